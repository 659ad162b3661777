"""GRPO whose rollouts come from vLLM in the same process: the engine samples with the trainer's log-probabilities."""

import pytest
import torch
from vllm import LLM

from veripo_trl.data.schema import rows_to_dataset
from veripo_trl.model.policy import LANGUAGE_MODEL_LINEAR
from veripo_trl.trainers.grpo import VideoGRPOConfig, VideoGRPOTrainer
from veripo_trl.vllm import training as backend

LORA = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv|linear_fc1|linear_fc2)"
GAP = "sampling/sampling_logp_difference/max"


@pytest.fixture(autouse=True)
def short_starts(monkeypatch):
    """Engines that compile nothing."""
    options = backend.engine_options
    monkeypatch.setattr(backend, "engine_options", lambda *a, **k: {**options(*a, **k), "enforce_eager": True})


def varied_reward(completions, **kwargs):
    return [float(len(completion[0]["content"]) % 7) for completion in completions]


def make_trainer(model, encoder, rows, folder, *, make=VideoGRPOTrainer, reward=varied_reward, **changes):
    options = {
        "output_dir": str(folder), "per_device_train_batch_size": 2 * len(rows), "num_generations": 2,
        "max_completion_length": 12, "gradient_checkpointing": False, "bf16": False, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "shuffle_dataset": False, "max_steps": 3, "logging_steps": 1,
        "learning_rate": 1e-2, "disable_tqdm": True, "use_vllm": True, **changes,
    }  # fmt: skip
    return make(
        model=model, reward_funcs=[reward], args=VideoGRPOConfig(**options), encoder=encoder,
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


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_linear_attention_follows_the_policy(weights, load, mixed_rows, tmp_path, monkeypatch):
    """Qwen3.5, before and after weight updates. The engine is in bfloat16, the only dtype in which vLLM's CPU build
    computes linear attention; the policy is not: what is left between the two is that one's rounding."""
    monkeypatch.setattr(backend, "engine_dtype", lambda config, model: torch.bfloat16)
    model, encoder = load("qwen3_5")
    if weights == "lora":
        model = as_lora(model, tower=False)
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    before = {key: value.clone() for key, value in trained.items()}
    trainer = make_trainer(model, encoder, mixed_rows, tmp_path)
    trainer.train()
    found = [entry["sampling/largest_prompt_gap"] for entry in trainer.state.log_history[:-1]]
    assert len(found) == 3 and max(found) < backend.GAP_BOUNDS[torch.bfloat16] / 2, found
    assert max(float((value - before[key]).abs().max()) for key, value in trained.items() if "linear_attn" in key) > 1e-2


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
