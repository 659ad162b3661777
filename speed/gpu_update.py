"""Cases of on_gpu.py about the update: how fast, how much memory, by which kernel, how many frames."""

import functools
import gc
import tempfile
from statistics import median

import torch
from models import SIDE, lora, made_up_prompt, random_model
from on_gpu import too_large
from peft import get_peft_model
from timing import alternate
from trl import ModelConfig
from update_step import EVERYTHING, GIVEN, Part, differences, over_limits, peak_bytes, resident_bytes

from veripo_trl.model.policy import load_policy
from veripo_trl.recipe.frames_that_fit import MemoryArguments, frames_that_fit
from veripo_trl.shared_prompt.attention import PackedLayout, attend, kernel_for
from veripo_trl.trainers.grpo import VideoGRPOTrainer

_held: dict = {}


def held(key, make):
    """What `make` gives, kept for the next case of the same key. There is room for one."""
    if key not in _held:
        release()
        _held[key] = make()
    return _held[key]


def release() -> None:
    _held.clear()
    free()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def part_of(part: str, shape: str, device: str) -> Part:
    """A trainer with LoRA, in bfloat16, with activation checkpointing."""

    def make():
        model, processor = random_model(shape, device=device, dtype=torch.bfloat16)
        return Part(part, with_adapter(model), processor, half=True, checkpointing=True)

    return held((part, shape), make)


def load(made: Part, shape: str, prompt: int, completion: int, group: int) -> None:
    """Give a part a prompt of that many tokens, nearly all of them of a video."""
    made_up = made_up_prompt(made.base.config, prompt, side=SIDE[shape], dtype=torch.bfloat16)
    made.load(made_up, completion=completion, group=group)


def with_adapter(model):
    model.requires_grad_(False)
    return get_peft_model(model, lora(init_lora_weights=False))  # from its usual start at 0, half of all gradients are 0


# ---- ours against plain -----------------------------------------------------------------------------------------------


def update(device, part, shape, prompt, completion, group, pair, noise=False) -> dict:
    """One update by both ways: ratio, memory, differences.

    Args:
        noise: also measure what rounding does to the plain way, and fail where ours differs by more.
    """
    made = part_of(part, shape, device)
    load(made, shape, prompt, completion, group)
    return against_plain(made, pair, noise=noise)


def against_plain(made: Part, pair: str, *, noise: bool) -> dict:
    (group, completion), prompt = made.ids.shape, len(made.prompt)
    ours, tokens = measured(made, "ours", pair), made.tokens
    record = {"ours s": ours["s"], "ours GB": ours["gb"], "model GB": ours["model_gb"], "tokens a s": tokens / ours["s"]}
    if is_grpo(made):
        record["share of peak"] = update_flops(made) / ours["s"] / peak_flops(made.device)
    plain = plain_as_it_fits(made, pair)
    if plain is None:
        return {"plain": "does not fit", **record}
    if noise:
        plain["results"]["shifted"] = made.shifted_results(pair, rows_at_once=plain["rows_at_once"])
    apart = differences(ours["results"], plain["results"])
    found = {
        "ratio": plain["s"] / ours["s"],
        "limit": group * (prompt + completion) / (prompt + group * completion),
        "memory": ours["gb"] / plain["gb"] if plain["gb"] else None,
        "plain": plain["how"],
        "plain s": plain["s"],
        "plain GB": plain["gb"],
        **record,
        **apart,
        "all s": {"ours": ours["all"], "plain": plain["all"]},
    }
    if not noise:
        found.pop("limits")
    elif over_limits(apart):
        found |= {"state": "failed", "message": "ours and plain differ by more than rounding"}
    return found


def is_grpo(made: Part) -> bool:
    return isinstance(made.trainer, VideoGRPOTrainer)


def measured(made: Part, way: str, pair: str, rows_at_once: int | None = None) -> dict:
    """Seconds of an update, GB above model and adapter at its highest, gradients included, and `Part.results`.

    The first update warms up, unless it takes so long that this does not matter.
    """
    made.model.zero_grad()
    if pair == GIVEN:
        made.hold_features()
    free()
    before = resident_bytes(made.device)
    first = made.step(way, pair, rows_at_once=rows_at_once)
    seconds = [first] if first > 15 else []
    while len(seconds) < 3 and sum(seconds) < 10:
        seconds.append(made.step(way, pair, rows_at_once=rows_at_once))
    gb = (peak_bytes(made.device) - before) / 1e9
    results = made.results(way, rows_at_once=rows_at_once)
    return {"s": median(seconds), "all": [first, *seconds], "gb": gb, "model_gb": before / 1e9, "results": results}


