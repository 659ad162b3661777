"""TW-GRPO: tokens weigh more where the rollouts of a group have drifted apart (arXiv 2505.24718; read in
longmalongma/TW-GRPO at aa529ff).

With ℓ[g,t,v] the log-probabilities of the whole vocabulary at token t of rollout g, and rollouts aligned by index:

    d[g,t,v] = clamp(mean_g ℓ − ℓ, −11, 11)        D[t] = mean_g Σ_v (exp d − d − 1)
    w[t] = 1 + (α_max − 1) · (D[t] − min D) / (max D − min D + 1e-8)

and the advantage of a token is w[t] · A. Every entry of the vocabulary counts alike in D, however improbable: it tells
how far the contexts differ. At token 0 all rollouts have the same one, so that w[0] is 1.

**Otherwise than released.** There, a rollout that has ended enters ℓ as the uniform distribution. At 152k words that
swamps D, and in effect rewards being long; and the gradient runs through w. Here every mean, and min and max, is over
rollouts that are alive, at tokens where at least two are; other tokens weigh 1, and w has no gradient.
`dead_positions: uniform` counts ended rollouts as theirs did, for comparison. `token_weight_top_k` (ours, off; 20 is a
beginning) leaves the improbable words out of D.

**Place** in the step: advantages (3 in `trainers.grpo`). The weights are made inside the update's own forward, by a hook
that sees the backbone's hidden states, so that there is no second forward. A group has to be whole in a batch.

**Cost**: one more product with the output head, without gradient. Memory is bounded by blocks of positions: at blocks
of 8, G 8 and 152,064 words, 78 MB over the forward's own in float32 and 98 MB in bfloat16 (measured on a CPU, as the
peak of what the allocator gave out), whatever the length.

Published: `loss_type: bnpo`, `beta: 0`, G 8, α_max 1.7. A KL term would keep its weight of 1 at every token.
"""

import math
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from veripo_trl.errors import ConfigError
from veripo_trl.methods import Method
from veripo_trl.options import option
from veripo_trl.shared_prompt.scoring import Packed

LIMIT = 11.0  # of a difference of log-probabilities, as released


@dataclass
class TWGRPOOptions:
    token_weight_max: float = option(
        "TW-GRPO's α_max, the weight of a group's most divergent token; 1: none.", 1.7
    )
    token_weight_block: int = option(
        "Positions whose logits are held at once, for all rollouts of a group.", 8
    )
    token_weight_top_k: int | None = option(
        "Ours: D over that many words, the likeliest by the group's mean. Default: over all."
    )
    dead_positions: str = option(
        "Ended rollouts in TW-GRPO's weights: left_out, or uniform, as released.", "left_out",
        choices=("left_out", "uniform"),
    )  # fmt: skip


@torch.no_grad()
def divergence(
    log_probs: torch.Tensor, alive: torch.Tensor, dead_positions: str = "left_out", top_k: int | None = None
) -> torch.Tensor:
    """D of each position, float (T,).

    Args:
        log_probs: float (G, T, V), of one group. It is overwritten. alive: bool (G, T).
        top_k: of how many of the V, those with the largest mean, the sum is; None for all.
    """
    if dead_positions == "uniform":
        log_probs.masked_fill_(~alive[..., None], -math.log(log_probs.size(-1)))
        alive = torch.ones_like(alive)
    count = alive.sum(0).clamp(min=1)
    dead = ~alive[..., None]
    mean = log_probs.masked_fill_(dead, 0).sum(0) / count[:, None]
    if top_k is not None:
        mean, words = mean.topk(min(top_k, mean.size(1)))
        log_probs = (own.gather(1, words) for own in log_probs)
    total = 0
    # One rollout at a time: what is made of it has the size of the mean.
    for own, ended in zip(log_probs, dead, strict=True):
        difference = (mean - own).clamp_(-LIMIT, LIMIT).masked_fill_(ended, 0)
        total = total + difference.exp().sub_(difference).sub_(1).sum(-1)
    return total / count


def weights_of(divergences: torch.Tensor, counted: torch.Tensor, largest: float) -> torch.Tensor:
    """w of each position, (T,): 1 where not `counted` (bool), and everywhere if those that are counted do not differ."""
    ones = torch.ones_like(divergences)
    if not bool(counted.any()):
        return ones
    low, high = divergences[counted].min(), divergences[counted].max()
    if high - low < 1e-6:
        return ones
    return torch.where(counted, 1 + (largest - 1) * (divergences - low) / (high - low + 1e-8), ones)


def group_weights(log_probs_of, alive: torch.Tensor, options: TWGRPOOptions) -> torch.Tensor:
    """w of each position of one group, (T,).

    Args:
        log_probs_of: function of a slice of positions, gives float (G, positions, V), new at each call.
        alive: bool (G, T).
    """
    size = options.token_weight_block
    blocks = [slice(start, start + size) for start in range(0, alive.size(1), size)]
    parts = [
        divergence(log_probs_of(block), alive[:, block], options.dead_positions, options.token_weight_top_k)
        for block in blocks
    ]
    enough = 1 if options.dead_positions == "uniform" else 2
    return weights_of(torch.cat(parts), alive.sum(0) >= enough, options.token_weight_max)


