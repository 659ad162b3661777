"""The loader's end of the decoding process (worker.py): starting it, its time limit, its loss."""

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from veripo_trl.errors import VeripoError
from veripo_trl.files.tables import printable

MAX_REPLY_HEADER_BYTES = 1 << 20
# Starting imports the decoders, which on a cold network disk is slower than any clip.
START_TIMEOUT_S = 120.0
# Without the working directory, which `-m` and `-c` put first: a file av.py there would be run.
COMMAND = "import sys; sys.path = [p for p in sys.path if p]; from veripo_trl.media.worker import run; run()"


class WorkerLost(RuntimeError):
    """The process died in a request; the next request starts another."""


class WorkerHung(WorkerLost):
    """The process did not answer in time; it has been killed, and the next request starts another."""


class DecoderError(VeripoError):
    """The process cannot be started: no row is to blame."""


class DecodeProcess:
    """The parent's end: starts the process on the first request, and again after a loss.

    Not thread-safe but for `lock`, which its users hold while they ask. Unpickled it is a new one, without a process.
    """

    def __init__(self):
        self._process = self._stderr = None
        self.owner, self.lock = os.getpid(), threading.Lock()

    def __reduce__(self):
        return DecodeProcess, ()

    def start(self):
        """Start the process unless it runs. Raises DecoderError."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._lose()  # died between two requests (out-of-memory killer): no row is to blame
        package_parent = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package_parent, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
        # A file, not a pipe: nobody has to drain it while the frames are read.
        self._stderr = tempfile.TemporaryFile(mode="a+b")  # noqa: SIM115  closed with the process
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env={**os.environ, "PYTHONPATH": path},
            )
            self._exchange(b"", time.monotonic() + START_TIMEOUT_S)
        except (WorkerLost, OSError) as error:
            raise DecoderError(
                f"the process that decodes videos cannot be started ({error}). `{sys.executable} -c 'import av'` must "
                "work here, and memory be left for it."
            ) from None

    def request(self, message: dict, *, deadline: float) -> tuple[dict, np.ndarray | None]:
        """Send one request; returns the reply and, after "decode", its frames. `deadline` is on time.monotonic().

        Raises WorkerLost when the process died, WorkerHung when it did not answer in time.
        """
        timeout_s = max(deadline - time.monotonic(), 0.0)
        return self._exchange(json.dumps({**message, "timeout_s": timeout_s}).encode() + b"\n", deadline)

    def _exchange(self, request, deadline):
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            return self._reply(deadline)
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            if isinstance(error, TimeoutError):
                self._lose()
                raise WorkerHung("did not answer in time and was killed") from None
            raise WorkerLost(f"ended ({self._lose(patience_s=1.0)})") from None

    def _reply(self, deadline):
        (length,) = struct.unpack("<I", self._read(bytearray(4), deadline))
        if length > MAX_REPLY_HEADER_BYTES:
            raise EOFError("unreadable reply")
        reply = json.loads(bytes(self._read(bytearray(length), deadline)))
        if "decoded" in reply:
            print(f"{printable(reply['path'])}: {reply['decoded']} of {reply['of']} frames", file=sys.stderr, flush=True)
            return self._reply(deadline)
        if "shape" not in reply:
            return reply, None
        frames = np.empty(reply["shape"], dtype=np.uint8)
        self._read(frames.reshape(-1).data, deadline)
        return reply, frames

    def _read(self, buffer, deadline):
        """Fill `buffer` from the pipe."""
        view, fd = memoryview(buffer), self._process.stdout.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while len(view):
            if not poll.poll(max(deadline - time.monotonic(), 0.0) * 1000):
                raise TimeoutError
            count = os.readv(fd, [view])
            if count == 0:
                raise EOFError
            view = view[count:]
        return buffer

    def _lose(self, patience_s=0.0):
        """Kill and reap the process; returns how it ended, with the last line it wrote."""
        process, stderr = self._process, self._stderr
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)  # its pipe closes a moment before it is gone
        process.kill()
        code = process.wait()
        stderr.seek(0)
        lines = stderr.read()[-4000:].decode(errors="replace").strip().splitlines()
        self.close()
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return ended + (f": {lines[-1]}" if lines else "")

    def close(self):
        """Stop the process. In a fork of the process that started it, only let go of the pipe."""
        if self._process is None:
            return
        process, self._process = self._process, None
        for stream in (process.stdin, process.stdout, self._stderr):
            try:
                stream.close()  # the worker ends when its stdin does
            except BrokenPipeError:  # an unsent request to a process that is gone
                pass
        if process.returncode is None and process.poll() is None:
            process.kill()
            process.wait()

    def abandon(self):
        """Let go of a process that belongs to the parent of this fork, without stopping it."""
        if self._process is not None:
            self._process.returncode = 0  # not a child of ours: never wait for it, never signal it
        self.close()
