"""Cold start: supervised fine-tuning on questions with thinking (`process`), loss on the assistant's tokens only.

    accelerate launch -q recipes/sft_video.py                                       # the tiny world, CPU
    accelerate launch -q recipes/sft_video.py --config video_r1/sft.yaml \\
        --datasets '{"path": "Video-R1-COT-165k.json"}'

Without arguments it trains the embedded tiny model. A run that was broken off goes on from its last checkpoint.
"""

from veripo_trl.start import start

start()  # before torch and peft are imported

import sys
from dataclasses import replace
from pathlib import Path

from transformers import set_seed
from trl import ModelConfig

from veripo_trl.data.prompts import check_targets
from veripo_trl.errors import run
from veripo_trl.files.run_folder import only_process
from veripo_trl.recipe.arguments import SHARED, StopArguments, parse
from veripo_trl.recipe.build import make_encoder, make_policy, resolve
from veripo_trl.recipe.finish import finish_push, train
from veripo_trl.recipe.held_out import StopAtAccuracy
from veripo_trl.recipe.prepare import open_run, prepare_machine
from veripo_trl.recipe.training_rows import load_eval_rows, load_training_rows
from veripo_trl.trainers.sft import VideoSFTConfig, VideoSFTTrainer

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "tiny" / "sft.yaml"
ARGUMENTS = (*SHARED, StopArguments, VideoSFTConfig, ModelConfig)


def main(argv: list[str] | None = None) -> int | None:
    data_args, report, stop, training_args, model_args = parse(ARGUMENTS, default_config=DEFAULT_CONFIG, argv=argv)
    with only_process(training_args.output_dir):
        return run_stage(data_args, report, stop, training_args, model_args)


def run_stage(data_args, report, stop, training_args, model_args) -> int | None:
    if finish_push(training_args):
        return None
    prepare_machine(training_args, data_args, model_args)
    model_args, data_args, inputs = resolve(model_args, data_args)
    dataset = load_training_rows(data_args, seed=training_args.seed, output_dir=training_args.output_dir)
    heldout = load_eval_rows(data_args, output_dir=training_args.output_dir)

    set_seed(training_args.seed)
    model, processor = make_policy(model_args, data_args)
    encoder = make_encoder(model, processor, data_args)
    check_targets(dataset, encoder.template)
    checkpoint = open_run(training_args.output_dir, data_args, report, stop, training_args, model_args)
    trainer = VideoSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        processing_class=processor,
        encoder=encoder,
    )
    stopper = StopAtAccuracy(trainer, report, stop, allow_urls=data_args.allow_urls)
    return train(
        trainer,
        heldout,
        replace(report, report_before=False),  # a base model does not know the form of the answers
        checkpoint=checkpoint,
        title="Cold start on held-out questions",
        development=stopper.seen,
        inputs=inputs,
    )


if __name__ == "__main__":
    sys.exit(run(main))
