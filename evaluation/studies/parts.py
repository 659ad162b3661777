"""Which part of the method does the work? On the tiny world's questions that take several steps.

    python evaluation/studies/parts.py --seeds 0 1 2
    python evaluation/studies/parts.py --lines GRPO "all pairs" "no reflection pairs"   # of LINES below

A line is a run of a recipe that starts from another line's policy, its settings those of
`recipes/configs/tiny/` but for what LINES and SETTINGS say. All begin with one *base*, which has
learned to name the shapes of a clip with their times, and nothing of questions. A DPO line has
pairs of its own, judged from the rollouts of the line that it starts from, and as many steps as
each other DPO line. What searches a second time has the questions of the first GRPO. A finished run
under the output folder is not repeated.
"""

import asyncio
import json
import math
import re
import sys
import time
from pathlib import Path
from statistics import fmean

from runs import CONSISTENCY, in_own_process, known, options_of, scores  # before torch, whose environment it sets

from datasets import load_dataset

from veripo_trl.answers.score import score_answer, split_completion
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.errors import run
from veripo_trl.files import tables
from veripo_trl.recipe import held_out
from veripo_trl.tiny import relatives, steps
from veripo_trl.tiny.clips import clip_spec
from veripo_trl.tiny.judge import conclude
from veripo_trl.tiny.world import make_world
from veripo_trl.verifier.judges import RulesJudge
from veripo_trl.verifier.pairs import KINDS, RECHECK

WORLD = Path("outputs/tiny_steps")
relatives.SIZES["train"] = 9000  # three questions about each of 3,000 clips
ALL = list(KINDS[:3])
# Of every training run.
SHARED = {
    "report_max_new_tokens": 76, "save_strategy": "no", "dataloader_num_workers": 0,
    "tiny_world": WORLD, "tiny_questions": "steps",
    "eval_datasets": json.dumps({"path": str(WORLD / "heldout.jsonl"), "limit": 300}),
    "report_batch_size": 150,
}  # fmt: skip
# Of every run of a recipe.
SETTINGS = {
    "sft": {
        "max_steps": 300, "per_device_train_batch_size": 16, "warmup_steps": 50,
        "stop_at_accuracy": 1.1, "stop_check_steps": 10_000,
    },
    "grpo": {
        "max_steps": 30, "per_device_train_batch_size": 128, "max_completion_length": 76,
        "datasets": json.dumps({"path": str(WORLD / "rl.jsonl")}), "report_before": "false",
    },
    "verify": {"kinds": ALL, "prefer_longer": "true", "max_pairs_per_question": 3},
    "dpo": {"max_steps": 20, "report_before": "false"},
}  # fmt: skip
DIRECT = {"prompt_template": "tiny_process"}


def dpo(start: str = "GRPO", verify: dict | None = None, **settings) -> tuple:
    return "dpo", start, verify or {}, settings


BASE = {
    "max_steps": 150, "per_device_train_batch_size": 32, "prompt_template": "tiny_process",
    "eval_datasets": json.dumps({"path": str(WORLD / "heldout.jsonl"), "limit": 8}),
}  # fmt: skip
# Line: (recipe, the line that it starts from, of DPO what differs in making its pairs, what differs).
# In the order of running.
LINES = {
    "cold start": ("sft", "base", None, {}),
    "GRPO": ("grpo", "cold start", None, {}),
    "consistency reward": ("grpo", "cold start", None, CONSISTENCY),
    "all pairs": dpo(),
    "reward, then all pairs": dpo("consistency reward"),
    "GRPO, longer": ("grpo", "GRPO", None, {"max_steps": 10}),
    "no consistency pairs": dpo(verify={"kinds": ["penalty", "reflection"]}),
    "no reflection pairs": dpo(verify={"kinds": ["consistency", "penalty"]}),
    "no penalty pairs": dpo(verify={"kinds": ["consistency", "reflection"]}),
    "verdicts dealt out": dpo(verify={"judge": "controls:dealt_on"}),
    "direct, cold start": ("sft", "base", None, DIRECT),
    "direct, GRPO": ("grpo", "direct, cold start", None, {"max_completion_length": 8}),
    "5% flipped": dpo(verify={"judge": "controls:flipped_5"}),
    "10% flipped": dpo(verify={"judge": "controls:flipped_10"}),
    "20% flipped": dpo(verify={"judge": "controls:flipped_20"}),
    "direct, cold start, longer": ("sft", "base", None, {**DIRECT, "max_steps": 1000}),
    "direct, GRPO, longer": (
        "grpo", "direct, cold start, longer", None, {"max_completion_length": 8, "max_steps": 150},
    ),
    "not the longer": dpo(verify={"prefer_longer": "false"}),
    "sigmoid": dpo(loss_type="sigmoid", loss_weights=1),
    "ipo": dpo(loss_type="ipo", loss_weights=1),
    "apo_zero": dpo(loss_type="apo_zero", loss_weights=1),
    "robust": dpo(loss_type="robust", loss_weights=1, label_smoothing=0.1),
    "second search": (
        "grpo", "all pairs", None, {"leave_out": ["unseen.json", "all_pairs_pairs/solved.json"]},
    ),
    "second search, none dropped": ("grpo", "all pairs", None, {"leave_out": ["unseen.json"]}),
    "GRPO twice": ("grpo", "GRPO", None, {"leave_out": ["unseen.json"]}),
    "two loops": dpo("second search"),
    "two loops, none dropped": dpo("second search, none dropped"),
    "one loop, twice the steps": dpo("GRPO twice", max_steps=40),
}  # fmt: skip


