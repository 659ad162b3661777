"""Our task files in lmms-eval and our own evaluation: the same prompts, outputs and scores, row by row.

Records of the tiny world's clips in the form of each of the six benchmarks, as lmms-eval's own tasks read them, and a
policy that was taught for some seconds, so that some of its answers are right. Nothing of either tool is replaced.
"""

import json
import os
import subprocess
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import load_script

from veripo_trl.data.prompts import build_messages, load_template
from veripo_trl.data.rows import load_rows
from veripo_trl.data.schema import rows_to_dataset
from veripo_trl.model.policy import load_policy
from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.build import make_encoder
from veripo_trl.tiny.questions import SplitSize
from veripo_trl.tiny.world import make_world
from veripo_trl.trainers.sft import VideoSFTConfig, VideoSFTTrainer

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-lmms" / "bin" / "python"
SEEING = {
    "fps": 2.0,
    "max_frames": 6,
    "min_pixels": 28 * 28,
    "max_pixels": 56 * 56,
}  # the clips have 8 frames
SIZES = {
    "train": SplitSize(40, 60),
    "rl": SplitSize(6, 8),
    "dev": SplitSize(6, 6),
    "heldout": SplitSize(6, 6),
}
NEW_TOKENS = 24
# lmms-eval's task, its data set's part and split, where it looks for a video, the metric that has a row's score.
TASKS = {
    "vsi_bench": ("vsibench", "full", "test", "vsibench/scannet/{}.mp4", "vsibench_overall"),
    "perception": (
        "video_mmmu_perception",
        "Perception",
        "test",
        "video_mmmu/Art/{}.mp4",
        "mmmu_acc",
    ),
    "comprehension": (
        "video_mmmu_comprehension",
        "Comprehension",
        "test",
        "video_mmmu/Art/{}.mp4",
        "mmmu_acc",
    ),
    "adaptation": (
        "video_mmmu_adaptation",
        "Adaptation",
        "test",
        "video_mmmu/Art/{}.mp4",
        "mmmu_acc",
    ),
    "mmvu": ("mmvu_val", "default", "validation", "mmvu/videos/Art/{}.mp4", "accuracy"),
    "tomato": ("tomato", "default", "test", "TOMATO/videos/human/{}.mp4", "tomato_score"),
    "lvbench": ("lvbench", "default", "train", "lvbench/{}.mp4", "lvbench_score"),
    "video_mme": (
        "videomme",
        "default",
        "test",
        "videomme/data/{}.mp4",
        "videomme_perception_score",
    ),
}
VSI_CHOICES = [f"object_rel_direction_{level}" for level in ("easy", "medium", "hard")] + [
    "obj_appearance_order"
]


def official(name: str, number: int, row: dict) -> dict:
    """A row of the tiny world as a record of a benchmark, with the columns of the official file and
    of lmms-eval's copy."""
    video, options = f"validation_Art_{number}", row["options"]
    texts, choice = [option[3:] for option in options], "multiple-choice" if options else "open"
    video_mmmu = {"options": texts, "question_type": choice}
    own = {
        "vsi_bench": {
            "dataset": "scannet",
            "scene_name": video,
            "question_type": VSI_CHOICES[number % 4] if options else "object_counting",
            "ground_truth": row["solution"],
        },
        "perception": video_mmmu,
        "comprehension": video_mmmu,
        "adaptation": video_mmmu,
        "mmvu": {
            "video": f"https://huggingface.co/x/videos/Art/{video}.mp4",
            "video_path": f"videos/Art/{video}.mp4",
            "choices": dict(zip("ABCDE", [*texts, ""], strict=False)),
            "question_type": choice,
        },
        "tomato": {
            "key": video,
            "video_path": f"videos/human/{video}.mp4",
            "demonstration_type": "human",
            "reason_type": "count",
            "motion_type": "count",
            "options": texts,
            "answer": "ABCD".find(row["solution"]),
        },
        "lvbench": {
            "key": video,
            "uid": video,
            "video_path": f"{video}.mp4",
            "type": "tv",
            "question_type": ["count"],
            "question": "\n".join(
                [row["problem"], *(f"({text[0]}) {text[3:]}" for text in options)]
            ),
        },
        "video_mme": {
            "videoID": video,
            "question_id": video,
            "duration": "short",
            "domain": "Knowledge",
            "sub_category": "Astronomy",
            "task_type": "Action Reasoning",
        },
    }[name]
    record = {
        "id": video,
        "question": row["problem"],
        "options": options,
        "answer": row["solution"],
    }
    if name == "lvbench":  # they stand in the question
        del record["options"]
    return record | own


def score_of(name: str, found, doc: dict) -> float:
    """A row's score by lmms-eval, from what it logs."""
    if name == "vsi_bench":
        return found["accuracy"] if found.get("accuracy") is not None else found["MRA:.5:.95:.05"]
    if name in ("perception", "comprehension", "adaptation"):
        said = found["parsed_pred"]
        return float(said == doc["answer"] if doc["options"] else float(doc["answer"]) in said)
    if name == "mmvu":
        return float(found["correct"])
    return float(found if name == "lvbench" else found["score"])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world") / "world", sizes=SIZES, planted_share=0.0)


