"""TRL reward functions over `score_answer`; a recipe names them by their keys in `REWARDS` and `MAKERS`, or the user's
own as `module:function`, and weighs them by `reward_weights`.

Each is a column: logged, stored and weighed by itself. An accuracy scores every row by its own type, one type's rows in
its own way. What belongs to some types only is None for other rows: TRL leaves it out of their sum and of its mean (a
row with None from every reward has no advantage). `batch` and `columns` below are what `accuracy_reward` takes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from veripo_trl.answers.choice import partial_credit
from veripo_trl.answers.grammars import are_segments, is_structured
from veripo_trl.answers.grounded import grounded_letter, grounded_tiou
from veripo_trl.answers.numbers import absolute_range, exponential, relative_accuracy
from veripo_trl.answers.objects import object_id, object_id_in_time, object_tiou
from veripo_trl.answers.score import PROBLEM_TYPES, extract_answer, is_well_formed, score_answer
from veripo_trl.answers.spans import WITH_DURATION, needed_duration, solution_duration, tiou, tiou_time_r1
from veripo_trl.answers.yes_no import yes_no_or_rouge
from veripo_trl.errors import ConfigError, SolutionError
from veripo_trl.user_functions import is_user_function, user_function

FORMAT_REWARD = 0.5


def completion_text(completion: str | list[dict]) -> str:
    """The text of a completion, plain or conversational (one assistant message whose content is a string)."""
    if isinstance(completion, str):
        return completion
    if len(completion) == 1 and isinstance(completion[0].get("content"), str):
        return completion[0]["content"]
    raise TypeError(
        "Expected a completion as a string or as one assistant message with text content, "
        f"got {completion!r:.200}; multi-turn completions need a reward function of their own."
    )


def _scores(
    own: dict[str, Callable], /, completions, solution, problem_type, options=None, *, others=True, **columns
) -> list:
    """A score for each completion, given with all columns of its batch: by `own[its type]`, of what is read and the
    truth; else by the type's own accuracy, or None where `others` is false."""
    options = options if options is not None else [None] * len(completions)
    return [
        _score(extract_answer(completion_text(completion)), kind, truth, tuple(choices or ()), own.get(kind))
        if others or kind in own
        else None
        for completion, truth, kind, choices in zip(completions, solution, problem_type, options, strict=True)
    ]


@functools.lru_cache(maxsize=2048)  # the completions of a group give the same few answers
def _score(answer: str | None, problem_type: str, solution: str, options: tuple, score: Callable | None) -> float:
    return score_answer(answer, problem_type=problem_type, solution=solution, options=options, score=score)


# ------------------------------------------------------------------------------------------------------- accuracies


def accuracy_reward(
    completions: list, solution: Sequence[str], problem_type: Sequence[str], options: Sequence | None = None, **kwargs
) -> list[float]:
    """Accuracy in [0, 1] of the only <answer> span of each completion, each row by its own problem type."""
    return _scores({}, completions, solution, problem_type, options)


def accuracy_relative_error_reward(*batch, **columns) -> list[float]:
    """As `accuracy_reward`, with 1 - relative error (Video-R1's) for regression rows."""
    return _scores({"regression": relative_accuracy}, *batch, **columns)


def accuracy_soft_reward(*batch, **columns) -> list[float]:
    """As `accuracy_reward`, with partial credit (TW-GRPO's) for choices: the share of the right letters that are named,
    0 with a wrong one. Report `accuracy` beside it: naming one sure letter pays."""
    return _scores({"multiple choice": partial_credit}, *batch, **columns)


def yes_no_first_reward(*batch, **columns) -> list[float]:
    """As `accuracy_reward`, with the first word alone for free-form rows whose truth begins with yes or no
    (VideoHallu's), where ROUGE would count the words around it."""
    return _scores({"free-form": yes_no_or_rouge}, *batch, **columns)


def accuracy_absolute_range(max_range: float = 100.0) -> Callable[..., list[float]]:
    """As `accuracy_reward`, with 1 - |error| / `max_range` for regression rows (PRIMO R1's)."""
    _check("accuracy_absolute_range: max_range", max_range)
    own = {"regression": functools.partial(absolute_range, max_range=max_range)}

    def accuracy_absolute_range_reward(*batch, **columns) -> list[float]:
        return _scores(own, *batch, **columns)

    return accuracy_absolute_range_reward


# ----------------------------------------------------------------------------------------------- of some types only


