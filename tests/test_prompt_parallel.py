"""A prompt shared out: chunks and their order, the attention of all processes together, what is refused. Real processes:
tests_engines/test_prompt_parallel.py."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import (
    make_grpo_trainer, make_sft_trainer, make_tiny_policy, masked_attention, random_pieces, video_rows,
)  # fmt: skip
from test_shared_prefix import varlen_backward, varlen_forward
from transformers import TrainingArguments

from veripo_trl.errors import ConfigError
from veripo_trl.methods import with_methods
from veripo_trl.methods.tw_grpo import TWGRPOOptions
from veripo_trl.shared_prompt import attention, parallel
from veripo_trl.shared_prompt.attention import PackedLayout, attend
from veripo_trl.shared_prompt.parallel import SplitLayout, zigzag
from veripo_trl.trainers.grpo import VideoGRPOTrainer


def group_of(rank: int, count: int):
    return SimpleNamespace(size=lambda: count, rank=lambda: rank)


@pytest.mark.parametrize("total, count", [(187, 4), (1000, 8), (16, 8), (3, 4), (1, 2), (7, 1)])
def test_chunks_are_all_tokens_once_and_the_same_work(total, count):
    chunks = zigzag(total, count)
    assert sorted(token for pair in chunks for chunk in pair for token in chunk) == list(range(total))
    work = [sum(token + 1 for chunk in pair for token in chunk) for pair in chunks]
    assert max(work) - min(work) <= 2 * total  # of total² / 2 in all
    assert all(first.stop <= second.start for first, second in chunks)


def test_chunks_of_four_processes():
    expected = [[(0, 2), (14, 16)], [(2, 4), (12, 14)], [(4, 6), (10, 12)], [(6, 8), (8, 10)]]
    assert [[(chunk.start, chunk.stop) for chunk in pair] for pair in zigzag(16, 4)] == expected


@pytest.mark.parametrize("kernel", ["cpu", "variable length"])
@pytest.mark.parametrize("prefix, count", [(13, 1), (13, 2), (29, 4), (3, 4), (1, 2)])
@pytest.mark.parametrize("segments_only", [False, True])
def test_attention_of_all_processes_is_that_of_one(kernel, prefix, count, segments_only, monkeypatch):
    """Forward and gradients. The exchange is stood in for by one process's tensors, in which gradients add up."""
    if kernel != "cpu":
        monkeypatch.setattr(attention, "kernel_for", lambda query: (varlen_forward, varlen_backward))
    segments = [[3, 1, 4], [2], [5, 5], [1]][:count]
    whole = PackedLayout([prefix], [sum(segments, [])], "cpu")
    tensors = query, key, value = random_pieces(whole, dtype=torch.float32)
    layouts = [SplitLayout(prefix, own, group_of(rank, count), "cpu") for rank, own in enumerate(segments)]

    def every(own, group):
        parts = [torch.stack([key, value], 1)[layout.kept[: layout.prefix_tokens]] for layout in layouts]
        shape = (0, 0) * 3 + (0,)
        parts = [torch.nn.functional.pad(part, (*shape, layouts[0].most - len(part))) for part in parts]
        assert torch.equal(parts[group.rank()], own)
        return torch.cat(parts)

    monkeypatch.setattr(parallel.Gather, "apply", every)
    outputs, places, start = [], [], prefix
    for layout, own in zip(layouts, segments, strict=True):
        kept = torch.where(layout.kept < prefix, layout.kept, layout.kept - prefix + start)
        start += sum(own)
        left_out = layout.prefix_tokens if segments_only else 0
        outputs.append(attend(*(tensor[kept] for tensor in tensors), layout, segments_only=segments_only)[left_out:])
        places.append(kept[left_out:])
    places = torch.cat(places)
    found, expected = torch.cat(outputs), masked_attention(*tensors, whole)[places]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert sorted(places.tolist()) == list(range(prefix if segments_only else 0, len(query)))
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((found * weights).sum(), tensors)
    for gradient, want in zip(gradients, torch.autograd.grad((expected * weights).sum(), tensors), strict=True):
        torch.testing.assert_close(gradient, want, atol=1e-5, rtol=1e-4)


REFUSED = {
    "divides those of the run, 2": {"prompt_parallel": 3},
    r"set per_device_train_batch_size: 2 \(now 4\)": {"per_device_train_batch_size": 4},
    r"set steps_per_generation: 1 \(now 2\)": {"gradient_accumulation_steps": 2},
    r"set num_generations: 2 \(now 3\)": {"num_generations": 3, "per_device_train_batch_size": 3},
    r"set shared_prefix: True \(now False\)": {"shared_prefix": False},
    "set train_vision_tower: false": {"tower": True},
    "'sdpa' does": {"attention": "eager"},
    "linear attention's state": {"kind": "qwen3_5"},
    "expected whole groups in a batch of one process": {"method": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message, model_paths, media_root, tmp_path, monkeypatch):
    changes = {"num_generations": 4, "per_device_train_batch_size": 2, "prompt_parallel": 2, **REFUSED[message]}
    tower, eager = changes.pop("tower", False), changes.pop("attention", None)
    if changes.pop("method", False):
        changes["make"] = with_methods(VideoGRPOTrainer, ["tw_grpo"], [TWGRPOOptions()])
    folder = model_paths[changes.pop("kind", "qwen2_5_vl")]
    model, encoder = make_tiny_policy(folder, use_peft=False, attn_implementation=eager)
    model.model.visual.requires_grad_(tower)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ConfigError, match=message):
        make_grpo_trainer(model, encoder, video_rows(media_root, 2), tmp_path, **changes)


def test_sft_refuses_an_order_of_rows_that_it_would_not_keep(model_paths, media_root, tmp_path, monkeypatch):
    model, encoder = make_tiny_policy(model_paths["qwen2_5_vl"], use_peft=False)
    changes = {"prompt_parallel": 2, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ConfigError, match=r"set train_sampling_strategy: random \(now sequential\)"):
        make_sft_trainer(model, encoder, video_rows(media_root, 2), tmp_path, **changes)


@pytest.mark.parametrize("count", [1, 2])
def test_a_row_of_several_processes_is_counted_once(count, model_paths, mixed_rows, tmp_path, monkeypatch):
    """`num_tokens` is TRL's, of prompts and answers, whether prompts are shared or not."""
    model, encoder = make_tiny_policy(model_paths["qwen2_5_vl"], use_peft=False)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(dist, "new_subgroups", lambda **options: (None, None))  # of processes that are not there
    rows = mixed_rows[:1] if count > 1 else [mixed_rows[0], mixed_rows[0], mixed_rows[2]]
    trainer = make_sft_trainer(model, encoder, rows, tmp_path, prompt_parallel=count)
    monkeypatch.setattr(trainer.accelerator, "gather_for_metrics", lambda own: torch.stack([own] * count))
    stock = sum(len(trainer.data_collator([row])["input_ids"][0]) for row in rows)
    trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows))
    assert trainer._metrics["train"]["num_tokens"] == [stock]
