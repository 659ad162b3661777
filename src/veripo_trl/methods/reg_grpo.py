"""Reg-GRPO: the normalised log-ratio of a group's rollouts is regressed on their advantages (DeepVideo-R1, arXiv
2506.07464; its code could not be read, so that what the paper leaves open is ours).

With ρ_i = Σ_t log π_θ(y_i,t) − Σ_t log π_old(y_i,t), A_i the group's normalised advantage and s₀ a floor:

    z_i = (ρ_i − mean ρ) / sqrt(var ρ + s₀²)        L = mean_i (A_i − z_i)²

There is no ratio and no clip: only the direction of ρ counts, and nothing but a KL term (`beta`) bounds its size. The
floor is ours: at the first update after a generation ρ is 0, and without it z would be undefined. There ∂L/∂ρ_i is
−2 A_i / (G s₀), which is GRPO's gradient with sums over a sequence; regression proper begins with the second update of
the same rollouts, so that `num_iterations: 2` belongs to it. Groups of equal rewards are left out (L would only shrink
their ρ), and so are rollouts that no reward could score.

**Place** in the step: advantages (3 in `trainers.grpo`). With c = ∂L/∂ρ and |y_i| the length of rollout i, the
advantages −c_i · G · |y_i| give TRL's `grpo` loss, at a ratio of 1, exactly the gradient of L; KL, entropy and packed
rows stay what they are. The `loss` that is logged is not L: `regression/loss` is, beside `regression/correlation` of A
and ρ, and `regression/log_ratio_std`.

**Cost**: the old log-probabilities, one forward without gradient for each generation batch.

The paper's augmentation by difficulty is `difficulty_augmentation`, which goes with this or without.
Published: G 8, β 0.1; learning rate and updates for each rollout are not.
"""

import math
from dataclasses import dataclass

import torch

from veripo_trl.errors import ConfigError
from veripo_trl.methods import Method
from veripo_trl.options import option


@dataclass
class RegGRPOOptions:
    regression_floor: float = option(
        "Reg-GRPO's s₀, of the spread of a group's log-ratios, in nats.", 0.1
    )


def regression(log_ratios, advantages, scored, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """L of each group and z, with gradient.

    Args:
        log_ratios, advantages: float (groups, G). scored: bool (groups, G), whether a rollout takes part.

    Returns:
        (groups,), 0 for groups of equal rewards, and (groups, G).
    """
    centred, count = _centred(log_ratios, scored), scored.sum(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    z = centred / (variance + floor**2).sqrt()
    losses = ((advantages - z).square() * scored).sum(1) / count[:, 0].clamp(min=1)
    return losses * advantages.any(1), z


def _centred(values: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    count = scored.sum(1, keepdim=True).clamp(min=1)
    return (values - (values * scored).sum(1, keepdim=True) / count) * scored


def coefficients(log_ratios, advantages, scored, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """∂L/∂ρ of each rollout (groups, G), and L of each group (groups,); both without gradient."""
    with torch.enable_grad():
        leaf = log_ratios.detach().clone().requires_grad_()
        losses, _ = regression(leaf, advantages, scored, floor)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return gradient, losses.detach()


class RegGRPO(Method):
    """Minimises L, see the top of this file, in updates; evaluations, which may cut groups anywhere, are as they were."""

    NAME, OPTIONS = "reg_grpo", RegGRPOOptions

    def __init__(self, *args, reg_grpo: RegGRPOOptions, **kwargs):
        check_settings(kwargs["args"], reg_grpo.regression_floor)
        self._regression_floor = reg_grpo.regression_floor
        self._regressed: dict | None = None  # inputs of the update that is running
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        first = self.accelerator.process_index * len(inputs)
        output["scored"] = ~self._scored["rewards"][first : first + len(inputs)].isnan().all(1)
        return output

    def _compute_loss(self, model, inputs):
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        # A copy: other passes over the same rollouts need what is changed. Without old log-probabilities TRL's ratio is
        # 1, and nothing is clipped.
        old = inputs["old_per_token_logps"]
        self._regressed = {**inputs, "old_per_token_logps": None, "regressed_from": old}
        try:
            return super()._compute_loss(model, self._regressed)
        finally:
            self._regressed = None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._regressed is not None:  # else old or reference log-probabilities, or an evaluation
            self._put_advantages(result[0].detach())
        return result

    def _put_advantages(self, logps: torch.Tensor) -> None:
        inputs, size = self._regressed, self.num_generations
        mask = inputs["completion_mask"]
        log_ratios = ((logps - inputs["regressed_from"]) * mask).sum(1).view(-1, size)
        advantages, scored = inputs["advantages"].view(-1, size), inputs["scored"].view(-1, size)
        gradient, losses = coefficients(log_ratios, advantages, scored, self._regression_floor)
        inputs["advantages"] = -gradient.flatten() * size * mask.sum(1)

        a, ratios = (_centred(values, scored) for values in (advantages, log_ratios))
        size_a, size_ratios = a.norm(dim=1), ratios.norm(dim=1)
        correlations = (a * ratios).sum(1) / (
            size_a * size_ratios
        )  # NaN where one of the two does not vary
        spreads = size_ratios / (scored.sum(1) - 1).clamp(min=1).sqrt()
        found = torch.stack([losses, correlations, spreads])[:, advantages.any(1)].nanmean(1)
        means = self.accelerator.gather(found[None]).nanmean(0).tolist()
        for name, value in zip(("loss", "correlation", "log_ratio_std"), means, strict=True):
            self._metrics["train"][f"regression/{name}"].append(value)


def check_settings(args, floor: float) -> None:
    """Raise unless TRL's loss has the regression's gradient under these settings.

    Args:
        args: a `VideoGRPOConfig`, as the trainer filled it in.
    """
    expected = {
        "loss_type": "grpo", "importance_sampling_level": "token", "scale_rewards": "group",
        "multi_objective_aggregation": "sum_then_normalize", "delta": None, "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
    }  # fmt: skip
    if args.beta:
        expected["use_bias_correction_kl"] = False
    if args.use_vllm:
        expected["vllm_importance_sampling_correction"] = False
    for name, value in expected.items():
        if getattr(args, name) != value:
            raise ConfigError(
                f"reg_grpo: expected {name}: {value}, got {getattr(args, name)}: TRL's loss would not have the "
                f"regression's gradient."
            )
    passes = args.steps_per_generation * args.num_iterations
    if args.gradient_accumulation_steps % passes == 0:
        raise ConfigError(
            f"reg_grpo: expected more than one optimizer step for a generation batch, so that a log-ratio can differ "
            f"from 0; gradient_accumulation_steps {args.gradient_accumulation_steps} takes in all its {passes} batches. "
            f"num_iterations: 2 is the least change."
        )
    if args.per_device_train_batch_size % args.num_generations:
        raise ConfigError(
            f"reg_grpo: expected whole groups in a batch of one process: per_device_train_batch_size "
            f"{args.per_device_train_batch_size} is no multiple of num_generations {args.num_generations}."
        )
    if not (math.isfinite(floor) and floor > 0):
        raise ConfigError(f"regression_floor: expected a number above 0, got {floor}.")
