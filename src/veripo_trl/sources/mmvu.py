"""MMVU: expert questions on videos of 27 subjects.

Source: https://huggingface.co/datasets/yale-nlp/MMVU (validation.json), arXiv 2501.12380. Columns: id, video
(an address that ends in videos/<subject>/<number>.mp4), youtube_url, question_type, metadata {subject,
textbook, knowledge, rationale}, question, choices {A: …, E: …}, answer.
Licence: its page's, not looked at here. Videos: the dataset's videos folder:
MMVU/videos/<subject>/<number>.mp4.
Metric: accuracy of the 625 choice rows, as VerIPO has it. The open-ended rows are left out: their official
score comes from a language model that compares answers.
"""

NAME = "MMVU"
VIDEOS = "MMVU/videos/<subject>/<number>.mp4"


def convert(record: dict, *, file: str) -> list[dict | str]:
    if record["question_type"] != "multiple-choice":
        return ["left out: an open question"]
    video = "videos/" + record["video"].split("/videos/", 1)[1]
    return [
        {
            "question_id": record["id"],
            "problem": record["question"],
            "options": [
                f"{letter}. {text}" for letter, text in sorted(record["choices"].items()) if text
            ],
            "problem_type": "multiple choice",
            "solution": record["answer"],
            "videos": [f"MMVU/{video}"],
            "categories": {"subject": video.split("/")[1]},
        }
    ]


def categories_of_released(row: dict) -> dict:
    return {"subject": row["video_path"].split("/")[-2]}
