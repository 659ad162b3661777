"""What a verification found: counts, tables on the screen, a picture, and facts for the cards of what is pushed."""

import io
import math
import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from veripo_trl.files.disk import write_whole
from veripo_trl.files.tables import finite, print_table
from veripo_trl.hub.cards import shown_name
from veripo_trl.verifier.checks import inconsistency
from veripo_trl.verifier.pairs import KINDS


class PairsSeen:
    """What is shown of pairs, gathered while they pass by: counts, lengths of their thinking, one of each kind."""

    def __init__(self):
        self.kinds, self.faults, self.examples = Counter(), Counter(), {}
        self.lengths: dict[str, array] = {"chosen": array("q"), "rejected": array("q")}

    def watch(self, pairs: Iterable[dict]) -> Iterator[dict]:
        for pair in pairs:
            kind, verdicts = pair["kind"], pair["verdicts"]
            self.kinds[kind] += 1
            self.faults[f"{kind}: {verdicts['fault']}"] += 1
            self.examples.setdefault(kind, pair)
            self.lengths["chosen"].append(sum(verdict["think_tokens"] for verdict in verdicts["chosen"]))
            self.lengths["rejected"].append(verdicts["rejected"]["think_tokens"])
            yield pair


def summarize(rollouts: int, questions: int, counts: Counter, pairs: PairsSeen, dropped: Counter) -> dict:
    """The counts of results.json."""
    return {
        "rollouts": rollouts,
        "questions": questions,
        "accuracy": counts["accuracy"] / rollouts,
        "format": counts["well formed"] / rollouts,
        "verdicts": {name: counts[name] for name in ("consistent", "inconsistent", "unknown")},
        "unknown_why": {why.split(": ")[1]: n for why, n in counts.most_common() if why.startswith("unknown: ")},
        "inconsistency": finite(inconsistency(counts)),  # None where no verdict is known
        "unknown": counts["unknown"] / rollouts,
        "pairs": {**dict.fromkeys(KINDS, 0), **pairs.kinds},
        "faults": dict(pairs.faults.most_common()),
        "dropped": {why: n for why, n in sorted(dropped.items()) if n},
    }


def print_summary(counts: dict, solved: dict, pairs: PairsSeen) -> None:
    """Tables on the screen, and one pair of each kind."""
    verdicts = counts["verdicts"]
    line = {"rollouts": counts["rollouts"], "questions": counts["questions"], "accuracy": counts["accuracy"]}
    line |= {"format": counts["format"], **verdicts}
    line |= {
        "inconsistent %": "–" if counts["inconsistency"] is None else f"{100 * counts['inconsistency']:.1f}",
        "unknown %": f"{100 * counts['unknown']:.1f}",
    }
    print_table("Rollouts and verdicts (inconsistent % of those with a known verdict)", [line])
    if counts["unknown_why"]:
        lines = [{"unknown because": why, "rollouts": n} for why, n in counts["unknown_why"].items()]
        print_table("Unknown verdicts", lines)
    lines = [{"kind: the rejected is": why, "pairs": n} for why, n in counts["faults"].items()]
    lines += [{"kind: the rejected is": kind, "pairs": 0} for kind, n in counts["pairs"].items() if not n]
    print_table("Pairs", [*lines, {"kind: the rejected is": "all", "pairs": sum(counts["pairs"].values())}])
    if counts["dropped"]:
        lines = [{"became no pair": why, "count": n} for why, n in counts["dropped"].items()]
        print_table("Dropped, and why", lines)
    line = {key: solved[key] for key in ("solved", "mixed", "unsolved")} | {"left out next": len(solved["dropped"])}
    line["groups without variance"] = math.nan if solved["zero_variance"] is None else solved["zero_variance"]
    print_table("Questions (solved: every rollout right)", [line])
    for kind in KINDS:
        if (pair := pairs.examples.get(kind)) is not None:
            print(f"\nA {kind} pair, question {shown(pair['question_id'])} (solution {shown(pair['solution'])})")
            print(f"  chosen:   {shown(pair['chosen'][0]['content'])}")
            print(f"  rejected: {shown(pair['rejected'][0]['content'])} ({pair['verdicts']['fault']})")


def shown(text: str, limit: int = 400) -> str:
    """A text of a model for the screen: on one line, without control characters, its middle cut out if it is long."""
    text = " ".join("".join(c if c.isprintable() or c.isspace() else "�" for c in text).split())
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def plot(path: Path, counts: dict, pairs: PairsSeen, *, title: str) -> None:
    """Verdicts, pairs by kind, and the thinking's length of chosen and rejected, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(10.5, 3))
    counted = {"rollouts by verdict": counts["verdicts"], "pairs": counts["pairs"]}
    for axis, (name, heights) in zip(axes, counted.items(), strict=False):
        bars = axis.bar(list(heights), list(heights.values()))
        axis.bar_label(bars, fontsize=8)
        axis.margins(y=0.12)
        axis.set_title(name, fontsize=10)
    if pairs.kinds:
        labels = [f"{name}, median {statistics.median(values):.0f}" for name, values in pairs.lengths.items()]
        axes[2].hist(list(pairs.lengths.values()), bins=20, label=labels)
        axes[2].legend(fontsize=8)
    axes[2].set_title("tokens of the thinking", fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    write_whole(path, buffer.getvalue())
    pyplot.close(figure)


def card_facts(kind: str, results: dict) -> dict:
    """The arguments of `hub_cards.dataset_card` for "verdicts" or "pairs", from what results.json holds."""
    counts = results["counts"]
    read = {"rollouts": counts["rollouts"], "questions": counts["questions"]}
    if kind == "pairs":
        table = {"pairs": sum(counts["pairs"].values()), **counts["faults"]}
        table |= {f"{name} read": number for name, number in read.items()}
    else:
        table = {**read, "accuracy": counts["accuracy"], "well formed": counts["format"]}
        table |= {f"consistency: {name}": number for name, number in counts["verdicts"].items()}
        if counts["inconsistency"] is not None:
            table["inconsistent, of those known"] = f"{100 * counts['inconsistency']:.1f}%"
    sources = [results["inputs"].get(name, name) for name in results["rollouts"]]
    return {
        "counts": table,
        "inputs": {"rollouts" if n == 1 else f"rollouts ({n})": source for n, source in enumerate(sources, 1)},
        "policy": ", ".join(map(shown_name, results["policies"])),
        "judge": results["judge"]["name"],
        "prompt_version": results["judge"]["prompt_version"] or None,
    }
