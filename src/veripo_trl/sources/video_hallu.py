"""VideoHallu: questions on generated videos that break physics or common sense.

Source: https://github.com/zli12321/VideoHallu (on the Hub: physbench_train_split.json 1,000 rows and
synthetic_data_split.json 800, in Video-R1's columns; data.jsonl, the benchmark, 3,233: RowID, video_path,
Question, Answer, Categorization-1, Categorization-2), arXiv 2505.01481. Licence apache-2.0; PhysBench's
videos: own terms.
Metric: a language model judges. Ours is a proxy: the first word where the truth begins with yes or no, ROUGE
elsewhere; not to be quoted beside theirs.
Traps: `problem` is null in 424 of the 1,000: 1,376 of 1,800 rows can be used. problem_id is a float, of which
58 differ: the id is the row's index. All 246 synthetic training videos are videos of the benchmark: with
synthetic_data_split.json beside data.jsonl, benchmark rows are told apart by it. 178 solutions of
PhysBench's, two of them in 226 rows: balance them by `where` and `limit`.
"""

import json
from pathlib import Path

from veripo_trl.sources.record import text, untagged

NAME = "VideoHallu"
VIDEOS = "<path> or <video_path>, as in the rows"


def records(content: list[dict], *, file: str) -> list[dict]:
    kind, trained = Path(file).name[:3], Path(file).with_name("synthetic_data_split.json")
    if "RowID" not in content[0]:
        return [{**record, "id": f"vh-{kind}-{index:04d}"} for index, record in enumerate(content)]
    if not trained.is_file():
        return content
    seen = {Path(row["path"]).name for row in json.loads(trained.read_text(encoding="utf-8"))}
    return [{**row, "in_training": Path(row["video_path"]).name in seen} for row in content]


def convert(record: dict, *, file: str) -> list[dict | str]:
    counted: list[dict | str] = []
    if "RowID" in record:
        kinds = [record[name] for name in ("Categorization-1", "Categorization-2")]
        categories = {"kind": [str(kind) for kind in kinds if kind]}
        if "in_training" in record:
            categories["video"] = (
                "also in the training data" if record["in_training"] else "held out"
            )
        else:
            counted.append(
                "said: not known whether its video is in the training data (see the source's docstring)"
            )
        question_id, problem, path = (
            str(record["RowID"]),
            text(record, "Question"),
            text(record, "video_path"),
        )
        solution = text(record, "Answer")
    else:
        if record["problem"] is None:
            return ["left out: no problem (null)"]
        if record["id"].startswith("vh-syn"):
            counted.append(
                "said: its video is in VideoHallu's benchmark, which is not held out from it"
            )
        categories, question_id, problem, path = (
            {},
            record["id"],
            text(record, "problem"),
            text(record, "path"),
        )
        solution = untagged(text(record, "solution"), "answer").strip()
    first = solution.split()[0].strip(".,;:!").lower() if solution else ""
    row = {
        "question_id": question_id,
        "problem": problem,
        "options": [],
        "problem_type": "yes/no" if first in ("yes", "no") else "free-form",
        "solution": solution,
        "videos": [path],
        "data_source": NAME,
        "categories": categories,
    }
    return [*counted, row]
