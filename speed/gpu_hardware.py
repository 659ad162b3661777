"""Cases of on_gpu.py: a step of each shipped configuration at its real sizes. Is what its `Hardware:` line says true?

The recipe's own parser reads the file. Weights are random, rows are made up: a video of `max_frames` frames of
`max_pixels`, or the largest image where the file asks for images only. One micro-batch makes a step. What one GPU has no
room or time for is calculated, and the record says so:

- a rollout ends after 256 tokens and is filled up to `max_completion_length`: the update has its real size;
- where DeepSpeed shares out gradients, optimizer and weights, gradients are dropped as soon as they are there, and a
  process's share of all is added; so is the reference of a GRPO with full weights.
"""

import importlib.util
import re
import tempfile
import time
from pathlib import Path

import torch
import yaml
from gpu_update import release
from models import lora, moving_stripes, question, random_model, striped_clip
from peft import get_peft_model
from PIL import Image
from transformers import TrainingArguments
from trl import ModelConfig

from veripo_trl.answers.rewards import reward_functions
from veripo_trl.data.schema import rows_to_dataset
from veripo_trl.model.policy import SEEING
from veripo_trl.recipe.arguments import DataArguments, GRPOArguments
from veripo_trl.recipe.arguments import parse as parse_arguments
from veripo_trl.recipe.build import make_encoder
from veripo_trl.trainers.dpo import VideoDPOTrainer
from veripo_trl.trainers.grpo import VideoGRPOTrainer
from veripo_trl.trainers.sft import VideoSFTTrainer

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "recipes" / "configs"
GIB = 2**30
SAMPLED = 256  # tokens of a rollout that the model samples
OUTSIDE_GIB = {1: 0.6, 8: 1.6}  # CUDA's context, and with several processes NCCL's buffers: estimated
BUCKETS = 2 * 5e8 * 2  # bytes: DeepSpeed's default buckets, for reducing and for gathering
SIDES = {128 * 28 * 28: (224, 448), 1280 * 28 * 28: (896, 1120)}  # height and width of an area
ONE_STEP = "--max_steps 1 --gradient_accumulation_steps 1 --save_strategy no --dataloader_num_workers 0"
ON_CPU = "--bf16 false --use_cpu true --min_pixels 3136 --max_pixels 3136 --max_image_pixels 3136 --max_frames 4"


def one_step(device, config, shape, answer, search=None) -> dict:
    """GiB that a process needs, as measured and with what is calculated, and seconds.

    Args:
        answer: tokens of an answer, for SFT and DPO.
        search: for DPO, the configuration whose policy made the pairs: pairs are seen as that sees.
    """
    release()
    file = CONFIGS / config
    launch = re.search(r"^# Launch: .* --config_file (\S+) (\S+)", file.read_text(), re.M)
    hardware = re.search(r"^# Hardware: +(.*)", file.read_text(), re.M)[1]
    engine, recipe = yaml.safe_load((ROOT / launch[1]).read_text()), ROOT / launch[2]
    processes, zero = engine["num_processes"], engine.get("deepspeed_config", {}).get("zero_stage", 0)
    with tempfile.TemporaryDirectory() as folder:
        settings = parse(file, recipe, Path(folder), device)
        data, training, model_args = (
            next(item for item in settings if isinstance(item, kind))
            for kind in (DataArguments, TrainingArguments, ModelConfig)
        )
        seen = SEEING | (yaml.safe_load((CONFIGS / search).read_text()) if search else {})
        for name in SEEING:
            if getattr(data, name) is None:
                setattr(data, name, seen[name])
        model, processor = random_model(shape, device=device, dtype=torch.bfloat16)
        if "lora" in config:  # also of the DPO that continues an adapter
            model = get_peft_model(model, lora(r=model_args.lora_r, lora_alpha=model_args.lora_alpha))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if zero:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(drop_gradient)
        encoder = make_encoder(model, processor, data)
        rows = make_rows(recipe.name, data, training, answer, Path(folder))
        own = [item for item in settings if isinstance(item, GRPOArguments)]
        rewards = reward_functions(own[0].rewards, own[0].reward_kwargs) if own else []
        common = {"model": model, "args": training, "processing_class": processor, "encoder": encoder}
        trainer = make_trainer(recipe.name, common, rows_to_dataset(rows), rewards, shape, answer)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        trainer.train()
        record = {"train s": time.perf_counter() - started, "prompt tokens": len(encoder.encode(rows[0]))}
        encoder.loader.close()
    record |= {f"{part} s": seconds for part, seconds in getattr(trainer, "seconds", {}).items()}
    if device == "cpu":
        return record
    measured = torch.cuda.max_memory_allocated() / GIB
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB
    needed, states = measured + OUTSIDE_GIB[processes], sum(p.numel() for p in trained)
    if zero:  # gradients in bfloat16; weights and two moments in float32
        needed += (states * (2 + 12) / processes + BUCKETS) / GIB
    else:  # Adam's moments, which a first step makes after its peak
        needed += 8 * states / GIB
    if zero == 3:
        needed -= weights * (1 - 1 / processes)
    if yaml.safe_load(file.read_text()).get("beta") and recipe.name == "grpo_video.py" and "lora" not in config:
        needed += weights / (processes if zero == 3 else 1)
    reserved = torch.cuda.max_memory_reserved() / GIB
    memory = {"needs GiB": needed, "measured GiB": measured, "reserved GiB": reserved, "processes": processes}
    return {**memory, "ZeRO": zero, **verdict(needed, hardware), **record}


