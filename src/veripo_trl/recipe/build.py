"""A stage's policy and its encoder, made of its options: which commit, how it was trained to see, how it is loaded."""

import logging
import os
import sys
from dataclasses import replace

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from trl import ModelConfig, get_peft_config, get_quantization_config

from veripo_trl.data.prompts import load_template
from veripo_trl.errors import ConfigError, settings_checked
from veripo_trl.hub.locate import locate
from veripo_trl.media.video import VideoLoader, VideoSettings
from veripo_trl.model.encoding import PromptEncoder
from veripo_trl.model.policy import LANGUAGE_MODEL_LINEAR, SEEING, load_policy, read_settings
from veripo_trl.recipe.arguments import DataArguments

logger = logging.getLogger(__name__)


@settings_checked()
def resolve(model_args: ModelConfig, data_args: DataArguments) -> tuple[ModelConfig, DataArguments, dict]:
    """The arguments with the commits of all that they read from the Hub, asked once for all processes, and with how the
    policy was trained to see (`see_as_trained`).

    Returns:
        They, and {"model" or a dataset's path: {"repo_id", "revision"}} of what is read there.
    """
    name, found = model_args.model_name_or_path, [None]
    if PartialState().is_main_process:
        origin = locate(name, "model", revision_of(model_args)) if name else None
        inputs = {"model": origin} if origin else {}
        sources = {key: getattr(data_args, key) for key in ("datasets", "eval_datasets")}
        pinned = {key: given and [_pinned(source, inputs) for source in given] for key, given in sources.items()}
        found = [(pinned, inputs)]
    pinned, inputs = broadcast_object_list(found)[0]
    if "model" in inputs:
        model_args = replace(model_args, model_revision=inputs["model"]["revision"])
    data_args = see_as_trained(replace(data_args, **pinned), name, revision_of(model_args))
    return model_args, data_args, inputs


def _pinned(source: dict, inputs: dict) -> dict:
    """A source of rows with its commit, which is noted in `inputs`."""
    origin = locate(source.get("path", ""), "dataset", source.get("revision"))
    if origin is None:
        return source
    inputs[source["path"]] = origin
    return {**source, "revision": origin["revision"]}


def revision_of(model_args: ModelConfig) -> str | None:
    """None for TRL's default, which is left to the Hub."""
    return None if model_args.model_revision == "main" else model_args.model_revision


@settings_checked()
def see_as_trained(
    data_args: DataArguments, name: str, revision: str | None = None, *, defaults: dict = SEEING
) -> DataArguments:
    """The arguments with template and frame settings for those that are not given: as the policy was trained, else the
    defaults. Says what it took from the policy and what by default, and warns of what is given and differs."""
    trained, filled, taken, by_default, differing = read_settings(name, revision), {}, [], [], []
    for key, default in defaults.items():
        given, own = getattr(data_args, key), trained.get(key)
        if given is None:
            filled[key] = default if own is None else own
        template = key == "prompt_template" and own is not None
        shown = f"{key} {own.name if template else own}"
        if own is None and given is None:
            by_default.append(f"{key} {default}")
        elif given is None:
            taken.append(shown)
        elif own is not None and (load_template(given).hash != own.hash if template else given != own):
            differing.append(f"{shown} (here {given})")
    if int(os.environ.get("RANK", "0")) == 0:
        if taken:
            print(f"{name}: as it was trained: {', '.join(taken)}", file=sys.stderr, flush=True)
        if by_default:
            message = f"{name} has no veripo_trl.json of how it was trained; by default: {', '.join(by_default)}"
            print(message, file=sys.stderr, flush=True)
        if differing:
            logger.warning("%s was trained with %s: it does not see here as it did there.", name, ", ".join(differing))
    return replace(data_args, **filled)


@settings_checked()
def make_policy(model_args: ModelConfig, data_args: DataArguments):
    """The model and processor of a stage, see `policy.load_policy`. LoRA targets the language model by default."""
    if model_args.use_peft and model_args.lora_target_modules is None:
        model_args = replace(model_args, lora_target_modules=LANGUAGE_MODEL_LINEAR)
    quantization = get_quantization_config(model_args)
    return load_policy(
        model_args.model_name_or_path,
        revision=revision_of(model_args),
        dtype=model_args.dtype or "float32",
        attn_implementation=model_args.attn_implementation,
        train_vision_tower=data_args.train_vision_tower,
        lora=get_peft_config(model_args),
        quantization_config=quantization,
        device_map={"": torch.cuda.current_device()} if quantization and torch.cuda.is_available() else None,
    )


def make_encoder(model, processor, data_args: DataArguments) -> PromptEncoder:
    """The encoder of a stage: template, frame sampling and limits from its arguments, sizes from its model."""
    return encoder_from_config(model.config, processor, data_args, pixel_dtype=model.dtype)


@settings_checked()
def encoder_from_config(config, processor, data_args: DataArguments, *, pixel_dtype=torch.float32) -> PromptEncoder:
    """As `make_encoder`, where no weights are loaded."""
    vision = config.vision_config
    if processor.chat_template is None:
        raise ConfigError("The model has no chat template: expected an instruction-tuned Qwen-VL, or a policy of one.")
    seeing = SEEING | {key: value for key in SEEING if (value := getattr(data_args, key)) is not None}
    template, max_image_pixels = seeing.pop("prompt_template"), seeing.pop("max_image_pixels")
    loader = VideoLoader(
        VideoSettings(**seeing, size_factor=vision.patch_size * vision.spatial_merge_size),
        cache_dir=data_args.frame_cache,
        cache_max_bytes=int(data_args.frame_cache_gb * 1e9),
        timeout_s=data_args.decode_timeout_s,
        backend=data_args.video_backend,
        decode_threads=data_args.decode_threads,
    )
    return PromptEncoder(
        processor,
        config,
        template=load_template(template),
        loader=loader,
        max_image_pixels=max_image_pixels,
        max_prompt_tokens=data_args.max_prompt_tokens,
        pixel_dtype=pixel_dtype,
        allow_urls=data_args.allow_urls,
    )
