"""What the recipes share: arguments, the run folder, resuming, the end table."""

import hashlib
import json
import logging
import math
import os
import resource
import signal
import sys
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config
from trl.models import unwrap_model_for_generation

from veripo_trl.data.prompts import load_template
from veripo_trl.data.rows import check_media, content_of, load_rows
from veripo_trl.errors import ConfigError, settings_checked
from veripo_trl.evaluate.generate import generate, summarize
from veripo_trl.files.disk import read_json
from veripo_trl.files.run_folder import (
    RESULTS,
    TRAINED,
    changed_keys,
    last_checkpoint,
    move_finished_aside,
    write_results,
)
from veripo_trl.files.secrets import without_secrets
from veripo_trl.files.tables import print_table, write_json
from veripo_trl.hub.ask import HubError
from veripo_trl.hub.locate import SHA, fetch, is_local, locate
from veripo_trl.hub.runs import push_run, run_card
from veripo_trl.media.video import VideoLoader, VideoSettings
from veripo_trl.model.encoding import PromptEncoder
from veripo_trl.model.policy import LANGUAGE_MODEL_LINEAR, SEEING, load_policy, read_settings
from veripo_trl.recipe.console import silence
from veripo_trl.report.plots import save_charts, training_charts
from veripo_trl.tiny.parser import judge as judge_by_templates
from veripo_trl.verifier.judges import judge_by_rules

logger = logging.getLogger(__name__)

REPORT_JUDGES = {"rules": judge_by_rules, "tiny": judge_by_templates}


def _as_trained(name: str, text: str):
    return field(default=None, metadata={"help": f"{text} Default: as the policy was trained, else {SEEING[name]}."})


@dataclass
class DataArguments:
    """Which rows a stage reads, and how their media are read. `see_as_trained` fills in what `policy.SEEING` names."""

    datasets: list[str] | None = field(
        default=None,
        metadata={"help": "List of {path, split, where, limit, media_root, name, revision}; JSON on the command line."},
    )
    eval_datasets: list[str] | None = field(
        default=None, metadata={"help": "Held-out rows, in the same form, for the table at the end."}
    )
    holdout: int = field(
        default=0,
        metadata={
            "help": "Hold this many rows of `datasets` out of training, for that table: chosen by a hash of their ids, "
            "so that they are the same under every seed, on resume, and in every stage with the same `datasets`."
        },
    )
    manifest: str | None = field(
        default=None, metadata={"help": "Written by recipes/check_rows.py: rows it marks bad are left out."}
    )
    leave_out: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files solved.json of verify_rollouts.py, or datasets of its pairs on the Hub, org/name or "
            "org/name@revision: the questions that they drop are left out."
        },
    )
    allow_urls: bool = field(default=False, metadata={"help": "Let rows name media by URL."})
    prompt_template: str | None = _as_trained("prompt_template", "A template of the package or a YAML file.")
    fps: float | None = _as_trained("fps", "Frames sampled per second of video.")
    min_frames: int | None = _as_trained("min_frames", "Fewest frames per video.")
    max_frames: int | None = _as_trained("max_frames", "Most frames per video.")
    min_pixels: int | None = _as_trained("min_pixels", "Smallest area of one frame, in pixels.")
    max_pixels: int | None = _as_trained("max_pixels", "Largest area of one frame, in pixels.")
    max_image_pixels: int | None = _as_trained("max_image_pixels", "Largest area of one image, in pixels.")
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "A longer prompt, vision tokens included, is refused. Never cut."}
    )
    video_backend: str = field(default="decord", metadata={"help": "decord (PyAV where decord cannot) or pyav."})
    decode_threads: int = field(default=0, metadata={"help": "Threads of a video's decoder; 0 for its own choice."})
    decode_timeout_s: float = field(default=60.0, metadata={"help": "Seconds before one video's decoding is given up."})
    frame_cache: str | None = field(default=None, metadata={"help": "Folder for sampled frames; none by default."})
    frame_cache_gb: float = field(default=20.0, metadata={"help": "Largest size of that folder."})
    train_vision_tower: bool = field(default=False, metadata={"help": "Train the vision tower too."})
    tiny_world: str | None = field(
        default=None, metadata={"help": "Make the embedded world in this folder first, unless it is there."}
    )

    def __post_init__(self):
        for name in ("datasets", "eval_datasets"):
            setattr(self, name, read_sources(name, getattr(self, name)))
        if self.holdout < 0 or (self.holdout and (self.eval_datasets or not self.datasets)):
            raise ConfigError(
                f"holdout: expected a number of rows to hold out of `datasets`, or 0 with eval_datasets; came "
                f"{self.holdout}, datasets {self.datasets} and eval_datasets {self.eval_datasets}."
            )


