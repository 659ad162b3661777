"""Rows of this project's columns with the thoughts that a model shall write while it watches: SFT on streams.

Form: one video in `videos`, `thoughts` [[start, end, text], …] in seconds, one a clip from the video's start
and without gaps, and `end`, where the last clip ends, which the question (and its `process`) comes with.
Each becomes a row of type "thought" about its part of the video, with the earlier ones in its problem.
Traps: the parts are made beforehand, by `evaluation/cut_videos.py`, which takes this source as --source. The
memory has no limit here.
"""

from veripo_trl.data.schema import FieldError, show
from veripo_trl.data.streaming import taught_rows, window_time
from veripo_trl.sources.record import cut_row


def convert(record: dict, *, file: str) -> list[dict]:
    row = {name: value for name, value in record.items() if name not in ("thoughts", "end")}
    thoughts, videos = record["thoughts"], record["videos"]
    if not isinstance(videos, list) or len(videos) != 1:
        raise FieldError("videos", "one video", show(videos))
    bounds = [0, *(end for _, end, _ in thoughts), record["end"]]
    if [start for start, *_ in thoughts] != bounds[: len(thoughts)] or sorted(bounds) != bounds:
        raise FieldError("thoughts", "clips from 0, each from the end of the one before", show(thoughts))
    parts = [cut_row(videos[0], *span) for span in zip(bounds[:-1], bounds[1:], strict=True)]
    times = [window_time(*span) for span in zip(bounds[:-1], bounds[1:], strict=True)]
    turns = [
        (time, thought, {**part, "question_id": f"{row['question_id']}-{turn}"})
        for turn, (time, part, (*_, thought)) in enumerate(zip(times, parts, thoughts, strict=False))
    ]
    return taught_rows({**row, **parts[-1]}, turns, last=times[-1])
