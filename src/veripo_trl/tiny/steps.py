"""Questions that take several steps, about clips of four shapes whose colours may come again: name
each shape with its time and how many were of the colour asked about, then conclude.

    How many shapes are red?
        red: 0.0 red one 1.0 blue one 2.0 red two 3.0 green two, so 2.
    How many shapes are like the last?
        green: 0.0 red none 1.0 blue none 2.0 red none 3.0 green one, so 1.
    Which colour follows the first red?
        red: 0.0 red one 1.0 blue one 2.0 red two 3.0 green two, then blue, so A.

The thoughts of the split that has them differ in what a verifier and a reward can choose from: of
`STYLES`, some name nothing and only conclude ("So 2."), others misname one shape, conclude from
that, say `pairs.RECHECK` and think again. In `PLANTED_SHARE` of each the last conclusion
contradicts the answer, which stays right. Every colour has its letter, always the same: to look it
up is what the first world learns last, and not what is asked here.
"""

import numpy as np

from veripo_trl.tiny.clips import COLOURS, FPS, NUM_FRAMES, STREAM_LENGTH
from veripo_trl.tiny.questions import NUMBER_WORDS, PLANTED_SHARE
from veripo_trl.verifier.pairs import RECHECK

STYLES = {"named": 0.6, "short": 0.2, "rechecked": 0.2}
OPTIONS = [f"{letter}. {colour}" for letter, colour in zip("ABCDEF", sorted(COLOURS), strict=True)]
LETTER_OF = {option[3:]: option[0] for option in OPTIONS}
TIMES = [f"{n * NUM_FRAMES / STREAM_LENGTH / FPS:.1f}" for n in range(STREAM_LENGTH)]
WORDS = ("none", *NUMBER_WORDS[:STREAM_LENGTH])
COUNTS = [str(count) for count in range(STREAM_LENGTH + 1)]
TURNS = 3  # questions about one clip


def ask(spec: dict, turn: int, rng: np.random.Generator) -> dict:
    """A row's problem, problem_type, options, solution and process; by `turn` a count, a count like
    the last, what follows."""
    colours = spec["colours"]
    about = str(rng.choice(spec["palette"] if turn == 0 else colours[:-1]))
    question = {
        "problem": (
            f"How many shapes are {about}?",
            "How many shapes are like the last?",
            f"Which colour follows the first {about}?",
        )[turn],
        "problem_type": "multiple choice" if turn == 2 else "numerical",
        "options": OPTIONS if turn == 2 else [],
        "solution": solve(colours, turn, about)[1],
    }
    style = str(rng.choice(list(STYLES), p=list(STYLES.values())))
    others = [
        each
        for each in (list(LETTER_OF.values()) if turn == 2 else COUNTS)
        if each != question["solution"]
    ]
    concluded = str(rng.choice(others)) if rng.random() < PLANTED_SHARE else question["solution"]
    thought = f"So {concluded}." if style == "short" else _thought(colours, turn, about, concluded)
    if style == "rechecked":
        seen, place = list(colours), int(rng.integers(STREAM_LENGTH))
        seen[place] = str(rng.choice([name for name in COLOURS if name != colours[place]]))
        thought = f"{_thought(seen, turn, about)}\n{RECHECK}\n{thought}"
    return {**question, "process": thought}


def solve(colours: list[str], turn: int, about: str) -> tuple[str, str]:
    """(the thought up to its conclusion, the answer) where these colours are seen."""
    about = colours[-1] if turn == 1 else about
    counts = [colours[: n + 1].count(about) for n in range(STREAM_LENGTH)]
    tally = [
        f"{time} {colour} {WORDS[count]}"
        for time, colour, count in zip(TIMES, colours, counts, strict=True)
    ]
    steps = f"{about}: {' '.join(tally)}"
    if turn < 2:
        return steps, str(counts[-1])
    place = colours.index(about) if about in colours else -1
    follows = colours[min(place + 1, STREAM_LENGTH - 1)]
    return f"{steps}, then {follows}", LETTER_OF[follows]


def _thought(colours: list[str], turn: int, about: str, concluded: str | None = None) -> str:
    steps, answer = solve(colours, turn, about)
    return f"{steps}, so {concluded or answer}."


def name_shapes(colours: list[str]) -> str:
    """What is seen, without a question."""
    return " ".join(f"{time} {colour}" for colour, time in zip(colours, TIMES, strict=True))


def template_texts() -> list[str]:
    """Every word that is not among the other questions'."""
    colours = list(COLOURS)
    texts = [RECHECK, "\n", *OPTIONS, *(f" {text}" for text in OPTIONS), *COUNTS, "So 1."]
    for about in colours:
        texts += [f"How many shapes are {about}?", f"Which colour follows the first {about}?"]
        texts += [
            _thought([about] * STREAM_LENGTH, 2, about),
            _thought([about] * STREAM_LENGTH, 1, about),
        ]
    return [*texts, "How many shapes are like the last?", *(f" {word}" for word in WORDS)]
