"""The parent's end of the process that calculates (math_worker.py), and expressions as LaTeX for it."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

MAX_MATH_CHARS = 256
MATH_LIMIT_S = 1.0  # of processor time

FUNCTIONS = "sqrt|sin|cos|tan|cot|log|exp|max|min"
_worker, _worker_lock, _calls = None, threading.Lock(), itertools.count()
_timeouts = 0


def math_timeouts() -> int:
    """How many maths comparisons ran into the one-second limit in this process; each of them counted as wrong."""
    return _timeouts


def _forget_worker() -> None:
    """In a forked process: the worker's pipes are its parent's."""
    global _worker, _worker_lock
    _worker, _worker_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_worker)


def call_math(name: str, *arguments: str, limit_s: float) -> tuple[bool, Any]:
    """(whether it ended within `limit_s` of processor time, its result) of a function of math_worker.py, run in a
    process that is ended at the limit. The first call starts the process, a second or two outside of any limit; from
    any thread, one call at a time. Raises RuntimeError where the process cannot start."""
    global _worker
    with _worker_lock:
        for attempt in range(2):  # what else ends a process (the kernel, for memory) may be no fault of the call
            if _worker is None:
                script = [sys.executable, str(Path(__file__).with_name("math_worker.py"))]
                _worker = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            call = next(_calls)
            try:
                _worker.stdin.write(json.dumps([call, name, arguments, limit_s]).encode() + b"\n")
                _worker.stdin.flush()
                for reply in _worker.stdout:
                    number, result = json.loads(reply)
                    if number == call:  # any other is of a call that was broken off here (Ctrl-C)
                        return True, result
                    if number is None and (result == signal.SIGPROF or attempt):
                        return False, None
                    if number is None:
                        break
            except BrokenPipeError:
                pass
            worker, _worker = _worker, None
            with contextlib.suppress(BrokenPipeError), worker:  # closes its pipes and waits
                worker.kill()
    raise RuntimeError("The process that compares maths ended twice without an answer; what it said stands above.")


def calculate(name: str, *texts: str) -> Any:
    """The call's result, or None after MATH_LIMIT_S, which is counted."""
    global _timeouts
    ended, result = call_math(name, *texts, limit_s=MATH_LIMIT_S)
    _timeouts += not ended
    return result


def to_latex(text: str) -> str:
    text = re.sub(r"\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(rf"(?<![\\a-zA-Z])({FUNCTIONS}|ln)\b", r"\\\1", text)
    text = re.sub(r"√\s*\(?(\w+)\)?", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\a-zA-Z])pi\b|π", r"\\pi ", text).replace("×", r"\times ").replace("·", r"\cdot ")
    text = re.sub(r"(?<!\\)%", r"\\%", text.replace("**", "^").replace("*", r"\cdot "))
    return re.sub(r"\^(-?\d{2,}|-\d)", r"^{\1}", text)


def math_value(text: str) -> float | None:
    return calculate("value", f"${to_latex(text.strip())}$") if len(text) <= MAX_MATH_CHARS else None
