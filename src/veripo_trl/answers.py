"""Parse and compare answers: the one meaning of "correct" that reward, verifier and evaluation share.

Pure functions over text: math-verify and rouge-score are imported on first use. A model's bad answer earns 0 and
never raises; a malformed ground truth is refused by `check_solution` when the data loads.

Rules that the formats leave open, decided here:

- choice: the set of letters read must equal the truth's set. An answer that names another option as well (another
  letter, another option's text beside the letter), a hedge or a negation is wrong.
- numbers: exactly one value may be stated, units and words around it are tolerated ("3 apples"); a comma is a
  thousands separator only before groups of three digits, "3,5" is unreadable. Two numbers are equal within 1e-9
  relative, or within 0.005 (Video-R1's two decimals) if that is also within 2% (so that 0.004 is not 0.001).
- percent: "12%" equals 12 (sign stripped) and 0.12 (the fraction); with the sign on both sides, numbers compare.
- maths: an answer over 256 characters is wrong rather than cut, since its end could take back its beginning.
"""

import functools
import math
import re
import signal
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence

from .errors import VeripoError

PROBLEM_TYPES = ("multiple choice", "numerical", "regression", "math", "OCR", "free-form")
REGRESSION_SCORES = ("mean_relative_accuracy", "relative_error")

MAX_MATH_CHARS = 256
MATH_LIMIT_S = 1.0
MAX_CHARS = 4000  # of a choice or a number; keeps every pattern below far from a slow case
MAX_FREE_FORM_CHARS = 20_000  # ROUGE-L is quadratic

_HEDGE = re.compile(
    r"\b(?:or|not|either|neither|nor|maybe|perhaps|unsure|unknown|cannot|except|doubt|if|whether|unless)\b|n't\b", re.I
)
_WRAPPER = re.compile(r"\\(?:boxed|fbox|text\w*|math(?:rm|bf|it|sf|tt)|operatorname)\s*\{([^{}]*)\}")
_STATED = re.compile(
    r"\b(?:answer|option|choice|solution|result|total)\b\s*(?:is|are|was|:|=|would be|must be|should be)\s*:?\s*", re.I
)
_LEAD_IN = re.compile(
    r"(?:so|thus|therefore|hence|(?:it|that|this) is|it's|that's|there (?:is|are)|i (?:choose|pick|select|think|say)"
    r"|the (?:correct |right |final |best )?(?:answer|option|choice)|answer|options?|choices?|letter)\b\s*[,:]?\s*",
    re.I,
)


_FILLERS = {"and", "then", "the", "a", "an"}  # "red, then blue" says what "red blue" says


class SolutionError(VeripoError):
    """A row's ground truth cannot be compared with any answer."""


# ---------------------------------------------------------------------------------------------------- spans


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


# --------------------------------------------------------------------------------------------------- plain text


def boxed_spans(text: str) -> list[str]:
    r"""Contents of every \boxed{…}, braces matched; an unclosed one is left out."""
    spans, opened = [], []  # opened: where each open brace's content starts, None if it is not a box's
    for token in re.finditer(r"(\\boxed\s*)?\{|\}", text):
        if token[0] != "}":
            opened.append(token.end() if token[1] else None)
        elif opened and (start := opened.pop()) is not None:
            spans.append((start, text[start : token.start()]))
    return [content for _, content in sorted(spans)]


def _plain(text: str) -> str:
    """`text` without markdown, dollars, LaTeX text wrappers and Unicode look-alikes; its only \\boxed part, if any."""
    text = re.sub("[⁰¹²³⁴-⁹]", lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)  # 3² is not 32
    text = re.sub(r"(?<=\d)(?:\\[,!]|\{,\}|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", "", text)  # thin thousands
    text = unicodedata.normalize("NFKC", text)
    text = text.translate({0x2212: "-", 0x2044: "/", 0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x200B: None})
    boxed = boxed_spans(text)
    if len(boxed) == 1 and not _HEDGE.search(text.replace(boxed[0], " ")):
        text = boxed[0]
    for _ in range(4):  # wrappers nest: \boxed{\text{B}}
        text, found = _WRAPPER.subn(r"\1", text)
        if not found:
            break
    text = re.sub(r"\\[()\[\],;!]|[$*`]", " ", text)
    return re.sub(r"[^\S\n]+", " ", text).strip()


def _stated(text: str) -> str:
    """What follows the only "answer is", or follows the lead-ins at the start ("so it is …"); else `text`."""
    stated = list(_STATED.finditer(text))
    if len(stated) == 1 and not _HEDGE.search(text[: stated[0].start()]):
        text = text[stated[0].end() :]
    elif stated:
        return text
    for _ in range(4):
        match = _LEAD_IN.match(text)
        if not match or match.end() == len(text):
            break
        text = text[match.end() :]
    return text


