"""Less memory for long sequences, with the same result: the MLP in pieces, layer inputs on the host."""

from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.integrations import is_deepspeed_zero3_enabled

WHOLE = 16_384  # tokens of a sequence up to which its MLP is computed at once
PIECE = 4_096


def mlp_in_pieces(model) -> None:
    """Let the MLPs of a Qwen-VL's language model compute sequences of over WHOLE tokens in pieces, as they are told apart
    from each other by nothing. Each piece is computed anew in the backward pass.

    Of a layer's working set, which for a long prompt is more than all layer inputs that gradient checkpointing keeps,
    most is the MLP's. Experts are left alone, and so are weights that ZeRO-3 gathers for each call: processes whose rows
    have other lengths would gather them another number of times.

    Args:
        model: without its backend's and PEFT's wrappers; its adapters are in their places.
    """
    if is_deepspeed_zero3_enabled():
        return
    for layer in model.model.language_model.layers:
        if hasattr(layer.mlp, "down_proj") and getattr(layer.mlp.forward, "func", None) is not in_pieces:
            layer.mlp.forward = partial(in_pieces, layer.mlp.forward)


def in_pieces(forward, hidden: torch.Tensor) -> torch.Tensor:
    """`forward` of (rows, tokens, size), where each token's result depends on that token alone."""
    if hidden.size(1) <= WHOLE:
        return forward(hidden)
    pieces = hidden.split(PIECE, dim=1)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(forward, piece, use_reentrant=False) for piece in pieces], dim=1)
    return torch.cat([forward(piece) for piece in pieces], dim=1)


def layer_inputs_on_host(hidden_size: int) -> saved_tensors_hooks:
    """While this is entered, what a forward saves of hidden states, (rows, tokens, hidden_size), waits for its backward
    pass in host memory. Under gradient checkpointing these are the layers' inputs, and nearly all that is saved.
    """

    def pack(tensor):
        if tensor.dim() != 3 or tensor.size(-1) != hidden_size or not tensor.is_floating_point():
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(saved):
        return saved if isinstance(saved, torch.Tensor) else saved[1].to(saved[0], non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
