"""What a verification found: counts, tables on the screen, a picture, and facts for the cards of what is pushed."""

import io
import itertools
import math
import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from veripo_trl.data.schema import content_of
from veripo_trl.files.disk import write_whole
from veripo_trl.files.tables import print_table
from veripo_trl.hub.cards import shown_name
from veripo_trl.verifier.checks import inconsistency
from veripo_trl.verifier.judges import CONSISTENCIES
from veripo_trl.verifier.pairs import KINDS, generation_of


class Findings:
    """What is shown and recorded of verdicts, questions and pairs, gathered while they pass by."""

    def __init__(self):
        self.rollouts, self.accuracy, self.well_formed = 0, 0.0, 0
        self.consistency, self.unknown_why = Counter(), Counter()
        self.contents: dict[str, str] = {}  # of each question, by its id
        self.accuracies: list[tuple] = []  # for `choose_solved`
        self.kinds, self.faults, self.examples = Counter(), Counter(), {}
        self.lengths = {"chosen": array("q"), "rejected": array("q")}  # of the thinking, in tokens

    def of_verdicts(self, verdicts: Iterable[dict]) -> Iterator[dict]:
        for verdict in verdicts:
            self.rollouts += 1
            self.accuracy += verdict["accuracy"]
            self.well_formed += verdict["format_ok"]
            self.consistency[verdict["consistency"]] += 1
            if verdict["consistency"] == "unknown":
                self.unknown_why[verdict["reason"].split(":")[0]] += 1
            yield verdict

    def of_questions(self, questions: Iterable[list[dict]]) -> Iterator[list[dict]]:
        for rollouts in questions:
            self.contents[rollouts[0]["question_id"]] = content_of(rollouts[0])
            self.accuracies += _lowest_and_highest(rollouts)
            yield rollouts

    def of_pairs(self, pairs: Iterable[dict]) -> Iterator[dict]:
        for pair in pairs:
            kind, verdicts = pair["kind"], pair["verdicts"]
            self.kinds[kind] += 1
            self.faults[f"{kind}: {verdicts['fault']}"] += 1
            self.examples.setdefault(kind, pair)
            self.lengths["chosen"].append(sum(verdict["think_tokens"] for verdict in verdicts["chosen"]))
            self.lengths["rejected"].append(verdicts["rejected"]["think_tokens"])
            yield pair

    def counts(self, dropped: Counter) -> dict:
        """The counts of results.json."""
        return {
            "rollouts": self.rollouts,
            "questions": len(self.contents),
            "accuracy": self.accuracy / self.rollouts,
            "format": self.well_formed / self.rollouts,
            "verdicts": {name: self.consistency[name] for name in CONSISTENCIES},
            "unknown_why": dict(self.unknown_why.most_common()),
            "inconsistency": inconsistency(self.consistency),
            "unknown": self.consistency["unknown"] / self.rollouts,
            "pairs": {kind: self.kinds[kind] for kind in KINDS},
            "faults": dict(self.faults.most_common()),
            "dropped": {why: n for why, n in sorted(dropped.items()) if n},
        }


def _lowest_and_highest(rollouts: list[dict]) -> Iterator[tuple]:
    """(question, generation, accuracy): of each generation the extremes, which are all that `choose_solved` looks at."""
    for generation, group in itertools.groupby(sorted(rollouts, key=generation_of), key=generation_of):
        accuracies = sorted(rollout["verdict"]["accuracy"] for rollout in group)
        for accuracy in accuracies[:1] + accuracies[1:][-1:]:
            yield rollouts[0]["question_id"], generation, accuracy


def print_summary(counts: dict, solved: dict, examples: dict[str, dict]) -> None:
    """Tables on the screen, and one pair of each kind."""
    line = {key: counts[key] for key in ("rollouts", "questions", "accuracy", "format")} | counts["verdicts"]
    line |= {"inconsistent %": _percent(counts["inconsistency"]), "unknown %": _percent(counts["unknown"])}
    print_table("Rollouts and verdicts (inconsistent % of those with a known verdict)", [line])
    if counts["unknown_why"]:
        lines = [{"unknown because": why, "rollouts": n} for why, n in counts["unknown_why"].items()]
        print_table("Unknown verdicts", lines)
    faults = counts["faults"] | {kind: 0 for kind, n in counts["pairs"].items() if not n}
    faults["all"] = sum(counts["pairs"].values())
    print_table("Pairs", [{"kind: the rejected is": why, "pairs": n} for why, n in faults.items()])
    if counts["dropped"]:
        lines = [{"became no pair": why, "count": n} for why, n in counts["dropped"].items()]
        print_table("Dropped, and why", lines)
    line = {key: solved[key] for key in ("solved", "mixed", "unsolved")} | {"left out next": len(solved["dropped"])}
    variance = solved["zero_variance"]
    print_table(
        "Questions (solved: every rollout right)",
        [line | {"groups without variance": "–" if variance is None else variance}],
    )
    for kind in KINDS:
        if (pair := examples.get(kind)) is not None:
            print(f"\nA {kind} pair, question {shown(pair['question_id'])} (solution {shown(pair['solution'])})")
            print(f"  chosen:   {shown(pair['chosen'][0]['content'])}")
            print(f"  rejected: {shown(pair['rejected'][0]['content'])} ({pair['verdicts']['fault']})")


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}"


def shown(text: str, limit: int = 400) -> str:
    """A text of a model for the screen: on one line, without control characters, its middle cut out if it is long."""
    text = " ".join("".join(c if c.isprintable() or c.isspace() else "�" for c in text).split())
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def plot(path: Path, counts: dict, lengths: dict[str, array], *, title: str) -> None:
    """Verdicts, pairs by kind, and the thinking's length of chosen and rejected, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3), layout="tight")
    axes = figure.subplots(1, 3)
    counted = {"rollouts by verdict": counts["verdicts"], "pairs": counts["pairs"]}
    for axis, (name, heights) in zip(axes, counted.items(), strict=False):
        axis.bar_label(axis.bar(list(heights), list(heights.values())), fontsize=8)
        axis.margins(y=0.12)
        axis.set_title(name, fontsize=10)
    if lengths["chosen"]:
        labels = [f"{name}, median {statistics.median(values):.0f}" for name, values in lengths.items()]
        axes[2].hist(list(lengths.values()), bins=20, label=labels)
        axes[2].legend(fontsize=8)
    axes[2].set_title("tokens of the thinking", fontsize=10)
    figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    write_whole(path, buffer.getvalue())


def card_facts(kind: str, results: dict) -> dict:
    """The arguments of `cards.dataset_card` for "verdicts" or "pairs", from what results.json holds."""
    counts = results["counts"]
    read = {"rollouts": counts["rollouts"], "questions": counts["questions"]}
    if kind == "pairs":
        table = {"pairs": sum(counts["pairs"].values()), **counts["faults"]}
        table |= {f"{name} read": number for name, number in read.items()}
    else:
        table = {**read, "accuracy": counts["accuracy"], "well formed": counts["format"]}
        table |= {f"consistency: {name}": number for name, number in counts["verdicts"].items()}
        table["inconsistent, % of those known"] = _percent(counts["inconsistency"])
    sources = [results["inputs"].get(name, name) for name in results["rollouts"]]
    return {
        "counts": table,
        "inputs": {"rollouts" if n == 1 else f"rollouts ({n})": source for n, source in enumerate(sources, 1)},
        "policy": ", ".join(map(shown_name, results["policies"])),
        "judge": results["judge"]["name"],
        "prompt_version": results["judge"]["prompt_version"] or None,
    }
