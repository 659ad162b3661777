"""evaluation_vllm.py with --engine vllm, as a user runs it: the transformers engine's answers, a broken run, bad rows."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vllm.multimodal.cache import MultiModalReceiverCache

from conftest import load_script
from veripo_trl.evaluate.run import OutputFiles
from veripo_trl.vllm import evaluation as vllm_engine

SCRIPT = Path(__file__).resolve().parent.parent / "evaluation" / "evaluation_vllm.py"
TAIL = "\nAnswer with the option's letter from the given choices directly."
# The command in a process of its own, and the engine in another, as vLLM has it unless told otherwise.
PROCESS = """
import os, runpy, sys
import conftest
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
from veripo_trl.vllm import evaluation as vllm_engine
options = vllm_engine.engine_options
vllm_engine.engine_options = lambda *a, **k: {**options(*a, **k), "enforce_eager": True}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def script():
    return load_script("evaluation/evaluation_vllm.py")


@pytest.fixture(autouse=True)
def short_starts(monkeypatch):
    """Engines that compile nothing."""
    options = vllm_engine.engine_options
    monkeypatch.setattr(vllm_engine, "engine_options", lambda *a, **k: {**options(*a, **k), "enforce_eager": True})


@pytest.fixture
def prompts(media_root, tmp_path):
    """Seven rows; row 2 has no video, row 4 a question longer than the context."""
    rows = [
        {
            "question_id": f"q{place}", "video_path": video, "question": "Which?", "answer": "B",
            "processed_question": f"Which colour is {word}?\nA. red\nB. blue" + TAIL, **more,
        }
        for place, (video, word, more) in enumerate([
            ("long.mp4", "first", {}), ("wide.mp4", "third", {}), ("gone.mp4", "first", {}),
            ("fast.mp4", "second", {}), ("wide.mp4", "first or last " * 60, {}), ("wide.mp4", "last", {}),
            ("long.mp4", "last", {}),
        ])
    ]  # fmt: skip
    file = tmp_path / "tomato.json"
    file.write_text(json.dumps(rows))
    return file


