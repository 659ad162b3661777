"""Generate answers to rows and score them: the engine behind the end tables, the loop and the evaluation scripts."""

import hashlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from veripo_trl.answers.score import (
    answer_metrics,
    extract_answer,
    is_well_formed,
    score_answer,
    split_completion,
)
from veripo_trl.data.prompts import PromptError
from veripo_trl.data.schema import RowError
from veripo_trl.files.run_folder import outlive_sigterm
from veripo_trl.media.video import MediaError
from veripo_trl.model.encoding import EncodedPrompt, PromptEncoder, PromptTooLongError, vision_token_ids
from veripo_trl.model.streaming import Stream, StreamEncoder
from veripo_trl.shared_prompt.rollout import cut_at_end, sample_completions
from veripo_trl.verifier.checks import agreement, inconsistency

RESAMPLES = 1000
GREEDY_BELOW = 1e-5  # a lower temperature is greedy decoding, as vLLM has it too
COPIED = 2**18  # prompt tokens whose keys and values samples hold copies of: 15 GB of a 7B model in bfloat16
ROW_ERRORS = (RowError, MediaError, PromptTooLongError, PromptError)  # what is wrong with a row rather than with us


@dataclass(frozen=True)
class Decoding:
    """How completions are decoded. A temperature below 1e-5 is greedy; `seed` is of the sampling."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        finite = 0 <= self.temperature < math.inf and 0 < self.repetition_penalty < math.inf  # nan is neither
        if self.max_new_tokens < 1 or not finite or not 0 < self.top_p <= 1:
            raise ValueError(
                f"expected max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1 and repetition_penalty > 0; got {self}"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def seed_of(self, *parts) -> int:
        """A seed for one row or batch: its draws do not depend on what was drawn before it."""
        digest = hashlib.sha256(repr((self.seed, *parts)).encode()).digest()
        return int.from_bytes(digest[:4], "big")


class TransformersEngine:
    """Completes encoded prompts with a transformers model, one batch at a time.

    Args:
        model: the unwrapped policy, in evaluation mode.

    Attributes:
        ends: ids that end a completion. context: tokens that a prompt and its completion may have together.
        busy_s: seconds of computing so far.
    """

    def __init__(self, model, encoder: PromptEncoder, decoding: Decoding):
        self.model, self.tokenizer, self.config = model, encoder.processor.tokenizer, encoder.config
        self.decoding = decoding
        self.ends = end_ids(model.generation_config.eos_token_id, self.tokenizer)
        self.context, self.busy_s = encoder.config.get_text_config().max_position_embeddings, 0.0
        self.options = {
            "max_new_tokens": decoding.max_new_tokens,
            "eos_token_id": self.ends,
            "suppress_tokens": vision_token_ids(encoder.processor, encoder.config),
            "repetition_penalty": decoding.repetition_penalty,
            "top_k": None if decoding.greedy else 0,
            "top_p": None if decoding.greedy else decoding.top_p,
            "temperature": None if decoding.greedy else decoding.temperature,
            "do_sample": not decoding.greedy,
        }

    def complete(self, prompts: list[EncodedPrompt], indices: list[int], *, samples: int = 1) -> list[list[int]]:
        """Token ids of `samples` completions per prompt, in order, each up to and including its end token.

        Args:
            indices: the prompts' rows. Sampling is seeded by them, so that a batch is drawn alike whatever came before;
                the global generators are left as they were.
            samples: each decodes from a copy of its prompt's keys and values; behind long prompts as many at a time as
                have `COPIED` tokens, or as there are prompts.
        """
        started = time.perf_counter()
        device = next(self.model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.decoding.seed_of(indices))
            tokens = sample_completions(
                self.model,
                [prompt for prompt in prompts for _ in range(samples)],
                pad_token_id=self.tokenizer.pad_token_id,
                config=self.config,
                rows_at_once=max(len(prompts), COPIED // max(map(len, prompts))),
                **self.options,
            )
        completions = cut_at_end(tokens, self.ends)  # waits for the device
        self.busy_s += time.perf_counter() - started
        return completions


def think_through(streams: list[Stream], indices: list, engine, encoder: PromptEncoder) -> list[EncodedPrompt]:
    """Ask all turns before the last, each of all streams that have it together.

    Args:
        streams: one per entry of `indices`, which name them for the sampling's seed.

    Returns:
        The prompts of the last turns.
    """
    live = list(zip(indices, streams, strict=True))
    while live := [(index, stream) for index, stream in live if not stream.is_last]:
        prompts = [stream.prompt(encoder) for _, stream in live]
        seeds = [(index, len(stream.thoughts)) for index, stream in live]  # of each turn another one
        for (_, stream), ids in zip(live, engine.complete(prompts, seeds), strict=True):
            thought = describe_completion(ids, tokenizer=engine.tokenizer, ends=engine.ends)
            stream.add(thought, engine.tokenizer)
    return [stream.prompt(encoder) for stream in streams]


def describe_completion(ids: list[int], *, tokenizer, ends: list[int]) -> dict:
    """`completion`, `completion_tokens`, `think_tokens`, `finish_reason` ("stop" or "length") of generated ids."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    think = split_completion(text)[0]
    return {
        "completion": text,
        "completion_tokens": len(ids),
        "think_tokens": len(tokenizer(think)["input_ids"]) if think is not None else 0,
        "finish_reason": "stop" if ids and ids[-1] in ends else "length",
    }


