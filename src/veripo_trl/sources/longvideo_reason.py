"""LongVideo-Reason, LongVILA-R1's questions on long videos.

Source: https://github.com/NVlabs/Long-RL (rows of the kind its training scripts read), arXiv 2507.07966: 104K
questions of 18K videos, 36K with thinking for SFT, 68K for RL; 1K for evaluation. Licence: own terms; the videos
are of other sets. Columns: problem (options in its last lines), answer ("<answer>A</answer>"), videos (one path).
The file was not seen; the columns are those that its code reads.
Traps: there is no id, so the row's index is in it; open questions, which are rewarded by a judge there, are left
out; more than one video is refused there at the step, here when the rows load.
"""

from veripo_trl.data.schema import FieldError, show
from veripo_trl.sources.record import indexed, read_options, text, untagged

NAME = "LongVideo-Reason"


records = indexed


def convert(record: dict, *, file: str) -> list[dict | str]:
    videos = record["videos"]
    if isinstance(videos, list):
        if len(videos) != 1:
            raise FieldError("videos", "one path", show(videos))
        videos = videos[0]
    problem = text(record, "problem")
    if not (options := read_options(problem)):
        return ["left out: an open question"]
    return [
        {
            "question_id": f"lvr-{record['index']}",
            "problem": problem,
            "options": options,
            "problem_type": "multiple choice",
            "solution": untagged(record["answer"], "answer"),
            "videos": [text({"videos": videos}, "videos")],
        }
    ]
