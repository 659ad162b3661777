"""Numbers: the one value that a text states, and whether two are the same.

Exactly one value may be stated, units and words around it are tolerated ("3 apples"); a comma is a thousands separator
only before groups of three digits, "3,5" is unreadable. Two numbers are equal within 1e-9 relative, or within 0.005
(Video-R1's two decimals) if that is also within 2% (so that 0.004 is not 0.001). "12%" equals 12 (sign stripped) and
0.12 (the fraction); with the sign on both sides, numbers compare.
"""

import math
import re

from veripo_trl.answers.math_process import math_value
from veripo_trl.answers.plain import HEDGE, MAX_CHARS, stated, unexplained, without_rejected
from veripo_trl.errors import SolutionError

Number = tuple[float, bool]  # value, whether it has a percent sign

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
_COMPOUND_UNITS = (  # "1 m 20 cm" is 1.2: the number of its first unit
    ("min(?:ute)?s?", "s(?:ec(?:ond)?s?)?", 60),
    ("h(?:ou)?(?:rs?)?", "min(?:ute)?s?", 60),
    ("m(?:et(?:er|re)s?)?", "cm|centimet(?:er|re)s?", 100),
    ("km|kilomet(?:er|re)s?", "m(?:et(?:er|re)s?)?", 1000),
    ("f(?:ee|oo)?t", "in(?:ch(?:es)?)?", 12),
    ("kg|kilo(?:gram)?s?", "g(?:rams?)?", 1000),
)
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1e6, "billion": 1e9, "dozen": 12}
_COMPOUND_WORDS = {"hundred", "thousand", "million", "billion", "half", "third", "quarter", "dozen", "minus", "point"}


def _clean_number(text: str) -> str:
    text = re.sub(r"(?<=[\u3400-\u9fff])(?=[-+.\d])", " ", text)  # a script without spaces
    text = re.sub(r"\\[dt]?frac\s*\{(-?[\d.]+)\}\s*\{([\d.]+)\}", r" \1/\2", text)
    text = re.sub(r"(?<=[-+]) (?=[\d.])", "", text)
    text = re.sub(r"\\(?:approx|quad|simeq)\b|\\ |\^\s*\{?\s*\\circ\s*\}?|\\degree|°", " ", text).replace("\\%", "%")
    text = re.sub(r"\b(?:minus|negative)\s+(?=[\d.])", "-", text, flags=re.I)
    text = re.sub(r"\s*(?:\bx\b|[×*·]|\\times|\\cdot)\s*10\s*\^\s*\{?\s*([-+]?\d+)\s*\}?", r"e\1", text)
    text = re.sub(r"(?<=[a-zA-Z])\s?\^\{?\d\}?", "", text)  # m^2 is a unit

    def mixed(match: re.Match) -> str:
        whole, top, bottom = (int(group) for group in match.groups())
        return repr(whole + top / bottom) if bottom else match[0]

    text = re.sub(
        r"(?<![\w.,/])(\d[\d,]{0,15}(?:\.\d{1,15})?)(?:\s(hundred|thousand|million|billion|dozen)|(k))\b",
        lambda match: repr(float(match[1].replace(",", "")) * _SCALES[(match[2] or "thousand").lower()]),
        text,
        flags=re.I,
    )
    for unit, smaller, factor in _COMPOUND_UNITS:

        def in_first_unit(match: re.Match, factor=factor) -> str:
            whole, part = float(match[1]), float(match[3])
            return f"{whole + part / factor!r} {match[2]}" if part < factor else match[0]

        compound = rf"(?<![\w.,/-])(\d{{1,9}})\s?({unit})[,\s]*(?:and )?(\d{{1,9}}(?:\.\d+)?)\s?(?:{smaller})(?![a-z])"
        text = re.sub(compound, in_first_unit, text, flags=re.I)
    return re.sub(r"(?<![\w.,/])(\d{1,6})\s+(\d{1,6})/(\d{1,6})(?![\w./])", mixed, text)


def number_tokens(text: str) -> set[tuple[float, bool]]:
    tokens = set()
    for number, divisor, percent in _NUMBER.findall(text):
        value = float(number.replace(",", ""))
        if divisor:
            value = value / float(divisor) if float(divisor) else math.nan
        tokens.add((value, bool(percent)))
    return tokens


