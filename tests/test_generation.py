"""A cache's layer with room behind its rows holds what transformers' own layer holds."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from veripo_trl.model.inputs import model_inputs
from veripo_trl.shared_prompt import rollout as generation
from veripo_trl.shared_prompt.rollout import RoomyLayer, left_pad, sample_completions
from veripo_trl.trainers.grpo import SAMPLING


def states(tokens: int, rows: int):
    return torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 4)


@pytest.mark.parametrize("then", ["nothing", "crop", "select", "reorder"])
def test_as_transformers_own(then, monkeypatch):
    monkeypatch.setattr(generation, "ROOM", 3)
    own = DynamicLayer()
    own.update(*states(5, 2))
    before = own.keys.clone()
    places = torch.tensor([0, 0, 1])
    layer = RoomyLayer(own, places)
    own.batch_select_indices(places)
    for step in range(12):
        if step == 6 and then != "nothing":
            for changed in (own, layer):
                if then == "crop":
                    changed.crop(-2)
                elif then == "select":
                    changed.batch_select_indices(torch.tensor([2, 0, 1]))
                else:
                    changed.reorder_cache(torch.tensor([1, 1, 2]))
        new = states(2 if step == 3 else 1, 3)
        for expected, found in zip(own.update(*new), layer.update(*new), strict=True):
            assert torch.equal(expected, found)
        assert own.get_seq_length() == layer.get_seq_length()
    assert torch.equal(layer.keys[0, :, :3], before[0, :, :3]) or then != "nothing"


def test_all_that_sampling_may_be_told_samples_as_stock_does(load, mixed_rows):
    model, encoder = load()
    model.eval()
    prompts = [encoder.encode(row) for row in mixed_rows]
    ids, mask = left_pad(prompts, 0)
    inputs = {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0}
    inputs |= model_inputs(prompts, ids, completion_width=0, config=encoder.config)
    values = {
        "top_k": 5, "top_p": 0.5, "min_p": 0.1, "top_h": 0.4, "typical_p": 0.5, "epsilon_cutoff": 0.004,
        "eta_cutoff": 0.003, "repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "min_new_tokens": 9,
        "suppress_tokens": [*range(50, 300)], "begin_suppress_tokens": [*range(50, 300)],
        "bad_words_ids": [[token] for token in range(100, 200)], "sequence_bias": [[[60], 9.0]],
        "exponential_decay_length_penalty": [2, 1.5],
    }  # fmt: skip
    assert values.keys() == set(SAMPLING)
    for name, value in values.items():
        options = {"do_sample": True, "max_new_tokens": 8 + (name == "min_new_tokens"), name: value}
        torch.manual_seed(0)
        found = sample_completions(model, prompts, pad_token_id=0, config=encoder.config, **options)
        torch.manual_seed(0)
        with torch.no_grad():
            assert torch.equal(model.generate(**inputs, **options)[:, ids.size(1) :], found), name


def test_recurrent_states_are_copied_once_per_completion(load, mixed_rows, monkeypatch):
    """Qwen3.5 samples as stock `generate` does on whole rows; also in parts of a group, and prompts one by one."""
    model, encoder = load("qwen3_5")
    model.eval()
    prompts = [prompt for prompt in map(encoder.encode, mixed_rows) for _ in range(3)]
    ids, mask = left_pad(prompts, 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs |= model_inputs(prompts, ids, completion_width=0, config=encoder.config)
    seen = []
    model.model.language_model.layers[0].linear_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["hidden_states"].shape[:2])), with_kwargs=True
    )
    for do_sample in (True, False):
        options = {"do_sample": do_sample, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
        torch.manual_seed(0)
        with torch.no_grad():
            stock = model.generate(**inputs, **options)[:, ids.size(1) :]
        seen.clear()
        torch.manual_seed(0)
        found = sample_completions(model, prompts, config=encoder.config, **options)
        assert torch.equal(found, stock) and len(stock.unique(dim=0)) > (5 if do_sample else 1)
        assert seen == [(5, ids.size(1) - 1)] + [(15, 1)] * 8  # each prompt once, then tokens
    monkeypatch.setattr(generation, "MOST_MASKED", 0)
    assert torch.equal(sample_completions(model, prompts, config=encoder.config, rows_at_once=4, **options), stock)


@pytest.mark.parametrize("declared", [{"use_cache": False}, {"num_beams": 2}, {"no_repeat_ngram_size": 1}])
def test_a_policys_own_generation_config_counts_for_its_end_tokens_alone(load, mixed_rows, declared):
    model, encoder = load()
    model.eval()
    prompts = [encoder.encode(row) for row in mixed_rows]
    completions = []
    for declares in ({}, declared):
        model.generation_config.update(**declares)
        torch.manual_seed(0)
        options = {"config": encoder.config, "do_sample": True, "max_new_tokens": 12}
        completions.append(sample_completions(model, prompts, pad_token_id=0, **options))
    assert torch.equal(*completions)
    assert getattr(model.generation_config, *declared) == declared.popitem()[1]  # as it was


def test_completions_longer_than_the_room(load, mixed_rows, monkeypatch):
    """The same tokens, however often a layer has to grow; prompts of different lengths, two rows each."""
    model, encoder = load()
    model.eval()
    prompts = [prompt for prompt in map(encoder.encode, mixed_rows) for _ in range(2)]
    options = {"pad_token_id": 0, "config": encoder.config, "max_new_tokens": 12, "min_new_tokens": 12}
    completions = []
    for room in (256, 2):
        monkeypatch.setattr(generation, "ROOM", room)
        torch.manual_seed(0)
        completions.append(sample_completions(model, prompts, do_sample=True, **options))
    monkeypatch.setattr(generation, "DynamicLayer", type("Other", (), {}))  # transformers' own layers, kept
    torch.manual_seed(0)
    completions.append(sample_completions(model, prompts, do_sample=True, **options))
    assert torch.equal(completions[0], completions[1]) and torch.equal(completions[0], completions[2])
    assert len(completions[0].unique(dim=0)) > 5  # they are not all the same row
