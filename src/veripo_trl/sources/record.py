"""What the sources share: a record's fields, letters for options, spans, means. FieldError names the field."""

import ast
import math
import random
import re
from pathlib import PurePath
from typing import Any

from veripo_trl.answers.numbers import read_number
from veripo_trl.answers.score import SolutionError, check_solution
from veripo_trl.data.schema import FieldError, show

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_BARE_NUMBER = re.compile(
    r"\$?\s*[-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?(?:\s*/\s*\d+)?\s*%?\s*\$?", re.I
)
_OPTION = re.compile(r"\s*(\(?([A-Z])[.)]\s*)(?=\S)(.*)")


def text(record: dict, field: str) -> str:
    """A field that must be a text with something in it."""
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        came = show(value) if field in record else "no such column"
        raise FieldError(field, "a non-empty text", came)
    return value.strip()


def one_of(record: dict, field: str, known) -> Any:
    """A field that must have one of the known values."""
    value = record.get(field)
    if value not in list(known):
        raise FieldError(field, f"one of {', '.join(map(str, known))}", show(value))
    return value


def lettered(texts: list[str]) -> list[str]:
    """Options with their letters: "A. red", "B. blue"."""
    return [
        f"{letter}. {str(option).strip()}" for letter, option in zip(LETTERS, texts, strict=False)
    ]


def letter_of(answer: str, texts: list[str], field: str = "answer") -> str:
    """The letter of the option that the answer is. Raises FieldError where it is none of them, or twice there."""
    if texts.count(answer) != 1:
        what = f"the text of exactly one option of {show(texts)}"
        raise FieldError(field, what, f"{show(answer)}, {texts.count(answer)} times there")
    return LETTERS[texts.index(answer)]


def untagged(value: Any, tag: str) -> Any:
    """What stands between <tag> and </tag>, if the text is nothing else; any other value as it is: what still has tags
    in it is refused as any other text is."""
    match = (
        re.fullmatch(rf"\s*<{tag}>(.*)</{tag}>\s*", value, re.DOTALL)
        if isinstance(value, str)
        else None
    )
    return match[1] if match else value


def indexed(content: list[dict], *, file: str = "") -> list[dict]:
    """A file's records with their places in it from 0, `index`, where no column is an id."""
    return [{**record, "index": index} for index, record in enumerate(content)]


def keyed(content: dict[str, dict], *, file: str = "") -> list[dict]:
    """The records of {video: record}, each with its `video`."""
    return [{"video": video, **record} for video, record in content.items()]


def seeded(name: str) -> random.Random:
    """Random numbers that are the same for a name in every process."""
    return random.Random(name)


def cut_row(video: str, start: float | None, end: float | None) -> dict:
    """`videos` of a row about a part of a video: the name of a file that is cut beforehand, and `cut`, what to cut; of
    the whole video where both ends are None."""
    if start is None and end is None:
        return {"videos": [video]}
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (start, end))
    if not numbers or not 0 <= start < end < math.inf:
        expected = "both ends of a part of the video in seconds, or null for both"
        raise FieldError("start", expected, show([start, end]))
    path = PurePath(video)
    name = str(path.with_name(f"{path.stem}_{start:.2f}-{end:.2f}.mp4"))
    return {"videos": [name], "cut": {"video": video, "start": start, "end": end}}


def span(
    start: float, end: float, duration: float | None, *, field: str = "timestamps"
) -> tuple[str | None, list]:
    """("5.0 to 11.0 of 33.75", what to count); None for a span that nothing can be compared with.

    An end beyond the duration is set to it: 562 of Charades-STA's 3,720 test rows have one, by up to 1.5 s."""
    values = [value for value in (start, end, duration) if value is not None]
    if len(values) < 2 or not all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and v >= 0
        for v in values
    ):
        raise FieldError(field, "seconds from 0", show([start, end, duration]))
    if start >= end:
        return None, ["left out: its start is not before its end"]
    counted = []
    if duration is not None and end > duration:
        if start >= duration:
            return None, ["left out: it begins after the end of the video"]
        end, counted = duration, ["changed: an end beyond the video's, set to its duration"]
    whole = "" if duration is None else f" of {round(float(duration), 3)}"
    return f"{round(float(start), 3)} to {round(float(end), 3)}{whole}", counted


