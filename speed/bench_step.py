"""Whole GRPO and DPO steps of the real trainers, split into their parts, and what waits for the loading of videos.

    python speed/bench_step.py
    python speed/bench_step.py --shapes mid --workers 0                             # decoding in the step
    python speed/bench_step.py --device cuda --shapes 7b --seconds 64 --workers 4   # LoRA, bf16

Ours, and the plain path of the same trainers (`shared_prefix: false`: whole rows in every scoring forward) on the same
rows with the same seed. The tiny model reads the tiny world's clips, the mid-size one clips of 640 × 360 at 30 frames a
second, from an empty frame cache, for two epochs of a dataset of three batches. The tables leave out each run's first
step, which starts the workers and checks the rows.

The program fails where both paths have other losses or gradient norms (GRPO: in the first step, whose samples are the
same; DPO: in all steps of an epoch), or where the second epoch decodes a video.
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the loader's workers share the cores with the model

import copy
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from bench_loading import make_rows
from machine import describe_machine
from models import lora as adapter
from models import random_model, video_questions
from peft import get_peft_model
from transformers import TrainerCallback, set_seed

from veripo_trl.data.schema import rows_to_dataset
from veripo_trl.files.tables import print_table, write_json
from veripo_trl.media.frame_cache import FrameCache
from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.build import make_encoder
from veripo_trl.recipe.prepare import allow_many_open_files
from veripo_trl.trainers.dpo import VideoDPOConfig, VideoDPOTrainer
from veripo_trl.trainers.grpo import VideoGRPOConfig, VideoGRPOTrainer

ROOT = Path(__file__).resolve().parent.parent
GROUP = 8
SIZES = {  # prompts of a batch, tokens of a completion
    "tiny": {"prompts": 16, "completion": 40},
    "mid": {"prompts": 2, "completion": 64},
    "3b": {"prompts": 1, "completion": 270},  # more do not fit as plain rows
    "7b": {"prompts": 1, "completion": 270},
}
EPOCHS, BATCHES = 2, 3  # batches of an epoch
LOSS_LIMIT, NORM_LIMIT = 1e-4, 1e-3  # absolute, relative


def make_questions(shape: str, model, processor, args, cache: Path):
    """An encoder with an empty frame cache, and the rows of an epoch."""
    count = SIZES[shape]["prompts"] * BATCHES
    if shape == "tiny":
        encoder, rows = video_questions(model, processor, args.folder, prompt_tokens=56, count=count, side=56)
    else:
        rows = make_rows(args.folder, count, args)
        limits = {"max_frames": 30, "max_pixels": 224**2} if shape == "mid" else {"max_pixels": 128 * 28 * 28}
        data = DataArguments(prompt_template="tiny", fps=2.0, min_frames=2, **limits)
        encoder = make_encoder(model, processor, data)
    encoder.loader.cache = FrameCache(cache, max_bytes=10**10)  # empty until training starts
    return encoder, rows


class StepClock(TrainerCallback):
    """Seconds of each step: `trainer.seconds`' parts, and `whole`, from the end of the step before to its own."""

    def __init__(self, log_path: Path):
        self.trainer, self.steps, self.log_path, self.before = None, [], log_path, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.at = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now, seconds = time.perf_counter(), dict(self.trainer.seconds)
        step = {part: value - self.before.get(part, 0.0) for part, value in seconds.items()}
        self.steps.append({**step, "whole": now - self.at, "decoded": decoded(self.log_path)})
        self.at, self.before = now, seconds


def log_decodes(loader, log_path: Path) -> None:
    """Write a line per clip that is not cached, also from the loader's forked workers."""
    decode = loader._decode

    def logged(path, *args):
        with open(log_path, "a") as log:
            log.write(f"{path}\n")
        return decode(path, *args)

    loader._decode = logged


def decoded(log_path: Path) -> int:
    return len(log_path.read_text().splitlines()) if log_path.exists() else 0


