"""Videos: sampling, sizes, decoders, bad files.

Every clip is made here; the brightness of a frame tells its number.
"""

import io
import os
import re
import struct
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from helpers import SMALL, X265, add_stream, make_clip, numbers, picture
from PIL import Image

from veripo_trl.media.containers import BadFile, recognise_container
from veripo_trl.media.sampling import plan_frames
from veripo_trl.media.video import Clip, MediaError, VideoError, VideoLoader

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
def test_the_planned_frames_are_the_ones_decoded(tmp_path, load_clip, backend, frames):
    clip = load_clip(make_clip(tmp_path / "clip.mp4", frames=frames), backend=backend)
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
def test_both_decoders_give_the_same_frames(tmp_path, load_clip, width, height, size):
    path = make_clip(tmp_path / "clip.mp4", width=width - width % 2, height=height - height % 2)
    settings = replace(SMALL, max_pixels=20 * 28 * 28)
    ours, theirs = load_clip(path, settings), load_clip(path, settings, backend="pyav")
    assert (ours.backend, theirs.backend) == ("decord", "pyav")
    assert ours.frames.shape == theirs.frames.shape == (8, *size, 3)
    assert np.abs(ours.frames.astype(int) - theirs.frames).mean() < 1.5
    assert ours.frames_indices == theirs.frames_indices


@pytest.mark.parametrize("backend", ["decord", "pyav"])
@pytest.mark.parametrize("gop", ["1", "5", "250"])
def test_frames_between_key_frames(tmp_path, load_clip, backend, gop):
    path = make_clip(tmp_path / "clip.mp4", frames=50, options={"crf": "10", "g": gop, "bf": "2"})
    assert numbers(load_clip(path, backend=backend)) == [0, 7, 14, 21, 28, 35, 42, 49]


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
def test_containers_and_the_decoder_that_reads_them(tmp_path, load_clip, name, codec, container, decoder):
    path = make_clip(tmp_path / name, codec=codec)
    assert recognise_container(path) == container
    for backend in ("decord", "pyav"):
        clip = load_clip(path, backend=backend)
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
def test_cuts_without_decoding_begin_where_a_player_does(tmp_path, load_clip, name, suffix):
    codec, options, first_in_mkv = GROUPS[name]
    path = make_clip(tmp_path / "clip.mp4", codec=codec, options=options, frames=48)
    for cut in (13, 14, 15, 16, 19) if suffix == "mp4" else (15,):
        first = cut if suffix == "mp4" else first_in_mkv
        clip = load_clip(copy_packets(path, f"cut.{suffix}", start_s=cut / 8), replace(SMALL, fps=8.0, max_frames=64))
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
def test_files_that_decord_misreads(tmp_path, load_clip, name, settings):
    make, shown = MISREAD_BY_DECORD[name]
    clip = load_clip(make(tmp_path), settings)
    assert (clip.total_num_frames, clip.fps, clip.backend) == (50, 8.0, "pyav")
    assert numbers(clip) == [shown[index] for index in clip.frames_indices]


SLIDES_S = [0, 0.1, 0.2, 3, 3.05, 7, 7.5, 9]
VARIABLE = ["c.mkv libx264", "c.webm libvpx-vp9", "c.mp4 libx264", "c.mov libx265", "c.ts libx264", "c.flv libx264"]


@pytest.mark.parametrize("name", VARIABLE)
@pytest.mark.parametrize("fps", [2.0, 20.0])
def test_a_variable_rate_is_sampled_by_time(tmp_path, load_clip, name, fps):
    name, codec = name.split()
    path = make_clip(tmp_path / name, codec=codec, times_s=[5 + time_s for time_s in SLIDES_S], fps=30)
    clip = load_clip(path, replace(SMALL, fps=fps, max_frames=256))
    times_s = np.array(clip.frames_indices) / clip.fps
    duration_s = clip.total_num_frames / clip.fps
    assert 9 < duration_s < 10.3 and abs(len(clip.frames) - fps * duration_s) <= 2  # the last frame's own time differs
    assert np.abs(np.diff(times_s) - 1 / fps).max() < 0.1 / fps
    assert numbers(clip) == [sum(begin_s <= time_s for begin_s in SLIDES_S) - 1 for time_s in times_s]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_last_frame_counts_as_long_as_it_is_shown(tmp_path, load_clip, suffix):
    with av.open(str(tmp_path / f"c.{suffix}"), "w") as output:
        stream = add_stream(output, "libx264", width=56, height=56, fps=8, options={"crf": "10"})
        packets = [packet for number in range(17) for packet in stream.encode(picture(number, width=56, height=56))]
        packets += stream.encode()
        last = packets[-1] if suffix == "mp4" else max(packets, key=lambda packet: packet.pts)
        last.duration = int(5 / last.time_base)
        output.mux(packets)
    clip = load_clip(tmp_path / f"c.{suffix}", replace(SMALL, max_frames=64))
    assert clip.total_num_frames / clip.fps == pytest.approx(7, abs=0.01)
    assert numbers(clip) == [0, 4, 8, 12] + [16] * 10


