"""Vision features of prompts, computed once by a frozen tower and cached with the prompt."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from types import SimpleNamespace
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
PATCHES_AT_ONCE = 65_536  # of the tower, in one call: 16,384 tokens, some 1.3 GB on the device
# Per frozen tower: another one, both towers' versions at the time, and whether their weights were equal.
_COMPARED: WeakKeyDictionary = WeakKeyDictionary()


@dataclass
class CachedFeatures:
    """One prompt's features, by kind. On the host: 8,000 tokens of a 7B model in bfloat16 are 59 MB.

    Attributes:
        version: the tower's `tower_version` when it computed them.
        items: kind -> per image or video (tokens, size). levels: kind -> per depth the same, for Qwen3-VL.
    """

    version: int
    items: dict[str, list[torch.Tensor]]
    levels: dict[str, list[list[torch.Tensor]]]


def tower_is_frozen(tower) -> bool:
    """Whether a vision tower's features are the same at every call: nothing in it is trained, no adapter switched."""
    if any(parameter.requires_grad for parameter in tower.parameters()):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return not any(isinstance(module, BaseTunerLayer) for module in tower.modules())


def tower_version(tower) -> int:
    """A number that grows with every change of a weight in place: an optimizer's step, a loaded checkpoint."""
    return sum(parameter._version for parameter in tower.parameters())


def cached_features(model, prompts: list, device) -> dict:
    """`mm_encoder_outputs` for a forward over `prompts`, in row order; computes what is not cached with a prompt yet.

    Args:
        model: the unwrapped Qwen-VL model, with a frozen vision tower.
    """
    tower = model.model.visual
    unique = {id(prompt): prompt for prompt in prompts}
    found = {key: find(prompt, tower) for key, prompt in unique.items()}
    missing = [unique[key] for key, cached in found.items() if cached is None]
    if missing:
        compute(model, missing, device)
        found |= {id(prompt): prompt.features[tower] for prompt in missing}
    outputs = {}
    on_device = cache(lambda tensor: tensor.to(device, non_blocking=True))  # rows of a group share theirs there, too
    rows = [found[id(prompt)] for prompt in prompts]
    for kind in PIXELS:
        own = [cached for cached in rows if kind in cached.items]
        if not own:
            continue
        items = tuple(on_device(item) for cached in own for item in cached.items[kind])
        outputs[kind] = SimpleNamespace(pooler_output=items)
        if kind in own[0].levels:  # Qwen3-VL feeds features of several depths to its first layers
            outputs[kind].deepstack_features = [
                tuple(on_device(item) for cached in own for item in cached.levels[kind][depth])
                for depth in range(len(own[0].levels[kind]))
            ]
    return {"mm_encoder_outputs": outputs} if outputs else {}


def find(prompt, tower) -> CachedFeatures | None:
    """Features that `tower`, or another frozen one with the same weights, made of a prompt; None if they are stale."""
    if prompt.features is None:
        return None
    for other, cached in prompt.features.items():
        if cached.version == tower_version(other) and (other is tower or same_weights(tower, other)):
            return cached
    return None


def same_weights(tower, other) -> bool:
    """Whether two frozen towers are equal, as the policy's and the reference's from one checkpoint are. Compared once."""
    if not tower_is_frozen(other):
        return False
    versions = tower_version(tower), tower_version(other)
    known = _COMPARED.get(tower)
    if known is None or known[0]() is not other or known[1] != versions:
        pairs = zip(tower.parameters(), other.parameters(), strict=False)
        equal = [p.shape for p in tower.parameters()] == [p.shape for p in other.parameters()] and all(
            # Sharded weights are empty here: nothing can be said about them.
            a.numel() > 0 and (a.device, a.dtype) == (b.device, b.dtype) and torch.equal(a, b)
            for a, b in pairs
        )
        _COMPARED[tower] = known = (ref(other), versions, equal)
    return known[2]


def media_kinds(prompts: list) -> int:
    """Of how many kinds, image and video, the media of some prompts are: a trained tower runs once for each."""
    return sum(any(getattr(prompt, f"{kind}_grid_thw") is not None for prompt in prompts) for kind in PIXELS)


