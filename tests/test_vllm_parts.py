"""What rollouts by vLLM need beside vLLM itself. The engine's own tests are in tests_vllm/."""

import logging
import math
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_row

from veripo_trl.answers.rewards import REWARDS
from veripo_trl.data.schema import rows_to_dataset
from veripo_trl.errors import ConfigError, VeripoError
from veripo_trl.model.encoding import vision_token_ids
from veripo_trl.trainers.grpo import VideoGRPOConfig, VideoGRPOTrainer
from veripo_trl.vllm import training
from veripo_trl.vllm.inputs import EngineMismatchError, content_key, engine_options, longest_prompt, media_items
from veripo_trl.vllm.training import GapWatch, bias_logits, engine_config, largest_gap


def named(*names):
    return [SimpleNamespace(question_id=name) for name in names]


def test_the_largest_gap_is_that_of_a_prompt():
    first, second = named("first", "second")
    engine = torch.tensor([[-1.0, -1.0], [-1.0, math.nan], [-1.0, -1.0]])
    trained = torch.tensor([[-1.0, -1.6], [-1.0, -9.0], [-1.3, -9.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0]])
    gap, question_id = largest_gap(engine, trained, mask, [first, first, second])
    assert (gap, question_id) == (pytest.approx(0.3), "second")  # (0.6 + 0 + 0) / 3 against 0.3
    mask[2, 0] = 0
    assert largest_gap(engine, trained, mask, [first, first, second]) == (pytest.approx(0.2), "first")


# Gaps of generation batches by step, and what happens: at which batch the run stops (None: at none), how many warnings.
WATCHED = {
    "all small": ([(0, 1e-4), (1, 1e-4), (2, 1e-4)], {}, None, 0),
    "the first": ([(0, 0.5)], {}, 0, 0),
    "not a number": ([(0, math.nan)], {}, 0, 0),
    "after the first update": ([(0, 1e-4), (0, 1e-4), (4, 0.5)], {}, 2, 0),
    "later": ([(0, 1e-4), (1, 1e-4), (2, 0.5)], {}, None, 1),
    "allowed": ([(0, 0.5)], {"max_vllm_logp_gap": 0.6}, None, 0),
    "not allowed": ([(0, 1e-4)], {"max_vllm_logp_gap": 1e-5}, 0, 0),
}


@pytest.mark.parametrize("name", WATCHED)
def test_a_run_stops_at_its_first_gap(name, tmp_path, caplog):
    batches, changes, stops_at, warnings = WATCHED[name]
    config = VideoGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, use_vllm=True, top_p=0.9,
                             generation_kwargs={"min_tokens": 3, "logit_bias": {1: -100.0}}, **changes)  # fmt: skip
    accelerator = SimpleNamespace(gather=lambda value: value, device=torch.device("cpu"))
    watch = GapWatch(config, dtype=torch.float32, accelerator=accelerator)
    for place, (step, gap) in enumerate(batches):
        given = (torch.zeros(1, 1), torch.full((1, 1), gap), torch.ones(1, 1), named("the row"))
        if place == stops_at:
            causes = "Likely causes: .*'top_p': 0.9.*'min_tokens': 3"
            with pytest.raises(EngineMismatchError, match=rf"at step {step}.*'the row'.*{causes}"):
                watch.check(*given, step=step)
            return
        with caplog.at_level(logging.WARNING):
            watch.check(*given, step=step)
    assert stops_at is None and caplog.text.count("nats a token apart") == warnings


def test_every_process_stops_where_one_has_a_gap(tmp_path):
    config = VideoGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    other = SimpleNamespace(gather=lambda own: torch.cat([own, torch.tensor([0.7])]), device=torch.device("cpu"))
    watch = GapWatch(config, dtype=torch.float32, accelerator=other)
    with pytest.raises(EngineMismatchError, match="0.7"):
        watch.check(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), named("fine here"), step=0)


