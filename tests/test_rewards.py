"""The reward functions as TRL calls them: columns of a batch in, one float per completion out."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import documented, give_completions, make_grpo_trainer, video_rows

from veripo_trl.answers.rewards import (
    ACCURACIES,
    MAKERS,
    REWARDS,
    accuracy_relative_error_reward,
    accuracy_reward,
    check_reward_truths,
    format_reward,
    reward_function,
    reward_functions,
)
from veripo_trl.answers.score import SolutionError
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.errors import ConfigError
from veripo_trl.report.read import accuracy_name
from veripo_trl.trainers.grpo import VideoGRPOTrainer

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
    made = {name: reward_function(name) for name in (*REWARDS, *MAKERS)}
    assert set(ACCURACIES) <= made.keys()
    assert {name: function.__name__ for name, function in made.items()} == {name: f"{name}_reward" for name in made}


@pytest.mark.parametrize(
    "names, accuracy",
    [
        (["format_reward", "accuracy_reward"], "accuracy_reward"),
        (["accuracy_soft_reward", "accuracy_reward", "tiou_reward"], "accuracy_reward"),
        (["accuracy_absolute_range_reward", "structured_format_reward"], "accuracy_absolute_range_reward"),
        (["yes_no_first_reward", "format_reward"], "yes_no_first_reward"),
        (["yes_no_first"], "yes_no_first"),
        (["tiou_reward", "format_reward"], None),
    ],
)
def test_which_reward_a_report_shows_as_the_accuracy(names, accuracy):
    assert accuracy_name(names) == accuracy


# --------------------------------------------------------------------------------------------- the relatives' rewards

RELATIVES = [  # problem type, solution, answer; then what each reward gives
    ("temporal grounding", "4 to 12 of 20", "6 to 10", {"accuracy": 0.5, "tiou": 0.5, "tiou_time_r1": 0.405}),
    ("object and time", "2; 5 to 11", "2; 8 to 14", {"accuracy": 2 / 3, "tiou": 1 / 3, "object_id": 1}),
    ("object and time", "2; 5 to 11", "2; 12 to 15", {"accuracy": 0.5, "tiou": 0, "object_id": 1}),
    ("grounded choice", "B; 5 to 11", "B; 8 to 14", {"accuracy": 2 / 3, "grounded_letter": 1, "grounded_tiou": 1 / 3}),
    ("box grounding", "[100, 100, 300, 300]", "[150,150,250,250]", {"accuracy": 0.25, "box_iou": 0.25}),
    ("yes/no", "yes", "Yes, it falls.", {"accuracy": 1}),
    ("multiple choice", "A,C", "C", {"accuracy": 0, "accuracy_soft": 0.5}),
    ("multiple choice", "B", "B", {"accuracy": 1}),
    ("numerical", "3", "3", {"accuracy": 1}),
    ("free-form", "Yes, it does", "Yes.", {"accuracy": pytest.approx(0.5 / 3, abs=0.3), "yes_no_first": 1}),
    ("free-form", "No", "The answer is no", {"accuracy": pytest.approx(0.2, abs=0.2), "yes_no_first": 0}),
    ("free-form", "No", "Not sure", {"accuracy": 0, "yes_no_first": 0}),
    ("free-form", "A ball", "A ball", {"accuracy": 1, "yes_no_first": 1}),
    ("regression", "50", "40%", {"accuracy": 0.6, "accuracy_relative_error": 0.8, "accuracy_absolute_range": 0.9,
                                 "exponential_error": 1.5 * math.exp(-1)}),
    ("regression", "50", "many", {"accuracy": 0, "accuracy_absolute_range": 0, "exponential_error": 0}),
]  # fmt: skip
ACCURATE = {"accuracy_relative_error", "accuracy_soft", "accuracy_absolute_range", "yes_no_first"}


OF_ANSWERS = [name for name in (*REWARDS, *MAKERS) if "format" not in name and name != "consistency"]


@pytest.mark.parametrize("reward", OF_ANSWERS)
def test_each_reward_of_a_mixed_batch(reward):
    """An accuracy gives every row its own type's; what is of some types is None for the others, which TRL leaves out."""
    kinds, solutions, answers, _ = zip(*RELATIVES, strict=True)
    found = reward_function(reward)(
        completions=[message(GOOD.format(answer)) for answer in answers], solution=solutions, problem_type=kinds,
        options=[["A. x", "B. y", "C. z"] if "choice" in kind else [] for kind in kinds], completion_ids=None,
    )  # fmt: skip
    for (*row, given), score in zip(RELATIVES, found, strict=True):
        expected = given.get(reward, given["accuracy"] if reward in ACCURATE else None)
        assert score == (expected if expected is None else pytest.approx(expected)), (reward, row)


