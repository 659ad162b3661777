"""Rows in the form of ms-swift: messages, with the files beside them.

Form: https://swift.readthedocs.io ("Custom dataset"): messages [{role, content}], with <video> and <image>
where a file stands, videos and images (a path or a list of them), solution (for GRPO), id or question_id
where there is one. Rows may have our problem_type and options; else options at the end of the question make a
choice, a bare number is numerical, and all else free-form. "<think>…</think><answer>…</answer>" of the
assistant is process and solution; other text of it is the solution, unless there is one.
Traps: a system message is not used and media come first in a prompt here: both counted. Rows of several
turns, of a preference (rejected_response) or without a solution are left out. Files without a mark come first,
as in ms-swift, and are counted; a mark without a file is an error.
"""

import re

from veripo_trl.data.schema import FieldError
from veripo_trl.sources.record import (
    indexed,
    is_number,
    letter_in_brackets,
    one_of,
    read_options,
    text,
    untagged,
)

_MARK = re.compile(r"<(video|image)>")


records = indexed


def convert(record: dict, *, file: str) -> list[dict | str]:
    roles = ("system", "user", "assistant", "tool")
    turns = [(one_of(turn, "role", roles), turn["content"]) for turn in record["messages"]]
    return row_of_turns(turns, record)


def row_of_turns(turns: list[tuple[str, str]], record: dict) -> list[dict | str]:
    """A row of (role, text) turns and the columns beside them."""
    if record.get("rejected_response") or record.get("rejected"):
        return ["left out: a preference, not a question"]
    counted: list[dict | str] = (
        ["said: its system message is not used"] if turns[0][0] == "system" else []
    )
    turns = turns[len(counted) :]
    if [role for role, _ in turns] not in (["user"], ["user", "assistant"]):
        return [*counted, "left out: several turns"]
    marks = _MARK.findall(turns[0][1])
    media = {}
    for kind in ("video", "image"):
        files = record.get(f"{kind}s") or []
        media[f"{kind}s"] = [files] if isinstance(files, str) else list(files)
        if len(media[f"{kind}s"]) < marks.count(kind):
            came = f"{len(media[f'{kind}s'])} files, {marks.count(kind)} marks"
            raise FieldError(f"{kind}s", f"a file for each <{kind}>", came)
        if len(media[f"{kind}s"]) > marks.count(kind):
            counted.append(f"said: a file without its <{kind}> comes before the text")
    if not re.match(r"(?:<video>\s*)*(?:<image>\s*)*(?!.*<(?:video|image)>)", turns[0][1], re.S):
        counted.append("changed: videos, then images, before the text")
    reply = turns[1][1] if len(turns) == 2 else ""
    thought = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", reply, re.S)
    solution = untagged(record.get("solution"), "answer")
    if solution is None:
        solution = thought[2] if thought else untagged(reply, "answer")
    if not str(solution).strip():
        return [*counted, "left out: no solution"]
    problem = re.sub(r"\n?<(?:video|image)>\n?", "\n", turns[0][1]).strip()
    options, solution = record.get("options") or read_options(problem), str(solution).strip()
    kind = "multiple choice" if options else "numerical" if is_number(solution) else "free-form"
    if kind == "multiple choice" and "problem_type" not in record:
        solution = letter_in_brackets(
            {"solution": re.sub(r"^\(?([A-Z])[.)] .*", r"\1", solution)}, "solution"
        )
    row = {
        "question_id": record.get("question_id") or record.get("id") or f"row-{record['index']}",
        "problem": text({"messages": problem}, "messages"),
        "options": options,
        "problem_type": record.get("problem_type") or kind,
        "solution": solution,
        "process": thought[1] if thought else None,
        **media,
    }
    return [*counted, row]
