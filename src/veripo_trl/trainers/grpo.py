"""GRPO on text, image and video rows: what TRL's `GRPOTrainer` leaves out, and nothing else."""

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from peft import PeftModel
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer import grpo_trainer
from trl.trainer.utils import RepeatSampler

from veripo_trl.data.prompts import build_messages
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.errors import VeripoError, settings_checked
from veripo_trl.model.encoding import (
    EncodedPrompt,
    PromptEncoder,
    check_vision_tokens,
    encode_unique,
    model_inputs,
    vision_inputs,
    vision_token_ids,
)
from veripo_trl.model.policy import copy_adapter_to_reference
from veripo_trl.model.positions import use_trained_positions
from veripo_trl.shared_prompt.rollout import cut_at_end, sample_completions, whole_groups
from veripo_trl.shared_prompt.scoring import can_share, prefix_can_be_shared, score_completions
from veripo_trl.trainers.checkpoints import CheckpointMixin
from veripo_trl.trainers.guards import check_frames_matter, refuse_ignored, show_resolved_media
from veripo_trl.vllm import training as vllm

logger = logging.getLogger(__name__)


# What `generation_kwargs` may change: which tokens are drawn. All else is how, or would not be what is trained.
SAMPLING = (
    "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "no_repeat_ngram_size", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
    "sequence_bias", "exponential_decay_length_penalty",
)  # fmt: skip


