"""DPO on preference pairs that verify_rollouts.py made of a GRPO run's rollouts (arXiv 2505.19000, the fast alignment).

    accelerate launch -q recipes/dpo_video.py                                       # the tiny world, after its GRPO run
    accelerate launch -q recipes/dpo_video.py --config qwen2_5_vl_3b_lora/dpo.yaml \\
        --model_name_or_path outputs/qwen2_5_vl_3b_grpo --pairs '{"path": "my-org/my-pairs", "media_root": "clips"}'

`model_name_or_path` is the policy that made the rollouts; a warning names another. It is the reference too: its full
weights, or, where it is an adapter, a frozen copy of that. A run that was broken off goes on from its last checkpoint.
"""

from veripo_trl.start import start

start()  # before torch and peft are imported

import sys
from pathlib import Path

from peft import PeftModel
from transformers import set_seed
from trl import ModelConfig

from veripo_trl.data.media_paths import check_media
from veripo_trl.data.prompts import load_template
from veripo_trl.errors import run
from veripo_trl.files.run_folder import only_process
from veripo_trl.recipe.arguments import SHARED, PairArguments, parse
from veripo_trl.recipe.build import make_encoder, make_policy, resolve
from veripo_trl.recipe.finish import finish_push, train
from veripo_trl.recipe.prepare import open_run, prepare_machine
from veripo_trl.recipe.training_rows import count_kinds, load_eval_rows, refuse_trained
from veripo_trl.trainers.dpo import VideoDPOConfig, VideoDPOTrainer
from veripo_trl.verifier.pair_dataset import load_pairs

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "tiny" / "dpo.yaml"
ARGUMENTS = (*SHARED, PairArguments, VideoDPOConfig, ModelConfig)


def main(argv: list[str] | None = None) -> int | None:
    data_args, report, pair_args, training_args, model_args = parse(ARGUMENTS, default_config=DEFAULT_CONFIG, argv=argv)
    with only_process(training_args.output_dir):
        return run_stage(data_args, report, pair_args, training_args, model_args)


def run_stage(data_args, report, pair_args, training_args, model_args) -> int | None:
    if finish_push(training_args):
        return None
    prepare_machine(training_args, data_args, model_args)
    model_args, data_args, inputs = resolve(model_args, data_args)
    template = load_template(data_args.prompt_template)
    pairs, pair_inputs = load_pairs(
        pair_args.pairs, template=template, allow_urls=data_args.allow_urls, policy=model_args.model_name_or_path
    )
    if training_args.process_index == 0:
        check_media(pairs, allow_urls=data_args.allow_urls)
    heldout = load_eval_rows(data_args, output_dir=training_args.output_dir)
    refuse_trained(heldout, pairs, holdout=data_args.holdout)
    kinds = count_kinds(pairs)

    set_seed(training_args.seed)
    model, processor = make_policy(model_args, data_args)
    reference = None if isinstance(model, PeftModel) else make_policy(model_args, data_args)[0]
    checkpoint = open_run(training_args.output_dir, data_args, report, pair_args, training_args, model_args)
    trainer = VideoDPOTrainer(
        model=model,
        ref_model=reference,
        args=training_args,
        train_dataset=pairs,
        processing_class=processor,
        encoder=make_encoder(model, processor, data_args),
    )
    return train(
        trainer,
        heldout,
        report,
        checkpoint=checkpoint,
        title="Held-out questions",
        pairs=kinds,
        inputs=inputs | pair_inputs,
    )


if __name__ == "__main__":
    sys.exit(run(main))
