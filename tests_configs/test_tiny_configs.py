"""Every tiny configuration of the relatives, run for two steps on small worlds, untrained.

python -m pytest tests_configs
"""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import load_script
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from veripo_trl.answers.rewards import reward_functions
from veripo_trl.data.prompts import build_target, load_template
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.model import features, pieces
from veripo_trl.tiny import questions, relatives
from veripo_trl.tiny.questions import SplitSize
from veripo_trl.tiny.world import make_world

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
TINY = {
    str(file.relative_to(RECIPES / "configs")): yaml.safe_load(file.read_text())
    for file in sorted((RECIPES / "configs").glob("*/tiny*.yaml"))
}
SHAPED = "tiny/grpo_shaped.yaml"  # whose rewards are of tokens too
TINY[SHAPED] = yaml.safe_load((RECIPES / "configs" / SHAPED).read_text())
GRPO = [name for name, settings in TINY.items() if "rewards" in settings]
SFT = [name for name in TINY if name not in GRPO]
TWO_STEPS = {
    "max_steps": 2, "per_device_train_batch_size": 16, "logging_steps": 1, "save_strategy": "no",
    "dataloader_num_workers": 0, "report_samples": 1, "report_max_new_tokens": 8,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory):
    """A working directory with small worlds where the configurations look for them."""
    with pytest.MonkeyPatch.context() as patch:
        for split in questions.SPLITS:
            patch.setitem(questions.SIZES, split, SplitSize(clips=8, questions=12))
            patch.setitem(relatives.SIZES, split, 6)
        patch.chdir(tmp_path_factory.mktemp("configs"))
        for settings in TINY.values():
            make_world(settings["tiny_world"], questions=settings.get("tiny_questions"))
            for file in settings.get("difficulty_files", []):
                write_evaluation(settings["datasets"][0]["path"], file)
        yield


def write_evaluation(rows: str, file: str) -> None:
    """As evaluation_vllm.py would write one in which every other answer is right."""
    found = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    answers = [row["solution"] if place % 2 else "" for place, row in enumerate(found)]
    outputs = [
        {"question": row, "ground_truth": row["solution"], "model_output": f"<answer>{answer}</answer>"}
        for row, answer in zip(found, answers, strict=True)
    ]
    Path(file).write_text(json.dumps(outputs))


def run(recipe: str, name: str, **changes) -> dict:
    """The results of a configuration's two steps, from the untrained model of its world."""
    module = load_script(f"recipes/{recipe}.py")
    start = f"{TINY[name]['tiny_world']}/model"
    changes = {**TWO_STEPS, "model_name_or_path": start, **changes}
    words = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    assert not module.main(["--config", name, *words])
    return json.loads((Path(TINY[name]["output_dir"]) / "results.json").read_text())


@pytest.mark.parametrize("name", GRPO)
def test_grpo(name):
    settings = TINY[name]
    results = run("grpo_video", name, report_before=False)
    assert results["steps"] == 2 and math.isfinite(results["after"]["sampled"]["accuracy"])
    rollouts = RolloutStore(Path(settings["output_dir"]) / "rollouts").read()
    assert len(rollouts) == results["rollouts"] == 16 * 2 // settings["num_iterations"]
    columns = [
        function.__name__
        for function in reward_functions(settings["rewards"], settings.get("reward_kwargs"))
    ]
    if "t_grpo" in settings.get("methods", []):
        columns += ["temporal_reward", "length_reward"]
    if "care" in settings.get("methods", []):
        columns += ["care_reward"]
    for rollout in rollouts:
        assert list(rollout["rewards"]) == columns
    for column in columns:  # each reward has something to say about these rows
        assert any(rollout["rewards"][column] is not None for rollout in rollouts)


class BrokenOff(BaseException):
    """Stands in for the death of a run."""


def test_a_long_videos_run_resumes_like_an_unbroken_one(monkeypatch):
    """Amid a generation batch, with layer inputs on the host, a group decoded in pieces, tower and MLPs in pieces."""
    name, pieced, save = "long_video/tiny.yaml", [], Trainer._maybe_log_save_evaluate
    folder = Path(TINY[name]["output_dir"])
    assert TINY[name]["activation_offloading"] and TINY[name]["rollout_batch_size"] < TINY[name]["num_generations"]
    monkeypatch.setattr(features, "PATCHES_AT_ONCE", 16)
    monkeypatch.setattr(pieces, "WHOLE", 64)
    monkeypatch.setattr(pieces, "PIECE", 48)
    monkeypatch.setattr(pieces, "checkpoint", lambda *args, **kw: pieced.append(1) or checkpoint(*args, **kw))
    # Untrained, it gets no other reward: what is sampled decides the step.
    reward = "def length(completions, **_):\n    return [len(c[0]['content']) for c in completions]\n"
    Path("lengths.py").write_text(reward)
    changes = {
        "max_steps": 3, "per_device_train_batch_size": 8, "steps_per_generation": 2, "save_strategy": "steps",
        "save_steps": 1, "rewards": "lengths:length", "reward_weights": 1.0, "report_before": False,
    }  # fmt: skip

    def ended() -> tuple[dict, list]:
        rollouts = RolloutStore(folder / "rollouts").read()
        kept = [(row["rollout_id"], row["completion"], row["rewards"], row["advantage"]) for row in rollouts]
        return load_file(folder / "model.safetensors"), kept

    def break_off(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.state.global_step == 1:
            raise BrokenOff

    run("grpo_video", name, **changes)
    weights, rollouts = ended()
    with monkeypatch.context() as patch, pytest.raises(BrokenOff):
        patch.setattr(Trainer, "_maybe_log_save_evaluate", break_off)
        run("grpo_video", name, **changes)
    assert not (folder / "results.json").exists() and (folder / "checkpoint-1").is_dir() and len(rollouts) == 32
    assert run("grpo_video", name, **changes)["steps"] == 3
    again, rollouts_again = ended()
    assert rollouts_again == rollouts
    assert all(torch.equal(again[key], value) for key, value in weights.items())
    first = load_file(Path(TINY[name]["tiny_world"]) / "model" / "model.safetensors")
    assert pieced and any(not torch.equal(first[key], value) for key, value in weights.items() if key in first)


@pytest.mark.parametrize("name", SFT)
def test_sft(name):
    results = run("sft_video", name, stop_check_steps=2)
    assert results["steps"] == 2 and len(results["development"]) == 1
    assert results["history"][-2]["loss"] < 20


@pytest.mark.parametrize("name", [name for name in GRPO if name != SHAPED])
def test_what_its_cold_start_teaches_earns_the_most(name):
    """The SFT targets of a configuration's world, under its rewards."""
    settings, template = TINY[name], load_template(TINY[name]["prompt_template"])
    starts = {TINY[start]["output_dir"]: TINY[start]["tiny_world"] for start in SFT}
    starts["outputs/tiny_sft"] = "outputs/tiny_world"
    assert starts[settings["model_name_or_path"]] == settings["tiny_world"]
    file = Path(settings["tiny_world"]) / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if row["problem_type"] != "thought"]  # what is asked
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    for function in reward_functions(settings["rewards"], settings.get("reward_kwargs")):
        scores = function(completions=[build_target(row, template) for row in rows], **columns)
        best = max(score for score in scores if score is not None)
        assert best > 0 and {score for score in scores if score is not None} == {best}, (
            function,
            scores,
        )
