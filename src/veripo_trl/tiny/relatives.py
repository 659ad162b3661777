"""Questions that VerIPO's relatives ask, about the same small clips: rows in the project's schema,
with thinking.

A family is a function of a clip's spec; `FAMILIES` says which clips it asks about. A world of these
(`world.make_world(questions=["when"])`) stands in a folder of its own, with a model whose tokenizer
knows their words and numbers; worlds of families without `words` have the same tokenizer. Nothing is
planted in their thinking, but in that of `steps` (steps.py).
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from veripo_trl.data.streaming import taught_rows, window_time
from veripo_trl.tiny import steps
from veripo_trl.tiny.clips import (
    BACKGROUND,
    COLOURS,
    FPS,
    NUM_FRAMES,
    SIZE,
    STREAM_LENGTH,
    TURN,
    clip_spec,
    draw_clip,
)
from veripo_trl.tiny.questions import LETTERS, ORDINALS, SPLITS, numbered

SIZES = {
    "train": 4500,
    "rl": 1000,
    "dev": 200,
    "heldout": 450,
}  # questions, of all families of a world together
SECTIONS = ("planning", "observation", "reasoning")  # of PRIMO's thinking
_STAMPS = [f"00:{half // 2:02d}" + ".5" * (half % 2) for half in range(NUM_FRAMES + 1)]
_SECONDS = [f"{frame / FPS:.1f}" for frame in range(NUM_FRAMES + 1)]
# Single tokens, so that a number is one choice.
TOKENS = (
    *_SECONDS,
    *_STAMPS,
    *map(str, range(10, 100, 10)),
    *map(str, range(100, 1001, 100)),
    *(f"<{close}{tag}>" for tag in ("time", "caption", *SECTIONS) for close in ("", "/")),
)


def _seen(spec: dict) -> str:
    return f"I see {' then '.join(spec['colours'])}"


def _span(shape: dict) -> str:
    return f"{_SECONDS[shape['first']]} to {_SECONDS[shape['last']]}"


def _when(spec: dict, turn: int, rng: np.random.Generator) -> dict:
    shape = spec["shapes"][turn]
    return {
        "problem": f"When is {shape['colour']} visible?",
        "problem_type": "temporal grounding",
        "solution": f"{_span(shape)} of {_SECONDS[-1]}",
        "process": f"{_seen(spec)}, {shape['colour']} from {_span(shape)}.",
    }


def _which(spec: dict, turn: int, rng: np.random.Generator) -> dict:
    shape = spec["shapes"][turn]
    return {
        "problem": f"Which number is {shape['colour']}, and when?",
        "problem_type": "object and time",
        "solution": f"{shape['mark']}; {_span(shape)} of {_SECONDS[-1]}",
        "process": f"{_seen(spec)}, {shape['colour']} from {_span(shape)} is {shape['mark']}.",
    }


def _where(spec: dict, turn: int, rng: np.random.Generator) -> dict:
    ys, xs = np.nonzero((draw_clip(spec)[-1] != BACKGROUND).any(-1))
    edges = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / SIZE * 1000
    box = [int(edge) for edge in (edges / 100).round() * 100]
    return {
        "problem": "Give the box of the shape at the end.",
        "problem_type": "box grounding",
        "solution": str(box),
        "process": f"I see {spec['colours'][-1]} from {box[0]} to {box[2]} "
        f"and from {box[1]} to {box[3]}.",
    }


def _change(spec: dict, turn: int, rng: np.random.Generator) -> dict:
    truth = "no" if len(set(spec["colours"])) == 1 else "yes"
    return {
        "problem": "Does the shape change its colour?",
        "problem_type": "yes/no",
        "solution": truth,
        "process": f"{_seen(spec)}, so {truth}.",
    }


def _lettered(choices: list[str]) -> list[str]:
    return [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]


def _choice(spec: dict, colour: str, rng: np.random.Generator) -> dict:
    """The clip's colours and a stranger as options, by alphabet; the letter of `colour`."""
    stranger = str(rng.choice([name for name in COLOURS if name not in spec["colours"]]))
    choices = sorted([*spec["colours"], stranger])
    return {
        "options": _lettered(choices),
        "problem_type": "multiple choice",
        "solution": LETTERS[choices.index(colour)],
    }


