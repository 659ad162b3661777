"""GRPO-CARE: right answers earn a bonus where their own reasoning makes them likely (arXiv 2506.16141; read in
TencentARC/GRPO-CARE at b0628fc).

A slow copy of the policy is moved every k optimizer steps, θ_slow ← d · θ_slow + (1 − d) · θ. With p_slow the
probabilities that it gives to a rollout's own tokens, and a_i its accuracy:

    c_i = min(exp(mean log p_slow over the tokens of the answer), cap)          0 without a readable answer
    right = {i: a_i > 0.1, a_i ≥ mean a, thinking of at least `care_min_think_tokens`}
    bonus_i = b · a_i  if i is right and c_i ≥ mean c over the right − margin, else 0

The bonus is a reward column (`care_reward`, of weight b) behind the recipe's own, and takes the place of a KL term:
`beta: 0`. Released: b 0.5, cap 0.95, d 0.995, k 10; margin 0 for SEED-Bench-R1, 0.01 for general sets.

**It pays for repeating the answer** in the thinking, which makes it certain: the released recipe, rerun without a cold
start, ended in a thinking that is the letter (GRPO-CARE issue 1). So ours has a floor: shorter thinking, which is what
stands before the answer's tag, earns none and is not compared with. Watch `care/think_tokens` and
`care/think_is_answer`, and see that the floor is well below what the policy writes before.

**Otherwise than released.** The tokens are those with any of the answer's text; theirs begin at the `>` of the tag, so
that a letter's c is about the root of ours. A missing answer is 0; theirs is an empty mask, exp(0). The copy is kept in
float32: in bfloat16 most steps of 0.005 of a difference round to nothing.

**Place** in the step: rewards (1 in `trainers.grpo`). Off in evaluation.

**Cost.** One forward without gradient for each generation batch, on the path of reference log-probabilities (prompts
computed once), at the sampling temperature. The copy is of what is trained: an adapter, or all weights. Its float32
values lie in host memory, in every process, and in each checkpoint; for that forward they stand in the policy's place,
so that the device holds the trained weights twice. With ZeRO-3 or FSDP no process has them whole: refused.
"""

import re
from bisect import bisect_left, bisect_right
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from veripo_trl.answers.plain import words_of
from veripo_trl.answers.score import extract_answer
from veripo_trl.errors import ConfigError, VeripoError
from veripo_trl.methods import Method
from veripo_trl.methods.bonuses import add_bonuses
from veripo_trl.options import option
from veripo_trl.shared_prompt.rollout import left_pad

FILE = "care_slow_copy.safetensors"  # in a checkpoint
RIGHT_OVER = 0.1  # accuracy, as released


@dataclass
class CAREOptions:
    """Released values, but for the floor, which is ours."""

    care_bonus: float = option("GRPO-CARE's b, the weight of its bonus.", 0.5)
    care_margin: float = option("How far an answer's likelihood may be below the mean of the right ones.", 0.0)
    care_likelihood_cap: float = option("Likelihoods over it count as it.", 0.95)
    care_decay: float = option("What the slow copy keeps of itself when it is moved.", 0.995)
    care_every_steps: int = option("Optimizer steps between two moves of the slow copy.", 10)
    care_min_think_tokens: int = option(
        "Shorter thinking earns no bonus: without a floor, thinking shrinks to the answer.", 32
    )
    care_accuracy: str | None = option("Which of `rewards` tells right answers. Default: its first accuracy.")


def care_bonus(accuracy, likelihood, *, margin: float, counted=None) -> torch.Tensor:
    """The accuracy of each rollout that earns the bonus, 0 for others; float (groups, G), as both arguments.

    Args:
        accuracy: NaN where there is none. counted: bool, likewise; others earn none and are not compared with.
    """
    # ties pass, whatever their mean's rounding
    right = (accuracy > RIGHT_OVER) & (accuracy >= accuracy.nanmean(1, keepdim=True) - 1e-6)
    if counted is not None:
        right &= counted
    mean = (likelihood * right).sum(1, keepdim=True) / right.sum(1, keepdim=True).clamp(min=1)
    return torch.where(right & (likelihood >= mean - margin - 1e-6), accuracy, 0.0)


def answer_tokens(ids: list[int], tokenizer) -> range | None:
    """Which tokens of a completion hold any of its answer's text; None without exactly one answer that is not empty."""

    def decoded(count: int) -> str:
        return tokenizer.decode(ids[:count], skip_special_tokens=True)

    text = decoded(len(ids))
    if not (answer := extract_answer(text)):
        return None
    start = text.index(answer, text.index("<answer>") + len("<answer>"))
    # The fewest tokens whose text goes beyond the answer's first character, and that reach its end. A character of
    # several tokens is U+FFFD until its last: there at the start, not yet at the end.
    counts, end = range(len(ids) + 1), start + len(answer)
    first = bisect_right(counts, start, key=lambda count: len(decoded(count))) - 1
    return range(first, bisect_left(counts, end, key=lambda count: len(decoded(count).rstrip("\ufffd"))))


def thinking_of(text: str) -> str:
    """What stands before the answer's tag, without tags."""
    return re.sub(r"</?\w+>", "", text.partition("<answer>")[0]).strip()


class StepEnd(TrainerCallback):
    """Calls a function of nothing every `steps` optimizer steps."""

    def __init__(self, then, steps: int):
        self.then, self.steps = then, steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            self.then()


