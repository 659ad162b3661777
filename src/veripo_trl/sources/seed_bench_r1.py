"""SEED-Bench-R1: what comes next in a task, from a video of what was done and an image of now.

Source: https://huggingface.co/datasets/TencentARC/SEED-Bench-R1 (annotations/training_6k.jsonl, 6,000 of
50,269; validation_L1.jsonl 2,432 rows, _L2 923, _L3 1,321), arXiv 2503.24376. Licence: code Apache-2.0;
videos Epic-Kitchens CC BY-NC 4.0 (training and L1) and Ego4D, by signed agreement (L2, L3). Columns:
sample_id, video_source (EpicKitchens or Ego4D), video_basename, current_observation_basename, question,
task_progress_metadata (a list), answer and negative_answers (training) or choice_a … choice_d and
golden_choice_idx (validation); more are not read.
Media: videos/<video_source>/<video_basename>, images/<video_source>/<current_observation_basename>.
Metric: accuracy, L1 (seen scenes and tasks), L2 (unseen scenes) and L3 (unseen both) apart; L3 by domain.
Traps: their training shuffles options anew in every run, so that the letter depends on it: here by a seed of
the id. narration_text tells the past actions and is no part of the prompt. Epic-Kitchens' files may lie in a
folder more, merged_videos. The rows with thinking (training_with_cot_6k.jsonl) have other columns and are not
read.
"""

import re
from pathlib import PurePath

from veripo_trl.data.schema import FieldError, show
from veripo_trl.sources.record import LETTERS, lettered, one_of, seeded, text

NAME = "SEED-Bench-R1"
VIDEOS = "videos/<EpicKitchens|Ego4D>/<video_basename>"


def convert(record: dict, *, file: str) -> list[dict | str]:
    counted: list[dict | str] = []
    question_id = f"sbr1-{record['sample_id']}"
    if "golden_choice_idx" in record:
        if not (level := re.search(r"_(L[123])\b", PurePath(file).name)):
            raise FieldError(
                "(file)", "a name that ends in _L1, _L2 or _L3", file, "Keep the official names."
            )
        texts = [text(record, f"choice_{letter}") for letter in "abcd"]
        solution = one_of(record, "golden_choice_idx", "ABCD")
        categories = {"level": level[1], "domain": str(record.get("domain") or "")}
    else:
        answer, random, categories = text(record, "answer"), seeded(question_id), {}
        if not isinstance(others := record["negative_answers"], list):
            raise FieldError("negative_answers", "a list of texts", show(others))
        wrong = list(dict.fromkeys(other.strip() for other in others))
        wrong = [other for other in wrong if other and other != answer]
        if dropped := len(others) - len(wrong):
            counted += [
                "changed: a wrong option dropped, it repeats the answer or another"
            ] * dropped
        if not wrong:
            return [*counted, "left out: no wrong option"]
        texts = [answer, *random.sample(wrong, min(3, len(wrong)))]
        random.shuffle(texts)
        solution = LETTERS[texts.index(answer)]
    folder, image = (
        one_of(record, "video_source", ("EpicKitchens", "Ego4D")),
        text(record, "current_observation_basename"),
    )
    row = {
        "question_id": question_id,
        "problem": text(record, "question"),
        "options": lettered(texts),
        "problem_type": "multiple choice",
        "solution": solution,
        "videos": [f"videos/{folder}/{text(record, 'video_basename')}"]
        if record["task_progress_metadata"]
        else [],
        "images": [f"images/{folder}/{image}"],
        "categories": categories,
    }
    return [*counted, row]