def _several(spec: dict, turn: int, rng: np.random.Generator) -> dict:
    shown, others = spec["colours"], [name for name in COLOURS if name not in spec["colours"]]
    right = int(rng.integers(1, 4))  # how many of the four
    choices = sorted(
        [*rng.permutation(shown)[:right].tolist(), *rng.permutation(others)[: 4 - right].tolist()]
    )
    letters = ",".join(
        letter for letter, choice in zip(LETTERS, choices, strict=True) if choice in shown
    )
    return {
        "problem": "Which of these colours appear?",
        "options": _lettered(choices),
        "problem_type": "multiple choice",
        "solution": letters,
        "process": f"{_seen(spec)}: {letters}.",
    }


def _before(spec: dict, turn: int, rng: np.random.Generator) -> dict:
    asked, colour = spec["shapes"][turn + 1], spec["colours"][turn]
    choice = _choice(spec, colour, rng)
    return {
        **choice,
        "problem": "Which colour is before this?",
        "process": f"{_seen(spec)}, before {asked['colour']} is {colour}: {choice['solution']}.",
        "images": [[asked["first"]]],
    }


def _segments(spec: dict, turn: int, rng: np.random.Generator) -> dict:
    colour = spec["colours"][turn]
    choice = _choice(spec, colour, rng)
    trace = "".join(
        f"<time>{_STAMPS[shape['first']]}-{_STAMPS[shape['last']]}</time>"
        f"<caption>{shape['colour']}</caption>"
        f"<think>{ordinal}</think>"
        for shape, ordinal in zip(spec["shapes"], ORDINALS, strict=True)
    )
    return {
        **choice,
        "problem": f"Which colour is {ORDINALS[turn]}?",
        "process": f"{trace} {ORDINALS[turn]} is {colour}: {choice['solution']}.",
    }


def _progress(spec: dict, turn: int, rng: np.random.Generator) -> dict:
    turned, now = spec["percent"]
    thoughts = ("Find the shape.", f"It is at 0 then {turned} then {now}.", f"So {now}.")
    sections = "".join(
        f"<{name}>{text}</{name}>" for name, text in zip(SECTIONS, thoughts, strict=True)
    )
    return {
        "problem": "How far is it now, in percent?",
        "problem_type": "regression",
        "solution": str(now),
        "process": sections,
        "images": [[0], [NUM_FRAMES - 1]],
    }


def _composite(spec: dict, turn: int, rng: np.random.Generator) -> dict:
    turned, now = spec["percent"]
    way = "on" if now > turned else "back" if now < turned else "still"
    return {
        "problem": f"First 0, before {turned}. How far is it now, in percent?",
        "problem_type": "regression",
        "solution": str(now),
        "process": f"It is {way}, so {now}.",
        "images": [[0, TURN - 1, NUM_FRAMES - 1]],  # one picture
        "videos": False,
    }


def _stream(spec: dict, turn: int, rng: np.random.Generator) -> dict:
    """About four clips in one video. The colour that the last one shows, where it is not the answer,
    is no option: to see that clip alone leaves four."""
    if turn == 2:
        listed = " ".join(spec["colours"])
        return {
            "problem": "List the colours in order.",
            "problem_type": "free-form",
            "solution": listed,
            "process": f"{_seen(spec)}, so {listed}.",
        }
    asked, last = ("first", "last")[turn], spec["colours"][-1]
    colour = spec["colours"][-turn]  # [0] or [-1]
    others = [name for name in COLOURS if name not in (colour, last)]
    choices = sorted([colour, *rng.permutation(others)[: len(LETTERS) - 1].tolist()])
    letter = LETTERS[choices.index(colour)]
    return {
        "problem": f"Which colour is {asked}?",
        "options": _lettered(choices),
        "problem_type": "multiple choice",
        "solution": letter,
        "process": f"{_seen(spec)}, {asked} is {colour}: {letter}.",
    }


