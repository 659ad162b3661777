"""What a training prints: a short line for each logging step, and no warnings that nobody can act on."""

import logging
import os
import sys
import time
import warnings

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

# Of what a trainer logs, under the name that it is printed with. GRPO's loss, zero but for clipping and KL, is not.
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


class StepLines(TrainerCallback):
    """Prints a short line for each logging step, above the progress bar if there is one."""

    def __init__(self):
        self.last = (0, time.monotonic())  # step and time of the line before

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = (state.global_step, time.monotonic())

    def on_log(self, args, state, control, logs, **kwargs):
        names = {"reward": "reward"}
        for key in logs:
            if key.startswith("rewards/") and key.endswith("/mean"):
                names[key] = key.removeprefix("rewards/").removesuffix("/mean").removesuffix("_reward")
        names |= SHOWN if len(names) == 1 else {key: SHOWN[key] for key in SHOWN if key != "loss"}
        values = [f"{name} {float(logs[key]):.4g}" for key, name in names.items() if logs.get(key) is not None]
        (step, then), now = self.last, time.monotonic()
        if values and state.is_world_process_zero:
            place = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
            seconds = (now - then) / max(state.global_step - step, 1)
            tqdm.write("  ".join([place, *values, f"{seconds:.1f} s a step"]))
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
