"""Methods that change GRPO, each a file: a mixin over `VideoGRPOTrainer`, with its options in a dataclass. Recipes take
`methods: [name]`; the trainers know none of them. Nothing that trains without a method lives here.

The contract of a method, ours or a user's own (`module:Mixin`):

- its mixin is a subclass of `Method`, whose overrides call `super()` at one of the five places that
  `veripo_trl.trainers.grpo` names; its docstring has formula and source;
- `OPTIONS` is a dataclass of `options.option` fields. They join the recipe's parser, so that YAML, command line and
  `--help` know them where the method is named; no other option may have their names;
- the mixin's `__init__` takes an instance of it as the keyword argument `NAME`, and refuses by a ConfigError, before
  `super().__init__`, what it cannot do with the trainer's settings. It may append columns of its own to `reward_funcs`
  (and their weights to `args.reward_weights`: `bonuses.add_bonuses`);
- `EXCLUDES` names the methods that it cannot go together with, each with the reason.

The first of `methods:` is the outermost: its overrides run first, and `super()` of the last is the trainer.
"""

from dataclasses import fields
from functools import partial
from typing import ClassVar

from veripo_trl.errors import ConfigError
from veripo_trl.user_functions import is_user_function, user_function

METHODS: dict[str, str] = {
    "care": "veripo_trl.methods.care:CARE",
    "difficulty_augmentation": "veripo_trl.methods.difficulty_augmentation:DifficultyAugmentation",
    "grounding_curriculum": "veripo_trl.methods.grounding_curriculum:GroundingCurriculum",
    "reg_grpo": "veripo_trl.methods.reg_grpo:RegGRPO",
    "streaming": "veripo_trl.methods.streaming:Streaming",
    "t_grpo": "veripo_trl.methods.t_grpo:TGRPO",
    "tw_grpo": "veripo_trl.methods.tw_grpo:TWGRPO",
}


class Method:
    """A method's mixin, see above."""

    NAME: ClassVar[str]
    OPTIONS: ClassVar[type]
    EXCLUDES: ClassVar[dict[str, str]] = {}


def load_methods(names: list[str] | None) -> list[type[Method]]:
    """The mixins of `methods:`, in order.

    Raises:
        ConfigError: no such method, or two that cannot go together.
    """
    if not isinstance(names, list | None):
        raise ConfigError(f"methods: expected a list, like [{names}]; got {names!r}.")
    mixins: list[type[Method]] = []
    for name in names or []:
        if name not in METHODS and not is_user_function(str(name)):
            raise ConfigError(
                f"methods: expected some of {', '.join(METHODS)}, or module:Mixin; got {name!r}."
            )
        found = user_function(METHODS.get(name, name), setting="methods")
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise ConfigError(
                f"methods: {name}: expected a subclass of veripo_trl.methods.Method; it is {found!r:.80}."
            )
        for other in mixins:
            if reason := found.EXCLUDES.get(other.NAME) or other.EXCLUDES.get(found.NAME):
                raise ConfigError(
                    f"methods: {found.NAME} and {other.NAME} cannot go together: {reason}"
                )
            own, others = (
                {field.name for field in fields(each.OPTIONS)} for each in (found, other)
            )
            if found.NAME == other.NAME or own & others:
                raise ConfigError(
                    f"methods: {found.NAME} twice, or options of one name: {sorted(own & others)}."
                )
        mixins.append(found)
    return mixins


def with_methods(trainer: type, names: list[str] | None, options: list) -> partial:
    """A trainer's class with the methods' mixins before it; call it as the trainer.

    Args:
        options: an instance of each method's `OPTIONS`, in the order of `names`.
    """
    mixins = load_methods(names)
    made = type(trainer.__name__, (*mixins, trainer), {})
    return partial(
        made, **{mixin.NAME: given for mixin, given in zip(mixins, options, strict=True)}
    )