def tiou_reward(*batch, **columns) -> list[float | None]:
    """Temporal IoU of temporal grounding and of object and time."""
    own = {"temporal grounding": tiou, "object and time": object_tiou}
    return _scores(own, *batch, others=False, **columns)


def tiou_time_r1_reward(*batch, **columns) -> list[float | None]:
    """Temporal IoU times how near both ends are (Time-R1's), of temporal grounding rows with a duration."""
    return _scores({"temporal grounding": tiou_time_r1}, *batch, others=False, **columns)


def grounded_letter_reward(*batch, **columns) -> list[float | None]:
    """1 for the right letter of a grounded choice."""
    return _scores({"grounded choice": grounded_letter}, *batch, others=False, **columns)


def grounded_tiou_reward(*batch, **columns) -> list[float | None]:
    """Temporal IoU of a grounded choice, whatever its letter."""
    return _scores({"grounded choice": grounded_tiou}, *batch, others=False, **columns)


def box_iou_reward(*batch, **columns) -> list[float | None]:
    """IoU of box grounding rows."""
    own = {"box grounding": PROBLEM_TYPES["box grounding"].score}
    return _scores(own, *batch, others=False, **columns)


def object_id_maker(needs_overlap: bool = False) -> Callable[..., list[float | None]]:
    """1 for the right id of object and time; `needs_overlap`: if its span meets the true one (STVG-R1's words; its code
    asks for none)."""
    own = {"object and time": object_id_in_time if needs_overlap else object_id}

    def object_id_reward(*batch, **columns) -> list[float | None]:
        return _scores(own, *batch, others=False, **columns)

    return object_id_reward


def exponential_error(tau: float = 10.0, scale: float = 1.5) -> Callable[..., list[float | None]]:
    """`scale` · exp(-|error| / `tau`) of regression rows (SOLE-R1's; its tau is not published, 10 is ours)."""
    _check("exponential_error: tau", tau)
    own = {"regression": functools.partial(exponential, tau=tau)}

    def exponential_error_reward(*batch, **columns) -> list[float | None]:
        scores = _scores(own, *batch, others=False, **columns)
        return [None if score is None else scale * score for score in scores]

    return exponential_error_reward


# ------------------------------------------------------------------------------------------------------------- form


def format_reward(completions: list, **kwargs) -> list[float]:
    """0.5 for each completion that is exactly one think span, then one answer span; else 0."""
    return [FORMAT_REWARD if is_well_formed(completion_text(completion)) else 0.0 for completion in completions]


def segments_format_reward(completions: list, solution, problem_type, **kwargs) -> list[float]:
    """1 for time, caption and think in triples, then one answer (Video-Thinker's grammar; its size is not published: a
    weight of 0.5 makes it `format`'s). Spans are held against a row's duration where its solution tells it."""
    durations = [
        solution_duration(truth) if kind in WITH_DURATION else None
        for truth, kind in zip(solution, problem_type, strict=True)
    ]
    texts = map(completion_text, completions)
    return [float(are_segments(text, duration)) for text, duration in zip(texts, durations, strict=True)]


def structured_format(sections: Sequence[str] = ("planning", "observation", "reasoning")) -> Callable[..., list[float]]:
    """1 for a think span that is exactly these sections, then one answer (PRIMO R1's grammar)."""
    if isinstance(sections, str) or not sections or not all(isinstance(s, str) and s.isidentifier() for s in sections):
        raise ConfigError(f"structured_format: sections: expected a list of names of tags; got {sections!r}.")

    def structured_format_reward(completions: list, **kwargs) -> list[float]:
        return [float(is_structured(completion_text(each), tuple(sections))) for each in completions]

    return structured_format_reward


