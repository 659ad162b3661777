"""Runs of the recipes for a study: each a process of its own, forked from one that has imported
everything and computed nothing."""

import argparse
import importlib.util
import json
import math
import multiprocessing
import sys
from pathlib import Path

RECIPE_DIR = Path(__file__).resolve().parents[2] / "recipes"


def load_recipe(name: str):
    spec = importlib.util.spec_from_file_location(name, RECIPE_DIR / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # first: it sets the environment that torch is imported in
    return module


RECIPES = {
    name: load_recipe(name) for name in ("sft_video", "grpo_video", "dpo_video", "verify_rollouts")
}

from veripo_trl.errors import VeripoError, run
from veripo_trl.files.disk import read_json
from veripo_trl.files.run_folder import RESULTS

# The verifier's verdict as a reward.
CONSISTENCY = {
    "rewards": ["accuracy", "format", "consistency"],
    "reward_weights": [1, 1, 0.5],
    "reward_kwargs": json.dumps({"consistency": {"judge": "rules"}}),
}


def options_of(study: str, doc: str) -> argparse.ArgumentParser:
    """What every study takes."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path(f"outputs/{study}_study"))
    parser.add_argument("--json", type=Path, help=f"default: {study}.json in the output folder")
    return parser


def in_own_process(
    recipe: str, folder: Path, change=lambda recipe: None, further: list[str] = (), **options
) -> dict:
    """The results of a run, which is made unless it is finished, by the recipe as `change` leaves it."""
    if not (folder / RESULTS).exists():
        argv = []
        for name, value in {**options, "output_dir": folder}.items():
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        argv += further  # the last one given counts
        print("$", f"{recipe}.py", *argv, flush=True)
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=_train, args=(RECIPES[recipe], argv, change))
        process.start()
        process.join()
        if process.exitcode:
            raise VeripoError(f"{folder}: its run ended with exit code {process.exitcode}.")
    return read_json(
        folder / RESULTS, remedy="Remove the folder, and start the same command again."
    )


def _train(recipe, argv: list[str], change) -> None:
    change(recipe)
    sys.exit(run(lambda: recipe.main(argv)))


def known(summary: dict) -> dict:
    """JSON has no NaN: where all answers are unreadable, their inconsistency is null."""
    return {key: math.nan if value is None else value for key, value in summary.items()}


def scores(sampled: dict, greedy: dict) -> dict:
    """What a line says of its policy on the held-out questions."""

    def interval(name: str) -> str:
        low, high = sampled[f"{name}_low"], sampled[f"{name}_high"]
        return f"{low:.3f}–{high:.3f}".replace("nan–nan", "–")

    return {
        "sampled": sampled["accuracy"],
        "95%": interval("accuracy"),
        "greedy": greedy["accuracy"],
        "inconsistent": sampled["inconsistency"],
        "95% ": interval("inconsistency"),
    }