def plain_as_it_fits(made: Part, pair: str) -> dict | None:
    """The plain way with all rows at once; where they do not fit row by row, which a pair of DPO cannot."""
    if found := as_it_fits(lambda: measured(made, "plain", pair)):
        return {**found, "rows_at_once": None, "how": "all rows at once"}
    return row_by_row(made, pair) if is_grpo(made) else None


def as_it_fits(run):
    """What `run` gives, or None where the GPU's memory does not suffice. Then nothing is left of it."""
    try:
        return run()
    except RuntimeError as error:
        if not too_large(error):
            raise
    return None


def row_by_row(made: Part, pair: str) -> dict:
    """The plain way with one row in a forward, and the memory that all rows at once would take, calculated."""
    prompt, (group, completion) = made.given, made.ids.shape
    gb = []
    for rows in (1, 2):
        made.load(prompt, completion=completion, group=rows)
        if found := as_it_fits(lambda: measured(made, "plain", pair)):
            gb.append(found["gb"])
    made.load(prompt, completion=completion, group=group)
    found = {**measured(made, "plain", pair, rows_at_once=1), "rows_at_once": 1}
    if len(gb) < 2:
        return {**found, "gb": None, "how": "row by row, GB not known"}
    calculated = gb[0] + (group - 1) * (gb[1] - gb[0])
    return {**found, "gb": calculated, "how": "row by row, GB calculated from 1 and 2 rows"}


# ---- work, and where it goes ------------------------------------------------------------------------------------------


def update_flops(made: Part) -> float:
    """Floating-point operations of our GRPO update with LoRA and activation checkpointing, the vision tower left out.

    Forward, recomputed forward and the gradient of the inputs are one pass each over all frozen weights; an adapter has
    the gradient of its weights, too. The backward pass of attention has 5 matrix products where the forward has 2. The
    last layer has next to nothing to do for the prefix.
    """
    text, (group, completion), prefix = made.base.config.get_text_config(), made.ids.shape, len(made.prompt) - 1
    scored, layers = group * completion, text.num_hidden_layers
    adapter = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in made.base.model.language_model.layers.parameters()) - adapter
    linear = 2 * (prefix * (layers - 1) / layers + scored) * (3 * frozen + 4 * adapter)
    # Pairs of query and key, of all layers; 4 operations for each of a head's numbers.
    seen = (layers - 1) * prefix**2 / 2 + layers * (scored * prefix + group * completion**2 / 2)
    attention = 4 * text.hidden_size * seen * (1 + 1 + 2.5)
    return linear + attention + 2 * text.hidden_size * text.vocab_size * scored * 2


@functools.cache
def peak_flops(device: torch.device) -> float:
    """What a large product of bfloat16 matrices reaches here, a second."""
    size, runs = (8192, 10) if device.type == "cuda" else (256, 1)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))

    def product():
        for _ in range(runs):
            a @ b

    return 2 * size**3 * runs / alternate({"product": product}, runs=3)["product"]["seconds"]


def profile(device, shape, prompt, completion, group) -> dict:
    """What one of our updates runs on the device: the longest kernels go to the log, their sums here."""
    made = part_of("grpo", shape, device)
    load(made, shape, prompt, completion, group)
    made.step("ours", GIVEN)
    kind = device.upper()
    activities = {torch.profiler.ProfilerActivity.CPU, getattr(torch.profiler.ProfilerActivity, kind)}
    with torch.profiler.profile(activities=activities) as found:
        seconds = made.step("ours", GIVEN)
    spent = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = [event for event in found.key_averages() if event.device_type.name == kind]
    events.sort(key=lambda event: -getattr(event, spent))
    for event in events[:15]:
        print(f"{getattr(event, spent) / 1e3:9.2f} ms {event.count:6} times  {event.key[:120]}")
    sums = dict.fromkeys(("products", "attention", "rest"), 0.0)
    for event in events:
        name = event.key.lower()
        part = "products" if any(word in name for word in ("gemm", "nvjet", "cutlass", "cublas", "aten::mm")) else "rest"
        part = "attention" if any(word in name for word in ("flash", "fmha", "attention")) else part
        sums[part] += getattr(event, spent) / 1e6
    busy = {"busy s": sum(sums.values()), **{f"{name} s": value for name, value in sums.items()}}
    return {"s": seconds, **busy, "launches": sum(event.count for event in events)}


