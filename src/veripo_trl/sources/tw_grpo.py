"""TW-GRPO's rows: choices with several right letters, made of single ones by inverting the question.

Source: https://github.com/longmalongma/TW-GRPO (data/: id, video, question, options, solution
"<answer>B,C</answer>", is_negated), arXiv 2505.24718; of NExT-GQA's and STAR's rows (id, video, question,
options, answer "(C)") half are inverted here as there: the question is negated, so that the wrong options are
right and the old answer is wrong.
Licence: code Apache-2.0; videos as NExT-QA's and STAR's. Videos: <video>.mp4 below media_root.
Traps: their script inverts the answer also where it could not negate the question, so that labels are wrong:
such rows of its files are left out, counted; and its random numbers have no seed. Here what cannot be
negated, or not without another meaning (why, how), stays as it is, counted; which rows, and which of their
options, follow from the id; an inverted row's id ends in -inv. Rows with `is_negated` stay as they are.
"""

import re

from veripo_trl.sources.record import LETTERS, letter_in_brackets, lettered, seeded, text

NAME = "TW-GRPO"
_NEGATION = {
    word: f"{word}n't"
    for word in "did does do is are was were could would should has have had".split()
}
_NEGATIVE = re.compile(r"n't\b|\b(?:not|never|no|unable)\b", re.I)
_NEGATION |= {"will": "won't", "can": "can't"}


def convert(record: dict, *, file: str) -> list[dict | str]:
    problem = text(record, "question")
    if record.get("is_negated") and not _NEGATIVE.search(problem):
        return ["left out: its answer is inverted, its question is not"]
    row = {
        "question_id": f"tw-{record['id']}",
        "problem": problem,
        "options": list(record["options"]),
        "problem_type": "multiple choice",
        "solution": letter_in_brackets(record, "solution" if "solution" in record else "answer"),
        "videos": [f"{str(record['video']).lstrip('/').removesuffix('.mp4')}.mp4"],
    }
    several = len(row["solution"]) > 1 or len(row["options"]) < 2
    if "is_negated" in record or several or seeded(row["question_id"]).random() < 0.5:
        return [row]
    inverted = invert(row)
    if inverted is None:
        return [row, "kept: it cannot be negated"]
    return [inverted, "changed: question and answer inverted"]


def invert(row: dict) -> dict | None:
    """The negated question of a row with one right letter: the old answer and 1 … all of the wrong options, shuffled by
    a seed of the id, the wrong ones right now. None where it cannot be negated."""
    problem = negate(row["problem"])
    if problem is None:
        return None
    texts = [re.sub(r"^\s*\(?[A-Z][.)]\s*", "", option) for option in row["options"]]
    old = texts.pop(LETTERS.index(row["solution"]))
    random = seeded(row["question_id"] + "-inv")
    kept = [old, *random.sample(texts, random.randint(1, len(texts)))]
    random.shuffle(kept)
    solution = ",".join(
        letter for letter, option in zip(LETTERS, kept, strict=False) if option != old
    )
    inverted = {
        "question_id": row["question_id"] + "-inv",
        "problem": problem,
        "options": lettered(kept),
    }
    return {**row, **inverted, "solution": solution}


def negate(question: str) -> str | None:
    """ "What did he do?" → "What didn't he do?". None for one that has a negation, no auxiliary as its second or third
    word, or that asks why or how: the reasons for a thing are no reasons for its contrary."""
    words = question.split(" ")
    if _NEGATIVE.search(question) or words[0].lower() not in ("what", "which", "who", "where"):
        return None
    for place in range(1, min(3, len(words))):
        if negated := _NEGATION.get(words[place].lower()):
            return " ".join([*words[:place], negated, *words[place + 1 :]])
    return None
