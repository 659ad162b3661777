"""The report's HTML, from what was read: plain values here, their form in `template/page.html`."""

import base64
import hashlib
import json
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from veripo_trl.answers.score import score_name
from veripo_trl.files.tables import finite
from veripo_trl.report.plots import (
    DECODINGS,
    MEASURES,
    held_out_charts,
    is_number,
    svg_uri,
    training_charts,
)
from veripo_trl.verifier.checks import inconsistency


def render(
    *, title, stages, counts, benchmarks, questions, all_questions, pairs, media, absent, seed
) -> str:
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
    names = [stage["name"] for stage in stages]
    return environment.from_string(page).render(
        title=title,
        style=style,
        script=script,
        style_hash=content_hash(style),
        script_hash=content_hash(script),
        totals={
            "stages": len(stages),
            "questions": all_questions,
            "rollouts": sum(count["rollouts"] for count in counts),
            "pairs": sum(sum(count["pairs"].values()) for count in counts),
        },
        shown={
            "questions": len(questions),
            "rollouts": sum(len(question["rollouts"]) for question in questions),
            "pairs": len(pairs),
        },
        cards=_cards(points),
        stages=[_stage_row(stage, count) for stage, count in zip(stages, counts, strict=True)],
        held_out=_held_out_rows(points),
        benchmarks=benchmarks,
        training=[
            (stage["name"], charts) for stage in stages if (charts := _curves(stage["history"]))
        ],
        seed=seed,
        absent=absent or ["Nothing is absent."],
        data=embed({"stages": names, "questions": questions, "pairs": pairs, "media": media}),
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


def _cards(points: list[dict]) -> list[dict]:
    """A chart with its title, its last value, and how far that is from the first, for each measure."""
    cards = []
    for (key, title, percent, better), chart in zip(
        MEASURES, held_out_charts(points) if points else ()
    ):
        line = chart["series"][0]
        values = [100 * value if percent else value for value in line["y"] if is_number(value)]
        card = {"title": title, "chart": svg_uri(chart), "value": "–", "moved": "", "tone": ""}
        if key == "inconsistency":
            card["title"] += (
                f" (unknown {_percent((points[-1].get(line['name']) or {}).get('unknown'))})"
            )
        if values:
            change = values[-1] - values[0]
            card["value"] = f"{values[-1]:.1f}{'%' if percent else ''}"
            card["moved"] = (
                f"{change:+.1f}{' points' if percent else ''}".replace("-", "−")
                if values[1:]
                else ""
            )
            card["tone"] = (
                "good" if change * better > 1e-7 else "bad" if change * better < -1e-7 else ""
            )
        cards.append(card)
    return cards


def _curves(history: list[dict]) -> list[dict]:
    return [
        {"title": chart["title"], "chart": svg_uri(chart)} for chart in training_charts(history)
    ]


def _stage_row(stage, count) -> dict[str, str]:
    verdicts, judged = count["verdicts"], "–"
    if total := sum(verdicts.values()):
        judged = f"{total:,}: {_percent(inconsistency(verdicts))} inconsistent, "
        judged += f"{_percent(verdicts['unknown'] / total)} unknown"
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
        "pairs": ", ".join(f"{n:,} {kind}" for kind, n in sorted(count["pairs"].items(), key=str))
        or "–",
    }


def _held_out_rows(points: list[dict]) -> list[dict[str, str]]:
    keys = {key for point in points for decoding in DECODINGS for key in point.get(decoding) or {}}
    kinds = sorted(key for key in keys if key.startswith("accuracy: "))
    metrics = sorted(key for key in keys if ": " in key and key not in kinds)  # mIoU: temporal grounding
    rows = []
    for point in points:
        for decoding in DECODINGS:
            values = point.get(decoding) or {}
            row = {
                "policy after": point["label"],
                "decoding": decoding,
                score_name(keys): _percent(values.get("accuracy")),
                "95% interval": f"{_percent(values.get('accuracy_low'))}–{_percent(values.get('accuracy_high'))}",
                "accurate and consistent": _percent(values.get("accurate_and_consistent")),
                "inconsistent": _percent(values.get("inconsistency")),
                "unknown": _percent(values.get("unknown")),
                "format": _percent(values.get("format")),
                "think tokens": _number(values.get("think_tokens"), ".1f"),
                "cut": _percent(values.get("truncated")),
                "questions": values.get("questions", "–"),
                **{key.removeprefix("accuracy: "): _percent(values.get(key)) for key in kinds},
                **{key: _number(values.get(key), ".2f" if "MAE" in key else ".1%") for key in metrics},
            }
            rows += [row] if values else []
    return rows


def _number(value, form: str) -> str:
    return format(value, form) if is_number(value) else "–"


def _percent(value) -> str:
    return _number(value, ".1%")
