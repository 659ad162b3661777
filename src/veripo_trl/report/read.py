"""What a run left on disk, for its report: stages, rollouts, verdicts, pairs. Reads only; absent parts are named."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate, zip_longest
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from veripo_trl.data.rollouts import SCHEMA_FIELDS
from veripo_trl.data.schema import content_of
from veripo_trl.errors import VeripoError
from veripo_trl.evaluate.scores import table_of
from veripo_trl.files.disk import FileError, read_json, read_parquet
from veripo_trl.verifier.files import PAIR_SCHEMA, VERDICT_SCHEMA

MAX_ROLLOUTS = 64  # of one question on the page
MAX_PAIRS = 400
MAX_CHARS = 20_000  # of one completion on the page
COLUMNS = {  # of the Parquet files in a stage's folders
    "rollouts": [*(name for name, _ in SCHEMA_FIELDS), "rewards"],
    "verdicts": VERDICT_SCHEMA.names,
    "pairs": PAIR_SCHEMA.names,
}
QUESTION = COLUMNS["rollouts"][1:9]  # question_id … data_source
VERDICT = ("consistency", "concluded_answer", "accuracy", "repetition", "think_tokens", "judge", "reason")
_LISTS = ("options", "videos", "images")


class ReportError(VeripoError):
    """A folder that holds nothing to report."""


def read_stages(runs: list[str | Path]) -> tuple[str, list[dict], list[str]]:
    """The stages of run folders, in order: of a loop (`run.json`) its own, of any other folder itself.

    Returns:
        (title, stages, what is absent). A stage: `name, recipe, status, minutes, folder (None if it is not there),
        results, arguments, history, rollouts, verdicts, pairs (files)`.
    """
    stages, absent, titles = [], [], []
    for run in map(Path, runs):
        if not run.is_dir():
            raise ReportError(
                f"{run}: no such folder (looked from {Path.cwd()}). Expected the folder of a run."
            )
        name = run.resolve().name
        if (run / "run.json").is_file():
            record = _read_json(run / "run.json", absent)
            name = record.get("name") or name
            stages += [
                _stage(_loop_folder(entry, run, absent), entry, absent)
                for entry in record.get("stages") or []
            ]
        else:
            stages.append(_stage(run, {"name": name}, absent))
        titles.append(name)
    for part, what in (
        ("rollouts", "No rollouts: there are no questions to look at."),
        ("verdicts", "No verdicts: the verifier has not run, or its folder was not given."),
        ("pairs", "No preference pairs."),
        ("history", "No training log: there are no training curves."),
    ):
        if not any(stage[part] for stage in stages):
            absent.append(what)
    return " + ".join(titles), stages, absent


def find_path(path: str | Path, near: Path) -> Path | None:
    """An existing path, looked for from the working directory and from every folder above `near`.

    A run records paths as seen from where it was started; the report may be made elsewhere.
    """
    places = (place / Path(path).expanduser() for place in (Path.cwd(), *near.resolve().parents))
    return next((place for place in places if place.exists()), None)


def _loop_folder(entry: dict, run: Path, absent: list[str]) -> Path | None:
    name, recorded = entry.get("name"), entry.get("output_dir")
    if recorded:
        folder = find_path(recorded, run) or run / Path(recorded).name  # of a loop that was moved
        if folder.is_dir():
            return folder
    if entry.get("status") == "skipped":
        absent.append(f"Stage {name} was skipped: {entry.get('reason') or 'no reason recorded'}.")
    else:
        absent.append(f"Stage {name} ({entry.get('status')}): its folder {recorded} is not there.")
    return None


def _stage(folder: Path | None, entry: dict, absent: list[str]) -> dict:
    stage = {key: entry.get(key) for key in ("name", "recipe", "status", "minutes")}
    stage |= {"folder": folder, "results": entry.get("results") or {}, "arguments": {}, "history": []}
    if folder is None:
        return stage | {part: [] for part in COLUMNS}
    if (folder / "results.json").is_file():
        stage["results"] = _read_json(folder / "results.json", absent) or stage["results"]
    elif not stage["results"]:
        absent.append(f"{stage['name']}: no results.json, so it is unfinished.")
    if (folder / "_arguments.json").is_file():
        stage["arguments"] = _read_json(folder / "_arguments.json", absent)
    stage["history"] = stage["results"].get("history") or _checkpoint_history(folder, absent)
    stage["minutes"] = stage["minutes"] or stage["results"].get("minutes")
    return stage | {part: sorted((folder / part).glob("*.parquet")) for part in COLUMNS}


def _checkpoint_history(folder: Path, absent: list[str]) -> list[dict]:
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    return (_read_json(states[-1], absent).get("log_history") or []) if states else []


def _read_json(path: Path, absent: list[str]) -> dict:
    """A JSON object, {} where a file is broken: the report then says so and goes on without it."""
    try:
        return read_json(path, remedy="Remove it, or start what wrote it.")
    except FileError as error:
        absent.append(_without_place(error, path))
        return {}


def _without_place(error: FileError, path: Path) -> str:
    """An error's text for the page: the file by its name in the run, without the folders of this machine."""
    return str(error).replace(str(path), "/".join(path.parts[-3:]))


