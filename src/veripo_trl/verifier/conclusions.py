"""What a thinking concludes, read without a model.

The sentences are read from the end; the first that announces something settles it. Clauses that are hypothetical or
tell a first impression are left out before. For a choice, the options in a sentence are marked, and those that it
refutes aside it must name one. Numbers and expressions are what follows a cue; texts are the clause itself. Two readings
of one conclusion, or a change of mind that ends in no new one, are no conclusion.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from veripo_trl.answers.choice import option_labels, read_choice, true_choice
from veripo_trl.answers.grounded import true_grounded
from veripo_trl.answers.numbers import read_number
from veripo_trl.answers.plain import boxed_spans
from veripo_trl.answers.score import PROBLEM_TYPES
from veripo_trl.answers.spans import read_spans

MAX_THINK_CHARS = 100_000
MAX_SENTENCE_CHARS = 1_000  # its end; keeps every pattern far from a slow case
NARRATED = 2  # "so he opens the door" concludes in the last two sentences of a thinking, and is a story before


class Conclusion(NamedTuple):
    """`answer`: in a form that `answers_match` reads ("B", "A,C", "3.0", "12.0%", LaTeX, text), None if it cannot be
    told. `announced`: by a cue such as "so". `named`: in words that leave no doubt; others can only confirm an answer."""

    answer: str | None
    announced: bool = True
    named: bool = True


# ------------------------------------------------------------------------------------------------------- sentences

# It begins with the white space, which is three times as fast as beginning with a look behind.
_BETWEEN_SENTENCES = re.compile(
    r"\s(?:(?<=[.!?]\s)(?:(?<!\b[A-Z]\.\s)(?<!\b\d\.\s)(?<!\bi\.e\.\s)(?<!\be\.g\.\s)\s*|\s*(?=[A-Z]))|(?<=\n)\n*)"
)
# Of a thinking in sections, <planning>…</planning>; not of HTML, which `plain` takes away.
_SECTION = re.compile(r"</?(?!(?:strong|span|center|font|mark|code|div)>)[a-z]{3,20}>")
_TURN = re.compile(r";|\s[—–]\s|,?\s(?=(?:but|however|yet|though|so|therefore|thus|hence)\b)", re.I)
# Whatever a clause with one of these says, it does not settle it.
_UNSETTLED = re.compile(
    r"\b(?:if|whether|could|might|may|maybe|perhaps|possibly|suppose|would (?:need|have)|not sure|let(?:'s| us| me)"
    r"|at first|initially|i (?:\w+ )?(?:thought|assumed|guessed))\b|\?\W*$",
    re.I,
)
_TAKEN_BACK = re.compile(r"\b(?:wait|hmm+|on second thought|but no|not sure|mistaken)\b", re.I)
_RETRACTION = re.compile(
    rf"^(?:but|however|yet|unless)\b|{_TAKEN_BACK.pattern}|\b(?:actually|no,|maybe|perhaps|alternatively|forgot"
    r"|let me (?:re|double|look|check)|(?:still|i) (?:need|have) to|that (?:is|was) (?:wrong|not right))",
    re.I,
)
_NEGATED = r"\b(?:not|never|cannot|neither|nor|no|nothing|none|without|nobody)\b|n't\b"
# What follows the last cue of a sentence is what the sentence concludes.
_CUE = re.compile(
    r"\b(?:therefore|thus|hence|so(?! (?:far|that|many|much|long|on|as)\b)|in (?:conclusion|summary|short)|to conclude"
    r"|i conclude(?: that)?|consequently|accordingly|overall|ultimately|(?:this|that|which) (?:means|shows)(?: that)?"
    r"|(?:the|my|final|correct|right|best) (?:\w+ )?(?:answer|option|choice|result)(?: is| was| would be)?"
    r"|answer(?: is)?|(?:i|we|i'll|we'll|i would|i'd|i'm) (?:choose|pick|select|go(?:ing)? with|answer|say|read)"
    r"|must be|(?:it|this|that) (?:has to|can only|should) be|actually,? (?:it is|it's))(?!\w)",
    re.I,
)
_EXPLICIT = re.compile(r"\banswer\b|\bconclu|\\boxed", re.I)
_STATES = re.compile(rf"{_CUE.pattern}|\b(?:it|that|which|this)(?:'s| is)\b|=|:(?!\d)", re.I)


def sentences(think: str) -> list[str]:
    """Sentences in order; "A. red", "1. first" and decimals are not split."""
    parts = _BETWEEN_SENTENCES.split(think)
    return [part.strip()[-MAX_SENTENCE_CHARS:] for part in parts if part.strip()]


def _settled(sentence: str) -> str:
    """The sentence without the clauses that settle nothing."""
    clauses = _TURN.split(sentence)
    if re.match(r"\W*if\b", clauses[0], re.I):
        return ""
    return ", ".join(clause for clause in clauses if not _UNSETTLED.search(clause))


def _tail(sentence: str, cue: re.Pattern = _CUE) -> str | None:
    """What follows the sentence's last cue."""
    ends = [match.end() for match in cue.finditer(sentence)]
    return sentence[ends[-1] :].strip(" ,:") if ends else None


