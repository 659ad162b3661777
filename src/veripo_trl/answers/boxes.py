"""Box grounding (two of the three rewards of Scene-R1, arXiv 2506.17545): one box, [x1, y1, x2, y2] from 0 to 1000 of the
picture's width and height, whatever the model family writes elsewhere: the prompt asks for these units."""

import json
import math
import re

from veripo_trl.answers.plain import MAX_CHARS
from veripo_trl.errors import SolutionError

Box = tuple[float, float, float, float]

UNITS = 1000
SAME_IOU = 0.9

_NUMBER = r"-?\d{1,6}(?:\.\d{1,9})?"
_GROUP = re.compile(rf"\[\s*({_NUMBER}(?:\s*,\s*{_NUMBER}){{3}})\s*\]")


def read_box(text: str, options=None) -> Box | None:
    """The only box of `text`: JSON with `bbox_2d` or `bbox`, a list of one such object or of four numbers, or the only
    bracketed group of four numbers in other text. None for two boxes. The order of its corners is not repaired."""
    if len(text) > MAX_CHARS:
        return None
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.S)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        groups = _GROUP.findall(text)
        return tuple(map(float, groups[0].split(","))) if len(groups) == 1 else None
    while isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, dict) and ("bbox_2d" in found) != ("bbox" in found):
        found = found.get("bbox_2d", found.get("bbox"))
    if not isinstance(found, list) or [type(each) in (int, float) for each in found] != [True] * 4:
        return None
    return (
        tuple(map(float, found)) if all(abs(each) < 1e6 for each in found) else None
    )  # NaN is not


def true_box(solution: str, options=None) -> Box:
    box = read_box(solution)
    if box is None or not (0 <= box[0] < box[2] <= UNITS and 0 <= box[1] < box[3] <= UNITS):
        raise SolutionError(
            f"solution {solution!r}: expected one box [x1, y1, x2, y2] from 0 to {UNITS} with x1 < x2 and y1 < y2, as in "
            "'[120, 80, 360, 410]'"
        )
    return box


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 if either box has no width or height, or its corners reversed."""
    areas = [
        (x2 - x1) * (y2 - y1) if x2 > x1 and y2 > y1 else math.nan for x1, y1, x2, y2 in (a, b)
    ]
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    iou = both / (sum(areas) - both)
    return 0.0 if math.isnan(iou) else iou


def tube_iou(boxes: dict[int, Box], frames: range, truth: dict[int, Box]) -> float:
    """vIoU of STVG (HC-STVG's): over the frames of the answer and of the truth, the mean IoU, 0 where one has no box.

    Args:
        boxes: {frame: box} of the answer's object, of which only those in `frames`, the answer's time, count.
    """
    shared = [frame for frame in truth if frame in frames and frame in boxes]
    either = len(frames) + sum(frame not in frames for frame in truth)
    return sum(box_iou(boxes[frame], truth[frame]) for frame in shared) / max(1, either)


def same_box(a: Box, b: Box) -> bool:
    return box_iou(a, b) >= SAME_IOU


def box_metrics(box: Box | None, truth: Box) -> dict[str, float]:
    iou = box_iou(box, truth) if box else 0.0
    return {
        "mean IoU": iou,
        "IoU ≥ .25": float(iou >= 0.25 - 1e-9),
        "IoU ≥ .5": float(iou >= 0.5 - 1e-9),
    }
