"""What stops a run with vLLM at its first batch, what is never sampled, and an adapter of the stage before."""

import pytest
import torch
from conftest import make_row
from test_trainer import as_lora, gaps, make_trainer, short_starts  # noqa: F401  the last is a fixture

from veripo_trl.data.schema import rows_to_dataset
from veripo_trl.model.policy import load_policy
from veripo_trl.vllm import training as backend
from veripo_trl.vllm.inputs import EngineMismatchError, longest_prompt


def test_stale_vision_features_stop_the_run(load, mixed_rows, tmp_path, monkeypatch):
    """The engine keeps features by name: unless they are dropped after a weight sync, they are the old tower's."""
    from vllm.v1.engine.llm_engine import LLMEngine

    monkeypatch.setattr(LLMEngine, "reset_encoder_cache", lambda self: None)
    model, encoder = load()
    model.model.visual.requires_grad_(True)
    trainer = make_trainer(model, encoder, mixed_rows[1:3], tmp_path)
    with pytest.raises(EngineMismatchError, match="features of the old weights"):
        trainer.train()
    assert trainer.state.global_step == 1


# What is wrong, and what the message must say.
WRONG = {
    "an engine of another dtype": ({}, {"dtype": "bfloat16"}, "another dtype"),
    "sampling cut to the likeliest tokens": ({"top_k": 5}, {}, "top_k"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_stops_the_run_at_its_first_batch(name, load, mixed_rows, tmp_path, monkeypatch):
    changes, engine, message = WRONG[name]
    options = backend.engine_options
    monkeypatch.setattr(backend, "engine_options", lambda *a, **k: {**options(*a, **k), **engine})
    model, encoder = load()
    trainer = make_trainer(model, encoder, mixed_rows[1:3], tmp_path, **changes)
    with pytest.raises(EngineMismatchError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_wrong_frame_rate_stops_the_run(load, mixed_rows, tmp_path, monkeypatch):
    """Both lines of defence: the positions are compared, and were they not, the log-probabilities are."""
    from veripo_trl.vllm import inputs

    fields = inputs.engine_fields
    monkeypatch.setattr(
        inputs, "engine_fields", lambda item: fields({**item, "seconds": item["seconds"] and 2 / 24})
    )
    model, encoder = load()
    trainer = make_trainer(model, encoder, mixed_rows[2:3], tmp_path)
    with pytest.raises(EngineMismatchError, match="position"):
        trainer.train()
    monkeypatch.setattr(inputs, "check_positions", lambda *args: None)
    with pytest.raises(EngineMismatchError, match="nats a token apart at step 0"):
        trainer.train()


def test_banned_tokens_are_never_sampled_and_change_no_gap(load, media_root, tmp_path):
    """A model that wants nothing but vision tokens, and a user's own bias beside the bans."""
    model, encoder = load()
    tokenizer = encoder.processor.tokenizer
    banned = ["<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
    banned = tokenizer.convert_tokens_to_ids([*banned, tokenizer.pad_token])
    favoured = 150
    with torch.no_grad():
        head = model.lm_head.weight
        head[banned] *= 8  # half of the samples would be banned tokens
    rows = [make_row(f"row{n}", media_root, videos=["long.mp4"], problem=f"Which colour is {n}?") for n in range(4)]
    trainer = make_trainer(
        model, encoder, rows, tmp_path, max_completion_length=64, max_steps=2, learning_rate=1e-3,
        generation_kwargs={"logit_bias": {favoured: 5.0}, "min_tokens": 0}, vllm_importance_sampling_correction=False,
        num_generations=4, per_device_train_batch_size=16,
    )  # fmt: skip
    bias = {favoured: 5.0, **dict.fromkeys(banned, -100.0)}
    assert trainer.args.generation_kwargs == {"logit_bias": bias, "min_tokens": 0}
    seen, generate = [], trainer.vllm_generation.generate
    trainer.vllm_generation.generate = lambda **kwargs: seen.append(generate(**kwargs)) or seen[-1]
    trainer.train()
    samples = [completion for _, completions, *_ in seen for completion in completions]
    tokens = [token for completion in samples for token in completion]
    assert len(tokens) > 1000 and not set(tokens) & set(banned)
    assert tokens.count(favoured) > len(tokens) / 20
    groups = [samples[start : start + 4] for start in range(0, len(samples), 4)]
    assert all(len(set(map(tuple, group))) == 4 for group in groups)
    measured = [entry["sampling/largest_prompt_gap"] for entry in trainer.state.log_history[:-1]]
    assert len(measured) == 2 and max(measured) < 1e-4


def test_the_bans_are_what_keeps_them_out(load, media_root, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "BAN", 0.0)
    model, encoder = load()
    with torch.no_grad():
        model.lm_head.weight[encoder.config.video_token_id] *= 8
    row = make_row("row", media_root, problem="Which colour is last?")
    trainer = make_trainer(model, encoder, [row], tmp_path, max_completion_length=64, max_steps=1)
    with pytest.raises(RuntimeError, match="vision token was sampled"):
        trainer.train()


def test_the_context_holds_every_row(load, mixed_rows):
    _, encoder = load()
    bound = longest_prompt(encoder, [rows_to_dataset(mixed_rows)])
    assert max(len(encoder.encode(row)) for row in mixed_rows) < bound < 4096
    encoder.max_prompt_tokens = 77
    assert longest_prompt(encoder, [rows_to_dataset(mixed_rows)]) == 77


def test_an_adapter_from_the_stage_before_is_what_samples(load, model_paths, mixed_rows, tmp_path):
    """The engine loads the adapter's base; the adapter reaches it with the first sync."""
    model, encoder = load()
    model = as_lora(model)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    policy, _ = load_policy(str(tmp_path / "adapter"))
    trainer = make_trainer(policy, encoder, mixed_rows, tmp_path / "run", max_steps=1)
    trainer.train()
    assert max(gaps(trainer)) < 1e-4
