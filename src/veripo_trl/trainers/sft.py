"""Supervised fine-tuning on text, image and video rows: the cold start before GRPO."""

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from veripo_trl.data.prompts import build_target
from veripo_trl.data.schema import RowError
from veripo_trl.errors import settings_checked
from veripo_trl.model.encoding import PromptEncoder, encode_unique
from veripo_trl.options import option
from veripo_trl.trainers.base import VideoConfig, VideoMixin
from veripo_trl.trainers.checkpoints import with_changes
from veripo_trl.trainers.loading import RowsForGroups, with_answers


@dataclass
class VideoSFTConfig(VideoConfig, SFTConfig):
    """TRL's `SFTConfig` without truncation, which would cut vision tokens, and with private repositories."""

    max_length: int | None = option("Longest prompt with answer; a longer row is refused, never cut.")

    UNUSED = {
        "label_smoothing_factor": (0,),
        "completion_only_loss": (None, True),
        "truncation_mode": ("keep_start",),
        **dict.fromkeys(("assistant_only_loss", "packing", "eval_packing", "padding_free"), (False, None)),
        **dict.fromkeys(("pad_to_multiple_of", "pad_token"), (None,)),
        "dataset_text_field": ("text",),
    }
    BECAUSE = "The loss is on the answers, from their tokens' log-probabilities, and rows are neither cut nor packed."


class SFTCollator:
    """Rows to a padded batch with loss on the assistant's tokens only.

    What `with_answers` returns, with `labels` (rows, length) in place of its `completion_mask`, and `prompts`, one per
    row: encoded in the loader's workers, they travel as plain objects.
    """

    def __init__(self, encoder: PromptEncoder, *, max_length: int | None):
        self.encoder = encoder
        self.max_length = max_length

    def __call__(self, rows: list[dict]) -> dict:
        prompts = encode_unique(self.encoder, rows)
        texts = [build_target(row, self.encoder.template) for row in rows]
        batch = with_answers(self.encoder, prompts, texts, [True] * len(rows), max_length=self.max_length)
        labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
        return {**batch, "labels": labels, "prompts": prompts}


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
        self._share_out_prompts(per_device_train_batch_size=1, train_sampling_strategy="random")

    def _get_train_sampler(self, train_dataset=None):
        """Rows for groups of processes, each of which computes the answer of its row, and its share of the prompt."""
        if self.prompt_group is None:
            return super()._get_train_sampler(train_dataset)
        return RowsForGroups(self.train_dataset, self.args.prompt_parallel, seed=self.args.seed)

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = dict(inputs)
        prompts, width = inputs.pop("prompts"), inputs.pop("completion_width")
        self._make_features([prompts])
        self._decide_sharing(model, prompts[0])

        def scored(*, input_ids, attention_mask, **kwargs):
            return self._score(model, prompts, input_ids, attention_mask, width)

        return super().compute_loss(scored, inputs, *args, **kwargs)


def check_thinking(dataset) -> None:
    """Raise unless every row has a `process`, naming the first rows without."""
    bare = [index for index, process in enumerate(dataset["process"]) if not (process or "").strip()]
    if bare:
        names = ", ".join(repr(row["question_id"]) for row in dataset.select(bare[:10]))
        raise RowError(
            f"{len(bare)} of {len(dataset)} rows have no `process`, the thinking that SFT teaches: {names}"
            f"{', …' if len(bare) > 10 else ''}. Give them one, or leave them out with `where` in `datasets`."
        )
