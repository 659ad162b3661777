"""The curriculum of temporal grounding: worked numbers, rows chosen by an evaluation, masks that ease over the steps."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import StoppedError, make_grpo_trainer, state, stop_at
from transformers import set_seed

from conftest import make_row
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.data.schema import RowError
from veripo_trl.errors import ConfigError
from veripo_trl.media.video import Clip
from veripo_trl.methods import load_methods, with_methods
from veripo_trl.methods.grounding_curriculum import (
    GroundingCurriculumOptions,
    chosen,
    masked,
    read_difficulty,
    weight,
)
from veripo_trl.model.encoding import Shown
from veripo_trl.trainers.grpo import VideoGRPOTrainer
from veripo_trl.verifier.pairs import seeded_order


@pytest.fixture
def clip():
    """16 frames, one a second, that all differ; the mean colour is 120."""
    frames = np.broadcast_to(np.arange(0, 256, 16, np.uint8)[:, None, None, None], (16, 4, 4, 3)).copy()
    return Clip(frames, 2.0, 32, list(range(0, 32, 2)), "made up")


def hidden_of(clip, **how) -> set[int]:
    frames = masked(clip, **how)
    assert frames.shape == clip.frames.shape and frames.dtype == np.uint8
    hidden = {place for place in range(16) if not np.array_equal(frames[place], clip.frames[place])}
    assert all((frames[place] == 120).all() for place in hidden)
    return hidden


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_masked(clip, seed):
    """The span is frames 4 to 7, 12 are outside: 9, 6 and none are hidden, and what was shown stays shown."""
    found = {share: hidden_of(clip, spans=((4.0, 7.0),), share=share, seed=seed) for share in (0.75, 0.5, 0.0)}
    assert {share: len(hidden) for share, hidden in found.items()} == {0.75: 9, 0.5: 6, 0.0: 0}
    assert found[0.5] < found[0.75] and not found[0.75] & {4, 5, 6, 7}
    assert found[0.5] != hidden_of(clip, spans=((4.0, 7.0),), share=0.5, seed=seed + 2)
    two = hidden_of(clip, spans=((0.0, 2.5), (9.0, 15.0)), share=0.75, seed=seed)
    assert len(two) == 4 and two < {3, 4, 5, 6, 7, 8}
    assert hidden_of(clip, spans=((0.0, 99.0),), share=0.75, seed=seed) == set()


@pytest.mark.parametrize(
    ("p", "expected"), [(0.3, 1.0), (0.1, 0.6065), (0.5, 0.6065), (0.7, 0.1353), (0.0, 0.0), (1.0, 0.0022)]
)
def test_weights(p, expected):
    assert weight(p, "weighted") == pytest.approx(expected, abs=1e-4)


def test_rows_are_chosen_by_difficulty():
    difficulty = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.71, 1.0]
    assert chosen(difficulty, 7, how="spaced", seed=0) == [1, 2, 3, 4, 5, 6, 7]
    assert chosen(difficulty[::-1], 3, how="spaced", seed=0) == [2, 5, 8]  # .7, .4, .1
    assert chosen(difficulty, 9, how="weighted", seed=0) == list(range(1, 10))
    drawn = [tuple(chosen(difficulty, 3, how="weighted", seed=seed)) for seed in range(300)]
    assert drawn[0] == tuple(chosen(difficulty, 3, how="weighted", seed=0)) and len(set(drawn)) > 20
    counts = [sum(index in one for one in drawn) for index in range(10)]
    assert counts[0] == 0 and min(counts[2:5]) > counts[7] > counts[9]
    with pytest.raises(ConfigError, match="expected 1 to 7, the rows that are fit for row_choice: spaced .of 10.; got 8"):
        chosen(difficulty, 8, how="spaced", seed=0)


@pytest.fixture
def rows(media_root):
    """`long.mp4` has 24 frames in 12 seconds."""
    task = {"problem_type": "temporal grounding", "options": [], "problem": "When is it?", "videos": ["long.mp4"]}
    spans = ("4 to 6", "0 to 3", "8.0 to 10.0 of 12", "1 to 2")
    return [make_row(f"row{n}", media_root, solution=span, **task) for n, span in enumerate(spans)]


# tIoU .1, .6, .2 and .9
ANSWERS = {"row0": "4 to 4.2", "row1": "0 to 1.8", "row2": "8 to 8.4", "row3": "1 to 1.9"}


@pytest.fixture
def evaluated(rows, tmp_path):
    """What an evaluation of the rows wrote, and one more row."""

    def write(answers) -> str:
        raw = [{key: value for key, value in row.items() if key != "media_root"} for row in rows]
        raw.append({**raw[0], "question_id": "held-out"})
        found = [
            {
                "question": row, "ground_truth": row["solution"],
                "model_output": f"<think>x</think><answer>{answers.get(row['question_id'], '')}</answer>",
            }
            for row in raw
        ]  # fmt: skip
        file = tmp_path / f"evaluated{len(list(tmp_path.glob('*.json')))}.json"
        file.write_text(json.dumps(found))
        return str(file)

    return write


def test_difficulty_is_the_mean_over_evaluations(evaluated):
    one, two = evaluated(ANSWERS), evaluated({**ANSWERS, "row0": "4 to 6", "row3": "no idea"})
    expected = {"row0": 0.1, "row1": 0.6, "row2": 0.2, "row3": 0.9, "held-out": 0.0}
    assert read_difficulty([one]) == pytest.approx(expected)
    assert read_difficulty([one, two]) == pytest.approx({**expected, "row0": 0.55, "row3": 0.45})
    failed = json.loads(Path(two).read_text())
    failed[0]["model_output"] = ""  # its video could not be read
    Path(two).write_text(json.dumps(failed))
    assert read_difficulty([two]) == pytest.approx({"row1": 0.6, "row2": 0.2, "row3": 0.0, "held-out": 0.0})


@pytest.fixture
def sampled(monkeypatch):
    """The prompts that were sampled from, one of each group."""
    from veripo_trl.trainers import grpo

    prompts, sample = [], grpo.sample_completions

    def recording(model, chunk, **kwargs):
        prompts.extend(chunk[::2])
        return sample(model, chunk, **kwargs)

    monkeypatch.setattr(grpo, "sample_completions", recording)
    monkeypatch.setattr(grpo, "drop_pixels", lambda *args: None)  # they are looked at afterwards
    return prompts


def make_trainer(load, rows, folder, *, given=None, **changes):
    model, encoder = load(max_frames=8)
    make = with_methods(VideoGRPOTrainer, ["grounding_curriculum"], [given]) if given else VideoGRPOTrainer

    def by_tokens(completion_ids, **kwargs):
        return [sum(ids) % 7 / 7 for ids in completion_ids]

    settings = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 4, "max_steps": 4}
    trainer = make_grpo_trainer(
        model, encoder, rows, folder, make=make, reward=by_tokens, **{**settings, "logging_steps": 1, **changes}
    )
    trainer.rollout_store = RolloutStore(folder / "rollouts")
    set_seed(0)
    return trainer


def as_masked(trainer, row, share):
    if not share:
        return trainer.encoder.encode(row)
    span = tuple(float(end) for end in row["solution"].partition(" of ")[0].split(" to "))
    seed = seeded_order(trainer.args.seed, "mask", row["question_id"])
    hide = partial(masked, spans=(span,), share=share, seed=seed)
    return trainer.encoder.encode({**row, "shown": Shown("mask", share, frames=hide)})


def test_masks_ease_over_the_steps(load, rows, tmp_path, evaluated, sampled):
    """Two steps an epoch, two epochs, masks for half of the steps: .75 (not 1) in the first, .5 in the second."""
    given = GroundingCurriculumOptions([evaluated(ANSWERS)])
    trainer = make_trainer(load, rows, tmp_path / "run", given=given)
    trainer.train()
    assert [prompt.question_id for prompt in sampled] == ["row0", "row1", "row2", "row3"] * 2
    for prompt, share in zip(sampled, [0.75, 0, 0.5, 0, 0, 0, 0, 0], strict=True):
        row = rows[int(prompt.question_id[-1])]
        expected = as_masked(trainer, row, share)
        assert torch.equal(prompt.pixel_values_videos, expected.pixel_values_videos)
        assert np.array_equal(prompt.input_ids, expected.input_ids)
        assert np.array_equal(prompt.positions, trainer.encoder.encode(row).positions)
    assert not torch.equal(sampled[0].pixel_values_videos, sampled[4].pixel_values_videos)
    stored = trainer.rollout_store.read()
    shown = {(row["step"], row["question_id"], row["shown"]["level"]) for row in stored if row["shown"]}
    assert shown == {(0, "row0", 0.75), (1, "row2", 0.5)}
    logged = trainer.state.log_history[:4]
    assert [entry["curriculum/masked"] for entry in logged] == [0.5, 0.5, 0, 0]
    first = [(bool(row["shown"]), row["rewards"]["by_tokens"]) for row in stored if row["step"] == 0]
    rewards = {which: np.mean([reward for masked, reward in first if masked == which]) for which in (True, False)}
    assert logged[0]["curriculum/reward_masked"] == pytest.approx(rewards[True], abs=1e-6)
    assert logged[0]["curriculum/reward_whole"] == pytest.approx(rewards[False], abs=1e-6)
    assert "curriculum/reward_masked" not in logged[2]

    sampled.clear()
    trainer.evaluate(eval_dataset=trainer.train_dataset)
    whole = trainer.encoder.encode(rows[0]).pixel_values_videos
    assert all(torch.equal(prompt.pixel_values_videos, whole) for prompt in sampled)


def test_shares_are_of_the_chosen_rows_and_their_steps(load, rows, tmp_path, evaluated):
    """row1 and row2 are chosen, and of these row2 is hard. One batch an epoch, where a step takes three: four steps are
    four epochs, and half of them have masks."""
    file = evaluated({**ANSWERS, "row0": "no idea"})
    given = GroundingCurriculumOptions([file], row_choice="spaced", chosen_rows=2)
    settings = {"gradient_accumulation_steps": 3, "steps_per_generation": 1}
    trainer = make_trainer(load, rows, tmp_path / "run", given=given, **settings)
    added = trainer._get_train_sampler().added
    shares = [[added(index, {"epochs": epochs}).get("shown") for epochs in (0.0, 1.0, 1.5, 2.0)] for index in (0, 1)]
    assert shares[0] == [None] * 4
    assert [shown and shown.level for shown in shares[1]] == [0.75, 0.5, 0.25, None]
    choice = {**rows[2], "problem_type": "multiple choice", "options": ["A. it", "B. he"], "solution": "B"}
    trainer.train_dataset = [choice] * 2
    assert added(1, {"epochs": 0.0}) == {}  # nothing but spans can be masked around


def test_without_masks_the_steps_are_plain_grpos(load, rows, tmp_path, evaluated):
    weights = []
    for given in (None, GroundingCurriculumOptions([evaluated(ANSWERS)], mask_largest=0.0)):
        trainer = make_trainer(load, rows, tmp_path / str(given is None), given=given, max_steps=1)
        trainer.train()
        weights.append(state(trainer.model))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_resume_and_workers_show_the_same(load, rows, tmp_path, evaluated, sampled):
    """Of three chosen rows, amid a generation batch and with workers in the loader."""
    file = evaluated({**ANSWERS, "row3": "5 to 6"})  # nothing of it is right: it is not chosen
    given = GroundingCurriculumOptions([file], row_choice="weighted", chosen_rows=3, mask_below=0.7, mask_until=1.0)
    options = {
        "per_device_train_batch_size": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 8,
        "num_generations": 4, "save_strategy": "steps", "save_steps": 1, "shuffle_dataset": True, "seed": 3,
    }  # fmt: skip

    def run(folder, *, workers=0, stop=None, resume=None):
        sampled.clear()
        trainer = make_trainer(load, rows, folder, given=given, dataloader_num_workers=workers, **options)
        assert list(trainer.train_dataset["question_id"]) == ["row0", "row1", "row2"]
        stop_at(trainer, stop)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return trainer

    whole = run(tmp_path / "whole" / "run")
    with pytest.raises(StoppedError):
        run(tmp_path / "broken" / "run", workers=1, stop=6)
    resumed = run(tmp_path / "broken" / "run", workers=1, resume=tmp_path / "broken" / "run" / "checkpoint-5")
    stored, expected = resumed.rollout_store.read(), whole.rollout_store.read()
    levels = {row["step"]: row["shown"]["level"] for row in expected}
    assert levels == pytest.approx({0: 0.75, 2: 0.75, 4: 0.5, 6: 0.25})
    for key in ("rollout_id", "completion", "shown", "rewards", "advantage"):
        assert [row[key] for row in stored] == [row[key] for row in expected], key
    weights = state(whole.model)
    assert all(torch.equal(value, weights[name]) for name, value in state(resumed.model).items())


def test_what_it_cannot_do_is_refused(load, rows, tmp_path, evaluated):
    file = evaluated(ANSWERS)
    for options, message in (
        ({}, "expected difficulty_files"),
        ({"difficulty_files": [file], "mask_largest": 1.0}, "a mask_largest from 0 to under 1"),
        ({"difficulty_files": [file], "mask_until": 0.0}, "a mask_until over 0"),
        ({"difficulty_files": [file], "row_choice": "spaced"}, "chosen_rows: expected 1 to 3, .* got 2500"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_trainer(load, rows, tmp_path, given=GroundingCurriculumOptions(**options))
    few = make_trainer(load, rows, tmp_path, given=GroundingCurriculumOptions([file]), per_device_train_batch_size=16)
    with pytest.raises(RowError, match="The 4 training rows fill no batch"):
        few.get_train_dataloader()
    others = [*rows, {**rows[0], "question_id": "new"}]
    with pytest.raises(ConfigError, match="1 of 5 training rows are not answered in them .'new' first"):
        make_trainer(load, others, tmp_path, given=GroundingCurriculumOptions([file]))
    with pytest.raises(ConfigError, match="cannot go together: each decides how a row is shown"):
        load_methods(["difficulty_augmentation", "grounding_curriculum"])
