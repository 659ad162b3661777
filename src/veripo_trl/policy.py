"""Load the model that a stage trains: full weights, a new LoRA adapter, or the adapter of the stage before."""

import json
import logging
import re
from pathlib import Path

import torch
import transformers
from transformers import AutoProcessor, PreTrainedConfig
from transformers.utils import find_adapter_config_file

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
    trainable: bool = True,
):
    """Load a policy and its processor.

    Args:
        model_name_or_path: a Qwen2.5-VL or Qwen3-VL model, or the adapter that an earlier stage saved; its base model
            is then read from its `adapter_config.json` and the adapter goes on training. Folders are looked for from
            the working directory.
        revision: of `model_name_or_path` on the Hub; an adapter's base has the revision that the adapter recorded.
        dtype: "float32", "bfloat16", "float16" or "auto".
        train_vision_tower: otherwise the whole vision tower, merger included, is frozen. For full weights only.
        lora: a `peft.LoraConfig` for a new adapter, or None for full fine-tuning. Ignored, with a message, where
            `model_name_or_path` is an adapter: one adapter continues through the stages.
        quantization_config: a `BitsAndBytesConfig` for QLoRA. An adapter does not record it: give it again.
        trainable: False where nothing is trained: an adapter is then frozen, and full weights may be quantized.

    Returns:
        (model, processor). The processor pads on the left, as generation needs.

    Raises:
        FileNotFoundError: no such model, adapter or base of an adapter.
        ValueError: a model family whose video path this project does not know, or options that exclude each other.
    """
    adapter = adapter_config(model_name_or_path, revision)
    with_adapter = adapter is not None or lora is not None
    if train_vision_tower and with_adapter:
        raise ValueError(
            "train_vision_tower=true was given with a LoRA adapter, which holds the language model's layers only: the "
            "vision tower's changes would not be saved. Set train_vision_tower: false, or train full weights "
            "(use_peft: false)."
        )
    if quantization_config is not None and not with_adapter and trainable:
        raise ValueError(
            f"{model_name_or_path!r} is to be loaded in 4 or 8 bits without an adapter, and quantized weights cannot "
            f"be trained. Set use_peft: true, or load_in_4bit and load_in_8bit: false."
        )
    base, base_revision, model_type = _base_model(model_name_or_path, revision, adapter)
    if model_type not in SUPPORTED:
        raise ValueError(
            f"{base!r} is a model of type {model_type!r}. Expected one of {sorted(SUPPORTED)}: positions and "
            f"video inputs are known for these only."
        )
    architecture = getattr(transformers, SUPPORTED[model_type])
    model = architecture.from_pretrained(
        base,
        revision=base_revision,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=attn_implementation,
        quantization_config=quantization_config,
        device_map=device_map,
    )
    # Transformers has a place for it, never saved, and fills it no more. vLLM is to load the same one.
    model.config._commit_hash = base_revision
    processor = AutoProcessor.from_pretrained(base, revision=base_revision, padding_side="left")
    if not train_vision_tower:
        model.model.visual.requires_grad_(False)
    if adapter is not None:
        from peft import PeftModel

        if lora is not None:
            logger.warning(
                "%s is an adapter: it goes on training with its own rank and targets; the LoRA options of this run "
                "are not used.",
                model_name_or_path,
            )
        model = PeftModel.from_pretrained(model, model_name_or_path, revision=revision, is_trainable=trainable)
    elif lora is not None:
        from peft import get_peft_model

        # The adapter records the revision, so that the next stage loads the same base.
        model = get_peft_model(model, lora, revision=revision)
    return model, processor


def adapter_config(model_name_or_path: str, revision: str | None = None) -> dict | None:
    """The `adapter_config.json` of a local folder or a Hub repository, or None where it is not an adapter.

    Without a network the Hub's local cache is read.

    Raises:
        FileNotFoundError: `model_name_or_path` can only be a folder, and there is none. ValueError: it is empty.
    """
    if not model_name_or_path:
        raise ValueError("No model is given. Set model_name_or_path: a folder, or a model's name on the Hub.")
    if not Path(model_name_or_path).is_dir() and looks_local(model_name_or_path):
        raise FileNotFoundError(
            f"{model_name_or_path!r}: no such folder (looked from {Path.cwd()}). Expected the folder of a saved model "
            f"or adapter, or a model's name on the Hub, like 'Qwen/Qwen2.5-VL-3B-Instruct'."
        )
    file = find_adapter_config_file(model_name_or_path, revision=revision)
    return None if file is None else json.loads(Path(file).read_text())


def looks_local(name: str) -> bool:
    """Whether a name can only mean a folder: it is no Hub id (`name` or `owner/name`), or lies in `outputs/`."""
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) is None or name.startswith("outputs/")


def _base_model(model_name_or_path: str, revision: str | None, adapter: dict | None):
    """(name, revision, model type) of the model that is loaded first: itself, or an adapter's base."""
    base = model_name_or_path
    if adapter is not None:
        base, revision = adapter.get("base_model_name_or_path"), adapter.get("revision")
    if not base:
        reason = "it names none"
    elif not Path(base).is_dir() and looks_local(base):
        reason = "no such folder"
    else:
        try:
            model_type = PreTrainedConfig.get_config_dict(base, revision=revision)[0].get("model_type")
            if model_type is not None:
                return base, revision, model_type
            reason = "no config.json with a model_type in it"
        except OSError as error:
            reason = f"{'' if Path(base).is_dir() else 'no such folder, and as a name on the Hub: '}{error}"
    if adapter is None:
        raise FileNotFoundError(f"{base!r} (looked from {Path.cwd()}): {reason}")
    raise FileNotFoundError(
        f"The base model {base!r} of the adapter {model_name_or_path!r} cannot be loaded (looked from {Path.cwd()}): "
        f"{reason}. Start where the adapter was trained, or correct base_model_name_or_path in its "
        f"adapter_config.json."
    )