def grounding_rows(record: dict, *, prefix: str, video: str) -> list[dict | str]:
    """Rows of {video, duration, timestamps [[start, end], …], sentences}: one a sentence, "when does this happen"."""
    spans, sentences = record["timestamps"], record["sentences"]
    if len(spans) != len(sentences):
        came = f"{len(spans)} and {len(sentences)}"
        raise FieldError("timestamps", "as many as sentences", came)
    rows: list[dict | str] = []
    for number, ((start, end), sentence) in enumerate(zip(spans, sentences, strict=True)):
        solution, counted = span(start, end, record.get("duration"))
        rows += counted
        if solution is None:
            continue
        event = text({"sentences": sentence}, "sentences").rstrip(".")
        rows.append(
            {
                "question_id": f"{prefix}-{record['video']}-{number}",
                "problem": f"When does this happen in the video: {event}?",
                "problem_type": "temporal grounding",
                "solution": solution,
                "videos": [video],
            }
        )
    return rows


def mean_of_means(groups: dict) -> Any:
    """The mean of the groups' means, each group as heavy as another; of arrays whose first axis is rows."""
    means = [scores.mean(axis=0) for scores in groups.values()]
    return sum(means) / len(means)


def kind_of(truths: list[str]) -> str:
    """The problem type of a question without options: what all of its truths can be compared as."""
    if all(map(is_number, truths)):
        return "numerical"
    try:
        for truth in truths:
            check_solution(problem_type="math", solution=truth)
    except SolutionError:
        return "free-form"
    return "math"


def is_number(solution: str) -> bool:
    """Whether a ground truth is a bare number, perhaps a fraction, a percentage or between dollars; "x+1" is not."""
    return (
        _BARE_NUMBER.fullmatch(solution.strip()) is not None and read_number(solution) is not None
    )


def ground_truths(answer: Any) -> list[str]:
    """The answers that count as right: one, or those of a list written as text, `"['24/7', '3.429']"`, in which
    VideoMMMU once forgets the last quote. Raises FieldError for what begins as a list and is none."""
    text = str(answer).strip()
    if text.startswith("['"):
        try:
            return [str(item) for item in ast.literal_eval(re.sub(r"(?<!')\]$", "']", text))]
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            remedy = "Write it as a list of texts, ['24/7', '3.429']."
            raise FieldError(
                "answer", "answers that others can be compared with", show(text), remedy
            ) from error
    return [text]


def read_options(problem: str) -> list[str]:
    """The options at the end of a question's text, lettered A, B, C, …; [] if there are none.

    Each is text of the question, so that the prompt does not write it again. Video-MME's released rows letter their
    options twice ("A. A. red"): one letter is taken off.
    """
    options: list[str] = []
    for line in reversed(problem.rstrip().split("\n")):
        match = _OPTION.fullmatch(line)
        if not match:
            break
        again = _OPTION.fullmatch(match[3])
        options.insert(0, match[3].strip() if again and again[2] == match[2] else line.strip())
        if match[2] == "A":  # what stands before it is the question
            break
    letters = [_OPTION.fullmatch(option)[2] for option in options]
    return (
        options
        if len(options) > 1 and letters == [chr(ord("A") + place) for place in range(len(options))]
        else []
    )


def letter_in_brackets(record: dict, field: str) -> str:
    """B of "(B)", "B", or "<answer>B</answer>"; "B,C" of several."""
    letters = str(untagged(text(record, field), "answer")).strip()
    if not (found := re.fullmatch(r"\(?([A-Z](?:,\s?[A-Z])*)\)?\.?", letters)):
        raise FieldError(field, "the letter of an option", show(record[field]))
    return found[1]
