"""LoRA and QLoRA: one adapter trains, is saved, loaded, merged and goes on through the stages; all else stays."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from helpers import (
    EMBEDDINGS,
    changed,
    fixed_completions,
    give_completions,
    make_grpo_trainer,
    make_sft_trainer,
    make_tiny_policy,
    plain_log_probs,
    state,
)

from conftest import make_row
from veripo_trl.errors import ConfigError
from veripo_trl.model.policy import load_policy, read_settings

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "merge_adapter.py"
QUANTIZED = {"load_in_4bit": True}


@pytest.fixture
def rows(media_root):
    return [
        make_row("text", media_root, problem="Which colour is last?"),
        make_row("video", media_root, videos=["wide.mp4"]),
        make_row("image-and-video", media_root, videos=["fast.mp4"], images=["tall.png"]),
    ]


def sft(model, encoder, rows, path, **changes):
    trainer = make_sft_trainer(model, encoder, rows, path, **{"max_steps": 2, "learning_rate": 1e-2, **changes})
    return trainer


def grpo(model, encoder, rows, path, **changes):
    """A trainer whose rewards differ within each group, whatever an untrained model says."""
    trainer = make_grpo_trainer(model, encoder, rows, path, **{"learning_rate": 1e-2, **changes})

    def reward(completions, **kwargs):
        return [float(place % 2) for place in range(len(completions))]

    trainer.reward_funcs, trainer.reward_func_names = [reward], ["reward"]
    return trainer


def adapter(model, name: str = "default") -> dict[str, torch.Tensor]:
    return {key: value for key, value in state(model).items() if re.search(rf"\.lora_(embedding_)?[AB]\.{name}\b", key)}


def assert_only_the_adapter_changed(before: dict, model) -> None:
    names = changed(before, model)
    assert names and all(".lora_" in name and ".default." in name for name in names), sorted(names)[:5]


@pytest.mark.parametrize("kind, layers", [("qwen2_5_vl", 2 * 7), ("qwen3_vl", 2 * 7), ("qwen3_5", 7 + 2 * 8)])
def test_adapters_sit_on_the_language_models_linear_layers(kind, layers, model_paths):
    model, _ = make_tiny_policy(model_paths[kind])
    places = {name.split(".lora_")[0] for name in adapter(model)}
    assert places == {
        name
        for name, module in model.named_modules()
        if ".language_model." in name and "Linear" in type(module).__name__ and not re.search("base_layer|lora_", name)
    }
    assert len(places) == layers
    assert not any("visual" in name or "lm_head" in name for name in places)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter(model))


@pytest.mark.parametrize(
    "options, packs", [({}, None), (QUANTIZED, False), (QUANTIZED, True)], ids=["lora", "qlora", "qlora-avx512bf16"]
)
def test_one_adapter_goes_through_the_stages(options, packs, model_paths, rows, tmp_path, monkeypatch):
    """SFT with a new adapter, GRPO with the same one; everything else keeps every bit. `packs`: whether the CPU is one
    on which bitsandbytes packs weights in `eval()` (`support_avx512bf16_for_cpu`)."""
    if options:
        modules = pytest.importorskip("bitsandbytes.nn.modules")
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: packs)
    switches = {"gradient_checkpointing": True}  # TRL's default; the other tests train without
    model, encoder = make_tiny_policy(model_paths["qwen2_5_vl"], **options)
    before = state(model)
    trainer = sft(model, encoder, rows, tmp_path / "sft", **switches)
    before |= adapter(model)  # TRL casts a quantized model's adapter to bfloat16
    trainer.train()
    assert_only_the_adapter_changed(before, model)
    assert set(adapter(model)) <= changed(before, model)
    trainer.save_model()
    assert (tmp_path / "sft" / "adapter_config.json").exists()
    assert not list((tmp_path / "sft").glob("model*.safetensors"))
    learned = adapter(model)

    model, encoder = make_tiny_policy(tmp_path / "sft", **options)
    assert list(model.peft_config) == ["default"]
    for name, value in adapter(model).items():
        torch.testing.assert_close(value.float(), learned[name].float(), atol=0, rtol=0)
    before = state(model)
    trainer = grpo(model, encoder, rows, tmp_path / "grpo", max_steps=2, **switches)
    before |= adapter(model)
    trainer.train()
    assert_only_the_adapter_changed(before, model)
    assert set(adapter(model)) <= changed(before, model)
    trainer.save_model()

    again, _ = make_tiny_policy(tmp_path / "grpo", **options)
    for name, value in adapter(again).items():
        torch.testing.assert_close(value.float(), adapter(model)[name].float(), atol=0, rtol=0)
    assert_only_the_adapter_changed(before, again)


def test_a_merged_adapter_scores_as_the_adapter_does(model_paths, rows, tmp_path):
    model, encoder = make_tiny_policy(model_paths["qwen2_5_vl"])
    bare = [plain_log_probs(model, encoder, row, [150, 160, 170]) for row in rows]
    trainer = sft(model, encoder, rows, tmp_path / "sft")
    trainer.train()
    trainer.save_model()
    model.eval()
    expected = [plain_log_probs(model, encoder, row, [150, 160, 170]) for row in rows]
    loaded, encoder = make_tiny_policy(tmp_path / "sft")
    loaded.eval()
    merged = load_policy(str(tmp_path / "sft"))[0].merge_and_unload()
    runpy.run_path(str(RECIPE))["main"]([str(tmp_path / "sft"), str(tmp_path / "merged")])
    needed = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "processor_config.json"}
    assert needed <= {file.name for file in (tmp_path / "merged").iterdir()}
    seen, own = read_settings(str(tmp_path / "merged")), read_settings(str(tmp_path / "sft"))
    assert own.pop("base_weights") and seen.pop("base_weights") is None and seen == own
    for given, message in (("merged other", "a LoRA adapter .* it is a whole model"), ("sft merged", "not there yet")):
        with pytest.raises(ConfigError, match=message):
            runpy.run_path(str(RECIPE))["main"]([str(tmp_path / name) for name in given.split()])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "adapter_config.json").write_bytes((tmp_path / "sft" / "adapter_config.json").read_bytes())
    settings = (tmp_path / "sft" / "veripo_trl.json").read_bytes()
    (tmp_path / "bare" / "veripo_trl.json").write_bytes(settings)
    with pytest.raises(FileNotFoundError, match="bare': expected an adapter's weights, adapter_model.safetensors"):
        load_policy(str(tmp_path / "bare"))
    again, _ = load_policy(str(tmp_path / "merged"))
    for row, want, start in zip(rows, expected, bare, strict=True):
        assert (want - start).abs().max() > 1e-2
        for policy in (loaded, merged, again):
            torch.testing.assert_close(plain_log_probs(policy, encoder, row, [150, 160, 170]), want, atol=1e-5, rtol=0)
    (tmp_path / "sft" / "veripo_trl.json").unlink()  # as peft alone saves one
    runpy.run_path(str(RECIPE))["main"]([str(tmp_path / "sft"), str(tmp_path / "silent")])
    assert read_settings(str(tmp_path / "silent")) == {}


def test_a_qlora_adapter_merges_into_the_whole_weights(model_paths, rows, tmp_path):
    """The adapter alone is saved, so it is merged into weights that were never quantized."""
    pytest.importorskip("bitsandbytes")
    model, encoder = make_tiny_policy(model_paths["qwen2_5_vl"], **QUANTIZED)
    trainer = sft(model, encoder, rows, tmp_path)
    trainer.train()
    trainer.save_model()
    whole, encoder = make_tiny_policy(tmp_path)
    whole.eval()
    expected = [plain_log_probs(whole, encoder, row, [150, 160]) for row in rows]
    merged = whole.merge_and_unload()
    for row, want in zip(rows, expected, strict=True):
        torch.testing.assert_close(plain_log_probs(merged, encoder, row, [150, 160]), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage, options", [(sft, {}), (grpo, {}), (grpo, QUANTIZED)], ids=["sft", "grpo", "grpo-qlora"])
def test_a_resumed_run_ends_with_the_adapter_of_an_unbroken_one(stage, options, model_paths, rows, tmp_path):
    if options:
        pytest.importorskip("bitsandbytes")
    switches = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    switches |= {"beta": 0.1} if stage is grpo else {}
    model, encoder = make_tiny_policy(model_paths["qwen2_5_vl"], **options)
    stage(model, encoder, rows, tmp_path, **switches).train()
    resumed, encoder = make_tiny_policy(model_paths["qwen2_5_vl"], **options)
    start = adapter(resumed)
    trainer = stage(resumed, encoder, rows, tmp_path, **switches)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert changed(state(model), resumed) == set()
    assert any(not torch.equal(value, start[name]) for name, value in adapter(resumed).items())


@pytest.mark.parametrize("options", [{}, QUANTIZED, EMBEDDINGS], ids=["lora", "qlora", "embeddings"])
def test_the_reference_is_the_continued_adapter(options, model_paths, rows, tmp_path):
    """With `beta`, TRL keeps a frozen copy of the adapter as it came: the first KL is 0, later ones are not."""
    if options is QUANTIZED:
        pytest.importorskip("bitsandbytes")
    model, encoder = make_tiny_policy(model_paths["qwen2_5_vl"], **options)
    trainer = sft(model, encoder, rows, tmp_path / "sft")
    trainer.train()
    trainer.save_model()
    model, encoder = make_tiny_policy(tmp_path / "sft", **options)
    start = adapter(model)
    assert options is not EMBEDDINGS or any("lora_embedding_B" in name for name in start)
    assert model.peft_config["default"].lora_dropout > 0  # which would make two scorings of one policy differ
    trainer = grpo(model, encoder, rows, tmp_path / "grpo", beta=0.1, max_steps=3, logging_steps=1)
    assert "ref" in model.peft_config
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert len(kl) == 3 and kl[0] == pytest.approx(0, abs=1e-6) and kl[1] > 1e-4 and kl[2] > 1e-4
    for name, value in start.items():
        reference, trained = model.state_dict()[name.replace(".default", ".ref")], model.state_dict()[name]
        assert reference.dtype == trained.dtype and torch.equal(reference, value.to(trained.dtype))
        assert not torch.equal(trained, reference)
    trainer.save_model()
    # The next stage goes on with the policy and has a reference of its own.
    again, encoder = make_tiny_policy(tmp_path / "grpo", **options)
    assert list(again.peft_config) == ["default"]
    assert all(torch.equal(value, adapter(model)[name]) for name, value in adapter(again).items())
    grpo(again, encoder, rows, tmp_path / "next", beta=0.1)
    for name, value in adapter(again, "ref").items():
        assert torch.equal(value, adapter(model)[name.replace(".ref", ".default")])


def test_the_update_sees_the_adapter(model_paths, rows, tmp_path, monkeypatch):
    """Log-probabilities of the update equal a plain forward through the adapter, in training mode."""
    model, encoder = make_tiny_policy(model_paths["qwen2_5_vl"])
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer = grpo(model, encoder, rows, tmp_path)
    completions = fixed_completions(encoder.processor.tokenizer, 6)
    give_completions(trainer, completions, monkeypatch)
    model.train()
    inputs = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].size(1)
    found = trainer._get_per_token_logps_and_entropies(model, ids, mask, width)[0].detach()
    model.eval()
    for place, completion in enumerate(completions):
        expected = plain_log_probs(model, encoder, rows[place // 2], completion)
        torch.testing.assert_close(found[place, : len(completion)], expected, atol=1e-5, rtol=0)
