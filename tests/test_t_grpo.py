"""T-GRPO: bonuses by Video-R1's formulas, and shuffled rollouts that see shuffled frames."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import StoppedError, changed, make_grpo_trainer, state, stop_at, video_rows
from transformers import set_seed

from conftest import make_row
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.errors import ConfigError
from veripo_trl.methods import load_methods, with_methods
from veripo_trl.methods.t_grpo import (
    ShufflingCollator,
    TGRPOOptions,
    advantages,
    length_bonus,
    shuffle_seed,
    temporal_bonus,
)
from veripo_trl.model.encoding import shuffled_order
from veripo_trl.trainers.grpo import VideoGRPOTrainer
from veripo_trl.vllm.inputs import content_key, media_items

NAN = float("nan")
MIXED = [1, 1, 0, 0, 1, 0, 0, 0]


# Worked by hand from the paper's formula and the released settings: μ 0.8, τ 0.1, α 0.3, ω 0.2
@pytest.mark.parametrize(
    ("ordered", "shuffled", "ratio", "expected"),
    [
        (MIXED, [1, 0, 0, 0], 0.8, MIXED),  # 0.375 against 0.2
        (MIXED, [1, 1, 0, 0], 0.8, [0] * 8),  # against 0.4
        (MIXED, [1, 1, 0, 0], 0.7, MIXED),  # against 0.35
        (MIXED, [1, 1, 0, 0], 1.0, [0] * 8),
        ([1, 0], [1, 0], 1.0, [1, 0]),  # a tie passes
        ([0, 0], [0, 0], 1.0, [0, 0]),  # so does this one, but nobody is right
        ([0.1, 0.11, 0, 0], [0, 0], 0.8, [0, 1, 0, 0]),  # strictly over the threshold
        ([1, 0], [NAN, NAN], 0.8, [0, 0]),  # no shuffled rollouts: images
        ([1, NAN, 0, 1], [0.5, NAN], 1.0, [1, 0, 0, 1]),  # of two thirds and a half
    ],
)
def test_temporal_bonus(ordered, shuffled, ratio, expected):
    given = torch.tensor([ordered]).float(), torch.tensor([shuffled]).float()
    earned = temporal_bonus(*given, ratio=ratio, threshold=0.1)
    assert earned.tolist() == [expected]


@pytest.mark.parametrize(
    ("accuracy", "tokens", "expected"),
    [
        ([1, 1, 1, 0], [319, 320, 512, 400], [0, 1, 1, 0]),
        ([1, 1, 1, 0], [319, 320, 513, 400], [0, 1, 0, 0]),
        ([1, 0, 0, 0], [400, 400, 400, 400], [0, 0, 0, 0]),  # a single right one earns nothing
    ],
)
def test_length_bonus(accuracy, tokens, expected):
    between = {"threshold": 0.1, "between": (320, 512)}
    assert length_bonus(torch.tensor([accuracy]), torch.tensor([tokens]), **between).tolist() == [expected]


GRADED = [1, 0.667, 0.5, 0]


@pytest.mark.parametrize(
    ("accuracy", "form", "plain", "with_bonus"),
    [
        # right or wrong, form constant: the bonus cancels
        (MIXED, [1] * 8, [1.2074 if a else -0.7244 for a in MIXED], [1.2074 if a else -0.7244 for a in MIXED]),
        (
            MIXED, [1, 1, 1, 1, 0, 1, 0, 1],
            [1.3651, 1.3651, -0.195, -0.195, -0.195, -0.195, -1.7552, -0.195],
            [1.4021, 1.4021, -0.3134, -0.3134, 0.0825, -0.3134, -1.633, -0.3134],
        ),
        (GRADED, [0] * 4, [1.0994, 0.3005, -0.1002, -1.2998], [0.9662, 0.3628, 0.0602, -1.3893]),
    ],
)  # fmt: skip
def test_what_the_bonus_does_to_advantages(accuracy, form, plain, with_bonus):
    accuracy = torch.tensor([accuracy]).float()
    rewards = accuracy + torch.tensor([form])
    bonus = 0.3 * temporal_bonus(accuracy, torch.zeros(1, 2), ratio=0.8, threshold=0.1)
    assert advantages(rewards, "group")[0].tolist() == pytest.approx(plain, abs=1e-4)
    assert advantages(rewards + bonus, "group")[0].tolist() == pytest.approx(with_bonus, abs=1e-4)


@pytest.mark.parametrize(("scale", "size"), [("none", 0.5), ("batch", 1.2245), ("group", 0.707)])
def test_advantages_are_scaled_as_trls(scale, size):
    found = advantages(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), scale)
    assert found.flatten().tolist() == pytest.approx([size, -size, 0, 0], abs=1e-3)


def test_a_shuffle_moves_frames_and_nothing_else(load, media_root):
    for seed in range(200):
        order = shuffled_order(4, seed)
        assert sorted(order) == [0, 1, 2, 3] and list(order) != [0, 1, 2, 3]
    assert list(shuffled_order(1, 0)) == [0]
    seeds = [shuffle_seed(seed, epoch, row) for seed in (0, 1) for epoch in (0, 1) for row in ("a", "b")]
    assert len(set(seeds)) == 8 and shuffle_seed(0, 0, "a") == seeds[0]
    _, encoder = load()
    row = make_row("row", media_root, videos=["long.mp4"])
    recorded, shuffled = encoder.encode(row), encoder.encode(row, shuffle_seed=seeds[0])
    assert np.array_equal(recorded.input_ids, shuffled.input_ids)
    assert np.array_equal(recorded.positions, shuffled.positions)
    assert not torch.equal(recorded.pixel_values_videos, shuffled.pixel_values_videos)
    # the engine of vLLM returns the features of an equal name
    names = [[content_key(item) for item in media_items(each, encoder.config)] for each in (recorded, shuffled)]
    assert names[0] != names[1]


def accuracy_reward(completion_ids, **kwargs):
    """Never the same within a group."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def make_trainer(load, rows, folder, *, options=None, reward=accuracy_reward, plain=False, make=None, **changes):
    model, encoder = load()
    options = TGRPOOptions(length_range=[1, 9]) if options is None else options
    make = make or (VideoGRPOTrainer if plain else with_methods(VideoGRPOTrainer, ["t_grpo"], [options]))
    settings = {"num_generations": 4, "per_device_train_batch_size": 4 * len(rows), "max_completion_length": 6}
    trainer = make_grpo_trainer(model, encoder, rows, folder, make=make, reward=reward, **{**settings, **changes})
    trainer.rollout_store = RolloutStore(folder / "rollouts")
    return trainer


