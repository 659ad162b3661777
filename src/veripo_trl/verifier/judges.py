"""The consistency judges: does the thinking conclude the answer that is given?

`rules` reads the conclusion out of the thinking with patterns and compares it by `answers.py`; it needs no model. It
prefers "unknown" to a guess: two readings of one conclusion, a hypothetical, or a change of mind that ends in no new
conclusion give None.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from veripo_trl.answers import answers_match, boxed_spans, option_labels, read_choice, read_number, split_completion

MAX_THINK_CHARS = 100_000
MAX_SENTENCE_CHARS = 1_000  # its end; keeps every pattern far from a slow case
MAX_TAILS = 6
MAX_PROSE_WORDS = 12  # a longer free answer may say the same in other words

# A conclusion announces itself. What follows the last cue of a sentence is what the sentence concludes.
_CUE = re.compile(
    r"\b(?:therefore|thus|hence|so(?! (?:far|that|many|much|long|on)\b)|in conclusion|i conclude(?: that)?"
    r"|consequently|(?:the|my|final|correct|right|best) (?:answer|option|choice|count|total|result)(?: here)?"
    r"(?: (?:is|:|=|was|(?:must|should|would|has to) be))?|answer(?: is|:|=)"
    r"|(?:that|this|it|which) (?:makes|gives|leaves|means|equals)"
    r"|(?:giving|making|totall?ing|leaving|equals|in total|altogether|the total is|total of)"
    r"|it (?:must|has to) be|(?:i|we|i'll|we'll|i will|i would|i'd) (?:choose|pick|select|go with|answer)"
    r"|must be|it's actually|it is actually|actually,? (?:it is|it's))(?!\w)[,:]?|=|\\boxed",
    re.I,
)
# Whatever a sentence with one of these says, it does not settle it.
_UNSETTLED = re.compile(
    r"\b(?:if|whether|could|might|may|maybe|perhaps|possibly|would that|suppose|assum\w+|seems?|guess)\b|\?\W*$", re.I
)
_RETRACTION = re.compile(
    r"\b(?:wait|hmm+|actually|on second thought|let me (?:re|double|look|check)\w*|but no|no,|i was wrong|mistaken"
    r"|maybe|perhaps|or (?:is|was) it|not sure|alternatively"
    r"|that (?:is|was|can't be|cannot be) (?:not )?(?:wrong|right))",
    re.I,
)
_NEGATION = re.compile(r"\b(?:not|never|cannot|neither|nor|except|rather than|instead of|no longer)\b|n't\b", re.I)
_LETTERS = r"[(\[]?[A-Z][)\]]?(?:\s*(?:,|&|,?\s*and)\s*[(\[]?[A-Z][)\]]?(?![\w']))*"
_LETTER_AT_START = re.compile(
    rf"\W*(?:(?:the|my)\s+)?(?:(?:correct|right|final|best)\s+)?(?:(?:answer|option|choice|letter|it)s?\b\W*)?"
    rf"(?:(?:is|are|must be|should be|would be)\b\W*)?(?:(?:clearly|definitely|simply|option|options|choice|letter)\b"
    rf"\W*)*(?P<letters>{_LETTERS})(?![\w'])(?!\s+[a-z])"
)
_LETTER_FITS = re.compile(
    r"(?:\b(?:option|choice|answer)\s+)?(?P<letters>[(\[]?[B-Z][)\]]?|(?<=option )A|(?<=Option )A)\s+(?:is|must be)\s+"
    r"(?:therefore\s+|clearly\s+)?(?:the\s+)?(?:correct|right|best|answer)\b"
)
_LETTER_AT_END = re.compile(rf":\s*(?P<letters>{_LETTERS})\s*[.!]?\s*$")
_IS_LETTER_AT_END = re.compile(rf"\b(?:is|are|be)\s+(?:option\s+)?(?P<letters>{_LETTERS})\s*[.!]?\s*$")
_RIVAL = re.compile(r"[\s.)\]]*(?:\bor\b|/)", re.I)


# It begins with the white space, which is three times as fast as beginning with a look behind.
_BETWEEN_SENTENCES = re.compile(
    r"\s(?:(?<=[.!?]\s)(?:(?<!\b[A-Z]\.\s)(?<!\b\d\.\s)\s*|\s*(?=[A-Z]))|(?<=\n)\n*)"
)


def _sentences(think: str) -> list[str]:
    """Sentences in order; "A. red", "1. first" and decimals are not split."""
    parts = _BETWEEN_SENTENCES.split(think)
    return [part.strip()[-MAX_SENTENCE_CHARS:] for part in parts if part.strip()]


def _tails(sentence: str) -> list[str]:
    """What follows each cue of the sentence, the last cue first."""
    return [sentence[match.end() :] for match in list(_CUE.finditer(sentence))[: -MAX_TAILS - 1 : -1]]


def _named_options(text: str, labels: dict[str, str]) -> set[str]:
    """Letters of the options whose text occurs in `text` as words; "red" inside a found "red ball" does not count."""
    text = re.sub(r"\s+", " ", text.casefold())
    named = set()
    for letter in sorted(labels, key=lambda key: -len(labels[key])):
        words = re.escape(labels[letter])
        if words and re.search(rf"(?<!\w){words}(?!\w)", text):
            named.add(letter)
            text = re.sub(rf"(?<!\w){words}(?!\w)", " # ", text)
    return named


def _concluded_letters(match: re.Match, sentence: str, options: Sequence[str]) -> str | None:
    """The letters of a match, unless a rival ("B or C") or another option's text ("B (right)") follows them."""
    after = sentence[match.end("letters") :]
    letters = read_choice(match["letters"], options)
    if letters is None or _RIVAL.match(after):
        return None
    beside = re.match(r"\s*[(:,.–-]\s*(?P<text>[^.;)]+)", after)
    if beside and options and len(letters) == 1:
        named = _named_options(beside["text"], option_labels(options))
        if named and named != letters:
            return None
    return ",".join(sorted(letters))


