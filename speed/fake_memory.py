"""Peak memory of a packed GRPO update, and of a rollout's prefill, by fake tensors: the real code path of a model of any
size, without its weights, its time or a GPU. `recipes/check_rows.py --gpu_memory` computes with what it found.

Embeddings are given: what the model holds while it puts vision features into them is not counted.

    python speed/fake_memory.py 7b 65536                # bytes per prompt token of today's path and of each technique
"""

import argparse
import contextlib
import weakref
from functools import partial
from unittest import mock

import torch
from models import SHAPES, VISION, lora
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

from veripo_trl.files.tables import print_table
from veripo_trl.model import pieces
from veripo_trl.shared_prompt.attention import PackedLayout, use_shared_prefix

WAYS = {"whole": {}, "MLP in pieces": {"mlp": True}, "… and layer inputs on the host": {"mlp": True, "offload": True}}


class Tracked(TorchDispatchMode):
    """Bytes of the storages that operations made and that are alive, and the most at any time; without what was there
    before."""

    def __init__(self, before: list):
        super().__init__()
        self.live = self.peak = 0
        self.seen, self.uncounted = {tensor.untyped_storage()._cdata: 0 for tensor in before}, False

    def elsewhere(self, make, *args, **kwargs):
        """What `make` makes, in other memory."""
        self.uncounted = True
        try:
            return make(*args, **kwargs)
        finally:
            self.uncounted = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self._count(storage._cdata, 0 if self.uncounted else storage.nbytes())
                    weakref.finalize(storage, self._gone, storage._cdata)
        return output

    def _count(self, key, size):
        self.seen[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)

    def _gone(self, key):
        self.live -= self.seen.pop(key)


def meta_policy(shape: str, layers: int):
    """(the policy with LoRA, its base), of bfloat16 weights that hold nothing."""
    text = {**SHAPES[shape]["text"], "num_hidden_layers": layers, "max_position_embeddings": 128_000}
    vision = {**VISION, **SHAPES[shape]["vision"], "depth": 1, "out_hidden_size": text["hidden_size"]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        model.requires_grad_(False)
        return get_peft_model(model, lora()), model


@contextlib.contextmanager
def fake_tensors():
    """FakeTensorMode, with the output head as on a GPU: there kernels of Triton's work on its tiles in place."""

    def nothing(*args, **kwargs):
        pass

    in_place = dict.fromkeys(("_forward_tile", "_backward_tile", "_addmm_fp32"), nothing)
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.multiple(chunked_logprob, **in_place):
        yield


def become_fake(policy) -> None:
    """Replace the weights of a model on "meta" by fake ones of the CPU, those that are trained with gradients."""
    for module in policy.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fake = torch.nn.Parameter(torch.empty_like(value, device="cpu"), value.requires_grad)
                fake.grad = torch.empty_like(fake) if value.requires_grad else None
                module._parameters[name] = fake
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty_like(value, device="cpu")


def held(policy) -> list[torch.Tensor]:
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    return [*policy.parameters(), *policy.buffers(), *gradients]


def update_bytes(shape: str, prompt: int, *, layers: int, group: int = 8, completion: int = 512,
                 mlp: bool = False, offload: bool = False) -> dict:  # fmt: skip
    """Bytes at the end of the forward pass and at the peak, without weights, gradients and optimizer."""
    hidden_size, tokens = SHAPES[shape]["text"]["hidden_size"], prompt + group * completion
    policy, base = meta_policy(shape, layers)
    with fake_tensors(), mock.patch.object(pieces, "WHOLE", pieces.WHOLE if mlp else 1 << 40):
        become_fake(policy)
        policy.train()
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        pieces.mlp_in_pieces(base)
        use_shared_prefix(base)
        inputs = {
            "inputs_embeds": torch.empty(1, tokens, hidden_size, dtype=torch.bfloat16, requires_grad=True),
            "position_ids": torch.zeros(3, 1, tokens, dtype=torch.long),
            "shared_prefix": PackedLayout([prompt], [[completion] * group], "cpu"),
            "shift_labels": torch.ones(1, group * completion, dtype=torch.long),
        }
        tracked = Tracked(before=held(policy))
        # The device is a CPU here, and so is the host that layer inputs wait on.
        host = mock.patch.object(pieces.torch, "empty", partial(tracked.elsewhere, torch.empty))
        with tracked, torch.autocast("cpu", dtype=torch.bfloat16):
            with contextlib.ExitStack() as stack:
                if offload:
                    stack.enter_context(host)
                    stack.enter_context(pieces.layer_inputs_on_host(hidden_size))
                output = policy(**inputs, fused_lm_head=True)
            kept = tracked.live
            output.log_probs.sum().backward()
    return {"tokens": tokens, "kept": kept, "peak": tracked.peak}


@torch.no_grad()
def prefill_bytes(shape: str, prompt: int, *, layers: int) -> dict:
    """Bytes at the peak of a prompt's forward pass that keeps its keys and values."""
    policy, base = meta_policy(shape, layers)
    with fake_tensors():
        become_fake(policy)
        pieces.mlp_in_pieces(base.eval())
        embeddings = torch.empty(1, prompt, SHAPES[shape]["text"]["hidden_size"], dtype=torch.bfloat16)
        positions = torch.zeros(3, 1, prompt, dtype=torch.long)
        with Tracked(before=held(policy)) as tracked, torch.autocast("cpu", dtype=torch.bfloat16):
            policy(inputs_embeds=embeddings, position_ids=positions, use_cache=True, logits_to_keep=1)
    return {"tokens": prompt, "peak": tracked.peak}


def of_all_layers(measure, shape: str, *args, **options) -> float:
    """Bytes at the peak with all of a shape's layers: of two, and what each further one adds."""
    few, more = (measure(shape, *args, layers=layers, **options)["peak"] for layers in (2, 3))
    return few + (SHAPES[shape]["text"]["num_hidden_layers"] - 2) * (more - few)


def per_token(shape: str, prompt: int, layers: int, **options) -> dict:
    """Bytes that a further token of so long a prompt takes: of two layers and of what a further layer adds."""
    short, long = (update_bytes(shape, prompt - less, layers=2, **options) for less in (4096, 0))
    deep = update_bytes(shape, prompt, layers=3, **options)
    return {
        name: (long[name] - short[name]) / 4096 + (layers - 2) * (deep[name] - long[name]) / long["tokens"]
        for name in ("kept", "peak")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=["3b", "7b"])
    parser.add_argument("tokens", type=int)
    args = parser.parse_args()
    table = []
    layers = SHAPES[args.shape]["text"]["num_hidden_layers"]
    for way, options in WAYS.items():
        found = per_token(args.shape, args.tokens, layers, **options)
        table.append({"update": way, "KB a token": found["peak"] / 1e3, "of it kept": found["kept"] / 1e3})
        print(table[-1], flush=True)
    print_table(f"{args.shape} with LoRA, bfloat16", table)


if __name__ == "__main__":
    main()
