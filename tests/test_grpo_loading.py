"""Every unique video of a generation batch is decoded and processed once, however the loader repeats it."""

import json
import os
import signal

import pytest
import torch
from conftest import make_row
from helpers import make_grpo_trainer as make_trainer
from helpers import video_rows

from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.data.schema import RowError
from veripo_trl.files.run_folder import last_checkpoint
from veripo_trl.trainers.dpo import VideoDPOConfig
from veripo_trl.trainers.grpo import VideoGRPOConfig
from veripo_trl.trainers.sft import VideoSFTConfig


@pytest.mark.parametrize("workers", [0, 2])
def test_once_per_unique_video(workers, load, media_root, tmp_path, counted, monkeypatch):
    """8 clips, G 2, 4 generation batches of 2 prompts, each yielded 2 × 2 times by the loader."""
    model, encoder = load()
    monkeypatch.setattr("veripo_trl.trainers.grpo.VideoGRPOTrainer._check_first_rows", lambda self: None)
    trainer = make_trainer(
        model, encoder, video_rows(media_root, 8), tmp_path / "run", per_device_train_batch_size=2, num_generations=2,
        steps_per_generation=2, num_iterations=2, gradient_accumulation_steps=2, max_steps=8,
        dataloader_num_workers=workers, max_completion_length=4,
    )  # fmt: skip
    before = len(counted())  # an encoder tries its processor once when it is made
    trainer.train()
    calls = counted()[before:]
    decoded = sorted(what for kind, what, _ in calls if kind == "decode")
    assert decoded == sorted(f"clip{place}.mp4" for place in range(8))
    assert sum(what for kind, what, _ in calls if kind == "process") == 8  # videos that went through the processor
    pids = {pid for *_, pid in calls}
    if workers == 0:
        assert pids == {os.getpid()}
    else:  # ahead of the step, in several processes, though the loader repeats each batch four times
        assert os.getpid() not in pids and len(pids) >= 2


