"""evaluation_vllm.py as a user runs it, on real clips: its files, broken runs, bad rows, two writers, what training
sees. The model is untrained: what it writes is noise, but always the same noise."""

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import contents, released, released_file
from helpers import evaluation_command as command
from hub_server import HubServer, Repo

from conftest import load_script, make_row
from veripo_trl.data.prompts import load_template
from veripo_trl.data.schema import RowError, rows_to_dataset
from veripo_trl.errors import ConfigError, VeripoError
from veripo_trl.evaluate import generate as evaluate
from veripo_trl.evaluate.generate import Decoding, TransformersEngine, encoded_batches
from veripo_trl.evaluate.questions import _benchmark_rows, read_questions
from veripo_trl.evaluate.run import OutputFiles, answer_questions, answered, write_outputs
from veripo_trl.files.journal import Journal, JournalError
from veripo_trl.files.run_folder import only_process
from veripo_trl.recipe.verify_stage import JudgeArguments

SCRIPT = Path(__file__).resolve().parent.parent / "evaluation" / "evaluation_vllm.py"


@pytest.fixture(scope="module")
def script():
    return load_script("evaluation/evaluation_vllm.py")


@pytest.fixture
def prompts(tmp_path):
    return released_file(tmp_path)


def test_the_output_is_the_released_form_and_the_record_says_how(script, model_paths, media_root, prompts, tmp_path):
    output = tmp_path / "out" / "tomato.json"
    assert script.main(command(model_paths, media_root, prompts, output)) == 0
    rows, results = json.loads(prompts.read_text()), json.loads(output.read_text())
    assert [list(item) for item in results] == [["question", "ground_truth", "model_output"]] * 12
    assert [item["question"] for item in results] == rows and {item["ground_truth"] for item in results} == {"B"}
    record = json.loads(OutputFiles(output).record.read_text())
    settings = record["settings"]
    assert settings["decoding"] == {"max_new_tokens": 8, "temperature": 1e-6, "top_p": 1.0, "repetition_penalty": 1.05,
                                    "seed": 0}  # fmt: skip
    assert settings["video"]["fps"] == 2.0 and settings["video"]["max_frames"] == 24
    assert settings["prompt_template"] == load_template("tiny").hash and settings["model_revision"]
    assert settings["torch_version"] == torch.__version__ and settings["max_image_pixels"] == 1280 * 28 * 28
    made = record["rows"]
    media = [row["media"][0] for row in made[:2]]
    assert media[0].startswith("long.mp4: 24 frames × 56 × 56 ") and media[0].endswith("→ 48 tokens")
    assert media[1].startswith("wide.mp4: 6 frames × 56 × 112 ") and media[1].endswith("→ 24 tokens")
    assert all(row["completion_tokens"] == 8 and row["finish_reason"] == "length" for row in made)
    assert [row["position"] for row in made] == list(range(12)) and len({row["key"] for row in made}) == 12

    # One by one, without workers: the same answers, since padding and company change nothing.
    alone = tmp_path / "alone.json"
    script.main(command(model_paths, media_root, prompts, alone, batch_size=1, num_workers=0))
    assert contents(alone)["output"] == contents(output)["output"]


def test_a_benchmarks_official_file_is_asked(script, model_paths, media_root, tmp_path, capsys):
    folder = tmp_path / "Video-MME" / "videos"
    folder.mkdir(parents=True)
    (folder / "a.mp4").write_bytes((Path(media_root) / "long.mp4").read_bytes())
    row = {"video_id": "1", "duration": "short", "domain": "x", "videoID": "a", "question_id": "1-1", "task_type": "y",
           "question": "Which?", "options": ["A. red", "B. blue"], "answer": "B"}  # fmt: skip
    (tmp_path / "official.json").write_text(json.dumps([row]))
    options = command(model_paths, tmp_path, tmp_path / "official.json", tmp_path / "out.json", benchmark="video_mme")
    assert script.main(options) == 0
    (prediction,) = json.loads((tmp_path / "out.json").read_text())
    assert prediction["ground_truth"] == "B" and prediction["question"]["categories"]["task"] == "y"
    part = {"video": "a.mp4", "question": "Which?", "candidates": ["red", "blue"], "answer": "red", "start": 1, "end": 2}
    (tmp_path / "state_change.json").write_text(json.dumps([part]))
    options = command(model_paths, tmp_path, tmp_path / "state_change.json", tmp_path / "out.json", benchmark="mvbench")
    parts = r"a_1.00-2.00.mp4'. Correct --video_dir. Parts .* by evaluation/cut_videos.py. There it needs MVBench/<folder"
    with pytest.raises(RowError, match=parts):
        script.main(options)


