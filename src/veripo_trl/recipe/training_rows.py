"""The rows that a stage trains on and is evaluated with: commits of the Hub, rows held out, solved questions left out."""

import hashlib
import json
import logging
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from trl import ModelConfig

from veripo_trl.data.media_paths import check_media
from veripo_trl.data.rows import load_rows
from veripo_trl.data.schema import content_of
from veripo_trl.errors import ConfigError
from veripo_trl.hub.ask import HubError
from veripo_trl.hub.locate import SHA, fetch, is_local, locate
from veripo_trl.recipe.arguments import DataArguments

logger = logging.getLogger(__name__)


def pin_data(data_args: DataArguments) -> DataArguments:
    """The arguments with the commit of whatever they read from the Hub, asked once for all processes."""
    pinned = [None]
    if PartialState().is_main_process:
        pinned = [
            {
                "datasets": _pin_sources(data_args.datasets),
                "eval_datasets": _pin_sources(data_args.eval_datasets),
                "leave_out": data_args.leave_out and [_solved_file(entry)[1] for entry in data_args.leave_out],
            }
        ]
    return replace(data_args, **broadcast_object_list(pinned)[0])


def _pin_sources(sources: list[dict] | None) -> list[dict] | None:
    if sources is None:
        return None
    pinned = []
    for source in sources:
        origin = locate(source.get("path", ""), "dataset", source.get("revision"))
        pinned.append({**source, "revision": origin["revision"]} if origin else source)
    return pinned


def hub_inputs(data_args: DataArguments, model_args: ModelConfig) -> dict[str, dict]:
    """{"model" or a dataset's path: {"repo_id", "revision"}} of what a stage has read from the Hub, by its arguments
    with their commits."""
    sources = [*(data_args.datasets or []), *(data_args.eval_datasets or [])]
    read = {"model": (model_args.model_name_or_path, model_args.model_revision)}
    read |= {source["path"]: (source["path"], source.get("revision")) for source in sources}
    read |= {f"left out by {name}": (name, sha) for name, _, sha in (e.partition("@") for e in data_args.leave_out or [])}
    return {
        name: {"repo_id": place, "revision": revision}
        for name, (place, revision) in read.items()
        if revision and SHA.fullmatch(revision) and not is_local(place)
    }


def load_training_rows(data_args: DataArguments, *, seed: int):
    """The training rows, mixed and shuffled by seed, with every media file looked at."""
    if not data_args.datasets:
        raise ConfigError("Expected `datasets:`, a list of {path: …}; none was given.")
    solved: dict[str, str | None] = {}
    for entry in data_args.leave_out or []:
        solved |= _solved_questions(entry)
    dataset = load_rows(
        data_args.datasets, seed=seed, allow_urls=data_args.allow_urls, manifest=data_args.manifest, unique_ids=True
    )
    if data_args.holdout:
        dataset = split_holdout(dataset, data_args.holdout)[1]
    if solved:
        dataset = _without(dataset, solved)
    check_media(dataset, allow_urls=data_args.allow_urls)
    return dataset


def load_eval_rows(data_args: DataArguments):
    """The held-out rows in file order, or None where the recipe names none."""
    held_out = data_args.holdout > 0
    sources = data_args.datasets if held_out else data_args.eval_datasets
    if not sources:
        return None
    dataset = load_rows(
        sources, shuffle=False, allow_urls=data_args.allow_urls, unique_ids=held_out,
        manifest=data_args.manifest if held_out else None,
    )  # fmt: skip
    if held_out:
        dataset = split_holdout(dataset, data_args.holdout)[0]
    check_media(dataset, allow_urls=data_args.allow_urls)
    return dataset


def split_holdout(dataset, count: int):
    """(the rows of the `count` ids whose hashes are smallest, the others), in their order.

    By nothing but the ids, so that a smaller set of rows never trains on what a larger one with them holds out.
    """
    ids = list(dataset["question_id"])
    if count >= len(ids):
        raise ConfigError(f"holdout: {count} of {len(ids)} rows of `datasets` leave none to train on. Give fewer.")
    held = set(sorted(ids, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])
    indices = {side: [index for index, name in enumerate(ids) if (name in held) is side] for side in (True, False)}
    return dataset.select(indices[True]), dataset.select(indices[False])


def refuse_trained(heldout, trained, *, holdout: int) -> None:
    """Raise unless no held-out question is among the rows that a stage before trained on."""
    if holdout and (seen := sorted(set(heldout["question_id"]) & set(trained["question_id"]))):
        raise ConfigError(
            f"holdout: {len(seen)} of the {holdout} questions have pairs ({', '.join(seen[:3])}, …): the GRPO run "
            f"trained on them. Give that run the same datasets, manifest and holdout, or give this one eval_datasets."
        )


def count_kinds(pairs) -> dict[str, int]:
    """How many preference pairs there are of each kind, printed."""
    kinds = dict(sorted(Counter(pairs["kind"]).items()))
    if PartialState().is_main_process:
        print(f"{len(pairs)} pairs ({', '.join(f'{number} {kind}' for kind, number in kinds.items())})", flush=True)
    return kinds


def _without(dataset, solved: dict[str, str | None]):
    """The rows of all other questions than the solved, {id: content}; how many are gone is printed."""
    questions = list(dataset["question_id"])
    for index, question in enumerate(questions):
        if solved.get(question) and solved[question] != content_of(dataset[index]):
            raise ConfigError(
                f"leave_out: {question!r} is another question in `datasets` than the solved one of that id. Leave out "
                f"questions of the same data, or set an `id_prefix`."
            )
    kept = [index for index, question in enumerate(questions) if question not in solved]
    if not kept:
        raise ConfigError(f"leave_out: all {len(questions)} rows are of solved questions: nothing is left to train on.")
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"left out {len(questions) - len(kept)} rows of solved questions, {len(kept)} rows stay", flush=True)
        if strange := sorted(set(solved).difference(questions)):
            logger.warning(
                "leave_out: %d of %d solved questions are not among the rows of `datasets` (%s). Is it of the same "
                "data, with the same `id_prefix`?",
                len(strange), len(solved), ", ".join(map(repr, strange[:3])),
            )  # fmt: skip
    return dataset.select(kept)


def _solved_file(entry: str) -> tuple[Path, str]:
    """(the file of an entry of `leave_out`; the entry, of the Hub with its commit)."""
    repo_id, _, revision = entry.partition("@")
    try:
        here = entry.endswith(".json") or Path(entry).expanduser().exists()  # its folder may have an @ in its name
        if not here and (origin := locate(repo_id, "dataset", revision or None)):
            folder = fetch(**origin, patterns=("solved.json",))
            return folder / "solved.json", f"{repo_id}@{origin['revision']}"
    except HubError as error:
        raise HubError(
            f"leave_out: {entry}: no such file here, so it was read as a Hub dataset of pairs. {error}"
        ) from error
    return Path(entry).expanduser(), entry


def _solved_questions(entry: str) -> dict[str, str | None]:
    """The questions that the `solved.json` of an entry of `leave_out` says to leave out, {id: content}."""
    file, entry = _solved_file(entry)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        questions = [str(question) for question in content["dropped"]]
        contents = content.get("contents", [None] * len(questions))
        return dict(zip(questions, contents, strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'leave_out: {entry}: expected a solved.json of verify_rollouts.py, {{"dropped": [question ids], …}}, '
            f"got {type(error).__name__}: {error}."
        ) from error
