"""The row schema and its readers: JSON, JSONL, Parquet and Hub datasets in; one map-style dataset of checked rows out.

A row is one question (see ``COLUMNS``). Everything that can be known to be wrong with a row is said when the data
loads, with the file, the row, the question id and the field; what needs the media files is said by `check_media`.
"""

import contextlib
import hashlib
import json
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veripo_trl.answers import score as answers
from veripo_trl.errors import VeripoError
from veripo_trl.files.disk import FileError, read_parquet
from veripo_trl.files.tables import printable
from veripo_trl.hub.locate import is_local
from veripo_trl.user_functions import is_user_function, user_function

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

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
SUFFIXES = (".parquet", ".jsonl", ".json")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # JSON and JSONL may be
SHOWN = 10  # problems spelled out in one error; the rest are counted

# Columns that mean media but are not ours. Dropping one with the other unknown columns would train without the video.
_MEDIA_LOOKALIKES = {"video": "videos", "video_path": "videos", "image": "images", "image_path": "images"}
_VIDEO_R1 = {"problem_id", "problem", "data_type", "problem_type", "solution", "path"}
_URL = re.compile(r"[a-z][a-z0-9+.\-]*://|data:", re.IGNORECASE)
_TAG = re.compile(r"</?(?:think|answer)>")
# What JSON allows and Python does not read: numbers of over 4,300 digits, and values nested hundreds deep.
_TOO_MUCH = re.compile(rb"\d{4301,}|(?:[\[{][^\[\]{}]*){500}")


