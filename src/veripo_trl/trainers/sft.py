"""Supervised fine-tuning on text, image and video rows: the cold start before GRPO."""

from dataclasses import dataclass, field

import torch
from trl import SFTConfig, SFTTrainer

from veripo_trl.data.prompts import build_target
from veripo_trl.data.rows import RowError
from veripo_trl.errors import settings_checked
from veripo_trl.model.encoding import PromptEncoder, PromptTooLongError, model_inputs, text_ids
from veripo_trl.model.positions import use_trained_positions
from veripo_trl.trainers.checkpoints import CheckpointMixin
from veripo_trl.trainers.guards import check_frames_matter, refuse_ignored, show_resolved_media


@dataclass
class VideoSFTConfig(SFTConfig):
    """TRL's `SFTConfig` without truncation, which would cut vision tokens, and with private repositories."""

    max_length: int | None = field(
        default=None, metadata={"help": "Longest sequence, prompt and answer. A longer row is refused, never cut."}
    )
    hub_private_repo: bool | None = field(default=True, metadata={"help": "Whether a pushed repository is private."})

    def __post_init__(self):
        super().__post_init__()
        harmless = {"completion_only_loss": (None, True), "truncation_mode": ("keep_start",)}
        harmless |= dict.fromkeys(("assistant_only_loss", "packing", "eval_packing", "padding_free"), (False, None))
        harmless |= {"pad_to_multiple_of": (None,), "pad_token": (None,), "dataset_text_field": ("text",)}
        refuse_ignored(self, harmless, "The loss is on the answers, and rows are neither cut nor packed.")


class SFTCollator:
    """Rows to a padded batch with loss on the assistant's tokens only.

    Returns `input_ids, attention_mask, labels` (rows, width), `position_ids` (3, rows, width) and the vision tensors.
    Prompts are padded on the left and answers on the right, as in a rollout.
    """

    def __init__(self, encoder: PromptEncoder, *, max_length: int | None):
        self.encoder = encoder
        self.max_length = max_length

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        tokenizer = self.encoder.processor.tokenizer
        prompts = self.encoder.encode_rows(rows)
        targets = text_ids(tokenizer, [build_target(row, self.encoder.template) for row in rows])
        answers = [ids + [tokenizer.eos_token_id] for ids in targets]
        for prompt, answer in zip(prompts, answers, strict=True):
            length = len(prompt) + len(answer)
            if self.max_length is not None and length > self.max_length:
                raise PromptTooLongError(
                    f"Row {prompt.question_id!r} has {length} tokens ({len(prompt)} of prompt), the limit is "
                    f"max_length={self.max_length}. Rows are never cut: raise max_length, lower max_frames, fps or "
                    f"max_pixels, or drop the row."
                )
        prompt_width, answer_width = max(map(len, prompts)), max(map(len, answers))
        shape = (len(rows), prompt_width + answer_width)
        input_ids = torch.full(shape, tokenizer.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, -100)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            start, end = prompt_width - len(prompt), prompt_width + len(answer)
            input_ids[row, start:prompt_width] = torch.from_numpy(prompt.input_ids)
            input_ids[row, prompt_width:end] = torch.tensor(answer)
            attention_mask[row, start:end] = 1
            labels[row, prompt_width:end] = torch.tensor(answer)
        media = model_inputs(prompts, input_ids, completion_width=answer_width, config=self.encoder.config)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **media}


class VideoSFTTrainer(CheckpointMixin, SFTTrainer):
    """TRL's `SFTTrainer` for rows with any number of videos and images and a `process` (the thinking).

    Args:
        encoder: turns a row into ids, positions and vision tensors.
        Further arguments as in `trl.SFTTrainer`. Datasets have the columns of `rows.load_rows`.

    Raises:
        RowError: rows of the training data have no `process`.
    """

    @settings_checked()
    def __init__(self, *args, encoder: PromptEncoder, **kwargs):
        check_thinking(kwargs["train_dataset"])
        config = kwargs["args"]
        config.remove_unused_columns = False
        config.dataset_kwargs = {**(config.dataset_kwargs or {}), "skip_prepare_dataset": True}
        kwargs["data_collator"] = SFTCollator(encoder, max_length=config.max_length)
        super().__init__(*args, **kwargs)
        self.encoder = encoder
        self._checked = False
        use_trained_positions(self.accelerator.unwrap_model(self.model))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.model.training and not self._checked:
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
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def check_thinking(dataset) -> None:
    """Raise unless every row has a `process`, naming the first rows without."""
    bare = [place for place, process in enumerate(dataset["process"]) if not (process or "").strip()]
    if bare:
        names = ", ".join(repr(row["question_id"]) for row in dataset.select(bare[:10]))
        raise RowError(
            f"{len(bare)} of {len(dataset)} rows have no `process`, the thinking that SFT teaches: {names}"
            f"{', …' if len(bare) > 10 else ''}. Give them one, or leave them out with `where` in `datasets`."
        )
