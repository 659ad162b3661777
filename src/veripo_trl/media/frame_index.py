"""Which frames a file shows, and when, by its packets; opening, demuxing and decoding it with PyAV."""

from collections import namedtuple
from contextlib import contextmanager
from itertools import islice

import numpy as np

MAX_FRAME_PIXELS = 8192 * 4352  # the largest frame of H.264 and HEVC up to level 6.2
VARIABLE_FPS = 1000.0
MAX_STEP_S = 10.0  # in mpeg-ts: a longer one is a break in the time stamps, as it is for FFmpeg


class Unreadable(Exception):
    """The file cannot be decoded; the text says why."""


Packet = namedtuple("Packet", "pts dts duration key discard")


class FrameIndex:
    """The frames that a player shows, in display order, by the file's packets: headers are wrong in many files.

    stream: index of the video stream. file_frames: how many frames it shows. height, width: of upright frames. stamps:
    sorted time stamps of the frames, or None where frames can only be counted. keys: sorted (index, time to seek to) of
    the key frames that a seek finds.
    simple: decord can be trusted with it. decord 0.6.0 gives other frames than it was asked for, without an error,
    where pictures after a key frame are shown before it, in fragmented mp4, where an edit list leaves frames out, and
    in containers without an index (mpeg-ts, flv); of several streams it chooses by a rule of its own; it mirrors no
    frames, and turns them in mp4 alone.

    total_num_frames, fps: of the clip to sample from. At a constant rate (to half a frame) these are the file's. At a
    variable one the clip is what a player shows, every 1 / VARIABLE_FPS s; `file_indices` says which frame that is.
    """

    def __init__(self, path, container, threads):
        self.path, self.container, self.threads = path, container, threads
        with open_container(path, container) as opened:
            stream, packets = read_packets(opened, container)
            self.stream, time_base = stream.index, float(stream.time_base)
            header_fps = float(stream.average_rate or stream.guessed_rate or 0)
            reorders = stream.codec_context.has_b_frames
            whole = container != "mov" or stream.frames == len(packets)  # a fragmented mp4's header counts none
            alone = len(opened.streams.video) == 1
        stamps = [packet.pts for packet in packets]
        with open_container(path, container) as opened:
            frames = decode(opened, self)
            if (first := next(frames, None)) is None:
                raise Unreadable("the video stream has no frames")
            decoded = [first.pts]
            trusted = first.pts in stamps and None not in stamps and len(set(stamps)) == len(stamps)
            trusted = trusted and in_order([packet.dts for packet in packets if packet.dts is not None])
            if trusted and reorders and in_order(stamps):  # perhaps times of decoding, the only ones in AVI
                decoded += [frame.pts for frame in islice(frames, 16)]
                trusted = in_order(decoded)
            if trusted:
                # A player begins with what its decoder gives first: what would be shown before refers to frames that
                # are not in the file, or an edit list hides it.
                shown = sorted(pkt.pts for pkt in packets if pkt.pts >= first.pts and not pkt.discard)
            else:
                shown = decoded + [frame.pts for frame in frames]
        self.stamps, self.keys, self.simple = shown if trusted else None, [], False
        self.file_frames = len(shown)
        self.height, self.width = upright(first).shape[:2]
        self._set_times(shown, packets, time_base, header_fps)
        if trusted and container in ("mov", "matroska"):
            order = {pts: index for index, pts in enumerate(shown)}
            at = [
                (place, order[packet.pts], packet.dts if container == "mov" else packet.pts)
                for place, packet in enumerate(packets)
                if packet.key and packet.pts in order
            ]
            self.keys = sorted((index, seek) for _, index, seek in at)
            a, b, c, d = display_matrix(first)
            plain = a == d == 1 or (container == "mov" and a * d > b * c)
            whole = whole and len(shown) == len(packets) and packets[0].key
            self.simple = alone and whole and plain and all(place == index for place, index, _ in at)

    def _set_times(self, shown, packets, time_base, header_fps):
        """Take the rate from the time stamps of the frames, or of decoding, or else from the header."""
        self.total_num_frames, self.fps, self._begins_ms = len(shown), header_fps, None
        for stamps in (shown, [packet.dts for packet in packets]):
            if len(stamps) == len(shown) and None not in stamps:
                seconds = (np.array(stamps) - stamps[0]) * time_base
                steps = np.diff(seconds)
                if (steps > 0).all() and not (self.container == "mpegts" and (steps > MAX_STEP_S).any()):
                    break
        else:
            return
        in_mov = self.container == "mov"  # which has the durations in order of decoding
        last = next((packet for packet in packets if packet.pts == shown[-1] and not in_mov), packets[-1])
        end = seconds[-1] + ((last.duration or 0) * time_base or (steps.mean() if len(steps) else 0))
        for fps in (header_fps, len(steps) / seconds[-1] if len(steps) else 0):
            if fps and end * fps <= len(shown) + 1 and abs(seconds * fps - np.arange(len(shown))).max() <= 0.5:
                self.fps = fps
                return
        self._begins_ms = (seconds * 1000).round()
        self.total_num_frames, self.fps = max(round(end * VARIABLE_FPS), 1), VARIABLE_FPS

    def file_indices(self, indices):
        """Which of the file's frames are shown at `indices` of the clip."""
        if self._begins_ms is None:
            return indices
        return (np.searchsorted(self._begins_ms, indices, side="right") - 1).tolist()


