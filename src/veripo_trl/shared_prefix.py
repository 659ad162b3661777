"""Score the completions of a group with their prompt computed once."""

import torch

from .encoding import EncodedPrompt, model_inputs, pad_positions
from .generation import distinct_neighbours, left_pad


def score_completions(model, unwrapped, prompts: list[EncodedPrompt], completion_ids, completion_mask, *, pad_token_id):
    """Per-token log-probabilities and entropies of completions, with gradient where it is enabled.

    Two passes: the prompts without their last token, once each, keeping keys and values (with their gradient); then, for
    every row, the last prompt token and the completion on top of them. The result is that of whole rows, for
    P + G · C tokens of work instead of G · (P + C). Not for models under gradient checkpointing, which keep none.

    Args:
        model: what the second pass runs through, wrapped for its backend, with TRL's fused head.
        unwrapped: the same policy, unwrapped, for the first pass.
        prompts: one per row; rows of a group are neighbours and share one object.
        completion_ids, completion_mask: int64 (rows, C), padded on the right.

    Returns:
        TRL's fused output: `log_probs` and `entropy` of shape (rows, C), zero where masked.
    """
    unique, place = distinct_neighbours(prompts)
    device = completion_ids.device
    prompt_ids, prompt_mask = (tensor.to(device) for tensor in left_pad(unique, pad_token_id))
    inputs = model_inputs(unique, prompt_ids, completion_width=0, config=unwrapped.config)
    cache = unwrapped(
        input_ids=prompt_ids[:, :-1],
        attention_mask=prompt_mask[:, :-1],
        use_cache=True,
        logits_to_keep=1,
        **{**inputs, "position_ids": inputs["position_ids"][:, :, :-1]},
    ).past_key_values
    rows = torch.tensor(place, device=device)
    cache.batch_select_indices(rows)

    width = prompt_ids.size(1)
    positions = pad_positions(prompts, prompt_width=width, completion_width=completion_ids.size(1))
    labels = completion_ids.masked_fill(completion_mask == 0, -100)
    return model(
        input_ids=torch.cat([prompt_ids[rows, -1:], completion_ids], dim=1),
        attention_mask=torch.cat([prompt_mask[rows], completion_mask], dim=1),
        position_ids=positions[:, :, width - 1 :].to(device),
        past_key_values=cache,
        labels=torch.cat([torch.full_like(labels[:, :1], -100), labels], dim=1),
        fused_lm_head=True,
    )
