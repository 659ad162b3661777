"""Writes the report: reads a run, finds its frames, fills the page, one HTML file.

The page is one file, opens from disk and asks no network for anything. What models and judges wrote is untrusted: it
travels as escaped JSON, becomes text nodes and never markup, and the page's policy (a Content-Security-Policy with the
hashes of our own script and style) lets nothing else run or load.
"""

from collections.abc import Callable
from pathlib import Path

from veripo_trl.files.disk import write_whole
from veripo_trl.report import read
from veripo_trl.report.frames import film
from veripo_trl.report.page import embed, render


def write_report(
    runs: list[str | Path],
    output: str | Path | None = None,
    *,
    questions: int = 40,
    seed: int = 0,
    media_root: str | None = None,
    max_mb: float = 20.0,
    scores: list[str | Path] = (),
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the page of one run, or of several as the stages of one.

    Args:
        runs: folders: of a loop (with `run.json`), or of stages (`results.json`, `rollouts/`, `verdicts/`, `pairs/`),
            in their order: verdicts after the rollouts that they judge.
        output: the file; `report.html` in the first folder by default.
        questions: how many are shown with their frames. More are listed without, until the page is full.
        seed: draws the questions and pairs on the page, where not all of them fit.
        media_root: folder of the videos and images; by default what the runs recorded.
        max_mb: about the largest size of the page, in megabytes.
        scores: files of benchmark results (`<name>.scores.json`), beside those in the run's folders.
        say: called with a line for each file that is broken: it is left out, and the page says so too.

    Returns:
        The path written.

    Raises:
        ReportError: a folder is missing or holds nothing to report.
    """
    title, stages, absent = read.read_stages(list(runs))
    benchmarks = read.read_scores(list(runs), stages, list(scores), absent)
    if not benchmarks and not any(
        stage[part] for stage in stages for part in ("results", "history", *read.COLUMNS)
    ):
        raise read.ReportError(
            f"{', '.join(map(str, runs))}: nothing to report. Expected run.json of a loop, or results.json, "
            f"rollouts/*.parquet, verdicts/*.parquet or pairs/*.parquet of a stage."
        )
    broken: list[str] = []
    counts, sizes = read.survey(stages, broken, progress=progress)
    budget = int(max_mb * 1e6)
    chosen = read.choose_questions(sizes, seed=seed, budget=budget // 2)
    listed = _fitting(read.read_questions(stages, chosen, absent, broken, progress=progress), budget // 2)
    pairs, all_pairs = read.read_pairs(stages, broken, seed=seed)
    for line in broken:
        say(line)
    media = film(listed[:questions], stages, media_root, budget=budget // 3, progress=progress, say=say)
    if failed := [entry for entry in media.values() if not entry["frames"]]:
        absent.append(
            f"{len(failed)} of {len(media)} videos and images are not shown: {failed[0]['note']}. Give --media_root, the "
            f"folder that their paths start from."
        )
    page = render(
        title=title,
        stages=stages,
        counts=counts,
        benchmarks=benchmarks,
        questions=listed,
        pairs=_fitting(pairs, budget // 6),
        media=media,
        absent=broken + absent,
        sample={"seed": seed, "questions": len(sizes), "pairs": all_pairs},
    )
    path = Path(output) if output is not None else Path(runs[0]) / "report.html"
    write_whole(path, page.encode("utf-8", "backslashreplace"))  # half a surrogate pair would not be UTF-8
    return path


def _fitting(items: list[dict], budget: int) -> list[dict]:
    """The first items that take `budget` bytes on the page. Escapes make a text up to six times longer."""
    return read.fitting(
        items, [len(embed(item).encode("utf-8", "backslashreplace")) for item in items], budget
    )
