"""A cache's layer with room behind its rows holds what transformers' own layer holds."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from veripo_trl import generation
from veripo_trl.generation import RoomyLayer, sample_completions


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


def test_completions_longer_than_the_room(load, mixed_rows, monkeypatch):
    """The same tokens, however often a layer has to grow; prompts of different lengths, two rows each."""
    model, encoder = load()
    model.eval()
    prompts = [prompt for prompt in encoder.encode_rows(mixed_rows) for _ in range(2)]
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
