"""Files of the verifier: rollouts in, verdicts and preference pairs out, a bounded number of them in memory."""

import itertools
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
    seen: set[str] = set()
    twice: set[str] = set()
    for table in found.tables():
        found.rollouts += len(table)
        found.policies.update(table["policy"].to_pylist())
        found.templates.update(table["prompt_template"].to_pylist())
        for name in table["rollout_id"].to_pylist():
            (twice if name in seen else seen).add(name)
    if twice:
        shown = sorted(twice)[:5]
        places = [f"{name!r} in {' and in '.join(_places(name, found.files))}" for name in shown]
        raise RolloutFilesError(
            f"{len(twice)} rollout ids are there more than once:\n  " + "\n  ".join(places) + "\nGive every run's "
            "rollouts once. Two runs whose output folders have one name give the same ids: verify them apart."
        )
    if not found.rollouts:
        raise RolloutFilesError(f"No rollouts in {', '.join(map(str, found.files)) or 'no files'}: nothing to verify.")
    return found


def _places(rollout_id: str, files: list[Path]) -> list[str]:
    """The files that hold a rollout id, one as often as it does."""
    found = {file: read_parquet(file, ["rollout_id"])[0].to_pylist().count(rollout_id) for file in files}
    return [str(file) for file, count in found.items() for _ in range(count)]


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
    if wrong := [f"{item.name} {item.type}" for item in table.schema if not _fits(item)]:
        expected = ", ".join(f"{name} {ROLLOUT_SCHEMA.field(name).type}" for name in (w.split()[0] for w in wrong))
        came = ", ".join(wrong)
        raise RolloutFilesError(f"{file}: columns of other types than a rollout's: {came}; expected {expected}.")
    table = table.cast(ROLLOUT_SCHEMA)
    for place, name in enumerate(table.column_names):
        if not table.column(name).null_count:
            continue
        if name not in _MAY_BE_NULL:
            raise RolloutFilesError(f"{file}: {table.column(name).null_count} rollouts without `{name}`.")
        if name != "data_source":
            filled = pc.fill_null(table.column(name), pa.scalar([], ROLLOUT_SCHEMA.field(name).type))
            table = table.set_column(place, ROLLOUT_SCHEMA.field(name), filled)
    return table


def _fits(column: pa.Field) -> bool:
    """Whether a column is what its type in ROLLOUT_SCHEMA is, in any width; a column of nulls fits where those may be."""
    kind, wanted = column.type, ROLLOUT_SCHEMA.field(column.name).type
    if pa.types.is_null(kind):
        return column.name in _MAY_BE_NULL
    if pa.types.is_list(wanted):
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            return False
        kind, wanted = kind.value_type, wanted.value_type
        if pa.types.is_null(kind):
            return True
    if pa.types.is_string(wanted):
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return pa.types.is_integer(kind)


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

    A question's rollouts are spread over the whole run, so the files are read once for every `at_once` rollouts; that
    many (or the largest question's) are in memory.

    Args:
        verdicts: the folder that holds the rollouts' verdicts, in the same order.
    """
    files = sorted(verdicts.glob(f"{verdicts.name}-*.parquet"))
    counts: Counter = Counter()
    for file in files:
        counts.update(read_parquet(file, ["question_id"])[0].to_pylist())
    for questions in _slices(sorted(counts.items()), at_once):
        wanted = pa.array(questions)
        texts, checks = _of(wanted, rollouts.tables()), _of(wanted, map(read_parquet, files))
        if not texts["rollout_id"].equals(checks["rollout_id"]):
            raise RolloutFilesError(f"{verdicts}: not the verdicts of these rollouts, one each and in their order.")
        yield from _grouped(texts, checks, pc.sort_indices(texts["question_id"]))


def _of(questions: pa.Array, tables: Iterable[pa.Table]) -> pa.Table:
    parts = [table.filter(pc.is_in(table["question_id"], questions)) for table in tables]
    return pa.concat_tables(parts).combine_chunks()


def _slices(counts: list[tuple[str, int]], at_once: int) -> Iterator[list[str]]:
    names, total = [], 0
    for name, count in counts:
        if names and total + count > at_once:
            yield names
            names, total = [], 0
        names.append(name)
        total += count
    if names:
        yield names


def _grouped(texts: pa.Table, checks: pa.Table, order: pa.Array) -> Iterator[list[dict]]:
    def rows() -> Iterator[dict]:
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            for rollout, verdict in zip(texts.take(part).to_pylist(), checks.take(part).to_pylist(), strict=True):
                yield {**rollout, "verdict": verdict}

    for _, group in itertools.groupby(rows(), key=lambda rollout: rollout["question_id"]):
        yield list(group)
