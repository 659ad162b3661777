"""Questions about the clips: rows in the project's schema, with templated thinking.

Three families: **count** (numerical), **order** (multiple choice: the first, second or last colour)
and **list** (free-form: every colour in order). Only the `train` split carries thoughts. In a
planted share of them the conclusion contradicts the answer, which stays right: something for the
verifier to find. No field of a row says which they are; `veripo_trl.tiny.judge` reads it out of the
text.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from veripo_trl.tiny.clips import COLOURS, MAX_COUNT, clip_spec

NUMBER_WORDS = ("one", "two", "three", "four", "five", "six")
ORDINALS = ("first", "second", "last")  # of the three colours of an order clip
LETTERS = "ABCD"
SPLITS = ("train", "rl", "dev", "heldout")
PROBLEM_TYPES = {"count": "numerical", "order": "multiple choice", "list": "free-form"}


@dataclasses.dataclass(frozen=True)
class SplitSize:
    """`questions` rows over `clips` clips. An order clip serves up to three order questions and one
    list question."""

    clips: int
    questions: int


SIZES = {
    "train": SplitSize(clips=3000, questions=4500),
    "rl": SplitSize(clips=700, questions=1000),
    "dev": SplitSize(clips=200, questions=200),
    "heldout": SplitSize(clips=450, questions=450),
}
SHARES = {"count": 0.35, "order": 0.55, "list": 0.10}
PLANTED_SHARE = 0.2


def plan_split(size: SplitSize) -> dict[str, int]:
    """Split a size into `{"count", "order", "list"}` questions and `{"count_clips",
    "order_clips"}`.

    A count clip serves one question. Raises ValueError where the order clips left over are too few
    or none.
    """
    count = round(size.questions * SHARES["count"])
    listing = round(size.questions * SHARES["list"])
    order = size.questions - count - listing
    needed = max(-(-order // len(ORDINALS)), listing)
    if size.clips - count < needed:
        raise ValueError(
            f"{size.questions} questions with shares {SHARES} need {count} count clips and at least {needed} order "
            f"clips, but clips is {size.clips}: raise clips or lower questions"
        )
    # More clips than questions would leave clips that nobody asks about.
    order_clips = min(size.clips - count, order + listing)
    return {
        "count": count,
        "order": order,
        "list": listing,
        "count_clips": count,
        "order_clips": order_clips,
    }


def make_split(
    split: str,
    *,
    seed: int = 0,
    size: SplitSize | None = None,
    planted_share: float = PLANTED_SHARE,
) -> tuple[list[dict], dict[str, tuple[str, list[int]]]]:
    """Make the rows of one split and say which clips they need.

    Returns `(rows, clips)`; `clips` maps a path like `clips/train-count-00007.mp4` to the `(kind,
    key)` that `clips.make_clip` draws it from. Rows lack `media_root`: the folder that the paths
    are relative to.
    """
    plan = plan_split(size or SIZES[split])
    code = SPLITS.index(split)
    clips = {}
    for kind in ("count", "order"):
        for number in range(plan[f"{kind}_clips"]):
            clips[f"clips/{split}-{kind}-{number:05d}.mp4"] = (kind, [seed, code, number])
    count_paths = [path for path, (kind, _) in clips.items() if kind == "count"]
    order_paths = [path for path, (kind, _) in clips.items() if kind == "order"]

    rng = np.random.default_rng([seed, code])
    asked = [("count", path, None) for path in count_paths]
    # Clips take their turns until the questions are used up; each clip asks its ordinals in an order of its own.
    ordinals = {path: rng.permutation(len(ORDINALS)).tolist() for path in order_paths}
    for number in range(plan["order"]):
        turn, place = divmod(number, len(order_paths))
        asked.append(("order", order_paths[place], ordinals[order_paths[place]][turn]))
    # From the other end, so that every clip is asked about.
    asked += [("list", path, None) for path in order_paths[::-1][: plan["list"]]]

    planted = (
        _planted_rows([family for family, _, _ in asked], planted_share, rng)
        if split == "train"
        else set()
    )
    rows = []
    for number, (family, path, ordinal) in enumerate(asked):
        spec = clip_spec(*clips[path])
        row = _FAMILIES[family](spec, ordinal, number in planted, rng)
        rows.append({**row, "videos": [path], "images": [], "data_source": f"tiny-{family}"})
    return numbered(rows, split, rng), clips


def numbered(rows: list[dict], split: str, rng: np.random.Generator) -> list[dict]:
    """A split's rows in another order, with their ids, and without thoughts unless it trains them."""
    shuffled = [rows[index] for index in rng.permutation(len(rows))]
    for number, row in enumerate(shuffled):
        row["question_id"] = f"tiny-{split}-{number:05d}"
        row["process"] = row["process"] if split == "train" else None
    return shuffled


