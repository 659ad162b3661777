"""Decoding and preprocessing videos: by decoder and threads, cold and from the frame cache, and against stock TRL.

    python speed/bench_loading.py
    python speed/bench_loading.py --height 720 --width 1280 --seconds 60 --max_frames 128

Clips are H.264 in mp4, written by the program once. "cold": the frame cache is empty (the file itself is in the system's
memory); "cached": the sampled frames are read from it, as in every epoch after the first.

Stock: TRL 1.16 has no path for video. What it does for images, done for video with Qwen's own helper: for each of the G
rows of a prompt `qwen_vl_utils.process_vision_info` (decord) and the processor, once where `_tokenize_prompts` renders
the rows and once where `_generate_and_score_completions` prepares its forward passes: 2 · G times per prompt. (vLLM
would add a third.) Ours: `encode_unique`, once per prompt.

The program fails where cached frames are not bit for bit the cold ones, where the decoders' frames differ by more than
their conversion of colours, or where stock's prompt is another than ours.
"""

import argparse
import os

os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"  # read when qwen_vl_utils is imported

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import av
import numpy as np
import torch
from machine import describe_machine
from models import moving_stripes, question, random_model
from qwen_vl_utils import process_vision_info

from veripo_trl.data.prompts import build_messages
from veripo_trl.files.tables import print_table, write_json
from veripo_trl.model.encoding import encode_unique
from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.build import encoder_from_config

ROOT = Path(__file__).resolve().parent.parent
DECODER_LIMIT = 2.0  # mean difference between two decoders' frames, of 255
STOCK_LIMIT = 0.1  # mean difference between two resizings, in standard deviations of a pixel