def kernel_name(query: torch.Tensor) -> str:
    kernel = kernel_for(query)
    return "gathered keys" if kernel is None else kernel[0].__name__


# ---- kernels ----------------------------------------------------------------------------------------------------------


def kernels(device, shape, prompt, completion, group) -> dict:
    """Attention of one layer with this shape's heads, forward and backward: milliseconds and TFLOP/s by kernel.

    torch: the one that is used. flex: FlexAttention with the packed layout as its mask. flash-attn: the calls that the
    packed layout takes, where it is installed. plain: what plain rows take, by torch's own choice.
    """
    model_heads = {"7b": (28, 4, 128), "3b": (16, 2, 128)}.get(shape, (4, 2, 64))
    layout = PackedLayout([prompt - 1], [[completion] * group], device)
    tokens, generator = int(layout.pieces[-1]), torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(tokens, count, model_heads[2], generator=generator).to(device, torch.bfloat16)
        for count in (model_heads[0], model_heads[1], model_heads[1])
    )
    weight = torch.randn(q.shape, generator=generator).to(device, torch.bfloat16)
    start = layout.prefix_tokens
    pairs = {"packed": start**2 / 2 + group * completion * start + group * completion**2 / 2}
    pairs["plain"] = group * (prompt + completion) ** 2 / 2
    record: dict = {"kernel": kernel_name(q)}
    expected = None
    for name, make in (("torch", packed_attention), ("flex", flex), ("flash-attn", flash_attn), ("plain", plain_rows)):
        backward = name != "flex" or device == "cuda"  # on a CPU it has no backward
        leaves = [tensor.detach().requires_grad_(backward) for tensor in (q, k, v)]
        try:
            attention = make(layout, device)

            def run(attention=attention, leaves=leaves, backward=backward):
                out = attention(*leaves)
                return [out, *(torch.autograd.grad((out * weight[: len(out)]).sum(), leaves) if backward else [])]

            found = alternate({name: run}, runs=5, warm_up=2)[name]
        except Exception as error:  # one that is not here, or fails, leaves the others their lines
            if name == "torch":
                raise
            record[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(name, repr(error), flush=True)
            continue
        work = pairs["plain" if name == "plain" else "packed"] * 4 * q.size(1) * q.size(2) * (3.5 if backward else 1)
        record |= {f"{name} ms": 1e3 * found["seconds"], f"{name} TFLOP/s": work / found["seconds"] / 1e12}
        if name == "torch":
            expected = found["result"]
        elif name != "plain" and expected is not None:
            checked = found["result"][:1] if name == "flash-attn" else found["result"]
            record[f"{name} differs by"] = max(
                ((a - b).float().norm() / b.float().norm()).item() for a, b in zip(checked, expected, strict=False)
            )
    return record


def packed_attention(layout: PackedLayout, device):
    return lambda q, k, v: attend(q, k, v, layout)


def flex(layout: PackedLayout, device):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    start, tokens = layout.prefix_tokens, int(layout.pieces[-1])
    place = torch.arange(tokens, device=device)
    piece = torch.bucketize(place, layout.pieces[1:], right=True)

    def seen(batch, head, query, key):
        return (query >= key) & ((key < start) | (piece[query] == piece[key]))  # there is one prefix

    mask = create_block_mask(seen, None, None, tokens, tokens, device=device)
    attention = torch.compile(flex_attention) if device == "cuda" else flex_attention

    def packed(q, k, v):
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        return attention(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return packed


def flash_attn(layout: PackedLayout, device):
    """Its public function hides the gradient through the log-sum-exp: time and output are right, gradients are not."""
    from flash_attn import flash_attn_varlen_func

    start, segments = layout.prefix_tokens, layout.segments[0]
    longest = max(start, *segments)

    def packed(q, k, v):
        own, own_lse, *_ = flash_attn_varlen_func(
            q, k, v, layout.pieces, layout.pieces, longest, longest, causal=True, return_attn_probs=True
        )
        crossed, lse, *_ = flash_attn_varlen_func(
            q[start:], k[:start], v[:start], layout.group_ends, layout.prefix_ends, sum(segments), start,
            return_attn_probs=True,
        )  # fmt: skip
        share = (own_lse[:, start:] - lse).sigmoid().T[..., None].to(q.dtype)
        return torch.cat([own[:start], own[start:] * share + crossed * (1 - share)])

    return packed


def plain_rows(layout: PackedLayout, device):
    """All rows of the group, each with its own prompt."""
    start, group = layout.prefix_tokens, len(layout.segments[0])

    def rows(tensor):
        segments = tensor[start:].unflatten(0, (group, -1))
        return torch.cat([tensor[:start].expand(group, -1, -1, -1), segments], 1).transpose(1, 2)

    def plain(q, k, v):
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(rows(q), rows(k), rows(v), is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    return plain


# ---- memory -----------------------------------------------------------------------------------------------------------

# Bytes of a prompt's token at the highest, tower included: what the search for the most frames starts from.
BYTES_A_TOKEN = {("7b", "ours"): 6.8e5, ("3b", "ours"): 4.6e5, ("7b", "plain"): 7e6, ("3b", "plain"): 5e6}


def computed_frames(config, shape: str, gib: float, *, offloading: bool) -> int:
    """What `check_rows.py --gpu_memory` says of the same update."""
    adapter = ModelConfig(use_peft=True, lora_r=64, dtype="bfloat16")
    memory = MemoryArguments(
        gpu_memory=gib * 2**30 / 1e9, max_completion_length=270, activation_offloading=offloading
    )
    return frames_that_fit(config, adapter, memory, (SIDE[shape] // 28) ** 2 / 2)["update"]


def most_frames(device, shape, way, gib, offloading=False) -> dict:
    """The most frames of one video with which an update with 8 completions of 270 tokens stays within so many GiB."""
    made = part_of("grpo", shape, device)
    made.trainer.args.activation_offloading = offloading
    computed = {}
    if way == "ours":
        computed["computed"] = computed_frames(made.base.config, shape, gib, offloading=offloading)
    load(made, shape, 600, 270, 8)
    made.step(way, EVERYTHING)  # what kernels and libraries take for themselves is there from the first on
    made.model.zero_grad()
    free()
    available, total = torch.cuda.mem_get_info()
    outside = total - available - torch.cuda.memory_reserved()  # CUDA's context, and another program's
    cap = min(gib * 2**30, total)  # a card of 80 has 79
    if gib * 2**30 > 1.05 * total:
        return {"state": "skipped", "message": f"the card has {total / 2**30:.0f} GiB"}
    states = sum(8 * p.numel() for p in made.model.parameters() if p.requires_grad)
    optimizer = torch.empty(states, dtype=torch.uint8, device=device)  # Adam's, which is not made here
    room = cap - outside - torch.cuda.memory_allocated()
    per_pair, seconds = (SIDE[shape] // 28) ** 2, {0: 0.0}

    def fits(frames: int) -> bool:
        load(made, shape, frames // 2 * per_pair + 40, 270, 8)
        taken = as_it_fits(lambda: made.step(way, EVERYTHING))
        made.model.zero_grad()
        free()
        print(f"{frames} frames: {'fit' if taken else 'too many'}", flush=True)
        seconds[frames] = taken or 0.0
        return taken is not None

    torch.cuda.set_per_process_memory_fraction((cap - outside) / total)
    try:
        start = max(16, int(0.8 * room / BYTES_A_TOKEN.get((shape, way), 3e5) / per_pair) * 2)
        frames = most(fits, start=start, step=max(4, start // 32 * 2), factor=1.25)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        made.trainer.args.activation_offloading = False
        del optimizer
    taken = seconds[frames]
    return {"frames": frames, **computed, "update s": taken, "ms a frame": 1e3 * taken / max(frames, 1)}


def most(fit, *, start: int, step: int, factor: float) -> int:
    """Largest multiple of `step` for which `fit` holds, 0 for none, if it holds up to some number and not beyond.

    From `start` on numbers grow by `factor`, until one does not fit; then the gap is halved.
    """
    low, high = 0, max(step, start // step * step)
    while fit(high):
        low, high = high, max(high + step, int(high * factor) // step * step)
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


def qlora(device, shape, prompt, completion, group) -> dict:
    """An update on weights in 4 bits, against plain rows."""
    from transformers import BitsAndBytesConfig

    release()
    with tempfile.TemporaryDirectory() as folder:
        model, processor = random_model(shape, device=device, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        del model
        free()
        quantization = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        model, processor = load_policy(
            folder,
            dtype="bfloat16",
            lora=lora(init_lora_weights=False),
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, **quantization),
            device_map={"": 0} if device == "cuda" else None,
        )
    made = Part("grpo", model, processor, half=True, checkpointing=True)
    load(made, shape, prompt, completion, group)
    record = against_plain(made, GIVEN, noise=True)
    record.pop("share of peak")  # its weights are packed: their number is not that of the products
    return record
