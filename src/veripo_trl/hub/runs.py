"""What a training run pushes: its model or adapter with processor and card, and a GRPO run's rollouts."""

import json
import shutil
from pathlib import Path

from veripo_trl.files.disk import read_json
from veripo_trl.hub import push as hub
from veripo_trl.hub.cards import dataset_card, model_card, rollout_counts, shown_name

ADAPTER_CONFIG = "adapter_config.json"


def push_run(folder: str | Path, args, results: dict, *, rollouts_id: str | None, license: str) -> dict[str, dict]:
    """Push what lies in a finished run's folder.

    Args:
        args: its `TrainingArguments`; the `hub_…` ones are read. results: what `stages.finish` gathered.
        rollouts_id: dataset for the rollouts, by default the model's name with "-rollouts".

    Returns:
        {"model", "rollouts"}: each {"repo_id", "revision", "url"}, as the Hub says. Raises `hub.HubError`.
    """
    folder, model_id = Path(folder), model_repo(args)
    staged, _ = stage_model(folder, folder / "_hub_model", results)
    private = args.hub_private_repo is not False
    card = run_card(folder, results, repo_id=model_id, license=license)
    pushed = {
        "model": hub.push_folder(
            staged, model_id, repo_type="model", card=card, message=f"Model after {results['steps']} steps",
            branch=args.hub_revision or "main", private=private,
        )
    }  # fmt: skip
    rollouts = folder / "rollouts"
    if files := [rollouts / name for name in hub.find_files(rollouts, ["*.parquet"])]:
        rollouts_id = rollouts_id or f"{pushed['model'].repo_id}-rollouts"
        counts, policy = rollout_counts(files)
        inputs = {**(results.get("inputs") or {}), "trained into": _record(pushed["model"])}
        card = dataset_card(
            "rollouts", repo_id=rollouts_id, counts=counts, policy=policy, data_files="rollouts/*.parquet",
            inputs=inputs, license=license,
        )  # fmt: skip
        pushed["rollouts"] = hub.push_folder(
            rollouts, rollouts_id, repo_type="dataset", card=card, path_in_repo="rollouts",
            message=f"Rollouts of {results['steps']} steps", private=private,
        )  # fmt: skip
    for item in pushed.values():
        print(f"{item.url} holds all {len(item.files)} files at revision {item.revision}", flush=True)
    for leftover in (staged, folder / "_hub_checkpoint"):
        shutil.rmtree(leftover, ignore_errors=True)
    return {name: {**_record(item), "url": item.url} for name, item in pushed.items()}


def run_card(folder: Path, results: dict, *, repo_id: str, license: str) -> str:
    """The card of the model or adapter that a run saved in its folder."""
    inputs = {**(results.get("inputs") or {}), **local_pairs(folder)}
    return model_card(
        repo_id=repo_id, stage=results["stage"], counts=_run_counts(results), inputs=inputs, license=license,
        **base_of(folder, results),
    )  # fmt: skip


def model_repo(args) -> str:
    """Where a run's model goes: `hub_model_id`, or the name of its folder as transformers has it."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def stage_model(source: Path, target: Path, results: dict) -> tuple[Path, dict]:
    """Put what is pushed of a saved model or adapter into a folder of its own, as links where the disk has them.

    A base model that lies in a folder here means nothing elsewhere: the staged adapter names the repository and the
    revision that it was pushed to, or else what `shown_name` leaves of the folder.

    Returns:
        (target, what `model_card` needs to know of the base).
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in hub.find_files(source, hub.PATTERNS["model"]):
        hub.link(source / name, target / name)
    base = base_of(source, results)
    if base["adapter"]:
        config = target / ADAPTER_CONFIG
        name = base["base"] if base["base_on_hub"] else shown_name(base["base"])
        content = _read(config) | {"base_model_name_or_path": name, "revision": base["base_revision"]}
        config.unlink()  # a link: the run's own file keeps what it says
        config.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
    return target, base


def base_of(folder: Path, results: dict) -> dict:
    """What `model_card` needs to know of what a saved adapter is for, or full weights were trained from."""
    config = folder / ADAPTER_CONFIG
    if not config.exists():
        origin = (results.get("inputs") or {}).get("model") or {}
        return {"adapter": False, **_base(results["model"], origin.get("revision"))}
    content = _read(config)
    return {"adapter": True, **_base(content["base_model_name_or_path"], content.get("revision"))}


def local_pairs(folder: Path) -> dict[str, dict | str]:
    """The preference pairs that a DPO run read from folders here, for its card: {role: what the Hub holds of them by
    the stage that made them, {"repo_id", "revision"}; or the folder's name}."""
    arguments = folder / "_arguments.json"
    if not arguments.exists():
        return {}
    sources = _read(arguments).get("PairArguments", {}).get("pairs") or []
    found = {}
    for path in (Path(source["path"]).expanduser() for source in sources):
        if not path.exists():  # of the Hub, and among the run's inputs
            continue
        name = shown_name(str(path))
        stages = [place / "results.json" for place in (path, *path.absolute().parents[:2])]
        pushed = [(_read(file).get("hub") or {}).get("pairs") for file in stages if file.is_file()]
        origin = next(filter(None, pushed), None)
        found["pairs" if len(sources) == 1 else f"pairs of {name}"] = origin or f"{name} (a local folder, not on the Hub)"
    return found


def _read(file: Path) -> dict:
    return read_json(file, remedy="Take it from a copy, or remove it: cards then do not name what it was pushed to.")


def _base(name: str, revision: str | None) -> dict:
    """A base model by its name on the Hub, where it has one."""
    folder = Path(name)
    if not folder.is_dir():
        return {"base": name, "base_revision": revision, "base_on_hub": hub.HUB_ID.fullmatch(name) is not None}
    results = folder / "results.json"
    pushed = _read(results).get("hub") if results.exists() else None
    if pushed:
        pushed = pushed["model"]
        return {"base": pushed["repo_id"], "base_revision": pushed["revision"], "base_on_hub": True}
    return {"base": name, "base_revision": None, "base_on_hub": False}


def _record(pushed: hub.Pushed) -> dict:
    return {"repo_id": pushed.repo_id, "revision": pushed.revision}


def _run_counts(results: dict) -> dict[str, object]:
    counts = {"optimizer steps": results["steps"]}
    if results.get("rollouts") is not None:
        counts["rollouts"] = results["rollouts"]
    counts |= {f"{kind} pairs": number for kind, number in (results.get("pairs") or {}).items()}
    for decoding, summary in (results.get("after") or {}).items():
        counts[f"held-out questions, {decoding}"] = summary["questions"]
        for key in ("accuracy", "inconsistency", "unknown"):
            counts[f"held-out {key}, {decoding}"] = "–" if summary[key] is None else float(summary[key])
    return counts
