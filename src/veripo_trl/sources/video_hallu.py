"""VideoHallu: questions on generated videos that break physics or common sense.

Source: https://github.com/zli12321/VideoHallu (on the Hub: physbench_train_split.json 1,000 rows and
synthetic_data_split.json 800, in Video-R1's columns; data.jsonl, the benchmark, 3,233: RowID, video_path,
Question, Answer, Categorization-1, Categorization-2), arXiv 2505.01481. Licence apache-2.0; PhysBench's
videos: own terms.
Metric: a language model judges. Ours is a proxy: the first word where the truth begins with yes or no, ROUGE
elsewhere; not to be quoted beside theirs.
Traps: `problem` is null in 424 of the 1,000: 1,376 of 1,800 rows can be used. problem_id is a float, of which
58 differ: the id is the row's index. All 246 synthetic training videos are videos of the benchmark: with
synthetic_data_split.json beside data.jsonl, benchmark rows are told apart by it. 12 of these repeat a question: 5
with the same answer are left out, 7 have another; counted. 178 solutions of
PhysBench's, two of them in 226 rows: balance them by `where` and `limit`.
"""

import json
from os.path import normpath
from pathlib import Path

from veripo_trl.answers.yes_no import read_yes_no
from veripo_trl.sources.record import text, untagged

NAME = "VideoHallu"
VIDEOS = "<path> or <video_path>, as in the rows"


def records(content: list[dict], *, file: str) -> list[dict]:
    kind, trained = Path(file).name[:3], Path(file).with_name("synthetic_data_split.json")
    numbered, asked = [], {}
    for index, record in enumerate(content):
        key = record.get("video_path"), record.get("Question")
        numbered.append({**record, "id": f"vh-{kind}-{index:04d}", "earlier": asked.get(key)})
        if "RowID" in record:
            asked[key] = record["Answer"]
    if not asked or not trained.is_file():
        return numbered
    seen = {normpath(row["path"]) for row in json.loads(trained.read_text(encoding="utf-8"))}
    return [{**row, "in_training": normpath(row["video_path"]) in seen} for row in numbered]


def convert(record: dict, *, file: str) -> list[dict | str]:
    counted: list[dict | str] = []
    if "RowID" in record:
        if record["earlier"] == record["Answer"]:
            return ["left out: asked before of the same video"]
        if record["earlier"] is not None:
            counted.append("said: asked before of the same video, with another answer")
        fields, categories = ("Question", "video_path", "Answer"), {}
        kinds = [record[name] for name in ("Categorization-1", "Categorization-2")]
        categories["kind"] = [str(kind) for kind in kinds if kind]
        if "in_training" not in record:
            counted.append("said: not known whether its video is in the training data")
        else:
            seen = record["in_training"]
            categories["video"] = "also in the training data" if seen else "held out"
    elif record["problem"] is None:
        return ["left out: no problem (null)"]
    else:
        fields, categories = ("problem", "path", "solution"), {}
        if record["id"].startswith("vh-syn"):
            counted.append(
                "said: its video is in VideoHallu's benchmark too, so that is not held out"
            )
    problem, path, solution = (text(record, field) for field in fields)
    solution = untagged(solution, "answer").strip()
    row = {
        "question_id": record["id"],
        "problem": problem,
        "problem_type": "yes/no" if read_yes_no(solution) else "free-form",
        "solution": solution,
        "videos": [path],
        "categories": categories,
    }
    return [*counted, row]
