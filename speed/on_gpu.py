"""What a machine with a GPU has to say about this project, in one command.

    python speed/on_gpu.py                         # nine minutes; the same command again goes on from there
    python speed/on_gpu.py --list
    python speed/on_gpu.py --only update dpo --shape 7b --minutes 20
    python speed/on_gpu.py --device cpu --shape tiny --out /tmp/tiny       # all of it that a CPU can do, scaled down

Half an hour is three times the first command, each within ten minutes: by the estimates every stage for the 3B shape but
`sizes`. The 7B shape takes more than as long again; its update and DPO alone, `--shape 7b --only update dpo`, five
minutes.

Stages come in the order of their worth, each in a process of its own, and consist of cases; the second shape comes after
the first, and the stage `sizes` after both. Weights are random, in the real shapes; clips are made on the spot; no
network is used. A case is begun if its estimated time is left of --minutes; one that takes over three times its estimate
and two and a half minutes is ended with all that it started, and so is everything half a minute after --minutes. A case
that fails, does not fit or ends its process is a line of the table.

The cases are in gpu_cases.py, what they do in the other files gpu_*.py.

--out, by default results/<device> beside this file, gets `log.txt` and `results.json`, rewritten whole at every case:
{"device", "machine", "stages": {stage: {case: {"state", "message", "at", "seconds", and the case's own numbers}}}}, with
the states done, failed, does not fit, skipped and running. What is in it is not done again, also not from another
checkout, except a case that was running when everything was killed; --retry tries again what is not done.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
sys.path[:0] = [str(FOLDER), str(ROOT / "src")]

from gpu_cases import SIZES, STAGES, Case, plan

from veripo_trl.errors import run as run_command
from veripo_trl.files.disk import read_json
from veripo_trl.files.tables import write_json

START_S = 30  # of a stage's process
GRACE_S = 30
ENDED = 3  # exit code of a process whose GPU is of no use any more


# ---- what is known ----------------------------------------------------------------------------------------------------


def read(file: Path) -> dict:
    remedy = "Move it away, or give another --out."
    return {"stages": {}, **(read_json(file, remedy=remedy) if file.exists() else {})}


def note(file: Path, stage: str, case: str, record: dict) -> None:
    results = read(file)
    results["stages"].setdefault(stage, {})[case] = record
    write_json(file, results)


def still_to_do(cases: list[Case], records: dict, again_before: float) -> list[Case]:
    """Cases without a record, that were killed with everything, or not done in an earlier command that is retried."""

    def open_(record: dict | None) -> bool:
        if record is None or record["state"] == "running":
            return True
        return record["state"] != "done" and record["at"] < again_before

    return [case for case in cases if open_(records.get(case.name))]


# ---- in the process of a stage ----------------------------------------------------------------------------------------


def perform(stage: str, cases: list[Case], file: Path, *, device: str, until: float, again_before: float = 0.0) -> None:
    """Do the cases of a stage that are to do and that fit before `until`, one after the other."""
    for case in still_to_do(cases, read(file)["stages"].get(stage, {}), again_before):
        left = until - time.time()
        if case.seconds > left:
            print(f"{stage}: {case.name}: not begun, takes {case.seconds:.0f} s, {left:.0f} s are left", flush=True)
            continue
        begun = time.time()
        note(file, stage, case.name, {"state": "running", "at": begun})
        print(f"\n== {stage}: {case.name}", flush=True)
        faulthandler.dump_traceback_later(limit_s(case), file=sys.__stderr__)  # then `wait` ends it
        record = attempt(case, device)
        faulthandler.cancel_dump_traceback_later()
        note(file, stage, case.name, {**record, "at": begun, "seconds": time.time() - begun})
        if not clean_up(device):
            sys.exit(ENDED)


def limit_s(case: Case) -> float:
    return 3 * case.seconds + 150  # a process's first case has all the imports in it


def attempt(case: Case, device: str) -> dict:
    """The record of a case, whatever happens in it."""
    for need in case.needs:
        if device == "cpu" if need == "cuda" else importlib.util.find_spec(need) is None:
            return {"state": "skipped", "message": f"needs {need}"}
    module, function = case.function.split(":")
    try:
        return {"state": "done", **getattr(importlib.import_module(module), function)(device, **case.options)}
    except (Exception, SystemExit) as error:  # a recipe's parser ends in the latter
        traceback.print_exc()
        message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        return {"state": "does not fit" if too_large(error) else "failed", "message": message}


def too_large(error: BaseException) -> bool:
    """Whether the GPU's memory did not suffice, for torch or for a library that allocates by itself."""
    return "out of memory" in str(error) or "ALLOC_FAILED" in str(error)


def clean_up(device: str) -> bool:
    """Free what a case has left. False where its error has spoilt the GPU for this process."""
    gc.collect()
    torch = sys.modules.get("torch")
    if device == "cuda" and torch is not None:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


def stage_main(args) -> None:
    from machine import describe_machine

    results, machine = read(args.out / "results.json"), describe_machine()
    device = machine["accelerator"] if args.device == "cuda" else machine["processor"]
    if args.device == "cuda" and device is None:
        sys.exit("No GPU was found here: give --device cpu, or see why torch.cuda.is_available() is False.")
    if results.get("device", device) != device:
        sys.exit(f"{args.out}: results of {results['device']}, but this is {device}. Give another --out.")
    write_json(args.out / "results.json", {"device": device, **results, "machine": machine})
    (shape,) = args.shape
    until, again = args.until, args.again_before
    cases = plan(args.device, shape)[args.stage]
    perform(args.stage, cases, args.out / "results.json", device=args.device, until=until, again_before=again)


# ---- in the command's own process -------------------------------------------------------------------------------------


