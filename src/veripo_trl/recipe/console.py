"""What a training prints: a short line for each logging step, and no warnings that nobody can act on."""

import logging
import os
import sys
import time
import warnings

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

# Of what a trainer logs, under the name that it is printed with.
SHOWN = {
    "loss": "loss",
    "eval_loss": "held-out loss",
    "mean_token_accuracy": "token accuracy",
    "rewards/accuracies": "chosen preferred",
    "completions/mean_length": "tokens",
}
# transformers warns of its own and of TRL's calls, not of anything that a recipe or its user writes.
DEPRECATIONS = ("`gradient_checkpointing` is deprecated", "`is_gradient_checkpointing` is deprecated")
LOGGED = {  # by the logger: how a message begins
    "transformers.generation.utils": "Passing `generation_config` together with generation-related arguments",
    "transformers.trainer_utils": "mtime may not be reliable on this filesystem",
}


def silence() -> None:
    """Leave out, by their names, the warnings of libraries about each other."""
    for message in DEPRECATIONS:
        warnings.filterwarnings("ignore", message, FutureWarning)
    for logger in LOGGED:
        logging.getLogger(logger).addFilter(_wanted)


def _wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(LOGGED[record.name])


def log_line(logs: dict, *, step: int, max_steps: int, seconds: float) -> str | None:
    """One line for what a trainer logs at a step, or None where nothing of it is shown.

    Args:
        seconds: per step, since the line before.
    """
    rewards = [key for key in logs if key.startswith("rewards/") and key.endswith("/mean")]
    names = {
        key: key.removeprefix("rewards/").removesuffix("/mean").removesuffix("_reward") for key in rewards
    }
    names = {"reward": "reward", **names, **SHOWN}
    if rewards:
        del names["loss"]  # GRPO's is zero but for what clipping and the KL term leave
    values = [f"{name} {float(logs[key]):.4g}" for key, name in names.items() if key in logs]
    if not values:
        return None
    return "  ".join([f"step {step:>{len(str(max_steps))}}/{max_steps}", *values, f"{seconds:.1f} s a step"])


class StepLines(TrainerCallback):
    """Prints a line for each logging step, above the progress bar if there is one."""

    def __init__(self):
        self.last = (0, time.monotonic())  # step and time of the line before

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = (state.global_step, time.monotonic())

    def on_log(self, args, state, control, logs, **kwargs):
        (step, then), now = self.last, time.monotonic()
        seconds = (now - then) / max(state.global_step - step, 1)
        line = log_line(logs, step=state.global_step, max_steps=state.max_steps, seconds=seconds)
        if line is not None and state.is_world_process_zero:
            tqdm.write(line)
            sys.stdout.flush()
        if state.global_step > step:
            self.last = (state.global_step, now)


class Bar(ProgressCallback):
    """transformers' progress bar, without the dictionary of each logging step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


def show_steps(trainer) -> None:
    """Have a trainer print `StepLines` where transformers prints whole dictionaries."""
    bar = trainer.pop_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StepLines())
    # Where bars speak seldom (`start.SELDOM`) there is none: each line would redraw it.
    if bar is not None and os.environ.get("TQDM_DELAY", "0") == "0":
        trainer.add_callback(Bar())
