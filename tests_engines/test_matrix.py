"""SFT, GRPO and DPO with full weights and LoRA under ZeRO-2, ZeRO-3 and FSDP2, against DDP: two processes over gloo.

Each cell is two steps of a recipe on given completions. An engine's cells run in one launch of two processes, which pay
for their imports once; a cell that fails or hangs ends the launch, and another one begins behind it.
"""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_row, write_video
from safetensors.torch import load_file

from veripo_trl.data.prompts import build_messages, load_template
from veripo_trl.data.rollouts import RolloutStore

DRIVER = Path(__file__).with_name("matrix_driver.py")
LIMIT_S = 120  # of one cell: far more than it takes on an idle machine
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
TOLERANCE = 1e-6

OPTIONS = {
    # With an epsilon as large as 1 AdamW's steps are in proportion to the gradients, as plain SGD's are, and have a state
    # to be saved: its usual ones are sign(gradient) at first, which makes a whole step of a rounding difference near 0.
    "optim": "adamw_torch", "adam_epsilon": 1.0, "learning_rate": 1.0, "lr_scheduler_type": "constant",
    "gradient_checkpointing": "false", "bf16": "false", "dtype": "float32", "report_to": "none", "save_strategy": "no",
    "logging_steps": 1, "disable_tqdm": "true", "dataloader_num_workers": 0, "seed": 0, "prompt_template": "tiny",
    "min_frames": 2, "max_frames": 4, "min_pixels": 3136, "max_pixels": 3136, "report_batch_size": 1,
    "report_samples": 1, "report_max_new_tokens": 4, "max_steps": 2,
}  # fmt: skip
STAGES = {
    "sft": {"recipe": "sft_video", "per_device_train_batch_size": 1},
    "grpo": {
        "recipe": "grpo_video", "per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 40,
        "loss_type": "grpo", "temperature": 1.0,
    },
    "dpo": {"recipe": "dpo_video", "per_device_train_batch_size": 1},
}  # fmt: skip
WEIGHTS = {"full": {}, "lora": {"use_peft": "true", "lora_r": 4, "lora_alpha": 8}}
# Rows, and other options. Of "text beside video" each process has one in each step.
CASES = {
    "same rows": ("clips", {"gradient_checkpointing": "true"}),
    "text beside video": ("text and clip", {}),
    "resumed": ("clips", {"save_strategy": "steps", "save_steps": 1}),
}
CELLS = {f"{s}, {w}, {c}": (s, w, CASES[c][0], dict(CASES[c][1])) for s, w, c in product(STAGES, WEIGHTS, CASES)}
for weights in WEIGHTS:  # with a reference beside the policy: in full, or the adapter switched off
    CELLS[f"grpo, {weights}, text beside video"][3]["beta"] = 0.04