def media_inputs(prompts: list, device) -> dict[str, torch.Tensor]:
    """The vision tensors of a batch, in row order, moved to `device`."""
    inputs = {}
    for kind, pixels in PIXELS.items():
        if given := [prompt for prompt in prompts if getattr(prompt, f"{kind}_grid_thw") is not None]:
            grid = np.concatenate([getattr(prompt, f"{kind}_grid_thw") for prompt in given])
            values = torch.cat([getattr(prompt, pixels) for prompt in given])
            inputs[pixels] = values.to(device, non_blocking=True)
            inputs[f"{kind}_grid_thw"] = torch.from_numpy(grid).to(device)
    return inputs


@torch.no_grad()
def compute(model, prompts: list, device) -> None:
    """Run the tower on the media of `prompts`, and give each prompt its own features."""
    tower = model.model.visual
    version = tower_version(tower)
    for prompt in prompts:
        prompt.features = WeakKeyDictionary() if prompt.features is None else prompt.features
        prompt.features[tower] = CachedFeatures(version, {}, {})
    for kind, pixels in PIXELS.items():
        given = [prompt for prompt in prompts if getattr(prompt, f"{kind}_grid_thw") is not None]
        if not given:
            continue
        if gone := [prompt.question_id for prompt in given if getattr(prompt, pixels) is None]:
            raise RuntimeError(f"Rows {gone}: their features are of other weights, and their pixels are gone.")
        grids = [getattr(prompt, f"{kind}_grid_thw") for prompt in given]
        # views, one per image or video
        values = [getattr(p, pixels).split(g.prod(1).tolist()) for p, g in zip(given, grids, strict=True)]
        found, *levels = run_tower(model, kind, list(chain(*values)), np.concatenate(grids), device)
        for prompt, grid in zip(given, grids, strict=True):
            cached = prompt.features[tower]
            cached.items[kind] = [next(found) for _ in grid]
            if levels:
                cached.levels[kind] = [[next(level) for _ in grid] for level in levels]


@torch.no_grad()
def run_tower(model, kind: str, pixels: list[torch.Tensor], grid: np.ndarray, device) -> list[Iterator[torch.Tensor]]:
    """A tower's features of images or videos, on the host, by calls of at most PATCHES_AT_ONCE patches each.

    The tower's attention stays within a temporal step, so a longer video is cut between two of them, which changes
    nothing but, at most, rounding. What is not being encoded stays on the host.

    Args:
        pixels: (patches, patch size) per item. grid: int64 array (items, 3).

    Returns:
        (tokens, size) of each item, and for Qwen3-VL the same for each of the depths whose features it feeds in.
    """
    features = model.get_image_features if kind == "image" else model.get_video_features
    found: list[list[list[torch.Tensor]]] = []
    for call in cut_along_time(grid, PATCHES_AT_ONCE):
        parts, sizes = [], []
        for item, first, steps in call:
            _, height, width = grid[item]
            parts.append(pixels[item][first * height * width : (first + steps) * height * width])
            sizes.append([steps, height, width])
        # In the tower's own dtype, whoever asks first: a rollout runs without the autocast of the update.
        with torch.autocast(torch.device(device).type, enabled=False):
            output = features(torch.cat(parts).to(device, non_blocking=True), torch.tensor(np.array(sizes)).to(device))
        outputs = [output.pooler_output, *(output.get("deepstack_features") or [])]
        found = found or [[[] for _ in grid] for _ in outputs]
        for own, level in zip(found, outputs, strict=True):
            for (item, *_), tokens in zip(call, level, strict=True):
                own[item].append(tokens.cpu())
    return [iter([parts[0] if len(parts) == 1 else torch.cat(parts) for parts in own]) for own in found]


def cut_along_time(grid: np.ndarray, most: int) -> list[list[tuple[int, int, int]]]:
    """Calls of a tower, each of at most `most` patches or of one step: (item's index, its first step, steps), in order.

    An item that fits in a call is not cut.
    """
    calls, room = [], 0
    for item, (steps, height, width) in enumerate(grid.tolist()):
        at_once = max(1, most // (height * width))
        for first in range(0, steps, at_once):
            own = min(at_once, steps - first)
            if own * height * width > room:
                calls.append([])
                room = most
            calls[-1].append((item, first, own))
            room -= own * height * width
    return calls


def drop_pixels(prompts: list, towers: list) -> None:
    """Let go of the pixels, in host memory, of prompts whose features all of these frozen towers can take."""
    for prompt in prompts:
        if all(tower_is_frozen(tower) and find(prompt, tower) is not None for tower in towers):
            prompt.pixel_values = prompt.pixel_values_videos = None