def read_scores(
    runs: list[str | Path], stages: list[dict], given: list[str | Path], absent: list[str]
) -> list[dict]:
    """Benchmark results, as evaluation/calculate_score.py writes them: `{"name", "rows", "notes"}` a file.

    Those of the run are `*.scores.json` in its folders and in `evaluation/` below them; `given` are others.
    """
    folders = [*map(Path, runs), *(stage["folder"] for stage in stages if stage["folder"] is not None)]
    files = [
        path
        for folder in folders
        for sub in ("", "evaluation")
        for path in (folder / sub).glob("*.scores.json")
    ]
    for path in map(Path, given):
        if not path.is_file():
            raise ReportError(
                f"--scores {path}: no such file. Expected <name>.scores.json of calculate_score.py."
            )
        files.append(path)
    found = []
    for path in dict.fromkeys(path.resolve() for path in sorted(files)):
        content = _read_json(path, absent)
        try:
            rows, notes = table_of(content["lines"]), content["notes"]
            found.append({"name": path.name.removesuffix(".scores.json"), "rows": rows, "notes": notes})
        except (KeyError, TypeError):
            absent.append(f"{path.name} holds no scores: expected what calculate_score.py writes.")
    return found


def tables(stage: dict, part: str, broken: list[str], columns: list[str] | None = None) -> Iterator[tuple]:
    """(path, table) of each file of a stage's "rollouts", "verdicts" or "pairs". One that cannot be read is left out
    from then on, and what to do about it goes into `broken`."""
    for path in list(stage[part]):
        try:
            table = read_parquet(path, columns or COLUMNS[part])
        except FileError as error:
            stage[part].remove(path)
            broken.append(_without_place(error, path))
        else:
            yield path, table


def survey(stages: list[dict], broken: list[str], *, progress: bool) -> tuple[list[dict], dict[str, int]]:
    """Count everything, a file at a time.

    Returns:
        (per stage: `rollouts, questions, accuracy, completion_tokens, truncated, verdicts (by consistency), pairs (by
        kind)`; per question: about the bytes that its rollouts would take on the page).
    """
    counts, sizes = [], Counter()
    for stage in tqdm(stages, desc="counting", unit="stage", disable=not progress):
        questions, tokens, cut, accuracies = set(), [], [], []
        columns = ["question_id", "completion", "completion_tokens", "finish_reason", "rewards"]
        for _, table in tables(stage, "rollouts", broken, columns):
            for row in table.to_pylist():
                questions.add(row["question_id"])
                sizes[row["question_id"]] += min(len(row["completion"]), MAX_CHARS) + 400
                tokens.append(row["completion_tokens"])
                cut.append(row["finish_reason"] == "length")
                accuracies.append((row["rewards"] or {}).get(accuracy_name(row["rewards"] or {})))
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        count = {"rollouts": len(tokens), "questions": len(questions)}
        means = (("accuracy", known), ("completion_tokens", tokens), ("truncated", cut))
        count |= {name: fmean(values) if values else None for name, values in means}
        for part, column in (("verdicts", "consistency"), ("pairs", "kind")):
            found = tables(stage, part, broken, [column])
            count[part] = dict(Counter(value for _, table in found for value in table[column].to_pylist()))
        counts.append(count)
    return counts, dict(sizes)


def accuracy_name(names: Iterable[str]) -> str | None:
    """Which reward is the accuracy: `accuracy_reward`, or the shortest that begins like it; None without one."""
    return min((name for name in names if name.startswith("accuracy")), key=len, default=None)


def choose_questions(sizes: dict[str, int], *, seed: int, budget: int) -> list[str]:
    """Question ids in an order drawn by `seed`, as many as `budget` bytes hold (at least one)."""
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    return fitting(order, [sizes[question_id] for question_id in order], budget)


def fitting(items: list, sizes: list[int], budget: int) -> list:
    """The first items whose sizes sum up to `budget` at most; at least one, if there is one."""
    return items[: max(1, sum(total <= budget for total in accumulate(sizes)))]


