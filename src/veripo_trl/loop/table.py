"""What a run shows at its end: a line for each stage, curves of the held-out results, the report."""

from veripo_trl.files.tables import print_table
from veripo_trl.loop.state import Run


def show(run: Run, stages: list[dict]) -> None:
    """Print the table; draw the curves and write the report, unless they are newer than the run's state."""
    entries = [run.stages[stage["name"]] for stage in stages]
    settings = [stage["settings"] for stage in stages]
    reporting = {own["report_judge"] for own in settings if "report_judge" in own} or {"rules"}
    curating = {stage["settings"].get("judge", "rules") for stage in stages if stage["kind"] == "verify"}
    print_table(
        f"{run.folder}: held-out questions, sampled at temperature 1 unless it says greedy; consistency reported by "
        f"{', '.join(sorted(reporting))}",
        [table_row(entry) for entry in entries],
    )
    print(
        "inconsistent = inconsistent / (consistent + inconsistent); accurate+consistent counts unknown as a miss; "
        "judges differ = share of answers on which the judge that reports and `rules` give two verdicts; in accuracy "
        "free text counts by its ROUGE."
    )
    if both := reporting & curating:
        names = ", ".join(sorted(both))
        print(f"note: {names} chose the pairs and reports too: read its inconsistency with care.")
    report = run.folder / "report.html"
    if not report.exists() or report.stat().st_mtime < run.file.stat().st_mtime:
        draw(run, entries)
    done = [stage for stage in stages if run.stages[stage["name"]]["status"] == "done"]
    policies = [stage["output_dir"] for stage in done if stage["kind"] not in ("verify", "sample")]
    print(f"\nreport.html (open it in a browser), loop.png, run.json and logs/ are in {run.folder}")
    print(f"policy: {(policies or ['none yet'])[-1]}", flush=True)


def draw(run: Run, entries: list[dict]) -> None:
    from veripo_trl.report.page import milestones
    from veripo_trl.report.plots import held_out_charts, save_charts
    from veripo_trl.report.write import write_report

    stages = [{"name": entry["name"], "results": entry.get("results", {})} for entry in entries]
    charts = held_out_charts(points) if (points := milestones(stages)) else []
    save_charts(run.folder / "loop.png", charts, title=run.folder.name)
    write_report([run.folder])


def table_row(entry: dict) -> dict:
    """One stage's line of the table; "–" for what it has not."""
    results = entry.get("results", {})
    counts = results.get("counts") or results  # a verification's, or a training's
    after = results.get("after") or {}
    sampled, greedy = after.get("sampled") or {}, after.get("greedy") or {}
    interval = "{accuracy_low:.1%}–{accuracy_high:.1%}".format(**sampled) if sampled else None

    def shown(value, form: str = "{:.1%}") -> str | None:
        return None if value is None else form.format(value)

    return {
        "stage": entry["name"] + (" (skipped)" if entry["status"] == "skipped" else ""),
        "accuracy": shown(sampled.get("accuracy")),
        "95%": interval,
        "greedy": shown(greedy.get("accuracy")),
        "inconsistent": shown(sampled.get("inconsistency")),
        "unknown": shown(sampled.get("unknown")),
        "accurate+consistent": shown(sampled.get("accurate_and_consistent")),
        "think tokens": shown(sampled.get("think_tokens"), "{:.1f}"),
        "judges differ": shown(sampled.get("disagreement")),
        "rollouts": shown(counts.get("rollouts"), "{:,}"),
        "pairs": shown(counts.get("pairs") and sum(counts["pairs"].values()), "{:,}"),
        "minutes": f"{entry['minutes']:.1f}",
    }