def _stream_turn(spec: dict, turn: int, rng: np.random.Generator) -> dict:
    """What SFT teaches of it: a thought on each clip before the last, then the three answers."""
    before, stay = STREAM_LENGTH - 1, NUM_FRAMES // STREAM_LENGTH
    times = [window_time(n * stay / FPS, (n + 1) * stay / FPS) for n in range(STREAM_LENGTH)]
    turns = [(time, f"I see {name}.", {}) for time, name in zip(times, spec["colours"][:before])]
    question = {"options": [], "images": [], **_stream(spec, max(turn - before, 0), rng)}
    clip = min(turn, before)
    shown = range(clip * stay, (clip + 1) * stay)
    return {**taught_rows(question, turns, last=times[-1])[clip], "part": list(shown)}


@dataclasses.dataclass(frozen=True)
class Family:
    """`ask(spec, turn, rng)` about clips of `kind`, `turns` questions each: a row's problem,
    problem_type, solution, process, and where they are not empty options and images (the numbers of
    the frames that each shows side by side); `"videos": False` where the clip itself is not
    shown, `"part"` (the numbers of its frames) where a part of it is.

    taught: what the splits of SFT (train, dev) have instead. Its words are not the tokenizer's.
    words: texts that only a world of this family trains its tokenizer on too."""

    kind: str
    turns: int
    ask: Callable[[dict, int, np.random.Generator], dict]
    taught: "Family | None" = None
    words: Callable[[], list[str]] | None = None


FAMILIES = {
    "when": Family("order", 3, _when),
    "which": Family("marked", 3, _which),
    "where": Family("order", 1, _where),
    "change": Family("change", 1, _change),
    "several": Family("order", 1, _several),
    "before": Family("order", 2, _before),
    "segments": Family("order", 3, _segments),
    "progress": Family("progress", 1, _progress),
    "composite": Family("progress", 1, _composite),
    "stream": Family("stream", 3, _stream, taught=Family("stream", STREAM_LENGTH + 2, _stream_turn)),
    "steps": Family("steps", steps.TURNS, steps.ask, words=steps.template_texts),
}


def make_split(
    split: str, *, questions: list[str], seed: int = 0, size: int | None = None
) -> tuple[list[dict], dict[str, tuple]]:
    """Make the rows of one split, `size` of them, and say which media they need: `(rows, {path:
    arguments of clips.make_clip after the path})`. The families have equal shares; those named
    first have the rows left over."""
    code, size = SPLITS.index(split), SIZES[split] if size is None else size
    # 9: so many there were first. One more leaves the rows of the others as they are.
    rng = np.random.default_rng([seed, code, 9])
    rows, media = [], {}
    for name, family in ((name, FAMILIES[name]) for name in questions):
        if family.taught is not None and split in ("train", "dev"):
            family = family.taught
        share = size // len(questions) + (questions.index(name) < size % len(questions))
        for number in range(share):
            clip, turn = divmod(number, family.turns)
            key = [seed, code, list(FAMILIES).index(name), clip]
            stem = f"{split}-{name}-{clip:05d}"
            row = {"options": [], **family.ask(clip_spec(family.kind, key), turn, rng)}
            part = row.pop("part", None)
            ends = f"-{part[0]}-{part[-1]}" if part else ""
            videos = [f"clips/{stem}{ends}.mp4"] if row.get("videos", True) else []
            images = {
                f"clips/{stem}-{'-'.join(map(str, shown))}.png": shown
                for shown in row.get("images", [])
            }
            media |= {path: (family.kind, key, *([part] if part else [])) for path in videos}
            media |= {path: (family.kind, key, shown) for path, shown in images.items()}
            rows.append(
                {**row, "videos": videos, "images": list(images), "data_source": f"tiny-{name}"}
            )
    return numbered(rows, split, rng), media


def template_texts(questions: list[str] = ()) -> list[str]:
    """Texts with every word of the families without `taught` and `words`, always the same: what the
    tokenizer is trained on, and on the `words` of `questions`. The others spell theirs."""
    own = [text for name in questions if FAMILIES[name].words for text in FAMILIES[name].words()]
    families = [name for name, each in FAMILIES.items() if not (each.taught or each.words)]
    rows, _ = make_split("train", questions=families, size=100 * len(families))
    texts = [
        " ".join([row["problem"], *row["options"], row["process"], row["solution"]]) for row in rows
    ]
    return [
        *own,
        *texts,
        "yes",
        "no",
        *ORDINALS,
        "It",
        "So",
        "Find",
    ]  # these stand without a space before them too
