"""Rollouts by vLLM that see exactly what the trainer scores: the same ids, pixels and positions.

vLLM's own processor never runs. It would read another frame rate for Qwen2.5-VL (24 fps is assumed), expand prompt ids
a second time and leave other tokens around a Qwen3-VL video. An `EncodedPrompt`'s tensors are handed over instead, in
the form that its processor would have made, and the positions that vLLM will compute from them are compared with ours.

Written for vLLM 0.30, which is imported only where it is used.
"""

import functools
import types
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import xxhash

from veripo_trl.errors import VeripoError
from veripo_trl.model.encoding import EncodedPrompt, PromptEncoder
from veripo_trl.model.features import PIXELS
from veripo_trl.model.positions import media_runs

BAN = -100.0  # added to a logit, the lowest that vLLM takes: e^-100 of the odds. It has no list of suppressed tokens.
MOST_POSTED = 1e9  # bytes of a prompt's pixels to a server: 1,600 frames of 128 × 28 × 28 pixels in bfloat16


class EngineMismatchError(VeripoError):
    """The engine does not see, or does not compute, what the trainer does."""


def has_timed_videos(config) -> bool:
    """Whether a video is one block with times in its positions (Qwen2.5-VL), not one picture after another (Qwen3-VL)."""
    return getattr(config.vision_config, "tokens_per_second", None) is not None


def media_items(prompt: EncodedPrompt, config) -> list[dict]:
    """A prompt's images and videos in the order of its ids, as vLLM's model takes them.

    Qwen3-VL puts every temporal step of a video into a block of its own and computes it by itself, so each is handed
    over as what it is to the model: a picture. (As one video it would need a placeholder with holes, which vLLM's
    server cannot receive.)

    Returns:
        dicts of `kind` ("image" or "video"), `offset` and `length` of its ids in the prompt, `pixels` (patches, patch
        size), `grid` int64 (3,) and `seconds` per temporal step or None.
    """
    merge = config.vision_config.spatial_merge_size**2
    blocks: dict[str, Iterator] = {}
    for kind, pixels in PIXELS.items():
        grids, seconds = getattr(prompt, f"{kind}_grid_thw"), prompt.second_per_grid_ts
        as_pictures = kind == "video" and not has_timed_videos(config)
        grids = [] if grids is None else grids.tolist()
        blocks[kind] = _blocks("image" if as_pictures else kind, getattr(prompt, pixels), grids, seconds, as_pictures)
    items = []
    runs = media_runs(prompt.input_ids, image_token_id=config.image_token_id, video_token_id=config.video_token_id)
    for kind, start, end in runs:
        if kind == "text":
            continue
        item = next(blocks[kind], None)
        tokens = 0 if item is None else int(np.prod(item["grid"])) // merge
        if end - start != tokens:
            raise EngineMismatchError(
                f"Row {prompt.question_id!r}: expected a run of {tokens} {kind} tokens, its ids hold {end - start}."
            )
        items.append({**item, "offset": start, "length": end - start})
    if any(next(left, None) is not None for left in blocks.values()):
        raise EngineMismatchError(f"Row {prompt.question_id!r} has more images or videos than its ids name.")
    return items


def _blocks(kind: str, pixels, grids: list, seconds, as_pictures: bool) -> Iterator[dict]:
    start = 0
    for index, (t, h, w) in enumerate(grids):
        for shape in [(1, h, w)] * t if as_pictures else [(t, h, w)]:
            end = start + int(np.prod(shape))
            yield {
                "kind": kind,
                "pixels": pixels[start:end],
                "grid": np.array(shape, dtype=np.int64),
                "seconds": seconds[index] if kind == "video" else None,
            }
            start = end


def content_key(item: dict) -> str:
    """A name for an item's content: pixels, sizes and frame rate. vLLM returns the old features of an equal name."""
    pixels = item["pixels"].contiguous()
    digest = xxhash.xxh3_128(f"{pixels.dtype} {tuple(pixels.shape)} {item['grid'].tolist()} {item['seconds']}".encode())
    digest.update(pixels.view(torch.uint8).numpy())
    return digest.hexdigest()


