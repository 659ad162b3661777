"""DPO on text, image and video pairs: what TRL's `DPOTrainer` leaves out, and nothing else.

The loss is TRL's own; the YAML chooses it by `loss_type`.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import PeftModel
from torch.nn.functional import pad
from trl import DPOConfig, DPOTrainer

from veripo_trl.errors import settings_checked
from veripo_trl.model.encoding import EncodedPrompt, PromptEncoder, encode_unique
from veripo_trl.options import option
from veripo_trl.trainers.base import VideoConfig, VideoMixin
from veripo_trl.trainers.loading import RowsForGroups, with_answers


@dataclass
class VideoDPOConfig(VideoConfig, DPOConfig):
    """TRL's `DPOConfig` without truncation, which would cut vision tokens, and with private repositories."""

    max_length: int | None = option("Longest prompt with answer; a longer pair is refused, never cut.")

    UNUSED = {
        **dict.fromkeys(("precompute_ref_log_probs", "sync_ref_model", "padding_free"), (False,)),
        "truncation_mode": ("keep_start",),
        **dict.fromkeys(("pad_to_multiple_of", "pad_token"), (None,)),
    }
    BECAUSE = (
        "Pairs are neither cut nor packed; the reference stays the policy that made the rollouts, and is computed beside "
        "the policy, from the same vision features."
    )


class DPOCollator:
    """Pairs to a padded batch, chosen rows first, then rejected ones, as `DPOTrainer` takes them.

    What `with_answers` returns, of 2 × pairs rows, and `prompts`, one per row: encoded once each, in the loader's
    workers, they travel as plain objects.
    """

    def __init__(self, encoder: PromptEncoder, *, max_length: int | None):
        self.encoder = encoder
        self.max_length = max_length

    def __call__(self, pairs: list[dict]) -> dict:
        prompts = encode_unique(self.encoder, pairs) * 2
        texts = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
        # A rollout that was cut off did not end: no end is taught from it.
        finished = [True] * len(pairs) + [pair["rejected_finished"] for pair in pairs]
        return {
            **with_answers(self.encoder, prompts, texts, finished, max_length=self.max_length),
            "prompts": prompts,
        }


class VideoDPOTrainer(VideoMixin, DPOTrainer):
    """TRL's `DPOTrainer` for pairs whose questions have any number of videos and images.

    The reference is the policy that training starts from: with an adapter TRL's frozen copy of it (`ref`), with full
    weights the `ref_model` given here.

    Args:
        encoder: see `VideoMixin`.
        ref_model: for full fine-tuning: the starting policy, loaded once more.
        train_dataset: the data set of `pair_dataset.load_pairs`.
        Further arguments as in `trl.DPOTrainer`.

    Raises:
        ValueError: full fine-tuning without `ref_model`, or an adapter with one.
    """

    @settings_checked()
    def __init__(self, *args, encoder: PromptEncoder, **kwargs):
        model, ref_model = kwargs["model"], kwargs.get("ref_model")
        if isinstance(model, PeftModel) != (ref_model is None):
            raise ValueError(
                "Expected `ref_model` with full weights and none with an adapter, whose frozen copy is the reference; "
                f"got {type(model).__name__} and ref_model {type(ref_model).__name__}."
            )
        kwargs["data_collator"] = DPOCollator(encoder, max_length=kwargs["args"].max_length)
        super().__init__(*args, encoder=encoder, **kwargs)
        self._share_out_prompts(per_device_train_batch_size=1, train_sampling_strategy="random")
        self.precompute_ref_logps = True  # `_compute_loss` hands them over, computed from the same encoded prompts

    def _get_train_sampler(self, train_dataset=None):
        """Pairs for groups of processes, each of which computes the answers of its pair, and its share of the prompt."""
        if self.prompt_group is None:
            return super()._get_train_sampler(train_dataset)
        return RowsForGroups(self.train_dataset, self.args.prompt_parallel, seed=self.args.seed)

    def _compute_loss(self, model, inputs, return_outputs):
        inputs = dict(inputs)
        prompts, width = inputs.pop("prompts"), inputs.pop("completion_width")
        self._make_features([prompts])
        self._decide_sharing(model, prompts[0])

        def scored(model):
            return lambda **kwargs: self._forward(model, prompts, width, **kwargs)

        reference = self.model if self.ref_model is None else self.ref_model
        with self._timed("reference"):
            chosen, rejected = self.compute_ref_log_probs(scored(reference), inputs)
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = chosen, rejected
        loss = super()._compute_loss(scored(model), inputs, return_outputs)
        self._log_lengths_and_drift(inputs["completion_mask"])
        return loss

    def _forward(self, model, prompts: list[EncodedPrompt], width: int, *, input_ids, attention_mask, **kwargs):
        """What TRL's forward gives: `.log_probs`, `.entropy`, `.mean_logits`, `.is_top1` of (rows, length - 1)."""
        output = self._score(model, prompts, input_ids, attention_mask, width)
        before = input_ids.size(1) - 1 - width
        names = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
        values = {name: getattr(output, name) for name in names}
        values = {name: pad(value, (before, 0)) for name, value in values.items() if value is not None}
        return SimpleNamespace(**values, aux_loss=output.aux_loss)

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