def uncompressed(path: str | Path) -> Path:
    """The name that a file would have without its compression."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in COMPRESSED else path


def is_data_file(path: str | Path) -> bool:
    """Whether rows are read from files of such a name."""
    return Path(path).suffix in SUFFIXES or uncompressed(path).suffix in (".jsonl", ".json")


class RowError(VeripoError):
    """Rows that cannot be used. ``problems``: a flat dict each (file, row, question_id, field, expected, came,
    remedy), complete, though the message spells out the first ten only."""

    def __init__(self, message: str, problems: Iterable[dict[str, Any]] = ()):
        super().__init__(printable(message))
        self.problems = list(problems)

    def __reduce__(self):  # loader workers send their errors to the main process by pickle
        return type(self), (str(self), self.problems)


class _FieldError(ValueError):
    def __init__(self, field: str, expected: str, came: str, remedy: str):
        super().__init__(field, expected, came, remedy)
        self.problem = {"field": field, "expected": expected, "came": came, "remedy": remedy}


@dataclass(frozen=True)
class DatasetSource:
    """One entry of a recipe's ``datasets:``.

    path: a .json (list of objects), .jsonl or .parquet file, also .json.gz, .jsonl.zst and so on; a directory (saved by
        `datasets`, or with files named ``<split>.*`` or ``<split>-*``, also under ``data/``); or a Hub dataset id,
        with `name` (its configuration) and `revision`; or `module:function`, a generator of the user's own, of the
        working directory or an installed package. It is called without arguments and yields a dict a row, with the
        columns of ``COLUMNS`` that a row has (`question_id`, `problem`, `problem_type` and `solution` at least, media as
        paths from `media_root`); the rows are checked as those of a file are, and must be the same, in the same order,
        on every call and in every process.
    where: {raw column: value or list of values}; rows that equal none of the values are left out.
    limit: the first n rows in file order after `where`: the same rows under every seed. A file sorted by source
        gives a one-sided sample, so list such a file once per source, each with its own `limit`.
    media_root: what videos and images are relative to. Default: the data file's directory; a Hub dataset has none.
    id_prefix: put before each question_id, for mixing files that number their rows alike.
    """

    path: str
    split: str = "train"
    where: dict[str, Any] | None = None
    limit: int | None = None
    media_root: str | None = None
    name: str | None = None
    revision: str | None = None
    id_prefix: str = ""

    def __post_init__(self):
        for field, kind in (("path", str), ("split", str), ("where", dict), ("limit", int), ("media_root", str)):
            value = getattr(self, field)
            optional = field not in ("path", "split")
            if not (isinstance(value, kind) and not isinstance(value, bool)) and not (optional and value is None):
                raise RowError(f"dataset source {self.path!r}: `{field}` must be a {kind.__name__}, came {value!r}.")
        if not self.path:
            raise RowError("dataset source: `path` is empty; give a file, a directory or a Hub dataset id.")
        if self.limit is not None and self.limit < 1:
            raise RowError(f"dataset source {self.path!r}: `limit` must be 1 or more, came {self.limit}.")


def load_rows(
    sources: list[dict | DatasetSource],
    *,
    seed: int = 0,
    shuffle: bool = True,
    allow_urls: bool = False,
    manifest: str | None = None,
    unique_ids: bool = True,
) -> "Dataset":
    """Read, check, mix and shuffle rows: a map-style dataset with exactly ``COLUMNS``.

    manifest: written by the check command; rows it marks bad are dropped (before they are checked here, so that a
        malformed row it knows of is no error), rows it does not know are an error.
    unique_ids: False for benchmarks, whose ids repeat; training needs True.
    Raises RowError with every malformed row.
    """
    rows, problems = read_rows(sources, allow_urls=allow_urls, manifest=manifest, unique_ids=unique_ids)
    if problems:
        raise RowError(_message(problems, "cannot be used"), problems)
    if not rows:
        raise RowError(f"no rows left of {[s['path'] for s in map(_source_fields, sources)]}: all were dropped.")
    if shuffle:
        random.Random(seed).shuffle(rows)
    return rows_to_dataset(rows)


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


def read_rows(
    sources: list[dict | DatasetSource],
    *,
    allow_urls: bool = False,
    manifest: str | None = None,
    unique_ids: bool = True,
    other_columns: tuple[str, ...] = (),
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(good rows in file order, problems of the others, one each). For the check command; `load_rows` raises.

    other_columns: columns beside a row's that the caller reads itself."""
    if isinstance(sources, (str, dict)) or not sources:
        raise RowError(f"`datasets` must be a list of at least one {{path: …}}, came {sources!r}.")
    sources = [DatasetSource(**_source_fields(source)) for source in sources]
    verdicts = None if manifest is None else read_manifest(manifest)
    files: dict[tuple, tuple[list, str | None]] = {}  # a recipe may list one large file several times: parse it once
    rows, problems, unknown, dropped = [], [], [], Counter()
    places: dict[str, str] = {}  # of each id so far
    for source in sources:
        key = (source.path, source.name, source.split, source.revision)
        if key not in files:
            files[key] = _read(source)
        records, default_root = files[key]
        root = _media_root(source, default_root)
        records, id_column = _selected(records, source, other_columns)
        for file, number, record in records:
            raw_id = record.get(id_column) if isinstance(record, dict) else None
            question_id = source.id_prefix + str(raw_id) if _is_id(raw_id) else None
            if verdicts is not None and question_id is not None:
                if question_id not in verdicts:
                    unknown.append(question_id)
                    continue
                if reason := verdicts[question_id].get("reason"):
                    dropped[reason] += 1
                    continue
            try:
                row = _row(record, question_id, id_column, file=file, allow_urls=allow_urls)
                if unique_ids and question_id in places:
                    remedy = "Make the ids unique, or give one source an `id_prefix`."
                    raise _FieldError(id_column, "an id used once", f"the id of {places[question_id]} too", remedy)
                if verdicts and verdicts[question_id].get("content", content_of(row)) != content_of(row):
                    remedy = "Run the check command again, on this data."
                    raise _FieldError("(row)", f"the question that {manifest} knows by this id", "another", remedy)
            except _FieldError as error:
                problems.append({"file": file, "row": number, "question_id": question_id, **error.problem})
                continue
            if root is None and (row["videos"] or row["images"]):
                raise RowError(f"{source.path}: its rows have media: give the `media_root` they are in.")
            places[question_id] = f"{file} row {number}"
            rows.append(row | {"media_root": root or ""})
    if verdicts is not None:
        _report_manifest(manifest, unknown, dropped, kept=len(rows) + len(problems))
    return rows, problems


