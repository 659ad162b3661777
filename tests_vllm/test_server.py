"""GRPO whose rollouts come from a vLLM server, over a real socket.

Not run: the weight sync, which goes over NCCL between GPUs. The policy stays as the server loaded it.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from test_trainer import GAP, gaps, make_trainer
from trl.generation.vllm_client import VLLMClient

from veripo_trl.vllm.inputs import EngineMismatchError
from veripo_trl.vllm.training import check_server

TIMEOUT_S = 400  # until a server answers; half a minute on two idle cores


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def server(request, model_paths, tmp_path_factory):
    """(kind, URL, log file) of a server of a tiny model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_paths[request.param]),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--logprobs-mode", "processed_logprobs",
        "--no-mm-device-do-normalize", "--enable-scale-out", "--mm-processor-cache-gb", "0", "--enforce-eager",
        "--max-model-len", "1024", "--max-num-seqs", "4", "--limit-mm-per-prompt", '{"image": 30, "video": 0}'
        if request.param == "qwen3_vl" else '{"image": 2, "video": 2}',
    ]  # fmt: skip
    env = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server is not up:\n{log.read_text()[-8000:]}")
            time.sleep(1)
        yield request.param, url, log
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture
def no_weight_sync(monkeypatch):
    """NCCL stays out; what surrounds it runs."""
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", lambda self, metadata, named: [None for _ in named])


def test_a_server_samples_with_the_trainers_log_probs(server, load, mixed_rows, tmp_path, no_weight_sync):
    kind, url, log = server
    model, encoder = load(kind)
    options = {"vllm_mode": "server", "vllm_server_base_url": url, "learning_rate": 0.0, "max_steps": 2}
    trainer = make_trainer(model, encoder, mixed_rows, tmp_path / "mixed", **options)
    trainer.train()
    found = gaps(trainer)
    assert len(found) == 2 and max(found) < 1e-4, (GAP, found)
    text = make_trainer(model, encoder, mixed_rows[:1], tmp_path / "text", **options)
    text.train()
    assert max(gaps(text)) < 1e-4
    calls = log.read_text()
    # Each prompt once per batch, and every sync followed by both resets.
    assert calls.count("POST /inference/v1/generate") == 2 * len(mixed_rows) + 2
    assert calls.count("POST /reset_prefix_cache") == calls.count("POST /reset_encoder_cache") == 4


def test_a_row_that_does_not_fit_the_servers_context_is_refused(server, load, mixed_rows, tmp_path, no_weight_sync):
    kind, url, _ = server
    model, encoder = load(kind)
    options = {"vllm_mode": "server", "vllm_server_base_url": url, "max_completion_length": 1000}
    trainer = make_trainer(model, encoder, mixed_rows[2:3], tmp_path, **options)
    with pytest.raises(ValueError, match="do not fit into vLLM's context of 1024"):
        trainer.train()


def test_a_server_with_other_settings_is_refused(server):
    _, url, _ = server
    info = VLLMClient(base_url=url).get_server_info()
    options = {"dtype": "float32"}
    assert check_server(info, options, url) == 1024
    wrong = {
        "--dtype": {"dtype": "torch.bfloat16"},
        "--logprobs-mode": {"logprobs_mode": "raw_logprobs"},
        "--mm-device-do-normalize": {
            "multimodal_config": {**info["model_config"]["multimodal_config"], "mm_device_do_normalize": True}
        },
    }
    for name, change in wrong.items():
        with pytest.raises(EngineMismatchError, match=f"runs with {name} "):
            check_server({**info, "model_config": {**info["model_config"], **change}}, options, url)
