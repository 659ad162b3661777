"""The server judge against a real server on a socket that delays, refuses, breaks off and lies."""

import gc
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from judge_server import JudgeServer, Reply

from veripo_trl.verifier.judge_prompts import load_judge_prompt, reply_schema
from veripo_trl.verifier.judges import JudgeError
from veripo_trl.verifier.reply_cache import VerdictCache
from veripo_trl.verifier.server_judge import ServerJudge
from veripo_trl.verifier.verify import verify_stream

ROOT = Path(__file__).resolve().parent.parent
PROMPT = load_judge_prompt(ROOT / "verifier_prompts" / "consistency.yaml")
LIE = json.dumps({"concluded_answer": "A", "consistent": True, "reason": "says A, and that A is B"})


def rollouts(count: int) -> list[dict]:
    """Each text differs; the thinking concludes A, B, C, D in turn, and every answer is B."""
    return [
        {
            "rollout_id": f"r{number}",
            "question_id": f"q{number}",
            "completion": f"<think>Case {number}: the answer is {'ABCD'[number % 4]}.</think><answer>B</answer>",
            "problem_type": "multiple choice",
            "solution": "B",
            "options": ["A. red", "B. blue", "C. green", "D. yellow"],
        }
        for number in range(count)
    ]


def expected(count: int) -> list[str]:
    return ["consistent" if number % 4 == 1 else "inconsistent" for number in range(count)]


def make_judge(url: str, **options) -> ServerJudge:
    options = {"concurrency": 8, "timeout_s": 5.0, "max_retries": 2, "backoff_s": 0.02, **options}
    return ServerJudge(url, "tiny-judge", PROMPT, **options)


class Words:
    """Counts words for tokens: these tests are about the wire, and one starts processes that shall not load torch."""

    is_fast = False

    def __call__(self, text, add_special_tokens):
        return {"input_ids": text.split()}


def verify(judge, count: int = 40, cache=None) -> list[dict]:
    return list(verify_stream(rollouts(count), judge=judge, tokenizer=Words(), cache=cache))


def consistencies(verdicts: list[dict]) -> list[str]:
    return [verdict["consistency"] for verdict in verdicts]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --------------------------------------------------------------------------------------------------------- asking


