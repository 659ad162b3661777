"""Files that are written whole or not at all, and read as they were written."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from veripo_trl.errors import VeripoError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, a user, a file


class FileError(VeripoError):
    """A file that is damaged, or that its disk has no room for: which one, and what to do."""


@contextlib.contextmanager
def room_for(path: str | Path, size: int) -> Iterator[None]:
    """Around the writing of `size` bytes.

    Raises:
        FileError: there is no room for them.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        folder = Path(path).absolute().parent
        raise FileError(
            f"{folder}: {os.strerror(error.errno)}: {Path(path).name} needs {size:,} bytes, free there are "
            f"{shutil.disk_usage(folder).free:,}. Make room, then start the same command again: it goes on."
        ) from error


def write_whole(path: str | Path, content) -> None:
    """Write bytes (or a buffer of them) as a file, whole or not at all, and have them on the disk itself."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with room_for(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def read_json(path: str | Path, *, remedy: str) -> dict:
    """A file's JSON object.

    Raises:
        FileError: it holds something else; with the `remedy`.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"came {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: expected a JSON object: {error}. {remedy}") from error
    return content


def write_parquet(table, path: str | Path) -> None:
    """Write an Arrow table, with a checksum for each of its pages."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    write_whole(path, sink.getvalue())


@contextlib.contextmanager
def readable(path: str | Path, kind: str) -> Iterator[None]:
    """Around the reading of a file by a library.

    Raises:
        FileError: it is not a file of this kind, or not what was written.
    """
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0].rstrip('.')}"
        raise FileError(
            f"{path}: not a readable {kind} ({reason}). Copy it again, or remove it and start what wrote it."
        ) from error


@contextlib.contextmanager
def open_parquet(path: str | Path) -> Iterator:
    """A `pyarrow.parquet.ParquetFile` that verifies what checksums there are, for as long as it is read.

    Raises:
        FileError: it is not what was written.
    """
    import pyarrow.parquet as pq

    # ParquetFile, which reads no partitions out of folders' names
    with readable(path, "Parquet file"), pq.ParquetFile(path, page_checksum_verification=True) as file:
        # Checksums are of pages; in what is around them a wrong count would go unnoticed.
        rows = sum(file.metadata.row_group(number).num_rows for number in range(file.num_row_groups))
        if rows != file.metadata.num_rows:
            raise ValueError(f"{rows} rows in its parts, {file.metadata.num_rows} in all")
        yield file


def read_parquet(path: str | Path, columns: list[str] | None = None):
    """All of a file, or these columns, as an Arrow table. Raises as `open_parquet`, and where a column is missing."""
    with open_parquet(path) as file:
        table = file.read(columns=columns)
        table.validate(full=True)  # UTF-8, which reading does not look at
        if missing := sorted(set(columns or ()) - set(table.column_names)):
            has = ", ".join(file.schema_arrow.names)
            raise FileError(f"{path}: no column {', '.join(missing)}; it has {has}. Move it away, or remove it.")
    return table
