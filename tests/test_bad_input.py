"""Bad input to the shipped GRPO recipe: one clear error with row, file and remedy, and nothing lost."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_script, make_row, write_video
from torch.utils.data import DataLoader

from veripo_trl.answers.score import SolutionError
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.data.schema import COLUMNS, RowError
from veripo_trl.errors import ConfigError
from veripo_trl.files.run_folder import RESULTS
from veripo_trl.media.video import VideoError
from veripo_trl.model.encoding import PromptTooLongError

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "grpo_video.py"
ROLLOUT = {"rollout_id": "old", "question_id": "q", "step": 0, "rewards": {"accuracy_reward": 1.0}}


@pytest.fixture(scope="module")
def recipe():
    return load_script("recipes/grpo_video.py")


def truncated(path):
    write_video(path, frames=6, height=56, width=56)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def link_out(path):
    write_video(path.parent.parent / "secret.mp4", frames=4, height=56, width=56)
    path.symlink_to(path.parent.parent / "secret.mp4")


# what makes the file; what came and what to do
FILES = {
    "missing.mp4": (lambda path: None, "does not exist", "Put the file there"),
    "empty.mp4": (lambda path: path.touch(), "is empty", "Fetch it again"),
    "link.mp4": (link_out, "link.mp4 -> .*secret.mp4", "replace the symbolic link"),
}
# changes to the row "bad"; what came and what to do
ROWS = {
    "path that leaves the root": ({"videos": ["../secret.mp4"]}, r"'\.\./secret.mp4'", "Choose a media_root"),
    "absolute path": ({"videos": ["/etc/passwd"]}, "'/etc/passwd'", "Choose a media_root"),
    "URL": ({"videos": ["https://example.org/bad.mp4"]}, "the URL 'https://example.org/bad.mp4'", "allow_urls"),
    "unknown problem type": ({"problem_type": "riddle"}, "'riddle'", "leave the rows out"),
    "empty solution": ({"solution": ""}, "solution: .*''", "remove the row"),
    "no option of that letter": ({"solution": "E"}, "'E'", "Correct the solution, its options"),
    "duplicate id": ({"question_id": "good"}, "the id of .*rows.jsonl row 1", "Make the ids unique"),
}


class Run:
    """A folder with media, rows, a recipe's YAML, and what an earlier, unfinished run of that name has written."""

    def __init__(self, folder, model):
        self.folder, self.model = folder, model
        self.media, self.output = folder / "media", folder / "run"
        self.media.mkdir()
        write_video(self.media / "good.mp4", frames=6, height=56, width=56)
        self.store = RolloutStore(self.output / "rollouts")
        self.store.write([ROLLOUT], step=0, part=0, rank=0, reward_names=["accuracy_reward"])
        (self.output / "before.json").write_text("{}")

    def start(self, recipe, rows, *, workers=0, **changes):
        data = self.folder / "rows.jsonl"
        kept = [column for column in COLUMNS if column != "media_root"]
        data.write_text("".join(json.dumps({column: row[column] for column in kept}) + "\n" for row in rows))
        settings = {
            "model_name_or_path": str(self.model), "output_dir": str(self.output),
            "datasets": [{"path": str(data), "media_root": str(self.media)}],
            "prompt_template": "tiny", "max_frames": 8, "min_pixels": 3136, "max_pixels": 3136,
            "num_generations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
            "max_completion_length": 4, "max_steps": 5, "learning_rate": 1e-4, "gradient_checkpointing": False,
            "dtype": "float32", "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no",
            "dataloader_num_workers": workers, "disable_tqdm": True,
        }  # fmt: skip
        self.config = self.folder / "grpo.yaml"
        self.config.write_text(json.dumps(settings | changes))  # JSON is YAML
        recipe.main(["--config", str(self.config), "--max_steps", "1"])

    def good_row(self):
        return make_row("good", self.media, videos=["good.mp4"])

    def bad_row(self, **changes):
        return make_row("bad", self.media, videos=["bad.mp4"], **changes)

    def written(self):
        """Content of every file under the run's folder, or where it was moved aside to."""
        return sorted(p.read_bytes() for p in self.folder.glob("run*/**/*") if p.is_file())

    def assert_nothing_ran(self, before):
        """No rollout beside the old one, and everything that was there is there still."""
        left = self.written()
        assert all(content in left for content in before)
        rollouts = [file for file in self.folder.glob("run*/**/*.parquet")]
        assert len(rollouts) == 1 and not list(self.folder.glob("run*/**/*.safetensors"))


@pytest.fixture
def run(tmp_path, model_paths):
    return Run(tmp_path, model_paths["qwen2_5_vl"])


