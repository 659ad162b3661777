"""MMVU: expert questions on videos of 27 subjects.

Source: https://huggingface.co/datasets/yale-nlp/MMVU (validation.json), arXiv 2501.12380. Columns: id, video
(an address that ends in videos/<subject>/<number>.mp4), youtube_url, question_type, metadata {subject,
textbook, knowledge, rationale}, question, choices {A: …, E: …}, answer.
Licence: its page's, not looked at here. Videos: the dataset's videos folder:
MMVU/videos/<subject>/<number>.mp4.
Metric: accuracy of the 625 choice rows, as VerIPO has it. `convert` leaves the open-ended rows out; `with_open`
has them as free text, whose official score comes from a language model that compares answers (gpt-4o):
`calculate_score.py --judge server`.
"""

NAME = "MMVU"
VIDEOS = "MMVU/videos/<subject>/<number>.mp4"


def convert(record: dict, *, file: str) -> list[dict | str]:
    if record["question_type"] != "multiple-choice":
        return ["left out: an open question"]
    return [_row(record)]


def with_open(record: dict, *, file: str) -> list[dict]:
    """`convert` with the open questions."""
    row = _row(record)
    return [{**row, "categories": {**row["categories"], "question": record["question_type"]}}]


def _row(record: dict) -> dict:
    video = "videos/" + record["video"].split("/videos/", 1)[1]
    choice = record["question_type"] == "multiple-choice"
    choices = sorted(record["choices"].items()) if choice else []
    return {
        "question_id": record["id"],
        "problem": record["question"],
        "options": [f"{letter}. {text}" for letter, text in choices if text],
        "problem_type": "multiple choice" if choice else "free-form",
        "solution": record["answer"],
        "videos": [f"MMVU/{video}"],
        "categories": {"subject": video.split("/")[1]},
    }


def categories_of_released(row: dict) -> dict:
    return {"subject": row["video_path"].split("/")[-2]}