def engine_fields(item: dict):
    """One item as vLLM's `MultiModalKwargsItem`."""
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

    kind, grid = item["kind"], torch.from_numpy(item["grid"])[None]
    values = {PIXELS[kind]: item["pixels"], f"{kind}_grid_thw": grid}
    fields = {
        PIXELS[kind]: MultiModalFieldConfig.flat_from_sizes(kind, grid.prod(-1)),
        f"{kind}_grid_thw": MultiModalFieldConfig.batched(kind, keep_on_cpu=True),
    }
    if item["seconds"] is not None:
        # float64, as in `mrope_positions`: in single precision some frames land on another position
        values["second_per_grid_ts"] = torch.tensor([item["seconds"]], dtype=torch.float64)
        fields["second_per_grid_ts"] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
    return MultiModalKwargsItems.from_hf_inputs(values, fields)[kind][0]


def check_positions(prompt: EncodedPrompt, items: list[dict], fields: list, config) -> None:
    """Raise unless vLLM's model will give a prompt the positions that the trainer gives it."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    features = [
        MultiModalFeatureSpec(
            data=data,
            modality=item["kind"],
            identifier="",
            mm_position=PlaceholderRange(offset=item["offset"], length=item["length"]),
        )
        for item, data in zip(items, fields, strict=True)
    ]
    if not has_timed_videos(config):
        from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration as Model

        positions = functools.partial(Model._get_mrope_input_positions, config=config)
    else:
        from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model

        model = types.SimpleNamespace(config=config)  # all that these two methods read
        model.iter_mm_grid_thw = functools.partial(Model.iter_mm_grid_thw, model)
        positions = functools.partial(Model.get_mrope_input_positions, model)
    found = positions(input_tokens=prompt.input_ids.tolist(), mm_features=features)[0].numpy()
    if not np.array_equal(found, prompt.positions):
        first = int((found != prompt.positions).any(0).argmax()) if found.shape == prompt.positions.shape else 0
        raise EngineMismatchError(
            f"Row {prompt.question_id!r}: vLLM would give token {first} the position {found[:, first].tolist()} "
            f"(time, height, width), the trainer gives it {prompt.positions[:, first].tolist()}. They disagree on the "
            f"video's frame rate or on the rule for positions: use the vLLM version that this project pins."
        )


def prepared_media(prompt: EncodedPrompt, config) -> list[tuple]:
    """(item of `media_items`, its `engine_fields`, its content key) of each image and video, positions compared."""
    items = media_items(prompt, config)
    fields = [engine_fields(item) for item in items]
    check_positions(prompt, items, fields, config)
    return list(zip(items, fields, map(content_key, items), strict=True))


def by_kind(media: list[tuple], value: Callable) -> dict[str, list]:
    """`value(item, fields, key)` of each prepared item, in lists by its kind."""
    found: dict[str, list] = {}
    for item, fields, key in media:
        found.setdefault(item["kind"], []).append(value(item, fields, key))
    return found


def engine_input(prompt: EncodedPrompt, config):
    """A prompt as an input of vLLM's engine, past its processor."""
    from vllm.inputs.engine import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

    ids, media = prompt.input_ids.tolist(), prepared_media(prompt, config)
    if not media:
        return tokens_input(ids)
    return mm_input(
        ids,
        MultiModalKwargsItems(by_kind(media, lambda item, fields, key: fields)),
        by_kind(media, lambda item, fields, key: key),
        by_kind(media, lambda item, fields, key: PlaceholderRange(offset=item["offset"], length=item["length"])),
    )


def server_features(prompt: EncodedPrompt, config) -> dict:
    """A prompt's media as TRL's `VLLMGeneration` passes them from `image_features` to `generate` of its client.

    `veripo_trl` is an object of this prompt's alone, its `features` what the server is sent, None for text. TRL itself
    reads and replaces `mm_placeholders["image"]`, one entry for each run of image tokens.
    """
    check_size(prompt)
    from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import encode_mm_kwargs_item

    media = prepared_media(prompt, config)
    own = {
        "mm_hashes": by_kind(media, lambda item, fields, key: key),
        "mm_placeholders": by_kind(media, lambda item, *_: {"offset": item["offset"], "length": item["length"]}),
        "kwargs_data": by_kind(media, lambda item, fields, key: encode_mm_kwargs_item(fields)),
    }
    images = 0 if prompt.image_grid_thw is None else len(prompt.image_grid_thw)
    return {"mm_placeholders": {"image": [None] * images}, "veripo_trl": {"features": own if media else None}}


def vllm_inputs(llm, prompts: list[EncodedPrompt]) -> list:
    """Prompts as inputs of `generate_with_vllm`.

    Args:
        llm: a `vllm.LLM` made with `engine_options`.

    Raises:
        EngineMismatchError: the engine would normalise pixels a second time, or give tokens other positions.
    """
    if llm.model_config.multimodal_config.mm_device_do_normalize:
        raise EngineMismatchError(
            "This engine normalises pixels itself, and ours are normalised already. Make it with "
            "LLM(…, mm_device_do_normalize=False), see vllm.inputs.engine_options."
        )
    return [engine_input(prompt, llm.model_config.hf_config) for prompt in prompts]