def read_packets(opened, container):
    """The video stream to read, the largest that is more than a still picture, and its packets in decoding order."""
    from av.stream import Disposition

    cover = Disposition.attached_pic | Disposition.timed_thumbnails
    videos = [stream for stream in opened.streams.video if stream.codec_context and not stream.disposition & cover]
    if not videos:
        kinds = sorted({stream.type if stream.codec_context else "unknown codec" for stream in opened.streams})
        raise Unreadable(f"no video stream (it has: {', '.join(kinds) or 'nothing'})")
    packets, ends_s = {stream.index: [] for stream in videos}, [0.0]
    for packet in demux(opened, opened.streams if container in ("flv", "matroska") else videos):
        if not packet.size:
            continue
        if packet.pts is not None:
            ends_s.append((packet.pts + (packet.duration or 0)) * float(packet.time_base))
        if packet.stream_index in packets:
            fields = packet.pts, packet.dts, packet.duration, packet.is_keyframe, packet.is_discard
            packets[packet.stream_index].append(Packet(*fields))

    def area(stream):
        return stream.codec_context.width * stream.codec_context.height

    # max() keeps the first of equals
    stream = max(videos, key=lambda stream: (len(packets[stream.index]) > 1, area(stream)))
    if area(stream) > MAX_FRAME_PIXELS:
        size = f"{stream.codec_context.width} x {stream.codec_context.height} pixels"
        raise Unreadable(f"{size}, over {MAX_FRAME_PIXELS}: make it smaller")
    # An interrupted flv ends between two tags, a fragmented mp4 between fragments; zeros in a mkv or webm are skipped.
    duration_s = 0.0
    if container in ("flv", "matroska"):
        duration_s = (opened.duration or 0) / 1e6
    elif container == "mov" and stream.frames != len(packets[stream.index]):
        duration_s = float((stream.duration or 0) * stream.time_base)
    ends_s = np.sort(ends_s)  # the last frame may be as long as any other
    if ends_s[-1] + np.diff(ends_s).max(initial=1.0) + 0.5 < duration_s:
        raise Unreadable(f"truncated: {duration_s:.1f} s long by its header, its last frame ends at {ends_s[-1]:.1f} s")
    return stream, packets[stream.index]


def in_order(stamps) -> bool:
    return None not in stamps and stamps == sorted(stamps)


def display_matrix(frame) -> tuple[int, int, int, int]:
    """How a frame is to be turned and mirrored: (a, b, c, d), each -1, 0 or 1; (x, y) goes to (ax + cy, bx + dy)."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV cannot read it beside kinds that it does not know, as EXIF; it has the angle
        return [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)][round(frame.rotation / 90) % 4]
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(data, dtype=np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):  # angles between are rounded to quarter turns
        return -1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1
    return 0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0


def upright(frame) -> np.ndarray:
    """RGB of a PyAV frame, (H, W, 3), turned and mirrored as its display matrix asks."""
    rgb, (a, b, c, d) = frame.to_ndarray(format="rgb24"), display_matrix(frame)
    if b:
        rgb = rgb.transpose(1, 0, 2)
    return np.ascontiguousarray(rgb[:: b + d, :: a + c])


@contextmanager
def open_container(path, container):
    """The opened file, whose errors are Unreadable."""
    import av

    try:  # the option bounds what FFmpeg decodes while it opens the file
        with av.open(
            path, format=container, metadata_errors="replace", options={"max_pixels": str(MAX_FRAME_PIXELS)}
        ) as opened:
            yield opened
    except av.ArgumentError as error:  # what decoders say of too large a frame
        raise Unreadable(f"{error}; its frames may be over {MAX_FRAME_PIXELS} pixels") from None
    except av.FFmpegError as error:
        raise Unreadable(str(error)) from None


def demux(opened, streams):
    """Packets of `streams`, the last ones empty."""
    try:
        yield from opened.demux(*streams)
    except IndexError:  # PyAV's, when all is read, if the file has streams that began later
        return


def decode(opened, index):
    """Frames of the indexed stream, from where the opened file is."""
    stream = opened.streams[index.stream]
    if not stream.codec_context.is_open:
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = index.threads
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    for packet in demux(opened, [stream]):
        yield from packet.decode()
