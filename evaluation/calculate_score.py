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
from veripo_trl.data.rows import RowError, read_json
from veripo_trl.errors import run
from veripo_trl.evaluate.generate import RESAMPLES
from veripo_trl.evaluate.questions import content_hash, read_predictions, task_of
from veripo_trl.evaluate.scores import (
    by_category,
    compare_scores,
    our_score,
    released_metric,
    released_score,
    score_predictions,
    summarize_scores,
)
from veripo_trl.files.tables import print_table, printable, write_json

BY_NAME = {benchmark.NAME: benchmark for benchmark in BENCHMARKS.values()}
PLOTTED = 60  # lines of the table at most; a picture has a largest size
LABEL_CHARS = 50


def benchmark_of(row: dict) -> tuple[str, dict]:
    """(benchmark, categories) of a row: released rows name it in their video path, ours in `data_source`."""
    if "processed_question" not in row:
        return row.get("data_source") or "questions", {k: v for k, v in (row.get("categories") or {}).items() if v}
    path = str(row["video_path"])
    name = path.split("/")[0] if "/" in path else "questions"
    find = getattr(BY_NAME.get(name), "categories_of_released", None)  # of those whose released rows tell some
    return name, find(row) if find else {}


def read_with_record(path: Path) -> tuple[list[dict], list[dict] | None]:
    """Predictions and, where it lies beside them, what was recorded of each."""
    predictions = read_predictions(path)
    beside = path.with_suffix(".record.json")
    if not beside.is_file():
        return predictions, None
    record = read_json(beside)["rows"]
    hashes = [content_hash(item["question"]) for item in predictions]
    if [row["key"].split("-")[1] for row in record] != hashes:
        raise RowError(f"{beside} is of other predictions than {path.name}. Move it away, or fetch the one that belongs.")
    return predictions, record


def lines_of(scored: list[dict]) -> list[dict]:
    """The table: a line for each benchmark, under it one for each value of its categories."""
    lines = []
    for name in sorted({row["benchmark"] for row in scored}):
        rows = [row for row in scored if row["benchmark"] == name]
        lines.append({"benchmark": name, "category": "", "value": "", **summarize_scores(rows)})
        for category, values in by_category(rows).items():
            for value, some in values.items():
                lines.append({"benchmark": name, "category": category, "value": value, **summarize_scores(some)})
    return lines


def totals_of(scored: list[dict]) -> list[str]:
    """Sentences on how parts are combined, and a benchmark's own total where it is not the mean of its rows."""
    told = []
    for name in sorted({row["benchmark"] for row in scored}):
        rows = [row for row in scored if row["benchmark"] == name]
        groups = by_category(rows)
        totals = getattr(BY_NAME.get(name), "totals", None)
        if totals is None or not {"part", "task"} <= groups.keys():
            continue
        parts = {part: some for part, some in groups["part"].items()}
        shares = " + ".join(
            f"{len(some)} × {100 * np.mean([row['ours'] for row in some]):.2f}% ({part})" for part, some in parts.items()
        )
        mean = 100 * np.mean([row["ours"] for row in rows])
        told.append(f"{name}, ours: ({shares}) / {len(rows)} = {mean:.2f}%, the mean of all rows.")
        for mode in ("ours", "released"):
            values = {
                category: {value: [row[mode] for row in some] for value, some in found.items()}
                for category, found in groups.items()
            }
            for what, total, (low, high) in total_intervals(totals, values):
                told.append(f"{name}, {mode}: {100 * total:.2f}% (95% {100 * low:.1f}–{100 * high:.1f}), {what}.")
    return told


def total_intervals(totals, values: dict[str, dict[str, list[float]]]) -> list[tuple[str, float, tuple]]:
    """(what, total, 95% interval) of a benchmark's own totals; the bootstrap is over the rows of each value."""
    found = totals(values)
    rng = np.random.default_rng(0)
    means = {
        category: {value: rng.choice(some, (RESAMPLES, len(some))).mean(axis=1) for value, some in kinds.items()}
        for category, kinds in values.items()
    }
    drawn = [
        list(totals({c: {v: [mean[turn]] for v, mean in kinds.items()} for c, kinds in means.items()}).values())
        for turn in range(RESAMPLES)
    ]
    ends = [tuple(np.quantile(column, [0.025, 0.975])) for column in zip(*drawn)]
    return [(what, total, end) for (what, total), end in zip(found.items(), ends, strict=True)]


COLUMNS = {
    "rows": "rows",
    "ours": "ours %",
    "interval": "95%",
    "released": "released %",
    "unparsable": "unparsable %",
    "truncated": "truncated %",
    "inconsistency": "inconsistent %",
    "unknown": "unknown %",
    "think_length": "thinking",
}


def cells_of(line: dict) -> list[str]:
    """A line of the table as texts, in the order of COLUMNS."""
    shown = {"interval": f"{100 * line['ours_low']:.1f}–{100 * line['ours_high']:.1f}", "rows": str(line["rows"])}
    for name in COLUMNS:
        if name not in shown:
            value = line[name] * (1 if name == "think_length" else 100)
            shown[name] = "–" if math.isnan(value) else f"{value:.1f}"
    return [shown[name] for name in COLUMNS]