@pytest.fixture(scope="module")
def policy(world, tmp_path_factory):
    """A folder: the tiny policy, taught on a third of the questions."""
    folder = tmp_path_factory.mktemp("policy")
    model, processor = load_policy(str(world.model), train_vision_tower=True)
    seeing = DataArguments(prompt_template="tiny", frame_cache=str(folder / "frames"), **SEEING)
    encoder = make_encoder(model, processor, seeing)
    rows = load_rows([{"path": str(world.train)}]).to_list()
    rows = [row for row in rows if row["data_source"] != "tiny-list"][:20]
    options = {
        "max_steps": 40,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 20,
        "save_strategy": "no",
    }
    options |= {"output_dir": str(folder), "report_to": "none", "bf16": False, "use_cpu": True}
    args, data = VideoSFTConfig(**options, gradient_checkpointing=False), rows_to_dataset(rows)
    tools = {"processing_class": processor, "encoder": encoder}
    VideoSFTTrainer(model=model, args=args, train_dataset=data, **tools).train()
    model.generation_config.update(repetition_penalty=1.05, do_sample=True, temperature=0.5)
    model.save_pretrained(folder / "policy")
    processor.save_pretrained(folder / "policy")
    return folder / "policy"


@pytest.fixture(scope="module")
def records(world, tmp_path_factory):
    """{name: (records, rows as our sources make them)}, with files for either tool below `home`."""
    home = tmp_path_factory.mktemp("home")
    lines = [json.loads(line) for line in world.train.read_text().splitlines()]
    choices, counts = (
        [row for row in lines if row["data_source"] == f"tiny-{kind}"]
        for kind in ("order", "count")
    )
    found = {}
    for offset, (name, (_, part, split, where, _)) in enumerate(TASKS.items()):
        asked = choices[offset:][:8] + (counts[:4] if name in ("vsi_bench", "adaptation") else [])
        numbers = range(100 * offset, 100 * offset + len(asked))
        made = [official(name, *each) for each in zip(numbers, asked, strict=True)]
        rows = []
        for number, row, record in zip(numbers, asked, made, strict=True):
            video = home / where.format(f"validation_Art_{number}")
            video.parent.mkdir(parents=True, exist_ok=True)
            os.link(world.root / row["videos"][0], video)
            (ours,) = convert(name, record)
            rows.append(
                {
                    **ours,
                    "question_id": f"{name}-{number}",
                    "videos": [str(video.relative_to(home))],
                    "images": [],
                }
            )
        folder = home / "sets" / TASKS[name][0]
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(made), folder / "rows.parquet")
        files = f"  data_files:\n  - split: {split}\n    path: rows.parquet\n"
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {part}\n{files}---\n")
        found[name] = made, rows
    (home / "rows.json").write_text(json.dumps([row for _, rows in found.values() for row in rows]))
    return home, found


def convert(name: str, record: dict) -> list[dict]:
    track = name in ("perception", "comprehension", "adaptation")
    module = import_module(f"veripo_trl.sources.{'video_mmmu' if track else name}")
    return [
        {**row, "data_source": module.NAME}
        for row in module.convert(record, file=f"{name.title()}/x.parquet")
    ]


def test_scores_are_those_of_our_evaluation_row_by_row(policy, records, tmp_path):
    home, sets = records
    shipped = ROOT / "evaluation" / "lmms_eval"
    # The shipped files, with another data set and a length that is soon reached.
    for file in shipped.glob("*.yaml"):
        text = file.read_text()
        for task, *_ in TASKS.values():
            text = text.replace(
                f"- task: {task}\n", f"- task: {task}\n    dataset_path: {home}/sets/{task}\n"
            )
        (tmp_path / file.name).write_text(text)
    (tmp_path / "tasks.py").write_text((shipped / "tasks.py").read_text())
    (tmp_path / "_ours").write_text(
        (shipped / "_ours").read_text().replace("4096", str(NEW_TOKENS))
    )
    arguments = f"pretrained={policy},device=cpu,device_map=cpu,fps=2"
    words = f"""-m lmms_eval --model qwen2_5_vl --tasks veripo --include_path {tmp_path}
        --model_args {arguments},min_pixels=784,max_pixels=3136 --batch_size 1
        --log_samples --output_path {tmp_path}/theirs""".split()
    ours = {"HF_HOME": str(home), "VERIPO_TEMPLATE": "tiny", "VERIPO_MAX_FRAMES": "6"}
    streams = dict.fromkeys(("stdout", "stderr"), (log := tmp_path / "log.txt").open("w"))
    done = subprocess.run([PYTHON, *words], env=os.environ | ours, cwd=tmp_path, **streams)
    assert done.returncode == 0, log.read_text()[-6000:]

    output = tmp_path / "ours.json"
    argv = f"""--model_path {policy} --output_path {output} --prompt_path {home}/rows.json
        --video_dir {home} --engine transformers --dtype bfloat16 --prompt_template tiny
        --batch_size 1 --num_workers 1 --max_new_tokens {NEW_TOKENS}""".split()
    argv += [word for name, value in SEEING.items() for word in (f"--video_{name}", str(value))]
    assert load_script("evaluation/evaluation_vllm.py").main(argv) == 0
    load_script("evaluation/calculate_score.py").main(["--pred_path", str(output)])
    outputs = [item["model_output"] for item in json.loads(output.read_text())]
    scores = [
        row["ours"] for row in json.loads((tmp_path / "ours.scores.json").read_text())["rows"]
    ]

    template, place = load_template("tiny"), 0
    for name, (task, *_, metric) in TASKS.items():
        (file,) = (tmp_path / "theirs").glob(f"*/*_samples_{task}.jsonl")
        logged = sorted(
            map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"]
        )
        for sample, record, row in zip(logged, *sets[name], strict=True):
            where, ours = (name, sample, row), (outputs[place], scores[place])
            assert sample["input"] == build_messages(row, template)[0]["content"][-1]["text"], where
            assert (sample["resps"][0], score_of(name, sample[metric], record)) == ours, where
            place += 1
    assert place == len(scores) and 0.2 < sum(scores) / place < 0.95, scores
