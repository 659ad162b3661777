"""The report's HTML, from what was read: plain values here, their form in `template/page.html`."""

import base64
import hashlib
import json
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from veripo_trl.files.tables import finite
from veripo_trl.report.plots import DECODINGS, MEASURES, held_out_charts, is_number, svg_uri, training_charts
from veripo_trl.verifier.checks import inconsistency


def render(*, title, stages, counts, benchmarks, questions, pairs, media, absent, sample) -> str:
    """The whole page as text. See `write_report` for what goes in."""
    folder = files("veripo_trl.report") / "template"
    page, style, script = (
        (folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["thousands"] = "{:,}".format
    points = milestones(stages)
    data = {
        "stages": [stage["name"] for stage in stages],
        "questions": questions,
        "pairs": pairs,
        "media": media,
    }
    return environment.from_string(page).render(
        title=title,
        style=style,
        script=script,
        style_hash=content_hash(style),
        script_hash=content_hash(script),
        totals=_totals(stages, counts),
        cards=_cards(points),
        stages=[_stage_row(stage, count) for stage, count in zip(stages, counts, strict=True)],
        held_out=_held_out_rows(points),
        benchmarks=benchmarks,
        training=[(stage["name"], charts) for stage in stages if (charts := _curves(stage["history"]))],
        shown=_shown(questions, pairs, media),
        sample=sample,
        absent=absent or ["Nothing is absent."],
        data=embed(data),
    )


def content_hash(text: str) -> str:
    """What a Content-Security-Policy calls an inline script or style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embed(data) -> str:
    """JSON that may stand in a <script> element: nothing in it can end the element or begin a comment."""
    text = json.dumps(finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def milestones(stages) -> list[dict]:
    """The policies whose held-out results are known, in order: `{"label", "greedy", "sampled"}`; the first may be the
    start of the run."""
    found = []
    for stage in stages:
        before, after = stage["results"].get("before"), stage["results"].get("after")
        if not found and _evaluated(before):
            found.append({"label": "start", **before})
        if _evaluated(after):
            found.append({"label": str(stage["name"]), **after})
    return found


def _evaluated(results) -> bool:
    return isinstance(results, dict) and any(
        isinstance(results.get(decoding), dict) for decoding in DECODINGS
    )


def _totals(stages, counts) -> dict:
    return {
        "stages": len(stages),
        "rollouts": sum(count["rollouts"] for count in counts),
        "verdicts": sum(sum(count["verdicts"].values()) for count in counts),
        "pairs": sum(sum(count["pairs"].values()) for count in counts),
        "minutes": sum(stage["minutes"] for stage in stages if is_number(stage["minutes"])),
    }


def _shown(questions, pairs, media) -> dict:
    """How much of the run is on the page."""
    return {
        "questions": len(questions),
        "rollouts": sum(len(question["rollouts"]) for question in questions),
        "filmed": sum(
            any(media.get(name, {}).get("frames") for name in q["videos"] + q["images"]) for q in questions
        ),
        "pairs": len(pairs),
    }


def _cards(points: list[dict]) -> list[dict]:
    """A chart with its title, its last value, and how far that is from the first, for each measure."""
    cards = []
    for (key, title, percent, better), chart in (
        zip(MEASURES, held_out_charts(points), strict=True) if points else ()
    ):
        decoding, scale, unit = chart["series"][0]["name"], 100 if percent else 1, "%" if percent else ""
        values = [scale * value for value in chart["series"][0]["y"] if is_number(value)]
        card = {"title": title, "chart": svg_uri(chart), "value": "–", "moved": "", "tone": ""}
        if key == "inconsistency":
            card["title"] += f" (unknown {_percent((points[-1].get(decoding) or {}).get('unknown'))})"
        if values:
            card["value"] = f"{values[-1]:.1f}{unit}"
        if len(values) > 1:
            change = values[-1] - values[0]
            card["moved"] = f"{change:+.1f}{' points' if percent else ''}".replace("-", "−")
            card["tone"] = (
                "" if not better or abs(change) < 1e-7 else "good" if change * better > 0 else "bad"
            )
        cards.append(card)
    return cards


def _curves(history: list[dict]) -> list[dict]:
    return [{"title": chart["title"], "chart": svg_uri(chart)} for chart in training_charts(history)]


def _stage_row(stage, count) -> dict[str, str]:
    verdicts, judged = count["verdicts"], "–"
    if total := sum(verdicts.values()):
        judged = f"{total:,}: {_percent(inconsistency(verdicts))} inconsistent, "
        judged += f"{_percent(verdicts.get('unknown', 0) / total)} unknown"
    return {
        "stage": f"{stage['name']} ({stage['recipe']})" if stage["recipe"] else stage["name"],
        "status": stage["status"] or "–",
        "minutes": _number(stage["minutes"], ".1f"),
        "rollouts": _number(count["rollouts"] or None, ","),
        "questions": _number(count["questions"] or None, ","),
        "accuracy": _percent(count["accuracy"]),
        "tokens": _number(count["completion_tokens"], ".0f"),
        "cut": _percent(count["truncated"]),
        "verdicts": judged,
        "pairs": ", ".join(f"{n:,} {kind}" for kind, n in sorted(count["pairs"].items(), key=str)) or "–",
    }


def _held_out_rows(points: list[dict]) -> list[dict[str, str]]:
    keys = {key for point in points for decoding in DECODINGS for key in point.get(decoding) or {}}
    kinds = sorted(key for key in keys if key.startswith("accuracy: "))
    return [
        {
            "policy after": point["label"],
            "decoding": decoding,
            "accuracy": _percent(values.get("accuracy")),
            "95% interval": _interval(values, "accuracy"),
            "accurate and consistent": _percent(values.get("accurate_and_consistent")),
            "inconsistent": _percent(values.get("inconsistency")),
            "unknown": _percent(values.get("unknown")),
            "format": _percent(values.get("format")),
            "think tokens": _number(values.get("think_tokens"), ".1f"),
            "cut": _percent(values.get("truncated")),
            "questions": values.get("questions", "–"),
            **{key.removeprefix("accuracy: "): _percent(values.get(key)) for key in kinds},
        }
        for point in points
        for decoding in DECODINGS
        if (values := point.get(decoding))
    ]


def _number(value, form: str) -> str:
    return format(value, form) if is_number(value) else "–"


def _percent(value) -> str:
    return _number(value, ".1%")


def _interval(values: dict, key: str) -> str:
    low, high = values.get(f"{key}_low"), values.get(f"{key}_high")
    return f"{100 * low:.1f}–{high:.1%}" if is_number(low) and is_number(high) else "–"