def _words(text: str) -> str:
    """For equality of short texts: lower case, single spaces, no punctuation at the ends, no leading article."""
    text = re.sub(r"\s+", " ", _plain(text).casefold()).strip(" .,;:!?\"'()[]{}")
    return re.sub(r"^(?:the|an?) (?=\w)", "", text)


# -------------------------------------------------------------------------------------------------------- choice


@functools.lru_cache(maxsize=4096)
def _labels(options: tuple[str, ...]) -> dict[str, str]:
    split = [re.fullmatch(r"\s*[(\[]?([A-Za-z])[)\].:]+\s*(.*)", option, re.S) for option in options]
    letters = [match[1].upper() for match in split if match]
    if len(letters) == len(options) == len(set(letters)):
        return {match[1].upper(): _words(match[2]) for match in split}
    return {chr(ord("A") + i): _words(option) for i, option in enumerate(options)}


def option_labels(options: Sequence[str] | None) -> dict[str, str]:
    """{letter: text in comparable form} of options such as "A. red", "(B) green"; letters by position if they have
    none; {} without options."""
    return _labels(tuple(options or ()))


def _letter(text: str, labels: dict[str, str]) -> str | None:
    """The letter that `text` consists of, brackets and punctuation aside."""
    text = text.strip(" \t\n.,;:!\"'()[]{}").upper()
    known = text in labels if labels else len(text) == 1 and "A" <= text <= "Z"
    return text if known else None


def leading_option(text: str, labels: dict[str, str]) -> tuple[str | None, str]:
    """(letter of the longest option text that `text` begins with or None, the words after it)."""
    words = _words(text)
    found = [
        letter
        for letter, option in labels.items()
        if option and words.startswith(option) and not words[len(option) : len(option) + 1].isalnum()
    ]
    if not found:
        return None, words
    longest = max(found, key=lambda letter: len(labels[letter]))
    return longest, words[len(labels[longest]) :]


def other_letters(text: str, labels: dict[str, str]) -> set[str]:
    """Capital option letters that stand alone in `text`; the article "A" and the pronoun "I" are not letters."""
    known = labels or "ABCDEFGHIJ"
    standing = re.finditer(r"(?<![\w'])([A-Z])(?![\w'])(?!(?<=[AI]) [a-z])", text)
    return {match[1] for match in standing if match[1] in known}


def _single_choice(text: str, labels: dict[str, str]) -> str | None:
    """The letter of "B", "left", "B. left", "B (left)" or "left (B)"; None for anything more or contradictory."""
    if letter := _letter(text, labels):
        return letter
    words = _words(text)
    same_text = [letter for letter, option in labels.items() if option and option == words]
    if same_text:
        return same_text[0] if len(same_text) == 1 else None
    for pattern, letter_group, text_group in (
        (r"[(\[]?([A-Za-z])(?:\s*[.):\],-]+\s*|\s+)(.+)", 1, 2),
        (r"(.+?)\s*[(\[]([A-Za-z])[)\]]\W*", 2, 1),
    ):
        match = re.fullmatch(pattern, text, re.S)
        if match:
            letter = match[letter_group].upper()
            if labels.get(letter) and labels[letter] == _words(match[text_group]):
                return letter
    return None


def _letter_and_prose(text: str, labels: dict[str, str]) -> str | None:
    """The letter of "B. because …" or "B is correct" if the prose names no other option."""
    match = re.match(r"[(\[]?([A-Za-z])(?:[.):\],]+\s|\s+[(–—-]|\s+(?=because|since|as\b|is (?:the )?(?:correct|right|"
                     r"best|answer)))", text)  # fmt: skip
    letter = match and _letter(match[1], labels)
    if not letter:
        return None
    prose = text[match.end() :]
    leading, rest = leading_option(prose, labels)
    if leading not in (None, letter) or re.match(r"\W*(?:or|and|and/or|/)(?!\w)", rest):
        return None
    if re.search(r"\b(?:wait|unsure|not sure|or maybe)\b", rest) or other_letters(prose, labels) - {letter}:
        return None
    return letter


def _choice_set(text: str, labels: dict[str, str]) -> frozenset[str] | None:
    if letter := _single_choice(text, labels):
        return frozenset(letter)
    joined = text.strip(" .()[]")
    if joined.isalpha() and joined.isupper() and list(joined) == sorted(set(joined)):
        if all(_letter(character, labels) for character in joined):
            return frozenset(joined)
    parts = re.split(r"\s*(?:[,;&\n]|\band\b)\s*", re.sub(r"^both\s+|^\(|\)$", "", text, flags=re.I))
    letters = [_single_choice(part, labels) for part in parts if part]
    if letters and None not in letters:
        return frozenset(letters)
    if letter := _letter_and_prose(text, labels):
        return frozenset(letter)
    return None


