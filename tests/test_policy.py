"""Which models and adapters are loaded, how, and what is said of those that are not."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedConfig
from trl import ModelConfig

from veripo_trl import policy, stages
from veripo_trl.policy import LANGUAGE_MODEL_LINEAR, adapter_config, load_policy, looks_local


def lora(**changes):
    options = {"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE_MODEL_LINEAR, "task_type": "CAUSAL_LM", **changes}
    return LoraConfig(**options)


@pytest.fixture
def adapter_path(model_paths, tmp_path):
    """A new adapter of the tiny Qwen2.5-VL, saved."""
    model, _ = load_policy(str(model_paths["qwen2_5_vl"]), lora=lora())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "name, local",
    [
        ("outputs/tiny_sft", True),
        ("./model", True),
        ("../model", True),
        ("/data/model", True),
        ("~/model", True),
        ("a/b/c", True),
        ("models/", True),
        ("with space/model", True),
        ("Qwen/Qwen2.5-VL-3B-Instruct", False),
        ("gpt2", False),
    ],
)
def test_names_that_can_only_be_folders(name, local):
    assert looks_local(name) is local


@pytest.mark.parametrize("name", ["outputs/none_such", "./none_such", "/none/such/model", "a/b/none_such"])
def test_a_folder_that_is_not_there_is_said_to_be_missing(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(policy, "find_adapter_config_file", lambda *a, **k: pytest.fail("the Hub was asked"))
    with pytest.raises(FileNotFoundError, match=f"'{name}': no such folder.*{tmp_path}"):
        load_policy(name)


def test_an_unknown_name_that_may_be_on_the_hub_names_both_places():
    with pytest.raises(FileNotFoundError, match="'Qwen/None-such'.*no such folder, and as a name on the Hub"):
        load_policy("Qwen/None-such")


@pytest.mark.parametrize("model_type", ["qwen2", "llava", "invented"])
def test_another_model_family_is_refused(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=f"type '{model_type}'.*qwen2_5_vl.*qwen3_vl"):
        load_policy(str(tmp_path))


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_folder_without_a_model_is_refused(content, tmp_path):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*no config.json"):
        load_policy(str(tmp_path))


@pytest.mark.parametrize("name", [None, ""])
def test_no_model_is_refused(name):
    with pytest.raises(ValueError, match="model_name_or_path"):
        load_policy(name)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_dtype(kind, dtype, model_paths):
    model, processor = load_policy(str(model_paths[kind]), dtype=dtype)
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32  # the tiny models are saved in float32
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize("train_vision_tower", [False, True])
def test_the_vision_tower_is_frozen_unless_asked_for(train_vision_tower, model_paths):
    model, _ = load_policy(str(model_paths["qwen2_5_vl"]), train_vision_tower=train_vision_tower)
    names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    visual = {name for name, _ in model.named_parameters() if ".visual." in name}
    assert names == (set() if train_vision_tower else visual) and visual


def test_adapter_config(model_paths, adapter_path):
    assert adapter_config(str(model_paths["qwen2_5_vl"])) is None
    assert adapter_config(str(adapter_path))["base_model_name_or_path"] == str(model_paths["qwen2_5_vl"])


@pytest.mark.parametrize(
    "base, reason", [("outputs/gone", "no such folder"), ("Qwen/None-such", "no such folder, and"), (None, "names none")]
)
def test_an_adapter_whose_base_is_gone_names_both(base, reason, adapter_path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    file = adapter_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
    with pytest.raises(FileNotFoundError, match=f"{base!r} of the adapter '{adapter_path}'.*{tmp_path}.*{reason}"):
        load_policy(str(adapter_path))


def test_a_relative_base_is_found_from_where_the_adapter_was_trained(model_paths, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_paths["qwen2_5_vl"], "outputs/base")
    model, _ = load_policy("outputs/base", lora=lora())
    model.save_pretrained("outputs/adapter")
    assert adapter_config("outputs/adapter")["base_model_name_or_path"] == "outputs/base"
    assert isinstance(load_policy("outputs/adapter")[0], PeftModel)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="Start where the adapter was trained"):
        load_policy(str(tmp_path / "outputs" / "adapter"))


def test_lora_options_beside_an_adapter_are_not_used_and_said_so(adapter_path, caplog):
    model, _ = load_policy(str(adapter_path), lora=lora(r=16))
    assert model.peft_config["default"].r == 4
    assert "LoRA options of this run are not used" in caplog.text


@pytest.mark.parametrize("with_adapter", ["new", "continued"])
def test_a_vision_tower_that_would_not_be_saved_is_refused(with_adapter, model_paths, adapter_path):
    path = str(model_paths["qwen2_5_vl"] if with_adapter == "new" else adapter_path)
    with pytest.raises(ValueError, match="train_vision_tower: false"):
        load_policy(path, train_vision_tower=True, lora=lora() if with_adapter == "new" else None)


def test_quantized_weights_without_an_adapter_are_refused(model_paths):
    model_args = ModelConfig(model_name_or_path=str(model_paths["qwen2_5_vl"]), load_in_4bit=True)
    with pytest.raises(ValueError, match="use_peft: true"):
        stages.make_policy(model_args, stages.DataArguments())


def test_revisions_reach_what_they_belong_to(model_paths, tmp_path, monkeypatch):
    """`model_revision` is the model's; an adapter records it as its base's, and the next stage loads that base."""
    asked = []
    read = PreTrainedConfig.get_config_dict.__func__

    def record(cls, name, **kwargs):
        asked.append((str(name), kwargs.get("revision")))
        return read(cls, name, **kwargs)

    base = str(model_paths["qwen2_5_vl"])
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", classmethod(record))
    options = {"use_peft": True, "lora_r": 4}
    model_args = ModelConfig(model_name_or_path=base, model_revision="first", **options)
    model, _ = stages.make_policy(model_args, stages.DataArguments())
    assert asked[0] == (base, "first")
    model.save_pretrained(tmp_path / "adapter")
    assert adapter_config(str(tmp_path / "adapter"))["revision"] == "first"
    asked.clear()
    load_policy(str(tmp_path / "adapter"), revision="second")
    assert asked[0] == (base, "first")
    asked.clear()
    stages.make_policy(ModelConfig(model_name_or_path=base), stages.DataArguments())
    assert asked[0] == (base, None)  # "main", TRL's default, is left to the Hub