def check_media(dataset: "Dataset", *, allow_urls: bool = False) -> None:
    """Every media file of every row exists, is not empty, and lies in its row's media_root; else one RowError that
    names rows and files. Each file is looked at once. Decodes nothing."""
    columns = ["question_id", "videos", "images", "data_source", "media_root"]
    table = dataset.select_columns(columns).with_format("arrow")[:]  # arrow: a row at a time is ten times slower
    seen: dict[tuple[str, str], dict | None] = {}
    problems = []
    for question_id, videos, images, data_source, root in zip(*(table[c].to_pylist() for c in columns), strict=True):
        for field, paths in (("videos", videos), ("images", images)):
            for path in paths:
                if (root, path) not in seen:
                    seen[root, path] = None
                    try:
                        _resolve(root, path, field, allow_urls)
                    except _FieldError as error:
                        seen[root, path] = error.problem
                if seen[root, path]:
                    problem = {"file": os.path.join(root, path), "row": None, "question_id": question_id}
                    problems.append(problem | seen[root, path] | {"field": field, "data_source": data_source})
    if problems:
        raise RowError(_message(problems, "cannot be used"), problems)


def resolve_media(row: dict[str, Any], *, allow_urls: bool = False) -> tuple[list[str], list[str]]:
    """Absolute paths of the row's (videos, images), symbolic links resolved; allowed URLs pass as they are.
    Raises RowError with the row's id and file if one is missing, empty, or outside of media_root."""
    try:
        videos = [_resolve(row["media_root"], path, "videos", allow_urls) for path in row["videos"]]
        images = [_resolve(row["media_root"], path, "images", allow_urls) for path in row["images"]]
    except _FieldError as error:
        file = row.get("data_source") or "row"
        problem = {"file": file, "row": None, "question_id": row.get("question_id"), **error.problem}
        raise RowError(_line(problem), [problem]) from None
    return videos, images


def read_manifest(path: str) -> dict[str, dict[str, Any]]:
    """{question_id: its line} of a manifest: JSONL, first line {"manifest": 1, …}, then {"question_id", "ok", "reason"
    (of bad rows), "content" (of good ones), …} a row. Of two lines for one id the bad one counts."""
    records = [record for _, _, record in _read_file(Path(path))]
    if not isinstance(records[0], dict) or records[0].get("manifest") != 1:
        raise RowError(
            f'{path}: not a manifest (expected the first line {{"manifest": 1, …}}, came {_show(records[0])}).'
        )
    verdicts: dict[str, dict[str, Any]] = {}
    for number, record in enumerate(records[1:], start=2):
        if not (isinstance(record, dict) and _is_id(record.get("question_id")) and isinstance(record.get("ok"), bool)):
            raise RowError(f"{path}, entry {number}: expected {{question_id, ok, reason}}, came {_show(record)}.")
        question_id = str(record["question_id"])
        if not record["ok"]:
            verdicts[question_id] = {**record, "reason": str(record.get("reason") or "no reason given")}
        else:
            verdicts.setdefault(question_id, {**record, "reason": None})
    return verdicts


def _report_manifest(manifest: str, unknown: list, dropped: Counter, kept: int) -> None:
    if unknown and not kept and not dropped:
        raise RowError(f"{manifest} knows none of the {len(unknown)} rows: it is the manifest of other data.")
    if unknown:
        ids = ", ".join(map(repr, unknown[:5]))
        raise RowError(f"{manifest} does not know {len(unknown)} rows ({ids}, …). Run the check command again.")
    if dropped:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in dropped.most_common(SHOWN))
        logger.warning("%s: kept %d rows, dropped %d (%s)", manifest, kept, dropped.total(), printable(reasons))
    else:
        logger.info("%s: kept all %d rows", manifest, kept)


# ---- reading: a list of (file, row number counted from 1, raw row) ----------------------------------------------


def _source_fields(source: dict | DatasetSource) -> dict[str, Any]:
    if isinstance(source, DatasetSource):
        return asdict(source)
    known = [field.name for field in fields(DatasetSource)]
    if not isinstance(source, dict) or "path" not in source or set(source) - set(known):
        raise RowError(f"dataset source {source!r}: expected `path` and any of {', '.join(known[1:])}, nothing else.")
    return source