def test_what_a_benchmark_left_out_is_printed_once(tmp_path, capsys, monkeypatch):
    row = {"video": "a.mp4", "question": "Which?", "answer": "red"}
    rows = [{**row, "candidates": ["red", "blue"]}, {**row, "candidates": ["red"]}]
    (tmp_path / "state_change.json").write_text(json.dumps(rows))
    assert len(_benchmark_rows(tmp_path / "state_change.json", "mvbench")) == 1
    assert "one candidate" in capsys.readouterr().out
    monkeypatch.setenv("VERIPO_EVALUATION_RANK", "0")  # an engine of a data-parallel run
    _benchmark_rows(tmp_path / "state_change.json", "mvbench")
    assert not capsys.readouterr().out


def test_released_defaults(script, model_paths):
    """Of a model that does not say how it was trained to see."""
    model = str(model_paths["qwen2_5_vl"])
    args = script.parse_arguments(["--model_path", model, "--output_path", "o.json", "--prompt_path", "p.json"])
    expected = {"max_new_tokens": 4096, "temperature": 1e-6, "top_p": 1.0, "repetition_penalty": 1.05,
                "tensor_parallel_size": 1}  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    video = script.make_encoder(args).loader.settings
    expected = {"fps": 2.0, "max_pixels": 200704, "max_frames": 128}
    assert {name: getattr(video, name) for name in expected} == expected
    assert args.engine == ("vllm" if importlib.util.find_spec("vllm") else "transformers")


def test_the_readmes_commands_are_understood(script):
    text = (SCRIPT.parent / "README.md").read_text().replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("python evaluation/evaluation_vllm.py")]
    assert lines
    for line in lines:
        assert script.parse_arguments(line[2:]).prompt_path
    options = set(re.findall(r"`(--\w+)", text))
    scripts = SCRIPT.read_text() + SCRIPT.with_name("calculate_score.py").read_text()
    known = {*re.findall(r'"(--\w+)"', scripts), *(f"--{field.name}" for field in fields(JudgeArguments))}
    assert options <= known and len(options) > 10


@pytest.mark.slow
def test_killed_and_started_again_and_two_writers(script, model_paths, media_root, prompts, tmp_path):
    """Sampled answers, so that a run that drew on from where it stopped would show."""
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    options = {"temperature": 1.0, "max_new_tokens": 48, "seed": 3}
    script.main(command(model_paths, media_root, prompts, whole, **options))
    argv = command(model_paths, media_root, prompts, broken, **options)
    journal = OutputFiles(broken).journal
    process = subprocess.Popen([sys.executable, str(SCRIPT), *argv], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while (journal.read_bytes().count(b"\n") if journal.exists() else 0) < 3:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        with pytest.raises(VeripoError, match=f"process {process.pid} on .* is at work on it"):
            script.main(argv)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    written = journal.read_bytes()
    assert not broken.exists() and 3 <= written.count(b"\n") < 13
    journal.write_bytes(written + b'{"key": "half a li')  # as if it had been killed while writing
    assert script.main(argv) == 0
    assert contents(broken) == contents(whole)
    assert journal.read_bytes().startswith(written)  # nothing was computed twice that had been written
    keys = [json.loads(line).get("key") for line in journal.read_bytes().splitlines()]
    assert len([key for key in keys if key]) == 12


def test_a_half_done_batch_is_computed_whole_again(load, media_root, prompts, tmp_path):
    """What a row is answered depends on its batch, not on where a run was broken off."""
    model, encoder = load()
    questions = read_questions(prompts, video_dir=media_root)
    engine = TransformersEngine(model.eval(), encoder, Decoding(max_new_tokens=6, temperature=1.0, seed=1))
    first = Journal(tmp_path / "a.jsonl", {})
    answer_questions(questions, engine, encoder, first, batch_size=4, num_workers=0)
    assert len(first.lines) == 12
    lines = first.path.read_bytes().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[:7]))  # one batch, and half of the next
    second = Journal(tmp_path / "b.jsonl", {})
    assert len(second.lines) == 6
    asked = []
    complete = engine.complete
    engine.complete = lambda prompts, places, **more: asked.append(places) or complete(prompts, places, **more)
    answer_questions(questions, engine, encoder, second, batch_size=4, num_workers=0)
    assert asked == [[4, 5, 6, 7], [8, 9, 10, 11]] and second.lines == first.lines
    # Several processes, each with every second batch, write one journal.
    third = Journal(tmp_path / "c.jsonl", {})
    for rank in (1, 0):
        own = Journal(tmp_path / "c.jsonl", {}, repair=False)
        answer_questions(questions, engine, encoder, own, batch_size=4, num_workers=0, rank=rank, processes=2)
    third.read()
    assert third.lines == first.lines


