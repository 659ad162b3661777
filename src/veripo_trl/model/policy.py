"""Which models are supported, and loading the one that a stage trains: full weights, a new LoRA adapter, or the adapter
of the stage before; and what a saved policy says of itself: how it was trained to see, and on which base."""

import hashlib
import json
import logging
import os
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import AutoProcessor, PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
)

from veripo_trl.data.prompts import read_template
from veripo_trl.files.disk import read_json
from veripo_trl.files.tables import write_json
from veripo_trl.hub.locate import is_local
from veripo_trl.media.video import VideoSettings

logger = logging.getLogger(__name__)

# The language model's linear layers. The vision tower has layers of the same names, which stay untouched.
LANGUAGE_MODEL_LINEAR = (
    r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|in_proj_\w+|out_proj)"
)

SETTINGS_FILE = "veripo_trl.json"  # in a policy's folder
# What it says of how the policy was trained to see, and the defaults where a policy says nothing. Pixels are per frame.
SEEING = {
    "prompt_template": "default",
    **{
        setting.name: setting.default
        for setting in fields(VideoSettings)
        if setting.name != "size_factor"
    },
    "max_image_pixels": 1280 * 28 * 28,
}

# What else knows families: positions.py (the rule), features.py, encoding.py, vllm/inputs.py, tiny/model.py (`KINDS`).
SUPPORTED = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
}

# A file's path, or None where it is not.
_find_file = partial(cached_file, _raise_exceptions_for_missing_entries=False)


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
        model_name_or_path: a model of a family in `SUPPORTED`, or the adapter that an earlier stage saved; its base model
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
        ValueError: a model family whose video path this project does not know, options that exclude each other, or a
            base whose weights are not those that the adapter was trained on.
    """
    adapter, base, base_revision, model_type = find_base(model_name_or_path, revision)
    with_adapter = adapter is not None or lora is not None
    if train_vision_tower and with_adapter:
        raise ValueError(
            "train_vision_tower=true was given with a LoRA adapter, which has the language model's layers only: the "
            "vision tower's changes would not be saved. Set train_vision_tower: false, or use_peft: false."
        )
    if quantization_config is not None and not with_adapter and trainable:
        raise ValueError(
            f"{model_name_or_path!r} is to be loaded in 4 or 8 bits without an adapter, and quantized weights cannot "
            f"be trained. Set use_peft: true, or load_in_4bit and load_in_8bit: false."
        )
    base_weights = weights_hash(base, base_revision) if with_adapter else None
    if adapter is not None:
        check_base(model_name_or_path, revision, base, base_weights)
    model = getattr(transformers, SUPPORTED[model_type]).from_pretrained(
        base,
        revision=base_revision,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=attn_implementation,
        quantization_config=quantization_config,
        device_map=device_map,
    )
    if quantization_config is not None:
        keep_weights_unpacked(model)
    if is_deepspeed_zero3_enabled():
        # transformers notes all renamings that it knows there, not those that this model needed, and would save weights
        # as `model.model.…`, which it alone can read.
        vars(model).pop("_weight_conversions", None)
    # An attribute of transformers' that is never saved and no longer filled. vLLM is to load the same revision.
    model.config._commit_hash = base_revision
    processor = AutoProcessor.from_pretrained(base, revision=base_revision, padding_side="left")
    if not train_vision_tower:
        model.model.visual.requires_grad_(False)
    if with_adapter:
        model = _put_adapter(
            model, model_name_or_path, revision, adapter is not None, lora, trainable
        )
        model.base_weights = base_weights  # what `save_settings` records
    return model, processor


def _put_adapter(model, name: str, revision: str | None, saved: bool, lora, trainable: bool):
    """A base model with its adapter: the one that is `saved` under a name, else a new one."""
    from peft import PeftModel, get_peft_model

    if not saved:
        # The adapter records the revision, so that the next stage loads the same base.
        return get_peft_model(model, lora, revision=revision)
    if Path(name).is_dir() and not any(Path(name).glob("adapter_model.*")):
        raise FileNotFoundError(f"{name!r}: expected an adapter's weights, adapter_model.safetensors; there are none.")
    if lora is not None:
        logger.warning(
            "%s is an adapter: it goes on training with its own rank and targets; the LoRA options of this run are not "
            "used.",
            name,
        )
    return PeftModel.from_pretrained(model, name, revision=revision, is_trainable=trainable)


def keep_weights_unpacked(model) -> None:
    """Switch off bitsandbytes' packing of 4-bit weights in `eval()` on some CPUs: packed, they round otherwise and train
    no more."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def copy_adapter_to_reference(model) -> None:
    """Give TRL's reference adapter, if there is one, the values and dtype of the policy's.

    TRL's own copy leaves out adapters of embeddings, and in QLoRA it casts only the trained one to bfloat16: two policies
    that differ by rounding.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if "ref" in parts:
            source = ".".join("default" if part == "ref" else part for part in parts)
            parameter.data = parameters[source].data.clone()


def save_settings(folder: str | Path, encoder, model) -> None:
    """Write beside a saved policy how it was trained to see, and what an adapter's base is."""
    settings = {**asdict(encoder.loader.settings), "max_image_pixels": encoder.max_image_pixels}
    settings = {name: settings.get(name) for name in SEEING} | {
        "prompt_template": asdict(encoder.template)
    }
    write_json(
        Path(folder) / SETTINGS_FILE,
        {**settings, "base_weights": getattr(model, "base_weights", None)},
    )


