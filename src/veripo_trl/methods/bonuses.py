"""Reward columns that a method fills itself, since they need the whole group: T-GRPO's bonuses, GRPO-CARE's."""

from veripo_trl.errors import ConfigError
from veripo_trl.trainers.checkpoints import with_changes


def add_bonuses(
    kwargs: dict, weights: dict[str, float], *, accuracy: str | None, setting: str
) -> list[int]:
    """Put columns, empty until then, behind the recipe's rewards.

    Args:
        kwargs: of a trainer; its `args` and `reward_funcs` are replaced.
        weights: of each column, by its name.
        accuracy: which of the rewards tells right answers; None for the first named accuracy….
        setting: what named it, for the error.

    Returns:
        The index of that reward, and of each new column.

    Raises:
        ConfigError: there is no such reward, or columns are standardised, so that no bonus would have its size.
    """
    config, functions = kwargs["args"], list(kwargs["reward_funcs"])
    names = [function.__name__.removesuffix("_reward") for function in functions]
    accuracy = accuracy or next((name for name in names if name.startswith("accuracy")), None)
    if accuracy not in names:
        raise ConfigError(f"{setting}: expected one of rewards ({', '.join(names)}); got {accuracy!r}.")
    if config.multi_objective_aggregation != "sum_then_normalize":
        raise ConfigError(
            f"{setting.partition(':')[0]}: expected multi_objective_aggregation: sum_then_normalize; got "
            f"{config.multi_objective_aggregation}, which standardises each column, so that no bonus has its size."
        )
    given = config.reward_weights or [1.0] * len(functions)
    if len(given) == len(functions):  # else TRL refuses them, and shall tell the recipe's own numbers
        kwargs["args"] = with_changes(config, reward_weights=[*given, *weights.values()])
        kwargs["reward_funcs"] = [*functions, *map(_empty, weights)]
    return [names.index(accuracy), *range(len(functions), len(functions) + len(weights))]


def _empty(name: str):
    def column(completions: list, **kwargs) -> list[None]:
        return [None] * len(completions)

    column.__name__ = name
    return column