def test_the_engine_is_of_the_policys_revision(model_paths, tmp_path, monkeypatch):
    """TRL names no revision, so that vLLM would load the newest."""
    from hub_server import HubServer, Repo
    from trl.generation import vllm_generation

    from veripo_trl.model.policy import load_policy
    from veripo_trl.recipe.arguments import DataArguments
    from veripo_trl.recipe.build import make_encoder
    from veripo_trl.vllm.training import trl_engine

    files = {file.name: file.read_bytes() for file in model_paths["qwen2_5_vl"].iterdir()}
    with HubServer() as hub:
        hub.use_in_this_process(monkeypatch, tmp_path)
        hub.repos["models/tester/tiny"] = Repo(False)
        first, _ = [hub.repos["models/tester/tiny"].add("main", title, files) for title in ("first", "second")]
        model, processor = load_policy("tester/tiny", revision=first)
        encoder = make_encoder(model, processor, DataArguments(prompt_template="tiny"))
        made = type("LLM", (), {"__init__": lambda self, **options: vars(self).update(options)})
        monkeypatch.setattr(import_module("trl.import_utils"), "is_vllm_available", lambda: True)
        monkeypatch.setattr(vllm_generation, "LLM", made, raising=False)
        monkeypatch.setattr(vllm_generation, "VLLMClient", object, raising=False)
        config = VideoGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
        with trl_engine(config, encoder, model=model, datasets=[rows_to_dataset([make_row("a", "")])]):
            assert vllm_generation.LLM(model="tester/tiny").revision == first
        model.save_pretrained(tmp_path / "saved")
    assert first not in (tmp_path / "saved" / "config.json").read_text()


# What a server says to /health, each time it is asked: nothing, or a status; and what is said of it.
HEALTH = {"silent": ([None], "Read timed out"), "ill": ([503] * 9, "503"), "starting": ([503, 503, 200], None)}


@pytest.mark.parametrize("name", HEALTH)
def test_a_server_is_not_waited_for_for_ever(name, monkeypatch):
    import requests
    from trl.generation.vllm_client import VLLMClient

    statuses, said = HEALTH[name]
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status = statuses.pop(0) if self.path == "/health" else None
            if status is None:
                over.wait(10)
                return
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    monkeypatch.setattr(training, "HEALTH_S", 0.2)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = object.__new__(training.client_class(VLLMClient, None, {}, timeout_s=0.2))
        client.base_url, client.session = f"http://127.0.0.1:{server.server_port}", requests.Session()
        waits = {"total_timeout": 0.3 if said else 5.0, "retry_interval": 0.05}
        if said:
            with pytest.raises(VeripoError, match=rf"{client.base_url}: expected .*/health within 0.3 s.*came .*{said}"):
                client.check_server(**waits)
        else:
            client.check_server(**waits)
            assert not statuses
        with pytest.raises(requests.ReadTimeout):  # what the client asks next
            client.session.get(f"{client.base_url}/v1/models")
        over.set()
        server.shutdown()


def test_workers_keep_to_one_thread_beside_the_cpu_engine(load, mixed_rows, monkeypatch):
    """vLLM's CPU engine replaces `torch.set_num_threads`, by which the loader keeps a forked worker to one thread."""
    from veripo_trl.evaluate.generate import encoded_batches

    encoder = load()[1]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(encoder, "encode", lambda row: torch.get_num_threads())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda count: None)
        found = list(encoded_batches(encoder, mixed_rows, [[0], [1]], num_workers=1))
    torch.set_num_threads(before)
    assert sorted(found) == [([0], [1]), ([1], [1])]


def test_a_users_bias_stays_beside_the_bans(load, mixed_rows, tmp_path):
    _, encoder = load()
    config = VideoGRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, use_vllm=True, max_completion_length=100,
        generation_kwargs={"min_tokens": 1, "logit_bias": {"7": 3, 8: -1000.0}},
    )  # fmt: skip
    datasets = [rows_to_dataset(mixed_rows)]
    changes = engine_config(config, encoder, banned=[5, 6], datasets=datasets)
    bias = {7: 3.0, 8: -100.0, 5: -100.0, 6: -100.0}  # as vLLM clips them
    assert changes["generation_kwargs"] == {"min_tokens": 1, "logit_bias": bias}
    assert changes["vllm_max_model_length"] == longest_prompt(encoder, datasets) + 100
    assert config.generation_kwargs["logit_bias"] == {"7": 3, 8: -1000.0} and config.vllm_max_model_length is None
    config.vllm_max_model_length = 500
    assert "vllm_max_model_length" not in engine_config(config, encoder, banned=[], datasets=datasets)
    config.vllm_model_impl = "transformers"
    with pytest.raises(ValueError, match="vllm_model_impl"):
        engine_config(config, encoder, banned=[], datasets=datasets)


def test_the_trainer_renormalises_without_what_is_banned(load, mixed_rows, tmp_path):
    from trl.trainer.utils import add_fused_lm_head

    model, encoder = load()
    banned = vision_token_ids(encoder.processor, encoder.config)
    saved = set(model.state_dict())
    ids = torch.arange(100, 130)[None]
    labels = ids.clone()
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1] / 0.7
        logits[..., banned] = -torch.inf
        expected = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
        for _ in range(2):  # a second trainer of the same model replaces the bias
            bias_logits(model, dict.fromkeys(banned, -100.0))
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(output.log_probs, expected, atol=1e-5, rtol=0)
    assert bool(output.entropy.isfinite().all())
    assert set(model.state_dict()) == saved
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.lm_head.bias is None


