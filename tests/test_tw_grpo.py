"""TW-GRPO's token weights: the worked numbers, by blocks and packed, and in TRL's loss."""

import dataclasses
import math

import pytest
import torch
from helpers import fixed_completions, give_completions, make_grpo_trainer, video_rows

from veripo_trl.errors import ConfigError
from veripo_trl.methods import with_methods
from veripo_trl.methods.tw_grpo import TWGRPO, TWGRPOOptions, divergence, group_weights, weights_of
from veripo_trl.model.inputs import model_inputs
from veripo_trl.shared_prompt.rollout import left_pad
from veripo_trl.trainers.grpo import VideoGRPOTrainer

EVEN, HIGH, LOW, SURE = [0.5, 0.5], [0.8, 0.2], [0.2, 0.8], [0.9, 0.1]
# Probabilities of each rollout's tokens; how many of them it lived; D and w; w where ended ones count as uniform.
PAIRS = {
    "drifted apart once": ([[EVEN, HIGH, SURE], [EVEN, LOW, SURE]], [3, 3], [0, 0.5, 0], [1, 1.7, 1], [1, 1.7, 1]),
    "and a little later": (
        [[EVEN, HIGH, [0.6, 0.4]], [EVEN, LOW, [0.4, 0.6]]], [3, 3], [0, 0.5, 0.041241], [1, 1.7, 1.057738],
        [1, 1.7, 1.057738],
    ),
    # Alone at its last token, a rollout is compared with nothing: the released code rewards it for being long.
    "one has ended": ([[EVEN, HIGH, SURE], [EVEN, LOW, SURE]], [3, 2], [0, 0.5, 0], [1, 1.7, 1], [1, 1.7, 1.5392]),
    "three rollouts": ([[EVEN, HIGH], [EVEN, LOW], [EVEN, HIGH]], [2, 2, 2], [0, 0.450472], [1, 1.7], [1, 1.7]),
    "two of three": ([[EVEN, HIGH], [EVEN, LOW], [EVEN, HIGH]], [2, 2, 1], [0, 0.5], [1, 1.7], [1, 1.7]),
    "all alike": ([[EVEN, HIGH, SURE]] * 2, [3, 3], [0, 0, 0], [1, 1, 1], [1, 1, 1]),
    "a group of one": ([[EVEN, HIGH, SURE]], [3], [0, 0, 0], [1, 1, 1], [1, 1, 1]),
}  # fmt: skip


