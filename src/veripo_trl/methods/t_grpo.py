"""T-GRPO: a bonus where frames in order beat shuffled ones, and one for length (Video-R1, arXiv 2503.21776; its code,
tulerfeng/Video-R1 at 59d65c3, for what the paper leaves open).

Of each question with a video, G̃ = G/2 rollouts more are sampled on the same frames in random order, scored and not
trained. With p and p̃ the mean accuracies of the group and of these:

    temporal_i = 1  if p ≥ μ p̃ and accuracy_i > τ            length_i = 1  if more than one rollout has accuracy > τ,
                                                                          this one too, and lo ≤ its tokens ≤ hi
    R_i = Σ rewards_i + α temporal_i + ω length_i

Both are reward columns (`temporal_reward`, `length_reward`) that this method adds behind the recipe's own, α and ω their
weights. Published: μ 1 in the paper and 0.8 in the released code, τ 0.1, α 0.3, ω 0.2, 320 to 512 tokens.

**Place** in the step: extra rollouts (2 in `trainers.grpo`). Off in evaluation. A question without a video, or whose
frames are all alike, has no temporal bonus; its rollouts are not fewer. `temporal_rollouts: 0` leaves the bonus for
length alone, as PRIMO R1 has it (arXiv 2603.15600, a fork of Video-R1's code).

**When it acts.** With accuracies of 0 and 1, a constant format, no bonus for length and `scale_rewards: group`, the
temporal bonus cancels: R is then affine in the accuracy, advantages are the same. It acts on graded rewards, on mixed
ones (it weighs them anew) and with `scale_rewards: none` or `batch`; never in a group that is all right or all wrong.
`t_grpo/advantage_change` says how much: the mean |A with both bonuses − A without|.

**Shuffle.** Seeded by the run's seed, the epoch and the question's id: the same on resume, in every process and with any
number of workers; never the identity. (Video-R1's vLLM trainer showed "shuffled" rollouts the ordered frames until July
2025.)

**Cost.** G̃/G more sampled tokens; of each video question a prefill, a pass of the vision tower and a call of the
processor more, and a look into `frame_cache` (without one, the video is decoded twice). The update is unchanged.
"""

import hashlib
from dataclasses import dataclass, field, replace

import torch
from trl.trainer.utils import nanstd

from veripo_trl.errors import ConfigError
from veripo_trl.methods import Method
from veripo_trl.methods.bonuses import add_bonuses
from veripo_trl.model.encoding import EncodedPrompt, PromptEncoder
from veripo_trl.options import option
from veripo_trl.trainers.grpo import total_rewards


@dataclass
class TGRPOOptions:
    """Published values, but for μ: the released run's is 0.8."""

    temporal_ratio: float = option(
        "T-GRPO's μ: ordered frames reach this share of the shuffled accuracy.", 1.0
    )
    temporal_threshold: float = option(
        "T-GRPO's τ: a rollout is right whose accuracy is over it.", 0.1
    )
    temporal_rollouts: int | None = option(
        "Rollouts on shuffled frames; 0: no temporal bonus. Default: half of num_generations."
    )
    temporal_bonus: float = option("T-GRPO's α, the weight of the temporal bonus.", 0.3)
    temporal_accuracy: str | None = option(
        "Which of `rewards` it compares. Default: the first named accuracy…."
    )
    length_bonus: float = option("T-GRPO's ω, the weight of the bonus for length.", 0.2)
    length_range: list[int] = field(
        default_factory=lambda: [320, 512],
        metadata={
            "help": "Fewest and most tokens that earn the bonus for length, the end token counted."
        },
    )


def temporal_bonus(accuracy, shuffled, *, ratio: float, threshold: float) -> torch.Tensor:
    """1 for each rollout that earns it, else 0.

    Args:
        accuracy: float (groups, G). shuffled: float (groups, G̃); both NaN where there is none.
    """
    # ties pass; a mean of nothing (NaN) does not
    passed = accuracy.nanmean(1) >= ratio * shuffled.nanmean(1) - 1e-6
    return (passed[:, None] & (accuracy > threshold)).float()