def read_sources(name: str, sources: list | None) -> list | None:
    """The entries of a list of sources: mappings from a YAML, JSON from the command line."""
    try:
        return sources and [json.loads(item) if isinstance(item, str) else item for item in sources]
    except ValueError as error:
        raise ConfigError(f'{name}: expected entries like {{"path": "rows.jsonl"}}, as JSON; got {sources!r}: {error}')


@dataclass
class PushArguments:
    """Where a stage's results go beside `hub_model_id`, and under which licence."""

    hub_rollouts_id: str | None = field(
        default=None, metadata={"help": "Hub dataset for GRPO's rollouts. Default: hub_model_id with -rollouts."}
    )
    hub_license: str = field(default="unknown", metadata={"help": "Licence in the cards, by the Hub's identifier."})


@dataclass
class ReportArguments:
    """The held-out evaluation behind the table at the end of a stage."""

    report_batch_size: int = field(default=8, metadata={"help": "Questions per batch and process."})
    report_samples: int = field(default=2, metadata={"help": "Sampled answers per question, beside the greedy one."})
    report_temperature: float = field(default=1.0, metadata={"help": "Temperature of the sampled answers."})
    report_max_new_tokens: int = field(default=1024, metadata={"help": "Longest answer, in tokens."})
    report_judge: str = field(
        default="rules",
        metadata={"help": "Who judges consistency here: rules, or tiny (reads the embedded world's own templates)."},
    )
    report_before: bool = field(
        default=True, metadata={"help": "Evaluate before training too; the loop has that from the stage before."}
    )

    def __post_init__(self):
        if self.report_judge not in REPORT_JUDGES:
            raise ConfigError(f"report_judge: expected one of {sorted(REPORT_JUDGES)}, got {self.report_judge!r}.")


