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
import time
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
from veripo_trl.recipe.console import show_steps
from veripo_trl.recipe.finish import finish, finish_push
from veripo_trl.recipe.held_out import HeldOutEvaluation
from veripo_trl.recipe.prepare import cold_start, open_run, prepare_machine
from veripo_trl.recipe.training_rows import hub_inputs, load_eval_rows, load_training_rows, pin_data
from veripo_trl.trainers.grpo import VideoGRPOConfig, VideoGRPOTrainer

RECIPES = Path(__file__).resolve().parent
DEFAULT_CONFIG = RECIPES / "configs" / "tiny" / "grpo.yaml"
ARGUMENTS = (*SHARED, GRPOArguments, VideoGRPOConfig, ModelConfig)


def main(argv: list[str] | None = None) -> int | None:
    *options, training_args, model_args = parse(ARGUMENTS, default_config=DEFAULT_CONFIG, argv=argv)
    with only_process(training_args.output_dir):
        return train(*options, training_args, model_args)


def train(data_args, report, push, grpo, training_args, model_args) -> int | None:
    started = time.time()
    if finish_push(training_args, push):
        return None
    prepare_machine(training_args, tiny_world=data_args.tiny_world)
    data_args = pin_data(data_args)
    dataset = load_training_rows(data_args, seed=training_args.seed)
    check_truths(grpo.rewards, dataset)
    heldout = load_eval_rows(data_args)

    policy = model_args.model_name_or_path
    if grpo.cold_start:
        cold_start(RECIPES / "sft_video.py", grpo.cold_start, policy, seed=training_args.seed)
    set_seed(training_args.seed)
    model_args, data_args = resolve_policy(model_args, data_args)
    model, processor = make_policy(model_args, data_args)
    checkpoint = open_run(training_args.output_dir, data_args, report, push, grpo, training_args, model_args)
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
    trainer.started = started
    show_steps(trainer)
    evaluation = HeldOutEvaluation(trainer, heldout, report, before=report.report_before)
    trainer.train(resume_from_checkpoint=checkpoint)
    inputs = hub_inputs(data_args, model_args)
    return finish(
        trainer, evaluation, title="Held-out questions", push=push, rollouts=store.count(), inputs=inputs
    )


if __name__ == "__main__":
    sys.exit(run(main))
