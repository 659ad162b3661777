"""Attention over a packed sequence in which several segments share one prefix.

A packed sequence is one row: the prefixes of all groups, then the segments of all groups in the same order. A prefix
sees itself, a segment sees its group's prefix and itself, both causally. For two groups with prefixes P1, P2 and
segments a, b of the first and c of the second (rows are queries, columns keys):

            P1  P2  a   b   c
        P1  1   .   .   .   .        1: every piece on itself, causal
        P2  .   1   .   .   .        2: a group's segments, as one run of queries, on its prefix, in full
        a   2   .   1   .   .        .: not computed
        b   2   .   .   1   .
        c   .   2   .   .   1

Forward. Of one query, with scores s_j = scale · query · key_j and L = log Σ_j exp(s_j) (the log-sum-exp), attention is
out = Σ_j exp(s_j - L) v_j. Call 1 sums over the segment's own keys and returns (out_1, L_1), call 2 over the prefix's
and returns (out_2, L_2). Over all keys L = log(exp(L_1) + exp(L_2)) and out = exp(L_1 - L) out_1 + exp(L_2 - L) out_2:
the two results are merged by their log-sum-exp. No key is copied and no token padded.

Backward. With g = ∂loss/∂out and the weights p_j = exp(s_j - L), softmax's derivative gives, for each key by itself,
    ∂loss/∂v_j = p_j g,    ∂loss/∂s_j = p_j (g · v_j - g · out),
and from ∂loss/∂s_j follow the gradients of key_j and, summed over j, of the query. A key's terms need no other key: all
that the others do is in `out` and `L`. Flash attention's backward computes just these terms, from the `out` and `L` that
it is given. So each call's backward, given the *merged* `out` and `L`, yields its own keys' terms of the whole attention,
and the terms of the two calls add up. (The same identity carries ring attention.)

Of a prefix in the last layer only keys and values are needed: its own attention and its MLP are left out there.
"""

from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class PackedLayout:
    """Where the pieces of a packed sequence lie, in tokens.

    A plain class on purpose: wrappers such as FSDP's copy dataclasses on their way into a forward.

    Attributes:
        prefixes: length of each group's prefix. segments: lengths of each group's segments.
        pieces: int32 (prefixes + segments + 1), ends of all pieces; prefix_ends, group_ends: int32 (groups + 1), ends
            of the prefixes, and of the groups' segments counted from the first segment; segment_ends: int32
            (segments + 1), of the segments counted from there. All on the model's device.
        layers: the layers that have followed this layout.
    """

    def __init__(self, prefixes: list[int], segments: list[list[int]], device):
        def ends(lengths):
            return torch.tensor(cumulative(lengths), dtype=torch.int32, device=device)

        self.prefixes, self.segments = prefixes, segments
        flat = [length for group in segments for length in group]
        self.pieces, self.segment_ends = ends([*prefixes, *flat]), ends(flat)
        self.prefix_ends, self.group_ends = ends(prefixes), ends([sum(group) for group in segments])
        self.layers: set[int] = set()

    @property
    def prefix_tokens(self) -> int:
        """Tokens of all prefixes: where the first segment starts."""
        return sum(self.prefixes)

    def shared(self, key, value) -> tuple[torch.Tensor, torch.Tensor]:
        """What `crossings` refer to: keys and values of the prefixes, contiguous."""
        return key[: self.prefix_tokens], value[: self.prefix_tokens]

    def crossings(self, segments_only: bool) -> list[tuple[int, "Pieces"]]:
        """The calls on shared keys: where their queries start, and the pieces; queries and keys without a gap, the keys
        from the first shared one. With `segments_only` queries are counted from the first segment."""
        return [(0 if segments_only else self.prefix_tokens, on_prefixes(self))]