@pytest.mark.parametrize(
    "answer, truth, max_range, value",
    [
        ("50", "50", 100, 1), ("40", "50", 100, 0.9), ("51.5", "50", 100, 0.985), ("50", "0", 100, 0.5),
        ("100", "0", 100, 0), ("-10", "50", 100, 0.4), ("200", "50", 100, 0), ("soon", "50", 100, 0),
        (".3", ".5", 1, 0.8), ("50%", "50", 100, 1), ("50%", "1", 100, 0.51),  # .505 and .995 there: a % is a hundredth
        ("45", "50", 100, 0.95), ("90", "50", 100, 0.6),
    ],
)  # fmt: skip
def test_absolute_range(answer, truth, max_range, value):
    reward = reward_function("accuracy_absolute_range", {"max_range": max_range})
    assert reward([GOOD.format(answer)], [truth], ["regression"]) == pytest.approx([value])


@pytest.mark.parametrize("answer, value", [("40", 0.8), ("5 of", 0), ("0", 1)])
def test_the_relative_kind(answer, value):
    """At a truth of 0, PRIMO's and Video-R1's code gives 0 even to the answer 0; ours 1."""
    truth = "0" if answer == "0" else "50" if answer == "40" else "1"
    assert accuracy_relative_error_reward([GOOD.format(answer)], [truth], ["regression"]) == pytest.approx([value])


@pytest.mark.parametrize(
    "answer, truth, options, total",
    [
        ("30", "30", {}, 2.5), ("40", "30", {}, 1.5518), ("50", "30", {}, 1.2030), ("-10", "30", {}, 1.0275),
        ("35", "30", {"tau": 20}, 2.1682), ("about a fifth", "30", {}, 1), ("45%", "45", {}, 2.5),
        ("45", "45", {"scale": 1}, 2),
    ],
)  # fmt: skip
def test_exponential_error_beside_a_format_of_one(answer, truth, options, total):
    row = [GOOD.format(answer)], [truth], ["regression"]
    score = reward_function("exponential_error", options)(*row)[0] + 2 * format_reward(row[0])[0]
    assert score == pytest.approx(total, abs=1e-4)


def test_an_object_must_be_there_in_time_if_asked_for():
    row = [GOOD.format("2; 12 to 15")], ["2; 5 to 11"], ["object and time"]
    assert reward_function("object_id")(*row) == [1]
    assert reward_function("object_id", {"needs_overlap": True})(*row) == [0]


def test_segments_are_held_against_their_own_rows_duration():
    trace = "<time>00:06-00:12</time><caption>c</caption><think>t</think><answer>A</answer>"
    columns = {"solution": ["1 to 2 of 8", "1 to 2 of 5", "1 of 5"], "problem_type": ["temporal grounding"] * 2 + ["OCR"]}
    assert REWARDS["segments_format"]([message(trace)] * 3, **columns) == [1, 0, 1]
    sections = "<think><plan>p</plan><why>w</why></think><answer>A</answer>"
    assert reward_function("structured_format", {"sections": ["plan", "why"]})([sections, GOOD]) == [1, 0]
    assert reward_function("structured_format")([sections]) == [0]


