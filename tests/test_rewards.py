"""The reward functions as TRL calls them: columns of a batch in, one float per completion out."""

import sys

import pytest
from helpers import documented

from veripo_trl.answers.rewards import (
    REWARDS,
    accuracy_relative_error_reward,
    accuracy_reward,
    format_reward,
    reward_function,
)
from veripo_trl.answers.score import SolutionError
from veripo_trl.errors import ConfigError

GOOD = "<think>t</think><answer>{}</answer>"


def message(text):
    return [{"role": "assistant", "content": text}]


BATCH = [  # answer, solution, problem type, options, accuracy
    ("B", "B", "multiple choice", ["A. red", "B. blue"], 1.0),
    ("A or B", "B", "multiple choice", ["A. red", "B. blue"], 0.0),
    ("3 apples", "3", "numerical", [], 1.0),
    ("11", "10", "regression", [], 0.9),
    ("1/2", "0.5", "math", [], 1.0),
    ("red", "red blue", "OCR", [], 0.5),
    ("a man runs", "a man runs", "free-form", [], 1.0),
]


@pytest.mark.parametrize("wrap", [str, message], ids=["plain", "conversational"])
def test_each_row_is_scored_by_its_own_type(wrap):
    answers, solution, problem_type, options, expected = (list(column) for column in zip(*BATCH, strict=True))
    completions = [wrap(GOOD.format(answer)) for answer in answers]
    columns = {"solution": solution, "problem_type": problem_type, "options": options}
    # TRL passes the other columns and its state along
    scores = accuracy_reward(completions=completions, prompts=completions, trainer_state=None, videos=[[]], **columns)
    assert scores == pytest.approx(expected)
    assert format_reward(completions=completions, prompts=completions, trainer_state=None, **columns) == [0.5] * 7


@pytest.mark.parametrize(
    "text, accuracy, form",
    [
        ("<think>t</think><answer>B</answer>", 1.0, 0.5),
        (" <think>t</think>\n<answer>\nB\n</answer>\n", 1.0, 0.5),
        ("words <answer>B</answer> words", 1.0, 0.0),
        ("<think>t</think>B", 0.0, 0.0),
        ("<think>t</think><answer>B</answer><answer>B</answer>", 0.0, 0.0),
        ("<think>t</think><answer>A</answer>", 0.0, 0.5),
        ("<think>t</think><answer></answer>", 0.0, 0.5),
        ("", 0.0, 0.0),
    ],
)
def test_accuracy_and_format(text, accuracy, form):
    columns = {"solution": ["B"], "problem_type": ["multiple choice"]}
    assert accuracy_reward([message(text)], options=[["A. x", "B. y"]], **columns) == [accuracy]
    assert accuracy_reward([text], options=None, **columns) == [accuracy]
    assert format_reward([message(text)], **columns) == [form]


def test_relative_error_is_another_reward():
    columns = {"solution": ["10"], "problem_type": ["regression"], "options": [[]]}
    assert accuracy_relative_error_reward([GOOD.format("10.4")], **columns) == pytest.approx([0.96])
    assert accuracy_reward([GOOD.format("10.4")], **columns) == pytest.approx([1.0])


def test_broken_is_not_wrong():
    with pytest.raises(SolutionError, match="unknown"):
        accuracy_reward([GOOD.format("B")], ["B"], ["poem"], [[]])
    with pytest.raises(SolutionError):
        accuracy_reward([GOOD.format("3")], ["many"], ["numerical"], [[]])
    with pytest.raises(ValueError, match="shorter|longer"):
        accuracy_reward([GOOD.format("3")] * 2, ["3"], ["numerical"], [[]])
    with pytest.raises(TypeError, match="one assistant message"):
        format_reward([message("a") + message("b")])
    with pytest.raises(TypeError, match="one assistant message"):
        format_reward([[{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]])


def test_names_are_the_metrics_names():
    assert {name: function.__name__ for name, function in REWARDS.items()} == {
        "accuracy": "accuracy_reward",
        "accuracy_relative_error": "accuracy_relative_error_reward",
        "format": "format_reward",
    }


def test_a_reward_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        documented("own reward") + "\nSCALE = 10\n"
    )
    (tmp_path / "json.py").write_text("raise RuntimeError('this file hides an installed module')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    brevity = reward_function("my_rewards:brevity")
    assert brevity(completions=["a", "b"], completion_ids=[[1], [1] * 256], solution=["B"] * 2) == [1.0, 0.0]
    assert brevity.__name__ == "brevity"
    assert reward_function("json:dumps")([1]) == "[1]"
    assert reward_function("accuracy") is accuracy_reward
    for name, says in (
        ("acuracy", "expected some of accuracy"),
        ("my_rewards:brevty", "no attribute 'brevty'"),
        ("nowhere:brevity", "No module named 'nowhere'"),
        ("my_rewards:SCALE", "expected a function, it is a int"),
    ):
        with pytest.raises(ConfigError, match=says):
            reward_function(name)