def _planted_rows(families: list[str], share: float, rng: np.random.Generator) -> set[int]:
    """Choose the rows whose thought contradicts the answer: the exact share of every family."""
    planted = set()
    for family in PROBLEM_TYPES:
        numbers = [number for number, name in enumerate(families) if name == family]
        planted.update(rng.permutation(numbers)[: round(share * len(numbers))].tolist())
    return planted


def _count_row(spec: dict, ordinal: None, planted: bool, rng: np.random.Generator) -> dict:
    count = len(spec["colours"])
    concluded = (
        int(rng.choice([n for n in range(1, MAX_COUNT + 1) if n != count])) if planted else count
    )
    return {
        "problem": "How many shapes are there?",
        "options": [],
        "problem_type": PROBLEM_TYPES["count"],
        "solution": str(count),
        "process": f"I count {' '.join(NUMBER_WORDS[:count])}, so {concluded}.",
    }


def _order_row(spec: dict, ordinal: int, planted: bool, rng: np.random.Generator) -> dict:
    shown = spec["colours"]
    stranger = str(rng.choice([name for name in COLOURS if name not in shown]))
    # In alphabetical order: a colour's letter depends on its rivals, yet is no mere chance, and is soon learned.
    choices = sorted([*shown, stranger])
    right = choices.index(shown[ordinal])
    # A contradicting thought names another option, colour and letter together.
    concluded = (
        int(rng.choice([n for n in range(len(choices)) if n != right])) if planted else right
    )
    return {
        "problem": f"Which colour is {ORDINALS[ordinal]}?",
        "options": [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)],
        "problem_type": PROBLEM_TYPES["order"],
        "solution": LETTERS[right],
        "process": (
            f"I see {' then '.join(shown)}, {ORDINALS[ordinal]} is {choices[concluded]}: {LETTERS[concluded]}."
        ),
    }


def _list_row(spec: dict, ordinal: None, planted: bool, rng: np.random.Generator) -> dict:
    shown = list(spec["colours"])
    concluded = shown
    while planted and concluded == shown:
        concluded = [str(name) for name in rng.permutation(shown)]
    return {
        "problem": "List the colours in order.",
        "options": [],
        "problem_type": PROBLEM_TYPES["list"],
        "solution": " ".join(shown),
        "process": f"I see {' then '.join(shown)}, so {' '.join(concluded)}.",
    }


_FAMILIES: dict[str, Callable[..., dict]] = {
    "count": _count_row,
    "order": _order_row,
    "list": _list_row,
}


def template_texts() -> list[str]:
    """Every phrase that the templates can produce, without a seed: what the tokenizer is trained
    on."""
    texts = [
        "user",
        "assistant",
        "system",
        "seconds",
    ]  # with the chat template's words, and Qwen3-VL's time stamps
    texts += ["How many shapes are there?", "List the colours in order."]
    for ordinal in ORDINALS:
        texts.append(f"Which colour is {ordinal}?")
    for number in range(1, MAX_COUNT + 1):
        texts.append(f"I count {' '.join(NUMBER_WORDS[:number])}, so {number}.")
    for colour in COLOURS:
        texts.append(colour)
        texts += [f" {letter}. {colour}" for letter in LETTERS]
        for ordinal in ORDINALS:
            texts.append(f"I see {colour} then {colour}, {ordinal} is {colour}: {LETTERS[0]}.")
    return texts
