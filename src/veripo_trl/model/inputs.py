"""Encoded prompts to what a forward takes: padded positions, and pixels or the features of a frozen tower.

Every forward of a trainer (rollout, old and reference log-probabilities, update, SFT) gets its inputs from here, so that
all of them see the same pixels at the same positions.
"""

import torch

from veripo_trl.model.encoding import EncodedPrompt
from veripo_trl.model.features import cached_features, media_inputs, tower_is_frozen


def pad_positions(prompts: list[EncodedPrompt], *, prompt_width: int, completion_width: int) -> torch.Tensor:
    """Positions of left-padded prompts followed by right-padded completions.

    Returns:
        int64 tensor (3, rows, prompt_width + completion_width). Padding before a prompt gets 0; it is masked.
    """
    positions = torch.zeros(3, len(prompts), prompt_width + completion_width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        positions[:, row, prompt_width - len(prompt) : prompt_width] = torch.from_numpy(prompt.positions)
        positions[:, row, prompt_width:] = torch.arange(completion_width) + prompt.next_position
    return positions


def vision_inputs(model, prompts: list[EncodedPrompt], device) -> dict:
    """What a forward takes for the images and videos of `prompts`, in row order.

    With a frozen vision tower its features, computed once per prompt and cached with it, in host memory: they live as
    long as it does, in training one generation batch. With a trained one the pixels, so that the features are made in
    the forward, with gradient. Which of the two is read from the parameters at every call.

    Args:
        model: the unwrapped Qwen-VL model. prompts: rows of a group share one object.
    """
    if tower_is_frozen(model.model.visual):
        return cached_features(model, prompts, device)
    return media_inputs(prompts, device)


def check_vision_tokens(input_ids: torch.Tensor, prompts: list[EncodedPrompt], config) -> None:
    """Raise unless a batch holds exactly the vision tokens of the features that will be given with it.

    Args:
        input_ids: (rows, width), padded; `prompts` in the same order.
    """
    merge = config.vision_config.spatial_merge_size**2
    for name, token_id in (("image", config.image_token_id), ("video", config.video_token_id)):
        grids = [getattr(prompt, f"{name}_grid_thw") for prompt in prompts]
        expected = [0 if grid is None else int(grid.prod(axis=1).sum()) // merge for grid in grids]
        found = (input_ids == token_id).sum(dim=1).tolist()
        for prompt, want, got in zip(prompts, expected, found, strict=True):
            if want != got:
                raise RuntimeError(
                    f"Row {prompt.question_id!r}: its features stand for {want} {name} tokens, its ids hold {got}. "
                    f"Ids and features belong to different prompts, or a vision token was sampled or cut off."
                )


def model_inputs(
    prompts: list[EncodedPrompt], input_ids: torch.Tensor, *, completion_width: int, config, frozen_model=None
) -> dict[str, torch.Tensor]:
    """Positions and vision tensors for a forward over padded prompts and completions.

    Args:
        prompts: one per row of `input_ids` (rows, prompt width + completion width).
        frozen_model: the unwrapped model, if its vision tower is frozen: features are then given, computed once per
            distinct prompt, instead of pixels, which the forward encodes once per row.

    Returns:
        `position_ids` (3, rows, width) and the pixels and grids, or features, on the device of `input_ids`.
    """
    check_vision_tokens(input_ids, prompts, config)
    prompt_width = input_ids.size(1) - completion_width
    positions = pad_positions(prompts, prompt_width=prompt_width, completion_width=completion_width)
    if frozen_model is None:
        media = media_inputs(prompts, input_ids.device)
    else:
        media = vision_inputs(frozen_model, prompts, input_ids.device)
    return {"position_ids": positions.to(input_ids.device), **media}
