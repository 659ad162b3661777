"""Rows to what the model takes: token ids, M-RoPE positions and vision tensors, once per prompt.

Everything downstream (rollout, old and reference log-probabilities, update, SFT, evaluation) builds its inputs from
`EncodedPrompt`, so that all of them see the same ids, pixels and positions.
"""

import time
from collections.abc import Callable, MutableMapping
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedConfig, ProcessorMixin

from veripo_trl.data.media_paths import resolve_media
from veripo_trl.data.prompts import PromptTemplate, build_messages
from veripo_trl.data.schema import content_of
from veripo_trl.errors import VeripoError
from veripo_trl.files.tables import printable
from veripo_trl.media.downloads import fetch
from veripo_trl.media.images import load_image
from veripo_trl.media.video import Clip, VideoLoader
from veripo_trl.model.features import PIXELS
from veripo_trl.model.positions import mrope_positions

STAND_IN = "\ue000"  # for a row's text while the chat template is rendered


@dataclass(frozen=True)
class Shown:
    """How a row is shown otherwise than it is, in its key `shown`: what a method sends with its index.

    Attributes:
        kind, level: what the rollout store says of it.
        problem: the text in place of the row's, which rewards and the store keep; None for that.
        frames: of a `Clip` of the row gives the frames to show, as many and as large; None for its own. It is pickled.
    """

    kind: str
    level: float
    problem: str | None = None
    frames: Callable[[Clip], np.ndarray] | None = None


def as_shown(row: dict) -> dict:
    """The row with the text that is shown."""
    shown = row.get("shown")
    return row if shown is None or shown.problem is None else {**row, "problem": shown.problem}


class PromptTooLongError(VeripoError):
    """A prompt has more tokens than the run allows."""

    def __init__(self, message: str):
        super().__init__(printable(message))


@dataclass(eq=False)
class EncodedPrompt:
    """One prompt, encoded. Tensors stay on the host; `inputs.model_inputs` moves what a forward needs.

    No mapping and no `.to` on purpose: a data loader's `pin_memory` copies every mapping, and accelerate moves whatever
    has `.to`, so either would undo the sharing of one encoded prompt between the rows of a group.

    Attributes:
        input_ids: int64 array (P,), vision tokens expanded.
        positions: int64 array (3, P), see `mrope_positions`.
        pixel_values: (image patches, patch size) or None; image_grid_thw: int64 array (images, 3) or None.
        pixel_values_videos: (video patches, patch size) or None; video_grid_thw: int64 array (videos, 3) or None.
        second_per_grid_ts: seconds that one temporal step of each video covers, floats; None for models without it.
        media: a line per image and video for people: frames × height × width and tokens.
        load_s, encode_s: seconds spent in reading media and in the processor.
        features: what frozen vision towers made of the media, see `vision_inputs`; None until one did.
    """

    question_id: str
    input_ids: np.ndarray
    positions: np.ndarray
    pixel_values: torch.Tensor | None
    image_grid_thw: np.ndarray | None
    pixel_values_videos: torch.Tensor | None
    video_grid_thw: np.ndarray | None
    second_per_grid_ts: list[float] | None
    media: list[str]
    load_s: float
    encode_s: float
    features: MutableMapping | None = None

    def __getstate__(self):
        """Without features, which belong to the towers of one process."""
        return {**vars(self), "features": None}

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def next_position(self) -> int:
        """Position of the first token after the prompt, the same in all three axes."""
        return int(self.positions.max()) + 1


