"""Runs on the same questions, paired: two of them, or one with its controls, which say what its figure
owes to thinking, to the video and to chance.

| control | asked |
|---|---|
| thinking | as the policy was trained to answer |
| direct | with the thinking closed empty |
| frames shuffled | with the frames in another order |
| no video | without the video |
| voted | so many times at a temperature |
"""

from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from veripo_trl.answers.math_process import MATH_LIMIT_S, math_timeouts
from veripo_trl.answers.score import split_completion
from veripo_trl.data.schema import RowError
from veripo_trl.evaluate.generate import bootstrap_interval
from veripo_trl.evaluate.questions import content_hash, task_of
from veripo_trl.evaluate.scores import compare_scores, is_readable, our_score, read_with_record
from veripo_trl.evaluate.votes import elected
from veripo_trl.files.tables import print_table, printable, write_json
from veripo_trl.verifier.judges import Judge
from veripo_trl.verifier.verify import judge_stream, judged_item

# Of each: what stands before the .json of its file, and the options that ask so.
_CONTROLS = {
    "thinking": ("", []),
    "direct": (".direct", ["--direct"]),
    "frames shuffled": (".shuffle", ["--perturb", "shuffle"]),
    "no video": (".no_video", ["--perturb", "no_video"]),
    "voted": (".votes", []),
}


def control_files(output: str | Path) -> dict[str, tuple[Path, list[str]]]:
    """{control: (its file of predictions, the options of evaluation_vllm.py)}, by the output path of the first."""
    return {
        name: (Path(output).with_suffix(f"{part}.json"), how)
        for name, (part, how) in _CONTROLS.items()
    }


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
    pairs = [pair for pair in both if not any("error" in (item["made"] or {}) for item in pair)]
    left = [len(side) - len(both) for side in (first, second)]
    notes = [
        f"{len(both)} questions in both; left out: {left[0]} of the first, {left[1]} of the second."
    ]
    if len(pairs) < len(both):
        notes.append(
            f"Never answered by one of them and left out: {len(both) - len(pairs)}; compared: {len(pairs)}."
        )
    for name, side in zip(names, (first, second), strict=True):
        if next(iter(side.values()))["made"] is None:
            notes.append(
                f"There is no .record.json beside {name}: rows that were never answered count as wrong there."
            )
    if not pairs:
        raise RowError(
            f"{names[0]} and {names[1]} have no answered question in common. {' '.join(notes)}"
        )
    return pairs, notes


def timeout_notes(count: int) -> list[str]:
    note = f"ours: maths comparisons that took over {MATH_LIMIT_S:g} s and count as not equal: {count}."
    return [note] if count else []


def described(found: dict) -> str:
    """A comparison of `compare_scores` in words."""
    return (
        f"{100 * found['difference']:+.2f} points (95% {100 * found['low']:+.2f} to {100 * found['high']:+.2f}), "
        f"p = {found['p']:.3g} ({found['test']}; better on {found['better']}, worse on {found['worse']})"
    )


def show_controls(output: Path, judge: Judge, cache=None) -> None:
    """Print the table of `control_lines` and write it to the .controls.json beside `output`."""
    timeouts = math_timeouts()
    lines, notes = control_lines(output, judge, cache)
    notes += timeout_notes(math_timeouts() - timeouts)
    shown = [
        {
            "asked": line["control"],
            "questions": line["questions"],
            "ours %": f"{100 * line['ours']:.1f}",
            "95%": f"{100 * line['low']:.1f}–{100 * line['high']:.1f}",
            "− thinking": "" if found is None else f"{100 * found['difference']:+.1f}",
            "95% of that": ""
            if found is None
            else f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}",
            "p": ""
            if found is None
            else f"{found['p']:.2g}" + "*" * (found["test"] != "McNemar, exact"),
            "better, worse": "" if found is None else f"{found['better']}, {found['worse']}",
            "unparsable %": f"{100 * line['unparsable']:.1f}",
            "thinking": f"{line['think_length']:.1f}",
        }
        for line in lines
        for found in [line["paired"]]
    ]
    print_table(f"{output.stem}, and its controls", shown)
    notes.append(
        "Differences over the questions that both answered; p by McNemar's exact test, with * by a paired permutation "
        "test; none is corrected for how many there are."
    )
    print("", *map(printable, notes), sep="\n")
    file = output.with_suffix(".controls.json")
    write_json(file, {"lines": lines, "notes": notes, "judge": judge.record()})
    print(f"written: {file}")


