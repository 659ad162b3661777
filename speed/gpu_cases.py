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
    "video_r1/sft.yaml": ("7b", 1024, None),
    "video_r1/grpo.yaml": ("7b", None, None),
    "qwen2_5_vl_7b/1_activation.yaml": ("7b", None, None),
    "qwen2_5_vl_7b/5_search.yaml": ("7b", None, None),
}
STAGES = ("parity", "update", "dpo", "rollout", "step", "loading", "hardware", "frames", "sizes")


def plan(device: str, shape: str) -> dict[str, list[Case]]:
    """All cases by stage. On a CPU everything is short, and what it cannot do is skipped."""
    stages: dict[str, list[Case]] = {name: [] for name in STAGES}

    def add(stage: str, name: str, seconds: float, function: str, needs=(), **options):
        stages[stage].append(Case(name, seconds / 5 if device == "cpu" else seconds, function, options, needs))

    small = "tiny" if shape == "tiny" else "mid"
    for dtype in ("bfloat16", "float32"):
        for heads, key_value_heads, size in HEADS if dtype == "bfloat16" or device == "cpu" else []:  # else no kernel
            name = f"attention {heads}/{key_value_heads} × {size}, {dtype}"
            sizes = {"heads": heads, "key_value_heads": key_value_heads, "size": size}
            add("parity", name, 2, "gpu_parity:attention", **sizes, dtype=dtype)
        for family in ("qwen2_5_vl", "qwen3_vl"):
            add("parity", f"rows of {family}, {dtype}", 5, "gpu_parity:rows", family=family, shape=small, dtype=dtype)
        for part in ("grpo", "dpo"):
            add("parity", f"{part} loss, {dtype}", 5, "gpu_parity:loss", part=part, shape=small, dtype=dtype)
    for function in ("features", "positions", "against_cpu"):
        add("parity", function, 5, f"gpu_parity:{function}", shape=small)

    slow = 1 if shape == "7b" else 0.5  # of what computes; decoding waits for launches
    prompt, completion, group = SIZES[shape]
    named = {"shape": shape, "prompt": prompt, "completion": completion, "group": group}

    def update(stage: str, seconds: float, part: str, prompt=prompt, completion=completion, group=group,
               pair="features given", noise=False):  # fmt: skip
        name = f"{shape}, P {prompt}, C {completion}, G {group}, {pair}"
        name = f"{part} {name}" if stage == "sizes" else name
        options = {**named, "prompt": prompt, "completion": completion, "group": group}
        add(stage, name, seconds * slow, "gpu_update:update", **options, part=part, pair=pair, noise=noise)

    update("update", 80, "grpo", noise=True)
    add("update", f"{shape}, profile", 30 * slow, "gpu_update:profile", **named)
    add("update", f"{shape}, kernels", 40, "gpu_update:kernels", **named)
    answer = 512 if prompt == 8200 else completion
    update("dpo", 60, "dpo", completion=answer, group=2, noise=True)
    add("rollout", f"{shape}, phases", 50, "gpu_runs:phases", **named)
    add("rollout", f"{shape}, against stock", 100, "gpu_runs:rollout", **named)
    add("rollout", "copies", 10, "gpu_runs:copies", ("cuda",))
    add("rollout", f"{shape}, vLLM", 100, "gpu_runs:rollout_vllm", ("cuda", "vllm"), **named)
    add("step", f"{shape}, whole step, ours", 80, "gpu_runs:step", shape=shape, shared=True)
    add("step", "tiny loop", 240, "gpu_runs:loop", quick=device == "cpu")
    add("step", f"{shape}, QLoRA", 90 * slow, "gpu_update:qlora", ("bitsandbytes",), **named)
    add("step", f"{shape}, whole step, plain", 100, "gpu_runs:step", shape=shape, shared=False)
    for function in ("decoders", "workers"):
        add("loading", function, 50, f"gpu_runs:{function}", quick=device == "cpu")
    for config, (own, length, search) in CONFIGS.items():
        sizes = {"shape": "tiny", "answer": length and 8} if device == "cpu" else {"shape": own, "answer": length}
        if sizes["shape"] == shape:
            seconds = 40 if own == "3b" else 60
            add("hardware", config, seconds, "gpu_hardware:one_step", config=config, search=search, **sizes)
    for way in ("ours", "plain"):
        for gib, seconds in ((24, 40), (48, 80), (80, 240)):
            options = {"shape": shape, "way": way, "gib": gib}
            add("frames", f"{shape}, {gib} GiB, {way}", seconds * slow, "gpu_update:most_frames", ("cuda",), **options)
    update("sizes", 150, "grpo", pair="everything", noise=True)
    for length, seconds in ((1024, 15), (4096, 30), (16384, 90), (32768, 120)) if prompt == 8200 else ((48, 5),):
        update("sizes", seconds, "grpo", prompt=length)
    for count, seconds in ((4, 30), (16, 60)) if prompt == 8200 else ((2, 5),):
        update("sizes", seconds, "grpo", group=count)
    update("sizes", 120, "dpo", completion=answer, group=2, pair="everything", noise=True)
    options = {"shape": shape, "way": "ours", "gib": 48, "offloading": True}
    add("sizes", f"{shape}, 48 GiB, layer inputs on the host", 160 * slow, "gpu_update:most_frames", ("cuda",), **options)
    return stages
