"""Accuracy, format, repetition and length of a rollout, by tables."""

import pytest

from veripo_trl.answers.rewards import accuracy_relative_error_reward, accuracy_reward
from veripo_trl.answers.score import SolutionError
from veripo_trl.tiny.model import build_tokenizer
from veripo_trl.verifier.checks import AccuracyError, check_rollouts, repetition_share

TEN = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize(
    "text, ngram, share",
    [
        ("", 10, 0.0),
        (TEN, 10, 0.0),  # one 10-gram cannot repeat
        (f"{TEN} eleven", 10, 0.0),
        (f"{TEN} {TEN}", 10, 1 / 11),  # 11 10-grams, the last is the first again
        (f"{TEN} " * 3, 10, 11 / 21),
        ("a b a b a b", 2, 3 / 5),  # ab ba ab ba ab
        ("a a a a", 1, 3 / 4),
        ("Red  red\nRED", 1, 2 / 3),  # case and white space aside
        ("看看看看", 1, 3 / 4),  # a script without spaces
        ("看 the 看", 1, 1 / 3),
        ("café café", 1, 1 / 2),
    ],
)
def test_repetition(text, ngram, share):
    assert repetition_share(text, ngram=ngram) == pytest.approx(share)


def test_repetition_of_a_loop_is_high_and_of_prose_low():
    assert repetition_share("and then the ball rolls to the left " * 40) > 0.9
    assert repetition_share(" ".join(f"the ball {i} rolls to {i * 7}" for i in range(60))) == 0.0


CHOICE = {"problem_type": "multiple choice", "solution": "B", "options": ["A. red", "B. blue"]}
NUMBER = {"problem_type": "regression", "solution": "10", "options": []}


@pytest.mark.parametrize(
    "completion, row, expected",
    [
        ("<think>blue: B.</think><answer>B</answer>", CHOICE, (True, 1.0, "blue: B.", "B")),
        ("<think>blue: B.</think>\n<answer>blue</answer>\n", CHOICE, (True, 1.0, "blue: B.", "blue")),
        ("<think>blue: B.</think><answer>A</answer>", CHOICE, (True, 0.0, "blue: B.", "A")),
        ("Well. <think>x</think><answer>B</answer>", CHOICE, (False, 1.0, "x", "B")),  # spans readable, form not
        ("<answer>B</answer>", CHOICE, (False, 1.0, None, "B")),
        ("<think>cut off in a", CHOICE, (False, 0.0, None, None)),
        ("<think>a</think><think>b</think><answer>B</answer>", CHOICE, (False, 1.0, None, "B")),
        ("<think>a</think><answer>A</answer><answer>B</answer>", CHOICE, (False, 0.0, "a", None)),
        ("<think>so 11.</think><answer>11</answer>", NUMBER, (True, 0.9, "so 11.", "11")),  # the graded score
    ],
)
def test_checks(completion, row, expected, tokenizer):
    (check,) = check_rollouts([{"rollout_id": "r", "completion": completion, **row}], tokenizer=tokenizer)
    assert (check["format_ok"], check["accuracy"], check["think"], check["answer"]) == expected
    assert check["think_tokens"] == len(tokenizer(expected[2] or "", add_special_tokens=False)["input_ids"])


def test_a_completion_cut_off_in_a_loop_is_repetitive(tokenizer):
    rollout = {"rollout_id": "r", "completion": "<think>" + "it goes left and then right " * 30, **CHOICE}
    (check,) = check_rollouts([rollout], tokenizer=tokenizer)
    assert check["repetition"] > 0.8 and check["think_tokens"] == 0


def test_a_truncation_saved_with_the_tokenizer_does_not_cap_the_length(tokenizer):
    rollout = {"rollout_id": "r", "completion": f"<think>{TEN}</think><answer>B</answer>", **CHOICE}
    (free,) = check_rollouts([rollout], tokenizer=tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    (capped,) = check_rollouts([rollout], tokenizer=tokenizer)
    tokenizer.backend_tokenizer.no_truncation()
    assert capped["think_tokens"] == free["think_tokens"] > 3


def test_the_graded_score_of_a_regression_is_the_rewards(tokenizer):
    rollout = {"rollout_id": "r", "completion": "<think>x</think><answer>11</answer>", **NUMBER}
    checks = check_rollouts([rollout], tokenizer=tokenizer, reward=accuracy_relative_error_reward)
    assert checks[0]["accuracy"] == pytest.approx(0.9)
    rollout["completion"] = "<think>x</think><answer>13</answer>"
    scores = [check_rollouts([rollout], tokenizer=tokenizer, reward=reward)[0]["accuracy"]
              for reward in (accuracy_reward, accuracy_relative_error_reward)]  # fmt: skip
    assert scores == pytest.approx([0.5, 0.7])


def test_an_unreadable_truth_names_the_rollout(tokenizer):
    rollout = {"rollout_id": "run/step3", "completion": "<think>x</think><answer>B</answer>", **CHOICE, "solution": "Z"}
    with pytest.raises(SolutionError, match="run/step3.*not among the options"):
        check_rollouts([rollout], tokenizer=tokenizer)


def test_accuracy_is_the_users_own_reward(tokenizer):
    """Called as TRL calls it: messages, and every column of the rollout."""

    def first_letter(completions, solution, question_id, **kwargs):
        return [float(c[0]["content"][0] == s) / int(q) for c, s, q in zip(completions, solution, question_id)]

    rollout = {"rollout_id": "r", "question_id": "2", "completion": "B it is", **CHOICE}
    (check,) = check_rollouts([rollout], tokenizer=tokenizer, reward=first_letter)
    assert check["accuracy"] == 0.5
    for wrong in (2.0, None):
        with pytest.raises(AccuracyError, match=f"rollout 'r': the reward .* gives {wrong}; .* a number from 0 to 1"):
            check_rollouts([rollout], tokenizer=tokenizer, reward=lambda completions, **kwargs: [wrong])
