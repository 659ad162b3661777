"""Does the embedded GRPO run learn? Cold start, GRPO, and a control with rewards shuffled within groups, per seed.

    python benchmarks/learn_tiny.py --seeds 0 1 2

Runs the recipes as shipped, one after another, and writes the numbers that the README shows. The control differs from
the GRPO run in one thing: within each group, the rewards are dealt out to the completions at random, so that their
distribution stays and what they say is gone. A finished run under the output folder is not repeated.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch
from machine import describe_machine

from veripo_trl import stages
from veripo_trl.trainers.grpo import VideoGRPOTrainer

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"


class ShuffledRewards(VideoGRPOTrainer):
    """GRPO whose rewards carry no information about their completions."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        size = self.num_generations if self.model.training else self.num_generations_eval
        groups = rewards.view(-1, size, rewards.size(1))
        order = torch.rand(groups.shape[:2], device=rewards.device).argsort(1)
        self._scored["rewards"] = groups.gather(1, order[..., None].expand_as(groups)).view_as(rewards)
        return self._scored["rewards"]


def run_control(argv: list[str]) -> None:
    """The GRPO recipe with the control's trainer."""
    spec = importlib.util.spec_from_file_location("grpo_video", RECIPES / "grpo_video.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    recipe.VideoGRPOTrainer = ShuffledRewards
    recipe.main(argv)


def run(command: list[str], folder: Path) -> dict:
    """Run one stage unless it is finished, and return its results."""
    results = folder / stages.RESULTS
    if not results.exists():
        print("$", " ".join(command), flush=True)
        subprocess.run(command, check=True)
    return json.loads(results.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/learn_tiny"))
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "learn_tiny.json")
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        folder = args.output_dir / f"seed{seed}"
        common = ["--seed", str(seed), "--save_strategy", "no", "--disable_tqdm", "true"]
        start = ["--output_dir", str(folder / "sft"), "--config", "tiny/sft.yaml"]
        cold = run([sys.executable, str(RECIPES / "sft_video.py"), *start, *common], folder / "sft")
        options = ["--config", "tiny/grpo.yaml", "--model_name_or_path", str(folder / "sft"), *common]
        grpo_command = [sys.executable, str(RECIPES / "grpo_video.py"), "--output_dir", str(folder / "grpo"), *options]
        control_command = [sys.executable, __file__, "control", "--output_dir", str(folder / "control"), *options]
        grpo = run(grpo_command, folder / "grpo")
        control = run(control_command, folder / "control")
        runs.append({"seed": seed, "cold_start": cold, "grpo": grpo, "control": control})

    table = []
    for entry in runs:
        for policy, summaries, minutes in (
            ("cold start", entry["grpo"]["before"], entry["cold_start"]["minutes"]),
            ("GRPO", entry["grpo"]["after"], entry["grpo"]["minutes"]),
            ("control", entry["control"]["after"], entry["control"]["minutes"]),
        ):
            sampled, greedy = summaries["sampled"], summaries["greedy"]
            table.append(
                {
                    "seed": entry["seed"],
                    "policy": policy,
                    "sampled accuracy": sampled["accuracy"],
                    "95%": f"{sampled['accuracy_low']:.3f}–{sampled['accuracy_high']:.3f}",
                    "greedy accuracy": greedy["accuracy"],
                    "95% ": f"{greedy['accuracy_low']:.3f}–{greedy['accuracy_high']:.3f}",
                    "inconsistent": sampled["inconsistency"],
                    "unknown": sampled["unknown"],
                    "accurate+consistent": sampled["accurate_and_consistent"],
                    "minutes": minutes,
                }
            )
    stages.print_table("Tiny world, held-out questions (consistency judged by rules)", table)
    stages.write_json(args.json, {"machine": describe_machine(), "table": table, "runs": runs})
    print(f"written to {args.json}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["control"]:
        run_control(sys.argv[2:])
    else:
        main()
