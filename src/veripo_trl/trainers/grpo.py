"""GRPO on text, image and video rows: what TRL's `GRPOTrainer` leaves out, and nothing else.

A method that changes GRPO is a mixin before `VideoGRPOTrainer` whose overrides call `super()`. It hooks in at one of five
places:

1. rewards: functions in `reward_funcs`, a column each. What needs all rows and columns at once overrides
   `_calculate_rewards`, which returns (rows of all processes, functions).
2. extra rollouts of a prompt, scored and not trained: `_generate_single_turn`. Append to `self._active` (and to
   `prompt_ids`), cut the completions off again, and fill a reward column from them in `_calculate_rewards`.
3. advantages: `_compute_loss`. TRL's loss takes `inputs["advantages"]` as (rows,) or (rows, C), and reads them after
   `_get_per_token_logps_and_entropies`, where a weight that depends on the log-probabilities can still be put.
4. which rows, and how they look: `_get_train_sampler`. What the sampler yields with a row's index reaches
   `loading.MarkedRows` and the collator in the loader's workers, and is repeated on resume.
5. problem types: nothing here, see `veripo_trl.answers` and the prompt templates.
"""

import logging
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.errors import VeripoError, settings_checked
from veripo_trl.model.encoding import EncodedPrompt, PromptEncoder, encode_unique, vision_token_ids
from veripo_trl.model.features import drop_pixels
from veripo_trl.model.inputs import vision_inputs
from veripo_trl.model.pieces import layer_inputs_on_host
from veripo_trl.options import option
from veripo_trl.shared_prompt.parallel import prefill_in_parts, share_features
from veripo_trl.shared_prompt.rollout import cut_at_end, sample_completions, whole_groups
from veripo_trl.trainers.base import VideoConfig, VideoMixin
from veripo_trl.trainers.checkpoints import with_changes
from veripo_trl.trainers.engines import whole_policy
from veripo_trl.trainers.loading import MarkedRows, MarkedSampler, RolloutCollator, loader_options, regroup
from veripo_trl.vllm import training as vllm

# What `generation_kwargs` may change: which tokens are drawn. All else is how, or would not be what is trained.
SAMPLING = (
    "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "no_repeat_ngram_size", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
    "sequence_bias", "exponential_decay_length_penalty",
)  # fmt: skip
# A `seed` would be every request's, at every step: a divided group would be given the same completions twice.
VLLM_SAMPLING = (
    "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens",
    "logit_bias", "allowed_token_ids", "bad_words", "structured_outputs",
)  # fmt: skip

logger = logging.getLogger(__name__)

HEARD_OUT = 10  # generation batches after which a reward that scored no rollout is named: some rows' type may be rare
STORED = ("question_id", "problem", "options", "problem_type", "solution", "videos", "images", "data_source")


@dataclass
class VideoGRPOConfig(VideoConfig, GRPOConfig):
    """TRL's `GRPOConfig`, with the method's defaults (arXiv 2505.19000) and private repositories."""

    loss_type: str = option("Loss, as in TRL; `grpo` averages within a completion.", "grpo")
    beta: float = option("KL coefficient; 0 needs no reference model.", 0.0)
    disable_dropout: bool = option("A LoRA's dropout scores other policies than sampled.", True)
    rollout_batch_size: int | None = option(
        "Completions that transformers decodes at once per process, each with a copy of its prompt's keys and values. "
        "Default: whole groups, at most per_device_train_batch_size or one group."
    )
    activation_offloading: bool = option(
        "Layer inputs wait for the backward pass in host memory: for long videos, with gradient checkpointing.", False
    )
    max_vllm_logp_gap: float | None = option(
        "Largest difference between the log-probabilities of vLLM and of the trainer, as the mean per token of a "
        "prompt's completions, at which a run starts. Default: 1e-3 in float32, 0.1 in half precision."
    )

    UNUSED = {
        "chat_template_kwargs": (None, {}),
        "cache_implementation": (None,),
        "use_transformers_continuous_batching": (False,),
        "ds3_gather_for_generation": (True,),  # pieces of a rollout differ between processes
    }
    BECAUSE = "Prompts are encoded and computed once per group, by this project's own code."

    def __post_init__(self):
        super().__post_init__()
        supported = VLLM_SAMPLING if self.use_vllm else SAMPLING
        if refused := [name for name in self.generation_kwargs or {} if name not in supported]:
            raise ValueError(
                f"generation_kwargs: {', '.join(refused)}: not supported in rollouts{' by vLLM' * self.use_vllm}. "
                f"Expected any of {', '.join(supported)}; temperature, max_completion_length and num_generations are "
                f"options of their own."
            )


def total_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """TRL's weighted sums of (rollouts, functions), NaN for rollouts that no function scored."""
    totals = (rewards * weights.to(rewards.device)).nansum(1)
    return totals.masked_fill(rewards.isnan().all(1), torch.nan)


