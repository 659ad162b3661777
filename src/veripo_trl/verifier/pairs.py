"""Which pairs are made of judged rollouts, and why: penalty, consistency, reflection (arXiv 2505.19000, as we read it).

A group is a question's rollouts of a whole run. In it a rollout is

- right or wrong by its accuracy (`correct_threshold`, `wrong_threshold`), or neither;
- good: right, consistent, well formed, finished, not repetitive, not too short.

| kind        | chosen                                                        | rejected                               |
|-------------|---------------------------------------------------------------|----------------------------------------|
| penalty     | good                                                          | wrong, repetitive or too short         |
| consistency | good                                                          | right, but inconsistent, well formed   |
| reflection  | a wrong rollout's thinking + a turn to re-check + a good      | that wrong rollout                     |
|             | one's thinking and answer                                     |                                        |
| video       | good                                                          | wrong and well formed, sampled on a    |
|             |                                                               | perturbed video                        |

A group with every rollout right gives consistency pairs, and penalty pairs against a too short rollout only (its
length pairs). A group with none right gives nothing. A verdict "unknown" is neither consistent nor inconsistent. No
chosen is less accurate than its rejected. Of rollouts with one text the first by id stands for all. A first attempt
of a reflection is consistent: thinking that concludes something else than the wrong answer is no wrong thinking. Both
sides of a video pair are conditioned on the true video; of its rejected only the answer counts, and a rollout on a
perturbed video (column `perturbed`) has no other part in its group.
"""

import hashlib
import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from veripo_trl.answers.score import split_completion
from veripo_trl.data.prompts import PromptTemplate, build_messages
from veripo_trl.data.schema import QUESTION, RowError
from veripo_trl.errors import ConfigError
from veripo_trl.options import option
from veripo_trl.verifier.checks import repetition_share
from veripo_trl.verifier.judges import conclude_by_rules

KINDS = ("consistency", "penalty", "reflection", "video")
# Between the two thoughts of a reflection.
RECHECK = "Wait, let me go back and check this once more."
MAX_TRIED = 64  # combinations looked at per group and kind: a run's group may hold thousands


def check_setting(options, name: str, fine: object, expected: str) -> None:
    """Raise a ConfigError for a field that is not `fine`."""
    if not fine:
        raise ConfigError(f"{name}: expected {expected}; got {getattr(options, name)!r}.")


@dataclass
class PairOptions:
    """Which pairs are built of judged rollouts."""

    kinds: list[str] = field(
        default_factory=lambda: list(KINDS[:3]),
        metadata={
            "help": f"Kinds of pairs, of {', '.join(KINDS)}. They take turns, in this order, up to the caps."
        },
    )
    max_pairs_per_question: int | None = option("Over all kinds; null: all.", 4)
    max_pairs_per_question_and_kind: int | None = option("Of one kind; null: all.", 2)
    correct_threshold: float = option("Accuracy from which a rollout is right.", 0.8)
    wrong_threshold: float = option("Accuracy up to which a rollout is wrong.", 0.5)
    min_accuracy_margin: float = option(
        "Least accuracy of the chosen above that of a rejected that is wrong.", 0.5
    )
    max_repetition: float = option(
        "Share of repeated word 10-grams above which thinking is repetitive.", 0.4
    )
    min_length_ratio: float = option(
        "Thinking with fewer tokens than this × the median of the group's right ones is too short.",
        0.5,
    )
    prefer_longer: bool = option("Choose longer thinking first; else at random.", True)
    include_truncated: bool = option(
        "Completions cut off at the length limit may be rejected (never chosen).", False
    )
    seed: int = option("Of every choice among pairs.", 0)

    def __post_init__(self):
        check = partial(check_setting, self)
        some = set(self.kinds) <= set(KINDS) and 0 < len(self.kinds) == len(set(self.kinds))
        check("kinds", some, f"some of {', '.join(KINDS)}")
        for name in ("max_pairs_per_question", "max_pairs_per_question_and_kind"):
            check(name, (getattr(self, name) or 0) >= 0, "a number from 0, or null for no cap")
        shares = ("correct_threshold", "wrong_threshold", "min_accuracy_margin", "max_repetition")
        for name in shares:
            check(name, 0 <= getattr(self, name) <= 1, "a share from 0 to 1")
        apart = self.wrong_threshold < self.correct_threshold
        check("wrong_threshold", apart, "less than correct_threshold")
        check("min_length_ratio", self.min_length_ratio >= 0, "0 or more")


