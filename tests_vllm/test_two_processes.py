"""Rollouts by vLLM in a run of two processes over gloo: an engine in each, and one engine divided between them."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("two_process_driver.py")
TIMEOUT_S = 400


def launch(*arguments) -> tuple[int, str]:
    """Exit code and output of the driver on two processes; a hang ends in a failure, with both killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), str(DRIVER),
        *map(str, arguments),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"not done within {TIMEOUT_S} s:\n{output[-8000:]}")
    return process.returncode, output


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_two_processes(tensor_parallel_size, model_paths, media_root, tmp_path):
    code, output = launch(model_paths["qwen2_5_vl"], media_root, tmp_path, tensor_parallel_size)
    assert code == 0, output[-8000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["world"] == second["world"] == 2
    for way, rows in (("divided", 6), ("together", 2)):
        found = [own[way] for own in (first, second)]
        assert [[len(batch) for batch in own["sampled"]] for own in found] == [[rows, rows]] * 2
        assert all(len(own["gaps"]) == 2 and max(own["gaps"]) < 1e-4 for own in found[:1]), found
    for step in zip(*(own["sampled"] for own in found), strict=True):  # a group, and no completion of it twice
        assert len({tuple(completion) for own in step for completion in own}) == 4
