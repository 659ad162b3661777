"""The process that decodes: hangs, kills, forks, threads."""

import json
import multiprocessing
import os
import pickle
import signal
import struct
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import SMALL, make_clip, numbers

from veripo_trl.media import video
from veripo_trl.media import worker as video_worker
from veripo_trl.media.process import DecodeProcess, DecoderError
from veripo_trl.media.video import VideoError, VideoLoader


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
    pid = loader._process._process.pid
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(VideoError, match=r"'q9'.*clip\.mp4.*did not answer in time.*timeout_s"):
        loader.load(path, row_id="q9")
    assert time.monotonic() - start < 10 and not alive(pid)
    loader.timeout_s = 60.0
    assert len(loader.load(path, row_id="q10").frames) == 8
    loader.close()


class Killed(DecodeProcess):
    """Its first `kills` processes are killed when they are asked for something."""

    kills = 0

    def start(self):
        super().start()
        if self.kills:
            self.kills -= 1
            os.kill(self._process.pid, signal.SIGKILL)


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
    assert loader._process.kills == 0
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
    pid = loader._process._process.pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid))
    assert len(loader.load(path, row_id="q2").frames) == 8
    assert (loader.decoded, loader.cache_hits) == (2, 0)
    loader.close()


def load_and_wait(path, connection):
    loader = VideoLoader(SMALL)
    loader.load(path, row_id="q1")
    connection.send(loader._process._process.pid)
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
        return numbers(clip), self.loader._process._process.pid, os.getpid()


def test_in_data_loader_workers(tmp_path):
    from torch.utils.data import DataLoader

    paths = [make_clip(tmp_path / f"{frames}.mp4", frames=frames) for frames in (8, 16, 24, 32)]
    loader = VideoLoader(SMALL)
    loader.load(paths[0], row_id="parent")  # the parent has a decoding process of its own
    pid = loader._process._process.pid
    rows = list(DataLoader(Clips(paths, loader), batch_size=None, num_workers=2))
    assert [row[0][-1] for row in rows] == [7, 15, 23, 31]
    assert len({row[1] for row in rows}) == 2 and pid not in {row[1] for row in rows}
    wait_until(lambda: not any(alive(row[1]) for row in rows))
    assert loader._process._process.pid == pid and alive(pid)
    loader.load(paths[1], row_id="parent")
    loader.close()
    assert not alive(pid)
    assert os.getpid() not in {row[2] for row in rows}


def test_a_pickled_loader_starts_a_process_of_its_own(tmp_path):
    path = make_clip(tmp_path / "clip.mp4")
    loader = VideoLoader(SMALL, cache_dir=tmp_path / "cache", timeout_s=50)
    loader.load(path, row_id="q1")
    other = pickle.loads(pickle.dumps(loader))
    assert other._process._process is None
    other.load(make_clip(path, frames=16), row_id="q1")
    assert other.timeout_s == 50 and other._process._process.pid != loader._process._process.pid
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


def test_the_limit_grows_with_the_file_and_its_pixels(tmp_path, monkeypatch):
    path = make_clip(tmp_path / "clip.mp4")
    limits, request = [], DecodeProcess.request
    monkeypatch.setattr(
        DecodeProcess, "request", lambda self, message, *, deadline: (
            limits.append(deadline - time.monotonic()), request(self, message, deadline=deadline)
        )[1],
    )  # fmt: skip
    loader = VideoLoader(SMALL, timeout_s=50.0)
    clip = loader.load(path, row_id="q1")
    assert 40 < limits[0] <= limits[1] + 1 < 52  # a short clip's is what is given
    monkeypatch.setattr(video, "SLOWEST_BYTES", path.stat().st_size / 100)
    monkeypatch.setattr(video, "SLOWEST_PIXELS", clip.total_num_frames * 56 * 56 / 1000)
    loader.load(path, row_id="q1")
    assert 140 < limits[2] <= 150 and 1140 < limits[3] <= 1150
    monkeypatch.setattr(video, "MOST_S", 700.0)
    loader.load(path, row_id="q1")
    assert 740 < limits[5] <= 750
    loader.close()


def test_a_long_clip_tells_its_progress(tmp_path, monkeypatch, capsys):
    path = str(make_clip(tmp_path / "clip.mp4"))
    told = []
    monkeypatch.setattr(video_worker, "PROGRESS_S", 0.0)
    reader = video_worker.open_reader(path=path, container="mov", backend="pyav", threads=1)
    video_worker.read_frames(reader, [0, 2, 5], height=56, width=56, send=told.append)
    assert told == [{"path": path, "decoded": row, "of": 3} for row in range(3)]
    here, there = os.pipe()
    for reply in (told[1], told[2], {"ok": True}):
        text = json.dumps(reply).encode()
        os.write(there, struct.pack("<I", len(text)) + text)
    process = DecodeProcess()
    with os.fdopen(here, "rb") as stdout:
        process._process = SimpleNamespace(stdout=stdout)
        assert process._reply(time.monotonic() + 5) == ({"ok": True}, None)
    os.close(there)
    assert "clip.mp4: 1 of 3 frames\n" in capsys.readouterr().err