def cumulative(lengths: list[int]) -> list[int]:
    """Ends of consecutive pieces, with 0 in front."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return ends


def use_shared_prefix(model) -> None:
    """Let a Qwen-VL model take `shared_prefix=PackedLayout` in its forward; without it nothing changes.

    The attention function that the model uses is registered anew under its own name, so that whatever goes by that name
    (masks, kernels) stays as it is, and the backbone returns the segments' hidden states only. Both are left in place,
    as are the last layer's hooks: gradient checkpointing calls the attention again in the backward pass.

    Args:
        model: the unwrapped model, without PEFT's wrapper. Its attention is not "eager", which cannot be registered.
    """
    name = model.model.language_model.config._attn_implementation
    inner = ALL_ATTENTION_FUNCTIONS[name]
    if getattr(inner, "func", None) is not attention_forward:
        AttentionInterface.register(name, partial(attention_forward, inner=inner))
    if keep_segments not in model.model._forward_hooks.values():
        model.model.register_forward_hook(keep_segments, with_kwargs=True)
        leave_out_prefix(model.model.language_model.layers[-1])
    for layer in model.model.language_model.layers:
        linear = getattr(layer, "linear_attn", None)
        if linear is not None and getattr(linear.forward, "func", None) is not linear_forward:
            linear.forward = partial(linear_forward, linear, linear.forward)


def attention_forward(module, query, key, value, attention_mask, *, inner, shared_prefix=None, scaling=None, **kwargs):
    """An attention function for `AttentionInterface`: `inner`, unless a causal layer was given a layout."""
    if shared_prefix is None or not module.is_causal:  # a trained vision tower gets the forward's arguments, too
        return inner(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if torch.is_autocast_enabled(query.device.type):  # as autocast treats torch's own attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    shared_prefix.layers.add(module.layer_idx)
    tensors = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    last = module.layer_idx == module.config.num_hidden_layers - 1
    return attend(*tensors, shared_prefix, scaling, segments_only=last)[None], None


class PrefixState:
    """What a linear-attention layer has of a prefix at its end, with gradient; in the place of a cache of that layer.

    Attributes:
        conv: the last inputs of its convolution, (prefixes, channels, its width - 1). recurrent: (prefixes, heads, key
            size, value size). None before the prefixes went through.
    """

    conv = recurrent = None

    def get_conv_state(self, layer_idx, state_idx=0):
        return self.conv

    def get_recurrent_state(self, layer_idx, state_idx=0):
        return self.recurrent

    def update_conv_state(self, states, layer_idx, conv_kernel_size):
        before = states[..., :0] if self.conv is None else self.conv
        states = torch.cat([before, states], dim=-1)
        self.conv = F.pad(states, (conv_kernel_size - 1, 0))[..., 1 - conv_kernel_size :]
        return states

    def update_recurrent_state(self, states, layer_idx):
        self.recurrent = states


def linear_forward(
    module, inner, hidden_states, *, cache_params=None, attention_mask=None, shared_prefix=None, **kwargs
):
    """The forward of a linear-attention layer (Qwen3.5): `inner`, unless it was given a layout.

    Such a layer hands on a state of fixed size from token to token. So all prefixes go through it, and then all segments,
    each from the state at its prefix's end: what whole rows give, and the state's gradient is summed over a prefix's
    segments. Two calls in any case: under ZeRO-3 each gathers weights, in all processes alike.
    """
    if shared_prefix is None:
        return inner(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)
    shared_prefix.layers.add(module.layer_idx)
    counts = [len(group) for group in shared_prefix.segments]
    segments = [length for group in shared_prefix.segments for length in group]
    pieces = hidden_states[0].split([*shared_prefix.prefixes, *segments])
    state = PrefixState()
    # Zeros on the left change no state, so that all prefixes end together: (prefixes, longest, hidden size).
    before = pad_sequence(pieces[: len(counts)], batch_first=True, padding_side="left")
    before = inner(before, cache_params=state, **kwargs)
    group = torch.repeat_interleave(torch.tensor(counts)).to(hidden_states.device)
    state.conv, state.recurrent = state.conv[group], state.recurrent[group]
    after = pad_sequence(pieces[len(counts) :], batch_first=True)  # (segments, longest, hidden size)
    if after.size(1) == 1:  # to the module a step of decoding, whose kernel has no gradient
        after = F.pad(after, (0, 0, 0, 1))
    after = inner(after, cache_params=state, **kwargs)
    found = [row[row.size(0) - length :] for row, length in zip(before, shared_prefix.prefixes, strict=True)]
    return torch.cat([*found, *(row[:length] for row, length in zip(after, segments, strict=True))])[None]


def leave_out_prefix(layer) -> None:
    """Let a layer's MLP run on the segments only. What it would add to a prefix is 0 instead."""
    if not hasattr(layer.mlp, "down_proj"):
        return  # experts, which may give more than a tensor
    skipped = [0]

    def note(module, args, kwargs):
        layout = kwargs.get("shared_prefix")
        skipped[0] = 0 if layout is None else layout.prefix_tokens

    def cut(module, args):
        return (args[0][:, skipped[0] :],) if skipped[0] else None

    def fill(module, args, output):
        return F.pad(output, (0, 0, skipped[0], 0)) if skipped[0] else None

    layer.register_forward_pre_hook(note, with_kwargs=True)
    layer.mlp.register_forward_pre_hook(cut)
    layer.mlp.register_forward_hook(fill)


