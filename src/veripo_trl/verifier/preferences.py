"""Preference pairs, as recipes/verify_rollouts.py writes them, to a dataset that DPO trains on."""

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from veripo_trl.data.prompts import PromptTemplate
from veripo_trl.data.rows import RowError, read_rows, rows_to_dataset
from veripo_trl.files.disk import read_parquet
from veripo_trl.hub.locate import fetch, locate
from veripo_trl.verifier.pairs import KINDS

# What a pair has beside its question's columns.
PAIR_COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "kind",
    "chosen_ids",
    "rejected_id",
    "rejected_finished",
    "verdicts",
    "prompt_template",
    "policy",
)


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
    rows, extra, inputs = [], [], {}
    for given in sources:
        source = _source(given)
        files, origin = pair_files(source)
        if origin is not None:
            inputs[source.path] = origin
        before = len(rows)
        for file in files:
            table = read_parquet(file)
            if missing := [column for column in PAIR_COLUMNS if column not in table.column_names]:
                raise RowError(
                    f"{file}: no column {', '.join(missing)}. Expected pairs written by recipes/verify_rollouts.py."
                )
            if not len(table):
                continue
            found, problems = read_rows(
                [{"path": str(file), "media_root": source.media_root}],
                allow_urls=allow_urls,
                unique_ids=False,
                other_columns=PAIR_COLUMNS,
            )
            if problems:
                raise RowError(f"{file}: {len(problems)} pairs cannot be used, the first: {problems[0]}", problems)
            for row, pair in zip(found, table.select(PAIR_COLUMNS).to_pylist(), strict=True):
                if source.kinds and pair["kind"] not in source.kinds:
                    continue
                if source.limit is not None and len(rows) - before >= source.limit:
                    break
                _check_template(pair, template, file)
                rows.append(row)
                extra.append(
                    {
                        "chosen": pair["chosen"][0]["content"],
                        "rejected": pair["rejected"][0]["content"],
                        "rejected_finished": pair["rejected_finished"],
                        "kind": pair["kind"],
                    }
                )
    if not rows:
        raise RowError(
            f"no preference pairs in {[_source(given).path for given in sources]}. Pairs come from groups with right "
            f"and wrong, or consistent and inconsistent, rollouts: look at the table that verify_rollouts.py printed."
        )
    dataset = rows_to_dataset(rows)
    for column, kind in (
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("rejected_finished", pa.bool_()),
        ("kind", pa.string()),
    ):
        dataset = dataset.add_column(column, pa.array([pair[column] for pair in extra], kind))
    return Pairs(dataset, inputs)


def _source(given: dict) -> PairSource:
    known = list(PairSource.__dataclass_fields__)
    if not isinstance(given, dict) or "path" not in given or set(given) - set(known):
        raise RowError(f"pairs source {given!r}: expected `path` and any of {', '.join(known[1:])}, nothing else.")
    source = PairSource(**given)
    kinds = source.kinds
    if kinds is not None and (not isinstance(kinds, list) or not kinds or not all(kind in KINDS for kind in kinds)):
        raise RowError(f"pairs {source.path}: `kinds`: expected a list of some of {', '.join(KINDS)}; came {kinds!r}.")
    return source


def pair_files(source: PairSource) -> tuple[list[Path], dict | None]:
    """The parquet files of a source, in order, and where on the Hub they came from."""
    path, origin = Path(source.path).expanduser(), _hub_origin(source)
    if origin is not None:
        path = fetch(**origin)
    elif source.revision:
        raise RowError(f"pairs {source.path}: `revision` is for Hub datasets; leave it out of a local path.")
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet")) if path.is_dir() else []
    if not files:
        raise RowError(f"pairs {source.path}: expected a folder of parquet files or a Hub dataset; found no such file.")
    return files, origin


def _hub_origin(source: PairSource) -> dict | None:
    """{"repo_id", "revision"} of a Hub dataset, its revision a commit; None for files here. The main process looks and
    asks for all, so that they train on the same pairs."""
    found = None
    if PartialState().is_main_process:
        found = locate(source.path, "dataset", source.revision)
    return broadcast_object_list([found])[0]


def _check_template(pair: dict, template: PromptTemplate, file: Path) -> None:
    if pair["prompt_template"] != template.hash:
        raise RowError(
            f"{file}: its rollouts were made with the prompt template of hash {pair['prompt_template']}, this run's "
            f"{template.name!r} has {template.hash}. Set prompt_template to the one of the GRPO run."
        )
