"""Score what evaluation_vllm.py wrote: by our rules, and by the arithmetic of VerIPO's released script.

    python evaluation/calculate_score.py --pred_path outputs/vsi_bench.json
    python evaluation/calculate_score.py --compare outputs/before.json outputs/after.json

Writes <name>.scores.json, .scores.md and .scores.png beside the predictions; a comparison, .compare.json and
.compare.md beside the second file. Predictions of VerIPO's own script are read too; what only our record holds
(truncation, rows that were never answered, thinking length in tokens) is then missing or told in words.
"""

import argparse
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from benchmarks import BENCHMARKS
from tqdm import tqdm

from veripo_trl.answers.math_process import MATH_LIMIT_S, math_timeouts
from veripo_trl.data.schema import RowError
from veripo_trl.errors import run
from veripo_trl.evaluate.questions import content_hash, task_of
from veripo_trl.evaluate.scores import (
    by_category,
    compare_scores,
    lines_of,
    our_score,
    read_with_record,
    released_metric,
    released_score,
    score_predictions,
    summarize_scores,
    total_intervals,
)
from veripo_trl.files.tables import print_table, printable, write_json
from veripo_trl.report.plots import save_scores

BY_NAME = {benchmark.NAME: benchmark for benchmark in BENCHMARKS.values()}


def benchmark_of(row: dict) -> tuple[str, dict]:
    """(benchmark, categories) of a row: released rows name it in their video path, ours in `data_source`."""
    if "processed_question" not in row:
        return row.get("data_source") or "questions", {k: v for k, v in (row.get("categories") or {}).items() if v}
    path = str(row["video_path"])
    name = path.split("/")[0] if "/" in path else "questions"
    find = getattr(BY_NAME.get(name), "categories_of_released", None)  # of those whose released rows tell some
    return name, find(row) if find else {}


def totals_of(scored: list[dict]) -> list[str]:
    """Sentences on how parts are combined, and a benchmark's own total where it is not the mean of its rows."""
    told = []
    for name in sorted({row["benchmark"] for row in scored}):
        rows = [row for row in scored if row["benchmark"] == name]
        groups, totals = by_category(rows), getattr(BY_NAME.get(name), "totals", None)
        if totals is None or not {"part", "task"} <= groups.keys():
            continue
        means = {part: 100 * np.mean([row["ours"] for row in some]) for part, some in groups["part"].items()}
        shares = " + ".join(f"{len(groups['part'][part])} × {mean:.2f}% ({part})" for part, mean in means.items())
        mean = 100 * np.mean([row["ours"] for row in rows])
        told.append(f"{name}, ours: ({shares}) / {len(rows)} = {mean:.2f}%, the mean of all rows.")
        for mode in ("ours", "released"):
            for what, total, low, high in total_intervals(totals, groups, mode):
                told.append(f"{name}, {mode}: {100 * total:.2f}% (95% {100 * low:.1f}–{100 * high:.1f}), {what}.")
    return told


def table_of(lines: list[dict]) -> list[dict[str, str]]:
    def shown(value: float) -> str:
        return "–" if math.isnan(value) else f"{value:.1f}"

    return [
        {
            "benchmark": f"· {line['category']}: {line['value']}" if line["category"] else line["benchmark"],
            "rows": str(line["rows"]),
            "ours %": shown(100 * line["ours"]),
            "95%": f"{100 * line['ours_low']:.1f}–{100 * line['ours_high']:.1f}",
            "released %": shown(100 * line["released"]),
            "unparsable %": shown(100 * line["unparsable"]),
            "truncated %": shown(100 * line["truncated"]),
            "inconsistent %": shown(100 * line["inconsistency"]),
            "unknown %": shown(100 * line["unknown"]),
            "thinking": shown(line["think_length"]),
        }
        for line in lines
    ]


def write_markdown(path: Path, table: list[dict[str, str]], notes: list[str]) -> None:
    rows = [list(table[0]), *(row.values() for row in table)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "|".join([" --- "] + [" ---: "] * (len(table[0]) - 1)) + "|")
    path.write_text("\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n", encoding="utf-8")


def notes_on(scored: list[dict], predictions: list[dict], pred_path: str) -> list[str]:
    """What has to be known to read the table."""
    unit = "tokens" if any("think_tokens" in (item["made"] or {}) for item in predictions) else "words"
    notes = [f"thinking: mean length in {unit}, of the rows that were answered."]
    notes.append("inconsistent: of the outputs whose verdict is known, by the rules judge; unknown: of all outputs.")
    if predictions[0]["made"] is None:
        notes.append("There is no .record.json beside the predictions: truncation is not known.")
    if failed := sum(row["failed"] for row in scored):
        notes.append(f"{failed} rows were never answered and count as wrong.")
    notes += timeout_notes(sum(row["timeouts"] for row in scored))
    return notes + metric_notes(predictions, pred_path) + totals_of(scored)


def timeout_notes(count: int) -> list[str]:
    if not count:
        return []
    return [f"ours: maths comparisons that took over {MATH_LIMIT_S:g} s and count as not equal: {count}."]


def metric_notes(predictions: list[dict], pred_path: str) -> list[str]:
    """For a file with estimates: which metric the released script takes for them here."""
    kinds = (task_of(prediction["question"])["problem_type"] for prediction in predictions)
    if "vsi_bench" in pred_path or "regression" not in kinds:
        return []
    return [
        'released: the script takes mean relative accuracy only where the path holds "vsi_bench"; this one does not, '
        "so numbers went through math-verify."
    ]


