"""Each relative's configuration on a made-up official record: its source, its template and its rewards go together, and
what its SFT stage teaches earns all of them."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from veripo_trl.answers.rewards import check_reward_truths, reward_functions
from veripo_trl.data.prompts import build_messages, build_target, load_template
from veripo_trl.data.rows import load_rows

CONFIGS = Path(__file__).resolve().parents[1] / "recipes" / "configs"
VIDEO_R1 = {"problem_id": 7, "problem": "How many lids are opened?", "data_type": "video", "problem_type": "numerical",
            "options": [], "solution": "<answer>3</answer>", "path": "./Demo/7.mp4", "data_source": "Demo"}  # fmt: skip
SEED_BENCH = {"sample_id": 17, "video_source": "EpicKitchens", "video_id": "P01_01", "video_basename": "P01_01_0.mp4",
              "current_observation_basename": "P01_01_0.png", "task_goal": "make tea", "question": "What is next?",
              "task_progress_metadata": [{"narration_text": "open cupboard", "start_frame": 10, "stop_frame": 40}],
              "answer": "take cup", "negative_answers": ["wash knife", "open fridge", "close door"]}  # fmt: skip
CLEVRER = {"scene_index": 10012, "video_filename": "video_10012.mp4", "questions": [
    {"question_id": 1, "question": "Without the cube?", "question_type": "counterfactual", "choices": [
        {"choice_id": place, "choice": text, "answer": answer}
        for place, (text, answer) in enumerate([("goes", "correct"), ("touches", "wrong"), ("falls", "correct")])
    ]}]}  # fmt: skip
SECTIONS = {"planning": "lift, then put down", "observation": "it is up", "reasoning": "so less than half"}
PRIMO = {**VIDEO_R1, "problem": "How much of the task is done?", "solution": "<answer>40</answer>",
         "init_frame_path": "./ep5_f0.png", "current_frame_path": "./ep5_f120.png"}  # fmt: skip
STRUCTURED = "".join(f"<{name}>{text}</{name}>" for name, text in SECTIONS.items())
TRACE = "<time>00:04-00:11</time> <caption>a knife</caption> <think>it is first</think> Then"
THINKER = {"id": "1", "video": "yt/abc.mp4", "question": "Which tool is second?", "options": ["A. knife", "B. whisk"],
           "answer": "B", "trace": TRACE}  # fmt: skip
HALLU = {**VIDEO_R1, "problem_id": 3.0, "problem": "Does the feather fall faster?", "problem_type": "free-form",
         "solution": "<answer>No, both fall together.</answer>"}  # fmt: skip
SOLE = {"image_name": "ep7_012.png", "data_source": "sim", "solution": "<think>It is up.</think> <answer>45%</answer>",
        "prompt": json.dumps([{"role": "user", "content": "First 0%, before 30%: how far is it now?"}])}  # fmt: skip
VST = {"data_source": "multiple choice", "question": "Which is first?\nA. red\nB. blue", "video_context": "v/1.mp4",
       "reward_model": {"ground_truth": ["A"]}, "extra_info": {"duration": 96.0, "origin_id": "x1"}}  # fmt: skip

LONG = {"problem": "Who wins?\nA. red\nB. blue", "answer": "<answer>B</answer>", "videos": "games/1.mp4"}


def charades(start, end, duration):
    return {"9AX": {"duration": duration, "timestamps": [[start, end]], "sentences": ["A person sits."]}}


def plain(answer):
    return f"<think>so</think><answer>{answer}</answer>"


# system, official file, {completion: weighted sum of rewards}; {} stands for the row's solution
CASES = [
    ("video_r1", [VIDEO_R1], {plain("3.0"): 2.0, plain("4"): 1.0, "3": 0.0}),
    ("tw_grpo", [CLEVRER], {plain("C, A"): 2.0, plain("A"): 1.5, plain("A, B"): 1.0}),
    ("deepvideo_r1", [SEED_BENCH], {plain("{}"): 2.0, plain("none"): 1.0}),
    ("seed_bench_r1", [SEED_BENCH], {plain("{}"): 1.0, plain("none"): 0.0}),
    ("long_video", [LONG], {plain("{}"): 1.0, plain("A"): 0.1, "B": 0.0, "<answer>B</answer>": 0.9}),
    ("primo", [PRIMO], {f"<think>{STRUCTURED}</think><answer>50%</answer>": 1.9, plain("40"): 1.0, plain("?"): 0.0}),
    ("stvg", {"31": {**charades(5, 11, 20)["9AX"], "objectid": [2]}},
     {plain("Target ID: 2, Time range: 8 to 14"): 1 + 1 / 3 + 1, plain("Target ID: 1, Time range: 5 to 11"): 2.0,
      plain("2"): 1.0}),
    ("grounding", [{"video": "v.mp4", "duration": 20, "timestamp": [4, 12], "sentence": "He sits.", "qid": 1,
                    "video_start": None, "video_end": None}],
     {plain("6 to 10"): 1.405, plain("4 to 12"): 2.0, plain("12 to 4"): 1.0}),
    ("videotg", charades(4, 12, 20), {plain("6 to 10"): 1.5, plain("12 to 15"): 1.0}),
    ("video_thinker", [THINKER],
     {f"{TRACE} <answer>B</answer>": 1.5, plain("B"): 1.0, f"{TRACE} <answer>A</answer>": 0.5}),
    ("videohallu", [HALLU, {**HALLU, "problem": None}], {plain("No."): 2.0, plain("Yes, both fall together."): 1.0}),
    ("sole", [SOLE], {plain("45%"): 2.5, plain("55%"): 1.5518, plain("far"): 1.0}),
    ("vst", [VST], {"Red, so <answer>A</answer>": 1.0, plain("B"): 0.0}),
]  # fmt: skip


def rows_of(system: str, stage: str, official, folder: Path):
    """(its configuration, its rows): `official` in the file, or in a file of the folder, that it names."""
    config = yaml.safe_load((CONFIGS / system / f"{stage}.yaml").read_text())
    (source,) = config["datasets"]
    path = folder / Path(source["path"]).name
    file = path if path.suffix else path / "rows.json"
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(official), file)
    else:
        file.write_text("\n".join(map(json.dumps, official)) if file.suffix == ".jsonl" else json.dumps(official))
    return config, load_rows([{**source, "path": str(path), "media_root": str(folder)}], shuffle=False)


def total(config: dict, row: dict, completion: str) -> float:
    functions = reward_functions(config["rewards"], config.get("reward_kwargs"))
    columns = {name: [row[name]] for name in ("solution", "problem_type", "options")}
    scores = [function(completions=[completion], **columns)[0] for function in functions]
    weights = config.get("reward_weights") or [1.0] * len(scores)
    return sum(weight * score for weight, score in zip(weights, scores, strict=True) if score is not None)


@pytest.mark.parametrize("system, official, totals", CASES, ids=[case[0] for case in CASES])
def test_record_prompt_and_rewards_go_together(tmp_path, system, official, totals):
    config, rows = rows_of(system, "grpo", official, tmp_path)
    check_reward_truths(config["rewards"], rows)
    (row,) = rows
    (message,) = build_messages(row, load_template(config["prompt_template"]))
    assert message["content"][-1]["text"].count("<answer>") > 0
    for completion, expected in totals.items():
        completion = completion.replace("{}", row["solution"])
        assert total(config, row, completion) == pytest.approx(expected, abs=1e-4), completion


def test_box_grounding_by_the_rows_of_its_page(tmp_path):
    page = (CONFIGS / "scene_r1" / "README.md").read_text()
    written = [json.loads(line) for line in re.findall("^{.*}$", page, re.M)]
    config, rows = rows_of("scene_r1", "grpo", written, tmp_path)
    when, box = sorted(rows, key=lambda row: row["problem_type"], reverse=True)
    assert (when["problem_type"], box["problem_type"]) == ("temporal grounding", "box grounding")
    assert total(config, when, plain("5 to 7.5")) == pytest.approx(0.5 + 1)
    assert total(config, box, plain('{"bbox_2d": [412, 300, 655, 820], "label": "chair"}')) == 2.0
    for row in rows:
        assert build_messages(row, load_template(config["prompt_template"]))


@pytest.mark.parametrize(
    "system, official",
    [
        ("video_r1", [{**VIDEO_R1, "process": "<think>One, two, three.</think>"}]),
        ("primo", [{**PRIMO, **SECTIONS, "process": STRUCTURED, "select": True}]),
        ("video_thinker", [THINKER]),
        ("sole", [SOLE]),
    ],
)
def test_what_sft_teaches_earns_all_rewards(tmp_path, system, official):
    taught, (row,) = rows_of(system, "sft", official, tmp_path)
    config = yaml.safe_load((CONFIGS / system / "grpo.yaml").read_text())
    assert config["prompt_template"] == taught["prompt_template"]
    target = build_target(row, load_template(taught["prompt_template"]))
    best = max(next(totals for name, _, totals in CASES if name == system).values())
    assert total(config, row, target) == pytest.approx(2.0 if system == "primo" else best)


def test_every_relative_is_here():
    systems = {file.parent.name for file in CONFIGS.glob("*/README.md")}
    assert systems == {case[0] for case in CASES} | {"scene_r1"}
