"""Models with random weights, and questions about a video, of chosen sizes."""

import os
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from veripo_trl.model.encoding import EncodedPrompt, PromptEncoder
from veripo_trl.model.policy import LANGUAGE_MODEL_LINEAR
from veripo_trl.model.positions import mrope_positions
from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.build import make_encoder
from veripo_trl.tiny.clips import FPS, write_clip
from veripo_trl.tiny.model import SPECIAL_TOKENS, build_model, build_processor

SHAPES = {
    "mid": {
        "text": {
            "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
        },
        "vision": {
            "hidden_size": 128, "intermediate_size": 512, "depth": 4, "num_heads": 4, "fullatt_block_indexes": [3],
        },
    },
    "3b": {
        "text": {
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151936,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision": {},
    },
    "7b": {
        "text": {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision": {},
    },
}  # fmt: skip
# Qwen2.5-VL's own tower, the same in all of its sizes but for what it puts out.
VISION = {
    "hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}  # fmt: skip
# What Qwen3-VL has in the place of windows, of times in positions and of a head size that follows from the others.
QWEN3_TEXT = {"head_dim": 64}
QWEN3_VISION = {
    "hidden_size": 128, "intermediate_size": 512, "depth": 4, "num_heads": 4, "patch_size": 16, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "num_position_embeddings": 256, "deepstack_visual_indexes": [1, 2, 3],
}  # fmt: skip
SIDE = {"tiny": 56, "mid": 224, "3b": 308, "7b": 308}  # of a frame, pixels: of Qwen2.5-VL's tokens 4, 64 and 121 a pair


def random_model(
    shape: str, *, device="cpu", dtype: torch.dtype = torch.float32, seed: int = 0, family: str = "qwen2_5_vl"
):
    """A Qwen-VL with random weights, and its processor: the tiny world's, whatever the size of the vocabulary.

    Args:
        shape: "tiny" (the embedded world's), "mid" (text 8 layers × 256, vision 4 × 128), "3b" or "7b".
        family: "qwen2_5_vl", or in the shapes tiny and mid "qwen3_vl".

    Returns:
        (model, processor). The vision tower is frozen, as it is in training by default.
    """
    processor = build_processor(family)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if shape == "tiny":
        model = build_model(family, seed=seed, tokenizer=tokenizer).to(device, dtype)
    else:
        ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
        end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
        sizes = SHAPES[shape]
        text = {
            **sizes["text"], "max_position_embeddings": 32768, "initializer_range": 0.04,
            "bos_token_id": None, "eos_token_id": end, "pad_token_id": pad,
        }  # fmt: skip
        vision = {**VISION, **sizes["vision"]}
        architecture, config_class = Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig
        if family == "qwen3_vl":
            if shape != "mid":
                raise ValueError(f"Expected the shape tiny or mid for {family}, got {shape}.")
            text = {**text, **QWEN3_TEXT, "rope_parameters": {**text["rope_parameters"], "mrope_interleaved": True}}
            vision = QWEN3_VISION
            architecture, config_class = Qwen3VLForConditionalGeneration, Qwen3VLConfig
        config = config_class(
            text_config=text,
            vision_config={**vision, "out_hidden_size": text["hidden_size"]},
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=False,
        )
        torch.manual_seed(seed)
        with torch.device(device):
            model = architecture._from_config(config, dtype=dtype)
        model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=True)
    model.model.visual.requires_grad_(False)
    return model, processor


def lora(**changes) -> LoraConfig:
    """On the language model's linear layers, as the configurations for GPUs have it."""
    return LoraConfig(**{"r": 64, "lora_alpha": 128, "target_modules": LANGUAGE_MODEL_LINEAR, **changes})


def made_up_prompt(config, tokens: int, *, side: int, dtype: torch.dtype, seed: int = 0):
    """An `EncodedPrompt` about one video of random pixels, without a file or a processor, at two frames a second.

    All of its frames are alike: to make billions of random numbers would take longer than what is measured.

    Args:
        config: a Qwen2.5-VL's. tokens: of the whole prompt, from 40 on of text. side: of a frame, in pixels.
    """
    vision, generator = config.vision_config, torch.Generator().manual_seed(seed)
    per_pair = (side // vision.patch_size // vision.spatial_merge_size) ** 2  # tokens of two frames
    pairs = (tokens - 40) // per_pair
    grid = np.array([[pairs, side // vision.patch_size, side // vision.patch_size]])
    text = torch.randint(100, 250, (tokens - pairs * per_pair - 2,), generator=generator).tolist()
    video = [config.video_token_id] * (pairs * per_pair)
    around = [config.vision_start_token_id, *video, config.vision_end_token_id]
    input_ids = np.array([*text[:8], *around, *text[8:]])
    positions = mrope_positions(
        input_ids, image_grid_thw=None, video_grid_thw=grid, second_per_grid_ts=[1.0], config=config
    )
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(grid[0, 1:].prod()), patch, generator=generator).to(dtype).repeat(pairs, 1)
    return EncodedPrompt(
        question_id="made up", input_ids=input_ids, positions=positions, pixel_values=None, image_grid_thw=None,
        pixel_values_videos=pixels, video_grid_thw=grid, second_per_grid_ts=[1.0], media=[], load_s=0.0,
        encode_s=0.0,
    )  # fmt: skip


def question(name: str, folder: Path, **changes) -> dict:
    """A row with a multiple-choice question, about nothing unless `videos` or `images` are given."""
    return {
        "question_id": name,
        "problem": "Which colour is first?",
        "options": ["A. red", "B. blue", "C. green", "D. yellow"],
        "problem_type": "multiple choice",
        "solution": "B",
        "process": None,
        "videos": [],
        "images": [],
        "data_source": "benchmark",
        "media_root": str(folder.resolve()),
        **changes,
    }


def striped_clip(folder: Path, *, frames: int, height: int, width: int, seed: int = 0) -> str:
    """The name of a clip at two frames a second in that folder, written unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{frames}x{height}x{width}-{seed}.mp4"
    if not (folder / name).exists():
        own = folder / f"{os.getpid()}-{name}"  # another process may be making the same clip
        write_clip(own, moving_stripes(frames, height, width, seed=seed))
        own.replace(folder / name)
    return name


def video_questions(
    model, processor, folder: Path, *, prompt_tokens: int, count: int = 1, side: int = 224, **data
) -> tuple[PromptEncoder, list[dict]]:
    """Questions of exactly `prompt_tokens` tokens about one video each, nearly all of them video tokens.

    Args:
        folder: where the clips are written: two frames a second, `side` × `side` pixels, not smaller than they are.
        data: further `DataArguments`.

    Returns:
        (encoder, rows).
    """
    per_pair = (side // 28) ** 2
    pairs = (prompt_tokens - 40) // per_pair
    arguments = {"prompt_template": "tiny", "fps": FPS, "min_frames": 2, "max_frames": 2 * pairs, "decode_threads": 1}
    arguments |= {"min_pixels": side**2, "max_pixels": side**2}
    encoder = make_encoder(model, processor, DataArguments(**{**arguments, **data}))
    rows = []
    for number in range(count):
        clip = striped_clip(folder, frames=2 * pairs, height=side, width=side, seed=number)
        row = question(f"{prompt_tokens}-{number}", folder, videos=[clip])
        rows.append(fill_up(row, encoder, prompt_tokens))
    return encoder, rows


def fill_up(row: dict, encoder: PromptEncoder, prompt_tokens: int) -> dict:
    """The row with so many words after its question that its prompt has `prompt_tokens` tokens."""
    missing = prompt_tokens - len(encoder.encode(row))
    row = {**row, "problem": row["problem"] + " red" * missing}
    found = len(encoder.encode(row))
    if found != prompt_tokens:
        raise RuntimeError(f"A prompt of {prompt_tokens} tokens was asked for, {found} is what came out.")
    return row


def moving_stripes(frames: int, height: int, width: int | None = None, *, seed: int = 0) -> np.ndarray:
    """Coloured stripes that move, with some noise: uint8 (frames, height, width, 3). No two frames are alike."""
    width = width or height
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 24, size=(height, width, 3), dtype=np.uint8)
    y, x = np.mgrid[0:height, 0:width]
    colours = rng.integers(30, 230, size=(8, 3), dtype=np.uint8)
    pictures = np.empty((frames, height, width, 3), dtype=np.uint8)
    for frame in range(frames):
        pictures[frame] = colours[((x + 2 * y + 7 * frame) // 24) % 8] + noise
    return pictures