def read_questions(
    stages: list[dict], chosen: list[str], absent: list[str], broken: list[str], *, progress: bool
) -> list[dict]:
    """The chosen questions with their rollouts and verdicts, in the order of `chosen`.

    Rollouts of two runs can have the same ids, which are made from the names of folders: a verdict belongs to the last
    such rollout in a stage before its own, or in its own; of several verdicts on it the first counts.
    """
    wanted = pa.array(chosen, pa.string())

    def rows_of(stage: dict, part: str) -> list[dict]:
        found = (
            table.filter(pc.is_in(table["question_id"], value_set=wanted))
            for _, table in tables(stage, part, broken)
        )
        return [row for table in found for row in table.to_pylist()]

    rollouts: list[list[dict]] = []  # by stage, the last one first
    verdicts: dict[tuple, dict] = {}  # of later stages, whose rollouts have not been met
    for stage in tqdm(stages[::-1], desc="reading", unit="stage", disable=not progress):
        verdicts |= {(row["question_id"], row["rollout_id"]): row for row in rows_of(stage, "verdicts")}
        rollouts.append(rows_of(stage, "rollouts"))
        for row in rollouts[-1]:
            row["verdict"] = verdicts.pop((row["question_id"], row["rollout_id"]), None)
    if verdicts:
        absent.append(
            f"{len(verdicts)} verdicts have no rollouts before them. Give a verifier's folder after that of its rollouts."
        )
    found: dict[tuple, dict] = {}  # questions of two runs may share an id
    for number, rows in enumerate(rollouts[::-1]):
        for row in rows:
            question = found.setdefault(
                (row["question_id"], content_of(row)), {**_question(row, number), "rollouts": []}
            )
            question["rollouts"].append(_rollout(row, number))
    for question in found.values():
        question["total"] = len(question["rollouts"])
        if question["total"] > MAX_ROLLOUTS:  # evenly, so that early and late ones are there
            step = question["total"] / MAX_ROLLOUTS
            question["rollouts"] = [question["rollouts"][int(index * step)] for index in range(MAX_ROLLOUTS)]
    order = {question_id: index for index, question_id in enumerate(chosen)}
    return sorted(found.values(), key=lambda question: order[question["question_id"]])


def _question(row: dict, stage: int) -> dict:
    return {name: row[name] or ([] if name in _LISTS else "") for name in QUESTION} | {"stage": stage}


def _rollout(row: dict, stage: int) -> dict:
    rewards = {name.removesuffix("_reward"): value for name, value in (row["rewards"] or {}).items()}
    verdict = row["verdict"] or {"accuracy": None}
    accuracy = rewards.get(accuracy_name(rewards)) if verdict["accuracy"] is None else verdict["accuracy"]
    return {
        **{name: row[name] for name in ("rollout_id", "step", "completion_tokens", "finish_reason")},
        "stage": stage,
        "completion": _cut(row["completion"]),
        "rewards": {name: _short(value) for name, value in rewards.items() if value is not None},
        "advantage": _short(row["advantage"]),
        "accuracy": _short(accuracy),
        "verdict": _verdict(row["verdict"]),
    }


def _verdict(verdict: dict | None) -> dict | None:
    return verdict and {name: _short(verdict[name]) for name in VERDICT if verdict[name] not in (None, "")}


def _short(value):
    return round(value, 4) if isinstance(value, float) else value


def _cut(text: str) -> str:
    if len(text) <= MAX_CHARS:
        return text
    return f"{text[:MAX_CHARS]} […{len(text) - MAX_CHARS} more characters are not on this page]"


def read_pairs(stages: list[dict], broken: list[str], *, seed: int) -> tuple[list[dict], int]:
    """(pairs drawn by `seed`, the kinds in turn, `MAX_PAIRS` at most; how many there are)."""
    found = defaultdict(list)  # by kind: (stage, file, row in it)
    for number, stage in enumerate(stages):
        for path, table in tables(stage, "pairs", broken, ["kind"]):
            for row, kind in enumerate(table["kind"].to_pylist()):
                found[kind].append((number, path, row))
    kinds = [found[kind] for kind in sorted(found, key=str)]
    for kind in kinds:
        random.Random(seed).shuffle(kind)
    drawn = [pair for turn in zip_longest(*kinds) for pair in turn if pair is not None]
    records = {}
    for number, stage in enumerate(stages):
        for path in sorted({path for at, path, _ in drawn[:MAX_PAIRS] if at == number}):
            for _, table in tables({"pairs": [path]}, "pairs", broken):
                rows = [row for _, file, row in drawn[:MAX_PAIRS] if file == path]
                records |= {(path, row): table.slice(row, 1).to_pylist()[0] for row in rows}
    pairs = [_pair(records[path, row], at) for at, path, row in drawn[:MAX_PAIRS] if (path, row) in records]
    return pairs, len(drawn)


def _pair(record: dict, stage: int) -> dict:
    verdicts = record["verdicts"]
    return _question(record, stage) | {
        **{name: record[name] for name in ("kind", "chosen_ids", "rejected_id")},
        "fault": verdicts["fault"],
        "chosen_verdicts": list(map(_verdict, verdicts["chosen"])),
        "rejected_verdict": _verdict(verdicts["rejected"]),
        **{
            side: _cut("\n".join(message["content"] for message in record[side]))
            for side in ("chosen", "rejected")
        },
    }