def build_pairs(
    questions: Iterable[list[dict]],
    options: PairOptions,
    *,
    template: PromptTemplate,
    dropped: Counter,
) -> Iterator[dict]:
    """The pairs of a run, question by question; a question's are the same for every order of its rollouts.

    Args:
        questions: for each question all of its rollouts, every one with its `verdict`. Taken one at a time.
        dropped: gets the counts of what became no pair: "rollouts: <why>" (with the rollouts that stand in a pair,
            these add up to all), "groups: <why>", "pairs: <why>".

    Yields:
        Pairs (columns: `files.PAIR_SCHEMA`).

    Raises:
        RowError: two rollouts of one question id differ in the question itself.
    """
    for rollouts in questions:
        group = sorted(rollouts, key=lambda rollout: (rollout["perturbed"], rollout["rollout_id"]))
        _refuse_two_questions(group)
        own = [rollout for rollout in group if not rollout["perturbed"]]
        right = [r for r in own if r["verdict"]["accuracy"] >= options.correct_threshold]
        roles, fates = _roles(group, right, len(right) == len(own), options)
        lacking = None
        if not right:
            lacking = "with none right"
        elif not roles["chosen"]:
            lacking = "with none to choose (right, consistent, well formed, neither repetitive nor too short)"
        elif not any(roles[kind] for kind in options.kinds):
            lacking = "with nothing to reject"
        used = set()
        if lacking:
            dropped[f"groups: {lacking}"] += 1
        else:
            for pair in _in_turn(roles, options, template, dropped):
                used |= {*pair["chosen_ids"], pair["rejected_id"]}
                yield pair
        unused = f"in a group {lacking}" if lacking else "fit for a pair, not needed or over a cap"
        left = [rollout["rollout_id"] for rollout in group if rollout["rollout_id"] not in used]
        dropped.update(f"rollouts: {fates.get(name, unused)}" for name in left)


