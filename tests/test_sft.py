"""Supervised fine-tuning: what is learned, from which tokens, and that nothing else changes."""

from itertools import product

import pytest
import torch
from conftest import make_row
from helpers import changed, plain_log_probs, state
from helpers import make_sft_trainer as make_trainer
from trl import ModelConfig

from veripo_trl.data.prompts import build_target
from veripo_trl.data.schema import RowError
from veripo_trl.errors import VeripoError
from veripo_trl.model.encoding import PromptTooLongError
from veripo_trl.model.policy import load_policy
from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.build import make_encoder, make_policy
from veripo_trl.trainers.sft import SFTCollator, VideoSFTConfig

KINDS = ["qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_5"])
def test_labels_are_the_answer_with_its_end_of_turn(kind, load, mixed_rows):
    _, encoder = load(kind)
    rows = [{**row, "process": f"{row['process']} {'Yes. ' * place}"} for place, row in enumerate(mixed_rows)]
    batch = SFTCollator(encoder, max_length=None)(rows)
    tokenizer = encoder.processor.tokenizer
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    assert [prompt.question_id for prompt in batch["prompts"]] == [row["question_id"] for row in rows]
    for place, row in enumerate(rows):
        ids, labels, mask = (batch[name][place] for name in ("input_ids", "labels", "attention_mask"))
        learned = labels != -100
        assert tokenizer.decode(labels[learned]) == build_target(row, encoder.template) + "<|im_end|>"
        assert torch.equal(ids[learned], labels[learned])
        # All that is not padding: the prompt, then the answer, without a gap.
        text = tokenizer.decode(ids[mask.bool()])
        assert text.endswith("<|im_start|>assistant\n" + tokenizer.decode(labels[learned]))
        assert text.startswith("<|im_start|>user\n") and "<|endoftext|>" not in text
        assert not mask[learned.nonzero().max() + 1 :].any() and mask.sum() > learned.sum()


@pytest.mark.parametrize("kind, shared_prefix", [*product(KINDS, [True, False]), ("qwen3_5", True)])
def test_the_loss_is_that_of_a_plain_forward(kind, shared_prefix, load, mixed_rows, tmp_path):
    """Text, image, video, two videos, image + video in one batch, packed and padded, against each row alone."""
    model, encoder = load(kind)
    rows = [{**row, "process": f"{row['process']} {'Yes. ' * place}"} for place, row in enumerate(mixed_rows)]
    trainer = make_trainer(model, encoder, rows, tmp_path, shared_prefix=shared_prefix)
    tokenizer = encoder.processor.tokenizer
    expected = []
    for row in rows:
        answer = tokenizer(build_target(row, encoder.template), add_special_tokens=False)["input_ids"]
        expected.append(plain_log_probs(model, encoder, row, [*answer, tokenizer.eos_token_id]))
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(len(rows))])
    trainer.model.train()
    found, score = [], trainer._score
    trainer._score = lambda *args: found.append(score(*args)) or found[-1]
    loss = trainer.compute_loss(model, batch)  # with the guards of the first step
    assert trainer.shares_prompts is shared_prefix
    width = batch["completion_width"]
    for place, want in enumerate(expected):
        got = found[0].log_probs[place][batch["labels"][place, -width:] != -100]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert loss.item() == pytest.approx(-torch.cat(expected).mean().item(), abs=1e-5)


def test_a_few_steps_lower_the_loss_and_leave_the_vision_tower_as_it_was(load, mixed_rows, tmp_path):
    model, encoder = load()
    before = state(model)
    trainer = make_trainer(model, encoder, mixed_rows, tmp_path, max_steps=6)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0] - 1.0
    names = changed(before, model)
    assert names == {name for name in before if ".visual." not in name}


def test_a_vision_tower_that_is_to_be_trained_is(model_paths, media_root, tmp_path):
    sizes = {"min_frames": 2, "max_frames": 4, "min_pixels": 56 * 56, "max_pixels": 112 * 56}
    data_args = DataArguments(prompt_template="tiny", train_vision_tower=True, **sizes)
    model, processor = make_policy(ModelConfig(model_name_or_path=str(model_paths["qwen2_5_vl"])), data_args)
    before = state(model)
    rows = [make_row("video", media_root, videos=["wide.mp4"])]
    make_trainer(model, make_encoder(model, processor, data_args), rows, tmp_path).train()
    visual = {name for name in before if ".visual." in name}
    assert visual and visual <= changed(before, model)


