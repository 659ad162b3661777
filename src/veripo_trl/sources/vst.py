"""VST's RL rows: questions on streams of video.

Source: https://github.com/1ranGuan/VST (train.parquet on the Hub, 11,000 rows), arXiv 2603.12262. Licence:
code Apache-2.0, sources' own terms; Ego4D's part is not distributed. Columns: data_source (the kind of the
question: multiple choice, numerical, yes or no), question (options in its last lines), video_context (path),
reward_model {ground_truth: [..]}, extra_info {duration, origin_id}; prompt is not read. The SFT rows
(154,785, a thought per clip) are `vst_sft`'s.
Traps: origin_id repeats, so the row's index is in the id; options beyond E are never right in their code,
here they are.
"""

from veripo_trl.data.schema import FieldError, show
from veripo_trl.sources.record import indexed, one_of, read_options, text

NAME = "VST"
TYPES = {"multiple choice": "multiple choice", "numerical": "numerical", "yes or no": "yes/no"}


records = indexed


def convert(record: dict, *, file: str) -> list[dict | str]:
    problem, kind = text(record, "question"), TYPES[one_of(record, "data_source", TYPES)]
    if not isinstance(truths := record["reward_model"]["ground_truth"], list):
        raise FieldError("reward_model", "ground_truth as a list", show(truths))
    truths = [str(truth) for truth in truths]
    options = read_options(problem) if kind == "multiple choice" else []
    if kind == "multiple choice" and not options:
        raise FieldError("question", "options in its last lines, A. …", show(problem))
    if not truths:
        return ["left out: no truth"]
    counted: list[dict | str] = ["said: several truths, the first is taught"] if truths[1:] else []
    return [
        *counted,
        {
            "question_id": f"vst-{record['extra_info']['origin_id']}-{record['index']}",
            "problem": problem,
            "options": options,
            "problem_type": kind,
            "solution": truths[0].lower() if kind == "yes/no" else truths[0],
            "alternatives": truths,
            "videos": [text(record, "video_context")],
        },
    ]
