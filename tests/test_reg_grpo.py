"""Reg-GRPO: the worked numbers, and that TRL's loss has the regression's gradient."""

import copy

import pytest
import torch
from helpers import fixed_completions, give_completions, make_grpo_trainer, video_rows

from veripo_trl.errors import ConfigError
from veripo_trl.methods import with_methods
from veripo_trl.methods.reg_grpo import RegGRPO, RegGRPOOptions, coefficients, regression
from veripo_trl.trainers.grpo import VideoGRPOTrainer

UP = [1, 1, -1, -1]
# Rewards, log-ratios, floor; then A, z, L, and ∂L/∂ρ.
PAIRS = [
    ([1, 1, 0, 0], [0, 0, 0, 0], 0.1, [0.8659, UP], [0, UP], 0.7497, [-4.3294, UP]),
    ([1, 1, 0, 0], [0, 0, 0, 0], 1.0, [0.8659, UP], [0, UP], 0.7497, [-0.4329, UP]),
    ([1, 1, 0, 0], [0.1, 0.1, -0.1, -0.1], 0.1, [0.8659, UP], [0.6547, UP], 0.0446, [-0.2963, UP]),
    ([1, 1, 0, 0], [-0.1, -0.1, 0.1, 0.1], 0.1, [0.8659, UP], [-0.6547, UP], 2.3120, [-2.1330, UP]),
    ([1, 1, 0, 0], UP, 0.1, [0.8659, UP], [0.8628, UP], 0.0, [0, UP]),
    (
        [1, 0, 0, 0], [0.3, 0.1, 0.1, 0.1], 0.1, [1, [1.4997, *[-0.4999] * 3]], [1, [1.0607, *[-0.3536] * 3]], 0.0643,
        [1, [-0.7761, *[0.2587] * 3]],
    ),
    (
        [1.5, 0.5, 0.5, 0], [0.4, 0, -0.1, -0.3], 0.1, [1, [1.3905, -0.1986, -0.1986, -0.9932]],
        [1, [1.2865, 0, -0.3216, -0.9649]], 0.0166, [1, [-0.0834, 0.3195, -0.2187, -0.0173]],
    ),
    ([1, 0], [0.2, -0.2], 0.1, [0.707, [1, -1]], [0.6667, [1, -1]], 0.0016, [-0.0149, [1, -1]]),
    ([1, 1, 1, 1], [0.7, -0.3, 0.1, 0], 0.1, [0, UP], None, 0.0, [0, UP]),  # left out
]  # fmt: skip


def advantages_of(rewards):
    """As TRL gives them with `scale_rewards: group`."""
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)


@pytest.mark.parametrize("pair", PAIRS)
def test_worked_numbers(pair):
    rewards, log_ratios, floor, a, z, loss, gradient = pair
    advantages = advantages_of(torch.tensor([rewards], dtype=torch.float64))
    ratios = torch.tensor([log_ratios], dtype=torch.float64)
    scored = torch.ones_like(ratios, dtype=torch.bool)
    losses, found_z = regression(ratios, advantages, scored, floor)
    found_gradient, same = coefficients(ratios, advantages, scored, floor)
    assert torch.equal(losses, same)
    assert losses.item() == pytest.approx(loss, abs=6e-5)
    wanted = [(advantages, a), (found_gradient, gradient), *([(found_z, z)] if z else [])]
    for found, (size, signs) in wanted:
        assert found[0].tolist() == pytest.approx([size * sign for sign in signs], abs=4e-4)


def test_without_a_floor_only_the_direction_counts():
    """L = 2 − 2 corr with spreads of one: 4 for opposite signs (population's spread: rewards 1,0,0,0, L 2.6667)."""
    right = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.float64)
    advantages = (right - right.mean(1, keepdim=True)) / right.std(1, keepdim=True, correction=0)
    ratios = torch.tensor([[0.1, 0.3, 0.1, 0.1], [-0.1, -0.1, 0.1, 0.1]], dtype=torch.float64)
    spread = (
        3**0.5 / 2
    )  # ours has the unbiased one, as TRL's A: A and z both shrink by it, L by its square
    losses, _ = regression(ratios, advantages * spread, ratios == ratios, 1e-9)
    assert (losses / spread**2).tolist() == pytest.approx([2.6667, 4.0], abs=1e-4)


