"""PRIMO R1: how far a robot's task has come, from an image of the start, the video so far and an image of now.

Source: https://github.com/10-OASIS-01/PRIMO-R1 (on the Hub: primo-sft-json 116,755 rows, primo-rl-json
328,454, primo-bench-json 23,704 in 7 splits), arXiv 2603.15600. Licence: model card Apache-2.0; the data's
was not seen, its sources (AgiBot, BEHAVIOR-1K, RoboTwin) have their own. Columns: Video-R1's and
init_frame_path, current_frame_path; SFT also process, planning, observation, reasoning, select. 6.58 TB of
media; RoboTwin alone has 12.5 GB.
Metric: three in their evaluation, not comparable with each other; ours: `absolute_range` and mean absolute
error.
Traps: progress is called numerical there and scored by distance: regression here. Read as Video-R1's rows the
two images would be lost. Thinking is used where `select` is true and its three sections are there.
"""

from veripo_trl.sources.record import one_of, text, untagged

NAME = "PRIMO"
ID = "problem_id"
VIDEOS = "<path>, as in the rows"
TYPES = {"numerical": "regression", "boolean": "yes/no"}
TYPES |= {name: name for name in ("multiple choice", "regression", "OCR", "free-form")}
FRAMES = ("init_frame_path", "current_frame_path")
SECTIONS = ("planning", "observation", "reasoning")


def convert(record: dict, *, file: str) -> list[dict | str]:
    process = None
    if "select" in record:
        if record["select"] is not True:
            return ["left out: thinking that was not selected"]
        if not all(record.get(name) for name in ("process", *SECTIONS)):
            return ["left out: thinking without its sections"]
        process = "".join(
            f"<{name}>{untagged(text(record, name), name)}</{name}>" for name in SECTIONS
        )
    kind = TYPES[one_of(record, "problem_type", TYPES)]
    media = {"video": "videos", "image": "images"}[one_of(record, "data_type", ("video", "image"))]
    frames = FRAMES if any(record.get(name) for name in FRAMES) else ()
    row = {
        "question_id": record["problem_id"],
        "problem": text(record, "problem"),
        "options": record.get("options"),
        "problem_type": kind,
        "solution": untagged(text(record, "solution"), "answer").strip(),
        "process": process,
        "videos": [],
        "images": [],
        "data_source": record.get("data_source") or NAME,
    }
    row[media] = [text(record, "path")]
    row["images"] = row["images"] + [text(record, field) for field in frames]
    return [row]
