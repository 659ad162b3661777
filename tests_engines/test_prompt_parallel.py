"""A prompt shared out over 2 and 4 processes, over gloo: log-probabilities and gradients of one process.

Two launches, of 2 and of 4 processes, of all cases. Whole runs of the recipe: test_two_processes.py.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_row, write_video

from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.tiny.questions import SplitSize
from veripo_trl.tiny.world import make_world

DRIVER = Path(__file__).with_name("prompt_parallel_driver.py")
ROOT = DRIVER.parents[1]
TIMEOUT_S = 300  # of one launch
BOUND = 1e-5  # nats; of gradients relative, a tensor's

TRAINED = {"lora": True, "checkpointing": True, "ddp": True}
# Rows name the question of each group of processes. With 4 processes and `count` 2 there are two groups.
CASES = {
    "full weights": {"rows": ["clip"]},
    "full weights, checkpointing, DDP": {"rows": ["clip"], "checkpointing": True, "ddp": True},
    "LoRA, DDP": {"rows": ["clip"], "lora": True, "ddp": True},
    "LoRA, checkpointing, DDP": {"rows": ["clip"], **TRAINED},
    "two videos and an image": {"rows": ["both"], **TRAINED},
    "features of several depths": {"rows": ["both"], **TRAINED, "model": "qwen3_vl"},
    "fewer temporal steps than processes": {"rows": ["short"], **TRAINED},
    "text": {"rows": ["text"], **TRAINED},
    "text, shorter than its chunks": {"rows": ["text"], **TRAINED, "text": 4},
    "a token before the last": {"rows": ["text"], **TRAINED, "text": 2},
}  # fmt: skip
IN_PAIRS = {
    "two groups": {"rows": ["clip", "both"], "count": 2, **TRAINED},
    "two groups, of a video and of text": {"rows": ["clip", "text"], "count": 2, "ddp": True},
}
DIFFERENT = {"rows": ["clip", "text"], "way": "different"}
# Four steps: three of the first epoch (with 4 processes: two), then of the second.
STEPS = {"rows": ["clip", "both", "text"], "way": "steps", "count": 2}
STEPS = {
    "DPO": {**STEPS, "trainer": "dpo", "learning_rate": 1.0},
    "SFT": {**STEPS, "trainer": "sft", "learning_rate": 0.1},
}

pytestmark = pytest.mark.slow


def launch(processes: int, *command) -> str:
    """What a command said, started by torchrun; a hang ends in a failure, with every process of it killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", port]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env = {**os.environ, **own}
    process = subprocess.Popen(
        [*map(str, (*start, *command))], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{processes} processes did not end within {TIMEOUT_S} s:\n{process.communicate()[0][-8000:]}")
    assert process.returncode == 0, said[-8000:]
    return said


@pytest.fixture(scope="module")
def found(model_paths, tmp_path_factory):
    """What the driver found, by processes and case."""
    folder = tmp_path_factory.mktemp("prompt_parallel")
    write_video(folder / "clip.mp4", frames=24, height=56, width=112, seed=5)
    write_video(folder / "other.mp4", frames=14, height=112, width=56, seed=6)
    write_video(folder / "short.mp4", frames=2, height=56, width=56, seed=7)
    from PIL import Image

    Image.effect_noise((56, 84), 80).convert("RGB").save(folder / "noise.png")
    rows = {
        "clip": {"videos": ["clip.mp4"]},
        "both": {"videos": ["other.mp4", "clip.mp4"], "images": ["noise.png"]},
        "short": {"videos": ["short.mp4"]},
        "text": {},
    }
    given = {
        "rows": {name: make_row(name, folder, **media) for name, media in rows.items()},
        "models": {kind: str(path) for kind, path in model_paths.items()},
    }
    results = {}
    for processes in (2, 4):
        cases = {**CASES, **(IN_PAIRS if processes == 4 else {}), "different prompts": DIFFERENT}
        more = {"others": ["whole", "resumed"] if processes == 2 else ["whole"]}
        for name, case in STEPS.items():
            cases[name] = {**case, **more, "output_dir": str(folder / f"{name}{processes}")}
        listed = [{"model": "qwen2_5_vl", "count": processes, "name": name, **case} for name, case in cases.items()]
        file, output = folder / f"cases{processes}.json", folder / f"found{processes}.json"
        file.write_text(json.dumps({**given, "cases": listed, "output": str(output)}))
        launch(processes, DRIVER, file)
        results[processes] = {case["name"]: case for case in json.loads(output.read_text())}
    return results


@pytest.mark.parametrize(
    ("processes", "name"), [*((n, name) for n in (2, 4) for name in CASES), *((4, name) for name in IN_PAIRS)]
)
def test_it_gives_what_one_process_gives(processes, name, found):
    every = found[processes][name]["processes"]
    assert len(every) == processes
    for own in every:
        assert own["log_probs"] <= BOUND and own["gradients"] <= BOUND and own["tensors"] > 10, own
        assert own["same_features"] and own["cache"] <= BOUND and own["layers"] > 1


def test_the_prompt_is_shared_out(found):
    for processes in (2, 4):
        (chunks,) = {tuple(own["chunks"]) for own in found[processes]["full weights"]["processes"]}
        assert len(chunks) == processes and min(chunks) > 20 and max(chunks) - min(chunks) <= 2
    shortest = found[4]["a token before the last"]["processes"][0]["chunks"]
    assert sum(shortest) == 1 and shortest.count(0) == 3


def test_processes_of_a_group_with_different_prompts_stop_with_a_reason(found):
    for processes in (2, 4):
        said = found[processes]["different prompts"]["said"]
        assert len(said) == processes and all("hold other prompts than each other" in each for each in said)


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_those_of_whole_prompts_and_of_a_resumed_run(name, found):
    """On two rows at a time with 4 processes, with 2 on one."""
    for processes in (2, 4):
        for own in found[processes][name]["processes"]:
            assert own.pop("start") > 1000 * BOUND and max(own.values()) <= BOUND, own
    assert "resumed" in found[2][name]["processes"][0]


def test_the_configuration_of_256_frames(tmp_path):
    few = dict.fromkeys(("train", "rl", "dev", "heldout"), SplitSize(clips=4, questions=4))
    world = make_world(tmp_path / "world", hold=32, sizes=few)
    said = launch(
        2, ROOT / "recipes" / "grpo_video.py", "--config", "long_video/two_processes.yaml",
        "--datasets", json.dumps({"path": str(world.rl)}), "--model_name_or_path", world.model,
        "--output_dir", tmp_path / "run", "--frame_cache", tmp_path / "frames", "--max_steps", 1,
        "--save_strategy", "no", "--dataloader_num_workers", 0,
    )  # fmt: skip
    assert "256 frames × 56 × 56" in said, said[-4000:]
    rollouts = RolloutStore(tmp_path / "run" / "rollouts").read()
    by_rank = [{r["question_id"] for r in rollouts if f"-rank{rank}-" in r["rollout_id"]} for rank in (0, 1)]
    assert len(rollouts) == 4 * 8 and by_rank[0] == by_rank[1] and len(by_rank[0]) == 4
