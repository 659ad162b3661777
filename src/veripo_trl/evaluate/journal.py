"""An evaluation that can be broken off anywhere: a journal of answers, and the files made from it at the end.

For `--output_path run/vsi.json`: `vsi.journal.jsonl` grows a line per row; when every row has been dealt with,
`vsi.json` (VerIPO's form), `vsi.record.json` (what each answer was made with) and, if rows failed, `vsi.errors.json`
are written, each whole or not at all.
"""

import fcntl
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from veripo_trl.errors import VeripoError
from veripo_trl.evaluate.generate import Waiting, describe_completion, encoded_batches
from veripo_trl.evaluate.questions import place_image
from veripo_trl.files.disk import room_for
from veripo_trl.files.tables import write_json
from veripo_trl.model.encoding import EncodedPrompt, PromptEncoder


class JournalError(VeripoError):
    """The output belongs to another process or to a run of other settings."""


class OutputFiles:
    """The files of one evaluation, by its output path."""

    def __init__(self, output_path: str | Path):
        self.output = Path(output_path)
        if self.output.suffix != ".json":
            raise JournalError(f"output_path {str(output_path)!r}: expected a name that ends in .json.")
        self.journal = self.output.with_suffix(".journal.jsonl")
        self.record = self.output.with_suffix(".record.json")
        self.errors = self.output.with_suffix(".errors.json")
        self.lock = self.output.with_name(f".{self.output.name}.lock")
        self.merged = self.output.with_name(f".{self.output.name}.merged")  # weights with their adapter, for vLLM


def lock_output(files: OutputFiles, *, rank: int | None = None):
    """Claim an output for this process until it ends or closes what is returned.

    A POSIX lock rather than flock: a decoding worker forked from this process does not inherit it, so that a killed
    run can be started again at once. `rank`: a process of a data-parallel run locks a byte of its own, and as long as
    one of them outlives a killed run, that cannot be started again.

    Raises:
        JournalError: another process writes to this output.
    """
    files.output.parent.mkdir(parents=True, exist_ok=True)
    handle = open(files.lock, "a")  # noqa: SIM115  open for as long as the lock is held
    try:
        if rank is None:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # every byte: nobody else is there
            fcntl.lockf(handle, fcntl.LOCK_UN, 0, 1)  # all but the first are for this run's own processes
        else:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank + 1)
    except OSError:
        handle.close()
        raise JournalError(
            f"{files.output}: another process is writing to it. Wait for it to end, stop it, or choose another "
            f"output_path."
        ) from None
    return handle


