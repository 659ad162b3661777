"""What a run left on disk, for its report: stages, rollouts, verdicts, pairs. Reads only; absent parts are named."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.data.rows import content_of
from veripo_trl.errors import VeripoError
from veripo_trl.files.disk import FileError, read_parquet

MAX_ROLLOUTS = 64  # of one question on the page
MAX_PAIRS = 400
MAX_CHARS = 20_000  # of one completion on the page


class ReportError(VeripoError):
    """A folder that holds nothing to report."""


def read_stages(runs: list[str | Path]) -> tuple[str, list[dict], list[str]]:
    """The stages of run folders, in order: of a loop (`run.json`) its own, of any other folder itself.

    Returns:
        (title, stages, what is absent). A stage: `name, recipe, iteration, status, minutes, folder (None if it is not
        there), results, arguments, history, rollouts, verdicts, pairs (files)`.
    """
    stages, absent, titles = [], [], []
    for run in map(Path, runs):
        if not run.is_dir():
            raise ReportError(f"{run}: no such folder (looked from {Path.cwd()}). Expected the folder of a run.")
        titles.append(run.resolve().name)
        if (run / "run.json").is_file():
            record = _read_json(run / "run.json", absent) or {}
            titles[-1] = record.get("name") or titles[-1]
            stages += [_loop_stage(entry, run, absent) for entry in record.get("stages") or []]
        else:
            stages.append(_stage(run, {"name": run.resolve().name}, absent))
    for part, what in (
        ("rollouts", "No rollouts: there are no questions to look at."),
        ("verdicts", "No verdicts: the verifier has not run, or its folder was not given."),
        ("pairs", "No preference pairs."),
        ("history", "No training log: there are no training curves."),
    ):
        if not any(stage[part] for stage in stages):
            absent.append(what)
    return " + ".join(titles), stages, absent


def check_not_empty(runs: list, stages: list[dict], scores: list[dict]) -> None:
    """Raise where folders hold nothing that a report could show."""
    parts = ("results", "history", "rollouts", "verdicts", "pairs")
    if not scores and not any(stage[part] for stage in stages for part in parts):
        raise ReportError(
            f"{', '.join(map(str, runs))}: nothing to report. Expected run.json of a loop, or results.json, "
            f"rollouts/*.parquet, verdicts/*.parquet or pairs/*.parquet of a stage."
        )


def find_path(path: str | Path, near: Path) -> Path | None:
    """An existing path, looked for from the working directory and from every folder above `near`.

    A run records paths as seen from where it was started; the report may be made elsewhere.
    """
    path = Path(path).expanduser()
    places = [path] if path.is_absolute() else [place / path for place in (Path.cwd(), *near.resolve().parents)]
    return next((place for place in places if place.exists()), None)


def _loop_stage(entry: dict, run: Path, absent: list[str]) -> dict:
    name = str(entry.get("name"))
    folder = find_path(entry["output_dir"], run) if entry.get("output_dir") else None
    if folder is None and entry.get("output_dir"):
        folder = next((place for place in (run / name, run / Path(entry["output_dir"]).name) if place.is_dir()), None)
    if folder is None:
        if entry.get("status") == "skipped":
            absent.append(f"Stage {name} was skipped: {entry.get('reason') or 'no reason recorded'}.")
        else:
            absent.append(f"Stage {name} ({entry.get('status')}): its folder {entry.get('output_dir')} is not there.")
    return _stage(folder, entry, absent)


def _stage(folder: Path | None, entry: dict, absent: list[str]) -> dict:
    stage = {key: entry.get(key) for key in ("name", "recipe", "iteration", "status", "minutes")}
    stage |= {"folder": folder, "results": entry.get("results") or {}, "arguments": {}, "history": []}
    stage |= {"rollouts": [], "verdicts": [], "pairs": []}
    if folder is None:
        return stage
    if (folder / "results.json").is_file():
        stage["results"] = _read_json(folder / "results.json", absent) or stage["results"]
    elif not stage["results"]:
        absent.append(f"{stage['name']}: no results.json, so it is unfinished.")
    if (folder / "_arguments.json").is_file():
        stage["arguments"] = _read_json(folder / "_arguments.json", absent) or {}
    stage["history"] = stage["results"].get("history") or _checkpoint_history(folder, absent)
    stage["minutes"] = stage["minutes"] or stage["results"].get("minutes")
    stage["rollouts"] = RolloutStore(folder / "rollouts").files()
    for part in ("verdicts", "pairs"):
        stage[part] = sorted((folder / part).glob("*.parquet"))
    return stage


def _checkpoint_history(folder: Path, absent: list[str]) -> list[dict]:
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    return ((_read_json(states[-1], absent) or {}).get("log_history") or []) if states else []


def _read_json(path: Path, absent: list[str]) -> dict | None:
    """A JSON object, or None where a file is broken: the report then says so and goes on without it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        absent.append(f"{path.parent.name}/{path.name} cannot be read: {error}")
        return None
    if not isinstance(content, dict):
        absent.append(f"{path.parent.name}/{path.name} holds no JSON object.")
        return None
    return content