def test_an_unscorable_rollout_is_left_out_of_both_normalisations():
    advantages = torch.tensor([[1.4997, -0.4999, -0.4999, -0.4999, 0.0]])
    ratios = torch.tensor([[0.3, 0.1, 0.1, 0.1, 9.0]])
    scored = torch.tensor([[True, True, True, True, False]])
    gradient, losses = coefficients(ratios, advantages, scored, 0.1)
    assert losses.item() == pytest.approx(0.0643, abs=1e-4)
    assert gradient[0].tolist() == pytest.approx([-0.7761, *[0.2587] * 3, 0], abs=4e-4)


@pytest.fixture
def make_trainer(load, media_root, tmp_path, monkeypatch):
    """Two groups of four; the second group's last rollout cannot be scored."""

    def make(options=None, **changes):
        model, encoder = load()
        names, given = ([], []) if options is None else (["reg_grpo"], [options])
        kind = with_methods(VideoGRPOTrainer, names, given)
        settings = {
            "num_generations": 4, "per_device_train_batch_size": 8, "num_iterations": 2, "max_steps": 2, **changes,
        }  # fmt: skip
        trainer = make_grpo_trainer(
            model, encoder, video_rows(media_root, 2), tmp_path, make=kind, **settings
        )
        give_completions(trainer, fixed_completions(encoder.processor.tokenizer, 8), monkeypatch)
        values = [1.0, 0.0, 0.0, 2.0, 0.5, 1.0, 0.0, None]
        trainer.reward_funcs = [lambda completions, **kwargs: values[: len(completions)]]
        trainer.current_gradient_accumulation_steps = 1
        model.train()
        return trainer

    return make


