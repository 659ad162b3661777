"""The recipes as a user runs them: `accelerate launch`, another working directory."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import load_script
from helpers import make_sft_trainer
from torch.utils.data import DataLoader
from trl import ModelConfig

from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.data.schema import rows_to_dataset
from veripo_trl.errors import ConfigError, VeripoError, run
from veripo_trl.files.run_folder import holder, only_process, outlive_sigterm, process_name, write_results
from veripo_trl.recipe import held_out
from veripo_trl.recipe.arguments import ReportArguments, StopArguments
from veripo_trl.recipe.finish import train
from veripo_trl.recipe.prepare import open_run, save_arguments

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a small world and small configurations derived from the shipped ones."""
    from veripo_trl.tiny.questions import SplitSize
    from veripo_trl.tiny.world import make_world

    folder = tmp_path_factory.mktemp("work")
    sizes = {split: SplitSize(clips=16, questions=24) for split in ("train", "rl", "dev", "heldout")}
    make_world(folder / "outputs" / "tiny_world", sizes=sizes)
    small = {
        "sft": {"max_steps": 4, "stop_check_steps": 2, "stop_at_accuracy": 0.99, "save_steps": 2,
                "per_device_train_batch_size": 4, "logging_steps": 2},
        "grpo": {"max_steps": 4, "save_steps": 99, "per_device_train_batch_size": 16,
                 "logging_steps": 1, "report_samples": 1},
    }  # fmt: skip
    for name, changes in small.items():
        config = yaml.safe_load((RECIPES / "configs" / "tiny" / f"{name}.yaml").read_text())
        del config["tiny_world"]  # the shipped size is not needed here
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**config, **changes, "report_max_new_tokens": 12}))
    return folder


