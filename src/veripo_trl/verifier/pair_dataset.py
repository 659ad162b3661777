"""Reads preference pairs, as recipes/verify_rollouts.py wrote them, into the dataset that DPO trains on."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from veripo_trl.data.prompts import PromptTemplate
from veripo_trl.data.rows import read_rows
from veripo_trl.data.schema import RowError, rows_to_dataset
from veripo_trl.files.disk import read_parquet
from veripo_trl.hub.locate import fetch, locate
from veripo_trl.verifier.files import PAIR_COLUMNS
from veripo_trl.verifier.pairs import KINDS


@dataclass(frozen=True)
class PairSource:
    """One entry of a recipe's `pairs:`.

    path: a folder of parquet files (or one file), or a Hub dataset with its `revision`. media_root: what videos and
    images are relative to. kinds: only these kinds of pairs. limit: the first n pairs, after `kinds`.
    """

    path: str
    media_root: str | None = None
    revision: str | None = None
    kinds: list[str] | None = None
    limit: int | None = None

    def __post_init__(self):
        kinds = self.kinds
        if kinds is not None and (not isinstance(kinds, list) or not kinds or any(kind not in KINDS for kind in kinds)):
            raise RowError(
                f"pairs {self.path}: `kinds`: expected a list of some of {', '.join(KINDS)}; came {kinds!r}."
            )


@dataclass
class Pairs:
    """`dataset`: rows with `chosen` and `rejected` (texts), `rejected_finished`, `kind`; `inputs`: what came from the
    Hub, {path: {repo_id, revision}}."""

    dataset: object
    inputs: dict = field(default_factory=dict)


def load_pairs(sources: list[dict], *, template: PromptTemplate, allow_urls: bool = False) -> Pairs:
    """Read and check preference pairs.

    Args:
        template: of this run: pairs whose rollouts were made with another wording are refused, since DPO would train
            on prompts that the policy never saw.

    Raises:
        RowError: no pairs, a file that holds something else, malformed rows, another template. HubError: a dataset that
            cannot be read from the Hub.
    """
    if not isinstance(sources, list) or not sources:
        raise RowError(f"`pairs` must be a list of at least one {{path: …}}, came {sources!r}.")
    found, inputs = [], {}
    for given in sources:
        source = _source(given)
        files, origin = pair_files(source)
        if origin is not None:
            inputs[source.path] = origin
        both = (both for file in files for both in _read(file, source, template, allow_urls))
        found += [(row, pair) for row, pair in both if not source.kinds or pair["kind"] in source.kinds][: source.limit]
    if not found:
        raise RowError(
            f"no preference pairs in {sources}. Pairs come from groups with right and wrong, or consistent and "
            f"inconsistent, rollouts: look at the table that verify_rollouts.py printed."
        )
    rows, pairs = zip(*found, strict=True)
    dataset = rows_to_dataset(rows)
    for column in ("chosen", "rejected"):
        dataset = dataset.add_column(column, [pair[column][0]["content"] for pair in pairs])
    for column in ("rejected_finished", "kind"):
        dataset = dataset.add_column(column, [pair[column] for pair in pairs])
    return Pairs(dataset, inputs)


def _read(file: Path, source: PairSource, template: PromptTemplate, allow_urls: bool) -> list[tuple[dict, dict]]:
    """A file's pairs, each as its question's row and its other columns."""
    table = read_parquet(file)
    if missing := [column for column in PAIR_COLUMNS if column not in table.column_names]:
        raise RowError(f"{file}: no column {', '.join(missing)}. Expected pairs written by recipes/verify_rollouts.py.")
    if not len(table):
        return []
    if others := set(table["prompt_template"].to_pylist()) - {template.hash}:
        raise RowError(
            f"{file}: its rollouts were made with the prompt template of hash {others.pop()}, this run's "
            f"{template.name!r} has {template.hash}. Set prompt_template to the one of the GRPO run."
        )
    where = [{"path": str(file), "media_root": source.media_root}]
    rows, problems = read_rows(where, allow_urls=allow_urls, unique_ids=False, other_columns=PAIR_COLUMNS)
    if problems:
        raise RowError(f"{file}: {len(problems)} pairs cannot be used, the first: {problems[0]}", problems)
    return list(zip(rows, table.select(PAIR_COLUMNS).to_pylist(), strict=True))


def _source(given: dict) -> PairSource:
    known = [item.name for item in fields(PairSource)]
    if not isinstance(given, dict) or "path" not in given or set(given) - set(known):
        raise RowError(f"pairs source {given!r}: expected `path` and any of {', '.join(known[1:])}, nothing else.")
    return PairSource(**given)


def pair_files(source: PairSource) -> tuple[list[Path], dict | None]:
    """The parquet files of a source, in order, and where on the Hub they came from, {"repo_id", "revision"} with the
    commit. The main process looks there for all, so that they train on the same pairs."""
    path, origin = Path(source.path).expanduser(), None
    if PartialState().is_main_process:
        origin = locate(source.path, "dataset", source.revision)
    (origin,) = broadcast_object_list([origin])
    if origin is not None:
        path = fetch(**origin)
    elif source.revision:
        raise RowError(f"pairs {source.path}: `revision` is for Hub datasets; leave it out of a local path.")
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet")) if path.is_dir() else []
    if not files:
        raise RowError(f"pairs {source.path}: expected a folder of parquet files or a Hub dataset; found no such file.")
    return files, origin
