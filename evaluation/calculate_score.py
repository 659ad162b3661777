"""Score what evaluation_vllm.py wrote: by our rules, and by the arithmetic of VerIPO's released script.

    python evaluation/calculate_score.py --pred_path outputs/vsi_bench.json
    python evaluation/calculate_score.py --compare outputs/before.json outputs/after.json

Writes <name>.scores.json, .scores.md and .scores.png beside the predictions. Predictions of VerIPO's own script are
read too; what only our record holds (truncation, thinking length in tokens) is then missing or told in words.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from benchmarks import BENCHMARKS
from tqdm import tqdm

from veripo_trl.questions import content_hash, read_records
from veripo_trl.rows import RowError
from veripo_trl.scoring import by_category, compare_scores, our_score, released_score, score_predictions
from veripo_trl.scoring import summarize_scores
from veripo_trl.tables import print_table, write_json

BY_NAME = {benchmark.NAME: benchmark for benchmark in BENCHMARKS.values()}


def benchmark_of(row: dict) -> tuple[str, dict]:
    """(benchmark, categories) of a row: released rows name it in their video path, ours in `data_source`."""
    if "processed_question" not in row:
        return row.get("data_source") or "questions", {k: v for k, v in (row.get("categories") or {}).items() if v}
    name = row["video_path"].split("/")[0] if "/" in row["video_path"] else "questions"
    find = getattr(BY_NAME.get(name), "categories_of_released", None)  # of those whose released rows tell some
    return name, find(row) if find else {}


def read_predictions(path: Path) -> tuple[list[dict], list[dict] | None]:
    """Predictions and, where it lies beside them, what was recorded of each."""
    predictions = read_records(path)
    wanted = {"question", "ground_truth", "model_output"}
    if wrong := [place for place, item in enumerate(predictions) if not wanted <= item.keys()]:
        raise RowError(f"{path}, entry {wrong[0]}: expected question, ground_truth and model_output.")
    beside = path.with_suffix(".record.json")
    if not beside.is_file():
        return predictions, None
    record = json.loads(beside.read_text(encoding="utf-8"))["rows"]
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
            told += [f"{name}, {mode}: {100 * total:.2f}%, {what}." for what, total in totals(values).items()]
    return told


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
    """Accuracy with its interval, and inconsistency, line by line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [line["benchmark"] if not line["category"] else f"{line['category']}: {line['value']}" for line in lines]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 1.4 + 0.28 * len(lines)), sharey=True)
    places = np.arange(len(lines))[::-1]
    ours = np.array([100 * line["ours"] for line in lines])
    ends = np.array([[100 * line["ours_low"], 100 * line["ours_high"]] for line in lines]).T
    axes[0].barh(places, ours, xerr=np.abs(ends - ours), height=0.6, color="#4477aa", ecolor="#222222", label="ours")
    axes[0].plot([100 * line["released"] for line in lines], places, "o", color="#ee6677", ms=4, label="released")
    axes[0].set(xlim=(0, 100), xlabel="accuracy %", yticks=places, yticklabels=names)
    axes[0].legend(fontsize=8)
    axes[1].barh(places, [100 * line["inconsistency"] for line in lines], height=0.6, color="#ccbb44")
    axes[1].set(xlabel="inconsistent % (of the outputs whose verdict is known)")
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=11)
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
    numbers = any(row["problem_type"] == "regression" for row in scored)
    if numbers and "vsi_bench" not in pred_path:
        notes.append(
            'released: the script takes mean relative accuracy only where the path holds "vsi_bench"; this one does '
            "not, so numbers went through math-verify."
        )
    return notes + totals_of(scored)


def score(args) -> None:
    path = Path(args.pred_path)
    predictions, record = read_predictions(path)
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
    print("", *notes, sep="\n")
    rows = [{"position": place, **row} for place, row in enumerate(scored)]
    write_json(path.with_suffix(".scores.json"), {"lines": lines, "notes": notes, "rows": rows})
    write_markdown(path.with_suffix(".scores.md"), table, notes)
    plot(path.with_suffix(".scores.png"), lines, path.stem)
    print(f"written: {path.with_suffix('.scores.json')}, .md and .png")
    # The mean as the released script forms it, so that the printed figure is its own to the last digit.
    print(f"ours: {overall['ours'] * 100:.2f}%")
    print(f"released: {overall['released'] * 100:.2f}%")


def compare(args) -> None:
    """Pair two runs by question: its content, and which of equal questions it is."""
    sides = []
    for name in args.compare:
        predictions, _ = read_predictions(Path(name))
        seen, side = Counter(), {}
        for item in predictions:
            key = content_hash(item["question"])
            side[key, seen[key]] = item
            seen[key] += 1
        sides.append(side)
    keys = [key for key in sides[0] if key in sides[1]]
    if not keys:
        raise RowError(f"{args.compare[0]} and {args.compare[1]} have no question in common.")
    left = [len(side) - len(keys) for side in sides]
    print(f"{len(keys)} questions in both; left out: {left[0]} of the first, {left[1]} of the second")
    for mode in ("ours", "released"):
        first, second = (
            np.array(
                [
                    our_score(side[key]) if mode == "ours" else released_score(side[key], pred_path=name)
                    for key in tqdm(keys, desc=f"{Path(name).stem}, {mode}", unit="row")
                ]
            )
            for side, name in zip(sides, args.compare, strict=True)
        )
        found = compare_scores(first, second)
        print(
            f"{mode}: {100 * first.mean():.2f}% → {100 * second.mean():.2f}%, difference "
            f"{100 * found['difference']:+.2f} points (95% {100 * found['low']:+.2f} to {100 * found['high']:+.2f}), "
            f"p = {found['p']:.3g} ({found['test']}; better on {found['better']}, worse on {found['worse']})"
        )


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
    try:
        main()
    except RowError as error:
        sys.exit(str(error))