def test_bad_rows_are_listed_and_run_again_when_put_right(script, model_paths, media_root, tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("long.mp4", "wide.mp4"):
        (videos / name).write_bytes((media_root / name).read_bytes())
    (videos / "text.mp4").write_text("no video")
    (tmp_path / "secret.mp4").write_bytes((media_root / "long.mp4").read_bytes())
    (videos / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    names = ("long", "text", "wide", "gone", "link", "long", "none", "wide")
    rows = [released(place, f"{name}.mp4") for place, name in enumerate(names)]
    prompts, output = tmp_path / "x.json", tmp_path / "out.json"
    prompts.write_text(json.dumps(rows))
    argv = command(model_paths, videos, prompts, output, batch_size=4)
    assert script.main(argv) == 3
    told = capsys.readouterr().out
    assert "4 rows could not be answered" in told and "row 3, q1" in told and "does not exist" in told
    files = OutputFiles(output)
    record = json.loads(files.record.read_text())
    errors = [row for row in record["rows"] if "error" in row]
    assert [error["position"] for error in errors] == [1, 3, 4, 6]
    for error, reason in zip(errors, ("text.mp4", "gone.mp4", "media_root", "none.mp4"), strict=True):
        assert reason in error["error"]
    results = json.loads(output.read_text())
    assert [bool(item["model_output"]) for item in results] == [place not in (1, 3, 4, 6) for place in range(8)]
    assert record["errors"] == 4

    (videos / "gone.mp4").write_bytes((media_root / "fast.mp4").read_bytes())
    assert script.main(argv) == 3  # the other three are still bad
    again = json.loads(output.read_text())
    assert again[3]["model_output"] and [a for i, a in enumerate(again) if i != 3] == [
        a for i, a in enumerate(results) if i != 3
    ]
    again = json.loads(files.record.read_text())["rows"]
    assert [row["position"] for row in again if "error" in row] == [1, 4, 6]


def test_a_journal_of_other_settings_is_refused(script, model_paths, media_root, prompts, tmp_path):
    output = tmp_path / "out.json"
    files = OutputFiles(output)
    Journal(files.journal, {"a setting": "with which nothing was answered, as an engine did not start"})
    script.main(command(model_paths, media_root, prompts, output, limit=2, num_workers=0))
    before = contents(output)
    for change, told in [({"video_fps": 4}, "video"), ({"seed": 5}, "decoding"), ({"limit": 3}, "rows_sha256"),
                         ({"max_image_pixels": 9999}, "max_image_pixels"),
                         ({"attn_implementation": "eager"}, "attn_implementation")]:  # fmt: skip
        with pytest.raises(JournalError, match=f"other settings or rows.*{told}.*remove the journal"):
            script.main(command(model_paths, media_root, prompts, output, **{"limit": 2, "num_workers": 0, **change}))
    assert contents(output) == before
    files.journal.write_text('{"something": "else"}\n')
    with pytest.raises(JournalError, match="not a journal"):
        Journal(files.journal, {})
    with pytest.raises(ConfigError, match="ends in .json"):
        OutputFiles("out.txt")


def test_the_questions_are_not_overwritten(script, model_paths, media_root, prompts):
    before = prompts.read_bytes()
    for output in (prompts, prompts.parent / "." / prompts.name):
        with pytest.raises(ConfigError, match="expected an output apart from what is read"):
            script.main(command(model_paths, media_root, prompts, output, limit=1))
    assert prompts.read_bytes() == before


def test_the_output_may_lie_in_the_models_folder(script, model_paths, media_root, tmp_path):
    """The same command goes on; with a file of the model's changed, it does not."""
    model = tmp_path / "model"
    shutil.copytree(model_paths["qwen2_5_vl"], model)
    (tmp_path / "vsi.json").write_text(json.dumps([released(0), released(1, "gone.mp4")]))
    argv = command({"qwen2_5_vl": model}, media_root, tmp_path / "vsi.json", model / "vsi.json", num_workers=0)
    assert script.main(argv) == 3
    assert script.main(argv) == 3
    (template,) = model.glob("chat_template*")
    template.write_text(template.read_text() + " ")
    with pytest.raises(JournalError, match="other settings or rows.*model_revision"):
        script.main(argv)


def test_commits_of_the_hub_are_recorded_and_compared(
    script, model_paths, media_root, prompts, tmp_path, monkeypatch, adapter
):
    """A model, an adapter and its base, each from a Hub whose main branch moves on."""
    def files(folder, **changes):
        return {**{file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}, **changes}

    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "tester/tiny"}
    with HubServer() as hub:
        hub.use_in_this_process(monkeypatch, tmp_path / "hf_home")
        model, lora = hub.repos["models/tester/tiny"], hub.repos["models/tester/lora"] = Repo(False), Repo(False)
        first = model.add("main", "first", files(model_paths["qwen2_5_vl"]))
        second = model.add("main", "second", files(model_paths["qwen2_5_vl"], **{"other.txt": b"moved on"}))
        tuned = lora.add("main", "first", files(adapter, **{"adapter_config.json": json.dumps(config).encode()}))

        def run(name, **options):
            options = {"limit": 1, "max_new_tokens": 2, "num_workers": 0, **options}
            script.main(command(model_paths, media_root, prompts, tmp_path / name, **options))
            return json.loads(OutputFiles(tmp_path / name).record.read_text())["settings"]

        assert run("a.json", model_path="tester/tiny", model_revision=first)["model_revision"] == first
        with pytest.raises(JournalError, match=f"model_revision: .{first}. → .{second}."):
            run("a.json", model_path="tester/tiny")
        assert run("b.json", model_path="tester/tiny", model_revision="main")["model_revision"] == second
        alone = run("d.json", model_path="tester/lora")
        assert (alone["model_revision"], alone["base"], alone["base_revision"]) == (tuned, "tester/tiny", second)
        model.add("main", "third", files(model_paths["qwen2_5_vl"]))
        with pytest.raises(JournalError, match="base_revision"):
            run("d.json", model_path="tester/lora")
        with pytest.raises(VeripoError, match="tester/none.*no such repository"):
            run("e.json", model_path="tester/none")


# options of the command line, and what is said about them before anything is loaded
BAD = [
    ({"temperature": -1}, "temperature >= 0"), ({"temperature": "nan"}, "temperature >= 0"),
    ({"top_p": 0}, "0 < top_p"),
    ({"batch_size": 0}, "--batch_size: expected 1"), ({"num_workers": -1}, "--num_workers 0 or more"),
    ({"decode_timeout_s": 0}, "--decode_timeout_s above 0"), ({"max_new_tokens": 0}, "max_new_tokens >= 1"),
    ({"gpu_memory_utilization": 90}, "above 0 and at most 1"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "told"), BAD)
def test_bad_options_are_said_at_once(change, told, script, model_paths, media_root, prompts, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        script.parse_arguments(command(model_paths, media_root, prompts, tmp_path / "out.json", **change))
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_few_pixels_alone_are_enough(script, model_paths, media_root, prompts, tmp_path):
    argv = command(model_paths, media_root, prompts, tmp_path / "out.json")
    least = argv.index("--video_min_pixels")
    del argv[least : least + 2]
    settings = script.make_encoder(script.parse_arguments(argv)).loader.settings
    assert settings.min_pixels == settings.max_pixels == 112 * 56


def test_what_cannot_be_loaded_is_refused(script, model_paths, media_root, prompts, tmp_path):
    changes = [
        ({"model_path": tmp_path / "none"}, "no such folder"),
        ({"model_path": tmp_path}, "config.json"),
        ({"attn_implementation": "quick"}, "quick"),
        ({"video_fps": 0}, "fps must be above 0"),
        ({"video_max_frames": 1}, "min_frames <= max_frames"),
        ({"video_max_pixels": 100}, "size_factor"),
    ]
    for change, told in changes:
        with pytest.raises(ConfigError, match=told):
            script.main(command(model_paths, media_root, prompts, tmp_path / "out.json", **change))
    argv = command(model_paths, media_root, prompts, tmp_path / "out.json", model_path=tmp_path / "none")
    ended = subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("ConfigError: ") and "Traceback" not in ended.stderr


def test_a_prompt_without_room_for_its_completion_costs_its_row(load, media_root, prompts, tmp_path):
    model, encoder = load()
    questions = read_questions(prompts, video_dir=media_root, limit=3)
    lengths = [len(encoder.encode(question["row"])) for question in questions]
    assert lengths[0] > max(lengths[1:])
    encoder.config.get_text_config().max_position_embeddings = max(lengths[1:]) + 6
    engine = TransformersEngine(model.eval(), encoder, Decoding(max_new_tokens=6))
    journal = Journal(tmp_path / "a.jsonl", {})
    answer_questions(questions, engine, encoder, journal, batch_size=3, num_workers=0)
    assert sorted(journal.lines[key]["position"] for key in answered(journal)) == [1, 2]
    (error,) = [line for line in journal.lines.values() if "error" in line]
    assert error["position"] == 0 and f"has {lengths[0]} tokens; with 6 new ones" in error["error"]


def test_vllm_is_told_of_the_rows_and_of_the_commit(
    script, load, model_paths, media_root, prompts, tmp_path, monkeypatch
):
    from veripo_trl.vllm import evaluation as vllm_engine

    monkeypatch.setattr(vllm_engine, "VLLMEngine", lambda **given: given)
    args = script.parse_arguments(command(model_paths, media_root, prompts, tmp_path / "out.json"))
    args.model_revision = "c" * 40
    questions = read_questions(prompts, video_dir=media_root)
    given = script.make_vllm_engine(args, load()[1], questions, tmp_path / "none")
    assert given["rows"] == [question["row"] for question in questions]
    assert given["model_path"] == str(model_paths["qwen2_5_vl"]) and given["revision"] == "c" * 40


def test_unfinished_journals_give_no_output(prompts, media_root, tmp_path):
    questions = read_questions(prompts, video_dir=media_root)
    journal = Journal(tmp_path / "a.jsonl", {})
    with pytest.raises(JournalError, match="12 rows are not answered yet"):
        write_outputs(OutputFiles(tmp_path / "a.json"), questions, journal, {})
    assert not (tmp_path / "a.json").exists()


def test_a_wrong_video_dir_is_said_before_the_model_loads(script, model_paths, prompts, tmp_path):
    with pytest.raises(script.RowError, match="None of the 3 videos"):
        script.main(command(model_paths, tmp_path, prompts, tmp_path / "out.json"))
    with pytest.raises(script.RowError, match="no such folder"):
        script.main(command(model_paths, tmp_path / "no", prompts, tmp_path / "out.json"))


def test_an_engine_that_outlives_a_killed_run_keeps_the_next_one_from_starting(
    script, model_paths, media_root, prompts, tmp_path, monkeypatch
):
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with only_process(tmp_path / "out.json.engine1"):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
            os._exit(0)
    os.read(ready[0], 1)
    argv = command(model_paths, media_root, prompts, tmp_path / "out.json")
    monkeypatch.setenv(script.RANK, "1")
    try:
        with pytest.raises(VeripoError, match=f"out.json.engine1: process {child} on .* is at work"):
            script.main(argv)
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)


def test_weights_that_a_killed_run_left_are_removed(script, model_paths, media_root, prompts, tmp_path):
    left = OutputFiles(tmp_path / "out.json").merged / "0" / "model.safetensors"
    left.parent.mkdir(parents=True)
    left.write_text("15 GB")
    with pytest.raises(ConfigError):
        script.main(command(model_paths, media_root, prompts, tmp_path / "out.json", model_path=tmp_path / "none"))
    assert not left.parent.parent.exists()


# cores, batch size, most rows under way
@pytest.mark.parametrize(("cores", "batch_size", "most"), [(64, 8, 16), (64, 1, 2), (4, 64, 128), (3, 8, 18), (1, 1, 2)])
def test_host_memory_is_bounded(cores, batch_size, most, load, monkeypatch):
    """About two batches are under way, however many cores there are."""
    _, encoder = load()
    made = []

    def loader(rows, **options):
        made.append(options["num_workers"] * options["prefetch_factor"])
        return []

    monkeypatch.setattr(evaluate, "DataLoader", loader)
    batches = [list(range(start, start + batch_size)) for start in range(0, 10 * batch_size, batch_size)]
    assert list(encoded_batches(encoder, None, batches, num_workers=cores)) == []
    assert made == [most]


def test_batches_are_encoded_ahead_whole_and_by_place(load, media_root, mixed_rows):
    """Rows of one id are different rows; slow ones hold up their own batch only."""
    _, encoder = load()
    rows = [{**row, "question_id": "same"} for row in mixed_rows]
    batches = [[0, 1], [2, 3], [4]]
    expected = [encoder.encode(row) for row in rows]
    for workers in (0, 2):
        found = encoded_batches(encoder, rows, batches, num_workers=workers)
        found = {tuple(indices): prompts for indices, prompts in found}
        assert sorted(found) == [(0, 1), (2, 3), (4,)]
        for places, prompts in found.items():
            for place, prompt in zip(places, prompts, strict=True):
                assert np.array_equal(prompt.input_ids, expected[place].input_ids)


@pytest.fixture(scope="module")
def adapter(model_paths, tmp_path_factory):
    """The folder of an adapter that changes what the model writes."""
    from peft import LoraConfig

    from veripo_trl.model.policy import LANGUAGE_MODEL_LINEAR, load_policy

    folder = tmp_path_factory.mktemp("adapter")
    lora = LoraConfig(r=4, target_modules=LANGUAGE_MODEL_LINEAR, init_lora_weights=False)
    model, _ = load_policy(str(model_paths["qwen2_5_vl"]), lora=lora)
    model.save_pretrained(folder)
    return folder


def test_an_adapter(script, model_paths, media_root, prompts, tmp_path, adapter):
    texts = []
    for model in (model_paths["qwen2_5_vl"], adapter):
        output = tmp_path / f"{Path(model).name}.json"
        options = {"limit": 4, "num_workers": 0, "model_path": model}
        script.main(command(model_paths, media_root, prompts, output, **options))
        texts.append([item["model_output"] for item in json.loads(output.read_text())])
    assert texts[0] != texts[1]


@pytest.mark.slow
def test_engines_beside_each_other(script, model_paths, media_root, prompts, tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    script.main(command(model_paths, media_root, prompts, one, num_workers=0))
    assert script.main(command(model_paths, media_root, prompts, two, num_workers=0, data_parallel_size=2)) == 0
    assert contents(two)["output"] == contents(one)["output"]


# ---------------------------------------------------------------------------------------------- faithful to training


class Seen:
    """What a model's forwards are given, ids and positions, and the pixels that its vision tower is given."""

    def __init__(self, model):
        self.forwards, self.pixels = [], set()
        self.handles = [
            model.register_forward_pre_hook(self.take, with_kwargs=True),
            model.model.visual.register_forward_pre_hook(self.take_pixels),
        ]

    def take(self, model, args, inputs):
        ids = inputs["input_ids"] if "input_ids" in inputs else args[0]
        positions = inputs["position_ids"].detach().clone()
        self.forwards.append({"ids": ids.detach().clone(), "positions": positions, "grad": torch.is_grad_enabled()})

    def take_pixels(self, tower, args):
        self.pixels.add(hashlib.sha256(args[0].detach().numpy().tobytes()).hexdigest())

    def prompt(self, count: int) -> tuple:
        """(ids, positions, pixels) of the `count` tokens of a prompt in a generation: all but one, then the last."""
        first, last = self.forwards[:2]
        assert first["ids"].size(1) == count - 1
        ids = torch.cat([first["ids"][0], last["ids"][0, -1:]]).tolist()
        positions = torch.cat([first["positions"][:, 0], last["positions"][-3:, 0, -1:]], 1).tolist()
        return ids, positions, self.pixels


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_evaluation_chat_rollout_and_update_see_the_same(kind, load, model_paths, media_root, tmp_path):
    """One row through the real entry points: token ids, M-RoPE positions and pixels at the model's door are equal."""
    from test_grpo_parity import make_trainer

    from veripo_trl.chat import Chat

    row = make_row("video", media_root, videos=["long.mp4"])
    model, encoder = load(kind)
    reference = encoder.encode(row)
    expected = (reference.input_ids.tolist(), reference.positions.tolist())

    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{key: value for key, value in row.items() if key != "media_root"}]))
    questions = read_questions(file, video_dir=media_root)
    seen = Seen(model)
    engine = TransformersEngine(model.eval(), encoder, Decoding(max_new_tokens=2))
    answer_questions(questions, engine, encoder, Journal(tmp_path / "j.jsonl", {}), batch_size=1, num_workers=0)
    pixels = {hashlib.sha256(reference.pixel_values_videos.numpy().tobytes()).hexdigest()}
    assert seen.prompt(len(reference)) == (*expected, pixels)
    for handle in seen.handles:
        handle.remove()

    settings = {"prompt_template": "tiny", "fps": 2.0, "min_frames": 2, "max_frames": 24, "min_pixels": 56 * 56}
    chat = Chat(str(model_paths[kind]), device="cpu", max_pixels=112 * 56, **settings)
    seen = Seen(chat.model)
    chat.ask(row["problem"], videos=[media_root / "long.mp4"], options=row["options"], decoding={"max_new_tokens": 2})
    assert seen.prompt(len(reference)) == (*expected, pixels)

    trainer = make_trainer(
        model, encoder, [row], tmp_path, max_completion_length=2, beta=0.0, shared_prefix=False
    )
    model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    seen = Seen(model)
    inputs = trainer._generate_and_score_completions(batch)
    assert seen.prompt(len(reference)) == (*expected, pixels)
    seen.forwards.clear()
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(model, inputs)
    (update,) = [forward for forward in seen.forwards if forward["grad"]]
    count = len(reference)
    for place in range(2):  # the group's rows
        assert update["ids"][place, :count].tolist() == expected[0]
        assert update["positions"][-3:, place, :count].tolist() == expected[1]
    assert seen.pixels == pixels  # no others; a frozen tower's features may have been kept


def test_rows_with_equal_ids_get_their_own_answers(load, media_root):
    from veripo_trl.evaluate.generate import generate

    model, encoder = load()
    rows = [make_row("same", media_root, videos=["long.mp4"]), make_row("same", media_root, videos=["wide.mp4"])]
    apart = [generate(model, encoder, rows_to_dataset([row]), max_new_tokens=6)[0]["completion"] for row in rows]
    together = [answer["completion"] for answer in generate(model, encoder, rows_to_dataset(rows), max_new_tokens=6)]
    assert together == apart and apart[0] != apart[1]
