"""Score the completions of a group with their prompt computed once.

A group is packed as [prompt without its last token] [last prompt token, c1 … c(C-1)] × G: every segment starts with its
own copy of the last prompt token, so that each of its tokens predicts one of the completion. That is P + G · C tokens of
work instead of G · (P + C), no padding, the output head on completions only, and the result of whole rows. A packed
forward keeps no cache, so gradient checkpointing works, and it runs through the wrapped model like any other.
"""

import math
from dataclasses import fields

import torch
from transformers.utils import logging
from trl.trainer.utils import FusedCausalLMOutput

from veripo_trl.model.encoding import EncodedPrompt
from veripo_trl.model.inputs import model_inputs, vision_inputs
from veripo_trl.shared_prompt.attention import PackedLayout, kernel_difference, use_shared_prefix
from veripo_trl.shared_prompt.parallel import share_out
from veripo_trl.shared_prompt.rollout import left_pad

logger = logging.get_logger(__name__)

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


def score_completions(
    model,
    unwrapped,
    prompts: list[EncodedPrompt],
    completion_ids,
    completion_mask,
    *,
    pad_token_id: int,
    shared: bool = True,
    group=None,
) -> FusedCausalLMOutput:
    """Per-token log-probabilities and entropies of completions, with gradient where it is enabled.

    Args:
        model: what the forward runs through, wrapped for its backend, with TRL's fused head.
        unwrapped: the same model without wrappers and without PEFT's.
        prompts: one per row; rows with the same object share its computation.
        completion_ids, completion_mask: int64 (rows, C), padded on the right.
        shared: False computes whole padded rows, as stock trainers do. So do models that cannot share, and say so.
        group: processes that share out the prompt, which has to be one, the same in all of them; entered by all.

    Returns:
        TRL's fused output; its per-token fields have shape (rows, C) and are zero where masked.

    Raises:
        RuntimeError: a completion has the placeholder token of an image or video.
    """
    if not shared or not can_share(unwrapped):
        return score_rows(model, unwrapped, prompts, completion_ids, completion_mask, pad_token_id=pad_token_id)
    use_shared_prefix(unwrapped)
    packed = Packed(prompts, completion_ids.cpu(), completion_mask.cpu())
    packed.check_segments(unwrapped.config)
    device = completion_ids.device
    if group is None:
        layout = PackedLayout(packed.prefixes, packed.segments, device)
        inputs = {
            "input_ids": packed.input_ids.to(device),
            "position_ids": packed.positions.to(device),
            **vision_inputs(unwrapped, packed.unique, device),
        }
    else:
        layout, inputs = share_out(unwrapped, packed, group, device)
    labels = packed.labels.to(device)
    output = model(shared_prefix=layout, shift_labels=labels, fused_lm_head=True, **inputs)
    if len(layout.layers) != unwrapped.config.get_text_config().num_hidden_layers:
        raise RuntimeError(f"Only the layers {sorted(layout.layers)} attended as packed. Set shared_prefix: false.")
    flat_index = packed.flat_index.to(device)
    values = {field.name: getattr(output, field.name) for field in fields(output)}
    for name in PER_TOKEN:
        if values[name] is not None:  # (1, segment tokens) to (rows, C)
            empty = values[name].new_zeros(completion_ids.numel())
            values[name] = empty.scatter(0, flat_index, values[name][0]).view(completion_ids.shape)
    return FusedCausalLMOutput(**values)


def score_rows(
    model, unwrapped, prompts, completion_ids, completion_mask, *, pad_token_id: int, shift: int = 0
) -> FusedCausalLMOutput:
    """`score_completions` by whole rows: prompts padded on the left, completions on the right.

    `shift` is added to every position: rotary attention sees differences only, so that nothing but rounding changes.
    """
    prompt_ids, prompt_mask = (tensor.to(completion_ids.device) for tensor in left_pad(prompts, pad_token_id))
    input_ids = torch.cat([prompt_ids, completion_ids], dim=1)
    width = completion_ids.size(1)
    labels = input_ids.masked_fill(torch.cat([prompt_mask * 0, completion_mask], dim=1) == 0, -100)
    inputs = model_inputs(
        prompts, input_ids, completion_width=width, config=unwrapped.config, frozen_model=unwrapped
    )
    inputs["position_ids"] += shift
    output = model(
        input_ids=input_ids,
        attention_mask=torch.cat([prompt_mask, completion_mask], dim=1),
        labels=labels,
        fused_lm_head=True,
        **inputs,
    )
    values = {field.name: getattr(output, field.name) for field in fields(output)}
    values |= {name: values[name][:, -width:] for name in PER_TOKEN if values[name] is not None}
    return FusedCausalLMOutput(**values)


