"""Cases of on_gpu.py: small models compute on the device what they should, in float32 and bfloat16."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from gpu_update import kernel_name, with_adapter
from models import made_up_prompt, question, random_model, striped_clip
from own_positions import use_trained_positions
from trl.trainer.utils import add_fused_lm_head
from update_step import EVERYTHING, Part, differences, over_limits

from veripo_trl.model import inputs
from veripo_trl.model.encoding import EncodedPrompt
from veripo_trl.model.inputs import vision_inputs
from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.build import make_encoder
from veripo_trl.shared_prompt import attention as prefix_attention
from veripo_trl.shared_prompt.rollout import left_pad
from veripo_trl.shared_prompt.scoring import FLOAT32_BOUND, score_completions, score_rows

torch.backends.cudnn.allow_tf32 = False  # the tower's first layer is a convolution
GROUPS, COMPLETION = [3, 2, 1], 12  # completions of each prompt of `small_model`, and the tokens of the longest


def verdict(numbers: dict, ok: bool) -> dict:
    return numbers if ok else {"state": "failed", "message": "too different", **numbers}


def compared(device: str, ours: dict, plain: dict, **more) -> dict:
    """The record of two of `Part.results`."""
    apart = differences(ours, plain)
    if device != "cpu" and "shifted" not in plain:  # other kernels, in another order
        apart["limits"] = {**apart["limits"], "log_probs": FLOAT32_BOUND}
    return verdict({**more, **apart}, not over_limits(apart))


def small_model(device: str, shape: str, dtype: torch.dtype, family: str = "qwen2_5_vl"):
    """A model with TRL's output head, and prompts: a video, text, two videos."""
    model, processor = random_model(shape, device=device, dtype=dtype, family=family)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    model.train()
    data = DataArguments(prompt_template="tiny", min_frames=2, min_pixels=56**2, max_pixels=224**2)
    encoder = make_encoder(model, processor, data)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        clips = [
            striped_clip(folder, frames=frames, height=224, width=width, seed=frames)
            for frames, width in ((12, 224), (4, 448))
        ]
        rows = [question("video", folder, videos=clips[:1]), question("text", folder)]
        prompts = [encoder.encode(row) for row in [*rows, question("two videos", folder, videos=clips)]]
    encoder.loader.close()
    return model, prompts


