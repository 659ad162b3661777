"""STVG-R1's rows: which numbered object, and when. The videos carry the numbers already, drawn on the objects.

Source: https://github.com/XiaowZhang00/stvg-r1 (trainjson.py makes {video: {duration, timestamps, sentences,
objectid}} of HC-STVG v1 and v2), arXiv 2602.11730. Licence: none seen; HC-STVG's clips are of films. Videos:
<video>.mp4, with the marks that their preprocessing (a detector and a tracker, not part of this project)
drew.
Metric: m_tIoU, and m_vIoU, which needs the boxes (`calculate_score.py --boxes`); ours: share of right ids and mean tIoU.
Traps: videos without a mark are skipped there without a word: left out here and counted; the id is a vote
among frames without a threshold, so it may be wrong.
"""

from veripo_trl.data.schema import FieldError, show
from veripo_trl.sources.record import grounding_rows, keyed

NAME = "STVG-R1"


records = keyed


def convert(record: dict, *, file: str) -> list[dict | str]:
    made, ids = [], record["objectid"]
    if len(ids) != len(record["sentences"]) or not all(i is None or type(i) is int for i in ids):
        raise FieldError("objectid", "a whole number or null for each sentence", show(ids))
    for row in grounding_rows(
        record, prefix="stvg", video=f"{record['video'].removesuffix('.mp4')}.mp4"
    ):
        if isinstance(row, dict):
            index = int(row["question_id"].rpartition("-")[2])
            if ids[index] is None or ids[index] < 0:
                made.append("left out: no mark on the object")
                continue
            row["solution"] = f"{ids[index]}; {row['solution']}"
            row |= {"problem": record["sentences"][index], "problem_type": "object and time"}
        made.append(row)
    return made
