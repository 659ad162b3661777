"""CLEVRER, its counterfactual choice questions, as TW-GRPO trains and tests on them.

Source: http://clevrer.csail.mit.edu (train.json, validation.json: a list of {scene_index, video_filename,
questions: [{question_id, question, question_type, choices: [{choice_id, choice, answer: correct or
wrong}]}]}), arXiv 1910.01442.
Licence: CC0, to be checked there. Videos of 5 s; the zip files nest them by thousand: unpack them flat (unzip
-j).
Metric: all letters right (strict), as ours; TW-GRPO's `accuracy_soft` is its reward. 9,238 validation rows,
3,945 with one right letter and 5,293 with several.
Traps: other question types are left out and counted, and so are questions without a right choice. 1,000 rows
of MVBench show validation videos: do not train on validation.json.
"""

from veripo_trl.sources.record import LETTERS, lettered, one_of, text

NAME = "CLEVRER"
VIDEOS = "CLEVRER/<video_filename>"


def convert(record: dict, *, file: str) -> list[dict | str]:
    rows: list[dict | str] = []
    for question in record["questions"]:
        if question["question_type"] != "counterfactual":
            rows.append(f"left out: a {question['question_type']} question")
            continue
        choices = sorted(question["choices"], key=lambda choice: choice["choice_id"])
        right = [one_of(choice, "answer", ("correct", "wrong")) == "correct" for choice in choices]
        if not any(right):
            rows.append("left out: no choice is right")
            continue
        rows.append(
            {
                "question_id": f"clv-{record['scene_index']}-{question['question_id']}",
                "problem": text(question, "question"),
                "options": lettered([text(choice, "choice") for choice in choices]),
                "problem_type": "multiple choice",
                "solution": ",".join(
                    letter for letter, is_right in zip(LETTERS, right, strict=False) if is_right
                ),
                "videos": [f"CLEVRER/{text(record, 'video_filename')}"],
                "categories": {"answers": "several" if sum(right) > 1 else "one"},
            }
        )
    return rows
