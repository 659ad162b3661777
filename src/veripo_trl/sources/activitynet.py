"""ActivityNet Captions: when something happens in a video of two minutes.

Source: https://cs.stanford.edu/people/ranjaykrishna/densevid (train.json 10,009 videos and 37,421 sentences,
val_1.json 4,917 and 17,505, val_2.json 4,885 and 17,031, the test of most papers), arXiv 1705.00754. Columns:
{v_<YouTube id>: {duration, timestamps [[s, e]], sentences}}. Licence: not looked at; the videos are
from YouTube, many are gone: state how many were found.
Metric: as Charades-STA's.
Traps: 4 training spans have no length: left out; 261 end beyond the video, all but 14 by a hundredth of a
second: set to its end. Both are counted.
"""

from veripo_trl.sources.record import grounding_rows, keyed

NAME = "ActivityNet Captions"
VIDEOS = "ActivityNet/v_<YouTube id>.mp4"


records = keyed


def convert(record: dict, *, file: str) -> list[dict | str]:
    return grounding_rows(record, prefix="anet", video=f"ActivityNet/{record['video']}.mp4")
