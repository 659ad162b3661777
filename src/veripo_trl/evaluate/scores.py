"""Scores of predictions: by our rules, and by the released script's arithmetic as it stands, faults included.

A prediction is what the evaluation scripts write: `{question: <row>, ground_truth, model_output}`; its `made` is what
the evaluation recorded of it, None where there is no record.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from veripo_trl.answers.math_process import call_math, math_timeouts
from veripo_trl.answers.objects import tube_metrics
from veripo_trl.answers.score import (
    answer_metrics,
    extract_answer,
    read_answer,
    score_answer,
    split_completion,
)
from veripo_trl.data.files import read_json
from veripo_trl.data.schema import RowError, show
from veripo_trl.evaluate.generate import RESAMPLES, bootstrap_interval, bootstrap_means, mean_metrics
from veripo_trl.evaluate.questions import content_hash, read_predictions, task_of, truths_of
from veripo_trl.verifier.checks import agreement, inconsistency
from veripo_trl.verifier.judges import Judge, judge_by_rules
from veripo_trl.verifier.verify import judge_stream, judged_item

PAIRED_RESAMPLES = 10_000
RELEASED_LIMIT_S = 30.0  # of processor time


def read_with_record(path: Path) -> list[dict]:
    """Predictions, each with its `position` and with what was `made` of it by the `.record.json` beside them."""
    predictions, beside = read_predictions(path), path.with_suffix(".record.json")
    record = read_json(beside)["rows"] if beside.is_file() else [None] * len(predictions)
    hashes = [content_hash(item["question"]) for item in predictions]
    if beside.is_file() and [row["key"].split("-")[1] for row in record] != hashes:
        raise RowError(f"{beside} is of other predictions than {path.name}. Move it away, or fetch the one that belongs.")
    return [{**item, "position": n, "made": row} for n, (item, row) in enumerate(zip(predictions, record, strict=True))]


BOXES = '{question_id: {"fps": 2, "truth": {frame: [x1, y1, x2, y2]}, "<id>": {frame: [x1, y1, x2, y2]}, …}}'


def read_boxes(path: Path, predictions: list[dict]) -> dict[str, dict]:
    """A file of the form `BOXES` as {question_id: what `objects.tube_metrics` takes}, for each row of object and time.

    Raises:
        RowError: another form, or a row without boxes.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise RowError(f"{path}: expected {BOXES}; came {show(content)}.")
    for name, entry in content.items():
        fields = {"fps": None, "truth": None, **entry} if isinstance(entry, dict) else {"(entry)": entry}
        for field, value in fields.items():
            if not _fits(field, value):
                raise RowError(f"{path}: question_id {name!r}, {field}: expected {BOXES}; came {show(value)}.")
    rows = [item["question"] for item in predictions if task_of(item["question"])["problem_type"] == "object and time"]
    ids = [str(row.get("question_id")) for row in rows]
    if not ids or (missing := [name for name in ids if name not in content]):
        lacks = f"no boxes of {len(missing)} of {len(ids)} such rows, {missing[0]!r} first" if ids else "no such row"
        raise RowError(f"{path}: expected the boxes of every row of object and time; came {lacks}.")
    return {name: {_number(field): value if field == "fps" else {int(frame): box for frame, box in value.items()}
                   for field, value in entry.items()} for name, entry in content.items()}  # fmt: skip


def _number(field: str) -> int | str:
    return int(field) if field.isdecimal() else field


def _fits(field: str, value: Any) -> bool:
    if field == "fps":
        return type(value) in (int, float) and 0 < value <= 1000
    if not isinstance(value, dict) or not (field.isdecimal() or (field == "truth" and value)):
        return False
    return all(frame.isdecimal() and _is_box(box) for frame, box in value.items())


def _is_box(box: Any) -> bool:
    numbers = isinstance(box, list) and [type(each) in (int, float) for each in box] == [True] * 4
    return numbers and -1e6 < box[0] < box[2] < 1e6 and -1e6 < box[1] < box[3] < 1e6


# ------------------------------------------------------------------------------------------------- released mode

_SPAN = re.compile("<answer>(.*?)</answer>", re.DOTALL)
_OTHERS = "abcdefghij"
_TOLERANCES = 1 - np.linspace(0.5, 0.95, int((0.95 - 0.5) / 0.05 + 2))  # the script's own line
# The one list of answers that the script knows, written as in the data, with and without its last quote.
_LISTED = {"['24/7', '3.429', '3.43]": "24/7", "['24/7', '3.429', '3.43']": "24/7"}