def _choice_in(sentence: str, options: Sequence[str]) -> tuple[bool, str | None]:
    """(whether the sentence concludes, what). A letter outranks an option's text: it is what will be answered."""
    labels = option_labels(options)
    tails = _tails(sentence)
    boxed = boxed_spans(sentence)
    if boxed:
        read = {read_choice(span, options) for span in boxed}
        letters = read.pop() if len(read) == 1 else None
        return True, ",".join(sorted(letters)) if letters else None
    found = [(sentence, _LETTER_AT_END.search(sentence)), (sentence, _LETTER_FITS.search(sentence))]
    found += [(tail, _LETTER_AT_START.match(tail) or _IS_LETTER_AT_END.search(tail)) for tail in tails]
    for text, match in found:
        if match and (not labels or read_choice(match["letters"], options)):
            if _NEGATION.search(text[: match.end()]):
                continue
            return True, _concluded_letters(match, text, options)
    for tail in tails:
        named = _named_options(tail, labels)
        if named:
            clear = len(named) == 1 and not _NEGATION.search(tail)
            return True, named.pop() if clear else None
        if re.match(r"\W*(?:either\s+)?[(\[]?[A-Z][)\]]?\s*(?:or|/)\s*[(\[]?[A-Z]\b", tail):
            return True, None
    return False, None


_NUMERAL = re.compile(
    r"\d|\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen"
    r"|seventeen|eighteen|nineteen|twenty)\b",
    re.I,
)


def _number_in(sentence: str, options: Sequence[str]) -> tuple[bool, str | None]:
    boxed = boxed_spans(sentence)
    tails = boxed[-1:] if boxed else _tails(sentence)
    if re.search(r":\s*[^:]*\d[^:]*$", sentence):
        tails.insert(0, sentence.rsplit(":", 1)[1])
    if before := re.match(r"(.*)\b(?:in total|altogether|in all)\W*$", sentence, re.I):
        tails.append(before[1])
    for tail in tails:
        if not _NUMERAL.search(tail):
            continue
        number = read_number(tail)
        if number is None:
            return True, None
        return True, f"{number[0]!r}{'%' if number[1] else ''}"
    return False, None


def _expression_in(sentence: str, options: Sequence[str]) -> tuple[bool, str | None]:
    boxed = boxed_spans(sentence)
    if boxed:
        return True, boxed[-1].strip() or None
    dollars = re.findall(r"\$([^$]+)\$", sentence)
    tails = _tails(sentence)
    if not tails:
        return False, None
    tail = tails[0].strip(" .:,")
    if len(dollars) and _CUE.search(sentence):
        return True, dollars[-1].rsplit("=", 1)[-1].strip() or None
    words = re.findall(r"(?<!\\)\b[A-Za-z]{3,}", tail)
    if words:
        return _number_in(sentence, options)
    return (True, tail) if tail else (False, None)


