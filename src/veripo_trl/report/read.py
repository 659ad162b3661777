"""What a run left on disk, for its report: stages, rollouts, verdicts, pairs. Reads only; absent parts are named."""

import hashlib
import math
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from veripo_trl.answers.rewards import ACCURACIES
from veripo_trl.data.rollouts import SCHEMA_FIELDS
from veripo_trl.data.schema import content_of
from veripo_trl.errors import VeripoError
from veripo_trl.files.disk import FileError, read_json, read_parquet

MAX_ROLLOUTS = 64  # of one question on the page
MAX_PAIRS = 400  # of one kind, and on the page
MAX_CHARS = 20_000  # of one completion on the page
QUESTION = [name for name, _ in SCHEMA_FIELDS[1:9]]  # question_id … data_source
ROLLOUT = ["rollout_id", "step", "completion_tokens", "finish_reason"]
VERDICT = [
    "consistency",
    "concluded_answer",
    "accuracy",
    "repetition",
    "think_tokens",
    "judge",
    "reason",
]
COLUMNS = {  # that are read of the Parquet files in a stage's folders
    "rollouts": [*QUESTION, *ROLLOUT, "completion", "rewards", "advantage"],
    "verdicts": ["rollout_id", "question_id", *VERDICT],
    "pairs": [*QUESTION, "kind", "chosen_ids", "rejected_id", "chosen", "rejected", "verdicts"],
}


class ReportError(VeripoError):
    """A folder that holds nothing to report."""


def read_stages(runs: list[str | Path], absent: list[str]) -> tuple[str, list[dict]]:
    """The stages of run folders, in order: of a loop (`run.json`) its own, of any other folder itself.

    Args:
        absent: takes a line for everything that is not there or is broken, here and in the other functions.

    Returns:
        (title, stages). A stage: `name, recipe, status, minutes, folder (None if it is not there), results, arguments,
        history`.
    """
    stages, titles = [], []
    for run in map(Path, runs):
        if not run.is_dir():
            raise ReportError(
                f"{run}: no such folder (looked from {Path.cwd()}). Expected the folder of a run."
            )
        title = run.resolve().name
        entries = [{"name": title, "output_dir": run}]
        if (run / "run.json").is_file():
            record = _read_json(run / "run.json", absent)
            title, entries = record.get("name") or title, record.get("stages") or []
        stages += [_stage(entry, run, absent) for entry in entries]
        titles.append(title)
    return " + ".join(titles), stages


def find_path(path: str | Path, near: Path) -> Path | None:
    """An existing path, looked for from the working directory and from every folder above `near`.

    A run records paths as seen from where it was started; the report may be made elsewhere.
    """
    places = (place / Path(path).expanduser() for place in (Path.cwd(), *near.resolve().parents))
    return next((place for place in places if place.exists()), None)


def _stage(entry: dict, run: Path, absent: list[str]) -> dict:
    stage = {key: entry.get(key) for key in ("name", "recipe", "status", "minutes")}
    stage |= {"folder": None, "results": entry.get("results") or {}, "arguments": {}, "history": []}
    recorded = entry.get("output_dir") or ""
    folder = find_path(recorded, run) or run / Path(recorded).name  # of a loop that was moved
    if stage["status"] == "skipped":
        absent.append(
            f"Stage {stage['name']} was skipped: {entry.get('reason') or 'no reason recorded'}."
        )
        return stage
    if not recorded or not folder.is_dir():
        absent.append(
            f"Stage {stage['name']} ({stage['status']}): its folder {recorded} is not there."
        )
        return stage
    if (folder / "results.json").is_file():
        stage["results"] = _read_json(folder / "results.json", absent) or stage["results"]
    elif not stage["results"]:
        absent.append(f"{stage['name']}: no results.json, so it is unfinished.")
    if (folder / "_arguments.json").is_file():
        stage["arguments"] = _read_json(folder / "_arguments.json", absent)
    history = stage["results"].get("history")
    states = sorted(
        folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime
    )
    if not history and states:  # of a run that is not finished
        history = _read_json(states[-1], absent).get("log_history")
    minutes = stage["minutes"] or stage["results"].get("minutes")
    return stage | {"folder": folder, "history": history or [], "minutes": minutes}


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


