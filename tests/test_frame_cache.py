"""The cache of decoded frames: what it goes by, damage, its bound, several processes."""

import errno
import multiprocessing
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL, make_clip

from veripo_trl.media.frame_cache import FrameCache
from veripo_trl.media.video import VideoLoader


def test_a_cached_clip_needs_no_decoding_process(tmp_path):
    path, cache = make_clip(tmp_path / "clip.mp4"), tmp_path / "cache"
    first = VideoLoader(SMALL, cache_dir=cache)
    clip = first.load(path, row_id="q1")
    first.close()
    (entry,) = cache.glob("*/*.frames")
    assert entry.stat().st_mode == path.stat().st_mode  # others may use it too
    second = VideoLoader(SMALL, cache_dir=cache)
    again = second.load(path, row_id="q1")
    assert second._process._process is None
    assert (second.decoded, second.cache_hits) == (0, 1)
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
def test_what_the_cache_goes_by(tmp_path, load_clip, name, monkeypatch):
    change, settings, kwargs = CACHE_MISSES[name]
    path, cache = make_clip(tmp_path / "clip.mp4"), tmp_path / "cache"
    load_clip(path, cache_dir=cache)
    change(path)
    decode, decoded = VideoLoader._decode, []
    monkeypatch.setattr(VideoLoader, "_decode", lambda *args: decoded.append(args) or decode(*args))
    load_clip(path, replace(SMALL, **settings), cache_dir=cache, **kwargs)
    load_clip(path, replace(SMALL, **settings), cache_dir=cache, **kwargs)
    assert len(decoded) == 1


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
def test_a_damaged_entry_is_rebuilt(tmp_path, load_clip, name):
    path, cache = make_clip(tmp_path / "clip.mp4"), tmp_path / "cache"
    clip = load_clip(path, cache_dir=cache)
    (entry,) = cache.glob("??/*.frames")
    whole = entry.read_bytes()
    DAMAGE[name](entry)
    loader = VideoLoader(SMALL, cache_dir=cache)
    assert (loader.load(path, row_id="q1").frames == clip.frames).all()
    assert loader.decoded == 1
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


def test_a_read_only_cache_is_read(tmp_path, monkeypatch):
    """A read-only disk refuses to remove what is not there, too."""
    frames, cache = np.zeros((2, 28, 28, 3), dtype=np.uint8), FrameCache(tmp_path, max_bytes=10**9)
    cache.put("aa" + "0" * 62, frames, {})
    cache.put("ab" + "0" * 62, frames, {})
    cache.path("ab" + "0" * 62).write_bytes(b"damaged")

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    for owner, name in ((Path, "unlink"), (os, "replace"), (os, "utime")):
        monkeypatch.setattr(owner, name, refuse)
    assert cache.get("ab" + "0" * 62) is None and (cache.get("aa" + "0" * 62)[0] == frames).all()
    with pytest.warns(UserWarning, match="Read-only file system; this process goes on"):
        cache.put("aa" + "1" * 62, frames, {})


def test_a_cache_that_cannot_be_written_is_warned_of_once(tmp_path):
    (tmp_path / "cache").write_text("a file where the directory should be")
    loader = VideoLoader(SMALL, cache_dir=tmp_path / "cache")
    path = make_clip(tmp_path / "clip.mp4")
    with pytest.warns(UserWarning, match="frame cache"):
        loader.load(path, row_id="q1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(loader.load(path, row_id="q1").frames) == 8
    assert loader.decoded == 2
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
