"""Time-R1's 2,500 training rows for temporal grounding, and its test TVGBench of 800.

Source: https://huggingface.co/datasets/Boshenxx/TimeR1-Dataset (train_2k5.json: video, duration, timestamp
[s, e], sentence, qid, video_start, video_end, difficulty, pred) and
https://github.com/xiaomi-research/time-r1 (TVGBench: path, question, answer "13.4-28.1", start, end,
duration, dataset_name), arXiv 2503.13377. Licence: code Apache-2.0; videos of several sets, each with its own
terms.
Metric: as Charades-STA's.
Traps: the span is relative to the part of the video from video_start to video_end (null: the whole), which is
to be cut beforehand; `where: {difficulty: …}` and `pred` are another model's. TVGBench has it as start and
end. 11 of its 800 answers have no length: no span can match them, left out here and counted.
"""

from veripo_trl.data.schema import FieldError, show
from veripo_trl.sources.record import cut_row, indexed, span, text

NAME = "Time-R1"
VIDEOS = "<video> or <path>, as in the rows; parts as <name>_<start>-<end>.mp4"


records = indexed


def convert(record: dict, *, file: str) -> list[dict | str]:
    if "timestamp" in record:
        part, (start, end) = (record["video_start"], record["video_end"]), record["timestamp"]
        video, event = text(record, "video"), text(record, "sentence")
        row = {"question_id": f"tr1-{record['qid']}"}
    else:
        try:
            start, end = map(float, text(record, "answer").split("-"))
        except ValueError:
            raise FieldError("answer", "a span like '13.4-28.1'", show(record["answer"])) from None
        part = record["start"], record["end"]
        video, event = text(record, "path"), text(record, "question")
        row = {"question_id": f"tvg-{record['index']:03d}", "data_source": "TVGBench"}
    media = cut_row(video, *part)
    duration = part[1] - part[0] if "cut" in media else record.get("duration")
    solution, counted = span(start, end, duration, field="timestamp")
    if solution is None:
        return counted
    row |= {
        "problem": f"When does this happen in the video: {event.rstrip('.?')}?",
        "problem_type": "temporal grounding",
        "solution": solution,
        **media,
    }
    return [*counted, row]
