"""The stages of a loop, one after another, each as a process of its own, as a user would start it; which of them are
finished and kept, and which go on."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from veripo_trl.errors import VeripoError
from veripo_trl.files.disk import room_for, write_whole
from veripo_trl.files.run_folder import RESULTS, changed_keys, holder
from veripo_trl.loop.check import check_settings
from veripo_trl.loop.judge_server import judge_server
from veripo_trl.loop.plan import LoopError, plan, select, shown
from veripo_trl.loop.state import MARKER, Run, only_run, read_results
from veripo_trl.loop.table import show
from veripo_trl.start import SELDOM


def run_loop(loop: dict, *, first: str | None = None, last: str | None = None) -> None:
    """Do what is not done yet of the stages up to `last`; `first` and what follows it once more, where it is given."""
    stages = plan(loop)
    begin, end = select(stages, first, last)
    folder = Path(loop["output_dir"])
    if not (folder / "run.json").exists():
        check_settings(stages)
    with stopped_by_signals(), only_run(folder):
        run = Run(folder)
        if first is not None and run.redone_from != first:
            run.forget(stages[begin:])
        before = None
        for index in range(end + 1):
            stage = plan(loop, run.skipped)[index]
            before = do_stage(stage, run, before=before)["finished"]
        if run.redone_from:
            run.redone_from = None
            run.save()
        show(run, stages[: end + 1])


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """`stop` at a signal, and the handlers from before after it: a process may go on when its loop has ended."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    for number in before:
        if before[number] is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, before[number])


def stop(number: int, frame) -> None:
    """Ends the loop at a signal: the first, or a second Ctrl-C."""
    for other in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    name = signal.Signals(number).name
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"\nended by {name}: the same command goes on", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def do_stage(stage: dict, run: Run, *, before: str | None) -> dict:
    """Run a stage unless it is finished. Returns its entry in run.json.

    Args:
        before: when the stage before this one was finished: a finished stage must have followed that very one.
    """
    name, settings = stage["name"], stage["settings"]
    known, results = run.stages.get(name), read_results(stage["output_dir"])
    finished = known is not None and known["status"] in ("done", "skipped")
    if known is None and results is not None:
        raise LoopError(
            f"{stage['output_dir']} holds a run that is not this loop's: choose another output_dir."
        )
    changed = changed_keys(known["settings"], settings) if known else ""
    refusal = None
    if finished and known["after"] != before:
        refusal = "but a stage before it was made anew. To follow it"
    elif finished and changed:
        refusal = f"with other settings ({changed}). To redo it"
    elif changed:
        print(f"{name} goes on with changed settings: {changed}", flush=True)
    if refusal:
        raise LoopError(f"{name} is finished, {refusal}: --from {name}.")
    own = ("name", "recipe", "iteration", "output_dir", "settings")
    entry = {key: stage[key] for key in own} | {"after": before}
    if finished and (results is not None or known["status"] == "skipped"):
        entry = known
    elif results is not None:  # the loop was killed before it could note that
        entry = run.put(entry | done(results))
    elif no_pairs(stage):  # what follows goes on from the policy before this stage
        entry = run.put(entry | {"status": "skipped", "minutes": 0.0})
    else:
        return start_stage(stage, run, entry)
    why = ", there are no pairs" if entry["status"] == "skipped" else ""
    print(f"{name}: {entry['status']}{why}", flush=True)
    return entry


def done(results: dict) -> dict:
    return {"status": "done", "results": results, "minutes": results.get("minutes", 0.0)}


def no_pairs(stage: dict) -> bool:
    """Whether a DPO stage's verification has found no preference pairs."""
    pairs = stage["settings"].get("pairs") if stage["kind"] == "dpo" else None
    results = pairs and read_results(Path(pairs[0]["path"]).parent)
    return bool(results) and not sum(results["counts"]["pairs"].values())


def start_stage(stage: dict, run: Run, entry: dict) -> dict:
    """Run a stage's recipe, with its judge's server if it has one. Returns its entry in run.json."""
    name, logs, env = stage["name"], run.folder / "logs", environment(run.folder)
    write_whole(
        stage["config"],
        yaml.safe_dump(stage["settings"], sort_keys=False, allow_unicode=True).encode(),
    )
    run.put(entry | {"status": "running", "command": stage["command"]})
    print(f"\n=== {name}: {shown(stage['command'])}", flush=True)
    try:
        with judge_server(stage, logs / f"{name}-judge.log", env):
            code = run_logged(stage["command"], logs / f"{name}.log", env, stage["output_dir"])
    except SystemExit:
        run.put(entry | {"status": "stopped"})
        raise
    results = read_results(stage["output_dir"])
    if code == 0 and results is not None:
        return run.put(entry | done(results))
    run.put(entry | {"status": "failed", "exit_code": code})
    raise LoopError(
        f"{name} failed (exit code {code}{'' if results else f', no {RESULTS}'}). Its log: {logs / name}.log. Mend what "
        f"it says and start the same command again: finished stages are kept, this one goes on where it can."
    )


def environment(folder: Path) -> dict[str, str]:
    """Of what a run starts: marked as its own, and without the working directory among the places of imports."""
    places = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    own = {
        MARKER: str(folder.resolve()),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(places),
    }
    bars = (
        {"TQDM_DELAY": "0"} if sys.stdout.isatty() else SELDOM
    )  # they see a pipe, and not what is behind it
    return {**bars, **os.environ, **own}


def run_logged(command: list[str], log: Path, env: dict, output_dir: str) -> int:
    """Run a command, its output on the screen and at the end of a file. Returns its exit code.

    For want of its log no stage is to end: what cannot be written is left out, and that is said once. A signal that ends
    the loop is passed to the trainer, which knows what to do, and whose end is waited for; the launcher would die of it
    and leave the trainer behind.
    """
    whole = True

    def note(part: bytes) -> None:
        nonlocal whole
        try:
            with room_for(log, len(part)):
                file.write(part)
        except VeripoError as error:
            if whole:
                print(f"The log is not whole, the stage goes on. {error}", flush=True)
            whole = False

    def copy() -> int:
        while part := os.read(process.stdout.fileno(), 65536):
            note(part)
            with contextlib.suppress(OSError):  # the terminal may be gone; the log has it
                sys.stdout.buffer.write(part)
                sys.stdout.flush()
        return process.wait()

    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab", buffering=0) as file:
        started_again = "\n" if file.tell() else ""  # a killed run ends in the middle of a line
        note(f"{started_again}$ {shown(command)}\n".encode())
        # a session of its own: Ctrl-C comes to the loop alone
        process = subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return copy()
        except SystemExit as stopped:
            if trainer := holder(output_dir):
                number = signal.SIGINT if stopped.code == 128 + signal.SIGINT else signal.SIGTERM
                pid, _, node = trainer.partition(" on ")
                with contextlib.suppress(ProcessLookupError):
                    # On another node by way of the launcher, whose processes get no more than torchrun's 30 s.
                    os.kill(int(pid) if node == socket.gethostname() else process.pid, number)
                copy()
            raise
