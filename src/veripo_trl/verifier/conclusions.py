"""What a thinking concludes, read without a model.

The sentences are read from the end; the first that announces something settles it. Clauses that are hypothetical or
tell a first impression are left out before. For a choice, the options in a sentence are marked, and those that it
refutes aside it must name one. Numbers and expressions are what follows a cue; texts are the clause itself. Two readings
of one conclusion, or a change of mind that ends in no new one, are no conclusion.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from veripo_trl.answers.choice import option_labels, read_choice
from veripo_trl.answers.numbers import read_number
from veripo_trl.answers.plain import boxed_spans

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
_TURN = re.compile(r";|\s[—–]\s|,?\s(?=(?:but|however|yet|although|though|so|therefore|thus|hence)\b)", re.I)
_LEADING = re.compile(r"^\s*(?:since|because|as|given|while|although|though|if (?:we|you|i))\b[^,]*,\s*", re.I)
# Whatever a clause with one of these says, it does not settle it.
_UNSETTLED = re.compile(
    r"\b(?:if|whether|could|might|may|maybe|perhaps|possibly|suppose|would (?:need|have)|not sure|let(?:'s| us| me)"
    r"|at first|initially|(?:first|initial) (?:guess|thought|impression|look|glance)"
    r"|i (?:\w+ )?(?:thought|assumed|believed|guessed))\b|\?\W*$",
    re.I,
)
_RETRACTION = re.compile(
    r"^(?:but|however|yet|then again|on the other hand|unless)\b"
    r"|\b(?:wait|hmm+|actually|on second thought|let me (?:re|double|look|check)\w*|but no|no,|i was wrong|mistaken"
    r"|maybe|perhaps|or (?:is|was) it|not sure|alternatively|forgot|double[- ]?check|(?:still|i) (?:need|have) to"
    r"|that (?:is|was|can't be|cannot be) (?:not )?(?:wrong|right))",
    re.I,
)
_TAKEN_BACK = re.compile(r"\b(?:wait|hmm+|on second thought|but no|not sure|mistaken|or (?:is|was) it)\b", re.I)
_NEGATION = re.compile(r"\b(?:not|never|cannot|neither|nor|no|nothing|none|without|nobody)\b|n't\b", re.I)
# What follows the last cue of a sentence is what the sentence concludes.
_CUE = re.compile(
    r"\b(?:therefore|thus|hence|so(?! (?:far|that|many|much|long|on|as)\b)|in (?:conclusion|summary|short)|to conclude"
    r"|i conclude(?: that)?|consequently|accordingly|overall|ultimately"
    r"|(?:this|that|which) (?:means|shows|tells us)(?: that)?"
    r"|(?:the|my|final|correct|right|best) (?:\w+ )?(?:answer|option|choice|result)(?: here)?"
    r"(?: (?:is|=|was|(?:must|should|would|has to) be))?|answer(?: is)?"
    r"|(?:i|we|i'll|we'll|i will|i would|i'd|i'm|i am) (?:choose|pick|select|go with|going with|answer|say|read)"
    r"|(?:it|this|that) (?:must|has to|can only|should) be|must be"
    r"|it's actually|it is actually|actually,? (?:it is|it's))(?!\w)",
    re.I,
)
_EXPLICIT = re.compile(r"\banswer\b|\bconclu|\\boxed", re.I)
_STATES = re.compile(rf"{_CUE.pattern}|\b(?:it's|it is|that's|that is|which is|this is)(?!\w)|=|:(?!\d)", re.I)


def _sentences(think: str) -> list[str]:
    """Sentences in order; "A. red", "1. first" and decimals are not split."""
    parts = _BETWEEN_SENTENCES.split(think)
    return [part.strip()[-MAX_SENTENCE_CHARS:] for part in parts if part.strip()]


def _settled(sentence: str) -> str:
    """The sentence without a leading "since …," and without the clauses that settle nothing."""
    clauses = _TURN.split(_LEADING.sub("", sentence, count=1))
    hypothetical = re.match(r"\W*if\b", clauses[0], re.I)
    return "" if hypothetical else ", ".join(clause for clause in clauses if not _UNSETTLED.search(clause))


def _tail(sentence: str, cue: re.Pattern = _CUE) -> str | None:
    """What follows the sentence's last cue."""
    ends = [match.end() for match in cue.finditer(sentence)]
    return sentence[ends[-1] :].strip(" ,:") if ends else None


