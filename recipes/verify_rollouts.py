"""Judge a GRPO run's rollouts and build preference pairs for DPO (arXiv 2505.19000, the rollout-aware verifier).

    python recipes/verify_rollouts.py                                            # the tiny world's, by rules
    python recipes/verify_rollouts.py --rollouts outputs/my_grpo/rollouts --output_dir outputs/my_verify \\
        --judge server --judge_url http://127.0.0.1:8000/v1 --judge_model Qwen/Qwen3-4B-Instruct-2507

Writes <output_dir>/verdicts (one per rollout), pairs, solved.json (questions the next iteration leaves out) and
results.json. One process does it all; a judge server brings its own GPUs. Broken off, it is started again with the
same command: what a judge model said is kept in the verdict cache, and the pairs come out the same.
"""

from veripo_trl.start import start

start()  # before torch and tqdm are imported

import os
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.compute as pc
from tqdm import tqdm

from veripo_trl.data.prompts import load_template
from veripo_trl.errors import run
from veripo_trl.files.run_folder import only_process, refuse_own_input
from veripo_trl.files.tables import write_json
from veripo_trl.recipe import verify_stage as recipe
from veripo_trl.recipe.arguments import parse
from veripo_trl.recipe.prepare import save_arguments
from veripo_trl.recipe.verify_stage import VerifyArguments
from veripo_trl.verifier import files
from veripo_trl.verifier.pairs import PairOptions, build_pairs
from veripo_trl.verifier.summary import count, print_summary
from veripo_trl.verifier.verify import verify_stream

RECIPES = Path(__file__).resolve().parent
DEFAULT_CONFIG = RECIPES / "configs" / "tiny" / "verify.yaml"
ARGUMENTS = (VerifyArguments, PairOptions)


def main(argv: list[str] | None = None) -> None:
    arguments, options = parse(ARGUMENTS, default_config=DEFAULT_CONFIG, argv=argv)
    if not int(os.environ.get("RANK", "0")):  # one process of a launcher's does the work
        with only_process(arguments.output_dir):
            verify(arguments, options)


def verify(arguments: VerifyArguments, options: PairOptions) -> None:
    started = time.time()
    refuse_own_input(arguments.output_dir, [*arguments.rollouts, *arguments.perturbed])
    recipe.check_kinds(arguments, options)
    recipe.check_repositories(arguments)
    found, inputs = recipe.find_rollouts(arguments)
    scratch = Path(arguments.output_dir).absolute().parent
    rollouts = files.read_rollouts(found, limit=arguments.limit, scratch=scratch)
    also = [file for folder in arguments.perturbed for file in files.find_rollout_files(folder)]
    judged = files.with_perturbed(rollouts, files.read_rollouts(also, scratch=scratch, perturbed=True) if also else None)
    template = load_template(arguments.prompt_template)
    files.refuse_other_template(template, pc.unique(judged["prompt_template"]).to_pylist(), "rollouts")
    recipe.say_other_accuracy(arguments, found)
    policies = {item["values"]: item["counts"] for item in pc.value_counts(rollouts["policy"]).to_pylist()}
    tokenizer = recipe.load_tokenizer(arguments.tokenizer, found, policies)
    judge = recipe.make_judge(arguments)
    opened = recipe.open_cache(arguments.verdict_cache, judge, beside=arguments.output_dir)
    # after all that can be wrong with the arguments
    folder = recipe.open_folder(arguments.output_dir)
    save_arguments(str(folder), arguments, options)

    with opened as cache:
        verdicts = verify_stream(
            files.rows_of(judged),
            judge=judge,
            tokenizer=tokenizer,
            cache=cache,
            reward=arguments.reward(),
        )
        verdicts = tqdm(
            verdicts, total=len(judged), desc="verdicts", unit="rollout", smoothing=0.05
        )
        files.write_files(verdicts, folder / "verdicts", files.VERDICT_SCHEMA)
    verdicts = files.read_files(folder / "verdicts")
    questions = tqdm(
        files.judged_questions(judged, verdicts, seed=options.seed), desc="pairs", unit="question"
    )
    pairs = build_pairs(questions, options, template=template, dropped=(dropped := Counter()))
    files.write_files(pairs, folder / "pairs", files.PAIR_SCHEMA)
    pairs = files.read_files(folder / "pairs")
    verdicts, of_perturbed = verdicts[: len(rollouts)], verdicts[len(rollouts) :]
    solved = recipe.solved_questions(
        rollouts, verdicts, share=arguments.drop_solved_share, seed=options.seed
    )
    write_json(folder / "solved.json", solved)

    counts = count(verdicts, pairs, dropped)
    if also:
        counts["perturbed"] = {
            "rollouts": len(of_perturbed),
            "accuracy": pc.mean(of_perturbed["accuracy"]).as_py(),
        }
    print(f"\n{judge.summary()}")
    print_summary(counts, solved, pairs)
    results = {
        "counts": counts,
        "solved": {key: value for key, value in solved.items() if not isinstance(value, list)},
        "rollouts": arguments.rollouts,
        "inputs": inputs,
        "judge": judge.record(),
        "prompt_template": template.hash,
        "policies": policies,
        "hub": None,
    }
    recipe.finish(folder, arguments, results, started=started)


if __name__ == "__main__":
    sys.exit(run(main))