def table_of(lines: list[dict]) -> list[dict[str, str]]:
    names = [line["benchmark"] if not line["category"] else f"· {line['category']}: {line['value']}" for line in lines]
    head = ["benchmark", *COLUMNS.values()]
    return [dict(zip(head, [name, *cells_of(line)], strict=True)) for name, line in zip(names, lines, strict=True)]


def write_markdown(path: Path, table: list[dict[str, str]], notes: list[str]) -> None:
    def line(cells):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join([" --- "] + [" ---: "] * (len(table[0]) - 1)) + "|"
    body = [line(table[0]), rule, *(line(row.values()) for row in table), "", *(f"- {note}" for note in notes)]
    path.write_text("\n".join(body) + "\n", encoding="utf-8")


def plot(path: Path, lines: list[dict], title: str) -> None:
    """Accuracy with its interval, and inconsistency, line by line: of the first `PLOTTED` lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if len(lines) > PLOTTED:
        title, lines = f"{title}: the first {PLOTTED} of {len(lines)} lines", lines[:PLOTTED]
    names = [line["benchmark"] if not line["category"] else f"{line['category']}: {line['value']}" for line in lines]
    names = [name if len(name) <= LABEL_CHARS else name[: LABEL_CHARS - 1] + "…" for name in names]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 1.4 + 0.28 * len(lines)), sharey=True)
    places = np.arange(len(lines))[::-1]
    ours = np.array([100 * line["ours"] for line in lines])
    ends = np.array([[100 * line["ours_low"], 100 * line["ours_high"]] for line in lines]).T
    axes[0].barh(places, ours, xerr=np.abs(ends - ours), height=0.6, color="#4477aa", ecolor="#222222", label="ours")
    axes[0].plot([100 * line["released"] for line in lines], places, "o", color="#ee6677", ms=4, label="released")
    axes[0].set(xlim=(0, 100), xlabel="accuracy %")
    axes[0].set_yticks(places, names, parse_math=False)  # a dollar in a category's name is a dollar
    axes[0].legend(fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))  # above: bars may fill the axes
    axes[1].barh(places, [100 * line["inconsistency"] for line in lines], height=0.6, color="#ccbb44")
    axes[1].set(xlabel="inconsistent % (of the outputs whose verdict is known)")
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def notes_on(scored: list[dict], record, tokenizer, pred_path: str) -> list[str]:
    """What has to be known to read the table."""
    unit = "tokens" if tokenizer is not None or (record and any("think_tokens" in row for row in record)) else "words"
    notes = [f"thinking: mean length in {unit}, of the rows that were answered."]
    notes.append("inconsistent: of the outputs whose verdict is known, by the rules judge; unknown: of all outputs.")
    if record is None:
        notes.append("There is no .record.json beside the predictions: truncation is not known.")
    if failed := sum(row["failed"] for row in scored):
        notes.append(f"{failed} rows were never answered and count as wrong.")
    notes += timeout_notes(sum(row["timeouts"] for row in scored))
    if any(row["problem_type"] == "regression" for row in scored):
        notes += metric_notes(pred_path)
    return notes + totals_of(scored)


def timeout_notes(count: int) -> list[str]:
    if not count:
        return []
    return [f"ours: maths comparisons that took over {MATH_LIMIT_S:g} s and count as not equal: {count}."]


def metric_notes(pred_path: str) -> list[str]:
    """For a file with estimates: which metric the released script takes for them here."""
    if "vsi_bench" in pred_path:
        return []
    return [
        'released: the script takes mean relative accuracy only where the path holds "vsi_bench"; this one does not, '
        "so numbers went through math-verify."
    ]


def score(args) -> None:
    path = Path(args.pred_path)
    predictions, record = read_with_record(path)
    tokenizer = None
    if args.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    scored = score_predictions(
        predictions,
        pred_path=args.pred_path,
        record=record,
        tokenizer=tokenizer,
        benchmark_of=benchmark_of,
        progress=lambda items: tqdm(items, desc="score", unit="row"),
    )
    lines, overall = lines_of(scored), summarize_scores(scored)
    if len({row["benchmark"] for row in scored}) > 1:
        lines.insert(0, {"benchmark": "all", "category": "", "value": "", **overall})
    notes = notes_on(scored, record, tokenizer, args.pred_path)
    table = table_of(lines)
    print_table(path.stem, table)
    print("", *map(printable, notes), sep="\n")
    rows = [{"position": place, **row} for place, row in enumerate(scored)]
    write_json(path.with_suffix(".scores.json"), {"lines": lines, "notes": notes, "rows": rows})
    write_markdown(path.with_suffix(".scores.md"), table, notes)
    plot(path.with_suffix(".scores.png"), lines, path.stem)
    print(f"written: {path.with_suffix('.scores.json')}, .md and .png")
    # The mean as the released script forms it, so that the printed figure is its own to the last digit.
    print(f"ours: {overall['ours'] * 100:.2f}%")
    print(f"released: {overall['released'] * 100:.2f}%")


def by_question(name: str) -> tuple[dict[tuple, dict], bool]:
    """({question: position, prediction, failed}, whether failed rows are known) of a file.

    A question is its content, and which of equal ones it is.
    """
    predictions, record = read_with_record(Path(name))
    seen, found = Counter(), {}
    for position, prediction in enumerate(predictions):
        key = content_hash(prediction["question"])
        failed = record is not None and "error" in record[position]
        found[key, seen[key]] = {"position": position, "prediction": prediction, "failed": failed}
        seen[key] += 1
    return found, record is not None


def pair_runs(names: list[str]) -> tuple[list[tuple[dict, dict]], list[str]]:
    """(pairs of a question's two entries, notes on what is left out). Rows without an answer say nothing of a model."""
    (first, first_known), (second, second_known) = (by_question(name) for name in names)
    both = [(entry, second[key]) for key, entry in first.items() if key in second]
    pairs = [pair for pair in both if not any(entry["failed"] for entry in pair)]
    left = [len(side) - len(both) for side in (first, second)]
    notes = [f"{len(both)} questions in both; left out: {left[0]} of the first, {left[1]} of the second."]
    failed = [sum(pair[side]["failed"] for pair in both) for side in (0, 1)]
    if any(failed):
        notes.append(
            f"Never answered: {failed[0]} of the first, {failed[1]} of the second; {len(both) - len(pairs)} questions "
            f"are left out for it, {len(pairs)} are compared."
        )
    for name, known in zip(names, (first_known, second_known), strict=True):
        if not known:
            notes.append(f"There is no .record.json beside {name}: rows that were never answered count as wrong there.")
    if not pairs:
        raise RowError(f"{names[0]} and {names[1]} have no answered question in common. {' '.join(notes)}")
    return pairs, notes


def compare(args) -> None:
    """Two runs on the same questions: the difference, its interval, and whether it may be chance."""
    names, timeouts = args.compare, math_timeouts()
    pairs, notes = pair_runs(names)
    sides = [[pair[side]["prediction"] for pair in pairs] for side in (0, 1)]
    metrics = [
        [released_metric(str(prediction["ground_truth"]), pred_path=name) for prediction in side]
        for name, side in zip(names, sides, strict=True)
    ]
    modes = ["ours", "released"] if metrics[0] == metrics[1] else ["ours"]
    if "released" in modes:
        if any(task_of(prediction["question"])["problem_type"] == "regression" for prediction in sides[0]):
            notes += metric_notes(names[0])
    else:
        notes.append(
            'released: not compared. The script takes mean relative accuracy only where the path holds "vsi_bench", '
            "which is so for one of these two, so that their scores are of two metrics. Rename one of them."
        )
    results, rows = {}, [{"positions": [entry["position"] for entry in pair]} for pair in pairs]
    for mode in modes:
        scores = [
            np.array(
                [
                    our_score(prediction) if mode == "ours" else released_score(prediction, pred_path=name)
                    for prediction in tqdm(side, desc=f"{Path(name).stem}, {mode}", unit="row")
                ]
            )
            for name, side in zip(names, sides, strict=True)
        ]
        ends = {"first": float(scores[0].mean()), "second": float(scores[1].mean())}
        results[mode] = {**ends, **compare_scores(*scores)}
        for row, pair in zip(rows, np.stack(scores, axis=1).tolist(), strict=True):
            row[mode] = pair
    notes += timeout_notes(math_timeouts() - timeouts)
    print(*map(printable, notes), sep="\n")
    for mode, found in results.items():
        print(
            f"{mode}: {100 * found['first']:.2f}% → {100 * found['second']:.2f}%, difference "
            f"{100 * found['difference']:+.2f} points (95% {100 * found['low']:+.2f} to {100 * found['high']:+.2f}), "
            f"p = {found['p']:.3g} ({found['test']}; better on {found['better']}, worse on {found['worse']})"
        )
    path = Path(names[1])
    content = {"files": names, "questions": len(pairs), "results": results, "notes": notes, "rows": rows}
    write_json(path.with_suffix(".compare.json"), content)
    notes = [f"first: {names[0]}", f"second: {names[1]}", *notes]
    write_markdown(path.with_suffix(".compare.md"), comparison_table(results), notes)
    print(f"written: {path.with_suffix('.compare.json')} and .md")


def comparison_table(results: dict[str, dict]) -> list[dict[str, str]]:
    return [
        {
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
        for mode, found in results.items()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pred_path", help="a file of predictions")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two files of predictions on the same questions")
    parser.add_argument("--tokenizer", help="count thinking in its tokens (default: as recorded, or words)")
    args = parser.parse_args(argv)
    if (args.pred_path is None) == (args.compare is None):
        parser.error("give --pred_path, or --compare A B")
    if args.compare:
        compare(args)
    else:
        score(args)


if __name__ == "__main__":
    sys.exit(run(main))