def _read(source: DatasetSource) -> tuple[list[tuple[str, int, Any]], str | None]:
    """(records, the directory that media are relative to by default)."""
    path = Path(source.path).expanduser()
    if is_local(source.path):
        own = is_user_function(source.path) and not path.exists()
        if not (own or path.exists() or is_data_file(path)):
            raise RowError(
                f"{source.path}: no such directory, no {'/'.join(SUFFIXES)} file, not module:function, and not a Hub "
                f"dataset id."
            )
        if source.name or source.revision:
            raise RowError(f"{source.path} is local: `name` and `revision` are for Hub datasets; leave them out.")
        if path.is_dir():
            return _read_directory(path, source.split), str(path)
        if source.split != "train":
            raise RowError(
                f"{source.path}: a file has no split {source.split!r}; leave `split` out or name a directory."
            )
        if own:
            records = user_function(source.path, setting="datasets")()
            return [(source.path, number, record) for number, record in enumerate(records, start=1)], None
        return _read_file(path), str(path.parent)

    import datasets

    try:
        dataset = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).rstrip(".")
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            reason += f": {error.__cause__}"
        if "scripts" in reason:
            reason += ". Nothing of it is run: convert it to Parquet, or give a revision that holds Parquet files"
        raise RowError(f"{source.path}: no such directory here, and not read as a Hub dataset: {reason}.") from error
    return _records(source.path, dataset.with_format("arrow")[:]), None


def _read_directory(directory: Path, split: str) -> list[tuple[str, int, Any]]:
    if (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file():
        from datasets import DatasetDict, load_from_disk

        with _named_where_damaged(directory, "dataset saved by `datasets`"):
            saved = load_from_disk(str(directory))
        splits = saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
        if split not in splits:
            raise RowError(f"{directory}: no split {split!r}; it has {', '.join(splits)}.")
        with _named_where_damaged(directory, "dataset saved by `datasets`"):
            table = splits[split].with_format("arrow")[:]
            table.validate(full=True)  # a damaged offset would point outside of the file
        return _records(str(directory), table)
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
    return [record for file in chosen for record in _read_file(file)]


def _read_file(file: Path) -> list[tuple[str, int, Any]]:
    if not file.is_file():
        raise RowError(f"{file}: no such file. Check `path` (working directory: {os.getcwd()}).")
    if not is_data_file(file):
        raise RowError(f"{file}: expected a {', '.join(SUFFIXES)} file (JSON also as {' or '.join(COMPRESSED)}).")
    if file.suffix == ".parquet":
        try:
            return _records(str(file), read_parquet(file))
        except FileError as error:
            raise RowError(str(error)) from error
    if uncompressed(file).suffix == ".jsonl":
        lines = enumerate(_content(file).splitlines(), start=1)
        records = [(str(file), number, _parse(line, file, number)) for number, line in lines if line.strip()]
    else:
        content = read_json(file)
        if not isinstance(content, list):
            raise RowError(f"{file}: expected a JSON list of rows, came {_show(content)}. One row a line is .jsonl.")
        records = [(str(file), number, record) for number, record in enumerate(content, start=1)]
    if not records:
        raise RowError(f"{file}: no rows in it.")
    return records


def read_json(file: Path) -> Any:
    """What a JSON file holds. Raises RowError with the line."""
    return _parse(_content(file), file, 1)


def _content(file: Path) -> bytes:
    import pyarrow

    with _named_where_damaged(file, "file"):
        return pyarrow.input_stream(str(file), compression=COMPRESSED.get(file.suffix)).read()


def _parse(content: bytes, file: Path, line: int) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        line, reason = line + error.lineno - 1, f"not JSON: {error.msg}."
    except UnicodeDecodeError as error:
        line, reason = line + content.count(b"\n", 0, error.start), f"not UTF-8 text: {error}."
    except (RecursionError, ValueError):
        found = _TOO_MUCH.search(content)
        line += content.count(b"\n", 0, found.end() if found else 0)
        reason = "a number of over 4,300 digits, or a value nested hundreds deep. Correct or remove it."
    raise RowError(f"{file}, line {line}: {reason}")


@contextlib.contextmanager
def _named_where_damaged(file: str | Path, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0].rstrip('.')}"
        raise RowError(f"{file}: not a readable {kind} ({reason}). Copy it again, or make it anew.") from error


def _records(file: str, table) -> list[tuple[str, int, Any]]:
    if not table.num_rows:
        raise RowError(f"{file}: no rows in it.")
    return [(file, number, record) for number, record in enumerate(table.to_pylist(), start=1)]


def _media_root(source: DatasetSource, default: str | None) -> str | None:
    if source.media_root is None:
        return default and os.path.abspath(default)
    root = os.path.abspath(os.path.expanduser(source.media_root))
    if not os.path.isdir(root):
        raise RowError(f"{source.path}: media_root {root} is not a directory.")
    return root


