"""Which models and adapters are loaded, how, and what is said of those that are not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import load_script, make_row
from helpers import make_grpo_trainer
from helpers import make_sft_trainer as make_trainer
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from trl import ModelConfig

from veripo_trl.chat import Chat
from veripo_trl.data.prompts import PromptError, load_template
from veripo_trl.model import policy
from veripo_trl.model.policy import (
    LANGUAGE_MODEL_LINEAR,
    SEEING,
    SETTINGS_FILE,
    adapter_config,
    check_base,
    load_policy,
    read_settings,
    weights_hash,
)  # fmt: skip
from veripo_trl.recipe.arguments import DataArguments, ReportArguments
from veripo_trl.recipe.build import make_encoder, make_policy, see_as_trained
from veripo_trl.recipe.finish import train
from veripo_trl.recipe.training_rows import rows_folder


def lora(**changes):
    options = {"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE_MODEL_LINEAR, "task_type": "CAUSAL_LM", **changes}
    return LoraConfig(**options)


@pytest.fixture
def adapter_path(model_paths, tmp_path):
    """A new adapter of the tiny Qwen2.5-VL, saved."""
    model, _ = load_policy(str(model_paths["qwen2_5_vl"]), lora=lora())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", ["outputs/none_such", "./none_such", "/none/such/model", "a/b/none_such"])
def test_a_folder_that_is_not_there_is_said_to_be_missing(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(policy, "find_adapter_config_file", lambda *a, **k: pytest.fail("the Hub was asked"))
    with pytest.raises(FileNotFoundError, match=f"'{name}': no such folder.*{tmp_path}"):
        load_policy(name)


def test_an_unknown_name_that_may_be_on_the_hub_names_both_places():
    with pytest.raises(FileNotFoundError, match="'Qwen/None-such'.*as a folder .looked from .* or from the Hub"):
        load_policy("Qwen/None-such")


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_5_moe", "llava", "invented"])
def test_another_model_family_is_refused(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=f"type '{model_type}'.*qwen2_5_vl.*qwen3_5.*qwen3_vl"):
        load_policy(str(tmp_path))


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_folder_without_a_model_is_refused(content, tmp_path):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*no config.json with a model_type"):
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
    "base, reason", [("outputs/gone", "no such folder"), ("Qwen/None-such", "from the Hub: ."), (None, "no such folder")]
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
    with pytest.raises(FileNotFoundError, match="seen from where it was trained"):
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
        make_policy(model_args, DataArguments())


@pytest.fixture
def asked(monkeypatch):
    """(name, revision) of each model whose config is read."""
    names, read = [], PreTrainedConfig.get_config_dict.__func__

    def record(cls, name, **kwargs):
        names.append((str(name), kwargs.get("revision")))
        return read(cls, name, **kwargs)

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", classmethod(record))
    return names


def test_a_reference_has_the_policys_revision(asked, model_paths, tmp_path):
    """TRL loads it by name alone, perhaps from another machine's cache: the main branch as it is now."""
    base = str(model_paths["qwen2_5_vl"])
    model_args = ModelConfig(model_name_or_path=base, model_revision="first")
    model, processor = make_policy(model_args, DataArguments())
    encoder = make_encoder(model, processor, DataArguments())
    asked.clear()
    trainer = make_grpo_trainer(model, encoder, [make_row("text", tmp_path)], tmp_path, beta=0.1)
    assert type(trainer.ref_model) is type(model)
    assert asked and set(asked) == {(base, "first")}


def test_revisions_reach_what_they_belong_to(asked, model_paths, tmp_path):
    """`model_revision` is the model's; an adapter records it as its base's, and the next stage loads that base."""
    base = str(model_paths["qwen2_5_vl"])
    options = {"use_peft": True, "lora_r": 4}
    model_args = ModelConfig(model_name_or_path=base, model_revision="first", **options)
    model, _ = make_policy(model_args, DataArguments())
    assert asked[0] == (base, "first")
    model.save_pretrained(tmp_path / "adapter")
    assert adapter_config(str(tmp_path / "adapter"))["revision"] == "first"
    asked.clear()
    load_policy(str(tmp_path / "adapter"), revision="second")
    assert asked[0] == (base, "first")
    asked.clear()
    make_policy(ModelConfig(model_name_or_path=base), DataArguments())
    assert asked[0] == (base, None)  # "main", TRL's default, is left to the Hub