def launch(workplace, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", str(RECIPES / "grpo_video.py"), *arguments]
    return subprocess.Popen(
        command, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_a_stopped_search_and_its_second_start(workplace, monkeypatch, capsys):
    """A scheduler's SIGTERM, to every process of the job, in the first step; then the same command."""
    monkeypatch.chdir(workplace)
    assert load_script("recipes/sft_video.py").main(["--config", "sft.yaml"]) is None
    assert "development accuracy" in capsys.readouterr().out
    process, run = launch(workplace, "--config", "grpo.yaml"), workplace / "outputs" / "tiny_grpo"
    store = RolloutStore(run / "rollouts")
    while not store.files():
        assert process.poll() is None, process.stdout.read()[-4000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    first, _ = process.communicate(timeout=100)
    assert "→ 16 tokens" in first  # what the first rows became
    step = int(re.search(r"outputs/tiny_grpo: terminated after step (\d) of 4; the same command", first)[1])
    assert not (run / "results.json").exists() and "Traceback" not in first
    before = [row["rollout_id"] for row in store.read()]

    process = launch(workplace, "--config", "grpo.yaml", "--logging_steps", "2")
    again, _ = process.communicate(timeout=400)
    assert process.returncode == 0, again[-4000:]
    assert f"going on from outputs/tiny_grpo/checkpoint-{step}" in again
    assert "outputs/tiny_grpo goes on with changed settings: logging_steps: 1 → 2\n" in again
    assert "Held-out questions" in again and "Seconds per step" in again
    assert "Full weights, trained from outputs/tiny_sft" in (run / "README.md").read_text()
    checkpoints = list(run.glob("checkpoint-*"))
    assert checkpoints and all((checkpoint / "veripo_trl.json").exists() for checkpoint in checkpoints)
    assert not list(run.glob("checkpoint-*/README.md"))
    for place in ("results.json", "curves.png", "config.json", "model.safetensors", "_arguments.json"):
        assert (run / place).stat().st_size > 0, place
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == 4
    for when in ("before", "after"):
        for decoding in ("greedy", "sampled"):
            assert results[when][decoding]["questions"] == 24
    rollouts = store.read()
    assert len(rollouts) == 4 * 16 and {row["step"] for row in rollouts} == {0, 1, 2, 3}
    assert {row["policy"] for row in rollouts} == {"outputs/tiny_sft"}
    assert [row["rollout_id"] for row in rollouts][: len(before)] == before


def test_a_finished_run_is_moved_aside_and_nothing_is_lost(tmp_path, capsys):
    run = tmp_path / "run"
    for number in (1, 2):
        (run / "rollouts").mkdir(parents=True)
        (run / "results.json").write_text(str(number))
        assert open_run(str(run)) is None
        assert [path.name for path in run.iterdir()] == ["_arguments.json"]
        assert (tmp_path / f"run.previous-{number}" / "results.json").read_text() == str(number)
    assert "moved to" in capsys.readouterr().out


# command: what it is given that lies in, or is, its output
OWN_INPUT = {
    "sft_video": {"model_name_or_path": "run/checkpoint-2", "output_dir": "run", "datasets": [{"path": "rows.jsonl"}]},
    "grpo_video": {"model_name_or_path": "run", "output_dir": "there/../run", "datasets": [{"path": "rows.jsonl"}]},
    "dpo_video": {"model_name_or_path": "run", "output_dir": "run", "pairs": [{"path": "run/pairs"}]},
    "verify_rollouts": {"rollouts": ["run/rollouts"], "output_dir": "run"},
    "sample_perturbed": {"model_name_or_path": "model", "rollouts": "run/rollouts", "output_dir": "run"},
    "check_rows": {"model_name_or_path": "run", "datasets": [{"path": "rows.jsonl"}], "output": "rows.jsonl"},
}


@pytest.mark.parametrize("name", OWN_INPUT)
def test_what_a_run_reads_is_not_written_over_or_moved_aside(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("run/checkpoint-2", "run/rollouts", "there"):
        Path(folder).mkdir(parents=True)
    row = {"question_id": "q", "problem": "?", "problem_type": "free-form", "solution": "yes"}
    Path("rows.jsonl").write_text(json.dumps(row))
    write_results(Path("run"), {})
    cpu = {"use_cpu": True, "bf16": False} if name in ("sft_video", "grpo_video", "dpo_video") else {}
    Path("it.yaml").write_text(json.dumps(OWN_INPUT[name] | cpu))  # JSON is YAML
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(ConfigError, match="expected an output apart from what is read; .* holds (run|rows)"):
        load_script(f"recipes/{name}.py").main(["--config", "it.yaml"])
    assert before.items() <= {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}.items()


def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path, capsys):
    """Half-written, short of a file, or with a cut one: the one before is taken, saying so."""
    files = {"model.safetensors": 4, "optimizer.pt": 4, "rng_state.pth": 4}
    for step in (2, 4, 6, 8, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name, size in files.items():
            (folder / name).write_bytes(b"x" * size)
        (folder / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": {"run": {"files": files}}}))
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-6" / "rng_state.pth").write_bytes(b"xx")
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text('{"global_step":')
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    assert open_run(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    names = sorted(path.name for path in tmp_path.iterdir())
    # nothing whole is deleted
    assert names == ["_arguments.json", "checkpoint-2", "damaged-checkpoint-4", "damaged-checkpoint-6"]
    said = capsys.readouterr().out
    assert said.count("broken off while it was written") == 2
    assert "checkpoint-4 cannot be continued: optimizer.pt missing" in said
    assert "checkpoint-6 cannot be continued: rng_state.pth missing, or not of the size" in said


@pytest.mark.parametrize(
    ("then", "now", "changed"),
    [
        ({"use_peft": True}, {"use_peft": False, "lora_r": 8}, "(use_peft: True → False)"),
        ({"use_peft": True, "lora_r": 8}, {"use_peft": True, "lora_r": 4}, "(lora_r: 8 → 4)"),
        ({"lora_r": 8}, {"lora_r": 4, "lora_alpha": 1}, None),  # without LoRA it says nothing
        ({"use_peft": True, "lora_alpha": 8}, {"use_peft": True}, None),
    ],
)
def test_a_checkpoint_of_other_weights_is_not_gone_on_from(then, now, changed, tmp_path, capsys):
    save_arguments(str(tmp_path), ModelConfig(**then))
    before = (tmp_path / "_arguments.json").read_text()
    if changed is None:
        save_arguments(str(tmp_path), ModelConfig(**now), resumed=True)
        assert "goes on with changed settings: lora_" in capsys.readouterr().out
        return
    with pytest.raises(ConfigError, match=rf"cannot go on .*{re.escape(changed)}\. Start it as it was; or give another"):
        save_arguments(str(tmp_path), ModelConfig(**now), resumed=True)
    assert (tmp_path / "_arguments.json").read_text() == before


HOLD = """
import sys, time
from veripo_trl.files.run_folder import only_process
with only_process(sys.argv[1]):
    print("held", flush=True)
    time.sleep(99)
"""


def test_one_process_works_on_a_run(tmp_path, monkeypatch, model_paths):
    """Every recipe takes the same lock, which ends with its process, however that ends."""
    monkeypatch.chdir(tmp_path)
    other = subprocess.Popen([sys.executable, "-c", HOLD, "outputs/run.jsonl"], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    assert holder("outputs/run.jsonl") == f"{other.pid} on {socket.gethostname()}"
    for name, option in (
        ("sft_video", "--output_dir"), ("grpo_video", "--output_dir"), ("dpo_video", "--output_dir"),
        ("verify_rollouts", "--output_dir"), ("check_rows", "--output"), ("veripo", "--output_dir"),
    ):  # fmt: skip
        with pytest.raises(VeripoError, match=f"run.jsonl: process {other.pid} on .* is at work on it"):
            load_script(f"recipes/{name}.py").main([option, "outputs/run.jsonl"])
    other.kill()
    other.wait()
    assert holder("outputs/run.jsonl") is None
    with only_process("outputs/run.jsonl"):
        code = "import sys; from veripo_trl.files.run_folder import holder; print(holder(sys.argv[1]))"
        seen = subprocess.run([sys.executable, "-c", code, "outputs/run.jsonl"], capture_output=True, text=True)
        assert seen.stdout.strip() == process_name()
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == [".run.jsonl.lock"]


def test_a_cold_start_that_was_stopped_on_purpose_is_not_trained_further(load, mixed_rows, tmp_path, monkeypatch):
    """Killed after its last checkpoint, it finishes; with a higher threshold it goes on."""
    monkeypatch.setattr(held_out, "load_rows", lambda *args, **kwargs: rows_to_dataset(mixed_rows))

    def run(threshold, resume=None):
        model, encoder = load()
        trainer = make_sft_trainer(model, encoder, mixed_rows, tmp_path, max_steps=6, save_strategy="steps", save_steps=4)
        stop = StopArguments(stop_datasets=[{"path": "-"}], stop_at_accuracy=threshold, stop_check_steps=1)
        stopper = held_out.StopAtAccuracy(trainer, ReportArguments(report_max_new_tokens=2), stop)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.global_step, stopper.seen()

    assert run(0.0)[0] == 1  # any accuracy does
    steps, history = run(0.0, resume=str(tmp_path / "checkpoint-1"))
    assert steps == 1 and [look["step"] for look in history] == [1]
    steps, history = run(2.0, resume=str(tmp_path / "checkpoint-1"))
    assert steps == 6 and [look["step"] for look in history] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        # with report_before: false an evaluation begins when all is trained
        (ReportArguments, {"report_batch_size": 0}, "report_batch_size: expected 1 or more; got 0"),
        (ReportArguments, {"report_samples": 0}, "report_samples: expected 1 or more"),
        (ReportArguments, {"report_max_new_tokens": -1}, "report_max_new_tokens: expected 1 or more"),
        (StopArguments, {"stop_at_accuracy": 0.9}, "stop_datasets: expected rows, with stop_at_accuracy; got None"),
        (StopArguments, {"stop_check_steps": 0}, "stop_check_steps: expected 1 or more"),
    ],
)
def test_settings_of_an_evaluation_are_looked_at_before_anything_is_trained(kind, given, message):
    with pytest.raises(ConfigError, match=message):
        kind(**given)


def test_a_run_of_no_step_saves_the_policy_that_it_was_given(load, mixed_rows, tmp_path):
    trainer = make_sft_trainer(*load(), mixed_rows[:1], tmp_path, max_steps=0)
    train(trainer, None, ReportArguments(), checkpoint=None, title="")
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 0
    assert (tmp_path / "model.safetensors").exists()


def test_ctrl_c_ends_in_one_line(capsys):
    def work():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(99)

    assert run(work) == 130
    assert capsys.readouterr().err.strip() == (
        "interrupted: the same command goes on, from the last checkpoint if there is one"
    )


@pytest.mark.parametrize(
    "error, says",
    [(ConfigError("broken.mp4"), r"ConfigError: broken.mp4\n"), (KeyError("boom"), r"Traceback .*__getitem__\n.*boom.*")],
)
def test_an_error_ends_the_loaders_workers(error, says, capsys):
    """They outlive the one SIGTERM of Python's end, which would wait for them for ever."""

    class Videos(list):
        def __getitem__(self, index):
            raise error

    loader = DataLoader(Videos([0]), batch_size=None, num_workers=1, worker_init_fn=outlive_sigterm)
    assert run(lambda: list(loader)) == 1 and not multiprocessing.active_children()
    assert re.fullmatch(says, capsys.readouterr().err, re.DOTALL)


def test_what_says_finished_is_written_when_the_disk_has_the_rest(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def noting(handle):
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), (tmp_path / "run" / "results.json").exists()))
        fsync(handle)

    (tmp_path / "run" / "rollouts").mkdir(parents=True)
    (tmp_path / "run" / "model.safetensors").write_text("weights")
    (tmp_path / "run" / "rollouts" / "a.parquet").write_text("rollouts")
    monkeypatch.setattr(os, "fsync", noting)
    write_results(tmp_path / "run", {"steps": 1})
    names = [Path(path).relative_to(tmp_path).as_posix() for path, _ in synced]
    assert sorted(names[:-1]) == ["run", "run/model.safetensors", "run/rollouts", "run/rollouts/a.parquet"]
    assert names[-1].startswith("run/.results.json.") and not any(there for _, there in synced)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == {"steps": 1}


def test_configurations_are_found_and_mistyped_options_refused(capsys):
    """`--config` is found beside the recipes from any directory; a mistyped option names its neighbours."""
    recipe = load_script("recipes/grpo_video.py")
    with pytest.raises(ConfigError, match="max_steps"):
        recipe.main(["--config", "tiny/grpo.yaml", "--max_stepz", "3"])
    assert "configs/tiny/grpo.yaml" in capsys.readouterr().out


def test_help_names_every_group_of_options(capsys):
    with pytest.raises(SystemExit) as ended:
        load_script("recipes/grpo_video.py").main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    options = ("--datasets", "--max_pixels", "--rollout_batch_size", "--rewards", "--lora_r", "--report_samples")
    for option in options:
        assert option in shown