def released_score(prediction: dict[str, Any], *, pred_path: str) -> float:
    """What the released script gives one row.

    Upper-case letters as the truth: the first answer span, in lower case, holds them and no other letter from a to j
    (so "B. because" is wrong, and a truth of two such letters, "AC", is never met). Otherwise, where `pred_path` holds
    "vsi_bench": mean relative accuracy of the span's first word, divided by the truth rather than its size (so a
    negative truth accepts anything). Otherwise math-verify of the whole output, in the script's order of arguments; what
    its own limits (5 s a step) do not end is ended, and not equal, after RELEASED_LIMIT_S.
    """
    truth, output = str(prediction["ground_truth"]), prediction["model_output"]
    span = _SPAN.search(output)
    answer = span[1].strip() if span else ""
    if truth.isalpha() and truth.isupper():
        answer = answer.replace("<answer>", "").lower()
        wanted = truth.lower()
        return float(wanted in answer and not any(letter in answer for letter in _OTHERS if letter != wanted))
    if "vsi_bench" in pred_path:
        return _released_estimate(answer.replace("<answer>", "").strip(), truth)
    return float(call_math("released", output, _LISTED.get(truth, truth), limit_s=RELEASED_LIMIT_S)[1] is True)


def _released_estimate(answer: str, truth: str) -> float:
    try:
        value = float(answer.strip("$").split(" ")[0].rstrip(".").strip())
        target = float(truth.strip("$").strip())
        error = abs(value - target) / target
    except (ValueError, ZeroDivisionError, OverflowError):
        return 0.0
    return float((error <= _TOLERANCES).mean())


# ----------------------------------------------------------------------------------------------------- our mode


def our_score(prediction: dict[str, Any]) -> float:
    """Accuracy by `score_answer`, in [0, 1]: the answer span against the row's truth, or the best of several truths."""
    row = prediction["question"]
    task, answer = task_of(row), extract_answer(prediction["model_output"])
    return max(score_answer(answer, **{**task, "solution": truth}) for truth in truths_of(row))


def is_readable(prediction: dict[str, Any]) -> bool:
    """Whether the output has one answer span that can be read as an answer of its row's kind."""
    task, answer = task_of(prediction["question"]), extract_answer(prediction["model_output"])
    return read_answer(answer, problem_type=task["problem_type"], options=task["options"]) is not None


def score_predictions(
    predictions: list[dict],
    *,
    pred_path: str,
    benchmark_of: Callable[[dict], tuple[str, dict]],
    boxes: dict[str, dict] | None = None,
) -> list[dict]:
    """One flat dict per prediction.

    Args:
        predictions: as `read_with_record` gives them.
        benchmark_of: a row's (benchmark, {category: value or list of values}).
        boxes: from `read_boxes`; rows of object and time then have `objects.tube_metrics` too.

    Returns:
        `ours`, `released`, `metrics` (`score.answer_metrics`, by the first truth), `benchmark`, `categories`,
        `problem_type`, `readable`, `truncated` (None if not known),
        `failed` (the row was never answered), `consistency`, `think_length` (tokens as recorded, or words), `timeouts`
        (maths comparisons of ours that ran into their time limit and count as unequal).
    """
    scored = []
    for prediction in tqdm(predictions, desc="score", unit="row"):
        timeouts, made, output = math_timeouts(), prediction["made"] or {}, prediction["model_output"]
        task = task_of(prediction["question"])
        benchmark, categories = benchmark_of(prediction["question"])
        answer = extract_answer(output)
        metrics, ours = answer_metrics(answer, **task), our_score(prediction)
        if "ROUGE" in metrics:
            metrics["ROUGE"] = ours  # of several truths the best, as in `ours`
        if boxes and task["problem_type"] == "object and time":
            said = read_answer(answer, problem_type=task["problem_type"], options=task["options"])
            metrics |= tube_metrics(said, boxes[str(prediction["question"]["question_id"])])
        scored.append(
            {
                "ours": ours,
                "released": released_score(prediction, pred_path=pred_path),
                "metrics": metrics,
                "benchmark": benchmark,
                "categories": categories,
                "problem_type": task["problem_type"],
                "readable": is_readable(prediction),
                "truncated": made["finish_reason"] == "length" if "finish_reason" in made else None,
                "failed": "error" in made,
                "consistency": judge_by_rules(output, problem_type=task["problem_type"], options=task["options"]),
                "think_length": made.get("think_tokens", len((split_completion(output)[0] or "").split())),
                "timeouts": math_timeouts() - timeouts,
            }
        )
    return scored


