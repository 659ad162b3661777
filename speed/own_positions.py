"""Plain `model.generate` with the positions that the models were trained with: what the shared ways are compared with."""

import math
import types

import torch

from veripo_trl.model.positions import _rows, mrope_positions


def use_trained_positions(model) -> None:
    """Give a Qwen-VL model `mrope_positions` as its `get_rope_index`, for callers that pass no `position_ids`.

    The package passes explicit positions; this is for a plain `model.generate(**processor_output)`.
    """
    backbone = model.get_base_model().model if hasattr(model, "peft_config") else model.model

    def get_rope_index(
        self,
        input_ids,
        mm_token_type_ids=None,
        image_grid_thw=None,
        video_grid_thw=None,
        second_per_grid_ts=None,
        attention_mask=None,
        **kwargs,
    ):
        batch, length = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        images = iter(_rows(image_grid_thw.cpu() if image_grid_thw is not None else None))
        videos = iter(_rows(video_grid_thw.cpu() if video_grid_thw is not None else None))
        has_times = hasattr(self.config.vision_config, "tokens_per_second")
        if has_times and video_grid_thw is not None and second_per_grid_ts is None:
            raise ValueError(
                "Expected `second_per_grid_ts` beside `video_grid_thw`: without it the time between frames is unknown. "
                "Pass what the processor returned, made with the video's metadata."
            )
        seconds = iter([] if second_per_grid_ts is None else torch.as_tensor(second_per_grid_ts).tolist())
        positions = torch.zeros(3, batch, length, dtype=torch.long)
        deltas = []
        merge = self.config.vision_config.spatial_merge_size
        for row in range(batch):
            keep = mask[row].bool().cpu()
            ids = input_ids[row].cpu()[keep].numpy()
            row_images = _take(images, int((ids == self.config.image_token_id).sum()), merge)
            row_videos = _take(videos, int((ids == self.config.video_token_id).sum()), merge)
            row_seconds = [next(seconds, 1.0) for _ in row_videos]
            own = mrope_positions(
                ids,
                image_grid_thw=row_images,
                video_grid_thw=row_videos,
                second_per_grid_ts=row_seconds,
                config=self.config,
            )
            positions[:, row, keep] = torch.from_numpy(own)
            deltas.append(int(own.max()) + 1 - len(ids))
        device = input_ids.device
        return positions.to(device), torch.tensor(deltas, device=device).unsqueeze(1)

    backbone.get_rope_index = types.MethodType(get_rope_index, backbone)


def _take(grids, tokens: int, merge: int) -> list[list[int]]:
    """The next grids that together make `tokens` merged vision tokens."""
    taken: list[list[int]] = []
    while tokens > 0:
        grid = next(grids)
        taken.append(grid)
        tokens -= math.prod(grid) // merge**2
    return taken
