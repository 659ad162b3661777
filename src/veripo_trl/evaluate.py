"""Generate answers to rows and score them."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from .answers import extract_answer, is_well_formed, score_answer, split_completion
from .encoding import PromptEncoder, encode_unique, vision_token_ids
from .generation import cut_at_end, sample_completions

RESAMPLES = 1000


def generate(
    model,
    encoder: PromptEncoder,
    dataset,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 1024,
    batch_size: int = 8,
    num_workers: int = 0,
    seed: int = 0,
    progress: str | None = None,
) -> list[dict]:
    """Answer every row of a dataset.

    Args:
        model: the unwrapped policy; run in evaluation mode and put back afterwards.
        dataset: rows as `rows.load_rows` gives them.
        samples: answers per row. temperature: 0 is greedy decoding.
        batch_size: rows per batch, times `samples` completions at once.
        num_workers: processes that decode ahead. seed: of the sampling; the global generators are left as they were.
        progress: title of a progress bar, None for none.

    Returns:
        One dict per completion, in row order: `row` (its index), `question_id`, `completion`, `completion_tokens`,
        `think_tokens`, `finish_reason` ("stop" or "length"), `prompt_template` (its hash).
    """
    tokenizer = encoder.processor.tokenizer
    device = next(model.parameters()).device
    ends = _end_ids(model, tokenizer)
    options = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": ends,
        "suppress_tokens": vision_token_ids(encoder.processor, encoder.config),
        "repetition_penalty": 1.0,
    }
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    else:
        options |= {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    loader = DataLoader(
        range(len(dataset)),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=EncodedBatch(encoder, dataset),
    )
    training = model.training
    model.eval()
    answers = []
    bar = tqdm(total=len(dataset), desc=progress, unit="row", disable=progress is None)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for places, prompts in loader:
            tokens = sample_completions(
                model,
                [prompt for prompt in prompts for _ in range(samples)],
                pad_token_id=tokenizer.pad_token_id,
                config=encoder.config,
                **options,
            )
            for place, ids in zip(np.repeat(places, samples).tolist(), cut_at_end(tokens, ends), strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                think = split_completion(text)[0]
                answers.append(
                    {
                        "row": place,
                        "question_id": dataset[place]["question_id"],
                        "completion": text,
                        "completion_tokens": len(ids),
                        "think_tokens": len(tokenizer(think)["input_ids"]) if think is not None else 0,
                        "finish_reason": "stop" if ids[-1] in ends else "length",
                        "prompt_template": encoder.template.hash,
                    }
                )
            bar.update(len(places))
    bar.close()
    model.train(training)
    return answers


class EncodedBatch:
    """Collates row numbers to `(numbers, encoded prompts)`; a class, so that it reaches spawned workers too."""

    def __init__(self, encoder: PromptEncoder, dataset):
        self.encoder, self.dataset = encoder, dataset

    def __call__(self, places: list[int]):
        return places, encode_unique(self.encoder, [self.dataset[place] for place in places])


def _end_ids(model, tokenizer) -> list[int]:
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [] if declared is None else [declared]
    return sorted({tokenizer.eos_token_id, *declared})


def summarize(answers: list[dict], dataset, *, judge: Callable[..., str]) -> dict[str, float | int]:
    """Score completions and average them.

    Args:
        answers: from `generate`. dataset: the rows that they answer.
        judge: `(completion, problem_type=, options=) -> "consistent" | "inconsistent" | "unknown"`.

    Returns:
        `accuracy` with `accuracy_low`, `accuracy_high` (95% bootstrap over questions), `format` (share well formed),
        `inconsistency` = inconsistent / (consistent + inconsistent), NaN if no verdict is known, `unknown` (share),
        `accurate_and_consistent` (unknown counts as a miss), `think_tokens` and `completion_tokens` (means),
        `truncated` (share), `questions`, `completions`, and `accuracy: <problem type>`.
    """
    if not answers:
        raise ValueError("Expected at least one completion to summarize, but got none.")
    scores, verdicts, kinds = [], [], []
    for answer in answers:
        row = dataset[answer["row"]]
        task = {"problem_type": row["problem_type"], "options": row["options"]}
        scores.append(score_answer(extract_answer(answer["completion"]), solution=row["solution"], **task))
        verdicts.append(judge(answer["completion"], **task))
        kinds.append(row["problem_type"])
    scores = np.array(scores)
    questions = np.array([answer["row"] for answer in answers])
    low, high = bootstrap_interval(scores, questions)
    inconsistent, consistent = verdicts.count("inconsistent"), verdicts.count("consistent")
    known = inconsistent + consistent
    both = [score * (verdict == "consistent") for score, verdict in zip(scores, verdicts, strict=True)]
    return {
        "accuracy": float(scores.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "format": float(np.mean([is_well_formed(answer["completion"]) for answer in answers])),
        "inconsistency": inconsistent / known if known else math.nan,
        "unknown": verdicts.count("unknown") / len(verdicts),
        "accurate_and_consistent": float(np.mean(both)),
        "think_tokens": float(np.mean([answer["think_tokens"] for answer in answers])),
        "completion_tokens": float(np.mean([answer["completion_tokens"] for answer in answers])),
        "truncated": float(np.mean([answer["finish_reason"] == "length" for answer in answers])),
        "questions": len(set(questions.tolist())),
        "completions": len(answers),
        **{
            f"accuracy: {kind}": float(scores[[k == kind for k in kinds]].mean())
            for kind in sorted(set(kinds))
        },
    }


def bootstrap_interval(scores: np.ndarray, questions: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean score, resampling questions, since completions of one question are not independent."""
    _, place = np.unique(questions, return_inverse=True)
    totals, counts = np.bincount(place, weights=scores), np.bincount(place)
    drawn = np.random.default_rng(seed).integers(0, len(counts), size=(RESAMPLES, len(counts)))
    means = totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