def test_what_is_asked_and_what_comes_of_it():
    with JudgeServer() as server:
        judge = make_judge(server.url, request_options={"chat_template_kwargs": {"enable_thinking": False}})
        verdicts = verify(judge)
    assert consistencies(verdicts) == expected(40)
    assert (judge.requests, judge.retries, dict(judge.failures), len(server.log)) == (40, 0, {}, 40)
    assert judge.summary() == f"40 requests to tiny-judge at {server.url}, 0 of them repeated; every reply was readable."
    body = server.log[0]["body"]
    assert {key: body[key] for key in ("model", "temperature", "seed", "max_tokens", "chat_template_kwargs")} == {
        "model": "tiny-judge", "temperature": 0, "seed": 0, "max_tokens": 1024,
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    assert body["response_format"]["json_schema"]["schema"] == reply_schema()
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert "authorization" not in server.log[0]["headers"]


def test_no_more_in_flight_than_allowed_and_no_fewer():
    with JudgeServer(lambda number, body: Reply(delay_s=0.05)) as server:
        start = time.monotonic()
        verify(make_judge(server.url, concurrency=5), 60)
        took = time.monotonic() - start
    assert server.most_in_flight == 5
    assert 0.55 <= took < 60 * 0.05  # 12 rounds of five, far from one by one


def test_the_name_tells_judges_apart_but_not_servers():
    judge = make_judge("http://127.0.0.1:1/v1")
    assert judge.name == make_judge("http://127.0.0.1:2/v1", concurrency=3).name
    others = [{"seed": 1}, {"max_tokens": 5}, {"top_k": 1}]
    assert len({judge.name, *(make_judge("http://127.0.0.1:1/v1", request_options=o).name for o in others)}) == 4


def test_the_name_shows_no_path():
    """Names go into verdicts, and with those to the Hub."""
    names = {}
    for model in ("/srv/someone/models/judge", "/srv/another/judge/", "outputs/x/judge", "~/judge", "..\\judge"):
        names[model] = ServerJudge("http://127.0.0.1:1/v1", model, PROMPT).name
    assert all(re.fullmatch(r"server:judge:[0-9a-f]{8}", name) for name in names.values()), names
    assert len(set(names.values())) == len(names)
    for model in ("Qwen/Qwen3-4B", "qwen3:4b", "judge"):
        assert ServerJudge("http://127.0.0.1:1/v1", model, PROMPT).name.startswith(f"server:{model}:")


def test_no_verdict_quotes_the_models_path():
    with JudgeServer(
        lambda n, b: Reply(status=400, body=b"/srv/someone/judge: too long") if "Case 5:" in str(b) else Reply()
    ) as server:
        judge = ServerJudge(server.url, "/srv/someone/judge", PROMPT, concurrency=2, max_retries=0)
        verdicts = verify(judge, 8)
    assert verdicts[5]["reason"] == "HTTP 400: judge: too long" and "/srv" not in json.dumps(verdicts)


# --------------------------------------------------------------------------------------------------------- faults

# script by number of the request; (unknown verdicts, their cause, requests that came, retries) of 40 rollouts
FAULTS = {
    "one request fails once with 500": (lambda n, b: Reply(status=500) if n == 5 else Reply(), 0, None, 41, 1),
    "503 twice": (lambda n, b: Reply(status=503) if n in (0, 1) else Reply(), 0, None, 42, 2),
    "connection closed without a byte": (lambda n, b: Reply(drop="before" if n == 5 else ""), 0, None, 41, 1),
    "connection closed within the reply": (lambda n, b: Reply(drop="within" if n == 5 else ""), 0, None, 41, 1),
    "garbage for JSON": (lambda n, b: Reply(content="I think so!" if n == 5 else None), 1, "not JSON", 40, 0),
    "no content": (lambda n, b: Reply(content="" if n == 5 else None), 1, "no text", 40, 0),
    "truncated JSON": (lambda n, b: Reply(content='{"concluded_answer": "B", "cons' if n == 5 else None),
                       1, "not JSON", 40, 0),
    "cut off by max_tokens": (lambda n, b: Reply(content=LIE, finish_reason="length") if n == 5 else Reply(),
                              1, "cut off", 40, 0),
    "wrong schema": (lambda n, b: Reply(content='{"verdict": "consistent"}' if n == 5 else None),
                     1, "wrong schema", 40, 0),
    "a verdict that contradicts itself": (lambda n, b: Reply(content=LIE if n == 5 else None), 1, "contradiction", 40, 0),
    "bytes that are no chat completion": (lambda n, b: Reply(body=b"\xff\x00<html>" if n == 5 else None),
                                          1, "not a chat completion", 40, 0),
    "JSON that is no chat completion": (lambda n, b: Reply(body=b'{"choices": []}' if n == 5 else None),
                                        1, "not a chat completion", 40, 0),
    "a body without end": (lambda n, b: Reply(body=b" " * 2_000_000 if n == 5 else None),
                           1, "not a chat completion", 40, 0),
    "one text refused with 400": (lambda n, b: Reply(status=400, body=b"too long") if "Case 5:" in str(b) else Reply(),
                                  1, "HTTP 400", 40, 0),
    "a redirect": (lambda n, b: Reply(status=307, headers={"Location": "http://127.0.0.1:1/"}) if n == 5 else Reply(),
                   1, "HTTP 307", 40, 0),
    "one text always fails with 500": (lambda n, b: Reply(status=500) if "Case 5:" in str(b) else Reply(),
                                       1, "HTTP 500", 42, 2),
    "one text is always too slow": (lambda n, b: Reply(delay_s=1.5 if "Case 5:" in str(b) else 0), 1, "time-out", 42, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_one_verdict_at_most(name, tmp_path):
    script, unknown, cause, requests, retries = FAULTS[name]
    with JudgeServer(script) as server, VerdictCache(tmp_path / "c.sqlite") as cache:
        judge = make_judge(server.url, timeout_s=0.5 if "slow" in name else 5.0)
        verdicts = verify(judge, cache=cache)
        cached = len(cache)
        server.script = lambda number, body: Reply()
        before = server.requests
        again = verify(make_judge(server.url), cache=cache)
    assert (server.log[:requests], before) == (server.log[:before], requests) and judge.requests == requests
    assert judge.retries == retries
    found = [(verdict["consistency"], truth) for verdict, truth in zip(verdicts, expected(40))]
    assert Counter(mine for mine, _ in found)["unknown"] == unknown
    assert all(mine in (truth, "unknown") for mine, truth in found)  # nobody else's verdict
    assert dict(judge.failures) == ({cause: unknown} if unknown else {})
    if not unknown:
        assert judge.summary().endswith("every reply was readable.")
        return
    assert judge.summary().endswith(f"without a usable verdict: {cause} 1.")
    reasons = [verdict["reason"] for verdict in verdicts if verdict["consistency"] == "unknown"]
    assert [reason.split(":")[0] for reason in reasons] == [cause]
    if cause == "contradiction":  # readable: judged, and kept
        assert cached == 40 and server.requests == before and consistencies(again) == consistencies(verdicts)
    else:  # asked again by the next run, and only that
        assert cached == 39 and server.requests == before + 1 and consistencies(again) == expected(40)


def test_retry_after_is_honoured():
    with JudgeServer(
        lambda n, b: Reply(status=429, headers={"Retry-After": "1"}) if n == 10 else Reply()
    ) as server:
        judge = make_judge(server.url, concurrency=4)
        start = time.monotonic()
        assert consistencies(verify(judge)) == expected(40)
    assert 0.9 <= time.monotonic() - start < 10 and judge.retries == 1


def test_a_wait_that_is_too_long_is_a_failure():
    with JudgeServer(
        lambda n, b: Reply(status=429, headers={"Retry-After": "86400"}) if "Case 5:" in str(b) else Reply()
    ) as server:
        judge = make_judge(server.url)
        start = time.monotonic()
        verdicts = verify(judge)
    assert time.monotonic() - start < 60 and dict(judge.failures) == {"HTTP 429": 1}
    assert verdicts[5]["reason"] == "HTTP 429: asks to wait for 86400 s"


def test_a_server_without_json_schema_is_refused_and_takes_none_if_told():
    with JudgeServer(json_schema=False) as server:
        with pytest.raises(JudgeError, match="response_format is not supported.*\"response_format\": null"):
            verify(make_judge(server.url))
        judge = make_judge(server.url, request_options={"response_format": None})
        assert consistencies(verify(judge)) == expected(40)


# ------------------------------------------------------------------------------------------------- broken servers


def test_a_server_that_is_down_stops_the_run_with_one_error():
    judge = make_judge(f"http://127.0.0.1:{free_port()}/v1")
    with pytest.raises(JudgeError) as error:
        verify(judge)
    message = str(error.value)
    assert f"{judge.url} (model 'tiny-judge') has not answered a single request" in message
    assert "after 3 tries with no connection" in message and "start the same command again" in message


@pytest.mark.parametrize("status, cause", [(500, "HTTP 500"), (400, "HTTP 400"), (200, "not a chat completion")])
def test_a_server_that_only_fails_stops_the_run(status, cause):
    with JudgeServer(lambda n, b: Reply(status=status, body=b"<html>")) as server:
        with pytest.raises(JudgeError, match=f"not answered a single request.*{cause}: .*<html>"):
            verify(make_judge(server.url))


def test_texts_that_are_refused_before_the_first_reply_do_not_stop_the_run():
    """A server refuses at once, and takes its time for a reply."""
    first = ("Case 0:", "Case 1:", "Case 2:", "Case 3:")
    with JudgeServer(
        lambda n, b: Reply(status=400) if any(case in str(b) for case in first) else Reply(delay_s=0.2)
    ) as server:
        judge = make_judge(server.url)
        assert consistencies(verify(judge))[4:] == expected(40)[4:]
    assert dict(judge.failures) == {"HTTP 400": 4}


def test_a_judge_that_writes_only_garbage_does_not_stop_the_run():
    with JudgeServer(lambda n, b: Reply(content="yes", delay_s=0.02)) as server:
        judge = make_judge(server.url)
        assert set(consistencies(verify(judge))) == {"unknown"}
    assert dict(judge.failures) == {"not JSON": 40} and server.most_in_flight == 8


def test_a_server_that_dies_stops_the_run_and_a_new_one_continues(tmp_path, caplog):
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        with JudgeServer() as server:

            def script(number, body):
                if number == 200:
                    server.loop.call_soon(server.stopping.set)
                return Reply()

            server.script = script
            judge = make_judge(server.url, max_wait_s=0.3)
            with pytest.raises(JudgeError, match="no longer answers.*the same command again.*in the cache"):
                verify(judge, 400, cache)
        stored = len(cache)
        assert 150 <= stored <= 210
        with JudgeServer() as server:
            assert consistencies(verify(make_judge(server.url), 400, cache)) == expected(400)
        assert server.requests == 400 - stored
    gc.collect()
    assert not [record.message for record in caplog.records if record.name == "asyncio"]  # said once, by the error


@pytest.mark.parametrize("how", ["no connection", "HTTP 502", "HTTP 503"])
def test_a_server_that_restarts_is_waited_for(how, caplog):
    """Longer than all tries of a request take; behind a proxy, the proxy answers meanwhile."""
    gone_until = []

    def script(number, body):
        if number == 100 and how == "no connection":
            server.loop.call_soon(server.stopping.set)
        elif number >= 100 and how != "no connection":
            gone_until[:] = gone_until or [time.monotonic() + 1]
            return Reply(status=int(how[-3:]) if time.monotonic() < gone_until[0] else 200)
        return Reply()

    def start_again():
        server.thread.join()
        time.sleep(1)
        with JudgeServer(port=server.port):
            done.wait(60)

    done = threading.Event()
    with JudgeServer(script) as server, caplog.at_level(logging.WARNING):
        if how == "no connection":
            threading.Thread(target=start_again, daemon=True).start()
        judge = make_judge(server.url)
        try:
            assert consistencies(verify(judge, 400)) == expected(400)
        finally:
            done.set()
    said = [record.message for record in caplog.records if record.name.startswith("veripo")]
    assert re.match(rf"The judge at {server.url} is gone \({how}.*Waiting for it, 300 s at most", said[0]), said
    assert len(said) == 1 and judge.retries > 2 * 8 and not judge.failures


def test_one_text_that_a_proxy_refuses_is_not_waited_for_forever():
    with JudgeServer(lambda n, b: Reply(status=503) if "Case 5:" in str(b) else Reply()) as server:
        judge = make_judge(server.url, max_wait_s=0.5)
        verdicts = verify(judge)
    assert dict(judge.failures) == {"HTTP 503": 1} and verdicts[5]["reason"] == "HTTP 503"


def test_an_error_of_the_callers_leaves_no_connection():
    def broken():
        yield from rollouts(100)
        raise OSError("the disk is gone")

    with JudgeServer(lambda n, b: Reply(delay_s=0.05)) as server:
        with pytest.raises(OSError, match="the disk is gone"):
            list(verify_stream(broken(), judge=make_judge(server.url), tokenizer=Words(), cache=None))
        stream = verify_stream(rollouts(500), judge=make_judge(server.url), tokenizer=Words(), cache=None)
        next(stream)
        assert server.connections
        stream.close()
        deadline = time.monotonic() + 10
        while server.connections:
            assert time.monotonic() < deadline
            time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------ the key

KEY = "sk-verysecret-123"


def test_the_key_is_sent_and_appears_nowhere_else(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def script(number, body):
        return Reply(status=500, body=f"key {KEY} failed".encode()) if "Case 5:" in str(body) else Reply()

    with JudgeServer(script, api_key=KEY) as server, VerdictCache(tmp_path / "c.sqlite") as cache:
        with caplog.at_level(logging.DEBUG):
            judge = make_judge(server.url, api_key_env="JUDGE_KEY")
            verdicts = verify(judge, cache=cache)
    assert verdicts[5]["reason"] == "HTTP 500: key <JUDGE_KEY> failed"
    assert all(entry["headers"]["authorization"] == f"Bearer {KEY}" for entry in server.log)
    texts = [repr(judge), str(vars(judge)), judge.summary(), caplog.text, json.dumps(verdicts)]
    texts += [path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()]
    assert not [text for text in texts if KEY in text]


def test_a_missing_key_is_an_error_before_any_request(monkeypatch):
    for value in (None, "", "  "):
        monkeypatch.delenv("JUDGE_KEY", raising=False)
        if value is not None:
            monkeypatch.setenv("JUDGE_KEY", value)
        with pytest.raises(JudgeError, match="'JUDGE_KEY', which is not set"):
            make_judge("http://127.0.0.1:1/v1", api_key_env="JUDGE_KEY")


def test_a_refused_key_stops_the_run_at_once(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with JudgeServer(api_key="another") as server:
        with pytest.raises(JudgeError, match="asked with the key in JUDGE_KEY, refuses with HTTP 401") as error:
            verify(make_judge(server.url, api_key_env="JUDGE_KEY"))
        with pytest.raises(JudgeError, match="asked without a key .judge_api_key_env., refuses with HTTP 401"):
            verify(make_judge(server.url))
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "url, message",
    [
        ("127.0.0.1:8000/v1", "expected the API's base"),
        ("file:///etc/passwd", "expected the API's base"),
        ("http://127.0.0.1/v1?key=1", "expected the API's base"),
        (f"http://user:{KEY}@127.0.0.1/v1", "a key goes into an environment variable"),
    ],
)
def test_a_url_that_is_none_is_refused(url, message):
    with pytest.raises(JudgeError, match=message) as error:
        make_judge(url)
    assert KEY not in str(error.value)


def test_a_wrong_path_stops_the_run():
    with JudgeServer() as server:
        with pytest.raises(JudgeError, match="refuses with HTTP 404.*whose /models lists 'tiny-judge'"):
            verify(make_judge(f"{server.url}/v2"))


# --------------------------------------------------------------------------------------------------------- resuming

DRIVER = """
import sys
from test_judge_server import *
with VerdictCache(sys.argv[2]) as cache:
    stream = verify_stream(rollouts(300), judge=make_judge(sys.argv[1]), tokenizer=Words(), cache=cache)
    for verdict in stream:
        print(verdict["rollout_id"], flush=True)
"""


def test_a_run_that_is_killed_continues(tmp_path):
    path = tmp_path / "c.sqlite"
    with JudgeServer(lambda number, body: Reply(delay_s=0.02)) as server:
        for kills in range(2):
            environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT / 'src'}"}
            process = subprocess.Popen([sys.executable, "-c", DRIVER, server.url, str(path)],
                                       stdout=subprocess.PIPE, env=environment)  # fmt: skip
            for _ in range(100 * (kills + 1)):
                assert process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        with VerdictCache(path) as cache:
            before = server.requests
            assert 190 <= len(cache) <= before
            assert consistencies(verify(make_judge(server.url), 300, cache)) == expected(300)
            # Lost with each kill: what was in flight or not yet stored, twice the concurrency at most.
            assert 300 <= server.requests <= 300 + 2 * 2 * 8
            done = server.requests
            assert consistencies(verify(make_judge(server.url), 300, cache)) == expected(300)
            assert server.requests == done  # a second run asks nothing