def seeded_order(seed: int, *parts: str) -> int:
    """A number below 2**128 that looks random, is the same on every machine, and differs between seeds."""
    text = "\0".join([str(seed), *parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def _refuse_two_questions(rollouts: list[dict]) -> None:
    first = rollouts[0]
    for other in rollouts:
        if differing := [
            name for name in QUESTION if (other[name] or None) != (first[name] or None)
        ]:
            raise RowError(
                f"Rollouts {first['rollout_id']!r} and {other['rollout_id']!r} have the question id "
                f"{first['question_id']!r}, but differ in {', '.join(differing)}. Question ids must be unique over all "
                "runs that are read together: verify them apart, or set an id_prefix where the rows are loaded."
            )


def _roles(
    group: list[dict], right: list[dict], all_right: bool, options: PairOptions
) -> tuple[dict[str, list], dict[str, str]]:
    """What the rollouts of a group may stand for, {"chosen" or a kind: [(why, rollout)]}; and of those that may stand
    for nothing, why: {rollout id: why}."""
    lengths = [rollout["verdict"]["think_tokens"] for rollout in right if _whole(rollout)]
    shortest = options.min_length_ratio * statistics.median(lengths) if lengths else 0
    roles, fates, texts = {name: [] for name in ("chosen", *KINDS)}, {}, set()
    for rollout in group:
        if (text := rollout["completion"].strip()) in texts:
            fates[rollout["rollout_id"]] = "same text as another"
            continue
        texts.add(text)
        found, fates[rollout["rollout_id"]] = _roles_of(rollout, shortest, all_right, options)
        for role in found.keys() & {"chosen", *options.kinds}:
            roles[role].append((found[role], rollout))
            fates.pop(rollout["rollout_id"], None)
    return roles, fates


def _whole(rollout: dict) -> bool:
    return rollout["verdict"]["format_ok"] and rollout["finish_reason"] != "length"


def _roles_of(
    rollout: dict, shortest: float, all_right: bool, options: PairOptions
) -> tuple[dict[str, str], str]:
    """({"chosen" or a kind: why}, what to count the rollout under if it has no role)."""
    verdict, whole = rollout["verdict"], _whole(rollout)
    repetitive, short = (
        verdict["repetition"] > options.max_repetition,
        verdict["think_tokens"] < shortest,
    )
    consistency, roles, fate = verdict["consistency"], {}, "of no use to the kinds asked for"
    if rollout["perturbed"]:
        wrong = whole and verdict["accuracy"] <= options.wrong_threshold
        return {"video": "wrong"} if wrong else {}, "on a perturbed video, not wrong or not well formed"
    if rollout["finish_reason"] == "length" and not options.include_truncated:
        fate = "cut off at the length limit"
    elif verdict["accuracy"] <= options.wrong_threshold:
        roles["penalty"] = "wrong"
        if whole and consistency == "consistent" and not repetitive:
            roles["reflection"] = "wrong"
    elif not whole:
        fate = "not well formed, though not wrong"
    else:
        if repetitive and not all_right:
            roles["penalty"] = "repetitive"
        elif short:
            roles["penalty"] = "too short"
        if verdict["accuracy"] < options.correct_threshold:
            fate = "neither right nor wrong"
        elif consistency == "inconsistent":
            roles["consistency"] = "inconsistent"
        elif consistency == "unknown":
            fate = "right, consistency unknown"
        elif not repetitive and not short:
            roles["chosen"] = "good"
    return roles, fate


def _in_turn(
    roles: dict[str, list], options: PairOptions, template: PromptTemplate, dropped: Counter
) -> Iterator[dict]:
    """Pairs of one group: one of each kind in turn, up to the caps, no two texts together twice."""
    seen: set[tuple] = set()

    def unseen(pairs: Iterator[dict]) -> Iterator[dict]:
        for pair in pairs:
            ids = (*pair["chosen_ids"], pair["rejected_id"])
            if ids not in seen:
                seen.add(ids)
                yield pair

    found = (_candidates(kind, roles, options, template, dropped) for kind in options.kinds)
    cap = options.max_pairs_per_question_and_kind
    of_kind = [itertools.islice(unseen(pairs), cap) for pairs in found]
    rounds = itertools.zip_longest(*of_kind)
    pairs = (pair for one in rounds for pair in one if pair is not None)
    return itertools.islice(pairs, options.max_pairs_per_question)


def _candidates(
    kind: str,
    roles: dict[str, list],
    options: PairOptions,
    template: PromptTemplate,
    dropped: Counter,
) -> Iterator[dict]:
    """Possible pairs of a kind, the preferred first, each rollout once before one comes again."""

    def order(role: str, rollout: dict) -> int:
        return seeded_order(options.seed, kind, role, rollout["rollout_id"])

    def preference(rollout: dict) -> tuple:
        tokens = rollout["verdict"]["think_tokens"] if options.prefer_longer else 0
        return -tokens, order("chosen", rollout)

    winners = sorted((rollout for _, rollout in roles["chosen"]), key=preference)
    losers = sorted(roles[kind], key=lambda item: order("rejected", item[1]))
    tries = itertools.product(range(len(winners)), enumerate(losers))
    for shift, (index, (fault, loser)) in itertools.islice(tries, MAX_TRIED):
        winner = winners[(index + shift) % len(winners)]
        ahead = winner["verdict"]["accuracy"] - loser["verdict"]["accuracy"]
        refusal, text, parts = None, winner["completion"], [winner]
        if ahead < -1e-9 or (fault == "wrong" and ahead < options.min_accuracy_margin - 1e-9):
            refusal = "accuracy margin too small"
        elif kind == "reflection":
            text, parts = join_for_reflection(loser["completion"], text), [loser, winner]
            refusal = _refused_join(text, winner, options)
        if refusal:
            dropped[f"pairs: {refusal}"] += 1
            continue
        yield {
            **{name: winner[name] for name in ("question_id", *QUESTION, "data_source")},
            "prompt": build_messages(winner, template),
            "chosen": [{"role": "assistant", "content": text}],
            "rejected": [{"role": "assistant", "content": loser["completion"]}],
            "rejected_finished": loser["finish_reason"] != "length",
            "kind": kind,
            "chosen_ids": [part["rollout_id"] for part in parts],
            "rejected_id": loser["rollout_id"],
            "verdicts": {
                "chosen": [part["verdict"] for part in parts],
                "rejected": loser["verdict"],
                "fault": fault,
            },
            "prompt_template": loser["prompt_template"],
            "policy": loser["policy"],
        }


def join_for_reflection(wrong: str, right: str) -> str:
    """`<think>`, the wrong completion's thinking, `RECHECK` on a line of its own, the right one's thinking, and all that
    follows that one's `</think>` as it was written. Both must be well formed."""
    closing = right.index("</think>")
    thinking = right[right.index("<think>") + len("<think>") : closing].strip()
    return f"<think>{split_completion(wrong)[0]}\n{RECHECK}\n{thinking}{right[closing:]}"


def _refused_join(text: str, winner: dict, options: PairOptions) -> str | None:
    """Why a joined completion cannot be chosen: the pieces are sound, but together they may not be."""
    think = split_completion(text)[0]
    if repetition_share(think) > options.max_repetition:
        return "joined thinking is repetitive"
    own = split_completion(winner["completion"])[0]
    read = {"problem_type": winner["problem_type"], "options": winner["options"]}
    if conclude_by_rules(think, **read) != conclude_by_rules(own, **read):
        return "joined thinking concludes something else"
    return None
