"""Video-MMMU: what is learnt from lectures, in three tracks: perception, comprehension, adaptation.

Source: https://huggingface.co/datasets/lmms-lab/VideoMMMU (a folder of Parquet files for each track), arXiv
2501.13826.
Columns: id, question, options, answer, question_type, qa_type, link_selected; Adaptation also image.
Licence: its page's, not looked at here. Videos: the dataset's zip files, unpacked:
VideoMMMU/<group>/<id>.mp4. The image of an adaptation question is the end of its video, which the official
prompt says too.
Metric: accuracy. VerIPO did not release its file for this benchmark. The official one is lmms-eval's
(lmms_eval/tasks/videommmu at 2bb5e98): `official` asks in its wording, and `official_score` reads free
text as it does, which forgives more than our rules: of several letters the last counts, and an open
answer is right if it contains the truth. Its version 0.7.3 reads letters in another way. Of options that
carry their letter in the data an answer without any letter is compared with the text alone, there with both.
"""

import re
from pathlib import Path

from veripo_trl.answers.score import extract_answer
from veripo_trl.data.schema import FieldError
from veripo_trl.sources.record import LETTERS, ground_truths, kind_of, lettered

NAME = "VideoMMMU"
VIDEOS = "VideoMMMU/<Art|Business|Engineering|Humanities|Medicine|Science>/<id>.mp4"
TRACKS = ("Perception", "Comprehension", "Adaptation")
GROUPS = {
    "Art": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
    "Mechanical_Engineering",
    "Humanities": "History Literature Psychology Sociology",
    "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Science": "Biology Chemistry Geography Math Physics",
}


def convert(record: dict, *, file: str) -> list[dict]:
    track = next((part for part in reversed(Path(file).parts) if part in TRACKS), None)
    if track is None:
        raise FieldError(
            "(file)",
            f"a path with the track in it: {', '.join(TRACKS)}",
            file,
            "Keep the official folders.",
        )
    subject = re.sub(r"^[^_]+_|_\d+$", "", record["id"])
    group = next((group for group, subjects in GROUPS.items() if subject in subjects.split()), None)
    if group is None:
        known = "<split>_<subject>_<number> of a known subject"
        raise FieldError("id", known, repr(record["id"]))
    intro = (
        "The image that the question speaks of is shown at the end of the video.\n"
        if track == "Adaptation"
        else ""
    )
    truths = ground_truths(record["answer"])
    texts = zip(LETTERS, record["options"] or [], strict=False)  # some carry their letter already
    options = lettered([str(text).removeprefix(f"{letter}.") for letter, text in texts])
    return [
        {
            "question_id": f"{track.lower()}_{record['id']}",
            "problem": intro + record["question"],
            "options": options,
            "problem_type": "multiple choice" if options else kind_of(truths),
            "solution": truths[0],
            "alternatives": truths,
            "videos": [f"VideoMMMU/{group}/{record['id']}.mp4"],
            "categories": {"track": track, "group": group, "subject": subject},
        }
    ]


_LEARN = (
    "You should watch and learn the video content. Then apply what you learned to answer the following {} question. "
    "The image for this question is at the end of the video."
)
_IGNORE = "Please ignore the Quiz question in last frame of the video."


def official(record: dict, *, file: str) -> list[dict]:
    """`convert` in the official wording, for prompt template `question`, which adds nothing to it."""
    (row,) = convert(record, file=file)
    lines = [record["question"], *row["options"]]
    if row["categories"]["track"] == "Adaptation":
        lines.insert(0, _LEARN.format("multi-choice" if row["options"] else "open-ended"))
    else:
        lines.append(_IGNORE)
    return [{**row, "problem": "\n".join(lines)}]


def official_score(output: str, *, options: list[str], truths: list[str]) -> float:
    """What the official matching gives an output: of its only answer span where it has one, which is ours, else of all of
    it. An empty output, which they leave out of the mean, is wrong."""
    said = extract_answer(output)
    text = output if said is None else said
    if options:
        return float(_letter(text, options) in truths)
    found = _open_answers(text) if text else set()
    right = [value for truth in truths for value in _plain(truth)]
    texts = [each for each in found if isinstance(each, str)]
    return float(any(t in found if isinstance(t, float) else any(t in each for each in texts) for t in right))


def _letter(text: str, options: list[str]) -> str | None:
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text, letters = f" {text} ", LETTERS[: len(options)]
    # a form, and where of several letters in that form each stands
    for forms, place in ((("{}.", "{}:"), None), (("({})",), "({})"), (("{} ",), " {} ")):
        in_form = {form: [x for x in letters if form.format(x) in text] for form in forms}
        if found := sum(in_form.values(), []):
            place = place or next(form for form in forms if in_form[form])
            return max(found, key=lambda x: text.rfind(place.format(x)))
    spelled = {x: option.split(". ", 1)[-1].lower() for x, option in zip(letters, options, strict=False)}
    found = [x for x in letters if spelled[x] in text.lower()] if len(text.split()) > 5 else []
    return max(found, key=lambda x: text.lower().rfind(spelled[x]), default=None)


_BEFORE = (
    "could be |so |is |thus |therefore |final |answer |result |are |in total |total |identify |recognize |calculated as "
    "|counted as |measured as |observed as |concluded as |found to be |equals |determined to be |number of |value is "
    "|adds up to |have |has "
).split("|")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?e[+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?!e[+-]?\d)(?![,\d])",
)


def _open_answers(text: str) -> set[str | float]:
    """Of each line the shortest end behind one of `_BEFORE`, of a text without any all of it; and the numbers there."""
    lines, found = text.strip().strip(".").lower().split("\n"), []
    for number, line in enumerate(lines, 1):
        end = ""
        for word in [*_BEFORE, "="] if number == len(lines) else _BEFORE:
            tail = line.split(word)[-1].strip()
            if word in line and (not end or len(tail) < len(end)):
                end = tail
        found += [end] if end and end not in list(":,.!?;'") else []
    found = found or ["\n".join(lines)]
    numbers = [number for end in found for pattern in _NUMBERS for number in re.findall(pattern, end)]
    return {value for each in [*found, *numbers] for value in _plain(each)}


def _plain(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