def _text_in(sentence: str, options: Sequence[str]) -> tuple[bool, str | None]:
    boxed = boxed_spans(sentence)
    if boxed:
        return True, boxed[-1].strip() or None
    quoted = re.search(r"\b(?:reads?|says?|shows?|is|answer|:)\W*[\"“](?P<text>[^\"”]+)[\"”]\W*$", sentence, re.I)
    if quoted and not _NEGATION.search(sentence):
        return True, quoted["text"].strip()
    tails = _tails(sentence)
    if tails and not _NEGATION.search(tails[0]):
        tail = re.sub(r"^\W*(?:it|the (?:answer|text)|they|this)\s+(?:is|are|reads|says)\b", "", tails[0], flags=re.I)
        tail = tail.strip(" .:,!\"'")
        if tail:
            return True, tail
    return False, None


_READERS = {
    "multiple choice": _choice_in,
    "numerical": _number_in,
    "regression": _number_in,
    "math": _expression_in,
    "OCR": _text_in,
    "free-form": _text_in,
}


def conclude_by_rules(think: str, *, problem_type: str, options: Sequence[str] | None = None) -> str | None:
    """The answer that the thinking concludes last, in a form `answers_match` reads ("B", "A,C", "3.0", "12.0%", LaTeX,
    text); None if it concludes none, several at once, or takes the last one back. Raises KeyError for an unknown
    problem type (rows are checked when they load)."""
    read, options = _READERS[problem_type], options or []
    retracted = False
    for sentence in reversed(_sentences(think[-MAX_THINK_CHARS:])):
        if not _UNSETTLED.search(sentence):
            concludes, conclusion = read(sentence, options)
            if concludes:
                retracted = retracted or any(_RETRACTION.search(tail) for tail in _tails(sentence)[:1])
                return None if retracted else conclusion
        retracted = retracted or bool(_RETRACTION.search(sentence))
    return None


def judge_by_rules(completion: str, *, problem_type: str, options: Sequence[str] | None = None) -> str:
    """ "consistent", "inconsistent" or "unknown" for a completion. Unknown: no single think or answer span, no clear
    conclusion, or free texts too long to differ by wording alone."""
    think, answer = split_completion(completion)
    if not think or not answer:
        return "unknown"
    return _verdict_by_rules(think, answer, problem_type, options)["consistency"]


@functools.lru_cache(maxsize=2048)  # the rollouts of a group say the same few things
def _match(conclusion: str, answer: str, problem_type: str, options: tuple[str, ...]) -> bool:
    return answers_match(conclusion, answer, problem_type=problem_type, options=options)


def _verdict_by_rules(think: str, answer: str, problem_type: str, options: Sequence[str] | None) -> dict:
    conclusion = conclude_by_rules(think, problem_type=problem_type, options=options)
    if conclusion is None:
        consistency, reason = "unknown", "no conclusion: the patterns read none"
    elif _match(conclusion, answer, problem_type, tuple(options or ())):
        consistency, reason = "consistent", ""
    elif problem_type in ("OCR", "free-form") and max(len(conclusion.split()), len(answer.split())) > MAX_PROSE_WORDS:
        consistency, reason = "unknown", "long text: it may say the same in other words"
    else:
        consistency, reason = "inconsistent", ""
    return {"consistency": consistency, "concluded_answer": conclusion, "reason": reason}


def shown_model(model: str, *, is_path: bool = False) -> str:
    """A judge's model as others may read it: of a path of this machine the last part; any other name as it is."""
    path = is_path or model.count("/") > 1 or model.startswith(("/", "~", ".")) or "\\" in model
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1] if path else model


class RulesJudge:
    """The judge that needs no model. It shares the judges' protocol:

    - `name`, `prompt_version`: who judged and by what text; both go into verdicts and into the cache's key.
    - `judge_stream(items)`: yields `(place, verdict)` for each item, in any order. An item is a dict `place, think,
      answer, problem_type, options`; a verdict is `consistency, concluded_answer, reason, reply`, where `reply` is what
      may be cached, None for nothing. The items may contain None for "none at the moment": the judge then yields at
      least once before it asks for the next one, `(None, None)` if it has nothing else.
    - `requests`, `retries`, `failures` (a Counter by cause): what judging took so far.
    """

    name = "rules"
    prompt_version = ""
    caches = False  # reading again is cheaper than looking up

    def __init__(self):
        self.requests, self.retries, self.failures = 0, 0, Counter()

    def judge_stream(self, items: Iterable[dict | None]) -> Iterator[tuple[int | None, dict | None]]:
        for item in items:
            if item is None:
                yield None, None
                continue
            task = (item["problem_type"], item["options"])
            yield item["place"], {**_verdict_by_rules(item["think"], item["answer"], *task), "reply": None}

    def summary(self) -> str:
        return "Judged by rules, without requests."
