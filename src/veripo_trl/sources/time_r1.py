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
from veripo_trl.sources.record import cut_row, span, text

NAME = "Time-R1"
VIDEOS = "<video> or <path>, as in the rows; parts as <name>_<start>-<end>.mp4"


def records(content: list[dict], *, file: str) -> list[dict]:
    return [{**record, "index": index} for index, record in enumerate(content)]


def convert(record: dict, *, file: str) -> list[dict | str]:
    if "timestamp" in record:
        (start, end), part = (
            record["timestamp"],
            (record.get("video_start"), record.get("video_end")),
        )
        video, event, question_id, name = (
            text(record, "video"),
            text(record, "sentence"),
            f"tr1-{record['qid']}",
            NAME,
        )
    else:
        try:
            start, end = map(float, text(record, "answer").split("-"))
        except ValueError:
            remedy = "Correct the record or take it out."
            raise FieldError(
                "answer", "a span like '13.4-28.1'", show(record["answer"]), remedy
            ) from None
        part, event, name = (
            (record.get("start"), record.get("end")),
            text(record, "question"),
            "TVGBench",
        )
        video = text(record, "path")
        question_id = f"tvg-{record['index']:03d}"
    cut = None not in part
    solution, counted = span(
        start, end, part[1] - part[0] if cut else record.get("duration"), field="timestamp"
    )
    if solution is None:
        return counted
    row = {
        "question_id": question_id,
        "problem": f"When does this happen in the video: {event.rstrip('.?')}?",
        "options": [],
        "problem_type": "temporal grounding",
        "solution": solution,
        "data_source": name,
        **(cut_row(video, *part) if cut else {"videos": [video]}),
    }
    return [*counted, row]
