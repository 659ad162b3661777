"""VerIPO's loop: GRPO, verifier, DPO, and round again (arXiv 2505.19000).

    python recipes/veripo.py                                  # the tiny world: CPU, offline, minutes
    python recipes/veripo.py --config qwen2_5_vl_3b_lora/veripo.yaml --dry-run
    python recipes/veripo.py --config my_loop.yaml --until verify-1

One YAML names the stages in order, each a recipe of this folder with its configuration and overrides. Every stage runs
as its own process, as a user would run it. The state of the run is `<output_dir>/run.json`: killed anywhere, the same
command goes on; finished stages are not run again. SIGTERM is passed to the trainer, which writes a checkpoint.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import yaml

from veripo_trl.errors import VeripoError
from veripo_trl.errors import run as run_command
from veripo_trl.files.disk import read_json, room_for, write_whole  # the package lets the screen lack characters
from veripo_trl.files.run_folder import RESULTS, changed_keys, holder, only_process
from veripo_trl.files.secrets import without_secrets
from veripo_trl.files.tables import print_table, write_json

RECIPES = Path(__file__).resolve().parent
CONFIGS = RECIPES / "configs"
DEFAULT_CONFIG = CONFIGS / "tiny" / "veripo.yaml"
MARKER = "VERIPO_RUN"  # in the environment of every process that a run starts
TRAINING = ("sft_video.py", "grpo_video.py", "dpo_video.py")  # these make a policy and are launched by accelerate
LOOP_KEYS = {"output_dir", "iterations", "seed", "accelerate", "stages", "iteration", "push_to_hub", "hub_prefix"}
STAGE_KEYS = {
    "name", "recipe", "config", "overrides", "later_config", "later_overrides",
    "judge_command", "judge_health", "judge_start_timeout_s",
}  # fmt: skip


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(DEFAULT_CONFIG), help="the loop's YAML, from here or recipes/configs/")
    parser.add_argument("--output_dir", help="the run's folder; default: the configuration's")
    parser.add_argument("--iterations", type=int, help="times round the loop; default: the configuration's")
    parser.add_argument("--seed", type=int, help="of every stage; default: the configuration's")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="do this stage and all after it again")
    parser.add_argument("--until", dest="last", metavar="STAGE", help="end after this stage")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and write nothing")
    return parser.parse_args(argv)


def find_config(name: str) -> Path:
    for path in (Path(name), CONFIGS / name):
        if path.is_file():
            return path
    raise SystemExit(f"{name}: no such file here or in {CONFIGS}.")


def read_loop(arguments: argparse.Namespace) -> dict:
    """The loop's YAML with the command line's values in it, checked."""
    path = find_config(arguments.config)
    loop = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(loop, dict) or not isinstance(loop.get("iteration"), list):
        raise SystemExit(f"{path}: expected a mapping with `iteration:`, the list of stages that are repeated.")
    refuse_secrets(str(path), loop)
    for key in ("output_dir", "iterations", "seed"):
        if getattr(arguments, key) is not None:
            loop[key] = getattr(arguments, key)
    loop = {"stages": [], "iterations": 1, "accelerate": [], "push_to_hub": False, **loop}
    if unknown := sorted(set(loop) - LOOP_KEYS):
        raise SystemExit(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(LOOP_KEYS))}.")
    for stage in [*loop["stages"], *loop["iteration"]]:
        missing = sorted({"name", "recipe", "config"} - set(stage))
        if missing or set(stage) - STAGE_KEYS:
            raise SystemExit(
                f"{path}: stage {stage.get('name')!r}: missing {missing or 'nothing'}, unknown "
                f"{sorted(set(stage) - STAGE_KEYS) or 'nothing'}; known are {', '.join(sorted(STAGE_KEYS))}."
            )
        if stage["recipe"] not in (*TRAINING, "verify_rollouts.py"):
            raise SystemExit(f"{path}: stage {stage['name']!r}: no recipe {stage['recipe']!r} for a loop.")
        check_judge(stage, path)
    if not loop.get("output_dir"):
        raise SystemExit(f"{path}: expected `output_dir:`, the run's folder.")
    if not isinstance(loop["iterations"], int) or loop["iterations"] < 1:
        raise SystemExit(f"iterations: expected a whole number of 1 or more, got {loop['iterations']!r}.")
    if loop["push_to_hub"] and not loop.get("hub_prefix"):
        raise SystemExit(f"{path}: push_to_hub needs `hub_prefix`, like my-name/my-run: what repositories begin with.")
    return loop


def check_judge(stage: dict, path: Path) -> None:
    """Refuse a judge's command that is not one, or whose server all the network would reach."""
    command = stage.get("judge_command")
    if command is None:
        return
    if not isinstance(command, list) or not command:
        raise SystemExit(f"{path}: stage {stage['name']!r}: judge_command: expected a list of words, got {command!r}.")
    vllm = any(Path(str(word)).name == "vllm" or str(word).startswith("vllm.") for word in command)
    if vllm and not any(str(word).startswith("--host") for word in command):
        raise SystemExit(
            f"{path}: stage {stage['name']!r}: judge_command: without --host vLLM listens on every interface of this "
            f"machine. Add --host, 127.0.0.1."
        )