def read_choice(text: str, options: Sequence[str] | None) -> frozenset[str] | None:
    """The letters that `text` answers with; None if there is no clear answer. Without options, letters A to Z."""
    if len(text) > MAX_CHARS:
        return None
    labels, text = option_labels(options), _plain(text)
    return _choice_set(text, labels) or _choice_set(_stated(text), labels)


# ------------------------------------------------------------------------------------------------------- numbers

_NUMBER = re.compile(
    r"(?<![\w.,^/])([-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?)"
    r"(?:\s?/\s?(\d+(?:\.\d+)?))?(?![\d^]|[.,/]\d)\s*(%|per ?cent\b)?",
    re.I,
)
_BOUND = re.compile(r"\b(?:at least|at most|more than|less than|fewer than|greater than|between)\b|[<>≤≥±]|\d\+", re.I)
_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_NUMBER_WORDS = {word: value for value, word in enumerate(f"{_ONES} seventeen eighteen nineteen twenty".split())}
_TENS = "thirty forty fifty sixty seventy eighty ninety"
_NUMBER_WORDS |= {word: 10 * value for value, word in enumerate(_TENS.split(), 3)}
_COMPOUND_WORDS = {"hundred", "thousand", "million", "billion", "half", "third", "quarter", "dozen", "minus", "point"}


def _clean_number(text: str) -> str:
    text = re.sub(r"\\[dt]?frac\s*\{(-?[\d.]+)\}\s*\{([\d.]+)\}", r" \1/\2", text)
    text = re.sub(r"(?<=[-+]) (?=[\d.])", "", text)
    text = re.sub(r"\\(?:approx|quad|simeq)\b|\\ |\^\s*\{?\s*\\circ\s*\}?|\\degree|°", " ", text).replace("\\%", "%")
    text = re.sub(r"\b(?:minus|negative)\s+(?=[\d.])", "-", text, flags=re.I)
    text = re.sub(r"\s*(?:\bx\b|[×*·]|\\times|\\cdot)\s*10\s*\^\s*\{?\s*([-+]?\d+)\s*\}?", r"e\1", text)
    text = re.sub(r"(?<=[a-zA-Z])\s?\^\{?\d\}?", "", text)  # m^2 is a unit

    def mixed(match: re.Match) -> str:
        whole, top, bottom = (int(group) for group in match.groups())
        return repr(whole + top / bottom) if bottom else match[0]

    return re.sub(r"(?<![\w.,/])(\d{1,6})\s+(\d{1,6})/(\d{1,6})(?![\w./])", mixed, text)


def _number_tokens(text: str) -> set[tuple[float, bool]]:
    tokens = set()
    for number, divisor, percent in _NUMBER.findall(text):
        value = float(number.replace(",", ""))
        if divisor:
            value = value / float(divisor) if float(divisor) else math.nan
        tokens.add((value, bool(percent)))
    return tokens


def read_number(text: str) -> tuple[float, bool] | None:
    """(value, has a percent sign) of the one finite number that `text` states; None if it states none, several,
    a bound or a hedge. What plain text cannot settle (roots, powers, pi) goes through math-verify."""
    if len(text) > MAX_CHARS:
        return None
    text = _clean_number(_stated(_plain(text)))
    if _HEDGE.search(text) or _BOUND.search(text):
        return None
    text = text.rsplit("=", 1)[-1]
    if re.search(r"\\[a-zA-Z]|\^|[√π]|\bsqrt\b|(?<![a-zA-Z])pi\b", text):
        value = _math_value(text)
        return None if value is None else (value, False)
    outside = re.sub(r"\([^()]*\)", " ", text)
    tokens = _number_tokens(outside) or _number_tokens(text)
    if not tokens and not any(character.isdigit() for character in text):
        words = set(re.findall(r"[a-z]+", text.casefold()))
        if not words & _COMPOUND_WORDS:
            tokens = {(float(_NUMBER_WORDS[word]), False) for word in words & _NUMBER_WORDS.keys()}
    if len(tokens) != 1:
        return None
    value, percent = tokens.pop()
    return (value, percent) if math.isfinite(value) else None


