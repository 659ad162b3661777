"""Runs recipes/grpo_video.py in this process, as `torchrun` starts it, with fixed completions and a record of reads.

    python tests_engines/two_process_driver.py SCENARIOS.json

SCENARIOS.json is a list of {name, argv, log, and optionally completions, break_at, terminate_at,
make_world, folders: the working directory of each process, which then has to be refused}. They run
one after the other, so that their processes pay for their imports once. Used by test_two_processes.py only.
"""

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from veripo_trl.errors import ConfigError
from veripo_trl.media.video import VideoLoader
from veripo_trl.recipe import prepare
from veripo_trl.tiny import world
from veripo_trl.trainers.grpo import VideoGRPOTrainer

RANK = int(os.environ.get("RANK", "0"))
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "grpo_video.py"
WAIT_S = 60.0


def load_recipe():
    spec = importlib.util.spec_from_file_location("grpo_video", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    sys.modules["grpo_video"] = recipe  # TrlParser resolves the dataclasses' annotations there
    spec.loader.exec_module(recipe)
    return recipe


class Record:
    """Lines of JSON in one file, from every process and from the loaders' workers, which inherit it by fork."""

    def __init__(self, path: str):
        self.path = path
        self.reader = "training"  # or "guard", while the start-up checks read in the main process

    def add(self, kind: str, **fields) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"kind": kind, "rank": RANK, **fields}) + "\n")


def record_reads(record: Record) -> None:
    load, check = VideoLoader.load, VideoGRPOTrainer._check_first_rows

    def recording_load(self, path, **kwargs):
        record.add("read", video=os.path.basename(path), reader=record.reader)
        return load(self, path, **kwargs)

    def recording_check(self):
        accelerator = self.accelerator
        rows = [file["filename"] for file in self.train_dataset.cache_files]  # mapped ones
        record.add("world", size=accelerator.num_processes, index=accelerator.process_index, rows=rows)
        record.reader = "guard"
        check(self)
        record.reader = "training"

    VideoLoader.load = recording_load
    VideoGRPOTrainer._check_first_rows = recording_check


def fix_completions(completions: dict[str, list[str]]) -> None:
    """Give the n-th row of a group its question's n-th completion, counted over all processes; extra rollouts, which
    come behind a process's rows, those that the first rows have."""

    def fixed(self, prompt_ids, *args, **kwargs):
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation
        first = self.accelerator.process_index * rows
        ids = []
        for place, prompt in enumerate(self._active):
            number = first + place if place < rows else place - rows
            text = completions[prompt.question_id][number % self.num_generations]
            ids.append([*self._tokenizer(text)["input_ids"], self._tokenizer.eos_token_id])
        return ids, None

    VideoGRPOTrainer._generate_single_turn = fixed


def break_off(step: int) -> None:
    """Rank 1 dies at `step`, when every process has written the step's rollouts."""
    store = VideoGRPOTrainer._store_rollouts

    def store_and_die(self, rows, advantages):
        store(self, rows, advantages)
        if self.state.global_step == step and RANK == 1:
            deadline = time.monotonic() + WAIT_S
            pattern = f"*step{step:07d}*.parquet"
            while len(list(self.rollout_store.folder.glob(pattern))) < self.accelerator.num_processes:
                if time.monotonic() > deadline:
                    raise TimeoutError("The other process wrote no rollouts.")
                time.sleep(0.05)
            os._exit(9)

    VideoGRPOTrainer._store_rollouts = store_and_die


def terminate(step: int) -> None:
    """SIGTERM comes to rank 1 alone, in `step`."""
    store = VideoGRPOTrainer._store_rollouts

    def store_and_signal(self, rows, advantages):
        store(self, rows, advantages)
        if self.state.global_step == step and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    VideoGRPOTrainer._store_rollouts = store_and_signal


def make_world_slowly(record: Record, rows: str):
    """Stands in for the embedded world: `rl.jsonl` only, so slow to make that who does not wait misses it."""

    def make(folder, questions=None):
        record.add("world begins", exists=Path(folder).exists())
        if not Path(folder).exists():
            time.sleep(1)
            Path(folder).mkdir()
            shutil.copy(rows, Path(folder) / "rl.jsonl")
        record.add("world ends")

    return make


def refusal(recipe, scenario: dict) -> str:
    """What a run is refused with, that starts in another folder in each process."""
    before, prepare.SHARED_WAIT_S = os.getcwd(), 1
    os.chdir(scenario["folders"][RANK])
    try:
        recipe.main(scenario["argv"])
    except ConfigError as error:
        return f"refused: {error}"
    finally:
        os.chdir(before)
    return "not refused"


def say(line: str) -> None:
    """In one write: unbuffered, `print` writes a line's end apart, and another process's line may come between."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    recipe = load_recipe()
    kept = {
        (owner, name): getattr(owner, name)
        for owner, name in (
            (VideoLoader, "load"),
            (VideoGRPOTrainer, "_check_first_rows"),
            (VideoGRPOTrainer, "_generate_single_turn"),
            (VideoGRPOTrainer, "_store_rollouts"),
            (world, "make_world"),
        )
    }
    for scenario in json.loads(Path(sys.argv[1]).read_text()):
        for (owner, name), value in kept.items():
            setattr(owner, name, value)
        record = Record(scenario["log"])
        record_reads(record)
        if "completions" in scenario:
            fix_completions(scenario["completions"])
        if "break_at" in scenario:
            break_off(scenario["break_at"])
        if "terminate_at" in scenario:
            terminate(scenario["terminate_at"])
        if "make_world" in scenario:
            world.make_world = make_world_slowly(record, scenario["make_world"])
        started = time.monotonic()
        if "folders" in scenario:
            say(f"scenario {scenario['name']} rank {RANK}: {refusal(recipe, scenario)}")
            continue
        code = recipe.main(scenario["argv"])
        took_s = time.monotonic() - started
        say(f"scenario {scenario['name']} rank {RANK}, exit code {code}: {took_s:.1f} s")


if __name__ == "__main__":
    main()
