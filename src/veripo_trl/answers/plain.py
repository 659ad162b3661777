"""What choices, numbers and maths read first: a text without its markup, and what it states."""

import re
import unicodedata

MAX_CHARS = 4000  # of a choice or a number; keeps every pattern far from a slow case

HEDGE = re.compile(
    r"\b(?:or|not|either|neither|nor|maybe|perhaps|unsure|unknown|cannot|except|doubt|if|whether|unless)\b|n't\b"
    r"|[不没非或]|可能|也许",
    re.I,
)
TAKEN_BACK = r"\b(?:wait|unsure|not (?:sure|certain)|maybe|perhaps|i mean|correction|second thought|sorry)\b"
_EXPLANATION = re.compile(
    rf"\n\s*(?:explanation|reason(?:ing)?|rationale|justification|because)\b(?!.*{TAKEN_BACK}|.*\bactually\b).*",
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


def boxed_spans(text: str) -> list[str]:
    r"""Contents of every \boxed{…}, braces matched; an unclosed one is left out."""
    spans, opened = [], []  # opened: where each open brace's content starts, None if it is not a box's
    for token in re.finditer(r"(\\boxed\s*)?\{|\}", text):
        if token[0] != "}":
            opened.append(token.end() if token[1] else None)
        elif opened and (start := opened.pop()) is not None:
            spans.append((start, text[start : token.start()]))
    return [content for _, content in sorted(spans)]


def plain(text: str) -> str:
    """`text` without markdown, dollars, LaTeX text wrappers and Unicode look-alikes; its only \\boxed part, if any."""
    text = re.sub("[⁰¹²³⁴-⁹]", lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)  # 3² is not 32
    text = re.sub(r"(?<=\d)(?:\\[,!]|\{,\}|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", "", text)  # thin thousands
    text = unicodedata.normalize("NFKC", text)
    text = text.translate({0x2212: "-", 0x2044: "/", 0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x200B: None,
                           0x3002: "."})  # fmt: skip
    text = _HTML.sub(" ", text)
    boxed = boxed_spans(text)
    if len(boxed) == 1 and not HEDGE.search(text.replace(boxed[0], " ")):
        text = boxed[0]
    for _ in range(4):  # wrappers nest: \boxed{\text{B}}
        text, found = _WRAPPER.subn(r"\1", text)
        if not found:
            break
    text = re.sub(r"\\[()\[\],;!]|[$*`]", " ", text)
    text = re.sub(r"[^\S\n]+", " ", text).strip()
    return re.sub(r"\n[ \n]*\n", "\n\n", text)


def unexplained(text: str) -> str:
    """`plain` without an explanation that follows on a line of its own."""
    return _EXPLANATION.sub("", plain(text))


def stated(text: str) -> str:
    """What follows the only "answer is", or follows the lead-ins at the start ("so it is …"); else `text`."""
    stated = list(_STATED.finditer(text))
    if len(stated) == 1 and not HEDGE.search(text[: stated[0].start()]):
        text = text[stated[0].end() :]
    elif stated:
        return text
    for _ in range(4):
        match = _LEAD_IN.match(text)
        if not match or match.end() == len(text):
            break
        text = text[match.end() :]
    return text


def words_of(text: str) -> str:
    """For equality of short texts: lower case, single spaces, no punctuation at the ends, no leading article."""
    text = re.sub(r"\s+", " ", plain(text).casefold()).strip(" .,;:!?\"'()[]{}")
    return re.sub(r"^(?:the|an?) (?=\w)", "", text)


def without_rejected(text: str, other: str) -> str:
    """ "B" of "B (not A or C)", "B rather than A", "not A but B"."""
    if not re.search(r"\b(?:not|rather|instead) ", text):
        return text
    text = re.sub(rf"^(?:(?:it|that) is |it's )?not (?:option )?(?:{other}),? but (?:rather )?", "", text, flags=re.I)
    rejected = rf"(?<=\S)[\s,;(–—-]+(?:and |but )?(?:not|rather than|instead of) (?:option |the )?(?:{other})(?!\w)\)?"
    return re.sub(rejected, "", text, flags=re.I)
