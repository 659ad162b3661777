"""A run's folder: its lock, what says that it is finished, and which of its checkpoints is whole."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Iterable
from pathlib import Path

from veripo_trl.errors import ConfigError, VeripoError
from veripo_trl.files.tables import write_json

RESULTS = "results.json"  # written last: a run that has it is finished
TRAINED = "_trained.json"  # its content, before the push
STATE = "trainer_state.json"  # transformers writes it last of a checkpoint
RECORD = "run"  # what `trainers.checkpoints` puts into that file, among the states of callbacks


def _lock_file(folder: str | Path) -> Path:
    """Beside the folder: a finished run's is moved aside."""
    folder = Path(folder).absolute()
    return folder.with_name(f".{folder.name}.lock")


def process_name() -> str:
    """This process as other nodes may speak of it, which see the same disk."""
    return f"{os.getpid()} on {socket.gethostname()}"


@contextlib.contextmanager
def only_process(folder: str | Path):
    """Hold a run's folder (or an output file) alone; of several processes of one run, the first holds it for all.

    A POSIX lock rather than flock: forked loader workers do not inherit it, so that a killed run can be started again
    at once. The lock's file names the process, and stays.

    Raises:
        VeripoError: another process holds it.
    """
    if int(os.environ.get("RANK", "0")):
        yield
        return
    path = _lock_file(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+")  # noqa: SIM115  closed below
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}. Choose another output.") from error
    with handle as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(f"{folder} cannot be locked ({error}): choose an output on another disk.") from error
            file.seek(0)
            raise VeripoError(
                f"{folder}: process {file.read() or 'of another start'} is at work on it. Wait until it ends, "
                f"end it, or choose another output."
            ) from None
        file.truncate(0)
        file.write(process_name())
        file.flush()
        yield


def holder(folder: str | Path) -> str | None:
    """The `process_name` of who holds a folder by `only_process`, if one does; never to be asked by that one itself."""
    try:
        with open(_lock_file(folder), "r+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return file.read() or None
    except FileNotFoundError:
        pass
    return None


def held_by(folder: str | Path, name: str) -> bool:
    """Whether `only_process` of the process of that name wrote the folder's lock file that is seen from here. Never to be
    asked by that process itself: closing the file would end its lock."""
    try:
        return _lock_file(folder).read_text(encoding="utf-8") == name
    except OSError:
        return False


def outlive_sigterm(worker_id: int, then=None) -> None:
    """`worker_init_fn` of loaders: a scheduler signals workers too, and their batches are needed until a step is done.

    Only the first is ignored: the loader's own, where it has to end a worker by force, comes twice.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if then is not None:
        then(worker_id)


def changed_keys(before: dict, now: dict) -> str:
    """For people: the settings that are not what they were."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key}: {before.get(key)!r} → {now.get(key)!r}" for key in keys)


def sync_folder(folder: str | Path) -> None:
    """Have the disk hold everything in a folder."""
    for path in [Path(folder), *Path(folder).rglob("*")]:
        with contextlib.suppress(FileNotFoundError):  # another process's temporary file
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def write_results(folder: Path, results: dict, name: str = RESULTS) -> None:
    """Say that a run is finished, once all that it wrote is on the disk."""
    sync_folder(folder)
    write_json(folder / name, results)


def move_aside(folder: Path) -> Path:
    """Move a run's folder to `<folder>.previous-<n>`, which is returned."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.previous-{number}")).exists():
        number += 1
    return folder.rename(aside)


def refuse_own_input(output: str | Path, inputs: Iterable[str]) -> None:
    """Raise a ConfigError where what is read lies where will be written: it would be written over, or moved aside."""
    for name in inputs:
        if Path(name).exists() and Path(name).resolve().is_relative_to(Path(output).resolve()):
            raise ConfigError(
                f"{output}: expected an output apart from what is read; came one that holds {name}, which would be "
                f"written over or moved aside. Choose another output."
            )


def move_finished_aside(folder: Path) -> None:
    """Move a finished run's folder aside; leave any other as it is."""
    if (folder / RESULTS).exists():
        print(f"{folder} holds a finished run: moved to {move_aside(folder)}", flush=True)


def last_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint of an unfinished run. Later ones are put out of the way, saying so.

    What a run left that was killed while it wrote is removed; a checkpoint that lost files since is kept, renamed.
    """
    steps = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if re.search(r"-\d+$", path.name)}
    for _, checkpoint in sorted(steps.items(), reverse=True):
        try:
            state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            print(f"{checkpoint} was broken off while it was written: removed", flush=True)
            shutil.rmtree(checkpoint)
            continue
        files = state.get("stateful_callbacks", {}).get(RECORD, {}).get("files")
        if files is None:
            reason = "it says not of which files it consists (written with save_only_model, or by another version)"
        elif wrong := [name for name, size in files.items() if _size(checkpoint / name) != size]:
            reason = f"{', '.join(wrong)} missing, or not of the size that was written"
        else:
            return str(checkpoint)
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        print(f"{checkpoint} cannot be continued: {reason}. It is {aside.name} now; the one before is taken", flush=True)
    return None


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
