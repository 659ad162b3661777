"""The verifier's verdict as a reward: by rules, by a real judge's server on a socket, by a judge of the user's own."""

import sys
from pathlib import Path

import pytest
from helpers import documented, give_completions, make_grpo_trainer, video_rows
from judge_server import JudgeServer, Reply
from test_judge_server import LIE, free_port, rollouts

from veripo_trl.answers.rewards import reward_function, reward_functions
from veripo_trl.errors import ConfigError
from veripo_trl.verifier.judge_prompts import JudgePromptError
from veripo_trl.verifier.judges import JudgeError

PROMPT = str(Path(__file__).resolve().parent.parent / "verifier_prompts" / "consistency.yaml")


def batch(texts) -> dict:
    count = len(texts)
    return {"completions": [[{"role": "assistant", "content": text}] for text in texts],
            "problem_type": ["multiple choice"] * count, "solution": ["B"] * count,
            "options": [["A. red", "B. blue", "C. green", "D. yellow"]] * count}  # fmt: skip


TEXTS = [rollout["completion"] for rollout in rollouts(8)]  # their thinking concludes A, B, C, D in turn, the answer is B
VALUES = [-1, 1, -1, -1] * 2
OTHERS = ["<think>Hm.</think><answer>B</answer>", "no spans", f"<think>t</think><answer>{'B' * 3000}</answer>"]


def by_server(server, **options):
    options = {"judge": "server", "url": server.url, "model": "tiny-judge", "prompt": PROMPT, "max_retries": 1,
               "timeout_s": 5, "backoff_s": 0.01, **options}  # fmt: skip
    return reward_function("consistency", options)


def test_by_rules():
    metrics = {}
    reward = reward_function("consistency")
    scores = reward(**batch(TEXTS + OTHERS), completion_ids=None, log_metric=metrics.__setitem__)
    assert scores == VALUES + [0, 0, 0] and metrics == {"consistency/unknown": 3 / 11, "consistency/failed": 0}
    assert reward.__name__ == "consistency_reward" and reward(**batch([])) == []
    spans = {"problem_type": ["temporal grounding"], "solution": ["5 to 11"], "options": [[]]}
    assert reward(["<think>So from 5 to 11 s.</think><answer>0 to 2</answer>"], **spans) == [-1]


def test_by_a_server_at_once_and_equal_texts_once():
    with JudgeServer(lambda number, body: Reply(delay_s=0.2)) as server:
        reward = by_server(server)
        assert reward(**batch(TEXTS + TEXTS + OTHERS)) == VALUES + VALUES + [0, 0, 0]
        assert server.requests == 9 and server.most_in_flight >= 8  # one more that concludes nothing
        assert reward(**batch(TEXTS[:2])) == VALUES[:2]  # the next step, in another event loop
        one_by_one = by_server(server, concurrency=1)
        server.most_in_flight = 0
        assert one_by_one(**batch(TEXTS[:2])) == VALUES[:2] and server.most_in_flight == 1


def test_what_a_server_leaves_open_is_unknown_and_a_dead_one_ends_the_run():
    def script(number, body):
        return Reply(LIE) if number % 2 else Reply("I think so")

    with JudgeServer(script) as server:
        assert by_server(server)(**batch(TEXTS)) == [0] * 8  # readable, and contradicting itself; unreadable
    with JudgeServer(lambda number, body: Reply(status=500) if number >= 2 else Reply()) as server:
        reward = by_server(server, concurrency=1)
        metrics = {}
        scores = reward(**batch(TEXTS[:4]), log_metric=metrics.__setitem__)
        assert scores.count(None) == 2 and 0 not in scores, "a request that failed is no unknown verdict"
        assert metrics == {"consistency/unknown": 0, "consistency/failed": 0.5}
        with pytest.raises(JudgeError, match="answered none of a step's 2 requests; the last failed with HTTP 500"):
            reward(**batch(TEXTS[:2]))
    with JudgeServer(lambda number, body: Reply(status=400) if number >= 2 else Reply()) as server:
        reward = by_server(server, concurrency=1)
        assert reward(**batch(TEXTS[:2])) == VALUES[:2]
        assert reward(**batch(TEXTS[2:3])) == [None]  # a server that refuses one text is not dead
    with pytest.raises(JudgeError, match="no connection"):
        reward_function("consistency", {"judge": "server", "url": f"http://127.0.0.1:{free_port()}/v1", "model": "x",
                                        "prompt": PROMPT, "max_retries": 0})(**batch(TEXTS))  # fmt: skip