def measured(recipe) -> None:
    """Its results have `cpu_s` of its training, and its held-out tables `rechecks`."""
    finish, summarize = recipe.train, held_out.summarize

    def train(trainer, *args, **results):
        training, spent = trainer.train, []

        def clocked(**kwargs):
            started = time.process_time()
            training(**kwargs)
            spent.append(time.process_time() - started)

        trainer.train = clocked
        return finish(trainer, *args, **results, cpu_s=lambda: spent[0])

    recipe.train = train
    held_out.summarize = lambda answers, dataset, **judges: {
        **summarize(answers, dataset, **judges), **rechecks(answers, dataset)
    }  # fmt: skip


def rechecks(answers: list[dict], dataset) -> dict[str, float]:
    """The share of thoughts that name the shapes, and that check again; of these, the shares whose
    first and last conclusions are right, and of those whose first is wrong (right), the share whose
    last is right (wrong)."""
    pairs, named = [], 0
    for answer in answers:
        thought = split_completion(answer["completion"])[0] or ""
        named += bool("3.0 " in thought)
        if RECHECK in thought:
            row = dataset[answer["row"]]
            task = {key: row[key] for key in ("problem_type", "options", "solution")}
            said = [conclude(each) for each in (thought.partition(RECHECK)[0], thought)]
            pairs.append([bool(each) and score_answer(each, **task) == 1 for each in said])

    def share(some: list[bool]) -> float:
        return fmean(some) if some else math.nan

    return {
        "named": named / len(answers),
        "rechecked": len(pairs) / len(answers),
        "first right": share([first for first, _ in pairs]),
        "second right": share([second for _, second in pairs]),
        "mended": share([second for first, second in pairs if not first]),
        "spoilt": share([not second for first, second in pairs if first]),
    }


def make_line(name: str, seed: int, output_dir: Path) -> dict:
    """A line's results; the lines that it starts from are made first."""
    recipe, start, verify, settings = LINES.get(name, ("sft", None, None, BASE))
    folders = output_dir / f"seed{seed}"
    folder = folders / re.sub(r"\W+", "_", name) if start else output_dir / "base"
    if start:
        make_line(start, seed, output_dir)
        policy = output_dir / "base" if start == "base" else folders / re.sub(r"\W+", "_", start)
    else:  # one for all
        policy, seed = WORLD / "model", 0
    own = {
        **SHARED,
        "config": f"tiny/{recipe}.yaml",
        "model_name_or_path": policy,
        "seed": seed,
        **SETTINGS[recipe],
        **settings,
    }
    if recipe == "sft":
        rows = "train" if settings.get("prompt_template", "tiny") == "tiny" else name.split(",")[0]
        own |= {"datasets": json.dumps({"path": str(WORLD / f"{rows}.jsonl")})}
        own |= {"stop_datasets": json.dumps({"path": str(WORLD / "dev.jsonl")})}
        own |= {"prompt_template": settings.get("prompt_template", "tiny")}  # not the base's
    if "leave_out" in own:
        seen = {row["question_id"] for row in RolloutStore(folders / "GRPO" / "rollouts").read()}
        rows = map(json.loads, (WORLD / "rl.jsonl").read_text(encoding="utf-8").splitlines())
        unseen = [row["question_id"] for row in rows if row["question_id"] not in seen]
        (folders / "unseen.json").write_text(json.dumps({"dropped": unseen}), encoding="utf-8")
        own["leave_out"] = [folders / file for file in own["leave_out"]]
    pairs = {}
    if recipe == "dpo":
        rollouts = [policy / "rollouts"]
        if start == "GRPO twice":
            rollouts.append(folders / "GRPO" / "rollouts")
        given = {
            "config": "tiny/verify.yaml",
            "rollouts": rollouts,
            "tokenizer": policy,
            "seed": seed,
        }
        given |= {**SETTINGS["verify"], **verify}
        made = in_own_process("verify_rollouts", folder.with_name(f"{folder.name}_pairs"), **given)
        pairs = made["counts"]["pairs"] | {"wronged": wronged(Path(f"{folder}_pairs/pairs"))}
        own |= {"pairs": json.dumps({"path": f"{folder}_pairs/pairs", "media_root": str(WORLD)})}
    if recipe == "grpo" and start.startswith("direct"):
        own |= DIRECT
    found = in_own_process(f"{recipe}_video", folder, measured, **own)
    return found | {"pairs of a kind": pairs}


