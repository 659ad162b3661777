"""The report's HTML, from what was read: the parts that need no script, and the data for those that do."""

import base64
import hashlib
import json
import math
from html import escape
from importlib.resources import files
from string import Template

from .report_charts import line_chart

MEASURES = (  # of the held-out evaluation: key, title, percent, better
    ("accuracy", "Held-out accuracy", True, 1),
    ("accurate_and_consistent", "Accurate and consistent", True, 1),
    ("inconsistency", "Inconsistent", True, -1),
    ("think_tokens", "Thinking length, tokens", False, 0),
)
TRAINING = {  # what a trainer logs: title
    "reward": "reward",
    "rewards/accuracy_reward/mean": "accuracy reward",
    "rewards/format_reward/mean": "format reward",
    "frac_reward_zero_std": "groups without a difference",
    "completions/mean_length": "completion tokens",
    "completions/clipped_ratio": "cut at the longest length",
    "loss": "loss",
    "rewards/accuracies": "chosen preferred (share)",
    "rewards/margins": "reward margin",
    "rewards/chosen": "reward of chosen",
    "rewards/rejected": "reward of rejected",
    "logps/chosen": "log-probability of chosen",
    "logps/rejected": "log-probability of rejected",
    "mean_token_accuracy": "token accuracy",
    "entropy": "entropy",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
}
DECODINGS = ("sampled", "greedy")
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
    folder = files("veripo_trl") / "report_template"
    page, style, script = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    data = {
        "stages": [stage["name"] for stage in stages],
        "questions": [{key: value for key, value in question.items() if key != "stage"} for question in questions],
        "pairs": pairs,
        "media": media,
    }
    return Template(page).substitute(
        title=escape(title),
        style=style,
        script=script,
        style_hash=content_hash(style),
        script_hash=content_hash(script),
        facts=_facts(stages, counts),
        loop=_loop_curves(stages),
        stages=_stage_table(stages, counts),
        held_out=_held_out_table(stages),
        benchmarks="".join(map(_benchmark_table, benchmarks)),
        training=_training(stages),
        questions_note=escape(_questions_note(questions, media, counts, sample)),
        pairs_note=escape(_pairs_note(pairs, sample)),
        absent="".join(f"<li>{escape(line)}</li>" for line in absent) or "<li>Nothing is absent.</li>",
        data=embed(data),
    )


def content_hash(text: str) -> str:
    """What a Content-Security-Policy calls an inline script or style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embed(data) -> str:
    """JSON that may stand in a <script> element: nothing in it can end the element or begin a comment."""
    text = json.dumps(_plain(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plain(value):
    """NaN and infinities have no JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _facts(stages, counts) -> str:
    numbers = [
        (len(stages), "stage" if len(stages) == 1 else "stages"),
        (sum(count["rollouts"] for count in counts), "rollouts"),
        (sum(sum(count["verdicts"].values()) for count in counts), "verdicts"),
        (sum(sum(count["pairs"].values()) for count in counts), "pairs"),
    ]
    minutes = sum(stage["minutes"] for stage in stages if _is_number(stage["minutes"]))
    facts = [f"<li><b>{number:,}</b> {name}</li>" for number, name in numbers if number]
    return "".join(facts) + (f"<li><b>{minutes:.1f}</b> minutes</li>" if minutes else "")


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


def _loop_curves(stages) -> str:
    points = milestones(stages)
    if not points:
        return '<p class="empty">No held-out results yet: they come with the first stage that ends.</p>'
    ticks = [point["label"] for point in points]
    decodings = [decoding for decoding in DECODINGS if any(point.get(decoding) for point in points)]
    cards = []
    for key, title, percent, better in MEASURES:
        series = [_line(points, key, decoding, decoding) for decoding in decodings]
        if key == "inconsistency":
            series += [_line(points, "unknown", decoding, f"unknown, {decoding}") for decoding in decodings]
        chart = line_chart(series, ticks=ticks, percent=percent, title=title)
        headline = _headline(points, key, decodings[0], percent, better)
        beside = ""
        if key == "inconsistency":
            beside = f" (unknown {_percent((points[-1].get(decodings[0]) or {}).get('unknown'))})"
        names = "".join(f'<li class="s{number}">{escape(one["name"])}</li>' for number, one in enumerate(series))
        cards.append(
            f'<figure class="card"><figcaption><span>{title}{beside}</span>{headline}</figcaption>{chart}'
            f'<ul class="legend">{names}</ul></figure>'
        )
    return f'<div class="charts">{"".join(cards)}</div>'


def _line(points, key, decoding, name) -> dict:
    values = [point.get(decoding) or {} for point in points]
    line = {"name": name, "points": [(place, value.get(key)) for place, value in enumerate(values)]}
    if key == "accuracy":
        line |= {end: [value.get(f"accuracy_{end}") for value in values] for end in ("low", "high")}
    return line


def _headline(points, key, decoding, percent, better) -> str:
    """The last value, and how far it is from the first."""
    values = [point[decoding][key] for point in points if _is_number((point.get(decoding) or {}).get(key))]
    if not values:
        return '<strong class="value">–</strong>'
    last, change = values[-1], values[-1] - values[0]
    text = f"{100 * last:.1f}%" if percent else f"{last:.1f}"
    moved = ""
    if len(values) > 1:
        tone = "" if better == 0 or abs(change) < 1e-9 else " good" if change * better > 0 else " bad"
        amount = f"{100 * change:+.1f} points" if percent else f"{change:+.1f}"
        moved = f' <small class="change{tone}">{amount.replace("-", "−")}</small>'
    return f'<strong class="value">{text}{moved}</strong>'


