"""VSI-Bench: spatial understanding of indoor videos; choices, and estimates of numbers.

Source: https://huggingface.co/datasets/nyu-visionx/VSI-Bench (test-00000-of-00001.parquet or test.jsonl),
arXiv 2412.14171. Columns: id, dataset, scene_name, question_type, question, ground_truth, options (null for
numbers).
Licence: its page's, not looked at here. Videos: the dataset's three zip files, unpacked:
VSI-Bench/<dataset>/<scene_name>.mp4.
Metric: accuracy of choices, mean relative accuracy of numbers. The benchmark's own total is the mean of eight
tasks, the three levels of relative direction being averaged into one first; VerIPO's script takes the mean of
all rows.
"""

import re

NAME = "VSI-Bench"
VIDEOS = "VSI-Bench/<arkitscenes|scannet|scannetpp>/<scene_name>.mp4"
NUMERIC = (
    "object_abs_distance",
    "object_counting",
    "object_size_estimation",
    "room_size_estimation",
)
# Released rows do not say their task. These patterns match each of their 5,130 questions exactly once.
_TASKS = {
    "object_counting": r"^How many .+ are in this room\?",
    "object_abs_distance": r"what is the (direct )?distance between",
    "object_size_estimation": r"length of the longest dimension",
    "room_size_estimation": r"size of this room",
    "object_rel_distance": r"which of these objects .*is the closest to",
    "obj_appearance_order": r"first-time appearance order",
    "route_planning": r"You are a robot",
    "object_rel_direction": r"^If I am standing by",
}
_LEVELS = {2: "easy", 3: "medium", 4: "hard"}  # of relative direction, by the number of options


def convert(record: dict, *, file: str) -> list[dict]:
    kind = record["question_type"]
    numeric = kind in NUMERIC
    return [
        {
            "question_id": f"vsi_bench_{record['id']}",
            "problem": record["question"],
            "options": [] if numeric else list(record["options"]),
            "problem_type": "regression" if numeric else "multiple choice",
            "solution": str(record["ground_truth"]),
            "videos": [f"VSI-Bench/{record['dataset']}/{record['scene_name']}.mp4"],
            "categories": _categories(kind, numeric),
        }
    ]


def categories_of_released(row: dict) -> dict:
    question = row.get("question") or row["processed_question"]
    found = [task for task, pattern in _TASKS.items() if re.search(pattern, question, re.DOTALL)]
    kind = found[0] if len(found) == 1 else "unknown"
    if kind == "object_rel_direction":
        kind += f"_{_LEVELS.get(len(row.get('options') or ()), 'unknown')}"
    return _categories(kind, numeric="options" not in row)


def _categories(kind: str, numeric: bool) -> dict:
    return {"part": "numeric" if numeric else "choice", "task": kind}


def totals(by_category: dict[str, dict]) -> dict[str, float]:
    """Totals beside the mean of all rows, of the scores of each category's values: arrays, their first axis rows."""
    known = {
        task: scores.mean(axis=0)
        for task, scores in by_category["task"].items()
        if not task.endswith("unknown")
    }
    if not known:
        return {}
    levels = [mean for task, mean in known.items() if task.startswith("object_rel_direction")]
    tasks = [mean for task, mean in known.items() if not task.startswith("object_rel_direction")]
    tasks += [sum(levels) / len(levels)] if levels else []
    left_out = sum(len(scores) for task, scores in by_category["task"].items() if task not in known)
    more = f"; {left_out} rows of no known task left out" if left_out else ""
    return {
        f"mean of {len(tasks)} tasks (the benchmark's own total{more})": sum(tasks) / len(tasks)
    }
