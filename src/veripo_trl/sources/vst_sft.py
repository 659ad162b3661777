"""VST's SFT rows: a thought on each clip of a stream.

Source: https://github.com/1ranGuan/VST (its data set on the Hub, 154,785 rows for training, 5,107 for
validation), arXiv 2603.12262. Licence: as `vst`. Form, as its code reads it (the files were not seen): a line is
two messages, a user's of [{video, video_start, video_end}, {text, previous}] and an assistant's of [{text_stream
[[start, end, thought], …], qa_stream [[start, end, question, answer], …]}], seconds of the whole video;
`previous` is the memory before video_start, text their instruction, which is not used.
Each thought becomes a row of type "thought" about its part of the video, with the earlier ones in its problem;
the parts are made beforehand, by `evaluation/cut_videos.py`. The memory has no limit here.
Traps: a video may be a list of images; a thought may be empty, or have no time; the last line may be an index of
the lines' bytes. Questions are left out: their answers have no thinking to teach.
"""

from pathlib import Path

from veripo_trl.data.streaming import Memory, turn_row, window_time
from veripo_trl.sources.record import cut_row

NAME = "VST"


def records(content: list, *, file: str = "") -> list[dict]:
    lines = [line for line in content if not all(isinstance(byte, int) for byte in line)]
    return [
        {"shown": user["content"], "streams": assistant["content"][0], "index": index}
        for index, (user, assistant) in enumerate(lines)
    ]


def convert(record: dict, *, file: str) -> list[dict | str]:
    (video, asked), streams = record["shown"], record["streams"]
    if not isinstance(video["video"], str):
        return ["left out: its video is a list of images"]
    rows: list[dict | str] = ["left out: a question, without thinking"] * len(streams.get("qa_stream", []))
    memory = Memory(entries=[f"{asked['previous'].strip()}\n"] if asked.get("previous") else [])
    for turn, (start, end, thought) in enumerate(streams["text_stream"]):
        if not thought.strip() or start >= end:
            rows.append("left out: a thought without a text or a time")
            continue
        name, time = f"vst-sft-{Path(file).stem}-{record['index']}-{turn}", window_time(start, end)
        row = {"question_id": name, "problem": "", "solution": thought.strip(), "process": thought.strip()}
        rows.append({**turn_row(row, time, memory.text, last=False), **cut_row(video["video"], start, end)})
        memory.add(time, thought)
    return rows
