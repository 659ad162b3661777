"""What on_gpu.py does: its stages in the order of their worth, and their cases with estimated seconds."""

from typing import NamedTuple


class Case(NamedTuple):
    """One line of the table: `function`, "module:function" of this folder, called with the device and `options`.

    It returns its numbers, and with a `state` other than done a `message`. `seconds` are estimated, on an H100. `needs`
    are modules to import, or "cuda": without them the case is skipped.
    """

    name: str
    seconds: float
    function: str
    options: dict = {}
    needs: tuple[str, ...] = ()


HEADS = [(28, 4, 128), (16, 2, 128), (32, 8, 128), (4, 2, 64), (6, 6, 32)]  # of 7B, 3B, Qwen3-VL 8B, mid and tiny
SIZES = {"tiny": (128, 12, 4), "mid": (1024, 64, 4), "3b": (8200, 270, 8), "7b": (8200, 270, 8)}  # P, C, G
# Of recipes/configs: a shape, the tokens of an answer where no rollout says how long they are, and the configuration of
# the policy that made the pairs, which says what it saw.
CONFIGS: dict[str, tuple] = {
    "qwen2_5_vl_3b_lora/grpo.yaml": ("3b", None, None),
    "qwen2_5_vl_3b_lora/dpo.yaml": ("3b", 1024, "qwen2_5_vl_3b_lora/grpo.yaml"),
    "qwen2_5_vl_3b_lora/sft.yaml": ("3b", 1024, None),
    "qwen2_5_vl_7b/2_search.yaml": ("7b", None, None),
    "qwen2_5_vl_7b/4_align.yaml": ("7b", 1024, "qwen2_5_vl_7b/2_search.yaml"),
    "video_r1_7b/sft.yaml": ("7b", 1024, None),
    "video_r1_7b/grpo.yaml": ("7b", None, None),
    "qwen2_5_vl_7b/1_activation.yaml": ("7b", None, None),
    "qwen2_5_vl_7b/5_search.yaml": ("7b", None, None),
}
STAGES = ("parity", "update", "dpo", "rollout", "step", "frames", "loading", "hardware")


def plan(device: str, shapes: list[str]) -> dict[str, list[Case]]:
    """All cases by stage. On a CPU everything is short, and what it cannot do is skipped."""
    stages: dict[str, list[Case]] = {name: [] for name in STAGES}

    def add(stage: str, name: str, seconds: float, function: str, needs=(), **options):
        stages[stage].append(Case(name, seconds / 5 if device == "cpu" else seconds, function, options, needs))

    small = "tiny" if shapes == ["tiny"] else "mid"
    for dtype in ("bfloat16", "float32"):
        for heads, key_value_heads, size in HEADS:
            name = f"attention {heads}/{key_value_heads} × {size}, {dtype}"
            sizes = {"heads": heads, "key_value_heads": key_value_heads, "size": size}
            add("parity", name, 2, "gpu_parity:attention", **sizes, dtype=dtype)
        for family in ("qwen2_5_vl", "qwen3_vl"):
            add("parity", f"rows of {family}, {dtype}", 5, "gpu_parity:rows", family=family, shape=small, dtype=dtype)
        for part in ("grpo", "dpo"):
            add("parity", f"{part} loss, {dtype}", 5, "gpu_parity:loss", part=part, shape=small, dtype=dtype)
    for function in ("features", "positions", "against_cpu"):
        add("parity", function, 5, f"gpu_parity:{function}", shape=small)

    def update(stage: str, seconds: float, part: str, shape: str, sizes: tuple, pair="features given", **options):
        prompt, completion, group = sizes
        name = f"{shape}, P {prompt}, C {completion}, G {group}, {pair}"
        options |= {"part": part, "shape": shape, "pair": pair}
        options |= {"prompt": prompt, "completion": completion, "group": group}
        add(stage, name, seconds * slow[shape], "gpu_update:update", **options)

    slow = {shape: 1 if shape == "7b" else 0.5 for shape in SIZES}
    for shape in shapes:
        sizes = prompt, completion, group = SIZES[shape]
        named = {"shape": shape, "prompt": prompt, "completion": completion, "group": group}
        update("update", 60, "grpo", shape, sizes, noise=True)
        update("update", 150, "grpo", shape, sizes, "everything", noise=True)
        add("update", f"{shape}, profile", 30 * slow[shape], "gpu_update:profile", **named)
        add("update", f"{shape}, kernels", 40, "gpu_update:kernels", **named)
        pair = (prompt, 512 if prompt == 8200 else completion, 2)
        update("dpo", 60, "dpo", shape, pair, noise=True)
        update("dpo", 120, "dpo", shape, pair, "everything", noise=True)
        add("rollout", f"{shape}, phases", 50 * slow[shape], "gpu_runs:phases", **named)
        add("rollout", f"{shape}, against stock", 100 * slow[shape], "gpu_runs:rollout", **named)
        add("step", f"{shape}, whole step, ours", 100 * slow[shape], "gpu_runs:step", shape=shape, shared=True)
        if shape == shapes[-1]:
            add("rollout", f"{shape}, vLLM", 150, "gpu_runs:rollout_vllm", ("cuda", "vllm"), **named)
            add("rollout", "copies", 10, "gpu_runs:copies", ("cuda",))
        if shape == shapes[0]:
            add("step", "tiny loop", 240, "gpu_runs:loop", quick=device == "cpu")
        add("step", f"{shape}, whole step, plain", 130 * slow[shape], "gpu_runs:step", shape=shape, shared=False)
        add("step", f"{shape}, QLoRA", 90 * slow[shape], "gpu_update:qlora", ("bitsandbytes",), **named)
        for gib, seconds in ((24, 20), (48, 60), (80, 120)):
            for way in ("ours", "plain"):
                named_so = {"shape": shape, "way": way, "gib": gib}
                name = f"{shape}, {gib} GiB, {way}"
                add("frames", name, seconds * slow[shape], "gpu_update:most_frames", ("cuda",), **named_so)
    for shape in reversed(shapes):  # of the last one the model is there
        prompt, completion, group = SIZES[shape]
        lengths = ((1024, 15), (4096, 30), (16384, 90), (32768, 120)) if prompt == 8200 else ((48, 5),)
        for length, seconds in lengths:
            update("update", seconds, "grpo", shape, (length, completion, group))
        for count, seconds in ((4, 30), (16, 60)) if prompt == 8200 else ((2, 5),):
            update("update", seconds, "grpo", shape, (prompt, completion, count))
    add("loading", "decoders", 40, "gpu_runs:decoders", quick=device == "cpu")
    add("loading", "workers", 60, "gpu_runs:workers", quick=device == "cpu")
    for config, (shape, answer, search) in CONFIGS.items():
        sizes = {"shape": "tiny", "answer": answer and 8} if device == "cpu" else {"shape": shape, "answer": answer}
        if sizes["shape"] in shapes:
            seconds = 40 if shape == "3b" else 60
            add("hardware", config, seconds, "gpu_hardware:one_step", config=config, search=search, **sizes)
    return stages
