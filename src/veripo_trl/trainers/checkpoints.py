"""Resuming with the weights of the checkpoint."""

from peft import PeftModel


class CheckpointMixin:
    """For a `transformers.Trainer` subclass: put before it among the bases."""

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Load a checkpoint's full weights by the model's own loader.

        transformers 5.23 saves Qwen-VL weights under the names of their release (`visual.…`) and its Trainer loads them
        by the names of the module tree (`model.visual.…`), not strictly: nothing is loaded, and the run goes on from
        its first weights with a warning. Adapters and FSDP checkpoints keep transformers' way.
        """
        model = self.model if model is None else model
        if isinstance(model, PeftModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict(), strict=True)