def _stage_table(stages, counts) -> str:
    head = ("stage", "status", "minutes", "rollouts", "questions", "accuracy", "tokens", "cut", "verdicts", "pairs")
    rows = []
    for stage, count in zip(stages, counts, strict=True):
        verdicts = count["verdicts"]
        known = verdicts.get("consistent", 0) + verdicts.get("inconsistent", 0)
        judged = "–"
        if total := sum(verdicts.values()):
            share = f"{100 * verdicts.get('inconsistent', 0) / known:.1f}%" if known else "–"
            judged = f"{total:,}: {share} inconsistent, {100 * verdicts.get('unknown', 0) / total:.1f}% unknown"
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(count["pairs"].items(), key=str))
        recipe = f'<br><small>{escape(str(stage["recipe"]))}</small>' if stage["recipe"] else ""
        rows.append(
            [
                f"{escape(str(stage['name']))}{recipe}",
                escape(str(stage["status"] or "–")),
                f"{stage['minutes']:.1f}" if _is_number(stage["minutes"]) else "–",
                f"{count['rollouts']:,}" if count["rollouts"] else "–",
                f"{count['questions']:,}" if count["questions"] else "–",
                _percent(count["accuracy"]),
                f"{count['completion_tokens']:.0f}" if count["completion_tokens"] is not None else "–",
                _percent(count["truncated"]),
                escape(judged),
                escape(kinds) or "–",
            ]
        )
    return _table(head, rows, numbers=range(2, 8))


def _held_out_table(stages) -> str:
    points = milestones(stages)
    keys = {key for point in points for decoding in DECODINGS for key in point.get(decoding) or {}}
    kinds = sorted(key for key in keys if key.startswith("accuracy: "))
    head = ["policy after", "decoding", "accuracy", "95% interval", "accurate and consistent", "inconsistent", "unknown"]
    head += ["format", "think tokens", "cut", "questions", *(key.removeprefix("accuracy: ") for key in kinds)]
    rows = []
    for point in points:
        for decoding in DECODINGS:
            values = point.get(decoding)
            if not values:
                continue
            low, high = values.get("accuracy_low"), values.get("accuracy_high")
            interval = f"{100 * low:.1f}–{100 * high:.1f}%" if _is_number(low) and _is_number(high) else "–"
            shares = ("accurate_and_consistent", "inconsistency", "unknown", "format")
            rows.append(
                [escape(point["label"]), decoding, _percent(values.get("accuracy")), interval]
                + [_percent(values.get(key)) for key in shares]
                + [f"{values['think_tokens']:.1f}" if _is_number(values.get("think_tokens")) else "–"]
                + [_percent(values.get("truncated")), escape(str(values.get("questions", "–")))]
                + [_percent(values.get(key)) for key in kinds]
            )
    if not rows:
        return '<p class="empty">No held-out results.</p>'
    return _table([escape(name) for name in head], rows, numbers=range(2, len(head)))


def _benchmark_table(scores: dict) -> str:
    """The lines of one file of scores: a benchmark, then its categories."""
    rows = []
    for line in scores["lines"]:
        category = f"· {line['category']}: {line.get('value')}" if line.get("category") else str(line.get("benchmark"))
        low, high = line.get("ours_low"), line.get("ours_high")
        interval = f"{100 * low:.1f}–{100 * high:.1f}%" if _is_number(low) and _is_number(high) else "–"
        length = line.get("think_length")
        rows.append(
            [escape(category), escape(str(line.get("rows", "–"))), _percent(line.get("ours")), interval]
            + [_percent(line.get(key)) for key in list(SCORES)[1:]]
            + [f"{length:.0f}" if _is_number(length) else "–"]
        )
    head = [escape(scores["name"]), "rows", "accuracy", "95% interval", *list(SCORES.values())[1:], "thinking"]
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in scores["notes"])
    table = _table(head, rows, numbers=range(1, len(head)))
    return f'<h3>Benchmark: {escape(scores["name"])}</h3>{table}<ul class="note">{notes}</ul>'


def _percent(value) -> str:
    return f"{100 * value:.1f}%" if _is_number(value) else "–"


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _table(head, rows, *, numbers) -> str:
    """A table of cells that are HTML already."""

    def line(cells, tag):
        classes = ['class="n"' if place in numbers else "" for place in range(len(cells))]
        return "<tr>" + "".join(f"<{tag} {c}>{cell}</{tag}>" for c, cell in zip(classes, cells, strict=True)) + "</tr>"

    table = f"<thead>{line(head, 'th')}</thead><tbody>{''.join(line(row, 'td') for row in rows)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table>{table}</table></div>'


def _training(stages) -> str:
    parts = []
    for stage in stages:
        charts = []
        for key, title in TRAINING.items():
            logged = [entry for entry in stage["history"] if key in entry and _is_number(entry.get("step"))]
            points = [(entry["step"], entry[key]) for entry in logged]
            chart = line_chart([{"name": title, "points": points}], title=title) if len(points) > 1 else ""
            if chart:
                charts.append(f'<figure class="card"><figcaption><span>{title}</span></figcaption>{chart}</figure>')
        if charts:
            opened = "" if parts else " open"
            summary = f"<summary>{escape(str(stage['name']))}</summary>"
            parts.append(f'<details{opened}>{summary}<div class="charts">{"".join(charts)}</div></details>')
    return "".join(parts) or '<p class="empty">No training log was found.</p>'


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
