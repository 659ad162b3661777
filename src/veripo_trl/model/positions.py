"""Computes M-RoPE positions, by the rule that Qwen2.5-VL and Qwen3-VL were trained with.

transformers 5.3 and later start the text after a video at the block's start + max(height, width), so a clip longer
than its grid is wide gets text positions inside its own temporal range. The models were trained, and vLLM runs them,
with that text starting one after the largest position of the block in any axis (transformers up to 5.2; pull request
#35569, issue #45381). Generation, scoring and training here all take their positions from `mrope_positions`.
"""

import math

import numpy as np


def media_runs(input_ids: np.ndarray, *, image_token_id: int, video_token_id: int) -> list[tuple[str, int, int]]:
    """Split a prompt into runs of one kind: `(kind, start, end)` with kind "text", "image" or "video"."""
    kinds = np.where(input_ids == image_token_id, 1, np.where(input_ids == video_token_id, 2, 0))
    edges = np.flatnonzero(np.diff(kinds)) + 1
    bounds = [0, *edges.tolist(), len(kinds)]
    names = ("text", "image", "video")
    return [(names[kinds[start]], start, end) for start, end in zip(bounds[:-1], bounds[1:], strict=True) if end > start]


def mrope_positions(
    input_ids,
    *,
    image_grid_thw,
    video_grid_thw,
    second_per_grid_ts,
    config,
) -> np.ndarray:
    """Temporal, height and width positions of one unpadded sequence, by the trained rule.

    Text counts up by one in all three axes. A vision block starts at the next position `s`; its token at grid cell
    `(t, h, w)` gets `(s + floor(t * seconds * tokens_per_second), s + h, s + w)`; the text behind it starts at the
    largest of these + 1. Images have no time. Qwen3-VL puts every frame of a video in a block of its own, with the time
    written as text before it, so its blocks have no temporal extent.

    Args:
        input_ids: integers of shape (P,), vision tokens expanded.
        image_grid_thw: (images, 3) or None, patches before merging, as the processor returns them.
        video_grid_thw: (videos, 3) or None.
        second_per_grid_ts: seconds that one temporal step of each video covers, (videos,); None for models without it.
        config: the model's config (`vision_config.spatial_merge_size`, token ids).

    Returns:
        int64 array of shape (3, P).

    Raises:
        ValueError: the vision tokens of the sequence are not those of the grids.
    """
    input_ids = np.asarray(input_ids, dtype=np.int64)
    merge = config.vision_config.spatial_merge_size
    tokens_per_second = getattr(config.vision_config, "tokens_per_second", None)
    # One entry per vision block in the sequence: (t, h, w) in merged cells, and positions per temporal step.
    blocks = {"image": [(1, int(h) // merge, int(w) // merge, 0.0) for _, h, w in _rows(image_grid_thw)], "video": []}
    for index, (t, h, w) in enumerate(_rows(video_grid_thw)):
        cell = (int(h) // merge, int(w) // merge)
        if tokens_per_second is None:  # Qwen3-VL: a block per frame
            blocks["video"] += [(1, *cell, 0.0)] * int(t)
        else:
            # float64: single precision lands on the other side of an integer in some cases.
            step = float(second_per_grid_ts[index]) * float(tokens_per_second)
            blocks["video"].append((int(t), *cell, step))
    for items in blocks.values():
        items.reverse()  # popped from the end below

    parts: list[np.ndarray] = []  # (3, tokens) each
    position = 0  # of the next token, in all three axes
    for kind, start, end in media_runs(
        input_ids, image_token_id=config.image_token_id, video_token_id=config.video_token_id
    ):
        if kind == "text":
            parts.append(np.broadcast_to(np.arange(end - start) + position, (3, end - start)))
            position += end - start
            continue
        while start < end and blocks[kind]:
            t, h, w, step = blocks[kind].pop()
            time = np.array([math.floor(i * step) for i in range(t)])
            # (3, t, h, w) flattened to (3, t · h · w): time, row and column of each token, in the order of its ids
            grid = np.stack(np.meshgrid(time, np.arange(h), np.arange(w), indexing="ij")).reshape(3, -1) + position
            parts.append(grid)
            position = int(grid.max()) + 1  # behind the largest in any axis: the trained rule
            start += t * h * w
        if start != end:
            raise ValueError(
                f"A run of {kind} tokens ends at {end}, its grids end at {start}: expected "
                f"{_tokens(image_grid_thw, merge)} image and {_tokens(video_grid_thw, merge)} video tokens in the prompt."
            )
    left = {kind: len(items) for kind, items in blocks.items() if items}
    if left:
        raise ValueError(f"The prompt lacks the tokens of {left} vision blocks (frames or images) that were given.")
    return np.concatenate(parts, axis=1).astype(np.int64)


def _rows(grid) -> list[list[int]]:
    return [] if grid is None else np.asarray(grid).reshape(-1, 3).tolist()


def _tokens(grid, merge: int) -> int:
    return sum(t * h * w for t, h, w in _rows(grid)) // merge**2
