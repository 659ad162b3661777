"""GRPO over turns: whose advantage, which tokens count, and that every turn is scored as it was sampled."""

import pytest
import torch
from helpers import make_grpo_trainer, plain_positions, state
from trl import GRPOTrainer

from conftest import make_row
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.errors import ConfigError
from veripo_trl.evaluate.generate import generate
from veripo_trl.methods import load_methods, with_methods
from veripo_trl.methods.streaming import StreamingOptions
from veripo_trl.model.streaming import StreamEncoder
from veripo_trl.trainers.grpo import VideoGRPOTrainer

OWNERS, TOKENS, REWARDS = [0, 1, 0, 0, 1, 2, 3, 3], [3, 2, 1, 2, 4, 5, 1, 2], [1.0, 0.0, 0.0, 1.0]


@pytest.fixture
def make_trainer(load, media_root, tmp_path):
    """On a question of three turns and one of two, three rollouts each."""

    def make(*, rewards=(1.0, 0.0, 0.0, 0.0, 1.0, 1.0), clip_tokens=16, extra=(), **changes):
        model, encoder = load()
        rows = [make_row(name, media_root, videos=[f"{name}.mp4", *extra]) for name in ("long", "wide")]
        options = {"num_generations": 3, "per_device_train_batch_size": 3, "steps_per_generation": 2,
                   "gradient_accumulation_steps": 2, "loss_type": "dapo", "scale_rewards": "none",
                   "max_completion_length": 6, "generation_kwargs": {"top_k": 1}, **changes}  # fmt: skip
        kind = with_methods(VideoGRPOTrainer, ["streaming"], [StreamingOptions(clip_tokens, 40)])
        trainer = make_grpo_trainer(model, encoder, rows, tmp_path, make=kind, **options)
        trainer.reward_funcs = [lambda completions, **kwargs: list(rewards)[: len(completions)]]
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        trainer.rollout_store = RolloutStore(tmp_path / "rollouts")
        model.train()
        return trainer

    return make


def test_the_worked_loss(make_trainer, monkeypatch):
    """Ratio 1: the mean over all tokens, not over turns (−.125) nor rollouts (0), in one batch and in two."""
    trainer = make_trainer()
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies",
        lambda model, ids, *args, **kwargs: (torch.zeros(len(ids), 5), torch.zeros(len(ids), 5), None),
    )  # fmt: skip
    advantages = torch.tensor(REWARDS) - sum(REWARDS) / 4
    assert advantages[OWNERS].tolist() == [0.5, -0.5, 0.5, 0.5, -0.5, -0.5, 0.5, 0.5]
    mask = (torch.arange(5) < torch.tensor(TOKENS)[:, None]).long()
    ids = torch.ones(8, 5, dtype=torch.long)
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask,
              "advantages": advantages[OWNERS]}  # fmt: skip

    def loss(rows: slice, steps: int):
        trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = steps
        part = {key: value[rows] for key, value in inputs.items()}
        return float(GRPOTrainer._compute_loss(trainer, trainer.model, {**part, "num_items_in_batch": mask.sum()}))

    assert loss(slice(0, 8), 1) == pytest.approx(0.05)
    assert loss(slice(0, 3), 2) + loss(slice(3, 8), 2) == pytest.approx(0.05)


