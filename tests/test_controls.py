"""The studies' controls keep what a method's signal looks like, and take away what it says."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "evaluation" / "studies"))

import controls  # noqa: E402

GROUPS, SIZE = 40, 4


class Base:
    """What a control sees of a trainer with its method."""

    num_generations, reward_func_names = SIZE, ["accuracy_reward", "consistency_reward"]
    _accuracy_column, _bonus_columns, _t_grpo = 0, [1], SimpleNamespace(temporal_threshold=0.1)

    def __init__(self, rewards=None):
        self.rewards, self.model = rewards, SimpleNamespace(training=True)

    def _calculate_rewards(self, *args):
        return self.rewards

    def _earned(self, accuracy, likelihood, think_tokens):
        return likelihood


def made(control: type, *args):
    """The control before `Base`, as `with_methods` puts it."""
    return type("Made", (control, Base), {})(*args, **{control.NAME: controls.NoOptions()})


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def sorted_rows(rewards) -> list:
    return [sorted(group.tolist()) for group in rewards.view(GROUPS, SIZE, -1)]


def test_rewards_stay_in_their_group_and_rows_stay_whole():
    rewards = torch.rand(GROUPS * SIZE, 2)
    found = made(controls.ShuffledRewards, rewards.clone())._calculate_rewards()
    assert sorted_rows(found) == sorted_rows(rewards)
    moved = (found != rewards).any(1).view(GROUPS, SIZE)
    assert 0.6 < moved.float().mean() < 0.9  # of four, one stays in its place on average


def test_one_column_alone_is_dealt_out():
    rewards = torch.rand(GROUPS * SIZE, 2)
    store = rewards.clone()
    found = made(controls.ShuffledConsistency, store)._calculate_rewards()
    assert found is store  # the store of rollouts keeps this very tensor
    assert torch.equal(found[:, 0], rewards[:, 0]) and not torch.equal(found[:, 1], rewards[:, 1])
    assert sorted_rows(found[:, 1]) == sorted_rows(rewards[:, 1])


def test_as_many_groups_have_the_bonus_and_only_right_rollouts():
    accuracy = (torch.rand(GROUPS, SIZE) > 0.6).float()
    accuracy[::5] = 0  # nobody is right
    passed = torch.rand(GROUPS, 1) > 0.5
    rewards = torch.stack([accuracy.flatten(), (accuracy * passed).flatten()], 1)
    found = made(controls.RandomGroupsBonus, rewards.clone())._calculate_rewards()
    earned, before = (each[:, 1].view(GROUPS, SIZE) for each in (found, rewards))
    got = earned.any(1)
    assert torch.equal(found[:, 0], rewards[:, 0])
    assert got.sum() == before.any(1).sum() and not torch.equal(got, before.any(1))
    assert torch.equal(earned, accuracy * got[:, None])


def test_weights_move_between_positions_that_count():
    alive = torch.arange(9) < torch.tensor(
        [[9], [7], [6], [3]]
    )  # at positions 7 and 8 one rollout is alone
    weights = torch.ones(SIZE, 9)
    weights[:, :7] = torch.linspace(1, 1.7, 7)
    found = made(controls.PermutedWeights)._changed(weights.clone(), alive)
    assert not torch.equal(found, weights) and torch.equal(found[:, 7:], weights[:, 7:])
    assert torch.equal(found, found[:1].expand_as(found))
    assert torch.equal(found[0, :7].sort().values, weights[0, :7])


def test_likelihoods_stay_in_their_group():
    likelihood = torch.rand(GROUPS, SIZE)
    found = made(controls.PermutedLikelihoods)._earned(None, likelihood, None)
    assert not torch.equal(found, likelihood)
    assert torch.equal(found.sort(1).values, likelihood.sort(1).values)


def test_what_a_thought_says():
    assert {"red", "three", "B", "4"} <= controls.SAID and not {"I", "see", "so"} & controls.SAID
