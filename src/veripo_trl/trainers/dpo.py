"""DPO on text, image and video pairs: what TRL's `DPOTrainer` leaves out, and nothing else."""

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import PeftModel
from torch.nn.functional import pad
from trl import DPOConfig, DPOTrainer

from veripo_trl.errors import settings_checked
from veripo_trl.model.encoding import (
    EncodedPrompt,
    PromptEncoder,
    PromptTooLongError,
    check_vision_tokens,
    encode_unique,
    text_ids,
)
from veripo_trl.model.policy import copy_adapter_to_reference
from veripo_trl.model.positions import use_trained_positions
from veripo_trl.shared_prompt.rollout import left_pad
from veripo_trl.shared_prompt.scoring import prefix_can_be_shared, score_completions
from veripo_trl.trainers.checkpoints import CheckpointMixin
from veripo_trl.trainers.guards import check_frames_matter, refuse_ignored, show_resolved_media


@dataclass
class VideoDPOConfig(DPOConfig):
    """TRL's `DPOConfig` without truncation, which would cut vision tokens, and with private repositories."""

    max_length: int | None = field(
        default=None, metadata={"help": "Longest sequence, prompt and answer. A longer pair is refused, never cut."}
    )
    hub_private_repo: bool | None = field(default=True, metadata={"help": "Whether a pushed repository is private."})
    shared_prefix: bool = field(
        default=True, metadata={"help": "Compute the prompt that the answers of a question share once."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs is not supported: it would decode every video twice. Set it to false; the "
                "reference is computed with the policy, from the same vision features."
            )
        if self.sync_ref_model:
            raise ValueError(
                "sync_ref_model is not supported: the reference is the policy that made the rollouts, and stays so. "
                "Set it to false."
            )
        harmless = {"truncation_mode": ("keep_start",), "padding_free": (False,)}
        harmless |= dict.fromkeys(("pad_to_multiple_of", "pad_token"), (None,))
        refuse_ignored(self, harmless, "Pairs are neither cut nor packed.")


class DPOCollator:
    """Pairs to a padded batch, chosen rows first, then rejected ones, as `DPOTrainer` takes them.

    Prompts are encoded once each, in the loader's workers, and travel as plain objects: `prompts` (2 × pairs). Beside
    them: `input_ids`, `attention_mask`, `completion_mask` (2 × pairs, width), prompts padded on the left and answers
    on the right, and `completion_width`.
    """

    def __init__(self, encoder: PromptEncoder, *, max_length: int | None):
        self.encoder = encoder
        self.max_length = max_length

    def __call__(self, pairs: list[dict]) -> dict:
        tokenizer = self.encoder.processor.tokenizer
        prompts = encode_unique(self.encoder, pairs) * 2
        texts = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
        # A rollout that was cut off did not end: no end is taught from it.
        finished = [True] * len(pairs) + [pair["rejected_finished"] for pair in pairs]
        answers = [
            ids + [tokenizer.eos_token_id] * ended
            for ids, ended in zip(text_ids(tokenizer, texts), finished, strict=True)
        ]
        for prompt, answer in zip(prompts, answers, strict=True):
            length = len(prompt) + len(answer)
            if self.max_length is not None and length > self.max_length:
                raise PromptTooLongError(
                    f"A pair of question {prompt.question_id!r} has {length} tokens ({len(prompt)} of prompt), the "
                    f"limit is max_length={self.max_length}. Pairs are never cut: raise max_length, lower max_frames, "
                    f"fps or max_pixels, or leave the question out."
                )
        width = max(map(len, answers))
        prompt_ids, prompt_mask = left_pad(prompts, tokenizer.pad_token_id)
        answer_ids = torch.full((len(answers), width), tokenizer.pad_token_id)
        answer_mask = torch.zeros((len(answers), width), dtype=torch.long)
        for row, answer in enumerate(answers):
            answer_ids[row, : len(answer)] = torch.tensor(answer)
            answer_mask[row, : len(answer)] = 1
        return {
            "input_ids": torch.cat([prompt_ids, answer_ids], dim=1),
            "attention_mask": torch.cat([prompt_mask, answer_mask], dim=1),
            "completion_mask": torch.cat([torch.zeros_like(prompt_mask), answer_mask], dim=1),
            "completion_width": width,
            "prompts": prompts,
        }


class VideoDPOTrainer(CheckpointMixin, DPOTrainer):
    """TRL's `DPOTrainer` for pairs whose questions have any number of videos and images.

    The reference is the policy that training starts from: with an adapter TRL's frozen copy of it (`ref`), with full
    weights the `ref_model` given here.

    Args:
        encoder: turns a question into ids, positions and vision tensors.
        ref_model: for full fine-tuning: the starting policy, loaded once more.
        train_dataset: `preferences.load_pairs(...).dataset`.
        Further arguments as in `trl.DPOTrainer`.

    Raises:
        ValueError: full fine-tuning without `ref_model`, or an adapter with one.
    """

    @settings_checked()
    def __init__(self, *args, encoder: PromptEncoder, **kwargs):
        config, model, ref_model = kwargs["args"], kwargs["model"], kwargs.get("ref_model")
        if isinstance(model, PeftModel) != (ref_model is None):
            raise ValueError(
                "Expected `ref_model` with full weights and none with an adapter, whose frozen copy is the reference; "
                f"got {type(model).__name__} and ref_model {type(ref_model).__name__}."
            )
        config.remove_unused_columns = False
        kwargs["data_collator"] = DPOCollator(encoder, max_length=config.max_length)
        super().__init__(*args, **kwargs)
        if isinstance(self.model, PeftModel):
            copy_adapter_to_reference(self.model)
        self.encoder = encoder
        self.precompute_ref_logps = True  # `_compute_loss` hands them over, computed from the same encoded prompts
        use_trained_positions(self.accelerator.unwrap_model(self.model))
        if self.ref_model is not None:
            self.ref_model.requires_grad_(False)
            use_trained_positions(self.accelerator.unwrap_model(self.ref_model))
        self._checked = False

    def _compute_loss(self, model, inputs, return_outputs):
        if not self._checked:
            self._check_first_pairs(model, inputs["prompts"][0])
        started = time.perf_counter()
        inputs = dict(inputs)
        prompts, width = inputs.pop("prompts"), inputs.pop("completion_width")

        def scored(model):
            return lambda **kwargs: self._score(model, prompts, width, **kwargs)

        reference = self.ref_model if self.ref_model is not None else self.model
        chosen, rejected = self.compute_ref_log_probs(scored(reference), inputs)
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = chosen, rejected
        self.seconds["reference"] += time.perf_counter() - started
        loss = super()._compute_loss(scored(model), inputs, return_outputs)
        self._log_lengths_and_drift(inputs["completion_mask"])
        return loss

    def _score(self, model, prompts: list[EncodedPrompt], width: int, **kwargs):
        """What TRL's forward gives: `.log_probs`, `.entropy`, `.mean_logits`, `.is_top1` of (rows, length - 1)."""
        with self.accelerator.autocast():
            return self._forward(model, prompts, width, **kwargs)

    def _forward(self, model, prompts: list[EncodedPrompt], width: int, *, input_ids, attention_mask, **kwargs):
        check_vision_tokens(input_ids, prompts, self.encoder.config)
        output = score_completions(
            model,
            self._bare(model),
            prompts,
            input_ids[:, -width:],
            attention_mask[:, -width:],
            pad_token_id=self._tokenizer.pad_token_id,
            shared=self.args.shared_prefix,
        )
        before = input_ids.size(1) - 1 - width
        names = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
        values = {name: getattr(output, name) for name in names}
        values = {name: pad(value, (before, 0)) for name, value in values.items() if value is not None}
        return SimpleNamespace(**values, aux_loss=output.aux_loss)

    def _bare(self, model):
        """A model without the wrappers of its backend and of PEFT."""
        unwrapped = self.accelerator.unwrap_model(model)
        return unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped

    def _check_first_pairs(self, model, prompt: EncodedPrompt) -> None:
        self._checked = True
        if self.accelerator.is_main_process:
            show_resolved_media(self.encoder, self.train_dataset)
        check_frames_matter(
            model,
            self.encoder,
            self.train_dataset,
            accelerator=self.accelerator,
            autocast=self.accelerator.autocast,
        )
        if self.args.shared_prefix:
            self.args.shared_prefix = prefix_can_be_shared(
                model,
                self._bare(model),
                prompt,
                pad_token_id=self._tokenizer.pad_token_id,
                accelerator=self.accelerator,
            )

    def _log_lengths_and_drift(self, completion_mask: torch.Tensor) -> None:
        """Tokens of the answers, and how far their log-probability moved from the reference's, in nats."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        lengths = self.accelerator.gather(completion_mask.sum(dim=1))
        chosen, rejected = lengths.view(-1, 2, len(completion_mask) // 2).unbind(1)
        for name, lengths in (("chosen", chosen), ("rejected", rejected)):
            metrics[f"length/{name}"].append(lengths.float().mean().item())
            metrics[f"logps/drift_{name}"].append(metrics[f"rewards/{name}"][-1] / self.beta)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        # The reference is the policy that the run starts from: it is loaded from there, never from here.
        shutil.rmtree(Path(output_dir or self.args.output_dir) / "ref", ignore_errors=True)

    def training_step(self, *args, **kwargs):
        started = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self.seconds["step"] += time.perf_counter() - started
        return loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        started = time.perf_counter()
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.seconds["wait for data"] += time.perf_counter() - started
        return batches
