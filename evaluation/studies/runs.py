"""Runs of the recipes for a study: each a process of its own, forked from one that has imported
everything and computed nothing."""

import importlib.util
import math
import multiprocessing
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

from veripo_trl.errors import VeripoError
from veripo_trl.files.disk import read_json
from veripo_trl.files.run_folder import RESULTS


def in_own_process(recipe: str, folder: Path, train, further: list[str] = (), **options) -> dict:
    """The results of a run, which `train(recipe, argv)` makes unless it is finished."""
    if not (folder / RESULTS).exists():
        argv = []
        for name, value in {**options, "output_dir": folder}.items():
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        argv += further  # the last one given counts
        print("$", f"{recipe}.py", *argv, flush=True)
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=train, args=(RECIPES[recipe], argv))
        process.start()
        process.join()
        if process.exitcode:
            raise VeripoError(f"{folder}: its run ended with exit code {process.exitcode}.")
    return read_json(
        folder / RESULTS, remedy="Remove the folder, and start the same command again."
    )


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
