"""Which solved questions the next iteration leaves out."""

import random

import pytest

from veripo_trl.verifier.curriculum import choose_solved


def accuracies(solved=50, mixed=30, unsolved=20):
    found = []
    for n in range(solved):
        found += [(f"solved{n}", step, 1.0) for step in (0, 1) for _ in range(4)]
    for n in range(mixed):
        found += [(f"mixed{n}", 0, accuracy) for accuracy in (1.0, 0.0, 1.0, 0.4)]
    for n in range(unsolved):
        found += [(f"unsolved{n}", 0, 0.0) for _ in range(4)]
    return found


def test_counts_and_share():
    result = choose_solved(accuracies(), share=0.8, seed=3)
    assert len(result["dropped"]) == 40 and all(name.startswith("solved") for name in result["dropped"])
    counts = {key: result[key] for key in ("kept", "solved", "mixed", "unsolved", "share", "seed", "groups")}
    assert counts == {"kept": 10, "solved": 50, "mixed": 30, "unsolved": 20, "share": 0.8, "seed": 3, "groups": 150}
    assert result["zero_variance"] == 120 / 150


@pytest.mark.parametrize(("share", "dropped"), [(0, 0), (0.5, 25), (1, 50)])
def test_other_shares(share, dropped):
    assert len(choose_solved(accuracies(), share=share)["dropped"]) == dropped


def test_order_does_not_matter_and_the_seed_does():
    shuffled = accuracies()
    random.Random(0).shuffle(shuffled)
    assert choose_solved(iter(shuffled), seed=1) == choose_solved(accuracies(), seed=1)
    assert choose_solved(accuracies(), seed=1)["dropped"] != choose_solved(accuracies(), seed=2)["dropped"]


def test_once_wrong_is_not_solved_and_graded_answers_count():
    rows = [("a", 0, 1.0), ("a", 0, 1.0), ("a", 1, 0.9), ("b", 0, 0.1), ("b", 0, 0.1), ("c", 0, 1.0)]
    result = choose_solved(rows, share=1)
    assert result["dropped"] == ["c"] and (result["mixed"], result["unsolved"]) == (2, 0)
    assert (result["groups"], result["zero_variance"]) == (2, 1.0)  # of one rollout there is no variance


def test_nothing_and_a_wrong_share():
    assert choose_solved([])["zero_variance"] is None
    with pytest.raises(ValueError, match="drop_solved_share"):
        choose_solved([], share=80)