def predicting_states(prompts, ids, alive, shape: tuple) -> torch.Tensor:
    """Which of the states, as one list, predicts each token: int64 (rows, C), anything where not alive.

    Args:
        ids, alive: (rows, C), of completions. shape: (rows, length, H) of states, or (1, length, H) of packed rows.
    """
    rows, length, width = shape[0], shape[1], ids.size(1)
    if rows == len(prompts):  # the state before a token, which is its row's
        first = torch.arange(rows, device=ids.device)[:, None] * length + length - width - 1
        return first + torch.arange(width, device=ids.device)
    flat = Packed(prompts, ids.cpu(), alive.cpu()).flat_index.to(ids.device)
    places = torch.zeros_like(ids).view(-1)
    places[flat] = torch.arange(
        length - len(flat), length, device=ids.device
    )  # behind the prompts, if these are there
    return places.view(ids.shape)


class TWGRPO(Method):
    """Weighs the tokens of updates by D, see the top of this file. Evaluations may cut groups anywhere: no weights."""

    NAME, OPTIONS = "tw_grpo", TWGRPOOptions
    EXCLUDES = {"reg_grpo": "a weight of each token is no part of the regression's gradient."}

    def __init__(self, *args, tw_grpo: TWGRPOOptions, **kwargs):
        config = kwargs["args"]
        if config.importance_sampling_level != "token":
            raise ConfigError(
                f"tw_grpo: expected importance_sampling_level: token, got {config.importance_sampling_level}, which "
                f"spreads the mean weight of a rollout over its tokens."
            )
        if config.per_device_train_batch_size % config.num_generations:
            raise ConfigError(
                f"tw_grpo: expected whole groups in a batch of one process, but per_device_train_batch_size "
                f"{config.per_device_train_batch_size} is no multiple of num_generations {config.num_generations}."
            )
        if not (
            tw_grpo.token_weight_max >= 1
            and tw_grpo.token_weight_block >= 1
            and (tw_grpo.token_weight_top_k is None or tw_grpo.token_weight_top_k >= 1)
        ):
            raise ConfigError(
                f"tw_grpo: expected a largest weight, a block and a top_k of at least 1, got {tw_grpo}."
            )
        self._token_weighting = tw_grpo
        self._weighed: dict | None = None  # inputs of the update that is running
        super().__init__(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        # A copy: other passes over the same rollouts need the advantages as they were.
        self._weighed = dict(inputs)
        try:
            return super()._compute_loss(model, self._weighed)
        finally:
            self._weighed = None

    def _score(self, model, prompts, input_ids, attention_mask, width):
        if self._weighed is None:  # old or reference log-probabilities, or an evaluation
            return super()._score(model, prompts, input_ids, attention_mask, width)
        unwrapped, made = self._unwrapped(model), []
        ids, alive = input_ids[:, -width:], attention_mask[:, -width:].bool()

        def weigh(module, args, output):
            hidden = output.last_hidden_state.detach()
            places = predicting_states(prompts, ids, alive, hidden.shape)
            made.append(self._token_weights(unwrapped, hidden.flatten(0, 1), places, alive))

        hook = unwrapped.base_model.register_forward_hook(weigh)
        try:
            output = super()._score(model, prompts, input_ids, attention_mask, width)
        finally:
            hook.remove()
        (weights,) = made
        self._weighed["advantages"] = self._weighed["advantages"][:, None] * weights
        self._log_weights(weights, alive)
        return output

    @torch.no_grad()
    def _token_weights(self, unwrapped, hidden, places, alive) -> torch.Tensor:
        """(rows, C), from states (N, H), and which of them predicts each token."""
        head, groups = unwrapped.get_output_embeddings(), range(0, len(alive), self.num_generations)
        tensors = (head.weight, head.bias)
        weight, bias = (t.full_tensor() if isinstance(t, DTensor) else t for t in tensors)
        weights = torch.ones(alive.shape, device=hidden.device)
        with maybe_gather_lm_head_ctx(weight, bias):  # entered once by each process
            for rows in (slice(first, first + self.num_generations) for first in groups):

                def log_probs_of(block, rows=rows):
                    states = hidden[places[rows, block]].to(weight.dtype)
                    logits = torch.nn.functional.linear(states, weight, bias).div_(self.temperature)
                    return logits.log_softmax(-1, dtype=torch.float32)

                weights[rows] = group_weights(log_probs_of, alive[rows], self._token_weighting)
        return weights

    def _log_weights(self, weights, alive) -> None:
        size = self.num_generations
        living = alive.view(-1, size, alive.size(1)).sum(1).repeat_interleave(size, 0)[alive]
        own = weights[alive]
        both = torch.stack([own, living.float()])
        correlation = torch.corrcoef(both)[0, 1] if len(own) > 1 else own.new_tensor(math.nan)
        found = torch.stack([own.mean(), (own > 1.5).float().mean(), correlation])
        means = self.accelerator.gather(found[None]).nanmean(0).tolist()
        for name, value in zip(("mean", "above_1.5", "correlation_with_alive"), means, strict=True):
            self._metrics["train"][f"token_weights/{name}"].append(value)