def can_share(unwrapped) -> bool:
    """Whether a model's rows can share their prompts. If not, says so once."""
    obstacle = why_not_shared(unwrapped)
    if obstacle is not None:
        logger.warning_once(f"Every row computes its prompt for itself: {obstacle}.")
    return obstacle is None


def why_not_shared(unwrapped) -> str | None:
    """What keeps a model's rows from sharing their prompts, or None."""
    config = unwrapped.config.get_text_config()
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "linear_attention"}
    if other:  # they do not see a prefix as these do
        return f"its layers of kind {', '.join(sorted(other))} are neither plain nor linear attention"
    if unwrapped.model.language_model.config._attn_implementation == "eager":
        return "attn_implementation 'eager' takes no other attention function; 'sdpa' does"
    if getattr(config, "output_router_logits", False):
        return "its routers' load-balancing loss counts every token of a row"
    if unwrapped.training and getattr(config, "attention_dropout", 0.0) > 0:
        return f"attention_dropout is {config.attention_dropout}, not 0"
    return None


class Packed:
    """Rows packed as described at the top of this file, all prefixes before all segments. Tensors on the host.

    Attributes:
        unique: distinct prompts, in order of their first row. prefixes: their lengths without the last token.
        segments: per distinct prompt, the lengths of its rows' segments: those of the completions, at least 1.
        input_ids: int64 (1, tokens). positions: int64 (3, 1, tokens).
        labels: int64 (1, segment tokens), what each of them predicts; -100 where nothing is scored.
        flat_index: int64 (segment tokens,), the index of each one's result in the flattened (rows, C).
    """

    def __init__(self, prompts: list[EncodedPrompt], completion_ids: torch.Tensor, completion_mask: torch.Tensor):
        rows_of: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(id(prompt), []).append(row)
        lengths = completion_mask.sum(dim=1).tolist()
        width = completion_ids.size(1)
        self.unique = list({id(prompt): prompt for prompt in prompts}.values())
        self.prefixes = [len(prompt) - 1 for prompt in self.unique]
        # A row without a token to score keeps one all the same, masked: a batch of such rows still has a gradient, 0.
        self.segments = [[max(1, lengths[row]) for row in rows_of[id(prompt)]] for prompt in self.unique]
        ids = [torch.from_numpy(prompt.input_ids[:-1]) for prompt in self.unique]
        positions = [torch.from_numpy(prompt.positions[:, :-1]) for prompt in self.unique]
        flat_index = []
        for prompt, segments in zip(self.unique, self.segments, strict=True):
            last, last_position = torch.from_numpy(prompt.input_ids[-1:]), torch.from_numpy(prompt.positions[:, -1:])
            for row, length in zip(rows_of[id(prompt)], segments, strict=True):
                ids += [last, completion_ids[row, : length - 1]]
                after = torch.arange(length - 1) + prompt.next_position
                positions += [last_position, after.expand(3, -1)]
                flat_index.append(torch.arange(length) + row * width)
        self.input_ids = torch.cat(ids)[None]
        self.positions = torch.cat(positions, dim=1)[:, None]
        self.flat_index = torch.cat(flat_index)
        labels = completion_ids.masked_fill(completion_mask == 0, -100)
        self.labels = labels.flatten()[self.flat_index][None]

    def check_segments(self, config) -> None:
        """Raise if a segment has a vision token: the forward would put one of the prompt's features there."""
        segments = self.input_ids[:, sum(self.prefixes) :]
        for name, token_id in (("image", config.image_token_id), ("video", config.video_token_id)):
            if bool((segments == token_id).any()):
                raise RuntimeError(
                    f"A completion has {name} token {token_id}. Expected text: vision tokens are never sampled, and a "
                    f"prompt ends with its text. Rows: {[prompt.question_id for prompt in self.unique]}."
                )


