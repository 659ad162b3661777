"""Score what evaluation_vllm.py wrote: by our rules, and by the arithmetic of VerIPO's released script.

    python evaluation/calculate_score.py --pred_path outputs/vsi_bench.json
    python evaluation/calculate_score.py --compare outputs/before.json outputs/after.json
    python evaluation/calculate_score.py --controls outputs/vsi_bench.json   # of evaluation_vllm.py --controls

Writes <name>.scores.json beside the predictions; a comparison, by our rules, .compare.json beside the second file.
Predictions of VerIPO's own script are read too; what only our record holds (truncation, rows that were never answered,
thinking length in tokens) is then missing or told in words.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import HfArgumentParser

from veripo_trl.answers.math_process import math_timeouts
from veripo_trl.data.official import find_source
from veripo_trl.errors import run
from veripo_trl.evaluate.compare import described, pair_runs, show_controls, timeout_notes
from veripo_trl.evaluate.questions import task_of, truths_of
from veripo_trl.evaluate.scores import (
    BOXES,
    add_correctness,
    add_verdicts,
    by_category,
    compare_scores,
    lines_of,
    our_score,
    read_boxes,
    read_with_record,
    score_predictions,
    summarize_scores,
    total_intervals,
)
from veripo_trl.files.tables import print_table, printable, write_json
from veripo_trl.recipe.verify_stage import JudgeArguments, make_judge, open_cache
from veripo_trl.report.read import table_of
from veripo_trl.sources import BENCHMARKS
from veripo_trl.verifier.checks import agreement

RELEASED_TYPES = ("multiple choice", "numerical", "regression", "math")
BY_NAME = {module.NAME: module for module in map(find_source, BENCHMARKS)}


def benchmark_of(row: dict) -> tuple[str, dict]:
    """(benchmark, categories) of a row: released rows name it in their video path, ours in `data_source`."""
    if "processed_question" not in row:
        return row.get("data_source") or "questions", {
            k: v for k, v in (row.get("categories") or {}).items() if v
        }
    path = str(row["video_path"])
    name = path.split("/")[0] if "/" in path else "questions"
    find = getattr(
        BY_NAME.get(name), "categories_of_released", None
    )  # of those whose released rows tell some
    return name, find(row) if find else {}


def totals_of(scored: list[dict]) -> list[str]:
    """Sentences on how parts are combined, and a benchmark's own total where it is not the mean of its rows."""
    told = []
    for name in sorted({row["benchmark"] for row in scored}):
        rows = [row for row in scored if row["benchmark"] == name]
        groups, totals = by_category(rows), getattr(BY_NAME.get(name), "totals", None)
        if "part" in groups:
            means = {
                part: 100 * np.mean([row["ours"] for row in some])
                for part, some in groups["part"].items()
            }
            shares = " + ".join(
                f"{len(groups['part'][part])} × {mean:.2f}% ({part})"
                for part, mean in means.items()
            )
            mean = 100 * np.mean([row["ours"] for row in rows])
            told.append(
                f"{name}, ours: ({shares}) / {len(rows)} = {mean:.2f}%, the mean of all rows."
            )
        if totals is None or "task" not in groups:
            continue
        for mode in ("ours", "released"):
            for what, total, low, high in total_intervals(totals, groups, mode):
                told.append(
                    f"{name}, {mode}: {100 * total:.2f}% (95% {100 * low:.1f}–{100 * high:.1f}), {what}."
                )
    return told


def notes_on(scored: list[dict], predictions: list[dict], pred_path: str) -> list[str]:
    """What has to be known to read the table."""
    unit = (
        "tokens" if any("think_tokens" in (item["made"] or {}) for item in predictions) else "words"
    )
    notes = [f"thinking: mean length in {unit}, of the rows that were answered."]
    notes.append(
        "inconsistent: of the outputs whose verdict is known, by the rules judge; unknown: of all outputs."
    )
    if predictions[0]["made"] is None:
        notes.append("There is no .record.json beside the predictions: truncation is not known.")
    if any(row["problem_type"] == "free-form" for row in scored):
        notes.append("ours: free text by its ROUGE, which is no accuracy.")
    if failed := sum(row["failed"] for row in scored):
        notes.append(f"{failed} rows were never answered and count as wrong.")
    if "vsi_bench" not in pred_path and any(row["problem_type"] == "regression" for row in scored):
        notes.append(
            'released: the script takes mean relative accuracy only where the path holds "vsi_bench"; this one does '
            "not, so numbers went through math-verify."
        )
    if unknown := sorted({row["problem_type"] for row in scored} - set(RELEASED_TYPES)):
        notes.append(
            "released: the script reads letters, numbers and formulas; of "
            f"{', '.join(unknown)} its arithmetic says nothing."
        )
    return notes + timeout_notes(sum(row["timeouts"] for row in scored)) + totals_of(scored)


