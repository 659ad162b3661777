"""Models, clips and rows that the test folders share. All real: saved models, mp4 files, processors."""

import importlib.util
import locale
import os
import signal
import sys

locale.setlocale(locale.LC_CTYPE, "C.UTF-8")  # the tests' own reading and writing, whatever the machine's language
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the recipes set it before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DELAY", "0")  # progress bars as on a terminal

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def model_paths(tmp_path_factory):
    """Folders of an untrained tiny model and its processor, by kind."""
    from veripo_trl.tiny.model import KINDS, save_tiny_model

    folder = tmp_path_factory.mktemp("models")
    return {kind: save_tiny_model(folder / kind, kind) for kind in KINDS}


def write_video(path: Path, *, frames: int, height: int, width: int, fps: int = 2, seed: int = 0) -> None:
    """A clip of smooth noise that changes from frame to frame."""
    import av

    rng = np.random.default_rng(seed)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(frames):
            small = rng.integers(0, 255, size=(4, 4, 3), dtype=np.uint8)
            picture = np.kron(small, np.ones((height // 4, width // 4, 1), dtype=np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def media_root(tmp_path_factory):
    """Clips `long.mp4` (24 frames, longer than its grid is wide), `wide.mp4`, `fast.mp4` (8 fps) and two images.

    Sides are multiples of 28 and of 32 where a test needs no resizing.
    """
    from PIL import Image

    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "long.mp4", frames=24, height=56, width=56, fps=2, seed=1)
    write_video(folder / "wide.mp4", frames=6, height=56, width=112, fps=2, seed=2)
    write_video(folder / "fast.mp4", frames=16, height=56, width=56, fps=8, seed=3)
    rng = np.random.default_rng(4)
    for name, size in (("square.png", (56, 56)), ("tall.png", (56, 112))):
        small = rng.integers(0, 255, size=(4, 4, 3), dtype=np.uint8)
        picture = np.kron(small, np.ones((size[1] // 4, size[0] // 4, 1), dtype=np.uint8))
        Image.fromarray(picture).save(folder / name)
    return folder


def load_script(path: str):
    """A script of recipes/ or evaluation/ as a module, by its path in the repository."""
    path = Path(__file__).resolve().parent / path
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)  # TrlParser resolves annotations there
    spec.loader.exec_module(module)
    return module


def make_row(name: str, root, *, videos=(), images=(), problem="Which colour is first?", **changes) -> dict:
    """A multiple-choice row whose answer is B."""
    row = {
        "question_id": name,
        "problem": problem,
        "options": ["A. red", "B. blue", "C. green", "D. yellow"],
        "problem_type": "multiple choice",
        "solution": "B",
        "process": "I see blue then red, first is blue: B.",
        "videos": list(videos),
        "images": list(images),
        "data_source": "test",
        "media_root": str(root),
    }
    return {**row, **changes}


@pytest.fixture(scope="session")
def mixed_rows(media_root):
    """Text, image, video, two videos, and image with video; prompts of different lengths."""
    return [
        make_row("text", media_root, problem="Which colour is last?"),
        make_row("image", media_root, images=["square.png"]),
        make_row("video", media_root, videos=["long.mp4"]),
        make_row("two-videos", media_root, videos=["wide.mp4", "fast.mp4"]),
        make_row("image-and-video", media_root, videos=["fast.mp4"], images=["tall.png"]),
    ]


@pytest.fixture(scope="session")
def load(model_paths):
    """`load(kind) -> (model, encoder)`: a fresh model and an encoder for it."""
    from veripo_trl.model.policy import load_policy
    from veripo_trl.recipe.arguments import DataArguments
    from veripo_trl.recipe.build import make_encoder

    def fresh(kind: str = "qwen2_5_vl", **options):
        settings = {"prompt_template": "tiny", "fps": 2.0, "min_frames": 2, "max_frames": 24, "min_pixels": 56 * 56}
        data_args = DataArguments(**{**settings, "max_pixels": 112 * 56, **options})
        model, processor = load_policy(str(model_paths[kind]))
        return model, make_encoder(model, processor, data_args)

    return fresh


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """A file with a line per clip loaded, clip not cached and processor call, in whatever process it happens."""
    import json

    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

    from veripo_trl.media.video import VideoLoader

    log = tmp_path / "calls.log"

    def line(kind, what):
        with open(log, "a") as file:
            file.write(json.dumps([kind, what, os.getpid()]) + "\n")

    load, decode, call = VideoLoader.load, VideoLoader._decode, Qwen2_5_VLProcessor.__call__

    def counting_load(self, path, **kwargs):
        line("decode", os.path.basename(path))
        return load(self, path, **kwargs)

    def counting_decode(self, path, *args):
        line("cache miss", os.path.basename(path))
        return decode(self, path, *args)

    def counting_call(self, *args, **kwargs):
        line("process", len(kwargs.get("videos") or []))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(VideoLoader, "load", counting_load)
    monkeypatch.setattr(VideoLoader, "_decode", counting_decode)
    monkeypatch.setattr(Qwen2_5_VLProcessor, "__call__", counting_call)
    return lambda: [json.loads(text) for text in log.read_text().splitlines()] if log.exists() else []


# Two workers take whole files: those that last are begun first.
LONG = ["test_loop.py", "test_bad_input.py", "test_recipes.py", "test_hub_faults.py", "test_evaluation_runs.py",
        "test_verify_rollouts.py", "test_shared_prefix.py", "test_grpo_loading.py"]  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {name: index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.fixture(scope="module")
def decode_process():
    from veripo_trl.media.process import DecodeProcess

    process = DecodeProcess()
    yield process
    process.close()


@pytest.fixture
def load_clip(decode_process):
    """Loads one clip, with a decoding process that the tests of a file share, because each takes a second to start."""
    from helpers import SMALL

    from veripo_trl.media.video import VideoLoader

    def load(path, settings=SMALL, *, row_id="q1", **kwargs):
        loader = VideoLoader(settings, **kwargs)
        loader._process = decode_process
        return loader.load(path, row_id=row_id)

    return load