def test_an_output_head_that_cannot_be_biased_is_refused(load):
    from peft import LoraConfig, get_peft_model

    model, _ = load()
    model = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="lm_head"):
        bias_logits(model, {1: -100.0})


# Per kind of model: what the rows of `mixed_rows` are handed over as.
ITEMS = {
    "qwen2_5_vl": [[], ["image"], ["video"], ["video", "video"], ["video", "image"]],
    "qwen3_vl": [[], ["image"], ["image"] * 12, ["image"] * 5, ["image"] * 3],
}


@pytest.mark.parametrize("kind", ITEMS)
def test_media_items_are_whole(kind, load, mixed_rows):
    _, encoder = load(kind)
    for row, expected in zip(mixed_rows, ITEMS[kind], strict=True):
        prompt = encoder.encode(row)
        items = media_items(prompt, encoder.config)
        assert sorted(item["kind"] for item in items) == sorted(expected), row["question_id"]
        vision = {encoder.config.image_token_id, encoder.config.video_token_id}
        covered = [place for item in items for place in range(item["offset"], item["offset"] + item["length"])]
        assert covered == [place for place, token in enumerate(prompt.input_ids.tolist()) if token in vision]
        whole = [v for v in (prompt.pixel_values, prompt.pixel_values_videos) if v is not None]
        assert sum(len(item["pixels"]) for item in items) == sum(map(len, whole))
        assert all(len(item["pixels"]) == np.prod(item["grid"]) for item in items)


def test_a_key_names_a_content(load, mixed_rows):
    _, encoder = load()
    (item,) = media_items(encoder.encode(mixed_rows[2]), encoder.config)
    pixels = item["pixels"].clone()
    assert content_key({**item, "pixels": pixels}) == content_key(item)
    pixels[3, 5] += 1e-3
    others = [
        {**item, "pixels": pixels}, {**item, "pixels": item["pixels"].bfloat16()},
        {**item, "seconds": item["seconds"] * 2}, {**item, "grid": item["grid"][[0, 2, 1]] * np.array([1, 2, 1])},
    ]  # fmt: skip
    assert len({content_key(other) for other in [item, *others]}) == 5


def test_a_gathered_group_still_shares_its_prompt(load, mixed_rows):
    """Prompts travel between processes of a tensor-parallel group by pickle."""
    _, encoder = load()
    prompt = encoder.encode(mixed_rows[2])
    first, second = pickle.loads(pickle.dumps([prompt, prompt]))
    assert first is second
    assert torch.equal(first.pixel_values_videos, prompt.pixel_values_videos)
    assert first.second_per_grid_ts == prompt.second_per_grid_ts == [1.0]


@pytest.mark.parametrize("kind", ITEMS)
def test_engine_options_hold_the_largest_media(kind, load):
    _, encoder = load(kind, max_frames=140, max_pixels=112 * 112)
    rows = {"images": [[], ["a", "b"]], "videos": [["a", "b", "c"], []]}
    options = engine_options(encoder, dtype=torch.bfloat16, datasets=[rows])
    side = encoder.loader.settings.size_factor
    assert options["dtype"] == "bfloat16" and options["mm_device_do_normalize"] is False
    assert options["max_num_batched_tokens"] >= max(4096, 70 * 112 * 112 // side**2)
    limits = options["limit_mm_per_prompt"]
    assert limits["image"]["count"] == {"qwen2_5_vl": 2, "qwen3_vl": 2 + 3 * 70}[kind]
    timed = {"count": 3, "num_frames": 140, "width": 112, "height": 112}
    assert limits["video"] == {"qwen2_5_vl": timed, "qwen3_vl": 0}[kind]


def test_without_vllm_its_use_is_refused(load, media_root, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("trl.import_utils"), "is_vllm_available", lambda *args, **kwargs: False)
    model, encoder = load()
    rows = [make_row("one", media_root, videos=["long.mp4"])]
    config = VideoGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, use_vllm=True, num_generations=2,
                             per_device_train_batch_size=2)  # fmt: skip
    with pytest.raises(ConfigError, match=r"veripo_trl\[vllm\]"):
        VideoGRPOTrainer(
            model=model, reward_funcs=[REWARDS["accuracy"]], args=config, train_dataset=rows_to_dataset(rows),
            processing_class=encoder.processor, encoder=encoder,
        )  # fmt: skip