def ends_with_its_parent(number: int):
    """A Popen's `preexec_fn`: when what has started the process is killed, it gets this signal (Linux)."""
    return partial(ctypes.CDLL(None).prctl, 1, number)


def run_stage(stage: str, shape: str, cases: list[Case], args, *, deadline: float, again_before: float) -> None:
    """Run a stage's process, and again where one of its cases ended it."""
    file, log = args.out / "results.json", args.out / "log.txt"

    def to_do():
        return still_to_do(cases, read(file)["stages"].get(stage, {}), again_before)

    args.out.mkdir(parents=True, exist_ok=True)
    while todo := to_do():
        left = deadline - time.time() - START_S
        if min(case.seconds for case in todo) > left:
            break
        command = [sys.executable, __file__, "--stage", stage, "--out", str(args.out), "--device", args.device]
        command += ["--shape", shape, "--until", str(deadline), "--again_before", str(again_before)]
        paths = filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])
        one = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": one, "PYTHONPATH": os.pathsep.join(paths)}
        started = time.time()

        def overdue() -> bool:
            name, record = running(read(file), stage, since=started)
            limits = {case.name: limit_s(case) for case in cases}
            late = name is not None and time.time() > record["at"] + limits[name] + 2  # its traceback is written
            return late or time.time() > deadline + GRACE_S

        with open(log, "ab") as output:
            killed = ends_with_its_parent(signal.SIGKILL)
            process = subprocess.Popen(command, stdout=output, stderr=output, env=env, preexec_fn=killed)
            code = wait(process, overdue)
        name, record = running(read(file), stage, since=started)
        if name is not None:
            seconds = time.time() - record["at"]
            why = f"time limit, {seconds:.0f} s" if code is None else f"its process ended with code {code}, see the log"
            note(file, stage, name, {**record, "state": "failed", "message": why, "seconds": seconds})
        elif code not in (0, None, ENDED) and len(to_do()) == len(todo):
            sys.exit(f"{stage} did not start, code {code}. The end of {log}:\n{log.read_text(errors='replace')[-2000:]}")
        if code == 0 or time.time() > deadline:
            break
    if todo := to_do():
        print(f"{stage}: {len(todo)} cases not begun: too little time is left for them")


def running(results: dict, stage: str, since: float) -> tuple[str | None, dict]:
    """The case that a process started since then has left in its middle."""
    records = results["stages"].get(stage, {}).items()
    left = [(name, record) for name, record in records if record["state"] == "running" and record["at"] >= since]
    return left[0] if left else (None, {})


def wait(process: subprocess.Popen, overdue) -> int | None:
    """A process's exit code, or None where it was overdue and was ended, with all that it had started."""
    while not overdue():
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1)
    import psutil

    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    return None


def show(stage: str, records: dict) -> None:
    print(f"\n{stage}")
    width = max(map(len, records))
    for name, record in records.items():
        numbers = {key: value for key, value in record.items() if key not in ("state", "message", "at", "seconds")}
        shown = [f"{key} {short(value)}" for key, value in numbers.items() if isinstance(value, (int, float, str))]
        line = f"{name:{width}}  {record['state']:12} {record.get('seconds', 0):5.0f} s"
        print(f"{line}  {'; '.join([*filter(None, [record.get('message')]), *shown])}")
    sys.stdout.flush()


def short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def default_folder(device: str) -> Path:
    if device == "cpu":
        return FOLDER / "results" / "cpu"
    # Asked in another process: this one is to hold nothing of the GPU.
    command = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"No GPU was found here ({found.stderr.strip().splitlines()[-1]}): give --device cpu.")
    return FOLDER / "results" / re.sub(r"\W+", "_", found.stdout.strip().lower())


def in_order(shapes: list[str]) -> list[tuple[str, str]]:
    """Stages with their shapes: all of the first shape, then of the next, and the last stage of all at the end."""
    *stages, last = STAGES
    return [*((stage, shape) for shape in shapes for stage in stages), *((last, shape) for shape in shapes)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: results/<device> beside this file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", nargs="+", choices=list(SIZES), help="default: 3b and 7b; on a CPU tiny")
    parser.add_argument("--minutes", type=float, default=9.0, help="what fits is run; default: 9")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help="these stages only")
    parser.add_argument("--list", action="store_true", help="show the cases, with estimated seconds and their state")
    parser.add_argument("--retry", action="store_true", help="try again what failed, was skipped or did not fit")
    for internal, kind in (("--stage", str), ("--until", float), ("--again_before", float)):
        parser.add_argument(internal, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    started = time.time()
    if args.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {args.minutes:g}")
    args.shape = args.shape or (["tiny"] if args.device == "cpu" else ["3b", "7b"])
    args.out = args.out or default_folder(args.device)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder, but {args.out} is a file")
    if args.stage:
        stage_main(args)
        return
    file, deadline = args.out / "results.json", started + 60 * args.minutes
    for stage, shape in in_order(args.shape):
        cases = plan(args.device, shape)[stage] if stage in args.only else []
        if args.list:
            records = read(file)["stages"].get(stage, {})
            for case in cases:
                state = records.get(case.name, {}).get("state", "to do")
                print(f"{stage:9} {case.seconds:4.0f} s  {state:12}  {case.name}")
            continue
        run_stage(stage, shape, cases, args, deadline=deadline, again_before=started if args.retry else 0.0)
        records = read(file)["stages"].get(stage, {})
        if shown := {case.name: records[case.name] for case in cases if case.name in records}:
            show(stage, shown)
    if not args.list:
        where = f"{file} and log.txt" if file.exists() else "nothing was begun"
        print(f"\n{where}; {(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    sys.exit(run_command(main))