def read_scores(runs: list[str | Path], stages: list[dict], given: list[str | Path], absent: list[str]) -> list[dict]:
    """Benchmark results, as evaluation/calculate_score.py writes them: `{"name", "lines", "notes"}` a file.

    Those of the run are `*.scores.json` in its folders and in `evaluation/` below them; `given` are others.
    """
    folders = dict.fromkeys([*map(Path, runs), *(stage["folder"] for stage in stages if stage["folder"] is not None)])
    files = [path for folder in folders for sub in ("", "evaluation") for path in (folder / sub).glob("*.scores.json")]
    for path in map(Path, given):
        if not path.is_file():
            raise ReportError(f"--scores {path}: no such file. Expected <name>.scores.json of calculate_score.py.")
        files.append(path)
    found = []
    for path in dict.fromkeys(path.resolve() for path in sorted(files)):
        content = _read_json(path, absent)
        if content is not None and isinstance(content.get("lines"), list):
            name = path.name.removesuffix(".scores.json")
            found.append({"name": name, "lines": content["lines"], "notes": content.get("notes") or []})
        elif content is not None:
            absent.append(f"{path.name} holds no scores (`lines`).")
    return found


def survey(stages: list[dict], *, progress: bool) -> tuple[list[dict], dict[str, int]]:
    """Count everything, without reading it into Python.

    Returns:
        (per stage: `rollouts, questions, accuracy, completion_tokens, truncated, verdicts (by consistency), pairs (by
        kind)`; per question: bytes that its rollouts would take on the page).
    """
    counts, sizes = [], Counter()
    files = sum(len(stage[part]) for stage in stages for part in ("rollouts", "verdicts", "pairs"))
    with tqdm(total=files, desc="counting", unit="file", disable=not progress) as bar:
        for stage in stages:
            total, questions, sums = 0, set(), Counter()
            for path in stage["rollouts"]:
                table = _read(path, ["question_id", "completion", "completion_tokens", "finish_reason", "rewards"])
                total += len(table)
                lengths = pc.min_element_wise(pc.binary_length(table["completion"]), MAX_CHARS)
                grouped = pa.table({"id": table["question_id"], "bytes": lengths}).group_by("id")
                for row in grouped.aggregate([("bytes", "sum"), ("bytes", "count")]).to_pylist():
                    sizes[row["id"]] += row["bytes_sum"] + 400 * row["bytes_count"]
                    questions.add(row["id"])
                sums["tokens"] += pc.sum(table["completion_tokens"]).as_py() or 0
                sums["truncated"] += pc.sum(pc.equal(table["finish_reason"], "length")).as_py() or 0
                accuracies = _accuracies(table)
                if accuracies is not None:
                    sums["accuracy"] += pc.sum(accuracies).as_py() or 0
                    sums["scored"] += len(accuracies) - accuracies.null_count
                bar.update()
            verdicts, pairs = Counter(), Counter()
            for part, column, counter in (("verdicts", "consistency", verdicts), ("pairs", "kind", pairs)):
                for path in stage[part]:
                    for value in pc.value_counts(_read(path, [column])[column]).to_pylist():
                        counter[value["values"]] += value["counts"]
                    bar.update()
            counts.append(
                {
                    "rollouts": total,
                    "questions": len(questions),
                    "accuracy": sums["accuracy"] / sums["scored"] if sums["scored"] else None,
                    "completion_tokens": sums["tokens"] / total if total else None,
                    "truncated": sums["truncated"] / total if total else None,
                    "verdicts": dict(verdicts),
                    "pairs": dict(pairs),
                }
            )
    return counts, dict(sizes)