def parse(dataclasses: tuple, *, default_config: Path, argv: list[str] | None = None, ignored: tuple = ()) -> tuple:
    """Parse a recipe's YAML and command line; unknown keys are refused.

    Keys of the dataclasses in `ignored` are known, but not read: a check takes a training recipe's YAML, and can do
    without what that asks of the machine.

    `--config` names a file as seen from the working directory or from `recipes/configs/`. Without it, and without a
    model, the recipe's default configuration is used.
    """
    silence()
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    configs = default_config.parent.parent
    if "--config" in argv:
        place = argv.index("--config") + 1
        if place == len(argv):
            raise ConfigError("--config expects a YAML file.")
        given = Path(argv[place])
        found = given if given.is_file() else configs / given
        if not found.is_file():
            raise ConfigError(f"--config {given}: no such file here or in {configs}.")
        argv[place] = str(found)
    elif not any(word.split("=")[0] == "--model_name_or_path" for word in argv):
        argv = ["--config", str(default_config), *argv]
    if "--config" in argv and int(os.environ.get("RANK", "0")) == 0:
        print(f"config: {argv[argv.index('--config') + 1]}", flush=True)
    known = sorted({f.name for kind in (*dataclasses, *ignored) for f in fields(kind)})
    if "--config" in argv:
        # before the dataclasses are made: one of them may stumble over the value that a mistyped key did not set
        config = argv[argv.index("--config") + 1]
        try:
            content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"{config}: expected YAML: {error}") from error
        _refuse_unknown(config, [key for key in content if key != "env"] if isinstance(content, dict) else [], known)
    with settings_checked():
        *parsed, _, rest = _Parser(dataclasses).parse_args_and_config(
            args=argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    for item, setting in ((item, setting) for item in parsed for setting in fields(item)):
        value, choices = getattr(item, setting.name), setting.metadata.get("choices")
        if choices and value is not None and value not in choices:  # argparse does not look at a YAML's
            raise ConfigError(f"{setting.name}: expected one of {', '.join(choices)}; got {value!r}.")
    if rest:
        given = [word[2:].split("=")[0] for word in rest if word.startswith("--")]
        _refuse_unknown("command line", given or rest, known)
    return tuple(parsed)


class _Parser(TrlParser):
    def error(self, message: str):
        raise ConfigError(message)  # without argparse's usage of some hundred lines


def _refuse_unknown(place: str, keys: list, known: list[str]) -> None:
    if unknown := [key for key in map(str, keys) if key not in known]:
        hints = [f"{key!r} (close: {', '.join(get_close_matches(key, known)) or 'none'})" for key in unknown]
        raise ConfigError(f"{place}: unknown key {'; '.join(hints)}. Correct or remove it. Nothing was run.")


def allow_many_open_files() -> None:
    """Raise the soft limit of open files to the hard one: every tensor from a loader's worker holds a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def use_all_cores(training_args) -> None:
    """On a CPU, share its cores among the processes: `accelerate launch` gives each a single thread."""
    if training_args.use_cpu:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // training_args.world_size))


@settings_checked()
def make_policy(model_args: ModelConfig, data_args: DataArguments):
    """The model and processor of a stage, see `policy.load_policy`. LoRA targets the language model by default."""
    if model_args.use_peft and model_args.lora_target_modules is None:
        model_args.lora_target_modules = LANGUAGE_MODEL_LINEAR
    revision = None if model_args.model_revision == "main" else model_args.model_revision
    name = model_args.model_name_or_path
    if name and (origin := _hub_origin(name, "model", revision)):
        model_args.model_revision = revision = origin["revision"]
    quantization = get_quantization_config(model_args)
    device_map = {"": torch.cuda.current_device()} if quantization and torch.cuda.is_available() else None
    return load_policy(
        name,
        revision=revision,
        dtype=model_args.dtype or "float32",
        attn_implementation=model_args.attn_implementation,
        train_vision_tower=data_args.train_vision_tower,
        lora=get_peft_config(model_args),
        quantization_config=quantization,
        device_map=device_map,
    )


def _hub_origin(name: str, repo_type: str, revision: str | None) -> dict | None:
    """`locate`, asked once for all processes."""
    return broadcast_object_list([locate(name, repo_type, revision) if PartialState().is_main_process else None])[0]


def _pin(sources: list[dict]) -> None:
    """Set the revision of datasets of the Hub to the commit that is read, so that it is known afterwards."""
    for source in sources:
        if origin := _hub_origin(source.get("path", ""), "dataset", source.get("revision")):
            source["revision"] = origin["revision"]


def hub_inputs(data_args: DataArguments, model_args: ModelConfig) -> dict[str, dict]:
    """{"model" or a dataset's path: {"repo_id", "revision"}} of what a stage has read from the Hub, by commit."""
    sources = [*(data_args.datasets or []), *(data_args.eval_datasets or [])]
    read = {"model": (model_args.model_name_or_path, model_args.model_revision)}
    read |= {source["path"]: (source["path"], source.get("revision")) for source in sources}
    read |= {f"left out by {name}": (name, sha) for name, _, sha in (e.partition("@") for e in data_args.leave_out or [])}
    return {
        name: {"repo_id": place, "revision": revision}
        for name, (place, revision) in read.items()
        if revision and SHA.fullmatch(revision) and not is_local(place)
    }


@settings_checked()
def see_as_trained(
    data_args: DataArguments, name: str, revision: str | None = None, *, defaults: dict = SEEING
) -> None:
    """Fill in the template and the frame settings that are not given: as the policy was trained, else the defaults.

    Says what it took from the policy and what it took by default, and warns of what is given and differs.
    """
    trained = read_settings(name, None if revision == "main" else revision)
    taken, by_default, differing = [], [], []
    for key, default in defaults.items():
        given, own = getattr(data_args, key), trained.get(key)
        if given is None:
            setattr(data_args, key, default if own is None else own)
        template = key == "prompt_template" and own is not None
        shown = f"{key} {own.name if template else own}"
        if own is None and given is None:
            by_default.append(f"{key} {default}")
        elif given is None:
            taken.append(shown)
        elif own is not None and (load_template(given).hash != own.hash if template else given != own):
            differing.append(f"{shown} (here {given})")
    if int(os.environ.get("RANK", "0")) == 0:
        if taken:
            print(f"{name}: as it was trained: {', '.join(taken)}", file=sys.stderr, flush=True)
        if by_default:
            message = f"{name} has no veripo_trl.json of how it was trained; by default: {', '.join(by_default)}"
            print(message, file=sys.stderr, flush=True)
        if differing:
            logger.warning("%s was trained with %s: it does not see here as it did there.", name, ", ".join(differing))


def make_encoder(model, processor, data_args: DataArguments) -> PromptEncoder:
    """The encoder of a stage: template, frame sampling and limits from its arguments, sizes from its model."""
    return encoder_from_config(model.config, processor, data_args, pixel_dtype=model.dtype)


@settings_checked()
def encoder_from_config(config, processor, data_args: DataArguments, *, pixel_dtype=torch.float32) -> PromptEncoder:
    """As `make_encoder`, where no weights are loaded."""
    vision = config.vision_config
    if processor.chat_template is None:
        raise ConfigError("The model has no chat template: expected an instruction-tuned Qwen-VL, or a policy of one.")
    seeing = SEEING | {key: value for key in SEEING if (value := getattr(data_args, key)) is not None}
    template, max_image_pixels = seeing.pop("prompt_template"), seeing.pop("max_image_pixels")
    loader = VideoLoader(
        VideoSettings(**seeing, size_factor=vision.patch_size * vision.spatial_merge_size),
        cache_dir=data_args.frame_cache,
        cache_max_bytes=int(data_args.frame_cache_gb * 1e9),
        timeout_s=data_args.decode_timeout_s,
        backend=data_args.video_backend,
        decode_threads=data_args.decode_threads,
    )
    return PromptEncoder(
        processor,
        config,
        template=load_template(template),
        loader=loader,
        max_image_pixels=max_image_pixels,
        max_prompt_tokens=data_args.max_prompt_tokens,
        pixel_dtype=pixel_dtype,
        allow_urls=data_args.allow_urls,
    )


def make_tiny_world(data_args: DataArguments, training_args) -> None:
    """Make the embedded world where a configuration asks for it; several processes may ask at once."""
    if data_args.tiny_world is not None:
        from veripo_trl.tiny.world import make_world

        with training_args.main_process_first(desc="tiny world"):
            make_world(data_args.tiny_world)


def load_training_rows(data_args: DataArguments, *, seed: int):
    """The training rows, mixed and shuffled by seed, with every media file looked at."""
    if not data_args.datasets:
        raise ConfigError("Expected `datasets:`, a list of {path: …}; none was given.")
    _pin(data_args.datasets)
    dropped = {}
    for place, entry in enumerate(data_args.leave_out or []):
        data_args.leave_out[place], questions = _dropped_questions(entry)
        dropped.update(questions)
    dataset = load_rows(
        data_args.datasets, seed=seed, allow_urls=data_args.allow_urls, manifest=data_args.manifest, unique_ids=True
    )
    if data_args.holdout:
        dataset = split_holdout(dataset, data_args.holdout)[1]
    if dropped:
        dataset = _without(dataset, dropped)
    check_media(dataset, allow_urls=data_args.allow_urls)
    return dataset


def _without(dataset, dropped: dict[str, str | None]):
    """The rows of all other questions than the dropped, {id: content}; how many are gone is printed."""
    questions = list(dataset["question_id"])
    for place, question in enumerate(questions):
        if dropped.get(question) and dropped[question] != content_of(dataset[place]):
            raise ConfigError(
                f"leave_out: {question!r} is another question in `datasets` than the solved one of that id. Leave out "
                f"questions of the same data, or set an `id_prefix`."
            )
    kept = [place for place, question in enumerate(questions) if question not in dropped]
    if not kept:
        raise ConfigError(f"leave_out: all {len(questions)} rows are of solved questions: nothing is left to train on.")
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"left out {len(questions) - len(kept)} rows of solved questions, {len(kept)} rows stay", flush=True)
        if strange := sorted(set(dropped).difference(questions)):
            logger.warning(
                "leave_out: %d of %d solved questions are not among the rows of `datasets` (%s). Is it of the same "
                "data, with the same `id_prefix`?",
                len(strange), len(dropped), ", ".join(map(repr, strange[:3])),
            )  # fmt: skip
    return dataset.select(kept)


def _dropped_questions(entry: str) -> tuple[str, dict[str, str | None]]:
    """(the entry, of the Hub with its commit; the questions that its `solved.json` says to leave out, {id: content}).

    The main process reads it for all.
    """
    found = [None]
    if PartialState().is_main_process:
        file, (repo_id, _, revision) = Path(entry).expanduser(), entry.partition("@")
        try:
            if origin := locate(repo_id, "dataset", revision or None):
                file = fetch(**origin, patterns=("solved.json",)) / "solved.json"
                entry = f"{repo_id}@{origin['revision']}"
        except HubError as error:
            raise HubError(
                f"leave_out: {entry}: no such file here, so it was read as a Hub dataset of pairs. {error}"
            ) from error
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            questions = [str(question) for question in content["dropped"]]
            contents = content.get("contents", [None] * len(questions))
            found = [(entry, dict(zip(questions, contents, strict=True)))]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'leave_out: {entry}: expected a solved.json of verify_rollouts.py, {{"dropped": [question ids], …}}, '
                f"got {type(error).__name__}: {error}."
            ) from error
    return broadcast_object_list(found)[0]


