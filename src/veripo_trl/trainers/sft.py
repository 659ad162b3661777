"""Supervised fine-tuning on text, image and video rows: the cold start before GRPO."""

from dataclasses import dataclass

import torch
from trl import SFTConfig, SFTTrainer

from veripo_trl.data.prompts import build_target
from veripo_trl.data.schema import RowError
from veripo_trl.errors import settings_checked
from veripo_trl.model.encoding import PromptEncoder
from veripo_trl.model.features import PIXELS
from veripo_trl.model.inputs import model_inputs
from veripo_trl.options import option
from veripo_trl.trainers.base import VideoConfig, VideoMixin
from veripo_trl.trainers.checkpoints import with_changes
from veripo_trl.trainers.engines import check_media_alike, shares_out_towers, whole_towers
from veripo_trl.trainers.loading import with_answers


@dataclass
class VideoSFTConfig(VideoConfig, SFTConfig):
    """TRL's `SFTConfig` without truncation, which would cut vision tokens, and with private repositories."""

    max_length: int | None = option("Longest prompt with answer; a longer row is refused, never cut.")

    UNUSED = {
        "completion_only_loss": (None, True),
        "truncation_mode": ("keep_start",),
        **dict.fromkeys(("assistant_only_loss", "packing", "eval_packing", "padding_free"), (False, None)),
        **dict.fromkeys(("pad_to_multiple_of", "pad_token"), (None,)),
        "dataset_text_field": ("text",),
    }
    BECAUSE = "The loss is on the answers, and rows are neither cut nor packed."


class SFTCollator:
    """Rows to a padded batch with loss on the assistant's tokens only.

    Returns `input_ids, attention_mask, labels` (rows, width), `position_ids` (3, rows, width) and the vision tensors.
    """

    def __init__(self, encoder: PromptEncoder, *, max_length: int | None):
        self.encoder = encoder
        self.max_length = max_length

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        prompts = [self.encoder.encode(row) for row in rows]
        texts = [build_target(row, self.encoder.template) for row in rows]
        batch = with_answers(self.encoder, prompts, texts, [True] * len(rows), max_length=self.max_length)
        ids, width = batch["input_ids"], batch.pop("completion_width")
        batch["labels"] = ids.masked_fill(batch.pop("completion_mask") == 0, -100)
        return {**batch, **model_inputs(prompts, ids, completion_width=width, config=self.encoder.config)}


class VideoSFTTrainer(VideoMixin, SFTTrainer):
    """TRL's `SFTTrainer` for rows with any number of videos and images and a `process` (the thinking).

    Args:
        encoder: see `VideoMixin`.
        Further arguments as in `trl.SFTTrainer`. Datasets have the columns of `rows.load_rows`.

    Raises:
        RowError: rows of the training data have no `process`.
    """

    @settings_checked()
    def __init__(self, *args, encoder: PromptEncoder, **kwargs):
        check_thinking(kwargs["train_dataset"])
        config = kwargs["args"]
        prepared = {**(config.dataset_kwargs or {}), "skip_prepare_dataset": True}
        kwargs["args"] = with_changes(config, dataset_kwargs=prepared)
        kwargs["data_collator"] = SFTCollator(encoder, max_length=config.max_length)
        super().__init__(*args, encoder=encoder, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        unwrapped, given = self._unwrapped(model), [kind for kind, pixels in PIXELS.items() if pixels in inputs]
        check_media_alike(self.accelerator, unwrapped, len(given))
        if shares_out_towers(self.accelerator, unwrapped):  # in the forward only processes with media would run it
            inputs, outputs = dict(inputs), {}
            with whole_towers([unwrapped.model.visual]), torch.no_grad():
                for kind in given:
                    features = unwrapped.get_image_features if kind == "image" else unwrapped.get_video_features
                    outputs[kind] = features(inputs.pop(PIXELS[kind]), inputs.pop(f"{kind}_grid_thw"))
            inputs |= {"mm_encoder_outputs": outputs} if outputs else {}
        return super().compute_loss(model, inputs, *args, **kwargs)


def check_thinking(dataset) -> None:
    """Raise unless every row has a `process`, naming the first rows without."""
    bare = [index for index, process in enumerate(dataset["process"]) if not (process or "").strip()]
    if bare:
        names = ", ".join(repr(row["question_id"]) for row in dataset.select(bare[:10]))
        raise RowError(
            f"{len(bare)} of {len(dataset)} rows have no `process`, the thinking that SFT teaches: {names}"
            f"{', …' if len(bare) > 10 else ''}. Give them one, or leave them out with `where` in `datasets`."
        )