@pytest.fixture
def no_model(monkeypatch, recipe):
    """Loading a model fails the test: the error has to come before."""

    def loaded(*args, **kwargs):
        pytest.fail("the model was loaded before the rows were refused")

    monkeypatch.setattr(recipe, "make_policy", loaded)


def assert_clear(error, *parts):
    """One message that says it all: row, file, what came, what to do."""
    for part in parts:
        assert re.search(part, str(error), re.DOTALL), f"{part!r} is not in: {error}"


def test_files_that_a_look_refuses(run, recipe, no_model):
    for name, (write, *_) in FILES.items():
        write(run.media / name)
    before = run.written()
    with pytest.raises(RowError, match="3 rows") as caught:
        run.start(recipe, [run.good_row(), *(make_row(name, run.media, videos=[name]) for name in FILES)])
    said = {name: line for line in str(caught.value).splitlines() for name in FILES if f"'{name}'" in line}
    for name, (_, came, remedy) in FILES.items():
        assert_clear(said[name], came, remedy)
    run.assert_nothing_ran(before)


def test_rows_that_reading_refuses(run, recipe, no_model):
    before = run.written()
    rows = [{**make_row(name, run.media, videos=["good.mp4"]), **changes} for name, (changes, *_) in ROWS.items()]
    with pytest.raises(RowError, match=f"{len(ROWS)} rows") as caught:
        run.start(recipe, [run.good_row(), *rows])
    said = str(caught.value).splitlines()[1:]
    for number, (line, row, (_, came, remedy)) in enumerate(zip(said, rows, ROWS.values(), strict=True), 2):
        assert_clear(line, f"rows.jsonl row {number}, question_id '{row['question_id']}'", came, remedy)
    run.assert_nothing_ran(before)


