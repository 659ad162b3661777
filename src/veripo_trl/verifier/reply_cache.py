"""Judges' replies on disk, by content: what was asked once is not asked again."""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from veripo_trl.errors import VeripoError


class CacheError(VeripoError):
    """A file that cannot be the cache."""


class VerdictCache:
    """A SQLite file of readable replies. One connection, for the thread that opens it; other processes of this
    machine may use the same file at the same time, so it has to lie on a local disk.

    What is stored is the judge's reply, not the verdict drawn from it: that is drawn anew each time (`settle`), by the
    comparison of the day. Each reply is stored at once, so that a killed run loses none that was put here.
    """

    def __init__(self, path: str | Path):
        """Raises CacheError if `path` is a file of another kind, or cannot be opened and written."""
        self.path = Path(path).expanduser()
        with self._usable("expected a cache of verdicts (SQLite), or no file yet"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(self.path, isolation_level=None, timeout=60)
            # With a write-ahead log a commit is an append; NORMAL leaves out the wait for the disk, which only a power
            # cut could miss.
            self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute("PRAGMA synchronous = NORMAL")
            self.connection.execute(
                "CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, judge TEXT, prompt_version TEXT, reply TEXT) "
                "WITHOUT ROWID"
            )

    @contextlib.contextmanager
    def _usable(self, what: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            remedy = "Make room on its disk" if full else "Name another file, or remove this one"
            raise CacheError(
                f"verdict_cache {self.path}: {what}: {error}. {remedy}, then start the same command again: what the "
                "cache does not hold is asked for."
            ) from error

    @staticmethod
    def key(judge: str, prompt_version: str, text: str) -> bytes:
        """SHA-256 over who judges, by which prompt, what."""
        content = json.dumps([judge, prompt_version, text], ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()

    def get(self, key: bytes) -> dict | None:
        with self._usable("it is damaged"):
            found = self.connection.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
            return None if found is None else json.loads(found[0])

    def put(self, key: bytes, reply: dict, *, judge: str, prompt_version: str) -> None:
        row = (key, judge, prompt_version, json.dumps(reply))
        with self._usable(f"a reply of {len(row[3]):,} bytes cannot be stored"):
            self.connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", row)

    def __len__(self) -> int:
        with self._usable("it is damaged"):
            return self.connection.execute("SELECT COUNT(*) FROM replies").fetchone()[0]

    def close(self) -> None:
        self.connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()