class EncodedRows(Dataset):
    """Rows by their index, encoded where they are asked for: in the loader's workers. `encoder` may be a
    `StreamEncoder`, which gives streams.

    A row that cannot be encoded is the text of its error there, unless `strict`.
    """

    def __init__(self, encoder: PromptEncoder, rows, indices: list[int], *, strict: bool):
        self.encoder, self.rows, self.indices, self.strict = encoder, rows, indices, strict

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, EncodedPrompt | str]:
        try:
            return place, self.encoder.encode(self.rows[self.indices[place]])
        except ROW_ERRORS as error:
            if self.strict:
                raise
            return place, f"{type(error).__name__}: {error}"


def use_one_thread(worker: int) -> None:
    """A forked worker's second thread would wait for ever. The loader says so to torch, but in a process whose engine is
    vLLM's CPU build `torch.set_num_threads` has been replaced by a function that does nothing."""
    torch._C.set_num_threads(1)


def batches_of(count: int, batch_size: int) -> list[list[int]]:
    return [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]


def encoded_batches(
    encoder: PromptEncoder,
    rows,
    batches: list[list[int]],
    *,
    num_workers: int,
    strict: bool = True,
) -> Iterator[tuple[list[int], list[EncodedPrompt | str]]]:
    """Encode batches of row indices ahead of their use.

    About two batches are under way beside the one in use, so that host memory stays bounded: no more workers are started
    than these have rows. A slow video holds up its own batch only.

    Args:
        num_workers: the most processes; 0 encodes here.

    Yields:
        `(indices, prompts)`, each batch when all of it is there: in any order where there are workers. With
        `strict=False` a bad row's prompt is the text of its error.
    """
    places = [(number, index) for number, indices in enumerate(batches) for index in indices]
    wanted = 2 * max(map(len, batches), default=1)  # rows under way
    num_workers = min(num_workers, wanted)
    loader = DataLoader(
        EncodedRows(encoder, rows, [index for _, index in places], strict=strict),
        batch_size=None,
        num_workers=num_workers,
        in_order=not num_workers,
        generator=torch.Generator(),  # without one, starting the workers draws from the global generator
        worker_init_fn=partial(outlive_sigterm, then=use_one_thread),  # training may be going on
        **({"prefetch_factor": math.ceil(wanted / num_workers)} if num_workers else {}),
    )
    arrived: dict[int, dict] = defaultdict(dict)
    for place, prompt in loader:
        number, index = places[place]
        arrived[number][index] = prompt
        if len(arrived[number]) == len(batches[number]):
            found = arrived.pop(number)
            yield batches[number], [found[index] for index in batches[number]]


