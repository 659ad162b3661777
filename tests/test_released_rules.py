"""Where our scores differ from the released rules, there is a stated reason; where there is none, they are equal."""

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "evaluation" / "studies"))

import released_rules  # noqa: E402


def test_every_difference_has_its_reason():
    rows = released_rules.compare()
    assert {row["rule"] for row in rows} == {rule.name for rule in released_rules.RULES}
    for row in rows:
        assert row["answers"] > 20 and bool(row["differ"]) == bool(row["reason"]), row


@pytest.mark.parametrize(
    "rule, completion, theirs, ours",
    [
        ("TimeZero", "<answer>6 to 10</answer>", 0.5, 0.5),
        ("TimeZero", "<answer>00:06 to 00:10</answer>", 0, 0.5),
        ("Time-R1", "<answer>0 to 30</answer>", 0.2667 * 0.8 * 0.1, 0.2667 * 0.8 * 0.1),
        ("VideoChat-R1", "<answer>Answer: B</answer>", 0, 1),
        ("STVG-R1", "<answer>target id: 2; time range: 4 and 12</answer>", 1, 1),
        ("TW-GRPO", "<answer>C, A</answer>", 1, 1),
        ("TW-GRPO", "<answer>A and C</answer>", 0, 1),
        ("absolute range", "<answer>50%</answer>", 0.505, 1),
    ],
)
def test_the_rules_give_the_worked_pairs(rule, completion, theirs, ours):
    (found,) = (each for each in released_rules.RULES if rule in each.name)
    assert (found.theirs(completion), found.ours(completion)) == pytest.approx((theirs, ours), abs=1e-4)


def test_a_group_gets_its_first_rollouts_reward_there():
    wrong, silent = released_rules.yes_no_groups(800, random.Random(0))
    assert 300 < wrong < 500 and silent > 700