def test_a_group_shares_one_object_in_host_memory(load, media_root, tmp_path):
    model, encoder = load()
    trainer = make_trainer(
        model, encoder, video_rows(media_root, 2), tmp_path, num_generations=2, dataloader_num_workers=1,
        per_device_train_batch_size=4, dataloader_pin_memory=False,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    assert len({id(row["encoded"]) for row in batch}) == 2
    assert batch[0]["encoded"] is batch[1]["encoded"]
    assert all(row["encoded"].pixel_values_videos.device.type == "cpu" for row in batch)


def test_a_repeat_that_must_be_generated_from_is_encoded_on_the_spot(load, media_root, tmp_path):
    model, encoder = load()
    trainer = make_trainer(
        model, encoder, video_rows(media_root, 2), tmp_path, per_device_train_batch_size=2, steps_per_generation=2
    )
    first, repeat = [batch for _, batch in zip(range(2), trainer.get_train_dataloader(), strict=False)]
    assert all(row["encoded"] is not None for row in first)
    assert all(row["encoded"] is None for row in repeat)
    model.train()
    output = trainer._generate_and_score_completions(repeat)
    assert [p.question_id for p in trainer._encoded["train"][1]] == [row["question_id"] for row in repeat]
    assert output["row_index"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "config, option, value",
    [
        *((VideoGRPOConfig, "vllm", {name: value}) for name, value in [
            ("seed", 1), ("stop", "no"), ("max_tokens", 3), ("temperature", 2.0), ("n", 2), ("suppress_tokens", [1])]),
        *((VideoGRPOConfig, "generation_kwargs", {name: value}) for name, value in [
            ("use_cache", False), ("num_beams", 2), ("cache_implementation", "static"), ("temperature", 2.0),
            ("max_new_tokens", 3), ("stop_strings", "no")]),
        (VideoGRPOConfig, "cache_implementation", "static"),
        (VideoGRPOConfig, "chat_template_kwargs", {"add_vision_id": True}),
        (VideoGRPOConfig, "use_transformers_continuous_batching", True),
        *((VideoSFTConfig, name, value) for name, value in [
            ("completion_only_loss", False), ("assistant_only_loss", True), ("truncation_mode", "keep_end"),
            ("packing", True), ("eval_packing", True), ("padding_free", True), ("pad_to_multiple_of", 8),
            ("pad_token", "<|im_end|>"), ("dataset_text_field", "problem"), ("label_smoothing_factor", 0.1)]),
        *((VideoDPOConfig, name, value) for name, value in [
            ("truncation_mode", "keep_end"), ("padding_free", True), ("pad_to_multiple_of", 8), ("pad_token", "x")]),
    ],
)  # fmt: skip
def test_options_of_trl_that_do_not_fit_are_refused_by_name(config, option, value, tmp_path):
    options = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    if option == "vllm":
        options, option = {**options, "use_vllm": True}, "generation_kwargs"
    with pytest.raises(ValueError, match=f"^{option}: .*{next(iter(value)) if isinstance(value, dict) else value}"):
        config(**options, **{option: value})
    config(**options)


@pytest.mark.parametrize("count", [2, 3])
def test_rows_that_fill_no_generation_batch_are_refused(count, load, media_root, tmp_path):
    model, encoder = load()
    rows = [make_row(f"row{place}", media_root) for place in range(count)]
    options = {"per_device_train_batch_size": 2, "steps_per_generation": 3, "max_completion_length": 4}
    trainer = make_trainer(model, encoder, rows, tmp_path, **options)
    if count == 3:
        assert trainer.train().global_step == 1
    else:
        with pytest.raises(RowError, match="The 2 training rows fill no batch.*steps_per_generation"):
            trainer.train()


class _KilledError(RuntimeError):
    pass


# 8 micro-batches an epoch, in steps of 3, 3 and 2; generation batches of 4, so that a step may end amid one
CUT = {"steps_per_generation": 2, "num_iterations": 2, "gradient_accumulation_steps": 3, "save_steps": 1}


@pytest.mark.parametrize(
    ("stop", "how", "checkpoint", "changes"),
    [(3, "killed", 2, {}), (5, "killed", 4, {}), (4, "killed", 4, CUT), (1, "SIGTERM", 2, {**CUT, "save_steps": 99})],
)
def test_resume_repeats_nothing_and_loses_nothing(stop, how, checkpoint, changes, load, media_root, tmp_path):
    """Broken off and resumed, in the second epoch and amid a generation batch too, a run is what an unbroken one is."""
    rows = video_rows(media_root, 8)
    options = {
        "per_device_train_batch_size": 4, "steps_per_generation": 1, "num_generations": 2, "max_steps": 7,
        "save_strategy": "steps", "save_steps": 2, "max_completion_length": 4, "shuffle_dataset": True, "seed": 3,
        "logging_steps": 1, "enable_jit_checkpoint": True, **changes,
    }  # fmt: skip

    def reward(completion_ids, **kwargs):
        return [float(sum(ids) % 7) for ids in completion_ids]  # never the same within a group: the weights move

    def run(folder, *, stop=None, resume=None):
        model, encoder = load()
        trainer = make_trainer(model, encoder, rows, folder, **options)
        trainer.reward_funcs = [reward]
        trainer.rollout_store = RolloutStore(folder / "rollouts")
        if stop is not None:
            generate = trainer._generate_single_turn

            def generate_or_stop(*args, **kwargs):
                result = generate(*args, **kwargs)
                if trainer.state.global_step == stop and how == "killed":
                    trainer.rollout_store.write([], step=stop, part=9, rank=0, reward_names=["accuracy_reward"])
                    raise _KilledError
                if trainer.state.global_step == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                return result

            trainer._generate_single_turn = generate_or_stop
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return trainer

    folder = tmp_path / "broken" / "run"
    whole = run(tmp_path / "whole" / "run")
    if how == "killed":
        with pytest.raises(_KilledError):
            run(folder, stop=stop)
    else:
        assert run(folder, stop=stop).terminated and not whole.terminated
    state = folder / f"checkpoint-{checkpoint}" / "trainer_state.json"
    content = json.loads(state.read_text())
    record = content["stateful_callbacks"]["run"]
    record["seconds"]["rollout"], record["minutes"], record["train_s"] = 1e6, 1e6, 1e6
    state.write_text(json.dumps(content))
    resumed = run(folder, resume=last_checkpoint(folder))
    stored, expected = resumed.rollout_store.read(), whole.rollout_store.read()
    assert len({row["rollout_id"] for row in stored}) == len(stored)
    for key in ("rollout_id", "question_id", "completion", "advantage"):  # the same rows, weights and random state
        assert [row[key] for row in stored] == [row[key] for row in expected], key
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())
    assert (how == "killed") == bool(list((folder / "rollouts" / "set_aside").glob("*/*.parquet")))
    # of the whole run, and not of its last start
    logged, before = resumed.state.log_history, whole.state.log_history
    assert logged[-1]["train_loss"] == pytest.approx(before[-1]["train_loss"])
    assert [entry.get("num_tokens") for entry in logged] == [entry.get("num_tokens") for entry in before]
    assert resumed.seconds["rollout"] > 1e6 and resumed.minutes > 1e6 and logged[-1]["train_runtime"] > 1e6

    again = run(folder, resume=folder / "checkpoint-7")  # killed before it said that it was finished: no step is made
    assert again.state.global_step == 7 and again.rollout_store.read() == stored
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())