def read_number(text: str, options=None) -> Number | None:
    """(value, has a percent sign) of the one finite number that `text` states; None if it states none, several,
    a bound or a hedge. What plain text cannot settle (roots, powers, pi) goes through math-verify."""
    if len(text) > MAX_CHARS:
        return None
    text = _clean_number(stated(unexplained(text)))
    text = without_rejected(text, r"[-+]?\d[\d.,]*")
    if HEDGE.search(text) or _BOUND.search(text) or re.search(r"\d[a-df-zA-DF-Z][a-z]?\d\d", text):  # "1h30"
        return None
    text = text.rsplit("=", 1)[-1]
    if re.search(r"\\[a-zA-Z]|\^|[√π]|\bsqrt\b|(?<![a-zA-Z])pi\b", text):
        value = math_value(text)
        return None if value is None or not math.isfinite(value) else (value, False)
    outside = re.sub(r"\([^()]*\)", " ", text)
    tokens = number_tokens(outside) or number_tokens(text)
    if not tokens and not any(character.isdigit() for character in text):
        words = set(re.findall(r"[a-z]+", text.casefold()))
        if not words & _COMPOUND_WORDS:
            tokens = {(float(_NUMBER_WORDS[word]), False) for word in words & _NUMBER_WORDS.keys()}
    if len(tokens) != 1:
        return None
    value, percent = tokens.pop()
    return (value, percent) if math.isfinite(value) else None


def comparable(answer: Number, truth: Number) -> list[tuple[float, float]]:
    """The pairs of values to compare: a percent sign on one side only reads as the number or as the fraction."""
    (value, percent), (true_value, true_percent) = answer, truth
    pairs = [(value, true_value)]
    if percent != true_percent:
        pairs.append((value / 100, true_value) if percent else (value, true_value / 100))
    return pairs


def _close(value: float, truth: float) -> bool:
    error = abs(value - truth)
    return error <= 1e-9 * max(1.0, abs(truth)) or (error <= 0.005 + 1e-9 and error <= 0.02 * abs(truth))


def same_number(answer: Number, truth: Number) -> bool:
    return any(_close(value, true_value) for value, true_value in comparable(answer, truth))


# VSI-Bench's own 1 - np.linspace(0.5, 0.95, 10): its binary fractions decide at the edges.
_MRA_THRESHOLDS = [1 - (0.5 + i * ((0.95 - 0.5) / 9)) for i in range(10)]


def true_number(solution: str, options=None) -> Number:
    number = read_number(solution)
    if number is None:
        raise SolutionError(f"solution {solution!r} of a row with numbers: expected one finite number such as '3.5'")
    return number


# ------------------------------------------------------------------------------------------------------ regression


def _relative_error(value: float, truth: float) -> float:
    """At truth 0 no relative error exists: 0 for an answer equal to 0, else without end."""
    if truth == 0:
        return 0.0 if _close(value, truth) else math.inf
    return abs(value - truth) / abs(truth)


def mean_relative_accuracy(answer: Number, truth: Number) -> float:
    """The mean over theta in 0.50, 0.55, … 0.95 of: relative error <= 1 - theta (VSI-Bench, arXiv 2412.14171)."""
    errors = [_relative_error(*pair) for pair in comparable(answer, truth)]
    return max(sum(error <= threshold for threshold in _MRA_THRESHOLDS) / 10 for error in errors)


def relative_accuracy(answer: Number, truth: Number) -> float:
    """1 - relative error, not below 0 (Video-R1, arXiv 2503.21776)."""
    return max(1.0 - min(_relative_error(*pair), 1.0) for pair in comparable(answer, truth))


def absolute_range(answer: Number, truth: Number, max_range: float) -> float:
    """1 - |error| / max_range, not below 0; values as written, percent signs aside (PRIMO R1, arXiv 2603.15600)."""
    return max(0.0, 1.0 - abs(answer[0] - truth[0]) / max_range)


def exponential(answer: Number, truth: Number, tau: float) -> float:
    """exp(-|error| / tau); values as written, percent signs aside (SOLE-R1, arXiv 2603.28730)."""
    return math.exp(-abs(answer[0] - truth[0]) / tau)


def absolute_error(answer: Number | None, truth: Number) -> dict[str, float]:
    """Of what can be read, as written: a mean absolute error has no value for the rest, which is counted elsewhere."""
    return {"MAE": abs(answer[0] - truth[0])} if answer else {}
