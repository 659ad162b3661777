"""Score answers: the one meaning of "correct" that reward, verifier and evaluation share.

Pure functions over text, by problem type: the modules beside this one read and compare. A model's bad answer earns 0 and
never raises; a malformed ground truth is refused by `check_solution` when the data loads.
"""

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from veripo_trl.answers.boxes import box_iou, box_metrics, read_box, same_box, true_box
from veripo_trl.answers.choice import read_choice, true_choice
from veripo_trl.answers.grounded import grounded_metrics, grounded_score, read_grounded, same_grounded, true_grounded
from veripo_trl.answers.maths import check_math, same_math
from veripo_trl.answers.numbers import absolute_error, mean_relative_accuracy, read_number, same_number, true_number
from veripo_trl.answers.objects import object_metrics, object_score, read_object, same_object, true_object
from veripo_trl.answers.plain import words_of
from veripo_trl.answers.spans import read_spans, same_spans, span_metrics, tiou, true_spans
from veripo_trl.answers.texts import one_minus_word_error_rate, rouge, rouge_metrics, same_words
from veripo_trl.answers.yes_no import read_yes_no, true_yes_no
from veripo_trl.errors import SolutionError


def _text(text: str, options=None) -> str:
    return text


class ProblemType(NamedTuple):
    """What a problem type is: five functions.

    read: (an answer's text, the row's options) -> what it says, None if that cannot be told.
    truth: (a solution, the row's options) -> what it says; SolutionError if no answer could be compared with it.
    score: (what was read, the truth) -> in [0, 1].
    same: (what was read, likewise) -> whether two answers say the same.
    metrics: (what was read or None, the truth) -> {name: value}; the mean over rows is shown beside the accuracy.
    """

    read: Callable[[str, Sequence[str] | None], Any]
    truth: Callable[[str, Sequence[str] | None], Any]
    score: Callable[[Any, Any], float]
    same: Callable[[Any, Any], bool]
    metrics: Callable[[Any, Any], dict[str, float]] = lambda answer, truth: {}


PROBLEM_TYPES = {
    "multiple choice": ProblemType(read_choice, true_choice, operator.eq, operator.eq),
    "numerical": ProblemType(read_number, true_number, same_number, same_number),
    "regression": ProblemType(read_number, true_number, mean_relative_accuracy, same_number, absolute_error),
    "math": ProblemType(_text, _text, same_math, same_math),
    "OCR": ProblemType(_text, _text, one_minus_word_error_rate, same_words),
    "free-form": ProblemType(_text, _text, rouge, same_words, rouge_metrics),
    "temporal grounding": ProblemType(read_spans, true_spans, tiou, same_spans, span_metrics),
    "grounded choice": ProblemType(read_grounded, true_grounded, grounded_score, same_grounded, grounded_metrics),
    "object and time": ProblemType(read_object, true_object, object_score, same_object, object_metrics),
    "box grounding": ProblemType(read_box, true_box, box_iou, same_box, box_metrics),
    "yes/no": ProblemType(read_yes_no, true_yes_no, operator.eq, operator.eq),
    "thought": ProblemType(_text, _text, rouge, same_words),  # a note on a part of a video: text without an answer span
}


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


def _type_of(problem_type: str) -> ProblemType:
    if problem_type not in PROBLEM_TYPES:
        raise SolutionError(f"problem_type {problem_type!r} is unknown; expected one of {', '.join(PROBLEM_TYPES)}")
    return PROBLEM_TYPES[problem_type]


def read_answer(answer: str | None, *, problem_type: str, options: Sequence[str] | None = None) -> Any:
    """What a model's answer span says, in its type's own form; None for no span, an empty and an unreadable one."""
    kind = _type_of(problem_type)
    return kind.read(answer, options) if answer and answer.strip() else None


def score_answer(
    answer: str | None,
    *,
    problem_type: str,
    solution: str,
    options: Sequence[str] | None = None,
    score: Callable[[Any, Any], float] | None = None,
) -> float:
    """Accuracy of a model's answer span, in [0, 1]; None (no span) and anything unreadable earn 0.

    `score`: in place of the type's own, of what its `read` and its `truth` give. Raises SolutionError for a truth that
    `check_solution` refuses by its type or that cannot be read.
    """
    kind = _type_of(problem_type)
    if not solution.strip():
        raise SolutionError("solution is empty; expected the bare answer")
    truth, said = kind.truth(solution, options), read_answer(answer, problem_type=problem_type, options=options)
    return 0.0 if said is None else float((score or kind.score)(said, truth))


def answer_metrics(
    answer: str | None, *, problem_type: str, solution: str, options: Sequence[str] | None = None
) -> dict[str, float]:
    """What the type's metrics are means of, for this answer: {"mIoU": .5, "R@.3": 1.0, …}; {} for a type without."""
    kind = _type_of(problem_type)
    said = read_answer(answer, problem_type=problem_type, options=options)
    return kind.metrics(said, kind.truth(solution, options))


def score_name(keys: Iterable[str]) -> str:
    """What the mean score of a summary with these keys is called: of free text alone it is no accuracy."""
    return "ROUGE" if {key for key in keys if ": " in key} == {"ROUGE: free-form"} else "accuracy"


def answers_match(a: str, b: str, *, problem_type: str, options: Sequence[str] | None = None) -> bool:
    """Whether two answers of a model say the same, read as `score_answer` reads them; an unreadable one matches
    nothing, except that choices without options also match as texts."""
    kind = _type_of(problem_type)
    first, second = kind.read(a, options), kind.read(b, options)
    if first is None and second is None and problem_type == "multiple choice" and not options:
        return bool(words_of(a)) and words_of(a) == words_of(b)
    return first is not None and second is not None and bool(kind.same(first, second))


def check_solution(*, problem_type: str, solution: str, options: Sequence[str] | None = None) -> None:
    """Raise SolutionError, saying what was expected, for a ground truth that no answer could be compared with."""
    kind = _type_of(problem_type)
    if not isinstance(solution, str) or not solution.strip():
        raise SolutionError(f"solution is {solution!r}; expected the bare answer as a non-empty string")
    if re.search(r"</?(?:answer|think)>", solution):
        raise SolutionError(f"solution {solution!r} holds tags; expected the bare answer without <answer>")
    kind.truth(solution, options)
    if problem_type == "math":
        check_math(solution)  # when it loads, not at each answer: it takes a process