def _selected(records: list, source: DatasetSource, other_columns: tuple[str, ...]) -> tuple[list, str]:
    """(records after `where` and `limit`, the column of their ids). Checks the columns of the whole source."""
    columns: dict[str, None] = {}
    for _, _, record in records:
        if isinstance(record, dict):
            columns.update(dict.fromkeys(record))
    where = source.where or {}
    if missing := [column for column in where if column not in columns]:
        raise RowError(f"{source.path}: `where` names {missing}; the columns are {', '.join(columns)}.")
    is_video_r1 = _VIDEO_R1 <= columns.keys() and "question_id" not in columns
    _check_columns(source.path, [c for c in columns if c not in other_columns], is_video_r1)
    for column, wanted in where.items():
        accepted = wanted if isinstance(wanted, list) else [wanted]
        kept = [r for r in records if isinstance(r[2], dict) and r[2].get(column) in accepted]
        if not kept:
            there = Counter(_show(r[2].get(column)) for r in records if isinstance(r[2], dict)).most_common(SHOWN)
            values = ", ".join(value for value, _ in there)
            raise RowError(f"{source.path}: no row has {column} = {wanted!r}; values there: {values}.")
        records = kept
    return records[: source.limit], "problem_id" if is_video_r1 else "question_id"


def _check_columns(path: str, columns: Iterable[str], is_video_r1: bool) -> None:
    if is_video_r1:
        return
    if missing := [column for column in REQUIRED if column not in columns]:
        raise RowError(
            f"{path}: no column {', '.join(missing)}. Expected {', '.join(COLUMNS[:-1])} (or Video-R1's columns "
            f"{', '.join(sorted(_VIDEO_R1))}), came {', '.join(columns)}."
        )
    for column, ours in _MEDIA_LOOKALIKES.items():
        if column in columns and ours not in columns:
            raise RowError(f"{path}: column {column!r} would be ignored; rename it to {ours!r}, a list of paths.")
    if extra := [column for column in columns if column not in COLUMNS[:-1]]:
        logger.warning("%s: columns not in the schema are ignored: %s", path, printable(", ".join(extra)))


# ---- one row: raw columns in, a checked row out; _FieldError on the first thing wrong -----------------------------


def _row(record: Any, question_id: str | None, id_column: str, *, file: str, allow_urls: bool) -> dict:
    if not isinstance(record, dict):
        raise _FieldError("(row)", "an object with the row's columns", _show(record), "Correct or remove it.")
    if question_id is None:
        came = _show(record.get(id_column))
        raise _FieldError(id_column, "a non-empty string or a whole number", came, "Give the row an id.")
    if id_column == "problem_id":
        record = _from_video_r1(record)
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
    if row["problem_type"] not in answers.PROBLEM_TYPES:
        known = "one of " + ", ".join(answers.PROBLEM_TYPES)
        raise _FieldError("problem_type", known, _show(row["problem_type"]), "Correct it or leave the rows out.")
    try:
        answers.check_solution(problem_type=row["problem_type"], solution=row["solution"], options=row["options"])
    except answers.SolutionError as error:
        came = f"{_show(row['solution'])} ({error})"
        remedy = "Correct the solution, its options or its problem_type, or remove the row."
        raise _FieldError("solution", "a solution that answers can be compared with", came, remedy) from error
    return row


def _from_video_r1(record: dict[str, Any]) -> dict[str, Any]:
    """Video-R1's columns as ours. The thinking keeps its white space: process + newline + solution is its target."""
    kind = record.get("data_type")
    if kind not in ("video", "image"):
        raise _FieldError(
            "data_type", "'video' or 'image'", _show(kind), "Correct it or leave the rows out by `where`."
        )
    media = {"videos" if kind == "video" else "images": [_text(record, "path")]}
    common = {field: record.get(field) for field in ("problem", "options", "problem_type")}
    # Rows of one of its sources (ArxivQA) are reported to leave data_source blank; it is a label only.
    common["data_source"] = record.get("data_source") or None
    solution = _untagged(record, "solution", "answer")
    return {**common, "solution": solution, "process": _untagged(record, "process", "think"), **media}


