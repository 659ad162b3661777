"""NExT-GQA: a choice, and the seconds in which its reason is seen.

Source: https://github.com/doc-doc/NExT-GQA as Time-R1's and VideoChat-R1's JSON has it: id, video, question,
options ["(A) …"], answer "(C)", glue [[s, e], …], duration, type; arXiv 2309.01327. Videos: VidOR's, as
NExT-QA. Licence: not looked at; videos their own terms.
Metric: accuracy and mIoU, and the share that is right with an overlap; ours in two columns.
Traps: several spans are one truth (their union). Official letters are read from the first capital anywhere.
"""

from pathlib import PurePath

from veripo_trl.sources.record import letter_in_brackets, span, text

NAME = "NExT-GQA"
VIDEOS = "NExTQA/videos/<video>.mp4"


def convert(record: dict, *, file: str) -> list[dict | str]:
    spans, counted = [], []
    for start, end in record["glue"]:
        found, remarks = span(start, end, record.get("duration"), field="glue")
        spans += [found] if found else []
        counted += remarks
    if not spans:
        return [*counted, "left out: no span"]
    whole = spans[0].partition(" of ")[1:]
    row = {
        "question_id": f"gqa-{record['id']}",
        "problem": text(record, "question"),
        "options": list(record["options"]),
        "problem_type": "grounded choice",
        "solution": f"{letter_in_brackets(record, 'answer')}; "
        + "; ".join(one.partition(" of ")[0] for one in spans)
        + "".join(whole),
        "videos": [f"NExTQA/videos/{PurePath(str(record['video'])).name.removesuffix('.mp4')}.mp4"],
        "categories": {"type": str(record.get("type") or "")},
    }
    return [*counted, row]