def _read(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return read_parquet(path, columns)
    except FileError as error:
        raise ReportError(str(error)) from error


def _accuracies(table: pa.Table):
    names = [table["rewards"].type.field(place).name for place in range(table["rewards"].type.num_fields)]
    name = accuracy_name(names)
    return None if name is None else pc.struct_field(table["rewards"], name)


def accuracy_name(names: Iterable[str]) -> str | None:
    """Which reward is the accuracy: `accuracy_reward`, or the first whose name begins like it; None without one."""
    return next((name for name in sorted(names, key=len) if name.startswith("accuracy")), None)


def choose_questions(sizes: dict[str, int], *, seed: int, budget: int) -> list[str]:
    """Question ids in an order drawn by `seed`, as many as `budget` bytes hold (at least one)."""
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    chosen, used = [], 0
    for question_id in order:
        used += sizes[question_id]
        if chosen and used > budget:
            break
        chosen.append(question_id)
    return chosen


def read_questions(stages: list[dict], chosen: list[str], absent: list[str], *, progress: bool) -> list[dict]:
    """The chosen questions with their rollouts and verdicts, in the order of `chosen`.

    Rollouts of two runs can have the same ids, which are made from the names of folders: a verdict belongs to the last
    such rollout in a stage before its own, or in its own; of several verdicts on it the first counts.
    """
    wanted = pa.array(chosen, pa.string())
    rows: dict[str, list[list[dict]]] = {"rollouts": [], "verdicts": []}  # by stage
    files = sum(len(stage[part]) for stage in stages for part in rows)
    with tqdm(total=files, desc="reading", unit="file", disable=not progress) as bar:
        for stage in stages:
            for part, read in rows.items():
                read.append([])
                for path in stage[part]:
                    read[-1] += _rows_of(path, wanted)
                    bar.update()
    open_verdicts: dict[tuple, dict] = {}  # of later stages, whose rollouts have not been met
    for rollouts, verdicts in reversed(list(zip(rows["rollouts"], rows["verdicts"], strict=True))):
        open_verdicts |= {(verdict["question_id"], verdict["rollout_id"]): verdict for verdict in verdicts}
        for row in rollouts:
            row["verdict"] = open_verdicts.pop((row["question_id"], row["rollout_id"]), None)
    if open_verdicts:
        absent.append(
            f"{len(open_verdicts)} verdicts have no rollouts before them. Give a verifier's folder after that of its "
            f"rollouts."
        )
    found: dict[tuple, dict] = {}  # questions of two runs may share an id
    for place, rollouts in enumerate(rows["rollouts"]):
        for row in rollouts:
            question = found.setdefault((row["question_id"], content_of(row)), _question(row, place))
            question["rollouts"].append(_rollout(row, place, row["verdict"]))
    for question in found.values():
        question["total"] = len(question["rollouts"])
        if question["total"] > MAX_ROLLOUTS:  # evenly, so that early and late ones are there
            step = question["total"] / MAX_ROLLOUTS
            question["rollouts"] = [question["rollouts"][int(place * step)] for place in range(MAX_ROLLOUTS)]
    order = {question_id: place for place, question_id in enumerate(chosen)}
    return sorted(found.values(), key=lambda question: order[question["id"]])


def _rows_of(path: Path, wanted: pa.Array) -> list[dict]:
    table = _read(path)
    return table.filter(pc.is_in(table["question_id"], value_set=wanted)).to_pylist()


def _question(row: dict, place: int) -> dict:
    return {
        "id": row["question_id"],
        "problem": row["problem"],
        "options": row["options"] or [],
        "type": row["problem_type"],
        "solution": row["solution"],
        "videos": row["videos"] or [],
        "images": row["images"] or [],
        "source": row["data_source"] or "",
        "stage": place,
        "rollouts": [],
    }


def _rollout(row: dict, place: int, verdict: dict | None) -> dict:
    rewards = {name.removesuffix("_reward"): value for name, value in (row["rewards"] or {}).items()}
    accuracy = rewards.get(accuracy_name(rewards))
    if verdict is not None and verdict.get("accuracy") is not None:
        accuracy = verdict["accuracy"]
    return {
        "id": row["rollout_id"],
        "stage": place,
        "step": row["step"],
        "text": _cut(row["completion"]),
        "tokens": row["completion_tokens"],
        "cut": row["finish_reason"] == "length",
        "rewards": {name: _short(value) for name, value in rewards.items() if value is not None},
        "advantage": _short(row["advantage"]),
        "accuracy": _short(accuracy),
        "verdict": _verdict(verdict),
    }


def _verdict(verdict: dict | None) -> dict | None:
    if verdict is None:
        return None
    kept = ("consistency", "concluded_answer", "accuracy", "repetition", "think_tokens", "judge", "reason", "format_ok")
    return {key: _short(verdict[key]) for key in kept if verdict.get(key) not in (None, "")}


def _short(value):
    return round(value, 4) if isinstance(value, float) else value


def _cut(text: str) -> str:
    if len(text) <= MAX_CHARS:
        return text
    return f"{text[:MAX_CHARS]} […{len(text) - MAX_CHARS} more characters are not on this page]"


def read_pairs(stages: list[dict], *, seed: int) -> tuple[list[dict], int]:
    """(pairs drawn by `seed`, the kinds in turn, `MAX_PAIRS` at most; how many there are)."""
    places = defaultdict(list)  # by kind: (stage, file, row)
    for number, stage in enumerate(stages):
        for path in stage["pairs"]:
            for row, kind in enumerate(_read(path, ["kind"])["kind"].to_pylist()):
                places[kind].append((number, path, row))
    kinds = sorted(places, key=str)
    for kind in kinds:
        random.Random(seed).shuffle(places[kind])
    longest = max(map(len, places.values()), default=0)
    order = [places[kind][turn] for turn in range(longest) for kind in kinds if turn < len(places[kind])]
    drawn = order[:MAX_PAIRS]
    rows: dict[tuple, dict] = {}
    for number, path in sorted({(number, path) for number, path, _ in drawn}):
        own = [row for n, p, row in drawn if (n, p) == (number, path)]
        for row, record in zip(own, _read(path).take(own).to_pylist(), strict=True):
            rows[number, path, row] = _pair(record, number)
    return [rows[place] for place in drawn], len(order)


def _pair(record: dict, place: int) -> dict:
    verdicts = record.get("verdicts") or {}
    return {
        "id": record["question_id"],
        "stage": place,
        "problem": record.get("problem") or "",
        "options": record.get("options") or [],
        "type": record.get("problem_type") or "",
        "solution": record.get("solution") or "",
        "kind": record["kind"],
        "chosen": _cut(_content(record["chosen"])),
        "rejected": _cut(_content(record["rejected"])),
        "chosen_ids": record.get("chosen_ids") or [],
        "rejected_id": record.get("rejected_id") or "",
        "chosen_verdicts": [_verdict(verdict) for verdict in verdicts.get("chosen") or []],
        "rejected_verdict": _verdict(verdicts.get("rejected")),
        "fault": verdicts.get("fault"),
    }


def _content(messages) -> str:
    """The text of one side of a pair: a message, whose content is a text or a list of parts."""
    if isinstance(messages, str):
        return messages
    texts = []
    for message in messages:
        content = message["content"]
        texts.append(content if isinstance(content, str) else "".join(part.get("text") or "" for part in content))
    return "\n".join(texts)
