"""One HTML page about a run: curves, questions with their frames and rollouts, pairs, results.

The page is one file, opens from disk and asks no network for anything. What models and judges wrote is untrusted: it
travels as escaped JSON, becomes text nodes and never markup, and the page's policy (a Content-Security-Policy with the
hashes of our own script and style) lets nothing else run or load.
"""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from tqdm import tqdm

from veripo_trl.data.rows import RowError, resolve_media
from veripo_trl.files.disk import write_whole
from veripo_trl.media.video import MediaError, VideoLoader, VideoSettings, load_image
from veripo_trl.report import read as report_read
from veripo_trl.report.page import embed, render

THUMB_HEIGHT, THUMB_WIDTH = 96, 200  # pixels at most
MAX_FRAMES = 16  # of one video on the page
SETTINGS = ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels")


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
    say: Callable[[str], None] | None = None,
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
        say: called with a line for everything about media that went wrong.

    Returns:
        The path written.

    Raises:
        ReportError: a folder is missing or holds nothing to report, or a Parquet file is broken.
    """
    title, stages, absent = report_read.read_stages(list(runs))
    benchmarks = report_read.read_scores(list(runs), stages, list(scores), absent)
    report_read.check_not_empty(list(runs), stages, benchmarks)
    counts, sizes = report_read.survey(stages, progress=progress)
    budget = int(max_mb * 1e6)
    chosen = report_read.choose_questions(sizes, seed=seed, budget=budget // 2)
    listed = _fitting(report_read.read_questions(stages, chosen, absent, progress=progress), budget // 2)
    pairs, all_pairs = report_read.read_pairs(stages, seed=seed)
    pairs = _fitting(pairs, budget // 6)
    media = film(listed[:questions], stages, media_root, budget=budget // 3, progress=progress, say=say or print)
    page = render(
        title=title,
        stages=stages,
        counts=counts,
        benchmarks=benchmarks,
        questions=listed,
        pairs=pairs,
        media=media,
        absent=absent + _absent_media(media),
        sample={"seed": seed, "questions": len(sizes), "pairs": all_pairs},
    )
    path = Path(output) if output is not None else Path(runs[0]) / "report.html"
    write_whole(path, page.encode("utf-8", "backslashreplace"))  # half a surrogate pair would not be UTF-8
    return path


def _fitting(items: list[dict], budget: int) -> list[dict]:
    """The first items that take `budget` bytes on the page, at least one. Escapes make a text up to six times longer."""
    used = 0
    for place, item in enumerate(items):
        used += len(embed(item).encode("utf-8", "backslashreplace"))
        if place and used > budget:
            return items[:place]
    return items


def _absent_media(media: dict[str, dict]) -> list[str]:
    failed = [entry for entry in media.values() if not entry["frames"]]
    if not failed:
        return []
    return [
        f"{len(failed)} of {len(media)} videos and images are not shown: {failed[0]['note']}. Give --media_root, the "
        f"folder that their paths start from."
    ]


def film(
    questions: list[dict],
    stages: list[dict],
    media_root: str | None,
    *,
    budget: int,
    progress: bool,
    say: Callable[[str], None],
) -> dict[str, dict]:
    """Thumbnails of the frames and images that the model was given, by path.

    Videos are sampled by the settings of the stage that the question was met in.

    Returns:
        `{path: {"frames": [data URIs], "times": [seconds], "note": str}}`; no frames where a file cannot be shown, and
        then `note` says why, without the paths of this machine.
    """
    roots = _media_roots(stages, media_root)
    loaders: dict[VideoSettings, VideoLoader] = {}
    media, used = {}, 0
    try:
        for question in tqdm(questions, desc="frames", unit="question", disable=not progress):
            settings = _settings(stages[question["stage"]], stages)
            for kind in ("videos", "images"):
                for name in question[kind]:
                    if name in media:
                        continue
                    if used > budget:
                        media[name] = {"frames": [], "times": [], "note": "the page is full"}
                        continue
                    try:
                        path = _locate(name, kind, question["id"], roots)
                        if kind == "videos":
                            if settings not in loaders:
                                loaders[settings] = VideoLoader(settings)
                            media[name] = _strip(loaders[settings].load(path, row_id=question["id"]))
                        else:
                            media[name] = _picture(load_image(path, row_id=question["id"]))
                    except _NotShown as error:
                        media[name] = {"frames": [], "times": [], "note": str(error)}
                    except MediaError as error:
                        say(str(error))
                        media[name] = {"frames": [], "times": [], "note": "it cannot be decoded"}
                    used += sum(map(len, media[name]["frames"]))
    finally:
        for loader in loaders.values():
            loader.close()
    return media


class _NotShown(Exception):
    """A media file that is not found, with a reason for the page."""


def _media_roots(stages: list[dict], media_root: str | None) -> list[Path]:
    """Folders that media may be relative to: the given one, or what the stages recorded of their data."""
    if media_root is not None:
        if not Path(media_root).is_dir():
            raise report_read.ReportError(f"--media_root {media_root}: no such folder.")
        return [Path(media_root)]
    roots = []
    for stage in stages:
        for source in (stage["arguments"].get("DataArguments") or {}).get("datasets") or []:
            near = stage["folder"]
            found = report_read.find_path(source.get("media_root") or source["path"], near)
            if found is not None:
                root = (found if found.is_dir() else found.parent).resolve()
                roots += [root] if root not in roots else []
    return roots


def _locate(name: str, kind: str, row_id: str, roots: list[Path]) -> str:
    if "://" in name:
        raise _NotShown("named by URL, which is not fetched for a report")
    found = []
    for root in roots:
        row = {"question_id": row_id, "media_root": str(root), "videos": [], "images": [], kind: [name]}
        try:
            found += [path for paths in resolve_media(row) for path in paths]
        except RowError:  # not below this root
            continue
    if not roots:
        raise _NotShown("the run did not record where its media are")
    if not found:
        raise _NotShown("not found below the media folders of the run")
    if len(set(found)) > 1:
        raise _NotShown("found below two media folders, and the rollout does not say which")
    return found[0]


def _settings(stage: dict, stages: list[dict]) -> VideoSettings:
    """How the stage's videos were sampled; another stage's settings where it recorded none."""
    for source in (stage, *stages):
        recorded = source["arguments"].get("DataArguments") or {}
        if all(name in recorded for name in SETTINGS):
            return VideoSettings(**{name: recorded[name] for name in SETTINGS}, size_factor=_size_factor(source))
    return VideoSettings()


def _size_factor(stage: dict) -> int:
    """Patch size × merge size of the stage's model: its own config, or that of the base of its adapter."""
    name = (stage["arguments"].get("ModelConfig") or {}).get("model_name_or_path")
    folders = [stage["folder"], report_read.find_path(name, stage["folder"]) if name else None]
    for folder in [folder for folder in folders if folder is not None]:
        adapter = folder / "adapter_config.json"
        if adapter.is_file():
            name = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
            folders.append(report_read.find_path(name, stage["folder"]) if name else None)
    files = [folder / "config.json" for folder in folders if folder is not None]
    if name and len(Path(name).parts) == 2 and isinstance(cached := try_to_load_from_cache(name, "config.json"), str):
        files.append(Path(cached))
    for file in files:
        vision = json.loads(file.read_text(encoding="utf-8")).get("vision_config") if file.is_file() else None
        if vision and "patch_size" in vision:
            return vision["patch_size"] * vision.get("spatial_merge_size", 2)
    return VideoSettings().size_factor


def _strip(clip) -> dict:
    count, height, width, _ = clip.frames.shape
    shown = np.linspace(0, count - 1, min(count, MAX_FRAMES)).round().astype(int).tolist()
    some = f"{len(shown)} of the " if len(shown) < count else ""
    return {
        "frames": [_data_uri(Image.fromarray(clip.frames[place])) for place in shown],
        "times": [round(clip.frames_indices[place] / clip.fps, 2) for place in shown],
        "note": f"{some}{count} frames that the model saw, {height} × {width} pixels, of {clip.total_num_frames} at "
        f"{clip.fps:g} fps",
    }


def _picture(image) -> dict:
    return {"frames": [_data_uri(image)], "times": [], "note": f"image, {image.height} × {image.width} pixels"}


def _data_uri(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((THUMB_WIDTH, THUMB_HEIGHT))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
