"""Each problem type through the whole chain, without a model: row → prompt → SFT target → completion → reward → verdict →
pairs → evaluation tables."""

import json
from collections import Counter

import pytest

from veripo_trl.answers.rewards import accuracy_reward
from veripo_trl.answers.score import PROBLEM_TYPES, is_well_formed
from veripo_trl.data.prompts import build_messages, build_target, load_template
from veripo_trl.data.rows import load_rows
from veripo_trl.evaluate.generate import summarize
from veripo_trl.evaluate.scores import lines_of, score_predictions
from veripo_trl.report.read import table_of
from veripo_trl.tiny.model import build_tokenizer
from veripo_trl.verifier.judges import RulesJudge, judge_by_rules
from veripo_trl.verifier.pairs import PairOptions, build_pairs
from veripo_trl.verifier.verify import verify_stream

CHAIN = {  # type: (solution, options, what the prompt says, a right answer, a wrong one, the metrics of both's mean)
    "multiple choice": ("B", ["A. red", "B. blue"], "letter of the right option", "B", "A", {}),
    "numerical": ("3", [], "one number, written in digits", "3", "5", {}),
    "regression": ("50", [], "best estimate", "50", "10", {"MAE": 20}),
    "math": ("\\frac{1}{2}", [], "in LaTeX", "0.5", "2", {}),
    "OCR": ("STOP", [], "exactly as it can be read", "STOP", "EXIT", {}),
    "free-form": ("red blue green", [], "a short text", "red blue green", "a dog that sleeps",
                  {"ROUGE": 0.5}),
    "temporal grounding": ("5.0 to 11.0 of 20.0", [], "start and the end in seconds", "5 to 11", "12 to 15",
                           {"mIoU": 0.5, "R@.3": 0.5, "R@.5": 0.5, "R@.7": 0.5}),
    "grounded choice": ("B; 5.0 to 11.0", ["A. red", "B. blue"], "like B; 12.5 to 17.8", "B; 5 to 11", "A; 12 to 15",
                        {"letter accuracy": 0.5, "mIoU": 0.5}),
    "object and time": ("2; 5.0 to 11.0 of 20.0", [], "number of the object", "Target ID: 2, Time range: 5 to 11",
                        "Target ID: 1, Time range: 12 to 15",
                        {"ID accuracy": 0.5, "m_tIoU": 0.5, "R@.3": 0.5, "R@.5": 0.5}),
    "box grounding": ("[100, 100, 300, 300]", [], "one JSON object", '{"bbox_2d": [100, 100, 300, 300]}',
                      '{"bbox_2d": [600, 600, 900, 900]}', {"mean IoU": 0.5, "IoU ≥ .25": 0.5, "IoU ≥ .5": 0.5}),
    "yes/no": ("yes", [], "yes or no", "yes", "no", {}),
    "thought": ("red blue green", [], "one part of a longer video", "red blue green", "a dog that sleeps", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def completion(number: int, concluded: str, answer: str) -> str:
    """Long enough for a pair, and each other than the rest."""
    return f"<think>I look at it {number} times, so the answer is {concluded}.</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_a_type_through_the_chain(problem_type, tokenizer, tmp_path):
    solution, options, instruction, right, wrong, metrics = CHAIN[problem_type]
    template = load_template("default")
    row = {"question_id": "q1", "problem": "What is asked?", "options": options, "problem_type": problem_type,
           "solution": solution, "process": "I see it."}  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    dataset = load_rows([{"path": str(tmp_path / "rows.jsonl")}])
    (message,) = build_messages(dataset[0], template)
    assert instruction in message["content"][-1]["text"]
    target = build_target(dataset[0], template)
    if problem_type == "thought":  # nothing is asked: what is taught has no answer, and is not judged
        assert target == "I see it." and "<answer>" not in message["content"][-1]["text"]
        return
    assert is_well_formed(target) and " of 20" not in target

    columns = {"solution": [solution] * 3, "problem_type": [problem_type] * 3, "options": [options] * 3}
    texts = [completion(0, right, right), completion(1, wrong, wrong), completion(2, wrong, right)]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = accuracy_reward(completions=messages, **columns)
    assert rewards == [1.0, pytest.approx(rewards[1]), 1.0] and rewards[1] < 0.5
    assert accuracy_reward(completions=[target], **{key: value[:1] for key, value in columns.items()}) == [1.0]

    rollouts = [
        {**dataset[0], "rollout_id": f"r{place}", "completion": text, "finish_reason": "stop", "step": 0,
         "prompt_template": template.hash, "policy": "p"} for place, text in enumerate(texts)
    ]  # fmt: skip
    verdicts = list(verify_stream(rollouts, judge=RulesJudge(), tokenizer=tokenizer))
    assert [verdict["accuracy"] for verdict in verdicts] == rewards
    # that a text says something else in other words is beyond the rules
    other = "unknown" if problem_type == "free-form" else "inconsistent"
    assert [verdict["consistency"] for verdict in verdicts] == ["consistent", "consistent", other]

    rollouts = [{**rollout, "perturbed": False} for rollout in rollouts]
    judged = [{**rollout, "verdict": verdict} for rollout, verdict in zip(rollouts, verdicts, strict=True)]
    pairs = build_pairs([judged], PairOptions(), template=template, dropped=Counter())
    found = {pair["kind"]: (pair["chosen_ids"], pair["rejected_id"]) for pair in pairs}
    assert found["penalty"] == (["r0"], "r1") and found["reflection"] == (["r1", "r0"], "r1")
    assert found.get("consistency") == (None if other == "unknown" else (["r0"], "r2"))

    answers = [{"row": 0, "completion": text, "think_tokens": 9, "completion_tokens": 12, "finish_reason": "stop"}
               for text in texts[:2]]  # fmt: skip
    verdicts = [judge_by_rules(text, problem_type=problem_type, options=row["options"]) for text in texts[:2]]
    summary = summarize(answers, dataset, verdicts=verdicts)
    assert summary["accuracy"] == pytest.approx((1 + rewards[1]) / 2)
    expected = {f"{name}: {problem_type}": value for name, value in metrics.items()}
    own = [key for key in summary if ": " in key and not key.startswith("accuracy: ")]
    assert {key: summary[key] for key in own} == pytest.approx(expected)

    predictions = [{"question": row, "ground_truth": solution, "model_output": text, "made": None} for text in texts[:2]]
    scored = score_predictions(predictions, pred_path="x.json", benchmark_of=lambda row: ("tests", {}))
    assert [each["readable"] for each in scored] == [True, True]
    (line,) = table_of(lines_of(scored))
    shown = {name if "MAE" in name else f"{name} %": f"{value if 'MAE' in name else 100 * value:.1f}"
             for name, value in expected.items()}  # fmt: skip
    assert line["ours %"] == f"{100 * summary['accuracy']:.1f}" and shown.items() <= line.items()


def test_an_answer_that_is_near_the_conclusion_is_no_contradiction():
    """A span or a box that is rounded otherwise: the rules prefer unknown to a guess."""
    for problem_type, options, concluded, answer, verdict in (
        ("temporal grounding", None, "5.0 to 11.0", "5.4 to 11.2", "unknown"),
        ("temporal grounding", None, "5.0 to 11.0", "5.1 to 11.0", "consistent"),
        ("temporal grounding", None, "5.0 to 11.0", "9 to 20", "inconsistent"),
        ("temporal grounding", None, "5.0 to 5.0", "9 to 20", "unknown"),
        ("grounded choice", ["A. x", "B. y"], "B; 5 to 11", "A; 5 to 11", "inconsistent"),
        ("object and time", None, "object 2 from 5 to 11 seconds", "2; 5 to 10", "unknown"),
        ("object and time", None, "2; 5 to 11", "1; 5 to 11", "inconsistent"),
        ("box grounding", None, "[100, 100, 300, 300]", "[100, 100, 300, 340]", "unknown"),
        ("box grounding", None, "[300, 300, 100, 100]", "[100, 100, 300, 340]", "unknown"),
        ("yes/no", None, "yes", "No, it stays", "inconsistent"),
    ):
        text = completion(0, concluded, answer)
        assert judge_by_rules(text, problem_type=problem_type, options=options) == verdict, (concluded, answer)
