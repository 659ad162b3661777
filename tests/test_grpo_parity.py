"""What the trainer computes equals a plain transformers forward of the same prompt, row by row and unpadded."""

import dataclasses
from itertools import product

import pytest
import torch
from conftest import make_row
from helpers import fixed_completions, give_completions, plain_log_probs
from helpers import make_grpo_trainer as make_trainer

from veripo_trl.data.schema import rows_to_dataset
from veripo_trl.model.inputs import model_inputs
from veripo_trl.shared_prompt.rollout import left_pad, sample_completions
from veripo_trl.trainers.grpo import VideoGRPOTrainer
from veripo_trl.trainers.loading import regroup
from veripo_trl.vllm.inputs import media_items

KINDS = ["qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize(
    "kind, batch_size, vision",  # 1: nothing to share, the plain path
    [*product(KINDS, [10, 3, 1], ["frozen", "trained"]), ("qwen3_5", 3, "frozen")],
)
def test_update_sees_what_a_plain_forward_sees(kind, batch_size, vision, load, mixed_rows, tmp_path, monkeypatch):
    """Text, image, video, two videos, image + video in one left-padded batch, G = 2, whole and in parts."""
    model, encoder = load(kind)
    model.model.visual.requires_grad_(vision == "trained")
    trainer = make_trainer(model, encoder, mixed_rows, tmp_path)
    completions = fixed_completions(encoder.processor.tokenizer, 10)
    give_completions(trainer, completions, monkeypatch)
    model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = trainer._generate_and_score_completions(batch)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    trainer._active = trainer._encoded["train"][1]
    width = inputs["completion_ids"].size(1)
    found, entropies, _ = trainer._get_per_token_logps_and_entropies(
        model, ids, mask, width, batch_size=batch_size, compute_entropy=True
    )
    trainer.shares_prompts = False
    _, plain_entropies, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, width, compute_entropy=True)
    torch.testing.assert_close(entropies, plain_entropies, atol=1e-5, rtol=0)
    rows = [row for row in mixed_rows for _ in range(2)]
    for place, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        expected = plain_log_probs(model, encoder, row, completion)
        torch.testing.assert_close(found[place, : len(completion)].detach(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_media_in_the_templates_order(kind, load, mixed_rows, tmp_path, monkeypatch):
    """An image of the start, the video so far, an image of now (PRIMO R1), each where the prompt names it: for the
    update, and for vLLM."""
    model, encoder = load(kind)
    encoder.template = dataclasses.replace(encoder.template, media_order=["image", "video", "image"])
    images = mixed_rows[1]["images"] + mixed_rows[4]["images"]
    row = {**mixed_rows[2], "images": images[:1] + images[-1:]}
    trainer = make_trainer(model, encoder, [row], tmp_path)
    completions = fixed_completions(encoder.processor.tokenizer, 2)
    give_completions(trainer, completions, monkeypatch)
    model.train()
    inputs = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    trainer._active = trainer._encoded["train"][1]
    width = inputs["completion_ids"].size(1)
    found, *_ = trainer._get_per_token_logps_and_entropies(model, ids, mask, width)
    for place, completion in enumerate(completions):
        expected = plain_log_probs(model, encoder, row, completion)
        torch.testing.assert_close(found[place, : len(completion)].detach(), expected, atol=1e-5, rtol=0)

    prompt = encoder.encode(row)
    items = media_items(prompt, encoder.config)
    vision = [encoder.config.image_token_id, encoder.config.video_token_id]
    named = [int(prompt.input_ids[item["offset"]]) for item in items]
    assert named == [vision[0], *[vision[1]] * (len(items) - 2), vision[0]]
    first, last = prompt.image_grid_thw.prod(1)
    assert torch.equal(items[0]["pixels"], prompt.pixel_values[:first])
    assert torch.equal(items[-1]["pixels"], prompt.pixel_values[first : first + last])


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_prompt_gives_the_gradient_of_whole_rows(kind, load, mixed_rows, tmp_path, monkeypatch):
    """Vision tower trained too: its gradient comes through the one pass over the prompt."""
    gradients = []
    for shared in (True, False):
        model, encoder = load(kind)
        model.model.visual.requires_grad_(True)
        trainer = make_trainer(model, encoder, mixed_rows, tmp_path, shared_prefix=shared, loss_type="bnpo")
        give_completions(trainer, fixed_completions(encoder.processor.tokenizer, 10), monkeypatch)
        trainer.reward_funcs = [lambda completions, **kwargs: [float(n % 3) for n in range(len(completions))]]
        trainer.current_gradient_accumulation_steps = 1
        model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer._compute_loss(model, inputs).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    shared, plain = gradients
    assert any("visual" in name for name in shared) and shared.keys() <= plain.keys()
    for name, gradient in plain.items():
        if name not in shared:  # feeds only the last layer's outputs at prompt tokens, which nothing reads
            assert not gradient.any(), name
            continue
        assert (shared[name] - gradient).norm() / gradient.norm().clamp(min=1e-8) < 1e-4, name


def test_the_loss_of_an_update_uses_those_log_probs(load, mixed_rows, tmp_path, monkeypatch):
    """After TRL's shuffle and split, every slice scores its own rows: seen through what the update really computed."""
    model, encoder = load()
    trainer = make_trainer(
        model, encoder, mixed_rows, tmp_path, per_device_train_batch_size=5, steps_per_generation=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    completions = fixed_completions(encoder.processor.tokenizer, 10)
    give_completions(trainer, completions, monkeypatch)
    rows = [row for row in mixed_rows for _ in range(2)]
    expected = [
        plain_log_probs(model, encoder, row, ids).tolist() for row, ids in zip(rows, completions, strict=True)
    ]
    seen = []
    score = VideoGRPOTrainer._get_per_token_logps_and_entropies

    def record(self, *args, **kwargs):
        result = score(self, *args, **kwargs)
        if kwargs.get("compute_entropy"):
            seen.append(result[0].detach())
        return result

    monkeypatch.setattr(VideoGRPOTrainer, "_get_per_token_logps_and_entropies", record)
    trainer.train()
    found = [row.tolist() for part in seen for row in part]
    assert len(found) == 10
    for want, got in zip(expected, found, strict=True):  # slices are put back into the order of the rows
        assert got[: len(want)] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_5"])
def test_greedy_tokens_score_as_they_were_generated(kind, load, mixed_rows, tmp_path):
    """Generation and scoring see the same positions: log-probabilities of both passes agree."""
    model, encoder = load(kind)
    trainer = make_trainer(model, encoder, mixed_rows, tmp_path, num_generations=2)
    prompts = [encoder.encode(row) for row in mixed_rows]
    trainer._active = prompts
    ids, mask = left_pad(prompts, encoder.processor.tokenizer.pad_token_id)
    width = ids.size(1)
    fields = model_inputs(prompts, ids, completion_width=0, config=encoder.config)
    options = {
        "do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10,
        "suppress_tokens": trainer.generation_config.suppress_tokens,
    }  # fmt: skip
    output = model.generate(
        input_ids=ids, attention_mask=mask, **fields, **options, output_logits=True, return_dict_in_generate=True
    )
    tokens = output.sequences[:, width:]
    generated = torch.stack(output.logits, 1).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    scored, _, _ = trainer._get_per_token_logps_and_entropies(
        model, output.sequences, torch.cat([mask, torch.ones_like(tokens)], 1), 10
    )
    torch.testing.assert_close(scored.detach(), generated, atol=1e-5, rtol=0)
    # The rollout's own way, prompts computed once for each pair, takes the same tokens.
    pairs = [prompt for prompt in prompts for _ in range(2)]
    shared = sample_completions(
        model, pairs, pad_token_id=encoder.processor.tokenizer.pad_token_id, config=encoder.config, **options
    )
    assert shared.tolist() == tokens.repeat_interleave(2, 0).tolist()


def test_evaluation_between_two_updates_changes_nothing(load, media_root, tmp_path, monkeypatch):
    """Equal lengths and grids on both sides, so that other prompts' media would go unnoticed by shape."""
    from conftest import write_video

    for place in range(4):
        write_video(media_root / f"same{place}.mp4", frames=4, height=56, width=56, seed=100 + place)
    rows = [make_row(f"row{place}", media_root, videos=[f"same{place}.mp4"]) for place in range(4)]
    losses = []
    for evaluate in (False, True):
        model, encoder = load()
        trainer = make_trainer(
            model, encoder, rows[:2], tmp_path / str(evaluate), per_device_train_batch_size=2,
            steps_per_generation=2, per_device_eval_batch_size=4, num_generations=2,
        )  # fmt: skip
        tokenizer = encoder.processor.tokenizer
        completions = fixed_completions(tokenizer, 4)
        give_completions(trainer, completions, monkeypatch)
        trainer.current_gradient_accumulation_steps = 1
        torch.manual_seed(0)
        model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        trainer._compute_loss(model, trainer._prepare_inputs(batch))
        trainer._step += 1
        if evaluate:
            trainer.evaluate(eval_dataset=rows_to_dataset(rows[2:]))
            model.train()
        inputs = trainer._prepare_inputs(batch)
        trainer.current_gradient_accumulation_steps = 1
        trainer._compute_loss(model, inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logps = trainer._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].size(1))[0]
        losses.append(logps.detach())
    torch.testing.assert_close(losses[0], losses[1], atol=0, rtol=0)


def test_rows_of_another_generation_batch_are_refused(load, mixed_rows, tmp_path, monkeypatch):
    model, encoder = load()
    trainer = make_trainer(model, encoder, mixed_rows, tmp_path)
    give_completions(trainer, fixed_completions(encoder.processor.tokenizer, 10), monkeypatch)
    model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    old = trainer._generate_and_score_completions(batch)
    trainer._generate_and_score_completions(batch)
    with pytest.raises(RuntimeError, match="generation batches"):
        trainer._compute_loss(model, old)


def test_ids_and_features_of_different_rows_are_refused(load, mixed_rows, tmp_path):
    model, encoder = load()
    trainer = make_trainer(model, encoder, mixed_rows, tmp_path)
    prompts = [encoder.encode(row) for row in mixed_rows]
    ids = torch.from_numpy(prompts[2].input_ids)[None]
    trainer._active = [prompts[3]]
    with pytest.raises(RuntimeError, match="video tokens"):
        trainer._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), 2)


