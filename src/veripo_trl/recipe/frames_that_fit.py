"""How many frames of one video a GPU has memory for in a GRPO step, by what the step holds at its highest.

Bytes of a token follow from the model's sizes; how many times each is held was counted with fake tensors on the real
code path (`speed/fake_memory.py`), with which it agrees for the 3B and the 7B with LoRA (tests_speed/). Nothing is run.
"""

from bisect import bisect
from dataclasses import dataclass, replace

import torch
import transformers
from peft import get_peft_model
from trl import ModelConfig, get_peft_config

from veripo_trl.errors import ConfigError
from veripo_trl.files.tables import print_table
from veripo_trl.model.encoding import PromptEncoder
from veripo_trl.model.pieces import PIECE, WHOLE
from veripo_trl.model.policy import LANGUAGE_MODEL_LINEAR, SUPPORTED
from veripo_trl.options import option

CONTEXT = 2.5e9  # bytes: the driver's, the libraries', the output head's tiles, autocast's copies of an adapter
TEXT = 512  # tokens of a prompt around its video
MOST = 100_000  # frames that are looked at


@dataclass
class MemoryArguments:
    """The settings of GRPO that its memory depends on; named and meant as in the training recipe."""

    gpu_memory: float | None = option(
        "GB of a GPU: print how many frames of a video have room in a GRPO step there, by which option more, and stop."
    )
    num_generations: int = option("Completions per question.", 8)
    max_completion_length: int = option("Longest completion, in tokens.", 512)
    per_device_train_batch_size: int = option("Completions in one update.", 8)
    rollout_batch_size: int | None = option("Completions that are decoded at once.")
    activation_offloading: bool = option("Layer inputs wait in host memory.", False)
    gradient_checkpointing: bool = option("Without it, no long video fits.", True)
    use_vllm: bool = option("Rollouts by vLLM.", False)
    prompt_parallel: int = option("GPUs that compute one prompt together, of which this is one.", 1)


def report_frames(model_args: ModelConfig, memory: MemoryArguments, encoder: PromptEncoder) -> None:
    """Print the table. Raises ConfigError without gradient checkpointing, for numbers below 1, and for Qwen3.5."""
    if not memory.gradient_checkpointing:
        raise ConfigError("--gpu_memory: expected gradient_checkpointing: true, without which no long video fits.")
    if (least := min(memory.num_generations, memory.prompt_parallel)) < 1:
        raise ConfigError(f"--gpu_memory: expected num_generations and prompt_parallel of 1 or more, came {least}.")
    config, settings = encoder.config, encoder.loader.settings
    if config.model_type == "qwen3_5":
        raise ConfigError(
            "--gpu_memory: expected a Qwen2.5-VL or Qwen3-VL; came Qwen3.5, whose linear-attention layers were not "
            "counted: what they hold is up to the kernels that are installed. Measure it on the GPU."
        )
    per_frame = settings.max_pixels // settings.size_factor**2 / config.vision_config.temporal_patch_size
    changes = [
        {},
        {"activation_offloading": True},
        {"rollout_batch_size": 2},
        {"activation_offloading": True, "rollout_batch_size": 2},
    ]
    if memory.use_vllm:
        changes = changes[:2]
    if model_args.use_peft and not model_args.load_in_4bit:
        changes += [{**change, "load_in_4bit": True} for change in (changes[0], changes[-1])]
    table = []
    for change in changes:
        quantized = replace(model_args, load_in_4bit=change.pop("load_in_4bit", model_args.load_in_4bit))
        fits = frames_that_fit(config, quantized, replace(memory, **change), per_frame)
        named = {**change, **({"load_in_4bit": True} if quantized.load_in_4bit > model_args.load_in_4bit else {})}
        with_ = ", ".join(f"{name}: {str(value).lower()}" for name, value in named.items())
        table.append({"with": with_ or "these settings", **fits, "most frames": min(fits.values())})
    print_table(f"Frames of one video of {per_frame:.0f} tokens each, on {memory.gpu_memory:g} GB, computed", table)
    asked = settings.max_frames
    print(f"max_frames is {asked}, which {'fits' if asked <= table[0]['most frames'] else 'does not fit'}.", flush=True)


