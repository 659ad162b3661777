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
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainerCallback, set_seed
from trl import ModelConfig

from veripo_trl.data.rows import load_rows
from veripo_trl.errors import run
from veripo_trl.files.run_folder import only_process
from veripo_trl.recipe import stages
from veripo_trl.recipe.console import show_steps
from veripo_trl.trainers.sft import VideoSFTConfig, VideoSFTTrainer

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "tiny" / "sft.yaml"


@dataclass
class StopArguments:
    """Stop a cold start early, to leave room for reinforcement learning."""

    stop_datasets: list[str] | None = field(
        default=None, metadata={"help": "Development rows for the early stop, in the form of `datasets`."}
    )
    stop_at_accuracy: float | None = field(
        default=None, metadata={"help": "Stop once greedy accuracy on the development rows reaches this."}
    )
    stop_check_steps: int = field(default=50, metadata={"help": "Steps between two looks."})


class StopAtAccuracy(TrainerCallback):
    """Ends training once greedy accuracy on development rows is reached.

    What it saw, and so why training ended, is in the checkpoints: a run that is resumed from the end is at its end.
    """

    STATE = "stop_at_accuracy"

    def __init__(self, trainer, dataset, report, *, threshold: float, every: int):
        self.trainer, self.dataset, self.report, self.threshold, self.every = trainer, dataset, report, threshold, every
        self.history: list[dict] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.history = state.stateful_callbacks.setdefault(self.STATE, [])
        control.should_training_stop = bool(self.history) and self.history[-1]["accuracy"] >= self.threshold

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every:
            return
        summary = stages.evaluate_policy(self.trainer, self.dataset, self.report, decoding="greedy")
        self.history.append({"step": state.global_step, **summary})
        if state.is_world_process_zero:
            parts = ", ".join(f"{key.removeprefix('accuracy: ')} {summary[key]:.2f}" for key in summary if ": " in key)
            print(
                f"step {state.global_step}: development accuracy {summary['accuracy']:.3f} ({parts}), "
                f"format {summary['format']:.2f}; stops at {self.threshold}",
                flush=True,
            )
        if summary["accuracy"] >= self.threshold:
            control.should_training_stop = control.should_save = True


ARGUMENTS = (
    stages.DataArguments,
    stages.ReportArguments,
    stages.PushArguments,
    StopArguments,
    VideoSFTConfig,
    ModelConfig,
)


def main(argv: list[str] | None = None) -> int | None:
    arguments = stages.parse(ARGUMENTS, default_config=DEFAULT_CONFIG, argv=argv)
    with only_process(arguments[4].output_dir):
        return train(*arguments)


def train(data_args, report, push, stop, training_args, model_args) -> int | None:
    started = time.time()
    stages.allow_many_open_files()
    stages.use_all_cores(training_args)
    if stages.push_trained(training_args, push):
        return None
    stages.make_tiny_world(data_args, training_args)
    dataset = stages.load_training_rows(data_args, seed=training_args.seed)
    heldout = stages.load_eval_rows(data_args)
    set_seed(training_args.seed)
    stages.see_as_trained(data_args, model_args.model_name_or_path, model_args.model_revision)
    model, processor = stages.make_policy(model_args, data_args)
    trainer = VideoSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        processing_class=processor,
        encoder=stages.make_encoder(model, processor, data_args),
    )
    checkpoint = stages.open_run(training_args.output_dir, accelerator=trainer.accelerator)
    trainer.started = started
    show_steps(trainer)
    arguments = (data_args, push, stop, training_args, model_args)
    stages.save_arguments(training_args.output_dir, *arguments, resumed=checkpoint is not None)
    stopper = None
    if stop.stop_at_accuracy is not None:
        development = load_rows(stop.stop_datasets, shuffle=False, allow_urls=data_args.allow_urls, unique_ids=False)
        stopper = StopAtAccuracy(
            trainer, development, report, threshold=stop.stop_at_accuracy, every=stop.stop_check_steps
        )
        trainer.add_callback(stopper)
    evaluation = None
    if heldout is not None:
        evaluation = stages.HeldOutEvaluation(trainer, heldout, report, before=False)
        trainer.add_callback(evaluation)
    trainer.train(resume_from_checkpoint=checkpoint)
    return stages.finish(
        trainer,
        evaluation,
        title="Cold start on held-out questions",
        extra={
            "development": stopper.history if stopper else [],
            "inputs": stages.hub_inputs(data_args, model_args),
        },
        push=push,
    )


if __name__ == "__main__":
    sys.exit(run(main))
