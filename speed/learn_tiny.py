"""Does the loop learn? VerIPO's loop on the embedded world, and two controls, per seed.

    python speed/learn_tiny.py --seeds 0 1 2

Runs the recipes as shipped, one after another, and writes the numbers that the README shows:

- loop: `recipes/veripo.py` with `tiny/veripo.yaml` (cold start, then twice GRPO, verifier, DPO);
- GRPO alone: from the loop's first GRPO on, GRPO again, with as many steps and rollouts as the loop's second one;
- shuffled: the first GRPO with the rewards of each group dealt out to its completions at random, so that their
  distribution stays and what they say is gone.

A finished run under the output folder is not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from machine import describe_machine

from veripo_trl.files import tables
from veripo_trl.files.run_folder import RESULTS

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"


def run(command: list[str]) -> None:
    print("$", " ".join(command), flush=True)
    path = filter(None, [str(ROOT / "evaluation" / "studies"), os.environ.get("PYTHONPATH")])  # for controls.py
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(path)})


def grpo(command: list[str], folder: Path, *, start: Path, seed: int) -> dict:
    """A GRPO run, unless it is finished. Returns its results."""
    results = folder / RESULTS
    if not results.exists():
        options = ["--config", "tiny/grpo.yaml", "--model_name_or_path", str(start), "--report_before", "false"]
        run([*command, *options, "--output_dir", str(folder), "--seed", str(seed), "--save_strategy", "no"])
    return json.loads(results.read_text())


def table_row(seed: int, policy: str, results: dict) -> dict:
    sampled, greedy = results["after"]["sampled"], results["after"]["greedy"]
    return {
        "seed": seed,
        "policy": policy,
        "sampled accuracy": sampled["accuracy"],
        "95%": f"{sampled['accuracy_low']:.3f}–{sampled['accuracy_high']:.3f}",
        "greedy accuracy": greedy["accuracy"],
        "95% ": f"{greedy['accuracy_low']:.3f}–{greedy['accuracy_high']:.3f}",
        "inconsistent": sampled["inconsistency"],
        "95%  ": f"{sampled['inconsistency_low']:.3f}–{sampled['inconsistency_high']:.3f}",
        "unknown": sampled["unknown"],
        "accurate+consistent": sampled["accurate_and_consistent"],
        "think tokens": sampled["think_tokens"],
        "judges differ": sampled["disagreement"],
        "minutes": results["minutes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/learn_tiny"))
    parser.add_argument("--json", type=Path, default=ROOT / "speed" / "results" / "learn_tiny.json")
    args = parser.parse_args()
    table, loops = [], []
    for seed in args.seeds:
        folder = args.output_dir / f"seed{seed}"
        run([sys.executable, str(RECIPES / "veripo.py"), "--seed", str(seed), "--output_dir", str(folder / "loop")])
        loop = json.loads((folder / "loop" / "run.json").read_text())
        loops.append({"seed": seed, "minutes": sum(entry["minutes"] for entry in loop["stages"])})
        for entry in loop["stages"]:
            if "after" in entry["results"]:
                table.append(table_row(seed, entry["name"], entry["results"] | {"minutes": entry["minutes"]}))
            else:
                loops[-1][entry["name"]] = entry["results"]["counts"]
        start = [sys.executable, str(RECIPES / "grpo_video.py")]
        again = grpo(start, folder / "grpo_alone", start=folder / "loop" / "search-1", seed=seed)
        table.append(table_row(seed, "GRPO alone, as many steps", again))
        start += ["--methods", "controls:ShuffledRewards"]
        shuffled = grpo(start, folder / "shuffled", start=folder / "loop" / "cold-start", seed=seed)
        table.append(table_row(seed, "GRPO, shuffled rewards", shuffled))
        tables.print_table("Tiny world, held-out questions (consistency judged by the world's own templates)", table)
        tables.write_json(args.json, {"machine": describe_machine(), "table": table, "loops": loops})
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
