"""The checks that need no judge (accuracy, format, repetition, length), and the share of inconsistent verdicts."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from veripo_trl.answers.rewards import accuracy_reward
from veripo_trl.answers.score import SolutionError, is_well_formed, split_completion
from veripo_trl.errors import VeripoError

# Scripts without spaces between words: each character counts as a word.
_SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\s{_SPACELESS}]+")


class AccuracyError(VeripoError):
    """A reward that cannot stand for accuracy."""


def repetition_share(think: str, *, ngram: int = 10) -> float:
    """The share of word n-grams that occurred before, in [0, 1]; 0.0 for a text of fewer than n + 1 words.

    Words are what stands between white space, case aside.
    """
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


def agreement(first: Sequence[str], second: Sequence[str]) -> dict[str, float]:
    """How far two judges give one verdict on the same things, unknown counted as a verdict: `agreement` (share), `kappa`
    (Cohen's: 1 is full, 0 what chance would give; NaN where each says one thing throughout)."""
    total, same = len(first), sum(a == b for a, b in zip(first, second, strict=True))
    one, other = Counter(first), Counter(second)
    chance = sum(one[verdict] * other[verdict] for verdict in one) / total**2
    return {"agreement": same / total, "kappa": (same / total - chance) / (1 - chance) if chance < 1 else math.nan}


def check_rollouts(
    rollouts: list[dict], *, tokenizer, reward: Callable = accuracy_reward
) -> list[dict]:
    """Check a batch of rollouts.

    Args:
        rollouts: dicts with `completion, problem_type, solution, options`.
        tokenizer: the policy's own: the thinking's length is counted in its tokens. What it was saved with to truncate
            or pad is switched off.
        reward: the one that the policy was trained with for accuracy (`answers.rewards.reward_function`). Called for
            each rollout as TRL does, with `completions` (messages) and the rollout's columns.

    Returns:
        For each rollout `format_ok` (bool), `accuracy` in [0, 1] (the training reward's own function, computed anew),
        `repetition` of the thinking (of the whole completion where no single think span can be read: a rollout that
        was cut off in a loop is repetitive), `think_tokens` (0 without a readable span), and the spans themselves,
        `think` and `answer` (str or None).

    Raises:
        SolutionError: an unreadable truth, with the rollout's id. AccuracyError: the reward is no number in [0, 1].
    """
    checks = []
    for rollout in rollouts:
        completion = rollout["completion"]
        think, answer = split_completion(completion)
        checks.append(
            {
                "format_ok": is_well_formed(completion),
                "accuracy": _accuracy(rollout, reward),
                "repetition": repetition_share(completion if think is None else think),
                "think_tokens": 0,
                "think": think,
                "answer": answer,
            }
        )
    counts = _token_counts([check["think"] or "" for check in checks], tokenizer)
    for check, tokens in zip(checks, counts, strict=True):
        check["think_tokens"] = tokens
    return checks


def _accuracy(rollout: dict, reward: Callable) -> float:
    columns = {name: [value] for name, value in rollout.items() if name != "completion"}
    try:
        (accuracy,) = reward(
            completions=[[{"role": "assistant", "content": rollout["completion"]}]], **columns
        )
    except SolutionError as error:
        raise SolutionError(f"rollout {rollout['rollout_id']!r}: {error}") from error
    except TypeError as error:
        accuracy = error
    if not isinstance(accuracy, (int, float)) or not 0 <= accuracy <= 1:
        raise AccuracyError(
            f"rollout {rollout['rollout_id']!r}: the reward {reward.__name__} gives {accuracy!r}; as accuracy the "
            "verifier needs a number from 0 to 1 for every rollout. It gives `completions` and the rollout's columns "
            f"({', '.join(columns)}), no `prompts` and no `completion_ids`."
        )
    return float(accuracy)


def _token_counts(texts: list[str], tokenizer) -> list[int]:
    if not tokenizer.is_fast:
        return [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    # The backend directly: building a BatchEncoding costs more than tokenizing. A truncation that the tokenizer was
    # saved with would cap the count; its own calls set theirs.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return [
        len(encoding) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
    ]
