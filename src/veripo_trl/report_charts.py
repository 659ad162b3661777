"""Line charts as inline SVG: no scripts, no styles of their own (the page's classes colour them)."""

import math
from html import escape

WIDTH, HEIGHT = 290, 180  # near the size on the screen, so that the text has its own
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 28
MAX_POINTS = 400


def line_chart(series: list[dict], *, ticks: list[str] | None = None, percent: bool = False, title: str = "") -> str:
    """One chart.

    Args:
        series: `{"name", "points": [(x, y)], "low", "high" (lists beside the points, optional)}` each; points whose y
            is None or not finite are left out. The n-th series has the class `s<n>`.
        ticks: a label for x = 0, 1, …; without it x is a number (a step) and gets round ticks.
        percent: y is a share, shown in percent.

    Returns:
        An `<svg>` element; an empty text where no series has a point.
    """
    shown = [dict(one, points=_finite(one)) for one in series]
    shown = [one for one in shown if one["points"]]
    if not shown:
        return ""
    xs = [x for one in shown for x, *_ in one["points"]]
    ys = [y for one in shown for _, *values in one["points"] for y in values if y is not None]
    slanted = ticks is not None and (len(ticks) > 5 or max(map(len, ticks)) * len(ticks) > 36)
    bottom = BOTTOM + (34 if slanted else 0)
    height = HEIGHT + (34 if slanted else 0)
    x_low, x_high = (-0.3, len(ticks) - 0.7) if ticks is not None else (min(xs), max(xs))
    floor = 0.0 if min(ys) >= 0 else None  # no room below for what is never negative
    y_marks = round_marks(min(ys), max(ys), floor=floor, ceiling=1.0 if percent else None)
    y_low, y_high = y_marks[0], y_marks[-1]

    def at(x, y):
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_low) / ((y_high - y_low) or 1)
        return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(height - bottom - up * (height - TOP - bottom), 1)

    parts = []
    for mark in y_marks:
        y = at(x_low, mark)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{_number(mark, percent)}</text>')
    parts += _x_axis(ticks, slanted, at, x_low, x_high, y_low, height - bottom)
    for one in shown:
        parts += _series(one, series.index(next(s for s in series if s["name"] == one["name"])), at, ticks, percent)
    label = f"{title}: " + "; ".join(_spoken(one, ticks, percent) for one in shown)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _finite(one: dict) -> list[tuple]:
    """(x, y, low, high) of the points that can be drawn, thinned to `MAX_POINTS`, the last one kept."""
    none = [None] * len(one["points"])
    rows = zip(one["points"], one.get("low") or none, one.get("high") or none, strict=True)
    points = []
    for (x, y), *ends in rows:
        if _is_number(y):
            points.append((x, y, *(end if _is_number(end) else None for end in ends)))
    stride = math.ceil(len(points) / MAX_POINTS) or 1
    return points[(len(points) - 1) % stride :: stride] if points else []


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _series(one: dict, number: int, at, ticks, percent: bool) -> list[str]:
    places = [at(x, y) for x, y, *_ in one["points"]]
    parts = []
    if len(places) > 1:
        path = "M" + "L".join(f"{x},{y}" for x, y in places)
        parts.append(f'<path class="line s{number}" d="{path}"/>')
    for (x, y, low, high), (left, top) in zip(one["points"], places, strict=True):
        if low is not None and high is not None:
            ends = [at(x, value)[1] for value in (low, high)]
            parts.append(f'<line class="range s{number}" x1="{left}" x2="{left}" y1="{ends[0]}" y2="{ends[1]}"/>')
        if ticks is not None or len(places) <= 60:
            where = ticks[int(x)] if ticks is not None else f"step {x:g}"
            interval = f" ({_number(low, percent, 1)} to {_number(high, percent, 1)})" if low is not None else ""
            words = escape(f"{one['name']}, {where}: {_number(y, percent, 1)}{interval}")
            radius = 4 if ticks is not None else 2.2
            circle = f'<circle class="dot s{number}" cx="{left}" cy="{top}" r="{radius}">'
            parts.append(f"{circle}<title>{words}</title></circle>")
    return parts


def _x_axis(ticks, slanted: bool, at, x_low, x_high, y_low, base: float) -> list[str]:
    if ticks is None:
        marks = [mark for mark in round_marks(x_low, x_high) if x_low <= mark <= x_high]
        labels = [(at(mark, y_low)[0], f"{mark:g}") for mark in marks]
    else:
        labels = [(at(place, y_low)[0], label) for place, label in enumerate(ticks)]
    parts = []
    for x, label in labels:
        label = label if len(label) <= 16 else label[:15] + "…"
        if slanted:
            turn = f'transform="rotate(-35 {x} {base + 16})" text-anchor="end"'
        else:
            turn = 'text-anchor="middle"'
        parts.append(f'<text class="tick" x="{x}" y="{base + 17}" {turn}>{escape(label)}</text>')
    return parts


def _spoken(one: dict, ticks, percent: bool) -> str:
    first, last = one["points"][0], one["points"][-1]
    return f"{one['name']} from {_number(first[1], percent, 1)} to {_number(last[1], percent, 1)}"


def _number(value: float, percent: bool, places: int = 0) -> str:
    if percent:
        return f"{100 * value:.{places}f}%"
    if value and abs(value) < 0.001:
        digits, power = f"{value:.1e}".split("e")
        return f"{float(digits):g}e{int(power)}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def round_marks(
    low: float, high: float, *, floor: float | None = None, ceiling: float | None = None
) -> list[float]:
    """Three to six round numbers that span [low, high], a little wider, within floor and ceiling."""
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 0.5
    low, high = low - margin, high + margin
    if floor is not None:
        low = max(low, floor)
    if ceiling is not None:
        high = min(high, ceiling)
    rough = (high - low) / 4 or 1.0
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]
