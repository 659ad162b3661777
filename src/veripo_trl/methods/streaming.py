"""Streaming: GRPO over the turns of a video (VST, arXiv 2603.12262; its code, 1ranGuan/VST at b6f4490).

A rollout of a question watches its video clip by clip (`model.streaming`): a thought on each clip but the last, then,
with the last one, the question and its answer; held-out rows are asked so too. Every turn is a sequence of its own, with
its own prompt and pixels:

    r_i = Σ rewards of the answer alone        A_i = r_i − mean of the group's r (scale_rewards: none)
    L = − Σ_i Σ_turns Σ_t min(ρ A_i, clip(ρ) A_i) / tokens of all turns of all rollouts        (loss_type: dapo)

so that a thought is worth what its answer was, and a long rollout weighs more. **Place** in the step: extra rollouts (2
in `trainers.grpo`), trained here: `_generate` gives TRL the answers' sequences, then those of the thoughts, and
log-probabilities of all of them come from its own code. Rewards, advantages and the store see the answers alone.

**Processes** have as many sequences as the one with most, in each micro-batch too: what is missing is filled with
sequences whose loss mask is 0. One micro-batch has the turns of `per_device_train_batch_size` rollouts.

**Otherwise than theirs**: the last clip is never empty, the memory is bounded (`max_memory_tokens`) and behind the clip,
positions of all vision tokens are by the model's rule and each turn's own seconds.

**Cost.** K turns: K prefills, updates over K short prompts in place of a long one, K times the sampled tokens. Of the
second turn and later a group shares no prompt, since its memories differ: vision towers run once per rollout there.
"""

from dataclasses import dataclass

import torch

from veripo_trl.errors import ConfigError
from veripo_trl.evaluate.generate import describe_completion
from veripo_trl.methods import Method
from veripo_trl.model.encoding import EncodedPrompt
from veripo_trl.model.streaming import CLIP_TOKENS, MAX_MEMORY_TOKENS, Stream, StreamEncoder
from veripo_trl.options import option
from veripo_trl.trainers.loading import RolloutCollator

ONE_TURN = "streaming trains several sequences of a rollout, and it counts on one."


@dataclass
class StreamingOptions:
    """VST's 5,000 tokens; its memory has no limit."""

    clip_tokens: int = option("Visual tokens of a turn of streaming.", CLIP_TOKENS)
    max_memory_tokens: int = option("Of the thoughts that streaming keeps.", MAX_MEMORY_TOKENS)


class Streaming(Method):
    """The mixin. It makes rollouts of several turns, and sequences of them all."""

    NAME = "streaming"
    OPTIONS = StreamingOptions
    EXCLUDES = dict.fromkeys(("t_grpo", "tw_grpo", "reg_grpo", "care"), ONE_TURN)

    def __init__(self, *args, streaming: StreamingOptions, **kwargs):
        check_settings(kwargs["args"])
        if several := sum(len(videos) > 1 for videos in kwargs["train_dataset"]["videos"]):
            raise ConfigError(f"streaming: expected rows of one video; {several} training rows have several.")
        self._streams: list[Stream] = []
        self._owners: list[int] = []  # of each sequence, the rollout that it is a turn of
        super().__init__(*args, **kwargs)
        limits = (streaming.clip_tokens, streaming.max_memory_tokens)
        self.held_out_encoder = StreamEncoder(self.encoder, *limits)
        self.data_collator = RolloutCollator(self.held_out_encoder)

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        if inputs[0]["encoded"] is None:  # a repeat of the loader's, to be generated from
            inputs = self.data_collator([{**row, "repeated": False} for row in inputs])
        self._streams = [row["encoded"].again() for row in inputs]
        rows = [{**row, "encoded": row["encoded"].turns[0][2]} for row in inputs]
        output = super()._generate_and_score_completions(rows)
        mode = "train" if self.model.training else "eval"
        owners = torch.tensor(self._owners, device=output["advantages"].device)
        self._encoded[mode] = (self._generation, self._active)
        output["advantages"] = output["advantages"][owners]
        output["row_index"] = torch.arange(len(owners), device=owners.device)
        output["generation"] = torch.full_like(owners, self._generation)
        return output

    def _generate(self, prompts: list):
        """TRL's of the last turns, with the sequences of the turns before them behind."""
        turns = self._think()
        self._active = [stream.prompt(self.encoder) for stream in self._streams]
        _, completion_ids, _, *texts = super()._generate(prompts)
        turns = [*zip(range(len(prompts)), self._active, completion_ids, strict=True), *turns]
        missing = self._most(len(turns)) - len(turns)
        missing += -(len(turns) + missing) % self.args.steps_per_generation
        loss_mask = [[1] * len(ids) for *_, ids in turns]
        turns += turns[:1] * missing
        loss_mask += [[0] * len(ids) for *_, ids in turns[len(loss_mask) :]]
        self._owners, self._active, completion_ids = map(list, zip(*turns, strict=True))
        prompt_ids = [prompt.input_ids.tolist() for prompt in self._active]
        return prompt_ids, completion_ids, loss_mask, *texts

    def _think(self) -> list[tuple[int, EncodedPrompt, list[int]]]:
        """(rollout, prompt, completion) of each turn before the last. All processes take as many turns: gathering
        weights is theirs together."""
        tokenizer, done = self._tokenizer, []
        for _ in range(self._most(max(len(stream.turns) for stream in self._streams) - 1)):
            live = [(number, stream) for number, stream in enumerate(self._streams) if not stream.is_last]
            self._active = [stream.prompt(self.encoder) for _, stream in live]
            ids = [prompt.input_ids.tolist() for prompt in self._active]
            completions, _ = self._generate_single_turn(ids, None, {}, 1)
            for (number, stream), prompt, own in zip(live, self._active, completions, strict=True):
                stream.add(describe_completion(own, tokenizer=tokenizer, ends=self.eos_token_ids), tokenizer)
                done.append((number, prompt, own))
        counts = [len(self._streams), len(done), sum(len(ids) for *_, ids in done)]
        counts += [sum(stream.memory.evicted for stream in self._streams)]
        counts = self.accelerator.gather(torch.tensor([counts], device=self.accelerator.device)).sum(0)
        rollouts, thoughts, tokens, evicted = counts.tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["streaming/turns"].append(1 + thoughts / rollouts)
        metrics["streaming/thought_tokens"].append(tokens / max(thoughts, 1))
        metrics["streaming/evicted"].append(evicted / rollouts)
        return done

    def _most(self, count: int) -> int:
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list[: len(inputs)])


def check_settings(config) -> None:
    """Refuse what turns cannot be trained with."""
    every = config.steps_per_generation * config.num_iterations
    problem = None
    if config.loss_type not in ("dapo", "cispo"):
        problem = f"loss_type: expected dapo or cispo, a mean over the tokens of all turns; got {config.loss_type}."
    elif config.gradient_accumulation_steps % every:
        problem = (
            f"expected one optimizer step per generation batch, else a checkpoint in its middle would have to keep all "
            f"memories; got steps_per_generation × num_iterations = {every} with gradient_accumulation_steps "
            f"{config.gradient_accumulation_steps}."
        )
    elif config.use_vllm:
        problem = "rollouts of several turns are by transformers. Set use_vllm false."
    elif config.prompt_parallel > 1:
        problem = "the prompts of a group have memories of their own. Set prompt_parallel 1."
    if problem:
        raise ConfigError(f"streaming: {problem}")