# Really sampled: only the process with the video has T-GRPO's extra rollouts, and of three held-out rows in batches of
# one each process has another number.
UNEVEN = {"methods": "t_grpo", "max_completion_length": 8, "held_out": "three clips"}
CELLS |= {f"grpo, {w}, uneven": ("grpo", w, "text and clip", UNEVEN) for w in WEIGHTS}
# Likewise the process with the video has a turn more, which the other enters without a row. (A text is one turn.)
TURNS = {"methods": "streaming", "clip_tokens": 4, "loss_type": "dapo", "scale_rewards": "none"}
CELLS |= {
    "grpo, full, turns": ("grpo", "full", "text and clip", TURNS),
    "grpo, lora, uneven turns": ("grpo", "lora", "text and clip", {**UNEVEN, **TURNS}),
}
# Methods that read the output head, which the engines shard, and the old log-probabilities.
CELLS |= {
    "grpo, full, token weights": ("grpo", "full", "clips", {"methods": "tw_grpo", "loss_type": "bnpo"}),
    "grpo, full, regression": ("grpo", "full", "clips", {"methods": "reg_grpo", "num_iterations": 2}),
}
TRAINED = {"train_vision_tower": "true"}
CELLS |= {f"{s}, full, tower trained": (s, "full", "clips", TRAINED) for s in STAGES}
# Each row's prompt by both processes together; GRPO's second step is on the first one's rollouts, and resumed amid them.
SHARED_OUT = {"prompt_parallel": 2, "per_device_train_batch_size": 1}
SHARED = {f"{s}, full, prompt shared out": (s, "full", "clips", SHARED_OUT) for s in ("sft", "dpo")}
ITERATED = {**SHARED_OUT, "steps_per_generation": 1, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
SHARED |= {f"grpo, full, prompt shared out{end}": ("grpo", "full", "clips", ITERATED) for end in ("", ", resumed")}
CELLS |= SHARED
# Of another family, with linear attention in some of its layers.
QWEN3_5 = {"kind": "qwen3_5", "min_pixels": 4096, "max_pixels": 4096}
CELLS["grpo, full, text beside video, Qwen3.5"] = ("grpo", "full", "text and clip", {**QWEN3_5, "beta": 0.04})
# What is refused, by which engine, and with which words.
REFUSED = {
    "dpo, tower trained (fsdp2)": ("fsdp2", "dpo", "clips", TRAINED, {}, "expected no reference model"),
    **{
        f"{s}, sequence parallelism": ("zero2", s, "clips", {}, {"SP_SIZE": "2"}, "cp_size 1 and sp_size 2")
        for s in STAGES
    },
    **{
        f"{s}, context parallelism": ("fsdp2", s, "clips", {}, {"CP_SIZE": "2"}, "cp_size 2 and sp_size 1")
        for s in STAGES
    },
    **{
        f"{s}, tower trained, text beside video ({e})": (e, s, "text and clip", TRAINED, {}, "Give every row a video")
        for e, s in product(("zero3", "fsdp2"), STAGES)
        if (e, s) != ("fsdp2", "dpo")  # refused above, whatever the rows
    },
}  # fmt: skip

RUNS = [
    (e, cell) for e, cell in product(ENGINES, CELLS)
    if (e, cell) != ("fsdp2", "dpo, full, tower trained") and (cell not in SHARED or e in ("ddp", "zero2"))
]  # fmt: skip
# Of a resumed run with the prompt shared out DDP's own is compared, too: with one that was not broken off.
RESUMED = "grpo, full, prompt shared out, resumed"

pytestmark = pytest.mark.slow


def texts_of(place: int) -> list[str]:
    """Of different lengths and rewards, within a group and between questions."""
    think = "red then blue, " * (1 + place % 3)
    right = f"<think>{think}first is blue: B.</think><answer>B</answer>"
    return [right, f"<think>so {'red, ' * place}red.</think><answer>{'ACD'[place % 3]}</answer>"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """For each name of rows a JSON Lines file, and a folder of preference pairs."""
    folder = tmp_path_factory.mktemp("matrix_data")
    for place in range(4):
        write_video(folder / f"clip{place}.mp4", frames=4, height=56, width=56, seed=400 + place)
    rows = [make_row(f"row{place}", folder, videos=[f"clip{place}.mp4"]) for place in range(4)]
    text = make_row("text", folder, problem="Which colour is last?")
    template = load_template("tiny")
    for name, members in {"clips": rows, "text and clip": [text, rows[0]], "three clips": rows[:3]}.items():
        stored = [{key: value for key, value in row.items() if key != "media_root"} for row in members]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, stored)) + "\n")
        pairs = []
        for place, row in enumerate(stored):
            answers = [[{"role": "assistant", "content": text}] for text in texts_of(place)]
            verdict = {"rollout_id": "r", "consistency": "consistent"}
            pairs.append({
                **{key: value for key, value in row.items() if key != "process"},
                "prompt": json.loads(json.dumps(build_messages(row, template))), "chosen": answers[0],
                "rejected": answers[1], "kind": "consistency", "chosen_ids": ["a"], "rejected_id": "b",
                "rejected_finished": True, "verdicts": {"chosen": [verdict], "rejected": verdict},
                "prompt_template": template.hash, "policy": "p",
            })  # fmt: skip
        (folder / name).mkdir()
        pq.write_table(pa.Table.from_pylist(pairs), folder / name / "train-00000.parquet")
    return folder


def kind_of(options: dict) -> str:
    return options.get("kind", "qwen2_5_vl")


def scenario(engine, name, stage, weights, rows, options, *, data, models, folder) -> dict:
    given = {
        **OPTIONS, **STAGES[stage], **WEIGHTS[weights], "model_name_or_path": models[kind_of(options)],
        "output_dir": folder / name, "use_cpu": str(engine == "ddp").lower(), **options,
    }  # fmt: skip
    recipe, held_out, environ = given.pop("recipe"), given.pop("held_out", None), {}
    if given.pop("kind", None) and engine == "fsdp2":
        environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "Qwen3_5DecoderLayer"
    if held_out:
        given["eval_datasets"] = json.dumps({"path": str(data / f"{held_out}.jsonl"), "media_root": str(data)})
    if engine == "fsdp2" and "train_vision_tower" in options:
        environ["FSDP_IGNORED_MODULES"] = None
    path = data / rows if stage == "dpo" else data / f"{rows}.jsonl"
    given["pairs" if stage == "dpo" else "datasets"] = json.dumps({"path": str(path), "media_root": str(data)})
    argv = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    names = [json.loads(line)["question_id"] for line in (data / f"{rows}.jsonl").read_text().splitlines()]
    return {
        "name": name, "recipe": recipe, "argv": argv + ["--rewards", "accuracy", "format"] * (stage == "grpo"),
        "limit_s": LIMIT_S, "environ": environ,
        **({} if held_out else {"completions": {name: texts_of(place) for place, name in enumerate(names)}}),
    }  # fmt: skip


def launch(engine: str, scenarios: list[dict], folder: Path) -> str:
    """Run the driver on two processes; its output."""
    file = folder / "scenarios.json"
    file.write_text(json.dumps(scenarios))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [*command, str(DRIVER), engine, str(file)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=90 + sum(item["limit_s"] for item in scenarios))[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0]
    with open(folder / "output.txt", "a") as file:
        file.write(output)
    return output