_TWO_TO_TEN = "two three four five six seven eight nine ten"
_DIGITS = {word: str(value) for value, word in enumerate(_TWO_TO_TEN.split(), 2)}
_SAME = {"grey": "gray", "violet": "purple"}
_FUNCTION_WORDS = set(
    "a an the of to in on at by for from with and or as into onto is are was were be been being am do does did has have"
    " had will would should can it its this that these those there here he she they we i you his her their my our him"
    " them then so very just also which who what when where while than now clearly really about reads read says say shows"
    " show displays displayed written".split()
)


def _in_digits(text: str) -> str:
    return re.sub(r"\b[a-z]{3,5}\b", lambda match: _DIGITS.get(match[0], match[0]), text)


def _stem(word: str) -> str:
    return re.sub(r"(?<=\w{3})(?:ing|ed|es|s|e)$", "", word)


def _stems(text: str) -> list[str]:
    """The content words of a text without their endings (all of its words if it has no others); negations are "not"."""
    words = re.findall(r"\w+", re.sub(_NEGATED, " not ", _in_digits(text.casefold())))
    return [_stem(_SAME.get(word, word)) for word in words if word not in _FUNCTION_WORDS] or words


def _holds(words: list[str], part: list[str]) -> bool:
    """Whether the words of `part` occur in `words` in their order, or it is spelled by some in a row ("S T O P")."""
    left, spelled, ends = iter(words), "".join(part), range(1, min(len(words), 60) + 1)
    in_a_row = ("".join(words[i:j]) for j in ends for i in range(j))
    return all(word in left for word in part) or spelled in in_a_row


# --------------------------------------------------------------------------------------------------------- choices