_DIGITS = {word: str(value) for value, word in enumerate("two three four five six seven eight nine ten".split(), 2)}
_DIGITS |= {"once": "1 times", "twice": "2 times"}
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
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    if len(word) > 3 and word.isalpha() and word[-1] == word[-2] and word[-1] not in "ls":  # 2000 is not 200
        word = word[:-1]
    return word.removesuffix("e") if len(word) > 3 else word


def _stems(text: str) -> list[str]:
    """The content words of a text without their endings (all of its words if it has no others); negations are "not"."""
    words = re.findall(r"\w+", _NEGATION.sub(" not ", _in_digits(text.casefold())))
    return [_stem(_SAME.get(word, word)) for word in words if word not in _FUNCTION_WORDS] or words


def _holds(words: list[str], part: list[str]) -> bool:
    """Whether the words of `part` occur in `words` in their order, or it is spelled by some in a row ("S T O P")."""
    left, spelled = iter(words), "".join(part)
    ends = range(1, min(len(words), 60) + 1)
    return all(word in left for word in part) or any(spelled == "".join(words[i:j]) for j in ends for i in range(j))


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
_ORDINAL = re.compile(r"\b(?:the |my )?(first|second|third|fourth|fifth) (?:option|choice|alternative|answer)\b")
_PLACES = ("first", "second", "third", "fourth", "fifth")
_GROUP = re.compile(rf"{_L}(?:[\s,&/]*(?:\b(?:and|or|nor)\b[\s,]*)?(?:(?:option|choice)\s)?{_L})*")
_TRAILING = re.compile(rf" (?:because|since|whereas|while|although|as (?=the|it|he|she|they|there|we|option|{_L})).*")
_REFUTED_BEFORE = re.compile(
    r"(?:\b(?:not|never|cannot|neither|nor|except|nothing|none|hardly|rather than|instead of|unlike|other than|against"
    r"|rul\w+ out|eliminat\w+|exclud\w+|reject\w*|discard\w*|dismiss\w*|contradict\w*|cross\w* (?:out|off)|drop\w*"
    r"|omit\w*|ignor\w*|skip\w*|wrong|incorrect|false|least|worst|odd|tempting|mistake\w*|fail\w*|miss\w*|lacks?)\b"
    r"|n't\b)[^,;:]{0,40}$"
)
_REFUTED_AFTER = re.compile(
    r"(?:(?!\b(?:because|since|as|while|whereas|so|which|that|when)\b)[^,;:\ue000-\ue119]){0,40}?"
    r"(?:\b(?:not|never|no|cannot|neither|wrong|incorrect|false|excluded|eliminated|ruled|rejected|dismissed|discarded"
    r"|crossed|impossible|unlikely|implausible|invalid|unsupported|unrelated|irrelevant|inconsistent|contradict\w*|fails?"
    r"|misses|ignores|lacks|too|gone|off|away|(?:is|are|be|been|both|all|now|already) out)\b|n't\b)"
    r"|\s*out\b"  # "rules A out"
)
_NOTHING_BUT = re.compile(r"\b(?:nothing|anything|none|no \w+)\b[^,;]*\b(?:but|than|except|besides)\s*(?:option\s)?$")
# Words before an option's letter; after any other word the letter may be its noun's name.
_BEFORE_LETTER = re.compile(
    rf"^(?:{_CUE.pattern}|\b(?:option|choice|answer|letter|is|it's|that's|was|be|or|and|nor|with|to|than|not|of|for|by"
    r"|that|in|on|both|either|choose|pick|select|only|leaves|matches|fits|supports|means|confirms|gives)s?\b)", re.I,
)  # fmt: skip
# What makes a sentence at the end that names one option a conclusion.
_SETTLES = re.compile(
    rf"{_CUE.pattern}|\b(?:choose|pick(?:ed)?|select(?:ed)?|go(?:ing)?|settl(?:e|ing)|must|only|leav\w+|left|remain\w*"
    r"|match\w*|fit\w*|correspond\w*|support\w*|point\w*|confirm\w*|correct|right|best|it's|it is|that's|that is|which is"
    r"|choice|conclu\w+|means|suggests?|indicat\w+|consistent|align\w*|agree\w*|speaks|lean\w*|final\w*|works|describes?"
    rf"|stands|verdict)\b|:\W*{_L}\W*$|^\W*{_L}\W*$",
    re.I,
)