def _untagged(record: dict[str, Any], field: str, tag: str) -> Any:
    value = record.get(field)
    if not isinstance(value, str):
        return value
    match = re.fullmatch(rf"\s*<{tag}>(.*)</{tag}>\s*", value, re.DOTALL)
    return match[1] if match else value  # what still has tags in it is refused as any other text is


def _text(record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        came = _show(value) if field in record else "no such column"
        raise _FieldError(field, "a non-empty string", came, f"Write the row's {field} or remove the row.")
    return _encodable(value, field)


def _encodable(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _FieldError(field, "Unicode text", f"half a surrogate pair: {error}", "Correct the text.") from error
    return text


def _solution(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    text = _text({"solution": value}, "solution").strip()
    if _TAG.search(text):
        raise _FieldError("solution", "the bare answer", _show(text), "Write the answer without think or answer tags.")
    return text


def _process(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    text = _text({"process": value}, "process")
    if match := _TAG.search(text):
        remedy = "Write the thinking without think or answer tags: the prompt template puts them."
        raise _FieldError("process", "the bare thinking", f"{match[0]} in {_show(text)}", remedy)
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
    raise _FieldError("options", "a list like ['A. red', …] or {'A': 'red', …}", _show(value), "Write it so.")


def _media(record: dict[str, Any], field: str, allow_urls: bool) -> list[str]:
    paths = record.get(field)
    if paths is None:
        return []
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise _FieldError(field, "a list of paths", _show(paths), f'Write {field}: ["clips/1.mp4"], or [] for none.')
    for path in paths:
        _check_path(_encodable(path, field), field, allow_urls)
    return [path if _URL.match(path) else os.path.normpath(path) for path in paths]


def _check_path(path: str, field: str, allow_urls: bool) -> bool:
    """Whether the path is an allowed URL; raises for what is neither that nor a path that stays below its root."""
    if _URL.match(path):
        if re.match("[^/]*//[^/?#]*@", path):
            remedy = "Take them out and put them into ~/.netrc: a row's URLs are written to rollouts and logs."
            raise _FieldError(field, "a URL without user name and password", "one with them", remedy)
        if allow_urls and path.lower().startswith(("https://", "http://")):
            return True
        remedy = "Download the file, or allow URLs (allow_urls: http and https only)."
        raise _FieldError(field, "a path relative to media_root", f"the URL {_show(path)}", remedy)
    if os.path.isabs(path) or ".." in re.split(r"[/\\]", path) or "\0" in path:
        remedy = "Choose a media_root above the files and write their paths below it."
        raise _FieldError(field, "a path relative to media_root, without '..'", _show(path), remedy)
    return False


def _resolve(root: str, path: str, field: str, allow_urls: bool) -> str:
    if _check_path(path, field, allow_urls):
        return path
    real_root = os.path.realpath(root)
    real = os.path.realpath(os.path.join(real_root, path))
    if not root or os.path.commonpath([real_root, real]) != real_root:
        remedy = "Choose a media_root that holds the file itself, or replace the symbolic link by the file."
        raise _FieldError(field, f"a file inside of media_root {root!r}", f"{path} -> {real}", remedy)
    if not os.path.isfile(real):
        remedy = "Put the file there, correct media_root, or remove the row."
        if os.path.exists(real):
            what = "a directory" if os.path.isdir(real) else "a pipe, socket or device"
            raise _FieldError(field, "a regular file", f"{os.path.join(root, path)}, which is {what}", remedy)
        raise _FieldError(field, "a file", f"{os.path.join(root, path)}, which does not exist", remedy)
    if not os.path.getsize(real):
        raise _FieldError(field, "a media file", f"{os.path.join(root, path)}, which is empty", "Fetch it again.")
    return real


def _is_id(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, int) and not isinstance(value, bool)


def _show(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _line(problem: dict[str, Any]) -> str:
    row = "" if problem["row"] is None else f" row {problem['row']}"
    place = f"{problem['file']}{row}, question_id {problem['question_id']!r}, {problem['field']}"
    return f"{place}: expected {problem['expected']}; came {problem['came']}. {problem['remedy']}"


def _message(problems: list[dict[str, Any]], what: str) -> str:
    lines = [f"{len(problems)} row{'s' if len(problems) > 1 else ''} {what}:", *map(_line, problems[:SHOWN])]
    if len(problems) > SHOWN:
        lines.append(f"… and {len(problems) - SHOWN} more.")
    return "\n  ".join(lines)