def length_bonus(accuracy, tokens, *, threshold: float, between: tuple[int, int]) -> torch.Tensor:
    """1 for each rollout that earns it, else 0; all of (groups, G)."""
    right = accuracy > threshold
    several, fits = right.sum(1, keepdim=True) > 1, (between[0] <= tokens) & (tokens <= between[1])
    return (right & several & fits).float()


def advantages(rewards: torch.Tensor, scale: str) -> torch.Tensor:
    """TRL's, of (groups, G) sums of rewards, NaN where unscorable; to tell what a bonus changes."""
    centred = rewards - rewards.nanmean(1, keepdim=True)
    if scale == "none":
        return centred
    spread = nanstd(rewards, dim=1, keepdim=True) if scale == "group" else nanstd(rewards)
    return centred / (spread + 1e-4)


def shuffle_seed(seed: int, epoch: int, question_id: str) -> int:
    digest = hashlib.sha256(f"{seed} {epoch} {question_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


class ShufflingCollator:
    """A collator's rows with `shuffled`: their prompt on shuffled frames, or None for a repeat of the loader's, in
    evaluation, and where no order of frames makes a difference. Rows that share a prompt share it."""

    def __init__(self, collator, encoder: PromptEncoder, seed: int):
        self.collator, self.encoder, self.seed = collator, encoder, seed

    def __call__(self, rows: list[dict]) -> list[dict]:
        rows, done = self.collator(rows), {}
        for row in rows:
            key = id(row["encoded"])
            if key not in done:
                done[key] = self._shuffled(row)
            row["shuffled"] = done[key]
        return rows

    def _shuffled(self, row: dict) -> EncodedPrompt | None:
        recorded = row["encoded"]
        if recorded is None or recorded.pixel_values_videos is None or "epoch" not in row:
            return None
        seed = shuffle_seed(self.seed, row["epoch"], row["question_id"])
        shuffled = self.encoder.encode(row, shuffle_seed=seed)
        same = torch.equal(recorded.pixel_values_videos, shuffled.pixel_values_videos)
        return None if same else shuffled


class TGRPO(Method):
    """The mixin. It reads accuracies of the gathered rewards, and writes both columns there, in every process."""

    NAME = "t_grpo"
    OPTIONS = TGRPOOptions

    def __init__(self, *args, t_grpo: TGRPOOptions, **kwargs):
        config = kwargs["args"]
        if t_grpo.temporal_rollouts is None:
            t_grpo = replace(t_grpo, temporal_rollouts=config.num_generations // 2)
        check_settings(config, t_grpo)
        self._t_grpo = t_grpo
        weights = {"temporal_reward": t_grpo.temporal_bonus, "length_reward": t_grpo.length_bonus}
        self._accuracy_column, *self._bonus_columns = add_bonuses(
            kwargs, weights, accuracy=t_grpo.temporal_accuracy, setting="t_grpo: temporal_accuracy"
        )
        # of a generation's extra rollouts: row and shuffled prompt; completions
        self._extra: list[tuple[int, EncodedPrompt]] = []
        self._extra_ids: list[list[int]] = []
        super().__init__(*args, **kwargs)
        if not t_grpo.temporal_rollouts:
            return
        self.data_collator = ShufflingCollator(self.data_collator, self.encoder, self.args.seed)

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        if self.model.training:
            if inputs[0]["encoded"] is None:  # a repeat of the loader's, to be generated from
                inputs = self.data_collator([{**row, "repeated": False} for row in inputs])
            first, count = self.accelerator.process_index * len(inputs), self._t_grpo.temporal_rollouts
            for index, row in enumerate(inputs):  # groups may be divided between processes
                if row.get("shuffled") is not None and (first + index) % self.num_generations < count:
                    self._extra.append((index, row["shuffled"]))
        rows = [{key: row[key] for key in row if key != "shuffled"} for row in inputs]
        try:
            return super()._generate_and_score_completions(rows)
        finally:
            self._extra, self._extra_ids = [], []

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        active, extra = self._active, [prompt for _, prompt in self._extra]
        self._active = active + extra
        ids = [*prompt_ids, *(prompt.input_ids.tolist() for prompt in extra)]
        try:
            completions, logps = super()._generate_single_turn(ids, *args, **kwargs)
        finally:
            self._active = active
        self._extra_ids = completions[len(active) :]
        return completions[: len(active)], logps and logps[: len(active)]

    def _rollout_chunks(self) -> list:
        """Shuffled prompts in chunks of their own, so that the others are sampled as without them."""
        active = self._active
        trained, chunks = len(active) - len(self._extra), []
        for self._active in (active[:trained], active[trained:]):
            chunks += super()._rollout_chunks()
        self._active = active
        return chunks

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # of all processes
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        unscorable = rewards.isnan().all(1)
        rewards[:, self._bonus_columns] = 0.0
        if self.model.training:
            options, (temporal, length) = self._t_grpo, self._bonus_columns
            own = zip(self._score_extra(inputs, prompts), map(len, completion_ids_list), strict=True)
            own = torch.tensor(list(own), dtype=torch.float32, device=rewards.device)  # (rows, 2)
            gathered = self.accelerator.gather(own).view(-1, self.num_generations, 2)
            shuffled, tokens = gathered.unbind(2)
            accuracy = rewards[:, self._accuracy_column].view_as(shuffled)
            over = {"threshold": options.temporal_threshold}
            earned = temporal_bonus(accuracy, shuffled, ratio=options.temporal_ratio, **over)
            long = length_bonus(accuracy, tokens, between=options.length_range, **over)
            # in place: the store of rollouts keeps this very tensor
            rewards[:, temporal], rewards[:, length] = earned.flatten(), long.flatten()
        for column in self._bonus_columns:
            rewards[unscorable, column] = torch.nan  # else TRL would take them for a reward of 0
        if self.model.training:
            self._log_bonus(rewards, accuracy, shuffled, earned)
        return rewards

    def _score_extra(self, inputs: list[dict], prompts: list) -> list[float]:
        """A shuffled rollout's accuracy for each row of this process, NaN for rows without one or without accuracy."""
        scores = [torch.nan] * len(inputs)
        if self._extra:
            places = [index for index, _ in self._extra]
            columns = [key for key in inputs[0] if key != "prompt"]
            texts = self.processing_class.batch_decode(self._extra_ids, skip_special_tokens=True)
            found = self.reward_funcs[self._accuracy_column](
                prompts=[prompts[index] for index in places],
                completions=[[{"role": "assistant", "content": text}] for text in texts],
                completion_ids=self._extra_ids,
                trainer_state=self.state,
                log_extra=lambda *_: None,  # what a reward says of trained rollouts
                log_metric=lambda *_: None,
                **{key: [inputs[index][key] for index in places] for key in columns},
            )
            for index, score in zip(places, found, strict=True):
                scores[index] = torch.nan if score is None else score
        return scores

    def _log_bonus(self, rewards, accuracy, shuffled, earned) -> None:
        metrics, weights = self._metrics["train"], self.reward_weights.to(rewards.device)
        without = weights.clone()
        without[self._bonus_columns] = 0.0
        found = [
            advantages(total_rewards(rewards, each).view_as(accuracy), self.scale_rewards)
            for each in (without, weights)
        ]
        change = (found[1] - found[0]).abs().nan_to_num().mean()
        metrics["t_grpo/advantage_change"].append(change.item())
        compared = ~shuffled.isnan().all(1)  # groups of questions whose frames were shuffled
        if compared.any():
            metrics["t_grpo/bonus_rate"].append(earned[compared].mean().item())
            metrics["t_grpo/accuracy_ordered"].append(accuracy[compared].nanmean().item())
            metrics["t_grpo/accuracy_shuffled"].append(shuffled[compared].nanmean().item())


def check_settings(config, options: TGRPOOptions) -> None:
    """Refuse what the bonus cannot be computed with."""
    size, extra, between = config.num_generations, options.temporal_rollouts, options.length_range
    problem = None
    if not 0 <= extra <= size:
        problem = f"expected 0 to {size} temporal_rollouts, num_generations; got {extra}."
    elif len(between) != 2 or between[0] > between[1]:
        problem = f"length_range: expected fewest and most tokens, like [320, 512]; got {between}."
    elif extra and config.use_vllm and config.vllm_mode == "colocate" and config.vllm_tensor_parallel_size > 1:
        problem = (
            "vLLM's tensor parallelism takes as many rollouts from every process, but only questions with a video have "
            "more. Set vllm_tensor_parallel_size 1."
        )
    if problem:
        raise ConfigError(f"t_grpo: {problem}")
