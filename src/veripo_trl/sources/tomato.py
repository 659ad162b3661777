"""TOMATO: motion that no single frame shows: rotation, direction, speed, shape, counts.

Source: https://huggingface.co/datasets/yale-nlp/TOMATO (a Parquet file for each kind of motion) or
data/*.json of https://github.com/yale-nlp/TOMATO, arXiv 2410.23266. Columns: question, options, answer (a
place in them, from 0), key, motion_type, demonstration_type, variation, note, video_source_url.
Licence: its page's, not looked at here. Videos: TOMATO/videos/<demonstration_type>/<key>.mp4. VerIPO samples
them at 4 frames per second: --video_fps 4.
Metric: accuracy.
"""

from veripo_trl.sources.record import LETTERS, lettered

NAME = "TOMATO"
VIDEOS = "TOMATO/videos/<human|object|simulated>/<key>.mp4"


def convert(record: dict, *, file: str) -> list[dict]:
    return [
        {
            # several questions share a video: ids repeat, as in VerIPO's file
            "question_id": record["key"],
            "problem": record["question"],
            "options": lettered(record["options"]),
            "problem_type": "multiple choice",
            "solution": LETTERS[record["answer"]],
            "videos": [f"TOMATO/videos/{record['demonstration_type']}/{record['key']}.mp4"],
            "categories": {
                "motion": record["motion_type"],
                "demonstration": record["demonstration_type"],
            },
        }
    ]


def categories_of_released(row: dict) -> dict:
    return {"demonstration": row["video_path"].split("/")[-2]}
