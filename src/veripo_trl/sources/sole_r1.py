"""SOLE-R1's composites: how far a robot's task has come, from one picture of first, previous and current frame.

Source: https://huggingface.co/datasets/Philip-MIT/sole_training_data (2 TB), arXiv 2603.28730. Licence: not
seen (code MIT). Columns: image_name, prompt (JSON text of the messages, the assistant's included), solution
("<think>…</think> <answer>45%</answer>"), data_source; more are not read. The prompt says the previous
progress, in training the true one.
Traps: the assistant's message is the answer and leaves the prompt, as does the system's (no row has one
here); "%" is taken off, or "50%" would be read as a half; answers that are no number of per cent are left out
and counted.
`make_composite` makes the picture of one's own frames: save it as PNG and name it in a row's `images`.
"""

import json
import re

from veripo_trl.sources.record import text

NAME = "SOLE-R1"
CELL, GAP = 384, 5


def convert(record: dict, *, file: str) -> list[dict | str]:
    messages = json.loads(text(record, "prompt"))
    asked = [message["content"] for message in messages if message["role"] == "user"]
    parts = [[{"text": part}] if isinstance(part, str) else part for part in asked]
    problem = "\n".join(piece["text"] for part in parts for piece in part if "text" in piece)
    found = re.fullmatch(
        r"\s*(?:<think>(.*)</think>)?\s*<answer>\s*(-?\d+(?:\.\d+)?)\s*%?\s*</answer>\s*",
        text(record, "solution"),
        re.S,
    )
    if not found:
        return ["left out: the answer is no number of per cent"]
    image = text(record, "image_name")
    return [
        {
            "question_id": f"sole-{image}",
            "problem": problem,
            "problem_type": "regression",
            "solution": found[2],
            "process": found[1],
            "images": [image],
            "data_source": record.get("data_source") or NAME,
        }
    ]


def make_composite(rows: list[list]):
    """One picture of PIL images: a row of columns per camera (first, previous, current), each fitted into 384 × 384 and
    centred on black, 5 black pixels between them. Three columns and two rows are 1162 × 773."""
    from PIL import Image

    if len({len(row) for row in rows}) != 1:
        counts = [len(row) for row in rows]
        raise ValueError(f"make_composite: expected as many images in each row, came {counts}")
    step = CELL + GAP
    picture = Image.new("RGB", (step * len(rows[0]) - GAP, step * len(rows) - GAP))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            scale = min(CELL / image.width, CELL / image.height)
            size = round(image.width * scale), round(image.height * scale)
            left, top = ((CELL - side) // 2 for side in size)
            picture.paste(image.convert("RGB").resize(size), (x * step + left, y * step + top))
    return picture
