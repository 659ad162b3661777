"""What the studies hold against a method, each as a method of its own: the same run, with what the
method knows dealt out at random. And judges with hidden faults, for `judge:` of verify_rollouts.py.

    PYTHONPATH=evaluation/studies python recipes/grpo_video.py --config tiny/grpo.yaml --loss_type bnpo \\
        --methods controls:PermutedWeights tw_grpo

Named in `methods:` before the one that it is a control of.
"""

import random
from dataclasses import dataclass
from functools import partial

import torch

from veripo_trl.methods import Method
from veripo_trl.tiny.clips import COLOURS, MAX_COUNT
from veripo_trl.tiny.questions import LETTERS, NUMBER_WORDS
from veripo_trl.verifier.judges import RulesJudge

# What a templated thought or answer of the tiny world says; all else is the template.
SAID = {*COLOURS, *NUMBER_WORDS, *LETTERS, *map(str, range(1, MAX_COUNT + 1))}


@dataclass
class NoOptions:
    pass


class Control(Method):
    OPTIONS = NoOptions

    def __init__(self, *args, **kwargs):
        del kwargs[self.NAME]
        super().__init__(*args, **kwargs)

    def _groups(self, values: torch.Tensor) -> torch.Tensor:
        """Of (rows, …): (groups, G, …), a view."""
        size = self.num_generations if self.model.training else self.num_generations_eval
        return values.view(-1, size, *values.shape[1:])


def dealt_out(groups: torch.Tensor) -> torch.Tensor:
    """(groups, G, …) with the entries of each group in random order."""
    order = torch.rand(groups.shape[:2], device=groups.device).argsort(1)
    return torch.stack([group[places] for group, places in zip(groups, order, strict=True)])


class ShuffledRewards(Control):
    """The rewards of a group are dealt out to its rollouts: their distribution stays, and what they
    say about a completion is gone."""

    NAME = "shuffled_rewards"
    COLUMN: str | None = None  # one reward alone; None: all together

    def _calculate_rewards(self, *args):
        rewards = super()._calculate_rewards(*args)
        names = self.reward_func_names
        columns = slice(None) if self.COLUMN is None else [names.index(self.COLUMN)]
        # in place: the store of rollouts keeps this very tensor
        rewards[:, columns] = dealt_out(self._groups(rewards[:, columns])).flatten(0, 1)
        return rewards


class ShuffledConsistency(ShuffledRewards):
    """Only the consistency reward's column is dealt out."""

    NAME, COLUMN = "shuffled_consistency", "consistency_reward"


class RandomGroupsBonus(Control):
    """T-GRPO's temporal bonus for the right rollouts of as many groups, drawn at random among those
    that have a right one."""

    NAME = "random_groups_bonus"

    def _calculate_rewards(self, *args):
        rewards = super()._calculate_rewards(*args)
        if self.model.training:
            earned = self._groups(rewards[:, self._bonus_columns[0]])  # a view
            accuracy = self._groups(rewards[:, self._accuracy_column])
            right = accuracy > self._t_grpo.temporal_threshold
            able = right.any(1).nonzero()[:, 0]
            passed = torch.zeros_like(earned)
            passed[able] = earned[able].any(1)[torch.randperm(len(able))][:, None].float()
            earned.copy_(passed * right)
        return rewards


class WatchedWeights(Control):
    """TW-GRPO's weights as they are; their mean is logged apart for tokens that say something
    (colours, counts, letters) and for those of the template."""

    NAME = "watched_weights"

    def _token_weights(self, unwrapped, hidden, places, alive):
        weights = self._changed(super()._token_weights(unwrapped, hidden, places, alive), alive)
        ids = self._weighed["completion_ids"]
        words = [self._tokenizer.decode([i]).strip() in SAID for i in range(len(self._tokenizer))]
        said = torch.tensor(words)[ids] & alive
        for name, chosen in (("said", said), ("template", alive & ~said)):
            self._metrics["train"][f"token_weights/{name}"].append(weights[chosen].mean().item())
        return weights

    def _changed(self, weights, alive):
        return weights


class PermutedWeights(WatchedWeights):
    """The weights of a group are dealt out to its positions, of those where at least two rollouts
    are alive (the others weigh 1)."""

    NAME = "permuted_weights"

    def _changed(self, weights, alive):
        for group, living in zip(self._groups(weights), self._groups(alive), strict=True):
            places = (living.sum(0) >= 2).nonzero()[:, 0]
            group[:, places] = group[:, places[torch.randperm(len(places))]]
        return weights


class PermutedLikelihoods(Control):
    """GRPO-CARE's bonus by the likelihoods of other rollouts of the group."""

    NAME = "permuted_likelihoods"

    def _earned(self, accuracy, likelihood, think_tokens):
        return super()._earned(accuracy, dealt_out(likelihood), think_tokens)


# ---------------------------------------------------------------------------------- faulty judges

_RULES, _CHANCE, _LAST = RulesJudge(), random.Random(0), []
_OTHER = {"consistent": "inconsistent", "inconsistent": "consistent", "unknown": "unknown"}


async def flipped(item: dict, share: float) -> dict:
    """The rules' verdict, in a share of the rollouts the opposite one. Drawn anew for each: equal
    texts are not wronged alike."""
    found = await _RULES(item)
    swap = _CHANCE.random() < share
    return {**found, "consistency": _OTHER[found["consistency"]]} if swap else found


flipped_5, flipped_10, flipped_20 = (partial(flipped, share=each) for each in (0.05, 0.1, 0.2))


async def dealt_on(item: dict) -> dict:
    """The verdict of the rollout before: as many of each, and nothing is known of this one."""
    _LAST.append(await _RULES(item))
    return _LAST.pop(0) if len(_LAST) > 1 else _LAST[0]
