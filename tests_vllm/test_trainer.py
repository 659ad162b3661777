"""GRPO whose rollouts come from vLLM in the same process: the engine samples with the trainer's log-probabilities."""

import pytest
import torch
from conftest import make_row
from vllm import LLM

from veripo_trl.data.schema import rows_to_dataset
from veripo_trl.model.policy import LANGUAGE_MODEL_LINEAR, load_policy
from veripo_trl.trainers.grpo import VideoGRPOConfig, VideoGRPOTrainer
from veripo_trl.vllm import training as backend
from veripo_trl.vllm.inputs import EngineMismatchError, longest_prompt

LORA = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv|linear_fc1|linear_fc2)"
GAP = "sampling/sampling_logp_difference/max"


@pytest.fixture(autouse=True)
def short_starts(monkeypatch):
    """Engines that compile nothing."""
    options = backend.engine_options
    monkeypatch.setattr(backend, "engine_options", lambda *a, **k: {**options(*a, **k), "enforce_eager": True})


def varied_reward(completions, **kwargs):
    return [float(len(completion[0]["content"]) % 7) for completion in completions]


def make_trainer(model, encoder, rows, folder, **changes):
    options = {
        "output_dir": str(folder), "per_device_train_batch_size": 2 * len(rows), "num_generations": 2,
        "max_completion_length": 12, "gradient_checkpointing": False, "bf16": False, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "shuffle_dataset": False, "max_steps": 3, "logging_steps": 1,
        "learning_rate": 1e-2, "disable_tqdm": True, "use_vllm": True, **changes,
    }  # fmt: skip
    return VideoGRPOTrainer(
        model=model, reward_funcs=[varied_reward], args=VideoGRPOConfig(**options), encoder=encoder,
        train_dataset=rows_to_dataset(rows), processing_class=encoder.processor,
    )  # fmt: skip


def gaps(trainer) -> list[float]:
    return [entry[GAP] for entry in trainer.state.log_history if GAP in entry]


def as_lora(model, *, tower=True):
    from peft import LoraConfig, get_peft_model

    # As the recipes put it on, with a frozen tower.
    targets = LORA if tower else LANGUAGE_MODEL_LINEAR
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=targets))


# kind, weights, whether the vision tower trains (for LoRA: has adapters)
RUNS = {
    "full, frozen tower": ("qwen2_5_vl", "full", False),
    "full, trained tower": ("qwen2_5_vl", "full", True),
    "LoRA, both towers": ("qwen2_5_vl", "lora", True),
    "LoRA, frozen tower": ("qwen2_5_vl", "lora", False),
    "Qwen3-VL, trained tower": ("qwen3_vl", "full", True),
    "Qwen3-VL, LoRA": ("qwen3_vl", "lora", False),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_engine_follows_the_policy(name, load, mixed_rows, tmp_path, monkeypatch):
    """Text, image, video, two videos, image with video in each batch; before and after weight updates."""
    kind, weights, vision = RUNS[name]
    model, encoder = load(kind)
    model.model.visual.requires_grad_(vision)
    if weights == "lora":
        model = as_lora(model, tower=vision)
        assert any("visual" in key for key, value in model.named_parameters() if value.requires_grad) == vision
    before = {key: value.clone() for key, value in model.named_parameters() if value.requires_grad}
    requests = []
    monkeypatch.setattr(LLM, "_render_and_run_requests", record(requests, LLM._render_and_run_requests))
    trainer = make_trainer(model, encoder, mixed_rows, tmp_path)
    trainer.train()
    found = gaps(trainer)
    assert len(found) == 3 and max(found) < 1e-4, found
    # Each prompt once per batch, for two samples.
    assert requests == [[2] * len(mixed_rows)] * 3
    moved = {key: float((value - before[key]).abs().max()) for key, value in model.named_parameters() if key in before}
    assert max(moved.values()) > 1e-3
    assert not vision or max(move for key, move in moved.items() if "visual" in key) > 1e-3
    # What is trained and saved has no trace of the bias.
    assert not [key for key in model.state_dict() if key.endswith("lm_head.bias")]


def record(requests: list, original):
    def run(self, prompts, params, **kwargs):
        requests.append([param.n for param in params])
        return original(self, prompts=prompts, params=params, **kwargs)

    return run


def test_half_precision_stays_within_its_bound(load, mixed_rows, tmp_path):
    model, encoder = load()
    model, encoder.pixel_dtype = model.to(torch.bfloat16), torch.bfloat16
    trainer = make_trainer(model, encoder, mixed_rows, tmp_path, learning_rate=1e-3)
    assert trainer.vllm_generation.llm.model_config.dtype == torch.bfloat16
    trainer.train()
    found = [entry["sampling/largest_prompt_gap"] for entry in trainer.state.log_history[:-1]]
    assert 0 < max(found) < backend.GAP_BOUNDS[torch.bfloat16] / 4, found


def test_a_group_may_be_divided_between_processes(load, mixed_rows, tmp_path):
    """A process then has a part of a group: as many samples as it has rows, in their order."""
    model, encoder = load()
    trainer = make_trainer(model, encoder, mixed_rows, tmp_path)
    first, second = encoder.encode(mixed_rows[1]), encoder.encode(mixed_rows[3])
    rows = [[prompt] for prompt in (first, second, second, second, first)]
    ids = [row[0].input_ids.tolist() for row in rows]
    _, completions, log_probs, _ = trainer.vllm_generation.generate(ids, rows, num_generations=4)
    trainer._active = [row[0] for row in rows]
    for place, (completion, engine) in enumerate(zip(completions, log_probs, strict=True)):
        trainer._active = rows[place]
        line = torch.tensor([ids[place] + completion])
        found = trainer._get_per_token_logps_and_entropies(model, line, torch.ones_like(line), len(completion))[0]
        assert found[0].tolist() == pytest.approx([entry[0] for entry in engine], abs=1e-4)


def test_sleep_mode_keeps_its_order(load, mixed_rows, tmp_path, monkeypatch):
    """TRL's calls around our engine; putting memory to sleep itself needs a GPU."""
    model, encoder = load()
    trainer = make_trainer(model, encoder, mixed_rows[1:3], tmp_path, max_steps=2)
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for name in ("wake_up", "sleep"):
        monkeypatch.setattr(trainer.vllm_generation.llm, name, lambda name=name, **how: calls.append((name, how)))
    for name in ("reset_prefix_cache", "generate"):
        original = getattr(trainer.vllm_generation.llm, name)

        def recorded(*args, name=name, original=original, **kwargs):
            calls.append((name, {}))
            return original(*args, **kwargs)

        monkeypatch.setattr(trainer.vllm_generation.llm, name, recorded)
    trainer.vllm_generation.enable_sleep_mode = trainer.vllm_generation._llm_weights_sleeping = True
    trainer.train()
    step = [
        ("wake_up", {"tags": ["weights"]}), ("reset_prefix_cache", {}), ("wake_up", {"tags": ["kv_cache"]}),
        ("generate", {}), ("sleep", {"level": 2}),
    ]  # fmt: skip
    assert calls == step * 2
    assert max(gaps(trainer)) < 1e-4


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
