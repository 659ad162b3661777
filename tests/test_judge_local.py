"""The local judge, and the server judge against `transformers serve`: a tiny model with random weights, real wires."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from veripo_trl.tiny.model import build_tokenizer
from veripo_trl.verifier.judge_prompts import judge_messages, load_judge_prompt
from veripo_trl.verifier.local_judge import LocalJudge
from veripo_trl.verifier.reply_cache import VerdictCache
from veripo_trl.verifier.server_judge import ServerJudge
from veripo_trl.verifier.verify import verify_stream

ROOT = Path(__file__).resolve().parent.parent
PROMPT = load_judge_prompt(ROOT / "verifier_prompts" / "consistency.yaml")
CHAT = (
    "{%- for message in messages -%}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A text model of 100,000 parameters or so, as a folder."""
    path = tmp_path_factory.mktemp("judge") / "tiny-judge"
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer().backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT,
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def rollouts(count: int) -> list[dict]:
    return [
        {
            "rollout_id": f"r{number}",
            "question_id": f"q{number}",
            "completion": f"<think>{'So ' * number}the answer is B.</think><answer>B</answer>",
            "problem_type": "multiple choice",
            "solution": "B",
            "options": ["A. red", "B. blue"],
        }
        for number in range(count)
    ]


def test_a_model_that_says_nothing_readable_judges_nothing(model_path, tmp_path):
    judge = LocalJudge(str(model_path), PROMPT, batch_size=3, max_new_tokens=4, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        verdicts = list(verify_stream(rollouts(7), judge=judge, tokenizer=tokenizer, cache=cache))
        assert len(cache) == 0
    assert [verdict["rollout_id"] for verdict in verdicts] == [f"r{number}" for number in range(7)]
    assert {verdict["consistency"] for verdict in verdicts} == {"unknown"}
    assert judge.requests == 7 == sum(judge.failures.values())
    assert {verdict["reason"].split(":")[0] for verdict in verdicts} == set(judge.failures)
    assert "7 prompts; without a usable verdict" in judge.summary()


def test_replies_are_read_and_go_to_their_items(model_path, monkeypatch):
    """Sorting and batching keep each reply with its item; generation itself is replaced by an honest reader."""
    judge = LocalJudge(str(model_path), PROMPT, batch_size=4, max_new_tokens=4, device="cpu")
    batches = []

    def generate(prompts):
        batches.append([len(prompt) for prompt in prompts])
        texts = [judge.tokenizer.decode(prompt) for prompt in prompts]
        words = [text.count("So ") for text in texts]
        replies = [{"concluded_answer": "AB"[n % 2], "consistent": n % 2 == 1, "reason": str(n)} for n in words]
        return [(json.dumps(reply), False) for reply in replies]

    monkeypatch.setattr(judge, "_generate", generate)
    items = [{"think": "So " * (n * 7 % 50), "answer": "B", "problem_type": "multiple choice",
              "options": ["A. x", "B. y"]} for n in range(1, 40)]  # fmt: skip

    async def ask():
        return await asyncio.gather(*map(judge, items))

    found = [int(verdict["reason"]) - PROMPT.system.count("So ") for verdict in asyncio.run(ask())]
    assert found == [n * 7 % 50 for n in range(1, 40)]
    lengths = [length for batch in batches for length in batch]
    assert lengths == sorted(lengths) and list(map(len, batches)) == [4] * 9 + [3]  # little is padded


def test_what_is_read_at_once_is_judged_in_full_batches(model_path, monkeypatch):
    judge = LocalJudge(str(model_path), PROMPT, batch_size=4, max_new_tokens=4, device="cpu")
    batches = []
    monkeypatch.setattr(judge, "_generate", lambda prompts: batches.append(len(prompts)) or [("", True)] * len(prompts))
    list(verify_stream(rollouts(100), judge=judge, tokenizer=judge.tokenizer, cache=None))
    assert batches == [4] * 25


def test_padding_changes_no_reply(model_path):
    judge = LocalJudge(str(model_path), PROMPT, batch_size=4, max_new_tokens=8, device="cpu", dtype="float32")
    judge.model.generation_config.eos_token_id = list(range(0, judge.model.config.vocab_size, 3))  # ends soon
    prompts = []
    for item in rollouts(4):
        item |= {"think": item["completion"][7:40], "answer": "B"}
        prompts.append(judge.tokenizer.apply_chat_template(judge_messages(PROMPT, item), add_generation_prompt=True,
                                                           return_dict=True)["input_ids"])  # fmt: skip
    together = judge._generate(prompts)
    assert together == [judge._generate([prompt])[0] for prompt in prompts]


def test_a_prompt_beyond_the_models_length_is_unknown(model_path):
    judge = LocalJudge(str(model_path), PROMPT, max_new_tokens=8192, device="cpu")
    item = {"think": "so B", "answer": "B", "problem_type": "multiple choice", "options": None}
    verdict = asyncio.run(judge(item))
    assert verdict["reason"].startswith("too long: ") and dict(judge.failures) == {"too long": 1}


def test_a_model_without_a_chat_template_is_refused(model_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        LocalJudge(str(tmp_path), PROMPT)


def test_the_name_shows_no_path_and_tells_judges_apart(model_path, tmp_path):
    def name(path=model_path, **options):
        return LocalJudge(str(path), PROMPT, device="cpu", **options).name

    copy = tmp_path / model_path.name
    copy.symlink_to(model_path)
    names = [name(), name(copy), name(max_new_tokens=4), name(dtype="bfloat16")]
    assert all(re.fullmatch(r"local:tiny-judge@main:[0-9a-f]{8}", found) for found in names), names
    assert len(set(names)) == 4 and name(batch_size=2) == names[0]


@pytest.mark.slow
def test_the_wire_to_a_real_server(model_path):
    """`transformers serve` answers every request; what the model says is noise, and counts as unknown."""
    pytest.importorskip("uvicorn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model_path), "--device", "cpu",
               "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    with open(model_path.parent / "serve.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                   env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        judge = ServerJudge(f"http://127.0.0.1:{port}/v1", str(model_path), PROMPT, concurrency=2,
                            request_options={"max_tokens": 8})  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        verdicts = list(verify_stream(rollouts(6), judge=judge, tokenizer=tokenizer, cache=None))
    finally:
        process.terminate()
        process.wait(30)
    assert (judge.requests, judge.retries) == (6, 0), judge.summary()
    assert {verdict["consistency"] for verdict in verdicts} == {"unknown"}
    # replies of a language model, not errors of the wire
    assert set(judge.failures) <= {"not JSON", "cut off", "no text"} and sum(judge.failures.values()) == 6
