"""The process that decodes; its parent's end is video_process.py.

A decoder is native code that reads untrusted files: it may hang or crash. So it runs in a process of its own, started
with `subprocess` (data-loader workers are daemonic and may not have `multiprocessing` children), without torch, which
would cost seconds per start.

Protocol, over stdin and stdout: a request is one line of JSON. A reply is a 4-byte little-endian length, that many
bytes of JSON, and after a successful "decode" the raw uint8 frames. Requests:
  {"op": "probe", "path", "container", "backend", "threads", "timeout_s"}
      -> {"ok": true, "backend", "total_num_frames", "fps", "height", "width"} and keeps the file open
  {"op": "decode", "indices", "height", "width", "timeout_s"} -> {"ok": true, "shape": [T, H, W, 3]} and frames
  a file that cannot be read -> {"ok": false, "backend", "error"}
"""

import bisect
import json
import os
import signal
import struct
import sys

import numpy as np


class Unreadable(Exception):
    """The file cannot be decoded; the text says why."""


class FrameIndex:
    """The frames of a stream in display order, by its packets: headers' counts are missing or wrong in many files.

    times: time stamps, or None where the container has none. keys: sorted (index, time to seek to) of the key frames
    that a seek finds. simple: decord can be trusted with it. decord 0.6.0 reads other frames than it was asked for,
    without an error, where pictures after a key frame are shown before it, in fragmented mp4, where an edit list
    leaves frames out, and in containers without an index (mpeg-ts, flv).
    """

    def __init__(self, opened, stream, container):
        packets, started, dropped = [], False, False
        for packet in opened.demux(stream):
            started = started or packet.is_keyframe
            if packet.size and started and not packet.is_discard:
                packets.append((packet.pts, packet.dts, packet.is_keyframe))
            elif packet.size:
                dropped = True
        self.fps = float(stream.average_rate or stream.guessed_rate or 0)
        self.total_num_frames = len(packets)
        self.times, self.keys, self.simple = None, [], False
        if not packets:
            raise Unreadable("the video stream has no frames")
        if None in {pts for pts, _, _ in packets} or len({pts for pts, _, _ in packets}) < len(packets):
            return
        # Pictures shown before the first key frame refer to frames that are not in the file.
        self.times = sorted(pts for pts, _, _ in packets if pts >= packets[0][0])
        self.total_num_frames = len(self.times)
        if container not in ("mov", "matroska"):
            return
        order = {pts: index for index, pts in enumerate(self.times)}
        at = [
            (place, order[pts], dts if container == "mov" else pts)
            for place, (pts, dts, key) in enumerate(packets)
            if key and pts in order
        ]
        self.keys = sorted((index, seek) for _, index, seek in at)
        counted = container != "mov" or stream.frames == len(packets)  # a fragmented mp4's header counts none
        self.simple = counted and not dropped and all(place == index for place, index, _ in at)