class VideoGRPOTrainer(VideoMixin, GRPOTrainer):
    """TRL's `GRPOTrainer` for rows with any number of videos and images.

    Args:
        encoder: see `VideoMixin`.
        rollout_store: where every training rollout is written; None writes none.
        policy_name: what rollouts name as their policy: the model or adapter that this run starts from.
        Further arguments as in `trl.GRPOTrainer`. Datasets have the columns of `rows.load_rows`.

    Raises:
        vllm.inputs.EngineMismatchError: with `use_vllm`, where the engine's log-probabilities are not the trainer's.
    """

    step_name = "update"  # the rollout has a time of its own

    @settings_checked()
    def __init__(
        self,
        *args,
        encoder: PromptEncoder,
        rollout_store: RolloutStore | None = None,
        policy_name: str | None = None,
        **kwargs,
    ):
        model, banned = kwargs["model"], vision_token_ids(encoder.processor, encoder.config)
        config, engine = with_changes(kwargs["args"], **loader_options(kwargs["args"])), nullcontext()
        if config.use_vllm:
            datasets = [rows for rows in (kwargs["train_dataset"], kwargs.get("eval_dataset")) if rows is not None]
            config = with_changes(config, **vllm.engine_config(config, encoder, banned=banned, datasets=datasets))
            engine = vllm.trl_engine(config, encoder, model=model, datasets=datasets)
        # TRL loads the reference by the policy's name alone.
        revision = getattr(model.config, "_commit_hash", None)
        load = partial(grpo_trainer.create_model_from_path, architecture=type(model), revision=revision)
        with patch.object(grpo_trainer, "create_model_from_path", load), engine:
            super().__init__(*args, encoder=encoder, **{**kwargs, "args": config})
        if config.use_vllm:
            for scorer in (self.model, self.ref_model):
                if scorer is not None:
                    vllm.bias_logits(self.accelerator.unwrap_model(scorer), config.generation_kwargs["logit_bias"])
            self._gap_watch = vllm.GapWatch(config, dtype=vllm.engine_dtype(config, model), accelerator=self.accelerator)
        else:
            banned = sorted({*banned, *self.generation_config.suppress_tokens})
            self.generation_config.suppress_tokens = self.generation_kwargs["suppress_tokens"] = banned
        share = max(1, self.num_generations // max(1, self.args.prompt_parallel))
        self._share_out_prompts(  # so that TRL deals each group to as many neighbours
            num_generations=share * self.args.prompt_parallel,
            per_device_train_batch_size=share,
            steps_per_generation=1,
        )
        self.data_collator = RolloutCollator(encoder)
        self.rollout_store = rollout_store
        self.policy_name = policy_name or self.model.config._name_or_path
        # Encoded prompts of the latest generation batch, per mode: an evaluation between two updates of one training
        # batch must not replace them.
        self._encoded: dict[str, tuple[int, list[EncodedPrompt]]] = {}
        self._generation = 0
        self._resumed_questions: list[str] | None = None  # of a generation batch that a checkpoint was amid
        self._active: list[EncodedPrompt] = []  # prompts of the rows that a forward is running on
        self._scored: dict = {}  # what `_calculate_rewards` saw last
        self._heard: list[torch.Tensor] = []  # which functions scored any rollout, by generation batch of this start

    # Loading

    def _get_dataloader(self, dataset, *args, **kwargs):
        return super()._get_dataloader(MarkedRows(dataset), *args, **kwargs)

    def _get_train_sampler(self, dataset=None):
        return MarkedSampler(
            super()._get_train_sampler(dataset),
            batch_size=self.args.generation_batch_size,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            epoch=lambda: int(self.state.epoch or 0),
        )

    # Resuming

    def _save_rng_state(self, output_dir: str) -> None:
        """With the generation batch that the step is in the middle of: its completions cannot be sampled again."""
        started = self._step % (self.args.steps_per_generation * self.num_iterations) > 0
        saved = {"micro_step": self._step, "inputs": self._buffered_inputs if started else None, "questions": None}
        if started:
            saved["questions"] = [prompt.question_id for prompt in self._encoded["train"][1]]
        os.makedirs(output_dir, exist_ok=True)
        torch.save(saved, self._generation_file(output_dir))
        super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: str) -> None:
        super()._load_rng_state(checkpoint)
        device = self.accelerator.device
        device = "cpu" if device.type == "cpu" else device  # one of several processes has cpu:0, which torch cannot load
        saved = torch.load(self._generation_file(checkpoint), map_location=device, weights_only=True)
        self._step, self._buffered_inputs = saved["micro_step"], saved["inputs"]
        self._resumed_questions = saved["questions"]

    def _generation_file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"generation_{self.args.process_index}.pt")

    def _encode_resumed(self, rows: list[dict]) -> None:
        """Encode the prompts of the generation batch that a checkpoint was in the middle of."""
        if [row["question_id"] for row in rows] != self._resumed_questions:
            raise VeripoError("The loader gives other rows than those of the checkpoint's generation batch.")
        self._resumed_questions = None
        self._generation = int(self._buffered_inputs[0]["generation"][0])
        self._active = encode_unique(self.encoder, rows)
        self._encoded["train"] = (self._generation, self._active)
        self._make_features(self._rollout_chunks())
        if self.prompt_group is not None:
            share_features(self._unwrapped(self.model), self._active, self.prompt_group, self.accelerator.device)
        for chunk in self._rollout_chunks():  # features in the rollout's batches, to the last bit
            vision_inputs(self._unwrapped(self.model), chunk, self.accelerator.device)

    # Rollout

    def _check_first_rows(self) -> None:
        if self.rollout_store is not None and self.accelerator.is_main_process:
            self.rollout_store.set_aside_from(self.state.global_step)
        super()._check_first_rows()
        self.accelerator.wait_for_everyone()  # nobody writes rollouts before the old ones are set aside

    def _prepare_inputs(self, generation_batch):
        buffered = self._buffered_inputs
        if self.model.training and self._resumed_questions is not None:
            self._encode_resumed(generation_batch)
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is buffered:
            return inputs
        # TRL shuffled the rows of a new generation batch, which takes groups apart.
        self._buffered_inputs = regroup(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        mode = "train" if self.model.training else "eval"
        started = time.perf_counter()
        prompts = [row["encoded"] for row in inputs]
        if None in prompts:  # TRL generates from a repeat of the loader's after some resumed checkpoints
            prompts = encode_unique(self.encoder, inputs)
        self._generation += 1
        self._encoded[mode] = (self._generation, prompts)
        self._active = prompts
        self._make_features(self._rollout_chunks())
        if (group := self._group()) is not None:
            share_features(self._unwrapped(self.model), prompts, group, self.accelerator.device)
        # TRL processes an `images` column itself; ours travel in `self._active`.
        hidden = ("videos", "images", "encoded", "repeated", "epoch", "epochs", "shown", "media_root", "process")
        output = super()._generate_and_score_completions(
            [{key: value for key, value in row.items() if key not in hidden} for row in inputs]
        )
        if self.use_vllm:
            self._check_engine(output, mode)
        # Both survive TRL's shuffle and split: they name a row's encoded prompt, and the batch that it is of.
        output["row_index"] = torch.arange(len(inputs), device=output["prompt_ids"].device)
        output["generation"] = torch.full_like(output["row_index"], self._generation)
        if mode == "train":
            self._name_silent_rewards()
            for prompt in {id(prompt): prompt for prompt in prompts}.values():
                self.seconds["load (in workers)"] += prompt.load_s
                self.seconds["encode (in workers)"] += prompt.encode_s
            self.seconds["rollout"] += time.perf_counter() - started
            if self.rollout_store is not None:
                self._store_rollouts(inputs, output["advantages"].tolist())
        return output

    def _check_engine(self, output: dict, mode: str) -> None:
        """Compare the engine's log-probabilities of its samples with the trainer's."""
        trained, mask = output.get("old_per_token_logps"), output["completion_mask"]
        if trained is None:  # without vllm_importance_sampling_correction TRL needs them in some runs only
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
            whole = torch.cat([output["prompt_mask"], mask], 1)
            size = self.args.per_device_train_batch_size
            with torch.no_grad():
                trained = self._get_per_token_logps_and_entropies(self.model, ids, whole, mask.size(1), size)[0]
        engine = output["sampling_per_token_logps"]
        gap = self._gap_watch.check(engine, trained, mask, self._active, step=self.state.global_step)
        self._metrics[mode]["sampling/largest_prompt_gap"].append(gap)

    def _tokenize_prompts(self, prompts: list):
        return [prompt.input_ids.tolist() for prompt in self._active], None, {}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        with self._timed("generate"):
            if self.use_vllm:
                prompts = [[prompt] for prompt in self._active]  # TRL carries them as images
                return super()._generate_single_turn(prompt_ids, prompts, multimodal_fields, num_generations)
            return self._sample(), None

    def _sample(self) -> list[list[int]]:
        """A completion for each row of `self._active`, by transformers."""
        completions, group, cache = [], self._group(), None
        with whole_policy(self, self.generation_kwargs) as model:
            if group is not None:  # its own prompt comes first; a method's further ones are each process's own
                base = self._unwrapped(model)
                cache = prefill_in_parts(base, self._active[0], group, self.accelerator.device)
            for chunk in self._rollout_chunks():
                tokens = sample_completions(
                    model,
                    chunk,
                    pad_token_id=self._tokenizer.pad_token_id,
                    config=self.encoder.config,
                    rows_at_once=self.args.rollout_batch_size,
                    cache=cache,
                    generation_config=self.generation_config,
                )
                cache = None
                completions += cut_at_end(tokens.cpu(), self.eos_token_ids)
        return completions

    def _rollout_chunks(self) -> list[list[EncodedPrompt]]:
        size = self.args.rollout_batch_size or self.args.per_device_train_batch_size
        return whole_groups(self._active, 1 if self._group() is not None else size)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        with self._timed("score"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scored = {"completions": completions, "ids": completion_ids_list, "rewards": rewards}
        return rewards

    def _name_silent_rewards(self) -> None:
        """Warn once of functions that scored no rollout of the first batches, or of all of a shorter run. TRL warns of a
        row that none scored, and takes a function's None and NaN for "not of this row"."""
        if len(self._heard) == HEARD_OUT:
            return
        self._heard.append(~self._scored["rewards"].isnan().all(0).cpu())  # of all processes: alike in each
        steps = self.args.steps_per_generation * self.num_iterations / self.args.gradient_accumulation_steps
        last = self.state.global_step + steps >= self.state.max_steps
        heard = torch.stack(self._heard).any(0).tolist()
        silent = [name for name, one in zip(self.reward_func_names, heard, strict=True) if not one]
        if silent and any(heard) and (last or len(self._heard) == HEARD_OUT) and self.accelerator.is_main_process:
            logger.warning(
                "rewards: %s gave None or NaN for every rollout of the first %d generation batches, and had no effect. "
                "If they are of rows that are still to come, all is well; else correct what they give, or remove them.",
                ", ".join(silent),
                len(self._heard),
            )

    def _store_rollouts(self, rows: list[dict], advantages: list[float]) -> None:
        rank, step = self.accelerator.process_index, self.state.global_step
        run = Path(self.args.output_dir).resolve().name  # stages are joined later: ids must differ between runs
        part = self._step % self.args.gradient_accumulation_steps
        rewards = self._scored["rewards"][rank * len(rows) : (rank + 1) * len(rows)].tolist()
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        rollouts = []
        for index, row in enumerate(rows):
            ids, completion = self._scored["ids"][index], self._scored["completions"][index]
            values, shown = zip(self.reward_func_names, rewards[index], strict=True), row.get("shown")
            rollouts.append(
                {
                    **{key: row[key] for key in STORED},
                    "rollout_id": f"{run}/step{step}-part{part}-rank{rank}-{index}",
                    "step": step,
                    "completion": completion[0]["content"],
                    "completion_tokens": len(ids),
                    "finish_reason": "stop" if ids[-1] in ends else "length",
                    "rewards": {name: None if value != value else value for name, value in values},
                    "advantage": advantages[index],
                    "policy": self.policy_name,
                    "prompt_template": self.encoder.template.hash,
                    "seed": self.args.seed,
                    "shown": shown and {"kind": shown.kind, "level": shown.level},
                }
            )
        self.rollout_store.write(rollouts, step=step, part=part, rank=rank, reward_names=self.reward_func_names)

    # Update

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        generation, prompts = self._encoded[mode]
        if not bool((inputs["generation"] == generation).all()):
            raise RuntimeError(
                f"The rows of this update come from generation batches {inputs['generation'].unique().tolist()}, the "
                f"encoded prompts cached for {mode} from batch {generation}."
            )
        self._active = [prompts[index] for index in inputs["row_index"].tolist()]
        hidden_size = self.encoder.config.get_text_config().hidden_size
        with layer_inputs_on_host(hidden_size) if self.args.activation_offloading else nullcontext():
            loss = super()._compute_loss(model, inputs)
        models = [model for model in (self.model, self.ref_model) if model is not None]
        drop_pixels(prompts, [self._unwrapped(model).model.visual for model in models])
        return loss

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        """TRL's, for the rows of `self._active`: their media and positions come from the encoded prompts."""
        self._decide_sharing(model, self._active[0])
        size = batch_size or len(input_ids)
        outputs = [
            self._score(model, self._active[rows], input_ids[rows], attention_mask[rows], logits_to_keep)
            for rows in (slice(start, start + size) for start in range(0, len(input_ids), size))
        ]
        logps, entropies, aux_losses = (
            [getattr(output, name) for output in outputs] for name in ("log_probs", "entropy", "aux_loss")
        )
        return (
            torch.cat(logps),
            None if entropies[0] is None else torch.cat(entropies),  # a reference's head gives none
            None if aux_losses[0] is None else torch.stack(aux_losses).mean(),
        )

    def training_step(self, *args, **kwargs):
        rollout = self.seconds["rollout"]
        loss = super().training_step(*args, **kwargs)
        self.seconds["update"] -= self.seconds["rollout"] - rollout
        return loss
