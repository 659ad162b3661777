"""What only a GPU shows: its kernels, half precision, autocast, pinned copies, vLLM's sleep mode."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import masked_attention, random_pieces
from torch.utils.data import DataLoader

from veripo_trl.answers.rewards import REWARDS
from veripo_trl.data.schema import rows_to_dataset
from veripo_trl.model.inputs import media_inputs, vision_inputs
from veripo_trl.shared_prompt import attention as prefix_attention
from veripo_trl.shared_prompt.attention import PackedLayout, attend
from veripo_trl.trainers.grpo import VideoGRPOConfig, VideoGRPOTrainer
from veripo_trl.trainers.loading import RolloutCollator
from veripo_trl.trainers.sft import SFTCollator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "speed"))

import on_gpu  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
LAYOUTS = [([7, 5], [[3, 1, 4], [2]]), ([1], [[6]]), ([300], [[70] * 8]), ([513, 2], [[129, 1], [64, 200]])]


@pytest.mark.parametrize("case", on_gpu.plan("cuda", "mid")["parity"], ids=lambda case: case.name)
def test_parity(case):
    """Kernels, packed against plain rows, losses, features, positions: in float32, bfloat16 and under autocast."""
    record = on_gpu.attempt(case, "cuda")
    assert record["state"] == "done", record


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefixes, segments", LAYOUTS)
@pytest.mark.parametrize("segments_only", [False, True])
def test_the_kernel_is_that_of_the_written_out_mask(dtype, prefixes, segments, segments_only):
    """Against the dense attention of the same rounded numbers in float32, gradients too."""
    host = PackedLayout(prefixes, segments, "cpu")
    layout = PackedLayout(prefixes, segments, "cuda")
    tensors = random_pieces(host, dtype=dtype)
    assert prefix_attention.kernel_for(tensors[0].cuda()) is not None
    start = layout.prefix_tokens if segments_only else 0
    on_device = [tensor.detach().cuda().requires_grad_() for tensor in tensors]
    found = attend(*on_device, layout, segments_only=segments_only)[start:]
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    expected = masked_attention(*exact, host)[start:]
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((found * weights.cuda()).sum(), on_device)
    for value, want in zip(
        [found, *gradients], [expected, *torch.autograd.grad((expected * weights).sum(), exact)], strict=True
    ):
        assert (value.float().cpu() - want).norm() <= 0.02 * want.norm()


def test_media_are_copied_whole(load, mixed_rows):
    """By `non_blocking` copies, though the host's memory is changed right afterwards; features survive the way back."""
    model, encoder = load()
    prompts = [encoder.encode(row) for row in mixed_rows]
    expected = {name: value.clone() for name, value in media_inputs(prompts, "cpu").items()}
    found = media_inputs(prompts, "cuda")
    for prompt in prompts:
        for pixels in (prompt.pixel_values, prompt.pixel_values_videos):
            if pixels is not None:
                pixels.zero_()
    for name, value in expected.items():
        assert found[name].is_cuda and torch.equal(found[name].cpu(), value), name
    prompts, model = [encoder.encode(row) for row in mixed_rows], model.cuda()
    held = [vision_inputs(model, prompts, "cuda")["mm_encoder_outputs"]["video"].pooler_output for _ in range(2)]
    assert all(first.is_cuda and torch.equal(first, again) for first, again in zip(*held, strict=True))


def test_pinning_loaders(load, mixed_rows):
    """A batch of tensors is pinned; encoded prompts, which rows of a group share, are left as they are."""
    _, encoder = load()
    options = {"num_workers": 1, "pin_memory": True}
    batch = next(iter(DataLoader(mixed_rows, 5, collate_fn=SFTCollator(encoder, max_length=None), **options)))
    assert all(value.is_pinned() for value in batch.values() if isinstance(value, torch.Tensor))
    rows = [row for row in mixed_rows for _ in range(2)]
    batch = next(iter(DataLoader(rows, 10, collate_fn=RolloutCollator(encoder), **options)))
    encoded = [row["encoded"] for row in batch]
    assert len({id(prompt) for prompt in encoded}) == 5 and encoded[0] is encoded[1]


def varied_reward(completion_ids, **kwargs) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


@pytest.mark.parametrize("half", [False, True])
def test_a_run(half, load, mixed_rows, tmp_path):
    """Rollout, update and optimizer of the real trainer on every kind of row, and shared prompts stay on."""
    model, encoder = load()
    train(model, encoder, mixed_rows, tmp_path, bf16=half, reward_funcs=[varied_reward, REWARDS["format"]])


def train(model, encoder, rows, tmp_path, reward_funcs, **options):
    before = model.lm_head.weight.detach().clone()
    config = VideoGRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2 * len(rows), num_generations=2, max_completion_length=12,
        report_to="none", save_strategy="no", max_steps=2, logging_steps=1, learning_rate=1e-3, **options,
    )  # fmt: skip
    trainer = VideoGRPOTrainer(
        model=model, reward_funcs=reward_funcs, args=config, encoder=encoder, train_dataset=rows_to_dataset(rows),
        processing_class=encoder.processor,
    )  # fmt: skip
    trainer.train()
    assert trainer.accelerator.device.type == "cuda" and trainer.shares_prompts
    assert not torch.equal(model.lm_head.weight.detach().cpu(), before)
    return trainer


def test_vllm_sleeps_between_rollouts(load, mixed_rows, tmp_path):
    """In the same process: sleep, wake, weights synchronised; its log-probabilities stay the trainer's."""
    pytest.importorskip("vllm")
    model, encoder = load()
    trainer = train(
        model, encoder, mixed_rows, tmp_path, reward_funcs=[varied_reward], bf16=False, use_vllm=True,
        vllm_mode="colocate", vllm_enable_sleep_mode=True, vllm_gpu_memory_utilization=0.2,
    )  # fmt: skip
    gaps = [entry["sampling/largest_prompt_gap"] for entry in trainer.state.log_history[:-1]]
    assert len(gaps) == 2 and max(gaps) < 1e-2, gaps