def keep_segments(module, args, kwargs, output):
    """A forward hook of the backbone: the output head shall run on the segments only."""
    layout = kwargs.get("shared_prefix")
    if layout is not None:
        output.last_hidden_state = output.last_hidden_state[:, layout.prefix_tokens :]
    return output


def attend(
    query, key, value, layout: PackedLayout, scale: float | None = None, *, segments_only: bool = False
) -> torch.Tensor:
    """Attention of a packed sequence, with gradient.

    Args:
        query: (tokens, heads, head size). key, value: (tokens, key-value heads, head size), heads a multiple of theirs.
        segments_only: the output of prefixes is of no use; it may be 0.

    Returns:
        (tokens, heads, head size).
    """
    kernel = kernel_for(query)
    if kernel is None:
        if type(layout) is not PackedLayout:
            raise RuntimeError(
                f"prompt_parallel: expected half precision and a GPU with FlashAttention (compute capability 8 or more), "
                f"whose kernel returns its log-sum-exp; got {query.dtype}, heads of {query.size(-1)}, {query.device}. "
                f"Set bf16: true, or prompt_parallel: 1."
            )
        return attend_by_gathering(query, key, value, layout, scale)
    key, value = key.contiguous(), value.contiguous()
    shared = layout.shared(key, value)
    return MergedAttention.apply(query, key, value, *shared, layout, scale, segments_only, *kernel)


def kernel_for(query: torch.Tensor):
    """(forward, backward) of a variable-length kernel that returns the log-sum-exp, or None where there is none."""
    if query.device.type == "cpu":
        return cpu_forward, cpu_backward
    if query.is_cuda and torch.version.hip is None and query.dtype in (torch.float16, torch.bfloat16):
        if query.size(-1) % 8 == 0 and query.size(-1) <= 256 and torch.backends.cuda.is_flash_attention_available():
            if torch.cuda.get_device_capability(query.device)[0] >= 8:
                return cuda_forward, cuda_backward
    return None


KERNEL_BOUND = {torch.float32: 1e-4}  # relative; other dtypes round to 3 digits or fewer: 0.05


def kernel_difference(*, heads: int, key_value_heads: int, size: int, dtype: torch.dtype, device) -> float:
    """Largest difference of `attend` from `attend_by_gathering` on random tensors, relative, in units of its bound.

    Output and gradients, on a layout with groups of one and of several segments, down to one token. Above 1, or NaN:
    the kernel is not to be trusted. Raises what the kernel raises.
    """
    layout = PackedLayout([7, 70], [[1], [5, 1, 40]], device)
    tokens = int(layout.pieces[-1])
    generator = torch.Generator().manual_seed(0)

    def random(count):
        return torch.randn(tokens, count, size, generator=generator).to(device, dtype)

    weight = random(heads)
    inputs = [random(heads), random(key_value_heads), random(key_value_heads)]
    apart = []
    for segments_only, start in ((False, 0), (True, layout.prefix_tokens)):
        found = []
        for attention in (partial(attend, segments_only=segments_only), attend_by_gathering):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            with torch.enable_grad(), torch.autocast(torch.device(device).type, enabled=False):
                output = attention(*leaves, layout, None)[start:]
                found.append([output, *torch.autograd.grad((output * weight[start:]).float().sum(), leaves)])
        apart += [
            ((ours - other).float().norm() / other.float().norm()).item() for ours, other in zip(*found, strict=True)
        ]
    return max(apart, key=lambda value: (value != value, value)) / KERNEL_BOUND.get(dtype, 0.05)


