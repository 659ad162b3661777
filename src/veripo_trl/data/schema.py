"""What a row is, and the error of one that is none.

A row is one question (see ``COLUMNS``). Everything that can be known to be wrong with a row is said when the data
loads, with the file, the row, the question id and the field; what needs the media files is said by `check_media`.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from veripo_trl.errors import VeripoError
from veripo_trl.files.tables import printable

if TYPE_CHECKING:
    from datasets import Dataset


COLUMNS = (
    "question_id",
    "problem",
    "options",
    "problem_type",
    "solution",
    "process",
    "videos",
    "images",
    "data_source",
    "media_root",
)
QUESTION = ("problem", "options", "problem_type", "solution", "videos", "images")  # what makes two rows one question
_LISTS = ("options", "videos", "images")
REQUIRED = ("question_id", "problem", "problem_type", "solution")
SHOWN = 10  # problems spelled out in one error; the rest are counted


class RowError(VeripoError):
    """Rows that cannot be used. ``problems``: a flat dict each (file, row, question_id, field, expected, came,
    remedy), complete, though the message spells out the first ten only."""

    def __init__(self, message: str, problems: Iterable[dict[str, Any]] = ()):
        super().__init__(printable(message))
        self.problems = list(problems)

    def __reduce__(self):  # loader workers send their errors to the main process by pickle
        return type(self), (str(self), self.problems)


class FieldError(ValueError):
    def __init__(self, field: str, expected: str, came: str, remedy: str = "Correct the record or take it out."):
        super().__init__(field, expected, came, remedy)
        self.problem = {"field": field, "expected": expected, "came": came, "remedy": remedy}

    def __str__(self):
        return "{field}: expected {expected}; came {came}. {remedy}".format(**self.problem)


def rows_to_dataset(rows: list[dict[str, Any]]) -> "Dataset":
    """Checked rows as a dataset of fixed column types, so that any two concatenate."""
    import pyarrow
    from datasets import Dataset, Features, List, Value

    features = Features({c: List(Value("string")) if c in _LISTS else Value("string") for c in COLUMNS})
    # straight to Arrow: Dataset.from_dict encodes value by value, which takes longer than reading the rows did
    table = {column: [row[column] for row in rows] for column in COLUMNS}
    return Dataset(pyarrow.Table.from_pydict(table, schema=features.arrow_schema))


def content_of(row: dict[str, Any]) -> str:
    """16 hex digits over the question itself. Ids are only unique within one load: those of other data may be equal."""
    text = json.dumps([row[name] or None for name in QUESTION], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_id(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, int) and not isinstance(value, bool)


def show(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def line_of(problem: dict[str, Any]) -> str:
    row = "" if problem["row"] is None else f" row {problem['row']}"
    said = "{field}: expected {expected}; came {came}. {remedy}".format(**problem)
    return f"{problem['file']}{row}, question_id {problem['question_id']!r}, {said}"


def row_error(problems: list[dict[str, Any]], what: str = "cannot be used") -> RowError:
    """The error of these rows: the first ten problems spelled out, the rest counted."""
    lines = [f"{len(problems)} row{'s' if len(problems) > 1 else ''} {what}:", *map(line_of, problems[:SHOWN])]
    if len(problems) > SHOWN:
        lines.append(f"… and {len(problems) - SHOWN} more.")
    return RowError("\n  ".join(lines), problems)
