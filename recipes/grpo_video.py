"""GRPO on questions about videos, images and text (arXiv 2505.19000, the slow search).

    accelerate launch -q recipes/grpo_video.py                                      # the tiny world, CPU, minutes
    accelerate launch -q recipes/grpo_video.py --config qwen2_5_vl_3b_lora/grpo.yaml \\
        --datasets '{"path": "Video-R1-260k.json", "where": {"data_type": "video"}}'

Without arguments it makes the embedded world, cold-starts the tiny model, trains it and evaluates it on held-out clips.
A run that was broken off goes on from its last checkpoint.
"""

from veripo_trl.start import start

start()  # before torch and peft are imported

import sys
from pathlib import Path

from transformers import set_seed
from trl import ModelConfig

from veripo_trl.answers.rewards import check_truths, reward_functions
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.errors import run
from veripo_trl.files.run_folder import only_process
from veripo_trl.hub.cards import shown_name
from veripo_trl.recipe.arguments import SHARED, GRPOArguments, parse
from veripo_trl.recipe.build import make_encoder, make_policy, resolve_policy
from veripo_trl.recipe.finish import finish_push, train
from veripo_trl.recipe.prepare import cold_start, open_run, prepare_machine
from veripo_trl.recipe.training_rows import load_eval_rows, load_training_rows, pin_data
from veripo_trl.trainers.grpo import VideoGRPOConfig, VideoGRPOTrainer

RECIPES = Path(__file__).resolve().parent
DEFAULT_CONFIG = RECIPES / "configs" / "tiny" / "grpo.yaml"
ARGUMENTS = (*SHARED, GRPOArguments, VideoGRPOConfig, ModelConfig)


def main(argv: list[str] | None = None) -> int | None:
    data_args, report, grpo, training_args, model_args = parse(ARGUMENTS, default_config=DEFAULT_CONFIG, argv=argv)
    with only_process(training_args.output_dir):
        return run_stage(data_args, report, grpo, training_args, model_args)


def run_stage(data_args, report, grpo, training_args, model_args) -> int | None:
    if finish_push(training_args):
        return None
    prepare_machine(training_args, tiny_world=data_args.tiny_world)
    data_args, inputs = pin_data(data_args)
    dataset = load_training_rows(data_args, seed=training_args.seed)
    check_truths(grpo.rewards, dataset)
    heldout = load_eval_rows(data_args)

    policy = model_args.model_name_or_path
    if grpo.cold_start:
        cold_start(RECIPES / "sft_video.py", grpo.cold_start, policy, seed=training_args.seed)
    set_seed(training_args.seed)
    model_args, data_args, policy_input = resolve_policy(model_args, data_args)
    model, processor = make_policy(model_args, data_args)
    checkpoint = open_run(training_args.output_dir, data_args, report, grpo, training_args, model_args)
    store = RolloutStore(Path(training_args.output_dir) / "rollouts")
    trainer = VideoGRPOTrainer(
        model=model,
        reward_funcs=reward_functions(grpo.rewards, grpo.reward_kwargs),
        args=training_args,
        train_dataset=dataset,
        processing_class=processor,
        encoder=make_encoder(model, processor, data_args),
        rollout_store=store,
        policy_name=shown_name(policy),  # others are given the rollouts
    )
    return train(
        trainer,
        heldout,
        report,
        checkpoint=checkpoint,
        title="Held-out questions",
        rollouts=store.count,
        inputs={**policy_input, **inputs},
    )


if __name__ == "__main__":
    sys.exit(run(main))
