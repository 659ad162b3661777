"""Which pairs are made of judged rollouts, and why: penalty, consistency, reflection (arXiv 2505.19000, as we read it).

A group is a question's rollouts, of the whole run or of one generation. In it a rollout is

- right or wrong by its accuracy (`correct_threshold`, `wrong_threshold`), or neither;
- good: right, consistent, well formed, finished, not repetitive, not too short.

| kind        | chosen                                                        | rejected                               |
|-------------|---------------------------------------------------------------|----------------------------------------|
| penalty     | good                                                          | wrong, repetitive or too short         |
| consistency | good                                                          | right, but inconsistent, well formed   |
| reflection  | a wrong rollout's thinking + a turn to re-check + a good      | that wrong rollout                     |
|             | one's thinking and answer                                     |                                        |

A group with every rollout right gives consistency pairs, and penalty pairs against a too short rollout only (its
length pairs). A group with none right gives nothing. A verdict "unknown" is neither consistent nor inconsistent. No
chosen is less accurate than its rejected. Of rollouts with one text the first by id stands for all. A first attempt
of a reflection is consistent: thinking that concludes something else than the wrong answer is no wrong thinking.
"""

import hashlib
import itertools
import json
import statistics
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from veripo_trl.answers.score import split_completion
from veripo_trl.data.prompts import PromptTemplate, build_messages
from veripo_trl.data.schema import QUESTION
from veripo_trl.errors import ConfigError, VeripoError
from veripo_trl.files.disk import room_for
from veripo_trl.verifier.checks import repetition_share
from veripo_trl.verifier.judges import conclude_by_rules

KINDS = ("consistency", "penalty", "reflection")
MAX_TRIED = 64  # combinations looked at per group and kind: a run's group may hold thousands
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


class PairError(VeripoError):
    """Rollouts that cannot be compared with each other."""