@pytest.mark.parametrize("name", ["c.mkv", "c.mp4"])
def test_a_clip_shorter_than_its_sound(tmp_path, load_clip, name):
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
    assert load_clip(tmp_path / name).total_num_frames == 17


def test_a_slow_flv_is_not_taken_for_a_cut_one(tmp_path, load_clip):
    clip = load_clip(make_clip(tmp_path / "c.flv", codec="flv", times_s=range(0, 40, 4), fps=Fraction(1, 4)))
    assert (clip.fps, clip.total_num_frames) == (0.25, 10)


@pytest.mark.parametrize("name", VARIABLE)
def test_a_headers_rate_is_not_believed(tmp_path, load_clip, name):
    name, codec = name.split()
    clip = load_clip(make_clip(tmp_path / name, codec=codec, times_s=range(20), fps=30), replace(SMALL, max_frames=64))
    assert (clip.fps, clip.total_num_frames, numbers(clip)) == (1.0, 20, list(range(20)))


def test_a_broadcast_that_starts_between_key_frames(tmp_path, load_clip):
    path = make_clip(tmp_path / "clip.ts", frames=50, options={"crf": "10", "g": "12"})
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 3 // 188 * 188 :])
    shown = numbers(load_clip(path))
    assert shown[-1] == 49 and shown[0] > 0 and shown == sorted(set(shown))


def test_m2ts_is_recognised(tmp_path, load_clip):
    path = make_clip(tmp_path / "clip.ts", options={"crf": "10"})
    packets = path.read_bytes()
    path.write_bytes(b"".join(bytes(4) + packets[i : i + 188] for i in range(0, len(packets), 188)))
    assert recognise_container(path) == "mpegts"
    assert load_clip(path, backend="pyav").total_num_frames == 32


@pytest.mark.parametrize("large_first", [True, False])
@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_the_largest_of_two_streams_beside_a_still_picture(tmp_path, load_clip, backend, large_first):
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
    clip = load_clip(path, replace(SMALL, max_pixels=112 * 84), backend=backend)
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
def test_turned_and_mirrored_frames_are_upright(tmp_path, load_clip, name, suffix):
    (a, b, c, d), turn = MATRICES[name]
    matrix = [*(value << 16 for value in (a, b, 0, c, d, 0, 0, 0)), 1 << 30]
    path = make_clip(tmp_path / f"clip.{suffix}", width=112, height=56, matrix=matrix)
    expected = turn(picture(0, width=112, height=56).to_ndarray(format="rgb24"))
    for backend in ("decord", "pyav"):  # decord turns mp4, and nothing else
        clip = load_clip(path, replace(SMALL, max_pixels=112 * 56), backend=backend)
        assert clip.backend == (backend if suffix == "mp4" and "turned" in name else "pyav")
        assert clip.frames[0].shape == expected.shape
        assert np.abs(clip.frames[0].astype(int) - expected).mean() < 4


def test_a_cameras_motion_jpeg_is_turned_by_its_exif(tmp_path, load_clip):
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
    clip = load_clip(tmp_path / "clip.mkv", replace(SMALL, max_pixels=112 * 56))
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
    "zero frames": (zero_frames, "(no frames|no video stream).*leave the row out"),
    "text": (lambda path: path.write_text("not a video\n" * 100), "text file.*leave the row out"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 40), "no container"),
    "header and noise": (lambda path: path.write_bytes(b"\x1a\x45\xdf\xa3" + bytes(4000)), "cannot be decoded"),
    "HLS": (playlist("#EXTM3U\n#EXTINF:4,\nsecret.ts\n#EXT-X-ENDLIST\n"), "playlist.*leave the row out"),
    "HLS after a mark": (playlist("\ufeff\n#EXTM3U\n#EXTINF:4,\nsecret.ts\n"), "playlist"),
    "concat": (playlist("ffconcat version 1.0\nfile secret.ts\n"), "playlist"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, load_clip, name):
    write, message = BAD_FILES[name]
    path = tmp_path / "bad.mp4"
    write(path)
    with pytest.raises(VideoError, match=message) as error:
        load_clip(path, row_id="row-7")
    assert "'row-7'" in str(error.value) and "bad.mp4" in str(error.value)


def test_an_unreadable_file_keeps_the_decoding_process(tmp_path):
    (tmp_path / "bad.mkv").write_bytes(b"\x1a\x45\xdf\xa3" + bytes(4000))
    loader = VideoLoader(SMALL)
    good = make_clip(tmp_path / "good.mp4")
    loader.load(good, row_id=1)
    pid = loader._process._process.pid
    with pytest.raises(VideoError):
        loader.load(tmp_path / "bad.mkv", row_id=2)
    assert numbers(loader.load(good, row_id=3))[-1] == 31
    assert loader._process._process.pid == pid
    loader.close()


def test_a_video_error_is_a_media_error_and_clips_are_plain():
    assert issubclass(VideoError, MediaError)
    assert not any(hasattr(Clip, name) for name in ("to", "keys", "pin_memory"))  # design: shared by the rows
