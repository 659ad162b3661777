"""Starts and stops a judge's server for the stages that need it."""

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from veripo_trl.loop.plan import LoopError


@contextlib.contextmanager
def judge_server(stage: dict, log: Path, env: dict) -> Iterator[None]:
    """The server of a stage's `judge_command`, ended after it: so one GPU can hold policy and judge in turn."""
    if stage["judge_command"] is None:
        yield
        return
    health, timeout_s = stage["judge_health"], float(stage["judge_start_timeout_s"])
    if answers(health):
        raise LoopError(
            f"{health} answers before the judge is started: end the server that is there."
        )
    command = [str(part) for part in stage["judge_command"]]
    print(f"judge: {' '.join(command)} (log: {log})", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + timeout_s
        while not answers(health):
            if process.poll() is not None or time.monotonic() > deadline:
                ended = process.returncode is not None
                what = (
                    f"ended ({process.returncode})"
                    if ended
                    else f"did not answer in {timeout_s:.0f} s"
                )
                said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
                raise LoopError("\n".join([f"the judge {what}; {health} was waited for:", *said]))
            time.sleep(0.5)
        print("judge: ready", flush=True)
        yield
    finally:
        # the whole group: an engine may outlive its server, and hold the GPU
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(30)
        print("judge: stopped", flush=True)


def answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
    try:
        with opener.open(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False
