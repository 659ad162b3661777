"""Checkpoints: resuming with their weights, and pushing them while training goes on."""

import logging
from pathlib import Path

from huggingface_hub import HfApi
from peft import PeftModel
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from .. import hub, hub_runs
from ..hub_cards import model_card
from ..policy import save_settings, share_weights
from ..rows import RowError

logger = logging.getLogger(__name__)


class CheckpointMixin:
    """For a `transformers.Trainer` subclass: put before it among the bases."""

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

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if len(loader) == 0:
            raise RowError(
                f"The {len(self.train_dataset)} training rows fill no batch, so that nothing would be trained. Give more "
                f"rows, or lower per_device_train_batch_size, steps_per_generation or generation_batch_size."
            )
        return loader

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
        if self.args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise hub.HubError(
                f"hub_strategy: expected end or every_save, got {self.args.hub_strategy.value}. Checkpoints hold "
                f"pickled arguments, with paths of this machine: they stay here."
            )
        if self.args.hub_token is not None:
            raise hub.HubError(
                "hub_token: expected none. Every checkpoint's training_args.bin would hold it, and logs of the command "
                "line: set the environment variable HF_TOKEN or log in (`hf auth login`)."
            )
        self.hub_model_id = hub.prepare_repo(
            hub_runs.model_repo(self.args),
            repo_type="model",
            private=self.args.hub_private_repo is not False,
            branch=self.args.hub_revision or "main",
        )
        self.push_in_progress = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint's model in the background: weights, configuration and processor, and nothing else of the
        run's folder. A push that fails is told; the next one, and the last, send what is missing."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.args.hub_always_push:
            self._finish_current_push()
        elif self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        step = self.state.global_step
        results = {"stage": self._name, "steps": step, "model": self.model.config._name_or_path}
        # of its own, because checkpoints are deleted while training goes on
        folder, base = hub_runs.stage_model(
            Path(checkpoint_folder), Path(self.args.output_dir) / "_hub_checkpoint", results
        )
        card = model_card(repo_id=self.hub_model_id, stage=self._name, counts={"optimizer steps": step}, **base)
        job = HfApi().run_as_future(
            hub.push_folder,
            folder,
            self.hub_model_id,
            repo_type="model",
            card=card,
            private=self.args.hub_private_repo is not False,
            message=f"Model after {step} steps, in training",
            branch=self.args.hub_revision or "main",
        )
        job.add_done_callback(lambda job: _tell(job, step))
        self.push_in_progress = PushInProgress([job])


def _tell(job, step: int) -> None:
    if (error := job.exception()) is not None:
        logger.warning("The push of step %d failed; the last push sends what is missing. %s", step, error)
