"""DPO: its log-probabilities are a plain forward's, its loss stock DPO's, its reference the policy it starts from."""

import copy
import math
from itertools import product

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import (
    CHOSEN,
    EMBEDDINGS,
    REJECTED,
    make_tiny_policy,
    pair_dataset,
    plain_log_probs,
    settings,
    stored_pair,
    write_pairs,
)
from helpers import make_dpo_trainer as make_trainer
from peft import LoraConfig, get_peft_model

from veripo_trl.data.prompts import load_template
from veripo_trl.data.schema import RowError
from veripo_trl.errors import VeripoError
from veripo_trl.model.encoding import PromptTooLongError
from veripo_trl.model.policy import LANGUAGE_MODEL_LINEAR
from veripo_trl.trainers.dpo import DPOCollator, VideoDPOConfig, VideoDPOTrainer
from veripo_trl.verifier.pair_dataset import load_pairs


def perturb(model, scale=0.02):
    """Move a policy away from its reference, the vision tower left alone."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "visual" not in name:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def scored(trainer, model, batch):
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return trainer._forward(
        model,
        batch["prompts"],
        batch["completion_width"],
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=labels,
    )


@pytest.mark.parametrize(
    "kind, shared", [*product(["qwen2_5_vl", "qwen3_vl"], [True, False]), ("qwen3_5", True)]
)
def test_log_probs_are_a_plain_forwards(kind, shared, load, mixed_rows, tmp_path):
    """Text, image, video, two videos, image + video in one batch, two pairs a question; of sources that number alike."""
    model, encoder = load(kind)
    dataset = pair_dataset([{**row, "question_id": "1"} for row in mixed_rows])
    trainer = make_trainer(model, encoder, dataset, tmp_path, shared_prefix=shared)
    trainer.shares_prompts = shared
    batch = DPOCollator(encoder, max_length=None)(list(dataset))
    assert len({id(prompt) for prompt in batch["prompts"]}) == len(mixed_rows)  # encoded once each
    with torch.no_grad():
        output = scored(trainer, model, batch)
    assert output.log_probs.shape == (2 * len(dataset), batch["input_ids"].size(1) - 1)
    tokenizer = encoder.processor.tokenizer
    for place, text in enumerate(dataset["chosen"][:] + dataset["rejected"][:]):
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        expected = plain_log_probs(model, encoder, dataset[place % len(dataset)], ids)
        own = batch["completion_mask"][place, 1:].bool()
        torch.testing.assert_close(output.log_probs[place][own], expected, atol=1e-5, rtol=0)
        assert output.log_probs[place][~own].abs().max() == 0


def first_log(trainer) -> dict:
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "rewards/margins" in entry)


def test_first_loss_is_ln_2_with_full_weights(load, mixed_rows, tmp_path):
    model, encoder = load()
    perturb(model)
    reference = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(model, encoder, pair_dataset(mixed_rows), tmp_path, max_steps=2)
    log = first_log(trainer)
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(log["rewards/margins"]) < 1e-6
    assert log["length/chosen"] > log["length/rejected"] and abs(log["logps/drift_chosen"]) < 1e-5
    second = [entry for entry in trainer.state.log_history if "rewards/margins" in entry][1]
    assert abs(second["logps/drift_chosen"]) > 1e-4 and second["loss"] != log["loss"]
    assert all(torch.equal(value, reference[name]) for name, value in trainer.ref_model.state_dict().items())
    assert any(not torch.equal(value, reference[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options", [{}, {"load_in_4bit": True, "dtype": "bfloat16"}, EMBEDDINGS], ids=["lora", "qlora", "embeddings"]
)
def test_the_adapter_of_the_stage_before_is_the_reference(options, model_paths, mixed_rows, tmp_path):
    """A trained adapter goes on; the reference is its frozen copy, not the bare base model."""
    model, encoder = make_tiny_policy(model_paths["qwen2_5_vl"], **options)
    perturb(model, 0.1)
    model.save_pretrained(tmp_path / "grpo")
    policy, encoder = make_tiny_policy(tmp_path / "grpo", **options)
    trainer = make_trainer(policy, encoder, pair_dataset(mixed_rows), tmp_path / "dpo", max_steps=2)
    log = first_log(trainer)
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(log["rewards/margins"]) < 1e-5
    weights = dict(policy.named_parameters())
    before = dict(model.named_parameters())
    copies = {name: name.replace(".ref", ".default") for name in weights if ".ref" in name}
    assert copies and not any(weights[name].requires_grad for name in copies)
    for name, source in copies.items():
        assert torch.equal(weights[name], before[source].to(weights[name].dtype))  # QLoRA trains in bfloat16
    assert any(not torch.equal(weights[name], weights[source]) for name, source in copies.items())
    # The bare base model is another policy: with it as the reference the first margins would not be 0.
    batch = trainer.data_collator(list(pair_dataset(mixed_rows)))
    with torch.no_grad():
        own = scored(trainer, policy, batch).log_probs.sum()
        with policy.disable_adapter():
            assert abs(scored(trainer, policy, batch).log_probs.sum() - own) > 1e-2


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_resumed_run_ends_like_an_unbroken_one(adapter, model_paths, load, mixed_rows, tmp_path):
    """Policy from the checkpoint, reference from the start."""
    if adapter:
        model, _ = make_tiny_policy(model_paths["qwen2_5_vl"])
        perturb(model, 0.1)
        model.save_pretrained(tmp_path / "start")
    final = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-1")):
        model, encoder = make_tiny_policy(tmp_path / "start") if adapter else load()
        trainer = make_trainer(
            model, encoder, pair_dataset(mixed_rows), tmp_path / "run", max_steps=3, save_strategy="steps", save_steps=1
        )
        trainer.train(resume_from_checkpoint=resume)
        final.append({name: value.detach().clone() for name, value in model.named_parameters()})
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[2] < losses[1]
    assert not (tmp_path / "run" / "checkpoint-1" / "ref").exists()
    assert final[0].keys() == final[1].keys()
    for name, value in final[0].items():
        torch.testing.assert_close(final[1][name], value, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_has_the_same_loss_curve_with_and_without_sharing(adapter, load, mixed_rows, tmp_path):
    """Videos included; gradients are those of whole rows, or the second loss would already differ."""
    curves = []
    for shared in (True, False):
        model, encoder = load()
        if adapter:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE_MODEL_LINEAR, init_lora_weights=False))
        trainer = make_trainer(
            model, encoder, pair_dataset(mixed_rows), tmp_path / str(shared), shared_prefix=shared, max_steps=3,
            learning_rate=1e-2, gradient_checkpointing=adapter,
        )  # fmt: skip
        trainer.train()
        assert trainer.shares_prompts == shared
        curves.append([(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log])
    shared, plain = torch.tensor(curves)
    assert len(shared) == 3 and shared[0, 0] == pytest.approx(math.log(2), abs=1e-5)
    assert (shared[1:, 0] - shared[0, 0]).abs().min() > 1e-3
    torch.testing.assert_close(shared, plain, atol=2e-5, rtol=1e-3)


def test_evaluating_before_training_checks_the_sharing(load, mixed_rows, tmp_path, monkeypatch):
    model, encoder = load()
    monkeypatch.setattr("veripo_trl.trainers.base.prefix_can_be_shared", lambda *args, **kwargs: False)
    trainer = make_trainer(model, encoder, pair_dataset(mixed_rows), tmp_path)
    metrics = trainer.evaluate(pair_dataset(mixed_rows[:2]))
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-5) and trainer.shares_prompts is False


def test_gradient_checkpointing_gives_the_same_loss(load, mixed_rows, tmp_path):
    losses = []
    for checkpointing in (False, True):
        model, encoder = load()
        reference = copy.deepcopy(model)
        perturb(model)
        trainer = make_trainer(
            model, encoder, pair_dataset(mixed_rows), tmp_path, ref_model=reference,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        losses.append(first_log(trainer)["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_cut_off_rollout_is_not_taught_an_end(load, mixed_rows):
    encoder = load()[1]
    end = encoder.processor.tokenizer.eos_token_id
    batch = DPOCollator(encoder, max_length=None)(list(pair_dataset(mixed_rows[:1], finished=False)))
    ended = [end in row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["completion_mask"])]
    assert ended == [True, True, False, False]


def test_special_tokens_that_a_rollout_spells_stay_text(load, mixed_rows):
    encoder = load()[1]
    tokenizer = encoder.processor.tokenizer
    spelled = "<think>I see <|video_pad|> and <|im_end|>: B.</think><answer>B</answer>"
    dataset = pair_dataset(mixed_rows[:1], texts=[(CHOSEN, spelled)])
    batch = DPOCollator(encoder, max_length=None)(list(dataset))
    ids = batch["input_ids"][1][batch["completion_mask"][1].bool()].tolist()
    assert ids.count(tokenizer.eos_token_id) == 1 and encoder.config.video_token_id not in ids
    assert tokenizer.decode(ids[:-1]) == spelled
    chosen = batch["input_ids"][0][batch["completion_mask"][0].bool()].tolist()
    assert chosen == tokenizer(CHOSEN)["input_ids"] + [tokenizer.eos_token_id]  # the tags stay what they are


def test_too_long_a_pair_is_refused_not_cut(load, mixed_rows):
    encoder = load()[1]
    with pytest.raises(PromptTooLongError, match=r"'video' has \d+ tokens .*max_length=30.*never cut"):
        DPOCollator(encoder, max_length=30)(list(pair_dataset([mixed_rows[2]])))


def test_a_reference_is_asked_for(load, mixed_rows, tmp_path):
    model, encoder = load()
    with pytest.raises(ValueError, match="Expected `ref_model` with full weights"):
        VideoDPOTrainer(
            model=model,
            args=VideoDPOConfig(**settings(tmp_path)),
            train_dataset=pair_dataset(mixed_rows),
            processing_class=encoder.processor,
            encoder=encoder,
        )


@pytest.mark.parametrize("option", ["precompute_ref_log_probs", "sync_ref_model"])
def test_options_that_would_be_wrong_are_refused(option, tmp_path):
    with pytest.raises(ValueError, match=option):
        VideoDPOConfig(**settings(tmp_path), **{option: True})


def test_stored_pairs_load_as_rows(mixed_rows, media_root, tmp_path):
    path = write_pairs(tmp_path / "pairs", [stored_pair(mixed_rows[2]), stored_pair(mixed_rows[0], kind="penalty")])
    source = {"path": path, "media_root": str(media_root)}
    loaded = load_pairs([source], template=load_template("tiny"))[0]
    assert loaded["kind"][:] == ["consistency", "penalty"]
    for column in ("question_id", "problem", "options", "videos", "images", "media_root"):
        assert loaded[0][column] == mixed_rows[2][column], column
    assert loaded[0]["chosen"] == CHOSEN and loaded[0]["rejected"] == REJECTED
    only = load_pairs([{**source, "kinds": ["penalty"], "limit": 5}], template=load_template("tiny"))[0]
    assert only["question_id"][:] == ["text"]


@pytest.mark.parametrize(
    ("policy", "changes", "warned"),
    [
        ("outputs/grpo", {}, False),
        ("outputs/grpo/checkpoint-50", {}, False),
        ("me/grpo", {}, False),  # pushed under the run's name
        ("outputs/sft", {}, False),  # it made the first rollouts
        ("outputs/loop/align-1", {}, True),
        ("Qwen/Qwen2.5-VL-3B-Instruct", {}, True),
        ("outputs/sft-2", {"chosen_ids": ["a"]}, True),
        ("outputs/sft", {"chosen_ids": ["a"], "policy": None}, False),  # nothing is known
    ],
)
def test_a_policy_that_did_not_sample_the_pairs_is_named(policy, changes, warned, mixed_rows, tmp_path, caplog):
    known = {"chosen_ids": ["grpo/step0-part0-rank0-1"], "policy": "outputs/sft"}
    path = write_pairs(tmp_path / "pairs", [stored_pair(mixed_rows[0], **{**known, **changes})] * 2)
    load_pairs([{"path": path}], template=load_template("tiny"), policy=policy)
    assert caplog.text.count(f"model_name_or_path is {policy}; the pairs were sampled by ") == warned


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_template": "0123"}, "template of hash 0123"),
        ({"solution": "E"}, "cannot be used"),
        ({"videos": ["/elsewhere/clip.mp4"]}, "cannot be used"),
    ],
)
def test_pairs_that_cannot_be_used(changes, message, mixed_rows, media_root, tmp_path):
    path = write_pairs(tmp_path / "pairs", [stored_pair(mixed_rows[2], **changes)])
    with pytest.raises(VeripoError, match=message):
        load_pairs([{"path": path, "media_root": str(media_root)}], template=load_template("tiny"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "./nowhere/pairs"}, "expected a folder of parquet files"),
        ({"path": "x", "split": "train"}, "expected `path`, and nothing but path, media_root"),
    ],
)
def test_sources_that_cannot_be_used(source, message):
    with pytest.raises(RowError, match=message):
        load_pairs([source], template=load_template("tiny"))


def test_other_files_are_not_pairs(mixed_rows, tmp_path):
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.Table.from_pylist([{"question_id": "q"}]), tmp_path / "rows" / "a.parquet")
    with pytest.raises(VeripoError, match="a.parquet: no column chosen"):
        load_pairs([{"path": str(tmp_path / "rows")}], template=load_template("tiny"))