def test_max_length_refuses_and_never_cuts(load, mixed_rows, tmp_path):
    model, encoder = load()
    row = mixed_rows[3]
    prompt = len(encoder.encode(row))
    length = int(SFTCollator(encoder, max_length=None)([row])["attention_mask"].sum())
    assert length > prompt
    whole = SFTCollator(encoder, max_length=length)([row])
    assert whole["input_ids"].size(1) == length
    message = rf"'two-videos' has {length} tokens \({prompt} of prompt\).*max_length={length - 1}.*max_frames"
    trainer = make_trainer(model, encoder, [row], tmp_path, max_length=length - 1)
    with pytest.raises(PromptTooLongError, match=message):
        trainer.train()
    assert VideoSFTConfig.max_length is None  # TRL's default is 1024


@pytest.mark.parametrize("process", [None, "", "  \n"])
def test_rows_without_thinking_are_named_before_training(process, load, mixed_rows, tmp_path):
    model, encoder = load()
    rows = [*mixed_rows[:2], {**mixed_rows[2], "process": process}, {**mixed_rows[3], "process": process}]
    with pytest.raises(RowError, match="2 of 4 rows have no `process`.*'video', 'two-videos'"):
        make_trainer(model, encoder, rows, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(kind, load, mixed_rows, tmp_path):
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    model, encoder = load(kind)
    unbroken = make_trainer(model, encoder, mixed_rows, tmp_path, **options)
    unbroken.train()
    whole = state(model)
    resumed, encoder = load(kind)
    trainer = make_trainer(resumed, encoder, mixed_rows, tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert changed(whole, resumed) == set()
    for key in ("num_tokens", "train_loss"):  # of the whole run
        logged = [[entry.get(key) for entry in t.state.log_history] for t in (trainer, unbroken)]
        assert logged[0] == pytest.approx(logged[1])
    for rows, changes, what in (
        (mixed_rows[:-1], {}, "rows: 5 → 4, content of rows: "),
        ([*mixed_rows[:-1], {**mixed_rows[-1], "solution": "A"}], {}, "content of rows: "),
        (mixed_rows, {"per_device_train_batch_size": 1}, "per_device_train_batch_size: 2 → 1"),
    ):
        trainer = make_trainer(load(kind)[0], encoder, rows, tmp_path, **{**options, **changes})
        with pytest.raises(VeripoError, match=f"cannot go on from step 2: its steps would see other rows .*{what}"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    # The check can fail: without the checkpoint's weights the last two steps lead elsewhere.
    other, encoder = load(kind)
    trainer = make_trainer(other, encoder, mixed_rows, tmp_path, **options)
    trainer._load_from_checkpoint = lambda *args, **kwargs: None
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert changed(whole, other) != set()


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_checkpoint_is_loaded_whole(kind, load, mixed_rows, tmp_path):
    """Not its few tensors whose names are those of the module tree, among the last ones of all others."""
    model, encoder = load(kind)
    trainer = make_trainer(
        model, encoder, mixed_rows[:2], tmp_path, eval_rows=mixed_rows[:2], max_steps=2, save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, greater_is_better=True,
        metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert changed(state(model), load_policy(str(tmp_path / "checkpoint-1"))[0]) == set()
    assert changed(state(model), load_policy(str(tmp_path / "checkpoint-2"))[0]) != set()


def test_a_saved_model_is_the_trained_one(load, mixed_rows, tmp_path):
    model, encoder = load()
    trainer = make_trainer(model, encoder, mixed_rows, tmp_path)
    trainer.train()
    trainer.save_model()
    loaded, processor = load_policy(str(tmp_path))
    assert changed(state(model), loaded) == set()
    assert processor.tokenizer.get_vocab() == encoder.processor.tokenizer.get_vocab()
