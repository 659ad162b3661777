"""Cases of on_gpu.py that run more than an update: rollouts, whole steps, the loop, and what feeds them."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_loading
import bench_rollout
import bench_step
import torch
import yaml
from gpu_update import held, release
from machine import cores
from models import SIDE, made_up_prompt, random_model
from on_gpu import ends_with_its_parent
from own_positions import use_trained_positions
from timing import alternate
from torch.utils.data import DataLoader

from veripo_trl.model.inputs import vision_inputs
from veripo_trl.shared_prompt.rollout import sample_completions

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / "outputs" / "on_gpu"  # clips, and the loop, which goes on from there
LEARNED = ROOT / "speed" / "results" / "learn_tiny.json"


# ---- rollouts ---------------------------------------------------------------------------------------------------------


def sampler(shape: str, device: str):
    """(model, processor) for generation."""

    def make():
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model, processor = random_model(shape, device=device, dtype=dtype)
        model.eval()
        use_trained_positions(model)
        return model, processor

    return held(("sampler", shape), make)


def phases(device, shape, prompt, completion, group) -> dict:
    """Seconds of the vision tower and of the prefill, and tokens a second of decoding, a group's prompt computed once."""
    model, processor = sampler(shape, device)
    made_up = made_up_prompt(model.config, prompt, side=SIDE[shape], dtype=model.dtype)

    def tower():
        made_up.features = None
        vision_inputs(model, [made_up], device)

    def decode(tokens: int):
        sample_completions(
            model, [made_up] * group, pad_token_id=processor.tokenizer.pad_token_id, config=model.config,
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True,
        )  # fmt: skip

    ways = {"tower": tower, "first": lambda: decode(1), "all": lambda: decode(completion)}
    found = {name: way["seconds"] for name, way in alternate(ways, runs=2).items()}
    rate = group * (completion - 1) / (found["all"] - found["first"])
    return {
        "tower s": found["tower"],
        "prefill s": found["first"],
        "tokens a s": rate,
        "ms a token": 1e3 * group / rate,
        "tower patches a s": len(made_up.pixel_values_videos) / found["tower"],
    }


def rollout(device, shape, prompt, completion, group, **options) -> dict:
    """The rollout benchmark's case: ours against stock generation, and vLLM where it is given."""
    model, processor = sampler(shape, device)
    case = f"{prompt}:{completion}:{group}"
    found = bench_rollout.run_case(model, processor, case, runs=1, folder=SCRATCH / "clips", **options)
    record = {name: value for name, value in found.items() if name not in ("P:C:G", "runs", "ok")}
    if not found["ok"]:
        record |= {"state": "failed", "message": "the completions differ by more than rounding"}
    return record


def rollout_vllm(device, shape, prompt, completion, group) -> dict:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, as the trainer has it
    model, processor = sampler(shape, device)
    encoder, _ = bench_rollout.video_questions(model, processor, SCRATCH / "clips", prompt_tokens=prompt)
    encoder.loader.close()
    with tempfile.TemporaryDirectory() as folder:
        lengths, half = [prompt + completion], {"gpu_memory_utilization": 0.5}
        llm = bench_rollout.start_vllm(model, processor, lengths, Path(folder), encoder, **half)
        return rollout(device, shape, prompt, completion, group, llm=llm)


def copies(device) -> dict:
    """Gigabytes a second between host and device: pinned and pageable memory, and pinning itself."""
    size = 256 * 2**20
    pageable = torch.ones(size, dtype=torch.uint8)
    on_device = pageable.to(device)
    kept = [pinned := pageable.pin_memory()]  # what is pinned and given back would be there for the next
    ways = {
        "to the device, pageable": lambda: on_device.copy_(pageable),
        "to the device, pinned": lambda: on_device.copy_(pinned, non_blocking=True),
        "to the host, pageable": lambda: pageable.copy_(on_device),
        "to the host, pinned": lambda: pinned.copy_(on_device, non_blocking=True),
        "pinning": lambda: kept.append(pageable.pin_memory()),
    }
    return {f"{name}, GB/s": size / 1e9 / way["seconds"] for name, way in alternate(ways, runs=3).items()}


# ---- whole steps ------------------------------------------------------------------------------------------------------