# Says which it is, and no more: "the answer is B", "that is option B", "therefore B".
_OUTRIGHT = re.compile(
    rf"{_EXPLICIT.pattern}|(?:(?:{_CUE.pattern}|\b(?:that|this|it)(?:'s| is))[\s,:]*(?:it's|it is)?\s*|^\W*)"
    rf"(?:the )?(?:option\s*|choice\s*)?{_L}(?: is (?:correct|right))?\W*$",
    re.I,
)


def _is_remark(sentence: str, options: tuple[str, ...]) -> bool:
    """Whether a last sentence that names a letter may follow the conclusion: "Option A only fits the start." """
    says_so = _CUE.search(sentence) or _EXPLICIT.search(sentence) or _RETRACTION.search(sentence)
    return not says_so and re.search(_L, _marked(sentence, options)) is not None


@functools.lru_cache(maxsize=1024)
def _option_patterns(options: tuple[str, ...]) -> tuple[dict[str, str], list[tuple[re.Pattern, str]]]:
    """(labels, for each option's text, the longest first: how it is found, and its mark)."""
    labels, patterns = option_labels(options), []
    for letter, text in sorted(labels.items(), key=lambda item: -len(item[1])):
        # "no car", "the right answer" are no options
        after = {"no": r"(?!\s*\w)", "right": r"(?! (?:answer|option|choice|one|now|after|before))"}.get(text, "")
        if text and list(labels.values()).count(text) == 1:
            pattern = re.compile(rf"(?<!\w){re.escape(_in_digits(text))}(?!\w){after}", re.I)
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

    def ordinal_mark(match: re.Match) -> str:
        place = _PLACES.index(match[1])
        return chr(0xDFBF + ord(sorted(labels)[place])) if place < len(labels) else match[0]

    def joined(match: re.Match) -> str:
        letter, text = sorted(match.groups())
        return letter if ord(letter) + 0x100 == ord(text) else _CONTRADICTORY

    text = re.sub("[\ue000-\uf8ff]", "", sentence)
    for pattern, mark in patterns:
        if re.search(r"\b(?:[b-z]|a$)\b", labels[chr(ord(mark) - 0xE0BF)]):  # the letter in "point B" is no option's
            text = pattern.sub(mark, text)
    text = _in_digits(_LETTER.sub(letter_mark, text).replace("’", "'").casefold())
    text = _ORDINAL.sub(ordinal_mark, text)
    for pattern, mark in patterns:
        text = pattern.sub(mark, text)
    text = re.sub(r"[*_\"“”`$]", "", text)
    text = re.sub(rf"({_L})\s*[.:,(–-]*\s*(?:the |an? )?({_T})", joined, text)
    text = re.sub(rf"({_T})\s*\(?\s*({_L})", joined, text)
    return re.sub(r"[()\[\]{}\s]+", " ", text).strip()


def _choice_in(sentence: str, last: bool, options: tuple[str, ...], refuted: set[str]) -> Conclusion | None:
    """A letter outranks an option's text: it is what will be answered. What the sentence refutes goes into `refuted`."""
    if boxed := boxed_spans(sentence):
        read = {read_choice(span, options) for span in boxed}
        letters = read.pop() if len(read) == 1 else None
        return Conclusion(",".join(sorted(letters)) if letters else None)
    text = _TRAILING.sub("", _marked(_settled(sentence), options))
    if _CONTRADICTORY in text:
        return Conclusion(None)
    if not re.search(_L, text):
        return _option_text_in(text, last, options)
    named, place = set(), 0
    for group in _GROUP.finditer(text):
        before, after, place = text[place : group.start()], text[group.end() :], group.end()
        letters = ",".join(sorted({chr(ord(mark) - 0xDFBF) for mark in re.findall(_L, group[0])}))
        if not _NOTHING_BUT.search(before) and (_REFUTED_BEFORE.search(before) or _REFUTED_AFTER.match(after)):
            refuted.update(letters.split(","))
        else:
            named.add(None if re.search(r"\bor\b|/", group[0]) else letters)
    if _labels_a_thing(text):
        return Conclusion(None)
    named = {letters for letters in named if letters and len(letters) == 1} or named
    announced = bool(named) and (_SETTLES if last or refuted else _CUE).search(text) is not None
    if len(named) == 1 and (last or announced):
        return Conclusion(named.pop(), announced, named=announced)
    return Conclusion(None) if announced and _CUE.search(text) else None


