"""The report's HTML, from what was read: plain values here, their form in `template/page.html`."""

import base64
import hashlib
import json
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from veripo_trl.files.tables import finite
from veripo_trl.report.plots import DECODINGS, MEASURES, held_out_charts, is_number, svg_uri, training_charts

SCORES = {  # of a line of benchmark results: title
    "ours": "accuracy",
    "released": "accuracy, released script",
    "unparsable": "unparsable",
    "truncated": "cut",
    "inconsistency": "inconsistent",
    "unknown": "unknown",
}


def render(*, title, stages, counts, benchmarks, questions, pairs, media, absent, sample) -> str:
    """The whole page as text. See `report.write_report` for what goes in."""
    folder = files("veripo_trl.report") / "template"
    page, style, script = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    data = {
        "stages": [stage["name"] for stage in stages],
        "questions": [{key: value for key, value in question.items() if key != "stage"} for question in questions],
        "pairs": pairs,
        "media": media,
    }
    return environment.from_string(page).render(
        title=title,
        style=style,
        script=script,
        style_hash=content_hash(style),
        script_hash=content_hash(script),
        facts=_facts(stages, counts),
        cards=_cards(milestones(stages)),
        stages=_stage_table(stages, counts),
        held_out=_held_out_table(milestones(stages)),
        benchmarks=list(map(_benchmark_table, benchmarks)),
        training=_training(stages),
        questions_note=_questions_note(questions, media, counts, sample),
        pairs_note=_pairs_note(pairs, sample),
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


def _facts(stages, counts) -> list[str]:
    numbers = {
        "stage" if len(stages) == 1 else "stages": len(stages),
        "rollouts": sum(count["rollouts"] for count in counts),
        "verdicts": sum(sum(count["verdicts"].values()) for count in counts),
        "pairs": sum(sum(count["pairs"].values()) for count in counts),
    }
    minutes = sum(stage["minutes"] for stage in stages if is_number(stage["minutes"]))
    facts = [(f"{number:,}", name) for name, number in numbers.items() if number]
    return facts + ([(f"{minutes:.1f}", "minutes")] if minutes else [])


def milestones(stages) -> list[dict]:
    """The policies whose held-out results are known, in order: `{"label", "greedy", "sampled"}`; the first may be the
    start of the run."""
    found = []
    for stage in stages:
        results = stage["results"]
        if not found and _evaluated(results.get("before")):
            found.append({"label": "start", **results["before"]})
        if _evaluated(results.get("after")):
            found.append({"label": str(stage["name"]), **results["after"]})
    return found


def _evaluated(results) -> bool:
    return isinstance(results, dict) and any(isinstance(results.get(decoding), dict) for decoding in DECODINGS)


def _cards(points: list[dict]) -> list[dict]:
    """A chart with its title, its last value, and how far that is from the first, for each measure."""
    if not points:
        return []
    cards = []
    for (key, title, percent, better), chart in zip(MEASURES, held_out_charts(points), strict=True):
        decoding = chart["series"][0]["name"]
        values = [value for value in chart["series"][0]["y"] if is_number(value)]
        card = {"title": title, "chart": svg_uri(chart), "alt": _spoken(chart), "value": "–", "moved": "", "tone": ""}
        if key == "inconsistency":
            card["title"] += f" (unknown {_percent((points[-1].get(decoding) or {}).get('unknown'))})"
        if values:
            change = values[-1] - values[0]
            card["value"] = f"{100 * values[-1]:.1f}%" if percent else f"{values[-1]:.1f}"
            if len(values) > 1:
                card["moved"] = (f"{100 * change:+.1f} points" if percent else f"{change:+.1f}").replace("-", "−")
                card["tone"] = "" if not better or abs(change) < 1e-9 else "good" if change * better > 0 else "bad"
        cards.append(card)
    return cards


def _spoken(chart: dict) -> str:
    """A chart in words, for those who do not see it."""
    show = _percent if chart["percent"] else lambda value: f"{value:.4g}"
    series = [(one["name"], [value for value in one["y"] if is_number(value)]) for one in chart["series"]]
    return f"{chart['title']}: " + "; ".join(
        f"{name} from {show(values[0])} to {show(values[-1])}" for name, values in series if values
    )


def _stage_table(stages, counts) -> dict:
    rows = []
    for stage, count in zip(stages, counts, strict=True):
        verdicts = count["verdicts"]
        known = verdicts.get("consistent", 0) + verdicts.get("inconsistent", 0)
        judged = "–"
        if total := sum(verdicts.values()):
            share = _percent(verdicts.get("inconsistent", 0) / known) if known else "–"
            judged = f"{total:,}: {share} inconsistent, {_percent(verdicts.get('unknown', 0) / total)} unknown"
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(count["pairs"].items(), key=str))
        tokens, minutes = count["completion_tokens"], stage["minutes"]
        rows.append(
            [
                f"{stage['name']} ({stage['recipe']})" if stage["recipe"] else stage["name"],
                stage["status"] or "–",
                f"{minutes:.1f}" if is_number(minutes) else "–",
                f"{count['rollouts']:,}" if count["rollouts"] else "–",
                f"{count['questions']:,}" if count["questions"] else "–",
                _percent(count["accuracy"]),
                "–" if tokens is None else f"{tokens:.0f}",
                _percent(count["truncated"]),
                judged,
                kinds or "–",
            ]
        )
    head = ["stage", "status", "minutes", "rollouts", "questions", "accuracy", "tokens", "cut", "verdicts", "pairs"]
    return {"head": head, "rows": rows, "numbers": (2, 8)}