def step(device, shape, shared) -> dict:
    """Whole GRPO steps of the trainer on clips of 64 seconds, which the loader's workers decode."""
    quick = shape == "tiny"
    if quick:
        bench_step.SIZES["tiny"] = {"prompts": 2, "completion": 8}
    args = argparse.Namespace(device=device, workers=2, width=640, height=360, fps=30, seconds=64)
    args.folder = SCRATCH / "clips"
    release()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "frames"
        found = bench_step.run("grpo", shape, args, shared=shared, cache=cache, epochs=1, lora=True)
    seconds = bench_step.split("grpo", found["steps"][1:])
    prompts = bench_step.SIZES[shape]["prompts"]
    record = {f"{part} s": value for part, value in seconds.items()}
    record |= {"prompts": prompts, "prompt tokens": found["prompt tokens"], "clips a s": prompts / seconds["whole"]}
    last = found["steps"][-1]  # by a worker's second clip: its first one starts its decoder
    loading, busy = last["load (in workers)"] + last["encode (in workers)"], seconds["whole"] - seconds["wait for data"]
    record |= {"loading on one core s": loading, "waits": "the GPU" if loading / cores() > busy else "the cores"}
    if device == "cuda":
        record["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return record


def loop(device, quick) -> dict:
    """One round of VerIPO's loop on the tiny world, as shipped but for the device, against the results on CPUs.

    Same: the 95% interval of each policy's accuracy and inconsistency meets those of the CPU's seeds.
    """
    folder = SCRATCH / f"loop_{device}{'_quick' * quick}"
    folder.mkdir(parents=True, exist_ok=True)
    config = yaml.safe_load((ROOT / "recipes" / "configs" / "tiny" / "veripo.yaml").read_text())
    config |= {"iterations": 1, "output_dir": "outputs/veripo"}
    for stage in [*config["stages"], *config["iteration"]]:
        if stage["recipe"] != "verify_rollouts.py":
            changes = {"use_cpu": device == "cpu", "dataloader_num_workers": min(4, cores())}
            changes |= few_steps(stage["recipe"]) if quick else {}
            stage["overrides"] = {**stage.get("overrides", {}), **changes}
    if device == "cuda":
        config["accelerate"] = ["--num_processes", 1]
    if quick:
        small_world(folder / "outputs" / "tiny_world")
    (folder / "loop.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "recipes" / "veripo.py"), "--config", "loop.yaml"]
    subprocess.run(command, cwd=folder, check=True, preexec_fn=ends_with_its_parent(signal.SIGTERM))
    run = json.loads((folder / "outputs" / "veripo" / "run.json").read_text())
    shutil.rmtree(folder / "outputs" / "veripo")  # what was broken off goes on, what is done is done anew
    minutes = {f"{entry['name']} minutes": entry["minutes"] for entry in run["stages"] if entry["status"] == "done"}
    return minutes if quick else {**minutes, **quality(run["stages"])}


def few_steps(recipe: str) -> dict:
    """Settings of a loop that only shows that it runs."""
    few = {"max_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 4, "report_max_new_tokens": 4}
    few |= {"tiny_world": None}  # it is there, and smaller
    own = {"sft_video.py": {"stop_at_accuracy": None}, "grpo_video.py": {"num_generations": 2}}
    return few | own.get(recipe, {})


def small_world(folder: Path) -> None:
    from veripo_trl.tiny.questions import SplitSize
    from veripo_trl.tiny.world import make_world

    make_world(folder, sizes={split: SplitSize(clips=4, questions=4) for split in ("train", "rl", "dev", "heldout")})


def quality(stages: list[dict]) -> dict:
    """Each policy's sampled accuracy and inconsistency, and whether the CPU's are met."""
    table, record, missed = json.loads(LEARNED.read_text())["table"], {}, []
    for entry in stages:
        sampled = entry["results"].get("after", {}).get("sampled")
        if sampled is None:
            continue
        for name, interval in (("accuracy", "95%"), ("inconsistency", "95%  ")):
            before = [row for row in table if row["policy"] == entry["name"]]
            bounds = [float(bound) for row in before for bound in row[interval].split("–")]
            record[f"{entry['name']} {name}"] = sampled[name]
            record[f"{entry['name']} {name}, CPU"] = f"{min(bounds)}–{max(bounds)}"
            if sampled[f"{name}_low"] > max(bounds) or sampled[f"{name}_high"] < min(bounds):
                missed.append(f"{name} of {entry['name']}")
    if missed:
        record |= {"state": "failed", "message": f"outside of the CPU's intervals: {', '.join(missed)}"}
    return record


# ---- what feeds them --------------------------------------------------------------------------------------------------


def sources(quick: bool) -> tuple[argparse.Namespace, list[dict]]:
    """Clips of 64 seconds at 30 frames a second, as `step` reads them."""
    args = argparse.Namespace(width=640, height=360, fps=30, seconds=64, max_frames=128, max_pixels=128 * 28 * 28)
    args.threads, clips = [1, 0], 4
    if quick:
        args.width, args.height, args.seconds, args.threads, clips = 168, 112, 2, [1], 2
    return args, bench_loading.make_rows(SCRATCH / "clips", clips, args)


def decoders(device, quick) -> dict:
    """One clip at a time, by decoder and threads: source frames a second."""
    args, rows = sources(quick)
    model, processor = random_model("tiny")
    lines, equal = bench_loading.measure_decoders(model.config, processor, rows, args)
    record = {f"{line['decoder']}, {line['threads']} threads, frames a s": line["source frames a s"] for line in lines}
    return record if equal else {"state": "failed", "message": "the decoders' frames differ", **record}


def workers(device, quick) -> dict:
    """Clips a second that so many of the loader's workers decode, resize and encode; a step eats its own `clips a s`."""
    args, rows = sources(quick)
    model, processor = random_model("tiny", dtype=torch.bfloat16)
    encoder = bench_loading.make_encoder(model.config, processor, args, decode_threads=1)
    record: dict = {"cores": cores(), "sampled frames a clip": min(args.max_frames, 2 * args.seconds)}
    for count in (1,) if quick else sorted({1, 4, min(cores(), 32)}):
        own = [rows[number % len(rows)] for number in range(4 * count)]
        loader, at = DataLoader(own, batch_size=None, num_workers=count, collate_fn=encoder.encode), []
        for _ in loader:
            at.append(time.perf_counter())
        # A worker's first clip is left out: it starts its decoder.
        record[f"{count} workers, clips a s"] = 3 * count / (at[-1] - at[count - 1])
    encoder.loader.close()
    return record