def judge_rows(scored: list[dict], predictions: list[dict], arguments: JudgeArguments, path: Path) -> list[str]:
    """Ask a judge about consistency, and a model also whether free text is right; sentences on what it took."""
    judge = make_judge(arguments)
    with open_cache(arguments.verdict_cache, judge, beside=path) as cache:
        add_verdicts(scored, predictions, judge, cache)
        told = [f"judged: {judge.summary()} Agreement and kappa: with the rules' verdicts, unknown counted as one."]
        if judge.caches and any(row["problem_type"] == "free-form" for row in scored):
            judge = None  # a local one lets go of its weights before they are loaded again
            judge = make_judge(replace(arguments, judge_prompt="correctness"))
            add_correctness(scored, predictions, judge, cache)
            free = [row for row in scored if row["right"] is not None]
            by_rouge = ["consistent" if row["ours"] >= 0.5 else "inconsistent" for row in free]
            same = agreement(by_rouge, [row["verdict"] for row in free])
            told.append(
                f"free text: of {len(free)} answers {np.mean([row['right'] for row in free]):.1%} right by the judge "
                f"({sum(row['verdict'] == 'unknown' for row in free)} unknown, counted as wrong), mean ROUGE "
                f"{np.mean([row['ours'] for row in free]):.3f}; it and ROUGE from 0.5 agree on "
                f"{same['agreement']:.1%}, kappa {same['kappa']:.2f}. {judge.summary()}"
            )
    return told


def score(pred_path: str, boxes: str | None, arguments: JudgeArguments) -> None:
    path = Path(pred_path)
    predictions = read_with_record(path)
    tubes = read_boxes(Path(boxes), predictions) if boxes else None
    scored = score_predictions(
        predictions, pred_path=pred_path, benchmark_of=benchmark_of, boxes=tubes
    )
    for row, item in zip(scored, predictions, strict=True):
        if official := getattr(BY_NAME.get(row["benchmark"]), "official_score", None):
            options, truths = task_of(item["question"])["options"], truths_of(item["question"])
            row["official"] = official(item["model_output"], options=options, truths=truths)
    told = judge_rows(scored, predictions, arguments, path) if arguments.judge != "rules" else []
    lines, notes = lines_of(scored), notes_on(scored, predictions, pred_path) + told
    print_table(path.stem, table_of(lines))
    print("", *map(printable, notes), sep="\n")
    rows = [{"position": position, **row} for position, row in enumerate(scored)]
    write_json(path.with_suffix(".scores.json"), {"lines": lines, "notes": notes, "rows": rows})
    print(f"written: {path.with_suffix('.scores.json')}")
    # The mean as the released script forms it, so that the printed figure is its own to the last digit.
    overall = summarize_scores(scored)
    print(f"ours: {overall['ours'] * 100:.2f}%")
    print(f"released: {overall['released'] * 100:.2f}%")


def compare(names: list[str]) -> None:
    """Two runs on the same questions, by our rules: the difference, its interval, and whether it may be chance."""
    timeouts = math_timeouts()
    pairs, notes = pair_runs(names)
    scores = np.array(
        [[our_score(item) for item in pair] for pair in tqdm(pairs, desc="score", unit="question")]
    )
    found = compare_scores(*scores.T)
    notes += timeout_notes(math_timeouts() - timeouts)
    print(*map(printable, notes), sep="\n")
    print(f"ours: {100 * found['first']:.2f}% → {100 * found['second']:.2f}%, difference {described(found)}")
    rows = [
        {"positions": [item["position"] for item in pair], "ours": both}
        for pair, both in zip(pairs, scores.tolist(), strict=True)
    ]
    path = Path(names[1]).with_suffix(".compare.json")
    write_json(
        path, {"files": names, "questions": len(pairs), "ours": found, "notes": notes, "rows": rows}
    )
    print(f"written: {path}")


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        JudgeArguments, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pred_path", help="a file of predictions")
    what.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two files of predictions on the same questions",
    )
    what.add_argument("--controls", help="a file of predictions beside which its controls lie")
    parser.add_argument(
        "--boxes",
        metavar="FILE",
        help="m_vIoU, vIoU@.3 and vIoU@.5 of object and time, from the tracked objects' boxes, in one unit per "
        f"question: JSON, {BOXES}; frame n is at n / fps seconds",
    )
    judging, args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.boxes and not args.pred_path:
        parser.error("--boxes goes with --pred_path")
    if args.compare and judging.judge != "rules":
        parser.error("--judge goes with --pred_path and --controls; two runs are compared by our rules")
    if args.compare:
        compare(args.compare)
    elif args.controls:
        judge = make_judge(judging)
        with open_cache(judging.verdict_cache, judge, beside=args.controls) as cache:
            show_controls(Path(args.controls), judge, cache)
    else:
        score(args.pred_path, args.boxes, judging)


if __name__ == "__main__":
    sys.exit(run(main))
