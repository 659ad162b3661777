"""Generation for evaluation, and what its summary says."""

import math
import os
import signal

import numpy as np
import pytest
from torch.utils.data import get_worker_info

from conftest import make_row
from veripo_trl.answers.score import score_name
from veripo_trl.data.schema import rows_to_dataset
from veripo_trl.evaluate.generate import bootstrap_interval, generate, summarize, task_of
from veripo_trl.verifier.judges import judge_by_rules


def answer(row, completion, **changes):
    return {
        "row": row, "question_id": f"q{row}", "completion": completion, "completion_tokens": 20, "think_tokens": 10,
        "finish_reason": "stop", **changes,
    }  # fmt: skip


def rows(count, **changes):
    return rows_to_dataset([make_row(f"q{place}", "", **changes) for place in range(count)])


def verdicts_of(answers, dataset) -> list[str]:
    return [judge_by_rules(each["completion"], **task_of(dataset[each["row"]])) for each in answers]


def test_summary_counts_by_its_definitions():
    good = "<think>First is blue, so the answer is B.</think><answer>B</answer>"
    inconsistent = "<think>First is red, so the answer is A.</think><answer>B</answer>"
    wrong = "<think>First is red, so the answer is A.</think><answer>A</answer>"
    unknown = "<think>Hm.</think><answer>B</answer>"
    broken = "no tags at all"
    answers = [answer(place, text) for place, text in enumerate([good, inconsistent, wrong, unknown, broken])]
    answers[4]["finish_reason"] = "length"
    verdicts = ["consistent", "inconsistent", "consistent", "unknown", "unknown"]
    assert verdicts_of(answers, rows(5)) == verdicts
    summary = summarize(answers, rows(5), verdicts=verdicts, second=["consistent", "consistent", *verdicts[2:]])
    # four of five; by chance 2/5 · 3/5 + 1/5 · 0 + 2/5 · 2/5
    assert summary["disagreement"] == pytest.approx(1 / 5) and summary["kappa"] == pytest.approx((0.8 - 0.4) / 0.6)
    assert summary["accuracy"] == pytest.approx(3 / 5)
    assert summary["format"] == pytest.approx(4 / 5)
    assert summary["inconsistency"] == pytest.approx(1 / 3)  # of the three whose verdict is known
    assert summary["unknown"] == pytest.approx(2 / 5)
    assert summary["accurate_and_consistent"] == pytest.approx(1 / 5)
    assert summary["truncated"] == pytest.approx(1 / 5)
    assert (summary["questions"], summary["completions"]) == (5, 5)
    assert summary["accuracy: multiple choice"] == pytest.approx(3 / 5)


def test_no_known_verdict_is_no_number():
    summary = summarize([answer(0, "nothing")], rows(1), verdicts=["unknown"])
    assert math.isnan(summary["inconsistency"]) and summary["unknown"] == 1.0


def test_nothing_to_summarize_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        summarize([], rows(1), verdicts=[])


def test_free_text_has_no_accuracy_but_rouge():
    texts = ["<think>x</think><answer>red blue</answer>", "<think>x</think><answer>green</answer>", "none"]
    free = rows(3, problem_type="free-form", options=[], solution="red blue")
    summary = summarize([answer(n, text) for n, text in enumerate(texts)], free, verdicts=["unknown"] * 3)
    assert summary["ROUGE: free-form"] == pytest.approx(1 / 3) and "accuracy: free-form" not in summary
    assert score_name(summary) == "ROUGE" and score_name([*summary, "accuracy: numerical"]) == "accuracy"


def test_interval_is_over_questions():
    """Ten equal answers per question say no more than one: the interval stays as wide."""
    scores = np.random.default_rng(0).integers(0, 2, size=100).astype(float)
    once = bootstrap_interval(scores, np.arange(100))
    often = bootstrap_interval(np.repeat(scores, 10), np.repeat(np.arange(100), 10))
    assert once == pytest.approx(often)
    half_width = (once[1] - once[0]) / 2
    assert half_width == pytest.approx(1.96 * scores.std() / 10, rel=0.15)


def test_generate_is_seeded_ordered_and_leaves_the_model_as_it_was(load, mixed_rows):
    import torch

    model, encoder = load()
    model.train()
    dataset = rows_to_dataset(mixed_rows)
    options = {"samples": 2, "temperature": 1.0, "max_new_tokens": 6, "batch_size": 2}
    state = torch.get_rng_state()
    first = generate(model, encoder, dataset, seed=1, **options)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert [item["row"] for item in first] == [place for place in range(5) for _ in range(2)]
    assert generate(model, encoder, dataset, seed=1, **options) == first
    assert generate(model, encoder, dataset, seed=2, **options) != first
    greedy = [generate(model, encoder, dataset, max_new_tokens=6, batch_size=size) for size in (1, 5)]
    assert greedy[0] == greedy[1]  # padding and company change nothing
    # in training SIGTERM comes to the loader's workers too, while the trainer still goes on to the end of its step
    assert generate(model, encoder, Terminated(dataset), num_workers=1, seed=1, **options) == first


class Terminated:
    """Rows whose reader, if it is a loader's worker, gets a SIGTERM."""

    def __init__(self, dataset):
        self.dataset, self.sent = dataset, False

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, place):
        if get_worker_info() is not None and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        return self.dataset[place]
