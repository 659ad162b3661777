"""Rows of this project's columns whose video is a list of images.

Form: frames (their paths), frames_fps (of the video that they are from) and frames_indices (in it, from 0),
in place of `videos`. `evaluation/cut_videos.py` makes a video of each list, in which every image is shown
from index / fps to the next one's; the first is shown from 0.
Traps: a list without rate and indices has no times: say them, or leave the rows out.
"""

import hashlib
from pathlib import PurePath

from veripo_trl.data.schema import FieldError, show


def convert(record: dict, *, file: str) -> list[dict]:
    frames, fps, indices = (record[name] for name in ("frames", "frames_fps", "frames_indices"))
    rising = (
        all(isinstance(index, int) for index in indices)
        and sorted({0, *indices})[-len(indices) :] == indices
    )
    if not rising or len(indices) != len(frames) or not frames:
        raise FieldError("frames_indices", "rising indices from 0, one an image", show(indices))
    if not isinstance(fps, (int, float)) or not 0 < fps < 10_000:
        raise FieldError("frames_fps", "frames per second", show(fps))
    if record.get("videos"):
        raise FieldError("videos", "none beside frames", show(record["videos"]))
    key = hashlib.sha256(repr((frames, fps, indices)).encode()).hexdigest()[:12]
    row = {name: value for name, value in record.items() if not name.startswith("frames")}
    cut = {"frames": frames, "fps": fps, "indices": indices}
    return [
        {**row, "videos": [str(PurePath(frames[0]).with_name(f"frames-{key}.mp4"))], "cut": cut}
    ]
