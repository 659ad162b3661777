"""LVBench: questions on videos of half an hour to two hours.

Source: https://huggingface.co/datasets/THUDM/LVBench (video_info.meta.jsonl), arXiv 2406.08035. A line is a
video: key (its YouTube id), type, video_info, qa: a list of {uid, question, answer, question_type,
time_reference}; the options stand in the question as "(A) …". The flat tables made from it (a row per
question, with key) are read too.
Licence: its page's, not looked at here. Videos: LVBench/<key>.mp4, to be fetched from YouTube.
Metric: accuracy. A question counts in each of its question types.
"""

from veripo_trl.sources.record import read_options

NAME = "LVBench"
VIDEOS = "LVBench/<key>.mp4"


def convert(record: dict, *, file: str) -> list[dict]:
    return [
        {
            "question_id": str(question["uid"]),
            "problem": question["question"],
            "options": read_options(question["question"]),
            "problem_type": "multiple choice",
            "solution": question["answer"].strip(),
            "videos": [f"LVBench/{record['key']}.mp4"],
            "categories": {
                "question type": list(question["question_type"]),
                "video": record["type"],
            },
        }
        for question in record.get("qa", [record])
    ]
