"""What a verification found: counts, tables on the screen, and facts for the cards of what is pushed."""

import math
from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from veripo_trl.files.tables import print_table
from veripo_trl.hub.cards import shown_name
from veripo_trl.verifier.checks import inconsistency
from veripo_trl.verifier.judges import CONSISTENCIES
from veripo_trl.verifier.pairs import KINDS


def count(verdicts: pa.Table, pairs: pa.Table, dropped: Counter) -> dict:
    """The counts of results.json."""
    consistency = Counter(verdicts["consistency"].to_pylist())
    unknown = verdicts.filter(pc.equal(verdicts["consistency"], "unknown"))
    kinds, faults = (
        pairs["kind"].to_pylist(),
        pc.struct_field(pairs["verdicts"], "fault").to_pylist(),
    )
    return {
        "rollouts": len(verdicts),
        "questions": pc.count_distinct(verdicts["question_id"]).as_py(),
        "accuracy": pc.mean(verdicts["accuracy"]).as_py(),
        "format": pc.mean(verdicts["format_ok"]).as_py(),
        "verdicts": {name: consistency[name] for name in CONSISTENCIES},
        "unknown_why": dict(
            Counter(why.split(":")[0] for why in unknown["reason"].to_pylist()).most_common()
        ),
        "inconsistency": inconsistency(consistency),
        "unknown": consistency["unknown"] / len(verdicts),
        "pairs": {kind: kinds.count(kind) for kind in KINDS if kind != "video" or kind in kinds},
        "faults": dict(Counter(map(": ".join, zip(kinds, faults, strict=True))).most_common()),
        "dropped": dict(sorted(dropped.items())),
    }


def print_summary(counts: dict, solved: dict, pairs: pa.Table) -> None:
    """Tables on the screen, and one pair of each kind."""
    line = {key: counts[key] for key in ("rollouts", "questions", "accuracy", "format")} | counts[
        "verdicts"
    ]
    line |= {
        "inconsistent %": _percent(counts["inconsistency"]),
        "unknown %": _percent(counts["unknown"]),
    }
    print_table("Rollouts and verdicts (inconsistent % of those with a known verdict)", [line])
    if "perturbed" in counts:
        print_table("Rollouts on perturbed videos", [counts["perturbed"]])
    faults = (
        counts["faults"]
        | {kind: 0 for kind, n in counts["pairs"].items() if not n}
        | {"all": len(pairs)}
    )
    for title, (what, number), found in (
        ("Unknown verdicts", ("unknown because", "rollouts"), counts["unknown_why"]),
        ("Pairs", ("kind: the rejected is", "pairs"), faults),
        ("Dropped, and why", ("became no pair", "count"), counts["dropped"]),
    ):
        if found:
            print_table(title, [{what: why, number: n} for why, n in found.items()])
    line = {key: solved[key] for key in ("solved", "mixed", "unsolved")} | {
        "left out next": len(solved["dropped"])
    }
    line["groups without variance"] = solved["zero_variance"]
    print_table("Questions (solved: every rollout right)", [line])
    for kind in KINDS:
        for pair in pairs.filter(pc.equal(pairs["kind"], kind))[:1].to_pylist():
            print(
                f"\nA {kind} pair, question {shown(pair['question_id'])} (solution {shown(pair['solution'])})"
            )
            print(f"  chosen:   {shown(pair['chosen'][0]['content'])}")
            print(
                f"  rejected: {shown(pair['rejected'][0]['content'])} ({pair['verdicts']['fault']})"
            )


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}"


def shown(text: str, limit: int = 400) -> str:
    """A text of a model for the screen: on one line, without control characters, its middle cut out if it is long."""
    text = " ".join("".join(c if c.isprintable() or c.isspace() else "�" for c in text).split())
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


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
        "inputs": {
            "rollouts" if n == 1 else f"rollouts ({n})": source
            for n, source in enumerate(sources, 1)
        },
        "policy": ", ".join(map(shown_name, results["policies"])),
        "judge": results["judge"]["name"],
        "prompt_version": results["judge"]["prompt_version"] or None,
        "prompt_template": results["prompt_template"],
    }