def add_verdicts(scored: list[dict], predictions: list[dict], judge: Judge, cache) -> None:
    """Give each scored prediction `judged`, a judge's verdict on its consistency beside that of the rules."""
    tasks = [task_of(item["question"]) for item in predictions]
    items = [
        judged_item(item["model_output"], problem_type=task["problem_type"], options=task["options"])
        for item, task in zip(predictions, tasks, strict=True)
    ]
    said = tqdm(judge_stream(items, judge=judge, cache=cache), desc="judge", unit="row", total=len(items))
    for row, verdict in zip(scored, said, strict=True):
        row["judged"] = verdict["consistency"]


def add_correctness(scored: list[dict], predictions: list[dict], judge: Judge, cache) -> None:
    """Give each prediction of free text `right`: 1 where a judge finds the answer right, 0 where not or unknown, and the
    `verdict` itself; None where our rules score the type."""
    places = [place for place, row in enumerate(scored) if row["problem_type"] == "free-form"]
    items = []
    for place in places:
        row = predictions[place]["question"]
        answer, truths = extract_answer(predictions[place]["model_output"]), truths_of(row)
        problem = str(row.get("processed_question") or row["problem"])
        task = {"problem_type": "free-form", "options": None}
        items.append({"question": problem, "think": "\n".join(truths), "answer": answer, **task})
    said = list(tqdm(judge_stream(items, judge=judge, cache=cache), desc="judge", unit="answer", total=len(items)))
    for row in scored:
        row["right"] = None
    for place, verdict in zip(places, said, strict=True):
        scored[place] |= {"right": float(verdict["consistency"] == "consistent"), "verdict": verdict["consistency"]}


def judged_means(scored: list[dict]) -> dict[str, float]:
    """What `add_verdicts` and `add_correctness` add to a summary: `judge_inconsistency`, `judge_unknown`, `agreement` and
    `kappa` of the judge and the rules, and `ours_judged`: `ours` with free text by the judge in place of ROUGE."""
    found = {}
    if "judged" in scored[0]:
        verdicts = [row["judged"] for row in scored]
        found = agreement([row["consistency"] for row in scored], verdicts)
        found["judge_inconsistency"] = inconsistency(Counter(verdicts))
        found["judge_unknown"] = verdicts.count("unknown") / len(scored)
    if "right" in scored[0]:
        found["ours_judged"] = float(np.mean([row["ours"] if row["right"] is None else row["right"] for row in scored]))
    return found


# ----------------------------------------------------------------------------------------------------- summaries


def summarize_scores(scored: list[dict]) -> dict[str, float | int]:
    """Means of scored predictions.

    Returns:
        `rows`, `failed` (counted as wrong), `ours` with `ours_low`, `ours_high` (95% bootstrap over rows), `released`,
        `unparsable` (share without a readable answer), `truncated` (share of the rows where it is known, else NaN),
        `inconsistency` (`verifier.checks.inconsistency`), `unknown` (share), `think_length` (mean over rows that were
        answered), `timeouts` (sum); what `judged_means` gives; `official`, where each has it; the types' own metrics, as
        `mIoU: <problem type>`.
    """
    ours = np.array([row["ours"] for row in scored])
    low, high = bootstrap_interval(ours, np.arange(len(ours)))
    verdicts = Counter(row["consistency"] for row in scored)
    truncated = [row["truncated"] for row in scored if row["truncated"] is not None]
    official = [row.get("official") for row in scored]
    lengths = [row["think_length"] for row in scored if not row["failed"]]
    return {
        "rows": len(scored),
        "failed": sum(row["failed"] for row in scored),
        "ours": float(ours.mean()),
        "ours_low": low,
        "ours_high": high,
        "released": sum(row["released"] for row in scored) / len(scored),
        "unparsable": 1.0 - float(np.mean([row["readable"] for row in scored])),
        "truncated": float(np.mean(truncated)) if truncated else math.nan,
        "inconsistency": inconsistency(verdicts),
        "unknown": verdicts["unknown"] / len(scored),
        "think_length": float(np.mean(lengths)) if lengths else math.nan,
        "timeouts": sum(row["timeouts"] for row in scored),
        **judged_means(scored),
        **({} if None in official else {"official": sum(official) / len(scored)}),
        **mean_metrics([row["metrics"] for row in scored], [row["problem_type"] for row in scored]),
    }