@pytest.fixture
def sampled(monkeypatch):
    """The prompts of each chunk that was sampled from."""
    from veripo_trl.trainers import grpo

    chunks, sample = [], grpo.sample_completions

    def recording(model, prompts, **kwargs):
        chunks.append(prompts)
        return sample(model, prompts, **kwargs)

    monkeypatch.setattr(grpo, "sample_completions", recording)
    monkeypatch.setattr(grpo, "drop_pixels", lambda *args: None)  # they are looked at afterwards
    return chunks


@pytest.fixture
def rows(media_root):
    """A video, an image and a text, and another video."""
    first, second = video_rows(media_root, 2)
    others = [make_row("image", media_root, images=["square.png"]), make_row("text", media_root)]
    return [first, *others, second]


def test_extra_rollouts_see_shuffled_frames_and_fill_the_columns(load, rows, tmp_path, sampled):
    options = TGRPOOptions(length_range=[1, 9], temporal_threshold=0.3)
    trainer = make_trainer(load, rows, tmp_path / "run", options=options, max_steps=1)
    scored = []

    def reward(completion_ids, **kwargs):
        scored.append(([row for row in kwargs["question_id"]], accuracy_reward(completion_ids)))
        return scored[-1][1]

    trainer.reward_funcs[0] = reward
    trainer.train()
    ordered, extra = sampled
    assert [prompt.question_id for prompt in ordered] == [row["question_id"] for row in rows for _ in range(4)]
    assert [prompt.question_id for prompt in extra] == ["row0"] * 2 + ["row1"] * 2  # G/2 of each video
    assert extra[0] is extra[1]  # so that their prompt is computed once
    encode = partial(trainer.encoder.encode, rows[0])
    assert torch.equal(ordered[0].pixel_values_videos, encode().pixel_values_videos)
    expected = encode(shuffle_seed=shuffle_seed(trainer.args.seed, 0, "row0")).pixel_values_videos
    assert torch.equal(extra[0].pixel_values_videos, expected)
    assert not torch.equal(extra[0].pixel_values_videos, ordered[0].pixel_values_videos)

    (_, accuracies), (names, shuffled) = scored
    assert names == ["row0"] * 2 + ["row1"] * 2  # each by its own row
    stored = trainer.rollout_store.read()
    assert len(stored) == 16 and trainer.reward_func_names == ["accuracy_reward", "temporal_reward", "length_reward"]
    groups = torch.tensor(accuracies).view(4, 4)
    against = torch.tensor([shuffled[:2], [NAN] * 2, [NAN] * 2, shuffled[2:]])
    temporal = temporal_bonus(groups, against, ratio=1.0, threshold=0.3)
    assert [row["rewards"]["temporal_reward"] for row in stored] == temporal.flatten().tolist()
    tokens = torch.tensor([row["completion_tokens"] for row in stored]).view(4, 4)
    length = length_bonus(groups, tokens, threshold=0.3, between=(1, 9))
    assert [row["rewards"]["length_reward"] for row in stored] == length.flatten().tolist() and length.sum() > 4
    total = groups + 0.3 * temporal + 0.2 * length
    assert [row["advantage"] for row in stored] == pytest.approx(advantages(total, "group").flatten().tolist(), abs=1e-5)
    logged = trainer.state.log_history[0]
    assert logged["t_grpo/bonus_rate"] == pytest.approx(temporal[[0, 3]].mean().item())
    assert logged["t_grpo/accuracy_shuffled"] == pytest.approx(sum(shuffled) / 4)
    assert logged["t_grpo/accuracy_ordered"] == pytest.approx(groups[[0, 3]].mean().item())
    assert ((groups > 0.1) != (groups > 0.3)).any()  # the threshold is the option's
    change = (advantages(total, "group") - advantages(groups, "group")).abs().mean().item()
    assert logged["t_grpo/advantage_change"] == pytest.approx(change, abs=1e-5)


