"""Evaluation files: what VerIPO released as JSON, read as it is, and files of our own rows.

A released row has `question_id, video_path, question, answer, processed_question`, in VSI-Bench also `scene_name` and
for choice rows `options`. Row and ground truth are taken from it as they stand; question ids repeat, so a row is known
by its position in the file and its content.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from veripo_trl.answers.score import SolutionError, check_solution
from veripo_trl.data.fields import checked_row
from veripo_trl.data.files import read_file, uncompressed
from veripo_trl.data.official import make_rows, print_counts, read_official
from veripo_trl.data.schema import QUESTION, FieldError, RowError, row_error, show
from veripo_trl.files.disk import read_parquet
from veripo_trl.sources.record import ground_truths, kind_of, read_options
from veripo_trl.verifier.files import find_rollout_files

RELEASED_TAIL = "\nAnswer with the option's letter from the given choices directly."
RELEASED_COLUMNS = ("question_id", "video_path", "answer", "processed_question")


def read_questions(
    path: str | Path, *, video_dir: str | Path | None = None, limit: int | None = None, benchmark: str | None = None
) -> list[dict]:
    """The questions of a file that `rows` reads, released rows or our own, of a folder of rollouts, or of a benchmark's
    official file or folder.

    Args:
        benchmark: whose official records they are: one of `sources.BENCHMARKS`, or the user's own `module:function`.
        video_dir: what video paths are relative to; the file's folder by default. limit: the first n rows.

    Returns:
        Per question a dict: `position`, `key` (position and content hash), `raw` (the row as it is in the file), `row`
        (as `rows.load_rows` gives it).

    Raises:
        RowError: no rows, rows of neither kind, or malformed ones: with row, field and remedy.
    """
    path = Path(path)
    root = Path(video_dir).expanduser() if video_dir else path if path.is_dir() else path.parent
    if not root.is_dir():
        raise RowError(f"video_dir {str(root)!r}: no such folder. Give the one that the rows' video paths start from.")
    own = rollout_questions if path.is_dir() else read_records
    records = (_benchmark_rows(path, benchmark) if benchmark else own(path))[:limit]
    released = sum("processed_question" in record for record in records)
    if released not in (0, len(records)):
        raise RowError(f"{path}: {released} of {len(records)} rows are in the released form. Give one form a file.")
    questions = []

    def read(position: int, raw: dict) -> None:
        ours = from_released(raw, stem=uncompressed(path).stem) if released else raw
        question_id = None if ours.get("question_id") in (None, "") else str(ours["question_id"])
        row = checked_row(ours, question_id, "question_id", file=str(path), allow_urls=False)
        check_truths(raw)
        row["media_root"] = str(root.resolve())
        questions.append({"position": position, "key": key_of(position, raw), "raw": raw, "row": row})

    _each(records, path, read, "cannot be used")
    return questions


def rollout_questions(folder: str | Path) -> list[dict]:
    """The questions of a folder of rollouts, each once, by their ids."""
    names, found = ["question_id", *QUESTION, "data_source"], {}
    for file in find_rollout_files(folder):
        for row in read_parquet(file, names).to_pylist():
            found.setdefault(row["question_id"], row)
    return [found[name] for name in sorted(found)]


def _benchmark_rows(path: Path, benchmark: str) -> list[dict]:
    """The rows of a benchmark's official records, with what was counted printed. Raises RowError for broken ones."""
    rows, counted = make_rows(read_official(path, benchmark), benchmark)
    broken = [(*place, row) for *place, row in rows if isinstance(row, FieldError)]
    if broken:
        columns = ("file", "row", "question_id")
        raise row_error([dict(zip(columns, place, strict=True)) | error.problem for *place, error in broken])
    if not rows:
        raise RowError(f"{path}: no question of {benchmark} in it; left out: {dict(counted)}.")
    if "VERIPO_EVALUATION_RANK" not in os.environ:  # the engines of a data-parallel run read after it
        print_counts(str(path), benchmark, rows, counted)
    return [row for *_, row in rows]


def read_predictions(path: str | Path) -> list[dict]:
    """A file of `{question, ground_truth, model_output}`, ours or of VerIPO's script, the questions of either form.

    Raises:
        RowError: entries that cannot be scored: with row, field and remedy.
    """
    predictions = read_records(path)
    _each(predictions, path, _check_prediction, "cannot be scored")
    return predictions


def _each(records: list[dict], path: str | Path, check, what: str) -> None:
    """Call `check(position, record)` for all; one RowError for those in which a field is wrong."""
    problems = []
    for position, record in enumerate(records):
        try:
            check(position, record)
        except FieldError as error:
            raw = record["question"] if isinstance(record.get("question"), dict) else record
            where = {"file": str(path), "row": position + 1, "question_id": raw.get("question_id")}
            problems.append({**where, **error.problem})
    if problems:
        raise row_error(problems, what)


