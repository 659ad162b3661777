"""The options of the training recipes beside TRL's own; the parser of YAML and command line.

The defaults of frames and pixels (`fps`, `max_frames`, `max_pixels` …) are in media/sampling.py.
"""

import json
import os
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from inspect import formatannotation
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from veripo_trl.answers.rewards import MAKERS, REWARDS, reward_functions
from veripo_trl.errors import ConfigError, settings_checked
from veripo_trl.methods import METHODS, load_methods
from veripo_trl.model.policy import SEEING
from veripo_trl.options import option
from veripo_trl.recipe.console import silence
from veripo_trl.verifier.judge_prompts import load_judge_prompt
from veripo_trl.verifier.pairs import check_setting
from veripo_trl.verifier.server_judge import ServerJudge


def _as_trained(name: str, text: str):
    return option(f"{text} Default: as the policy was trained, else {SEEING[name]}.")


@dataclass
class DataArguments:
    """Which rows a stage reads, and how their media are read. `build.see_as_trained` fills in what `SEEING` names."""

    datasets: list[str] | None = option(
        "List of {path, source, split, where, limit, media_root, name, revision, id_prefix}; JSON on the command line."
    )
    eval_datasets: list[str] | None = option("Held-out rows, likewise, for the table at the end.")
    holdout: int = option(
        "Hold this many rows of `datasets` out of training, for that table: chosen by a hash of their ids, so that they "
        "are the same under every seed, on resume, and in every stage with the same `datasets`.",
        default=0,
    )
    manifest: str | None = option("Of recipes/check_rows.py: rows that it marks bad are left out.")
    leave_out: list[str] | None = option(
        "Files solved.json of verify_rollouts.py (on the Hub it lies beside the pairs): the questions that they drop are "
        "left out."
    )
    allow_urls: bool = option("Media may be http(s) URLs, downloaded to ~/.cache/veripo_trl.", False)
    prompt_template: str | None = _as_trained("prompt_template", "A name or a YAML file.")
    fps: float | None = _as_trained("fps", "Frames sampled per second of video.")
    min_frames: int | None = _as_trained("min_frames", "Fewest frames per video.")
    max_frames: int | None = _as_trained("max_frames", "Most frames per video.")
    min_pixels: int | None = _as_trained("min_pixels", "Smallest area of a frame, in pixels.")
    max_pixels: int | None = _as_trained("max_pixels", "Largest area of a frame, in pixels.")
    max_image_pixels: int | None = _as_trained("max_image_pixels", "Largest area of an image.")
    max_prompt_tokens: int | None = option("A longer prompt, vision tokens included, is refused.")
    video_backend: str = option("decord (PyAV where decord cannot), or pyav alone.", "decord")
    decode_threads: int = option("Threads of a video's decoder; 0 for its own choice.", 0)
    decode_timeout_s: float = option(
        "Of one video's decoding; a large file and many pixels have more: 1 s per 20 MB and per 100 million.", 60.0
    )
    frame_cache: str | None = option("Folder for sampled frames, on a fast disk; none by default.")
    frame_cache_gb: float = option("Largest size of that folder.", 20.0)
    train_vision_tower: bool = option("Train the vision tower too.", False)
    tiny_world: str | None = option("Make the embedded world in this folder, unless it is there.")
    tiny_questions: list[str] | None = option("A relative's questions for it, instead of its own.")

    def __post_init__(self):
        for name in ("datasets", "eval_datasets"):
            setattr(self, name, read_sources(name, getattr(self, name)))
        if self.holdout < 0 or (self.holdout and (self.eval_datasets or not self.datasets)):
            raise ConfigError(
                f"holdout: expected a number of rows to hold out of `datasets`, or 0 with eval_datasets; came "
                f"{self.holdout}, datasets {self.datasets} and eval_datasets {self.eval_datasets}."
            )


