"""Files of rows: JSON, JSONL and Parquet, and folders of them, as lists of (file, row number counted from 1, raw row).

What cannot be read is a RowError, or a FileError where the file is damaged.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from veripo_trl.data.schema import RowError, show
from veripo_trl.files.disk import read_parquet, readable

SUFFIXES = (".parquet", ".jsonl", ".json")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # JSON and JSONL may be


def uncompressed(path: str | Path) -> Path:
    """The name that a file would have without its compression."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in COMPRESSED else path


def is_data_file(path: str | Path) -> bool:
    """Whether rows are read from files of such a name."""
    return Path(path).suffix in SUFFIXES or uncompressed(path).suffix in (".jsonl", ".json")


def read_directory(directory: Path, split: str) -> list[tuple[str, int, Any]]:
    if (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file():
        from datasets import DatasetDict, load_from_disk

        with readable(directory, "dataset saved by `datasets`"):
            saved = load_from_disk(str(directory))
            splits = saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
            if split not in splits:
                raise RowError(f"{directory}: no split {split!r}; it has {', '.join(splits)}.")
            table = splits[split].with_format("arrow")[:]
            table.validate(full=True)  # a damaged offset would point outside of the file
        return numbered(str(directory), table.to_pylist())
    folders = [folder for folder in (directory, directory / "data") if folder.is_dir()]
    files = sorted(file for folder in folders for file in folder.iterdir() if is_data_file(file))
    chosen = [file for file in files if uncompressed(file).stem == split or file.name.startswith(split + "-")]
    if not chosen and split == "train" and len(files) == 1:
        chosen = files
    if len({uncompressed(file).suffix for file in chosen}) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise RowError(
            f"{directory}: expected files of one kind named {split}.* or {split}-*; data files here: {names}."
        )
    return [record for file in chosen for record in read_file(file)]


def read_file(file: Path) -> list[tuple[str, int, Any]]:
    if not file.is_file():
        raise RowError(f"{file}: no such file. Check `path` (working directory: {os.getcwd()}).")
    if not is_data_file(file):
        raise RowError(f"{file}: expected a {', '.join(SUFFIXES)} file (JSON also as {' or '.join(COMPRESSED)}).")
    if file.suffix == ".parquet":
        return numbered(str(file), read_parquet(file).to_pylist())
    if uncompressed(file).suffix == ".jsonl":
        lines = [line for line in numbered(str(file), _content(file).splitlines()) if line[2].strip()]
        rows = [(name, number, _parse(line, file, number)) for name, number, line in lines] or numbered(str(file), [])
        if len(rows) == 1 and isinstance(rows[0][2], list):
            raise RowError(f"{file}: expected a row a line, came one list of rows. That is a .json file: rename it.")
        return rows
    content = read_json(file)
    if not isinstance(content, list):
        raise RowError(f"{file}: expected a JSON list of rows, came {show(content)}. One row a line is .jsonl.")
    return numbered(str(file), content)


def read_json(file: Path) -> Any:
    """What a JSON file holds. Raises RowError with the line."""
    return _parse(_content(file), file, 1)


def _content(file: Path) -> bytes:
    import pyarrow

    with readable(file, "file"):
        return pyarrow.input_stream(str(file), compression=COMPRESSED.get(file.suffix)).read()


def _parse(content: bytes, file: Path, line: int) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        line, reason = line + error.lineno - 1, f"not JSON: {error.msg}."
    except UnicodeDecodeError as error:
        line, reason = line + content.count(b"\n", 0, error.start), f"not UTF-8 text: {error}."
    except (RecursionError, ValueError):
        reason = "from there on it has a number of over 4,300 digits, or a value nested hundreds deep. Remove it."
    raise RowError(f"{file}, line {line}: {reason}")


def numbered(file: str, rows: Iterable) -> list[tuple[str, int, Any]]:
    """Rows with their file and number. Raises RowError where there are none."""
    records = [(file, number, row) for number, row in enumerate(rows, start=1)]
    if not records:
        raise RowError(f"{file}: no rows in it.")
    return records
