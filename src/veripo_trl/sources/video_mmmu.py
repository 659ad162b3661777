"""Video-MMMU: what is learnt from lectures, in three tracks: perception, comprehension, adaptation.

Source: https://huggingface.co/datasets/lmms-lab/VideoMMMU (a folder of Parquet files for each track), arXiv
2501.13826.
Columns: id, question, options, answer, question_type, qa_type, link_selected; Adaptation also image.
Licence: its page's, not looked at here. Videos: the dataset's zip files, unpacked:
VideoMMMU/<group>/<id>.mp4. The image of an adaptation question is the end of its video, which the official
prompt says too.
Metric: accuracy. VerIPO did not release its file for this benchmark.
"""

import re
from pathlib import Path

from veripo_trl.data.schema import FieldError
from veripo_trl.sources.record import LETTERS, ground_truths, kind_of, lettered

NAME = "VideoMMMU"
VIDEOS = "VideoMMMU/<Art|Business|Engineering|Humanities|Medicine|Science>/<id>.mp4"
TRACKS = ("Perception", "Comprehension", "Adaptation")
GROUPS = {
    "Art": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
    "Mechanical_Engineering",
    "Humanities": "History Literature Psychology Sociology",
    "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Science": "Biology Chemistry Geography Math Physics",
}


def convert(record: dict, *, file: str) -> list[dict]:
    track = next((part for part in reversed(Path(file).parts) if part in TRACKS), None)
    if track is None:
        raise FieldError(
            "(file)",
            f"a path with the track in it: {', '.join(TRACKS)}",
            file,
            "Keep the official folders.",
        )
    subject = re.sub(r"^[^_]+_|_\d+$", "", record["id"])
    group = next((group for group, subjects in GROUPS.items() if subject in subjects.split()), None)
    if group is None:
        known = "<split>_<subject>_<number> of a known subject"
        raise FieldError("id", known, repr(record["id"]))
    intro = (
        "The image that the question speaks of is shown at the end of the video.\n"
        if track == "Adaptation"
        else ""
    )
    truths = ground_truths(record["answer"])
    texts = zip(LETTERS, record["options"] or [], strict=False)  # some carry their letter already
    options = lettered([str(text).removeprefix(f"{letter}.") for letter, text in texts])
    return [
        {
            "question_id": f"{track.lower()}_{record['id']}",
            "problem": intro + record["question"],
            "options": options,
            "problem_type": "multiple choice" if options else kind_of(truths),
            "solution": truths[0],
            "alternatives": truths,
            "videos": [f"VideoMMMU/{group}/{record['id']}.mp4"],
            "categories": {"track": track, "group": group, "subject": subject},
        }
    ]