@pytest.mark.parametrize(
    ("start", "options", "message"),
    [
        ([sys.executable, str(RECIPE.with_stem("sft_video"))], ["--use_cpu", "true", "--prompt_template", "tiny"],
         "RowError: 1 row .*, question_id 'bad'"),
        ([sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", str(RECIPE)],
         ["--num_generations", "7"], r"ConfigError: generation_batch_size \(\d+\) must be divisible"),
    ],
)  # fmt: skip
def test_a_command_ends_in_the_message(start, options, message, run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {key: value for key, value in run.bad_row(solution="").items() if key != "media_root"}
    rows.write_text(json.dumps(row) + "\n")
    command = [*start, "--output_dir", str(tmp_path / "run"), *options, "--datasets"]
    command.append(json.dumps({"path": str(rows), "media_root": str(run.media)}))
    if start[-1] != str(RECIPE):  # with a model, so that no tiny world is made first
        command += ["--model_name_or_path", str(run.model)]
    env = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    lines = found.stderr.splitlines()
    # without what is asked for above, and without progress bars
    shown = [line for line in lines if not line.startswith("import time:") and "%|" not in line]
    said = "\n".join(shown)
    assert found.returncode == 1 and "Traceback" not in said and "kernels-community" not in said
    assert re.findall(message, said, re.S) and len(shown) < 12, said
    modules = {line.rpartition("|")[2].strip() for line in lines}
    # Only quantization uses it; for GRPO, TRL's own trainer imports it.
    assert "bitsandbytes.nn" not in modules or start[-1] == str(RECIPE)


def test_a_held_out_row_is_refused_as_early(run, recipe, no_model):
    heldout = run.folder / "heldout.jsonl"
    row = {key: value for key, value in run.bad_row().items() if key != "media_root"}
    heldout.write_text(json.dumps(row) + "\n")
    before = run.written()
    with pytest.raises(RowError) as caught:
        run.start(recipe, [run.good_row()], eval_datasets=[{"path": str(heldout), "media_root": str(run.media)}])
    assert_clear(caught.value, "'bad'", "bad.mp4", "does not exist")
    run.assert_nothing_ran(before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_decoding_refuses(workers, run, recipe):
    truncated(run.media / "bad.mp4")
    before = run.written()
    with pytest.raises(VideoError) as caught:
        run.start(recipe, [run.good_row(), run.bad_row()], workers=workers)
    assert_clear(caught.value, "row 'bad'", "bad.mp4", "truncated mp4", "copy or download it again")
    run.assert_nothing_ran(before)


def test_a_prompt_over_the_limit(run, recipe):
    write_video(run.media / "bad.mp4", frames=8, height=56, width=56)
    before = run.written()
    with pytest.raises(PromptTooLongError) as caught:
        run.start(recipe, [run.good_row(), run.bad_row(problem="Which? " * 90)], max_prompt_tokens=70)
    assert_clear(caught.value, "Row 'bad'", "bad.mp4", r"has \d+ tokens", "max_prompt_tokens=70", "Raise the limit")
    run.assert_nothing_ran(before)


def test_a_finished_run_outlives_a_run_that_fails(run, recipe):
    """Its folder is moved aside, whole."""
    truncated(run.media / "bad.mp4")
    (run.output / RESULTS).write_text('{"steps": 1}')
    before = run.written()
    with pytest.raises(VideoError):
        run.start(recipe, [run.good_row(), run.bad_row()])
    run.assert_nothing_ran(before)
    assert (run.folder / "run.previous-1" / RESULTS).is_file()


@pytest.mark.parametrize(
    "key, close", [("max_frame", "max_frames"), ("num_generation", "num_generations"), ("datasetz", "datasets")]
)
def test_a_mistyped_key(key, close, run, recipe, no_model):
    before = run.written()
    with pytest.raises(ConfigError) as caught:
        run.start(recipe, [run.good_row()], **{key: 2})
    assert_clear(caught.value, str(run.config), f"unknown key '{key}' .close: .*{close}", "Correct or remove")
    run.assert_nothing_ran(before)


# setting: what is said of it
MISTAKES = {
    "no such folder": ({"model_name_or_path": "./nowhere"}, "'./nowhere': no such folder"),
    "group size": ({"num_generations": 3}, r"\(4\) must be divisible by num_generations \(3\)"),
    "dtype": ({"dtype": "float99"}, "dtype: expected one of auto, .*; got 'float99'"),
    "not a number": ({"learning_rate": "fast"}, "--learning_rate.*'fast'"),
    "nan": ({"beta": float("nan")}, "beta: expected a number; got nan"),
    "half a JSON": ({"datasets": ['{"path']}, "datasets: expected entries like .*, as JSON; got "),
    "a null": ({"datasets": [None]}, r"datasets: expected entries like .* got \[None\]: an entry is no mapping"),
    "rewards": ({"reward_weights": [1.0]}, r"weights \(1\) must match number of reward functions \(2\)"),
    "frames": ({"fps": -1.0}, "fps must be above 0"),
    "decoder": ({"video_backend": "none"}, "must be 'decord' or 'pyav', got 'none'"),
    "LoRA": ({"use_peft": True, "lora_target_modules": ["none"]}, "Target modules none not found"),
    "quantized": ({"load_in_4bit": True}, "without an adapter.*Set use_peft: true"),
    "no chat template": ({}, "no chat template: expected an instruction-tuned"),
    "output": ({"output_dir": "/proc/none"}, "/proc/none"),
    "checkpoint": ({"resume_from_checkpoint": "runs/a"}, "expected none, came 'runs/a'. .* as model_name_or_path"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_setting_that_cannot_be_used(name, run, recipe, tmp_path):
    settings, message = MISTAKES[name]
    if name == "no chat template":
        shutil.copytree(run.model, tmp_path / "model", ignore=shutil.ignore_patterns("*.jinja"))
        run.model = tmp_path / "model"
    before = run.written()
    with pytest.raises(ConfigError) as caught:
        run.start(recipe, [run.good_row()], **settings)
    assert_clear(caught.value, message)
    run.assert_nothing_ran(before)


def test_a_mistake_on_the_command_line_is_told_without_the_usage(run, recipe, no_model):
    with pytest.raises(ConfigError, match="--dtype: invalid choice: 'float99'") as caught:
        recipe.main(["--config", "tiny/grpo.yaml", "--dtype", "float99"])
    assert len(str(caught.value).splitlines()) == 1


def test_good_rows_train(run, recipe):
    """What the others refuse is their input: as it is here, a step is made and its rollouts are written, which others
    can read."""
    write_video(run.media / "bad.mp4", frames=6, height=56, width=56, seed=1)
    run.start(recipe, [run.good_row(), run.bad_row()], workers=1)
    assert {rollout["question_id"] for rollout in run.store.read()} == {"good", "bad"}
    assert len({file.stat().st_mode for file in run.output.glob("**/*") if file.is_file()}) == 1
    assert len(run.store.read()) == 4
    aside = RolloutStore(run.output / "rollouts" / "set_aside" / "001")  # the old run's, which had no checkpoint
    assert [rollout["rollout_id"] for rollout in aside.read()] == ["old"]


class Raising:
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize(
    "kind",
    [VideoError, RowError, PromptTooLongError, SolutionError],
    ids=lambda k: k.__name__,
)
def test_errors_arrive_from_a_loader_worker_as_they_are(kind):
    """torch makes the error again from its type and one text; pickle takes it through a pipe."""
    error = kind("row 'bad', video 'bad.mp4': is bad;\nleave it out")
    with pytest.raises(kind) as caught:
        list(DataLoader(Raising(error), num_workers=1))
    assert type(caught.value) is kind and str(caught.value) == str(error)  # without the worker's traceback
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