def _comparable(answer: tuple[float, bool], truth: tuple[float, bool]) -> list[tuple[float, float]]:
    """The pairs of values to compare: a percent sign on one side only reads as the number or as the fraction."""
    (value, percent), (true_value, true_percent) = answer, truth
    pairs = [(value, true_value)]
    if percent != true_percent:
        pairs.append((value / 100, true_value) if percent else (value, true_value / 100))
    return pairs


def _close(value: float, truth: float) -> bool:
    error = abs(value - truth)
    return error <= 1e-9 * max(1.0, abs(truth)) or (error <= 0.005 + 1e-9 and error <= 0.02 * abs(truth))


def _same_number(answer: tuple[float, bool] | None, truth: tuple[float, bool] | None) -> bool:
    if answer is None or truth is None:
        return False
    return any(_close(value, true_value) for value, true_value in _comparable(answer, truth))


def _regression_score(value: float, truth: float, kind: str) -> float:
    """In [0, 1]. At truth 0 no relative error exists: 1 for an answer equal to 0, else 0."""
    if truth == 0:
        return float(_close(value, truth))
    error = abs(value - truth) / abs(truth)
    if kind == "relative_error":
        return 1.0 - min(error, 1.0)
    # 1e-9: an error of exactly 10% must pass theta = 0.90, which binary fractions alone would deny
    return sum(error <= (100 - theta) / 100 + 1e-9 for theta in range(50, 100, 5)) / 10


# --------------------------------------------------------------------------------------------------------- maths

_FUNCTIONS = "sqrt|sin|cos|tan|cot|log|exp|max|min"
_timeouts = 0


class _MathTimeoutError(BaseException):
    """Not an Exception: math-verify catches those itself, and a time-out must not pass as an unparsable answer."""


def math_timeouts() -> int:
    """How many maths comparisons ran into the one-second limit in this process; each of them counted as wrong."""
    return _timeouts


@functools.cache
def _load_math() -> None:
    """Import math-verify and warm its grammar, outside any time limit (a second or two)."""
    import logging

    import math_verify

    # It warns that its own limit is off; ours is on.
    for module in (math_verify.parser, math_verify.grader):
        module.logger.addFilter(lambda record: record.levelno > logging.WARNING)
    for text in (r"\frac{1}{2}", "x^2+1", "(1,2)"):
        _parse_math(text)


def _within_limit(function: Callable, *arguments):
    """function(*arguments), or None after MATH_LIMIT_S, which is counted. One limit over parsing and comparing:
    math-verify's own applies to each step and each pair of candidates anew."""
    global _timeouts
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "Maths answers are compared under a time limit that uses a signal, which Python delivers to the main "
            f"thread only; this is thread {threading.current_thread().name!r}. Score them in the main thread or in "
            "a process of their own."
        )
    _load_math()

    def stop(signum, frame):
        raise _MathTimeoutError

    start, (due_s, interval_s) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, 0)
    previous = signal.signal(signal.SIGALRM, stop)
    try:
        # It fires again: a first exception can be lost in a destructor or a bare except of the libraries.
        signal.setitimer(signal.ITIMER_REAL, MATH_LIMIT_S, 0.25)
        try:
            return function(*arguments)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _MathTimeoutError:
        _timeouts += 1
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if due_s:  # somebody else's alarm (a test runner's) goes on
            signal.setitimer(signal.ITIMER_REAL, max(due_s - (time.monotonic() - start), 1e-3), interval_s)


def _to_latex(text: str) -> str:
    text = re.sub(r"\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(rf"(?<![\\a-zA-Z])({_FUNCTIONS}|ln)\b", r"\\\1", text)
    text = re.sub(r"√\s*\(?(\w+)\)?", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\a-zA-Z])pi\b|π", r"\\pi ", text).replace("×", r"\times ").replace("·", r"\cdot ")
    text = re.sub(r"(?<!\\)%", r"\\%", text.replace("**", "^").replace("*", r"\cdot "))
    return re.sub(r"\^(-?\d{2,}|-\d)", r"^{\1}", text)


