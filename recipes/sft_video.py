"""Cold start: supervised fine-tuning on questions with thinking (`process`), loss on the assistant's tokens only.

    accelerate launch -q recipes/sft_video.py                                       # the tiny world, CPU
    accelerate launch -q recipes/sft_video.py --config video_r1_7b/sft.yaml \\
        --datasets '{"path": "Video-R1-COT-165k.json"}'

Without arguments it trains the embedded tiny model. A run that was broken off goes on from its last checkpoint.
"""

from veripo_trl.start import start

start()  # before torch and peft are imported

import sys
import time
from pathlib import Path

from transformers import set_seed
from trl import ModelConfig

from veripo_trl.data.prompts import check_targets
from veripo_trl.errors import run
from veripo_trl.files.run_folder import only_process
from veripo_trl.recipe.arguments import SHARED, StopArguments, parse
from veripo_trl.recipe.build import make_encoder, make_policy, resolve_policy
from veripo_trl.recipe.console import show_steps
from veripo_trl.recipe.finish import finish, finish_push
from veripo_trl.recipe.held_out import HeldOutEvaluation, StopAtAccuracy
from veripo_trl.recipe.prepare import open_run, prepare_machine
from veripo_trl.recipe.training_rows import hub_inputs, load_eval_rows, load_training_rows, pin_data
from veripo_trl.trainers.sft import VideoSFTConfig, VideoSFTTrainer

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "tiny" / "sft.yaml"
ARGUMENTS = (*SHARED, StopArguments, VideoSFTConfig, ModelConfig)


def main(argv: list[str] | None = None) -> int | None:
    *options, training_args, model_args = parse(ARGUMENTS, default_config=DEFAULT_CONFIG, argv=argv)
    with only_process(training_args.output_dir):
        return train(*options, training_args, model_args)


def train(data_args, report, push, stop, training_args, model_args) -> int | None:
    started = time.time()
    if finish_push(training_args, push):
        return None
    prepare_machine(training_args, tiny_world=data_args.tiny_world)
    data_args = pin_data(data_args)
    dataset = load_training_rows(data_args, seed=training_args.seed)
    heldout = load_eval_rows(data_args)

    set_seed(training_args.seed)
    model_args, data_args = resolve_policy(model_args, data_args)
    model, processor = make_policy(model_args, data_args)
    encoder = make_encoder(model, processor, data_args)
    check_targets(dataset, encoder.template)
    checkpoint = open_run(training_args.output_dir, data_args, report, push, stop, training_args, model_args)
    trainer = VideoSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        processing_class=processor,
        encoder=encoder,
    )
    trainer.started = started
    show_steps(trainer)
    stopper = None
    if stop.stop_at_accuracy is not None:
        stopper = StopAtAccuracy(trainer, report, stop, allow_urls=data_args.allow_urls)
    evaluation = HeldOutEvaluation(trainer, heldout, report, before=False)
    trainer.train(resume_from_checkpoint=checkpoint)
    return finish(
        trainer,
        evaluation,
        title="Cold start on held-out questions",
        push=push,
        development=stopper.history if stopper else [],
        inputs=hub_inputs(data_args, model_args),
    )


if __name__ == "__main__":
    sys.exit(run(main))
