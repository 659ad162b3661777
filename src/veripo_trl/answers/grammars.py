"""Forms of a completion beside think and answer: Video-Thinker's segments, PRIMO R1's sections."""

import functools
import re

from veripo_trl.answers.spans import Spans, seconds

_CLOCK = r"(?:\d{1,2}:)?\d{1,3}:\d\d(?:\.\d+)?"
_SEGMENT_TIME = re.compile(rf"\s*({_CLOCK})\s*[-–]\s*({_CLOCK})\s*")
_TAGS = ("time", "caption", "think")
_TEXT = r"(?:(?!</?(?:time|caption|think|answer)>).)*"
_TRIPLE = re.compile(
    rf"<time>({_TEXT})</time>\s*<caption>{_TEXT}</caption>\s*<think>{_TEXT}</think>", re.S
)


def read_segments(text: str, duration: float | None = None) -> Spans | None:
    """The spans of `<time>MM:SS-MM:SS</time> <caption>…</caption> <think>…</think>`, in seconds: () without any, None if
    one cannot be read, ends before it starts or starts after the duration, over which ends are clipped."""
    spans = []
    for time in _TRIPLE.findall(text):
        match = _SEGMENT_TIME.fullmatch(time)
        start, end = map(seconds, match.groups()) if match else (None, None)
        if (
            start is None
            or end is None
            or start >= end
            or (duration is not None and start >= duration)
        ):
            return None
        spans.append((start, end if duration is None else min(end, duration)))
    return tuple(spans)


@functools.lru_cache(maxsize=2048)
def are_segments(text: str, duration: float | None = None) -> bool:
    """Video-Thinker's grammar (arXiv 2510.23473), as we state it: triples with prose between them, then one answer and
    nothing after it; no tag outside of a triple, every span readable."""
    before, opening, after = text.partition("<answer>")
    if (
        not opening
        or after.count("</answer>") != 1
        or not after.rstrip().endswith("</answer>")
        or "<answer>" in after
    ):
        return False
    triples = len(_TRIPLE.findall(before))
    tags = [text.count(form.format(tag)) for tag in _TAGS for form in ("<{}>", "</{}>")]
    if "</answer>" in before or not triples or tags != [triples] * len(tags):
        return False
    return read_segments(before, duration) is not None


def is_structured(text: str, sections: tuple[str, ...]) -> bool:
    """PRIMO R1's grammar (arXiv 2603.15600): one think span that is exactly these sections, in order, each once and not
    empty, then one answer span. Its own pattern lets a section come twice or be empty, and answers stand in sections."""
    names = (*sections, "think", "answer")
    if any(text.count(form.format(name)) != 1 for name in names for form in ("<{}>", "</{}>")):
        return False
    inner = r"\s*".join(rf"<{name}>(?!\s*</{name}>).+?</{name}>" for name in sections)
    return (
        re.fullmatch(rf"\s*<think>\s*{inner}\s*</think>\s*<answer>.*</answer>\s*", text, re.S)
        is not None
    )
