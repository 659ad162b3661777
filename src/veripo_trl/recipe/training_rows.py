"""The rows that a stage trains on and is evaluated with: rows held out, solved questions left out."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from datasets import load_from_disk

from veripo_trl.data.media_paths import check_media
from veripo_trl.data.rows import load_rows
from veripo_trl.data.schema import content_of
from veripo_trl.errors import ConfigError
from veripo_trl.recipe.arguments import DataArguments


def load_training_rows(data_args: DataArguments, *, seed: int, output_dir: str | None = None):
    """The training rows, mixed and shuffled by seed, with every media file looked at.

    Args:
        output_dir: the run's; several processes need it, see `_once`.
    """
    return _once(lambda: _training_rows(data_args, seed), output_dir, "training")


def load_eval_rows(data_args: DataArguments, *, output_dir: str | None = None):
    """The held-out rows in file order, or None where the recipe names none."""
    if not (data_args.holdout or data_args.eval_datasets):
        return None
    return _once(lambda: _eval_rows(data_args), output_dir, "heldout")


def _once(make: Callable, output_dir: str | None, name: str):
    """Rows that the first process reads and looks at; all others map them into memory, from a folder beside the run's:
    reading 263,000 rows takes 23 s and 1.4 GB."""
    state = PartialState()
    if output_dir is None or state.num_processes == 1:
        return make()
    folder = rows_folder(output_dir) / name
    if state.is_main_process:
        make().save_to_disk(folder)
    state.wait_for_everyone()
    return load_from_disk(folder)


def rows_folder(output_dir: str) -> Path:
    """Where a run of several processes has its rows while it runs: beside its folder, as a finished one of its name is
    only moved aside later. Every start writes them anew."""
    run = Path(output_dir).absolute()
    return run.with_name(f".{run.name}.rows")


def _training_rows(data_args: DataArguments, seed: int):
    if not data_args.datasets:
        raise ConfigError("Expected `datasets:`, a list of {path: …}; none was given.")
    solved: dict[str, str | None] = {}
    for file in data_args.leave_out or []:
        solved |= _solved_questions(file)
    manifest, urls = data_args.manifest, data_args.allow_urls
    dataset = load_rows(data_args.datasets, seed=seed, allow_urls=urls, manifest=manifest)
    if data_args.holdout:
        dataset = split_holdout(dataset, data_args.holdout)[1]
    if solved:
        dataset = _without(dataset, solved)
    check_media(dataset, allow_urls=data_args.allow_urls)
    return dataset


def _eval_rows(data_args: DataArguments):
    if data_args.holdout:
        manifest, urls = data_args.manifest, data_args.allow_urls
        dataset = load_rows(data_args.datasets, shuffle=False, allow_urls=urls, manifest=manifest)
        dataset = split_holdout(dataset, data_args.holdout)[0]
    else:
        urls = data_args.allow_urls
        dataset = load_rows(data_args.eval_datasets, shuffle=False, allow_urls=urls, unique_ids=False)
    check_media(dataset, allow_urls=data_args.allow_urls)
    return dataset


def split_holdout(dataset, count: int):
    """(the rows of the `count` ids whose hashes are smallest, the others), in their order.

    By nothing but the ids, so that a smaller set of rows never trains on what a larger one with them holds out.
    """
    ids = list(dataset["question_id"])
    if count >= len(ids):
        raise ConfigError(f"holdout: {count} of {len(ids)} rows of `datasets` leave none to train on. Give fewer, or 0.")
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
    if PartialState().is_main_process:
        gone = len(questions) - len(kept)
        print(f"left out {gone} rows of {len(solved)} solved questions, {len(kept)} rows stay", flush=True)
    return dataset.select(kept)


def _solved_questions(file: str) -> dict[str, str | None]:
    """The questions that a `solved.json` says to leave out, {id: content}."""
    try:
        content = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
        questions = [str(question) for question in content["dropped"]]
        contents = content.get("contents", [None] * len(questions))
        return dict(zip(questions, contents, strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'leave_out: {file}: expected a solved.json of verify_rollouts.py, {{"dropped": [question ids], …}}, '
            f"got {type(error).__name__}: {error}."
        ) from error