def split_holdout(dataset, count: int):
    """(the rows of the `count` ids whose hashes are smallest, the others), in their order.

    By nothing but the ids, so that a smaller set of rows never trains on what a larger one with them holds out.
    """
    ids = list(dataset["question_id"])
    if count >= len(ids):
        raise ConfigError(f"holdout: {count} of {len(ids)} rows of `datasets` leave none to train on. Give fewer.")
    held = set(sorted(ids, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])
    places = {side: [place for place, name in enumerate(ids) if (name in held) is side] for side in (True, False)}
    return dataset.select(places[True]), dataset.select(places[False])


def load_eval_rows(data_args: DataArguments):
    """The held-out rows in file order, or None where the recipe names none."""
    sources, held_out = data_args.eval_datasets, data_args.holdout > 0
    if held_out:
        sources = data_args.datasets
    if not sources:
        return None
    _pin(sources)
    dataset = load_rows(
        sources, shuffle=False, allow_urls=data_args.allow_urls, unique_ids=held_out,
        manifest=data_args.manifest if held_out else None,
    )  # fmt: skip
    if held_out:
        dataset = split_holdout(dataset, data_args.holdout)[0]
    check_media(dataset, allow_urls=data_args.allow_urls)
    return dataset


def open_run(output_dir: str, *, accelerator) -> str | None:
    """Prepare a run's folder and find the checkpoint to go on from.

    A finished run of the same name is moved aside, never written over; an unfinished one is continued.

    Returns:
        The last checkpoint of an unfinished run, or None for a fresh start.
    """
    folder, checkpoint = Path(output_dir), None
    if accelerator.is_main_process:
        move_finished_aside(folder)
        checkpoint = last_checkpoint(folder)
        if checkpoint is not None:
            print(f"{folder} holds an unfinished run: going on from {checkpoint}", flush=True)
    return broadcast_object_list([checkpoint])[0]