def _held_out_table(points: list[dict]) -> dict:
    keys = {key for point in points for decoding in DECODINGS for key in point.get(decoding) or {}}
    kinds = sorted(key for key in keys if key.startswith("accuracy: "))
    head = ["policy after", "decoding", "accuracy", "95% interval", "accurate and consistent", "inconsistent", "unknown"]
    head += ["format", "think tokens", "cut", "questions", *(key.removeprefix("accuracy: ") for key in kinds)]
    shares = ("accurate_and_consistent", "inconsistency", "unknown", "format")
    rows = [
        [point["label"], decoding, _percent(values.get("accuracy")), _interval(values, "accuracy")]
        + [_percent(values.get(key)) for key in shares]
        + [f"{values['think_tokens']:.1f}" if is_number(values.get("think_tokens")) else "–"]
        + [_percent(values.get("truncated")), values.get("questions", "–")]
        + [_percent(values.get(key)) for key in kinds]
        for point in points
        for decoding in DECODINGS
        if (values := point.get(decoding))
    ]
    return {"head": head, "rows": rows, "numbers": (2, len(head))}


def _benchmark_table(scores: dict) -> dict:
    """The lines of one file of scores: a benchmark, then its categories."""
    head = [scores["name"], "rows", "accuracy", "95% interval", *list(SCORES.values())[1:], "thinking"]
    rows = []
    for line in scores["lines"]:
        length = line.get("think_length")
        rows.append(
            [f"· {line['category']}: {line.get('value')}" if line.get("category") else line.get("benchmark")]
            + [line.get("rows", "–"), _percent(line.get("ours")), _interval(line, "ours")]
            + [_percent(line.get(key)) for key in list(SCORES)[1:]]
            + [f"{length:.0f}" if is_number(length) else "–"]
        )
    return {"name": scores["name"], "notes": scores["notes"], "head": head, "rows": rows, "numbers": (1, len(head))}


def _percent(value) -> str:
    return f"{100 * value:.1f}%" if is_number(value) else "–"


def _interval(values: dict, key: str) -> str:
    low, high = values.get(f"{key}_low"), values.get(f"{key}_high")
    return f"{100 * low:.1f}–{100 * high:.1f}%" if is_number(low) and is_number(high) else "–"


def _training(stages) -> list[dict]:
    found = [(stage["name"], training_charts(stage["history"])) for stage in stages]
    return [
        {"name": name, "cards": [{"title": c["title"], "chart": svg_uri(c), "alt": _spoken(c)} for c in charts]}
        for name, charts in found
        if charts
    ]


def _questions_note(questions, media, counts, sample) -> str:
    total = sum(count["rollouts"] for count in counts)
    shown = sum(len(question["rollouts"]) for question in questions)
    if not total:
        return "There are no rollouts in this run."
    filmed = sum(any(media.get(name, {}).get("frames") for name in q["videos"] + q["images"]) for q in questions)
    if len(questions) == sample["questions"] and shown == total:
        what = f"All {len(questions):,} questions and all {total:,} rollouts are on this page"
    else:
        what = (
            f"A sample (seed {sample['seed']}): {len(questions):,} of {sample['questions']:,} questions and {shown:,} of "
            f"{total:,} rollouts are on this page. Filters and counts here are about the sample; the tables above are "
            f"about all"
        )
    return f"{what}. {filmed:,} questions come with the frames that the model saw."


def _pairs_note(pairs, sample) -> str:
    if not sample["pairs"]:
        return "There are no preference pairs in this run."
    if len(pairs) == sample["pairs"]:
        return f"All {len(pairs):,} pairs. Words that only one side has are marked."
    return (
        f"A sample (seed {sample['seed']}): {len(pairs):,} of {sample['pairs']:,} pairs, the kinds in turn. Words that "
        f"only one side has are marked."
    )
