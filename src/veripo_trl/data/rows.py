"""The entries of a recipe's ``datasets:`` as one map-style dataset of checked rows."""

import logging
import os
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veripo_trl.data.fields import checked_row
from veripo_trl.data.files import SUFFIXES, is_data_file, numbered, read_directory, read_file
from veripo_trl.data.manifest import read_manifest, report_dropped
from veripo_trl.data.official import find_source, make_rows, print_counts, read_official, unnested
from veripo_trl.data.schema import (
    COLUMNS,
    REQUIRED,
    SHOWN,
    FieldError,
    RowError,
    content_of,
    is_id,
    row_error,
    rows_to_dataset,
    show,
)
from veripo_trl.files.tables import printable
from veripo_trl.hub.locate import is_local
from veripo_trl.user_functions import is_user_function, user_function

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


# Columns that mean media but are not ours. Dropping one with the other unknown columns would train without the video.
_MEDIA_LOOKALIKES = {"video": "videos", "video_path": "videos", "image": "images", "image_path": "images"}
_VIDEO_R1 = {"problem_id", "problem", "data_type", "problem_type", "solution", "path"}
_OF_EVALUATION = ("categories", "alternatives", "cut")  # columns of a source's rows that training does not read


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
    source: what the files are, where they are not in our columns: a public data set by its name (a module of
        `veripo_trl.sources`), or `module:function` of the user's own, `convert(record, file=…) -> rows`. A directory is
        then every data file below it. Video-R1's files need none.
    where: {raw column: value or list of values}; rows that equal none of the values are left out.
    limit: the first n rows in file order after `where` and `source`: the same rows under every seed. A file sorted by
        source gives a one-sided sample, so list such a file once per source, each with its own `limit`.
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
    source: str | None = None

    def __post_init__(self):
        kinds = {"path": str, "split": str, "where": dict, "limit": int, "media_root": str, "source": str}
        for field, kind in kinds.items():
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
        raise row_error(problems)
    if not rows:
        raise RowError(f"no rows left of {[source.path for source in map(_source, sources)]}: all were dropped.")
    if shuffle:
        random.Random(seed).shuffle(rows)
    return rows_to_dataset(rows)


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
    sources = [_source(source) for source in sources]
    verdicts = None if manifest is None else read_manifest(manifest)
    files: dict[tuple, tuple[list, str | None]] = {}  # a recipe may list one large file several times: parse it once
    rows, problems, unknown, dropped = [], [], [], Counter()
    places: dict[str, str] = {}  # of each id so far
    for source in sources:
        key = (source.path, source.name, source.split, source.revision, source.source)
        if key not in files:
            files[key] = _read(source)
        records, default_root = files[key]
        root = _media_root(source, default_root)
        records, id_column = _selected(records, source, other_columns)
        for file, number, raw_id, record in records:
            question_id = source.id_prefix + str(raw_id) if is_id(raw_id) else None
            if verdicts is not None and question_id is not None:
                if question_id not in verdicts:
                    unknown.append(question_id)
                    continue
                if reason := verdicts[question_id].get("reason"):
                    dropped[reason] += 1
                    continue
            try:
                if isinstance(record, FieldError):
                    raise record
                row = checked_row(record, question_id, id_column, file=file, allow_urls=allow_urls)
                if unique_ids and question_id in places:
                    remedy = "Make the ids unique, or give one source an `id_prefix`."
                    raise FieldError(id_column, "an id used once", f"the id of {places[question_id]} too", remedy)
                if verdicts and verdicts[question_id].get("content", content_of(row)) != content_of(row):
                    remedy = "Run the check command again, on this data."
                    raise FieldError("(row)", f"the question that {manifest} knows by this id", "another", remedy)
            except FieldError as error:
                problems.append({"file": file, "row": number, "question_id": question_id, **error.problem})
                continue
            if root is None and (row["videos"] or row["images"]):
                raise RowError(f"{source.path}: its rows have media: give the `media_root` they are in.")
            places[question_id] = f"{file} row {number}"
            rows.append(row | {"media_root": root or ""})
    if verdicts is not None:
        report_dropped(manifest, unknown, dropped, kept=len(rows) + len(problems))
    return rows, problems


