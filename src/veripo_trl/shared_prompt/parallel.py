"""A prompt shared out over the processes that hold its completions (`prompt_parallel`): docs/prompt_parallel.md.

Of a group of n processes each computes two chunks of the prefix (the prompt without its last token) and its own
completions. Cut into 2n chunks, process r takes r and 2n - 1 - r, whose work under a causal mask is the same for all:

        prefix      0   1   2   3   4   5   6   7          n = 4
        process     0   1   2   3   3   2   1   0

Its packed sequence is [chunk][chunk][own segments]. In each layer the keys and values of all chunks are gathered, and the
calls of `attention.py` become: every piece on itself; a chunk on all that lies before it; the segments on the whole
prefix. The gradients of what was gathered are summed on their way back. So the gradients of all processes add up to those
of the sum of their losses, which is what data parallelism expects of them: nothing is rescaled.
"""

import zlib
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicCache

from veripo_trl.model.encoding import EncodedPrompt
from veripo_trl.model.features import CachedFeatures, cached_features, compute, find
from veripo_trl.shared_prompt.attention import (
    PackedLayout,
    Pieces,
    cumulative,
    kernel_for,
    use_shared_prefix,
)


def zigzag(total: int, count: int) -> list[list[range]]:
    """The two chunks of `total` tokens of each of `count` processes; some are empty where tokens are few."""
    ends = [index * total // (2 * count) for index in range(2 * count + 1)]
    chunks = [range(*pair) for pair in pairwise(ends)]
    return [[chunks[rank], chunks[-1 - rank]] for rank in range(count)]


class SplitLayout(PackedLayout):
    """Where the pieces of a process's packed sequence lie: its chunks of one prefix are its prefixes.

    Args:
        whole: tokens of the prefix. segments: lengths of the process's segments. group: the processes that share it.

    Attributes:
        kept: int64, the process's tokens in the order of its sequence, as indices of [prefix][own segments].
    """

    def __init__(self, whole: int, segments: list[int], group, device):
        every = zigzag(whole, group.size())
        chunks = [chunk for chunk in every[group.rank()] if chunk]
        super().__init__([len(chunk) for chunk in chunks], [segments], device)
        tokens = [*chunks, range(whole, whole + sum(segments))]
        self.kept = torch.cat([torch.arange(part.start, part.stop) for part in tokens])
        self.group, self.most = group, max(sum(map(len, pair)) for pair in every)
        order = torch.empty(
            whole, dtype=torch.long
        )  # of each token of the prefix, its place in what is gathered
        for rank, (first, second) in enumerate(every):
            start = rank * self.most
            order[first.start : first.stop] = torch.arange(len(first)) + start
            order[second.start : second.stop] = torch.arange(len(second)) + start + len(first)
        self.order = order.to(device)
        self.cache: Cache | None = None  # where each layer's keys and values of the whole prefix are kept, if anywhere

        def crossing(queries: int, keys: int) -> Pieces:
            ends = (
                torch.tensor([0, length], dtype=torch.int32, device=device)
                for length in (queries, keys)
            )
            return Pieces([queries], [keys], *ends)

        starts = cumulative(self.prefixes)
        found = zip(starts, chunks, strict=False)
        self._chunks = [
            (start, crossing(len(chunk), chunk.start)) for start, chunk in found if chunk.start
        ]
        self._segments = crossing(sum(segments), whole)

    def shared(self, key, value):
        """Keys and values of the whole prefix, (S, K, D) each, by one exchange between the group's processes."""
        own = torch.stack([key, value], dim=1)[
            : self.prefix_tokens
        ]  # (tokens of the chunks, 2, K, D)
        own = F.pad(own, (0, 0, 0, 0, 0, 0, 0, self.most - len(own)))
        every = Gather.apply(own, self.group)
        whole = every[:, 0][self.order], every[:, 1][self.order]
        if self.cache is not None:
            heads_first = (tensor.transpose(0, 1)[None] for tensor in whole)  # (1, K, S, D)
            self.cache.update(*heads_first, len(self.cache.layers))
        return whole

    def crossings(self, segments_only):
        if segments_only:
            return [(0, self._segments)]
        return [*self._chunks, (self.prefix_tokens, self._segments)]


class Gather(torch.autograd.Function):
    """(rows, …) of every process of a group, one behind the other. Their gradients are summed over the processes."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return gathered(tensor, group)

    @staticmethod
    def backward(ctx, grad):
        own = grad.new_empty(len(grad) // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None


def gathered(tensor: torch.Tensor, group) -> torch.Tensor:
    every = tensor.new_empty(group.size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(every, tensor.contiguous(), group=group)
    return every


def share_out(model, packed, group, device) -> tuple[SplitLayout, dict]:
    """This process's part of a packed sequence, and what a forward takes for it.

    Args:
        model: the unwrapped model, with a frozen vision tower. packed: a `scoring.Packed` of one prompt, which all
            processes of `group` hold.
    """
    share_features(model, packed.unique, group, device)
    layout = SplitLayout(packed.prefixes[0], packed.segments[0], group, device)
    inputs = {
        "input_ids": packed.input_ids[:, layout.kept].to(device),
        "position_ids": packed.positions[:, :, layout.kept].to(device),
    }
    outputs = cached_features(model, packed.unique, "cpu").get("mm_encoder_outputs", {})
    kept = layout.kept[: layout.prefix_tokens]
    for kind, output in outputs.items():
        stands_for = packed.input_ids[0] == getattr(model.config, f"{kind}_token_id")
        rows = (stands_for.cumsum(0) - 1)[kept[stands_for[kept]]]
        for name, items in vars(output).items():
            levels = items if name == "deepstack_features" else [items]
            whole = (level[0] if len(level) == 1 else torch.cat(level) for level in levels)
            own = [(level[rows].to(device),) for level in whole]
            setattr(output, name, own if name == "deepstack_features" else own[0])
    return layout, inputs | ({"mm_encoder_outputs": outputs} if outputs else {})


@torch.no_grad()
def prefill_in_parts(model, prompt: EncodedPrompt, group, device) -> Cache | None:
    """What `rollout.prefill` gives for one prompt, each process having computed its chunks. Entered by all of `group`.

    Args:
        model: the unwrapped model. None without a kernel for its dtype: rollouts run without autocast.
    """
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kernel_for(torch.empty(1, 1, size, dtype=model.dtype, device=device)) is None:
        return None
    use_shared_prefix(model)
    # The whole prompt is its prefix with one segment: its last token.
    packed = SimpleNamespace(
        unique=[prompt],
        prefixes=[len(prompt) - 1],
        segments=[[1]],
        input_ids=torch.from_numpy(prompt.input_ids)[None],
        positions=torch.from_numpy(prompt.positions)[:, None],
    )
    layout, inputs = share_out(model, packed, group, device)
    layout.cache = DynamicCache()
    model.model(shared_prefix=layout, use_cache=False, **inputs)
    return layout.cache


@torch.no_grad()
def share_features(model, prompts: list[EncodedPrompt], group, device) -> None:
    """Give a prompt its features, each process having computed its part of the temporal steps. Entered by all of `group`.

    Attention in the tower never crosses temporal steps, so that these are the features of one call. Images, and videos if
    one has fewer steps than there are processes, are computed by each.

    Args:
        prompts: the same object in every place, and equal in all processes.
    """
    prompt, tower = prompts[0], model.model.visual
    count, grid = group.size(), prompt.video_grid_thw
    if check_same_prompt(prompts, find(prompt, tower) is not None, group, device):
        return
    if grid is None or grid[:, 0].min() < count:
        compute(model, [prompt], device)
        return
    # Where the steps of each process begin: (videos, processes + 1).
    shares = grid[:, :1] * np.arange(count + 1) // count
    first, last = shares[:, group.rank()], shares[:, group.rank() + 1]
    patches = grid[:, 1] * grid[:, 2]  # of a temporal step
    videos = prompt.pixel_values_videos.split((grid[:, 0] * patches).tolist())
    pixels = [
        video[a:b] for video, a, b in zip(videos, first * patches, last * patches, strict=True)
    ]
    own_grid = grid.copy()
    own_grid[:, 0] = last - first
    own = replace(
        prompt, features=None, pixel_values_videos=torch.cat(pixels), video_grid_thw=own_grid
    )
    compute(model, [own], device)
    cached = own.features[tower]

    tokens = (shares[:, 1:] - shares[:, :-1]) * (
        patches // model.config.vision_config.spatial_merge_size**2
    )[:, None]

    def exchanged(items: list[torch.Tensor]) -> list[torch.Tensor]:
        """Of each video, from this process's part of each."""
        part = torch.cat(items).to(device)
        every = (
            gathered(F.pad(part, (0, 0, 0, int(tokens.sum(0).max()) - len(part))), group)
            .cpu()
            .chunk(count)
        )
        parts = [
            one.split([*own, len(one) - sum(own)])
            for one, own in zip(every, tokens.T.tolist(), strict=True)
        ]
        return [torch.cat([of[video] for of in parts]) for video in range(len(grid))]

    items = {**cached.items, "video": exchanged(cached.items["video"])}
    levels = dict(cached.levels)
    if "video" in levels:
        levels["video"] = [exchanged(level) for level in levels["video"]]
    prompt.features = own.features if prompt.features is None else prompt.features
    prompt.features[tower] = CachedFeatures(cached.version, items, levels)


def check_same_prompt(prompts: list[EncodedPrompt], has_features: bool, group, device) -> bool:
    """Whether every process of a group has its prompt's features. Raises in all of them unless each holds one prompt, the
    same as the others. Entered by all."""
    ids, distinct = prompts[0].input_ids, {id(prompt) for prompt in prompts}
    own = [has_features, len(distinct), len(ids), zlib.crc32(ids.tobytes())]
    have, *every = zip(*gathered(torch.tensor([own], device=device), group).tolist(), strict=True)
    if max(every[0]) > 1 or any(len(set(values)) > 1 for values in every):
        names = sorted({prompt.question_id for prompt in prompts})
        raise RuntimeError(
            f"prompt_parallel: the processes of a group hold other prompts than each other, here {names}; prompts, "
            f"tokens and checksum of each: {every}. What deals out the rows breaks groups up: leave that method or "
            f"sampler out, or set prompt_parallel: 1."
        )
    return all(have)