class MergedAttention(torch.autograd.Function):
    """The attention calls of a packed sequence, merged. Formulas: at the top of this file."""

    @staticmethod
    def forward(
        ctx, query, key, value, shared_key, shared_value, layout, scale, segments_only, kernel_forward, kernel_backward
    ):
        # T tokens, of which the first left_out get no output; S shared keys; H heads of size D, K key-value heads.
        query = query.contiguous()  # (T, H, D); key, value: (T, K, D); shared_key, shared_value: (S, K, D)
        left_out = layout.prefix_tokens if segments_only else 0
        # Call 1, every piece on itself: out (T - left_out, H, D), lse (H, T - left_out).
        own = (query[left_out:], key[left_out:], value[left_out:])
        out, lse = kernel_forward(*own, own_pieces(layout, segments_only), True, scale)
        for start, pieces in layout.crossings(segments_only):
            # Call 2, segments on their prefixes: N queries, (N, H, D) and (H, N).
            rows, before = slice(start, start + sum(pieces.queries)), sum(pieces.keys)
            crossed = (own[0][rows], shared_key[:before], shared_value[:before])
            out_prefix, lse_prefix = kernel_forward(*crossed, pieces, False, scale)
            # Each result is a mean of values weighted by softmax over its own keys. Over all keys, a key's weight is
            # exp(lse_own - merged) of that, and so is the whole result's share: (H, N) to (N, H, 1).
            lse_own = lse[:, rows]
            merged = torch.logaddexp(lse_own, lse_prefix)
            share, share_prefix = (part.sub(merged).exp().T[..., None] for part in (lse_own, lse_prefix))
            out[rows] = out[rows] * share + out_prefix * share_prefix
            lse[:, rows] = merged  # the backward of both calls starts from the merged out and lse
        ctx.save_for_backward(query, key, value, shared_key, shared_value, out, lse)
        ctx.rest = layout, scale, segments_only, kernel_backward
        return zeros_before(out, left_out)

    @staticmethod
    def backward(ctx, grad):
        query, key, value, shared_key, shared_value, out, lse = ctx.saved_tensors
        layout, scale, segments_only, kernel_backward = ctx.rest
        left_out = layout.prefix_tokens if segments_only else 0
        grad, query = grad.contiguous()[left_out:], query[left_out:]  # (T - left_out, H, D)
        # Call 1's keys: gradients of (T - left_out) queries, keys and values.
        own = (grad, query, key[left_out:], value[left_out:], out, lse)
        d_query, d_key, d_value = kernel_backward(*own, own_pieces(layout, segments_only), True, scale)
        # Call 2's keys: gradients of its queries and of the shared keys and values, summed over what saw them.
        d_shared_key, d_shared_value = torch.zeros_like(shared_key), torch.zeros_like(shared_value)
        for start, pieces in layout.crossings(segments_only):
            rows, before = slice(start, start + sum(pieces.queries)), sum(pieces.keys)
            crossed = (grad[rows], query[rows], shared_key[:before], shared_value[:before], out[rows])
            grads = kernel_backward(*crossed, lse[:, rows].contiguous(), pieces, False, scale)
            d_query[rows] += grads[0]
            d_shared_key[:before] += grads[1]
            d_shared_value[:before] += grads[2]
        own = (zeros_before(tensor, left_out) for tensor in (d_query, d_key, d_value))
        return *own, d_shared_key, d_shared_value, None, None, None, None, None


def zeros_before(tensor: torch.Tensor, count: int) -> torch.Tensor:
    return F.pad(tensor, (0, 0, 0, 0, count, 0)) if count else tensor


@dataclass(frozen=True)
class Pieces:
    """Which queries see which keys: piece i of the queries sees piece i of the keys.

    Lengths of the pieces on the host, and their ends, int32 (pieces + 1), 0 in front, on the device.
    """

    queries: list[int]
    keys: list[int]
    query_ends: torch.Tensor
    key_ends: torch.Tensor


def own_pieces(layout: PackedLayout, segments_only: bool) -> Pieces:
    """Call 1: every prefix and segment (or segments alone) on itself."""
    lengths = [length for group in layout.segments for length in group]
    if segments_only:
        return Pieces(lengths, lengths, layout.segment_ends, layout.segment_ends)
    lengths = [*layout.prefixes, *lengths]
    return Pieces(lengths, lengths, layout.pieces, layout.pieces)


def on_prefixes(layout: PackedLayout) -> Pieces:
    """Call 2: the segments of a group, which are neighbours, as one piece of queries on the group's prefix."""
    return Pieces([sum(group) for group in layout.segments], layout.prefixes, layout.group_ends, layout.prefix_ends)


def cpu_forward(query, key, value, pieces: Pieces, causal: bool, scale):
    """Output (tokens, heads, size) and log-sum-exp (heads, tokens), by the kernel of torch's own CPU attention."""
    out = torch.empty_like(query)
    lse = torch.empty(query.size(1), query.size(0), dtype=torch.float64 if query.dtype == torch.float64 else torch.float)
    for count, q, k in slices(pieces):  # as a batch of `count`: out (count, heads, tokens, size), lse without size
        own_out, own_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(heads_first(tensor, count) for tensor in (query[q], key[k], value[k])), 0.0, causal, scale=scale
        )
        out[q], lse[:, q] = own_out.transpose(1, 2).flatten(0, 1), own_lse.transpose(0, 1).flatten(1)
    return out, lse