def alive_of(lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("block", [1, 2, 8])
def test_worked_numbers(name, block):
    probabilities, lengths, divergences, ours, released = PAIRS[name]
    log_probs, alive = torch.tensor(probabilities).log(), alive_of(lengths)
    assert divergence(log_probs.clone(), alive).tolist() == pytest.approx(divergences, abs=1e-5)
    options = TWGRPOOptions(token_weight_block=block)
    for mode, expected in (("left_out", ours), ("uniform", released)):
        chosen = dataclasses.replace(options, dead_positions=mode)
        found = group_weights(lambda positions: log_probs[:, positions].clone(), alive, chosen)
        assert found.tolist() == pytest.approx(expected, abs=1e-4), mode


def test_a_rollout_alone_is_no_measure_of_the_least_divergence():
    log_probs = torch.tensor([[[0.6, 0.4], HIGH, SURE], [[0.4, 0.6], LOW, SURE]]).log()
    found = group_weights(lambda positions: log_probs[:, positions].clone(), alive_of([3, 2]), TWGRPOOptions())
    assert found.tolist() == pytest.approx([1, 1.7, 1], abs=1e-4)


def test_divergence_is_the_ratio_of_geometric_and_harmonic_means():
    probabilities = torch.tensor([HIGH, LOW])
    geometric, inverse = probabilities.log().mean(0).exp(), (1 / probabilities).mean(0)
    expected = float((geometric * inverse).sum() - 2)
    found = divergence(probabilities.log()[:, None], torch.ones(2, 1, dtype=torch.bool))
    assert expected == pytest.approx(0.5) and found.tolist() == pytest.approx([expected])


def test_differences_are_bounded():
    """By ±11, as released, else a word that one rollout all but rules out would be all of D."""
    log_probs = torch.tensor([[[0.0, -30.0]], [[-30.0, 0.0]]])
    found = divergence(log_probs, torch.ones(2, 1, dtype=torch.bool))
    assert found.tolist() == pytest.approx([math.exp(11) + math.exp(-11) - 2], rel=1e-5)


@pytest.mark.parametrize(("top_k", "expected"), [(2, 0.0), (3, None), (4, None), (20, None)])
def test_the_likeliest_words_alone(top_k, expected):
    """By the group's mean: two of the words are as likely to both rollouts."""
    log_probs = torch.tensor([[[0.01, 0.5, 0.19, 0.3]], [[0.1, 0.5, 0.1, 0.3]]]).log()
    alive = torch.ones(2, 1, dtype=torch.bool)
    if expected is None:
        words = [1, 3, 2, 0][:top_k]
        expected = divergence(log_probs[..., words].clone(), alive).item()
        assert expected > 0.05
    assert divergence(log_probs.clone(), alive, top_k=top_k).item() == pytest.approx(expected, abs=1e-6)
    options = TWGRPOOptions(token_weight_top_k=2)
    found = group_weights(lambda positions: log_probs.expand(2, 2, 4)[:, positions].clone(), alive.expand(2, 2), options)
    assert found.tolist() == [1, 1]


def test_a_largest_weight_of_one_weighs_nothing():
    assert weights_of(torch.tensor([0.0, 3.0]), torch.tensor([True, True]), 1.0).tolist() == [1, 1]


@pytest.fixture
def make_trainer(load, media_root, tmp_path, monkeypatch):
    """(trainer, its first inputs, its completions) on two groups of four; stock without options."""

    def make(options=None, *, completions=None, questions=2, **changes):
        model, encoder = load()
        names, given = ([], []) if options is None else (["tw_grpo"], [options])
        kind = with_methods(VideoGRPOTrainer, names, given)
        settings = {
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "loss_type": "bnpo",
            **changes,
        }
        trainer = make_grpo_trainer(
            model, encoder, video_rows(media_root, questions), tmp_path, make=kind, **settings
        )
        completions = completions or fixed_completions(encoder.processor.tokenizer, 8)
        give_completions(trainer, completions, monkeypatch)
        trainer.reward_funcs = [
            lambda completions, **kwargs: [float(n % 3) for n in range(len(completions))]
        ]
        trainer.current_gradient_accumulation_steps = 1
        model.train()
        return trainer

    return make


def first_inputs(trainer):
    torch.manual_seed(0)
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def recorded(monkeypatch):
    """The weights of every update, as they are made."""
    seen, own = [], TWGRPO._token_weights

    def record(self, *args):
        seen.append(own(self, *args))
        return seen[-1]

    monkeypatch.setattr(TWGRPO, "_token_weights", record)
    return seen


@pytest.mark.parametrize("block", [1, 3, 8])
@pytest.mark.parametrize("shared", [True, False])
def test_weights_are_those_of_plain_rows(block, shared, make_trainer, monkeypatch):
    """Packed and not, against logits of a forward of the whole rows, all positions at once."""
    seen = recorded(monkeypatch)
    options = TWGRPOOptions(token_weight_block=block)
    trainer = make_trainer(options, shared_prefix=shared, temperature=0.7)
    inputs = first_inputs(trainer)
    assert not trainer._compute_loss(trainer.model, inputs).isnan()
    assert inputs["advantages"].ndim == 1, (
        "other passes over the same rollouts need them as they were"
    )
    prompts, alive = trainer._encoded["train"][1], inputs["completion_mask"].bool()
    ids, mask = left_pad(prompts, trainer._tokenizer.pad_token_id)
    ids = torch.cat([ids, inputs["completion_ids"]], 1)
    width = alive.size(1)
    # pixels were let go of after the update; their features are there
    kept = {"config": trainer.encoder.config, "frozen_model": trainer._unwrapped(trainer.model)}
    fields = model_inputs(prompts, ids, completion_width=width, **kept)
    with torch.no_grad():
        logits = trainer.model(
            input_ids=ids, attention_mask=torch.cat([mask, alive], 1), **fields
        ).logits
    log_probs = (logits[:, -width - 1 : -1] / 0.7).log_softmax(-1)
    (weights,) = seen
    assert not weights.requires_grad and not alive.all() and weights.max() > 1.5
    for rows in (slice(0, 4), slice(4, 8)):
        counted = alive[rows].sum(0) >= 2
        plain = weights_of(divergence(log_probs[rows].clone(), alive[rows]), counted, 1.7)
        torch.testing.assert_close(weights[rows], plain.expand(4, -1), atol=1e-5, rtol=0)
        assert (weights[rows][:, 0] == 1).all(), (
            "all rollouts have the same context at their first token"
        )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_largest_weight_of_one_is_plain_grpo(shared, bf16, make_trainer):
    """Loss and gradient of the first update, under autocast too; with 1.7 they differ."""
    losses, gradients = [], []
    for options in (None, TWGRPOOptions(token_weight_max=1.0), TWGRPOOptions()):
        trainer = make_trainer(options, shared_prefix=shared, bf16=bf16)
        loss = trainer._compute_loss(trainer.model, first_inputs(trainer))
        loss.backward()
        losses.append(loss.item())
        gradients.append(trainer.model.lm_head.weight.grad)
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(gradients[0], gradients[1]) and not torch.allclose(
        gradients[0], gradients[2]
    )


def test_the_worked_loss(make_trainer, monkeypatch):
    """Lengths 3 and 2, A 1 and −1: the value is that of no weights, the gradient of the second token is 1.7 times it."""
    weights = torch.tensor([[1, 1.7, 1], [1, 1.7, 1]])
    monkeypatch.setattr(TWGRPO, "_token_weights", lambda self, *args: weights)
    seen, score = [], VideoGRPOTrainer._score

    def keep(self, *args):
        output = score(self, *args)
        output.log_probs.retain_grad()
        seen.append(output.log_probs)
        return output

    monkeypatch.setattr(VideoGRPOTrainer, "_score", keep)
    trainer = make_trainer(
        TWGRPOOptions(), completions=[[101, 102, 103], [104, 105]], questions=1, num_generations=2,
        per_device_train_batch_size=2,
    )  # fmt: skip
    inputs = {**first_inputs(trainer), "advantages": torch.tensor([1.0, -1.0])}
    loss = trainer._compute_loss(trainer.model, inputs)
    assert loss.item() == pytest.approx(-(1 + 1.7 + 1 - 1 - 1.7) / 5) == pytest.approx(-0.2)
    loss.backward()
    torch.testing.assert_close(seen[0].grad, torch.tensor([[-0.2, -0.34, -0.2], [0.2, 0.34, 0.0]]))


def test_micro_batches_hold_whole_groups(make_trainer, monkeypatch):
    """Two of one group each, after TRL's shuffle, have the weights of one batch of both; and their means are logged."""
    seen = recorded(monkeypatch)
    trainer = make_trainer(TWGRPOOptions())
    trainer._compute_loss(trainer.model, first_inputs(trainer))
    trainer = make_trainer(
        TWGRPOOptions(), per_device_train_batch_size=4, steps_per_generation=2, gradient_accumulation_steps=2,
        logging_steps=1,
    )  # fmt: skip
    trainer.train()
    whole, *parts = seen
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)
    logged = trainer.state.log_history[0]
    alive = torch.tensor(
        [[n < len(c) for n in range(whole.size(1))] for c in trainer._scored["ids"]]
    )
    means = [
        part[own].mean().item() for part, own in zip(whole.split(4), alive.split(4), strict=True)
    ]
    assert logged["token_weights/mean"] == pytest.approx(sum(means) / 2, abs=1e-5)
    assert -1 <= logged["token_weights/correlation_with_alive"] <= 1
    seen.clear()
    trainer.model.eval()
    trainer._compute_loss(
        trainer.model, {**trainer._generate_and_score_completions(first_rows(trainer))}
    )
    assert not seen, "an evaluation is not weighed"


def first_rows(trainer):
    return next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))


def test_a_resumed_run_ends_like_an_unbroken_one(make_trainer, tmp_path):
    """From amid a generation batch, whose advantages are stored without weights."""
    final = []
    for resume in (None, str(tmp_path / "checkpoint-1")):
        trainer = make_trainer(
            TWGRPOOptions(), num_iterations=2, max_steps=2, save_strategy="steps", save_steps=1
        )
        trainer.train(resume_from_checkpoint=resume)
        final.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*final, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {"importance_sampling_level": "sequence"}, "importance_sampling_level: token"),
        ({}, {"per_device_train_batch_size": 2, "steps_per_generation": 4}, "whole groups"),
        ({"token_weight_max": 0.5}, {}, "a largest weight, a block and a top_k of at least 1"),
        ({"token_weight_block": 0}, {}, "at least 1"),
        ({"token_weight_top_k": 0}, {}, "at least 1"),
    ],
)
def test_refused(options, changes, message, make_trainer):
    with pytest.raises(ConfigError, match=message):
        make_trainer(TWGRPOOptions(**options), **changes)
