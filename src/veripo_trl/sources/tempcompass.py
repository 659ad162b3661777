"""TempCompass: action, direction, speed, order and change of attributes, asked in four ways of 410 videos.

Source: https://github.com/llyx97/TempCompass (questions/multi-choice.json 1,580 questions, yes_no.json 2,453,
caption_matching.json 1,503, captioning.json 2,004: {video: {dimension: [{question, answer}]}}), arXiv
2403.00476.
Licence: questions CC BY-NC 4.0. Videos: https://huggingface.co/datasets/lmms-lab/TempCompass, <video>.mp4.
Metric: mean over questions, per task and per dimension. Quoted figures (Video-R1's) are the mean of all
7,540; multiple choice alone is told beside it.
Traps: the video is the key; the two lines of a matching question are headed "Option 1:", "Sentence A:" or
"Caption B:" and answered by either part; captioning ("Information A: {…}", answer "B. …") is judged by a
language model there, and a choice of its pieces of information here.
"""

import re
from pathlib import Path

from veripo_trl.data.schema import FieldError, show
from veripo_trl.sources.record import lettered, one_of, read_options, text

NAME = "TempCompass"
VIDEOS = "TempCompass/<video>.mp4"
TASKS = ("multi-choice", "yes_no", "caption_matching", "captioning")
_PIECE = re.compile(r"^Information ([A-Z]): (.+)", re.M)
_HEADED = re.compile(r"((?:Option|Sentence|Caption) [12AB]): (.*)")


def records(content: dict, *, file: str) -> list[dict]:
    task = one_of({"(file)": Path(file).name.partition(".")[0]}, "(file)", TASKS)
    return [
        {"task": task, "video": video, "dimension": dimension, "index": index, **question}
        for video, dimensions in content.items()
        for dimension, questions in dimensions.items()
        for index, question in enumerate(questions)
    ]


def convert(record: dict, *, file: str) -> list[dict]:
    problem, answer, task = text(record, "question"), text(record, "answer"), record["task"]
    options: list[str] = []
    if task == "yes_no":
        solution = one_of({"answer": answer.lower().rstrip(".")}, "answer", ("yes", "no"))
    elif task == "caption_matching":
        *lines, first, second = problem.split("\n")
        pairs = [_HEADED.fullmatch(line.strip()) for line in (first, second)]
        right = [bool(pair) and answer in (pair[0], pair[1], pair[2].strip()) for pair in pairs]
        if not all(pairs) or sum(right) != 1:
            came = f"{show(problem)}, answer {show(answer)}"
            raise FieldError("answer", "one of the question's two last lines", came)
        problem, options = "\n".join(lines).strip(), lettered([pair[2] for pair in pairs])
        solution = "AB"[right.index(True)]
    else:
        options = read_options(problem)
        if task == "captioning":
            options = [f"{letter}. {piece}" for letter, piece in _PIECE.findall(problem)]
            problem = "Which of these pieces of information agrees with the video?"
        if not options:
            raise FieldError("question", "its options, a line each", show(record["question"]))
        solution = one_of(
            {"answer": answer[:1]}, "answer", [option.strip("(")[0] for option in options]
        )
    return [
        {
            "question_id": f"tc-{task}-{record['video']}-{record['dimension']}-{record['index']}",
            "problem": problem,
            "options": options,
            "problem_type": "yes/no" if task == "yes_no" else "multiple choice",
            "solution": solution,
            "videos": [f"TempCompass/{record['video']}.mp4"],
            "categories": {"task": task, "dimension": record["dimension"]},
        }
    ]


def totals(by_category: dict[str, dict]) -> dict[str, float]:
    alone = by_category["task"].get("multi-choice")
    return {} if alone is None else {"multiple choice alone": alone.mean(axis=0)}
