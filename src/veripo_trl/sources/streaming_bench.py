"""StreamingBench: questions at a moment of a stream, its real-time part and its sequential questions.

Source: https://github.com/THUNLP-MT/StreamingBench (questions_real.json 2,500 questions in 10 tasks,
questions_sqa.json 250), arXiv 2411.03628. Licence: code MIT; videos their own terms. Columns: a list of
{video_path, video_categories, questions: [{task_type, question, time_stamp "HH:MM:SS", answer (a letter),
options}]}.
Metric: accuracy over questions, per task; there, answers that cannot be read leave the denominator.
Traps: a model is shown the last 60 s before the moment (CONTEXT_S; the other official setting is all from 0):
cut it beforehand, and say the context when quoting. 2 of the real-time questions have no time stamp that can
be read (00:12450, 00:24): 2,498 are left, as in other editions. Options of sqa have no letters, and its
earlier questions with their answers stand before the question. omni needs sound and proactive an answer at a
time of its own: refused.
"""

import re
from pathlib import Path

from veripo_trl.sources.record import cut_row, indexed, lettered, one_of, text

NAME = "StreamingBench"
VIDEOS = "<video_path>, parts as <name>_<start>-<end>.mp4"
CONTEXT_S = 60


def records(content: list[dict], *, file: str) -> list[dict]:
    part = one_of(
        {"(file)": Path(file).name.partition(".")[0]}, "(file)", ("questions_real", "questions_sqa")
    )
    if part == "questions_sqa":  # a list of records for each video, in order
        content = [
            {**some[0], "questions": [q for one in some for q in one["questions"]]}
            for some in content
        ]
    return [record | {"part": part.removeprefix("questions_")} for record in indexed(content)]


def convert(record: dict, *, file: str) -> list[dict | str]:
    rows: list[dict | str] = []
    earlier = ""
    for number, question in enumerate(record["questions"]):
        if not (stamp := re.fullmatch(r"(\d+):(\d+):(\d+)", text(question, "time_stamp"))):
            rows.append("left out: its time stamp is none")
            continue
        hours, minutes, seconds = map(int, stamp.groups())
        now = 3600.0 * hours + 60 * minutes + seconds
        options = [str(option) for option in question["options"]]
        if not all(re.match(r"\(?[A-Z][.)]", option) for option in options):
            options = lettered(options)
        letters = [re.sub(r"\W", "", option)[0] for option in options]
        solution = one_of(question, "answer", letters)
        rows.append(
            {
                "question_id": f"sb-{record['part']}-{record['index']}-{number}",
                "problem": earlier + text(question, "question"),
                "options": options,
                "problem_type": "multiple choice",
                "solution": solution,
                "categories": {"task": question["task_type"], "questions": record["part"]},
                **cut_row(record["video_path"], max(0.0, now - CONTEXT_S), now),
            }
        )
        if record["part"] == "sqa":
            earlier += f"Asked before: {question['question']} Answered: {options[letters.index(solution)]}\n"
    return rows