def test_regroup_restores_the_order():
    index = torch.tensor([3, 0, 2, 1, 5, 4])
    parts = [
        {"row_index": index[:3], "x": index[:3] * 10, "n": torch.tensor(7)},
        {"row_index": index[3:], "x": index[3:] * 10, "n": torch.tensor(7)},
    ]
    whole = regroup(parts)
    assert [part["row_index"].tolist() for part in whole] == [[0, 1, 2], [3, 4, 5]]
    assert [part["x"].tolist() for part in whole] == [[0, 10, 20], [30, 40, 50]]
    assert whole[1]["n"].item() == 7


def test_vision_and_pad_tokens_are_never_sampled(load, mixed_rows, tmp_path):
    """A model that wants nothing but vision tokens, and some that the user suppresses, still samples none."""
    model, encoder = load()
    trainer = make_trainer(model, encoder, mixed_rows, tmp_path, generation_kwargs={"suppress_tokens": [100, 101]})
    tokenizer = encoder.processor.tokenizer
    wanted = ["<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
    wanted = [100, 101, *tokenizer.convert_tokens_to_ids([*wanted, tokenizer.pad_token])]
    hidden = []
    model.model.language_model.norm.register_forward_hook(lambda m, i, o: hidden.append(o))
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(0.1)
        head = model.lm_head.weight
        head[wanted] = head.mean(0) + 50 * head[wanted].sign()
    batch = next(iter(trainer.get_train_dataloader()))
    output = trainer._generate_and_score_completions(batch)
    sampled = set(output["completion_ids"][output["completion_mask"].bool()].tolist())
    assert sampled and not sampled & set(wanted)
