"""Video-R1's training rows, for SFT and RL.

Source: https://huggingface.co/datasets/Video-R1/Video-R1-data (Video-R1-COT-165k.json; Video-R1-260k.json, of
which 146,823 rows are of images), arXiv 2503.21776. Licence: card apache-2.0; the videos and images are of
many sets, each with terms of its own. Columns: problem_id, problem, data_type (image or video), problem_type,
options, solution ("<answer>…</answer>"), path ("./…" from the folder of the archives), data_source; COT also
process ("<think>…</think>"). There is no test split. Files with these columns are recognised: `source` may be
left out.
Traps: rows of ArxivQA are reported to leave data_source blank, it is a label only; VideoHallu's and PRIMO's
files look alike and have sources of their own.
"""

from veripo_trl.data.schema import FieldError, show
from veripo_trl.sources.record import text, untagged

NAME = "Video-R1"
ID = "problem_id"
COLUMNS = {"problem_id", "problem", "data_type", "problem_type", "solution", "path"}


def convert(record: dict, *, file: str) -> list[dict]:
    kind = record.get("data_type")
    if kind not in ("video", "image"):
        remedy = "Correct it or leave the rows out by `where`."
        raise FieldError("data_type", "'video' or 'image'", show(kind), remedy)
    return [
        {
            "question_id": record.get("problem_id"),
            **{field: record.get(field) for field in ("problem", "options", "problem_type")},
            "solution": untagged(record.get("solution"), "answer"),
            # The thinking keeps its white space: process + newline + solution is its target.
            "process": untagged(record.get("process"), "think"),
            "videos" if kind == "video" else "images": [text(record, "path")],
            "data_source": record.get("data_source") or None,
        }
    ]
