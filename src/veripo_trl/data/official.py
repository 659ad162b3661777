"""Official files of public data sets: their records, and the rows that a source makes of them."""

import importlib
import os
import sys
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from veripo_trl.data.files import (
    SUFFIXES,
    is_data_file,
    numbered,
    read_file,
    read_json,
    uncompressed,
)
from veripo_trl.data.schema import FieldError, RowError, row_error, show
from veripo_trl.files.tables import print_table
from veripo_trl.user_functions import is_user_function, user_function


def find_source(name: str) -> ModuleType:
    """The module of a source: one of `sources/` by its name, or that of a `module:function` of the user's own."""
    if is_user_function(name):
        return sys.modules[user_function(name, setting="source").__module__]
    known = sorted(Path(file.name).stem for file in (files("veripo_trl") / "sources").iterdir())
    known = [stem for stem in known if stem not in ("__init__", "record", "__pycache__")]
    if name not in known:
        raise RowError(f"source {name!r}: expected module:function, or one of {', '.join(known)}.")
    return importlib.import_module(f"veripo_trl.sources.{name}")


def read_official(path: Path, source: str) -> list[tuple[str, int, Any]]:
    """(file, number from 1, record) of an official file, also a .txt, or of each data file in a folder."""
    found = (
        sorted(file for file in path.rglob("*") if is_data_file(file)) if path.is_dir() else [path]
    )
    if not found or not found[0].is_file():
        raise RowError(
            f"{path}: expected a {', '.join(SUFFIXES)} or .txt file, or a folder with some."
        )
    return [record for file in found for record in _records(file, find_source(source))]


def _records(file: Path, module: ModuleType) -> list[tuple[str, int, Any]]:
    if file.suffix == ".txt":
        try:
            content = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise RowError(f"{file}: not UTF-8 text: {error}.") from error
        return unnested([line for line in content if line.strip()], str(file), module)
    if uncompressed(file).suffix == ".json":
        return unnested(read_json(file), str(file), module)
    records = read_file(file)
    nested = hasattr(module, "records")  # else the numbers stay those of the file's lines
    return unnested([record for *_, record in records], str(file), module) if nested else records


def unnested(content: Any, file: str, module: ModuleType) -> list[tuple[str, int, Any]]:
    """(file, number from 1, record) of what a file or a dataset of the Hub holds, as the source's `records` takes it
    apart; without it a list stays one, and a dict is its values."""
    try:
        if (nested := getattr(module, "records", None)) is not None:
            content = nested(content, file=file)
        elif isinstance(content, dict):
            content = list(content.values())
    except FieldError as error:
        problem = {"file": file, "row": None, "question_id": None, **error.problem}
        raise row_error([problem]) from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RowError(
            f"{file}: not in the official form of {module.__name__} ({reason})."
        ) from error
    if not isinstance(content, list):
        raise RowError(f"{file}: expected the records of {module.__name__}, came {show(content)}.")
    return numbered(file, content)


def make_rows(records: Iterable[tuple[str, int, Any]], source: str) -> tuple[list[tuple], Counter]:
    """The rows of official records.

    Returns:
        (file, number of the record, raw id, row or the FieldError of a record that breaks the official format) of
        each; and what the source counts: why rows were left out, what was changed in them.
    """
    module = find_source(source)
    id_column = getattr(module, "ID", "question_id")
    own = is_user_function(source)
    convert = user_function(source, setting="source") if own else module.convert
    label = {"data_source": module.NAME} if hasattr(module, "NAME") else {}
    rows, counted = [], Counter()
    for file, number, record in records:
        try:
            if not isinstance(record, dict):
                expected, remedy = "an object with the row's columns", "Correct or remove it."
                raise FieldError("(row)", expected, show(record), remedy)
            made = convert(record, file=file)
            if isinstance(made, (dict, str)):
                raise TypeError(f"{source} gave {show(made)}, not a list of rows")
            made = list(made)
        except FieldError as error:
            made = [error]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            field = str(error.args[0]) if isinstance(error, KeyError) else "(row)"
            came = f"{type(error).__name__}: {error}"
            expected = f"the official columns of {getattr(module, 'NAME', source)}"
            remedy = f"Its columns: {', '.join(map(str, record))}."
            made = [FieldError(field, expected, came, remedy)]
        for row in made:
            if isinstance(row, str):
                counted[row] += 1
            elif isinstance(row, dict):
                rows.append((file, number, row.get("question_id"), {**label, **row}))
            else:
                raw_id = record.get(id_column) if isinstance(record, dict) else None
                rows.append((file, number, raw_id, row))
    return rows, counted


def print_counts(path: str, source: str, rows: list[tuple], counted: Counter) -> None:
    """One short table of what a source did, by the first process."""
    if counted and int(os.environ.get("RANK", "0")) == 0:
        lines = [("rows", len(rows)), *sorted(counted.items())]
        print_table(
            f"{path}, source {source}", [{"what": what, "count": count} for what, count in lines]
        )