def refuse_secrets(name: str, settings: dict) -> None:
    """Refuse settings that hold a secret: they are written to run.json and to the stage's YAML, and printed."""
    without_secrets(settings, held := [])
    if held:
        raise SystemExit(
            f"{name}: {', '.join(held)} would be written to run.json. Take it out of the configuration and set an "
            f"environment variable, which all that the loop starts can read (HF_TOKEN for the Hub). A judge's server "
            f"needs no key: with --host 127.0.0.1 only this machine reaches it."
        )


def plan(loop: dict) -> list[dict]:
    """The stages in the order in which they run, each with the content of its YAML.

    What a stage reads of the stages before is filled in: the policy of the latest training, the rollouts of the latest
    GRPO, the pairs of the latest verification, the solved questions of all. `overrides` win over that.
    """
    run, stages = Path(loop["output_dir"]), []
    rounds = [(stage, stage["name"], 0) for stage in loop["stages"]]
    for number in range(1, loop["iterations"] + 1):
        rounds += [(stage, f"{stage['name']}-{number}", number) for stage in loop["iteration"]]
    policy = rollouts = pairs = None
    solved: list[str] = []
    for stage, key, iteration in rounds:
        later = iteration > 1
        file = find_config((later and stage.get("later_config")) or stage["config"])
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        overrides = {**stage.get("overrides", {}), **(stage.get("later_overrides", {}) if later else {})}
        output = run / key
        wired = {"output_dir": str(output)}
        recipe = stage["recipe"]
        if recipe in TRAINING and policy is not None:
            wired["model_name_or_path"] = policy
        if recipe == "grpo_video.py":
            wired["leave_out"] = list(solved) or None
            if policy is not None:
                content.pop("cold_start", None)
            rollouts = str(output / "rollouts")
        if recipe == "verify_rollouts.py":
            if rollouts is None and "rollouts" not in overrides:
                raise SystemExit(f"stage {key}: no GRPO stage before it: give it `rollouts` in its overrides.")
            wired |= {"rollouts": [rollouts], "verdict_cache": str(run / "verdict_cache.sqlite")}
            pairs = str(output / "pairs")
            solved.append(str(output / "solved.json"))
        if recipe == "dpo_video.py" and pairs is not None:
            first, *others = content.get("pairs") or [{}]  # the first is the loop's own; others are mixed in
            first = json.loads(first) if isinstance(first, str) else first
            kept = {name: value for name, value in first.items() if name != "revision"}
            wired["pairs"] = [{**kept, "path": pairs}, *others]
        if recipe in TRAINING:
            policy = str(output)
        if loop.get("seed") is not None:
            wired["seed"] = loop["seed"]
        if loop["push_to_hub"]:
            wired |= hub_options(recipe, f"{loop['hub_prefix']}-{key}")
            if recipe in TRAINING:  # what a stage ends with; its checkpoints only where they are asked for
                content.setdefault("hub_strategy", "end")
        settings = {**content, **wired, **overrides}
        refuse_secrets(f"stage {key}", settings)
        stages.append(
            {
                "name": key,
                "recipe": recipe,
                "iteration": iteration,
                "output_dir": str(output),
                "settings": settings,
                "judge": {name: stage[name] for name in stage if name.startswith("judge_")},
            }
        )
    if len({stage["name"] for stage in stages}) < len(stages):
        raise SystemExit(f"two stages have one name: {', '.join(stage['name'] for stage in stages)}.")
    return stages