def reward(completion_ids, **kwargs) -> list[float]:
    """Differs within a group, so that there is something to learn."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def run(method: str, shape: str, args, *, shared: bool, cache: Path, epochs: int, lora: bool | None = None) -> dict:
    """Train, and return the parts of the steps after the first, their losses and what was decoded.

    `lora`: an adapter and gradient checkpointing; default: as the shape and the device ask for.
    """
    set_seed(0)
    sizes, lora = SIZES[shape], shape in ("3b", "7b") if lora is None else lora
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    model, processor = random_model(shape, device=args.device, dtype=dtype)
    encoder, rows = make_questions(shape, model, processor, args, cache)
    log_path = cache.parent / f"{method}-{shape}-{shared}-{epochs}.jsonl"
    log_decodes(encoder.loader, log_path)
    options = {
        "output_dir": str(cache.parent / "run"), "max_steps": BATCHES * epochs, "learning_rate": 1e-6,
        "lr_scheduler_type": "constant", "shared_prefix": shared, "dataloader_num_workers": args.workers,
        "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "gradient_checkpointing": lora or args.device != "cpu", "bf16": args.device != "cpu",
        "use_cpu": args.device == "cpu", "disable_tqdm": True, "dataloader_pin_memory": args.device != "cpu",
    }  # fmt: skip
    clock = StepClock(log_path)
    if lora:
        model = get_peft_model(model, adapter())
    common = {"model": model, "processing_class": processor, "encoder": encoder, "callbacks": [clock]}
    if method == "grpo":
        training = VideoGRPOConfig(
            per_device_train_batch_size=sizes["prompts"] * GROUP, num_generations=GROUP, steps_per_generation=1,
            max_completion_length=sizes["completion"], generation_kwargs={"min_new_tokens": sizes["completion"]},
            **options,
        )  # fmt: skip
        trainer = VideoGRPOTrainer(args=training, train_dataset=rows_to_dataset(rows), reward_funcs=[reward], **common)
    else:
        training = VideoDPOConfig(per_device_train_batch_size=sizes["prompts"], **options)
        words = (sizes["completion"] - 1) // 2
        dataset = rows_to_dataset(rows)
        dataset = dataset.add_column("chosen", [" red blue" * words] * len(rows))
        dataset = dataset.add_column("rejected", [" blue green" * words] * len(rows))
        dataset = dataset.add_column("rejected_finished", [True] * len(rows))
        reference = None if lora else copy.deepcopy(model)
        trainer = VideoDPOTrainer(args=training, train_dataset=dataset, ref_model=reference, **common)
    clock.trainer = trainer
    trainer.train()
    encoder.loader.close()
    history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {
        "steps": clock.steps,
        "loss": [entry["loss"] for entry in history],
        "grad_norm": [float(entry["grad_norm"]) for entry in history],
        "questions": sizes["prompts"],
        "prompt tokens": len(encoder.encode(rows[0])),
    }


def split(method: str, steps: list[dict]) -> dict[str, float]:
    """Median seconds of the parts, which follow one another and make up the whole."""

    def parts(step: dict) -> dict[str, float]:
        def of(part):
            return step.get(part, 0.0)

        found = {"wait for data": of("wait for data")}
        if method == "grpo":
            found |= {"generate": of("generate"), "score": of("score")}
            # Advantages, and ids to text.
            found["rest of rollout"] = of("rollout") - of("generate") - of("score")
            found["update"] = of("update")
        else:
            found |= {"reference": of("reference"), "update": of("step") - of("reference")}
        return {**found, "optimizer, logging": step["whole"] - sum(found.values()), "whole": step["whole"]}

    rows = [parts(step) for step in steps]
    return {part: median(row[part] for row in rows) for part in rows[0]}


def compare(ours: dict, plain: dict, *, steps: int) -> tuple[float, float]:
    """Largest differences of the first steps' losses, and of their gradient norms, relative to the plain ones."""
    losses = zip(ours["loss"][:steps], plain["loss"][:steps], strict=True)
    norms = zip(ours["grad_norm"][:steps], plain["grad_norm"][:steps], strict=True)
    return max(abs(a - b) for a, b in losses), max(abs(a - b) / b for a, b in norms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["tiny", "mid", "3b", "7b"], default=["tiny", "mid"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="of the data loader")
    parser.add_argument("--height", type=int, default=360)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--fps", type=int, default=30)
    parser.add_argument("--seconds", type=int, default=15, help="length of the clips, but for the tiny model")
    parser.add_argument("--quick", action="store_true", help="the tiny model only, on fewer rows")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "bench_clips", help="where clips are kept")
    parser.add_argument("--json", type=Path, default=ROOT / "speed" / "results" / "bench_step.json")
    args = parser.parse_args()
    if args.quick:
        args.shapes, SIZES["tiny"] = ["tiny"], {"prompts": 2, "completion": 8}
    allow_many_open_files()
    results, parts, loading, costs, failures = {}, {"grpo": [], "dpo": []}, [], [], []
    for shape in args.shapes:
        for method in ("grpo", "dpo"):
            with tempfile.TemporaryDirectory() as folder:
                cache = Path(folder) / "frames"
                ours = run(method, shape, args, shared=True, cache=cache, epochs=EPOCHS)
                plain = run(method, shape, args, shared=False, cache=cache, epochs=1)
            results[f"{method} {shape}"] = {"ours": ours, "plain": plain}
            # After an update that differs by rounding, GRPO may sample another token; DPO's answers are given.
            loss, norm = compare(ours, plain, steps=1 if method == "grpo" else len(plain["loss"]))
            if not (loss <= LOSS_LIMIT and norm <= NORM_LIMIT) and args.device == "cpu":
                failures.append(f"{method} {shape}: ours and plain differ by {loss:.1e} in loss, {norm:.1e} in gradient")
            for name, found in (("ours", ours), ("plain", plain)):
                seconds = split(method, found["steps"][1:])
                parts[method].append({"model": shape, "path": name, **seconds})
            ratio = parts[method][-1]["whole"] / parts[method][-2]["whole"]
            differences = f"loss differs by {loss:.1e}, gradient norm by {norm:.1e}"
            print(f"{method}, {shape}: ours {ratio:.2f}x as fast as plain; {differences}", flush=True)
            loading += show_loading(method, shape, ours, failures)
        own = {method: results[f"{method} {shape}"]["ours"] for method in parts}
        cost = {method: split(method, found["steps"][1:])["whole"] / found["questions"] for method, found in own.items()}
        row = {"model": shape, "P": own["grpo"]["prompt tokens"], "C": SIZES[shape]["completion"], "G": GROUP}
        row |= {f"{method} s a question": value for method, value in cost.items()}
        costs.append({**row, "DPO faster by": cost["grpo"] / cost["dpo"]})
    print_table("GRPO step: seconds, medians", parts["grpo"])
    print_table("DPO step: seconds, medians", parts["dpo"])
    print_table(f"Loading, {args.workers} workers: seconds a step, medians", loading)
    print_table("DPO's cost against GRPO's (arXiv 2505.19000 says 7x)", costs)
    machine = describe_machine() | {"threads": torch.get_num_threads()}
    options = {name: value for name, value in vars(args).items() if name not in ("folder", "json")}
    tables = {"grpo": parts["grpo"], "dpo": parts["dpo"], "loading": loading, "costs": costs}
    write_json(args.json, {"machine": machine, "options": options, **tables, "runs": results, "failures": failures})
    print(f"\nwritten to {args.json}")
    if failures:
        sys.exit("\n".join(failures))


def show_loading(method: str, shape: str, ours: dict, failures: list[str]) -> list[dict]:
    """Per epoch what the step waited and what the workers spent (DPO's pairs do not say)."""
    lines, before = [], 0
    for epoch in range(EPOCHS):
        own = ours["steps"][epoch * BATCHES : (epoch + 1) * BATCHES]
        count, before = own[-1]["decoded"] - before, own[-1]["decoded"]
        if epoch and count:
            failures.append(f"{method} {shape}: the second epoch decoded {count} videos")
        own = own[1:] if epoch == 0 else own
        line = {"step": method, "model": shape, "epoch": epoch + 1, "videos decoded": count}
        line["wait for data"] = median(step["wait for data"] for step in own)
        for part in ("load (in workers)", "encode (in workers)"):
            line[part] = median(step.get(part, float("nan")) for step in own)
        lines.append({**line, "whole step": median(step["whole"] for step in own)})
    return lines


if __name__ == "__main__":
    main()