# ------------------------------------------------------------------------------- what a policy says of its own training

SEEN = {"fps": 1.0, "min_frames": 2, "max_frames": 6, "min_pixels": 3136, "max_pixels": 6272, "max_image_pixels": 5000}


def trained(base, folder, media_root, *, own_words: Path | None = None, **options):
    """A policy after one step of SFT with a checkpoint, as a recipe ends: its trainer."""
    seen = DataArguments(prompt_template=str(own_words or "tiny"), **SEEN)
    model, processor = load_policy(str(base), **options)
    rows = [make_row("one", media_root, videos=["wide.mp4"])]
    changes = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "learning_rate": 1e-2}
    changes["hub_license"] = "mit"
    trainer = make_trainer(model, make_encoder(model, processor, seen), rows, folder, **changes)
    rows_folder(folder).mkdir()  # as several processes leave it
    train(trainer, None, ReportArguments(), checkpoint=None, title="")
    assert not rows_folder(folder).exists()
    assert not (Path(folder) / "checkpoint-1" / "README.md").exists()  # TRL's, as a killed run would leave it
    return trainer


@pytest.mark.parametrize("adapter", [False, True])
def test_a_policy_carries_how_it_was_trained_to_see(adapter, model_paths, media_root, tmp_path, capfd):
    """A user's own template too, whose file is gone by then; read by the next stage, by chat and by evaluation."""
    words = tmp_path / "mine.yaml"
    words.write_text(yaml.safe_dump({
        "layout": "{problem} {options} {instruction}",
        "instructions": dict.fromkeys(load_template("tiny").instructions, "Say it."),
    }))  # fmt: skip
    base, run = model_paths["qwen2_5_vl"], tmp_path / "run"
    trainer = trained(base, run, media_root, own_words=words, lora=lora() if adapter else None)
    template = load_template(str(words))
    words.unlink()
    evaluation = load_script("evaluation/evaluation_vllm.py")
    given = ["--output_path", "o.json", "--prompt_path", "p.json", "--engine", "transformers"]
    for folder in (run, run / "checkpoint-1"):
        settings = json.loads((folder / SETTINGS_FILE).read_text())
        assert settings.pop("prompt_template")["layout"] == template.layout
        assert settings == {**SEEN, "base_weights": weights_hash(str(base)) if adapter else None}
        capfd.readouterr()
        data = see_as_trained(DataArguments(), str(folder))
        assert {name: getattr(data, name) for name in SEEN} == SEEN
        assert load_template(data.prompt_template) == template
        encoder = evaluation.make_encoder(evaluation.parse_arguments(["--model_path", str(folder), *given]))
        assert encoder.template == template and encoder.max_image_pixels == 5000
        assert encoder.loader.settings == trainer.encoder.loader.settings
        said = capfd.readouterr().err
        assert said.count(f"{folder}: as it was trained: prompt_template mine, fps 1.0, min_frames 2") == 2
    chat = Chat(str(run), device="cpu")
    assert chat.encoder.template == template and chat.encoder.max_image_pixels == 5000
    assert chat.encoder.loader.settings == trainer.encoder.loader.settings


def test_settings_that_differ_from_the_trained_ones_are_warned_of(model_paths, media_root, tmp_path, caplog, capsys):
    trained(model_paths["qwen2_5_vl"], tmp_path, media_root)
    capsys.readouterr()
    data = see_as_trained(DataArguments(prompt_template="default", **{**SEEN, "max_frames": 8}), str(tmp_path))
    assert "was trained with prompt_template tiny (here default), max_frames 6 (here 8)" in caplog.text
    assert data.max_frames == 8 and data.prompt_template == "default" and not capsys.readouterr().err
    caplog.clear()
    see_as_trained(DataArguments(prompt_template="tiny", **SEEN), str(tmp_path))
    assert not caplog.text and not capsys.readouterr().err