# In a marked sentence each letter of an option is one character, and each option's text another.
_L, _T, _CONTRADICTORY = "[\ue000-\ue019]", "[\ue100-\ue119]", "\ufffd"
_LETTER = re.compile(
    r"(?<![\w'’])[(\[]([A-Za-z])[)\]]"
    r"|\b(?i:option|choice|answer|letter)s?[\s:\"'-]+([A-Zb-z])(?![\w’]|'\w)"
    r"|(?<![\w-])(?<!\w['’])([A-HJ-Zb-hj]|a(?=[.!]?$))(?![\w-])(?!['’](?!s\b)\w)"
    # "A" before a word is the article, unless that is a verb or a conjunction
    r"(?!(?<=A)\s+(?!(?:is|was|and|or|nor|as|but|because|since|seems|must|has|can|cannot|does|fits|matches|remains|would"
    r"|looks|describes|says|with|rather|instead|in|to|it)\b)[a-z])"
)
_PLACES = ("first", "second", "third", "fourth", "fifth")
_ORDINAL = re.compile(rf"\b({'|'.join(_PLACES)}) (?:option|choice|alternative|answer)\b", re.I)
_GROUP = re.compile(rf"{_L}(?:[\s,&/]*(?:\b(?:and|or|nor)\b[\s,]*)?(?:(?:option|choice)\s)?{_L})*")
_REFUTED_BEFORE = re.compile(
    rf"(?:{_NEGATED}|\b(?:except|rather than|instead of|unlike|other than|against|rul\w+ out|eliminat\w+"
    r"|exclud\w+|reject\w*|dismiss\w*|contradict\w*|wrong|incorrect|false|least|fail\w*)\b)[^,;:]{0,40}$"
)
_REFUTED_AFTER = re.compile(
    r"(?:(?!\b(?:because|since|as|while|whereas|so|which|that|when)\b)[^,;:\ue000-\ue119]){0,40}?"
    rf"(?:{_NEGATED}|\b(?:wrong|incorrect|false|excluded|eliminated|ruled|rejected|dismissed|impossible|unlikely"
    r"|contradict\w*|fails?|misses|lacks|too|(?:is|are|be|been|both|all|now|already) out)\b)"
)
# What is said of an option beside the conclusion: "A, while B describes the start", "Since B says so, A".
_ASIDE = re.compile(rf"(?:^|,? )(?:because|since|while|whereas|although|as)\b[^,]*{_L}[^,]*,?")
# Words before an option's letter; after any other word the letter may be its noun's name.
_BEFORE_LETTER = re.compile(
    rf"^(?:{_CUE.pattern}|(?:option|choice|is|be|or|and|not|with|to)$)", re.I
)
# What makes a sentence at the end that names one option a conclusion.
_SETTLES = re.compile(
    rf"{_STATES.pattern}|\b(?:only|leav\w+|remain\w*|match\w*|fit\w*|correspond\w*|support\w*|point\w*|confirm\w*"
    rf"|correct|right|best|suggests?|indicat\w+|agree\w*|speaks|describes?|works)\b|^\W*{_L}\W*$",
    re.I,
)


@functools.lru_cache(maxsize=1024)
def _option_patterns(options: tuple[str, ...]) -> tuple[dict, list]:
    """(labels, for each option's text, the longest first: how it is found, and its mark)."""
    labels, patterns = option_labels(options), []
    for letter, text in sorted(labels.items(), key=lambda item: -len(item[1])):
        if text:
            pattern = re.compile(rf"(?<!\w){re.escape(_in_digits(text))}(?!\w)", re.I)
            patterns.append((pattern, chr(0xE0BF + ord(letter))))
    return labels, patterns


def _marked(sentence: str, options: tuple[str, ...]) -> str:
    """The sentence in lower case without quotes and brackets, its options as marks. A letter with its own text beside it
    is the letter's mark, one with another's text is contradictory; before a colon a text is not beside it."""
    labels, patterns = _option_patterns(options)

    def letter_mark(match: re.Match) -> str:
        letter = match[match.lastindex].upper()
        known = letter in labels if labels else letter <= "J"
        name = match[0][:-1] if match.lastindex == 2 else ""
        return f" {name}{chr(0xDFBF + ord(letter))} " if known else match[0]

    def ordinal_letter(match: re.Match) -> str:
        return f"option {chr(65 + _PLACES.index(match[1].lower()))}"

    def joined(match: re.Match) -> str:
        letter, text = sorted(match.groups())
        return letter if ord(letter) + 0x100 == ord(text) else _CONTRADICTORY

    text = _in_digits(_ORDINAL.sub(ordinal_letter, re.sub("[\ue000-\uf8ff]", "", sentence)))
    for pattern, mark in patterns:
        text = pattern.sub(mark, text)
    text = _LETTER.sub(letter_mark, text).replace("’", "'").casefold()
    text = re.sub(r"[*_\"“”`$]", "", text)
    text = re.sub(rf"({_L})\s*[.:,(–-]*\s*(?:the |an? )?({_T})", joined, text)
    return re.sub(r"[()\[\]{}\s]+", " ", text).strip()


