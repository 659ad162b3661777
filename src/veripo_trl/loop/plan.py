"""A loop's YAML, and the stages that it means: recipes with their settings, in the order in which they run."""

import json
import os
import sys
from pathlib import Path

import yaml

from veripo_trl.errors import VeripoError
from veripo_trl.files.secrets import without_secrets

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
if not RECIPES.is_dir():  # installed without -e: those beside the script that was started
    RECIPES = Path(sys.argv[0]).resolve().parent
CONFIGS = RECIPES / "configs"
# `python -m` would let a file of the working directory, like a yaml.py, stand in for the launcher's own imports.
LAUNCH = "import sys; sys.path[:] = filter(None, sys.path); from accelerate.commands.launch import main; main()"
# What a stage gets from the stages before it, and writes for those after it.
KINDS = {
    "sft_video.py": "sft",
    "grpo_video.py": "grpo",
    "sample_perturbed.py": "sample",
    "verify_rollouts.py": "verify",
    "dpo_video.py": "dpo",
}
LOOP = {
    "output_dir": None, "iterations": 1, "seed": None, "launcher": [], "accelerate": [], "stages": [], "iteration": None,
    "push_to_hub": False, "hub_prefix": None,
}  # fmt: skip
STAGE = {
    "name": None, "recipe": None, "kind": None, "config": None, "later_config": None, "overrides": {},
    "judge_command": None, "judge_health": "http://127.0.0.1:8000/health", "judge_start_timeout_s": 900,
}  # fmt: skip


class LoopError(VeripoError):
    """A loop that cannot run, or cannot go on."""


def expect(holds: object, where: object, what: str) -> None:
    if not holds:
        raise LoopError(f"{where}: expected {what}.")


def find(name: str, *folders: Path) -> Path:
    """The first file of this name in the folders; of a path, as seen from them."""
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    where = ", ".join(str(folder.absolute()) for folder in folders)
    raise LoopError(f"{name}: no such file in {where}.")


def read_yaml(file: str | Path) -> dict:
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        content = error
    expect(isinstance(content, dict), file, f"a mapping in YAML, got {content}")
    return content


def filled(where: object, content: dict, defaults: dict, needed: tuple) -> dict:
    """The content with defaults; every key must be one of theirs, and those that are needed must have a value."""
    content = defaults | content
    missing = [key for key in needed if not content[key]]
    unknown = sorted(set(content) - set(defaults))
    what = f"keys of {', '.join(defaults)}; missing {missing}, unknown {unknown}"
    expect(not missing + unknown, where, what)
    return content


def refuse_secrets(where: str, settings: dict) -> None:
    """Refuse settings that hold a secret: they are written to run.json and to the stage's YAML, and printed."""
    without_secrets(settings, held := [])
    expect(
        not held,
        where,
        f"no secrets: {', '.join(held)} would be written to run.json. Take it out of the configuration and set an "
        f"environment variable, which all that the loop starts can read (HF_TOKEN for the Hub). A judge's server needs "
        f"no key: with --host 127.0.0.1 only this machine reaches it",
    )


def read_loop(name: str, **given) -> dict:
    """The keys of `LOOP`, of a loop's YAML and of what is `given` instead; its stages have those of `STAGE`.

    Args:
        name: the file, as seen from the working directory or from `recipes/configs/`.
    """
    file = find(name, Path(), CONFIGS)
    loop = read_yaml(file)
    refuse_secrets(str(file), loop)
    loop |= {key: value for key, value in given.items() if value is not None}
    loop = filled(file, loop, LOOP, ("output_dir", "iteration"))
    for part in ("stages", "iteration"):
        listed = isinstance(loop[part], list) and all(
            isinstance(stage, dict) for stage in loop[part]
        )
        expect(listed, f"{file}: {part}", f"a list of stages, each a mapping; got {loop[part]!r}")
        loop[part] = [read_stage(stage, file) for stage in loop[part]]
    for part in ("launcher", "accelerate"):
        expect(isinstance(loop[part], list), f"{file}: {part}", f"a list of words, got {loop[part]!r}")
    times = loop["iterations"]
    what = f"a whole number of 1 or more, got {times!r}"
    expect(isinstance(times, int) and times > 0, "iterations", what)
    prefixed = loop["hub_prefix"] or not loop["push_to_hub"]
    what = "`hub_prefix` beside push_to_hub, like my-name/my-run: what repositories begin with"
    expect(prefixed, file, what)
    return loop


def read_stage(stage: dict, file: Path) -> dict:
    """A stage of a loop's YAML with its `script`, `kind`, and `contents`, of `config` and `later_config`: read now, for a
    run of hours outlives edits of its files. All are looked for beside that YAML and from the working directory."""
    where = f"{file}: stage {stage.get('name')!r}"
    stage = filled(where, stage, STAGE, ("name", "recipe", "config"))
    names = [stage["config"], stage["later_config"] or stage["config"]]
    stage["contents"] = [read_yaml(find(name, file.parent, Path(), CONFIGS)) for name in names]
    command = stage["judge_command"]
    listed = command is None or (command and isinstance(command, list))
    expect(listed, f"{where}: judge_command", f"a list of words, got {command!r}")
    words = [str(word) for word in command or []]
    vllm = any(word.startswith("vllm.") or Path(word).name == "vllm" for word in words)
    hosted = not vllm or any(word.startswith("--host") for word in words)
    what = "--host, 127.0.0.1: without it vLLM listens on every interface"
    expect(hosted, f"{where}: judge_command", what)
    if stage["recipe"] in KINDS:
        return stage | {"kind": KINDS[stage["recipe"]], "script": str(RECIPES / stage["recipe"])}
    script = find(stage["recipe"], file.parent, Path()).resolve()
    what = f"`kind`, one of {', '.join(KINDS.values())}: whose settings a recipe of your own takes"
    expect(stage["kind"] in KINDS.values(), where, what)
    return stage | {"script": str(script)}


