"""What `check_rows.py --gpu_memory` computes, against fake tensors on the real code path, in the 3B's and 7B's shapes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "speed"))

from fake_memory import of_all_layers, prefill_bytes, update_bytes  # noqa: E402
from models import SHAPES  # noqa: E402

from veripo_trl.recipe import frames_that_fit as computed  # noqa: E402

# Prompt tokens, completion tokens of each of 8, layer inputs on the host. In the third the last layer has most at work.
UPDATES = [(65_536, 512, False), (40_960, 512, True), (24_576, 2048, False), (8192, 512, True)]
PREFILL = 65_536
SET_ASIDE = 1e9  # bytes of CONTEXT that are for what the formulas leave out


@pytest.mark.parametrize("shape", ["3b", "7b"])
def test_what_is_computed_is_what_fake_tensors_count(shape):
    text = SimpleNamespace(**SHAPES[shape]["text"])
    found = {}
    for prompt, completion, offload in UPDATES:
        memory = computed.MemoryArguments(activation_offloading=offload)
        said = computed.update_bytes(text, prompt, 8 * completion, memory)
        options = {"completion": completion, "mlp": True, "offload": offload}
        counted = of_all_layers(update_bytes, shape, prompt, **options)
        # Vision features, embeddings before and after they are put in: given here.
        found[prompt, completion, offload] = said, counted + 3 * 2 * text.hidden_size * (prompt + 8 * completion)
    one = computed.MemoryArguments(num_generations=1, max_completion_length=0)
    found["prefill"] = computed.rollout_bytes(text, PREFILL, one), of_all_layers(prefill_bytes, shape, PREFILL)
    for case, (said, counted) in found.items():
        print(case, f"{said / counted - 1:+.1%}, {(said - counted) / 1e9:+.2f} GB")
        assert counted - SET_ASIDE <= said <= 1.05 * counted, (case, said, counted)
