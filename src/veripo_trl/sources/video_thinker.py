"""Video-Thinker-10K: choices with thinking in <time>, <caption> and <think> marks.

Source: https://github.com/shijian2001/Video-Thinker, arXiv 2510.23473. Licence and columns of the released
file were not seen: expected are id, video, question or problem, options, answer or solution, trace or
process. Videos: <video>, from ActivityNet, TutorialVQA, YouCook2, STAR, ScaleLong and LVBench.
Traps: the thinking is the whole trace, with think tags of its own: it needs a prompt template that writes it
as it is. An answer span at the trace's end is taken off. LVBench is trained on: do not quote it as held out.
"""

import re

from veripo_trl.data.schema import FieldError
from veripo_trl.sources.record import letter_in_brackets, text

NAME = "Video-Thinker"


def convert(record: dict, *, file: str) -> list[dict | str]:
    names = {}
    for ours, theirs in (("problem", "question"), ("solution", "answer"), ("process", "trace")):
        if not (found := [name for name in (ours, theirs) if record.get(name)]):
            raise FieldError(
                ours, f"a column {ours} or {theirs}", ", ".join(record), "Rename the columns."
            )
        names[ours] = found[0]
    trace = re.sub(r"\s*<answer>.*?</answer>\s*$", "", text(record, names["process"]), flags=re.S)
    if not re.search(
        r"<time>.*?</time>\s*<caption>.*?</caption>\s*<think>.*?</think>", trace, re.S
    ):
        return ["left out: no time, caption and thought in its trace"]
    return [
        {
            "question_id": f"vt-{record['id']}",
            "problem": text(record, names["problem"]),
            "options": record["options"],
            "problem_type": "multiple choice",
            "solution": letter_in_brackets(record, names["solution"]),
            "process": trace,
            "videos": [text(record, "video")],
            "data_source": record.get("data_source") or NAME,
        }
    ]
