"""Does tIoU as a reward teach time? GRPO from a cold start on the tiny world, and the same with
shuffled rewards.

    python evaluation/studies/grounding.py --seeds 0 1 2

For each seed: the cold start of `grounding/tiny_sft.yaml`; from it GRPO as in `grounding/tiny.yaml`,
and two controls: GRPO with rewards dealt out at random within groups, and GRPO with the reward for
the format alone. The floor is the one span that, given as the answer to every question, has the
best mean tIoU on the training rows. A finished run under the output folder is not repeated.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from veripo_trl.answers.score import score_answer
from veripo_trl.errors import run
from veripo_trl.evaluate.generate import bootstrap_interval
from veripo_trl.files import tables
from veripo_trl.files.run_folder import RESULTS
from veripo_trl.tiny.clips import FPS, NUM_FRAMES
from veripo_trl.tiny.world import make_world

ROOT = Path(__file__).resolve().parents[2]
WORLD = "outputs/tiny_when"


def stage(script: str, folder: Path, *options: str) -> dict:
    """The results of a run, which is made unless it is finished."""
    if not (folder / RESULTS).exists():
        command = [sys.executable, str(ROOT / script), "--output_dir", str(folder), *options]
        print("$", " ".join(command), flush=True)
        path = filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}  # for controls.py
        subprocess.run(command, check=True, env=environment)
    return json.loads((folder / RESULTS).read_text(encoding="utf-8"))


def table_row(seed: int | None, policy: str, summary: dict) -> dict:
    sampled, greedy = summary["sampled"], summary["greedy"]
    return {
        "seed": seed,
        "policy": policy,
        "sampled mIoU": sampled["accuracy"],
        "95%": f"{sampled['accuracy_low']:.3f}–{sampled['accuracy_high']:.3f}",
        "greedy mIoU": greedy["accuracy"],
        "95% ": f"{greedy['accuracy_low']:.3f}–{greedy['accuracy_high']:.3f}",
        "format": sampled["format"],
    }


def constant_span() -> dict:
    """The floor, by the rows of the world alone."""
    world = make_world(WORLD, questions=["when"])
    truths = {
        file: [
            json.loads(line)["solution"] for line in file.read_text(encoding="utf-8").splitlines()
        ]
        for file in (world.train, world.heldout)
    }
    times = [frame / FPS for frame in range(NUM_FRAMES + 1)]
    spans = [f"{start} to {end}" for start, end in itertools.combinations(times, 2)]

    def scores(span: str, file: Path) -> np.ndarray:
        return np.array(
            [
                score_answer(span, problem_type="temporal grounding", solution=t)
                for t in truths[file]
            ]
        )

    best = max(spans, key=lambda span: scores(span, world.train).mean())
    found = scores(best, world.heldout)
    low, high = bootstrap_interval(found, np.arange(len(found)))
    summary = {
        "accuracy": found.mean(),
        "accuracy_low": low,
        "accuracy_high": high,
        "format": float("nan"),
    }
    return table_row(None, f"best constant span, {best}", {"sampled": summary, "greedy": summary})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/grounding_study"))
    parser.add_argument(
        "--json", type=Path, default=ROOT / "evaluation" / "studies" / "grounding.json"
    )
    arguments = parser.parse_args(argv)
    table = [constant_span()]
    for seed in arguments.seeds:
        folder, seeded = arguments.output_dir / f"seed{seed}", ["--seed", str(seed)]
        start = folder / "cold_start"
        stage("recipes/sft_video.py", start, "--config", "grounding/tiny_sft.yaml", *seeded)
        options = ["--config", "grounding/tiny.yaml", "--model_name_or_path", str(start), *seeded]
        grpo = stage("recipes/grpo_video.py", folder / "grpo", *options)
        options += ["--report_before", "false"]
        dealt_out = ["--methods", "controls:ShuffledRewards"]
        control = stage("recipes/grpo_video.py", folder / "shuffled", *options, *dealt_out)
        options += ["--rewards", "format", "--reward_weights", "2"]
        form = stage("recipes/grpo_video.py", folder / "format", *options)
        table.append(table_row(seed, "cold start", grpo["before"]))
        table.append(table_row(seed, "GRPO", grpo["after"]))
        table.append(table_row(seed, "control: GRPO, rewards shuffled", control["after"]))
        table.append(table_row(seed, "control: GRPO, format alone", form["after"]))
        tables.print_table("When is it visible? Held-out questions of the tiny world", table)
        tables.write_json(arguments.json, {"table": table})


if __name__ == "__main__":
    sys.exit(run(main))
