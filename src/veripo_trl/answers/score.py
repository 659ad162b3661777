"""Parse and compare answers: the one meaning of "correct" that reward, verifier and evaluation share.

Pure functions over text; math-verify runs in a process of its own, rouge-score is imported on first use. A model's
bad answer earns 0 and never raises; a malformed ground truth is refused by `check_solution` when the data loads.

Rules that the formats leave open, decided here:

- choice: the set of letters read must equal the truth's set. An answer that names another option as well (another
  letter, another option's text beside the letter), a hedge or a negation is wrong.
- numbers: exactly one value may be stated, units and words around it are tolerated ("3 apples"); a comma is a
  thousands separator only before groups of three digits, "3,5" is unreadable. Two numbers are equal within 1e-9
  relative, or within 0.005 (Video-R1's two decimals) if that is also within 2% (so that 0.004 is not 0.001).
- percent: "12%" equals 12 (sign stripped) and 0.12 (the fraction); with the sign on both sides, numbers compare.
- maths: an answer over 256 characters is wrong rather than cut, since its end could take back its beginning.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veripo_trl.errors import VeripoError

PROBLEM_TYPES = ("multiple choice", "numerical", "regression", "math", "OCR", "free-form")
REGRESSION_SCORES = ("mean_relative_accuracy", "relative_error")

MAX_MATH_CHARS = 256
MATH_LIMIT_S = 1.0  # of processor time
MAX_CHARS = 4000  # of a choice or a number; keeps every pattern below far from a slow case
MAX_FREE_FORM_CHARS = 20_000  # ROUGE-L is quadratic

_HEDGE = re.compile(
    r"\b(?:or|not|either|neither|nor|maybe|perhaps|unsure|unknown|cannot|except|doubt|if|whether|unless)\b|n't\b"
    r"|[不没非或]|可能|也许",
    re.I,
)
_TAKEN_BACK = r"\b(?:wait|unsure|not (?:sure|certain)|maybe|perhaps|i mean|correction|second thought|sorry)\b"
_EXPLANATION = re.compile(
    rf"\n\s*(?:explanation|reason(?:ing)?|rationale|justification|because)\b(?!.*{_TAKEN_BACK}|.*\bactually\b).*",
    re.I | re.S,
)
_WRAPPER = re.compile(r"\\(?:boxed|fbox|text\w*|math(?:rm|bf|it|sf|tt)|operatorname)\s*\{([^{}]*)\}")
_STATED = re.compile(
    r"\b(?:answer|option|choice|solution|result|total)\b\s*(?:is|are|was|:|=|would be|must be|should be)\s*:?\s*", re.I
)
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|therefore|hence|(?:it|that|this) (?:is|(?:must|should|has to) be)|it's|that's|there (?:is|are)"
    r"|(?:i(?:'d|'ll|'m| would| will| am)? )?(?:choose|pick|select|say|go(?:ing)? (?:with|for))|i think"
    r"|the (?:correct |right |final |best )?(?:answer|option|choice)|answer|ans|options?|choices?|letter)\b"
    r"|(?:所以|因此)?(?:我?选择?|应选|(?:正确|最终)?(?:答案|选项)[是为]?))\s*[,:.]?\s*",
    re.I,
)
_HTML = re.compile(r"</?(?:b|i|u|p|em|strong|span|div|center|font|mark|code|br)(?:\s[^<>]*)?/?>", re.I)


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
    text = text.translate({0x2212: "-", 0x2044: "/", 0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x200B: None,
                           0x3002: "."})  # fmt: skip
    text = _HTML.sub(" ", text)
    boxed = boxed_spans(text)
    if len(boxed) == 1 and not _HEDGE.search(text.replace(boxed[0], " ")):
        text = boxed[0]
    for _ in range(4):  # wrappers nest: \boxed{\text{B}}
        text, found = _WRAPPER.subn(r"\1", text)
        if not found:
            break
    text = re.sub(r"\\[()\[\],;!]|[$*`]", " ", text)
    text = re.sub(r"[^\S\n]+", " ", text).strip()
    return re.sub(r"\n[ \n]*\n", "\n\n", text)


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
    text = text.strip(" \t\n.,;:!\"'()[]{}<>-•").upper()
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
    match = re.match(r"[(\[]?([A-Za-z])(?:[.):\],]+\s|\s*\n|\s+[(–—-]|\s+(?=because|since|as\b|"
                     r"is (?:the )?(?:correct|right|best|answer)))", text)  # fmt: skip
    letter = match and _letter(match[1], labels)
    if not letter:
        return None
    prose = text[match.end() :]
    leading, rest = leading_option(prose, labels)
    if leading not in (None, letter) or re.match(r"\W*(?:or|and|and/or|/|actually|no|rather)(?!\w)", rest):
        return None
    if re.search(_TAKEN_BACK, rest) or other_letters(prose, labels) - {letter}:
        return None
    if len(rest.split()) <= 3 and not _HEDGE.search(rest):  # "B. green (blue)"
        others = (option for other, option in labels.items() if option and other != letter)
        if any(re.search(rf"(?<!\w){re.escape(option)}(?!\w)", rest) for option in others):
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
    labels, text = option_labels(options), _EXPLANATION.sub("", _plain(text))
    for reading in (text, _stated(text)):
        letters = _choice_set(reading, labels) or _choice_set(_without_rejected(reading, _other_option(labels)), labels)
        if letters:
            return letters
    return None


def _other_option(labels: dict[str, str]) -> str:
    """A pattern for "A", "A or (C)", "red"."""
    letter = r"[(\[]?[A-Z][)\]]?"
    texts = "".join("|" + re.escape(option) for option in labels.values() if option)
    return rf"{letter}(?:\s*(?:,|/|or|and|nor)\s*{letter})*(?!\w)(?-i:(?!\s(?!but )[a-z])){texts}"


def _without_rejected(text: str, other: str) -> str:
    """ "B" of "B (not A or C)", "B rather than A", "not A but B"."""
    if not re.search(r"\b(?:not|rather|instead) ", text):
        return text
    text = re.sub(rf"^(?:(?:it|that) is |it's )?not (?:option )?(?:{other}),? but (?:rather )?", "", text, flags=re.I)
    rejected = rf"(?<=\S)[\s,;(–—-]+(?:and |but )?(?:not|rather than|instead of) (?:option |the )?(?:{other})(?!\w)\)?"
    return re.sub(rejected, "", text, flags=re.I)


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
    text = _clean_number(_stated(_EXPLANATION.sub("", _plain(text))))
    text = _without_rejected(text, r"[-+]?\d[\d.,]*")
    if _HEDGE.search(text) or _BOUND.search(text) or re.search(r"\d[a-df-zA-DF-Z][a-z]?\d\d", text):  # "1h30"
        return None
    text = text.rsplit("=", 1)[-1]
    if re.search(r"\\[a-zA-Z]|\^|[√π]|\bsqrt\b|(?<![a-zA-Z])pi\b", text):
        value = _math_value(text)
        return None if value is None or not math.isfinite(value) else (value, False)
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


# VSI-Bench's own 1 - np.linspace(0.5, 0.95, 10): its binary fractions decide at the edges.
_MRA_THRESHOLDS = [1 - (0.5 + i * ((0.95 - 0.5) / 9)) for i in range(10)]


def _regression_score(value: float, truth: float, kind: str) -> float:
    """In [0, 1]. At truth 0 no relative error exists: 1 for an answer equal to 0, else 0."""
    if truth == 0:
        return float(_close(value, truth))
    error = abs(value - truth) / abs(truth)
    if kind == "relative_error":
        return 1.0 - min(error, 1.0)
    return sum(error <= threshold for threshold in _MRA_THRESHOLDS) / 10


# --------------------------------------------------------------------------------------------------------- maths

_FUNCTIONS = "sqrt|sin|cos|tan|cot|log|exp|max|min"
_worker, _worker_lock, _calls = None, threading.Lock(), itertools.count()
_timeouts = 0


def math_timeouts() -> int:
    """How many maths comparisons ran into the one-second limit in this process; each of them counted as wrong."""
    return _timeouts


def _forget_worker() -> None:
    """In a forked process: the worker's pipes are its parent's."""
    global _worker, _worker_lock
    _worker, _worker_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_worker)


def call_math(name: str, *arguments: str, limit_s: float) -> tuple[bool, Any]:
    """(whether it ended within `limit_s` of processor time, its result) of a function of math_worker.py, run in a
    process that is ended at the limit. The first call starts the process, a second or two outside of any limit; from
    any thread, one call at a time. Raises RuntimeError where the process cannot start."""
    global _worker
    with _worker_lock:
        for attempt in range(2):  # what else ends a process (the kernel, for memory) may be no fault of the call
            if _worker is None:
                script = [sys.executable, str(Path(__file__).with_name("math_worker.py"))]
                _worker = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            call = next(_calls)
            try:
                _worker.stdin.write(json.dumps([call, name, arguments, limit_s]).encode() + b"\n")
                _worker.stdin.flush()
                for reply in _worker.stdout:
                    number, result = json.loads(reply)
                    if number == call:  # any other is of a call that was broken off here (Ctrl-C)
                        return True, result
                    if number is None and (result == signal.SIGPROF or attempt):
                        return False, None
                    if number is None:
                        break
            except BrokenPipeError:
                pass
            worker, _worker = _worker, None
            worker.kill()
            worker.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
            worker.wait()
    raise RuntimeError("The process that compares maths ended twice without an answer; what it said stands above.")


def _call_math(name: str, *texts: str) -> Any:
    """The call's result, or None after MATH_LIMIT_S, which is counted."""
    global _timeouts
    ended, result = call_math(name, *texts, limit_s=MATH_LIMIT_S)
    _timeouts += not ended
    return result


