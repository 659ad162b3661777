"""Files of the verifier: rollouts in, verdicts and preference pairs out. However many rollouts there are, memory holds a
bounded number of their texts: they lie in an Arrow file that is mapped."""

import itertools
import logging
import mmap
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from veripo_trl.data.prompts import PromptTemplate
from veripo_trl.data.rollouts import SCHEMA_FIELDS
from veripo_trl.errors import ConfigError
from veripo_trl.files.disk import FileError, open_parquet, read_parquet, write_parquet
from veripo_trl.verifier.pairs import seeded_order

logger = logging.getLogger(__name__)

_UNREAD = ("completion_tokens", "advantage", "seed", "shown")
_MAY_BE_NULL = ("options", "videos", "images", "data_source")
# large: together the texts of a run may be more than 2 GB
_TYPES = {pa.string(): pa.large_string()}
_READ = [(name, kind) for name, kind in SCHEMA_FIELDS if name not in _UNREAD]
ROLLOUT_SCHEMA = pa.schema([(name, _TYPES.get(kind, kind)) for name, kind in _READ])
VERDICT_SCHEMA = pa.schema(
    [
        ("rollout_id", pa.string()),
        ("question_id", pa.string()),
        ("format_ok", pa.bool_()),
        ("accuracy", pa.float64()),
        ("concluded_answer", pa.string()),
        ("consistency", pa.string()),
        ("repetition", pa.float64()),
        ("think_tokens", pa.int64()),
        ("judge", pa.string()),
        ("prompt_version", pa.string()),
        ("reason", pa.string()),
    ]
)
_VERDICT = pa.struct(list(VERDICT_SCHEMA))
_PART = pa.struct([("type", pa.string()), ("text", pa.string())])
_TEXTS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
# fault: why the rejected is rejected: wrong, repetitive, too short, inconsistent
_VERDICTS = pa.struct(
    [("chosen", pa.list_(_VERDICT)), ("rejected", _VERDICT), ("fault", pa.string())]
)
PAIR_SCHEMA = pa.schema(
    [
        *((name, kind) for name, kind in SCHEMA_FIELDS[1:9]),  # question_id … data_source
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(_PART))]))),
        ("chosen", _TEXTS),
        ("rejected", _TEXTS),
        ("rejected_finished", pa.bool_()),
        ("kind", pa.string()),
        ("chosen_ids", pa.list_(pa.string())),
        ("rejected_id", pa.string()),
        ("verdicts", _VERDICTS),
        ("prompt_template", pa.string()),
        ("policy", pa.string()),
    ]
)
PAIR_COLUMNS = tuple(PAIR_SCHEMA.names[8:])  # what a pair has beside its question's columns
BATCH = 5_000  # rows as dicts at once, and of a written file


class RolloutFilesError(FileError):
    """Files that are not the rollouts of finished generations, each once."""


def find_rollout_files(folder: str | Path) -> list[Path]:
    """The parquet files of a folder, or of `rollouts/` in it where it has none itself, in the order of their names.
    What a resumed run set aside lies deeper and is not among them."""
    folder = Path(folder).expanduser()
    for place in (folder, folder / "rollouts"):
        if files := sorted(place.glob("*.parquet")):
            return files
    came = "no parquet file is in it" if folder.is_dir() else "no such folder"
    raise RolloutFilesError(
        f"{folder}: expected a folder with the rollouts of a GRPO run (<output_dir>/rollouts), but {came}."
    )


def read_rollouts(
    files: Iterable[Path],
    *,
    limit: int | None = None,
    scratch: str | Path | None = None,
    perturbed: bool = False,
) -> pa.Table:
    """The rollouts of files, in order, as a table of ROLLOUT_SCHEMA. It is mapped from a file without a name in the
    folder `scratch` (default: the system's), which is gone with the table, also where the process is killed.

    Args:
        limit: the first n only.
        perturbed: also those that saw something else than their row, which the store calls `shown`.

    Raises:
        FileError: a file is damaged or holds something else, a rollout id is there twice, or there is no rollout.
        OSError: `scratch` has no room for them.
    """
    table = _mapped(_batches(files, limit, perturbed), ROLLOUT_SCHEMA, Path(scratch or tempfile.gettempdir()))
    counts = pc.value_counts(table["rollout_id"])
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
    if twice:
        raise RolloutFilesError(
            f"{len(twice)} rollout ids are there more than once: {', '.join(sorted(twice)[:5])}, … Give every run's "
            "rollouts once. Two runs whose output folders have one name give the same ids: verify them apart."
        )
    if not len(table):
        raise RolloutFilesError(f"No rollouts in {', '.join(map(str, files))}: nothing to verify.")
    return table


def _batches(files: Iterable[Path], limit: int | None, perturbed: bool) -> Iterator[pa.Table]:
    """Tables of BATCH rows or some more; a file that GRPO wrote has a handful."""
    rows, waiting, others = 0, [], 0
    for file in files:
        table = _read(file)
        kept = table if perturbed else _of_rows_themselves(table, file)
        others += len(table) - len(kept)
        waiting.append(kept[: limit and limit - rows])
        rows += len(waiting[-1])
        if sum(map(len, waiting)) >= BATCH:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting = []
        if rows == limit:
            break
    if others:
        logger.warning("Left out %d rollouts that saw a hint or other frames: they answer another question.", others)
    yield pa.concat_tables([ROLLOUT_SCHEMA.empty_table(), *waiting]).combine_chunks()


