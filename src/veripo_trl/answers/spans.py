"""Spans of time: the seconds that an answer names, and how far they agree with the truth's (temporal IoU).

"5.0 to 11.0", "00:05 - 00:11", "from 5 to 11 seconds", several with ";", "," or on lines of their own. Every number must
belong to a span, a reversed span is unreadable. Several spans count as their union, so that naming many does not pay.
"""

import functools
import re
from typing import NamedTuple

from veripo_trl.answers.plain import HEDGE, MAX_CHARS, stated, unexplained
from veripo_trl.errors import SolutionError

Spans = tuple[tuple[float, float], ...]  # (start, end) in seconds

MAX_SPANS = 20
TOLERANCE_S = 1.5  # of an end over the duration: Charades-STA rounds its ends up by as much
SAME_IOU = 0.95
WITH_DURATION = (
    "temporal grounding",
    "grounded choice",
    "object and time",
)  # types whose solutions may end in one

_TIME = r"\d{1,2}(?::\d\d){2}(?:\.\d+)?|\d{1,4}:\d\d(?:\.\d+)?|\d{1,7}(?:\.\d+)?|\.\d+"
_UNIT = r"(?:\s?s(?:ec(?:ond)?s?)?\b\.?)?"
_SPAN = re.compile(
    rf"(?<![\w.:-])({_TIME}){_UNIT}\s*(?:\bto\b|\band\b|to|[-–—~])\s*({_TIME})(?![\d:]|\.\d){_UNIT}(?!\w)",
    re.I,
)
_DURATION = re.compile(rf"\s+of\s+({_TIME}){_UNIT}\s*\.?\s*$", re.I)
_OTHER_UNIT = re.compile(
    r"\b(?:ms|millisec\w*|min(?:ute)?s?|h(?:ou)?rs?|hours?|frames?|percent)\b|%", re.I
)


class TrueSpans(NamedTuple):
    """`duration`: of the clip in seconds, None if the solution does not tell."""

    spans: Spans
    duration: float | None


def seconds(time: str) -> float | None:
    """Of "75.5", "1:15.5" or "0:01:15.5"; None where minutes or seconds after a colon are 60 or more."""
    *hours, last = time.split(":")
    fields = [*map(int, hours), float(last)]
    if any(field >= 60 for field in fields[1:]):
        return None
    return functools.reduce(lambda total, field: 60 * total + field, fields)


def read_spans(text: str, options=None) -> Spans | None:
    """The spans that `text` names, sorted as written; None if it names none, more than 20, a reversed one, a number
    beside them, or hedges. A duration at the end (" of 33.75", as in a solution) is left aside."""
    if len(text) > MAX_CHARS:
        return None
    text = _DURATION.sub("", stated(unexplained(text)))
    rest = _SPAN.sub(" ", text)
    spans = [tuple(map(seconds, match.groups())) for match in _SPAN.finditer(text)]
    if (
        not 0 < len(spans) <= MAX_SPANS
        or re.search(r"\d", rest)
        or HEDGE.search(rest)
        or _OTHER_UNIT.search(rest)
    ):
        return None
    if any(start is None or end is None or start > end for start, end in spans):
        return None
    return tuple(spans)


def solution_duration(solution: str) -> float | None:
    """The clip's duration in seconds, where a solution of `WITH_DURATION` ends in " of 33.75"."""
    match = _DURATION.search(solution)
    return seconds(match[1]) if match else None


def without_duration(solution: str) -> str:
    return _DURATION.sub("", solution)


def true_spans(solution: str, options=None) -> TrueSpans:
    """ "5.0 to 11.0", "1 to 3; 5 to 8 of 33.75". Raises SolutionError for what cannot be read or lies outside."""
    expected = "expected spans in seconds such as '5.0 to 11.0', '1 to 3; 5 to 8' or '5.0 to 11.0 of 33.75'"
    spans, duration = read_spans(solution), solution_duration(solution)
    between = _SPAN.sub(" ", without_duration(solution))
    if (
        spans is None
        or (" of " in solution and not duration)
        or re.search(r"(?!(?:and|from|between)\b)\b[^\W\d_]+", between)
        or any(start >= end for start, end in spans)
    ):
        raise SolutionError(
            f"solution {solution!r}: {expected}, each with its start before its end"
        )
    if duration and any(start >= duration or end > duration + TOLERANCE_S for start, end in spans):
        raise SolutionError(
            f"solution {solution!r}: expected spans within the duration (ends up to {TOLERANCE_S} s over it are taken "
            "as they are); clip or remove the span"
        )
    return TrueSpans(spans, duration)


def _merged(spans: Spans) -> list[list[float]]:
    merged: list[list[float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


def _length(spans: Spans) -> float:
    return sum(end - start for start, end in _merged(spans))


def union_iou(a: Spans, b: Spans) -> float:
    """Seconds in both / seconds in either; 1 if both name nothing, 0 if neither lasts. For a span on each side that
    overlap, it is their intersection over their hull, as TimeZero's, Time-R1's and VideoChat-R1's."""
    if not a and not b:
        return 1.0
    both = sum(max(0.0, min(e, f) - max(s, t)) for s, e in _merged(a) for t, f in _merged(b))
    either = _length(a) + _length(b) - both
    return both / either if either else 0.0


def tiou(spans: Spans, truth: TrueSpans) -> float:
    return union_iou(spans, truth.spans)


def tiou_time_r1(spans: Spans, truth: TrueSpans) -> float:
    """tIoU · (1 - |start error| / D) · (1 - |end error| / D), D the clip's duration, factors not below 0 (Time-R1,
    arXiv 2503.13377, whose code lets them be negative). Of several spans, the first start and the last end."""
    duration = needed_duration(truth)
    (start, end), (true_start, true_end) = (
        (min(s for s, _ in each), max(e for _, e in each)) for each in (spans, truth.spans)
    )
    factors = (
        max(0.0, 1 - abs(a - b) / duration) for a, b in ((start, true_start), (end, true_end))
    )
    return functools.reduce(lambda product, factor: product * factor, factors, tiou(spans, truth))


def needed_duration(truth: TrueSpans) -> float:
    if truth.duration is None:
        spans = "; ".join(f"{start:g} to {end:g}" for start, end in truth.spans)
        raise SolutionError(
            f"solution {spans!r}: Time-R1's tIoU needs the clip's duration; write '{spans} of 33.75', or use tiou"
        )
    return truth.duration


def same_spans(a: Spans, b: Spans) -> bool:
    return union_iou(a, b) >= SAME_IOU


def recalls(iou: float, thresholds=(0.3, 0.5, 0.7)) -> dict[str, float]:
    """{"R@.3": 1.0 if the IoU is at least .3, …}."""
    return {
        f"R@{threshold:g}".replace("0.", "."): float(iou >= threshold - 1e-9)
        for threshold in thresholds
    }


def span_metrics(spans: Spans | None, truth: TrueSpans) -> dict[str, float]:
    iou = tiou(spans, truth) if spans else 0.0
    return {"mIoU": iou, **recalls(iou)}