def _to_latex(text: str) -> str:
    text = re.sub(r"\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(rf"(?<![\\a-zA-Z])({_FUNCTIONS}|ln)\b", r"\\\1", text)
    text = re.sub(r"√\s*\(?(\w+)\)?", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\a-zA-Z])pi\b|π", r"\\pi ", text).replace("×", r"\times ").replace("·", r"\cdot ")
    text = re.sub(r"(?<!\\)%", r"\\%", text.replace("**", "^").replace("*", r"\cdot "))
    return re.sub(r"\^(-?\d{2,}|-\d)", r"^{\1}", text)


def _math_text(text: str) -> str:
    """An answer as math-verify is to read it. Bare expressions are put between dollars, without which its LaTeX reader
    ignores them; prose must contain one number, or it would pick the last of several ("" then, which it cannot read)."""
    text = text.translate({0x2212: "-", 0x2044: "/"}).strip()
    if not re.search(r"\$|\\\(|\\\[|\\boxed", text):
        text = _stated(text).rstrip(".")
        bare = re.sub(r"\\[a-zA-Z]+(?:\{[a-zA-Z ]*\})?", " ", text)
        if not re.search(rf"\b(?!(?:{_FUNCTIONS})\b)[A-Za-z]{{3,}}", bare):
            text = f"${_to_latex(text)}$"
        elif len(_number_tokens(text)) > 1:
            return ""
    return text


def _same_math(answer: str, truth: str) -> bool:
    answer, truth = answer.strip(), truth.strip()
    if not answer or max(len(answer), len(truth)) > MAX_MATH_CHARS:
        return False
    if _plain(answer) == _plain(truth):
        return True
    if _HEDGE.search(answer) and not _HEDGE.search(truth):
        return False
    return _call_math("is_same", _math_text(truth), _math_text(answer)) is True


def _math_value(text: str) -> float | None:
    return _call_math("value", f"${_to_latex(text.strip())}$") if len(text) <= MAX_MATH_CHARS else None


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
    by its type or that cannot be read.
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
        if not _call_math("is_maths", _math_text(solution)):
            raise SolutionError(
                f"solution {solution!r} of a math row: math-verify cannot parse or compare it within {MATH_LIMIT_S:g} s; "
                "write a number or a LaTeX expression, or use the problem type free-form"
            )
