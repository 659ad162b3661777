"""The base of our errors. A command ends in the message of one, without lines of code."""

import contextlib
import gc
import io
import multiprocessing
import os
import re
import signal
import sys
import traceback

_NO_ROOM_SAID = re.compile(
    r"No space left on device|File too large|Disk quota exceeded|StreamWriter failed writing|enforce fail at inline_cont"
)


class VeripoError(Exception):
    """Says what was expected, what came and what to do."""

    def __init__(self, message: object = ""):
        # torch makes the error of a loader's worker again from its type and one text, which begins with a traceback
        text = str(message).rpartition(f"\n{type(self).__module__}.{type(self).__qualname__}: ")[2]
        super().__init__(text.rstrip("\n"))


class ConfigError(VeripoError, ValueError):
    """A setting that cannot be used."""


class SolutionError(VeripoError):
    """A row's ground truth cannot be compared with any answer."""


@contextlib.contextmanager
def settings_checked():
    """While a run is set up, what a library refuses is a setting: its message becomes a ConfigError."""
    try:
        yield
    except VeripoError:
        raise
    except (ValueError, ImportError, OSError) as error:
        raise ConfigError(error) from error


def no_room(error: BaseException) -> str | None:
    """What to do, if a library found no room for what it wrote: torch and safetensors say so in their texts alone."""
    cause = error
    while cause is not None and not _NO_ROOM_SAID.search(str(cause)):
        cause = cause.__cause__ or cause.__context__
    return cause and (
        f"No room on the disk: {str(cause).strip().partition(chr(10))[0]}. Make room where this run writes, then start "
        f"the same command again: it goes on."
    )


def print_under_any_locale() -> None:
    """Under one without UTF-8 a print of "→" would end a command: such characters are escaped, as stderr does."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def first_failure(message: str) -> str:
    """Why the processes of a run end: the message of the one that failed first, which this one is unless another was.

    What a process meets when another is gone, a closed connection in the midst of a collective, says nothing of why.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return message
    rank, key = f"process {distributed.get_rank()}", "veripo_trl/failed"
    try:
        store = distributed.distributed_c10d._get_default_store()
        first = store.compare_set(key, "", f"{rank}: {message}").decode()
    except RuntimeError:  # the process that holds the store was the one
        return message
    own = first == f"{rank}: {message}"
    return message if own else f"{rank} ends, for another one failed. {first}"


def end_workers() -> None:
    """Of loaders that are left: an error's frames hold them, or a trainer does. Python's end would wait for them, for
    ever: they outlive the one SIGTERM that it sends."""
    if workers := [child for child in multiprocessing.active_children() if child.daemon]:
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a worker is killed
        for worker in workers:
            worker.kill()
            worker.join()
        gc.collect()
        signal.signal(signal.SIGCHLD, before)


def run(main) -> int | None:
    """A script's `main`, as a command: an error that says what to do ends it in that message, without lines of code."""
    print_under_any_locale()
    try:
        return main()
    except VeripoError as error:
        print(first_failure(f"{type(error).__name__}: {error}"), file=sys.stderr, flush=True)
        return 1
    except Exception as error:  # a full disk that a library found, or what nobody foresaw
        print(first_failure(no_room(error) or traceback.format_exc()), file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", "0")) == 0:
            print("\ninterrupted: the same command goes on, from the last checkpoint if there is one", file=sys.stderr)
        return 130
    finally:
        end_workers()
