"""Thumbnails for the page: the frames and images that a model was given, found and sampled as its run recorded."""

import base64
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from veripo_trl.data.media_paths import resolve_media
from veripo_trl.data.schema import RowError
from veripo_trl.media.images import load_image
from veripo_trl.media.sampling import VideoSettings
from veripo_trl.media.video import MediaError, VideoLoader
from veripo_trl.report.read import ReportError, find_path

THUMB_HEIGHT, THUMB_WIDTH = 96, 200  # pixels at most
MAX_FRAMES = 16  # of one video on the page
SETTINGS = ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels")


class _NotShown(Exception):
    """A media file that is not on the page, with a reason for it, without the paths of this machine."""


def film(
    questions: list[dict], stages: list[dict], media_root: str | None, *, budget: int
) -> dict[str, dict]:
    """Thumbnails of the questions' media, by path, until they take `budget` bytes.

    Videos are sampled by the settings of the stage that the question was met in.

    Returns:
        `{path: {"frames": [data URIs], "times": [seconds], "note": str}}`; no frames where a file cannot be shown, and
        then `note` says why.
    """
    roots = _media_roots(stages, media_root)
    loaders: dict[VideoSettings, VideoLoader] = {}
    media, used = {}, 0
    for question in tqdm(questions, desc="frames", unit="question", leave=False, disable=None):
        settings = _settings(stages[question["stage"]])
        loader = loaders.setdefault(settings, VideoLoader(settings))
        for kind, name in [
            (kind, name) for kind in ("videos", "images") for name in question[kind]
        ]:
            if name in media:
                continue
            try:
                if used > budget:
                    raise _NotShown("the page is full")
                path = _locate(name, kind, question["question_id"], roots)
                load, show = (loader.load, _strip) if kind == "videos" else (load_image, _picture)
                media[name] = show(load(path, row_id=question["question_id"]))
                used += sum(map(len, media[name]["frames"]))
            except (_NotShown, MediaError) as error:
                note = str(error)
                if isinstance(error, MediaError):
                    print(error, file=sys.stderr)
                    note = "it cannot be decoded"
                media[name] = {"frames": [], "times": [], "note": note}
    for loader in loaders.values():
        loader.close()
    return media


def _media_roots(stages: list[dict], media_root: str | None) -> list[Path]:
    """Folders that media may be relative to: the given one, or what the stages recorded of their data."""
    if media_root is not None:
        if not Path(media_root).is_dir():
            raise ReportError(f"--media_root {media_root}: no such folder.")
        return [Path(media_root)]
    roots = []
    for stage in stages:
        for source in (stage["arguments"].get("DataArguments") or {}).get("datasets") or []:
            if (
                found := find_path(source.get("media_root") or source["path"], stage["folder"])
            ) is not None:
                roots.append((found if found.is_dir() else found.parent).resolve())
    return list(dict.fromkeys(roots))


def _locate(name: str, kind: str, row_id: str, roots: list[Path]) -> str:
    if "://" in name:
        raise _NotShown("named by URL, which is not fetched for a report")
    if not roots:
        raise _NotShown("the run did not record where its media are")
    found = set()
    for root in roots:
        row = {
            "question_id": row_id,
            "media_root": str(root),
            "videos": [],
            "images": [],
            kind: [name],
        }
        try:
            found.update(*resolve_media(row))
        except RowError:  # not below this root
            continue
    if not found:
        raise _NotShown("not found below the media folders of the run")
    if len(found) > 1:
        raise _NotShown("found below two media folders, and the rollout does not say which")
    return found.pop()


def _settings(stage: dict) -> VideoSettings:
    """How the stage's videos were sampled. Their sizes are not the model's exactly: its patches are not known here."""
    recorded = stage["arguments"].get("DataArguments") or {}
    return VideoSettings(
        **{name: recorded[name] for name in SETTINGS if recorded.get(name) is not None}
    )


def _strip(clip) -> dict:
    count = len(clip.frames)
    shown = np.linspace(0, count - 1, min(count, MAX_FRAMES)).round().astype(int).tolist()
    some = f"{len(shown)} of the " if len(shown) < count else ""
    return {
        "frames": [_data_uri(Image.fromarray(clip.frames[index])) for index in shown],
        "times": [round(clip.frames_indices[index] / clip.fps, 2) for index in shown],
        "note": f"{some}{count} frames that the model saw, of {clip.total_num_frames} at {clip.fps:g} fps",
    }


def _picture(image) -> dict:
    return {
        "frames": [_data_uri(image)],
        "times": [],
        "note": f"image, {image.height} × {image.width} pixels",
    }


def _data_uri(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((THUMB_WIDTH, THUMB_HEIGHT))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
