"""What a long video's memory is cut down by changes nothing: pieces of the tower, of the MLP, of a group's decoding."""

import copy

import pytest
import torch
from accelerate import Accelerator
from helpers import (
    changed,
    fixed_completions,
    give_completions,
    make_grpo_trainer,
    make_tiny_policy,
    state,
    video_rows,
)  # fmt: skip
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5_VLConfig
from trl import ModelConfig
from trl.trainer.utils import add_fused_lm_head

from conftest import load_script
from veripo_trl.errors import ConfigError
from veripo_trl.model import features, pieces
from veripo_trl.model.inputs import vision_inputs
from veripo_trl.recipe import frames_that_fit
from veripo_trl.shared_prompt import rollout
from veripo_trl.shared_prompt.rollout import sample_completions
from veripo_trl.shared_prompt.scoring import prefix_can_be_shared, score_completions
from veripo_trl.vllm import inputs


def test_a_call_of_the_tower_holds_whole_items_or_runs_of_steps():
    grid = torch.tensor([[4, 4, 4], [1, 4, 2], [3, 6, 8], [2, 2, 2]]).numpy()
    calls = features.cut_along_time(grid, 72)
    assert calls == [[(0, 0, 4), (1, 0, 1)], [(2, 0, 1)], [(2, 1, 1)], [(2, 2, 1), (3, 0, 2)]]
    assert features.cut_along_time(grid, 7)[0] == [(0, 0, 1)]  # never less than a step


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_tower_in_pieces_gives_the_same_features(kind, load, mixed_rows, monkeypatch):
    model, encoder = load(kind)
    found = []
    for most in (1 << 20, 1):
        monkeypatch.setattr(features, "PATCHES_AT_ONCE", most)
        calls = []
        hook = model.model.visual.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(len(args[0])))
        prompts = [encoder.encode(row) for row in mixed_rows]
        vision_inputs(model, prompts, "cpu")
        hook.remove()
        found.append([p.features[model.model.visual] for p in prompts])
    grids = [grid for p in prompts for grid in (p.image_grid_thw, p.video_grid_thw) if grid is not None]
    assert len(calls) == sum(int(grid[:, 0].sum()) for grid in grids) > 5  # a call per temporal step
    for whole, cut in zip(*found, strict=True):
        assert whole.items.keys() == cut.items.keys()
        for name in whole.items:
            # to the last bit in a real tower's sizes; in so small ones matrices are multiplied in other orders
            torch.testing.assert_close(whole.items[name], cut.items[name], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(whole.levels.get(name), cut.levels.get(name), atol=1e-6, rtol=1e-5)


def gradients(model, prompts, completions):
    """Of a scored batch with gradient checkpointing, by the packed path and by plain rows."""
    found = []
    ids = pad_sequence([torch.tensor(own) for own in completions], batch_first=True)
    for shared in (True, False):
        model.zero_grad()
        score_completions(
            model, model, prompts, ids, (ids != 0).long(), pad_token_id=0, shared=shared
        ).log_probs.sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return found


@pytest.fixture
def scored(load, mixed_rows):
    """(model with TRL's head and gradient checkpointing, prompts, completions)"""
    model, encoder = load()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    prompts = [encoder.encode(row) for row in (mixed_rows[2], mixed_rows[2], mixed_rows[3])]
    prompts[1] = prompts[0]
    return model, prompts, fixed_completions(encoder.processor.tokenizer, 3)


def test_the_mlp_in_pieces_gives_the_same_gradients(scored, monkeypatch):
    model, prompts, completions = scored
    expected = gradients(model, prompts, completions)
    pieces.mlp_in_pieces(model)
    pieces.mlp_in_pieces(model)  # of a policy and its reference on one base: once all the same
    lengths = []
    projection = model.model.language_model.layers[0].mlp.down_proj
    projection.register_forward_pre_hook(lambda module, args: lengths.append(args[0].size(1)))
    gradients(model, prompts, completions)
    assert min(lengths) > 20
    monkeypatch.setattr(pieces, "WHOLE", 20)
    monkeypatch.setattr(pieces, "PIECE", 16)
    lengths.clear()
    for found, whole in zip(gradients(model, prompts, completions), expected, strict=True):
        for name, gradient in whole.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert max(lengths) == 16
    with torch.no_grad():
        lengths.clear()
        model(input_ids=torch.full((1, 40), 100))
        assert lengths == [16, 16, 8]
    other = copy.deepcopy(model)
    assert other.model.language_model.layers[0].mlp.forward.args[0].__self__ is other.model.language_model.layers[0].mlp


def test_layer_inputs_wait_on_the_host(scored, monkeypatch):
    model, prompts, completions = scored
    expected = gradients(model, prompts, completions)
    kept, empty = [], torch.empty
    monkeypatch.setattr(pieces.torch, "empty", lambda *args, **kw: kept.append(args[0]) or empty(*args, **kw))
    hidden, tokens = model.config.get_text_config().hidden_size, sum(map(len, completions)) + len(prompts[0]) - 1
    with pieces.layer_inputs_on_host(hidden):
        for found, whole in zip(gradients(model, prompts, completions), expected, strict=True):
            assert all(map(torch.equal, found.values(), whole.values()))
    packed = (1, tokens + len(prompts[2]) - 1, hidden)
    assert kept.count(packed) >= model.config.get_text_config().num_hidden_layers


def test_a_group_decoded_in_pieces_computes_its_prompt_once(load, mixed_rows):
    model, encoder = load()
    model.eval()
    prompts = [prompt for row in mixed_rows[1:4:2] for prompt in [encoder.encode(row)] * 3]
    options = {"pad_token_id": 0, "config": encoder.config, "do_sample": False, "max_new_tokens": 6}
    expected, lengths = sample_completions(model, prompts, **options), []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    assert torch.equal(sample_completions(model, prompts, rows_at_once=4, **options), expected)
    assert lengths[0] == (2, len(prompts[3]) - 1)  # both prompts, then the last token of each row
    assert lengths[1:] == [(4, 1)] * 6 + [(2, 1)] * 6


def masks_of(model) -> list:
    found = []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: found.append(kwargs["attention_mask"]), with_kwargs=True
        )
    return found


