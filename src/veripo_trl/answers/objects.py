"""Object and time (STVG-R1, arXiv 2602.11730): the number drawn on an object, and the span in which it does what is
asked. Both must be readable, one of each; an answer without the one is worth nothing, as there."""

import json
import math
import re

from veripo_trl.answers.boxes import tube_iou
from veripo_trl.answers.plain import MAX_CHARS, stated, unexplained
from veripo_trl.answers.spans import (
    Spans,
    TrueSpans,
    read_spans,
    recalls,
    same_spans,
    tiou,
    true_spans,
)
from veripo_trl.errors import SolutionError

_FORM = re.compile(
    r"target\s+id\s*:?\s*(?P<id>\d{1,6})\s*[,;.]?\s*time\s+range\s*:?\s*(?P<span>.+)"
    r"|(?P<bare>\d{1,6})\s*;\s*(?P<time>.+)",
    re.I | re.S,
)


def read_object(text: str, options=None) -> tuple[int, Spans] | None:
    """(id, its one span) of "Target ID: 2, Time range: 5.0 to 11.0", "2; 5.0 to 11.0" or {"id": 2, "start": 5.0, "end":
    11.0}; None for anything else, two ids or two spans among it."""
    if len(text) > MAX_CHARS:
        return None
    if text.strip().startswith("{"):
        return _from_json(text)
    match = _FORM.fullmatch(stated(unexplained(text)))
    spans = match and read_spans(match["span"] or match["time"])
    if not spans or len(spans) != 1:
        return None
    return int(match["id"] or match["bare"]), spans


def _from_json(text: str) -> tuple[int, Spans] | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if (
        content.keys() != {"id", "start", "end"}
        or type(content["id"]) is not int
        or content["id"] < 0
    ):
        return None
    times = content["start"], content["end"]
    if any(type(time) not in (int, float) for time in times) or not 0 <= times[0] <= times[1] < 1e7:
        return None
    return content["id"], ((float(times[0]), float(times[1])),)


def true_object(solution: str, options=None) -> tuple[int, TrueSpans]:
    match = re.fullmatch(r"\s*(\d{1,6})\s*;\s*(.+)", solution, re.S)
    if not match or len((truth := true_spans(match[2])).spans) != 1:
        raise SolutionError(
            f"solution {solution!r}: expected an id, ';' and one span, as in '2; 5.0 to 11.0 of 20.0'"
        )
    return int(match[1]), truth


def object_id(answer: tuple[int, Spans], truth) -> float:
    return float(answer[0] == truth[0])


def object_id_in_time(answer: tuple[int, Spans], truth) -> float:
    """1 for the right id if its span meets the true one: the paper's words; its code asks for no overlap."""
    return float(answer[0] == truth[0] and object_tiou(answer, truth) > 0)


def object_tiou(answer: tuple[int, Spans], truth) -> float:
    return tiou(answer[1], truth[1])


def object_score(answer: tuple[int, Spans], truth) -> float:
    return (object_id(answer, truth) + object_tiou(answer, truth)) / 2


def same_object(a: tuple[int, Spans], b: tuple[int, Spans]) -> bool:
    return a[0] == b[0] and same_spans(a[1], b[1])


def object_metrics(answer: tuple[int, Spans] | None, truth) -> dict[str, float]:
    iou = object_tiou(answer, truth) if answer else 0.0
    return {
        "ID accuracy": object_id(answer, truth) if answer else 0.0,
        "m_tIoU": iou,
        **recalls(iou, (0.3, 0.5)),
    }


def tube_metrics(answer: tuple[int, Spans] | None, tubes: dict) -> dict[str, float]:
    """m_vIoU, from the boxes of the object that was named at the frames of the time that was named.

    Args:
        tubes: {"fps": frames are numbered from 0 at it, "truth": {frame: box}, id: {frame: box}}. An id without a tube
            has no boxes.
    """
    iou, fps = 0.0, tubes["fps"]
    if answer:
        ((start, end),) = answer[1]
        frames = range(math.ceil(start * fps - 1e-6), math.floor(end * fps + 1e-6) + 1)
        iou = tube_iou(tubes.get(answer[0], {}), frames, tubes["truth"])
    return {"m_vIoU": iou, **{f"vIoU@{at[2:]}": hit for at, hit in recalls(iou, (0.3, 0.5)).items()}}