def evaluate_policy(
    trainer, dataset, report: ReportArguments, *, decoding: str, progress: str | None = None
) -> dict[str, float | int]:
    """The trainer's policy on rows, shared out over the processes; consistency judged by `report_judge`.

    Args:
        decoding: "greedy", or "sampled": `report_samples` answers per row at `report_temperature`.
        progress: title of a progress bar on the main process.

    Returns:
        What `evaluate.summarize` gives, the same on every process.
    """
    accelerator = trainer.accelerator
    own = list(range(accelerator.process_index, len(dataset), accelerator.num_processes))
    sampled = decoding == "sampled"
    with unwrap_model_for_generation(
        trainer.model_wrapped,
        accelerator,
        gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
    ) as model:
        answers = generate(
            model,
            trainer.encoder,
            dataset.select(own),
            samples=report.report_samples if sampled else 1,
            temperature=report.report_temperature if sampled else 0.0,
            max_new_tokens=report.report_max_new_tokens,
            batch_size=report.report_batch_size,
            num_workers=trainer.args.dataloader_num_workers,
            seed=trainer.args.seed + accelerator.process_index,
            progress=progress if accelerator.is_main_process else None,
        )
    answers = gather_object([{**answer, "row": own[answer["row"]]} for answer in answers])
    others = [judge for name, judge in REPORT_JUDGES.items() if name != report.report_judge and name != "tiny"]
    return summarize(
        answers, dataset, judge=REPORT_JUDGES[report.report_judge], second_judge=others[0] if others else None
    )