@dataclass(eq=False)
class PromptEncoder:
    """Encodes rows with a model's own processor.

    Args:
        processor: the model's `Qwen2_5_VLProcessor` or `Qwen3VLProcessor` (Qwen3.5's, too).
        config: the model's config.
        template: what turns a row into chat messages.
        loader: reads and samples the videos.
        max_image_pixels: largest area of one image, in pixels.
        max_prompt_tokens: longest prompt allowed, vision tokens included; None for no limit.
        pixel_dtype: dtype in which pixels are kept; the model's own dtype loses nothing, since it casts them first.
        allow_urls: whether rows may name media by URL.
    """

    processor: ProcessorMixin
    config: PreTrainedConfig
    _: KW_ONLY
    template: PromptTemplate
    loader: VideoLoader
    max_image_pixels: int = 1280 * 28 * 28
    max_prompt_tokens: int | None = None
    pixel_dtype: torch.dtype = torch.float32
    allow_urls: bool = False

    def __post_init__(self):
        """Run the processor once on made-up media, so that all modules it needs are imported in this process.

        A data loader forks. Were a thread of this process (the Hub client's, say) importing at that moment, the child
        would wait for ever for the lock of the first module that it imports itself.
        """
        import qwen_vl_utils.vision_process  # noqa: F401  (imported by the video loader on its first miss)
        from PIL import Image

        Image.init()
        side = self.config.vision_config.patch_size * self.config.vision_config.spatial_merge_size
        clip = Clip(np.zeros((2, side, side, 3), np.uint8), 2.0, 2, [0, 1], "made up")
        message = [{"role": "user", "content": [{"type": "video"}, {"type": "image"}]}]
        text = self.processor.apply_chat_template(message, tokenize=False)
        self._call_processor(text, [Image.fromarray(clip.frames[0])], [clip])

    def encode(self, row: dict, *, shuffle_seed: int | None = None) -> EncodedPrompt:
        """Encode one row's prompt.

        Args:
            row: a row of `rows.load_rows`, with `shown` (a `Shown`) where it is shown otherwise, and `begun` (text) where
                its answer is begun already.
            shuffle_seed: permute the frames of each video by this seed, see `shuffled_order`.

        Raises:
            MediaError: a video or image cannot be read. RowError: a path is missing or leaves the media root.
            PromptTooLongError: the prompt is over `max_prompt_tokens`.
        """
        started = time.perf_counter()
        clips, images = self.read_media(row)
        if shuffle_seed is not None:
            for clip in clips:
                clip.frames = clip.frames[shuffled_order(len(clip.frames), shuffle_seed)]
        return self.encode_media(row, clips, images, load_s=time.perf_counter() - started)

    def read_media(self, row: dict) -> tuple[list[Clip], list]:
        """The row's clips, as they are shown, and images (PIL). Raises MediaError, RowError as `encode` does."""
        videos, images = resolve_media(row, allow_urls=self.allow_urls)
        clips = [self._read(self.loader.load, path, row, "video") for path in videos]
        if (shown := row.get("shown")) is not None and shown.frames is not None:
            for clip in clips:
                clip.frames = shown.frames(clip)
        return clips, [self._read(load_image, path, row, "image") for path in images]

    def encode_media(self, row: dict, clips: list[Clip], images: list, *, load_s: float = 0.0) -> EncodedPrompt:
        """The row's prompt with these in place of its files: as many clips and images as it names."""
        started = time.perf_counter()
        rendered, text, tail = self._render(as_shown(row))
        inputs = self._call_processor(rendered, images, clips)
        input_ids = inputs["input_ids"][0].numpy()
        input_ids = np.insert(input_ids, len(input_ids) - tail, text)
        self._check_length(row, input_ids)
        grids = {
            name: inputs[name].numpy() if name in inputs else None
            for name in ("image_grid_thw", "video_grid_thw")
        }
        seconds = inputs.get("second_per_grid_ts")
        grids["second_per_grid_ts"] = (
            None if seconds is None else [float(second) for second in seconds]
        )
        pixels = {
            name: inputs[name].to(self.pixel_dtype) if name in inputs else None
            for name in PIXELS.values()
        }
        return EncodedPrompt(
            question_id=row["question_id"],
            input_ids=input_ids,
            positions=mrope_positions(input_ids, **grids, config=self.config),
            **pixels,
            **grids,
            media=self._describe(row, clips, grids["video_grid_thw"], grids["image_grid_thw"]),
            load_s=load_s,
            encode_s=time.perf_counter() - started,
        )

    def with_text(self, prompt: EncodedPrompt, before: dict, after: dict) -> EncodedPrompt:
        """The prompt of the row `before` as that of `after`, a row of the same media and type but another text."""
        (_, old, tail), (_, new, _) = self._render(before), self._render(after)
        end = len(prompt) - tail
        input_ids = np.concatenate([prompt.input_ids[: end - len(old)], new, prompt.input_ids[end:]])
        self._check_length(after, input_ids)
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        grids = {name: getattr(prompt, name) for name in names}
        return replace(prompt, input_ids=input_ids, positions=mrope_positions(input_ids, **grids, config=self.config))

    def _read(self, load, path: str, row: dict, kind: str):
        """`load` of a file, or of the copy of a URL, which errors go on to call by its URL."""
        local = fetch(path, row_id=row["question_id"], kind=kind) if "://" in path else path
        return load(local, row_id=row["question_id"], name=path)

    def _render(self, row: dict) -> tuple[str, list[int], int]:
        """(the chat prompt without the row's own text; the ids of that; how many ids of the prompt stand behind it).

        The text is tokenized apart, so that a control token that a row spells stays text.
        """
        messages = build_messages(row, self.template)
        part = messages[0]["content"][-1]
        (text,) = text_ids(self.processor.tokenizer, [part["text"]])
        part["text"] = STAND_IN
        rendered = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, after = rendered.split(STAND_IN)
        # Qwen3.5's template puts <think> there: here a completion opens it itself.
        after = after.partition("<think>")[0] + row.get("begun", "")
        return before + after, text, len(self.processor.tokenizer(after)["input_ids"])

    def _call_processor(self, text: str, images: list, clips: list[Clip]):
        """The processor's tensors. Clips have their size and frames already."""
        inputs = {"text": [text]}
        if images:
            shortest = self.processor.image_processor.size["shortest_edge"]
            size = {
                "shortest_edge": min(shortest, self.max_image_pixels),
                "longest_edge": self.max_image_pixels,
            }
            inputs |= {"images": images, "images_kwargs": {"size": size}}
        if clips:
            metadata = [clip_metadata(clip) for clip in clips]
            options = {"do_resize": False, "do_sample_frames": False, "video_metadata": metadata}
            inputs |= {"videos": [clip.frames for clip in clips], "videos_kwargs": options}
        return self.processor(**inputs, return_tensors="pt")

    def _check_length(self, row: dict, input_ids: np.ndarray) -> None:
        if self.max_prompt_tokens is not None and len(input_ids) > self.max_prompt_tokens:
            raise PromptTooLongError(
                f"Row {row['question_id']!r} ({', '.join(row['videos'] + row['images']) or 'text only'}): its prompt "
                f"has {len(input_ids)} tokens, the limit is max_prompt_tokens={self.max_prompt_tokens}. Vision tokens "
                f"are never cut off. Raise the limit, lower max_frames, fps or max_pixels, or drop the row."
            )

    def _describe(self, row, clips, video_grid, image_grid) -> list[str]:
        vision, lines = self.config.vision_config, []
        for path, clip, grid in zip(row["videos"], clips, video_grid if clips else [], strict=True):
            t, h, w, _ = clip.frames.shape
            what = f"{t} frames × {h} × {w} of {float(clip.total_num_frames):g} at {clip.fps:g} fps ({clip.backend})"
            lines.append((path, what, grid))
        for path, grid in zip(row["images"], image_grid if row["images"] else [], strict=True):
            lines.append(
                (path, f"image {grid[1] * vision.patch_size} × {grid[2] * vision.patch_size}", grid)
            )
        merge = vision.spatial_merge_size**2
        return [
            f"{printable(path).rpartition('/')[2]}: {what} → {int(grid.prod()) // merge} tokens"
            for path, what, grid in lines
        ]


def shuffled_order(frames: int, seed: int) -> np.ndarray:
    """A permutation of so many frames, never that which leaves all in place, unless there is no other."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(frames)
    while frames > 1 and (np.diff(order) == 1).all():
        order = rng.permutation(frames)
    return order


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


def encode_unique(encoder: PromptEncoder, rows: list[dict]) -> list[EncodedPrompt]:
    """Encode each distinct question of `rows` once; equal questions share one object. Ids may repeat: pairs of several
    sources are mixed."""
    keys = [(row["question_id"], content_of(row), row["media_root"]) for row in rows]
    distinct = dict(zip(keys, rows, strict=True))
    done = {key: encoder.encode(row) for key, row in distinct.items()}
    return [done[key] for key in keys]


def vision_token_ids(processor, config) -> list[int]:
    """Ids that a policy must never sample: placeholders and markers of images and videos, and padding."""
    tokenizer = processor.tokenizer
    ids = {
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
    }
    ids.add(tokenizer.get_vocab().get("<|vision_pad|>", config.video_token_id))
    # Padding ends nothing and stands for nothing, unless the tokenizer ends its turns with it.
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        ids.add(tokenizer.pad_token_id)
    return sorted(ids)
