"""Video files to sampled, resized frames, with the metadata that positions in time need.

Sampling and sizes are qwen-vl-utils' rules, so that the processor has nothing left to do: pass it the frames with
`do_sample_frames=False, do_resize=False` and `video_metadata={total_num_frames, fps, frames_indices}`. One departure:
rate and times are those of the frames, where qwen-vl-utils takes every clip for one of constant, average rate.
"""

import os
import time
from dataclasses import asdict, dataclass, replace
from fractions import Fraction

import numpy as np

from veripo_trl.errors import VeripoError
from veripo_trl.files.tables import printable
from veripo_trl.media.containers import BadFile, check_file, recognise_container
from veripo_trl.media.frame_cache import FrameCache, cache_key
from veripo_trl.media.process import DecodeProcess, WorkerHung, WorkerLost
from veripo_trl.media.sampling import VideoSettings, plan_frames

# What is decoded at this rate or faster is never cut off by a limit that suits short clips.
SLOWEST_BYTES, SLOWEST_PIXELS = 20e6, 100e6  # a second
MOST_S = 7200.0
DECODING = 3  # part of the frame cache's keys: raised when other frames are read from a file than before


class MediaError(VeripoError):
    """A video or image that cannot be used; the text names row, file, reason and remedy."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class VideoError(MediaError):
    """A video that cannot be used."""


@dataclass
class Clip:
    """Sampled frames, uint8 (T, H, W, 3) RGB with T even, and where they come from in the source.

    A frame's time is its index / fps, in seconds from the first frame. A source of variable rate counts as what a
    player shows of it, 1,000 times a second.
    """

    frames: np.ndarray
    fps: float  # of the source, not of the sampling
    total_num_frames: int | Fraction  # of the source
    frames_indices: list[int]  # of `frames` in the source
    backend: str  # "decord" or "pyav"

    def part(self, first: int, last: int) -> "Clip":
        """Frames `first` to `last` (excluded) as a clip of their own, which begins at 0 and in which they are as many
        per second, to the last bit, as in the whole: hence a fraction of its frames."""
        share = Fraction(last - first, len(self.frames))
        indices = [index - self.frames_indices[first] for index in self.frames_indices[first:last]]
        total = self.total_num_frames * share
        return replace(self, frames=self.frames[first:last], total_num_frames=total, frames_indices=indices)


@dataclass(eq=False)
class VideoLoader:
    """Loads clips in a decoding process of its own, with an optional cache on disk.

    timeout_s bounds the decoding of one clip, with a second more for each SLOWEST_BYTES of its file and SLOWEST_PIXELS of
    its frames, up to MOST_S in all. backend "decord" falls back to PyAV for what decord cannot read, "pyav"
    uses PyAV alone. decode_threads: threads of the decoder, 0 for its own choice. `decoded` and `cache_hits` count
    clips. Can be pickled and forked: each process starts its own decoder on its first miss.
    """

    settings: VideoSettings
    cache_dir: str | None = None
    cache_max_bytes: int = 50 * 1024**3
    timeout_s: float = 60.0
    backend: str = "decord"
    decode_threads: int = 0

    def __post_init__(self):
        if self.backend not in ("decord", "pyav"):
            raise ValueError(f"backend must be 'decord' or 'pyav', got {self.backend!r}")
        self.cache = None
        if self.cache_dir is not None:
            self.cache = FrameCache(self.cache_dir, max_bytes=self.cache_max_bytes)
        self._process, self.decoded, self.cache_hits = DecodeProcess(), 0, 0
        self._limit_s = self.timeout_s  # of the clip that is being decoded

    def close(self):
        """Stop the decoding process (the next miss starts another)."""
        if self._process.owner == os.getpid():
            self._process.close()

    def load(self, path, *, row_id, name=None) -> Clip:
        """The clip at `path`, sampled by the settings. Raises VideoError that names `row_id` and `name` or the file."""
        if self._process.owner != os.getpid():  # forked: the process on the other end of the pipe is the parent's
            self._process.abandon()
            self._process = DecodeProcess()
        try:
            return self._load(os.path.realpath(path))
        except BadFile as error:
            raise VideoError(f"row {row_id!r}, video {os.fspath(name or path)!r}: {error}") from None

    def _load(self, path):
        status = check_file(path)
        key = cache_key(DECODING, path, status.st_size, status.st_mtime_ns, asdict(self.settings), self.backend)
        entry = None if self.cache is None else self.cache.get(key)
        if entry is not None:
            self.cache_hits += 1
            frames, metadata = entry
            return Clip(frames=frames, **metadata)
        container = recognise_container(path)
        with self._process.lock:
            clip = self._decode(path, container)
        self.decoded += 1
        after = os.stat(path)
        if self.cache is not None and (after.st_size, after.st_mtime_ns) == (status.st_size, status.st_mtime_ns):
            metadata = {name: value for name, value in vars(clip).items() if name != "frames"}
            self.cache.put(key, clip.frames, metadata)
        return clip

    def _decode(self, path, container):
        for last in (False, True):  # the first may have been killed for memory that others took
            try:
                return self._ask(path, container)
            except WorkerLost as error:
                if last or isinstance(error, WorkerHung):
                    raise BadFile(
                        f"the decoding process {error}{', twice' * last} (limit {self._limit_s:.0f} s): the file is "
                        "damaged, or needs a higher timeout_s or more memory; leave the row out if it happens again"
                    ) from None

    def _ask(self, path, container):
        probe = {"op": "probe", "path": path, "container": container, "threads": self.decode_threads}
        backends = ("decord", "pyav") if self.backend == "decord" else ("pyav",)
        errors = []
        self._process.start()
        started, to_read = time.monotonic(), os.stat(path).st_size / SLOWEST_BYTES
        self._limit_s = self.timeout_s + min(to_read, MOST_S)
        for backend in backends:
            reply, _ = self._process.request({**probe, "backend": backend}, deadline=started + self._limit_s)
            if reply["ok"]:
                source = reply
                indices, height, width = plan_frames(source, self.settings)
                to_decode = source["file_frames"] * source["height"] * source["width"] / SLOWEST_PIXELS
                self._limit_s = self.timeout_s + min(to_read + to_decode, MOST_S)
                decode = {"op": "decode", "indices": indices, "height": height, "width": width}
                reply, frames = self._process.request(decode, deadline=started + self._limit_s)
                if reply["ok"]:
                    return Clip(frames, source["fps"], source["total_num_frames"], indices, source["backend"])
            errors.append(f"{reply['backend']}: {reply['error']}")
            if reply["backend"] == "pyav":
                break
        raise BadFile(f"cannot be decoded ({'; '.join(errors)}); re-encode the file or leave the row out")
