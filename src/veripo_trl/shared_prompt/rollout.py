"""Sample completions with transformers, each distinct prompt computed once."""

import copy
from itertools import groupby

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from veripo_trl.model.encoding import EncodedPrompt
from veripo_trl.model.inputs import model_inputs, pad_positions


def left_pad(prompts: list[EncodedPrompt], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of prompts padded on the left, int64 (prompts, longest)."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad_token_id)
    attention_mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.from_numpy(prompt.input_ids)
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids, attention_mask


def distinct_neighbours(prompts: list[EncodedPrompt]) -> tuple[list[EncodedPrompt], list[int]]:
    """Prompts without repeats of the one before, and for each entry the index of its prompt among them."""
    unique: list[EncodedPrompt] = []
    index = []
    for prompt in prompts:
        if not unique or unique[-1] is not prompt:
            unique.append(prompt)
        index.append(len(unique) - 1)
    return unique, index


def whole_groups(prompts: list[EncodedPrompt], size: int) -> list[list[EncodedPrompt]]:
    """Cut between groups (neighbours that are the same object): pieces of at most `size` entries, or of one group."""
    pieces: list[list[EncodedPrompt]] = []
    for _, group in groupby(prompts, key=id):
        group = list(group)
        if pieces and len(pieces[-1]) + len(group) <= size:
            pieces[-1] += group
        else:
            pieces.append(group)
    return pieces


ROOM = 256  # tokens that a layer's keys and values grow by


class RoomyLayer(DynamicLayer):
    """Rows of a cache's layer with room behind them, into which new tokens are written.

    Transformers' own layer copies all keys and values for each token: behind a video prompt, most of the time that
    decoding takes.
    """

    def __init__(self, layer: DynamicLayer, rows: torch.Tensor):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys[rows], layer.values[rows]
        self._room = (self.keys, self.values)  # none yet

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        start = self.keys.size(-2)
        end = start + key_states.size(-2)
        # Reordering the rows replaces `keys` and `values` by other tensors: then these are copied once more.
        if end > self._room[0].size(-2) or self.keys.data_ptr() != self._room[0].data_ptr():
            self._room = tuple(grown(tensor, end + ROOM) for tensor in (self.keys, self.values))
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[..., start:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self._room)
        return self.keys, self.values


def grown(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """A copy of (rows, heads, tokens, size) with room for `length` tokens."""
    room = tensor.new_empty(*tensor.shape[:-2], length, tensor.size(-1))
    room[..., : tensor.size(-2), :] = tensor
    return room


MOST_MASKED = 2**28  # queries × keys that padded prompts may be masked by: 0.3 GB as booleans, more as they are added


def prefill(model, base, prompts: list[EncodedPrompt], *, pad_token_id: int, config) -> Cache:
    """Keys and values of prompts, padded on the left, without their last token, which `generate` computes itself, since
    it needs its logits: (prompts, heads, longest - 1, size) in each layer.

    Long prompts of unequal lengths go one by one: together they would need a mask of (prompts, 1, L, L).
    """
    device = next(model.parameters()).device
    input_ids, attention_mask = (tensor.to(device) for tensor in left_pad(prompts, pad_token_id))
    if input_ids.numel() * input_ids.size(1) > MOST_MASKED and not attention_mask.all():
        one_by_one = [prefill(model, base, [prompt], pad_token_id=pad_token_id, config=config) for prompt in prompts]
        for number, layer in enumerate(one_by_one[0].layers):
            if isinstance(layer, LinearAttentionLayer):
                for name in ("conv_states", "recurrent_states"):
                    own = [getattr(cache.layers[number], name)[0] for cache in one_by_one]
                    getattr(layer, name)[0] = torch.cat(own)
                continue
            for name in ("keys", "values"):
                own = [getattr(cache.layers[number], name) for cache in one_by_one]
                width = input_ids.size(1) - 1
                setattr(layer, name, torch.cat([F.pad(part, (0, 0, width - part.size(2), 0)) for part in own]))
        return one_by_one[0]
    inputs = model_inputs(prompts, input_ids, completion_width=0, config=config, frozen_model=base)
    return model(
        input_ids=input_ids[:, :-1],
        attention_mask=attention_mask[:, :-1],
        position_ids=inputs.pop("position_ids")[:, :, :-1],
        use_cache=True,
        logits_to_keep=1,
        **inputs,
    ).past_key_values


@torch.no_grad()
def sample_completions(
    model,
    prompts: list[EncodedPrompt],
    *,
    pad_token_id: int,
    config,
    rows_at_once: int | None = None,
    cache: Cache | None = None,
    **options,
) -> torch.Tensor:
    """Sample one completion per entry of `prompts`.

    Neighbours that are the same object (a group) share one pass over their prompt: its keys and values are computed
    once and repeated. Vision features are computed once per prompt too, or taken from it (`vision_inputs`).

    Args:
        model: the unwrapped policy. options: for `model.generate` (`generation_config` or its fields). Of the policy's
            own generation_config.json only the end tokens count.
        rows_at_once: completions that are decoded together, each with a copy of its prompt's keys and values; default:
            all. The prompts are computed once all the same.
        cache: what `prefill` would give for the distinct prompts, if it is there already.

    Returns:
        int64 (len(prompts), new tokens), padded on the right with `pad_token_id`.
    """
    unique, index = distinct_neighbours(prompts)  # U prompts; of each of the R rows, the index of its prompt
    device = next(model.parameters()).device
    input_ids, attention_mask = (tensor.to(device) for tensor in left_pad(unique, pad_token_id))  # (U, P) each
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    positions = pad_positions(unique, prompt_width=input_ids.size(1), completion_width=0).to(device)  # (3, U, P)
    if cache is None:
        cache = prefill(model, base, unique, pad_token_id=pad_token_id, config=config)
    pieces = torch.tensor(index, device=device).split(rows_at_once or len(prompts))
    # What `options` leave open, `generate` would take from the policy's own generation_config.json: another cache, beams.
    own, outputs = base.generation_config, []
    base.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        for number, rows in enumerate(pieces):
            output = model.generate(
                input_ids=input_ids[rows],
                attention_mask=attention_mask[rows],
                position_ids=positions[:, rows],
                past_key_values=repeated(cache, rows, keep=number < len(pieces) - 1),
                pad_token_id=pad_token_id,
                synced_gpus=False,  # weights are whole: processes may generate unequally often, and long
                **options,
            )
            outputs += output[:, input_ids.size(1) :]
    finally:
        base.generation_config = own
    return pad_sequence(outputs, batch_first=True, padding_value=pad_token_id)


def repeated(whole: Cache, rows: torch.Tensor, *, keep: bool) -> Cache:
    """A cache of the given rows of `whole`, (rows, heads, tokens, size) in each layer. Unless `whole` is kept, a layer of
    it is freed as soon as it is copied."""
    cache = copy.copy(whole)
    if keep:
        cache.layers = list(whole.layers)
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = RoomyLayer(layer, rows)
        else:
            own = cache.layers[number] = copy.copy(layer)
            vars(own).update({name: dict(value) for name, value in vars(own).items() if isinstance(value, dict)})
            own.reorder_cache(rows)
    return cache


def cut_at_end(tokens: torch.Tensor, end_ids: list[int]) -> list[list[int]]:
    """Each row of (rows, width) up to and including its first end token."""
    ended = torch.isin(tokens, torch.tensor(end_ids, device=tokens.device))
    first = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.size(1))
    return [row[:length] for row, length in zip(tokens.tolist(), first.tolist(), strict=True)]