def verdict(needed: float, hardware: str) -> dict:
    """Of what a `Hardware:` line says, the sizes of a card that suffice: "24 to 80 GB" names two."""
    sizes = [int(size) for size in re.findall(r"\d+", re.search(r"(\d+ to )?\d+ GB", hardware)[0])]
    found: dict = {"says": hardware, **{f"fits {size} GB": needed <= size for size in sizes}}
    if needed > max(sizes):
        found |= {"state": "failed", "message": f"needs more than the {max(sizes)} GB of its Hardware line"}
    return found


def drop_gradient(parameter) -> None:
    parameter.grad = None


def parse(file: Path, recipe: Path, folder: Path, device: str) -> tuple:
    """What the recipe makes of a file, with one step asked for."""
    spec = importlib.util.spec_from_file_location(recipe.stem, recipe)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    argv = ["--config", str(file), "--output_dir", str(folder / "run"), "--frame_cache", str(folder / "frames")]
    argv += ONE_STEP.split()
    if recipe.name == "grpo_video.py":
        argv += ["--steps_per_generation", "1", "--beta", "0"]
    if device == "cpu":
        argv += ON_CPU.split()
        if recipe.name == "grpo_video.py":
            argv += "--per_device_train_batch_size 2 --num_generations 2 --max_completion_length 8".split()
    return parse_arguments(module.ARGUMENTS, default_config=module.DEFAULT_CONFIG, argv=argv)


def make_rows(recipe: str, data, training, answer: int | None, folder: Path) -> list[dict]:
    """One question for GRPO, otherwise a micro-batch of them: different questions, about media of one size."""
    kinds = {entry.get("where", {}).get("data_type") for entry in data.datasets or [{}]}
    images_only = kinds == {"image"}
    height, width = SIDES.get(data.max_image_pixels if images_only else data.max_pixels, (56, 56))
    if images_only:
        Image.fromarray(moving_stripes(1, height, width)[0]).save(folder / "image.png")
        media = {"images": ["image.png"]}
    else:
        media = {"videos": [striped_clip(folder, frames=data.max_frames, height=height, width=width)]}
    count = 1 if recipe == "grpo_video.py" else training.per_device_train_batch_size
    thinking = " red" * (answer or 1)
    return [question(f"row {number}", folder, process=thinking, **media) for number in range(count)]


class ShortRollouts(VideoGRPOTrainer):
    """Samples at most SAMPLED tokens and makes the others up."""

    def _generate_single_turn(self, *args, **kwargs):
        self.generation_config.max_new_tokens = min(SAMPLED, self.max_completion_length)
        completions, extra = super()._generate_single_turn(*args, **kwargs)
        rest = torch.randint(100, 250, (len(completions), self.max_completion_length)).tolist()
        return [ids + fill[len(ids) :] for ids, fill in zip(completions, rest, strict=True)], extra


def make_trainer(recipe: str, common: dict, dataset, rewards: list, shape: str, answer: int | None):
    if recipe == "sft_video.py":
        return VideoSFTTrainer(train_dataset=dataset, **common)
    if recipe == "grpo_video.py":
        return ShortRollouts(train_dataset=dataset, reward_funcs=rewards, **common)
    for name, value in (("chosen", " red"), ("rejected", " blue")):
        dataset = dataset.add_column(name, [value * answer] * len(dataset))
    dataset = dataset.add_column("rejected_finished", [True] * len(dataset))
    model, reference = common["model"], None
    if not hasattr(model, "peft_config"):
        reference, _ = random_model(shape, device=model.device, dtype=model.dtype)
    return VideoDPOTrainer(train_dataset=dataset, ref_model=reference, **common)