def read_scores(stages: list[dict], runs: list, given: list, absent: list[str]) -> list[dict]:
    """Benchmark results, as evaluation/calculate_score.py writes them: `{"name", "rows", "notes"}` a file.

    Those of the run are `*.scores.json` in its folders and in `evaluation/` below them; `given` are others.
    """
    folders = [*map(Path, runs), *(stage["folder"] for stage in stages if stage["folder"])]
    files = [
        path
        for folder in folders
        for sub in ("", "evaluation/")
        for path in folder.glob(f"{sub}*.scores.json")
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
            found.append(
                {"name": path.name.removesuffix(".scores.json"), "rows": rows, "notes": notes}
            )
        except (KeyError, TypeError):
            absent.append(f"{path.name} holds no scores: expected what calculate_score.py writes.")
    return found


def table_of(lines: list[dict]) -> list[dict[str, str]]:
    """The lines for people, also as a file of scores has them, in which NaN is null. Last the types' own metrics, of
    which MAE is in the truth's units."""
    metrics = sorted({key for line in lines for key in line if ": " in key})
    further = {
        "official %": "official", "judged: ours %": "ours_judged", "judged: inconsistent %": "judge_inconsistency",
        "judged: unknown %": "judge_unknown", "judges agree %": "agreement",
    }  # fmt: skip
    further = {name: key for name, key in further.items() if any(key in line for line in lines)}

    def shown(value: float | None, scale: int = 100, places: int = 1) -> str:
        return "–" if value is None or math.isnan(value) else f"{scale * value:.{places}f}"

    return [
        {
            "benchmark": f"· {line['category']}: {line['value']}" if line["category"] else line["benchmark"],
            "rows": str(line["rows"]),
            "ours %": shown(line["ours"]),
            "95%": f"{shown(line['ours_low'])}–{shown(line['ours_high'])}",
            "released %": shown(line["released"]),
            "unparsable %": shown(line["unparsable"]),
            "truncated %": shown(line["truncated"]),
            "inconsistent %": shown(line["inconsistency"]),
            "unknown %": shown(line["unknown"]),
            "thinking": shown(line["think_length"], 1),
            **{name: shown(line.get(key)) for name, key in further.items()},
            **({"kappa": shown(line.get("kappa"), 1, 2)} if "agreement" in further.values() else {}),
            **{
                key if "MAE" in key else f"{key} %": shown(line.get(key), 1 if "MAE" in key else 100)
                for key in metrics
            },
        }
        for line in lines
    ]


def _rows(stage: dict, part: str, absent: list[str]) -> Iterator[dict]:
    """The rows of a stage's "rollouts", "verdicts" or "pairs". A file that cannot be read is left out, and what to do
    about it is said on the screen too."""
    for path in sorted((stage["folder"] / part).glob("*.parquet")) if stage["folder"] else ():
        try:
            table = read_parquet(path, COLUMNS[part])
        except FileError as error:
            absent.append(_without_place(error, path))
            print(absent[-1], file=sys.stderr)
            continue
        for batch in table.to_batches(max_chunksize=1000):
            yield from batch.to_pylist()


class _Sample:
    """Of all questions those that are first in an order drawn by `seed`, as many as `budget` bytes hold (at least one),
    with what was met of them: `questions` is {place in the order: that}."""

    def __init__(self, seed: int, budget: int):
        self.seed, self.budget, self.size, self.end = seed, budget, 0, b"\xff" * 32
        self.questions: dict[bytes, dict] = {}

    def take(self, question_id: str, size: int) -> dict | None:
        """What is kept of a question, of which `size` more bytes come now; None if it is not in the sample."""
        place = hashlib.sha256(f"{self.seed} {question_id}".encode()).digest()
        if place >= self.end:
            return None
        kept = self.questions.setdefault(place, {"size": 0, "verdicts": {}, "contents": {}})
        kept["size"] += size
        self.size += size
        while self.size > self.budget and len(self.questions) > 1:
            self.end = max(self.questions)
            self.size -= self.questions.pop(self.end)["size"]
        return self.questions.get(place)


def read_rows(stages: list[dict], absent: list[str], *, seed: int, budget: int) -> dict:
    """Count all rollouts, verdicts and pairs, and draw those for the page, in one pass over the files.

    Rollouts of two runs can have the same ids, which are made from the names of folders: a verdict belongs to the last
    such rollout in a stage before its own, or in its own, so that the last stage is read first. Of several verdicts on
    a rollout the first counts.

    Returns:
        `counts`, per stage: `rollouts, questions, accuracy, completion_tokens, truncated, verdicts (by consistency),
        pairs (by kind)`; `questions`, drawn by `seed` until their texts take `budget` bytes, and `all_questions`, how
        many there are; `pairs`, drawn likewise, the kinds in turn, `MAX_PAIRS` at most.
    """
    sample, rng, ids, counts = _Sample(seed, budget), random.Random(seed), set(), []
    pairs, seen = defaultdict(list), Counter()
    for number, stage in tqdm(
        [*enumerate(stages)][::-1], desc="reading", unit="stage", leave=False, disable=None
    ):
        verdicts, kinds, own, tokens, cut, accuracies = Counter(), Counter(), set(), [], [], []
        for row in _rows(stage, "verdicts", absent):
            verdicts[row["consistency"]] += 1
            if (kept := sample.take(row["question_id"], 200)) is not None:
                kept["verdicts"][row["rollout_id"]] = row
        for row in _rows(stage, "rollouts", absent):
            rewards = row["rewards"] or {}
            own.add(row["question_id"])
            tokens.append(row["completion_tokens"])
            cut.append(row["finish_reason"] == "length")
            accuracies.append(rewards.get(accuracy_name(rewards)))
            if (
                kept := sample.take(
                    row["question_id"], min(len(row["completion"]), MAX_CHARS) + 400
                )
            ) is not None:
                question = kept["contents"].setdefault(content_of(row), {"rollouts": []})
                question |= _question(row, number)
                question["rollouts"].append(
                    _rollout(row, number, kept["verdicts"].pop(row["rollout_id"], None))
                )
        for row in _rows(stage, "pairs", absent):
            kinds[row["kind"]] += 1
            kept, place = pairs[row["kind"]], seen[row["kind"]]
            seen[row["kind"]] += 1
            if place >= MAX_PAIRS:  # each is as likely to stay
                place = rng.randrange(place + 1)
            if place < MAX_PAIRS:
                kept[place : place + 1] = [_pair(row, number)]
        ids |= own
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        means = {"accuracy": known, "completion_tokens": tokens, "truncated": cut}
        count = {name: fmean(values) if values else None for name, values in means.items()}
        count |= {
            "rollouts": len(tokens),
            "questions": len(own),
            "verdicts": verdicts,
            "pairs": kinds,
        }
        counts.insert(0, count)
    if lost := sum(len(kept["verdicts"]) for kept in sample.questions.values()):
        absent.append(
            f"{lost} verdicts have no rollouts before them. Give a verifier's folder after that of its rollouts."
        )
    for kept in pairs.values():
        rng.shuffle(kept)
    turns = zip_longest(*(pairs[kind] for kind in sorted(pairs, key=str)))
    return {
        "counts": counts,
        "questions": [
            _ordered(question)
            for _, kept in sorted(sample.questions.items())
            for question in sorted(
                kept["contents"].values(), key=lambda question: question["stage"]
            )
        ],
        "all_questions": len(ids),
        "pairs": [pair for turn in turns for pair in turn if pair is not None][:MAX_PAIRS],
    }


def accuracy_name(names: Iterable[str]) -> str | None:
    """Which reward is the accuracy: `accuracy_reward`, the shortest that begins like it, or another of `ACCURACIES`; None
    without one."""
    known = [name for name in names if name.startswith("accuracy")]
    known += [name for name in names if name.removesuffix("_reward") in ACCURACIES]
    return min(known, key=len, default=None)


def _ordered(question: dict) -> dict:
    """A question with its rollouts by stage; of very many some, evenly, so that early and late ones are there."""
    rollouts = sorted(question["rollouts"], key=lambda rollout: rollout["stage"])
    step = max(1, len(rollouts) / MAX_ROLLOUTS)
    shown = [rollouts[int(index * step)] for index in range(min(len(rollouts), MAX_ROLLOUTS))]
    return {**question, "total": len(rollouts), "rollouts": shown}


def _question(row: dict, stage: int) -> dict:
    lists = ("options", "videos", "images")
    return {name: row[name] or ([] if name in lists else "") for name in QUESTION} | {
        "stage": stage
    }


def _rollout(row: dict, stage: int, verdict: dict | None) -> dict:
    rewards = {
        name.removesuffix("_reward"): value for name, value in (row["rewards"] or {}).items()
    }
    verdict = _verdict(verdict)
    return {
        **{name: row[name] for name in ROLLOUT},
        "stage": stage,
        "completion": _cut(row["completion"]),
        "rewards": {name: _short(value) for name, value in rewards.items() if value is not None},
        "advantage": _short(row["advantage"]),
        "accuracy": (verdict or {}).get("accuracy", _short(rewards.get(accuracy_name(rewards)))),
        "verdict": verdict,
    }


def _verdict(verdict: dict | None) -> dict | None:
    return verdict and {
        name: _short(verdict[name]) for name in VERDICT if verdict[name] not in (None, "")
    }


def _short(value):
    return round(value, 4) if isinstance(value, float) else value


def _cut(text: str) -> str:
    if len(text) <= MAX_CHARS:
        return text
    return f"{text[:MAX_CHARS]} […{len(text) - MAX_CHARS} more characters are not on this page]"


def _pair(row: dict, stage: int) -> dict:
    verdicts = row["verdicts"]
    texts = {
        side: "\n".join(message["content"] for message in row[side])
        for side in ("chosen", "rejected")
    }
    return _question(row, stage) | {
        **{name: row[name] for name in ("kind", "chosen_ids", "rejected_id")},
        "fault": verdicts["fault"],
        "chosen_verdicts": list(map(_verdict, verdicts["chosen"])),
        "rejected_verdict": _verdict(verdicts["rejected"]),
        **{side: _cut(text) for side, text in texts.items()},
    }
