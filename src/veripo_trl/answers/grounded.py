"""Grounded choice (NExT-GQA): a letter and the spans that show it, "B; 5.0 to 11.0". Each counts without the other, as
VideoChat-R1's two answers do (arXiv 2504.06958)."""

import re

from veripo_trl.answers.choice import read_choice, true_choice
from veripo_trl.answers.plain import stated, unexplained
from veripo_trl.answers.spans import Spans, TrueSpans, read_spans, same_spans, tiou, true_spans
from veripo_trl.errors import SolutionError

Grounded = tuple[frozenset[str] | None, Spans | None]


def _parts(text: str) -> list[str]:
    for separator in (r"\s*[;\n]\s*", r"\s*,\s*"):
        if len(parts := re.split(separator, text.strip(), maxsplit=1)) == 2:
            return parts
    return [text, text]


def read_grounded(text: str, options=None) -> Grounded | None:
    """(letters, spans), one of them None where only the other can be read."""
    letters, spans = _parts(stated(unexplained(text)))
    found = read_choice(letters, options), read_spans(spans)
    return None if found == (None, None) else found


def true_grounded(solution: str, options=None) -> tuple[frozenset[str], TrueSpans]:
    letters, separator, spans = solution.partition(";")
    if not separator:
        raise SolutionError(
            f"solution {solution!r}: expected a letter, ';' and spans, as in 'B; 5.0 to 11.0 of 33.75'"
        )
    return true_choice(letters, options), true_spans(spans.strip())


def grounded_letter(answer: Grounded, truth) -> float:
    return float(answer[0] == truth[0])


def grounded_tiou(answer: Grounded, truth) -> float:
    return tiou(answer[1], truth[1]) if answer[1] else 0.0


def grounded_score(answer: Grounded, truth) -> float:
    return (grounded_letter(answer, truth) + grounded_tiou(answer, truth)) / 2


def same_grounded(a: Grounded, b: Grounded) -> bool:
    """In all that both say, which must be one of the two at least: a thinking may conclude the letter alone."""
    letters = a[0] == b[0] if a[0] and b[0] else None
    spans = same_spans(a[1], b[1]) if a[1] and b[1] else None
    return False not in (letters, spans) and True in (letters, spans)


def grounded_metrics(answer: Grounded | None, truth) -> dict[str, float]:
    answer = answer or (None, None)
    return {"letter accuracy": grounded_letter(answer, truth), "mIoU": grounded_tiou(answer, truth)}