def write_source(path: Path, args, *, seed: int) -> None:
    """An H.264 clip with key frames as x264 sets them."""
    if path.exists():
        return
    started = time.perf_counter()
    texture = moving_stripes(1, args.height, args.width * 2, seed=seed)[0]
    temporary = path.with_suffix(".part")
    with av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=args.fps, options={"crf": "23", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = args.height, args.width, "yuv420p"
        for frame in range(args.seconds * args.fps):
            picture = np.roll(texture, 3 * frame, axis=1)[:, : args.width]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    temporary.rename(path)
    seconds = time.perf_counter() - started
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, written in {seconds:.1f} s", flush=True)


def make_rows(folder: Path, count: int, args) -> list[dict]:
    """A question about each of so many clips in that folder, written unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{args.width}x{args.height}-{args.seconds}s-{args.fps}fps"
    paths = [folder / f"{name}-{number}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        write_source(path, args, seed=number)
    return [question(path.stem, folder, videos=[path.name]) for path in paths]


def make_encoder(config, processor, args, **data):
    arguments = DataArguments(
        prompt_template="tiny", fps=2.0, max_frames=args.max_frames, max_pixels=args.max_pixels, **data
    )
    return encoder_from_config(config, processor, arguments)


def measure_decoders(config, processor, rows, args) -> tuple[list[dict], bool]:
    """Seconds a clip by decoder and threads, without the processor. The last decoder's frames against the first's."""
    lines, clips = [], {}
    for backend in ("decord", "pyav"):
        for threads in args.threads:
            loader = make_encoder(config, processor, args, video_backend=backend, decode_threads=threads).loader
            paths = [os.path.join(row["media_root"], row["videos"][0]) for row in rows]
            loader.load(paths[0], row_id="warm-up")  # starts the decoding process
            seconds = []
            for path in paths[1:]:
                started = time.perf_counter()
                clip = loader.load(path, row_id=path)
                seconds.append(time.perf_counter() - started)
            loader.close()
            clips.setdefault(backend, clip)
            source = clip.total_num_frames
            lines.append(
                {
                    "decoder": clip.backend,
                    "threads": threads or "auto",
                    "s a clip": median(seconds),
                    "source frames a s": source / median(seconds),
                    "sampled": f"{len(clip.frames)} × {clip.frames.shape[1]} × {clip.frames.shape[2]} of {source}",
                    "all": seconds,
                }
            )
            print(f"{backend}, {threads or 'auto'} threads: {median(seconds):.2f} s a clip", flush=True)
    first, last = clips["decord"], clips["pyav"]
    difference = np.abs(first.frames.astype(np.int16) - last.frames)
    print(f"decord and PyAV: frames differ by {difference.mean():.3f} of 255 in the mean, {difference.max()} at most")
    same = (first.backend, last.backend) == ("decord", "pyav") and first.frames_indices == last.frames_indices
    return lines, same and float(difference.mean()) <= DECODER_LIMIT


def measure_cache(config, processor, rows, args) -> tuple[list[dict], bool]:
    """A whole `encode` without and with the frame cache, split into loading and processor."""
    lines, prompts, equal = [], {}, True
    with tempfile.TemporaryDirectory() as folder:
        encoder = make_encoder(config, processor, args, frame_cache=folder)
        encoder.encode(rows[0])  # starts the decoding process
        rows = rows[1:]
        for state in ("cold", "cached"):
            runs = [encoder.encode(row) for _ in range(1 if state == "cold" else args.runs) for row in rows]
            prompts[state] = runs[-len(rows) :]
            lines.append(
                {
                    "frames": state,
                    "load s": median(prompt.load_s for prompt in runs),
                    "processor s": median(prompt.encode_s for prompt in runs),
                    "tokens": len(runs[0]),
                    "clips decoded": encoder.loader.decoded - 1,
                    "cache hits": encoder.loader.cache_hits,
                }
            )
        equal = encoder.loader.decoded == len(rows) + 1
        encoder.loader.close()
    for cold, cached in zip(prompts["cold"], prompts["cached"], strict=True):
        equal = equal and torch.equal(cold.pixel_values_videos, cached.pixel_values_videos)
        equal = equal and np.array_equal(cold.input_ids, cached.input_ids)
    return lines, equal


def stock_batch(processor, row: dict, template, args) -> dict:
    """What stock code does for one prompt's G rows, in both places; the last row's tensors."""
    for _ in range(2):
        for _ in range(args.group):
            messages = build_messages(row, template)
            video = os.path.join(row["media_root"], row["videos"][0])
            options = {"video": video, "fps": 2.0, "max_frames": args.max_frames, "max_pixels": args.max_pixels}
            options["min_pixels"] = 16 * 28 * 28
            content = [{**part, **options} if part["type"] == "video" else part for part in messages[0]["content"]]
            _, videos, video_kwargs = process_vision_info(
                [{"role": "user", "content": content}], return_video_kwargs=True, return_video_metadata=True
            )
            frames, metadata = zip(*videos, strict=True)
            text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            result = processor(
                text=[text],
                videos=list(frames),
                videos_kwargs={"do_resize": False, "video_metadata": list(metadata), **video_kwargs},
                return_tensors="pt",
            )
    return result


def measure_batch(config, processor, rows, args) -> tuple[list[dict], bool]:
    """One prompt with its group: stock, ours cold, ours cached."""
    found = {name: [] for name in ("stock", "ours, cold", "ours, cached")}
    with tempfile.TemporaryDirectory() as folder:
        encoder = make_encoder(config, processor, args, frame_cache=folder)
        encoder.loader.load(os.path.join(rows[0]["media_root"], rows[0]["videos"][0]), row_id="warm-up")
        for row in rows[1 : 1 + args.runs]:  # a clip is cold once
            started = time.perf_counter()
            stock = stock_batch(processor, row, encoder.template, args)
            found["stock"].append(time.perf_counter() - started)
            for name in ("ours, cold", "ours, cached"):
                started = time.perf_counter()
                prompts = encode_unique(encoder, [row] * args.group)
                found[name].append(time.perf_counter() - started)
        encoder.loader.close()
    ours = prompts[0]
    same = np.array_equal(stock["input_ids"][0].numpy(), ours.input_ids)
    same = same and np.array_equal(stock["video_grid_thw"].numpy(), ours.video_grid_thw)
    difference = float((stock["pixel_values_videos"] - ours.pixel_values_videos).abs().mean()) if same else float("nan")
    print(f"stock and ours: pixels differ by {difference:.4f} standard deviations in the mean (two resizings)")
    seconds = {name: median(values) for name, values in found.items()}
    lines = [
        {
            f"one prompt, G {args.group}": name,
            "videos decoded": {"stock": 2 * args.group, "ours, cold": 1, "ours, cached": 0}[name],
            "processor calls": 2 * args.group if name == "stock" else 1,
            "seconds": value,
            "ratio": seconds["stock"] / value,
            "all": found[name],
        }
        for name, value in seconds.items()
    ]
    return lines, same and difference <= STOCK_LIMIT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=360)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--fps", type=int, default=30, help="frames per second of the clips")
    parser.add_argument("--seconds", type=int, default=30, help="length of the clips")
    parser.add_argument("--clips", type=int, default=4, help="the first one only warms up")
    parser.add_argument("--max_frames", type=int, default=64)
    parser.add_argument("--max_pixels", type=int, default=128 * 28 * 28, help="of one frame")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 0], help="of the decoder; 0 is its own choice")
    parser.add_argument("--group", type=int, default=8, help="G: rows of one prompt")
    parser.add_argument("--runs", type=int, default=3, help="batches for stock and ours; tables have medians")
    parser.add_argument("--quick", action="store_true", help="small clips, to see that the program works")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "bench_clips", help="where clips are kept")
    parser.add_argument("--json", type=Path, default=ROOT / "speed" / "results" / "bench_loading.json")
    args = parser.parse_args()
    if args.quick:
        args.height, args.width, args.seconds, args.clips, args.runs, args.threads = 112, 168, 3, 2, 1, [1]
    rows = make_rows(args.folder, args.clips, args)
    model, processor = random_model("mid")
    results, checks = {}, {}
    for name, measure in (("decoders", measure_decoders), ("cache", measure_cache), ("batch", measure_batch)):
        results[name], checks[name] = measure(model.config, processor, rows, args)
    size = f"{args.width} × {args.height}, {args.seconds} s at {args.fps} fps"
    for name, title in (
        ("decoders", f"Decoding and resizing ({size})"),
        ("cache", "One prompt: load and processor"),
        ("batch", "What a GRPO batch needs of one prompt"),
    ):
        print_table(title, [{key: value for key, value in line.items() if key != "all"} for line in results[name]])
    machine = describe_machine() | {"threads": torch.get_num_threads()}
    options = {name: value for name, value in vars(args).items() if name not in ("folder", "json")}
    write_json(args.json, {"machine": machine, "options": options, "checks": checks, **results})
    print(f"\nwritten to {args.json}")
    if not all(checks.values()):
        sys.exit(f"Frames or prompts differ: {checks}.")


if __name__ == "__main__":
    main()