class DecordReader:
    backend = "decord"

    def __init__(self, path, index, threads):
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self.index, self.error = index, decord.DECORDError
        try:
            self.reader = decord.VideoReader(path, num_threads=threads)
            if len(self.reader) != index.total_num_frames:
                raise Unreadable(f"{len(self.reader)} frames instead of {index.total_num_frames}")
            # The first frame, not the header: decord turns frames by the file's rotation.
            self.height, self.width = self.reader[0].shape[:2]
        except self.error as error:
            raise Unreadable(str(error)) from None

    def frames(self, indices):
        """Yield frames for sorted unique indices; a few at a time, which bounds the memory of large ones."""
        step = max(1, (64 << 20) // (self.height * self.width * 3))
        for start in range(0, len(indices), step):
            try:
                yield from self.reader.get_batch(indices[start : start + step]).asnumpy()
            except self.error as error:
                raise Unreadable(str(error)) from None


class PyavReader:
    backend = "pyav"

    def __init__(self, path, container, index, threads):
        self.path, self.container, self.index, self.threads = path, container, index, threads
        (first,) = self.frames([0])
        self.height, self.width = first.shape[:2]

    def frames(self, indices):
        """Yield frames for sorted unique indices."""
        done = 0
        for keys in (self.index.keys, []):  # the second time, if a seek missed its frame, from the start without seeks
            with open_container(self.path, self.container) as opened:
                for frame in self._decode(opened, indices[done:], keys):
                    done += 1
                    yield frame
            if done == len(indices):
                return
        raise Unreadable(f"frame {indices[done]} of {self.index.total_num_frames} could not be decoded")

    def _decode(self, opened, indices, keys):
        """Yield what comes of `indices`, in order, and stop at the first that does not come."""
        import av

        stream = largest_video_stream(opened)
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = self.threads
        position, decoded = -1, self._positions(opened, stream)
        try:
            for index in indices:
                key = bisect.bisect_right(keys, (index, float("inf"))) - 1
                if key >= 0 and keys[key][0] > position + 1:
                    opened.seek(keys[key][1], stream=stream, backward=True)
                    decoded = self._positions(opened, stream)
                position, frame = next(((at, frame) for at, frame in decoded if at >= index), (None, None))
                if position != index:
                    return
                yield upright(frame)
        except av.FFmpegError as error:
            raise Unreadable(str(error)) from None

    def _positions(self, opened, stream):
        """Decoded frames with their index in display order, by time stamp, or by counting where there is none."""
        times = self.index.times
        for count, frame in enumerate(opened.decode(stream)):
            if times is None:
                yield count, frame
            elif frame.pts is not None:
                at = bisect.bisect_left(times, frame.pts)
                if at < len(times) and times[at] == frame.pts:
                    yield at, frame


def upright(frame) -> np.ndarray:
    """RGB of a PyAV frame, (H, W, 3), turned as its display matrix asks (degrees counter-clockwise)."""
    rgb = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb


def open_container(path, container):
    import av

    try:
        return av.open(path, format=container, metadata_errors="replace")
    except av.FFmpegError as error:
        raise Unreadable(str(error)) from None


def video_streams(opened) -> list:
    """The container's video streams without cover pictures."""
    from av.stream import Disposition

    cover = Disposition.attached_pic | Disposition.timed_thumbnails
    return [stream for stream in opened.streams.video if not stream.disposition & cover]


def largest_video_stream(opened):
    # max() keeps the first of equals
    return max(video_streams(opened), key=lambda stream: stream.codec_context.width * stream.codec_context.height)


def open_reader(path, *, container, backend, threads):
    """A reader of the file's largest video stream: decord's if `backend` asks for it and it can be trusted with it."""
    with open_container(path, container) as opened:
        if not video_streams(opened):
            kinds = sorted({stream.type for stream in opened.streams})
            raise Unreadable(f"no video stream (it has: {', '.join(kinds) or 'nothing'})")
        index = FrameIndex(opened, largest_video_stream(opened), container)
        alone = len(opened.streams.video) == 1  # of several, decord chooses by a rule of its own
    if backend == "decord" and alone and index.simple:
        return DecordReader(path, index, threads)
    return PyavReader(path, container, index, threads)


def read_frames(reader, indices, *, height, width) -> np.ndarray:
    """Frames at `indices` (sorted, repeats allowed), resized where needed: uint8 (T, height, width, 3)."""
    from PIL import Image

    unique = sorted(set(indices))
    frames = np.empty((len(unique), height, width, 3), dtype=np.uint8)
    for row, frame in enumerate(reader.frames(unique)):
        if frame.shape[:2] != (height, width):  # Pillow's bicubic is antialiased, and one resize serves both decoders
            frame = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
        frames[row] = frame
    if len(unique) == len(indices):
        return frames
    return frames[np.searchsorted(unique, indices)]


def answer(request, reader):
    """Returns (reply, frames or None, reader kept open for the next request)."""
    if request["op"] == "decode":
        try:
            frames = read_frames(reader, request["indices"], height=request["height"], width=request["width"])
        except (Unreadable, MemoryError) as error:
            return ({"ok": False, "backend": reader.backend, "error": str(error) or "out of memory"}, None, None)
        return {"ok": True, "shape": frames.shape}, frames, None
    path, backend = request["path"], request["backend"]
    try:
        reader = open_reader(path, container=request["container"], backend=backend, threads=request["threads"])
    except (Unreadable, MemoryError) as error:
        return ({"ok": False, "backend": backend, "error": str(error) or "out of memory"}, None, None)
    size = {"height": reader.height, "width": reader.width}
    found = {"total_num_frames": reader.index.total_num_frames, "fps": reader.index.fps}
    return {"ok": True, "backend": reader.backend, **found, **size}, None, reader


def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; this process ends with its stdin
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
        reply, frames, reader = answer(request, reader)
        send(reply, frames)
        signal.setitimer(signal.ITIMER_REAL, 0)


def run():
    try:
        main()
    except BrokenPipeError:  # the parent is gone
        os._exit(0)