def lines_of(scored: list[dict]) -> list[dict]:
    """The table: a line for all if there are several benchmarks; one for each, under it those of its categories."""
    names = sorted({row["benchmark"] for row in scored})
    lines = [_line("all", scored)] if len(names) > 1 else []
    for name in names:
        rows = [row for row in scored if row["benchmark"] == name]
        lines.append(_line(name, rows))
        for category, values in by_category(rows).items():
            lines += [_line(name, some, category, value) for value, some in values.items()]
    return lines


def _line(benchmark: str, rows: list[dict], category: str = "", value: str = "") -> dict:
    return {"benchmark": benchmark, "category": category, "value": value, **summarize_scores(rows)}


def total_intervals(totals: Callable[[dict], dict], groups: dict, mode: str) -> list[tuple[str, float, float, float]]:
    """(what, total, low, high) of a benchmark's own totals; the bootstrap is over the rows of each value.

    Args:
        totals: of {category: {value: scores}}, arrays (rows,) or (rows, draws), makes {what: mean or means (draws,)}.
        groups: from `by_category`. mode: "ours" or "released".
    """
    rng = np.random.default_rng(0)
    scores = {c: {v: np.array([row[mode] for row in some]) for v, some in kinds.items()} for c, kinds in groups.items()}
    drawn = {
        category: {value: rng.choice(some, (RESAMPLES, len(some))).T for value, some in kinds.items()}
        for category, kinds in scores.items()
    }
    found = zip(totals(scores).items(), totals(drawn).values(), strict=True)
    return [(what, total, *np.quantile(means, [0.025, 0.975])) for (what, total), means in found]


def by_category(scored: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """{category: {value: rows}}, values sorted; a row with several values of one category is in each."""
    found: dict[str, dict[str, list[dict]]] = {}
    for row in scored:
        for category, values in row["categories"].items():
            for value in [values] if isinstance(values, str) else values:
                found.setdefault(category, {}).setdefault(value, []).append(row)
    return {category: dict(sorted(values.items())) for category, values in found.items()}


# ----------------------------------------------------------------------------------------------------- comparison


def compare_scores(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> dict[str, float | str]:
    """Two runs on the same questions, score by score.

    Returns:
        `first`, `second` (means), `difference` (second − first) with `low` and `high` (95% paired bootstrap), `p`,
        `test`: "McNemar, exact" where every score is 0 or 1, else "paired permutation"; `better`, `worse` (questions on
        which the second is).
    """
    differences = second - first
    better, worse, count = int((differences > 0).sum()), int((differences < 0).sum()), len(differences)
    means = bootstrap_means(differences, np.arange(count), resamples=PAIRED_RESAMPLES, seed=seed)
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    if np.isin([first, second], (0.0, 1.0)).all():
        p, test = mcnemar_p(better, worse), "McNemar, exact"
    else:
        p, test = permutation_p(differences, seed=seed), "paired permutation"
    ends = {"first": float(first.mean()), "second": float(second.mean()), "difference": float(differences.mean())}
    return {**ends, "low": low, "high": high, "p": p, "test": test, "better": better, "worse": worse}


def mcnemar_p(better: int, worse: int) -> float:
    """Two-sided exact p of a split of `better + worse` discordant pairs, each side as likely."""
    count = better + worse
    tail = sum(math.comb(count, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**count)  # Python's integers: exact until the division


def permutation_p(differences: np.ndarray, *, seed: int = 0) -> float:
    """Two-sided p of a mean difference where the two runs' scores are swapped on each question by a coin: McNemar's test
    for scores between 0 and 1. With few questions that differ it stays large, where a bootstrap's would not."""
    changed, rng = differences[differences != 0], np.random.default_rng(seed)
    least = abs(changed.sum()) - 1e-9  # sums in another order round otherwise
    draws = (abs(changed @ rng.choice((-1.0, 1.0), len(changed))) for _ in range(PAIRED_RESAMPLES))
    # one is added on both sides: drawing never shows that something is impossible
    return (sum(drawn >= least for drawn in draws).item() + 1) / (PAIRED_RESAMPLES + 1)
