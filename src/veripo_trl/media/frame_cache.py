"""Decoded frames on disk, the oldest evicted: one file per clip and sampling, no pickle, for any number of processes.

A file is a line with the CRC-32 of all that follows, a line of JSON and the raw uint8 frames.
Files are written under another name and renamed, so that a reader sees a whole entry or none.
"""

import contextlib
import hashlib
import json
import os
import time
import uuid
import warnings
import zlib
from pathlib import Path

import numpy as np

VERSION = "VTFRAME2"  # of the files' form, part of their names
ABANDONED_S = 3600.0
# A scan lists the whole cache, so it is done once per this share of the limit.
SCANS_PER_LIMIT = 256


def cache_key(*parts) -> str:
    """Name of an entry: a hash of everything its frames depend on (values that JSON can hold)."""
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()


class FrameCache:
    """Frames by key, in a directory of at most `max_bytes`.

    The least recently used go first. One process keeps the limit; of several, each may run over it by
    `max_bytes` / 256 between two of its scans. A full or read-only disk is warned of once and ends the writing.
    """

    def __init__(self, directory, *, max_bytes: int):
        self.directory = Path(directory)
        self.max_bytes = max_bytes
        self._allowance = 0  # bytes that may be written before the next scan
        self._writable = True

    def path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.frames"

    def get(self, key: str) -> tuple[np.ndarray, dict] | None:
        """Frames uint8 (T, H, W, 3) and their metadata, or None if absent; a damaged entry is removed."""
        path = self.path(key)
        try:
            with open(path, "rb") as file:
                checksum, header = file.readline(), file.readline()
                try:
                    frames = np.fromfile(file, np.uint8)
                except ValueError:  # shorter by now than what was read of it
                    frames = np.empty(0, np.uint8)
        except OSError:  # absent, or removed by another process just now
            return None
        if checksum != checksum_line(header, frames.data):
            with contextlib.suppress(OSError):  # as below
                path.unlink()
            return None
        # The time of the last use, which eviction goes by: atime is often not kept.
        with contextlib.suppress(OSError):  # removed meanwhile, or a cache that others own
            os.utime(path)
        metadata = json.loads(header)
        return frames.reshape(metadata.pop("shape")), metadata

    def put(self, key: str, frames: np.ndarray, metadata: dict):
        header = json.dumps({**metadata, "shape": frames.shape}).encode() + b"\n"
        data = np.ascontiguousarray(frames).reshape(-1).data
        checksum = checksum_line(header, data)
        size = len(checksum) + len(header) + len(data)
        if not self._writable or size > self.max_bytes:
            return
        path = self.path(key)
        # open() gives it the mode of other files, mkstemp would give it to the owner alone
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            self._make_room(size)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                file.writelines((checksum, header, data))
            os.replace(temporary, path)
        except OSError as error:
            self._writable = False
            with contextlib.suppress(OSError):  # absent; a read-only disk says that it is one, whether it is there or not
                temporary.unlink()
            warnings.warn(
                f"frame cache {self.directory}: {error}; this process goes on without writing to it",
                stacklevel=3,
            )

    def _make_room(self, size):
        step = self.max_bytes // SCANS_PER_LIMIT
        if size > self._allowance:
            evict(self.directory, max_bytes=max(self.max_bytes - max(size, step), 0))
            self._allowance = max(size, step)
        self._allowance -= size


def checksum_line(header: bytes, data) -> bytes:
    return b"%08x\n" % zlib.crc32(data, zlib.crc32(header))


def evict(directory: Path, *, max_bytes: int):
    """Remove the least recently used entries until the rest fits, and what killed processes left half-written."""
    entries, now = [], time.time()
    for path in directory.glob("??/*"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another process evicts too
            continue
        if path.suffix == ".frames":
            entries.append((status.st_mtime_ns, status.st_size, path))
        elif path.suffix == ".tmp" and now - status.st_mtime > ABANDONED_S:
            path.unlink(missing_ok=True)
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= max_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size