def read_settings(model_name_or_path: str, revision: str | None = None) -> dict:
    """What `save_settings` wrote of a folder or a repository on the Hub: the keys of `SEEING`, the template a
    `PromptTemplate`, and `base_weights`. An adapter that says nothing sees as its base does; {} where that says nothing
    either.

    Raises:
        FileNotFoundError: no such folder. ValueError: the file is not what `save_settings` writes. OSError: the Hub.
    """
    adapter = adapter_config(model_name_or_path, revision)
    file = _find_file(model_name_or_path, SETTINGS_FILE, revision=revision)
    if file is None:
        base = adapter and adapter.get("base_model_name_or_path")
        return (
            {**read_settings(base, adapter.get("revision")), "base_weights": None} if base else {}
        )
    shown = f"{model_name_or_path}/{SETTINGS_FILE}"
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        numbers = [settings[name] for name in SEEING if name != "prompt_template"]
        if settings.keys() - SEEING.keys() != {"base_weights"} or any(
            type(n) not in (int, float) for n in numbers
        ):
            raise ValueError(f"it has {settings}")
        return settings | {"prompt_template": read_template(settings["prompt_template"], shown)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{shown} is not what this version writes beside a policy ({', '.join(SEEING)}, base_weights): "
            f"{type(error).__name__}: {error}. Put it right, or remove it and give the settings."
        ) from error


def merge_adapter(name: str, folder: str | Path, *, revision: str | None = None, dtype: str = "auto") -> None:
    """Write an adapter merged into its base, with the processor and how it was trained to see, to a new folder.

    Raises:
        ValueError: no adapter, or the folder is there. Otherwise as `load_policy`.
    """
    if find_base(name, revision)[0] is None:
        raise ValueError(f"{name!r}: expected a LoRA adapter (a folder with adapter_config.json); it is a whole model.")
    if Path(folder).exists():
        raise ValueError(f"{str(folder)!r}: expected a folder that is not there yet.")
    model, processor = load_policy(name, revision=revision, dtype=dtype, trainable=False)
    model.merge_and_unload().save_pretrained(folder)
    processor.save_pretrained(folder)
    share_weights(folder)
    settings = read_settings(name, revision)
    if "prompt_template" in settings:  # else neither the adapter nor its base says how it sees
        template = asdict(settings["prompt_template"])
        write_json(Path(folder) / SETTINGS_FILE, {**settings, "prompt_template": template, "base_weights": None})


