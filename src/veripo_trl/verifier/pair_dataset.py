"""Reads preference pairs, as recipes/verify_rollouts.py wrote them, into the dataset that DPO trains on."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from veripo_trl.data.prompts import PromptTemplate
from veripo_trl.data.rows import read_rows
from veripo_trl.data.schema import RowError, row_error, rows_to_dataset
from veripo_trl.files.disk import read_parquet
from veripo_trl.hub.cards import shown_name
from veripo_trl.hub.locate import fetch, locate
from veripo_trl.verifier.files import PAIR_COLUMNS, refuse_other_template
from veripo_trl.verifier.pairs import KINDS

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


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
        if kinds is not None and (
            not isinstance(kinds, list) or not kinds or not set(kinds) <= set(KINDS)
        ):
            raise RowError(
                f"pairs {self.path}: `kinds`: expected a list of some of {', '.join(KINDS)}; came {kinds!r}."
            )


def load_pairs(
    sources: list[dict],
    *,
    template: PromptTemplate,
    allow_urls: bool = False,
    policy: str | None = None,
) -> tuple["Dataset", dict[str, dict]]:
    """Read and check preference pairs.

    Args:
        template: of this run: pairs whose rollouts were made with another wording are refused, since DPO would train
            on prompts that the policy never saw.
        policy: folder or Hub name of what is to be trained; a warning tells of pairs that others seem to have sampled.

    Returns:
        Rows with `chosen` and `rejected` (texts), `rejected_finished`, `kind`; and what came from the Hub, {path:
        {"repo_id", "revision"}}.

    Raises:
        RowError: no pairs, malformed rows. FileError: a file that holds something else. ConfigError: another template.
        HubError: a dataset that cannot be read from the Hub.
    """
    found, inputs = [], {}
    for given in sources:
        source = pair_source(given)
        files, origin = pair_files(source)
        if origin is not None:
            inputs[source.path] = origin
        both = (both for file in files for both in _read(file, source, template, allow_urls))
        found += [
            (row, pair) for row, pair in both if not source.kinds or pair["kind"] in source.kinds
        ][: source.limit]
    if not found:
        raise RowError(
            f"no preference pairs in {sources}. Pairs come from groups with right and wrong, or consistent and "
            f"inconsistent, rollouts: look at the table that verify_rollouts.py printed."
        )
    rows, pairs = zip(*found, strict=True)
    if policy is not None and PartialState().is_main_process:
        name_other_policy(pairs, policy)
    dataset = rows_to_dataset(rows)
    for column in ("chosen", "rejected", "rejected_finished", "kind"):
        dataset = dataset.add_column(column, [pair[column] for pair in pairs])
    return dataset, inputs


def _read(
    file: Path, source: PairSource, template: PromptTemplate, allow_urls: bool
) -> list[tuple[dict, dict]]:
    """A file's pairs, each as its question's row and its other columns."""
    pairs = read_parquet(file, list(PAIR_COLUMNS)).to_pylist()
    if not pairs:
        return []
    refuse_other_template(
        template, [pair["prompt_template"] for pair in pairs], f"the rollouts of {file}"
    )
    where = [{"path": str(file), "media_root": source.media_root}]
    rows, problems = read_rows(
        where, allow_urls=allow_urls, unique_ids=False, other_columns=PAIR_COLUMNS
    )
    if problems:
        raise row_error(problems)
    texts = [{side: pair[side][0]["content"] for side in ("chosen", "rejected")} for pair in pairs]
    return [(row, pair | text) for row, pair, text in zip(rows, pairs, texts, strict=True)]


def name_other_policy(pairs: Iterable[dict], policy: str) -> None:
    """Warn where a policy has the name neither of a run whose rollouts were chosen, which their ids begin with, nor of
    what such a run started from. Names are all that is known."""
    runs = {name.split("/")[0] for pair in pairs for name in pair["chosen_ids"] or () if "/" in name}
    starts = {pair["policy"] for pair in pairs} - {None}
    own = {*Path(policy).expanduser().resolve().parts[-2:]}  # of a checkpoint the run's too
    if (runs | starts) and not runs & own and shown_name(policy) not in starts:
        logger.warning(
            "model_name_or_path is %s; the pairs were sampled by %s, which started from %s. DPO expects the policy that "
            "sampled them, which is its reference too. If it is that one under another name, all is well.",
            policy,
            ", ".join(sorted(runs)) or "unknown runs",
            ", ".join(sorted(starts)) or "an unknown policy",
        )


def pair_source(given: dict) -> PairSource:
    try:
        return PairSource(**given)
    except TypeError as error:
        known = ", ".join(PairSource.__dataclass_fields__)
        raise RowError(
            f"pairs source {given!r}: expected `path`, and nothing but {known} ({error})."
        ) from error


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
        raise RowError(
            f"pairs {source.path}: `revision` is for Hub datasets; leave it out of a local path."
        )
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise RowError(
            f"pairs {source.path}: expected a folder of parquet files or a Hub dataset; found no such file."
        )
    return files, origin