class HeldOutEvaluation(TrainerCallback):
    """Evaluates the policy on held-out rows: `before` the first step, and `after`, when `finish` asks for it.

    `before` runs inside training on purpose: only there is the model wrapped for its backend. It survives a restart in
    `<output_dir>/before.json`.
    """

    def __init__(self, trainer, dataset, report: ReportArguments, *, before: bool):
        self.trainer, self.dataset, self.report, self.evaluate_before = trainer, dataset, report, before
        self.file = Path(trainer.args.output_dir) / "before.json"
        self.before: dict | None = None
        self.after: dict | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not self.evaluate_before:
            return
        if state.global_step > 0:
            if not self.file.exists():
                logger.warning("%s is missing: a resumed run cannot tell what its policy was before.", self.file)
                return
            self.before = json.loads(self.file.read_text(encoding="utf-8"))
            self.before = {d: {k: math.nan if v is None else v for k, v in s.items()} for d, s in self.before.items()}
            return
        self.before = self._evaluate("before")
        if state.is_world_process_zero:
            write_json(self.file, self.before)

    def run_after(self) -> None:
        self.after = self._evaluate("after")

    def _evaluate(self, when: str) -> dict[str, dict]:
        return {
            decoding: evaluate_policy(
                self.trainer, self.dataset, self.report, decoding=decoding, progress=f"held-out, {when} ({decoding})"
            )
            for decoding in ("greedy", "sampled")
        }


def result_row(when: str, decoding: str, summary: dict) -> dict:
    """One line of the end table from `evaluate.summarize`."""
    return {
        "policy": when,
        "decoding": decoding,
        "accuracy": summary["accuracy"],
        "95% interval": f"{summary['accuracy_low']:.3f}–{summary['accuracy_high']:.3f}",
        "format": summary["format"],
        "inconsistent": summary["inconsistency"],
        "unknown": summary["unknown"],
        "accurate+consistent": summary["accurate_and_consistent"],
        "think tokens": summary["think_tokens"],
    }


