"""GRPO whose rollouts come from a vLLM server, over a real socket.

Not run: the weight sync, which goes over NCCL between GPUs. The policy stays as the server loaded it.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
import two_process_driver as driver
from conftest import make_row
from test_trainer import GAP, gaps, make_trainer
from test_two_processes import launch
from trl.generation.vllm_client import VLLMClient
from urllib3.util.retry import Retry

from veripo_trl.errors import VeripoError
from veripo_trl.vllm import training as backend
from veripo_trl.vllm.inputs import EngineMismatchError
from veripo_trl.vllm.training import check_server

DTYPE = {"qwen3_5": "bfloat16"}  # the only one in which vLLM's CPU build has linear attention
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
        "--host", "127.0.0.1", "--port", str(port), "--dtype", DTYPE.get(request.param, "float32"),
        "--logprobs-mode", "processed_logprobs",
        "--no-mm-device-do-normalize", "--enable-scale-out", "--mm-processor-cache-gb", "0", "--enforce-eager",
        "--max-model-len", "1024", "--max-num-seqs", "4", "--limit-mm-per-prompt", '{"image": 30, "video": 0}'
        if request.param != "qwen2_5_vl" else '{"image": 2, "video": 2}',
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


@pytest.mark.parametrize("server", ["qwen3_5"], indirect=True)
def test_linear_attention_is_within_rounding(server, load, mixed_rows, tmp_path, no_weight_sync, monkeypatch):
    """The trainer is in float32."""
    monkeypatch.setattr(backend, "engine_dtype", lambda config, model: torch.bfloat16)
    kind, url, _ = server
    options = {"vllm_mode": "server", "vllm_server_base_url": url, "learning_rate": 0.0, "max_steps": 1}
    trainer = make_trainer(*load(kind), mixed_rows, tmp_path, **options)
    trainer.train()
    assert trainer.state.log_history[0]["sampling/largest_prompt_gap"] < backend.GAP_BOUNDS[torch.bfloat16] / 2


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


def test_a_server_that_refuses_or_is_gone_ends_the_run(server, load, mixed_rows, tmp_path, no_weight_sync):
    kind, url, _ = server
    model, encoder = load(kind)
    options = {"vllm_mode": "server", "vllm_server_base_url": url}
    trainer = make_trainer(model, encoder, mixed_rows[1:3], tmp_path, **options)
    client = trainer.vllm_generation.vllm_client
    client.model = "another"
    with pytest.raises(VeripoError, match=f"vLLM server at {url}, asked for /inference.*404.*`another` does not exist"):
        trainer.train()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes what is posted and says nothing
        client.base_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        client.session.request.keywords["timeout"] = 1
        with pytest.raises(VeripoError, match="Read timed out.*goes on from the last checkpoint"):
            trainer.train()
        silent.settimeout(0)
        for _ in range(2):  # of each row its one request
            silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()
    with socket.socket() as probe:  # nothing listens there
        probe.bind(("127.0.0.1", 0))
        client.base_url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    client.session.get_adapter(url).max_retries = Retry(0)  # not a minute of waiting for it
    with pytest.raises(VeripoError, match="Connection refused.*goes on from the last checkpoint"):
        trainer.train()


@pytest.mark.parametrize("server", ["qwen2_5_vl"], indirect=True)
def test_each_of_two_processes_posts_its_own_prompts(server, model_paths, media_root, tmp_path, no_weight_sync):
    kind, url, _ = server
    code, output = launch(model_paths[kind], media_root, tmp_path, url)
    files = [tmp_path / f"rank{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), output[-8000:]
    processes = [json.loads(file.read_text()) for file in files]
    divided, together = ([own[way] for own in processes] for way in ("divided", "together"))
    for own in (*divided, *together):
        assert len(own["gaps"]) == 2 and max(own["gaps"]) < 1e-4, own["gaps"]
    # Each prompt once, with as many samples as the process has of it; shuffled frames in the first one alone.
    posted = [[request for request in own["requests"] if request["samples"]] for own in divided]
    assert [sorted(request["samples"] for request in own) for own in posted] == [[2, 2, 2, 2, 4, 4], [2, 2, 4, 4]]
    # None before the first process has sent the weights.
    synced = [request["at"] for request in divided[0]["requests"] if request["path"] == "/reset_prefix_cache"]
    for own in posted:
        steps = [own[: len(own) // 2], own[len(own) // 2 :]]
        assert all(at < request["at"] for at, step in zip(synced, steps, strict=True) for request in step)
    exchanged = [size for own in (*divided, *together) for size in own["exchanged"]]
    assert exchanged and max(exchanged) < processes[0]["pixels"] / 4, (max(exchanged), processes[0]["pixels"])
    # One process has the same rollouts: a request's samples depend on its prompt and its seed.
    model, encoder = driver.load(str(model_paths[kind]), tower=False)
    rows = [
        make_row("image", media_root, images=["square.png"]), make_row("video", media_root, videos=["long.mp4"]),
        make_row("text", media_root, problem="Which colour is last?"),
    ]  # fmt: skip
    options = {"vllm_mode": "server", "vllm_server_base_url": url, "learning_rate": 0.0, "max_steps": 2}
    options |= {"num_generations": 4, "per_device_train_batch_size": 12}
    alone = make_trainer(model, encoder, rows, tmp_path / "one", **options)
    alone.vllm_generation.generation_kwargs["seed"] = driver.SEED
    for step, (image, video, text) in enumerate(
        (batch[:4], batch[4:8], batch[8:]) for batch in driver.train(alone)["sampled"]
    ):
        first, second = (own["sampled"][step] for own in divided)
        assert first[:6] == [*image, *video[:2]] and second == [*video[:2], *text] and len(first) == 8
        assert len({tuple(completion) for completion in (*image, *video, *text)}) == 12
    # A group over both processes, its prompt computed by them together: no completion twice.
    for step in zip(*(own["sampled"] for own in together), strict=True):
        assert len({tuple(completion) for own in step for completion in own}) == 4
    # Then the server refuses one of them, and both end.
    assert code != 0 and "The model `another` does not exist" in output, output[-8000:]
