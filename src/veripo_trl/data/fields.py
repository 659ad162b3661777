"""One row: raw columns in, a checked row out; FieldError on the first thing wrong."""

import os
import re
from typing import Any

from veripo_trl.answers.score import PROBLEM_TYPES, SolutionError, check_solution
from veripo_trl.data.files import uncompressed
from veripo_trl.data.media_paths import URL, check_path
from veripo_trl.data.schema import FieldError, show

_TAG = re.compile(r"</?(?:think|answer)>")


def checked_row(record: Any, question_id: str | None, id_column: str, *, file: str, allow_urls: bool) -> dict:
    if not isinstance(record, dict):
        raise FieldError("(row)", "an object with the row's columns", show(record), "Correct or remove it.")
    if question_id is None:
        came = show(record.get(id_column))
        raise FieldError(id_column, "a non-empty string or a whole number", came, "Give the row an id.")
    row = {
        "question_id": _encodable(question_id, id_column),
        "problem": _text(record, "problem"),
        "options": _options(record.get("options")),
        "problem_type": _text(record, "problem_type"),
        "solution": _solution(record.get("solution")),
        "process": _process(record.get("process")),
        "videos": _media(record, "videos", allow_urls),
        "images": _media(record, "images", allow_urls),
        "data_source": uncompressed(file).stem if record.get("data_source") is None else _text(record, "data_source"),
    }
    if row["problem_type"] not in PROBLEM_TYPES:
        known = "one of " + ", ".join(PROBLEM_TYPES)
        raise FieldError("problem_type", known, show(row["problem_type"]), "Correct it or leave the rows out.")
    try:
        check_solution(problem_type=row["problem_type"], solution=row["solution"], options=row["options"])
    except SolutionError as error:
        came = f"{show(row['solution'])} ({error})"
        remedy = "Correct the solution, its options or its problem_type, or remove the row."
        raise FieldError("solution", "a solution that answers can be compared with", came, remedy) from error
    return row


def _text(record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        came = show(value) if field in record else "no such column"
        raise FieldError(field, "a non-empty string", came, f"Write the row's {field} or remove the row.")
    return _encodable(value, field)


def _encodable(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FieldError(field, "Unicode text", f"half a surrogate pair: {error}", "Correct the text.") from error
    return text


def _solution(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    text = _text({"solution": value}, "solution").strip()
    if _TAG.search(text):
        raise FieldError("solution", "the bare answer", show(text), "Write the answer without think or answer tags.")
    return text


def _process(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    text = _text({"process": value}, "process")
    for tag in ("think", "answer"):  # whether there may be any is the template's to say
        if text.count(f"<{tag}>") != text.count(f"</{tag}>"):
            remedy = "Close its tags; thinking needs none, the prompt template puts them."
            raise FieldError("process", f"<{tag}> and </{tag}> in pairs, or none", show(text), remedy)
    return text


def _options(value: Any) -> list[str]:
    """["A. red", …] from a list of such strings, None (no options) or {"A": "red", …}; nothing else is guessed."""
    if value is None:
        return []
    if isinstance(value, dict):  # Arrow gives a struct's missing keys the value None
        texts = {key: text for key, text in value.items() if text is not None}
        if all(re.fullmatch("[A-Z]", key) and isinstance(text, str) and text.strip() for key, text in texts.items()):
            return [f"{key}. {_encodable(text, 'options')}" for key, text in sorted(texts.items())]
    elif isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value):
        return [_encodable(text, "options") for text in value]
    raise FieldError("options", "a list like ['A. red', …] or {'A': 'red', …}", show(value), "Write it so.")


def _media(record: dict[str, Any], field: str, allow_urls: bool) -> list[str]:
    paths = record.get(field)
    if paths is None:
        return []
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise FieldError(field, "a list of paths", show(paths), f'Write {field}: ["clips/1.mp4"], or [] for none.')
    for path in paths:
        check_path(_encodable(path, field), field, allow_urls)
    return [path if URL.match(path) else os.path.normpath(path) for path in paths]