@pytest.mark.parametrize("given", [{}, {"prompt": "consistency"}, {"prompt": "consistency.yaml"}, {"prompt": PROMPT}])
def test_the_shipped_prompt_is_found_from_any_folder(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with JudgeServer(lambda number, body: Reply()) as server:
        reward = reward_function("consistency", {"judge": "server", "url": server.url, "model": "m", **given})
        assert reward(**batch(TEXTS[:2])) == VALUES[:2]


def test_by_a_judge_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_consistency.py").write_text(documented("own judge"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    reward = reward_function("consistency", {"judge": "my_consistency:last_word", "concurrency": 2})
    assert reward(**batch(["<think>so B</think><answer>B</answer>", TEXTS[0]])) == [1, -1]


SERVED = {"judge": "server", "url": "http://x/v1", "model": "m", "prompt": PROMPT}


@pytest.mark.parametrize(
    "options, error, says",
    [
        ({"judge": "server"}, ConfigError, "judge: server with url and model"),
        ({"judge": "rules", "url": "x"}, ConfigError, "judge: rules with url"),
        ({"judge": "ruls"}, ConfigError, "judge: ruls with nothing"),
        ({"judge": "server", "url": "http://x/v1", "model": "m", "prompt": PROMPT, "retries": 1}, ConfigError, "retries"),
        ({"judge": "server", "url": "ftp://x", "model": "m", "prompt": PROMPT}, JudgeError, "judge URL"),
        (SERVED | {"url": 3}, JudgeError, "judge URL 3"),
        (SERVED | {"concurrency": "many"}, JudgeError, "concurrency: expected int, 1 or more; got 'many'"),
        (SERVED | {"timeout_s": float("nan")}, JudgeError, "timeout_s: expected float, 0 or more; got nan"),
        ({"judge": "json:dumps", "concurrency": 0}, JudgeError, "judge json:dumps: concurrency: .* got 0"),
        ({"judge": "server", "url": "http://x/v1", "model": "m", "prompt": "none.yaml"}, JudgePromptError, "none.yaml"),
    ],
)
def test_options_that_cannot_be_used_are_told_at_the_start(options, error, says):
    with pytest.raises(error, match=says):
        reward_functions(["accuracy", "consistency"], {"consistency": options})


def test_in_a_training_step(load, media_root, tmp_path, monkeypatch):
    model, encoder = load()
    rows = [{**row, "problem_type": "multiple choice", "solution": "B", "options": ["A. red", "B. blue"]}
            for row in video_rows(media_root, 1)]  # fmt: skip
    ids = [encoder.processor.tokenizer(text)["input_ids"] for text in (TEXTS[0], TEXTS[1])]
    with JudgeServer() as server:
        trainer = make_grpo_trainer(model, encoder, rows, tmp_path, max_completion_length=64)
        trainer.reward_funcs, trainer.reward_func_names = [by_server(server)], ["consistency_reward"]
        give_completions(trainer, ids, monkeypatch)
        trainer.train()
        assert server.requests == 2
    log = trainer.state.log_history[0]
    assert log["rewards/consistency_reward/mean"] == 0 and log["reward_std"] > 1 and log["consistency/unknown"] == 0
    trainer = make_grpo_trainer(model, encoder, rows, tmp_path, max_completion_length=64)
    trainer.reward_funcs, trainer.reward_func_names = [by_server(server, max_retries=0)], ["consistency_reward"]
    give_completions(trainer, ids, monkeypatch)
    with pytest.raises(JudgeError, match="no connection"):  # the server is gone: the run ends
        trainer.train()