def hub_options(recipe: str, repo_id: str) -> dict:
    """Where a stage pushes to; private unless its configuration says otherwise."""
    if recipe == "verify_rollouts.py":
        return {"push_to_hub": True, "hub_pairs_id": f"{repo_id}-pairs", "hub_verdicts_id": f"{repo_id}-verdicts"}
    return {"push_to_hub": True, "hub_model_id": repo_id}


def chosen(stages: list[dict], first: str | None, last: str | None) -> tuple[int, int]:
    """Places of the stages that `--from` and `--until` name."""
    names = [stage["name"] for stage in stages]
    for option, name in (("--from", first), ("--until", last)):
        if name is not None and name not in names:
            raise SystemExit(f"{option} {name}: no such stage; there are {', '.join(names)}.")
    return names.index(first) if first else 0, names.index(last) if last else len(names) - 1


def command_of(stage: dict, config: Path, accelerate: list[str]) -> list[str]:
    recipe = str(RECIPES / stage["recipe"])
    if stage["recipe"] not in TRAINING:
        return [sys.executable, recipe, "--config", str(config)]
    options = [str(CONFIGS / part) if (CONFIGS / part).is_file() else part for part in map(str, accelerate)]
    # quiet: the stage's own message is the last, not the launcher's traceback
    return [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *options, recipe, "--config", str(config)]


def check_settings(stages: list[dict]) -> None:
    """Refuse what would stop a stage when its turn comes: keys that its recipe does not know, a missing program."""
    import importlib.util
    from dataclasses import fields

    known = {}
    for stage in stages:
        command = stage["judge"].get("judge_command")
        if command and shutil.which(str(command[0])) is None:
            raise SystemExit(f"stage {stage['name']}: judge_command: no program {command[0]!r} here; install it.")
        recipe = stage["recipe"]
        if recipe not in known:
            spec = importlib.util.spec_from_file_location(recipe.removesuffix(".py"), RECIPES / recipe)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            known[recipe] = {item.name for kind in module.ARGUMENTS for item in fields(kind)} | {"env"}
        if unknown := sorted(set(stage["settings"]) - known[recipe]):
            raise SystemExit(f"stage {stage['name']}: {recipe} knows no {', '.join(unknown)}. Nothing was run.")


def look_at_inputs(stage: dict, made: list[str]) -> None:
    """Raise what would stop a training stage at its start: rows and their media, held-out rows, pairs, the policy; of
    those what is not below `made`, the folders that the stages before it write."""
    from dataclasses import fields

    from veripo_trl.model.policy import find_base
    from veripo_trl.recipe import stages as shared
    from veripo_trl.verifier.preferences import PairSource, pair_files

    settings = stage["settings"]
    names = {item.name for item in fields(shared.DataArguments)}
    data = shared.DataArguments(**{name: value for name, value in settings.items() if name in names})
    if data.tiny_world and not Path(data.tiny_world).exists():
        made = [*made, data.tiny_world]

    def to_find(path: str) -> bool:
        return not any(Path(folder) in (Path(path), *Path(path).parents) for folder in made)

    data.datasets = [source for source in data.datasets or [] if to_find(source["path"])]
    data.eval_datasets = [source for source in data.eval_datasets or [] if to_find(source["path"])]
    data.leave_out = [entry for entry in data.leave_out or [] if to_find(entry)]
    if data.datasets and stage["recipe"] != "dpo_video.py":
        shared.load_training_rows(data, seed=0)
    shared.load_eval_rows(data)
    for source in settings.get("pairs") or []:
        source = PairSource(**(json.loads(source) if isinstance(source, str) else source))
        if to_find(source.path):
            pair_files(source)
    model, revision = settings["model_name_or_path"], settings.get("model_revision", "main")
    if to_find(model) and (Path(model).exists() or not settings.get("cold_start")):
        find_base(model, None if revision == "main" else revision)


# ---- the run's state ----------------------------------------------------------------------------------------------