def test_long_prompts_of_unequal_lengths_make_no_square_mask(load, mixed_rows, monkeypatch):
    model, encoder = load()
    model.eval()
    prompts = [encoder.encode(row) for row in mixed_rows]
    options = {"pad_token_id": 0, "config": encoder.config, "do_sample": False, "max_new_tokens": 6}
    masks = masks_of(model)
    expected = sample_completions(model, prompts, **options)
    assert any(mask is not None and mask.size(-2) > 20 for mask in masks)
    masks.clear()
    monkeypatch.setattr(rollout, "MOST_MASKED", 0)
    assert torch.equal(sample_completions(model, prompts, **options), expected)
    assert all(mask is None or mask.size(-2) == 1 for mask in masks)


def test_the_check_of_shared_prompts_makes_no_mask(scored):
    model, prompts, _ = scored
    masks = masks_of(model)
    assert prefix_can_be_shared(model, model, prompts[0], pad_token_id=0, accelerator=Accelerator(cpu=True))
    assert masks and not any(mask is not None for mask in masks)


def longer(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def test_a_step_with_all_of_it_is_a_step_without(tmp_path, model_paths, media_root, monkeypatch):
    found = []
    for most, options in ((1 << 20, {}), (8, {"activation_offloading": True, "rollout_batch_size": 1})):
        monkeypatch.setattr(features, "PATCHES_AT_ONCE", most)
        monkeypatch.setattr(pieces, "WHOLE", most)
        monkeypatch.setattr(pieces, "PIECE", most)
        model, encoder = make_tiny_policy(model_paths["qwen2_5_vl"])
        trainer = make_grpo_trainer(
            model, encoder, video_rows(media_root, 1), tmp_path, reward=longer, gradient_checkpointing=True, **options
        )
        give_completions(trainer, fixed_completions(encoder.processor.tokenizer, 2, seed=3), monkeypatch)
        before = state(model)
        trainer.train()
        found.append(state(model))
        assert changed(before, model)
        (prompt,) = set(trainer._encoded["train"][1])
        assert prompt.pixel_values_videos is None and prompt.features  # let go of in both
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-7)


