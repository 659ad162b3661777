"""Methods that change GRPO against GRPO and against controls of their own, on the tiny world.

    python evaluation/studies/methods.py --seeds 0 1 2
    python evaluation/studies/methods.py --only T-GRPO "T-GRPO, bonus 0"   # of the lines below

For each seed: one cold start, as in `tiny/sft.yaml`; from it each line of ARMS, as in
`tiny/grpo.yaml` but for what the line says, with as many rollouts (`--steps` times 64). Options
that are not the study's own go to every GRPO run. A finished run under the output folder is not
repeated.
"""

import copy
import math
import resource
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from runs import CONSISTENCY, in_own_process, known, options_of, scores  # before torch, whose environment it sets

from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.errors import run
from veripo_trl.files import tables
from veripo_trl.methods.t_grpo import shuffle_seed
from veripo_trl.recipe.held_out import evaluate_policy

# Twice as many updates as rollouts: else a ratio is 1, and losses that differ in it alone are one.
TWICE = {"num_iterations": 2}
# In a group of standardised advantages a bonus for all that are right cancels.
T_GRPO = {"scale_rewards": "none", "length_bonus": 0}
CARE = {"care_min_think_tokens": 6}  # a thought of the tiny world has about 13
# Line: (what it is held against, what differs from tiny/grpo.yaml). In the order of running.
ARMS = {
    "GRPO": (None, {"report_before": "true"}),
    "GRPO, rewards shuffled": ("GRPO", {"methods": ["controls:ShuffledRewards"]}),
    "T-GRPO": ("T-GRPO, bonus 0", {**T_GRPO, "methods": ["t_grpo"]}),
    "T-GRPO, bonus 0": ("GRPO", {**T_GRPO, "methods": ["t_grpo"], "temporal_bonus": 0}),
    "T-GRPO, random groups": (
        "T-GRPO, bonus 0", {**T_GRPO, "methods": ["controls:RandomGroupsBonus", "t_grpo"]},
    ),
    "bnpo": ("GRPO", {"loss_type": "bnpo"}),
    "TW-GRPO": (
        "bnpo", {"loss_type": "bnpo", "methods": ["controls:WatchedWeights", "tw_grpo"]},
    ),
    "TW-GRPO, permuted": (
        "bnpo", {"loss_type": "bnpo", "methods": ["controls:PermutedWeights", "tw_grpo"]},
    ),
    "GRPO, twice": ("GRPO", TWICE),
    "Reg-GRPO": ("GRPO, twice", {**TWICE, "methods": ["reg_grpo"]}),
    "Reg-GRPO, rewards shuffled": (
        "GRPO, twice", {**TWICE, "methods": ["controls:ShuffledRewards", "reg_grpo"]},
    ),
    "consistency reward": ("GRPO", CONSISTENCY),
    "consistency, shuffled": (
        "GRPO", {**CONSISTENCY, "methods": ["controls:ShuffledConsistency"]},
    ),
    "CARE": ("GRPO", {**CARE, "methods": ["care"]}),
    "CARE, permuted": ("GRPO", {**CARE, "methods": ["controls:PermutedLikelihoods", "care"]}),
    "Dr. GRPO": ("GRPO, twice", {**TWICE, "loss_type": "dr_grpo", "scale_rewards": "none"}),
    "DAPO": ("GRPO, twice", {**TWICE, "loss_type": "dapo", "epsilon_high": 0.28}),
    "GSPO": (
        "GRPO, twice",
        {**TWICE, "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "CISPO": ("GRPO, twice", {**TWICE, "loss_type": "cispo", "epsilon_high": 5.0}),
    "SAPO": ("GRPO, twice", {**TWICE, "loss_type": "sapo"}),
}  # fmt: skip
# Of a run's log: what a method's own statement reads.
LOGGED = ("t_grpo/", "token_weights/", "regression/", "care/", "clip_ratio/region_mean", "cispo_")


def measured(recipe) -> None:
    """Its results have `study` too, see `measure`."""
    finish = recipe.train

    def train(trainer, heldout, report, **rest):
        found = {"study": lambda: heldout and measure(trainer, heldout, report)}
        return finish(trainer, heldout, report, **rest, **found)

    recipe.train = train


def measure(trainer, heldout, report) -> dict:
    """Peak memory, and what `evaluate.summarize` gives where the held-out frames are shuffled."""
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    encode, trainer.encoder = trainer.encoder.encode, copy.copy(trainer.encoder)
    trainer.encoder.encode = lambda row: encode(
        row, shuffle_seed=shuffle_seed(0, 0, row["question_id"])
    )
    shuffled = evaluate_policy(trainer, heldout, report, decoding="sampled")
    return {"peak_mb": peak_mb, "shuffled": shuffled}


def bonus_rates(folder: Path) -> dict[str, float]:
    """Of T-GRPO's groups with a right rollout: the share with the bonus, by kind of question."""
    groups = defaultdict(list)
    for rollout in RolloutStore(folder / "rollouts").read():
        kind = rollout["data_source"].removeprefix("tiny-")
        groups[rollout["step"], rollout["question_id"], kind].append(rollout["rewards"])
    found = defaultdict(list)
    for (*_, kind), rewards in groups.items():
        if max(reward["accuracy_reward"] for reward in rewards) > 0.1:
            found[f"bonus rate: {kind}"].append(any(each["temporal_reward"] for each in rewards))
    return {name: fmean(some) for name, some in found.items()}


def line(seed: int, name: str, results: dict, folder: Path, steps: int) -> dict:
    summaries = [*results["after"].values(), results["study"]["shuffled"]]
    greedy, sampled, shuffled = map(known, summaries)
    history = [entry for entry in results["history"] if "reward" in entry]
    log = {key: [e[key] for e in history if e.get(key) is not None] for key in history[-1]}
    own = {key: fmean(values) for key, values in log.items() if key.startswith(LOGGED) and values}
    gaps = {
        f"gap: {kind}": sampled[f"accuracy: {problem}"] - shuffled[f"accuracy: {problem}"]
        for kind, problem in (("order", "multiple choice"), ("count", "numerical"))
    }
    seconds = sum(results["seconds"][part] for part in ("wait for data", "rollout", "update"))
    return {
        "arm": name,
        "seed": seed,
        **scores(sampled, greedy),
        "unknown": sampled["unknown"],
        "consistent if right": sampled["accurate_and_consistent"]
        / (sampled["accuracy"] or math.nan),
        "think tokens": sampled["think_tokens"],
        "own rollouts": fmean(log["rewards/accuracy_reward/mean"]),
        **gaps,
        "seconds a step": seconds / steps,
        "peak MB": results["study"]["peak_mb"],
        "own": own | (bonus_rates(folder) if name.startswith("T-GRPO") else {}),
    }


def means(lines: list[dict]) -> list[dict]:
    """Each line of ARMS over its seeds, and its sampled accuracy less that of what it is held
    against, by seed."""
    sampled, table = {(each["arm"], each["seed"]): each["sampled"] for each in lines}, []
    for name, (against, _) in ARMS.items():
        if runs := [each for each in lines if each["arm"] == name]:
            numbers = [key for key, value in runs[0].items() if isinstance(value, float)]
            own = {
                key: fmean(each["own"].get(key, math.nan) for each in runs)
                for key in runs[0]["own"]
            }
            seeds = [each["seed"] for each in runs if (against, each["seed"]) in sampled]
            gains = [sampled[name, seed] - sampled[against, seed] for seed in seeds]
            row = {"arm": name, **{key: fmean(each[key] for each in runs) for key in numbers}}
            row |= {"against": against or "", "by": " ".join(f"{gain:+.3f}" for gain in gains)}
            table.append(row | {"own": own})
    return table


def main(argv: list[str] | None = None) -> None:
    parser = options_of("methods", __doc__)
    parser.add_argument("--only", nargs="+", choices=ARMS, metavar="LINE", help=", ".join(ARMS))
    parser.add_argument("--steps", type=int, default=80, help="generations of 64 rollouts")
    arguments, further = parser.parse_known_args(argv)
    steps, lines, before = arguments.steps, [], {}
    for name in arguments.only or ARMS:
        changes = {"per_device_train_batch_size": 64, "report_before": "false", **ARMS[name][1]}
        changes["max_steps"] = steps * changes.get("num_iterations", 1)
        for seed in arguments.seeds:
            folder = arguments.output_dir / f"seed{seed}"
            start = folder / "cold_start"
            shared = {"seed": seed, "save_strategy": "no", "dataloader_num_workers": 0}
            in_own_process("sft_video", start, measured, config="tiny/sft.yaml", **shared)
            own = folder / name.lower().replace(",", "").replace(" ", "_")
            given = {"config": "tiny/grpo.yaml", "model_name_or_path": start, **shared}
            results = in_own_process("grpo_video", own, measured, further, **given, **changes)
            lines.append(line(seed, name, results, own, steps))
            before |= {seed: results["before"]} if results["before"] else {}
        table = means(lines)
        shown = [{key: value for key, value in row.items() if key != "own"} for row in table]
        tables.print_table(f"Means over the seeds, {steps} generations of 64 rollouts", shown)
        found = {"steps": steps, "lines": lines, "means": table, "cold starts": before}
        tables.write_json(arguments.json or arguments.output_dir / "methods.json", found)


if __name__ == "__main__":
    sys.exit(run(main))