def cpu_backward(grad, query, key, value, out, lse, pieces: Pieces, causal: bool, scale):
    """Gradients of query, key and value, shaped like them, for the keys of `pieces`, given the merged `out` and `lse`."""
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for count, q, k in slices(pieces):
        own = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(heads_first(tensor, count) for tensor in (grad[q], query[q], key[k], value[k], out[q])),
            lse[:, q].unflatten(1, (count, -1)).transpose(0, 1), 0.0, causal, scale=scale,
        )  # fmt: skip
        for whole, part, rows in zip(grads, own, (q, k, k), strict=True):
            whole[rows] = part.transpose(1, 2).flatten(0, 1)  # (count, heads, tokens, size) to (count × tokens, …)
    return grads


def cuda_forward(query, key, value, pieces: Pieces, causal: bool, scale):
    """As `cpu_forward`, by torch's own FlashAttention, which also stands behind `torch.nn.attention.varlen` (there
    cuDNN's may come first); that interface hides the gradient through the log-sum-exp. Causal calls have queries and
    keys of equal lengths, so that no rule of alignment matters."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, pieces.query_ends, pieces.key_ends, longest(pieces.queries), longest(pieces.keys),
        0.0, causal, False, scale=scale,
    )  # fmt: skip
    return out, lse


def longest(lengths: list[int]) -> int:
    """At 1 the kernel would take query heads for tokens, as in decoding, and order the log-sum-exp otherwise."""
    return max(2, *lengths)


def cuda_backward(grad, query, key, value, out, lse, pieces: Pieces, causal: bool, scale):
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, lse, pieces.query_ends, pieces.key_ends, longest(pieces.queries),
        longest(pieces.keys), 0.0, causal, no_dropout, torch.empty(0, device=query.device), scale=scale,
    )  # fmt: skip


def slices(pieces: Pieces) -> list[tuple[int, slice, slice]]:
    """(how many pieces, their queries, their keys): neighbours of equal lengths are one batch."""
    found, query, key = [], 0, 0
    for lengths, equal in groupby(zip(pieces.queries, pieces.keys, strict=True)):
        count = len(list(equal))
        ends = query + count * lengths[0], key + count * lengths[1]
        found.append((count, slice(query, ends[0]), slice(key, ends[1])))
        query, key = ends
    return found


def heads_first(tensor: torch.Tensor, count: int = 1) -> torch.Tensor:
    """(count × tokens, heads, size) to (count, heads, tokens, size)."""
    return tensor.unflatten(0, (count, -1)).transpose(1, 2)


def attend_by_gathering(query, key, value, layout: PackedLayout, scale: float | None) -> torch.Tensor:
    """The same by torch's public attention, on any device: each segment gets a copy of its prefix's keys."""
    attention = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=True)
    if query.is_cuda:  # with fewer key heads only the kernel that writes all scores down would do in float32
        key, value = (part.repeat_interleave(query.size(1) // part.size(1), dim=1) for part in (key, value))
    query, key, value = heads_first(query), heads_first(key), heads_first(value)
    # From here (1, heads, tokens, size). Piece `index` of the sequence (prefixes, then segments) is tokens starts[index]
    # to starts[index + 1].
    starts = cumulative([*layout.prefixes, *(length for group in layout.segments for length in group)])
    prefixes = [slice(starts[index], starts[index + 1]) for index in range(len(layout.prefixes))]
    outputs = [attention(query[:, :, own], key[:, :, own], value[:, :, own], is_causal=True) for own in prefixes]
    index = len(prefixes)
    for prefix, group in zip(prefixes, layout.segments, strict=True):
        for length in group:
            own = slice(starts[index], starts[index + 1])
            keys, values = (torch.cat([part[:, :, prefix], part[:, :, own]], dim=2) for part in (key, value))
            # Row i of a segment sees the whole prefix and the segment's first i + 1 tokens.
            seen = torch.ones(length, keys.size(2), dtype=torch.bool, device=keys.device)
            seen = seen.tril(diagonal=keys.size(2) - length)
            outputs.append(attention(query[:, :, own], keys, values, attn_mask=seen))
            index += 1
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)