def run_all(engine: str, scenarios: list[dict], folder: Path) -> dict[str, list[str]]:
    """What each cell's ranks said at its end; of one that did not come to it, the output of its launch instead."""
    said: dict[str, list[str]] = {}
    while scenarios:
        output = launch(engine, scenarios, folder)
        for item in list(scenarios):
            ends = re.findall(rf"cell {re.escape(item['name'])} rank \d [\d.]+ s: (.*)", output)
            said[item["name"]] = ends if len(ends) == 2 else [output[-12000:]]
            scenarios.remove(item)
            if len(ends) < 2:
                break
    return said


@pytest.fixture(scope="session")
def runs(request, data, model_paths, tmp_path_factory):
    """`runs(engine) -> (folder, {cell: what its processes said})`: of the cells whose tests were chosen, run once."""
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cells = {params["cell"] for params in asked if "cell" in params}
    cells |= {cell.removesuffix(", resumed") for cell in cells & {RESUMED}}
    refused = {params["name"] for params in asked if "name" in params}
    failing = {params["failing"] for params in asked if "failing" in params}
    found = {}

    def run(engine: str):
        if engine not in found:
            folder = tmp_path_factory.mktemp(engine)
            make = {"data": data, "models": model_paths, "folder": folder}
            scenarios = []
            for cell in (cell for own, cell in RUNS if own == engine and cell in cells):
                item = scenario(engine, cell, *CELLS[cell], **make)
                if "resumed" in cell:
                    scenarios.append({**item, "name": f"{cell}, before", "break_after": 1})
                scenarios.append(item)
            for name, (own, stage, rows, options, sizes, _) in REFUSED.items():
                if own == engine and name in refused:
                    item = scenario(engine, name, stage, "full", rows, options, **make)
                    sizes = {f"PARALLELISM_CONFIG_{key}": value for key, value in sizes.items()}
                    used = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"} if sizes else {}
                    scenarios.append({**item, "refused": True, "environ": {**item["environ"], **sizes, **used}})
            if engine in failing:  # the last one: its processes cannot go on together
                item = scenario(engine, "failing", "sft", "full", "clips", {}, **make)
                scenarios.append({**item, "fail": True})
            found[engine] = folder, run_all(engine, scenarios, folder)
        return found[engine]

    return run


def needs(engine: str) -> None:
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: .ci/engines runs this in an environment that has it")


@pytest.mark.parametrize("engine,cell", [run for run in RUNS if run[0] != "ddp" or run[1] == RESUMED])
def test_steps_are_those_of_ddp(engine, cell, runs, model_paths):
    needs(engine)
    (reference, expected), (folder, said) = runs("ddp"), runs(engine)
    whole = cell.removesuffix(", resumed") if cell == RESUMED else cell
    assert expected[whole] == ["exit code 0"] * 2, expected[whole][0]
    assert said[cell] == ["exit code 0"] * 2, said[cell][0]
    if "resumed" in cell:
        assert said[f"{cell}, before"] == ["broken off"] * 2
        assert (folder / cell / "checkpoint-2").is_dir()
    name = "adapter_model.safetensors" if "lora" in cell else "model.safetensors"
    ours, theirs = load_file(folder / cell / name), load_file(reference / whole / name)
    assert ours.keys() == theirs.keys()
    apart = {key: float((ours[key] - theirs[key]).abs().max()) for key in ours}
    assert max(apart.values()) <= TOLERANCE, max(apart.items(), key=lambda item: item[1])
    if "uneven" in cell:
        found = [json.loads((place / cell / "results.json").read_text()) for place in (folder, reference)]
        assert found[0]["after"] == found[1]["after"] and found[0]["before"] == found[1]["before"]
        assert found[0]["after"]["greedy"]["questions"] == 3
        kept = [RolloutStore(place / cell / "rollouts").read() for place in (folder, reference)]
        assert [row["completion"] for row in kept[0]] == [row["completion"] for row in kept[1]]
        return
    first = load_file(model_paths[kind_of(CELLS[cell][3])] / "model.safetensors")
    moved = [float((theirs[key] - first[key]).abs().max()) for key in first.keys() & theirs.keys()]
    assert max(moved or [float(v.abs().max()) for k, v in theirs.items() if "lora_B" in k]) > 1000 * TOLERANCE
    if "tower trained" in cell:
        assert max(float((theirs[k] - first[k]).abs().max()) for k in theirs if "visual" in k) > 10 * TOLERANCE


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_every_process(name, runs):
    engine, *_, words = REFUSED[name]
    needs(engine)
    said = runs(engine)[1][name]
    assert len(said) == 2 and all(words in text for text in said), said[0]


@pytest.mark.parametrize("failing", ENGINES)
def test_a_process_that_fails_ends_the_others_with_its_message(failing, runs):
    needs(failing)
    said = runs(failing)[1]["failing"]
    message = "VeripoError: row 'row3' is not as it was"
    assert sorted(said) == sorted([message, f"process 0 ends, for another one failed. process 1: {message}"]), said[0]