def _labels_a_thing(text: str) -> bool:
    """Whether the only letter of a marked sentence may be a thing's name, as in "team B's shirt is red"."""
    letters, texts = re.findall(_L, text), re.findall(_T, text)
    if len(letters) != 1 or not texts or chr(ord(letters[0]) + 0x100) in texts:
        return False
    word = re.search(r"([a-z']+)\s*$", text[: text.index(letters[0])])
    return word is not None and not _BEFORE_LETTER.search(word[1])


def _option_text_in(text: str, last: bool, options: tuple[str, ...]) -> Conclusion | None:
    """What a marked sentence without letters concludes by an option's text, as it is written or by its content words."""
    tail = _tail(text, _STATES)
    stated = text if tail is None else tail
    letters = {
        chr(ord(match[0]) - 0xE0BF)
        for match in re.finditer(_T, stated)
        if not _REFUTED_BEFORE.search(stated[: match.start()]) and not _REFUTED_AFTER.match(stated[match.end() :])
    }
    named = bool(letters)
    if not re.search(_T, stated):
        letters, named = _resembled(stated, _option_patterns(options)[0])
    if not letters or (tail is None and (not last or len(letters) > 1)):
        return None
    return Conclusion(letters.pop() if len(letters) == 1 else None, tail is not None and named, named)


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
    if best < 1 / 3:
        return set(), False
    most = max(len(own[letter]) for letter, share in shares.items() if share == best)
    found = {letter for letter, share in shares.items() if share == best and len(own[letter]) == most}
    return found, best == 1


# --------------------------------------------------------------------------------------------------------- numbers

_NUMERAL = re.compile(
    r"\d|\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen"
    r"|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)\b",
    re.I,
)
_QUANTITY = (
    r"(?:number|count|total|sum|distance|length|width|height|depth|size|area|volume|speed|duration|time|value|estimate"
    r"|figure|tally|amount|share|percentage|ratio|probability|average|difference|result|side|diameter|radius|age|score"
    r"|price|weight)"
)
_AMOUNTS = re.compile(
    rf"{_CUE.pattern}|=|≈|\b(?:(?:that|this|it|which) (?:makes|gives|leaves|means|equals)|giv(?:es|ing)|yields|making"
    r"|totall?ing|leaving|equals?|results? in|in total|altogether|in all|total of|adds? up to|amounts? to|sums? to"
    r"|call it|i\.e\.,?|(?:comes?|works) (?:out )?(?:to|at)|(?:i|we) (?:estimate|conclude|get|arrive at|end up with|find)"
    rf"|{_QUANTITY} of|{_QUANTITY}\b[^,;]*? (?:is|are|was|would be|measures|should be|must be|comes to))(?!\w)",
    re.I,
)


# Beside a numeral, a second number in words: "twice in 10 minutes", "two cats in 3 boxes", "none of the 3".
_OTHER_NUMBER = re.compile(
    r"^(?=.*\d).*\b(?:no|none|neither|half|once|twice|thrice|two|three|four|five|six|seven|eight|nine|ten)\b", re.I
)


def _number_in(sentence: str, last: bool, options: tuple[str, ...], refuted: set[str]) -> Conclusion | None:
    sentence = _settled(sentence)
    boxed = boxed_spans(sentence)
    tails = boxed[-1:]
    if not boxed:
        if re.search(r":\s*[^:]*\d[^:]*$", sentence) and not re.search(r"\d:\d", sentence):
            tails.append(sentence.rsplit(":", 1)[1])
        tails += [sentence[match.end() :] for match in list(_AMOUNTS.finditer(sentence))[:-7:-1]]
        if total := re.match(r"(.*)\b(?:in total|altogether|in all)\b(.*)$", sentence, re.I):
            if all(map(_NUMERAL.search, total.groups())):
                return Conclusion(None)
            tails.append(total[1])
    announced = [tail for tail in tails if _NUMERAL.search(tail)]
    if announced and not boxed and _OTHER_NUMBER.search(announced[0]):
        return Conclusion(None)
    if not announced and not (last and _NUMERAL.search(sentence)):
        return None
    number = read_number(announced[0] if announced else sentence)
    if number is None:
        return Conclusion(None) if announced else None
    return Conclusion(f"{number[0]!r}{'%' if number[1] else ''}", bool(announced), named=bool(announced))


