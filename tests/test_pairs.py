"""Judged rollouts to preference pairs: a table of groups with the pairs they must give, read one by one."""

import itertools
import random
import tracemalloc
from collections import Counter
from dataclasses import replace

import pytest

from veripo_trl.answers.score import is_well_formed, split_completion
from veripo_trl.data.prompts import build_messages, load_template
from veripo_trl.data.schema import RowError
from veripo_trl.verifier import pairs as pairs_module
from veripo_trl.verifier.judges import judge_by_rules
from veripo_trl.verifier.pairs import RECHECK, PairOptions, join_for_reflection

TEMPLATE = load_template("tiny")
KINDS = PairOptions().kinds  # of rollouts on the true videos; the others are in test_perturb.py


def build_pairs(*arguments, **options):
    pairs = list(pairs_module.build_pairs(*arguments, **options, dropped=(dropped := Counter())))
    return pairs, dropped


QUESTION = {
    "question_id": "q1",
    "problem": "Which colour is first?",
    "options": ["A. red", "B. blue", "C. green", "D. yellow"],
    "problem_type": "multiple choice",
    "solution": "B",
    "videos": ["clips/1.mp4"],
    "images": [],
    "data_source": "test",
    "policy": "outputs/policy",
    "prompt_template": TEMPLATE.hash,
    "perturbed": False,
}


def rollout(name, accuracy, consistency="consistent", *, tokens=20, repetition=0.0, well_formed=True, finish="stop",
            step=0, text=None, **question):  # fmt: skip
    """A judged rollout: right and consistent unless told otherwise; its text says its name."""
    answer = "B" if accuracy == 1 else "A"
    concluded = {"consistent": answer, "inconsistent": "C", "unknown": None}[consistency]
    end = f"so the answer is {concluded}." if concluded else "hard to say."
    text = text or f"<think>Look at {name} here, {end}</think>\n<answer>{answer}</answer>"
    verdict = {
        "rollout_id": f"run/{name}",
        "question_id": question.get("question_id", "q1"),
        "format_ok": well_formed,
        "accuracy": float(accuracy),
        "concluded_answer": concluded,
        "consistency": consistency,
        "repetition": repetition,
        "think_tokens": tokens,
        "judge": "hand",
        "prompt_version": "1",
        "reason": "",
    }
    own = {"rollout_id": f"run/{name}", "step": step, "completion": text, "finish_reason": finish, "verdict": verdict}
    return {**QUESTION, **own, **question}


def right(name, consistency="consistent", **changes):
    return rollout(name, 1, consistency, **changes)


def wrong(name, consistency="consistent", **changes):
    return rollout(name, 0, consistency, **changes)


def build(rollouts, **changes):
    """({(kind, chosen, rejected)}, counts that are not 0, pairs) of one question, without caps unless told."""
    unlimited = {"max_pairs_per_question": None, "max_pairs_per_question_and_kind": None}
    pairs, dropped = build_pairs([rollouts], PairOptions(**(unlimited | changes)), template=TEMPLATE)
    short = [(p["kind"], "+".join(map(strip, p["chosen_ids"])), strip(p["rejected_id"])) for p in pairs]
    assert len(set(short)) == len(short)
    return set(short), {why: n for why, n in dropped.items() if n}, pairs


def strip(name):
    return name.removeprefix("run/")