def prepared(trainer):
    torch.manual_seed(0)
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def drift(trainer):
    """The policy after an update: log-ratios of some tenths."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.model.language_model.parameters():
            parameter += 0.005 * torch.randn_like(parameter)


def gradient(trainer) -> torch.Tensor:
    found = [p.grad.flatten() for p in trainer.model.model.language_model.parameters()]
    trainer.model.zero_grad()
    return torch.cat(found)


@pytest.mark.parametrize("update", ["first", "second"])
@pytest.mark.parametrize("shared", [True, False])
def test_the_gradient_is_that_of_the_regression(update, shared, make_trainer):
    """Against autograd of L written out, over rows of unequal lengths."""
    trainer = make_trainer(RegGRPOOptions(), shared_prefix=shared)
    inputs = prepared(trainer)
    assert inputs["scored"].tolist() == [True] * 7 + [False]
    if update == "second":
        drift(trainer)
    before = copy.copy(inputs)
    trainer._compute_loss(trainer.model, inputs).backward()
    assert all(inputs[key] is value for key, value in before.items()), (
        "the next iteration needs them as they were"
    )
    found = gradient(trainer)

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    whole = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    mask = inputs["completion_mask"]
    logps, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, whole, mask.size(1))
    ratios = ((logps - inputs["old_per_token_logps"]) * mask).sum(1)
    pairs = [(ratios[rows], inputs["advantages"][rows]) for rows in (slice(0, 4), slice(4, 7))]
    spreads = [own.std() for own, _ in pairs]
    losses = [
        ((a - (own - own.mean()) / (own.var() + 0.1**2).sqrt()) ** 2).mean() for own, a in pairs
    ]
    (sum(losses) / 2).backward()
    expected = gradient(trainer)
    assert (found - expected).norm() / expected.norm() < 1e-5
    wanted = {"loss": losses, "log_ratio_std": spreads}
    if update == "second":
        assert min(spreads) > 0.1
        wanted["correlation"] = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]
    for name, values in wanted.items():
        logged = trainer._metrics["train"][f"regression/{name}"]
        assert logged == pytest.approx([sum(values).item() / 2], abs=1e-4), name


def test_the_first_update_is_grpo_by_sums_of_a_sequence(make_trainer):
    """A times 2 |y| / s₀, in the plain trainer, has the same gradient; with its own it has another."""
    found = []
    for options, own in ((RegGRPOOptions(), None), (None, True), (None, False)):
        trainer = make_trainer(options)
        inputs = dict(prepared(trainer))
        if own:
            scored = torch.tensor([4.0] * 4 + [3.0] * 4)  # L is a mean over those that were scored
            inputs["advantages"] = (
                inputs["advantages"] * 2 / 0.1 * inputs["completion_mask"].sum(1) * 4 / scored
            )
        trainer._compute_loss(trainer.model, inputs).backward()
        found.append(gradient(trainer))
    assert (found[0] - found[1]).norm() / found[1].norm() < 1e-4
    assert (found[0] - found[2]).norm() / found[2].norm() > 1


SGD = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 100.0, "logging_steps": 1}


def trained(trainer, **options) -> torch.Tensor:
    """What a run adds to the policy."""
    before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    trainer.train(**options)
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - before


def test_several_micro_batches_and_updates(make_trainer):
    """Two of one group each train as one batch of both does; the second update fits the advantages better."""
    added = []
    halves = {"per_device_train_batch_size": 4, "steps_per_generation": 2}
    for changes in ({}, {**halves, "gradient_accumulation_steps": 2}):
        trainer = make_trainer(RegGRPOOptions(), **{**SGD, "learning_rate": 1e-4}, **changes)
        added.append(trained(trainer))
        first, second = trainer.state.log_history[:2]
        assert first["regression/log_ratio_std"] < 1e-4 < second["regression/log_ratio_std"]
        assert second["regression/loss"] < first["regression/loss"]
        assert second["regression/correlation"] > 0.5
    whole, parts = added
    assert (parts - whole).norm() / whole.norm() < 1e-3


def test_a_resumed_run_ends_like_an_unbroken_one(make_trainer, tmp_path):
    """From amid a generation batch: the second update needs its old log-probabilities, and who was scored."""
    trainer = make_trainer(RegGRPOOptions(), save_strategy="steps", save_steps=1, **SGD)
    whole = trained(trainer)
    again = make_trainer(RegGRPOOptions(), save_strategy="steps", save_steps=1, **SGD)
    resumed = trained(again, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert (resumed - whole).norm() / whole.norm() < 1e-5
    last, same = trainer.state.log_history[1], again.state.log_history[1]
    assert same["regression/loss"] == pytest.approx(last["regression/loss"], abs=1e-5)


def test_evaluation_is_as_it_was(make_trainer, monkeypatch):
    monkeypatch.setattr(RegGRPO, "_put_advantages", None)
    trainer = make_trainer(RegGRPOOptions())
    trainer.model.eval()
    inputs = trainer._generate_and_score_completions(
        next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    )
    assert trainer._compute_loss(trainer.model, inputs).isfinite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_iterations": 1}, "more than one optimizer step"),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
            "more than one optimizer step",
        ),
        ({"per_device_train_batch_size": 2, "steps_per_generation": 4}, "whole groups"),
        ({"loss_type": "bnpo"}, "loss_type: grpo"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level: token"),
        ({"scale_rewards": "batch"}, "scale_rewards: group"),
        ({"delta": 1.5}, "delta: None"),
        ({"beta": 0.1, "use_bias_correction_kl": True}, "use_bias_correction_kl: False"),
    ],
)
def test_refused(changes, message, make_trainer):
    with pytest.raises(ConfigError, match=message):
        make_trainer(RegGRPOOptions(), **changes)


def test_a_floor_of_nothing_is_refused(make_trainer):
    with pytest.raises(ConfigError, match="regression_floor"):
        make_trainer(RegGRPOOptions(regression_floor=0.0))