def test_without_weight_the_first_step_is_plain_grpos(load, rows, tmp_path, sampled):
    weights, stored = [], []
    for plain in (True, False):
        options = TGRPOOptions(temporal_bonus=0.0, length_bonus=0.0, length_range=[1, 9])
        set_seed(0)
        trainer = make_trainer(load, rows, tmp_path / f"plain{plain}", options=options, plain=plain)
        before = state(trainer.model)
        trainer.train()
        weights.append(state(trainer.model))
        stored.append([(row["completion"], row["advantage"]) for row in trainer.rollout_store.read()])
    assert len(sampled) == 3  # the extra rollouts are drawn nevertheless
    assert stored[0] == stored[1]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not all(torch.equal(value, weights[0][name]) for name, value in before.items())


def test_resume_repeats_the_shuffles(load, media_root, tmp_path, sampled):
    """In the second epoch, amid a generation batch, and with workers in the loader, a run goes on as if unbroken."""
    rows = video_rows(media_root, 4)
    options = {
        "per_device_train_batch_size": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 7,
        "save_strategy": "steps", "save_steps": 1, "shuffle_dataset": True, "seed": 3,
    }  # fmt: skip

    def run(folder, *, workers=0, stop=None, resume=None):
        sampled.clear()
        trainer = make_trainer(load, rows, folder, dataloader_num_workers=workers, **options)
        stop_at(trainer, stop)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        # a generation batch is two chunks, of a question each, and one of the extra rollouts of both
        extra = [prompt for chunk in sampled[2::3] for prompt in chunk[::2]]
        return trainer, [(prompt.question_id, prompt.pixel_values_videos) for prompt in extra]

    whole, shuffles = run(tmp_path / "whole" / "run")
    seen = {name: [pixels for other, pixels in shuffles if other == name] for name, _ in shuffles}
    assert len(seen) == 4 and any(not torch.equal(pixels[0], pixels[-1]) for pixels in seen.values())  # by epoch
    with pytest.raises(StoppedError):
        run(tmp_path / "broken" / "run", stop=6)
    resumed, again = run(tmp_path / "broken" / "run", workers=1, resume=tmp_path / "broken" / "run" / "checkpoint-5")
    assert len(again) == 2 and all(
        name == other and torch.equal(pixels, others)
        for (name, pixels), (other, others) in zip(again, shuffles[-len(again) :], strict=True)
    )
    stored, expected = resumed.rollout_store.read(), whole.rollout_store.read()
    for key in ("rollout_id", "completion", "rewards", "advantage"):
        assert [row[key] for row in stored] == [row[key] for row in expected], key
    weights = state(whole.model)
    assert all(torch.equal(value, weights[name]) for name, value in state(resumed.model).items())


