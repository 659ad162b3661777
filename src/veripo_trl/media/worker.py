"""The process that decodes; its parent's end is process.py.

A decoder is native code that reads untrusted files: it may hang or crash. So it runs in a process of its own, started
with `subprocess` (data-loader workers are daemonic and may not have `multiprocessing` children), without torch, which
would cost seconds per start.

Protocol, over stdin and stdout: a request is one line of JSON. A reply is a 4-byte little-endian length, that many
bytes of JSON, and after a successful "decode" the raw uint8 frames. Requests:
  {"op": "probe", "path", "container", "backend", "threads", "timeout_s"}
      -> {"ok": true, "backend", "total_num_frames", "file_frames", "fps", "height", "width"} and keeps the
      file open
  {"op": "decode", "indices", "height", "width", "timeout_s"} -> {"ok": true, "shape": [T, H, W, 3]} and frames
      before it, once in PROGRESS_S: {"path", "decoded": frames so far, "of": frames to decode}
  a file that cannot be read -> {"ok": false, "backend", "error"}
"""

import bisect
import json
import os
import signal
import struct
import sys
import time

import numpy as np

from veripo_trl.media.frame_index import FrameIndex, Unreadable, decode, open_container, upright

FOUND = ("total_num_frames", "file_frames", "fps", "height", "width")
PROGRESS_S = 60.0


class DecordReader:
    backend = "decord"

    def __init__(self, index):
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self.index, self.error = index, decord.DECORDError
        try:
            self.reader = decord.VideoReader(index.path, num_threads=index.threads)
        except self.error as error:
            raise Unreadable(str(error)) from None
        if len(self.reader) != len(index.stamps):
            raise Unreadable(f"{len(self.reader)} frames instead of {len(index.stamps)}")

    def frames(self, indices):
        """Yield frames for sorted unique indices; a few at a time, which bounds the memory of large ones."""
        step = max(1, (64 << 20) // (self.index.height * self.index.width * 3))
        for start in range(0, len(indices), step):
            try:
                yield from self.reader.get_batch(indices[start : start + step]).asnumpy()
            except self.error as error:
                raise Unreadable(str(error)) from None


class PyavReader:
    backend = "pyav"

    def __init__(self, index):
        self.index = index

    def frames(self, indices):
        """Yield frames for sorted unique indices."""
        done = 0
        for keys in (self.index.keys, []):  # the second time, if a seek missed its frame, from the start without seeks
            with open_container(self.index.path, self.index.container) as opened:
                for frame in self._decode(opened, indices[done:], keys):
                    done += 1
                    yield frame
            if done == len(indices):
                return
        raise Unreadable(f"the frame with index {indices[done]} could not be decoded")

    def _decode(self, opened, indices, keys):
        """Yield what comes of `indices`, in order, and stop at the first that does not come."""
        position, decoded = -1, self._positions(opened)
        for index in indices:
            key = bisect.bisect_right(keys, (index, float("inf"))) - 1
            if key >= 0 and keys[key][0] > position + 1:
                opened.seek(keys[key][1], stream=opened.streams[self.index.stream], backward=True)
                decoded = self._positions(opened)
            position, frame = next(((at, frame) for at, frame in decoded if at >= index), (None, None))
            if position != index:
                return
            yield upright(frame)

    def _positions(self, opened):
        """Decoded frames with their index in display order, by time stamp, or by counting where there is none."""
        stamps = self.index.stamps
        for count, frame in enumerate(decode(opened, self.index)):
            if stamps is None:
                yield count, frame
            elif frame.pts is not None:
                at = bisect.bisect_left(stamps, frame.pts)
                if at < len(stamps) and stamps[at] == frame.pts:
                    yield at, frame


def open_reader(*, path, container, backend, threads):
    """A reader of the file: decord's if `backend` asks for it, decord can be trusted with it, and opens it."""
    index = FrameIndex(path, container, threads)
    if backend == "decord" and index.simple:
        try:
            return DecordReader(index)
        except Unreadable:
            pass
    return PyavReader(index)


def read_frames(reader, indices, *, height, width, send=None) -> np.ndarray:
    """Frames at `indices` of the clip (sorted), resized where needed: uint8 (T, height, width, 3). `send` is told of a
    long clip's progress."""
    from PIL import Image

    indices = reader.index.file_indices(indices)
    unique = sorted(set(indices))
    frames = np.empty((len(unique), height, width, 3), dtype=np.uint8)
    told = time.monotonic()
    for row, frame in enumerate(reader.frames(unique)):
        if send and time.monotonic() - told > PROGRESS_S:
            send({"path": reader.index.path, "decoded": row, "of": len(unique)})
            told = time.monotonic()
        if frame.shape[:2] != (height, width):  # Pillow's bicubic is antialiased, and one resize serves both decoders
            frame = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
        frames[row] = frame
    if len(unique) == len(indices):
        return frames
    return frames[np.searchsorted(unique, indices)]


def answer(request, reader, send):
    """Returns (reply, frames or None, reader kept open for the next request)."""
    if request["op"] == "decode":
        try:
            size = {"height": request["height"], "width": request["width"]}
            frames = read_frames(reader, request["indices"], **size, send=send)
        except (Unreadable, MemoryError) as error:
            return ({"ok": False, "backend": reader.backend, "error": str(error) or "out of memory"}, None, None)
        return {"ok": True, "shape": frames.shape}, frames, None
    try:
        reader = open_reader(**{name: request[name] for name in ("path", "container", "backend", "threads")})
    except (Unreadable, MemoryError) as error:
        return ({"ok": False, "backend": "pyav", "error": str(error) or "out of memory"}, None, None)
    found = {name: getattr(reader.index, name) for name in FOUND}
    return {"ok": True, "backend": reader.backend, **found}, None, reader


def main():
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's to handle; this process ends with its stdin
        signal.signal(number, signal.SIG_IGN)
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not mix with the frames
    import av
    import PIL.Image  # noqa: F401  imported before the first time limit starts

    av.logging.set_level(None)

    def send(reply, frames=None):
        text = json.dumps(reply).encode()
        for data in (struct.pack("<I", len(text)) + text, b"" if frames is None else frames.reshape(-1).data):
            view = memoryview(data)
            while len(view):
                view = view[output.write(view) :]

    send({"ok": True})
    reader = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # The parent kills at the deadline; should the parent be gone, this ends a hang (SIGALRM's default).
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + 5)
        reply, frames, reader = answer(request, reader, send)
        send(reply, frames)
        signal.setitimer(signal.ITIMER_REAL, 0)


def run():
    try:
        main()
    except BrokenPipeError:  # the parent is gone
        os._exit(0)
