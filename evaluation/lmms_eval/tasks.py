"""What lmms-eval's own tasks are given here: our prompts, and of an output the answer span alone.

Environment: VERIPO_TEMPLATE, a prompt template's name or YAML file (default: default); VERIPO_MAX_FRAMES (default: 128).
lmms-eval imports this file by the `!function` lines of the YAML files beside it, and gives each function a record of its
own copy of a benchmark. Questions, options and types are made of it as `evaluation_vllm.py --benchmark` makes them of the
official record.
"""

import os

from lmms_eval.api.filter import Filter
from lmms_eval.tasks.tomato.utils import tomato_process_results
from qwen_vl_utils import vision_process

from veripo_trl.answers.score import extract_answer
from veripo_trl.data.prompts import build_messages, load_template
from veripo_trl.sources import lvbench, mmvu, tomato, video_mme, video_mmmu, vsi_bench

TEMPLATE = load_template(os.environ.get("VERIPO_TEMPLATE", "default"))
NO_ANSWER = "-"  # an empty text would leave VideoMMMU's denominator

# lmms-eval's Qwen2.5-VL asks for frames per second and sets no limit; qwen-vl-utils has this one then.
vision_process.FPS_MAX_FRAMES = int(os.environ.get("VERIPO_MAX_FRAMES", "128"))
vision_process.FORCE_QWENVL_VIDEO_READER = (
    "decord"  # our decoder; it prefers torchcodec where that is installed
)


class AnswerSpan(Filter):
    """The text of the only answer span of each output, without dollar signs around it."""

    def apply(self, resps, docs):
        return [
            [(extract_answer(text) or "").strip(" $") or NO_ANSWER for text in texts]
            for texts in resps
        ]


def _text(rows: list) -> str:
    (row,) = rows
    return build_messages({"images": [], **row}, TEMPLATE)[0]["content"][-1]["text"]


def vsi_bench_prompt(doc, *_) -> str:
    return _text(vsi_bench.convert(doc, file=""))


def perception_prompt(doc, *_) -> str:
    return _text(video_mmmu.convert(doc, file="Perception/"))


def comprehension_prompt(doc, *_) -> str:
    return _text(video_mmmu.convert(doc, file="Comprehension/"))


def adaptation_prompt(doc, *_) -> str:
    return _text(video_mmmu.convert(doc, file="Adaptation/"))


def mmvu_prompt(doc, *_) -> str:
    return _text(mmvu.convert({**doc, "video": f"/videos/{doc['video_path']}"}, file=""))


def choice_questions(dataset):
    """MMVU's rows with options, which VerIPO counts: an open question's score asks a paid model."""
    return dataset.filter(lambda doc: doc["question_type"] == "multiple-choice")


def tomato_prompt(doc, *_) -> str:
    return _text(
        tomato.convert({**doc, "key": doc["id"], "motion_type": doc["reason_type"]}, file="")
    )


def tomato_results(doc, results) -> dict:
    """lmms-eval's, which takes an output without an answer for "A": here it is wrong."""
    found = tomato_process_results(doc, results)
    if results[0] == NO_ANSWER:
        found["tomato_score"]["score"] = 0.0
    return found


def lvbench_prompt(doc, *_) -> str:
    options = "".join(
        f"\n({letter}) {text}"
        for letter, text in zip("ABCD", doc.get("options") or [], strict=False)
    )
    question = {
        "question": doc["question"] + options,
        "uid": "",
        "key": "",
        "type": "",
        "question_type": [],
    }
    return _text(lvbench.convert({**question, "answer": doc["answer"]}, file=""))


def video_mme_prompt(doc, *_) -> str:
    return _text(video_mme.convert(doc, file=""))
