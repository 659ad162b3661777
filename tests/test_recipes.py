"""The recipes as a user runs them: `accelerate launch`, a cold start made on the way, another working directory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from veripo_trl import stages
from veripo_trl.rollouts import RolloutStore

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
        "grpo": {"max_steps": 3, "save_steps": 1, "save_total_limit": 3, "per_device_train_batch_size": 16,
                 "logging_steps": 1, "cold_start": str(folder / "sft.yaml"), "report_samples": 1},
    }  # fmt: skip
    for name, changes in small.items():
        config = yaml.safe_load((RECIPES / "configs" / "tiny" / f"{name}.yaml").read_text())
        del config["tiny_world"]  # the shipped size is not needed here
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**config, **changes, "report_max_new_tokens": 12}))
    return folder


def launch(workplace, *arguments) -> str:
    command = [sys.executable, "-m", "accelerate.commands.launch", str(RECIPES / "grpo_video.py"), *arguments]
    result = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_main_job_and_its_second_start(workplace):
    first = launch(workplace, "--config", "grpo.yaml")
    run = workplace / "outputs" / "tiny_grpo"
    assert "outputs/tiny_sft is not there yet. Cold start" in first
    assert "development accuracy" in first
    assert "→ 16 tokens" in first  # what the first rows became
    assert "Held-out questions" in first and "Seconds per step" in first
    assert "Full weights, trained from outputs/tiny_sft" in (run / "README.md").read_text()
    assert not list(run.glob("checkpoint-*/README.md")) and len(list(run.glob("checkpoint-*/veripo_trl.json"))) == 3
    for place in ("results.json", "curves.png", "config.json", "model.safetensors", "_arguments.json"):
        assert (run / place).stat().st_size > 0, place
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == 3
    for when in ("before", "after"):
        for decoding in ("greedy", "sampled"):
            assert results[when][decoding]["questions"] == 24
    rollouts = RolloutStore(run / "rollouts").read()
    assert len(rollouts) == 3 * 16 and {row["step"] for row in rollouts} == {0, 1, 2}
    assert {row["policy"] for row in rollouts} == {"outputs/tiny_sft"}
    made = (workplace / "outputs" / "tiny_sft" / "results.json").stat().st_mtime_ns

    # The same run, had it been broken off after its second checkpoint: the same command finishes it.
    (run / "results.json").unlink()
    shutil.rmtree(run / "checkpoint-3")
    again = launch(workplace, "--config", "grpo.yaml")
    assert "going on from outputs/tiny_grpo/checkpoint-2" in again and "Cold start" not in again
    assert (workplace / "outputs" / "tiny_sft" / "results.json").stat().st_mtime_ns == made
    finished = json.loads((run / "results.json").read_text())
    assert finished["before"] == results["before"]  # kept from the first start
    repeated = RolloutStore(run / "rollouts").read()
    assert [row["rollout_id"] for row in repeated] == [row["rollout_id"] for row in rollouts]
    assert len(list((run / "rollouts" / "set_aside").rglob("*.parquet"))) == 1


def test_a_finished_run_is_moved_aside_and_nothing_is_lost(tmp_path, capsys):
    from accelerate import PartialState

    run = tmp_path / "run"
    for number in (1, 2):
        (run / "rollouts").mkdir(parents=True)
        (run / "results.json").write_text(str(number))
        assert stages.open_run(str(run), accelerator=PartialState()) is None
        assert not run.exists()
        assert (tmp_path / f"run.previous-{number}" / "results.json").read_text() == str(number)
    assert "moved to" in capsys.readouterr().out


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path, capsys):
    from accelerate import PartialState

    for step, state in ((2, "{}"), (4, '{"global_step":'), (6, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert stages.open_run(str(tmp_path), accelerator=PartialState()) == str(tmp_path / "checkpoint-2")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert capsys.readouterr().out.count("broken off while it was written") == 2


def test_configurations_are_found_and_mistyped_options_refused(capsys):
    """`--config` is found beside the recipes from any directory; a mistyped option names its neighbours."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("grpo_video", RECIPES / "grpo_video.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    with pytest.raises(SystemExit, match="max_steps"):
        recipe.main(["--config", "tiny/grpo.yaml", "--max_stepz", "3"])
    assert "configs/tiny/grpo.yaml" in capsys.readouterr().out


def test_help_names_every_group_of_options():
    result = subprocess.run(
        [sys.executable, str(RECIPES / "grpo_video.py"), "--help"], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0
    options = ("--datasets", "--max_pixels", "--rollout_batch_size", "--cold_start", "--lora_r", "--report_samples")
    for option in options:
        assert option in result.stdout
