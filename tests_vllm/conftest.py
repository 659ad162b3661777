"""Tests that need vLLM: `.ci/vllm` makes an environment for them and runs them there, on CPU."""

import os
import runpy
import sys
from pathlib import Path

STARTUP = Path(__file__).parent / "startup"

os.environ.update(
    PYTHONPATH=os.pathsep.join(filter(None, [str(STARTUP), os.environ.get("PYTHONPATH")])),  # of child processes
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process, as TRL's colocate mode has it
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
)

if "DeclareOperators" not in [getattr(finder, "__name__", None) for finder in sys.meta_path]:
    runpy.run_path(str(STARTUP / "sitecustomize.py"))

import gc  # noqa: E402
import importlib.util  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

spec = importlib.util.spec_from_file_location("main_conftest", Path(__file__).parent.parent / "conftest.py")
main = importlib.util.module_from_spec(spec)
spec.loader.exec_module(main)
model_paths, media_root, mixed_rows, load = main.model_paths, main.media_root, main.mixed_rows, main.load
load_script, make_row, write_video = main.load_script, main.make_row, main.write_video


@pytest.fixture(autouse=True)
def free_engines():
    """An engine keeps a gigabyte for keys and values."""
    yield
    gc.collect()


def plain_linear_layers() -> None:
    """Let weights be replaced on CPU.

    vLLM's CPU backend packs linear weights and drops the originals, so that none can be loaded later. On GPUs weights
    stay as they are. With plain linear layers the same holds here, as with the convolutions of linear attention where
    the processor is taken for one without bfloat16.
    """
    import vllm.kernels  # noqa: F401  (one library by what the processor is: before that is denied)
    from vllm.model_executor.layers import utils

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain
    torch.cpu._is_avx512_bf16_supported = lambda: False


plain_linear_layers()