def control_lines(output: Path, judge: Judge, cache=None) -> tuple[list[dict], list[str]]:
    """(the table's lines, notes), of the files that are there.

    Args:
        output: the file of "thinking". judge: whose verdicts elect among a vote's candidates. cache: of its replies.

    Returns:
        Lines with `control`, `questions`, `ours` with `low`, `high` (95% bootstrap over questions),
        `unparsable` (share), `think_length` (mean, tokens as recorded or words), `paired`: `compare_scores`
        of thinking and this, None for thinking itself.
    """
    files = {name: path for name, (path, _) in control_files(output).items()}
    missing = [name for name, path in files.items() if not path.is_file()]
    if files.pop("thinking") != output or "thinking" in missing or len(missing) == len(files):
        absent = ", ".join(missing)
        raise RowError(
            f"{output}: expected it and others of evaluation_vllm.py --controls; not there: {absent}."
        )
    scores: dict[tuple, float] = {}

    def score(item: dict) -> float:
        key = (item["position"], content_hash(item["question"]), item["model_output"])
        if key not in scores:
            scores[key] = our_score(item)
        return scores[key]

    lines, notes = [], [f"Not there: {', '.join(missing)}."] if missing else []
    for name in [name for name in files if name not in missing]:
        pairs, told = pair_runs([str(output), str(files[name])])
        notes += [f"{name}: {note}" for note in told]
        again = sum(after["model_output"].count("<think>") > 1 for _, after in pairs) if name == "direct" else 0
        if again:  # its thinking was closed before it began
            notes.append(f"direct: {again} answers of {len(pairs)} opened another thinking: they are not direct.")
        first = np.array([score(before) for before, _ in tqdm(pairs, desc=name, unit="question")])
        ways = {name: [[after] for _, after in pairs]}
        if name == "voted":
            ways = _votes([after for _, after in pairs], score, judge, cache)
        for label, groups in ways.items():
            lines.append(_line(label, groups, score, first))
    asked = read_with_record(output)
    said = [[item] for item in asked if "error" not in (item["made"] or {})]
    if len(said) < len(asked):
        notes.append(f"thinking: never answered and left out: {len(asked) - len(said)}.")
    return [_line("thinking", said, score), *lines], notes


def _line(name: str, groups: list[list[dict]], score, first: np.ndarray | None = None) -> dict:
    """A line; a question's score is the mean of its group's."""
    ours = np.array([np.mean([score(item) for item in group]) for group in groups])
    low, high = bootstrap_interval(ours, np.arange(len(ours)))
    items = [item for group in groups for item in group]
    words = [len((split_completion(item["model_output"])[0] or "").split()) for item in items]
    lengths = [
        (item["made"] or {}).get("think_tokens", count)
        for item, count in zip(items, words, strict=True)
    ]
    return {
        "control": name,
        "questions": len(groups),
        "ours": float(ours.mean()),
        "low": low,
        "high": high,
        "unparsable": 1.0 - float(np.mean([is_readable(item) for item in items])),
        "think_length": float(np.mean(lengths)),
        "paired": None if first is None else compare_scores(first, ours),
    }


def _votes(predictions: list[dict], score, judge: Judge, cache) -> dict[str, list[list[dict]]]:
    """{what is made of the candidates: the predictions of each question that it stands for}."""
    if not all("candidates" in (item["made"] or {}) for item in predictions):
        raise RowError(
            "voted: expected the candidates of each question in the .record.json beside it; came none."
        )
    groups = [
        [
            {**item, "model_output": made["completion"], "made": made}
            for made in item["made"]["candidates"]
        ]
        for item in predictions
    ]
    tasks = [task_of(item["question"]) for item in predictions]
    for task in tasks:
        del task["solution"]
    texts = [[item["model_output"] for item in group] for group in groups]
    items = [
        judged_item(text, **task) for some, task in zip(texts, tasks, strict=True) for text in some
    ]
    said = tqdm(
        judge_stream(items, judge=judge, cache=cache),
        desc="elect",
        unit="candidate",
        total=len(items),
    )
    verdicts = (verdict["consistency"] for verdict in said)
    found = [
        group[elected(some, [next(verdicts) for _ in some], **task)]
        for group, some, task in zip(groups, texts, tasks, strict=True)
    ]
    return {
        f"voted, majority of {len(groups[0])}": [[item] for item in predictions],
        f"voted, elected by the verifier ({judge.name})": [[item] for item in found],
        "one vote, on average": groups,
        "best vote (needs the truth)": [[max(group, key=score)] for group in groups],
    }
