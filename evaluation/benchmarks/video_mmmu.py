"""Video-MMMU: what is learnt from lectures, in three tracks: perception, comprehension, adaptation.

Source: https://huggingface.co/datasets/lmms-lab/VideoMMMU (a folder of Parquet files for each track), arXiv 2501.13826.
Columns: id, question, options, answer, question_type, qa_type, link_selected; Adaptation also image.
Videos: the dataset's zip files, unpacked: VideoMMMU/<group>/<id>.mp4. The image of an adaptation question is the end
of its video, which the official prompt says too.
Metric: accuracy. VerIPO did not release its file for this benchmark.
"""

import re
from pathlib import Path

from veripo_trl.evaluate.questions import ground_truths, kind_of

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
GROUP_OF = {subject: group for group, subjects in GROUPS.items() for subject in subjects.split()}


def convert(record: dict, *, file: str) -> list[dict]:
    track = next((part for part in reversed(Path(file).parts) if part in TRACKS), None)
    if track is None:
        raise ValueError(f"{file}: expected a path with the track in it: {', '.join(TRACKS)}.")
    subject = re.sub(r"^[^_]+_|_\d+$", "", record["id"])
    if subject not in GROUP_OF:
        raise ValueError(f"{file}: id {record['id']!r} names no subject that is known: <split>_<subject>_<number>.")
    problem = record["question"]
    if track == "Adaptation":
        problem = f"The image that the question speaks of is shown at the end of the video.\n{problem}"
    truths = ground_truths(record["answer"])
    options = [f"{chr(ord('A') + place)}. {_bare(text, place)}" for place, text in enumerate(record["options"] or [])]
    return [
        {
            "question_id": f"{track.lower()}_{record['id']}",
            "problem": problem,
            "options": options,
            "problem_type": "multiple choice" if options else kind_of(truths),
            "solution": truths[0],
            "alternatives": truths,
            "videos": [f"VideoMMMU/{GROUP_OF[subject]}/{record['id']}.mp4"],
            "data_source": NAME,
            "categories": {"track": track, "group": GROUP_OF[subject], "subject": subject},
        }
    ]


def _bare(option, place: int) -> str:
    """An option without the letter that some of them carry already."""
    return str(option).removeprefix(f"{chr(ord('A') + place)}.").strip()