_EQUATION = re.compile(r"\d\s*[A-Za-z]|[A-Za-z]\S*\s*[-+*/^]|[-+*/^]\s*\d*[A-Za-z]")  # "2x" on the left gives no result


def _expression_in(sentence: str, last: bool, options: tuple[str, ...], refuted: set[str]) -> Conclusion | None:
    if boxed := boxed_spans(sentence):
        return Conclusion(boxed[-1].strip() or None)
    sentence = _settled(sentence)
    tail = _tail(sentence, _AMOUNTS)
    clause = re.split(r"[,;:]", sentence)[-1]
    left, equals, _ = clause.partition("=")
    if tail is None or (equals and _EQUATION.search(re.sub(r"\\?[A-Za-z]{3,}", " ", left))):
        return None
    if re.search(r"±|\\pm\b|=[^=]*\b(?:and|or)\b[^=]*=", clause):  # several results
        return Conclusion(None)
    if re.search(r"\d.*(?:\b(?:about|approximately|roughly)\b|≈).*\d|=.*\bwhere\b.*=", sentence):  # two forms, two names
        return Conclusion(None)
    if dollars := re.findall(r"\$([^$]+)\$", sentence):
        return Conclusion(dollars[-1].rsplit("=", 1)[-1].strip() or None)
    tail = re.sub(r"^(?:\W*[A-Za-z]{3,}\b)*\W*\b(?:is|are|equals)\b", "", tail).strip(" .:,")
    if re.search(r"(?<!\\)\b[A-Za-z]{3,}", tail):
        return _number_in(sentence, last, options, refuted)
    return Conclusion(tail) if tail else None


# ----------------------------------------------------------------------------------------------------------- texts

_READS = re.compile(r"\b(?:is|are|was|were|reads?|says?|shows?|displays?|called|named|spells?)\b|=|:(?!\d)", re.I)
_READ_OUT = re.compile(
    r"\b(?:reads|says|spells?|displays|(?:texts?|words?|signs?|numbers?|titles?|names?|letters?|labels?|plates?|logos?"
    r"|brands?|captions?|codes?)\b[^,;:]*\b(?:is|are|was))\b(?: that)?:?",
    re.I,
)
_QUOTED = re.compile(r"\b(?:reads?|says?|shows?|spells?|displays?|is|was|answer|:)\W*[\"“]([^\"”]+)[\"”]\W*$", re.I)
_REJECTED = re.compile(r"\bnot\b[^,;.]*,?\s*\bbut\b|(?:, (?:and )?not|\brather than|\binstead of)\b[^,;.]*", re.I)
_COLOURS = set("red orange yellow green blue purple violet pink brown black white grey gray".split())
_RIVALS = (set(map(_stem, _COLOURS)), {"left", "right"}, {"up", "down"}, set(_DIGITS.values()) | {"0", "1"})


_DATED = re.compile(
    r"\d[:/.-]\d|\d\s?[ap]\.?m\b|['’]\d\d\b|o'clock|\bhalf past\b|\bquarter (?:to|past)\b|\bnoon\b|\bmidnight\b"
    r"|\b(?:january|february|march|april|may|june|july|august|september|october|november|december)\b", re.I,
)  # fmt: skip
_WRITTEN = re.compile(r"['’]?\d[\d:/.-]*(?:\s?[ap]\.?m)?")


def _text_in(sentence: str, last: bool, options: tuple[str, ...], refuted: set[str]) -> Conclusion | None:
    if boxed := boxed_spans(sentence):
        return Conclusion(boxed[-1].strip() or None)
    sentence = _settled(sentence)
    if (quoted := _QUOTED.search(sentence)) and not _NEGATION.search(sentence[: quoted.start(1)]):
        return Conclusion(quoted[1].strip())
    tail = _tail(sentence)
    if tail is None and re.match(r"\W*[^:]*\b(?:answer|text|title|result)\b[^:]*:", sentence, re.I):
        tail = sentence.split(":", 1)[1]
    if tail is None and last:
        tail = _tail(sentence, _READ_OUT)
    if tail := (tail or "").strip(" .:,!\"'"):
        return Conclusion(tail)
    return Conclusion(sentence.strip(" ."), announced=False, named=False) if last and sentence else None


