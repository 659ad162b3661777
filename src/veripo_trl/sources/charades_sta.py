"""Charades-STA: when something happens in a clip of half a minute.

Source: https://github.com/jiyanggao/TALL (charades_sta_train.txt 12,408 lines, _test.txt 3,720; arXiv
1705.02101), lines "VID start end##sentence", or the JSON of TimeZero and VideoChat-R1 {VID: {duration,
timestamps [[s, e]], sentences}}.
Licence: Charades' videos for non-commercial use. Videos: Charades_v1_480.
Metric: mIoU and R@1 at 0.3, 0.5, 0.7 of one span; unreadable answers count 0 (official scripts swap reversed
spans, take another "a to b" of the output, or lose repeated queries).
Traps: the end exceeds `duration` in 562 test and 1,789 training rows of the JSON, by up to 1.5 s: it is set
to it, and counted. 4 training rows have no length: left out. The lines of .txt tell no duration.
"""

from veripo_trl.data.schema import show
from veripo_trl.sources.record import grounding_rows, keyed

NAME = "Charades-STA"
VIDEOS = "Charades_v1_480/<VID>.mp4"


def records(content: dict | list[str], *, file: str) -> list[dict]:
    if isinstance(content, dict):
        return keyed(content)
    found: dict[str, dict] = {}
    for number, line in enumerate(content, start=1):
        place, _, sentence = line.partition("##")
        try:
            video, start, end = place.split()
            times = [float(start), float(end)]
        except ValueError:
            raise ValueError(
                f"line {number}: expected 'VID start end##sentence', came {show(line)}"
            ) from None
        record = found.setdefault(video, {"video": video, "timestamps": [], "sentences": []})
        record["timestamps"].append(times)
        record["sentences"].append(sentence)
    return list(found.values())


def convert(record: dict, *, file: str) -> list[dict | str]:
    return grounding_rows(record, prefix="cha", video=f"Charades_v1_480/{record['video']}.mp4")