def test_the_store_holds_training_rollouts_only(load, mixed_rows, tmp_path):
    model, encoder = load()
    trainer = make_trainer(model, encoder, mixed_rows, tmp_path, per_device_eval_batch_size=2, max_completion_length=6)
    trainer.rollout_store = RolloutStore(tmp_path / "rollouts")
    trainer.train()
    before = trainer.rollout_store.read()
    trainer.evaluate(eval_dataset=trainer.train_dataset)
    rollouts = trainer.rollout_store.read()
    assert rollouts == before and len(rollouts) == 10
    for row, rollout in zip([row for row in mixed_rows for _ in range(2)], rollouts, strict=True):
        for key in ("question_id", "problem", "options", "solution", "videos", "images"):
            assert rollout[key] == row[key]
        assert rollout["step"] == 0 and rollout["prompt_template"] == encoder.template.hash
        assert set(rollout["rewards"]) == {"accuracy_reward"}
        assert rollout["finish_reason"] in ("stop", "length")
        assert 0 < rollout["completion_tokens"] <= 6
        assert "media_root" not in rollout
    assert len({rollout["rollout_id"] for rollout in rollouts}) == 10


def test_a_broken_write_leaves_no_file(tmp_path):
    store = RolloutStore(tmp_path)
    with pytest.raises((TypeError, ValueError)):
        store.write([{"step": "not a number"}], step=0, part=0, rank=0, reward_names=[])
    assert store.files() == []


def test_frames_that_do_not_matter_stop_the_run(load, media_root, tmp_path):
    """A model whose vision features are blanked fails the check at the start."""
    from veripo_trl.trainers.guards import FramesIgnoredError

    model, encoder = load()

    def blank(module, inputs, output):
        output.pooler_output = torch.zeros_like(output.pooler_output)
        return output

    trainer = make_trainer(model, encoder, video_rows(media_root, 2), tmp_path)
    model.model.visual.register_forward_hook(blank)
    with pytest.raises(FramesIgnoredError, match="row0"):
        trainer.train()


def test_pushes_are_private_unless_told_otherwise(tmp_path):
    for config in (VideoGRPOConfig, VideoSFTConfig):
        options = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
        assert config(**options).hub_private_repo is True
        assert config(**options, hub_private_repo=False).hub_private_repo is False
