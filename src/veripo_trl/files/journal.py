"""A file of JSON lines that grows while a run works, and from which a killed run goes on."""

import json
import os
from pathlib import Path
from typing import Any

from veripo_trl.errors import VeripoError
from veripo_trl.files.disk import room_for
from veripo_trl.files.run_folder import changed_keys


class JournalError(VeripoError):
    """A journal of another run, or one that is damaged."""


class Journal:
    """What is done so far, a line each; every append is on the disk itself when it returns.

    Args:
        header: what the lines depend on, JSON; the first line. A journal with lines under another header is refused.
        key: the field that names a line. repair: cut off a last line that was not written to its end; for the one
            process that owns the journal.

    Attributes:
        lines: {key: line}; of two lines of one key the later counts.
    """

    def __init__(self, path: str | Path, header: dict[str, Any], *, key: str = "key", repair: bool = True):
        self.path, self.key, self.lines, self._read_to = Path(path), key, {}, 0
        header = {"journal": 1, **json.loads(json.dumps(header))}
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        found = _parse(whole.partition(b"\n")[0]) if whole else header
        if found.get("journal") != 1:
            raise JournalError(f"{path}: not a journal, or a damaged one. Choose another output, or remove it.")
        begun_anew = found != header and whole.count(b"\n") == 1 and repair  # nothing was done with the other settings
        if found != header and not begun_anew:
            raise JournalError(
                f"{path} is of a run with other settings or rows ({changed_keys(found, header)}). Go on with the old "
                f"ones, choose another output, or remove the journal."
            )
        whole = b"" if begun_anew else whole
        if whole != content and repair:
            os.truncate(path, len(whole))
        if not whole:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(json.dumps(header) + "\n")
        self.read()

    def read(self) -> None:
        """Take in what was written since the last look, by this process or by others."""
        with open(self.path, "rb") as file:
            file.seek(self._read_to)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read_to += len(whole)
        lines = map(_parse, whole.splitlines())
        self.lines |= {line[self.key]: line for line in lines if isinstance(line.get(self.key), str)}

    def append(self, lines: list[dict]) -> None:
        self.lines |= {line[self.key]: line for line in lines if self.key in line}
        self._write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def _write(self, text: str) -> None:
        # One write in append mode: lines of several processes do not mix.
        rest = memoryview(text.encode())
        with room_for(self.path, len(rest)), open(self.path, "ab", buffering=0) as file:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())


def _parse(line: bytes) -> dict:
    """A line; {} for one that is damaged, or that a killed process did not finish: what it said is done again."""
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