FLOAT32_BOUND = 1e-4  # nats, on the largest difference of a token's log-probability; found: below 1e-5
# In half precision, on the mean difference, relative to what rounding alone does to plain rows. Found in bfloat16 with
# random models of two sizes: 0.6 to 1.9; a prefix left out of the attention: 60 and more.
HALF_BOUND = 4
SHORT = 16  # tokens of the longer completion


@torch.no_grad()
def prefix_can_be_shared(
    model, unwrapped, prompt: EncodedPrompt, *, pad_token_id: int, accelerator, group=None
) -> bool:
    """Compare two short completions of one prompt, packed, with plain rows. Every process takes part, all decide alike.

    Before that the attention kernel is tried alone, with its gradients. Rounding is measured on plain rows with all
    positions shifted, which changes nothing else.

    Args:
        model, unwrapped, pad_token_id, group: as in `score_completions`. prompt: any; each process may have another,
            each group with one.

    Returns:
        Whether the difference is within the bound in every process. If not, says so.

    Raises:
        RuntimeError: it is not, with a `group`, whose processes could not compute their prompts whole.
    """
    if not can_share(unwrapped):
        return False
    device = accelerator.device
    config = unwrapped.config
    text = prompt.input_ids[(prompt.input_ids != config.image_token_id) & (prompt.input_ids != config.video_token_id)]
    ids = torch.from_numpy(text[-SHORT:]).to(device).expand(2, -1)
    mask = torch.ones_like(ids)
    mask[1, SHORT // 2 :] = 0

    def log_probs(**options):
        # Row by row: padded rows would get a mask of (rows, 1, L, L), 100 GB behind an hour of video.
        found = []
        for own in (ids[:1], ids[:1, : SHORT // 2]):
            output = score_rows(
                model, unwrapped, [prompt], own, torch.ones_like(own), pad_token_id=pad_token_id, **options
            )
            found.append(output.log_probs[0])
        return torch.cat(found).float()

    training = model.training
    model.eval()  # dropout would change log-probabilities by itself
    with accelerator.autocast():
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else unwrapped.dtype
        kernel, obstacle = try_kernel(config.get_text_config(), dtype, device)
        rows = log_probs()
        packed = score_completions(
            model, unwrapped, [prompt] * 2, ids, mask, pad_token_id=pad_token_id, group=group
        )
        difference = (packed.log_probs[mask.bool()].float() - rows).abs()
        noise = torch.stack([(log_probs(shift=shift) - rows).abs().mean() for shift in (17, 1001)]).mean()
    model.train(training)
    found = torch.stack([difference.max(), difference.mean(), noise, noise.new_tensor(kernel)])
    found = accelerator.gather(found[None])  # a NaN anywhere stays one
    largest, average, _, kernel = found.amax(dim=0).tolist()
    noise = found[:, 2].mean().item()
    value, bound = (largest, FLOAT32_BOUND) if dtype == torch.float32 else (average, HALF_BOUND * noise)
    equal = value <= bound and kernel <= 1  # False for NaN
    if equal:
        logger.info(f"Shared prompts: log-probabilities within {value:.1e} of plain rows (bound {bound:.1e}).")
        return True
    if not kernel <= 1:
        said = obstacle or f"the attention kernel's results or gradients are off by {kernel:.2g} times their bound"
    else:
        said = f"log-probabilities differ by {value:.2g} from those of plain rows, which is more than {bound:.2g}"
    if group is not None:
        raise RuntimeError(f"prompt_parallel: with the prompt shared out, {said}. Set prompt_parallel: 1.")
    if accelerator.is_main_process:
        logger.warning(
            f"SHARED PROMPTS ARE OFF: with the prompt computed once, {said}. Every row computes its prompt for itself, "
            f"which is slower. Expected equal results: the attention kernel or the model's code is not what was tested. "
            f"Set shared_prefix: false to start without this check."
        )
    return False


def try_kernel(config, dtype: torch.dtype, device) -> tuple[float, str | None]:
    """`kernel_difference` in a model's sizes, and what the kernel raised, if it did (then NaN)."""
    heads = config.num_attention_heads
    sizes = {
        "heads": heads,
        "key_value_heads": config.num_key_value_heads,
        "size": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }
    try:
        return kernel_difference(**sizes, dtype=dtype, device=device), None
    except RuntimeError as error:  # NotImplementedError included; reported by the caller, for all processes
        return math.nan, f"the attention kernel failed ({error})"
