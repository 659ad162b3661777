"""The order of a report's making: a run is read, its frames are found, page.py makes the page.

The page is one file, opens from disk and asks no network for anything. What models and judges wrote is untrusted: it
travels as escaped JSON, becomes text nodes and never markup, and the page's policy (a Content-Security-Policy with the
hashes of our own script and style) lets nothing else run or load.
"""

from itertools import accumulate
from pathlib import Path

from veripo_trl.files.disk import write_whole
from veripo_trl.report.frames import film
from veripo_trl.report.page import embed, render
from veripo_trl.report.read import ReportError, read_rows, read_scores, read_stages


def write_report(
    runs: list[str | Path],
    output: str | Path | None = None,
    *,
    questions: int = 40,
    seed: int = 0,
    media_root: str | None = None,
    max_mb: float = 20.0,
    scores: list[str | Path] = (),
) -> Path:
    """Write the page of one run, or of several as the stages of one. A file that is broken is left out: its error is
    printed, and the page says so too.

    Args:
        runs: folders: of a loop (with `run.json`), or of stages (`results.json`, `rollouts/`, `verdicts/`, `pairs/`),
            in their order: verdicts after the rollouts that they judge.
        output: the file; `report.html` in the first folder by default.
        questions: how many are shown with their frames. More are listed without, until the page is full.
        seed: draws the questions and pairs on the page, where not all of them fit.
        media_root: folder of the videos and images; by default what the runs recorded.
        max_mb: about the largest size of the page, in megabytes.
        scores: files of benchmark results (`<name>.scores.json`), beside those in the run's folders.

    Returns:
        The path written.

    Raises:
        ReportError: a folder is missing or holds nothing to report.
    """
    absent: list[str] = []
    title, stages = read_stages(runs, absent)
    benchmarks = read_scores(stages, runs, scores, absent)
    budget = int(max_mb * 1e6)
    found = read_rows(stages, absent, seed=seed, budget=budget // 2)
    parts = {
        "No rollouts: there are no questions to look at.": any(
            count["rollouts"] for count in found["counts"]
        ),
        "No verdicts: the verifier has not run, or its folder was not given.": any(
            count["verdicts"] for count in found["counts"]
        ),
        "No preference pairs.": bool(found["pairs"]),
        "No training log: there are no training curves.": any(stage["history"] for stage in stages),
    }
    if not benchmarks and not any(parts.values()) and not any(stage["results"] for stage in stages):
        raise ReportError(
            f"{', '.join(map(str, runs))}: nothing to report. Expected run.json of a loop, or results.json, "
            f"rollouts/*.parquet, verdicts/*.parquet or pairs/*.parquet of a stage."
        )
    absent += [line for line, is_there in parts.items() if not is_there]
    listed = _fitting(found["questions"], budget // 2)
    media = film(listed[:questions], stages, media_root, budget=budget // 3)
    if failed := [entry for entry in media.values() if not entry["frames"]]:
        absent.append(
            f"{len(failed)} of {len(media)} videos and images are not shown: {failed[0]['note']}. Give --media_root, the "
            f"folder that their paths start from."
        )
    page = render(
        title=title,
        stages=stages,
        counts=found["counts"],
        benchmarks=benchmarks,
        questions=listed,
        all_questions=found["all_questions"],
        pairs=_fitting(found["pairs"], budget // 6),
        media=media,
        absent=absent,
        seed=seed,
    )
    path = Path(output) if output is not None else Path(runs[0]) / "report.html"
    write_whole(
        path, page.encode("utf-8", "backslashreplace")
    )  # half a surrogate pair would not be UTF-8
    return path


def _fitting(items: list[dict], budget: int) -> list[dict]:
    """The first items that take `budget` bytes on the page, at least one. Escapes make a text up to six times longer."""
    sizes = (len(embed(item).encode("utf-8", "backslashreplace")) for item in items)
    return items[: max(1, sum(total <= budget for total in accumulate(sizes)))]
