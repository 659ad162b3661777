"""TRL reward functions over `score_answer`; a recipe names them by their keys in `REWARDS`, or the user's own as
`module:function`, and weighs them by `reward_weights`."""

import functools
from collections.abc import Callable, Sequence

from veripo_trl.answers.score import extract_answer, is_well_formed, score_answer
from veripo_trl.errors import ConfigError
from veripo_trl.user_functions import is_user_function, user_function

FORMAT_REWARD = 0.5


def _text(completion: str | list[dict]) -> str:
    """The text of a completion, plain or conversational (one assistant message whose content is a string)."""
    if isinstance(completion, str):
        return completion
    if len(completion) == 1 and isinstance(completion[0].get("content"), str):
        return completion[0]["content"]
    raise TypeError(
        "Expected a completion as a string or as one assistant message with text content, "
        f"got {completion!r:.200}; multi-turn completions need a reward function of their own."
    )


def _accuracy(completions, solution, problem_type, options, regression_score: str) -> list[float]:
    options = options if options is not None else [None] * len(completions)
    return [
        _score(extract_answer(_text(completion)), kind, truth, tuple(choices or ()), regression_score)
        for completion, truth, kind, choices in zip(completions, solution, problem_type, options, strict=True)
    ]


@functools.lru_cache(maxsize=2048)  # the completions of a group give the same few answers
def _score(answer: str | None, problem_type: str, solution: str, options: tuple, regression_score: str) -> float:
    return score_answer(
        answer, problem_type=problem_type, solution=solution, options=options, regression_score=regression_score
    )


def accuracy_reward(
    completions: list, solution: Sequence[str], problem_type: Sequence[str], options: Sequence | None = None, **kwargs
) -> list[float]:
    """Accuracy in [0, 1] of the only <answer> span of each completion, each row by its own problem type."""
    return _accuracy(completions, solution, problem_type, options, "mean_relative_accuracy")


def accuracy_relative_error_reward(
    completions: list, solution: Sequence[str], problem_type: Sequence[str], options: Sequence | None = None, **kwargs
) -> list[float]:
    """As `accuracy_reward`, with 1 - relative error (Video-R1's) for regression rows."""
    return _accuracy(completions, solution, problem_type, options, "relative_error")


def format_reward(completions: list, **kwargs) -> list[float]:
    """0.5 for each completion that is exactly one think span, then one answer span; else 0."""
    return [FORMAT_REWARD if is_well_formed(_text(completion)) else 0.0 for completion in completions]


REWARDS = {
    "accuracy": accuracy_reward,
    "accuracy_relative_error": accuracy_relative_error_reward,
    "format": format_reward,
}


def reward_function(name: str) -> Callable[..., list[float]]:
    """The reward that `rewards:` names: one of `REWARDS`, or the user's own as `module:function`.

    As TRL calls it: with `completions` and every column of the batch by its name, for one float (or None) each. It is
    logged, stored and weighed under its `__name__`.

    Raises:
        ConfigError: no such reward.
    """
    if name in REWARDS:
        return REWARDS[name]
    if is_user_function(name):
        return user_function(name, setting="rewards")
    raise ConfigError(f"rewards: expected some of {', '.join(REWARDS)}, or module:function; got {name!r}.")