def test_a_model_that_says_nothing_gets_the_defaults(model_paths, adapter_path, caplog, capsys):
    for folder in (model_paths["qwen2_5_vl"], adapter_path):
        data = see_as_trained(DataArguments(fps=3.0), str(folder))
        assert {name: getattr(data, name) for name in SEEING} == {**SEEING, "fps": 3.0}
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{folder} has no veripo_trl.json of how it was trained; by default: prompt_template def")
        assert "fps" not in line
    assert not caplog.text


def test_an_adapter_that_says_nothing_sees_as_its_base(model_paths, media_root, tmp_path):
    trained(model_paths["qwen2_5_vl"], tmp_path / "base", media_root)
    load_policy(str(tmp_path / "base"), lora=lora())[0].save_pretrained(tmp_path / "adapter")
    settings = read_settings(str(tmp_path / "adapter"))
    assert {name: settings[name] for name in SEEN} == SEEN


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("fps"), "KeyError: 'fps'"),
        (lambda s: s.update(fps="2"), "veripo_trl.json is not what this version writes"),
        (lambda s: s.update(later=1), "veripo_trl.json is not what this version writes"),
        (lambda s: s.update(prompt_template=None), "veripo_trl.json is not what this version writes"),
        (lambda s: s["prompt_template"].update(layout="{problem} {options}!"), "expected the hash .* came"),
        (lambda s: s["prompt_template"].pop("instructions"), "expected the keys layout"),
    ],
)
def test_settings_that_were_changed_are_refused(change, told, load, tmp_path):
    policy.save_settings(tmp_path, load()[1], None)
    (tmp_path / "config.json").write_text("{}")
    settings = json.loads((tmp_path / SETTINGS_FILE).read_text())
    change(settings)
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(settings))
    with pytest.raises((ValueError, PromptError), match=told) as raised:
        read_settings(str(tmp_path))
    assert str(tmp_path) in str(raised.value)
    (tmp_path / SETTINGS_FILE).write_text('{"fps": 2')
    with pytest.raises(ValueError, match="is not what this version writes"):
        read_settings(str(tmp_path))


def test_an_adapter_on_weights_that_are_not_its_base(model_paths, media_root, adapter_path, tmp_path):
    """Its base by another name is; what it was merged into is not, nor a base that was trained again."""
    shutil.copytree(model_paths["qwen2_5_vl"], tmp_path / "base")
    base, run = str(tmp_path / "base"), str(tmp_path / "run")
    trained(base, run, media_root, lora=lora())
    model, processor = load_policy(run)
    model.merge_and_unload().save_pretrained(tmp_path / "merged", max_shard_size="2MB")
    processor.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()
    copy = str(model_paths["qwen2_5_vl"])
    assert weights_hash(copy) == weights_hash(base) != weights_hash(str(tmp_path / "merged"))
    check_base(run, None, copy, weights_hash(copy))
    with pytest.raises(ValueError, match=f"adapter '{run}' was trained on other weights than those of '.*merged'"):
        check_base(run, None, str(tmp_path / "merged"), weights_hash(str(tmp_path / "merged")))
    check_base(str(adapter_path), None, base, weights_hash(base))  # says nothing of its base's weights
    shutil.rmtree(base)
    (tmp_path / "merged").rename(base)
    with pytest.raises(ValueError, match=f"other weights than those of '{base}'"):
        load_policy(run)


def test_weights_with_scalars_have_a_hash(tmp_path):
    """As quantized models and others have them."""
    hashes = set()
    for scale in (1.0, 2.0):
        save_file({"scale": torch.tensor(scale), "empty": torch.zeros(0)}, tmp_path / "model.safetensors")
        hashes.add(weights_hash(str(tmp_path)))
    assert len(hashes) == 2 and None not in hashes


@pytest.mark.parametrize("adapter", [False, True])
def test_the_card_is_the_true_one_and_checkpoints_have_none(adapter, model_paths, media_root, tmp_path):
    trained(model_paths["qwen2_5_vl"], tmp_path / "run", media_root, lora=lora() if adapter else None)
    card = (tmp_path / "run" / "README.md").read_text()
    assert ("A LoRA adapter for" if adapter else "Full weights, trained from") + " qwen2_5_vl (a local folder" in card
    assert "license: mit" in card and "cold start" in card and "| optimizer steps | 1 |" in card
    assert [file.parent.name for file in tmp_path.rglob("README.md")] == ["run"]
