"""Files of the verifier: rollouts in, verdicts and preference pairs out, a bounded number of them in memory."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from veripo_trl.data.rollouts import SCHEMA_FIELDS
from veripo_trl.files.disk import FileError, open_parquet, read_parquet, write_parquet

_UNREAD = ("completion_tokens", "advantage", "seed")
_MAY_BE_NULL = ("options", "videos", "images", "data_source")
ROLLOUT_SCHEMA = pa.schema([(name, kind) for name, kind in SCHEMA_FIELDS if name not in _UNREAD])
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
        # fault: why the rejected is rejected: wrong, repetitive, too short, inconsistent
        ("verdicts", pa.struct([("chosen", pa.list_(_VERDICT)), ("rejected", _VERDICT), ("fault", pa.string())])),
        ("prompt_template", pa.string()),
        ("policy", pa.string()),
    ]
)
PAIR_COLUMNS = tuple(PAIR_SCHEMA.names[8:])  # what a pair has beside its question's columns
BATCH = 5_000  # rollouts per read, rows per written file
GROUPED_AT_ONCE = 50_000  # rollouts in memory while pairs are built


class RolloutFilesError(FileError):
    """Files that are not the rollouts of finished generations, each once."""


@dataclass
class RolloutFiles:
    """Checked rollout files, in order, and what they say: `rollouts` (how many), `policies` and `templates` (counts)."""

    files: list[Path]
    rollouts: int = 0
    policies: Counter = field(default_factory=Counter)
    templates: Counter = field(default_factory=Counter)
    limit: int | None = None

    def __iter__(self) -> Iterator[dict]:
        for table in self.tables():
            yield from table.to_pylist()

    def tables(self) -> Iterator[pa.Table]:
        """The rollouts as tables of ROLLOUT_SCHEMA, BATCH rows at most."""
        left = self.limit
        for file in self.files:
            for table in _tables_of(file):
                table = table[:left]
                left = None if left is None else left - len(table)
                yield table
                if left == 0:
                    return


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


def open_rollouts(files: Iterable[Path], *, limit: int | None = None) -> RolloutFiles:
    """Read the files once to check them: all are rollouts, whole, and no rollout id is there twice.

    Args:
        limit: only the first n rollouts, in file order.
    """
    found = RolloutFiles(list(files), limit=limit)
    seen, twice = set(), set()
    for table in found.tables():
        found.rollouts += len(table)
        found.policies.update(table["policy"].to_pylist())
        found.templates.update(table["prompt_template"].to_pylist())
        for name in table["rollout_id"].to_pylist():
            (twice if name in seen else seen).add(name)
    if twice:
        raise RolloutFilesError(
            f"{len(twice)} rollout ids are there more than once: {', '.join(sorted(twice)[:5])}, … Give every run's "
            "rollouts once. Two runs whose output folders have one name give the same ids: verify them apart."
        )
    if not found.rollouts:
        raise RolloutFilesError(f"No rollouts in {', '.join(map(str, found.files)) or 'no files'}: nothing to verify.")
    return found


def _tables_of(file: Path) -> Iterator[pa.Table]:
    with open_parquet(file) as parquet:
        if missing := [name for name in ROLLOUT_SCHEMA.names if name not in parquet.schema_arrow.names]:
            raise RolloutFilesError(
                f"{file}: not the rollouts of a GRPO run: no column {', '.join(missing)}; it has "
                f"{', '.join(parquet.schema_arrow.names)}. Move it out of the folder, or name the right folder."
            )
        for batch in parquet.iter_batches(BATCH, columns=ROLLOUT_SCHEMA.names):
            batch.validate(full=True)
            yield _typed(pa.Table.from_batches([batch]).select(ROLLOUT_SCHEMA.names), file)


def _typed(table: pa.Table, file: Path) -> pa.Table:
    """The table in ROLLOUT_SCHEMA's types; empty lists for lists that are null."""
    columns = []
    for wanted in ROLLOUT_SCHEMA:
        column = table[wanted.name]
        try:
            column = column.cast(wanted.type)
        except pa.ArrowException:
            raise RolloutFilesError(
                f"{file}: {wanted.name}: expected {wanted.type}, a rollout's, came {column.type}."
            ) from None
        if column.null_count and wanted.name not in _MAY_BE_NULL:
            raise RolloutFilesError(f"{file}: {column.null_count} rollouts without `{wanted.name}`.")
        if column.null_count and pa.types.is_list(wanted.type):
            column = pc.fill_null(column, pa.scalar([], wanted.type))
        columns.append(column)
    return pa.table(columns, schema=ROLLOUT_SCHEMA)


def write_files(rows: Iterable[dict], folder: Path, schema: pa.Schema, *, rows_per_file: int = BATCH) -> int:
    """Write rows as `<folder>/<its name>-00000.parquet` and on, each file whole or not at all, and at least one.

    Returns:
        The number of rows.
    """
    rows, count = iter(rows), 0
    for number in itertools.count():
        part = list(itertools.islice(rows, rows_per_file))
        if number and not part:
            return count
        write_parquet(pa.Table.from_pylist(part, schema=schema), folder / f"{folder.name}-{number:05d}.parquet")
        count += len(part)


def remove_files(folder: Path) -> int:
    """Remove what `write_files` left in a folder; the number of files."""
    found = [*folder.glob(f"{folder.name}-*.parquet"), *folder.glob(f".{folder.name}-*")]
    for path in found:
        path.unlink()
    return len(found)


def judged_questions(
    rollouts: RolloutFiles, verdicts: Path, *, at_once: int = GROUPED_AT_ONCE
) -> Iterator[list[dict]]:
    """Each question's rollouts, every one with its `verdict`, questions in the order of their ids.

    A question's rollouts are spread over the whole run, so the files are read once for about every `at_once` rollouts;
    that many (or the largest question's) are in memory.

    Args:
        verdicts: the folder that holds the rollouts' verdicts, in the same order.
    """
    files = sorted(verdicts.glob(f"{verdicts.name}-*.parquet"))
    questions = sorted({name for file in files for name in read_parquet(file, ["question_id"])[0].to_pylist()})
    size = math.ceil(len(questions) * at_once / max(rollouts.rollouts, at_once))
    for start in range(0, len(questions), size):
        wanted = pa.array(questions[start : start + size])
        texts, checks = _of(wanted, rollouts.tables()), _of(wanted, map(read_parquet, files))
        if not texts["rollout_id"].equals(checks["rollout_id"]):
            raise RolloutFilesError(f"{verdicts}: not the verdicts of these rollouts, one each and in their order.")
        judged = texts.append_column("verdict", checks.to_struct_array())
        judged = judged.sort_by([("question_id", "ascending"), ("rollout_id", "ascending")])
        rows = (row for batch in judged.to_batches(BATCH) for row in batch.to_pylist())
        for _, group in itertools.groupby(rows, key=lambda rollout: rollout["question_id"]):
            yield list(group)


def _of(questions: pa.Array, tables: Iterable[pa.Table]) -> pa.Table:
    parts = [table.filter(pc.is_in(table["question_id"], questions)) for table in tables]
    return pa.concat_tables(parts).combine_chunks()
