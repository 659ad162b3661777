"""Yes/no: the first word of an answer (VideoHallu, PRIMO R1, TempCompass)."""

import re

from veripo_trl.answers.plain import unexplained
from veripo_trl.answers.texts import rouge
from veripo_trl.errors import SolutionError

_FIRST = re.compile(r"\W*(yes|no)\b(?!\s*(?:/|,?\s*(?:or|and|and/or)\b)\s*(?:yes|no|not)\b)", re.I)


def read_yes_no(text: str, options=None) -> str | None:
    """ "yes" or "no" if that is the first word: "Not sure" and "The answer is no" are neither, "yes or no" is both."""
    match = _FIRST.match(unexplained(text[:200]))
    return match[1].lower() if match else None


def true_yes_no(solution: str, options=None) -> str:
    answer = read_yes_no(solution)
    if answer is None:
        raise SolutionError(
            f"solution {solution!r} of a yes/no row: expected 'yes' or 'no' as its first word"
        )
    return answer


def yes_no_or_rouge(answer: str, truth: str) -> float:
    """Of texts: their first words where the truth's is yes or no, else ROUGE."""
    said = read_yes_no(truth)
    return rouge(answer, truth) if said is None else float(read_yes_no(answer) == said)