def test_every_turn_is_a_sequence_scored_as_it_was_sampled(make_trainer):
    trainer = make_trainer()
    model, encoder = trainer.model, trainer.encoder
    batch = next(iter(trainer.get_train_dataloader()))
    assert [row["encoded"] is batch[0]["encoded"] for row in batch] == [True] * 3 + [False] * 3  # read once
    first = trainer._prepare_inputs(batch)
    slices = trainer._buffered_inputs
    assert len(slices) == 2 and first is slices[0]
    # six answers, six thoughts on first clips, three on the second of the longer video, and one that fills up
    owners = trainer._owners
    assert owners == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2, 0]
    whole = {key: torch.cat([part[key] for part in slices]) for key in slices[0] if slices[0][key].ndim}
    assert whole["row_index"].tolist() == list(range(16))
    assert int(whole["tool_mask"][15, : whole["completion_mask"][15].sum()].sum()) == 0 and whole["tool_mask"][:15].all()
    expected = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0]).view(2, 3)
    expected = (expected - expected.mean(1, keepdim=True)).flatten()[owners]
    assert torch.allclose(whole["advantages"], expected)
    counts = whole["completion_mask"][:15].sum(1)
    assert int(slices[0]["num_items_in_batch"]) == int(counts.sum())
    trainer._active = prompts = trainer._encoded["train"][1]
    ids = torch.cat([whole["prompt_ids"], whole["completion_ids"]], 1)
    attention = torch.cat([whole["prompt_mask"], whole["completion_mask"]], 1)
    width = whole["completion_ids"].size(1)
    with torch.no_grad():
        scored = trainer._get_per_token_logps_and_entropies(model, ids, attention, width)[0]
    texts = [encoder.processor.tokenizer.decode(prompt.input_ids) for prompt in prompts]
    asked = ["Which colour" in text for text in texts]
    assert asked == [True] * 6 + [False] * 9 + [True]
    for row, prompt in enumerate(prompts[:15]):  # by itself, its positions computed a second time
        length = int(counts[row])
        completion = whole["completion_ids"][row, :length]
        sequence = torch.cat([torch.tensor(prompt.input_ids), completion])
        media = {"video_grid_thw": torch.tensor(prompt.video_grid_thw), "second_per_grid_ts": prompt.second_per_grid_ts}
        positions = plain_positions(sequence, media, encoder.config)[:, None]
        with torch.no_grad():
            logits = model(
                input_ids=sequence[None], position_ids=positions, video_grid_thw=media["video_grid_thw"],
                pixel_values_videos=prompt.pixel_values_videos,
            ).logits[0, len(prompt) - 1 : -1]  # fmt: skip
        own = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        assert torch.allclose(scored[row, :length], own, atol=1e-4), row
        logits[:, trainer.generation_config.suppress_tokens] = -torch.inf
        assert torch.equal(logits.argmax(-1), completion), row  # top_k 1: what sampling saw is what is scored
    for owner, stream in enumerate(trainer._streams):
        assert stream.memory.text and stream.memory.text.rstrip("\n") in texts[owner]
        assert len(stream.memory.entries) + stream.memory.evicted == len(stream.turns) - 1  # each rollout has its own
    stored = trainer.rollout_store.read()
    assert [row["question_id"] for row in stored] == ["long"] * 3 + ["wide"] * 3
    assert [row["completion_tokens"] for row in stored] == counts[:6].tolist()
    assert [row["problem"] for row in stored] == ["Which colour is first?"] * 6
    logged = {key: values[-1] for key, values in trainer._metrics["train"].items() if "streaming/" in key}
    assert logged["streaming/turns"] == 2.5 and logged["streaming/thought_tokens"] == counts[6:].float().mean()
    # the loss over both micro-batches is the mean over all turns' tokens
    losses = [float(trainer._compute_loss(model, part).detach()) for part in slices]
    assert sum(losses) == pytest.approx(float(-(expected[:15] * counts).sum() / counts.sum()), abs=1e-6)


def test_videos_of_one_turn_are_plain_grpo(make_trainer):
    trainer = make_trainer(clip_tokens=1000)
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert trainer._owners == list(range(6)) and len(trainer._buffered_inputs[0]["advantages"]) == 3
    assert trainer._buffered_inputs[0]["tool_mask"].all()


def test_a_resumed_run_ends_like_an_unbroken_one(make_trainer, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "generation_kwargs": {},
               "learning_rate": 1e-3, "num_generations": 2, "per_device_train_batch_size": 2}  # fmt: skip
    weights = []
    for checkpoint in (None, str(tmp_path / "checkpoint-1")):
        trainer = make_trainer(**options)
        trainer.train(resume_from_checkpoint=checkpoint)
        weights.append(state(trainer.model))
    assert trainer.state.log_history[-1]["step"] == 2 and trainer._owners
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_an_evaluation_amid_training_is_in_turns_too(make_trainer):
    trainer = make_trainer(per_device_eval_batch_size=3)
    first = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = float(trainer._compute_loss(trainer.model, first).detach())
    metrics = trainer.evaluate(eval_dataset=trainer.train_dataset)
    assert metrics["eval_streaming/turns"] == 2.5 and metrics["eval_reward"] == pytest.approx(1 / 3)
    trainer.model.train()
    assert float(trainer._compute_loss(trainer.model, first).detach()) == pytest.approx(loss)


def test_held_out_rows_are_asked_in_turns(make_trainer):
    trainer = make_trainer()
    assert isinstance(trainer.held_out_encoder, StreamEncoder)
    rows = trainer.train_dataset
    options = {"max_new_tokens": 4, "batch_size": 2}
    greedy = generate(trainer.model, trainer.held_out_encoder, rows, **options)
    sampled = generate(trainer.model, trainer.held_out_encoder, rows, samples=2, temperature=1.0, **options)
    plain = generate(trainer.model, trainer.encoder, rows, **options)
    assert [answer["row"] for answer in sampled] == [0, 0, 1, 1] and len(greedy) == 2
    assert [answer["completion"] for answer in greedy] != [answer["completion"] for answer in plain]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss_type": "grpo"}, "expected dapo or cispo"),
        ({"gradient_accumulation_steps": 1}, "one optimizer step per generation batch.*= 2 with"),
        ({"extra": ["fast.mp4"]}, "expected rows of one video; 2 training rows have several"),
        ({"prompt_parallel": 2}, "Set prompt_parallel 1"),
        ({"num_iterations": 2}, "one optimizer step per generation batch.*= 4 with"),
    ],
)
def test_what_cannot_be_trained_is_refused(make_trainer, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(**changes)


def test_methods_of_one_completion_are_refused():
    with pytest.raises(ConfigError, match="several sequences of a rollout"):
        load_methods(["streaming", "tw_grpo"])
