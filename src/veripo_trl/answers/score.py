"""Score answers: the one meaning of "correct" that reward, verifier and evaluation share.

Pure functions over text, by problem type: `choice`, `numbers`, `maths` and `texts` read and compare. A model's bad answer
earns 0 and never raises; a malformed ground truth is refused by `check_solution` when the data loads.
"""

import functools
import re
from collections.abc import Sequence

from veripo_trl.answers.choice import option_labels, read_choice
from veripo_trl.answers.math_process import MATH_LIMIT_S, MAX_MATH_CHARS, calculate
from veripo_trl.answers.maths import math_text, same_math
from veripo_trl.answers.numbers import comparable, read_number, regression_score_of, same_number
from veripo_trl.answers.plain import words_of
from veripo_trl.answers.texts import one_minus_word_error_rate, rouge
from veripo_trl.errors import VeripoError

PROBLEM_TYPES = ("multiple choice", "numerical", "regression", "math", "OCR", "free-form")
REGRESSION_SCORES = ("mean_relative_accuracy", "relative_error")
_FILLERS = {"and", "then", "the", "a", "an"}  # "red, then blue" says what "red blue" says


class SolutionError(VeripoError):
    """A row's ground truth cannot be compared with any answer."""


def _only_span(text: str, tag: str) -> str | None:
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening) + len(opening), text.index(closing)
    return text[start:end].strip() if start <= end else None


def split_completion(text: str) -> tuple[str | None, str | None]:
    """(thinking, answer), stripped; each None unless its opening and its closing tag occur exactly once, in order."""
    return _only_span(text, "think"), _only_span(text, "answer")


def extract_answer(text: str) -> str | None:
    """The text of the only <answer> span, whatever surrounds it; None if there is none or several."""
    return _only_span(text, "answer")


def is_well_formed(text: str) -> bool:
    """Whether the whole text is one think span, then one answer span, with nothing but white space around them."""
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return False
    return re.fullmatch(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", text, re.S) is not None


def _check_type(problem_type: str) -> None:
    if problem_type not in PROBLEM_TYPES:
        raise SolutionError(f"problem_type {problem_type!r} is unknown; expected one of {', '.join(PROBLEM_TYPES)}")


def score_answer(
    answer: str | None,
    *,
    problem_type: str,
    solution: str,
    options: Sequence[str] | None = None,
    regression_score: str = "mean_relative_accuracy",
) -> float:
    """Accuracy of a model's answer span, in [0, 1]; None (no span) and anything unreadable earn 0.

    `regression_score`: "mean_relative_accuracy" (mean over theta in 0.50, 0.55, … 0.95 of relative error <= 1 - theta)
    or "relative_error" (1 - relative error, clipped). Raises SolutionError for a truth that `check_solution` refuses
    by its type or that cannot be read.
    """
    _check_type(problem_type)
    if regression_score not in REGRESSION_SCORES:
        raise ValueError(f"regression_score {regression_score!r} is unknown; expected one of {REGRESSION_SCORES}")
    if not solution.strip():
        raise SolutionError("solution is empty; expected the bare answer")
    if answer is None or not answer.strip():
        return 0.0
    if problem_type == "multiple choice":
        return float(read_choice(answer, options) == _true_choice(solution, options))
    if problem_type in ("numerical", "regression"):
        truth, number = _true_number(solution, problem_type), read_number(answer)
        if problem_type == "numerical":
            return float(same_number(number, truth))
        pairs = comparable(number, truth) if number else []
        return max((regression_score_of(*pair, regression_score) for pair in pairs), default=0.0)
    if problem_type == "math":
        return float(same_math(answer, solution))
    return one_minus_word_error_rate(answer, solution) if problem_type == "OCR" else rouge(answer, solution)


def answers_match(a: str, b: str, *, problem_type: str, options: Sequence[str] | None = None) -> bool:
    """Whether two answers of a model say the same, read as `score_answer` reads them; an unreadable choice or number
    matches nothing, except that choices without options also match as texts."""
    _check_type(problem_type)
    if problem_type == "multiple choice":
        first, second = read_choice(a, options), read_choice(b, options)
        if first is None and second is None and not options:
            return bool(words_of(a)) and words_of(a) == words_of(b)
        return first is not None and first == second
    if problem_type in ("numerical", "regression"):
        return same_number(read_number(a), read_number(b))
    if problem_type == "math":
        return same_math(a, b)
    first, second = ([w for w in re.findall(r"\w+", words_of(text)) if w not in _FILLERS] for text in (a, b))
    return bool(first) and first == second


def _true_choice(solution: str, options: Sequence[str] | None) -> frozenset[str]:
    tokens = [token for token in re.split(r"(?:[\s,;&()\[\].]|\band\b)+", solution) if token]
    if len(tokens) == 1 and tokens[0].isupper() and list(tokens[0]) == sorted(tokens[0]):
        tokens = list(tokens[0])  # "AC"
    letters, labels = frozenset(token.upper() for token in tokens), option_labels(options)
    if not tokens or len(letters) != len(tokens) or not all(re.fullmatch("[A-Z]", letter) for letter in letters):
        raise SolutionError(f"solution {solution!r} of a multiple-choice row: expected letters such as 'B' or 'A,C'")
    if labels and not letters <= labels.keys():
        raise SolutionError(
            f"solution {solution!r} is not among the options' letters {', '.join(labels)}; correct the solution or "
            "the options"
        )
    return letters


@functools.lru_cache(maxsize=4096)
def _true_number(solution: str, problem_type: str) -> tuple[float, bool]:
    number = read_number(solution)
    if number is None:
        raise SolutionError(f"solution {solution!r} of a {problem_type} row: expected one finite number such as '3.5'")
    return number


def check_solution(*, problem_type: str, solution: str, options: Sequence[str] | None = None) -> None:
    """Raise SolutionError, saying what was expected, for a ground truth that no answer could be compared with."""
    _check_type(problem_type)
    if not isinstance(solution, str) or not solution.strip():
        raise SolutionError(f"solution is {solution!r}; expected the bare answer as a non-empty string")
    if re.search(r"</?(?:answer|think)>", solution):
        raise SolutionError(f"solution {solution!r} holds tags; expected the bare answer without <answer>")
    if problem_type == "multiple choice":
        _true_choice(solution, options)
    elif problem_type in ("numerical", "regression"):
        _true_number(solution, problem_type)
    elif problem_type == "math":
        if len(solution.strip()) > MAX_MATH_CHARS:
            raise SolutionError(f"solution has {len(solution)} characters; expected {MAX_MATH_CHARS} at most")
        if not calculate("is_maths", math_text(solution)):
            raise SolutionError(
                f"solution {solution!r} of a math row: math-verify cannot parse or compare it within {MATH_LIMIT_S:g} s; "
                "write a number or a LaTeX expression, or use the problem type free-form"
            )