def test_a_repeat_that_must_be_generated_from_is_shuffled_too(load, rows, tmp_path, sampled):
    trainer = make_trainer(load, rows, tmp_path, per_device_train_batch_size=8, steps_per_generation=2)
    first, repeat = [batch for _, batch in zip(range(2), trainer.get_train_dataloader(), strict=False)]
    assert first[0]["shuffled"] is not None and {row["shuffled"] for row in repeat} == {None}
    trainer.model.train()
    output = trainer._generate_and_score_completions(repeat)
    assert len(output["prompt_ids"]) == 16
    extra = [prompt for chunk in sampled for prompt in chunk][16:]
    assert len(extra) == 4 and torch.equal(extra[0].pixel_values_videos, first[0]["shuffled"].pixel_values_videos)
    assert trainer._active == trainer._encoded["train"][1]  # without the extra ones


def test_an_engines_log_probabilities_are_cut_off_with_the_extra_rollouts(load, rows, tmp_path, monkeypatch):
    """As vLLM answers: one request list, completions and log-probabilities in its order."""
    trainer = make_trainer(load, rows, tmp_path)
    active, extra = (make_prompts(trainer.encoder, rows[0], seed, count) for seed, count in ((None, 4), (7, 2)))
    seen = []

    def engine(self, prompt_ids, *args):
        seen.append((len(prompt_ids), list(self._active)))
        return [[place] for place in range(len(prompt_ids))], [[-float(place)] for place in range(len(prompt_ids))]

    monkeypatch.setattr(VideoGRPOTrainer, "_generate_single_turn", engine)
    trainer._active, trainer._extra = active, list(enumerate(extra))
    completions, logps = trainer._generate_single_turn([p.input_ids.tolist() for p in active], None, {}, 4)
    assert seen == [(6, active + extra)] and trainer._active is active
    assert (completions, logps) == ([[0], [1], [2], [3]], [[0.0], [-1.0], [-2.0], [-3.0]])
    assert trainer._extra_ids == [[4], [5]]


def make_prompts(encoder, row, seed, count) -> list:
    return [encoder.encode(row, shuffle_seed=seed)] * count


def test_evaluation_has_no_bonus(load, rows, tmp_path, sampled):
    trainer = make_trainer(load, rows, tmp_path, per_device_eval_batch_size=4)
    metrics = trainer.evaluate(eval_dataset=trainer.train_dataset)
    assert metrics["eval_rewards/temporal_reward/mean"] == metrics["eval_rewards/length_reward/mean"] == 0.0
    assert {prompt.question_id for chunk in sampled for prompt in chunk} == {row["question_id"] for row in rows}
    assert sum(map(len, sampled)) == 16 and not any(key.startswith("eval_t_grpo") for key in metrics)


