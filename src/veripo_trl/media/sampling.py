"""Which frames of a clip are taken, and their size, with the defaults (fps, max_frames, max_pixels).

The rules are qwen-vl-utils'.
"""

from dataclasses import dataclass

import numpy as np

from veripo_trl.media.containers import BadFile


@dataclass(frozen=True)
class VideoSettings:
    """How a clip is sampled. Pixels are per frame, whatever the model's processor calls them.

    fps: frames taken per second of video. min_frames, max_frames: bounds of their number, which is even; a clip that
    has fewer than min_frames gives what it has, rounded down to an even number (qwen-vl-utils' rule), and a clip of a
    single frame gives that frame twice. size_factor: both sides are multiples of it (28 for Qwen2.5-VL, 32 for
    Qwen3-VL: patch size × merge size).
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 128
    min_pixels: int = 16 * 28 * 28
    max_pixels: int = 128 * 28 * 28
    size_factor: int = 28

    def __post_init__(self):
        if not self.fps > 0:
            raise ValueError(f"fps must be above 0, got {self.fps}")
        if not 2 <= self.min_frames + self.min_frames % 2 <= self.max_frames:
            raise ValueError(
                f"expected 2 <= min_frames <= max_frames with an even number between them, "
                f"got min_frames={self.min_frames}, max_frames={self.max_frames}"
            )
        if not self.size_factor**2 <= self.max_pixels or not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"expected min_pixels <= max_pixels and size_factor² <= max_pixels (all per frame), "
                f"got min_pixels={self.min_pixels}, max_pixels={self.max_pixels}, size_factor={self.size_factor}"
            )


def plan_frames(source: dict, settings: VideoSettings) -> tuple[list[int], int, int]:
    """Frame indices and the height and width to resize to, for a source's total_num_frames, fps, height and width."""
    from qwen_vl_utils.vision_process import smart_nframes, smart_resize  # here, because it imports torch

    total, fps = source["total_num_frames"], source["fps"]
    if not fps > 0:
        raise BadFile("the file does not say its frame rate; re-encode it or leave the row out")
    count = 2
    if total >= 2:  # a single frame is given twice, as Qwen's processor pads
        limits = {"fps": settings.fps, "min_frames": settings.min_frames, "max_frames": settings.max_frames}
        count = smart_nframes(limits, total_frames=total, video_fps=fps)
    indices = np.linspace(0, total - 1, count).round().astype(int).tolist()
    height, width, factor = source["height"], source["width"], settings.size_factor
    limits = {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
    try:
        sides = smart_resize(height, width, factor, **limits)
    except ValueError as error:  # longer than 200 times its other side
        raise BadFile(f"{height} x {width} pixels: {error}; crop the file or leave the row out") from None
    # qwen-vl-utils rounds the short side of a very long frame down to 0; transformers keeps one factor, as here
    return indices, max(sides[0], factor), max(sides[1], factor)
