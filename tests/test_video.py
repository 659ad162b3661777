"""Video and image loading: sampling, sizes, decoders, bad files, the decoding process and the frame cache.

Every clip is made here; the brightness of a frame tells its number.
"""

import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import struct
import sys
import threading
import time
import warnings
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import X265, add_stream, make_clip, picture
from PIL import Image

from veripo_trl.media import worker as video_worker
from veripo_trl.media.containers import BadFile, recognise_container
from veripo_trl.media.frame_cache import FrameCache
from veripo_trl.media.images import load_image
from veripo_trl.media.process import DecodeProcess, DecoderError
from veripo_trl.media.sampling import VideoSettings, plan_frames
from veripo_trl.media.video import Clip, MediaError, VideoError, VideoLoader

SMALL = VideoSettings(fps=2.0, min_frames=4, max_frames=8, min_pixels=28 * 28, max_pixels=56 * 56)


def numbers(clip):
    """Frame numbers read back from the brightness at the right edge, which has no corner marks."""
    height, width = clip.frames.shape[1:3]
    grey = clip.frames[:, height // 3 : 2 * height // 3, 2 * width // 3 :].mean(axis=(1, 2, 3))
    return np.round((grey - 30) / 4).astype(int).tolist()


@pytest.fixture(scope="module")
def decode_process():
    process = DecodeProcess()
    yield process
    process.close()


@pytest.fixture
def load(decode_process):
    """Loads one clip, with a decoding process that the tests share, because each takes a second to start."""

    def load(path, settings=SMALL, *, row_id="q1", **kwargs):
        loader = VideoLoader(settings, **kwargs)
        loader._process = decode_process
        return loader.load(path, row_id=row_id)

    return load


SAMPLING = [
    # frames, fps of the source, changed settings, indices
    (32, 8, {}, [0, 4, 9, 13, 18, 22, 27, 31]),  # 4 s at 2 fps
    (32, 8, {"fps": 1.0}, [0, 10, 21, 31]),
    (32, 8, {"fps": 0.25}, [0, 10, 21, 31]),  # min_frames
    (32, 8, {"fps": 8.0, "max_frames": 6}, [0, 6, 12, 19, 25, 31]),  # max_frames
    (32, 8, {"max_frames": 7}, [0, 6, 12, 19, 25, 31]),  # even, never over the maximum
    (32, 8, {"min_frames": 5, "fps": 0.25}, [0, 6, 12, 19, 25, 31]),  # even, never under the minimum
    (28, 8, {}, [0, 5, 11, 16, 22, 27]),  # 3.5 s: 7 frames, rounded down
    (5, 8, {}, [0, 1, 3, 4]),
    (3, 8, {}, [0, 2]),  # fewer than min_frames: what it has, even
    (2, 8, {}, [0, 1]),
    (1, 8, {}, [0, 0]),  # a single frame: twice
]


@pytest.mark.parametrize("frames, fps, changes, indices", SAMPLING)
def test_sampling(frames, fps, changes, indices):
    source = {"total_num_frames": frames, "fps": float(fps), "height": 56, "width": 56}
    assert plan_frames(source, replace(SMALL, **changes)) == (indices, 56, 56)


@pytest.mark.parametrize("backend", ["decord", "pyav"])
@pytest.mark.parametrize("frames", [32, 5, 3, 1])
def test_the_planned_frames_are_the_ones_decoded(tmp_path, load, backend, frames):
    clip = load(make_clip(tmp_path / "clip.mp4", frames=frames), backend=backend)
    assert clip.frames.dtype == np.uint8 and clip.frames.shape == (len(clip.frames_indices), 56, 56, 3)
    assert len(clip.frames) % 2 == 0
    assert numbers(clip) == clip.frames_indices
    assert (clip.fps, clip.total_num_frames, clip.backend) == (8.0, frames, backend)


SIZES = [
    # height, width, changed settings, height and width out
    (56, 56, {}, (56, 56)),
    (270, 480, {"max_pixels": 128 * 28 * 28}, (224, 420)),
    (270, 480, {"max_pixels": 128 * 32 * 32, "size_factor": 32}, (256, 480)),
    (270, 480, {}, (28, 56)),
    (20, 20, {"min_pixels": 56 * 56}, (56, 56)),
    (40, 2000, {}, (28, 392)),  # the short side keeps one factor
]


@pytest.mark.parametrize("height, width, changes, expected", SIZES)
def test_size_limits_are_per_frame(height, width, changes, expected):
    source = {"total_num_frames": 32, "fps": 8.0, "height": height, "width": width}
    settings = replace(SMALL, **changes)
    assert plan_frames(source, settings)[1:] == expected
    assert plan_frames(source, replace(settings, max_frames=4))[1:] == expected


@pytest.mark.parametrize(
    "source, message",
    [({"fps": 0.0}, "frame rate"), ({"width": 57_000}, "aspect ratio"), ({"fps": float("nan")}, "frame rate")],
)
def test_sources_without_a_plan(source, message):
    with pytest.raises(BadFile, match=message):
        plan_frames({"total_num_frames": 32, "fps": 8.0, "height": 56, "width": 56, **source}, SMALL)


@pytest.mark.parametrize(
    "changes", [{"fps": 0}, {"min_frames": 9}, {"min_frames": 7, "max_frames": 7}, {"max_frames": 1}]
    + [{"min_pixels": 10**6}, {"size_factor": 100}]
)  # fmt: skip
def test_settings_that_cannot_hold(changes):
    with pytest.raises(ValueError, match="expected|must be"):
        replace(SMALL, **changes)


@pytest.mark.parametrize("width, height, size", [(320, 180, (84, 140)), (57, 57, (56, 56))])
def test_both_decoders_give_the_same_frames(tmp_path, load, width, height, size):
    path = make_clip(tmp_path / "clip.mp4", width=width - width % 2, height=height - height % 2)
    settings = replace(SMALL, max_pixels=20 * 28 * 28)
    ours, theirs = load(path, settings), load(path, settings, backend="pyav")
    assert (ours.backend, theirs.backend) == ("decord", "pyav")
    assert ours.frames.shape == theirs.frames.shape == (8, *size, 3)
    assert np.abs(ours.frames.astype(int) - theirs.frames).mean() < 1.5
    assert ours.frames_indices == theirs.frames_indices


@pytest.mark.parametrize("backend", ["decord", "pyav"])
@pytest.mark.parametrize("gop", ["1", "5", "250"])
def test_frames_between_key_frames(tmp_path, load, backend, gop):
    path = make_clip(tmp_path / "clip.mp4", frames=50, options={"crf": "10", "g": gop, "bf": "2"})
    assert numbers(load(path, backend=backend)) == [0, 7, 14, 21, 28, 35, 42, 49]


CODECS = [
    # file name, codec, container, decoder that reads it
    ("clip.mp4", "libx264", "mov", "decord"),
    ("clip.mov", "mpeg4", "mov", "decord"),
    ("clip.mkv", "libx264", "matroska", "decord"),
    ("clip.webm", "libvpx-vp9", "matroska", "decord"),
    ("clip.avi", "mpeg4", "avi", "pyav"),
    ("h264.avi", "libx264", "avi", "pyav"),  # with B-frames, of which AVI says only when they are decoded
    ("clip.ts", "libx264", "mpegts", "pyav"),
    ("clip.flv", "flv", "flv", "pyav"),
    ("h264.flv", "libx264", "flv", "pyav"),
    ("av1.mp4", "libsvtav1", "mov", "pyav"),  # decord cannot read AV1
    ("av1.webm", "libsvtav1", "matroska", "pyav"),
]


@pytest.mark.parametrize("name, codec, container, decoder", CODECS)
def test_containers_and_the_decoder_that_reads_them(tmp_path, load, name, codec, container, decoder):
    path = make_clip(tmp_path / name, codec=codec)
    assert recognise_container(path) == container
    for backend in ("decord", "pyav"):
        clip = load(path, backend=backend)
        assert clip.backend == (decoder if backend == "decord" else "pyav")
        assert clip.total_num_frames == 32 and clip.fps == pytest.approx(8.0)
        assert np.abs(np.array(numbers(clip)) - clip.frames_indices).max() <= 1  # lossy codecs shift the brightness


OPEN_GOP = {"crf": "10", "x264-params": "keyint=12:open-gop=1:bframes=3:scenecut=0"}


def copy_packets(path, name, *, start_s):
    """Copy packets without decoding, as cutting tools do.

    They begin at the key frame before `start_s`: an edit list hides what lies between in mp4, nothing does in mkv.
    """
    with av.open(str(path)) as source, av.open(str(path.with_name(name)), "w") as output:
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        shift = round(start_s / stream.time_base)
        source.seek(shift, stream=stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                output.mux(packet)
    return path.with_name(name)


GROUP = "keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0:crf=4"
GROUPS = {
    # codec and options; the first frame that is shown of a cut at frame 15 in mkv
    "H.264": ("libx264", {"x264-params": GROUP}, 12),
    "H.264, open": ("libx264", {"x264-params": f"{GROUP}:open-gop=1"}, 12),
    "HEVC": ("libx265", {"x265-params": f"{X265}:{GROUP}:open-gop=0"}, 12),
    "HEVC, open": ("libx265", {"x265-params": f"{X265}:{GROUP}"}, 12),
    "HEVC, leading pictures": ("libx265", {"x265-params": f"{X265}:{GROUP}:open-gop=0:radl=2"}, 10),
}


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("name", GROUPS)
def test_cuts_without_decoding_begin_where_a_player_does(tmp_path, load, name, suffix):
    codec, options, first_in_mkv = GROUPS[name]
    path = make_clip(tmp_path / "clip.mp4", codec=codec, options=options, frames=48)
    for cut in (13, 14, 15, 16, 19) if suffix == "mp4" else (15,):
        first = cut if suffix == "mp4" else first_in_mkv
        clip = load(copy_packets(path, f"cut.{suffix}", start_s=cut / 8), replace(SMALL, fps=8.0, max_frames=64))
        assert (numbers(clip)[0], clip.fps, clip.total_num_frames) == (first, 8.0, 48 - first)
        assert np.abs(np.array(numbers(clip)) - first - clip.frames_indices).max() <= 1  # lossy codecs


def joined(path):
    parts = [make_clip(path, times_s=[start_s + n / 8 for n in range(25)]).read_bytes() for start_s in (5, 3.9)]
    path.write_bytes(b"".join(parts))
    return path


def late_stream(path):
    """An flv whose last tag is a text, of which its header says nothing."""
    body = b"\x02\0\x0aonTextData\x08\0\0\0\1\0\4text\x02\0\2hi\0\0\x09"
    tag = struct.pack(">BHBIBH", 18, 0, len(body), 0, 0, 0) + body
    path.write_bytes(make_clip(path, frames=50).read_bytes() + tag + struct.pack(">I", len(tag)))
    return path


def hidden_end(path):
    data = bytearray(make_clip(path, frames=55).read_bytes())
    at = data.index(b"elst") + 12
    data[at : at + 4] = struct.pack(">I", 50 * 1000 // 8)
    path.write_bytes(data)
    return path


def without_display_times(path):
    """An mp4 of a writer that knew only the times of decoding."""
    make_clip(path, frames=50)
    path.write_bytes(path.read_bytes().replace(b"ctts", b"free").replace(b"edts", b"free"))
    return path


MISREAD_BY_DECORD = {
    # decord 0.6.0 gives other frames than asked for, without an error; so these must go to PyAV
    "open groups in mp4": (lambda path: make_clip(path / "c.mp4", frames=50, options=OPEN_GOP), range(50)),
    "open groups in mkv": (lambda path: make_clip(path / "c.mkv", frames=50, options=OPEN_GOP), range(50)),
    "fragmented": (lambda path: make_clip(path / "c.mp4", frames=50, flags="frag_keyframe+empty_moov"), range(50)),
    "a stream that begins late": (lambda path: late_stream(path / "c.flv"), range(50)),
    "an edit that ends early": (lambda path: hidden_end(path / "c.mp4"), range(50)),
    "mpeg-ts": (lambda path: make_clip(path / "c.ts", frames=50), range(50)),
    "times that jump back": (lambda path: joined(path / "c.ts"), [*range(25), *range(25)]),
    "times that jump ahead": (
        lambda path: make_clip(path / "c.ts", times_s=[number / 8 + 1000 * (number > 24) for number in range(50)]),
        range(50),
    ),
    "times of decoding": (lambda path: without_display_times(path / "c.mp4"), range(50)),
}


@pytest.mark.parametrize("name", MISREAD_BY_DECORD)
@pytest.mark.parametrize("settings", [SMALL, replace(SMALL, fps=8.0, max_frames=50)])
def test_files_that_decord_misreads(tmp_path, load, name, settings):
    make, shown = MISREAD_BY_DECORD[name]
    clip = load(make(tmp_path), settings)
    assert (clip.total_num_frames, clip.fps, clip.backend) == (50, 8.0, "pyav")
    assert numbers(clip) == [shown[index] for index in clip.frames_indices]


SLIDES_S = [0, 0.1, 0.2, 3, 3.05, 7, 7.5, 9]
VARIABLE = ["c.mkv libx264", "c.webm libvpx-vp9", "c.mp4 libx264", "c.mov libx265", "c.ts libx264", "c.flv libx264"]


@pytest.mark.parametrize("name", VARIABLE)
@pytest.mark.parametrize("fps", [2.0, 20.0])
def test_a_variable_rate_is_sampled_by_time(tmp_path, load, name, fps):
    name, codec = name.split()
    path = make_clip(tmp_path / name, codec=codec, times_s=[5 + time_s for time_s in SLIDES_S], fps=30)
    clip = load(path, replace(SMALL, fps=fps, max_frames=256))
    times_s = np.array(clip.frames_indices) / clip.fps
    duration_s = clip.total_num_frames / clip.fps
    assert 9 < duration_s < 10.3 and abs(len(clip.frames) - fps * duration_s) <= 2  # the last frame's own time differs
    assert np.abs(np.diff(times_s) - 1 / fps).max() < 0.1 / fps
    assert numbers(clip) == [sum(begin_s <= time_s for begin_s in SLIDES_S) - 1 for time_s in times_s]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_last_frame_counts_as_long_as_it_is_shown(tmp_path, load, suffix):
    with av.open(str(tmp_path / f"c.{suffix}"), "w") as output:
        stream = add_stream(output, "libx264", width=56, height=56, fps=8, options={"crf": "10"})
        packets = [packet for number in range(17) for packet in stream.encode(picture(number, width=56, height=56))]
        packets += stream.encode()
        last = packets[-1] if suffix == "mp4" else max(packets, key=lambda packet: packet.pts)
        last.duration = int(5 / last.time_base)
        output.mux(packets)
    clip = load(tmp_path / f"c.{suffix}", replace(SMALL, max_frames=64))
    assert clip.total_num_frames / clip.fps == pytest.approx(7, abs=0.01)
    assert numbers(clip) == [0, 4, 8, 12] + [16] * 10


@pytest.mark.parametrize("name", ["c.mkv", "c.mp4"])
def test_a_clip_shorter_than_its_sound(tmp_path, load, name):
    with av.open(str(tmp_path / name), "w", options={"movflags": "frag_keyframe"} if name == "c.mp4" else {}) as output:
        video = add_stream(output, "libx264", width=56, height=56, fps=8, options={"crf": "10"})
        sound = output.add_stream("aac", rate=16000)
        for number in range(17):
            output.mux(video.encode(picture(number, width=56, height=56)))
        output.mux(video.encode())
        for number in range(160):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, number * 1024
            output.mux(sound.encode(frame))
        output.mux(sound.encode())
    assert load(tmp_path / name).total_num_frames == 17


def test_a_slow_flv_is_not_taken_for_a_cut_one(tmp_path, load):
    clip = load(make_clip(tmp_path / "c.flv", codec="flv", times_s=range(0, 40, 4), fps=Fraction(1, 4)))
    assert (clip.fps, clip.total_num_frames) == (0.25, 10)


@pytest.mark.parametrize("name", VARIABLE)
def test_a_headers_rate_is_not_believed(tmp_path, load, name):
    name, codec = name.split()
    clip = load(make_clip(tmp_path / name, codec=codec, times_s=range(20), fps=30), replace(SMALL, max_frames=64))
    assert (clip.fps, clip.total_num_frames, numbers(clip)) == (1.0, 20, list(range(20)))


def test_a_broadcast_that_starts_between_key_frames(tmp_path, load):
    path = make_clip(tmp_path / "clip.ts", frames=50, options={"crf": "10", "g": "12"})
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 3 // 188 * 188 :])
    shown = numbers(load(path))
    assert shown[-1] == 49 and shown[0] > 0 and shown == sorted(set(shown))


def test_m2ts_is_recognised(tmp_path, load):
    path = make_clip(tmp_path / "clip.ts", options={"crf": "10"})
    packets = path.read_bytes()
    path.write_bytes(b"".join(bytes(4) + packets[i : i + 188] for i in range(0, len(packets), 188)))
    assert recognise_container(path) == "mpegts"
    assert load(path, backend="pyav").total_num_frames == 32


@pytest.mark.parametrize("large_first", [True, False])
@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_the_largest_of_two_streams_beside_a_still_picture(tmp_path, load, backend, large_first):
    path, sizes = tmp_path / "two.mp4", [(112, 84), (56, 56)]
    with av.open(str(path), "w") as output:
        streams = [
            add_stream(output, "libx264", width=width, height=height, fps=8, options={})
            for width, height in (sizes if large_first else sizes[::-1])
        ]
        cover = add_stream(output, "mjpeg", width=168, height=112, fps=8, options={})  # not marked as a picture
        cover.pix_fmt = "yuvj420p"
        for number in range(16):
            for stream in [*streams, *([cover] if number == 0 else [])]:
                output.mux(stream.encode(picture(number, width=stream.width, height=stream.height)))
        for stream in [*streams, cover]:
            output.mux(stream.encode())
    clip = load(path, replace(SMALL, max_pixels=112 * 84), backend=backend)
    assert clip.frames.shape[1:3] == (84, 112) and clip.backend == "pyav"


MATRICES = {
    # (a, b, c, d) of the header, and what it does to a picture
    "turned by 90": ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
    "turned by 180": ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
    "turned by 270": ((0, -1, 1, 0), lambda frame: np.rot90(frame)),
    "hflip": ((-1, 0, 0, 1), np.fliplr),
    "vflip": ((1, 0, 0, -1), np.flipud),
    "transpose": ((0, 1, 1, 0), lambda frame: frame.swapaxes(0, 1)),
    "transverse": ((0, -1, -1, 0), lambda frame: np.rot90(frame.swapaxes(0, 1), 2)),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_turned_and_mirrored_frames_are_upright(tmp_path, load, name, suffix):
    (a, b, c, d), turn = MATRICES[name]
    matrix = [*(value << 16 for value in (a, b, 0, c, d, 0, 0, 0)), 1 << 30]
    path = make_clip(tmp_path / f"clip.{suffix}", width=112, height=56, matrix=matrix)
    expected = turn(picture(0, width=112, height=56).to_ndarray(format="rgb24"))
    for backend in ("decord", "pyav"):  # decord turns mp4, and nothing else
        clip = load(path, replace(SMALL, max_pixels=112 * 56), backend=backend)
        assert clip.backend == (backend if suffix == "mp4" and "turned" in name else "pyav")
        assert clip.frames[0].shape == expected.shape
        assert np.abs(clip.frames[0].astype(int) - expected).mean() < 4


def test_a_cameras_motion_jpeg_is_turned_by_its_exif(tmp_path, load):
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    pixels = picture(0, width=112, height=56).to_ndarray(format="rgb24")
    Image.fromarray(pixels).save(data, "JPEG", exif=exif, quality=95)
    with av.open(str(tmp_path / "clip.mkv"), "w") as output:
        stream = add_stream(output, "mjpeg", width=112, height=56, fps=8, options={})
        stream.pix_fmt = "yuvj420p"
        output.start_encoding()
        for number in range(8):
            packet = av.Packet(data.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 8)
            output.mux(packet)
    clip = load(tmp_path / "clip.mkv", replace(SMALL, max_pixels=112 * 56))
    assert clip.frames[0].shape == (112, 56, 3) and np.abs(clip.frames[0] - np.rot90(pixels, -1).astype(int)).mean() < 4


# ---- bad files ----


def truncated(name="c.mp4", codec="libx264", flags=None):
    def write(path):
        data = make_clip(path.with_name(name), codec=codec, flags=flags).read_bytes()
        path.write_bytes(data[: len(data) // 2 + 1])

    return write


def cut_between_tags(path):
    data, end = make_clip(path.with_name("c.flv")).read_bytes(), 13
    while end < len(data) // 2:
        end += 15 + int.from_bytes(data[end + 1 : end + 4], "big")
    path.write_bytes(data[:end])


def zeros(name, codec, start, end):
    """A clip with zeros between two places of its file, in shares of its length."""

    def write(path):
        data = bytearray(make_clip(path.with_name(name), codec=codec).read_bytes())
        start_at, end_at = round(start * len(data)), round(end * len(data))
        data[start_at:end_at] = bytes(end_at - start_at)
        path.write_bytes(data)

    return write


def cut_between_fragments(path):
    data = make_clip(path.with_name("c.mp4"), frames=40, flags="dash+global_sidx", options={"g": "8"}).read_bytes()
    starts = [match.start() - 4 for match in re.finditer(b"moof", data)]
    path.write_bytes(data[: starts[len(starts) // 2]])


def huge(path):
    with av.open(str(path), "w") as output:
        stream = add_stream(output, "libx264", width=9000, height=4000, fps=8, options={"preset": "ultrafast"})
        output.mux(stream.encode(av.VideoFrame(9000, 4000, "yuv420p")))
        output.mux(stream.encode())


def cut_fast_start(path):
    data = make_clip(path, flags="faststart").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    path.write_bytes(data[:-200])


def unknown_codec(path):
    path.write_bytes(make_clip(path).read_bytes().replace(b"avc1", b"zzzz"))


def audio_only(path):
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())


def zero_frames(path):
    with av.open(str(path), "w") as output:
        add_stream(output, "mpeg4", width=56, height=56, fps=8, options={})
        output.start_encoding()


def playlist(text):
    def write(path):
        make_clip(path.with_name("secret.ts"), options={"crf": "10"})
        path.write_text(text)

    return write


def heic(path):
    Image.new("RGB", (64, 64)).save(path, format="AVIF")
    path.write_bytes(path.read_bytes().replace(b"avif", b"heic"))


BAD_FILES = {
    "missing": (lambda path: None, "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "AVIF": (lambda path: Image.new("RGB", (64, 64)).save(path, format="AVIF"), "is a still image .HEIC or AVIF"),
    "HEIC": (heic, "is a still image .HEIC or AVIF"),
    "PNG": (lambda path: Image.new("RGB", (64, 64)).save(path, format="PNG"), "is an image"),
    "directory": (lambda path: path.mkdir(), "directory"),
    "named pipe": (lambda path: os.mkfifo(path), "not a regular file"),
    "truncated": (truncated(), "truncated mp4"),
    "truncated mkv": (truncated("c.mkv"), "truncated mkv or webm"),
    "truncated webm": (truncated("c.webm", "libvpx-vp9"), "truncated mkv or webm"),
    "truncated live webm": (truncated("c.webm", "libvpx-vp9", {"live": "1"}), "truncated mkv or webm"),
    "truncated avi": (truncated("c.avi", "mpeg4"), "truncated avi"),
    "truncated mpeg-ts": (truncated("c.ts"), "truncated mpeg-ts"),
    "truncated flv": (truncated("c.flv"), "truncated flv"),
    "flv cut between tags": (cut_between_tags, "truncated: 4.* s long by its header"),
    "mkv that ends in zeros": (zeros("c.mkv", "libx264", 0.5, 1), "truncated: 4.* s long by its header"),
    "webm with zeros inside": (zeros("c.webm", "libvpx-vp9", 0.4, 0.8), "truncated: 4.* s long by its header"),
    "mp4 cut between fragments": (cut_between_fragments, "truncated: 5.* s long by its header"),
    "huge frames": (huge, "9000 x 4000 pixels, over 35651584"),
    "cut after the header": (cut_fast_start, "truncated"),
    "audio only": (audio_only, r"no video stream \(it has: audio\)"),
    "unknown codec": (unknown_codec, r"no video stream \(it has: unknown codec\)"),
    "zero frames": (zero_frames, "no frames|no video stream"),
    "text": (lambda path: path.write_text("not a video\n" * 100), "text file"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 40), "no container"),
    "header and noise": (lambda path: path.write_bytes(b"\x1a\x45\xdf\xa3" + bytes(4000)), "cannot be decoded"),
    "HLS": (playlist("#EXTM3U\n#EXTINF:4,\nsecret.ts\n#EXT-X-ENDLIST\n"), "playlist"),
    "HLS after a mark": (playlist("\ufeff\n#EXTM3U\n#EXTINF:4,\nsecret.ts\n"), "playlist"),
    "concat": (playlist("ffconcat version 1.0\nfile secret.ts\n"), "playlist"),
}


@pytest.mark.parametrize("backend", ["decord", "pyav"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, load, name, backend):
    write, message = BAD_FILES[name]
    path = tmp_path / "bad.mp4"
    write(path)
    with pytest.raises(VideoError, match=message) as error:
        load(path, row_id="row-7", backend=backend)
    assert "'row-7'" in str(error.value) and "bad.mp4" in str(error.value)


def test_an_unreadable_file_keeps_the_decoding_process(tmp_path):
    (tmp_path / "bad.mkv").write_bytes(b"\x1a\x45\xdf\xa3" + bytes(4000))
    loader = VideoLoader(SMALL)
    good = make_clip(tmp_path / "good.mp4")
    loader.load(good, row_id=1)
    pid = loader.worker_pid
    with pytest.raises(VideoError):
        loader.load(tmp_path / "bad.mkv", row_id=2)
    assert numbers(loader.load(good, row_id=3))[-1] == 31
    assert loader.worker_pid == pid and loader.stats["restarts"] == 0
    loader.close()


# ---- the decoding process ----


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, timeout_s=20):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_hang_is_killed_and_the_next_row_is_fine(tmp_path):
    path = make_clip(tmp_path / "clip.mp4")
    loader = VideoLoader(SMALL, timeout_s=1.0)
    loader._process.start()
    pid = loader.worker_pid
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(VideoError, match=r"'q9'.*clip\.mp4.*did not answer in time.*timeout_s"):
        loader.load(path, row_id="q9")
    assert time.monotonic() - start < 10 and not alive(pid)
    loader.timeout_s = 60.0
    assert len(loader.load(path, row_id="q10").frames) == 8
    assert loader.stats["restarts"] == 1
    loader.close()


class Killed(DecodeProcess):
    """Its first `kills` processes are killed when they are asked for something."""

    kills = 0

    def start(self):
        super().start()
        if self.kills:
            self.kills -= 1
            os.kill(self.pid, signal.SIGKILL)


def test_a_process_killed_once_costs_no_row_and_killed_twice_one(tmp_path):
    path = make_clip(tmp_path / "clip.mp4")
    loader = VideoLoader(SMALL)
    loader._process = Killed()
    loader._process.kills = 1
    assert len(loader.load(path, row_id="q1").frames) == 8
    loader._process.kills = 2
    with pytest.raises(VideoError, match=r"'q2'.*clip\.mp4.*ended \(signal SIGKILL\), twice"):
        loader.load(path, row_id="q2")
    assert len(loader.load(path, row_id="q3").frames) == 8
    assert loader.stats["restarts"] == 3
    loader.close()


def test_the_process_imports_nothing_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "av.py").write_text("raise SystemExit('not the real one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep)  # empty entries mean the working directory too
    loader = VideoLoader(SMALL)
    loader._process.start()
    loader.close()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DecoderError, match="cannot be started .*exit code 1: not the real one"):
        loader._process.start()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with pytest.raises(DecoderError, match="cannot be started .*No such file"):
        loader._process.start()


def test_a_process_that_died_while_idle_costs_no_row(tmp_path):
    path = make_clip(tmp_path / "clip.mp4")
    loader = VideoLoader(SMALL)
    loader.load(path, row_id="q1")
    pid = loader.worker_pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid))
    assert len(loader.load(path, row_id="q2").frames) == 8
    assert loader.stats == {"decoded": 2, "cache_hits": 0, "cache_damaged": 0, "restarts": 1}
    loader.close()


def load_and_wait(path, connection):
    loader = VideoLoader(SMALL)
    loader.load(path, row_id="q1")
    connection.send(loader.worker_pid)
    time.sleep(60)


def test_the_decoding_process_ends_with_its_parent(tmp_path):
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=load_and_wait, args=(make_clip(tmp_path / "clip.mp4"), there)
    )
    process.start()
    pid = here.recv()
    assert alive(pid)
    process.kill()
    process.join()
    wait_until(lambda: not alive(pid))


def test_the_decoding_process_does_without_torch():
    source = "import sys, veripo_trl.media.worker; assert 'torch' not in sys.modules, 'torch was imported'"
    package = str(Path(video_worker.__file__).parents[2])
    assert os.spawnve(os.P_WAIT, sys.executable, ["python", "-c", source], {**os.environ, "PYTHONPATH": package}) == 0


class Clips:
    def __init__(self, paths, loader):
        self.paths, self.loader = paths, loader

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        clip = self.loader.load(self.paths[index], row_id=index)
        return numbers(clip), self.loader.worker_pid, os.getpid()


def test_in_data_loader_workers(tmp_path):
    from torch.utils.data import DataLoader

    paths = [make_clip(tmp_path / f"{frames}.mp4", frames=frames) for frames in (8, 16, 24, 32)]
    loader = VideoLoader(SMALL, log_path=tmp_path / "decodes.jsonl")
    loader.load(paths[0], row_id="parent")  # the parent has a decoding process of its own
    pid = loader.worker_pid
    rows = list(DataLoader(Clips(paths, loader), batch_size=None, num_workers=2))
    assert [row[0][-1] for row in rows] == [7, 15, 23, 31]
    assert len({row[1] for row in rows}) == 2 and pid not in {row[1] for row in rows}
    wait_until(lambda: not any(alive(row[1]) for row in rows))
    assert loader.worker_pid == pid and alive(pid)
    loader.load(paths[1], row_id="parent")
    loader.close()
    assert not alive(pid)
    log = [json.loads(line) for line in (tmp_path / "decodes.jsonl").read_text().splitlines()]
    assert sorted(str(line["row_id"]) for line in log) == ["0", "1", "2", "3", "parent", "parent"]
    assert {line["pid"] for line in log} == {os.getpid(), *(row[2] for row in rows)}


def test_a_pickled_loader_starts_a_process_of_its_own(tmp_path):
    path = make_clip(tmp_path / "clip.mp4")
    loader = VideoLoader(SMALL, cache_dir=tmp_path / "cache", timeout_s=50)
    loader.load(path, row_id="q1")
    other = pickle.loads(pickle.dumps(loader))
    assert other.worker_pid is None and other.stats["decoded"] == 0
    other.load(make_clip(path, frames=16), row_id="q1")
    assert other.timeout_s == 50 and other.worker_pid not in (None, loader.worker_pid)
    loader.close()
    other.close()


def test_threads_share_a_loader(tmp_path):
    paths = [make_clip(tmp_path / f"{frames}.mp4", frames=frames) for frames in (8, 16, 24, 32)]
    loader, ends = VideoLoader(SMALL), {}

    def work(path):
        for _ in range(3):
            ends.setdefault(path, set()).add(numbers(loader.load(path, row_id=path.name))[-1])

    threads = [threading.Thread(target=work, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [ends[path] for path in paths] == [{7}, {15}, {23}, {31}]
    loader.close()


# ---- the frame cache ----


def test_a_cached_clip_needs_no_decoding_process(tmp_path):
    path, cache = make_clip(tmp_path / "clip.mp4"), tmp_path / "cache"
    first = VideoLoader(SMALL, cache_dir=cache)
    clip = first.load(path, row_id="q1")
    first.close()
    (entry,) = cache.glob("*/*.frames")
    assert entry.stat().st_mode == path.stat().st_mode  # others may use it too
    second = VideoLoader(SMALL, cache_dir=cache)
    again = second.load(path, row_id="q1")
    assert second.worker_pid is None
    assert second.stats == {"decoded": 0, "cache_hits": 1, "cache_damaged": 0, "restarts": 0}
    assert (again.frames == clip.frames).all() and again.frames.dtype == np.uint8
    assert {**vars(again), "frames": None} == {**vars(clip), "frames": None}


def touch(path):
    os.utime(path, ns=(1, 1))


CACHE_MISSES = {
    "other sampling": (lambda path: None, {"fps": 1.0}, {}),
    "other pixels": (lambda path: None, {"max_pixels": 84 * 84}, {}),
    "other factor": (lambda path: None, {"size_factor": 32}, {}),
    "other decoder": (lambda path: None, {}, {"backend": "pyav"}),
    "other time": (touch, {}, {}),
    "other content": (lambda path: make_clip(path, frames=16), {}, {}),
}


@pytest.mark.parametrize("name", CACHE_MISSES)
def test_what_the_cache_goes_by(tmp_path, load, name):
    change, settings, kwargs = CACHE_MISSES[name]
    path, cache = make_clip(tmp_path / "clip.mp4"), tmp_path / "cache"
    load(path, cache_dir=cache)
    change(path)
    log = tmp_path / "decodes.jsonl"
    load(path, replace(SMALL, **settings), cache_dir=cache, log_path=log, **kwargs)
    load(path, replace(SMALL, **settings), cache_dir=cache, log_path=log, **kwargs)
    assert len(log.read_text().splitlines()) == 1


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a frame's byte": lambda path: flip_byte(path, -100),
    "a header's byte": lambda path: flip_byte(path, 30),
    "the magic": lambda path: flip_byte(path, 0),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_entry_is_rebuilt(tmp_path, load, name):
    path, cache = make_clip(tmp_path / "clip.mp4"), tmp_path / "cache"
    clip = load(path, cache_dir=cache)
    (entry,) = cache.glob("??/*.frames")
    whole = entry.read_bytes()
    DAMAGE[name](entry)
    loader = VideoLoader(SMALL, cache_dir=cache)
    assert (loader.load(path, row_id="q1").frames == clip.frames).all()
    assert loader.stats["decoded"] == loader.stats["cache_damaged"] == 1
    assert entry.read_bytes() == whole
    loader.close()


def cached_bytes(directory):
    return sum(path.stat().st_size for path in directory.glob("??/*"))


def test_the_cache_is_bounded_and_drops_the_least_recently_used(tmp_path):
    frames = np.zeros((2, 28, 28, 3), dtype=np.uint8)
    limit = 10 * (frames.nbytes + 200)
    cache = FrameCache(tmp_path, max_bytes=limit)
    keys = [f"{number:02d}{'a' * 62}" for number in range(30)]
    for key in keys:
        cache.put(key, frames, {"key": key})
        if key != keys[0]:
            assert cache.get(keys[0]) is not None  # used all the time, so never dropped
        assert cached_bytes(tmp_path) <= limit
        time.sleep(0.002)
    kept = [key for key in keys if cache.get(key) is not None]
    assert kept == [keys[0], *keys[-len(kept) + 1 :]] and len(kept) >= 8
    cache.put("ff" + "b" * 62, np.zeros((400, 28, 28, 3), dtype=np.uint8), {})  # larger than the whole
    assert [key for key in keys if cache.get(key) is not None] == kept


def test_scans_are_rare_and_clear_what_killed_writers_left(tmp_path, monkeypatch):
    from veripo_trl.media import frame_cache

    scans, evict = [], frame_cache.evict
    monkeypatch.setattr(frame_cache, "evict", lambda *args, **kwargs: (scans.append(1), evict(*args, **kwargs)))
    (tmp_path / "aa").mkdir()
    old, new = tmp_path / "aa" / "old.tmp", tmp_path / "aa" / "new.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    cache = FrameCache(tmp_path, max_bytes=10**9)
    for number in range(50):
        cache.put(f"{number:064d}", np.zeros((2, 28, 28, 3), dtype=np.uint8), {})
    assert len(scans) == 1 and not old.exists() and new.exists()


def test_a_cache_that_cannot_be_written_is_warned_of_once(tmp_path):
    (tmp_path / "cache").write_text("a file where the directory should be")
    loader = VideoLoader(SMALL, cache_dir=tmp_path / "cache")
    path = make_clip(tmp_path / "clip.mp4")
    with pytest.warns(UserWarning, match="frame cache"):
        loader.load(path, row_id="q1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(loader.load(path, row_id="q1").frames) == 8
    assert loader.stats["decoded"] == 2
    loader.close()


def use_cache(directory, limit, seed, failures):
    """Puts, gets and damages entries; every entry read must be the one written under its key."""
    cache, random = FrameCache(directory, max_bytes=limit), np.random.default_rng(seed)
    for _ in range(300):
        number = int(random.integers(20))
        key = f"{number:02d}{'c' * 62}"
        entry = cache.get(key)
        if entry is None:
            cache.put(key, np.full((2, 28, 28, 3), number, dtype=np.uint8), {"number": number})
        elif entry[1] != {"number": number} or not (entry[0] == number).all():
            failures.put((number, entry[1]))
        elif random.random() < 0.05:
            cache.path(key).write_bytes(b"damaged")


def test_several_processes_share_a_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    failures, limit = context.Queue(), 10 * (2 * 28 * 28 * 3 + 200)
    processes = [context.Process(target=use_cache, args=(tmp_path, limit, seed, failures)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4 and failures.empty()
    assert not list(tmp_path.glob("??/*.tmp"))
    assert cached_bytes(tmp_path) <= limit * 1.5  # four processes may each be one entry over


# ---- images ----


def test_images(tmp_path):
    picture = Image.new("RGB", (60, 30), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg", row_id="q1").size == (30, 60)
    assert load_image(tmp_path / "turned.jpg", row_id="q1", settings=SMALL).size == (28, 56)
    for mode, color in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0)), ("L", 255), ("1", 1), ("I;16", 65535)):
        Image.new(mode, (4, 4), color).save(tmp_path / "picture.png")
        image = load_image(tmp_path / "picture.png", row_id="q1")
        assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 255, 255)), mode
    depth = Image.fromarray(np.uint16([[0, 257, 300, 25700, 65535]]))
    for options in ({}, {"transparency": 0}, {"transparency": 300}):
        depth.save(tmp_path / "depth.png", **options)
        greys = [255 if value == options.get("transparency") else value // 257 for value in (0, 257, 300, 25700, 65535)]
        image = load_image(tmp_path / "depth.png", row_id="q1")
        assert [image.getpixel((x, 0)) for x in range(5)] == [(grey,) * 3 for grey in greys], options


def image_bomb(path, side=100_000):
    data = b"\x89PNG\r\n\x1a\n"
    for kind, chunk in (
        (b"IHDR", struct.pack(">II5B", side, side, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(9))),
    ):
        data += struct.pack(">I", len(chunk)) + kind + chunk + struct.pack(">I", zlib.crc32(kind + chunk))
    path.write_bytes(data)


def cut_image(path):
    Image.effect_noise((64, 64), 50).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:1000])


BAD_IMAGES = {
    "missing": (lambda path: None, "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "text": (lambda path: path.write_text("no image"), "not an image"),
    "other format": (lambda path: Image.new("RGB", (4, 4)).save(path, format="TIFF"), "not an image"),
    "truncated": (cut_image, "cannot be decoded"),
    "bomb": (image_bomb, "decompression bomb"),
    "small bomb": (lambda path: image_bomb(path, 10_000), "over 89478485"),
    "strip": (lambda path: Image.new("RGB", (4000, 2)).save(path, format="PNG"), "aspect ratio"),
}


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(tmp_path, name):
    write, message = BAD_IMAGES[name]
    write(tmp_path / "bad.png")
    with pytest.raises(MediaError, match=message) as error:
        load_image(tmp_path / "bad.png", row_id="row-7", settings=SMALL)
    assert "'row-7'" in str(error.value) and "bad.png" in str(error.value)


def test_a_video_error_is_a_media_error_and_clips_are_plain():
    assert issubclass(VideoError, MediaError)
    assert not any(hasattr(Clip, name) for name in ("to", "keys", "pin_memory"))  # design: shared by the rows
