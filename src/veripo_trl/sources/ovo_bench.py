"""OVO-Bench: what was, what is and what will be, asked at a moment of a stream.

Source: https://github.com/JoeLeelyf/OVO-Bench (ovo_bench_new.json, a list of 1,640 of 644 videos), arXiv
2501.05510. Licence: code MIT, data CC BY-NC-SA 4.0. Columns: id, task, video, realtime, question, options,
answer, gt (an index from 0); the forward tasks REC, SSR and CRR have test_info, a list of {realtime, count or
type (0 no, 1 yes), step}: 1,567 queries. Videos: the official clips up to the moment of each question.
Metric: accuracy per task, mean of the tasks of a category, mean of the three categories. Some papers leave
the forward category out: told beside it.
Traps: `answer` differs from options[gt] in 420 of 1,468 rows (8 name another option): `gt` is taken, and
counted. The truth of HLD is "Unable to answer" in all 186 rows, so that one who always abstains has 100
there. Official letters, numbers and yes are looked for anywhere in the output.
"""

from veripo_trl.data.schema import FieldError, show
from veripo_trl.sources.record import LETTERS, lettered, mean_of_means, one_of, text

NAME = "OVO-Bench"
VIDEOS = "OVO-Bench/<id>.mp4, forward tasks <id>_<i>.mp4"
CATEGORIES = {
    **dict.fromkeys(("EPM", "HLD", "ASI"), "backward"),
    **dict.fromkeys(("OJR", "STU", "OCR", "ATR", "ACR", "FPD"), "real-time"),
    **dict.fromkeys(("REC", "CRR", "SSR"), "forward"),
}
STEP = "In a video of a procedure this step is described: {}\nIs somebody carrying it out just now, at the end?"
ENOUGH = "A question on the video: {}\nDoes what has been shown so far tell enough to answer it?"
COUNT = "How many times has this been done in the video so far: {}?"


def convert(record: dict, *, file: str) -> list[dict | str]:
    task = one_of(record, "task", CATEGORIES)
    base = {"categories": {"category": CATEGORIES[task], "task": task}}
    if CATEGORIES[task] == "forward":
        return [
            {**base, **_query(record, task, i, query)}
            for i, query in enumerate(record["test_info"])
        ]
    texts, right = [str(option) for option in record["options"]], record["gt"]
    if not isinstance(right, int) or not 0 <= right < len(texts):
        raise FieldError("gt", f"an index of {len(texts)} options", show(right))
    counted: list[dict | str] = []
    if record.get("answer") not in (texts[right], LETTERS[right]):
        counted.append("said: its answer is not the text of options[gt]; gt is taken")
    row = {
        "question_id": f"ovo-{record['id']}",
        "problem": text(record, "question"),
        "options": lettered(texts),
        "problem_type": "multiple choice",
        "solution": LETTERS[right],
        "videos": [f"OVO-Bench/{record['id']}.mp4"],
    }
    return [*counted, {**base, **row}]


def _query(record: dict, task: str, index: int, query: dict) -> dict:
    if task == "REC":
        problem = COUNT.format(text(record, "activity" if record.get("activity") else "question"))
        kind, solution = "numerical", str(query["count"])
    else:
        form, asked = (
            (STEP, text(query, "step")) if task == "SSR" else (ENOUGH, text(record, "question"))
        )
        problem = form.format(asked)
        kind, solution = "yes/no", ("no", "yes")[one_of(query, "type", (0, 1))]
    return {
        "question_id": f"ovo-{record['id']}-{index}",
        "problem": problem,
        "problem_type": kind,
        "solution": solution,
        "videos": [f"OVO-Bench/{record['id']}_{index}.mp4"],
    }


def totals(by_category: dict[str, dict]) -> dict[str, float]:
    """The mean of the categories' means of their tasks, and that of backward and real-time alone."""
    tasks: dict[str, dict] = {}
    for task, scores in by_category["task"].items():
        tasks.setdefault(CATEGORIES[task], {})[task] = scores
    means = {category: mean_of_means(some) for category, some in tasks.items()}
    what = f"mean of {len(means)} categories (the benchmark's own total is of 3)"
    found = {what: sum(means.values()) / len(means)}
    seen = [mean for category, mean in means.items() if category != "forward"]
    if 0 < len(seen) < len(means):
        found["of backward and real-time alone"] = sum(seen) / len(seen)
    return found
