"""Load the model that a stage trains: full weights, a new LoRA adapter, or the adapter of the stage before."""

import json
import logging
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoProcessor

logger = logging.getLogger(__name__)

# The language model's linear layers. The vision tower has layers of the same names, which stay untouched.
LANGUAGE_MODEL_LINEAR = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

SUPPORTED = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


def load_policy(
    model_name_or_path: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    train_vision_tower: bool = False,
    lora=None,
    quantization_config=None,
    device_map=None,
):
    """Load a policy and its processor.

    Args:
        model_name_or_path: a Qwen2.5-VL or Qwen3-VL model, or the adapter that an earlier stage saved; its base model
            is then read from its `adapter_config.json` and the adapter goes on training.
        dtype: "float32", "bfloat16", "float16" or "auto".
        train_vision_tower: otherwise the whole vision tower, merger included, is frozen.
        lora: a `peft.LoraConfig` for a new adapter, or None for full fine-tuning. Ignored, with a message, where
            `model_name_or_path` is an adapter: one adapter continues through the stages.
        quantization_config: a `BitsAndBytesConfig` for QLoRA.

    Returns:
        (model, processor). The processor pads on the left, as generation needs.

    Raises:
        ValueError: a model family whose video path this project does not know.
    """
    adapter = adapter_config(model_name_or_path, revision)
    base = adapter["base_model_name_or_path"] if adapter else model_name_or_path
    config = AutoConfig.from_pretrained(base, revision=None if adapter else revision)
    if config.model_type not in SUPPORTED:
        raise ValueError(
            f"{base!r} is a model of type {config.model_type!r}. Expected one of {sorted(SUPPORTED)}: positions and "
            f"video inputs are known for these only."
        )
    architecture = getattr(transformers, SUPPORTED[config.model_type])
    model = architecture.from_pretrained(
        base,
        revision=None if adapter else revision,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=attn_implementation,
        quantization_config=quantization_config,
        device_map=device_map,
    )
    processor = AutoProcessor.from_pretrained(base, revision=None if adapter else revision, padding_side="left")
    model.model.visual.requires_grad_(train_vision_tower)
    if adapter:
        from peft import PeftModel

        if lora is not None:
            logger.warning(
                "%s is an adapter: it goes on training with its own rank and targets; the LoRA options of this run "
                "are not used.",
                model_name_or_path,
            )
        model = PeftModel.from_pretrained(model, model_name_or_path, revision=revision, is_trainable=True)
    elif lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora)
    return model, processor


def adapter_config(model_name_or_path: str, revision: str | None = None) -> dict | None:
    """The `adapter_config.json` of a local folder or a Hub repository, or None where it is not an adapter."""
    local = Path(model_name_or_path)
    if local.is_dir():
        file = local / "adapter_config.json"
        return json.loads(file.read_text()) if file.is_file() else None
    from huggingface_hub import file_exists, hf_hub_download

    if not file_exists(model_name_or_path, "adapter_config.json", revision=revision):
        return None
    return json.loads(Path(hf_hub_download(model_name_or_path, "adapter_config.json", revision=revision)).read_text())