def plan(loop: dict, skipped: set[str] = frozenset()) -> list[dict]:
    """The stages in their order, each with its own `name`, `output_dir`, `iteration`, `settings` (its YAML), `config`
    (where that is written) and `command`.

    What a stage reads of the stages before is filled in: the policy of the latest training that is not `skipped`, the
    rollouts of the latest GRPO, what was sampled on perturbed videos after it, the pairs of the latest verification, the
    solved questions of all. `overrides` win.
    """
    rounds = [(stage, stage["name"], 0) for stage in loop["stages"]]
    for number in range(1, loop["iterations"] + 1):
        rounds += [(stage, f"{stage['name']}-{number}", number) for stage in loop["iteration"]]
    run, stages, solved = Path(loop["output_dir"]), {}, []
    policy = rollouts = perturbed = pairs = None
    for stage, name, iteration in rounds:
        kind, output = stage["kind"], str(run / name)
        settings = stage["contents"][iteration > 1] | {"output_dir": output}
        if loop["seed"] is not None:
            settings["seed"] = loop["seed"]
        if kind == "verify":
            settings |= {"rollouts": [rollouts], "verdict_cache": str(run / "verdict_cache.sqlite")}
            if perturbed:
                settings["perturbed"] = [perturbed]
        elif policy:
            settings["model_name_or_path"] = policy
        if kind == "sample":
            settings["rollouts"] = rollouts
        if kind == "grpo":
            settings["leave_out"] = list(solved) or None
        if loop["push_to_hub"] and kind != "sample":
            repo_id = f"{loop['hub_prefix']}-{name}"
            ids = {"hub_pairs_id": f"{repo_id}-pairs", "hub_verdicts_id": f"{repo_id}-verdicts"}
            settings |= ids if kind == "verify" else {"hub_model_id": repo_id}
            settings["push_to_hub"] = True  # privately, unless its configuration says otherwise
        settings |= stage["overrides"]
        if kind == "dpo" and pairs and isinstance(sources := settings.get("pairs") or [{}], list):
            # the first of them is the loop's own, unless an override gives it a path; others are mixed in
            own, *others = sources
            own = json.loads(own) if isinstance(own, str) else own
            if "pairs" not in stage["overrides"] or "path" not in own:
                own = {key: value for key, value in own.items() if key != "revision"} | {"path": pairs}
            settings["pairs"] = [own, *others]
        refuse_secrets(f"stage {name}", settings)
        if kind == "verify":
            both = bool(settings.get("perturbed")) == ("video" in (settings.get("kinds") or []))
            expect(both, name, "a stage of sample_perturbed.py before it, and `video` among its kinds, or neither")
        read = kind not in ("verify", "sample") or settings["rollouts"] not in ([None], None)
        expect(read, name, "a GRPO stage before it, or `rollouts` in its overrides")
        expect(name not in stages, name, "stages of different names")
        own = {"name": name, "iteration": iteration, "output_dir": output, "settings": settings}
        stages[name] = stage | own | {"config": run / "configs" / f"{name}.yaml"}
        stages[name]["command"] = command_of(stages[name], loop)
        if kind == "verify":
            pairs = f"{output}/pairs"
            solved.append(f"{output}/solved.json")
        elif kind == "sample":
            perturbed = f"{output}/rollouts"
        else:
            policy = output if name not in skipped else settings.get("model_name_or_path")
        if kind == "grpo":
            rollouts, perturbed = f"{output}/rollouts", None
    return list(stages.values())


def select(stages: list[dict], first: str | None, last: str | None) -> tuple[int, int]:
    """Indices of the stages that `--from` and `--until` name; of the first and the last stage without them."""
    names = [stage["name"] for stage in stages]
    for name in (first or names[0], last or names[-1]):
        expect(name in names, name, f"a stage, of {', '.join(names)}")
    return names.index(first or names[0]), names.index(last or names[-1])


def command_of(stage: dict, loop: dict) -> list[str]:
    """How a stage is started; a training stage behind the loop's `launcher`, like srun, which starts it on each node."""
    recipe = [stage["script"], "--config", str(stage["config"])]
    if stage["kind"] in ("verify", "sample"):
        return [sys.executable, *recipe]
    launcher, options = (
        [os.path.expandvars(str(word)) for word in loop[part]] for part in ("launcher", "accelerate")
    )
    options = [str(CONFIGS / part) if (CONFIGS / part).is_file() else part for part in options]
    # quiet: the stage's own message is the last, not the launcher's traceback
    return [*launcher, sys.executable, "-c", LAUNCH, "--quiet", *options, *recipe]


def shown(command: list[str]) -> str:
    """A command as a user types it."""
    text = " ".join(command).replace(f"{sys.executable} -c {LAUNCH}", "accelerate launch")
    return text.replace(f"{sys.executable} ", "python ")