def option(help: str, default=None, **metadata):
    """A field of a dataclass of options."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class PairOptions:
    """Which pairs are built of judged rollouts."""

    kinds: list[str] = field(
        default_factory=lambda: list(KINDS),
        metadata={"help": f"Kinds of pairs, of {', '.join(KINDS)}. They take turns, in this order, up to the caps."},
    )
    group_by: str = option(
        "Compare a question's rollouts of the whole run (question) or of one step (generation).",
        "question",
        choices=["question", "generation"],
    )
    from_step: int = option("Leave out rollouts of earlier steps: the policy has moved on since.", 0)
    max_pairs_per_question: int | None = option("Over all kinds and groups; null: all.", 4)
    max_pairs_per_question_and_kind: int | None = option("Of one kind; null: all.", 2)
    correct_threshold: float = option("Accuracy from which a rollout is right.", 0.8)
    wrong_threshold: float = option("Accuracy up to which a rollout is wrong.", 0.5)
    min_accuracy_margin: float = option("Least accuracy of the chosen above that of a rejected that is wrong.", 0.5)
    max_repetition: float = option("Share of repeated word n-grams above which thinking is repetitive.", 0.4)
    ngram: int = option("Words of an n-gram.", 10)
    min_length_ratio: float = option(
        "Thinking with fewer tokens than this × the median of the group's right ones is too short.", 0.5
    )
    prefer_longer: bool = option("Choose longer thinking first; else at random.", True)
    include_truncated: bool = option(
        "Completions cut off at the length limit may be rejected (never chosen).", False
    )
    recheck_text: str = option(
        "Stands between the two thoughts of a reflection, on a line of its own.",
        "Wait, let me go back and check this once more.",
    )
    seed: int = option("Of every choice among pairs.", 0)

    def __post_init__(self):
        def check(fine: bool, name: str, expected: str) -> None:
            if not fine:
                raise ConfigError(f"{name}: expected {expected}, got {getattr(self, name)!r}.")

        kinds = set(self.kinds)
        check(kinds and kinds <= set(KINDS) and len(self.kinds) == len(kinds), "kinds", f"some of {', '.join(KINDS)}")
        for name in ("max_pairs_per_question", "max_pairs_per_question_and_kind"):
            check(getattr(self, name) is None or getattr(self, name) >= 0, name, "a number from 0, or null for no cap")
        for name in ("correct_threshold", "wrong_threshold", "min_accuracy_margin", "max_repetition"):
            check(0 <= getattr(self, name) <= 1, name, "a share from 0 to 1")
        check(self.wrong_threshold < self.correct_threshold, "wrong_threshold", "less than correct_threshold")
        check(self.min_length_ratio >= 0, "min_length_ratio", "0 or more")
        check(self.ngram >= 1, "ngram", "1 or more")
        recheck = self.recheck_text.strip()
        check(recheck and not any(tag in recheck for tag in _TAGS), "recheck_text", "a text without tags")


def build_pairs(
    questions: Iterable[list[dict]], options: PairOptions, *, template: PromptTemplate, folder: Path | None = None
) -> tuple[Iterator[dict], Counter]:
    """The pairs of a run: the same for every order of questions and of rollouts.

    Args:
        questions: for each question all of its rollouts, every one with its `verdict`. Taken one at a time.
        folder: for an unnamed file that holds the pairs until their order is known.

    Returns:
        The pairs (columns: `files.PAIR_SCHEMA`) in a seeded order, so that any first n of them are a fair sample; and the
        counts of what became no pair: "rollouts: <why>" (with the rollouts that stand in a pair, these add up to all),
        "groups: <why>", "pairs: <why>".

    Raises:
        PairError: two rollouts of one question id differ in the question itself.
    """
    dropped: Counter = Counter()
    folder = Path(folder or tempfile.gettempdir())
    spool, entries = tempfile.TemporaryFile(dir=folder), []  # entries: (order, where in the file)
    for rollouts in questions:
        for pair in _pairs_of_question(rollouts, options, template, dropped):
            order = seeded_order(options.seed, pair["kind"], *pair["chosen_ids"], pair["rejected_id"])
            entries.append((order, spool.tell()))
            line = json.dumps(pair).encode() + b"\n"
            with room_for(folder / "pairs", len(line)):
                spool.write(line)
    with room_for(folder / "pairs", spool.tell()):
        spool.flush()
    return _read(spool, sorted(entries)), dropped


def _read(spool, entries: list[tuple[int, int]]) -> Iterator[dict]:
    with spool:
        for _, start in entries:
            spool.seek(start)
            yield json.loads(spool.readline())


def seeded_order(seed: int, *parts: str) -> int:
    """A number below 2**128 that looks random, is the same on every machine, and differs between seeds."""
    text = "\0".join([str(seed), *parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def generation_of(rollout: dict) -> tuple[str, int]:
    """Which generation a rollout is of: its run, the part of its id before the last "/", and its step."""
    return rollout["rollout_id"].rpartition("/")[0], rollout["step"]


def _pairs_of_question(
    rollouts: list[dict], options: PairOptions, template: PromptTemplate, dropped: Counter
) -> list[dict]:
    first = rollouts[0]
    for other in rollouts:
        if differing := [name for name in QUESTION if (other[name] or None) != (first[name] or None)]:
            raise PairError(
                f"Rollouts {first['rollout_id']!r} and {other['rollout_id']!r} have the question id "
                f"{first['question_id']!r}, but differ in {', '.join(differing)}. Question ids must be unique over all "
                "runs that are read together: verify them apart, or set an id_prefix where the rows are loaded."
            )
    recent = [rollout for rollout in rollouts if rollout["step"] >= options.from_step]
    dropped["rollouts: of a step before from_step"] += len(rollouts) - len(recent)
    groups: dict[tuple, list[dict]] = {}
    for rollout in sorted(recent, key=lambda rollout: rollout["rollout_id"]):
        groups.setdefault(generation_of(rollout) if options.group_by == "generation" else (), []).append(rollout)
    roles = [_roles(group, options, dropped) for group in groups.values()]
    roles = [role for role in roles if role is not None]
    pairs = list(_chosen_pairs(roles, options, dropped))
    used = {rollout["rollout_id"] for pair in pairs for rollout in (*pair["parts"], pair["rejected"])}
    eligible = {rollout["rollout_id"] for role in roles for rollout in role["chosen"]}
    eligible |= {r["rollout_id"] for role in roles for kind in KINDS for _, r in role[kind]}
    dropped["rollouts: fit for a pair, not needed or over a cap"] += len(eligible - used)
    return [_as_row(pair, first, template) for pair in pairs]


def _roles(group: list[dict], options: PairOptions, dropped: Counter) -> dict[str, list] | None:
    """What each rollout of a group may stand for: {"chosen": [rollout], kind: [(why it is rejected, rollout)]}.
    None where no pair is possible."""
    right = [r for r in group if r["verdict"]["accuracy"] >= options.correct_threshold]
    if len(group) == 1 or not right:
        why = "of one rollout" if len(group) == 1 else "with none right"
        dropped[f"groups: {why}"] += 1
        dropped[f"rollouts: in a group {why}"] += len(group)
        return None
    lengths = [r["verdict"]["think_tokens"] for r in right if _whole(r)]
    shortest = options.min_length_ratio * statistics.median(lengths) if lengths else 0
    roles: dict[str, list] = {"chosen": [], **{kind: [] for kind in KINDS}}
    texts: set[str] = set()
    for rollout in group:
        text = rollout["completion"].strip()
        if text in texts:
            dropped["rollouts: same text as another"] += 1
            continue
        texts.add(text)
        taken, fate = _role(rollout, shortest, len(right) == len(group), options)
        for role, why in taken:
            roles[role].append(rollout if role == "chosen" else (why, rollout))
        if not taken:
            dropped[f"rollouts: {fate}"] += 1
    rejected = [r for kind in options.kinds for _, r in roles[kind]]
    if roles["chosen"] and rejected:
        return roles
    why = "with none to choose (right, consistent, well formed, neither repetitive nor too short)"
    if roles["chosen"]:
        why = "with all right and nothing to reject" if len(right) == len(group) else "with nothing to reject"
    dropped[f"groups: {why}"] += 1
    dropped[f"rollouts: in a group {why}"] += len({r["rollout_id"] for r in [*roles["chosen"], *rejected]})
    return None


def _whole(rollout: dict) -> bool:
    return rollout["verdict"]["format_ok"] and rollout["finish_reason"] != "length"


def _role(rollout: dict, shortest: float, all_right: bool, options: PairOptions) -> tuple[list[tuple[str, str]], str]:
    """([(role, why)], what to count the rollout under if it has no role)."""
    verdict, whole = rollout["verdict"], _whole(rollout)
    left_out = rollout["finish_reason"] == "length" and not options.include_truncated
    right = verdict["accuracy"] >= options.correct_threshold
    wrong = verdict["accuracy"] <= options.wrong_threshold
    consistency = verdict["consistency"]
    repetitive = verdict["repetition"] > options.max_repetition
    short = verdict["think_tokens"] < shortest
    roles = {
        ("penalty", "wrong"): wrong,
        ("penalty", "repetitive"): not wrong and whole and repetitive and not all_right,
        ("penalty", "too short"): not wrong and whole and short and (all_right or not repetitive),
        ("reflection", "wrong"): wrong and whole and consistency == "consistent" and not repetitive,
        ("consistency", "inconsistent"): right and whole and consistency == "inconsistent",
        ("chosen", "good"): right and whole and consistency == "consistent" and not repetitive and not short,
    }
    fates = {
        "cut off at the length limit": left_out,
        "not well formed, though not wrong": not wrong and not whole,
        "neither right nor wrong": not wrong and not right,
        "right, consistency unknown": right and consistency == "unknown",
        "of no use to the kinds asked for": True,
    }
    taken = [role for role, fits in roles.items() if fits and not left_out and role[0] in (*options.kinds, "chosen")]
    return taken, next(fate for fate, applies in fates.items() if applies)


def _candidates(kind: str, roles: dict[str, list], options: PairOptions, dropped: Counter) -> Iterator[dict]:
    """Possible pairs of a kind and group, the preferred first, each rollout once before one comes again."""

    def order(role: str, rollout: dict) -> int:
        return seeded_order(options.seed, kind, role, rollout["rollout_id"])

    def preference(rollout: dict) -> tuple:
        return -rollout["verdict"]["think_tokens"] if options.prefer_longer else 0, order("chosen", rollout)

    winners = sorted(roles["chosen"], key=preference)
    losers = sorted(roles[kind], key=lambda item: order("rejected", item[1]))
    tried = 0
    for shift in range(len(winners)):
        for index, (fault, loser) in enumerate(losers):
            winner = winners[(index + shift) % len(winners)]
            tried += 1
            if tried > MAX_TRIED:
                return
            ahead = winner["verdict"]["accuracy"] - loser["verdict"]["accuracy"]
            if ahead < -1e-9 or (fault == "wrong" and ahead < options.min_accuracy_margin - 1e-9):
                dropped["pairs: accuracy margin too small"] += 1
                continue
            text, parts = winner["completion"], [winner]
            if kind == "reflection":
                text, parts = join_for_reflection(loser["completion"], text, options.recheck_text), [loser, winner]
                if refusal := _refused_join(text, winner, options):
                    dropped[f"pairs: {refusal}"] += 1
                    continue
            yield {"kind": kind, "text": text, "parts": parts, "rejected": loser, "fault": fault}


def join_for_reflection(wrong: str, right: str, recheck: str) -> str:
    """`<think>`, the wrong completion's thinking, the turn, the right one's thinking, and all that follows that one's
    `</think>` as it was written. Both must be well formed."""
    closing = right.index("</think>")
    thinking = right[right.index("<think>") + len("<think>") : closing].strip()
    return f"<think>{split_completion(wrong)[0]}\n{recheck.strip()}\n{thinking}{right[closing:]}"


def _refused_join(text: str, winner: dict, options: PairOptions) -> str | None:
    """Why a joined completion cannot be chosen: the pieces are sound, but together they may not be."""
    think = split_completion(text)[0]
    if repetition_share(think, ngram=options.ngram) > options.max_repetition:
        return "joined thinking is repetitive"
    own = split_completion(winner["completion"])[0]
    read = {"problem_type": winner["problem_type"], "options": winner["options"]}
    if conclude_by_rules(think, **read) != conclude_by_rules(own, **read):
        return "joined thinking concludes something else"
    return None


def _chosen_pairs(groups: list[dict], options: PairOptions, dropped: Counter) -> Iterator[dict]:
    """Pairs of one question: one of each kind in turn, and in each kind one of each group in turn, up to the caps."""
    seen: set[tuple[str, str]] = set()

    def unseen(candidates: Iterator[dict]) -> Iterator[dict]:
        for pair in candidates:
            texts = pair["text"].strip(), pair["rejected"]["completion"].strip()
            if texts in seen:
                dropped["pairs: same texts as another pair"] += 1
            else:
                seen.add(texts)
                yield pair

    streams = [unseen(_in_turn([_candidates(kind, g, options, dropped) for g in groups])) for kind in options.kinds]
    of_kind = [itertools.islice(stream, options.max_pairs_per_question_and_kind) for stream in streams]
    return itertools.islice(_in_turn(of_kind), options.max_pairs_per_question)


def _in_turn(streams: Iterable[Iterator[dict]]) -> Iterator[dict]:
    left = deque(streams)
    while left:
        try:
            yield next(left[0])
            left.rotate(-1)
        except StopIteration:
            left.popleft()


def _as_row(pair: dict, question: dict, template: PromptTemplate) -> dict:
    """A pair in the columns of the pairs' files: the question's, so that it is encoded as in GRPO, and TRL's
    conversational preference format."""
    parts, rejected = pair["parts"], pair["rejected"]
    return {
        **{name: question[name] for name in ("question_id", *QUESTION, "data_source")},
        "prompt": build_messages(question, template),
        "chosen": [{"role": "assistant", "content": pair["text"]}],
        "rejected": [{"role": "assistant", "content": rejected["completion"]}],
        "rejected_finished": rejected["finish_reason"] != "length",
        "kind": pair["kind"],
        "chosen_ids": [part["rollout_id"] for part in parts],
        "rejected_id": rejected["rollout_id"],
        "verdicts": {
            "chosen": [part["verdict"] for part in parts],
            "rejected": rejected["verdict"],
            "fault": pair["fault"],
        },
        "prompt_template": rejected["prompt_template"],
        "policy": rejected["policy"],
    }