def test_trls_rewards_by_their_makers():
    """Every maker that TRL 1.16 has: with options, `module:function` is called for the reward."""
    ids = {"completion_ids": [[1] * 90, [1] * 10]}
    overlong, repetition, cosine = reward_functions(
        ["trl.rewards:get_soft_overlong_punishment", "trl.rewards:get_repetition_penalty_reward",
         "trl.rewards:get_cosine_scaled_reward"],
        {"trl.rewards:get_soft_overlong_punishment": {"max_completion_len": 100, "soft_punish_cache": 20},
         "trl.rewards:get_repetition_penalty_reward": {}, "trl.rewards:get_cosine_scaled_reward": {"max_len": 100}},
    )  # fmt: skip
    assert overlong(completions=["a", "b"], **ids) == [-0.5, 0]
    assert repetition(completions=["a", "b"], **ids)[0] < -0.9
    names = [function.__name__ for function in (overlong, repetition, cosine)]
    assert names == ["soft_overlong_punishment_reward", "repetition_penalty_reward", "cosine_scaled_reward"]
    think = reward_function("trl.rewards:think_format_reward")  # without an entry it is the reward itself
    assert think(completions=[message("<think>t</think>A"), message("A")]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "names, options, says",
    [
        (["exponential_error"], {"exponential_error": {"tau": 0}}, "tau: expected a number over 0; got 0"),
        (["exponential_error"], {"exponential_error": {"tou": 1}}, "exponential_error: .*unexpected keyword.*tou"),
        (["accuracy_absolute_range"], {"accuracy_absolute_range": {"max_range": "x"}}, "max_range: expected a number"),
        (["structured_format"], {"structured_format": {"sections": "plan"}}, "sections: expected a list"),
        (["accuracy"], {"accuracy": {"tau": 1}}, "accuracy has no options; those that do are consistency, accuracy_ab"),
        (["accuracy"], {"exponential_error": {}}, "exponential_error: not among rewards"),
        (["accuracy"], {"accuracy": 3}, "expected {"),
        (["accuracy"], [], "expected {"),
        (["trl.rewards:get_soft_overlong_punishment"], {"trl.rewards:get_soft_overlong_punishment": {}}, "missing 2"),
        (["json:dumps"], {"json:dumps": {"obj": 1}}, "expected it to return a function with a name"),
    ],
)
def test_options_that_cannot_be_used(names, options, says):
    with pytest.raises(ConfigError, match=says):
        reward_functions(names, options)


def test_a_truth_without_a_duration_is_told_before_training():
    kinds = ["multiple choice", "temporal grounding"]
    rows = {"question_id": ["a", "b"], "solution": ["B", "5 to 11"], "problem_type": kinds}
    check_reward_truths(["accuracy", "tiou"], rows)
    with pytest.raises(SolutionError, match="question_id 'b'.*needs the clip's duration"):
        check_reward_truths(["accuracy", "tiou_time_r1"], rows)


@pytest.mark.parametrize(
    "names, says",
    [
        (["accuracy", "tiou", "box_iou"], "box_iou: of the rows' problem types .multiple choice, temporal.* scores none"),
        (["tiou", "format"], "tiou score no multiple choice, of which there are rows.*Add `accuracy`"),
        (["tiou", "consistency"], "tiou score no multiple choice"),
        (["tiou", "accuracy"], None),
        (["tiou", "format", "my_rewards:brevity"], None),  # what that scores is not known
        (["format"], None),
        (["consistency", "segments_format"], None),
        (["accuracy_soft", "exponential_error"], "exponential_error: of the rows'"),
    ],
)
def test_rows_that_no_reward_scores_are_told_before_training(names, says):
    """TRL would log a mean of NaN, or train such rows by their form alone."""
    kinds = ["multiple choice", "temporal grounding"]
    rows = {"question_id": ["a", "b"], "solution": ["B", "5 to 11"], "problem_type": kinds}
    if says is None:
        return check_reward_truths(names, rows)
    with pytest.raises(ConfigError, match=says):
        check_reward_truths(names, rows)


