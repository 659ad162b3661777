"""Does tIoU as a reward teach time? GRPO from a cold start on the tiny world, and the same with
shuffled rewards.

    python evaluation/studies/grounding.py --seeds 0 1 2

For each seed: the cold start of `grounding/tiny_sft.yaml`; from it GRPO as in `grounding/tiny.yaml`,
and two controls: GRPO with rewards dealt out at random within groups, and GRPO with the reward for
the format alone. The floor is the one span that, given as the answer to every question, has the
best mean tIoU on the training rows. A finished run under the output folder is not repeated.
"""

import itertools
import json
import sys
from pathlib import Path

from runs import in_own_process, options_of  # before torch, whose environment it sets

import numpy as np

from veripo_trl.answers.score import score_answer
from veripo_trl.errors import run
from veripo_trl.evaluate.generate import bootstrap_interval
from veripo_trl.files import tables
from veripo_trl.tiny.clips import FPS, NUM_FRAMES
from veripo_trl.tiny.world import make_world

WORLD = "outputs/tiny_when"
# Line: what differs from the GRPO of `grounding/tiny.yaml`, in the order of running.
ARMS = {
    "GRPO": ("grpo", {}),
    "control: GRPO, rewards shuffled": (
        "shuffled", {"report_before": "false", "methods": "controls:ShuffledRewards"},
    ),
    "control: GRPO, format alone": (
        "format", {"report_before": "false", "rewards": "format", "reward_weights": 2},
    ),
}  # fmt: skip


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
    arguments = options_of("grounding", __doc__).parse_args(argv)
    table = [constant_span()]
    for seed in arguments.seeds:
        folder = arguments.output_dir / f"seed{seed}"
        start = folder / "cold_start"
        in_own_process("sft_video", start, config="grounding/tiny_sft.yaml", seed=seed)
        given = {"config": "grounding/tiny.yaml", "model_name_or_path": start, "seed": seed}
        for name, (own, changes) in ARMS.items():
            results = in_own_process("grpo_video", folder / own, **given, **changes)
            if name == "GRPO":
                table.append(table_row(seed, "cold start", results["before"]))
            table.append(table_row(seed, name, results["after"]))
        tables.print_table("When is it visible? Held-out questions of the tiny world", table)
        tables.write_json(
            arguments.json or arguments.output_dir / "grounding.json", {"table": table}
        )


if __name__ == "__main__":
    sys.exit(run(main))