def _source(source: dict | DatasetSource) -> DatasetSource:
    if isinstance(source, DatasetSource):
        return source
    known = [field.name for field in fields(DatasetSource)]
    if not isinstance(source, dict) or "path" not in source or set(source) - set(known):
        raise RowError(f"dataset source {source!r}: expected `path` and any of {', '.join(known[1:])}, nothing else.")
    return DatasetSource(**source)


def _read(source: DatasetSource) -> tuple[list[tuple[str, int, Any]], str | None]:
    """(records, the directory that media are relative to by default)."""
    path = Path(source.path).expanduser()
    if is_local(source.path):
        own = is_user_function(source.path) and not path.exists()
        if not (own or path.exists() or is_data_file(path)):
            raise RowError(
                f"{source.path}: no such directory, no {'/'.join(SUFFIXES)} file, not module:function, and not a Hub "
                f"dataset id (owner/name)."
            )
        if source.name or source.revision:
            raise RowError(f"{source.path} is local: `name` and `revision` are for Hub datasets; leave them out.")
        saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
        if path.is_dir() and (saved or not source.source):
            return _taken_apart(read_directory(path, source.split), source), str(path)
        if source.split != "train":
            what = "what `source` reads" if source.source else "a file"
            raise RowError(
                f"{source.path}: {what} has no split {source.split!r}; leave `split` out or name a directory."
            )
        if own:
            records = numbered(source.path, user_function(source.path, setting="datasets")())
            return _taken_apart(records, source), None
        root = str(path if path.is_dir() else path.parent)
        return read_official(path, source.source) if source.source else read_file(path), root

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
    return _taken_apart(numbered(source.path, dataset.with_format("arrow")[:].to_pylist()), source), None


def _taken_apart(records: list[tuple[str, int, Any]], source: DatasetSource) -> list[tuple[str, int, Any]]:
    if not source.source:
        return records
    return unnested([record for *_, record in records], source.path, find_source(source.source))


def _media_root(source: DatasetSource, default: str | None) -> str | None:
    if source.media_root is None:
        return default and os.path.abspath(default)
    root = os.path.abspath(os.path.expanduser(source.media_root))
    if not os.path.isdir(root):
        raise RowError(f"{source.path}: media_root {root} is not a directory.")
    return root


def _selected(records: list, source: DatasetSource, other_columns: tuple[str, ...]) -> tuple[list, str]:
    """((file, number, raw id, row or FieldError) after `where` and `limit`, the column of their ids).

    Checks the columns of the whole source."""
    columns: dict[str, None] = {}
    for _, _, record in records:
        if isinstance(record, dict):
            columns.update(dict.fromkeys(record))
    where = source.where or {}
    if missing := [column for column in where if column not in columns]:
        raise RowError(f"{source.path}: `where` names {missing}; the columns are {', '.join(columns)}.")
    for column, wanted in where.items():
        accepted = wanted if isinstance(wanted, list) else [wanted]
        kept = [r for r in records if isinstance(r[2], dict) and r[2].get(column) in accepted]
        if not kept:
            there = Counter(show(r[2].get(column)) for r in records if isinstance(r[2], dict)).most_common(SHOWN)
            values = ", ".join(value for value, _ in there)
            raise RowError(f"{source.path}: no row has {column} = {wanted!r}; values there: {values}.")
        records = kept
    name = source.source or _recognised(source.path, columns)
    if name is None:
        _check_columns(source.path, [c for c in columns if c not in other_columns])
        rows = [(file, n, r.get("question_id") if isinstance(r, dict) else None, r) for file, n, r in records]
        return rows[: source.limit], "question_id"
    rows, counted = make_rows(records, name)
    print_counts(source.path, name, rows, counted)
    made = dict.fromkeys(column for *_, row in rows if isinstance(row, dict) for column in row)
    if made:
        _check_columns(source.path, [c for c in made if c not in (*other_columns, *_OF_EVALUATION)])
    return rows[: source.limit], getattr(find_source(name), "ID", "question_id")


def _recognised(path: str, columns: Iterable[str]) -> str | None:
    """The source of files that need not name it, by their columns."""
    if not _VIDEO_R1 <= set(columns) or "question_id" in columns:
        return None
    if "init_frame_path" in columns:  # of whose media Video-R1's columns are one of three
        raise RowError(f"{path}: these are PRIMO's columns. Set `source: primo_r1`, which keeps the images.")
    return "video_r1"


def _check_columns(path: str, columns: Iterable[str]) -> None:
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
