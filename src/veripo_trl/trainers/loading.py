"""From rows to batches: which rows the loader repeats, what its workers encode, and the order in which groups stay whole.

A method that shows rows otherwise (augmented, by a curriculum) adds to what `MarkedSampler` yields with a row's index, by
`WithMarks`: workers know no state of the trainer, and a resumed run repeats what the sampler draws.
"""

import logging
import math
from collections.abc import Callable

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from trl.trainer.utils import RepeatSampler

from veripo_trl.data.prompts import build_messages
from veripo_trl.model.encoding import EncodedPrompt, PromptEncoder, PromptTooLongError, as_shown, encode_unique, text_ids
from veripo_trl.shared_prompt.rollout import left_pad

logger = logging.getLogger(__name__)


class MarkedRows(Dataset):
    """A dataset's rows, with the marks that the sampler sends with an index: `repeated` on those that the loader only
    repeats, and what a method adds. Evaluation's rows have none.

    The loader yields every generation batch `num_iterations × steps_per_generation` times and the trainer uses the
    first; the rows of the others need not be decoded.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key) -> dict:
        index, marks = key if isinstance(key, tuple) else (key, {})
        return {**self.dataset[index], **marks}


class MarkedSampler(Sampler):
    """TRL's sampler, yielding `(index, {"repeated", "epoch", "epochs"})`, with an order that depends on the epoch's
    number alone. `epoch` is that number, `epochs` how many have been drawn when a row's generation batch begins, a float.

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
        epoch = self.epoch()
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + epoch)
        for drawn, index in enumerate(self.sampler):
            generation, repeat = divmod(drawn // self.batch_size, self.repeat_count)
            epochs = epoch + generation * self.repeat_count * self.batch_size / len(self)
            yield index, {"repeated": repeat > 0, "epoch": epoch, "epochs": epochs}


class WithMarks(Sampler):
    """A sampler of `(index, marks)` with a method's own.

    Args:
        added: of an index and its marks gives more marks. It is called when the loader draws, which may be many steps
            ahead of the trainer: it may depend on the trainer's state as it was when the epoch began, no later.
    """

    def __init__(self, sampler: Sampler, added: Callable[[int, dict], dict]):
        self.sampler = sampler
        self.added = added

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self):
        for index, marks in self.sampler:
            yield index, {**marks, **self.added(index, marks)}


class RowsForGroups(RepeatSampler):
    """Each row `count` times in a row, for as many processes, in an order that depends on the epoch's number alone."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


class RolloutCollator:
    """Rows with their chat messages and, unless the loader only repeats them, their encoded prompts.

    Runs in the loader's workers, ahead of the step. Equal questions of a batch share one `EncodedPrompt`.
    """

    def __init__(self, encoder: PromptEncoder):
        self.encoder = encoder

    def __call__(self, rows: list[dict]) -> list[dict]:
        # a batch is of one generation batch: all of it is repeated, or nothing
        prompts = [None] * len(rows) if rows[0].get("repeated") else encode_unique(self.encoder, rows)
        template = self.encoder.template
        return [
            {**row, "prompt": build_messages(as_shown(row), template), "encoded": prompt}
            for row, prompt in zip(rows, prompts, strict=True)
        ]


def with_answers(
    encoder: PromptEncoder,
    prompts: list[EncodedPrompt],
    texts: list[str],
    finished: list[bool],
    *,
    max_length: int | None,
) -> dict:
    """Prompts with given answers, padded as in a rollout: prompts on the left, answers on the right.

    Args:
        texts: an answer per prompt. finished: whether it ends there, with the end of the turn.

    Returns:
        `input_ids`, `attention_mask` and `completion_mask`, int64 (rows, length), and `completion_width`.

    Raises:
        PromptTooLongError: prompt and answer have more than `max_length` tokens.
    """
    tokenizer = encoder.processor.tokenizer
    ids = text_ids(tokenizer, texts)
    answers = [own + [tokenizer.eos_token_id] * ended for own, ended in zip(ids, finished, strict=True)]
    for prompt, answer in zip(prompts, answers, strict=True):
        length = len(prompt) + len(answer)
        if max_length is not None and length > max_length:
            raise PromptTooLongError(
                f"Question {prompt.question_id!r} has {length} tokens ({len(prompt)} of prompt) with its answer, the "
                f"limit is max_length={max_length}. Rows and pairs are never cut: raise max_length, lower max_frames, "
                f"fps or max_pixels, or leave the question out."
            )
    prompt_ids, prompt_mask = left_pad(prompts, tokenizer.pad_token_id)
    answers = [torch.tensor(answer, dtype=torch.long) for answer in answers]
    answer_ids = pad_sequence(answers, batch_first=True, padding_value=tokenizer.pad_token_id)
    answer_mask = pad_sequence([torch.ones_like(answer) for answer in answers], batch_first=True)
    return {
        "input_ids": torch.cat([prompt_ids, answer_ids], dim=1),
        "attention_mask": torch.cat([prompt_mask, answer_mask], dim=1),
        "completion_mask": torch.cat([torch.zeros_like(prompt_mask), answer_mask], dim=1),
        "completion_width": answer_ids.size(1),
    }


def loader_options(config) -> dict:
    """The loader's workers and prefetching, so that generation batches are encoded by all of them, ahead of the step.

    A loader deals its batches out in turn, and only every `steps_per_generation × num_iterations`-th is encoded: with a
    common factor, some workers would never get one, and with torch's prefetching of two the next might not be begun.

    Args:
        config: a `VideoGRPOConfig`.
    """
    workers = config.dataloader_num_workers
    if workers == 0:
        return {}
    cycle = config.steps_per_generation * config.num_iterations
    while math.gcd(workers, cycle) > 1:
        workers += 1
    if workers != config.dataloader_num_workers:
        logger.info(
            "dataloader_num_workers: %d, not %d: only every %dth batch is encoded, and workers take turns.",
            workers,
            config.dataloader_num_workers,
            cycle,
        )
    prefetch = config.dataloader_prefetch_factor or max(2, math.ceil((cycle + 1) / workers))
    return {"dataloader_num_workers": workers, "dataloader_prefetch_factor": prefetch}


def regroup(slices: list[dict]) -> list[dict]:
    """Put the rows of a generation batch, split into equal slices, back into the order in which they were generated.

    The completions of a prompt are neighbours in that order, so a group is divided only where a slice ends.
    """
    size = len(slices[0]["row_index"])
    order = torch.cat([part["row_index"] for part in slices]).argsort()
    ordered = [dict(part) for part in slices]
    for key, value in slices[0].items():
        if isinstance(value, torch.Tensor) and value.ndim > 0:  # one entry per row
            whole = torch.cat([part[key] for part in slices])[order]
            for part, own in zip(ordered, whole.split(size), strict=True):
                part[key] = own
    return ordered
