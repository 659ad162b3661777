"""Two processes of a GRPO run with vLLM rollouts, started by test_two_processes.py.

    torchrun --nproc_per_node 2 two_process_driver.py MODEL MEDIA FOLDER TENSOR_PARALLEL_SIZE
"""

import json
import sys
from pathlib import Path

import conftest  # (environment, torchvision)
import torch
from test_trainer import gaps, make_trainer

from veripo_trl.model.policy import load_policy
from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.build import make_encoder
from veripo_trl.vllm import training as backend


def main(model_path: str, media: str, folder: str, size: str) -> None:
    options = backend.engine_options
    backend.engine_options = lambda *a, **k: {**options(*a, **k), "enforce_eager": True}
    model, processor = load_policy(model_path)
    model.model.visual.requires_grad_(True)
    encoder = make_encoder(
        model,
        processor,
        DataArguments(prompt_template="tiny", max_frames=24, min_pixels=56 * 56, max_pixels=112 * 56),
    )
    rows = [
        conftest.make_row("image", media, images=["square.png"]),
        conftest.make_row("video", media, videos=["long.mp4"]),
        conftest.make_row("two-videos", media, videos=["wide.mp4", "fast.mp4"]),
    ]
    # Three groups of four over two processes of six completions: the middle one is divided.
    trainer = make_trainer(
        model, encoder, rows, folder, num_generations=4, per_device_train_batch_size=6, max_steps=2,
        vllm_tensor_parallel_size=int(size), ddp_backend="gloo",
    )  # fmt: skip
    sampled, generate = [], trainer.vllm_generation.generate
    trainer.vllm_generation.generate = lambda **kwargs: sampled.append(generate(**kwargs)) or sampled[-1]
    trainer.train()
    rank = trainer.accelerator.process_index
    world = torch.distributed.get_world_size()
    result = {"world": world, "gaps": gaps(trainer), "completions": [len(batch[1]) for batch in sampled]}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(result))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
