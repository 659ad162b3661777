"""Rows to what the model takes: token ids, M-RoPE positions and vision tensors, once per prompt.

Everything downstream (rollout, old and reference log-probabilities, update, SFT, evaluation) builds its inputs from
`EncodedPrompt` with `model_inputs`, so that all of them see the same ids, pixels and positions.
"""

import time

import numpy as np
import torch

from veripo_trl.data.prompts import PromptTemplate, build_messages
from veripo_trl.data.rows import content_of, resolve_media
from veripo_trl.errors import VeripoError
from veripo_trl.files.tables import printable
from veripo_trl.media.downloads import fetch
from veripo_trl.media.images import load_image
from veripo_trl.media.video import VideoLoader
from veripo_trl.model.features import held_features, tower_is_frozen
from veripo_trl.model.positions import mrope_positions

STAND_IN = "\ue000"  # for a row's text while the chat template is rendered
JOINT_BYTES = 32 * 1024**2  # of frames in one call of the processor, beyond which joining saves nothing


class PromptTooLongError(VeripoError):
    """A prompt has more tokens than the run allows."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class EncodedPrompt:
    """One prompt, encoded. Tensors stay on the host; `model_inputs` moves what a forward needs.

    A plain object on purpose: a data loader's `pin_memory` copies every mapping, and accelerate moves whatever has
    `.to`, so either would undo the sharing of one encoded prompt between the rows of a group.

    Attributes:
        input_ids: int64 array (P,), vision tokens expanded.
        positions: int64 array (3, P), see `mrope_positions`.
        pixel_values: (image patches, patch size) or None; image_grid_thw: int64 array (images, 3) or None.
        pixel_values_videos: (video patches, patch size) or None; video_grid_thw: int64 array (videos, 3) or None.
        second_per_grid_ts: seconds that one temporal step of each video covers, floats; None for models without it.
        media: a line per image and video for people: frames × height × width and tokens.
        load_s, encode_s: seconds spent in reading media and in the processor.
        features: what frozen vision towers made of the media, see `vision_inputs`; None until one did.
        content_keys: names of the media's content, see `vllm_rollouts.name_media`; None until they are asked for.
    """

    __slots__ = (
        "question_id",
        "input_ids",
        "positions",
        "pixel_values",
        "image_grid_thw",
        "pixel_values_videos",
        "video_grid_thw",
        "second_per_grid_ts",
        "media",
        "load_s",
        "encode_s",
        "features",
        "content_keys",
    )

    def __init__(self, **fields):
        self.features = self.content_keys = None
        for name in self.__slots__[:-2]:
            setattr(self, name, fields[name])

    def __getstate__(self):
        """Without features, which belong to the towers of one process."""
        return None, {name: getattr(self, name) for name in self.__slots__} | {"features": None}

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def next_position(self) -> int:
        """Position of the first token after the prompt, the same in all three axes."""
        return int(self.positions.max()) + 1


class PromptEncoder:
    """Encodes rows with a model's own processor.

    Args:
        processor: the model's `Qwen2_5_VLProcessor` or `Qwen3VLProcessor`.
        config: the model's config.
        template: what turns a row into chat messages.
        loader: reads and samples the videos.
        max_image_pixels: largest area of one image, in pixels.
        max_prompt_tokens: longest prompt allowed, vision tokens included; None for no limit.
        pixel_dtype: dtype in which pixels are kept; the model's own dtype loses nothing, since it casts them first.
        allow_urls: whether rows may name media by URL.
    """

    def __init__(
        self,
        processor,
        config,
        *,
        template: PromptTemplate,
        loader: VideoLoader,
        max_image_pixels: int = 1280 * 28 * 28,
        max_prompt_tokens: int | None = None,
        pixel_dtype: torch.dtype = torch.float32,
        allow_urls: bool = False,
    ):
        self.processor = processor
        self.config = config
        self.template = template
        self.loader = loader
        self.max_image_pixels = max_image_pixels
        self.max_prompt_tokens = max_prompt_tokens
        self.pixel_dtype = pixel_dtype
        self.allow_urls = allow_urls
        self._import_everything()

    def _import_everything(self) -> None:
        """Run the processor once on made-up media, so that all modules it needs are imported in this process.

        A data loader forks. Were a thread of this process (the Hub client's, say) importing at that moment, the child
        would wait for ever for the lock of the first module that it imports itself.
        """
        import qwen_vl_utils.vision_process  # noqa: F401  (imported by the video loader on its first miss)
        from PIL import Image

        Image.init()
        side = self.config.vision_config.patch_size * self.config.vision_config.spatial_merge_size
        picture = np.zeros((2, side, side, 3), dtype=np.uint8)
        message = [{"role": "user", "content": [{"type": "video"}, {"type": "image"}]}]
        self.processor(
            text=[self.processor.apply_chat_template(message, tokenize=False)],
            images=[Image.fromarray(picture[0])],
            videos=[picture],
            videos_kwargs={
                "do_resize": False,
                "do_sample_frames": False,
                "video_metadata": [{"total_num_frames": 2, "fps": 2.0, "frames_indices": [0, 1]}],
            },
            return_tensors="pt",
        )

    def encode(self, row: dict, *, shuffle_seed: int | None = None) -> EncodedPrompt:
        """Encode one row's prompt.

        Args:
            row: a row of `rows.load_rows`.
            shuffle_seed: permute the frames of each video by this seed; for checks that their order matters.

        Raises:
            MediaError: a video or image cannot be read. RowError: a path is missing or leaves the media root.
            PromptTooLongError: the prompt is over `max_prompt_tokens`.
        """
        return self._process([self._load(row, shuffle_seed)])[0]

    def encode_rows(self, rows: list[dict]) -> list[EncodedPrompt]:
        """Encode several rows, as `encode` does each.

        Small ones go through the processor together: a call costs as much as several small clips.
        """
        prompts, group, size = [], [], 0
        for row in rows:
            group.append(self._load(row))
            size += sum(clip.frames.nbytes for clip in group[-1]["clips"])
            size += sum(3 * image.width * image.height for image in group[-1]["images"])
            if size > JOINT_BYTES:
                prompts += self._process(group)
                group, size = [], 0
        return prompts + (self._process(group) if group else [])

    def _load(self, row: dict, shuffle_seed: int | None = None) -> dict:
        """A row's clips and images, and the seconds that reading them took."""
        started = time.perf_counter()
        videos, images = resolve_media(row, allow_urls=self.allow_urls)
        clips = [self._read(self.loader.load, path, row, "video") for path in videos]
        images = [self._read(load_image, path, row, "image") for path in images]
        if shuffle_seed is not None:
            for clip in clips:
                clip.frames = clip.frames[np.random.default_rng(shuffle_seed).permutation(len(clip.frames))]
        return {"row": row, "clips": clips, "images": images, "load_s": time.perf_counter() - started}

    def _read(self, load, path: str, row: dict, kind: str):
        """`load` of a file, or of the copy of a URL, which errors go on to call by its URL."""
        local = fetch(path, row_id=row["question_id"], kind=kind) if "://" in path else path
        return load(local, row_id=row["question_id"], name=path)

    def _process(self, loaded: list[dict]) -> list[EncodedPrompt]:
        """One call of the processor for several loaded rows, taken apart again."""
        started = time.perf_counter()
        clips = [clip for item in loaded for clip in item["clips"]]
        images = [image for item in loaded for image in item["images"]]
        messages = [build_messages(item["row"], self.template) for item in loaded]
        texts = text_ids(self.processor.tokenizer, [message[0]["content"][-1]["text"] for message in messages])
        for message in messages:
            message[0]["content"][-1]["text"] = STAND_IN
        rendered = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        behind = len(self.processor.tokenizer(rendered[0].split(STAND_IN)[1])["input_ids"])
        inputs = {"text": [prompt.replace(STAND_IN, "") for prompt in rendered]}
        if images:
            shortest = self.processor.image_processor.size["shortest_edge"]
            size = {"shortest_edge": min(shortest, self.max_image_pixels), "longest_edge": self.max_image_pixels}
            inputs |= {"images": images, "images_kwargs": {"size": size}}
        if clips:
            metadata = [clip_metadata(clip) for clip in clips]
            options = {"do_resize": False, "do_sample_frames": False, "video_metadata": metadata}
            inputs |= {"videos": [clip.frames for clip in clips], "videos_kwargs": options}
        batch = self.processor(**inputs, padding=True, return_tensors="pt")
        encode_s = (time.perf_counter() - started) / len(loaded)
        seconds = batch.get("second_per_grid_ts")
        image_parts = _parts(batch, "pixel_values", "image_grid_thw", [len(item["images"]) for item in loaded])
        video_parts = _parts(batch, "pixel_values_videos", "video_grid_thw", [len(item["clips"]) for item in loaded])
        prompts, videos_before = [], 0
        for place, item in enumerate(loaded):
            row, (pixels, image_grid), (video_pixels, video_grid) = item["row"], image_parts[place], video_parts[place]
            input_ids = batch["input_ids"][place][batch["attention_mask"][place].bool()].numpy()
            input_ids = np.insert(input_ids, len(input_ids) - behind, texts[place])
            self._check_length(row, input_ids)
            own = slice(videos_before, videos_before + len(item["clips"]))
            videos_before = own.stop
            own_seconds = None if seconds is None else [float(step) for step in seconds[own]]
            positions = mrope_positions(
                input_ids,
                image_grid_thw=image_grid,
                video_grid_thw=video_grid,
                second_per_grid_ts=own_seconds,
                config=self.config,
            )
            prompts.append(
                EncodedPrompt(
                    question_id=row["question_id"],
                    input_ids=input_ids,
                    positions=positions,
                    pixel_values=self._pixels(pixels),
                    image_grid_thw=image_grid,
                    pixel_values_videos=self._pixels(video_pixels),
                    video_grid_thw=video_grid,
                    second_per_grid_ts=own_seconds,
                    media=self._describe(row, item["clips"], video_grid, image_grid),
                    load_s=item["load_s"],
                    encode_s=encode_s,
                )
            )
        return prompts

    def _check_length(self, row: dict, input_ids: np.ndarray) -> None:
        if self.max_prompt_tokens is not None and len(input_ids) > self.max_prompt_tokens:
            raise PromptTooLongError(
                f"Row {row['question_id']!r} ({', '.join(row['videos'] + row['images']) or 'text only'}): its prompt "
                f"has {len(input_ids)} tokens, the limit is max_prompt_tokens={self.max_prompt_tokens}. Vision tokens "
                f"are never cut off. Raise the limit, lower max_frames, fps or max_pixels, or drop the row."
            )

    def _pixels(self, values):
        return None if values is None else values.to(self.pixel_dtype)

    def _describe(self, row, clips, video_grid, image_grid) -> list[str]:
        merge = self.config.vision_config.spatial_merge_size**2
        lines = []
        for path, clip, grid in zip(row["videos"], clips, video_grid if clips else [], strict=True):
            t, h, w, _ = clip.frames.shape
            name = printable(path).rpartition("/")[2]
            lines.append(
                f"{name}: {t} frames × {h} × {w} of {clip.total_num_frames} at {clip.fps:g} fps "
                f"({clip.backend}) → {int(grid.prod()) // merge} tokens"
            )
        for path, grid in zip(row["images"], image_grid if row["images"] else [], strict=True):
            patch = self.config.vision_config.patch_size
            h, w = int(grid[1]) * patch, int(grid[2]) * patch
            name = printable(path).rpartition("/")[2]
            lines.append(f"{name}: image {h} × {w} → {int(grid.prod()) // merge} tokens")
        return lines


def text_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of texts from outside, in which a control token of the model, spelled out, stays text."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def clip_metadata(clip) -> dict:
    """What transformers' video processors take as a clip's metadata; times come from the source's frame rate."""
    return {
        "total_num_frames": clip.total_num_frames,
        "fps": clip.fps,
        "frames_indices": clip.frames_indices,
        "height": clip.frames.shape[1],
        "width": clip.frames.shape[2],
        "duration": clip.total_num_frames / clip.fps,
        "video_backend": clip.backend,
    }


def _parts(batch, pixels: str, grid: str, counts: list[int]) -> list[tuple]:
    """The pixels and the grid of each row, of a batch whose rows have `counts` items; (None, None) for none."""
    parts, items, patches = [], 0, 0
    for count in counts:
        if not count:
            parts.append((None, None))
            continue
        own = batch[grid][items : items + count].numpy()
        length = int(own.prod(axis=1).sum())
        parts.append((batch[pixels][patches : patches + length], own))
        items, patches = items + count, patches + length
    return parts


def encode_unique(encoder: PromptEncoder, rows: list[dict]) -> list[EncodedPrompt]:
    """Encode each distinct question of `rows` once; equal questions share one object. Ids may repeat: pairs of several
    sources are mixed."""
    keys = [(row["question_id"], content_of(row), row["media_root"]) for row in rows]
    distinct = dict(zip(keys, rows, strict=True))
    done = dict(zip(distinct, encoder.encode_rows(list(distinct.values())), strict=True))
    return [done[key] for key in keys]


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


def media_inputs(prompts: list[EncodedPrompt], device) -> dict[str, torch.Tensor]:
    """The vision tensors of a batch, in row order, moved to `device`."""
    inputs = {}
    for name in ("pixel_values", "pixel_values_videos"):
        values = [getattr(prompt, name) for prompt in prompts if getattr(prompt, name) is not None]
        if values:
            inputs[name] = torch.cat(values).to(device, non_blocking=True)
    for name in ("image_grid_thw", "video_grid_thw"):
        grids = [getattr(prompt, name) for prompt in prompts if getattr(prompt, name) is not None]
        if grids:
            inputs[name] = torch.from_numpy(np.concatenate(grids)).to(device)
    return inputs


def vision_inputs(model, prompts: list[EncodedPrompt], device) -> dict:
    """What a forward takes for the images and videos of `prompts`, in row order.

    With a frozen vision tower its features, computed once per prompt and held with the prompt, in host memory: they live
    as long as it does, in training one generation batch. With a trained one the pixels, so that the features are made
    in the forward, with gradient. Which of the two is read from the parameters at every call.

    Args:
        model: the unwrapped Qwen-VL model. prompts: rows of a group share one object.
    """
    if tower_is_frozen(model.model.visual):
        return held_features(model, prompts, device)
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


def vision_token_ids(processor, config) -> list[int]:
    """Ids that a policy must never sample: placeholders and markers of images and videos, and padding."""
    tokenizer = processor.tokenizer
    ids = {config.image_token_id, config.video_token_id}
    ids |= {config.vision_start_token_id, config.vision_end_token_id}
    vocabulary = tokenizer.get_vocab()
    if "<|vision_pad|>" in vocabulary:
        ids.add(vocabulary["<|vision_pad|>"])
    # Padding ends nothing and stands for nothing, unless the tokenizer ends its turns with it.
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        ids.add(tokenizer.pad_token_id)
    return sorted(ids)