def score(pred_path: str) -> None:
    path = Path(pred_path)
    predictions = read_with_record(path)
    scored = score_predictions(predictions, pred_path=pred_path, benchmark_of=benchmark_of)
    lines, notes = lines_of(scored), notes_on(scored, predictions, pred_path)
    table = table_of(lines)
    print_table(path.stem, table)
    print("", *map(printable, notes), sep="\n")
    rows = [{"position": position, **row} for position, row in enumerate(scored)]
    write_json(path.with_suffix(".scores.json"), {"lines": lines, "notes": notes, "rows": rows})
    write_markdown(path.with_suffix(".scores.md"), table, notes)
    save_scores(path.with_suffix(".scores.png"), lines, title=path.stem)
    print(f"written: {path.with_suffix('.scores.json')}, .md and .png")
    # The mean as the released script forms it, so that the printed figure is its own to the last digit.
    overall = summarize_scores(scored)
    print(f"ours: {overall['ours'] * 100:.2f}%")
    print(f"released: {overall['released'] * 100:.2f}%")


def by_question(predictions: list[dict]) -> dict[tuple, dict]:
    """{question: its prediction}. A question is its content, and which of equal ones it is."""
    seen, found = Counter(), {}
    for prediction in predictions:
        key = content_hash(prediction["question"])
        found[key, seen[key]] = prediction
        seen[key] += 1
    return found


def pair_runs(names: list[str]) -> tuple[list[tuple[dict, dict]], list[str]]:
    """(a question's two predictions each, notes on what is left out). Rows without an answer say nothing of a model."""
    first, second = (by_question(read_with_record(Path(name))) for name in names)
    both = [(prediction, second[key]) for key, prediction in first.items() if key in second]
    failed = [["error" in (prediction["made"] or {}) for prediction in pair] for pair in both]
    pairs = [pair for pair, fails in zip(both, failed, strict=True) if not any(fails)]
    left = [len(side) - len(both) for side in (first, second)]
    notes = [f"{len(both)} questions in both; left out: {left[0]} of the first, {left[1]} of the second."]
    if len(pairs) < len(both):
        counts = [sum(side) for side in zip(*failed)]
        notes.append(
            f"Never answered: {counts[0]} of the first, {counts[1]} of the second; {len(both) - len(pairs)} questions "
            f"are left out for it, {len(pairs)} are compared."
        )
    for name, side in zip(names, (first, second), strict=True):
        if next(iter(side.values()))["made"] is None:
            notes.append(f"There is no .record.json beside {name}: rows that were never answered count as wrong there.")
    if not pairs:
        raise RowError(f"{names[0]} and {names[1]} have no answered question in common. {' '.join(notes)}")
    return pairs, notes


def score_by(mode: str, side: list[dict], name: str) -> np.ndarray:
    bar = tqdm(side, desc=f"{Path(name).stem}, {mode}", unit="row")
    return np.array([our_score(item) if mode == "ours" else released_score(item, pred_path=name) for item in bar])


def compare(names: list[str]) -> None:
    """Two runs on the same questions: the difference, its interval, and whether it may be chance."""
    timeouts, modes = math_timeouts(), ["ours"]
    pairs, notes = pair_runs(names)
    sides = list(zip(*pairs, strict=True))
    metrics = [
        [released_metric(str(item["ground_truth"]), pred_path=name) for item in side]
        for name, side in zip(names, sides, strict=True)
    ]
    if metrics[0] == metrics[1]:
        modes.append("released")
        notes += metric_notes(sides[0], names[0])
    else:
        notes.append(
            'released: not compared. The script takes mean relative accuracy only where the path holds "vsi_bench", '
            "which is so for one of these two, so that their scores are of two metrics. Rename one of them."
        )
    results, rows = {}, [{"positions": [item["position"] for item in pair]} for pair in pairs]
    for mode in modes:
        first, second = (score_by(mode, side, name) for name, side in zip(names, sides, strict=True))
        ends = {"first": float(first.mean()), "second": float(second.mean())}
        results[mode] = {**ends, **compare_scores(first, second)}
        for row, *both in zip(rows, first.tolist(), second.tolist(), strict=True):
            row[mode] = both
    notes += timeout_notes(math_timeouts() - timeouts)
    print(*map(printable, notes), sep="\n")
    table = [comparison_row(mode, found) for mode, found in results.items()]
    for row, found in zip(table, results.values(), strict=True):
        print(
            f"{row['score']}: {row['first %']}% → {row['second %']}%, difference {row['difference']} points (95% "
            f"{row['95%']}), p = {row['p']} ({row['test']}; better on {found['better']}, worse on {found['worse']})"
        )
    path = Path(names[1])
    content = {"files": names, "questions": len(pairs), "results": results, "notes": notes, "rows": rows}
    write_json(path.with_suffix(".compare.json"), content)
    write_markdown(path.with_suffix(".compare.md"), table, [f"first: {names[0]}", f"second: {names[1]}", *notes])
    print(f"written: {path.with_suffix('.compare.json')} and .md")


def comparison_row(mode: str, found: dict) -> dict[str, str]:
    return {
        "score": mode,
        "first %": f"{100 * found['first']:.2f}",
        "second %": f"{100 * found['second']:.2f}",
        "difference": f"{100 * found['difference']:+.2f}",
        "95%": f"{100 * found['low']:+.2f} to {100 * found['high']:+.2f}",
        "p": f"{found['p']:.3g}",
        "test": str(found["test"]),
        "better on": str(found["better"]),
        "worse on": str(found["worse"]),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pred_path", help="a file of predictions")
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two files of predictions on the same questions")
    args = parser.parse_args(argv)
    if args.compare:
        compare(args.compare)
    else:
        score(args.pred_path)


if __name__ == "__main__":
    sys.exit(run(main))