class Run:
    """`run.json` of a run: what its stages read, wrote and took. `at_work`: the folder of the stage that is running."""

    at_work: Path | None = None
    stopped_by: signal.Signals | None = None

    def __init__(self, folder: Path, loop: dict):
        self.folder, self.file = folder, folder / "run.json"
        if self.file.exists():
            remedy = "Take it from a copy. Without one, choose another output_dir; the folders of its stages are whole."
            self.content = read_json(self.file, remedy=remedy)
        else:
            self.content = {"name": folder.name, "stages": []}
        self.content["loop"] = loop

    def entry(self, name: str) -> dict | None:
        return next((entry for entry in self.content["stages"] if entry["name"] == name), None)

    def put(self, entry: dict) -> None:
        known = self.entry(entry["name"])
        if known is None:
            self.content["stages"].append(entry)
        elif known is not entry:
            self.content["stages"][self.content["stages"].index(known)] = entry
        self.save()

    def save(self) -> None:
        write_json(self.file, self.content)

    def pass_on(self, number: int, frame) -> None:
        """Of a signal: to the trainer alone, which knows what to do, and whose end is waited for."""
        again = self.stopped_by is signal.SIGINT
        self.stopped_by = signal.Signals(number)
        trainer = holder(self.at_work) if self.at_work else None
        if trainer is None or again:
            self.leave()
        with contextlib.suppress(ProcessLookupError):
            os.kill(trainer, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def leave(self) -> None:
        print(f"\n{self.folder}: ended by {self.stopped_by.name}: the same command goes on", file=sys.stderr, flush=True)
        raise SystemExit(128 + self.stopped_by)

    def forget(self, stages: list[dict]) -> None:
        """Move the folders of stages aside, so that they are done again; nothing is deleted."""
        number = 1
        while (aside := self.folder / "set_aside" / f"{number:03d}").exists():
            number += 1
        for stage in stages:
            if Path(stage["output_dir"]).exists():
                aside.mkdir(parents=True, exist_ok=True)
                Path(stage["output_dir"]).rename(aside / stage["name"])
                print(f"{stage['name']}: moved to {aside / stage['name']}, to be done again", flush=True)
        names = {stage["name"] for stage in stages}
        self.content["stages"] = [entry for entry in self.content["stages"] if entry["name"] not in names]
        self.content["redone_from"] = stages[0]["name"]  # until the run is through: the same command goes on
        self.save()


def read_results(stage: dict) -> dict | None:
    """A stage's results.json without its history, or None while it is not finished."""
    file = Path(stage["output_dir"]) / RESULTS
    if not file.exists():
        return None
    results = read_json(file, remedy="Remove it, and start the same command again: the stage's end is done anew.")
    return {key: value for key, value in results.items() if key != "history"}


@contextlib.contextmanager
def only_run(folder: Path):
    """Hold the run's folder alone; end what an earlier start of it left running, and what this one would leave."""
    with only_process(folder):
        folder.mkdir(parents=True, exist_ok=True)
        end_leftovers(folder)
        try:
            yield
        finally:
            end_leftovers(folder)


def end_leftovers(folder: Path, patience_s: float = 20.0) -> None:
    """End the processes of this run that outlived the loop which started them: two would write to one folder."""
    mark = f"{MARKER}={folder.resolve()}".encode()

    def alive() -> list[int]:
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                environment = (place / "environ").read_bytes().split(b"\0")
                gone = (place / "stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()[0] in "ZX"
            except (PermissionError, FileNotFoundError, ProcessLookupError):
                continue  # another user's, or it ended meanwhile
            if mark in environment and not gone and int(place.name) != os.getpid():
                found.append(int(place.name))
        return found

    for number in (signal.SIGTERM, signal.SIGKILL):
        left = alive()
        if left:
            print(f"ending {len(left)} processes that this run left behind: {left}", flush=True)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + patience_s
        while alive() and time.monotonic() < deadline:
            time.sleep(0.1)
    if left := alive():
        raise SystemExit(f"processes {left} of this run do not end; end them first.")


# ---- running a stage ------------------------------------------------------------------------------------------------


def add_to_log(file, part: bytes, *, lost: bool) -> bool:
    """Write to a stage's log, for want of which no stage is to end; whether any part of it is lost, said once."""
    try:
        with room_for(file.name, len(part)):
            file.write(part)
    except VeripoError as error:
        if not lost:
            print(f"The log is not whole, the stage goes on. {error}", flush=True)
        return True
    return lost


def run_logged(command: list[str], log: Path, env: dict) -> int:
    """Run a command, its output on the screen and at the end of a file. Returns its exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab", buffering=0) as file:
        started_again = "\n" if file.tell() else ""  # a killed run ends in the middle of a line
        lost = add_to_log(file, f"{started_again}$ {' '.join(command)}\n".encode(), lost=False)
        # a session of its own: Ctrl-C comes to the loop alone
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while part := os.read(process.stdout.fileno(), 65536):
                lost = add_to_log(file, part, lost=lost)
                sys.stdout.buffer.write(part)
                sys.stdout.flush()
            return process.wait()
        except BaseException:  # Ctrl-C or a termination; what the launcher leaves is ended by `only_run`
            process.terminate()
            process.wait()
            raise


@contextlib.contextmanager
def judge_server(judge: dict, log: Path, env: dict):
    """The judge's server for as long as a stage needs it, so that one GPU can hold policy and judge in turn."""
    if "judge_command" not in judge:
        yield
        return
    health = judge.get("judge_health", "http://127.0.0.1:8000/health")
    if answers(health):
        raise SystemExit(f"{health} answers before the judge is started: another server is there. End it.")
    command = [str(part) for part in judge["judge_command"]]
    print(f"judge: {' '.join(command)} (log: {log})", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            timeout_s = float(judge.get("judge_start_timeout_s", 900))
            deadline = time.monotonic() + timeout_s
            while not answers(health):
                if process.poll() is not None:
                    raise SystemExit(f"the judge ended with exit code {process.returncode}:\n{tail(log)}")
                if time.monotonic() > deadline:
                    raise SystemExit(f"{health} did not answer within {timeout_s:.0f} s:\n{tail(log)}")
                time.sleep(0.5)
            print("judge: ready", flush=True)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):  # an engine may outlive its server, and hold the GPU
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print("judge: stopped", flush=True)


def answers(url: str) -> bool:
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
        with opener.open(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def no_pairs(stage: dict, run: Run) -> str | None:
    """Why a DPO stage has nothing to do, or None."""
    path = (stage["settings"].get("pairs") or [{}])[0].get("path")
    for entry in run.content["stages"]:
        if entry["recipe"] == "verify_rollouts.py" and str(Path(entry["output_dir"]) / "pairs") == path:
            if not sum(entry["results"]["counts"]["pairs"].values()):
                return f"{entry['name']} found no preference pairs"
    return None


def do_stage(stage: dict, run: Run, accelerate: list[str], *, before: str | None) -> dict:
    """Run a stage unless it is finished. Returns its entry in run.json.

    Args:
        before: when the stage before this one was finished: a finished stage must have followed that very one.
    """
    name, settings = stage["name"], stage["settings"]
    entry = run.entry(name)
    results = read_results(stage)
    if entry is not None and entry["status"] in ("done", "skipped") and entry["after"] != before:
        raise SystemExit(f"{name} is finished, but a stage before it was made anew since. To follow it: --from {name}.")
    if entry is not None and entry["settings"] != settings:
        what = changed_keys(entry["settings"], settings)
        if entry["status"] in ("done", "skipped"):
            raise SystemExit(f"{name} is finished, with other settings ({what}). To do it again: --from {name}.")
        print(f"{name} goes on with changed settings: {what}", flush=True)
    if entry is not None and (entry["status"] == "skipped" or (entry["status"] == "done" and results is not None)):
        print(f"{name}: {entry['status']} ({entry['minutes']:.1f} minutes)", flush=True)
        return entry
    log = run.folder / "logs" / f"{name}.log"
    if entry is None:
        if results is not None:
            raise SystemExit(f"{stage['output_dir']} holds a run that is not this loop's; choose another output_dir.")
        entry = {"name": name, "recipe": stage["recipe"], "iteration": stage["iteration"], "minutes": 0.0}
    elif entry["status"] == "running" and log.exists():  # killed: it ran until its last word
        entry["minutes"] += max(0.0, log.stat().st_mtime - entry["started_at"]) / 60
    entry |= {"output_dir": stage["output_dir"], "settings": settings, "after": before}
    if results is not None:  # finished, but the loop was killed before it could note that
        run.put(entry | {"status": "done", "results": results, "finished": timestamp()})
        print(f"{name}: done ({entry['minutes']:.1f} minutes)", flush=True)
        return run.entry(name)
    if stage["recipe"] == "dpo_video.py" and (reason := no_pairs(stage, run)):
        # What follows goes on from the policy before: an empty folder would not be one.
        print(f"{name}: skipped, {reason}", flush=True)
        run.put(entry | {"status": "skipped", "reason": reason, "finished": timestamp()})
        return run.entry(name)
    config = run.folder / "configs" / f"{name}.yaml"
    write_whole(config, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode())
    command = command_of(stage, config, accelerate)
    run.put(entry | {"status": "running", "command": command, "started_at": time.time()})
    print(f"\n=== {name}: {' '.join(command)}", flush=True)
    env = {**os.environ, MARKER: str(run.folder.resolve()), "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with judge_server(stage["judge"], run.folder / "logs" / f"{name}-judge.log", env):
        run.at_work = Path(stage["output_dir"])
        code = run_logged(command, log, env)
        run.at_work = None
    entry = run.entry(name)
    entry["minutes"] += (time.monotonic() - started) / 60
    results = read_results(stage)
    if code != 0 or results is None:
        run.put(entry | {"status": "stopped" if run.stopped_by else "failed", "exit_code": code})
        if run.stopped_by:
            run.leave()
        raise SystemExit(
            f"\n{name} failed (exit code {code}{'' if results else f', no {RESULTS}'}). Its log: {log}. Mend what it "
            f"says and start the same command again: finished stages are kept, this one goes on where it can."
        )
    run.put(entry | {"status": "done", "exit_code": 0, "results": results, "finished": timestamp()})
    return run.entry(name)


def timestamp() -> str:
    """Tells one finish from another; for people too."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')}.{time.time_ns() % 10**9:09d}"


def skip_policies(stages: list[dict], place: int) -> None:
    """After a skipped DPO stage, later stages start from the policy that it would have started from."""
    skipped = stages[place]
    before = skipped["settings"]["model_name_or_path"]
    for stage in stages[place + 1 :]:
        if stage["settings"].get("model_name_or_path") == skipped["output_dir"]:
            stage["settings"]["model_name_or_path"] = before


# ---- what the run shows ---------------------------------------------------------------------------------------------


def table_row(entry: dict) -> dict:
    """One stage's line of the table at the end."""
    results = entry.get("results") or {}
    sampled = (results.get("after") or {}).get("sampled") or {}
    greedy = (results.get("after") or {}).get("greedy") or {}
    counts = results.get("counts") or {}

    def percent(value) -> str:
        return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}%"

    def number(value, form="{:,}") -> str:
        return "–" if value is None else form.format(value)

    interval = "–"
    if sampled:
        interval = f"{100 * sampled['accuracy_low']:.1f}–{100 * sampled['accuracy_high']:.1f}"
    pairs = counts.get("pairs") or results.get("pairs")
    return {
        "stage": entry["name"] + (" (skipped)" if entry["status"] == "skipped" else ""),
        "accuracy": percent(sampled.get("accuracy")),
        "95%": interval,
        "greedy": percent(greedy.get("accuracy")),
        "inconsistent": percent(sampled.get("inconsistency")),
        "unknown": percent(sampled.get("unknown")),
        "accurate+consistent": percent(sampled.get("accurate_and_consistent")),
        "think tokens": number(sampled.get("think_tokens"), "{:.1f}"),
        "judges differ": percent(sampled.get("disagreement")),
        "rollouts": number(counts.get("rollouts", results.get("rollouts"))),
        "pairs": number(None if pairs is None else sum(pairs.values())),
        "minutes": f"{entry['minutes']:.1f}",
    }


def show(run: Run, stages: list[dict]) -> None:
    """Print the table; draw the curves and write the report, unless they are newer than the run's state."""
    entries = [entry for stage in stages if (entry := run.entry(stage["name"])) is not None]
    settings = [stage["settings"] for stage in stages]
    reporting = sorted({s["report_judge"] for s in settings if "report_judge" in s} or {"rules"})
    curating = sorted({s.get("judge", "rules") for stage, s in zip(stages, settings, strict=True) if not
                       stage["recipe"] in TRAINING})  # fmt: skip
    print_table(
        f"{run.folder}: held-out questions, sampled at temperature 1 unless it says greedy; consistency reported by "
        f"{', '.join(reporting)}",
        [table_row(entry) for entry in entries],
    )
    print(
        "inconsistent = inconsistent / (consistent + inconsistent); accurate+consistent counts unknown as a miss; "
        "judges differ = share of answers on which the judge that reports and `rules` give two verdicts."
    )
    if set(reporting) & set(curating):
        print(f"note: {', '.join(curating)} chose the pairs and reports too: read its inconsistency with care.")
    report = run.folder / "report.html"
    if not report.exists() or report.stat().st_mtime < run.file.stat().st_mtime:
        from veripo_trl.report.page import milestones
        from veripo_trl.report.plots import held_out_charts, save_charts
        from veripo_trl.report.write import write_report

        points = milestones([{"name": entry["name"], "results": entry.get("results") or {}} for entry in entries])
        save_charts(run.folder / "loop.png", held_out_charts(points) if points else [], title=run.folder.name)
        write_report([run.folder], say=lambda line: print(f"report: {line}"))
    print(
        f"\nreport.html (open it in a browser), loop.png, run.json and logs/ are in {run.folder}\n"
        f"policy: {latest_policy(entries)}",
        flush=True,
    )


def latest_policy(entries: list[dict]) -> str:
    made = [entry["output_dir"] for entry in entries if entry["recipe"] in TRAINING and entry["status"] == "done"]
    return made[-1] if made else "none yet"


def dry_run(run: Run, stages: list[dict], first: int | None) -> None:
    """Print what would run, and then what would stop it: all that can be found without running it."""
    problems: dict[str, str] = {}  # each with the first stage that has it
    try:
        check_settings(stages)
    except SystemExit as error:
        problems[str(error)] = ""
    for place, stage in enumerate(stages):
        entry = run.entry(stage["name"])
        state = "to do" if entry is None or (first is not None and place >= first) else entry["status"]
        if state == "skipped":
            skip_policies(stages, place)
        command = command_of(stage, run.folder / "configs" / f"{stage['name']}.yaml", run.content["loop"]["accelerate"])
        print(f"{stage['name']} ({state}): {' '.join(command)}")
        for key, value in stage["settings"].items():
            print(f"    {key}: {json.dumps(value, ensure_ascii=False)}")
        if stage["recipe"] in TRAINING and state not in ("done", "skipped"):
            try:
                look_at_inputs(stage, [before["output_dir"] for before in stages[:place]])
            except (SystemExit, VeripoError, RuntimeError, ValueError, OSError, TypeError) as error:
                problems.setdefault(str(error), f"stage {stage['name']}: ")
    if problems:
        raise SystemExit("\n".join(["\nThis would not run:", *(name + what for what, name in problems.items())]))


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    loop = read_loop(arguments)
    stages = plan(loop)
    first, last = chosen(stages, arguments.first, arguments.last)
    folder = Path(loop["output_dir"])
    if arguments.dry_run:
        dry_run(Run(folder, loop), stages[: last + 1], first if arguments.first else None)
        return
    if not (folder / "run.json").exists():
        check_settings(stages)
    with only_run(folder):
        run = Run(folder, loop)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, run.pass_on)
        if not run.file.exists():
            run.save()
        if arguments.first is not None and run.content.get("redone_from") != arguments.first:
            run.forget(stages[first:])
        before = None
        for place, stage in enumerate(stages[: last + 1]):
            entry = do_stage(stage, run, loop["accelerate"], before=before)
            if run.stopped_by:
                run.leave()
            before = entry["finished"]
            if entry["status"] == "skipped":
                skip_policies(stages, place)
        if run.content.pop("redone_from", None):
            run.save()
        show(run, stages[: last + 1])


if __name__ == "__main__":
    sys.exit(run_command(main))
