"""The checks that need no judge: accuracy, format, repetition and length of the thinking; what inconsistency is."""

import functools
import math
import re
from collections.abc import Mapping

from veripo_trl.answers.score import SolutionError, extract_answer, is_well_formed, score_answer, split_completion

# Scripts without spaces between words: each character counts as a word.
_SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\s{_SPACELESS}]+")


def repetition_share(think: str, *, ngram: int = 10) -> float:
    """The share of word n-grams that occurred before, in [0, 1]; 0.0 for a text of fewer than n + 1 words.

    Words are what stands between white space, case aside.
    """
    if ngram < 1:
        raise ValueError(f"ngram: expected 1 or more, got {ngram}")
    think = think.lower()
    words = think.split() if think.isascii() else _WORD.findall(think)
    total = len(words) - ngram + 1
    if total < 2:
        return 0.0
    return 1.0 - len(set(zip(*(words[start:] for start in range(ngram))))) / total


def inconsistency(verdicts: Mapping[str, int]) -> float:
    """inconsistent / (consistent + inconsistent), of counts by verdict: unknown ones are left out; NaN if all are."""
    known = verdicts.get("consistent", 0) + verdicts.get("inconsistent", 0)
    return verdicts.get("inconsistent", 0) / known if known else math.nan


def check_rollouts(
    rollouts: list[dict], *, tokenizer, ngram: int = 10, regression_score: str = "mean_relative_accuracy"
) -> list[dict]:
    """Check a batch of rollouts.

    Args:
        rollouts: dicts with `completion, problem_type, solution, options`.
        tokenizer: a fast tokenizer, the policy's own: the thinking's length is counted in its tokens.
        regression_score: as the reward that the policy was trained with (`answers.score_answer`).

    Returns:
        For each rollout `format_ok` (bool), `accuracy` in [0, 1] (the training reward's own function, computed anew),
        `repetition` of the thinking (of the whole completion where no single think span can be read: a rollout that
        was cut off in a loop is repetitive), `think_tokens` (0 without a readable span), and the spans themselves,
        `think` and `answer` (str or None).

    Raises:
        SolutionError: an unreadable truth, with the rollout's id.
    """
    checks = []
    for rollout in rollouts:
        completion = rollout["completion"]
        think, answer = split_completion(completion)
        try:
            accuracy = _score(
                extract_answer(completion),
                rollout["problem_type"],
                rollout["solution"],
                tuple(rollout["options"] or ()),
                regression_score,
            )
        except SolutionError as error:
            raise SolutionError(f"rollout {rollout['rollout_id']!r}: {error}") from error
        checks.append(
            {
                "format_ok": is_well_formed(completion),
                "accuracy": accuracy,
                "repetition": repetition_share(completion if think is None else think, ngram=ngram),
                "think_tokens": 0,
                "think": think,
                "answer": answer,
            }
        )
    readable = [check for check in checks if check["think"]]
    for check, tokens in zip(readable, _token_counts([check["think"] for check in readable], tokenizer), strict=True):
        check["think_tokens"] = tokens
    return checks


@functools.lru_cache(maxsize=2048)  # the rollouts of a group give the same few answers
def _score(answer: str | None, problem_type: str, solution: str, options: tuple, regression_score: str) -> float:
    return score_answer(
        answer, problem_type=problem_type, solution=solution, options=options, regression_score=regression_score
    )


def _token_counts(texts: list[str], tokenizer) -> list[int]:
    if not texts:
        return []
    if not tokenizer.is_fast:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    # The backend directly: building a BatchEncoding costs more than tokenizing. A truncation that the tokenizer was
    # saved with would cap the count.
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        return [len(encoding) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