def wronged(folder: Path) -> float:
    """Of the consistency pairs the share whose rejected thought the rules do not find inconsistent."""
    rows = [row for row in load_dataset(str(folder), split="train") if row["kind"] == "consistency"]
    for row in rows:
        row["think"], row["answer"] = split_completion(row["rejected"][0]["content"])[:2]

    async def judge() -> list[bool]:
        return [(await RulesJudge()(row))["consistency"] != "inconsistent" for row in rows]

    return fmean(asyncio.run(judge())) if rows else math.nan


def line(seed: int, name: str, results: dict) -> dict:
    sampled, greedy = (known(results["after"][of]) for of in ("sampled", "greedy"))
    kept = ("named", "rechecked", "first right", "second right", "mended", "spoilt", "unknown")
    return {
        "line": name,
        "seed": seed,
        **scores(sampled, greedy),
        "both right": sampled["accurate_and_consistent"],
        **{key: sampled[key] for key in kept},
        "tokens": sampled["completion_tokens"],
        "judges differ": sampled["disagreement"],
        "steps": results["steps"],
        "CPU s": results["cpu_s"],
        "pairs": results["pairs of a kind"],
    }


def means(lines: list[dict]) -> list[dict]:
    """Each line over its seeds, with its sampled accuracy and inconsistency by seed."""
    table = []
    for name in LINES:
        if runs := [each for each in lines if each["line"] == name]:
            keys = [key for key, value in runs[0].items() if isinstance(value, float)]
            row = {"line": name, "seeds": len(runs)} | {key: _mean(runs, key) for key in keys}
            for key in ("sampled", "inconsistent"):
                row[f"{key} by seed"] = " ".join(f"{each[key]:.3f}" for each in runs)
            table.append(row)
    return table


def _mean(runs: list[dict], key: str) -> float:
    known = [each[key] for each in runs if not math.isnan(each[key])]
    return fmean(known) if known else math.nan


def make_rows() -> None:
    """Beside the world's own rows: those of the base, and those of the cold start without thinking."""
    world = make_world(WORLD, questions=["steps"])
    rows = list(map(json.loads, world.train.read_text(encoding="utf-8").splitlines()))
    _, media = relatives.make_split("train", questions=["steps"])
    named = {path: steps.name_shapes(clip_spec(*drawn)["colours"]) for path, drawn in media.items()}
    seen = {"problem": "List the colours in order.", "problem_type": "free-form", "options": []}
    base = [{**row, **seen, "solution": named[row["videos"][0]]} for row in rows]
    for name, some in (("direct", rows), ("base", base)):
        bare = ({**row, "process": f"<answer>{row['solution']}</answer>"} for row in some)
        text = "".join(json.dumps(row) + "\n" for row in bare)
        (WORLD / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = options_of("parts", __doc__)
    parser.add_argument(
        "--lines",
        nargs="+",
        choices=LINES,
        metavar="LINE",
        default=list(LINES),
        help=", ".join(LINES),
    )
    arguments = parser.parse_args(argv)
    make_rows()
    lines = []
    for name in arguments.lines:
        for seed in arguments.seeds:
            lines.append(line(seed, name, make_line(name, seed, arguments.output_dir)))
            table = means(lines)
            found = {"settings": SETTINGS, "lines": lines, "means": table}
            tables.write_json(arguments.json or arguments.output_dir / "parts.json", found)
        shown = [{key: value for key, value in row.items() if key != "pairs"} for row in table]
        tables.print_table("Means over the seeds", shown)


if __name__ == "__main__":
    sys.exit(run(main))