def check_base(adapter: str, revision: str | None, base: str, base_weights: str | None) -> None:
    """Raise ValueError where an adapter records that it was trained on other weights than its base has now, of the
    `weights_hash` base_weights."""
    if read_settings(adapter, revision).get("base_weights") not in (None, base_weights):
        raise ValueError(
            f"The adapter {adapter!r} was trained on other weights than those of {base!r}: its base is {base!r}, as it "
            f"was then. A merged model, or one that was trained again since, is another. Give the adapter alone as the "
            f"model; where its base lies is base_model_name_or_path in its adapter_config.json."
        )


def weights_hash(model_name_or_path: str, revision: str | None = None) -> str | None:
    """16 hex digits over the first row of every tensor of a saved model, whatever files they lie in: training and merging
    change those. None where there are no safetensors."""
    find = partial(_find_file, model_name_or_path, revision=revision)
    index = None if find(SAFE_WEIGHTS_NAME) else find(SAFE_WEIGHTS_INDEX_NAME)
    names = {SAFE_WEIGHTS_NAME}
    if index:
        names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    rows = {}
    for file in map(find, sorted(names)):
        if file is None:
            return None
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                part = tensors.get_slice(key)
                row = part[:1] if part.get_shape() else tensors.get_tensor(key)  # a scalar has no rows
                rows[key] = hashlib.sha256(row.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def adapter_config(model_name_or_path: str, revision: str | None = None) -> dict | None:
    """The `adapter_config.json` of a local folder or a Hub repository, or None where it is not an adapter.

    Without a network the Hub's local cache is read.

    Raises:
        FileNotFoundError: `model_name_or_path` can only be a folder, and there is none. ValueError: it is empty.
    """
    if not model_name_or_path:
        raise ValueError(
            "No model is given. Set model_name_or_path: a folder, or a model's name on the Hub."
        )
    if _is_missing(model_name_or_path):
        raise FileNotFoundError(
            f"{model_name_or_path!r}: no such folder (looked from {Path.cwd()}). Expected the folder of a saved model "
            "or adapter, or a model's name on the Hub, like 'Qwen/Qwen2.5-VL-3B-Instruct'. Where an earlier stage makes "
            "it (recipes/sft_video.py makes outputs/tiny_sft), run that first."
        )
    file = find_adapter_config_file(model_name_or_path, revision=revision)
    return None if file is None else read_json(file, remedy="Take the adapter from a copy.")


def find_base(model_name_or_path: str, revision: str | None = None) -> tuple:
    """(an adapter's config or None; name, revision and type of the model that is loaded first: itself, or the adapter's
    base), without looking at weights. Raises as `load_policy` does."""
    adapter, base, what = (
        adapter_config(model_name_or_path, revision),
        model_name_or_path,
        repr(model_name_or_path),
    )
    if adapter is not None:
        base, revision = adapter.get("base_model_name_or_path"), adapter.get("revision")
        what = (
            f"{base!r} of the adapter {model_name_or_path!r} (base_model_name_or_path in its adapter_config.json, seen "
            f"from where it was trained)"
        )
    try:
        if base is None or _is_missing(base):
            raise FileNotFoundError("no such folder")
        config, _ = PreTrainedConfig.get_config_dict(base, revision=revision)
        if (model_type := config.get("model_type")) is None:
            raise FileNotFoundError("no config.json with a model_type in it")
    except OSError as error:
        where = f"as a folder (looked from {Path.cwd()}) or from the Hub"
        raise FileNotFoundError(f"{what} cannot be loaded, {where}: {error}") from error
    if model_type not in SUPPORTED:
        raise ValueError(
            f"{base!r} is a model of type {model_type!r} by its config.json. Expected one of {sorted(SUPPORTED)}: "
            f"positions and video inputs are known for these only."
        )
    return adapter, base, revision, model_type


def _is_missing(name: str) -> bool:
    """Whether a name means a folder that is not there: the Hub is never asked for it."""
    return is_local(name) and not Path(name).is_dir()


def share_weights(folder: str | Path) -> None:
    """Give the weights in a folder the mode of other files: safetensors 0.8 writes them for the owner alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in Path(folder).glob("*.safetensors"):
        file.chmod(0o666 & ~umask)