def _choice_in(sentence: str, last: bool, options: tuple[str, ...]) -> Conclusion | None:
    """A letter outranks an option's text: it is what will be answered."""
    text = _ASIDE.sub("", _marked(_settled(sentence), options))
    if not re.search(_L, text):
        return _option_text_in(text, last, options)
    named, place = set(), 0
    for group in _GROUP.finditer(text):
        before, after, place = text[place : group.start()], text[group.end() :], group.end()
        letters = ",".join(sorted({chr(ord(mark) - 0xDFBF) for mark in re.findall(_L, group[0])}))
        if not (_REFUTED_BEFORE.search(before) or _REFUTED_AFTER.match(after)):
            named.add(None if re.search(r"\bor\b|/", group[0]) else letters)
    if _labels_a_thing(text):
        return Conclusion(None)
    named = {letters for letters in named if letters and len(letters) == 1} or named
    announced = bool(named) and (_SETTLES if last else _CUE).search(text) is not None
    if len(named) == 1 and (last or announced):
        return Conclusion(named.pop(), announced, named=announced)
    return Conclusion(None) if announced else None


def _labels_a_thing(text: str) -> bool:
    """Whether the only letter of a marked sentence may be a thing's name, as in "team B's shirt is red"."""
    letters, texts = re.findall(_L, text), re.findall(_T, text)
    word = re.search(rf"([a-z']+) {_L}", text)
    unlike = len(letters) == 1 and texts and chr(ord(letters[0]) + 0x100) not in texts
    return bool(unlike and word) and not _BEFORE_LETTER.search(word[1])


def _option_text_in(text: str, last: bool, options: tuple[str, ...]) -> Conclusion | None:
    """What a marked sentence without letters concludes by an option's text, as it is written or by its content words."""
    tail = _tail(text, _STATES)
    stated = text if tail is None else tail
    letters = set()
    for match in re.finditer(_T, stated):
        before, after = stated[: match.start()], stated[match.end() :]
        if not (_REFUTED_BEFORE.search(before) or _REFUTED_AFTER.match(after)):
            letters.add(chr(ord(match[0]) - 0xE0BF))
    named = bool(letters)
    if not re.search(_T, stated):
        letters, named = _resembled(stated, _option_patterns(options)[0])
    if not letters or (tail is None and (not last or len(letters) > 1)):
        return None
    letter = letters.pop() if len(letters) == 1 else None
    return Conclusion(letter, tail is not None and named, named)


def _resembled(text: str, labels: dict[str, str]) -> tuple[set[str], bool]:
    """(the options most of whose content words `text` has, those that all options share aside; whether it has all of them
    or none of a rival's)."""
    words, stems = _stems(text), {letter: _stems(option) for letter, option in labels.items()}
    common = set.intersection(*map(set, stems.values())) if stems else set()
    own = {letter: set(option) - common for letter, option in stems.items()}
    if stems and not any(own.values()):  # one list in several orders
        return {letter for letter, option in stems.items() if _holds(words, option)}, True
    shares = {
        letter: len(needed & set(words)) / len(needed)
        for letter, needed in own.items()
        if needed and ("not" in stems[letter]) == ("not" in words)
    }
    best = max(shares.values(), default=0)
    return {letter for letter, share in shares.items() if share == best >= 1 / 3}, best == 1


# --------------------------------------------------------------------------------------------------------- numbers

_NUMERAL = re.compile(
    r"\d|\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|fourteen"
    r"|(?:thir|for|fif|six|seven|eigh|nine)t(?:een|y))\b",
    re.I,
)
_QUANTITY = (
    r"(?:number|count|total|sum|distance|length|width|height|depth|size|area|volume|speed|duration|time|value|estimate"
    r"|amount|share|probability|average|difference|side|radius|age|price|weight)"
)
_AMOUNTS = re.compile(
    rf"{_CUE.pattern}|=|≈|:(?!\d)|\b(?:{_QUANTITY}\b[^,;]*? (?:is|are|was|be)|are(?=.*(?:total|in all))|makes|giving"
    r"|gives|leaves|leaving|means|measures|yields|making|totall?ing|equals?|results? in|total of|adds? up to|call it"
    r"|amounts? to|sums? to|i\.e\.,?|(?:in total|in all|altogether)(?=,? \D)|(?:comes?|works) (?:out )?(?:to|at)"
    r"|(?:i|we) (?:estimate|get|find))(?!\w)",
    re.I,
)