# name: (rollouts, options, the pairs, some of the counts)
CASES = {
    "a right and a wrong one: penalty, and reflection over the wrong thinking": (
        [right("r"), wrong("w")],
        {},
        {("penalty", "r", "w"), ("reflection", "w+r", "w")},
        {},
    ),
    "right but inconsistent is rejected for that, and never chosen": (
        [right("r"), right("i", "inconsistent"), wrong("w")],
        {"kinds": ["consistency", "penalty"]},
        {("consistency", "r", "i"), ("penalty", "r", "w")},
        {},
    ),
    "only inconsistent ones are right: there is none to choose": (
        [right("i", "inconsistent"), wrong("w")],
        {},
        set(),
        {"groups: with none to choose (right, consistent, well formed, neither repetitive nor too short)": 1},
    ),
    "unknown is neither chosen nor the inconsistent rejected": (
        [right("u", "unknown"), right("r"), wrong("w")],
        {},
        {("penalty", "r", "w"), ("reflection", "w+r", "w")},
        {"rollouts: right, consistency unknown": 1},
    ),
    "only unknown ones are right: nothing": (
        [right("u", "unknown"), wrong("w")],
        {},
        set(),
        {"rollouts: right, consistency unknown": 1},
    ),
    "an unknown wrong one is wrong all the same, but no first attempt": (
        [right("r"), wrong("w", "unknown")],
        {},
        {("penalty", "r", "w")},
        {},
    ),
    "an inconsistent wrong one's thinking is no wrong thinking: no first attempt": (
        [right("r"), wrong("w", "inconsistent")],
        {},
        {("penalty", "r", "w")},
        {},
    ),
    "all right and consistent: nothing": (
        [right("r"), right("s")],
        {},
        set(),
        {"groups: with nothing to reject": 1, "rollouts: in a group with nothing to reject": 2},
    ),
    "all right, one inconsistent: a consistency pair": (
        [right("r"), right("i", "inconsistent")],
        {},
        {("consistency", "r", "i")},
        {},
    ),
    "all right, one too short: a length pair, which is a penalty": (
        [right("r", tokens=40), right("s", tokens=40), right("t", tokens=40), right("short", tokens=10)],
        {},
        {("penalty", name, "short") for name in "rst"},
        {},
    ),
    "all right, one repetitive: nothing, since only consistency and length count there": (
        [right("r"), right("loop", repetition=0.7)],
        {},
        set(),
        {"rollouts: of no use to the kinds asked for": 1},
    ),
    "repetitive in a mixed group: rejected; it is no first attempt either": (
        [right("r"), right("loop", repetition=0.7), wrong("w", repetition=0.7)],
        {},
        {("penalty", "r", "loop"), ("penalty", "r", "w")},
        {},
    ),
    "at the limits: repetition of exactly 0.4 and half the median are fine": (
        [right("a", tokens=10, repetition=0.4), right("b", tokens=20), right("c", tokens=30), wrong("w")],
        {"kinds": ["penalty"]},
        {("penalty", name, "w") for name in "abc"},
        {},
    ),
    "the median is of the right ones: long wrong thinking makes no right one short": (
        [right("r", tokens=10), wrong("w", tokens=500), wrong("v", tokens=500)],
        {"kinds": ["penalty"]},
        {("penalty", "r", "w"), ("penalty", "r", "v")},
        {},
    ),
    "all wrong: nothing": (
        [wrong("w"), wrong("v", "inconsistent")],
        {},
        set(),
        {"groups: with none right": 1, "rollouts: in a group with none right": 2},
    ),
    "one rollout: nothing": ([right("r")], {}, set(), {"groups: with nothing to reject": 1}),
    "cut off: neither chosen nor rejected": (
        [right("r"), wrong("w"), right("cut", finish="length"), wrong("cut2", finish="length", well_formed=False)],
        {"kinds": ["penalty"]},
        {("penalty", "r", "w")},
        {"rollouts: cut off at the length limit": 2},
    ),
    "cut off, included: rejected, never chosen, no first attempt": (
        [right("r"), right("cut", finish="length"), wrong("cut2", finish="length", well_formed=False)],
        {"include_truncated": True},
        {("penalty", "r", "cut2")},
        {"rollouts: not well formed, though not wrong": 1},
    ),
    "malformed: wrong is rejected, right is left out": (
        [right("r"), right("m", well_formed=False), wrong("w", well_formed=False)],
        {},
        {("penalty", "r", "w")},
        {"rollouts: not well formed, though not wrong": 1},
    ),
    "a graded answer between the thresholds is neither": (
        [right("r"), rollout("half", 0.6), rollout("low", 0.5)],
        {"kinds": ["penalty"]},
        {("penalty", "r", "low")},
        {"rollouts: neither right nor wrong": 1},
    ),
    "graded answers: too small a margin": (
        [rollout("r", 0.8), rollout("low", 0.5), rollout("lower", 0.2)],
        {"kinds": ["penalty"]},
        {("penalty", "r", "lower")},
        {"pairs: accuracy margin too small": 1},
    ),
    "no chosen is less accurate than its rejected": (
        [rollout("r", 0.8), rollout("i", 1.0, "inconsistent"), rollout("j", 0.8, "inconsistent")],
        {"kinds": ["consistency"]},
        {("consistency", "r", "j")},
        {"pairs: accuracy margin too small": 1},
    ),
    "same text: one stands for all": (
        [right("r"), right("r2", text=right("r")["completion"]), wrong("w"), wrong("w2", text=wrong("w")["completion"])],
        {"kinds": ["penalty"]},
        {("penalty", "r", "w")},
        {"rollouts: same text as another": 2},
    ),
    "rollouts of different steps are compared": (
        [right("r"), wrong("w", step=1)],
        {"kinds": ["penalty"]},
        {("penalty", "r", "w")},
        {},
    ),
    "short and inconsistent: rejected by one good rollout once, whatever the kind": (
        [right("r", tokens=40), right("i", "inconsistent", tokens=10)],
        {},
        {("consistency", "r", "i")},
        {},
    ),
    "longer thinking is chosen first": (
        [right("a", tokens=20), right("b", tokens=30), right("c", tokens=25), wrong("w")],
        {"kinds": ["penalty"], "max_pairs_per_question": 2},
        {("penalty", "b", "w"), ("penalty", "c", "w")},
        {"rollouts: fit for a pair, not needed or over a cap": 1},
    ),
    "a repetitive joined thinking is not chosen": (
        [right("r", text="<think>a b c d e f g h i j k l. It is B.</think><answer>B</answer>"),
         wrong("w", text="<think>a b c d e f g h i j k l. It is A.</think><answer>A</answer>")],
        {"kinds": ["reflection"], "max_repetition": 0.1},
        set(),
        {"pairs: joined thinking is repetitive": 1, "rollouts: fit for a pair, not needed or over a cap": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_table(case):
    rollouts, options, expected, counts = CASES[case]
    found, dropped, pairs = build(rollouts, **options)
    if expected is not None:
        assert found == expected
    for why, count in counts.items():
        assert dropped.get(why) == count, dropped
    # every rollout is in a pair, or counted once
    used = {name for p in pairs for name in (*p["chosen_ids"], p["rejected_id"])}
    assert len(used) + sum(n for why, n in dropped.items() if why.startswith("rollouts: ")) == len(rollouts)
    by_id = {r["rollout_id"]: r for r in rollouts}
    for pair in pairs:
        chosen = by_id[pair["chosen_ids"][-1]]["verdict"]
        assert chosen["consistency"] == "consistent" and chosen["format_ok"]
        assert is_well_formed(pair["chosen"][0]["content"])
        assert pair["rejected"][0]["content"] == by_id[pair["rejected_id"]]["completion"]
        assert pair["verdicts"]["chosen"] == [by_id[name]["verdict"] for name in pair["chosen_ids"]]
        assert pair["verdicts"]["rejected"] == by_id[pair["rejected_id"]]["verdict"]


@pytest.mark.parametrize("kinds", itertools.permutations(KINDS), ids="-".join)
def test_kinds_take_turns_up_to_the_cap_of_a_question_in_their_order(kinds):
    rollouts = [right("a"), right("b"), wrong("w"), wrong("v", "unknown")]
    rollouts += [right("i", "inconsistent"), right("j", "inconsistent")]  # at least two pairs of each kind
    for cap in range(7):
        found, _, _ = build(rollouts, max_pairs_per_question=cap, kinds=list(kinds))
        assert Counter(kind for kind, *_ in found) == Counter((kinds * 2)[:cap])


def test_a_pair_repeats_the_rollouts_prompt():
    _, _, (pair,) = build([right("r"), wrong("w")], kinds=["penalty"])
    assert pair["prompt"] == build_messages(QUESTION, TEMPLATE)
    assert {key: pair[key] for key in ("question_id", "problem", "options", "solution", "videos", "images")} == {
        key: QUESTION[key] for key in ("question_id", "problem", "options", "solution", "videos", "images")
    }
    assert pair["prompt_template"] == TEMPLATE.hash and pair["policy"] == "outputs/policy"
    assert pair["verdicts"]["fault"] == "wrong" and pair["rejected_finished"] is True
    cut = [right("r"), wrong("w", finish="length")]
    assert build(cut, include_truncated=True)[2][0]["rejected_finished"] is False


def test_reflection_text():
    _, _, (pair,) = build([right("r"), wrong("w")], kinds=["reflection"])
    text = pair["chosen"][0]["content"]
    assert text == (
        f"<think>Look at w here, so the answer is A.\n{RECHECK}\nLook at r here, so the answer is B.</think>\n"
        "<answer>B</answer>"
    )
    assert pair["chosen_ids"] == ["run/w", "run/r"]
    assert judge_by_rules(text, problem_type="multiple choice", options=QUESTION["options"]) == "consistent"


@pytest.mark.parametrize("joiner", ["", "\n", " "])
def test_reflection_keeps_the_form_that_the_policy_writes(joiner):
    right = f"<think>\nIt is B.\n</think>{joiner}<answer> B </answer>\n"
    join = join_for_reflection(" <think> It is A. </think><answer>A</answer>", right)
    assert join == f"<think>It is A.\n{RECHECK}\nIt is B.</think>{joiner}<answer> B </answer>\n"
    assert split_completion(join) == (f"It is A.\n{RECHECK}\nIt is B.", "B")


def test_reflection_whose_join_changes_the_conclusion_is_refused(monkeypatch):
    # The right thinking says nothing that the rules read as a conclusion. After a turn that takes nothing back, they
    # read the wrong one's "so the answer is A".
    rollouts = [right("r", text="<think>Blue comes first.</think><answer>B</answer>"), wrong("w")]
    assert build(rollouts, kinds=["reflection"])[0] == {("reflection", "w+r", "w")}  # our turn takes it back
    monkeypatch.setattr(pairs_module, "RECHECK", "Look again.")
    found, dropped, _ = build(rollouts, kinds=["reflection"])
    assert not found and dropped["pairs: joined thinking concludes something else"] == 1


def many(seed=0, questions=60):
    """Questions of 16 rollouts over two steps, of every sort."""
    rng = random.Random(seed)
    found = []
    for q in range(questions):
        one = []
        for n in range(16):
            one.append(
                rollout(
                    f"q{q}-{n}",
                    rng.choice([0, 1, 1]),
                    rng.choice(["consistent", "consistent", "inconsistent", "unknown"]),
                    tokens=rng.randrange(5, 40),
                    repetition=rng.choice([0, 0, 0.6]),
                    finish=rng.choice(["stop"] * 7 + ["length"]),
                    step=n // 8,
                    question_id=f"q{q}",
                )
            )
        found.append(one)
    return found


def test_order_of_the_rollouts_does_not_matter():
    expected = build_pairs(many(), PairOptions(), template=TEMPLATE)
    assert len(expected[0]) > 60
    for seed in range(3):
        shuffled = many()
        for rollouts in shuffled:
            random.Random(seed).shuffle(rollouts)
        assert build_pairs(iter(shuffled), PairOptions(), template=TEMPLATE) == expected
    other = build_pairs(many(), replace(PairOptions(), seed=1), template=TEMPLATE)
    assert [p["chosen_ids"] for p in other[0]] != [p["chosen_ids"] for p in expected[0]]


def test_a_questions_pairs_do_not_depend_on_other_questions():
    alone = build_pairs(many()[7:8], PairOptions(), template=TEMPLATE)[0]
    among = [p for p in build_pairs(many(), PairOptions(), template=TEMPLATE)[0] if p["question_id"] == "q7"]
    assert alone == among and alone


def test_caps():
    def counted(**changes):
        pairs, dropped = build_pairs(many(), PairOptions(**changes), template=TEMPLATE)
        kinds = {kind: sum(p["kind"] == kind for p in pairs) for kind in KINDS}
        largest = {}
        for p in pairs:
            for key in (p["question_id"], (p["question_id"], p["kind"])):
                largest[key] = largest.get(key, 0) + 1
        return kinds, largest, dropped

    free = counted(max_pairs_per_question=None, max_pairs_per_question_and_kind=None)
    assert all(n > 100 for n in free[0].values())
    _, largest, _ = counted(max_pairs_per_question=3, max_pairs_per_question_and_kind=2)
    assert max(n for key, n in largest.items() if isinstance(key, str)) == 3
    assert max(n for key, n in largest.items() if isinstance(key, tuple)) == 2
    assert counted(max_pairs_per_question=0)[0] == dict.fromkeys(KINDS, 0)


def test_the_pairs_of_many_questions_are_not_held_in_memory():
    """Long texts: those of 100 questions would be 16 MB."""
    long = "word " * 8000

    def questions():
        for number in range(100):
            texts = [f"<think>{n} {long} {answer}.</think><answer>{answer}</answer>" for n, answer in enumerate("BBAA")]
            made = [right, right, wrong, wrong]
            yield [make(f"{number}-{n}", text=text, question_id=f"q{number}")
                   for n, (make, text) in enumerate(zip(made, texts, strict=True))]  # fmt: skip

    tracemalloc.start()
    try:
        options = PairOptions(kinds=["penalty"])
        pairs = pairs_module.build_pairs(questions(), options, template=TEMPLATE, dropped=Counter())
        assert sum(1 for _ in pairs) == 200 and tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def test_one_id_for_two_questions_is_refused():
    clash = [right("r"), wrong("w", problem="Which colour is last?", videos=["clips/2.mp4"])]
    with pytest.raises(RowError, match=r"'run/r' and 'run/w'.*'q1'.*differ in problem, videos"):
        build(clash)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ["penalties"]}, "kinds: expected some of consistency, penalty, reflection"),
        ({"kinds": []}, "kinds"),
        ({"kinds": ["penalty", "penalty"]}, "kinds"),
        ({"max_pairs_per_question": -1}, "max_pairs_per_question: expected a number from 0"),
        ({"max_repetition": 40}, "max_repetition: expected a share"),
        ({"wrong_threshold": 0.9}, "wrong_threshold: expected less than correct_threshold"),
    ],
)
def test_options_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        PairOptions(**changes)