def test_the_bonus_for_length_alone(load, rows, tmp_path, sampled):
    """Without rollouts on shuffled frames, and without their cost."""
    trainer = make_trainer(load, rows, tmp_path, options=TGRPOOptions(temporal_rollouts=0, length_range=[1, 9]))
    assert not isinstance(trainer.data_collator, ShufflingCollator)
    trainer.train()
    stored = trainer.rollout_store.read()
    assert sum(map(len, sampled)) == len(stored) == 16
    assert {row["rewards"]["temporal_reward"] for row in stored} == {0.0}
    assert {row["rewards"]["length_reward"] for row in stored} == {0.0, 1.0}


def test_what_no_reward_scores_gets_no_bonus_either(load, rows, tmp_path):
    def accuracy_reward(completion_ids, **kwargs):
        return [None if place % 4 == 1 else 1.0 - place % 2 for place in range(len(completion_ids))]

    trainer = make_trainer(load, rows, tmp_path, reward=accuracy_reward)
    trainer.train()
    stored = trainer.rollout_store.read()
    dead, alive = stored[1::4], [row for place, row in enumerate(stored) if place % 4 != 1]
    assert all(set(row["rewards"].values()) == {None} and row["advantage"] == 0.0 for row in dead)
    assert all(None not in row["rewards"].values() for row in alive)


def test_still_frames_have_no_shuffle(load, media_root, tmp_path, sampled, monkeypatch):
    trainer = make_trainer(load, video_rows(media_root, 1), tmp_path)
    load_clip = trainer.encoder.loader.load

    def still(*args, **kwargs):
        clip = load_clip(*args, **kwargs)
        clip.frames = np.repeat(clip.frames[:1], len(clip.frames), axis=0)
        return clip

    monkeypatch.setattr(trainer.encoder.loader, "load", still)
    trainer.train()
    assert sum(map(len, sampled)) == 4
    assert {row["rewards"]["temporal_reward"] for row in trainer.rollout_store.read()} == {0.0}


@pytest.mark.parametrize(("other", "changes"), [("tw_grpo", {}), ("reg_grpo", {"num_iterations": 2, "max_steps": 2})])
def test_it_goes_together_with(other, changes, load, rows, tmp_path, sampled):
    """Methods of other places in the step: the extra rollouts stay out of their advantages."""
    names = ["t_grpo", other]
    given = [TGRPOOptions(temporal_ratio=0.0), load_methods([other])[0].OPTIONS()]
    trainer = make_trainer(load, rows, tmp_path, make=with_methods(VideoGRPOTrainer, names, given), **changes)
    before = state(trainer.model)
    trainer.train()
    assert [len(chunk) for chunk in sampled] == [16, 4]
    stored = trainer.rollout_store.read()
    assert len(stored) == 16 and any(row["rewards"]["temporal_reward"] for row in stored)
    assert changed(before, trainer.model)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"temporal_rollouts": -1}, {}, "expected 0 to 4 temporal_rollouts, num_generations; got -1"),
        ({"temporal_rollouts": 5}, {}, "got 5"),
        ({}, {"num_generations": 1}, "at least 2"),
        ({"temporal_accuracy": "tiou"}, {}, "temporal_accuracy: expected one of rewards .accuracy.; got 'tiou'"),
        ({"length_range": [3]}, {}, "length_range: expected fewest and most tokens"),
        ({}, {"multi_objective_aggregation": "normalize_then_sum"}, "no bonus has its size"),
        ({}, {"reward_weights": [1.0, 2.0]}, r"weights \(2\) must match number of reward functions \(1\)"),
    ],
)
def test_what_it_cannot_do_is_refused(options, changes, message, load, rows, tmp_path):
    with pytest.raises((ConfigError, ValueError), match=message):
        make_trainer(load, rows, tmp_path, options=TGRPOOptions(**options), **changes)


def test_vllms_tensor_parallelism_which_needs_equal_processes_is_refused(load, rows, tmp_path):
    with pytest.raises(ConfigError, match="takes as many rollouts from every process"):
        make_trainer(load, rows, tmp_path, use_vllm=True, vllm_tensor_parallel_size=2)