def test_a_mixed_batch_in_a_training_step(load, media_root, tmp_path, monkeypatch, caplog):
    """A row that a reward says nothing of is neither in its mean nor in the row's sum; what none scores moves nothing. A
    reward that says nothing of any row is named."""
    model, encoder = load()
    kinds = [("temporal grounding", "5 to 11"), ("grounded choice", "B; 5 to 11"), ("yes/no", "yes")]
    rows = [{**row, "problem_type": kind, "solution": truth, "options": []}
            for row, (kind, truth) in zip(video_rows(media_root, 3), kinds, strict=True)]  # fmt: skip
    answers = ["5 to 11", "8 to 14", "B; 5 to 11", "A; 5 to 11", "yes", "no"]
    ids = [encoder.processor.tokenizer(GOOD.format(answer))["input_ids"] for answer in answers]
    trainer = make_grpo_trainer(model, encoder, rows, tmp_path, max_completion_length=64)
    names = ["tiou", "grounded_letter", "box_iou"]
    trainer.reward_funcs, trainer.reward_func_names = reward_functions(names, None), [f"{name}_reward" for name in names]
    trainer.reward_weights = trainer.reward_weights.new_ones(3)
    trainer.reward_processing_classes = [None] * 3
    trainer.rollout_store = RolloutStore(tmp_path / "rollouts")
    give_completions(trainer, ids, monkeypatch)
    trainer.train()
    assert caplog.text.count("rewards: box_iou_reward gave None or NaN for every rollout of the first 1") == 1
    log = trainer.state.log_history[0]
    assert log["rewards/tiou_reward/mean"] == pytest.approx(2 / 3) and log["rewards/grounded_letter_reward/mean"] == 0.5
    assert log["reward"] == pytest.approx((1 + 1 / 3 + 1 + 0) / 4) and math.isfinite(log["train_loss"])
    stored = {row["completion"].split("<answer>")[1].split("<")[0]: row for row in trainer.rollout_store.read()}
    given = {answer: stored[answer]["rewards"] for answer in answers}
    assert given["5 to 11"] == {"tiou_reward": 1, "grounded_letter_reward": None, "box_iou_reward": None}
    assert given["A; 5 to 11"] == {"tiou_reward": None, "grounded_letter_reward": 0, "box_iou_reward": None}
    assert set(given["yes"].values()) == {None}
    signs = [stored[answer]["advantage"] for answer in answers]
    assert signs[0] > 0 > signs[1] and signs[2] > 0 > signs[3] and signs[4:] == [0, 0]


# What two rewards give for every rollout, by generation batch, in runs of so many steps; after which batch one is named.
NAMED = {
    "at the end of a short run": ([(0, None), (0, None)], 2, 1),
    "in a long run": ([(0, None)] * 12, 12, 9),
    "no longer: it has scored": ([(0, None), (0, 1), (0, None)], 3, None),
    "no: TRL has warned of each row": ([(None, None)] * 2, 2, None),
}


@pytest.mark.parametrize("name", NAMED)
def test_when_a_reward_that_scores_nothing_is_named(name, caplog):
    batches, steps, named = NAMED[name]
    trainer = SimpleNamespace(
        _heard=[], args=SimpleNamespace(steps_per_generation=2, gradient_accumulation_steps=2), num_iterations=1,
        accelerator=SimpleNamespace(is_main_process=True), reward_func_names=["mine", "other"],
        state=SimpleNamespace(max_steps=steps),
    )  # fmt: skip
    said = []
    for trainer.state.global_step, values in enumerate(batches):
        values = [math.nan if value is None else value for value in values]
        trainer._scored = {"rewards": torch.tensor([values] * 4)}
        VideoGRPOTrainer._name_silent_rewards(trainer)
        said.append(caplog.text.count("gave None or NaN"))
    assert said == [int(named is not None and batch >= named) for batch in range(len(batches))]


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
