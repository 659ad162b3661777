"""MVBench: 20 tasks of 200 questions that one frame does not answer.

Source: https://huggingface.co/datasets/OpenGVLab/MVBench (json/<task>.json), arXiv 2311.17005. Licence: MIT,
videos their own terms (NTU RGB+D on request). Columns: video, question, candidates, answer (its text); start
and end in five tasks.
Metric: accuracy, mean of the tasks = mean over rows, 200 a task.
Traps: 5 rows have one candidate, right by default: left out, so that the two means differ a little. 1,000
rows are about a part of the video from start to end: cut it beforehand (many runs show the whole file).
TVQA's videos (episodic reasoning) are folders of frames at 3 per second: they become videos as they are cut.
1,000 rows are CLEVRER validation videos.
"""

from pathlib import Path

from veripo_trl.sources.record import (
    cut_row,
    indexed,
    letter_of,
    lettered,
    mean_of_means,
    one_of,
    text,
)

NAME = "MVBench"
VIDEOS = "MVBench/<folder of the task>/<video>; parts as <name>_<start>-<end>.mp4"
_TASKS = {
    "star/Charades_v1_480": "action_sequence action_prediction object_interaction",
    "ssv2_video": "action_antonym",
    "Moments_in_Time_Raw/videos": "fine_grained_action",
    "FunQA_test/test": "unexpected_action",
    "clevrer/video_validation": "object_existence moving_direction moving_count moving_attribute "
    "counterfactual_inference",
    "perception/videos": "object_shuffle action_count state_change character_order",
    "sta/sta_video": "action_localization",
    "scene_qa/video": "scene_transition",
    "nturgbd": "fine_grained_pose",
    "vlnqa": "egocentric_navigation",
    "tvqa/frames_fps3_hq": "episodic_reasoning",
}
FOLDERS = {task: folder for folder, tasks in _TASKS.items() for task in tasks.split()}


def records(content: list[dict], *, file: str) -> list[dict]:
    task = one_of({"(file)": Path(file).name.partition(".")[0]}, "(file)", FOLDERS)
    return [record | {"task": task} for record in indexed(content)]


def convert(record: dict, *, file: str) -> list[dict | str]:
    task, texts = record["task"], [str(candidate) for candidate in record["candidates"]]
    if len(texts) < 2:
        return ["left out: one candidate, right by default"]
    video = f"MVBench/{FOLDERS[task]}/{text(record, 'video')}"
    media = cut_row(video, record.get("start"), record.get("end"))
    if task == "episodic_reasoning" and "cut" in media:
        media["cut"]["fps"] = 3.0  # a folder of frames
    return [
        {
            "question_id": f"mvbench-{task}-{record['index']}",
            "problem": text(record, "question"),
            "options": lettered(texts),
            "problem_type": "multiple choice",
            "solution": letter_of(str(record["answer"]), texts),
            "categories": {"task": task},
            **media,
        }
    ]


def totals(by_category: dict[str, dict]) -> dict[str, float]:
    tasks = by_category["task"]
    return {f"mean of {len(tasks)} tasks (the benchmark's own total)": mean_of_means(tasks)}
