"""What a training run pushes: its model or adapter with processor and card, and a GRPO run's rollouts."""

import json
from importlib.metadata import version
from pathlib import Path

from veripo_trl.answers.score import score_name
from veripo_trl.files.disk import read_json
from veripo_trl.files.tables import finite
from veripo_trl.hub.cards import (
    TAG,
    dataset_card,
    fill_card,
    local_name,
    origins,
    rollout_counts,
    seen_by,
    shown_name,
)
from veripo_trl.hub.locate import is_local
from veripo_trl.hub.push import find_files, push_folder

ADAPTER_CONFIG, ARGUMENTS = "adapter_config.json", "_arguments.json"
SETTINGS = (  # of a run's arguments, those that a card names
    "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps", "lora_r",
    "train_vision_tower", "rewards", "methods", "num_generations", "temperature", "max_completion_length", "loss_type",
    "beta", "seed",
)  # fmt: skip
SCORES = {
    "inconsistency": "inconsistent (95%)",
    "accurate_and_consistent": "accurate and consistent",
}
STAGES = {
    "SFT": "supervised fine-tuning on questions with thinking (cold start)",
    "GRPO": "GRPO on verifiable rewards",
    "DPO": "DPO on preference pairs of verified rollouts",
}


def push_run(folder: str | Path, args, results: dict, *, license: str) -> dict[str, dict]:
    """Push what lies in a finished run's folder.

    Args:
        args: its `TrainingArguments`; the `hub_…` ones are read. results: what its `results.json` is to say.

    The rollouts go to a dataset of the model's name with "-rollouts".

    Returns:
        {"model", "rollouts"}: each {"repo_id", "revision", "url"}, as the Hub says. Raises `HubError`.
    """
    folder = Path(folder)
    model = push_model(folder, args, results, license=license, message=f"Model after {results['steps']} steps")
    pushed, rollouts = {"model": model}, folder / "rollouts"
    if files := [rollouts / name for name in find_files(rollouts, ["*.parquet"])]:
        rollouts_id = f"{model['repo_id']}-rollouts"
        counts, policy = rollout_counts(files)
        trained = {"trained into": {key: model[key] for key in ("repo_id", "revision")}}
        card = dataset_card(
            "rollouts", repo_id=rollouts_id, counts=counts, policy=policy, data_files="rollouts/*.parquet",
            inputs={**(results.get("inputs") or {}), **trained}, license=license, seen=seen_by(folder),
        )  # fmt: skip
        pushed["rollouts"] = push_folder(
            rollouts, rollouts_id, repo_type="dataset", card=card, path_in_repo="rollouts",
            message=f"Rollouts of {results['steps']} steps", private=args.hub_private_repo is not False,
        )  # fmt: skip
    for name, item in pushed.items():
        print(f"{item['url']} holds the {name} at revision {item['revision']}", flush=True)
    return pushed


def push_model(folder: Path, args, results: dict, *, license: str = "unknown", **options) -> dict:
    """Push a saved model or adapter with its card; `options` and what comes back are of `push_folder`.

    A base model that lies in a folder here means nothing elsewhere: the pushed adapter names the repository and the
    revision that it was pushed to, or else what `shown_name` leaves of the folder.
    """
    base, replaced = base_of(folder, results), {}
    if base["adapter"]:
        name = base["name"] if base["on_hub"] else shown_name(base["name"])
        content = _read(folder / ADAPTER_CONFIG) | {"base_model_name_or_path": name, "revision": base["revision"]}
        replaced[ADAPTER_CONFIG] = json.dumps(content, indent=2, sort_keys=True)
    model_id = model_repo(args)
    return push_folder(
        folder, model_id, repo_type="model", card=run_card(folder, results, repo_id=model_id, license=license),
        replaced=replaced, private=args.hub_private_repo is not False, branch=args.hub_revision or "main", **options,
    )  # fmt: skip