def completions(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of completions for GROUPS, of unequal lengths."""
    rows = sum(GROUPS)
    ids = torch.randint(100, 250, (rows, COMPLETION), generator=torch.Generator().manual_seed(0))
    lengths = COMPLETION - 2 * torch.arange(rows)[:, None]
    return ids.to(device), (torch.arange(COMPLETION) < lengths).long().to(device)


def attention(device: str, heads: int, key_value_heads: int, size: int, dtype: str) -> dict:
    """The packed kernel and its gradients against torch's public attention, in units of the bound."""
    dtype = getattr(torch, dtype)
    sizes = {"heads": heads, "key_value_heads": key_value_heads, "size": size}
    value = prefix_attention.kernel_difference(**sizes, dtype=dtype, device=device)
    name = kernel_name(torch.empty(1, heads, size, dtype=dtype, device=device))
    return verdict({"difference / bound": value, "kernel": name}, value <= 1 and name != "gathered keys")


def rows(device: str, family: str, shape: str, dtype: str) -> dict:
    """Log-probabilities and gradients of packed groups against plain rows."""
    half = dtype == "bfloat16"
    model, prompts = small_model(device, shape, getattr(torch, dtype), family)
    ids, mask = completions(device)
    repeated = [prompt for prompt, count in zip(prompts, GROUPS, strict=True) for _ in range(count)]
    weights = torch.linspace(-1, 1, ids.numel(), device=device).view(ids.shape)

    def results(shared: bool) -> dict:
        model.zero_grad()
        output = score_completions(model, model, repeated, ids, mask, pad_token_id=0, shared=shared)
        (output.log_probs * weights + 0.1 * output.entropy * weights.flip(0)).sum().backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        return {"log_probs": output.log_probs.detach().float().cpu(), "gradients": gradients}

    ours, plain = results(True), results(False)
    if half:
        for prompt in prompts:  # changes nothing but rounding
            prompt.positions += 17
        plain["shifted"] = results(False)
    return compared(device, ours, plain)


def loss(device: str, part: str, shape: str, dtype: str) -> dict:
    """The trainer's own loss and its gradients: adapter, activation checkpointing, bfloat16 under autocast."""
    half, dtype = dtype == "bfloat16", getattr(torch, dtype)
    made = small_part(part, shape, device, dtype, half=half)
    made.load(made_up_prompt(made.base.config, 56, side=56, dtype=dtype), completion=COMPLETION, group=2)
    found, losses = {}, {}
    for way in ("ours", "plain"):
        made.step(way, EVERYTHING)
        found[way], losses[f"loss, {way}"] = made.results(way), made.loss
    if half:
        found["plain"]["shifted"] = made.shifted_results(EVERYTHING)
    return compared(device, found["ours"], found["plain"], **losses)


def small_part(part: str, shape: str, device: str, dtype: torch.dtype, *, half: bool) -> Part:
    model, processor = random_model(shape, device=device, dtype=dtype)
    return Part(part, with_adapter(model), processor, half=half, checkpointing=True)


@torch.no_grad()
def features(device: str, shape: str) -> dict:
    """Features computed together and held, against each prompt's own; log-probabilities with them and with pixels."""
    model, prompts = small_model(device, shape, torch.float32)
    clips = [prompt for prompt in prompts if prompt.video_grid_thw is not None]
    together = held(model, clips, device)
    for prompt in clips:
        prompt.features = None
    alone = [item for prompt in clips for item in held(model, [prompt], device)]
    apart = max(float((a - b).norm() / b.norm()) for a, b in zip(together, alone, strict=True))
    ids, mask = (tensor[: len(prompts)] for tensor in completions(device))
    arguments = (model, model, prompts, ids, mask)
    with_features = score_rows(*arguments, pad_token_id=0).log_probs
    frozen, inputs.tower_is_frozen = inputs.tower_is_frozen, lambda tower: False
    try:
        with_pixels = score_rows(*arguments, pad_token_id=0).log_probs
    finally:
        inputs.tower_is_frozen = frozen
    log_probs = float((with_features - with_pixels).abs().max())
    return verdict({"features": apart, "log_probs": log_probs}, apart <= 1e-4 and log_probs <= FLOAT32_BOUND)


def held(model, prompts: list[EncodedPrompt], device: str) -> list[torch.Tensor]:
    return list(vision_inputs(model, prompts, device)["mm_encoder_outputs"]["video"].pooler_output)


def positions(device: str, shape: str) -> dict:
    """The model's own rope index, asked for a padded batch on the device, against the encoder's positions."""
    model, prompts = small_model(device, shape, torch.float32)
    use_trained_positions(model)
    ids, mask = (tensor.to(device) for tensor in left_pad(prompts, 0))
    clips = [prompt for prompt in prompts if prompt.video_grid_thw is not None]
    grids = torch.from_numpy(np.concatenate([prompt.video_grid_thw for prompt in clips])).to(device)
    seconds = torch.tensor([second for prompt in clips for second in prompt.second_per_grid_ts], device=device)
    found, deltas = model.model.get_rope_index(
        ids, video_grid_thw=grids, second_per_grid_ts=seconds, attention_mask=mask
    )
    equal = found.device.type == torch.device(device).type
    for row, prompt in enumerate(prompts):
        equal = equal and np.array_equal(found[:, row, -len(prompt) :].cpu().numpy(), prompt.positions)
        equal = equal and int(deltas[row]) + len(prompt) == prompt.next_position
    return verdict({"tokens": int(mask.sum())}, equal)


@torch.no_grad()
def against_cpu(device: str, shape: str) -> dict:
    """Log-probabilities in float32 on the device against the same model's on the CPU, packed and plain."""
    model, prompts = small_model("cpu", shape, torch.float32)
    found = {}
    for place in ("cpu", device):
        model.to(place)
        ids, mask = (tensor[: len(prompts)] for tensor in completions(place))
        for prompt in prompts:
            prompt.features = None
        for shared in (True, False):
            output = score_completions(model, model, prompts, ids, mask, pad_token_id=0, shared=shared)
            found[place, shared] = output.log_probs.cpu()
    expected = found["cpu", False]
    numbers = {
        "packed": float((found[device, True] - expected).abs().max()),
        "plain": float((found[device, False] - expected).abs().max()),
    }
    return verdict(numbers, max(numbers.values()) <= FLOAT32_BOUND)