def frames_that_fit(config, model_args: ModelConfig, memory: MemoryArguments, per_frame: float) -> dict[str, int]:
    """{"update", "rollout"}: the most frames with which each stays within the GPU's memory."""
    text, room = config.get_text_config(), memory.gpu_memory * 1e9 - fixed_bytes(config, model_args)
    answers = memory.per_device_train_batch_size * memory.max_completion_length
    prompts = max(1, memory.per_device_train_batch_size // memory.num_generations) / memory.prompt_parallel

    def largest(fits) -> int:
        pairs = range(1, MOST // 2)
        # Memory grows with frames, but for a step down where the MLP begins to go in pieces.
        step = bisect(pairs, False, key=lambda pair: prompts * (pair * 2 * per_frame + TEXT) + answers > WHOLE)
        for part in (pairs[step:], pairs[:step]):
            if count := bisect(part, False, key=lambda pair: not fits(pair * 2 * per_frame + TEXT)):
                return 2 * part[count - 1]
        return 0

    # Where a prompt is shared out: a layer's keys and values of all of it, gathered and in order, and their gradients.
    gathered = 4 * cache_bytes(text) / text.num_hidden_layers if memory.prompt_parallel > 1 else 0
    found = {"update": largest(lambda n: update_bytes(text, prompts * n, answers, memory) + gathered * n <= room)}
    if memory.use_vllm:
        found["vLLM"] = largest(lambda n: n + memory.max_completion_length <= text.max_position_embeddings)
    else:
        found["rollout"] = largest(lambda n: rollout_bytes(text, n, memory) <= room)
    return found


def fixed_bytes(config, model_args: ModelConfig) -> float:
    """Weights, gradients and AdamW's two moments: of LoRA in float32, of full weights in their own dtype."""
    dtype = config.dtype if model_args.dtype == "auto" else getattr(torch, model_args.dtype or "float32")
    with torch.device("meta"):
        model = getattr(transformers, SUPPORTED[config.model_type])._from_config(config, dtype=dtype)
        model.model.visual.requires_grad_(False)
        linear = sum(p.numel() for n, p in model.model.language_model.layers.named_parameters() if "proj.weight" in n)
        weights = sum(p.numel() for p in model.parameters())
        size, trained = dtype.itemsize, 3 * dtype.itemsize
        if model_args.use_peft:
            targets = model_args.lora_target_modules or LANGUAGE_MODEL_LINEAR
            model, trained = get_peft_model(model, get_peft_config(replace(model_args, lora_target_modules=targets))), 16
    changed = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = linear * (size - 0.55) if model_args.load_in_4bit else 0  # 4 bits and their scales
    return CONTEXT + weights * size - packed + changed * trained


def update_bytes(text, prompts: float, answers: int, memory: MemoryArguments) -> float:
    """A packed update of so many tokens with gradient checkpointing, in half precision: layer inputs, and the layer with
    most at work. The last takes little more of prompts than their keys and values, but its MLP all answers at once."""
    hidden, inner = 2 * text.hidden_size, 2 * text.intermediate_size
    kept = 5 if memory.activation_offloading else 5 + text.num_hidden_layers  # with embeddings and vision features
    any_layer, last = (t * 17.3 * hidden + in_pieces(t) * 6.3 * inner for t in (prompts + answers, answers))
    return (prompts + answers) * kept * hidden + max(any_layer, last + prompts * 9.5 * hidden)


def cache_bytes(text) -> int:
    """Keys and values of a token, in half precision."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * head


def rollout_bytes(text, tokens: float, memory: MemoryArguments) -> float:
    """Prefill of one prompt, then decoding with a copy of its keys and values per completion.

    The prefill is of the whole prompt where that is shared out, too: so it is in float32, and in the check at the start.
    """
    cache, completions = cache_bytes(text), max(1, memory.num_generations // memory.prompt_parallel)
    hidden, inner = 2 * text.hidden_size, 2 * text.intermediate_size
    prefill = tokens * (cache + 9 * hidden) + in_pieces(tokens) * 3 * inner
    at_once = min(completions, memory.rollout_batch_size or completions)
    decode = (tokens + memory.max_completion_length) * cache * at_once
    return max(prefill, decode + tokens * cache * (at_once < completions))


def in_pieces(tokens: float) -> float:
    """Tokens that an MLP works on at once."""
    return tokens if tokens <= WHOLE else PIECE