def _check(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ConfigError(f"{name}: expected a number over 0; got {value!r}.")


# ------------------------------------------------------------------------------------------------------------ names

REWARDS = {
    "accuracy": accuracy_reward,
    "accuracy_relative_error": accuracy_relative_error_reward,
    "accuracy_soft": accuracy_soft_reward,
    "yes_no_first": yes_no_first_reward,
    "tiou": tiou_reward,
    "tiou_time_r1": tiou_time_r1_reward,
    "grounded_letter": grounded_letter_reward,
    "grounded_tiou": grounded_tiou_reward,
    "box_iou": box_iou_reward,
    "format": format_reward,
    "segments_format": segments_format_reward,
}
MAKERS = {  # called with the entries that `reward_kwargs` has for them, for the reward function
    "consistency": "veripo_trl.verifier.reward:consistency",  # by name: that room is above this one
    "accuracy_absolute_range": accuracy_absolute_range,
    "object_id": object_id_maker,
    "exponential_error": exponential_error,
    "structured_format": structured_format,
}
ACCURACIES = ("accuracy", "accuracy_relative_error", "accuracy_soft", "accuracy_absolute_range", "yes_no_first")


def reward_function(name: str, options: dict[str, Any] | None = None) -> Callable[..., list[float]]:
    """The reward that `rewards:` names: one of `REWARDS` and `MAKERS`, or the user's own as `module:function`.

    As TRL calls it: with `completions` and every column of the batch by its name, for one float (or None) each. It is
    logged, stored and weighed under its `__name__`.

    Args:
        options: what `reward_kwargs` has under that name. With them `module:function` (as TRL's
            `trl.rewards:get_soft_overlong_punishment`) is called once, and returns the reward.

    Raises:
        ConfigError: no such reward, or not with these options.
    """
    if name in REWARDS:
        if options is not None:
            raise ConfigError(f"reward_kwargs: {name} has no options; those that do are {', '.join(MAKERS)}.")
        return REWARDS[name]
    if name not in MAKERS and not is_user_function(name):
        known = ", ".join((*REWARDS, *MAKERS))
        raise ConfigError(f"rewards: expected some of {known}, or module:function; got {name!r}.")
    make = MAKERS.get(name, name)
    make = user_function(make, setting="rewards") if isinstance(make, str) else make
    if name not in MAKERS and options is None:
        return make
    try:
        made = make(**(options or {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"reward_kwargs: {name}: {error}") from error
    if not callable(made) or not isinstance(getattr(made, "__name__", None), str):
        raise ConfigError(f"reward_kwargs: {name}: expected it to return a function with a name; came {made!r:.80}.")
    return made


def reward_functions(names: Sequence[str], options: dict[str, dict] | None) -> list[Callable[..., list[float]]]:
    """`reward_function` of each name, with its entry of `options`. Raises ConfigError too for entries of no reward."""
    options = {} if options is None else options
    if not isinstance(options, dict) or not all(isinstance(each, dict) for each in options.values()):
        raise ConfigError(f'reward_kwargs: expected {{"a reward": {{"an option": …}}}}; got {options!r}.')
    if unused := options.keys() - set(names):
        raise ConfigError(f"reward_kwargs: {', '.join(sorted(unused))}: not among rewards ({', '.join(names)}).")
    return [reward_function(name, options.get(name)) for name in names]


def check_reward_truths(names: Sequence[str], dataset) -> None:
    """Look at the rewards that `rewards:` names, and at the rows, before anything is generated.

    Raises:
        ConfigError: a reward scores none of the rows, or a type's rows have no reward for what they answer.
        SolutionError: a reward needs more of a truth than `check_solution` does; with the row's id.
    """
    _check_types(names, dataset)
    if "tiou_time_r1" not in names:
        return
    kind = "temporal grounding"
    for question, truth, of in zip(dataset["question_id"], dataset["solution"], dataset["problem_type"], strict=True):
        if of == kind:
            try:
                needed_duration(PROBLEM_TYPES[kind].truth(truth, None))
            except SolutionError as error:
                raise SolutionError(f"question_id {question!r}: {error}") from error


def _check_types(names: Sequence[str], dataset) -> None:
    truths: dict[str, str] = {}  # of each type the first
    for kind, truth in zip(dataset["problem_type"], dataset["solution"], strict=True):
        truths.setdefault(kind, truth)
    own = [name for name in names if name in REWARDS or name in MAKERS]
    batch = {"completions": [""] * len(truths), "problem_type": list(truths), "solution": list(truths.values())}
    found = {name: {k for k, score in zip(truths, reward_function(name)(**batch)) if score is not None} for name in own}
    if unused := [name for name in own if not found[name]]:
        raise ConfigError(
            f"rewards: {', '.join(unused)}: of the rows' problem types ({', '.join(truths)}) it scores none. Remove it."
        )
    of_answers = [name for name in own if not name.endswith("format") and name != "consistency"]
    left = truths.keys() - set().union(*(found[name] for name in of_answers))
    if of_answers and left and len(own) == len(names):  # what a reward of the user's own scores is not known
        raise ConfigError(
            f"rewards: {', '.join(of_answers)} score no {' and no '.join(sorted(left))}, of which there are rows: "
            "nothing would be said of their answers. Add `accuracy`, or leave the rows out."
        )