@dataclass
class ReportArguments:
    """The held-out evaluation behind the table at the end of a stage."""

    report_batch_size: int = option("Questions per batch and process.", 8)
    report_samples: int = option("Sampled answers per question, beside the greedy one.", 2)
    report_max_new_tokens: int = option("Longest answer, in tokens.", 1024)
    report_judge: str = option(
        "Who judges consistency: rules, server (a model, beside the rules), or tiny, by the embedded world's templates.",
        "rules",
        choices=("rules", "server", "tiny"),
    )
    report_judge_kwargs: str | None = option(
        "Of server, as a mapping or JSON: url, model, and any of prompt, verdict_cache, api_key_env, concurrency, "
        "timeout_s, max_retries, request_options. It must answer while the stage runs."
    )
    report_before: bool = option("Evaluate before training too.", True)

    def __post_init__(self):
        for name in ("report_batch_size", "report_samples", "report_max_new_tokens"):
            check_setting(self, name, getattr(self, name) >= 1, "1 or more")
        self.report_judge_kwargs = read_mapping("report_judge_kwargs", self.report_judge_kwargs)
        given, server = (self.report_judge_kwargs or {}).keys(), self.report_judge == "server"
        known = {"verdict_cache", *(setting.name for setting in fields(ServerJudge))}
        if not server and given or server and not {"url", "model"} <= given <= known:
            raise ConfigError(
                f"report_judge_kwargs: for report_judge: server expected url, model and any of "
                f"{', '.join(sorted(known))}, for another none; got {self.report_judge_kwargs!r} for {self.report_judge}."
            )
        if server:
            self.server_judge()  # its prompt, URL and key are looked at before a run

    def server_judge(self) -> ServerJudge:
        options = {name: value for name, value in self.report_judge_kwargs.items() if name != "verdict_cache"}
        return ServerJudge(**{**options, "prompt": load_judge_prompt(options.get("prompt", "consistency"))})


@dataclass
class StopArguments:
    """Stop a cold start early, to leave room for reinforcement learning."""

    stop_datasets: list[str] | None = option("Development rows, in the form of `datasets`.")
    stop_at_accuracy: float | None = option("Stop once greedy accuracy on them reaches this.")
    stop_check_steps: int = option("Steps between two looks.", 50)

    def __post_init__(self):
        self.stop_datasets = read_sources("stop_datasets", self.stop_datasets)
        stops = self.stop_at_accuracy is not None
        check_setting(self, "stop_datasets", self.stop_datasets or not stops, "rows, with stop_at_accuracy")
        check_setting(self, "stop_check_steps", self.stop_check_steps >= 1, "1 or more")


@dataclass
class GRPOArguments:
    """What the GRPO recipe adds to TRL's arguments."""

    rewards: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={
            "help": f"{', '.join((*REWARDS, *MAKERS))}, or module:function; `reward_weights` weighs them."
        },
    )
    reward_kwargs: str | None = option(
        f"Options of rewards, as a mapping or JSON: {{exponential_error: {{tau: 10}}}}; of {', '.join(MAKERS)}, and of a "
        "module:function that makes a reward: it is called with them once, and what it returns is the reward."
    )
    methods: list[str] | None = option(
        f"What changes the training step: some of {', '.join(METHODS)}, or module:Mixin. --help shows the options of "
        "those that are named."
    )

    def __post_init__(self):
        self.reward_kwargs = read_mapping("reward_kwargs", self.reward_kwargs)
        names = [function.__name__ for function in reward_functions(self.rewards, self.reward_kwargs)]
        if len(set(names)) < len(names):
            raise ConfigError(f"rewards: expected functions of different names, they are logged by them; got {names}.")


@dataclass
class PairArguments:
    """Where DPO's preference pairs are."""

    pairs: list[str] | None = option("List of {path, media_root, revision, kinds, limit}, or JSON.")

    def __post_init__(self):
        if not self.pairs:
            raise ConfigError("Expected `pairs:`, a list of {path: …} that verify_rollouts.py wrote; none was given.")
        self.pairs = read_sources("pairs", self.pairs)


SHARED = (DataArguments, ReportArguments)  # by every training recipe


def read_sources(name: str, sources: list | None) -> list | None:
    """The entries of a list of sources: mappings from a YAML, JSON from the command line."""
    try:
        found = sources and [json.loads(item) if isinstance(item, str) else item for item in sources]
        if not all(isinstance(item, dict) for item in found or []):
            raise ValueError("an entry is no mapping")
        return found
    except ValueError as error:
        raise ConfigError(f'{name}: expected entries like {{"path": "rows.jsonl"}}, as JSON; got {sources!r}: {error}')


