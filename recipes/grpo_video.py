"""GRPO on questions about videos, images and text (arXiv 2505.19000, the slow search).

    accelerate launch -q recipes/grpo_video.py                                      # the tiny world, after its cold start
    accelerate launch -q recipes/grpo_video.py --config qwen2_5_vl_3b_lora/grpo.yaml \\
        --datasets '{"path": "Video-R1-260k.json", "where": {"data_type": "video"}}'

Without arguments it trains the tiny model that sft_video.py makes, and evaluates it on held-out clips. A run that was
broken off goes on from its last checkpoint.
"""

from veripo_trl.start import start

start()  # before torch and peft are imported

import sys
from pathlib import Path

from transformers import set_seed
from trl import ModelConfig

from veripo_trl.answers.rewards import check_reward_truths, reward_functions
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.errors import run
from veripo_trl.files.run_folder import only_process
from veripo_trl.hub.cards import shown_name
from veripo_trl.methods import with_methods
from veripo_trl.recipe.arguments import SHARED, GRPOArguments, parse
from veripo_trl.recipe.build import make_encoder, make_policy, resolve
from veripo_trl.recipe.finish import finish_push, train
from veripo_trl.recipe.prepare import open_run, prepare_machine
from veripo_trl.recipe.training_rows import load_eval_rows, load_training_rows
from veripo_trl.trainers.grpo import VideoGRPOConfig, VideoGRPOTrainer

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "tiny" / "grpo.yaml"
ARGUMENTS = (*SHARED, GRPOArguments, VideoGRPOConfig, ModelConfig)


def main(argv: list[str] | None = None) -> int | None:
    arguments = parse(ARGUMENTS, default_config=DEFAULT_CONFIG, argv=argv)
    with only_process(arguments[3].output_dir):
        return run_stage(*arguments)


def run_stage(data_args, report, grpo, training_args, model_args, *options) -> int | None:
    if finish_push(training_args):
        return None
    prepare_machine(training_args, data_args, model_args)
    model_args, data_args, inputs = resolve(model_args, data_args)
    dataset = load_training_rows(data_args, seed=training_args.seed, output_dir=training_args.output_dir)
    check_reward_truths(grpo.rewards, dataset)
    heldout = load_eval_rows(data_args, output_dir=training_args.output_dir)

    set_seed(training_args.seed)
    model, processor = make_policy(model_args, data_args)
    checkpoint = open_run(training_args.output_dir, data_args, report, grpo, training_args, model_args, *options)
    store = RolloutStore(Path(training_args.output_dir) / "rollouts")
    trainer = with_methods(VideoGRPOTrainer, grpo.methods, options)(
        model=model,
        reward_funcs=reward_functions(grpo.rewards, grpo.reward_kwargs),
        args=training_args,
        train_dataset=dataset,
        processing_class=processor,
        encoder=make_encoder(model, processor, data_args),
        rollout_store=store,
        policy_name=shown_name(model_args.model_name_or_path),  # others are given the rollouts
    )
    return train(
        trainer,
        heldout,
        report,
        checkpoint=checkpoint,
        title="Held-out questions",
        rollouts=store.count,
        inputs=inputs,
    )


if __name__ == "__main__":
    sys.exit(run(main))
