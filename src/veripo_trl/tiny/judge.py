"""The tiny world's own judge, for its tables: it reads the world's thought templates, and nothing
else.

It shares no code with the project's `rules` judge, which curates the training pairs: the judge that
reports is not the judge that curates.
"""

import re

_COMPLETION = re.compile(
    r"\s*<think>(?P<think>[^<>]*)</think>\s*<answer>(?P<answer>[^<>]*)</answer>\s*"
)
_CONCLUSIONS = (
    re.compile(r"I count[a-z ]*, so (?P<conclusion>\d+)\."),
    re.compile(r"I see [a-z ]+, (?:first|second|last) is [a-z]+: (?P<conclusion>[A-Z])\."),
    re.compile(r"I see [a-z ]+, so (?P<conclusion>[a-z]+(?: [a-z]+)*)\."),
    # of steps.py; where it says to check again, what comes last
    re.compile(
        r"(?:[^\n]+\n)*(?:[a-z]+:(?: \d\.0 [a-z]+ [a-z]+){4}(?:, then [a-z]+)?, so|So) "
        r"(?P<conclusion>[0-9A-F])\."
    ),
)


def conclude(think: str) -> str | None:
    """Return what a templated thought concludes: a number, an option's letter, a list of colours;
    None if unreadable.

    For an order question the letter is the conclusion, whatever colour is named before it.
    """
    for template in _CONCLUSIONS:
        if match := template.fullmatch(think.strip()):
            return match["conclusion"]
    return None


def judge(
    completion: str, *, problem_type: str | None = None, options: list[str] | None = None
) -> str:
    """Compare a completion's concluded answer with its given one.

    Returns "consistent", "inconsistent", or "unknown" where the completion or its thought does not
    follow the templates. `problem_type` and `options` are there to be called like the other judges;
    the templates tell already.
    """
    parts = _COMPLETION.fullmatch(completion)
    concluded = conclude(parts["think"]) if parts else None
    if concluded is None:
        return "unknown"
    return "consistent" if concluded == parts["answer"].strip() else "inconsistent"
