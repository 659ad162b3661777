"""Resuming with the weights of the checkpoint."""

from peft import PeftModel


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