def generate(
    model,
    encoder: PromptEncoder | StreamEncoder,
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
        encoder: a `StreamEncoder` shows videos clip by clip.
        dataset: rows as `rows.load_rows` gives them.
        samples: answers per row. temperature: 0 is greedy decoding.
        batch_size: rows per batch, times `samples` completions at once.
        num_workers: processes that decode ahead. seed: of the sampling; the global generators are left as they were.
        progress: title of a progress bar, None for none.

    Returns:
        One dict per completion, in row order: `row` (its index), `question_id`, `completion`, `completion_tokens`,
        `think_tokens`, `finish_reason` ("stop" or "length"), `prompt_template` (its hash).

    Raises:
        MediaError, RowError, PromptTooLongError: a row cannot be encoded.
    """
    plain = encoder.encoder if isinstance(encoder, StreamEncoder) else encoder
    engine = TransformersEngine(
        model, plain, Decoding(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    )
    batches = batches_of(len(dataset), batch_size)
    training = model.training
    model.eval()
    answers = []
    with tqdm(total=len(dataset), desc=progress, unit="row", disable=progress is None) as bar:
        for indices, prompts in encoded_batches(encoder, dataset, batches, num_workers=num_workers):
            if plain is not encoder:
                streams = [stream.again() for stream in prompts for _ in range(samples)]
                names = [(index, sample) for index in indices for sample in range(samples)]
                completions = engine.complete(think_through(streams, names, engine, plain), names)
            else:
                completions = engine.complete(prompts, indices, samples=samples)
            for index, ids in zip(np.repeat(indices, samples).tolist(), completions, strict=True):
                described = describe_completion(ids, tokenizer=engine.tokenizer, ends=engine.ends)
                answer = {"row": index, "question_id": dataset[index]["question_id"], **described}
                answers.append({**answer, "prompt_template": encoder.template.hash})
            bar.update(len(indices))
    model.train(training)
    return sorted(answers, key=lambda answer: answer["row"])


def end_ids(declared: int | list[int] | None, tokenizer) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those that the model's generation_config declares."""
    declared = declared if isinstance(declared, list) else [] if declared is None else [declared]
    return sorted({tokenizer.eos_token_id, *declared})


def task_of(row: dict) -> dict:
    """What a judge is told of a row."""
    return {"problem_type": row["problem_type"], "options": row["options"]}


def summarize(
    answers: list[dict], dataset, *, verdicts: list[str], second: list[str] | None = None
) -> dict[str, float | int]:
    """Score completions and average them.

    Args:
        answers: from `generate`. dataset: the rows that they answer.
        verdicts: "consistent", "inconsistent" or "unknown" of each, by the judge that reports. second: another's, only
            compared with them.

    Returns:
        `accuracy` with `accuracy_low`, `accuracy_high` (95% bootstrap over questions), `format` (share well formed),
        `inconsistency` (`verifier.checks.inconsistency`) with `inconsistency_low` and `inconsistency_high` (likewise),
        `unknown` (share),
        `accurate_and_consistent` (unknown counts as a miss), `think_tokens` and `completion_tokens` (means),
        `truncated` (share), `questions`, `completions`, `accuracy: <problem type>` (not of free text) and a type's own
        metrics, as `mIoU: <problem type>` and `ROUGE: free-form`; with a second judge `disagreement` (share of
        completions) and `kappa`, see `verifier.checks.agreement`. `accuracy` is the mean score: free text by its ROUGE.
    """
    if not answers:
        raise ValueError("Expected at least one completion to summarize, but got none.")
    scores, kinds, metrics = [], [], []
    for answer in answers:
        row = dataset[answer["row"]]
        task = task_of(row)
        said = extract_answer(answer["completion"])
        scores.append(score_answer(said, solution=row["solution"], **task))
        metrics.append(answer_metrics(said, solution=row["solution"], **task))
        kinds.append(row["problem_type"])
    found = agreement(second, verdicts) if second else {}
    scores, verdicts, kinds = np.array(scores), np.array(verdicts), np.array(kinds)
    questions = np.array([answer["row"] for answer in answers])
    known, unclear = verdicts != "unknown", (math.nan, math.nan)
    low, high = bootstrap_interval(scores, questions)
    wrong = verdicts[known] == "inconsistent"
    wrong_low, wrong_high = bootstrap_interval(wrong, questions[known]) if known.any() else unclear
    return {
        "accuracy": float(scores.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "format": float(np.mean([is_well_formed(answer["completion"]) for answer in answers])),
        "inconsistency": inconsistency(Counter(verdicts.tolist())),
        "inconsistency_low": wrong_low,
        "inconsistency_high": wrong_high,
        "unknown": float(np.mean(~known)),
        "accurate_and_consistent": float(np.mean(scores * (verdicts == "consistent"))),
        "think_tokens": float(np.mean([answer["think_tokens"] for answer in answers])),
        "completion_tokens": float(np.mean([answer["completion_tokens"] for answer in answers])),
        "truncated": float(np.mean([answer["finish_reason"] == "length" for answer in answers])),
        **({"disagreement": 1.0 - found["agreement"], "kappa": found["kappa"]} if second else {}),
        "questions": len(set(questions.tolist())),
        "completions": len(answers),
        **{
            f"accuracy: {kind}": float(scores[kinds == kind].mean())
            for kind in sorted(set(kinds.tolist()) - {"free-form"})  # whose score is ROUGE
        },
        **mean_metrics(metrics, kinds.tolist()),
    }


def mean_metrics(metrics: list[dict[str, float]], kinds: list[str]) -> dict[str, float]:
    """{"mIoU: temporal grounding": its mean over the rows that have it, …} of `score.answer_metrics`."""
    values = defaultdict(list)
    for found, kind in zip(metrics, kinds, strict=True):
        for name, value in found.items():
            values[f"{name}: {kind}"].append(value)
    return {name: float(np.mean(some)) for name, some in sorted(values.items())}


def bootstrap_means(scores: np.ndarray, questions: np.ndarray, *, resamples=RESAMPLES, seed: int = 0) -> np.ndarray:
    """Mean scores of resampled questions, since completions of one question are not independent."""
    _, index = np.unique(questions, return_inverse=True)
    totals, counts = np.bincount(index, weights=scores), np.bincount(index)
    rng, number = np.random.default_rng(seed), len(counts)
    drawn = (rng.integers(0, number, number) for _ in range(resamples))
    return np.array([totals[places].sum() / counts[places].sum() for places in drawn])


def bootstrap_interval(scores: np.ndarray, questions: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean score, by `bootstrap_means`."""
    low, high = np.quantile(bootstrap_means(scores, questions, seed=seed), [0.025, 0.975])
    return float(low), float(high)