def _parse_math(text: str) -> list:
    """math-verify's reading of an answer. Bare expressions are put between dollars, without which its LaTeX reader
    ignores them; prose must contain one number, or it would pick the last of several."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse

    text = text.translate({0x2212: "-", 0x2044: "/"}).strip()
    if not re.search(r"\$|\\\(|\\\[|\\boxed", text):
        text = _stated(text).rstrip(".")
        bare = re.sub(r"\\[a-zA-Z]+(?:\{[a-zA-Z ]*\})?", " ", text)
        if not re.search(rf"\b(?!(?:{_FUNCTIONS})\b)[A-Za-z]{{3,}}", bare):
            text = f"${_to_latex(text)}$"
        elif len(_number_tokens(text)) > 1:
            return []
    extraction = [StringExtractionConfig(), LatexExtractionConfig(), ExprExtractionConfig()]
    return parse(text, extraction_config=extraction, fallback_mode="no_fallback", parsing_timeout=None)


_parse_truth = functools.lru_cache(maxsize=1024)(_parse_math)


def _verify_math(answer: str, truth: str) -> bool:
    from math_verify import verify

    return bool(verify(_parse_truth(truth), _parse_math(answer), timeout_seconds=None))


def _same_math(answer: str, truth: str) -> bool:
    answer, truth = answer.strip(), truth.strip()
    if not answer or max(len(answer), len(truth)) > MAX_MATH_CHARS:
        return False
    if _plain(answer) == _plain(truth):
        return True
    if _HEDGE.search(answer) and not _HEDGE.search(truth):
        return False
    return _within_limit(_verify_math, answer, truth) is True


def _evaluate_math(text: str) -> float | None:
    for expression in _parse_math(f"${_to_latex(text)}$"):
        if getattr(expression, "is_number", False):
            value = expression.evalf()
            return float(value) if value.is_real and value.is_finite else None
    return None


def _math_value(text: str) -> float | None:
    return _within_limit(_evaluate_math, text.strip()) if len(text) <= MAX_MATH_CHARS else None


# ---------------------------------------------------------------------------------------------------------- text


def _one_minus_word_error_rate(answer: str, truth: str) -> float:
    """max(0, 1 - edits / words of the truth) over white-space words, case as written."""
    words, true_words = answer.split(), truth.split()
    if len(words) >= 2 * len(true_words):
        return 0.0  # at least as many insertions as the truth has words
    row = list(range(len(true_words) + 1))
    for i, word in enumerate(words, 1):
        diagonal, row[0] = row[0], i
        for j, true_word in enumerate(true_words, 1):
            edits = min(row[j] + 1, row[j - 1] + 1, diagonal + (word != true_word))
            diagonal, row[j] = row[j], edits
    return max(0.0, 1.0 - row[-1] / len(true_words))


@functools.cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def _rouge(answer: str, truth: str) -> float:
    """Mean of the F1 of ROUGE-1, -2 and -L. ROUGE reads [a-z0-9] only, and a single word has no bigram: equal words
    score 1 whatever it says."""
    if len(answer) > MAX_FREE_FORM_CHARS:
        return 0.0
    if _words(answer) == _words(truth):
        return 1.0
    return sum(score.fmeasure for score in _rouge_scorer().score(truth, answer).values()) / 3


# ------------------------------------------------------------------------------------------------------- contract


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
    by its type or that cannot be read, and RuntimeError for maths outside the main thread.
    """
    if problem_type not in PROBLEM_TYPES:
        raise SolutionError(f"problem_type {problem_type!r} is unknown; expected one of {', '.join(PROBLEM_TYPES)}")
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
            return float(_same_number(number, truth))
        pairs = _comparable(number, truth) if number else []
        return max((_regression_score(*pair, regression_score) for pair in pairs), default=0.0)
    if problem_type == "math":
        return float(_same_math(answer, solution))
    return _one_minus_word_error_rate(answer, solution) if problem_type == "OCR" else _rouge(answer, solution)


def answers_match(a: str, b: str, *, problem_type: str, options: Sequence[str] | None = None) -> bool:
    """Whether two answers of a model say the same, read as `score_answer` reads them; an unreadable choice or number
    matches nothing, except that choices without options also match as texts."""
    if problem_type == "multiple choice":
        first, second = read_choice(a, options), read_choice(b, options)
        if first is None and second is None and not options:
            return bool(_words(a)) and _words(a) == _words(b)
        return first is not None and first == second
    if problem_type in ("numerical", "regression"):
        return _same_number(read_number(a), read_number(b))
    if problem_type not in PROBLEM_TYPES:
        raise SolutionError(f"problem_type {problem_type!r} is unknown; expected one of {', '.join(PROBLEM_TYPES)}")
    if problem_type == "math":
        return _same_math(a, b)
    first, second = ([w for w in re.findall(r"\w+", _words(text)) if w not in _FILLERS] for text in (a, b))
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
    if problem_type not in PROBLEM_TYPES:
        raise SolutionError(f"problem_type {problem_type!r} is unknown; expected one of {', '.join(PROBLEM_TYPES)}")
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
        if not _within_limit(_parse_truth, solution.strip()):
            raise SolutionError(
                f"solution {solution!r} of a math row: math-verify cannot parse it within {MATH_LIMIT_S:g} s; write a "
                "number or a LaTeX expression, or use the problem type free-form"
            )
