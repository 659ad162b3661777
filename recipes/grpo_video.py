"""GRPO on questions about videos, images and text (arXiv 2505.19000, the slow search).

    accelerate launch -q recipes/grpo_video.py                                      # the tiny world, CPU, minutes
    accelerate launch -q recipes/grpo_video.py --config qwen2_5_vl_3b_lora/grpo.yaml \\
        --datasets '{"path": "Video-R1-260k.json", "where": {"data_type": "video"}}'

Without arguments it makes the embedded world, cold-starts the tiny model, trains it and evaluates it on held-out clips.
A run that was broken off goes on from its last checkpoint.
"""

from veripo_trl.start import start

start()  # before torch and peft are imported

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed
from trl import ModelConfig

from veripo_trl.answers.rewards import REWARDS, reward_function
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.errors import ConfigError, VeripoError, run
from veripo_trl.files.run_folder import only_process
from veripo_trl.hub.cards import shown_name
from veripo_trl.recipe import stages
from veripo_trl.recipe.console import show_steps
from veripo_trl.trainers.grpo import VideoGRPOConfig, VideoGRPOTrainer

RECIPES = Path(__file__).resolve().parent
DEFAULT_CONFIG = RECIPES / "configs" / "tiny" / "grpo.yaml"


@dataclass
class GRPOArguments:
    """What this recipe adds to TRL's arguments."""

    rewards: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={
            "help": f"Reward functions: {', '.join(REWARDS)}, or module:function of the working directory or a package. "
            "`reward_weights` weighs them."
        },
    )
    cold_start: str | None = field(
        default=None,
        metadata={"help": "A config of sft_video.py that makes `model_name_or_path`, run first if that is missing."},
    )

    def __post_init__(self):
        names = [reward_function(name).__name__ for name in self.rewards]
        if len(set(names)) < len(names):
            raise ConfigError(f"rewards: expected functions of different names, they are logged by them; got {names}.")


def cold_start(config: str, model_path: str, seed: int) -> None:
    """Make the starting policy with sft_video.py, in a process of its own, unless it is there already."""
    state = PartialState()
    saved = any((Path(model_path) / name).exists() for name in ("config.json", "adapter_config.json"))
    # A cold start that was killed while it saved has a config.json too; finished ones have results.json.
    saved = saved and not (
        (Path(model_path) / "_arguments.json").exists() and not (Path(model_path) / stages.RESULTS).exists()
    )
    if state.is_main_process and not saved:
        command = [sys.executable, str(RECIPES / "sft_video.py"), "--config", config]
        command += ["--output_dir", model_path, "--seed", str(seed)]
        print(f"{model_path} is not there yet. Cold start: {' '.join(command)}", flush=True)
        # A process of its own, not a member of this one's group.
        launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        kept = ("ACCELERATE_", "TORCHELASTIC_", "GROUP_", "ROLE_")
        env = {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith(kept)}
        process = subprocess.Popen(command, env=env)
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # it writes a checkpoint
        code = process.wait()
        signal.signal(signal.SIGTERM, before)
        if code:
            raise VeripoError(f"the cold start ended with exit code {code}, see above. The same command goes on with it.")
    state.wait_for_everyone()


ARGUMENTS = (
    stages.DataArguments,
    stages.ReportArguments,
    stages.PushArguments,
    GRPOArguments,
    VideoGRPOConfig,
    ModelConfig,
)


def main(argv: list[str] | None = None) -> int | None:
    arguments = stages.parse(ARGUMENTS, default_config=DEFAULT_CONFIG, argv=argv)
    with only_process(arguments[4].output_dir):
        return train(*arguments)


def train(data_args, report, push, grpo_args, training_args, model_args) -> int | None:
    started = time.time()
    stages.allow_many_open_files()
    stages.use_all_cores(training_args)
    if stages.push_trained(training_args, push):
        return None
    stages.make_tiny_world(data_args, training_args)
    dataset = stages.load_training_rows(data_args, seed=training_args.seed)
    heldout = stages.load_eval_rows(data_args)
    if grpo_args.cold_start:
        cold_start(grpo_args.cold_start, model_args.model_name_or_path, training_args.seed)
    set_seed(training_args.seed)
    stages.see_as_trained(data_args, model_args.model_name_or_path, model_args.model_revision)
    model, processor = stages.make_policy(model_args, data_args)
    checkpoint = stages.open_run(training_args.output_dir, accelerator=PartialState())
    store = RolloutStore(Path(training_args.output_dir) / "rollouts")
    trainer = VideoGRPOTrainer(
        model=model,
        reward_funcs=[reward_function(name) for name in grpo_args.rewards],
        args=training_args,
        train_dataset=dataset,
        processing_class=processor,
        encoder=stages.make_encoder(model, processor, data_args),
        rollout_store=store,
        # relative: rollouts are given to others
        policy_name=shown_name(os.path.relpath(name) if os.path.isabs(name := model_args.model_name_or_path) else name),
    )
    trainer.started = started
    show_steps(trainer)
    arguments = (data_args, report, push, grpo_args, training_args, model_args)
    stages.save_arguments(training_args.output_dir, *arguments, resumed=checkpoint is not None)
    evaluation = None
    if heldout is not None:
        evaluation = stages.HeldOutEvaluation(trainer, heldout, report, before=report.report_before)
        trainer.add_callback(evaluation)
    trainer.train(resume_from_checkpoint=checkpoint)
    return stages.finish(
        trainer,
        evaluation,
        title="Held-out questions",
        extra={
            "seconds": dict(trainer.seconds),
            "rollouts": store.count(),
            "inputs": stages.hub_inputs(data_args, model_args),
        },
        push=push,
    )


if __name__ == "__main__":
    sys.exit(run(main))