def test_a_server_is_posted_no_gigabytes(load, mixed_rows, monkeypatch):
    prompt = load()[1].encode(mixed_rows[4])
    inputs.check_size(prompt)
    monkeypatch.setattr(inputs, "MOST_POSTED", prompt.pixel_values.nbytes + prompt.pixel_values_videos.nbytes - 1)
    with pytest.raises(ValueError, match="'image-and-video'.*would be posted.*vllm_mode: colocate"):
        inputs.check_size(prompt)


SIZES = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
         "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 128_000,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}  # fmt: skip


def test_frames_that_fit():
    """Of Qwen2.5-VL-7B with LoRA, as docs/results.md has them."""
    config = Qwen2_5_VLConfig(text_config=SIZES, vision_config={"out_hidden_size": 3584, "hidden_size": 1280})
    adapter = ModelConfig(use_peft=True, lora_r=64, dtype="bfloat16")
    fixed = frames_that_fit.fixed_bytes(config, adapter)
    assert fixed == pytest.approx(16.6e9 + 2.6e9 + frames_that_fit.CONTEXT, rel=0.01)  # weights, adapter, the rest
    full = frames_that_fit.fixed_bytes(config, ModelConfig(dtype="float32"))
    assert full > 4 * 16.6e9 * 1.9  # weights, gradients and two moments, in four bytes, but of the tower
    found = {}
    for options in ({}, {"activation_offloading": True}, {"rollout_batch_size": 2}, {"use_vllm": True}):
        memory = frames_that_fit.MemoryArguments(gpu_memory=80, **options)
        found[next(iter(options), "")] = frames_that_fit.frames_that_fit(config, adapter, memory, 64.0)
    assert found[""] == {"update": 2412, "rollout": 1970}
    assert found["activation_offloading"] == {"update": 5534, "rollout": 1970}
    assert found["rollout_batch_size"] == {"update": 2412, "rollout": 5284}
    assert found["use_vllm"]["vLLM"] == 1984  # (128,000 - 512 - 512) / 64, even
    text, memory = config.get_text_config(), frames_that_fit.MemoryArguments(gpu_memory=80)
    tokens = 2412 * 64 + 512
    assert fixed + frames_that_fit.update_bytes(text, tokens, 8 * 512, memory) <= 80e9
    assert fixed + frames_that_fit.update_bytes(text, tokens + 128, 8 * 512, memory) > 80e9
    eight = {"prompt_parallel": 8, "per_device_train_batch_size": 1, "max_completion_length": 2048}
    eight = frames_that_fit.MemoryArguments(gpu_memory=80, **eight)  # long_video/eight_gpus.yaml
    assert frames_that_fit.frames_that_fit(config, adapter, eight, 64.0) == {"update": 16600, "rollout": 7410}
    small = frames_that_fit.MemoryArguments(gpu_memory=20)
    assert frames_that_fit.frames_that_fit(config, adapter, small, 64.0) == {"update": 0, "rollout": 0}


def test_the_check_says_how_many_frames_fit(model_paths, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--model_name_or_path", str(model_paths["qwen2_5_vl"]), "--prompt_template", "tiny", "--gpu_memory", "24"]
    check_rows = load_script("recipes/check_rows.py")
    assert check_rows.main([*words, "--max_frames", "64"]) == 0
    told = capsys.readouterr().out
    assert "max_frames is 64, which fits." in told and "activation_offloading: true, rollout_batch_size: 2" in told
    with pytest.raises(ConfigError, match="expected gradient_checkpointing: true"):
        check_rows.main([*words, "--gradient_checkpointing", "false"])
    with pytest.raises(ConfigError, match="prompt_parallel of 1 or more, came 0"):
        check_rows.main([*words, "--prompt_parallel", "0"])
    with pytest.raises(ConfigError, match="came Qwen3.5, whose linear-attention layers"):
        check_rows.main([*words, "--model_name_or_path", str(model_paths["qwen3_5"])])