def _alike(word: str, other: str) -> bool:
    """Whether one word may stand for the other, as in "Coca" and "Coke", "kilometre" and "km"."""
    short, long = sorted((word, other), key=len)
    if not short.isalpha() or len(short) < 2 or short[0] != long[0]:
        return short == long
    letters = iter(long)
    return short[:2] == long[:2] or all(letter in letters for letter in short)


def _otherwise_written(text: str, other: str) -> bool:
    """Whether two texts without a common word may still be one: a time or a date in two forms, a name's initials."""
    written = [{re.sub(r"\d+", "0", number) for number in _WRITTEN.findall(each.casefold())} for each in (text, other)]
    if written[0] != written[1] and any(map(_DATED.search, (text, other))):
        return all(_DATED.search(each) or _NUMERAL.search(each) for each in (text, other))
    for one, two in ((text, other), (other, text)):
        words, names = re.findall(r"[a-z]\w*", one.casefold()), re.findall(r"\w\w+", two.casefold())
        initials = "".join(word[0] for word in words if word not in _FUNCTION_WORDS)
        if len(initials) > 1 and any(initials.endswith(name) or name.startswith(initials[-2:]) for name in names):
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
    if answered in (["yes"], ["not"]):
        return answered == words[:1] if words and words[0] in ("yes", "not") else None
    if not words or not answered or ("not" in words) != ("not" in answered):
        return None
    if _holds(words, answered) or _holds(answered, words):
        return True
    bare = [len(content) == len(re.findall(r"\b(?!(?:and|then)\b)\w+", text))
            for content, text in ((words, kept), (answered, answer))]  # fmt: skip
    if all(bare) and min(len(words), len(answered)) >= 3:
        return False
    said, given = (_stems(_tail(text, _READS) or text) for text in (kept, answer))
    if max(len(said), len(given)) > 4 or len(words) > 8:
        return None
    if exact:
        return None if any(_alike(a, b) for a in given for b in words) or _otherwise_written(kept, answer) else False
    for rivals in _RIVALS:
        if "left" in rivals and re.search(r"\b(?:left|right) of\b", f"{kept} {answer}"):
            continue  # one relation is said from either end
        ours, theirs = rivals.intersection(words), rivals.intersection(answered)
        if ours and theirs and not ours & theirs and set(answered) - theirs <= set(words):
            return False
    return None


# -------------------------------------------------------------------------------------------------------- thinking

_READERS = {
    "multiple choice": _choice_in,
    "numerical": _number_in,
    "regression": _number_in,
    "math": _expression_in,
    "OCR": _text_in,
    "free-form": _text_in,
}


def conclude(think: str, *, problem_type: str, options: Sequence[str] | None = None) -> Conclusion:
    """What the thinking announces last, else what its last sentence names. Raises KeyError for an unknown problem type
    (rows are checked when they load)."""
    read, options = _READERS[problem_type], tuple(options or ())
    retracted, refuted, unannounced, remark = False, set(), None, None
    for place, sentence in enumerate(reversed(_sentences(think[-MAX_THINK_CHARS:]))):
        story = place >= NARRATED and not (read is _choice_in or _EXPLICIT.search(sentence))
        last = place == 0 or (place == 1 and remark is not None)
        found = None if story else read(sentence, last, options, refuted)
        if found and found.announced and remark:
            if found.answer == remark.answer or retracted:
                return remark
            if _OUTRIGHT.search(_marked(_settled(sentence), options)):
                return found
            if place == 1:
                return Conclusion(None)
        elif found and found.announced and read is _choice_in and place == 0 and _is_remark(sentence, options):
            remark = found
        elif found and found.announced:
            struck = read is _choice_in and refuted.intersection((found.answer or "").split(","))
            retracted = retracted or struck or _TAKEN_BACK.search(_tail(sentence) or "")
            return Conclusion(None) if retracted else found
        unannounced = unannounced or found
        retracted = retracted or _RETRACTION.search(sentence)
    if remark:
        return remark
    return Conclusion(None) if retracted or not unannounced else unannounced
