"""An evaluation that can be broken off anywhere: answers go into a journal, and at the end into the files made from it.

For `--output_path run/vsi.json`: `vsi.journal.jsonl` grows a line per row; when every row has been dealt with,
`vsi.json` (VerIPO's form) and `vsi.record.json` (what each answer was made with, or why there is none) are written, each
whole or not at all.
"""

import os
from itertools import islice
from pathlib import Path

from veripo_trl.errors import ConfigError
from veripo_trl.evaluate.generate import batches_of, describe_completion, encoded_batches, think_through
from veripo_trl.evaluate.votes import majority
from veripo_trl.files.journal import Journal, JournalError
from veripo_trl.files.tables import write_json
from veripo_trl.model.encoding import EncodedPrompt, PromptEncoder
from veripo_trl.model.streaming import Stream, StreamEncoder


class OutputFiles:
    """The files of one evaluation, by its output path."""

    def __init__(self, output_path: str | Path):
        self.output = Path(output_path)
        if self.output.suffix != ".json":
            raise ConfigError(
                f"output_path {str(output_path)!r}: expected a name that ends in .json."
            )
        self.journal = self.output.with_suffix(".journal.jsonl")
        self.record = self.output.with_suffix(".record.json")
        self.rollouts = self.output.with_suffix("")  # answers about perturbed videos
        self.merged = self.output.with_name(
            f".{self.output.name}.merged"
        )  # weights with their adapter, for vLLM


def answered(journal: Journal) -> set[str]:
    """The keys of the questions that have an answer. One that failed is tried again by the next run."""
    return {key for key, line in journal.lines.items() if "error" not in line}


def answer_questions(
    questions: list[dict],
    engine,
    encoder: PromptEncoder | StreamEncoder,
    journal: Journal,
    *,
    batch_size: int,
    num_workers: int,
    samples: int = 1,
    rank: int = 0,
    processes: int = 1,
    progress=None,
) -> None:
    """Answer what the journal lacks, and write it there as it comes.

    Batches begin at fixed indices, and one that is half done is computed whole again (what is written stays): what a
    row is answered does not depend on where a run was broken off. A row that cannot be encoded, or is too long for the
    engine, is left out of its batch and written as an error.

    Args:
        engine: `complete(prompts, indices, samples=) -> token ids`, `tokenizer`, `decoding` and the attributes that
            `evaluate.TransformersEngine` names.
        samples: candidates per question, of which the `majority` elects the answer.
        encoder: a `StreamEncoder` for questions about videos that are shown clip by clip.
        rank, processes: this process takes every `processes`-th batch. progress: a tqdm bar.
    """
    keys, done, parent = (
        [question["key"] for question in questions],
        answered(journal),
        os.getppid(),
    )
    batches = batches_of(len(questions), batch_size)[rank::processes]
    batches = [indices for indices in batches if any(keys[index] not in done for index in indices)]
    rows = [question["row"] for question in questions]
    for indices, prompts in encoded_batches(encoder, rows, batches, num_workers=num_workers, strict=False):
        if processes > 1 and os.getppid() != parent:
            raise JournalError("The process that started this one has ended.")
        found = {
            index: _fitting(prompt, engine) for index, prompt in zip(indices, prompts, strict=True)
        }
        good = {index: prompt for index, prompt in found.items() if not isinstance(prompt, str)}
        lines = [
            {**_name(questions[index]), "error": found[index]}
            for index in indices
            if index not in good
        ]
        if any(keys[index] not in done for index in good):
            prompts = list(good.values())
            if isinstance(encoder, StreamEncoder):
                prompts = think_through(prompts, list(good), engine, encoder.encoder)
            completions = iter(engine.complete(prompts, list(good), samples=samples))
            lines += [
                _answer(questions[index], prompt, list(islice(completions, samples)), engine, encoder)
                for index, prompt in good.items()
            ]
        lines = [line for line in lines if line["key"] not in done]
        journal.append(lines)
        if progress is not None:
            progress.update(len(lines))


def _fitting(prompt: EncodedPrompt | Stream | str, engine) -> EncodedPrompt | Stream | str:
    """A prompt, or the text of an error if its completion might not fit behind it."""
    longest = engine.decoding.max_new_tokens
    if isinstance(prompt, str) or len(prompt) + longest <= engine.context:
        return prompt
    lower = "the frames, their pixels or max_new_tokens"
    if isinstance(prompt, Stream):
        lower = "clip_tokens, max_memory_tokens or max_new_tokens"
    return (
        f"PromptTooLongError: its prompt has {len(prompt)} tokens; with {longest} new ones (max_new_tokens) that is "
        f"over the model's context of {engine.context}. Lower {lower}."
    )


def _name(question: dict) -> dict:
    names = {"key": question["key"], "position": question["position"]}
    return {**names, "question_id": question["row"]["question_id"]}


def _answer(
    question: dict,
    prompt: EncodedPrompt | Stream,
    candidates: list[list[int]],
    engine,
    encoder: PromptEncoder | StreamEncoder,
) -> dict:
    """The line of a question; where there are several candidates, the elected one's with all of them."""
    row = question["row"]
    found = [describe_completion(ids, tokenizer=engine.tokenizer, ends=engine.ends) for ids in candidates]
    found = [{**each, "completion": row.get("begun", "") + each["completion"]} for each in found]
    described, several = dict(found[0]), {}
    if len(found) > 1:
        texts = [each["completion"] for each in found]
        several = {"candidates": found}
        described = dict(found[majority(texts, problem_type=row["problem_type"], options=row["options"])])
    if isinstance(prompt, Stream):
        made = prompt.record(encoder.encoder)
    else:
        made = {"prompt_tokens": len(prompt), "media": prompt.media}
    return {
        **_name(question),
        "model_output": described.pop("completion"),
        **described,
        **several,
        **made,
        "prompt_template": encoder.template.hash,
    }


def write_outputs(
    files: OutputFiles, questions: list[dict], journal: Journal, settings: dict
) -> list[dict]:
    """Write the final files from a journal that has dealt with every row.

    A row that failed stays in the list with an empty `model_output`, so that no score rises because a video could not
    be read.

    Returns:
        The errors, in row order.

    Raises:
        JournalError: rows are missing.
    """
    if missing := [
        question["position"] for question in questions if question["key"] not in journal.lines
    ]:
        raise JournalError(
            f"{journal.path}: {len(missing)} rows are not answered yet (first: {missing[:5]})."
        )
    lines = [journal.lines[question["key"]] for question in questions]
    errors = [line for line in lines if "error" in line]
    records = [
        {name: value for name, value in line.items() if name != "model_output"} for line in lines
    ]
    results = []
    for question, line in zip(questions, lines, strict=True):
        raw = question["raw"]
        truth = raw["answer"] if "processed_question" in raw else raw["solution"]
        results.append(
            {"question": raw, "ground_truth": truth, "model_output": line.get("model_output", "")}
        )
    write_json(files.record, {"settings": settings, "errors": len(errors), "rows": records})
    write_json(files.output, results)
    return errors
