"""Checkpoints: written (at a termination too), loaded again with all of a trainer's state."""

import copy
import hashlib
import json
import os
import signal
import time
from collections import defaultdict
from functools import cached_property, partial
from pathlib import Path

import psutil
from peft import PeftModel
from transformers.trainer_utils import HubStrategy

from veripo_trl.data.schema import RowError
from veripo_trl.errors import VeripoError
from veripo_trl.files.run_folder import RECORD, outlive_sigterm, sync_folder
from veripo_trl.hub.ask import HubError
from veripo_trl.hub.push import prepare_repo
from veripo_trl.hub.runs import model_repo
from veripo_trl.model.policy import save_settings, share_weights

# Of the arguments, what decides which rows a step sees.
ORDER = (
    "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "num_generations",
    "steps_per_generation", "num_iterations", "shuffle_dataset",
)  # fmt: skip


class CheckpointMixin:
    """For a `transformers.Trainer` subclass: put before it among the bases.

    Attributes:
        seconds: spent on each part of the work, of all starts of the run together.
        minutes: of all starts, each from the begin of its process.
        terminated: whether SIGTERM has ended the training, with a checkpoint of the step that it came in.
    """

    terminated = False

    def __init__(self, *args, **kwargs):
        # transformers' own saves between gradient and update, each process when its signal comes.
        kwargs["args"] = with_changes(kwargs["args"], enable_jit_checkpoint=False)
        super().__init__(*args, **kwargs)
        self._train_started = time.time()
        self.seconds = defaultdict(float)
        self._earlier = {"minutes": 0.0, "train_s": 0.0, "loss": 0.0}  # of the starts before this one

    @property
    def minutes(self) -> float:
        return self._earlier["minutes"] + (time.time() - psutil.Process().create_time()) / 60

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if len(loader) == 0:
            raise RowError(
                f"The {len(self.train_dataset)} training rows fill no batch, so that nothing would be trained. Give more "
                f"rows, or lower per_device_train_batch_size, steps_per_generation or generation_batch_size."
            )
        loader.base_dataloader.worker_init_fn = partial(outlive_sigterm, then=loader.worker_init_fn)
        return loader

    def _run_epoch(self, **kwargs):
        """An epoch, in which SIGTERM writes a checkpoint; none where the run is at its end already.

        transformers would make one more step of a run that was resumed from its last one.
        """
        self._train_started = kwargs["start_time"]
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        before = signal.signal(signal.SIGTERM, self._note_sigterm)
        try:
            super()._run_epoch(**kwargs)
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    def _note_sigterm(self, *_):
        os.write(2, b"\nSIGTERM: finishing this step, then writing a checkpoint\n")  # print is not safe here
        self.accelerator.set_trigger()

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if not self.terminated and self.accelerator.check_trigger():  # one process's signal ends all
            self.terminated = self.control.should_save = self.control.should_training_stop = True
            self.control.should_evaluate = False
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last that every process writes of a checkpoint; then transformers writes `trainer_state.json`, which says
        that it is whole. Until that the disk has to hold the rest, and the state a list of it."""
        super()._save_rng_state(output_dir)
        sync_folder(output_dir)
        self.accelerator.wait_for_everyone()
        folder = Path(output_dir)
        self.state.stateful_callbacks[RECORD] = {
            "files": {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()},
            "rows": self._rows_of_steps,
            "seconds": dict(self.seconds),
            "minutes": self.minutes,
            "train_s": self._earlier["train_s"] + time.time() - self._train_started,
            "loss": self._earlier["loss"] + self._total_loss_scalar + self._tr_loss.item(),
            "tokens": self._total_train_tokens,
        }

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self._earlier = record = self.state.stateful_callbacks[RECORD]
        then, now = record["rows"], self._rows_of_steps
        if changed := [f"{k}: {then.get(k)} → {now.get(k)}" for k in {**now, **then} if then.get(k) != now.get(k)]:
            raise VeripoError(
                f"{self.args.output_dir} cannot go on from step {self.state.global_step}: its steps would see other rows "
                f"than before ({', '.join(changed)}). Start it as it was; or give another output_dir, and the "
                f"checkpoint as model_name_or_path."
            )
        self.seconds.update(record["seconds"])
        self._total_train_tokens = record["tokens"]

    @cached_property
    def _rows_of_steps(self) -> dict:
        """What decides which rows each step sees."""
        order = {name: value for name, value in vars(self.args).items() if name in ORDER}
        if self.prompt_group is not None:
            order["prompt_parallel"] = self.args.prompt_parallel
        rows = {"rows": len(self.train_dataset), "content of rows": content_hash(self.train_dataset)}
        return {**rows, "processes": self.args.world_size, **order}

    def _finalize_training(self, trial, num_train_samples, start_time):
        self._total_loss_scalar += self._earlier["loss"]
        self._initial_global_step = 0
        return super()._finalize_training(trial, num_train_samples, start_time - self._earlier["train_s"])

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Load a checkpoint's full weights by the model's own loader.

        transformers 5.23 saves Qwen-VL weights under the names of their release (`visual.…`) and its Trainer loads them
        by the names of the module tree (`model.visual.…`), not strictly: nothing is loaded, and the run goes on from
        its first weights with a warning. Adapters and FSDP checkpoints keep transformers' way.

        For adapters that way ends with peft making them float32, where TRL trains the bfloat16 adapters of a quantized
        model: they get back the dtype that they had.
        """
        model = self.model if model is None else model
        if isinstance(model, PeftModel) or self.is_fsdp_enabled:
            dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(dtypes[name])
            return
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict(), strict=True)

    def _load_best_model(self) -> None:
        """The best checkpoint, as resuming loads it: transformers' own way ends in the last weights with a few of it."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """With what the policy says of itself, and without peft's card: ours is written when the run is finished."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            share_weights(folder)
            save_settings(folder, self.encoder, self.model)
            (folder / "README.md").unlink(missing_ok=True)

    def create_model_card(self, *args, **kwargs) -> None:
        """None of TRL's, which knows neither base nor data ("fine-tuned version of None")."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None):
        """Create the run's repository, or say in one error why that cannot be, before hours are spent on training."""
        if not self.is_world_process_zero():
            return
        if self.args.hub_strategy != HubStrategy.END:
            raise HubError(
                f"hub_strategy: expected end, got {self.args.hub_strategy.value}. A run is pushed when it is finished; "
                f"its checkpoints, which hold pickled arguments with paths of this machine, stay here."
            )
        if self.args.hub_token is not None:
            raise HubError(
                "hub_token: expected none. Every checkpoint's training_args.bin would hold it, and logs of the command "
                "line: set the environment variable HF_TOKEN or log in (`hf auth login`)."
            )
        self.hub_model_id = prepare_repo(
            model_repo(self.args),
            repo_type="model",
            private=self.args.hub_private_repo is not False,
            branch=self.args.hub_revision or "main",
        )


def with_changes(args, **changes):
    """A copy of a trainer's arguments with some of them changed, so that the caller's stay as they were given.

    Not `dataclasses.replace`, which would resolve them all once more.
    """
    args = copy.copy(args)
    vars(args).update(changes)
    return args


def content_hash(dataset) -> str:
    """16 hex digits over rows and their order, wherever their media lie."""
    digest = hashlib.sha256()
    columns = [name for name in dataset.column_names if name != "media_root"]
    for batch in dataset.select_columns(columns).iter(1000):
        digest.update(json.dumps(batch, default=str).encode())
    return digest.hexdigest()[:16]