class CARE(Method):
    """The mixin. It fills its column in the gathered rewards, in every process."""

    NAME, OPTIONS = "care", CAREOptions

    def __init__(self, *args, care: CAREOptions, **kwargs):
        check_settings(care)
        self._care = care
        self._compared, self._column = add_bonuses(
            kwargs, {"care_reward": care.care_bonus}, accuracy=care.care_accuracy, setting="care: care_accuracy"
        )
        self._slow: dict[str, torch.Tensor] = {}  # float32, on the host; empty until it is needed
        super().__init__(*args, **kwargs)
        if self._dist.is_zero3 or self._dist.is_fsdp:
            raise ConfigError("care: expected DDP, or ZeRO of stage 1 or 2: it copies whole weights.")
        self.add_callback(StepEnd(self._move_slow_copy, care.care_every_steps))

    # The slow copy

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def _slow_copy(self) -> dict[str, torch.Tensor]:
        if not self._slow:
            for name, parameter in self._trained().items():
                self._slow[name] = parameter.detach().to("cpu", torch.float32, copy=True)
        return self._slow

    @torch.no_grad()
    def _move_slow_copy(self) -> None:
        slow = self._slow_copy()
        for name, parameter in self._trained().items():
            slow[name].lerp_(parameter.to("cpu", torch.float32), 1 - self._care.care_decay)

    @contextmanager
    def _slow_in_place(self):
        """The slow copy's values in the policy's parameters; afterwards the policy's own, which nothing has touched."""
        slow = self._slow_copy()
        own = [(name, parameter, parameter.data) for name, parameter in self._trained().items()]
        try:
            for name, parameter, data in own:
                parameter.data = slow[name].to(data.device, data.dtype)
            yield
        finally:
            for _, parameter, data in own:
                parameter.data = data

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(self._slow_copy(), Path(output_dir) / FILE)
        super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: str) -> None:
        super()._load_rng_state(checkpoint)
        if not (file := Path(checkpoint) / FILE).exists():
            raise VeripoError(f"care: {file}: no such file. The checkpoint is of a run without it. Start anew.")
        self._slow = load_file(file)

    # The bonus

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # of all processes
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        unscorable = rewards.isnan().all(1)
        rewards[:, self._column] = 0.0
        if self.model.training:
            with self._timed("care"):
                own = self._measured(completion_ids_list).to(rewards.device)
            found = self.accelerator.gather(own).view(-1, self.num_generations, 3)
            likelihood, think_tokens, repeats = found.unbind(2)
            accuracy = rewards[:, self._compared].view_as(likelihood)
            earned = self._earned(accuracy, likelihood, think_tokens)
            # in place: the store of rollouts keeps this very tensor
            rewards[:, self._column] = earned.flatten()
            shown = {"likelihood": likelihood, "think_tokens": think_tokens}
            shown |= {"bonus_rate": (earned > 0).float(), "think_is_answer": repeats}
            for name, values in shown.items():
                self._metrics["train"][f"care/{name}"].append(values.mean().item())
        rewards[unscorable, self._column] = torch.nan  # else TRL would take them for a reward of 0
        return rewards

    def _earned(self, accuracy, likelihood, think_tokens) -> torch.Tensor:
        """The column's values, float (groups, G) as the arguments, which are of all processes and alike in each.

        A study's control overrides this, and gives `super()` a `likelihood` that is permuted within each group.
        """
        counted = think_tokens >= self._care.care_min_think_tokens
        return care_bonus(accuracy, likelihood, margin=self._care.care_margin, counted=counted)

    @torch.no_grad()
    def _measured(self, completions: list[list[int]]) -> torch.Tensor:
        """Of this process's rows c, tokens of thinking, and whether it is the answer alone; float (rows, 3)."""
        tokenizer, lengths = self._tokenizer, torch.tensor(list(map(len, completions)))
        prompt_ids, prompt_mask = left_pad(self._active, tokenizer.pad_token_id)
        ids = pad_sequence(list(map(torch.tensor, completions)), True, tokenizer.pad_token_id)
        mask = torch.arange(ids.size(1)) < lengths[:, None]
        with self._slow_in_place():
            logps, *_ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([prompt_ids, ids], 1).to(self.accelerator.device),
                torch.cat([prompt_mask, mask], 1).to(self.accelerator.device),
                ids.size(1),
                self.args.per_device_train_batch_size,
            )
        found, texts = [], tokenizer.batch_decode(completions, skip_special_tokens=True)
        for row, text, own_logps in zip(completions, texts, logps.float().cpu(), strict=True):
            answer, thinking, likelihood = answer_tokens(row, tokenizer), thinking_of(text), 0.0
            if answer is not None:
                likelihood = own_logps[answer.start : answer.stop].mean().exp().item()
            tokens = len(tokenizer(thinking, add_special_tokens=False)["input_ids"])
            repeats = answer is not None and words_of(thinking) == words_of(extract_answer(text))
            found.append([min(likelihood, self._care.care_likelihood_cap), tokens, repeats])
        return torch.tensor(found)


def check_settings(options: CAREOptions) -> None:
    """Refuse what the bonus cannot be computed with."""
    problem = None
    if not 0 < options.care_likelihood_cap <= 1 or not 0 <= options.care_decay <= 1:
        problem = f"expected a cap in (0, 1] and a decay in [0, 1]; got {options}."
    elif min(options.care_margin, options.care_min_think_tokens, options.care_every_steps - 1) < 0:
        problem = f"expected no margin or floor below 0, and moves every step or more; got {options}."
    if problem:
        raise ConfigError(f"care: {problem}")