def _check_prediction(position: int, prediction: dict) -> None:
    if not {"question", "ground_truth", "model_output"} <= prediction.keys():
        came, remedy = ", ".join(prediction), "Give the output of an evaluation."
        raise FieldError("(row)", "question, ground_truth and model_output", came, remedy)
    question, output = prediction["question"], prediction["model_output"]
    if not isinstance(output, str):
        raise FieldError("model_output", "a text", show(output), 'Write "" where there is no answer.')
    if not isinstance(question, dict):
        raise FieldError("question", "an object with the row's columns", show(question), "Correct or remove it.")
    _check_columns(question, RELEASED_COLUMNS if "processed_question" in question else ("problem_type", "solution"))
    if not isinstance(question.get("options") or [], (list, dict)):
        raise FieldError("options", "a list like ['A. red', …]", show(question["options"]), "Write it so.")
    check_truths(question)


def _check_columns(raw: dict, columns: tuple[str, ...]) -> None:
    if missing := [column for column in columns if raw.get(column) is None]:
        raise FieldError("question", f"a row with {', '.join(columns)}", f"none in {missing}", "Correct or remove it.")


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file. Raises RowError for anything else."""
    records = [record for _, _, record in read_file(Path(path))]
    if not all(isinstance(record, dict) for record in records):
        raise RowError(f"{path}: expected rows, each an object with columns.")
    return records


def key_of(position: int, raw: dict) -> str:
    """The name of a question in a file: its place, counted from 0, and a hash of its content."""
    return f"{position}-{content_hash(raw)}"


def content_hash(raw: dict) -> str:
    """16 hex digits over a row's content, whatever the order of its columns."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def from_released(raw: dict, *, stem: str = "") -> dict:
    """A released row in the columns of `rows`. Raises FieldError for one that lacks columns, or has an image."""
    _check_columns(raw, RELEASED_COLUMNS)
    if raw.get("image"):
        remedy = "Write rows of this project's form, with the image's path in `images`."
        raise FieldError("image", "no base64 image, which none of the released rows carries", "one", remedy)
    problem = str(raw["processed_question"]).removesuffix(RELEASED_TAIL)
    path = str(raw["video_path"])
    return {
        "question_id": str(raw["question_id"]),
        "problem": problem,
        "videos": [path],
        "data_source": path.split("/")[0] if "/" in path else stem or "released",
        **task_of(raw),
    }


def task_of(raw: dict) -> dict:
    """`problem_type`, `options` and `solution` of a row of either form: what scoring needs.

    A released row says the type of its answer by its answer alone, with one exception: numbers of VSI-Bench (rows that
    have a `scene_name`) are estimates, scored by mean relative accuracy. Of several truths all must be of that type.
    """
    if "processed_question" not in raw:
        options = raw.get("options") or []
        if isinstance(options, dict):
            options = [f"{key}. {text}" for key, text in sorted(options.items()) if text]
        return {"problem_type": raw["problem_type"], "options": options, "solution": str(raw["solution"])}
    problem = str(raw["processed_question"]).removesuffix(RELEASED_TAIL)
    options = list(raw.get("options") or read_options(problem))
    truths = ground_truths(raw["answer"])
    if all(re.fullmatch("[A-Z]+", truth) for truth in truths):
        kind = "multiple choice"
    elif (kind := kind_of(truths)) == "numerical" and "scene_name" in raw:
        kind = "regression"
    options = options if kind == "multiple choice" else []
    return {"problem_type": kind, "options": options, "solution": truths[0]}


def truths_of(raw: dict) -> list[str]:
    """All answers that count as right for a row of either form."""
    if "processed_question" in raw:
        return ground_truths(raw["answer"])
    return [str(truth) for truth in raw.get("alternatives") or [raw["solution"]]]


def check_truths(raw: dict) -> None:
    """Raise FieldError for a truth of a row, of either form, that no answer could be compared with."""
    field = "answer" if "processed_question" in raw else "alternatives" if raw.get("alternatives") else "solution"
    if not isinstance(raw.get("alternatives") or [], list):
        raise FieldError(field, "a list of answers", show(raw["alternatives"]), "Write it so, or take it out.")
    task = task_of(raw)
    for truth in truths_of(raw):
        try:
            check_solution(problem_type=task["problem_type"], solution=truth, options=task["options"])
        except SolutionError as error:
            remedy = "Correct the row's truth, its options or its problem_type, or remove the row."
            raise FieldError(field, "answers that others can be compared with", str(error), remedy) from error
