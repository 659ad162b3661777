"""The state of a run on the disk: `run.json`, what stages have left, what a killed loop left running."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from veripo_trl.files.disk import read_json
from veripo_trl.files.run_folder import RESULTS, move_aside, only_process
from veripo_trl.files.tables import write_json
from veripo_trl.loop.plan import LoopError

MARKER = "VERIPO_RUN"  # in the environment of every process that a run starts


class Run:
    """`run.json`. stages: {name: what one read, wrote and took}; redone_from: the stage of a `--from` under way."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "run.json"
        remedy = "Take it from a copy. Without one, choose another output_dir; the folders of its stages are whole."
        content = read_json(self.file, remedy=remedy) if self.file.exists() else {"stages": []}
        self.stages = {entry["name"]: entry for entry in content["stages"]}
        self.redone_from: str | None = content.get("redone_from")

    @property
    def skipped(self) -> set[str]:
        return {name for name, entry in self.stages.items() if entry["status"] == "skipped"}

    def put(self, entry: dict) -> dict:
        """Note where a stage is; that it is finished, with a time that tells one finish from another."""
        if entry["status"] in ("done", "skipped"):
            entry["finished"] = f"{time.strftime('%Y-%m-%d %H:%M:%S')}.{time.time_ns() % 10**9:09d}"
        self.stages[entry["name"]] = entry
        self.save()
        return entry

    def save(self) -> None:
        content = {"name": self.folder.name, "stages": list(self.stages.values())}
        write_json(self.file, content | {"redone_from": self.redone_from})

    def forget(self, stages: list[dict]) -> None:
        """Move the folders of stages aside, so that they are done again; nothing is deleted."""
        for stage in stages:
            self.stages.pop(stage["name"], None)
            if (folder := Path(stage["output_dir"])).exists():
                aside = move_aside(folder)
                print(f"{stage['name']}: moved to {aside}, to be done again", flush=True)
        self.redone_from = stages[0]["name"]  # until the run is through: the same command goes on
        self.save()


def read_results(folder: str | Path) -> dict | None:
    """A stage's results.json without its history, or None while it is not finished."""
    file = Path(folder) / RESULTS
    if not file.exists():
        return None
    remedy = "Remove it, and start the same command again: the stage's end is done anew."
    results = read_json(file, remedy=remedy)
    return {key: value for key, value in results.items() if key != "history"}


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the run's folder alone; end what an earlier start of it left running, and what this one would leave."""
    with only_process(folder):
        folder.mkdir(parents=True, exist_ok=True)
        end_leftovers(folder)
        try:
            yield
        finally:
            end_leftovers(folder)


def leftovers(folder: Path) -> list[psutil.Process]:
    """The processes of this run that are alive, but for this one."""
    mark = str(folder.resolve())
    others = [
        process
        for process in psutil.process_iter(["environ", "status"])
        if process.pid != os.getpid()
    ]
    ours = [process for process in others if (process.info["environ"] or {}).get(MARKER) == mark]
    return [process for process in ours if process.info["status"] != psutil.STATUS_ZOMBIE]


def end_leftovers(folder: Path, patience_s: float = 20.0) -> None:
    """End the processes of this run that outlived the loop which started them: two would write to one folder."""
    for end in (psutil.Process.terminate, psutil.Process.kill):
        if not (left := leftovers(folder)):
            return
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(
                f"ending {len(left)} processes that this run left behind: {[p.pid for p in left]}",
                flush=True,
            )
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        # Not `psutil.wait_procs`: where nobody reaps them, what has ended stays as a zombie.
        deadline = time.monotonic() + patience_s
        while leftovers(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
    if left := leftovers(folder):
        raise LoopError(
            f"processes {[p.pid for p in left]} of this run do not end; end them first."
        )