def run_card(folder: Path, results: dict, *, repo_id: str, license: str) -> str:
    """The card of the model or adapter that a run saved in its folder."""
    stage, base = results["stage"], base_of(folder, results)
    header = {
        "license": license,
        "library_name": "peft" if base["adapter"] else "transformers",
        "pipeline_tag": "video-text-to-text",
        "tags": ["veripo", TAG, "trl", stage.lower(), *(["lora"] if base["adapter"] else [])],
    }
    if base["on_hub"]:
        header |= {"base_model": base["name"], "base_model_relation": "adapter" if base["adapter"] else "finetune"}
    else:
        base["name"] = local_name(base["name"])
    made_from = origins({**(results.get("inputs") or {}), **local_pairs(folder)})
    stage, arguments = STAGES.get(stage, stage), _arguments(folder)
    if not arguments.get("use_peft"):
        arguments.pop("lora_r", None)
    settings = {name: arguments[name] for name in SETTINGS if arguments.get(name) not in (None, [])}
    shown = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in settings.items()}
    tables = {"counts": _run_counts(results), "origins": made_from, "seen": seen_by(folder), "settings": shown}
    return fill_card(
        header, repo_id, tables, kind="model", stage=stage, base=base, scores=_scores(results),
        judge=arguments.get("report_judge"), curves=(folder / "curves.png").is_file(),
        versions=", ".join(f"{name} {version(name)}" for name in ("veripo_trl", "trl", "transformers", "torch")),
    )  # fmt: skip


def model_repo(args) -> str:
    """Where a run's model goes: `hub_model_id`, or the name of its folder as transformers has it."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def base_of(folder: Path, results: dict) -> dict:
    """{"adapter", "name", "revision", "on_hub"}: whether this is an adapter, and what it is for or full weights were
    trained from, by its name on the Hub where it has one."""
    config, adapter = folder / ADAPTER_CONFIG, {}
    if config.exists():
        adapter = _read(config)
        name, revision = adapter["base_model_name_or_path"], adapter.get("revision")
    else:
        name, revision = results["model"], ((results.get("inputs") or {}).get("model") or {}).get("revision")
    on_hub = not is_local(name)
    if not on_hub:
        pushed = _pushed(Path(name)).get("model")
        on_hub, revision = pushed is not None, pushed and pushed["revision"]
        name = pushed["repo_id"] if pushed else name
    return {"adapter": bool(adapter), "name": name, "revision": revision, "on_hub": on_hub}


def local_pairs(folder: Path) -> dict[str, dict | str]:
    """The preference pairs that a DPO run read from folders here, for its card: {role: what the Hub holds of them by
    the stage that made them, {"repo_id", "revision"}; or the folder's name}."""
    sources = _arguments(folder).get("pairs") or []
    found = {}
    for path in (Path(source["path"]).expanduser() for source in sources if is_local(source["path"])):
        name = shown_name(str(path))
        pushed = [_pushed(place).get("pairs") for place in (path, *path.absolute().parents[:2])]
        origin = next(filter(None, pushed), None)
        found["pairs" if len(sources) == 1 else f"pairs of {name}"] = origin or local_name(str(path))
    return found


def _pushed(run: Path) -> dict:
    """What a run's `results.json` says that the Hub holds of it."""
    results = run / "results.json"
    return (_read(results).get("hub") or {}) if results.is_file() else {}


def _arguments(folder: Path) -> dict:
    """A run's arguments by their names, whatever the group."""
    file = folder / ARGUMENTS
    groups = _read(file).values() if file.exists() else ()
    return {name: value for group in groups if isinstance(group, dict) for name, value in group.items()}


def _read(file: Path) -> dict:
    return read_json(file, remedy="Take it from a copy, or remove it: cards then do not name what it was pushed to.")


def _run_counts(results: dict) -> dict[str, object]:
    counts = {"optimizer steps": results["steps"]}
    if results.get("rollouts") is not None:
        counts["rollouts"] = results["rollouts"]
    counts |= {f"{kind} pairs": number for kind, number in (results.get("pairs") or {}).items()}
    return counts


def _scores(results: dict) -> list[dict[str, str]]:
    """The lines of a card's table of results: the policy on held-out questions, before and after the run."""
    lines = []
    for when in ("before", "after"):
        for decoding, found in finite(results.get(when) or {}).items():
            line = {"policy": when, "decoding": decoding, "questions": f"{found['questions']:,}"}
            for key in ("accuracy", "inconsistency", "unknown", "accurate_and_consistent"):
                name = score_name(found) + " (95%)" if key == "accuracy" else SCORES.get(key, key)
                line[name] = _share(*(found.get(f"{key}{end}") for end in ("", "_low", "_high")))
            kinds = {name: value for name, value in found.items() if ": " in name and value is not None}
            line["by type"] = ", ".join(f"{name.removeprefix('accuracy: ')} {value:.3g}" for name, value in kinds.items())
            lines.append(line)
    return lines


def _share(value: float | None, low: float | None, high: float | None) -> str:
    return "–" if value is None else f"{value:.1%}" if low is None else f"{value:.1%} ({low:.1%}–{high:.1%})"
