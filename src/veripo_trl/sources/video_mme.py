"""Video-MME: 900 videos from eleven seconds to an hour, three questions each; without subtitles.

Source: https://huggingface.co/datasets/lmms-lab/Video-MME (videomme/test-00000-of-00001.parquet), arXiv
2405.21075.
Columns: video_id, duration, domain, sub_category, url, videoID, question_id, task_type, question, options
("A. …"), answer.
Licence: its page's, not looked at here. Videos: the dataset's zip files, unpacked:
Video-MME/videos/<videoID>.mp4.
Metric: accuracy.
"""

NAME = "Video-MME"
VIDEOS = "Video-MME/videos/<videoID>.mp4"


def convert(record: dict, *, file: str) -> list[dict]:
    return [
        {
            "question_id": record["question_id"],
            "problem": record["question"],
            "options": list(record["options"]),
            "problem_type": "multiple choice",
            "solution": record["answer"],
            "videos": [f"Video-MME/videos/{record['videoID']}.mp4"],
            "categories": {
                "duration": record["duration"],
                "domain": record["domain"],
                "task": record["task_type"],
            },
        }
    ]
