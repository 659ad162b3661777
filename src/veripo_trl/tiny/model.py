"""Qwen-VL models of about a million parameters, with a tokenizer trained on the world's templates.

The real classes with shrunk configs, saved and loaded like any checkpoint. The tokenizer belongs to
the checkpoint: trained again on other templates it would permute ids without a word, so load it
from there and never retrain it.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from veripo_trl.model.policy import share_weights
from veripo_trl.tiny.questions import template_texts

KINDS = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Not special: they must outlive decoding with skip_special_tokens=True, which the rewards read.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# The form of Qwen's own templates (roles, vision blocks, generation prompt) without the default system prompt.
# Qwen3-VL's wraps a video alike, and its processor puts timed blocks, one per pair of frames, in place of the pad.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
# Qwen3.5's opens the thinking for the model.
OPENED = CHAT_TEMPLATE.replace("assistant\\n", "assistant\\n<think>\\n")


def build_tokenizer(texts: Iterable[str] = (), tokens: Iterable[str] = ()) -> Qwen2Tokenizer:
    """Train the byte-level BPE tokenizer on the templates, to the end: each of their words is one
    token.

    `texts`: more templates (a relative's questions). `tokens`: more texts that are one token each
    wherever they stand.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000,  # more than the templates have: training ends when every word is whole
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator([*template_texts(), *texts], trainer)
    state = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
    )
    tokenizer.add_tokens(
        [AddedToken(tag, special=False, normalized=False) for tag in (*TAGS, *tokens)]
    )
    return tokenizer


def build_processor(
    kind: str = "qwen2_5_vl", tokenizer: Qwen2Tokenizer | None = None
) -> ProcessorMixin:
    """Build the family's real processor for the tiny world's sizes: frames from one merged patch to
    4 x 4 of them."""
    tokenizer = tokenizer or build_tokenizer()
    if kind == "qwen2_5_vl":
        size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
        vision = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
        image_processor = Qwen2VLImageProcessor(size=size, **vision)
        # Per frame; the cap over a whole video is left to our own video settings.
        video_processor = Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False, **vision)
        return Qwen2_5_VLProcessor(
            image_processor, tokenizer, video_processor, chat_template=CHAT_TEMPLATE
        )
    if kind in ("qwen3_vl", "qwen3_5"):
        size = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
        vision = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
        image_processor = Qwen2VLImageProcessor(
            size=size, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5], **vision
        )
        # Over all frames together.
        total = {"shortest_edge": 2 * 32 * 32, "longest_edge": 128 * 64 * 64}
        video_processor = Qwen3VLVideoProcessor(size=total, cap_pixels_per_frame=False, **vision)
        template = OPENED if kind == "qwen3_5" else CHAT_TEMPLATE
        return Qwen3VLProcessor(image_processor, tokenizer, video_processor, chat_template=template)
    raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")


def build_model(
    kind: str = "qwen2_5_vl", seed: int = 0, tokenizer: Qwen2Tokenizer | None = None
) -> PreTrainedModel:
    """Build an untrained float32 model on the CPU from the seed alone; torch's global random state
    does not move."""
    tokenizer = tokenizer or build_tokenizer()
    model_class = {
        "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": Qwen3VLForConditionalGeneration,
        "qwen3_5": Qwen3_5ForConditionalGeneration,
    }
    if kind not in model_class:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    config = _config(kind, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class[kind]._from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):  # Qwen3.5's: at its first values a state is forgotten within a token
            parameter.data -= 4
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=True)
    return model


def _config(
    kind: str, tokenizer: Qwen2Tokenizer
) -> Qwen2_5_VLConfig | Qwen3VLConfig | Qwen3_5Config:
    ids = dict(
        zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True)
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "intermediate_size": 576,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 4096,
        "initializer_range": 0.05,
        # At the usual theta of 1e6 a head of 32 has hardly any phase left for height and width.
        "rope_parameters": {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "depth": 2,
        "num_heads": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 192,
        "initializer_range": 0.05,
    }
    shared = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }
    if kind == "qwen2_5_vl":
        vision |= {
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 1,
        }
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **shared)
    text["rope_parameters"]["mrope_interleaved"] = True
    vision |= {"patch_size": 16, "num_position_embeddings": 64}
    if kind == "qwen3_5":
        text["rope_parameters"]["partial_rotary_factor"] = 0.5
        text |= {
            "head_dim": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,  # vLLM's CPU build has no kernel for less
            "linear_value_head_dim": 64,
        }
        return Qwen3_5Config(text_config=text, vision_config=vision, **shared)
    text["head_dim"] = 32
    vision["deepstack_visual_indexes"] = [0, 1]
    return Qwen3VLConfig(text_config=text, vision_config=vision, **shared)


def save_tiny_model(
    path: str | os.PathLike,
    kind: str = "qwen2_5_vl",
    seed: int = 0,
    tokenizer: Qwen2Tokenizer | None = None,
) -> Path:
    """Save an untrained model, its generation config, tokenizer and processor into a folder; return
    the folder."""
    path = Path(path)
    processor = build_processor(kind, tokenizer)
    build_model(kind, seed, processor.tokenizer).save_pretrained(path)
    share_weights(path)
    processor.save_pretrained(path)
    # transformers writes one processor_config.json; vLLM reads the video part from a file of its own.
    processor.video_processor.save_pretrained(path)
    return path