# Beside a numeral, a second number: "twice in 10 minutes", "two cats in 3 boxes", "5 in total, 3 of them red".
_OTHER_NUMBER = re.compile(
    r"^(?=.*\d).*\b(?:no|none|neither|half|once|twice|thrice|two|three|four|five|six|seven|eight|nine|ten)\b"
    r"|\d.*\b(?:in total|altogether|in all)\b.*\d",
    re.I,
)


def _number_in(sentence: str, last: bool, options: tuple[str, ...]) -> Conclusion | None:
    sentence = _settled(sentence)
    tails = [sentence[match.end() :] for match in list(_AMOUNTS.finditer(sentence))[:-7:-1]]
    announced = [tail for tail in tails if _NUMERAL.search(tail)]
    if announced and _OTHER_NUMBER.search(announced[0]):
        return Conclusion(None)
    if not announced and not (last and _NUMERAL.search(sentence)):
        return None
    number, cued = read_number(announced[0] if announced else sentence), bool(announced)
    if number is None:
        return Conclusion(None) if cued else None
    return Conclusion(f"{number[0]!r}{'%' if number[1] else ''}", cued, cued)


# Several results, two forms of one, or two names.
_SEVERAL = re.compile(
    r"±|\\pm\b|=.*\b(?:or|where)\b.*=|\bis\b[^,;]*\band\b[^,;]*\bis\b|\d.*(?:\babout\b|≈).*\d"
)
_EQUALS = re.compile(rf"{_AMOUNTS.pattern}|\b(?:is|are)\b", re.I)


def _expression_in(sentence: str, last: bool, options: tuple[str, ...]) -> Conclusion | None:
    sentence = _settled(sentence)
    tail = _tail(sentence, _EQUALS)
    if tail is None:
        return None
    if _SEVERAL.search(sentence):
        return Conclusion(None)
    if dollars := re.findall(r"\$([^$]+)\$", sentence):
        return Conclusion(dollars[-1].rsplit("=", 1)[-1].strip() or None)
    if re.search(r"(?<!\\)\b[A-Za-z]{3,}", tail):
        return _number_in(sentence, last, options)
    return Conclusion(tail.strip(" .:,") or None)


# ----------------------------------------------------------------------------------------------------------- texts

_READS = re.compile(r"\b(?:is|are|was|were|reads?|says?|shows?|displays?|named)\b|=|:(?!\d)", re.I)
_READ_OUT = re.compile(
    r"\b(?:reads|says|spells?|displays|(?:text|word|sign|number|name|label|plate|brand)s?\b[^,;:]*\b(?:is|was))\b:?",
    re.I,
)
_REJECTED = re.compile(
    r"\bnot\b[^,;.]*,?\s*\bbut\b|(?:, (?:and )?not|\brather than)\b[^,;.]*", re.I
)
_COLOURS = "red orange yellow green blue purple violet pink brown black white grey gray".split()
_RIVALS = (set(map(_stem, _COLOURS)), set(_DIGITS.values()) | {"0", "1"})


def _text_in(sentence: str, last: bool, options: tuple[str, ...]) -> Conclusion | None:
    sentence = _settled(sentence)
    tail = _tail(sentence)
    if tail is None and last:
        tail = _tail(sentence, _READ_OUT)
    if tail := (tail or "").strip(" .:,!\"'"):
        return Conclusion(tail)
    if not (last and sentence):
        return None
    return Conclusion(sentence.strip(" ."), announced=False, named=False)


def _alike(word: str, other: str) -> bool:
    """Whether one word may stand for the other, as in "Coca" and "Coke", "kilometre" and "km"."""
    short, long = sorted((word, other), key=len)
    if not short.isalpha() or len(short) < 2 or short[0] != long[0]:
        return short == long
    letters = iter(long)
    return short[:2] == long[:2] or all(letter in letters for letter in short)