def generate_with_vllm(llm, inputs: list, sampling_params: list) -> list:
    """Run `vllm_inputs` through the engine, each with its `vllm.SamplingParams`; one `RequestOutput` per input, in order.

    Raises:
        ValueError: a prompt and its completion do not fit into the engine's context, where vLLM would cut it short.
    """
    from vllm import RequestOutput

    for item, params in zip(inputs, sampling_params, strict=True):
        check_length(len(item["prompt_token_ids"]), params.max_tokens, llm.model_config.max_model_len)
    # The public `LLM.generate` renders once more and drops a video that was handed over.
    run = llm._render_and_run_requests
    return run(prompts=iter(inputs), params=sampling_params, output_type=RequestOutput, use_tqdm=False)


def check_size(prompt: EncodedPrompt) -> None:
    """Raise where a prompt's media are more than a server can be posted: as base64 in one JSON."""
    given = [pixels for name in PIXELS.values() if (pixels := getattr(prompt, name)) is not None]
    size = sum(pixels.nbytes for pixels in given)
    if size > MOST_POSTED:
        raise ValueError(
            f"Row {prompt.question_id!r}: {size / 1e9:.1f} GB of pixels would be posted to the vLLM server, expected at "
            f"most {MOST_POSTED / 1e9:g} GB. Set vllm_mode: colocate, or lower max_frames or max_pixels."
        )


def check_length(prompt_tokens: int, completion_tokens: int, limit: int) -> None:
    if prompt_tokens + completion_tokens > limit:
        raise ValueError(
            f"A prompt of {prompt_tokens} tokens and a completion of up to {completion_tokens} do not fit into vLLM's "
            f"context of {limit}. Raise vllm_max_model_length (max_model_len), up to the model's "
            f"max_position_embeddings, or lower max_frames, max_pixels or the completion's length. Behind that limit "
            f"rollouts by transformers go on (use_vllm: false)."
        )


def engine_options(encoder: PromptEncoder, *, dtype: torch.dtype, datasets: Sequence = ()) -> dict:
    """The arguments of `vllm.LLM` with which it computes what the trainer does.

    The sizes of the largest image and video are what vLLM reserves memory for; one must fit into one batch.

    Args:
        datasets: what will be asked, with the columns `images` and `videos`, for the most of them in one row.
    """
    max_images, max_videos = (
        max([1, *(len(media) for dataset in datasets for media in dataset[kind])]) for kind in ("images", "videos")
    )
    settings = encoder.loader.settings
    side, image_side = (int(pixels**0.5) for pixels in (settings.max_pixels, encoder.max_image_pixels))
    if has_timed_videos(encoder.config):
        video = {"count": max_videos, "num_frames": settings.max_frames, "width": side, "height": side}
    else:
        max_images += max_videos * ((settings.max_frames + 1) // 2)
        image_side, video = max(side, image_side), 0
    image = {"count": max_images, "width": image_side, "height": image_side}
    largest = max(settings.max_pixels * ((settings.max_frames + 1) // 2), encoder.max_image_pixels)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "limit_mm_per_prompt": {"image": image, "video": video},
        "max_num_batched_tokens": max(4096, largest // settings.size_factor**2),
        "mm_device_do_normalize": False,  # our pixels are normalised
        "mm_processor_cache_gb": 0,  # nothing is processed, so nothing need be kept twice
    }


def longest_prompt(encoder: PromptEncoder, datasets: list) -> int:
    """An upper bound on the tokens of a row's prompt, without reading any media."""
    if encoder.max_prompt_tokens is not None:
        return encoder.max_prompt_tokens
    settings = encoder.loader.settings
    factor = settings.size_factor**2
    # A temporal step has two frames, and around 16 tokens of time and markers in Qwen3-VL.
    video = (settings.max_frames + 1) // 2 * (settings.max_pixels // factor + 16) + 2
    image = encoder.max_image_pixels // factor + 2
    longest = 0
    for dataset in datasets:
        columns = (dataset[name] for name in ("problem", "options", "videos", "images"))
        for problem, options, videos, images in zip(*columns, strict=True):
            text = len(problem.encode()) + sum(len(option.encode()) + 1 for option in options)
            longest = max(longest, text + video * len(videos) + image * len(images))
    return longest + 1024  # the template