def save_arguments(output_dir: str, *arguments, resumed: bool = False) -> None:
    """Record what a run was started with, secrets left out; say what is not as in the start that it goes on from."""
    if int(os.environ.get("RANK", "0")):
        return
    record = {type(item).__name__: asdict(item) for item in arguments}
    record = without_secrets(json.loads(json.dumps(record, default=str)), [])
    # Named so that the trainer's push leaves it out: it may hold paths of this machine.
    file = Path(output_dir) / "_arguments.json"
    if resumed and file.exists():
        before = read_json(file, remedy="Remove it: the run goes on without knowing its settings before.")
        changed = filter(None, (changed_keys(before.get(kind, {}), values) for kind, values in record.items()))
        if changed := ", ".join(changed):
            print(f"{output_dir} goes on with changed settings: {changed}", flush=True)
    write_json(file, record)


def finish(
    trainer,
    evaluation: HeldOutEvaluation | None,
    *,
    title: str,
    extra: dict,
    push: PushArguments | None = None,
) -> int | None:
    """End a stage: save the model, then tables on the screen, curves as a picture, the push, and results.json.

    Returns:
        An exit code where SIGTERM ended the training: its checkpoint is there, and the run stays unfinished.
    """
    if trainer.terminated:
        if trainer.accelerator.is_main_process:
            state = trainer.state
            print(
                f"{trainer.args.output_dir}: terminated after step {state.global_step} of {state.max_steps}; the same "
                f"command goes on from its checkpoint",
                flush=True,
            )
        return 128 + signal.SIGTERM
    trainer.save_model(_internal_call=True)  # without transformers' push: ours comes last, when there is all to push
    if evaluation is not None:
        evaluation.run_after()
    folder = Path(trainer.args.output_dir)
    if trainer.accelerator.is_main_process:
        rows = []
        for when in ("before", "after"):
            summaries = getattr(evaluation, when, None) or {}
            rows += [result_row(when, decoding, summary) for decoding, summary in summaries.items()]
        if rows:
            judge = evaluation.report.report_judge
            print_table(f"{title} (consistency judged by {judge})", rows)
        if extra.get("seconds"):
            steps = max(trainer.state.global_step, 1)
            print_table(
                "Seconds per step (load and encode run in the loader's workers where there are any)",
                [{"part": part, "seconds": seconds / steps} for part, seconds in extra["seconds"].items()],
            )
        history = trainer.state.log_history
        save_charts(folder / "curves.png", training_charts(history), title=folder.name)
        results = {
            "stage": trainer._name,
            "model": trainer.model.config._name_or_path,
            "before": getattr(evaluation, "before", None),
            "after": getattr(evaluation, "after", None),
            "steps": trainer.state.global_step,
            "minutes": trainer.minutes,
            "history": history,
            **extra,
        }
        license = (push or PushArguments()).hub_license
        card = run_card(folder, results, repo_id=folder.absolute().name, license=license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        print(f"\nmodel, {RESULTS} and curves.png are in {folder} ({results['minutes']:.1f} minutes)", flush=True)
        write_results(folder, results, TRAINED if trainer.args.push_to_hub else RESULTS)
    trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        push_trained(trainer.args, push)


def push_trained(training_args, push: PushArguments | None = None) -> bool:
    """Push a run that is trained and not pushed, perhaps by an earlier process, which then counts as finished.

    Returns:
        Whether there was one, on every process: nothing is left to do. Without `push_to_hub` its push is given up.
    """
    push, folder, state = push or PushArguments(), Path(training_args.output_dir), PartialState()
    trained = (folder / TRAINED).exists() and not (folder / RESULTS).exists()
    state.wait_for_everyone()
    if trained and state.is_main_process:
        results = json.loads((folder / TRAINED).read_text(encoding="utf-8"))
        if training_args.push_to_hub:
            print(f"{folder} is trained; pushing it. Broken off, the same command goes on with the push.", flush=True)
            try:
                results["hub"] = push_run(
                    folder, training_args, results, rollouts_id=push.hub_rollouts_id, license=push.hub_license
                )
            except HubError as error:
                raise HubError(f"{error}\nOr start the run's own command again: it does not train again.") from None
        write_results(folder, results)
        (folder / TRAINED).unlink()
    return trained
