"""What can be found wrong with a loop before its first stage is run."""

import json
import runpy
import shutil
from dataclasses import fields
from pathlib import Path

from veripo_trl.errors import VeripoError
from veripo_trl.loop.plan import KINDS, LoopError, plan, select, shown
from veripo_trl.loop.state import Run


def check_settings(stages: list[dict]) -> None:
    """Refuse what would stop a stage when its turn comes: keys that its recipe does not know, a missing program."""
    known = {}
    for stage in stages:
        command, script = stage["judge_command"], stage["script"]
        if command and shutil.which(str(command[0])) is None:
            raise LoopError(
                f"stage {stage['name']}: judge_command: no program {command[0]!r} here; install it."
            )
        if stage["recipe"] not in KINDS:
            continue  # a recipe of the user's own: to import it might be to start it
        if script not in known:
            kinds = runpy.run_path(script)["ARGUMENTS"]
            known[script] = {item.name for kind in kinds for item in fields(kind)} | {"env"}
        from veripo_trl.recipe.arguments import method_options  # the recipe has silenced what it imports

        methods = stage["settings"].get("methods") if "methods" in known[script] else None
        own = {item.name for kind in method_options(methods) for item in fields(kind)}
        if unknown := sorted(set(stage["settings"]) - known[script] - own):
            raise LoopError(
                f"stage {stage['name']}: {stage['recipe']} knows no {', '.join(unknown)}. Nothing was run."
            )


def look_at_inputs(stage: dict, made: list[str]) -> None:
    """Raise what would stop a training stage at its start: rows and their media, held-out rows, pairs, the policy; of
    those what is not below `made`, the folders that the stages before it write."""
    from veripo_trl.model.policy import find_base
    from veripo_trl.recipe.arguments import DataArguments, read_sources
    from veripo_trl.recipe.training_rows import load_eval_rows, load_training_rows
    from veripo_trl.verifier.pair_dataset import pair_files, pair_source

    settings = stage["settings"]
    names = {item.name for item in fields(DataArguments)}
    data = DataArguments(**{name: value for name, value in settings.items() if name in names})
    if data.tiny_world and not Path(data.tiny_world).exists():
        made = [*made, data.tiny_world]

    def to_find(path: str) -> bool:
        return not any(Path(folder) in (Path(path), *Path(path).parents) for folder in made)

    data.datasets = [source for source in data.datasets or [] if to_find(source["path"])]
    data.eval_datasets = [source for source in data.eval_datasets or [] if to_find(source["path"])]
    data.leave_out = [entry for entry in data.leave_out or [] if to_find(entry)]
    if data.datasets and stage["kind"] != "dpo":
        load_training_rows(data, seed=0)
    load_eval_rows(data)
    for source in map(pair_source, read_sources("pairs", settings.get("pairs")) or []):
        if to_find(source.path):
            pair_files(source)
        root = source.media_root
        if root and to_find(root) and not Path(root).expanduser().is_dir():
            raise LoopError(
                f"pairs {source.path}: media_root {root!r}: no such folder (looked from {Path.cwd()}). Expected the one "
                f"that the videos of the rows lie in."
            )
    model, revision = settings.get("model_name_or_path"), settings.get("model_revision", "main")
    if model and to_find(model):
        find_base(model, None if revision == "main" else revision)


def dry_run(loop: dict, *, first: str | None = None, last: str | None = None) -> None:
    """Print what would run, and then what would stop it: all that can be found without running it."""
    run = Run(Path(loop["output_dir"]))
    stages = plan(loop, run.skipped)
    begin, end = select(stages, first, last)
    if first is not None:  # what is redone is not done, and no longer skipped
        for stage in stages[begin:]:
            run.stages.pop(stage["name"], None)
        stages = plan(loop, run.skipped)
    problems: dict[str, str] = {}  # each with the first stage that has it
    try:
        check_settings(stages)
    except LoopError as error:
        problems[str(error)] = ""
    for index, stage in enumerate(stages[: end + 1]):
        state = run.stages.get(stage["name"], {"status": "to do"})["status"]
        print(f"{stage['name']} ({state}): {shown(stage['command'])}")
        for key, value in stage["settings"].items():
            print(f"    {key}: {json.dumps(value, ensure_ascii=False)}")
        if (
            stage["recipe"] in KINDS
            and stage["kind"] not in ("verify", "sample")
            and state not in ("done", "skipped")
        ):
            try:
                look_at_inputs(stage, [earlier["output_dir"] for earlier in stages[:index]])
            except (VeripoError, RuntimeError, ValueError, OSError, TypeError) as error:
                problems.setdefault(str(error), f"stage {stage['name']}: ")
    if problems:
        raise LoopError(
            "\n".join(["this would not run:", *(name + what for what, name in problems.items())])
        )
