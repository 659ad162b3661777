"""Cut the parts of videos that a source's questions are about: what rows with `cut` name as their file.

    python evaluation/cut_videos.py --source mvbench --path MVBench/json --video_dir videos

Each part is encoded anew (H.264, without sound), its frames at their own times from 0. What is a folder
of images (MVBench's TVQA) or a list of frames (source frame_list) becomes a video too. Parts that are
there stay. Exits with 3 if some could not be cut (they are listed).
"""

import argparse
import bisect
import math
import sys
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

from veripo_trl.data.media_paths import check_path
from veripo_trl.errors import run
from veripo_trl.evaluate.questions import read_questions
from veripo_trl.files.tables import printable
from veripo_trl.media.containers import BadFile, recognise_container
from veripo_trl.media.frame_index import FrameIndex, Unreadable, decode, open_container, upright
from veripo_trl.media.images import IMAGE_ERRORS, read_image

TIME_BASE = Fraction(1, 90_000)
Frames = Iterable[tuple[float, np.ndarray]]  # (seconds, RGB (H, W, 3) uint8)


def frames_of(
    video: Path, start: float, end: float, fps: float
) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds from the part's start, frame) of what is shown from `start` until before `end`."""
    if video.is_dir():
        for index, image in enumerate(sorted(video.iterdir())):
            if start <= index / fps < end:
                yield index / fps - start, pixels_of(image)
        return
    container = recognise_container(str(video))
    index = FrameIndex(str(video), container, threads=0)
    if index.stamps is None:
        raise Unreadable("its frames have no times of their own; convert it first")
    if start >= index.total_num_frames / index.fps:
        return
    with open_container(str(video), container) as opened:
        base = opened.streams[index.stream].time_base
        begins = bisect.bisect_right(index.stamps, index.stamps[0] + start / base) - 1
        if seek := [time for key, time in index.keys if 0 < key <= begins]:
            opened.seek(seek[-1], stream=opened.streams[index.stream])
        shown = None  # the frame before: the one that is on the screen when the part begins
        for frame in decode(opened, index):
            time = float((frame.pts - index.stamps[0]) * base)
            if time >= end:
                break
            if time > start and shown is not None and shown[0] <= start:
                yield 0.0, upright(shown[1])
            if time > start:
                yield time - start, upright(frame)
            shown = time, frame
        if shown is not None and shown[0] <= start:
            yield 0.0, upright(shown[1])


def pixels_of(path: Path) -> np.ndarray:
    try:
        return np.asarray(read_image(path).convert("RGB"))
    except (BadFile, *IMAGE_ERRORS) as error:
        raise BadFile(f"{path}: {error}") from error


def images_of(root: Path, cut: dict) -> Frames:
    """(seconds, image) of a list of frames, each until the next one's time, the first from 0.

    At a constant rate, the highest that all times are multiples of: one that is nearly constant would be taken for it.
    """
    indices, pixels = cut["indices"], None
    tick = math.gcd(*indices) or 1
    for index in range(0, indices[-1] + 1, tick):
        if index in indices or pixels is None:
            pixels = pixels_of(
                root / cut["frames"][indices.index(index) if index in indices else 0]
            )
        yield index / cut["fps"], pixels


def write_video(path: Path, frames: Frames) -> int:
    """Write frames at their times, whole or not at all; sides are made even. Returns how many there were."""
    import av

    part, count = path.with_name(f".{path.name}.part"), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with av.open(str(part), "w", format="mp4") as container:
            stream = container.add_stream("libx264", options={"crf": "16", "preset": "veryfast"})
            stream.pix_fmt, stream.codec_context.time_base = "yuv420p", TIME_BASE
            for seconds, pixels in frames:
                height, width = (side // 2 * 2 for side in pixels.shape[:2])
                if not count:
                    stream.height, stream.width = height, width
                frame = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(pixels[:height, :width]), format="rgb24"
                )
                frame.pts, frame.time_base = round(seconds / TIME_BASE), TIME_BASE
                container.mux(stream.encode(frame))
                count += 1
            if not count:
                raise BadFile("shows nothing between start and end; correct the row or the video")
            container.mux(stream.encode())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", required=True, help="a public data set by its name, or module:function"
    )
    parser.add_argument(
        "--path", type=Path, required=True, help="its official file, or the folder of them"
    )
    parser.add_argument(
        "--video_dir", type=Path, required=True, help="what the rows' paths start from"
    )
    args = parser.parse_args(argv)
    questions = read_questions(args.path, video_dir=args.video_dir, benchmark=args.source)
    parts = {q["row"]["videos"][0]: q["raw"]["cut"] for q in questions if "cut" in q["raw"]}
    missing = {name: cut for name, cut in parts.items() if not (args.video_dir / name).exists()}
    print(f"{len(parts)} parts of videos, {len(parts) - len(missing)} are there already")
    failed = []
    for name, cut in tqdm(missing.items(), desc="cut", unit="part"):
        try:
            for path in cut.get("frames") or [cut["video"]]:
                check_path(path, "videos", allow_urls=False)
            if "frames" in cut:
                frames = images_of(args.video_dir, cut)
            else:
                video = args.video_dir / cut["video"]
                frames = frames_of(video, cut["start"], cut["end"], cut.get("fps", 1.0))
            write_video(args.video_dir / name, frames)
        except (BadFile, Unreadable, OSError, ValueError) as error:
            failed.append(f"{name}: {error}")
    for line in failed[:10]:
        print(f"  {printable(line)}")
    print(f"{len(missing) - len(failed)} cut, {len(failed)} could not be")
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(run(main))
