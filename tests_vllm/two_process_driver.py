"""Two processes of GRPO runs with vLLM rollouts, started by test_two_processes.py and test_server.py.

    torchrun --nproc_per_node 2 two_process_driver.py MODEL MEDIA FOLDER WAY

WAY is the number of processes that an engine is divided between, or a server's URL.
"""

import json
import pickle
import sys
import time
from pathlib import Path
from unittest.mock import patch

import conftest  # (environment, torchvision)
import torch.distributed as dist
from test_methods import accuracy_reward
from test_trainer import gaps, make_trainer
from trl.generation.vllm_client import VLLMClient

from veripo_trl import errors
from veripo_trl.methods import with_methods
from veripo_trl.methods.t_grpo import TGRPOOptions
from veripo_trl.model.policy import load_policy
from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.build import make_encoder
from veripo_trl.trainers.grpo import VideoGRPOTrainer
from veripo_trl.vllm import training as backend

# Three groups of four over two processes of six completions: the middle one is divided.
DIVIDED = {"num_generations": 4, "per_device_train_batch_size": 6, "max_steps": 2, "ddp_backend": "gloo"}
# A group of four over both, which compute its prompt together.
TOGETHER = {**DIVIDED, "per_device_train_batch_size": 2, "prompt_parallel": 2, "steps_per_generation": 1}
SEED = 7  # of each request, so that it can be repeated; runs themselves take none
SYNC_S = 1.0  # that the first process takes to send its weights to the server


def load(model_path: str, *, tower: bool):
    model, processor = load_policy(model_path)
    model.model.visual.requires_grad_(tower)
    sizes = {"max_frames": 24, "min_pixels": 56 * 56, "max_pixels": 112 * 56}
    return model, make_encoder(model, processor, DataArguments(prompt_template="tiny", **sizes))


def sized(exchange, place: int, sizes: list):
    """An exchange of objects between processes that notes their size in bytes."""

    def note(*args, **kwargs):
        sizes.append(len(pickle.dumps(args[place])))
        return exchange(*args, **kwargs)

    return note


def train(trainer) -> dict:
    """What a run sampled, the gaps of its steps, and the sizes of what its processes exchanged as objects."""
    sampled, sizes, generate = [], [], trainer.vllm_generation.generate
    trainer.vllm_generation.generate = lambda **kwargs: sampled.append(generate(**kwargs)) or sampled[-1]
    with (
        patch.object(dist, "all_gather_object", sized(dist.all_gather_object, 1, sizes)),
        patch.object(dist, "broadcast_object_list", sized(dist.broadcast_object_list, 0, sizes)),
    ):
        trainer.train()
    return {"sampled": [batch[1] for batch in sampled], "gaps": gaps(trainer), "exchanged": sizes}


def in_process(model_path: str, rows: dict, folder: str, size: int) -> dict:
    options = backend.engine_options
    backend.engine_options = lambda *a, **k: {**options(*a, **k), "enforce_eager": True}
    found = {}
    for name, layout, own in (
        ("divided", DIVIDED, ("image", "video", "two-videos")),
        ("together", TOGETHER, ("video", "two-videos")),
    ):
        model, encoder = load(model_path, tower=name == "divided")
        own = [rows[name] for name in own]
        found[name] = train(make_trainer(model, encoder, own, folder, vllm_tensor_parallel_size=size, **layout))
    return found


def by_server(model_path: str, rows: dict, folder: str, url: str) -> dict:
    """T-GRPO, whose rollouts on shuffled frames are the first process's alone; and a group whose prompt both compute."""
    log, post = [], VLLMClient._post

    def logged(self, address, **kwargs):
        samples = kwargs["json"]["sampling_params"]["n"] if address.endswith("/generate") else 0
        log.append({"path": address.removeprefix(url), "at": time.monotonic(), "samples": samples})
        return post(self, address, **kwargs)

    def update(self, metadata, named):
        for _ in named:
            pass
        time.sleep(SYNC_S)

    VLLMClient._post, VLLMClient.update_named_params = logged, update
    VLLMClient.init_communicator = lambda self, device: None
    options = {"vllm_mode": "server", "vllm_server_base_url": url, "learning_rate": 0.0}
    found = {}
    model, encoder = load(model_path, tower=False)
    make = with_methods(VideoGRPOTrainer, ["t_grpo"], [TGRPOOptions(length_range=[1, 9])])
    own = [rows[name] for name in ("image", "video", "text")]
    trainer = make_trainer(model, encoder, own, folder, make=make, reward=accuracy_reward, **DIVIDED, **options)
    trainer.vllm_generation.generation_kwargs["seed"] = SEED
    found["divided"] = {**train(trainer), "requests": list(log)}
    image, video, _ = map(encoder.encode, own)
    found["pixels"] = min(image.pixel_values.nbytes, video.pixel_values_videos.nbytes)
    model, encoder = load(model_path, tower=False)
    trainer = make_trainer(model, encoder, [rows["video"], rows["text"]], folder, **TOGETHER, **options)
    return {**found, "together": train(trainer)}


def refused(model_path: str, rows: dict, folder: str, url: str) -> None:
    """The server knows nothing of what one process asks for; the other one waits for that process."""
    model, encoder = load(model_path, tower=False)
    options = {"vllm_mode": "server", "vllm_server_base_url": url}
    trainer = make_trainer(model, encoder, [rows["text"]], folder, **TOGETHER, **options)
    if dist.get_rank() == 1:
        trainer.vllm_generation.vllm_client.model = "another"
    trainer.train()


def main(model_path: str, media: str, folder: str, way: str) -> int | None:
    rows = {
        "text": conftest.make_row("text", media, problem="Which colour is last?"),
        "image": conftest.make_row("image", media, images=["square.png"]),
        "video": conftest.make_row("video", media, videos=["long.mp4"]),
        "two-videos": conftest.make_row("two-videos", media, videos=["wide.mp4", "fast.mp4"]),
    }
    found = in_process(model_path, rows, folder, int(way)) if way.isdigit() else by_server(model_path, rows, folder, way)
    found["world"] = dist.get_world_size()
    Path(folder, f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    return None if way.isdigit() else errors.run(lambda: refused(model_path, rows, folder, way))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
