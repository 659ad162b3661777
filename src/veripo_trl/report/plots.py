"""Every picture of a run: a chart is drawn once here, as a png beside the run or as svg inside its report.

A chart: `{"title", "series", "percent", "ticks"}`. A series: `{"name", "x", "y"}` and, if there are intervals, `"low"`
and `"high"`, all lists of one length; values that are no finite number leave a gap. `percent`: y is a share.
`ticks`: labels of x = 0, 1, …; without them x is a step.
"""

import base64
import io
import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # not pyplot's, which wants a screen and is kept

from veripo_trl.files.disk import write_whole

DECODINGS = ("sampled", "greedy")
COLOURS = ("#2457c5", "#c2571a", "#7d8794", "#b9a27f")
MEASURES = (  # of the held-out evaluation: key, title, percent, which direction is better
    ("accuracy", "Held-out accuracy", True, 1),
    ("accurate_and_consistent", "Accurate and consistent", True, 1),
    ("inconsistency", "Inconsistent", True, -1),
    ("think_tokens", "Thinking length, tokens", False, 0),
)
LOGGED = {  # what a trainer logs: title; a reward has its own name
    "reward": "reward",
    "frac_reward_zero_std": "groups without a difference",
    "completions/mean_length": "completion tokens",
    "completions/clipped_ratio": "cut at the longest length",
    "loss": "loss",
    "rewards/accuracies": "chosen preferred (share)",
    "rewards/margins": "reward margin",
    "length/chosen": "chosen tokens",
    "logps/drift_chosen": "drift of chosen (nats)",
    "mean_token_accuracy": "token accuracy",
    "entropy": "entropy",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
}
MAX_POINTS = 400  # of one series; more are thinned, the last one kept


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def training_charts(history: list[dict]) -> list[dict]:
    """One chart for each quantity of a trainer's log that has at least two values, every reward among them."""
    keys = dict.fromkeys(key for entry in history for key in entry)
    rewards = [key for key in keys if key.startswith("rewards/") and key.endswith("/mean")]
    titles = {"reward": LOGGED["reward"]}
    titles |= {
        key: key.removeprefix("rewards/").removesuffix("/mean").replace("_", " ") for key in rewards
    }
    charts = []
    for key, title in (titles | LOGGED).items():
        points = [(entry.get("step"), entry.get(key)) for entry in history]
        points = [point for point in points if all(map(is_number, point))]
        if len(points) > 1:
            stride = math.ceil(len(points) / MAX_POINTS)
            steps, values = zip(*points[(len(points) - 1) % stride :: stride], strict=True)
            charts.append(
                {
                    "title": title,
                    "series": [{"name": title, "x": steps, "y": values}],
                    "percent": False,
                }
            )
    return charts


def held_out_charts(points: list[dict]) -> list[dict]:
    """One chart for each of `MEASURES`, over the policies of a run: `{"label", "sampled", "greedy"}` each, the summaries
    of `evaluate.summarize`."""
    decodings = [decoding for decoding in DECODINGS if any(point.get(decoding) for point in points)]
    charts = []
    for measure, title, percent, _ in MEASURES:
        lines = [(decoding, measure, decoding) for decoding in decodings]
        if measure == "inconsistency":
            lines += [(f"unknown, {decoding}", "unknown", decoding) for decoding in decodings]
        series = []
        for name, key, decoding in lines:
            values = [point.get(decoding) or {} for point in points]
            one = {
                "name": name,
                "x": list(range(len(points))),
                "y": [value.get(key) for value in values],
            }
            if key == "accuracy":
                one |= {
                    end: [value.get(f"accuracy_{end}") for value in values]
                    for end in ("low", "high")
                }
            series.append(one)
        ticks = [point["label"] for point in points]
        charts.append({"title": title, "series": series, "percent": percent, "ticks": ticks})
    return charts


def draw(axis, chart: dict) -> None:
    """Draw a chart on an axis of matplotlib."""
    for number, one in enumerate(chart["series"]):
        y, low, high = (
            np.array([value if is_number(value) else math.nan for value in one.get(key, one["y"])])
            for key in ("y", "low", "high")
        )
        look = {"color": COLOURS[number % len(COLOURS)], "linestyle": "-" if number < 2 else "--"}
        axis.plot(
            one["x"],
            y,
            label=one["name"],
            marker="o" if chart.get("ticks") else "",
            markersize=4,
            **look,
        )
        axis.vlines(one["x"], low, high, color=look["color"], alpha=0.45)
    if ticks := chart.get("ticks"):
        labels = [label if len(label) <= 16 else f"{label[:15]}…" for label in ticks]
        turned = 30 if sum(map(len, labels)) > 36 else 0
        axis.set_xticks(range(len(labels)), labels, rotation=turned, parse_math=False)
    if chart["percent"]:
        axis.yaxis.set_major_formatter("{x:.0%}")
        axis.set_ylim(bottom=max(0.0, axis.get_ylim()[0]))
    if len(chart["series"]) > 1:
        axis.legend(fontsize=7, frameon=False)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def save_charts(path: Path, charts: list[dict], *, title: str) -> None:
    """Write charts beside each other as one png; none where there are no charts."""
    if not charts:
        return
    columns = min(4, len(charts))
    rows = math.ceil(len(charts) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * rows), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    for number, chart in enumerate(charts, 1):
        axis = figure.add_subplot(rows, columns, number)
        axis.set_title(chart["title"], fontsize=10)
        draw(axis, chart)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    write_whole(path, buffer.getvalue())


def svg_uri(chart: dict) -> str:
    """A chart as an image's address. What is in an image can neither run nor load anything."""
    figure, buffer = Figure(figsize=(2.9, 2.0), layout="constrained"), io.BytesIO()
    draw(figure.add_subplot(), chart)
    # without a date and with ids of its own, equal runs have equal reports
    style = {"svg.fonttype": "none", "svg.hashsalt": "veripo_trl", "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