def read_mapping(name: str, value: dict | str | None) -> dict | None:
    """A mapping from a YAML, JSON from the command line."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ConfigError(f"{name}: expected a mapping, as JSON; got {value!r}: {error}") from error


def parse(dataclasses: tuple, *, default_config: Path, argv: list[str] | None = None, ignored: tuple = ()) -> tuple:
    """Parse a recipe's YAML and command line; unknown keys are refused.

    Keys of the dataclasses in `ignored` are known, but not read: a check takes a training recipe's YAML, and can do
    without what that asks of the machine.

    `--config` names a file as seen from the working directory or from `recipes/configs/`. Without it, and without a
    model, the recipe's default configuration is used. Where `dataclasses` have `methods`, the options of those that are
    named come after their own.
    """
    silence()
    finder = _Parser((), add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    given, argv = finder.parse_known_args(argv)
    config = _find_config(given.config, default_config, argv)
    options = method_options(_named_methods(config, argv))
    if "methods" in {f.name for kind in dataclasses for f in fields(kind)}:
        dataclasses += options
    known = sorted({f.name for kind in (*dataclasses, *ignored, *options) for f in fields(kind)})
    if config is not None:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"config: {config}", flush=True)
        # before the dataclasses are made: one of them may stumble over the value that a mistyped key did not set
        _refuse_unknown(str(config), [key for key in _read_yaml(config) if key != "env"], known)
        _refuse_types(config, dataclasses)
        argv = ["--config", str(config), *argv]
    with settings_checked():
        *parsed, _, rest = _Parser(dataclasses, allow_abbrev=False).parse_args_and_config(
            args=argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    for item, setting in ((item, setting) for item in parsed for setting in fields(item)):
        value, choices = getattr(item, setting.name), setting.metadata.get("choices")
        if choices and value is not None and value not in choices:  # argparse does not look at a YAML's
            raise ConfigError(f"{setting.name}: expected one of {', '.join(choices)}; got {value!r}.")
        if value != value:  # it compares as False with every limit
            raise ConfigError(f"{setting.name}: expected a number; got nan.")
    if rest:
        given = [word[2:].split("=")[0] for word in rest if word.startswith("--")]
        _refuse_unknown("command line", given or rest, known)
    return tuple(parsed)


def method_options(methods: list[str] | None) -> tuple:
    """The dataclasses of options that `methods:` adds to a recipe's own."""
    return tuple(mixin.OPTIONS for mixin in load_methods(methods))


def _named_methods(config: Path | None, argv: list[str]) -> list[str] | None:
    """The setting `methods`, read before all others: it decides which there are."""
    finder = _Parser((), add_help=False, allow_abbrev=False)
    finder.add_argument("--methods", nargs="+")
    given = finder.parse_known_args(argv)[0].methods
    return given if given is not None or config is None else _read_yaml(config).get("methods")


def _find_config(given: Path | None, default: Path, argv: list[str]) -> Path | None:
    if given is None:
        own_model = any(word.split("=")[0] == "--model_name_or_path" for word in argv)
        return None if own_model else default
    configs = default.parent.parent
    for file in (given, configs / given):
        if file.is_file():
            return file
    raise ConfigError(f"--config {given}: no such file here or in {configs}.")


def _read_yaml(file: Path) -> dict:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: expected YAML: {error}") from error
    return content if isinstance(content, dict) else {}


def _refuse_types(config: Path, dataclasses: tuple) -> None:
    """A value that is not of its option's type would be an error of whatever looks at it first."""
    given = _read_yaml(config)
    for kind in dataclasses:
        hints = get_type_hints(kind)
        for item in fields(kind):
            value = given.get(item.name, item.default)
            if value is not item.default and not _fits(value, hints[item.name]):
                expected = "a value" if value is None else formatannotation(hints[item.name])
                default = "" if item.default is MISSING else f" Leave it out for its default, {item.default!r}."
                came = "null" if value is None else repr(value)
                raise ConfigError(f"{config}: {item.name}: expected {expected}, came {came}.{default}")


def _fits(value, hint, *, listed: bool = False) -> bool:
    """Whether a YAML's value is of an option's type, as far as null, numbers and lists go.

    Args:
        listed: whether it is an entry of a list, where argparse reads no text as a number.
    """
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, each, listed=listed) for each in get_args(hint))
    if get_origin(hint) is list:
        if not isinstance(value, list):
            return isinstance(value, dict)  # `read_sources` says what it expects, of entries too
        return all(_fits(each, *get_args(hint), listed=True) for each in value)
    if hint is type(None):
        return value is None
    if hint in (int, float):
        return type(value) in (int, hint) or (isinstance(value, str) and not listed)
    return value is not None or listed


class _Parser(TrlParser):
    def error(self, message: str):
        raise ConfigError(message)  # without argparse's usage of some hundred lines


def _refuse_unknown(place: str, keys: list, known: list[str]) -> None:
    if unknown := [key for key in map(str, keys) if key not in known]:
        owners = {f.name: name for name in METHODS for kind in method_options([name]) for f in fields(kind)}
        hints = [
            f"{key!r} (of the method {owners[key]}, which methods does not name)"
            if key in owners
            else f"{key!r} (close: {', '.join(get_close_matches(key, known)) or 'none'})"
            for key in unknown
        ]
        raise ConfigError(f"{place}: unknown key {'; '.join(hints)}. Correct or remove it. Nothing was run.")