def _otherwise_written(text: str, other: str) -> bool:
    """Whether two texts without a common word may still be one: numbers in two forms, a name's initials."""
    shapes = [re.sub(r"\d+", "0", each) for each in (text, other)]
    one, two = (set(re.findall(r"['’]?0(?:[:/.-]0)*", shape)) for shape in shapes)
    if one != two and all(map(_NUMERAL.search, (text, other))):
        return True
    for one, two in ((text, other), (other, text)):
        words, names = re.findall(r"[a-z]\w*", one.casefold()), re.findall(r"\w\w+", two.casefold())
        initials = "".join(word[0] for word in words if word not in _FUNCTION_WORDS)
        if len(initials) > 1 and any(name.startswith(initials) for name in names):
            return True
    return False


def same_text(concluded: str, answer: str, *, exact: bool) -> bool | None:
    """Whether a conclusion in words says what the answer says.

    True: the one holds the other's words in their order. False: both are short, and where the very words count (`exact`:
    OCR) they share none, else they differ in a colour, a side or a number; or they are different bare lists. None: it
    cannot be told, since the same may be said in other words.
    """
    kept = _REJECTED.sub(" ", concluded)
    words, answered = _stems(kept), _stems(answer)
    if not words or not answered or ("not" in words) != ("not" in answered):
        return None
    if _holds(words, answered) or _holds(answered, words):
        return True
    bare = [len(content) == len(re.findall(r"\b(?!(?:and|then)\b)\w+", text))
            for content, text in ((words, kept), (answered, answer))]  # fmt: skip
    if all(bare) and min(len(words), len(answered)) >= 3:
        return False
    if exact:
        given = _stems(_tail(answer, _READS) or answer)
        alike = any(_alike(one, two) for one in given for two in words)
        return None if alike or _otherwise_written(kept, answer) else False
    for rivals in _RIVALS:
        ours, theirs = rivals.intersection(words), rivals.intersection(answered)
        if ours and theirs and not ours & theirs and set(answered) - theirs <= set(words):
            return False
    return None


# ------------------------------------------------------------------------------------------- spans, boxes, yes or no

_TYPED = ("temporal grounding", "grounded choice", "object and time", "box grounding", "yes/no")
_ID = re.compile(r"(?:\b(?:id|number|object|mark|person)\b\W{0,3}|#)(\d{1,6})\b(?!\s*(?:to\b|[-–:.]\s*\d))", re.I)


def _shown(spans) -> str:
    return "; ".join(f"{start} to {end}" for start, end in spans)


def in_own_form(text: str, problem_type: str, options: Sequence[str] | None) -> str:
    """A conclusion, "object 2 from 5 to 11 s", in its type's own form; `text` where it has none or is not read."""
    return (_said(text, problem_type, tuple(options or ())) if problem_type in _TYPED else None) or text


def _said(text: str, problem_type: str, options: tuple[str, ...]) -> str | None:
    """What a text says in a type's own form, as a solution has it."""
    if problem_type == "object and time":
        text = re.sub(r"^\W*(\d{1,6})\s*[,;]", r"id \1 from ", text)  # "2; 5.0 to 11.0"
        ids, spans = set(_ID.findall(text)), read_spans(_ID.sub(" ", text))
        return f"{ids.pop()}; {_shown(spans)}" if len(ids) == 1 and spans and len(spans) == 1 else None
    said = PROBLEM_TYPES[problem_type].read(text, options)
    if said is None or problem_type == "yes/no":
        return said
    if problem_type == "box grounding":
        return str(list(said))
    if problem_type == "grounded choice":
        return None if None in said else f"{','.join(sorted(said[0]))}; {_shown(said[1])}"
    return _shown(said)


_DETERMINER = re.compile(r"\W*no\s+(?!(?:because|since|as|it|there|they|he|she|the|this|that)\b)\w", re.I)


def _typed_in(problem_type: str, sentence: str, last: bool, options: tuple[str, ...], *_) -> Conclusion | None:
    """By the type's own reader: of what follows the last cue, or else of the last sentence."""
    tail = _tail(_settled(sentence))
    if tail is None:
        said = _said(sentence, problem_type, options) if last else None
        return said and Conclusion(said, announced=False, named=False)
    if problem_type == "yes/no" and _DETERMINER.match(tail):
        return Conclusion(None)  # "so no ball falls" may confirm what is asked
    said = _said(tail, problem_type, options)
    return Conclusion(said) if said or re.search(r"\d", tail) else None