def small_model(folder: Path, to: Path, **generation) -> Path:
    """A copy of a model with a context of 256 tokens and other fields in its generation config."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 256
    (to / "config.json").write_text(json.dumps(config))
    declared = json.loads((to / "generation_config.json").read_text())
    (to / "generation_config.json").write_text(json.dumps({**declared, **generation}))
    return to


def command(model, media_root, prompts, output, **more) -> list[str]:
    options = {
        "model_path": model, "output_path": output, "prompt_path": prompts, "video_dir": media_root, "engine": "vllm",
        "prompt_template": "tiny", "video_max_pixels": 112 * 56, "video_min_pixels": 56 * 56, "video_min_frames": 2,
        "video_max_frames": 24, "max_image_pixels": 56 * 112, "max_new_tokens": 16, "batch_size": 2, "num_workers": 2,
        "gpu_memory_utilization": 0.1, **more,
    }  # fmt: skip
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def made(output: Path) -> tuple[list, list]:
    """(answers, what the record says about each)."""
    record = json.loads(OutputFiles(output).record.read_text())
    return [item["model_output"] for item in json.loads(output.read_text())], record["rows"]


def test_candidates_of_a_vote_without_thinking(script, model_paths, media_root, prompts, tmp_path, monkeypatch):
    kept, keep = [], MultiModalReceiverCache.get_and_update_item
    monkeypatch.setattr(
        MultiModalReceiverCache, "get_and_update_item", lambda *a: kept.append((a[2], keep(*a))) or kept[-1][1]
    )
    output = tmp_path / "votes.json"
    argv = command(model_paths["qwen2_5_vl"], media_root, prompts, output, votes=3, vote_temperature=1.0)
    assert script.main([*argv, "--direct"]) == 3  # one has no video
    answers, rows = made(output)
    groups = [[each["completion"] for each in row["candidates"]] for row in rows if "error" not in row]
    assert len(groups) == 6 and {len(set(group)) for group in groups} == {3}
    assert all(text.startswith("<think></think>") for group in groups for text in group)
    assert [answer in group for answer, group in zip(filter(None, answers), groups, strict=True)] == [True] * 6
    # three candidates about each of three clips, twice: one copy of a clip's pixels
    assert len(kept) == 18 and len({key for key, _ in kept}) == len({id(pixels) for _, pixels in kept}) == 3


def test_a_broken_run_ends_with_the_file_of_an_unbroken_one(script, model_paths, media_root, prompts, tmp_path, capfd):
    """Sampled, each row with its own seed; what is wrong with two rows costs these rows."""
    model = small_model(model_paths["qwen2_5_vl"], tmp_path / "model")
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    options = {"temperature": 1.0, "seed": 3, "max_new_tokens": 48}
    assert script.main(command(model, media_root, prompts, whole, **options)) == 3
    answers, rows = made(whole)
    assert [bool(answer) for answer in answers] == [place not in (2, 4) for place in range(7)]
    assert len({*answers}) == 6
    assert "does not exist" in rows[2]["error"] and "model's context of 256" in rows[4]["error"]
    assert "2 rows could not be answered" in capfd.readouterr().out

    argv = command(model, media_root, prompts, broken, **options)
    journal = OutputFiles(broken).journal
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])}
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(SCRIPT), *argv], env=environment, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while (journal.read_bytes().count(b"\n") if journal.exists() else 0) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # vLLM's processes too, which outlive ours
        process.wait()
    written = journal.read_bytes()
    assert not broken.exists() and 2 <= written.count(b"\n") < 8
    assert script.main(argv) == 3
    assert broken.read_bytes() == whole.read_bytes() and journal.read_bytes().startswith(written)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_greedy_answers_are_those_of_transformers(kind, script, model_paths, media_root, prompts, tmp_path):
    """The same text, tokens and ends; for one kind with an adapter, and with an end that generation_config declares."""
    model = small_model(model_paths[kind], tmp_path / "model")
    if kind == "qwen2_5_vl":
        model = small_model(model_paths[kind], tmp_path / "ending", eos_token_id=[*range(200, 260)])
        model = save_adapter(model, tmp_path / "adapter")
    output, plain = tmp_path / "vllm.json", tmp_path / "plain.json"
    assert script.main(command(model, media_root, prompts, plain, engine="transformers")) == 3
    assert script.main(command(model, media_root, prompts, output)) == 3
    assert made(output) == made(plain)
    ends = [row.get("finish_reason") for row in made(output)[1]]
    assert ("stop" in ends) == (kind == "qwen2_5_vl") and len(set(made(output)[0])) > 3
    assert not OutputFiles(output).merged.exists()


def test_clip_by_clip_as_with_transformers(script, model_paths, media_root, prompts, tmp_path):
    """The same thoughts, memories and answers."""
    model = small_model(model_paths["qwen2_5_vl"], tmp_path / "model")
    outputs = {engine: tmp_path / f"{engine}.json" for engine in ("vllm", "transformers")}
    for engine, output in outputs.items():
        limits = {"clip_tokens": 16, "max_memory_tokens": 60}
        words = command(model, media_root, prompts, output, engine=engine, **limits)
        assert script.main([*words, "--streaming"]) == 3
    assert made(outputs["vllm"]) == made(outputs["transformers"])
    assert [len(row.get("thoughts", [])) for row in made(outputs["vllm"])[1]] == [2, 1, 0, 0, 0, 1, 2]


def save_adapter(model: Path, folder: Path) -> Path:
    from peft import LoraConfig

    from veripo_trl.model.policy import LANGUAGE_MODEL_LINEAR, load_policy

    lora = LoraConfig(r=4, target_modules=LANGUAGE_MODEL_LINEAR, init_lora_weights=False)
    load_policy(str(model), lora=lora)[0].save_pretrained(folder)
    return folder