class Journal:
    """The answers so far, by key; every append is on disk when it returns.

    Args:
        header: what the answers depend on. A journal of another header is refused.
        repair: cut off a last line that was not written to its end; for the one process that owns the journal.

    Attributes:
        answers, errors: {key: line}. A row that failed is tried again by the next run; the later line counts.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, repair: bool = True):
        self.path, self.answers, self.errors = path, {}, {}
        self._read_to = 0
        header = {"journal": 1, **json.loads(json.dumps(header))}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        found = _parse(whole.split(b"\n", 1)[0]) if whole else header
        if found is None or found.get("journal") != 1:
            raise JournalError(
                f"{path}: not a journal of an evaluation, or a damaged one. Choose another output_path, or remove it."
            )
        if found != header:
            differing = sorted(name for name in {*found, *header} if found.get(name) != header.get(name))
            told = "; ".join(f"{name}: {_short(found.get(name))} → {_short(header.get(name))}" for name in differing)
            raise JournalError(
                f"{path} is of a run with other settings or rows ({told}). Go on with the old ones, choose another "
                f"output_path, or remove the journal."
            )
        if whole != content and repair:
            os.truncate(path, len(whole))
        if not whole:
            self._write(json.dumps(header) + "\n")
        self.read()

    def read(self) -> None:
        """Take in what was written since the last look, by this process or by others."""
        with open(self.path, "rb") as file:
            file.seek(self._read_to)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read_to += len(whole)
        for line in whole.splitlines():
            if (parsed := _parse(line)) is not None:
                self._take(parsed)

    def _take(self, line: dict) -> None:
        if "error" in line:
            self.errors[line["key"]] = line
        elif "key" in line:
            self.answers[line["key"]] = line
            self.errors.pop(line["key"], None)

    def append(self, lines: list[dict]) -> None:
        for line in lines:
            self._take(line)
        self._write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def _write(self, text: str) -> None:
        # One write in append mode: lines of several processes do not mix.
        rest = memoryview(text.encode())
        with room_for(self.path, len(rest)), open(self.path, "ab", buffering=0) as file:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())


def _parse(line: bytes) -> dict | None:
    """A line, or None for one that a killed process did not finish, or that is damaged: its row is done again."""
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) and ("journal" in parsed or isinstance(parsed.get("key"), str)) else None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def answer_questions(
    questions: list[dict],
    engine,
    encoder: PromptEncoder,
    journal: Journal,
    *,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    processes: int = 1,
    progress=None,
) -> Waiting:
    """Answer what the journal lacks, and write it there as it comes.

    Batches begin at fixed places, and one that is half done is computed whole again (what is written stays): what a
    row is answered does not depend on where a run was broken off. A row that cannot be encoded, or is too long for the
    engine, is left out of its batch and written as an error.

    Args:
        engine: `complete(prompts, places) -> token ids`, `tokenizer`, `decoding` and the attributes that
            `evaluate.TransformersEngine` names.
        rank, processes: this process takes every `processes`-th batch. progress: a tqdm bar.

    Returns:
        `start_s`: until the first batch was ready. `idle_s`: all the time after it in which the engine did not compute,
        for whatever reason.
    """
    starts = range(0, len(questions), batch_size)
    batches = [list(range(start, min(start + batch_size, len(questions)))) for start in starts][rank::processes]
    keys = [question["key"] for question in questions]
    batches = [places for places in batches if any(keys[place] not in journal.answers for place in places)]
    waiting = Waiting()
    parent = os.getppid()
    started, busy_before = time.perf_counter(), engine.busy_s
    with tempfile.TemporaryDirectory(prefix="veripo-images-") as folder:
        for places, prompts in encoded_batches(
            encoder,
            QuestionRows(questions, folder),
            batches,
            num_workers=num_workers,
            strict=False,
            waiting=waiting,
            prepare=engine.prepare,
        ):
            if processes > 1 and os.getppid() != parent:
                raise JournalError("The process that started this one has ended.")
            prompts = [_fitting(prompt, engine) for prompt in prompts]
            good = [(place, prompt) for place, prompt in zip(places, prompts, strict=True) if not isinstance(prompt, str)]
            failed = [(place, prompt) for place, prompt in zip(places, prompts, strict=True) if isinstance(prompt, str)]
            lines = [{**_name(questions[place]), "error": reason} for place, reason in failed]
            if any(keys[place] not in journal.answers for place, _ in good):
                completions = engine.complete([prompt for _, prompt in good], [place for place, _ in good])
                for (place, prompt), ids in zip(good, completions, strict=True):
                    if keys[place] not in journal.answers:
                        lines.append(_answer(questions[place], prompt, ids, engine, encoder))
            known = sum(keys[place] in journal.answers for place in places)
            journal.append(lines)
            if progress is not None:
                progress.update(len(places) - known)
    waiting.idle_s = time.perf_counter() - started - waiting.start_s - (engine.busy_s - busy_before)
    return waiting


def _fitting(prompt: EncodedPrompt | str, engine) -> EncodedPrompt | str:
    """A prompt, or the text of an error if its completion might not fit behind it."""
    longest = engine.decoding.max_new_tokens
    if isinstance(prompt, str) or len(prompt) + longest <= engine.context:
        return prompt
    return (
        f"PromptTooLongError: its prompt has {len(prompt)} tokens; with {longest} new ones (max_new_tokens) that is over "
        f"the model's context of {engine.context}. Lower the frames, their pixels or max_new_tokens."
    )


class QuestionRows:
    """The rows of questions by place, an image that a question carries as text put into a file on the way."""

    def __init__(self, questions: list[dict], folder: str):
        self.questions, self.folder = questions, folder

    def __getitem__(self, place: int) -> dict:
        question = self.questions[place]
        return place_image(question["raw"], question["row"], self.folder)


def _name(question: dict) -> dict:
    return {"key": question["key"], "position": question["position"], "question_id": question["row"]["question_id"]}


def _answer(question: dict, prompt: EncodedPrompt, ids: list[int], engine, encoder: PromptEncoder) -> dict:
    described = describe_completion(ids, tokenizer=engine.tokenizer, ends=engine.ends)
    return {
        **_name(question),
        "model_output": described.pop("completion"),
        **described,
        "prompt_tokens": len(prompt),
        **media_sizes(prompt, encoder.config),
        "media": prompt.media,
        "prompt_template": encoder.template.hash,
    }


def media_sizes(prompt: EncodedPrompt, config) -> dict:
    """`videos` and `images` of a prompt as [frames, height, width] and [height, width], and its `vision_tokens`."""
    vision = config.vision_config
    grids = {"videos": prompt.video_grid_thw, "images": prompt.image_grid_thw}
    sizes, tokens = {}, 0
    for kind, grid in grids.items():
        found = [] if grid is None else grid.tolist()
        steps = [[t * vision.temporal_patch_size, h * vision.patch_size, w * vision.patch_size] for t, h, w in found]
        sizes[kind] = steps if kind == "videos" else [step[1:] for step in steps]
        tokens += sum(t * h * w for t, h, w in found) // vision.spatial_merge_size**2
    return {**sizes, "vision_tokens": tokens}


def write_outputs(files: OutputFiles, questions: list[dict], journal: Journal, settings: dict) -> list[dict]:
    """Write the final files from a journal that has dealt with every row.

    A row that failed stays in the list with an empty `model_output`, so that no score rises because a video could not
    be read.

    Returns:
        The errors, in row order.

    Raises:
        JournalError: rows are missing.
    """
    dealt = {*journal.answers, *journal.errors}
    if missing := [question["position"] for question in questions if question["key"] not in dealt]:
        raise JournalError(f"{journal.path}: {len(missing)} rows are not answered yet (first: {missing[:5]}).")
    results, records, errors = [], [], []
    for question in questions:
        raw, line = question["raw"], journal.answers.get(question["key"])
        if line is None:
            line = journal.errors[question["key"]]
            errors.append(line)
        truth = raw["answer"] if "processed_question" in raw else raw["solution"]
        results.append({"question": raw, "ground_truth": truth, "model_output": line.get("model_output", "")})
        records.append({name: value for name, value in line.items() if name != "model_output"})
    write_json(files.record, {"settings": settings, "errors": len(errors), "rows": records})
    if errors:
        write_json(files.errors, errors)
    else:
        files.errors.unlink(missing_ok=True)
    write_json(files.output, results)
    return errors