# -------------------------------------------------------------------------------------------------------- thinking

_READERS = {
    "multiple choice": _choice_in,
    "numerical": _number_in,
    "regression": _number_in,
    "math": _expression_in,
    "OCR": _text_in,
    "free-form": _text_in,
    **{kind: functools.partial(_typed_in, kind) for kind in _TYPED},
}


def _boxed(text: str, read: Callable, options: tuple[str, ...]) -> Conclusion:
    if read is _choice_in:
        return Conclusion(",".join(sorted(read_choice(text, options) or ())) or None)
    if read is _number_in:
        return read(f"= {text}", True, options)
    return Conclusion(text.strip() or None)


def conclude(think: str, *, problem_type: str, options: Sequence[str] | None = None) -> Conclusion:
    """What the thinking announces last, else what its last sentence names; nothing for a problem type without rules."""
    read, options = _READERS.get(problem_type), tuple(options or ())
    if read is None:
        return Conclusion(None, announced=False, named=False)
    think = _SECTION.sub("\n", think[-MAX_THINK_CHARS:])
    retracted, unannounced, remark = False, None, None
    for place, sentence in enumerate(reversed(sentences(think))):
        story = place >= NARRATED and not (read is _choice_in or _EXPLICIT.search(sentence))
        last = place == 0 or (place == 1 and remark is not None)
        if boxed := boxed_spans(sentence):
            found = _boxed(boxed[-1], read, options)
        else:
            found = None if story else read(sentence, last, options)
        if found and found.announced and remark:
            if found.answer == remark.answer or retracted:
                return remark
            return found if _STATES.search(sentence) else Conclusion(None)
        elif found and found.announced:
            names_one = read is _choice_in and place == 0 and not _STATES.search(sentence)
            if names_one and re.search(_L, _marked(sentence, options)):
                remark = found  # it may follow the conclusion: "Option A only fits the start."
            else:
                retracted = retracted or _TAKEN_BACK.search(_tail(sentence) or "")
                return Conclusion(None) if retracted else found
        unannounced = unannounced or found
        retracted = retracted or _RETRACTION.search(sentence)
    if remark:
        return remark
    return Conclusion(None) if retracted or not unannounced else unannounced


# ------------------------------------------------------------------------------------------------ what gives it away

_LETTERED = {"multiple choice": true_choice, "grounded choice": lambda *args: true_grounded(*args)[0]}
_NUMBERED = (
    "numerical", "regression", "temporal grounding", "grounded choice", "object and time", "box grounding",
)  # fmt: skip
_COUNTS = re.compile(
    rf"{_NUMERAL.pattern}|\b(?:hundred|thousand|half|dozen|both|pair|couple|none|no|single|once|twice)\b", re.I
)


def may_tell(sentence: str, *, problem_type: str, solution: str, options: Sequence[str] | None = None) -> bool:
    """Whether a sentence may give the truth away, too often rather than too seldom.

    Choices: it names a right option, by letter, text or all of the text's content words. Types with numbers: any number
    is in it, since one near the truth earns too. OCR: half of the truth's words. What gives other types away cannot be
    told, so that every sentence may.
    """
    if problem_type in _NUMBERED and _COUNTS.search(sentence):
        return True
    if problem_type in _LETTERED:
        truth, options = _LETTERED[problem_type](solution, options), tuple(options or ())
        labels, words = _option_patterns(options)[0], set(_stems(sentence))
        marks = "".join(chr(base + ord(letter)) for letter in truth for base in (0xDFBF, 0xE0BF))
        texts = [set(_stems(labels[letter])) for letter in truth if labels.get(letter)]
        return bool(re.search(f"[{marks}{_CONTRADICTORY}]", _marked(sentence, options))) or any(
            text <= words for text in texts
        )
    if problem_type == "OCR":
        words = set(_stems(solution))
        return 2 * len(words & set(_stems(sentence))) >= len(words)
    return problem_type not in _NUMBERED