@dataclass
class VideoGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig`, with the method's defaults (arXiv 2505.19000) and private repositories."""

    loss_type: str = field(default="grpo", metadata={"help": "Loss, as in TRL; `grpo` averages within a completion."})
    beta: float = field(default=0.0, metadata={"help": "KL coefficient; 0 needs no reference model."})
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Without it a LoRA's dropout makes update and reference score other policies than sampled."},
    )
    hub_private_repo: bool | None = field(default=True, metadata={"help": "Whether a pushed repository is private."})
    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions generated at once per process. Default: whole groups, at most "
            "per_device_train_batch_size or one group. A group cut in pieces computes its prompt for each piece."
        },
    )
    max_vllm_logp_gap: float | None = field(
        default=None,
        metadata={
            "help": "Largest difference between the log-probabilities of vLLM and of the trainer, as the mean per token "
            "of a prompt's completions, at which a run starts. Default: 1e-3 in float32, 0.1 in half precision."
        },
    )
    shared_prefix: bool = field(
        default=True,
        metadata={"help": "Compute a group's prompt once wherever its completions are scored, the update included."},
    )

    def __post_init__(self):
        super().__post_init__()
        harmless = {"chat_template_kwargs": (None, {}), "cache_implementation": (None,)}
        harmless |= {"use_transformers_continuous_batching": (False,)}
        refuse_ignored(self, harmless, "Prompts are encoded and computed once per group, by this project's own code.")
        refused = [] if self.use_vllm else [name for name in self.generation_kwargs or {} if name not in SAMPLING]
        if refused:
            raise ValueError(
                f"generation_kwargs: {', '.join(refused)}: not supported in rollouts, which go on from prompts computed "
                f"before. Expected any of {', '.join(SAMPLING)}; temperature and max_completion_length are options of "
                f"their own."
            )


class MarkedRows(TorchDataset):
    """A dataset's rows, with a mark on those that the loader only repeats.

    The loader yields every generation batch `num_iterations × steps_per_generation` times and the trainer uses the
    first; the rows of the others need not be decoded.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key) -> dict:
        index, repeated = key if isinstance(key, tuple) else (key, False)
        return {**self.dataset[index], "repeated": repeated}


class MarkedSampler(Sampler):
    """TRL's sampler, yielding `(index, repeated)`, with an order that depends on the epoch's number alone.

    TRL's own order depends on how many epochs this process has drawn, so that a run resumed in its second epoch would
    see the rows of the first again.

    Args:
        sampler: yields each generation batch `repeat_count` times in a row.
        batch_size: rows of one generation batch, over all processes.
        epoch: gives the number of the epoch that begins.
    """

    def __init__(self, sampler: RepeatSampler, *, batch_size: int, repeat_count: int, epoch: Callable[[], int]):
        self.sampler = sampler
        self.batch_size = batch_size
        self.repeat_count = repeat_count
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self):
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + self.epoch())
        for place, index in enumerate(self.sampler):
            yield index, (place // self.batch_size) % self.repeat_count > 0


class RolloutCollator:
    """Rows with their chat messages and, unless the loader only repeats them, their encoded prompts.

    Runs in the loader's workers, ahead of the step. Equal questions of a batch share one `EncodedPrompt`.
    """

    def __init__(self, encoder: PromptEncoder):
        self.encoder = encoder

    def __call__(self, rows: list[dict]) -> list[dict]:
        fresh = encode_unique(self.encoder, [row for row in rows if not row.get("repeated")])
        encoded = iter(fresh)
        return [
            {
                **row,
                "prompt": build_messages(row, self.encoder.template),
                "encoded": None if row.get("repeated") else next(encoded),
            }
            for row in rows
        ]


class VideoGRPOTrainer(CheckpointMixin, GRPOTrainer):
    """TRL's `GRPOTrainer` for rows with any number of videos and images.

    Args:
        encoder: turns a row into ids, positions and vision tensors; the trainer sees prompts through it only.
        rollout_store: where every training rollout is written; None writes none.
        policy_name: what rollouts name as their policy: the model or adapter that this run starts from.
        Further arguments as in `trl.GRPOTrainer`. Datasets have the columns of `rows.load_rows`.

    Raises:
        vllm_rollouts.EngineMismatchError: with `use_vllm`, where the engine's log-probabilities are not the trainer's.
    """

    _prefix_checked = False  # whether the shared prompt was compared with plain rows

    @settings_checked()
    def __init__(
        self,
        *args,
        encoder: PromptEncoder,
        rollout_store: RolloutStore | None = None,
        policy_name: str | None = None,
        **kwargs,
    ):
        config = kwargs["args"]
        banned = vision_token_ids(encoder.processor, encoder.config)
        spread_over_workers(config)
        model = kwargs["model"]
        # TRL loads the reference by the policy's name alone.
        load = partial(
            grpo_trainer.create_model_from_path,
            architecture=type(model),
            revision=getattr(model.config, "_commit_hash", None),
        )
        with patch.object(grpo_trainer, "create_model_from_path", load):
            if config.use_vllm:
                datasets = [rows for rows in (kwargs["train_dataset"], kwargs.get("eval_dataset")) if rows is not None]
                bias = vllm.prepare_config(config, encoder, banned=banned, datasets=datasets)
                with vllm.trl_engine(config, encoder, model=model, datasets=datasets) as dtype:
                    super().__init__(*args, **kwargs)
            else:
                super().__init__(*args, **kwargs)
        if isinstance(self.model, PeftModel):
            copy_adapter_to_reference(self.model)
        if config.use_vllm:
            for model in (self.model, self.ref_model):
                if model is not None:
                    vllm.bias_logits(self.accelerator.unwrap_model(model), bias)
            self._gap_watch = vllm.GapWatch(config, dtype=dtype, accelerator=self.accelerator)
        self.encoder = encoder
        self.rollout_store = rollout_store
        self.policy_name = policy_name or self.model.config._name_or_path
        self.args.remove_unused_columns = False
        self.data_collator = RolloutCollator(encoder)
        use_trained_positions(self.accelerator.unwrap_model(self.model))
        if self.ref_model is not None:
            self.ref_model.requires_grad_(False)  # its vision tower is frozen: it takes the policy's features
        if not self.use_vllm:
            banned = sorted({*banned, *self.generation_config.suppress_tokens})
            self.generation_config.suppress_tokens = self.generation_kwargs["suppress_tokens"] = banned
        # Encoded prompts of the latest generation batch, per mode: an evaluation between two updates of one training
        # batch must not replace them.
        self._encoded: dict[str, tuple[int, list[EncodedPrompt]]] = {}
        self._generation = 0
        self._resumed_questions: list[str] | None = None  # of a generation batch that a checkpoint was amid
        self._active: list[EncodedPrompt] = []  # prompts of the rows that a forward is running on
        self._scored: dict = {}  # what `_calculate_rewards` saw last
        self._checked = False
        self._seconds_logged: dict[str, float] = {}
        self._step_logged = 0

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
        saved = torch.load(self._generation_file(checkpoint), map_location=self.accelerator.device, weights_only=True)
        self._step, self._buffered_inputs = saved["micro_step"], saved["inputs"]
        self._resumed_questions = saved["questions"]

    def _generation_file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"generation_{self.args.process_index}.pt")

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self._seconds_logged, self._step_logged = dict(self.seconds), self.state.global_step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        started = time.perf_counter()
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.seconds["wait for data"] += time.perf_counter() - started
        return batches

    # Rollout

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        mode = "train" if self.model.training else "eval"
        if mode == "train" and not self._checked:
            self._check_first_rows()
        started = time.perf_counter()
        missing = [row for row in inputs if row["encoded"] is None]
        # TRL generates from a repeat of the loader's in one case: the first batch after some resumed checkpoints.
        found = iter(encode_unique(self.encoder, missing))
        prompts = [next(found) if row["encoded"] is None else row["encoded"] for row in inputs]
        self._generation += 1
        self._encoded[mode] = (self._generation, prompts)
        self._active = prompts
        # TRL processes an `images` column itself; ours travel in `self._active`.
        hidden = ("videos", "images", "encoded", "repeated", "media_root", "process")
        output = super()._generate_and_score_completions(
            [{key: value for key, value in row.items() if key not in hidden} for row in inputs]
        )
        if self.use_vllm:
            self._check_engine(output, prompts, mode)
        device = output["prompt_ids"].device
        output["row_index"] = torch.arange(len(inputs), device=device)
        output["generation"] = torch.full((len(inputs),), self._generation, device=device)
        if mode == "train":
            for prompt in {id(prompt): prompt for prompt in prompts}.values():
                self.seconds["load (in workers)"] += prompt.load_s
                self.seconds["encode (in workers)"] += prompt.encode_s
            self.seconds["rollout"] += time.perf_counter() - started
            if self.rollout_store is not None:
                self._store_rollouts(inputs, output["advantages"].tolist())
        return output

    def _check_engine(self, output: dict, prompts: list[EncodedPrompt], mode: str) -> None:
        """Compare the engine's log-probabilities of its samples with the trainer's."""
        trained = output.get("old_per_token_logps")
        if trained is None:  # without vllm_importance_sampling_correction TRL needs them in some runs only
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
            mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
            width, size = output["completion_ids"].size(1), self.args.per_device_train_batch_size
            with torch.no_grad():
                trained = self._get_per_token_logps_and_entropies(self.model, ids, mask, width, batch_size=size)[0]
        engine, mask = output["sampling_per_token_logps"], output["completion_mask"]
        gap = self._gap_watch.check(engine, trained, mask, prompts, step=self.state.global_step)
        self._metrics[mode]["sampling/largest_prompt_gap"].append(gap)

    def _check_first_rows(self) -> None:
        self._checked = True
        if self.accelerator.is_main_process:
            if self.rollout_store is not None:
                self.rollout_store.set_aside_from(self.state.global_step)
            show_resolved_media(self.encoder, self.train_dataset)
        check_frames_matter(
            self.model_wrapped,
            self.encoder,
            self.train_dataset,
            accelerator=self.accelerator,
            autocast=self.accelerator.autocast,
        )
        self.accelerator.wait_for_everyone()  # nobody writes rollouts before the old ones are set aside

    def _tokenize_prompts(self, prompts: list):
        if len(prompts) != len(self._active):
            raise RuntimeError(f"Expected {len(self._active)} prompts, one per encoded row, but got {len(prompts)}.")
        return [prompt.input_ids.tolist() for prompt in self._active], None, {}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        started = time.perf_counter()
        if self.use_vllm:
            prompts = [[prompt] for prompt in self._active]  # TRL carries them as images
            output = super()._generate_single_turn(prompt_ids, prompts, multimodal_fields, num_generations)
            self.seconds["generate"] += time.perf_counter() - started
            return output
        completions = []
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            for chunk in self._rollout_chunks():
                tokens = sample_completions(
                    model,
                    chunk,
                    pad_token_id=self._tokenizer.pad_token_id,
                    config=self.encoder.config,
                    generation_config=self.generation_config,
                )
                completions += cut_at_end(tokens.cpu(), self.eos_token_ids)
        self.seconds["generate"] += time.perf_counter() - started
        return completions, None

    def _rollout_chunks(self) -> list[list[EncodedPrompt]]:
        size = self.args.rollout_batch_size
        if size is None:
            return whole_groups(self._active, self.args.per_device_train_batch_size)
        return [self._active[start : start + size] for start in range(0, len(self._active), size)]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        started = time.perf_counter()
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.seconds["score"] += time.perf_counter() - started
        self._scored = {"completions": completions, "ids": completion_ids_list, "rewards": rewards}
        return rewards

    def _store_rollouts(self, rows: list[dict], advantages: list[float]) -> None:
        rank, step = self.accelerator.process_index, self.state.global_step
        run = Path(self.args.output_dir).resolve().name  # stages are joined later: ids must differ between runs
        part = self._step % self.args.gradient_accumulation_steps
        rewards = self._scored["rewards"][rank * len(rows) : (rank + 1) * len(rows)].tolist()
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        rollouts = []
        for place, row in enumerate(rows):
            ids, completion = self._scored["ids"][place], self._scored["completions"][place]
            values = zip(self.reward_func_names, rewards[place], strict=True)
            rollouts.append(
                {
                    **{key: row[key] for key in ("question_id", "problem", "options", "problem_type", "solution")},
                    **{key: row[key] for key in ("videos", "images", "data_source")},
                    "rollout_id": f"{run}/step{step}-part{part}-rank{rank}-{place}",
                    "step": step,
                    "completion": completion[0]["content"],
                    "completion_tokens": len(ids),
                    "finish_reason": "stop" if ids[-1] in ends else "length",
                    "rewards": {name: None if value != value else value for name, value in values},
                    "advantage": advantages[place],
                    "policy": self.policy_name,
                    "prompt_template": self.encoder.template.hash,
                    "seed": self.args.seed,
                }
            )
        self.rollout_store.write(rollouts, step=step, part=part, rank=rank, reward_names=self.reward_func_names)

    # Update

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

    def _encode_resumed(self, rows: list[dict]) -> None:
        """Encode the prompts of the generation batch that a checkpoint was in the middle of."""
        if [row["question_id"] for row in rows] != self._resumed_questions:
            raise VeripoError("The loader gives other rows than those of the checkpoint's generation batch.")
        self._resumed_questions = None
        self._generation = int(self._buffered_inputs[0]["generation"][0])
        self._active = encode_unique(self.encoder, rows)
        self._encoded["train"] = (self._generation, self._active)
        unwrapped = self.accelerator.unwrap_model(self.model)
        unwrapped = unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped
        for chunk in self._rollout_chunks():  # features in the rollout's batches, to the last bit
            vision_inputs(unwrapped, chunk, self.accelerator.device)

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        generation, prompts = self._encoded[mode]
        if not bool((inputs["generation"] == generation).all()):
            raise RuntimeError(
                f"The rows of this update come from generation batches {inputs['generation'].unique().tolist()}, the "
                f"encoded prompts held for {mode} from batch {generation}."
            )
        self._active = [prompts[index] for index in inputs["row_index"].tolist()]
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        size = batch_size or input_ids.size(0)
        unwrapped = self.accelerator.unwrap_model(model)
        unwrapped = unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped
        if self.args.shared_prefix and not self._prefix_checked:
            self._check_shared_prefix(model, unwrapped)
        share = self.args.shared_prefix and can_share(unwrapped)
        parts = []
        for start in range(0, input_ids.size(0), size):
            rows = slice(start, start + size)
            prompts = self._active[rows]
            check_vision_tokens(input_ids[rows], prompts, self.encoder.config)
            if share:
                with self.accelerator.autocast():
                    output = score_completions(
                        model,
                        unwrapped,
                        prompts,
                        input_ids[rows, -logits_to_keep:],
                        attention_mask[rows, -logits_to_keep:],
                        pad_token_id=self._tokenizer.pad_token_id,
                    )
                parts.append((output.log_probs, output.entropy, output.aux_loss))
                continue
            with self.accelerator.autocast():
                media = model_inputs(
                    prompts,
                    input_ids[rows],
                    completion_width=logits_to_keep,
                    config=self.encoder.config,
                    frozen_model=unwrapped,
                )

            def forward(*args, media=media, **inputs):
                return model(*args, **inputs, **media)

            parts.append(
                super()._get_per_token_logps_and_entropies(
                    forward, input_ids[rows], attention_mask[rows], logits_to_keep, **kwargs
                )
            )
        logps, entropies, aux_losses = zip(*parts, strict=True)
        return (
            torch.cat(logps),
            None if entropies[0] is None else torch.cat(entropies),
            None if aux_losses[0] is None else torch.stack(aux_losses).mean(),
        )

    def _check_shared_prefix(self, model, unwrapped) -> None:
        self._prefix_checked = True
        self.args.shared_prefix = prefix_can_be_shared(
            model,
            unwrapped,
            self._active[0],
            pad_token_id=self._tokenizer.pad_token_id,
            accelerator=self.accelerator,
        )

    def training_step(self, *args, **kwargs):
        started, rollout = time.perf_counter(), self.seconds["rollout"]
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.device.type == "cuda":  # else the clock stops before the kernels do
            torch.cuda.synchronize()
        self.seconds["update"] += time.perf_counter() - started - (self.seconds["rollout"] - rollout)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        steps = self.state.global_step - self._step_logged
        if self.model.training and steps > 0:
            for part, seconds in self.seconds.items():
                spent = seconds - self._seconds_logged.get(part, 0.0)
                self._metrics["train"][f"time/{part}"].append(spent / steps)
            self._seconds_logged, self._step_logged = dict(self.seconds), self.state.global_step
        super().log(logs, start_time)


def spread_over_workers(config: VideoGRPOConfig) -> None:
    """Choose the loader's workers and prefetching so that generation batches are encoded by all of them, ahead.

    A loader deals its batches out in turn, and only every `steps_per_generation × num_iterations`-th is encoded: with a
    common factor, some workers would never get one, and with torch's prefetching of two the next might not be begun.
    """
    if config.dataloader_num_workers == 0:
        return
    cycle = config.steps_per_generation * config.num_iterations
    workers = config.dataloader_num_workers
    while math.gcd(workers, cycle) > 1:
        workers += 1
    if workers != config.dataloader_num_workers:
        logger.info(
            "dataloader_num_workers: %d, not %d: only every %dth batch is encoded, and workers take turns.",
            workers,
            config.dataloader_num_workers,
            cycle,
        )
    config.dataloader_num_workers = workers
    if config.dataloader_prefetch_factor is None:
        config.dataloader_prefetch_factor = max(2, math.ceil((cycle + 1) / workers))


def regroup(slices: list[dict]) -> list[dict]:
    """Put the rows of a generation batch, split into equal slices, back into the order in which they were generated.

    The completions of a prompt are neighbours in that order, so a group is divided only where a slice ends.
    """
    sizes = {len(part["row_index"]) for part in slices}
    if len(sizes) != 1:
        raise RuntimeError(f"Expected slices of one size, but got {sorted(sizes)}.")
    order = torch.cat([part["row_index"] for part in slices]).argsort()
    whole = {}
    for key, value in slices[0].items():
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            whole[key] = torch.cat([part[key] for part in slices])[order]
        else:
            whole[key] = value
    size = sizes.pop()
    return [
        {
            key: value[start : start + size] if isinstance(value, torch.Tensor) and value.ndim > 0 else value
            for key, value in whole.items()
        }
        for start in range(0, size * len(slices), size)
    ]