def _mapped(tables: Iterable[pa.Table], schema: pa.Schema, folder: Path) -> pa.Table:
    with tempfile.TemporaryFile(dir=folder) as file:
        with pa.ipc.new_stream(pa.PythonFile(file, "w"), schema) as writer:
            for table in tables:
                writer.write_table(table)
        file.flush()
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_stream(pa.py_buffer(content)).read_all()


def _of_rows_themselves(table: pa.Table, file: Path) -> pa.Table:
    """Without the rollouts of a file that saw something else than their row."""
    with open_parquet(file) as opened:
        if "shown" not in opened.schema_arrow.names:  # written before it was recorded
            return table
        return table.filter(opened.read(columns=["shown"])["shown"].is_null())


def _read(file: Path) -> pa.Table:
    """A file in ROLLOUT_SCHEMA's types; empty lists for lists that are null."""
    table, columns = read_parquet(file, ROLLOUT_SCHEMA.names), []
    for wanted in ROLLOUT_SCHEMA:
        column = table[wanted.name]
        try:
            column = column.cast(wanted.type)
        except pa.ArrowException:
            raise RolloutFilesError(
                f"{file}: {wanted.name}: expected {wanted.type}, a rollout's, came {column.type}."
            ) from None
        if column.null_count and wanted.name not in _MAY_BE_NULL:
            raise RolloutFilesError(
                f"{file}: {column.null_count} rollouts without `{wanted.name}`."
            )
        if column.null_count and pa.types.is_list(wanted.type):
            column = pc.fill_null(column, pa.scalar([], wanted.type))
        columns.append(column)
    return pa.table(columns, schema=ROLLOUT_SCHEMA)


def with_perturbed(rollouts: pa.Table, perturbed: pa.Table | None) -> pa.Table:
    """Both, with a column `perturbed` that tells the ones sampled on perturbed videos, which come last."""
    both = [rollouts] if perturbed is None else [rollouts, perturbed]
    marks = [pa.repeat(place == 1, len(table)) for place, table in enumerate(both)]
    return pa.concat_tables(both).append_column("perturbed", pa.chunked_array(marks, pa.bool_()))


def rows_of(table: pa.Table) -> Iterator[dict]:
    """A table's rows, a bounded number of them as dicts at once."""
    for batch in table.to_batches(BATCH):
        yield from batch.to_pylist()


def judged_questions(rollouts: pa.Table, verdicts: pa.Table, *, seed: int) -> Iterator[list[dict]]:
    """Each question's rollouts, every one with its `verdict`; questions in a seeded order, the same for every order of
    the rollouts, so that any first n are a fair sample.

    Args:
        verdicts: of these rollouts, in their order.
    """
    ids = rollouts["question_id"].combine_chunks().dictionary_encode()
    orders = [f"{seeded_order(seed, 'question', name):032x}" for name in ids.dictionary.to_pylist()]
    keys = {"order": pa.array(orders).take(ids.indices), "rollout_id": rollouts["rollout_id"]}
    places = pc.sort_indices(pa.table(keys), [(name, "ascending") for name in keys])
    places = places.to_numpy().astype(np.int64)
    # A table's own `take` joins its parts first, which would read all of the mapped file into memory, for each batch.
    parts = rollouts.append_column("verdict", verdicts.to_struct_array()).to_batches()
    judged = (
        row
        for start in range(0, len(places), BATCH)
        for row in _taken(parts, places[start : start + BATCH]).to_pylist()
    )
    for _, group in itertools.groupby(judged, key=lambda rollout: rollout["question_id"]):
        yield list(group)


def _taken(parts: list[pa.RecordBatch], places: np.ndarray) -> pa.Table:
    """The rows of these places, counted over all parts."""
    starts = np.cumsum([0, *map(len, parts)])
    ascending = np.sort(places)
    bounds = np.searchsorted(ascending, starts)
    taken = [
        part.take(pa.array(ascending[low:high] - start))
        for part, start, low, high in zip(parts, starts, bounds, bounds[1:])
        if low < high
    ]
    return pa.Table.from_batches(taken).take(pa.array(np.searchsorted(ascending, places)))


def write_files(
    rows: Iterable[dict], folder: Path, schema: pa.Schema, *, rows_per_file: int = BATCH
) -> int:
    """Write rows as `<folder>/<its name>-00000.parquet` and on, each file whole or not at all, and at least one.

    Returns:
        The number of rows.
    """
    rows, count = iter(rows), 0
    for number in itertools.count():
        part = list(itertools.islice(rows, rows_per_file))
        if number and not part:
            return count
        write_parquet(
            pa.Table.from_pylist(part, schema=schema),
            folder / f"{folder.name}-{number:05d}.parquet",
        )
        count += len(part)


def read_files(folder: Path) -> pa.Table:
    """What `write_files` wrote."""
    return pa.concat_tables(map(read_parquet, sorted(folder.glob(f"{folder.name}-*.parquet"))))


def remove_files(folder: Path) -> int:
    """Remove what `write_files` left in a folder; the number of files."""
    found = [*folder.glob(f"{folder.name}-*.parquet"), *folder.glob(f".{folder.name}-*")]
    for path in found:
        path.unlink()
    return len(found)


def refuse_other_template(template: PromptTemplate, hashes: Iterable[str], where: str) -> None:
    """Raise a ConfigError unless all that is there was made with this template: pairs repeat the prompt that the policy
    saw, and DPO trains on it."""
    if others := sorted(set(hashes) - {template.hash}):
        raise ConfigError(
            f"{where}: made with the prompt template of hash {', '.join(others)}; prompt_template {template.name!r} has "
            f"the hash {template.hash}. Set prompt_template to the one of the GRPO run."
        )
