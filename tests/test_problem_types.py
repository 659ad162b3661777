"""The problem types of VerIPO's relatives: each worked pair of their papers' and codes' rules is a row of a table. Where
a released code gives another value, the row says which and why ours differs."""

import pytest

from veripo_trl.answers.boxes import read_box
from veripo_trl.answers.choice import partial_credit
from veripo_trl.answers.grammars import are_segments, is_structured, read_segments
from veripo_trl.answers.objects import object_id_in_time, read_object, tube_metrics
from veripo_trl.answers.score import SolutionError, answer_metrics, answers_match, check_solution, score_answer
from veripo_trl.answers.spans import read_spans, tiou_time_r1, true_spans, union_iou

OPTIONS = ["A. the dog", "B. the cat", "C. nobody"]


def score(problem_type, answer, solution, options=None, **other):
    return score_answer(answer, problem_type=problem_type, solution=solution, options=options, **other)


# ------------------------------------------------------------------------------------------------- temporal grounding

SPANS = [  # answer, truth, tIoU, Time-R1's
    ("6 to 10", "4 to 12 of 20", 0.5, 0.405),
    ("0 to 8", "4 to 12 of 20", 1 / 3, 0.64 / 3),
    ("4 to 12", "4 to 12 of 20", 1.0, 1.0),
    ("10 to 6", "4 to 12 of 20", 0.0, 0.0),
    ("12 to 15", "4 to 12 of 20", 0.0, 0.0),  # they touch
    ("0 to 30", "4 to 12 of 20", 8 / 30, 8 / 30 * 0.8 * 0.1),
    ("5.5 to 5.5", "4 to 12 of 20", 0.0, 0.0),  # TimeZero's and Time-R1's reuse the previous completion's on a null hull
    ("0 to 50", "0 to 2 of 20", 0.04, 0.0),  # theirs -.056: a factor below 0 makes the reward negative
    ("0 to 3; 2 to 4; 22 to 25", "1 to 5 of 30", 3 / 8, None),
    ("6.5 to 10, 12 to 13", "4 to 12 of 20", 3.5 / 9, None),
    ("1 to 2, finally 4 to 12", "4 to 12 of 20", 8 / 9, None),  # theirs 1.0: the last match counts, here the union does
    ("", "1 to 5 of 20", 0.0, 0.0),
    ("around 6", "4 to 12 of 20", 0.0, 0.0),
    ("4 to 12", "4 to 8; 8 to 12 of 20", 1.0, None),
]


@pytest.mark.parametrize("answer, truth, iou, time_r1", SPANS)
def test_spans(answer, truth, iou, time_r1):
    check_solution(problem_type="temporal grounding", solution=truth)
    assert score("temporal grounding", answer, truth) == pytest.approx(iou)
    if time_r1 is not None:
        assert score("temporal grounding", answer, truth, score=tiou_time_r1) == pytest.approx(time_r1)


@pytest.mark.parametrize(
    "a, b, iou",
    [
        (((0, 3), (2, 4), (22, 25)), ((1, 5), (2, 2), (2, 4)), 3 / 8),
        (((6.5, 10), (12, 13)), ((4, 12),), 3.5 / 9),
        ((), ((1, 5),), 0.0),
        ((), (), 1.0),
        (((3, 3),), ((3, 3),), 0.0),  # VideoChat-R1's gives 1.0, TimeZero's fails or repeats the IoU before
        (((0, 10),), ((5, 15),), 1 / 3),
    ],
)
def test_union_iou(a, b, iou):
    assert union_iou(a, b) == pytest.approx(iou) == pytest.approx(union_iou(b, a))


@pytest.mark.parametrize("form", [
    "6 to 10", "6s to 10s", "00:06 - 00:10", "00:06 to 00:10", "from 6 to 10 seconds", "6–10", "6 - 10", "6~10",
    "between 6 and 10", "6.0 seconds to 10.00 sec.", "The answer is 6 to 10.", "**6 to 10**", "0:00:06 to 0:00:10.0",
    "6 to 10 of 33.75", "From 6s and 10s", "It happens from 6 to 10 s.", "- 6 to 10", "6.0s–10.0s", "\\boxed{6 to 10}",
])  # fmt: skip
def test_forms_of_a_span(form):
    assert read_spans(form) == ((6, 10),)


@pytest.mark.parametrize("form", [
    "around 6", "6", "", "6, 10", "at 6 and from 7", "-6 to 10", "6 to 10 minutes", "frames 6 to 10", "10 to 6",
    "1 to 2 and 10 to 6", "00:75 to 01:20", "6 to ten", "nan to inf", "1e3 to 1e4", "1,234 to 1,300", "6:00:99 to 7",
    "6 to 10 or 12 to 14", "not 6 to 10", "maybe 6 to 10", "6 to 10 at 50%", "x6 to 10y", "6.7.8 to 9", "6 to 10 to 14",
    "; ".join(f"{2 * n} to {2 * n + 1}" for n in range(21)), "6 to 10 " + " " * 5000, "2 min 3 s to 2 min 9 s",
])  # fmt: skip
def test_no_span(form):
    assert read_spans(form) is None


def test_times():
    assert read_spans("01:15.5 to 1:02:03") == ((75.5, 3723),)
    assert read_spans("1 to 3\n5 to 8; 10 to 11, 12 to 13 and 14 to 15") == ((1, 3), (5, 8), (10, 11), (12, 13), (14, 15))


# ---------------------------------------------------------------------------------------- choices, grounded, several


@pytest.mark.parametrize(
    "answer, value, letter, iou",
    [
        ("B; 5.0 to 11.0", 1.0, 1.0, 1.0),
        ("(B) the cat; 5 to 11", 1.0, 1.0, 1.0),
        ("B, 5 to 11", 1.0, 1.0, 1.0),
        ("B\nfrom 8 to 14 seconds", (1 + 3 / 9) / 2, 1.0, 3 / 9),
        ("A; 5 to 11", 0.5, 0.0, 1.0),
        ("B; 11 to 5", 0.5, 1.0, 0.0),
        ("B", 0.5, 1.0, 0.0),
        ("5 to 11", 0.5, 0.0, 1.0),
        ("Because; 5 to 11", 0.5, 0.0, 1.0),  # VideoChat-R1 takes the first capital from A to G: B
        ("A or B; 5 to 11", 0.5, 0.0, 1.0),
        ("Answer: B; 5 to 11", 1.0, 1.0, 1.0),  # there the A of "Answer"
        ("somewhere", 0.0, 0.0, 0.0),
    ],
)
def test_grounded_choice(answer, value, letter, iou):
    row = {"problem_type": "grounded choice", "solution": "B; 5.0 to 11.0 of 20", "options": OPTIONS}
    assert score_answer(answer, **row) == pytest.approx(value)
    assert answer_metrics(answer, **row) == pytest.approx({"letter accuracy": letter, "mIoU": iou})


@pytest.mark.parametrize(
    "answer, truth, soft, strict",
    [
        ("A", "A,C", 0.5, 0), ("A,C", "A,C", 1, 1), ("C, A", "A,C", 1, 1), ("A,A", "A,C", 0.5, 0), ("A,B", "A,C", 0, 0),
        ("", "A,C", 0, 0), ("B,D", "B,C,D", 2 / 3, 0), ("A", "A", 1, 1),
        # 0 in the released code, which splits at commas and compares as written
        ("AC", "A,C", 1, 1), ("A and C", "A,C", 1, 1), ("a", "A", 1, 1), ("A.", "A", 1, 1),
    ],
)  # fmt: skip
def test_several_letters(answer, truth, soft, strict):
    options = ["A. 1", "B. 2", "C. 3", "D. 4"]
    assert score("multiple choice", answer, truth, options, score=partial_credit) == pytest.approx(soft)
    assert score("multiple choice", answer, truth, options) == strict


# --------------------------------------------------------------------------------------------------- object and time


@pytest.mark.parametrize(
    "answer, value",
    [
        ("Target ID: 2, Time range: 5.00 to 11.00", 1.0),
        ("Target ID: 1, Time range: 5.00 to 11.00", 0.5),
        ("Target ID: 2, Time range: 8 to 14", 2 / 3),
        ("Target ID: 2, Time range: 11 to 5", 0.0),  # .5 there, for the id: here one rule for every reversed span
        ("Target ID: 2", 0.0),
        ("Time range: 5 to 11", 0.0),
        ("target id: 2; time range: 5 and 11", 1.0),
        ("Target ID: 2 or 1, Time range: 5 to 11", 0.0),  # 1 there: the first id counts
        ("Target IDs: 2, 3, Time range: 5 to 11", 0.0),
        ("Target ID: 2, Time range: 12 to 15", 0.5),
        ("2; 5.0 to 11.0", 1.0),
        ("2; 5 to 11 of 20", 1.0),
        ('{"id": 2, "start": 5.0, "end": 11}', 1.0),
        ('{"id": 2, "start": 11, "end": 5}', 0.0),
        ('{"id": "2", "start": 5, "end": 11}', 0.0),
        ('{"id": true, "start": 5, "end": 11}', 0.0),
        ('{"id": 2, "start": NaN, "end": 11}', 0.0),
        ('{"id": 2, "start": 5, "end": 11, "more": 1}', 0.0),
        ("2; 5 to 7; 8 to 11", 0.0),
        ("2", 0.0),
        ("-2; 5 to 11", 0.0),
        ("{" * 4000, 0.0),
    ],
)
def test_object_and_time(answer, value):
    assert score("object and time", answer, "2; 5 to 11") == pytest.approx(value)


def test_an_object_that_must_be_there_in_time():
    for answer, strict in (("2; 12 to 15", 0.0), ("2; 8 to 14", 1.0), ("1; 5 to 11", 0.0)):
        assert score("object and time", answer, "2; 5 to 11", score=object_id_in_time) == strict
    assert read_object("2; 12 to 15") == (2, ((12, 15),))


# ----------------------------------------------------------------------------------------------------- box grounding

BOX = "[100, 100, 300, 300]"


@pytest.mark.parametrize(
    "answer, iou",
    [
        (BOX, 1.0),
        ("[200,100,400,300]", 1 / 3),
        ("[300,100,500,300]", 0.0),  # touching
        ("[150,150,250,250]", 0.25),
        ("[300,300,100,100]", 0.0),  # reversed: not repaired
        ("[100,100,100,300]", 0.0),
        ("[0,0,1000,1000]", 0.04),
        ('```json\n{"bbox_2d": [100, 100, 300, 300]}\n```', 1.0),
        ('[{"bbox_2d": [100, 100, 300, 300], "label": "chair"}]', 1.0),
        ('{"bbox": [100, 100, 300, 300]}', 1.0),
        ("The chair is at [100, 100, 300, 300].", 1.0),
        ("[[100, 100, 300, 300]]", 1.0),
        ("[100, 100, 300, 300] or [0, 0, 1, 1]", 0.0),
    ],
)
def test_boxes(answer, iou):
    assert score("box grounding", answer, BOX) == pytest.approx(iou)


@pytest.mark.parametrize("text", [
    '[{"bbox_2d": [1,2,3,4]}, {"bbox_2d": [5,6,7,8]}]', '{"bbox_2d": [1, 2, 3]}', "x1=100", "[NaN, 1, 2, 3]",
    '{"bbox_2d": [NaN, 1, 2, 3]}', "[Infinity, 1, 2, 3]", "[1e999, 1, 2, 3]", "[true, 1, 2, 3]", '["1", 1, 2, 3]', "{}",
    "[1, 2, 3, 4, 5]", '{"bbox": [1,2,3,4], "bbox_2d": [1,2,3,4]}', "[" * 3000, "[1,2,3,4]" + " " * 4000, "null", "7",
])  # fmt: skip
def test_no_box(text):
    assert read_box(text) is None


TUBES = {  # truth in frames 4 to 7; of 2, boxes with half of it everywhere; 1 is elsewhere, 3 was never tracked
    "truth": {frame: (100, 100, 300, 300) for frame in range(4, 8)},
    2: {frame: (100, 100, 300, 200) for frame in range(20)},
    1: {frame: (600, 600, 700, 700) for frame in range(20)},
}


@pytest.mark.parametrize(
    "answer, fps, iou",
    [
        ("2; 6 to 9", 1, (0.5 + 0.5) / 6),
        ("2; 3 to 4.5", 2, (0.5 + 0.5) / 6),  # frames 6 to 9 again
        ("2; 3.6 to 7.4", 1, 0.5),  # frames 4 to 7
        ("2; 4 to 9000000", 25, 0),  # frames from 100
        ("2; 0 to 9999", 1, 2 / 10_000),  # frames without a box count as well
        ("1; 6 to 9", 1, 0),
        ("3; 6 to 9", 1, 0),
        ("2; 8 to 9", 1, 0),
        ("2; 6.2 to 6.8", 1, 0),  # between two frames
        ("2; 9 to 6", 1, 0),
        ("2", 1, 0),
    ],
)
def test_a_tube_of_boxes(answer, fps, iou):
    found = tube_metrics(read_object(answer), {"fps": fps, **TUBES})
    assert found == pytest.approx({"m_vIoU": iou, "vIoU@.3": int(iou >= 0.3), "vIoU@.5": int(iou >= 0.5)})


# ------------------------------------------------------------------------------------------------- yes/no, numbers


@pytest.mark.parametrize(
    "answer, truth, value",
    [
        ("Yes.", "Yes, it does", 1), ("no", "Yes", 0), ("Not sure", "No", 0), ("YES!", "yes", 1), ("", "No", 0),
        ("The answer is no", "No", 0),  # strict: the first word
        ("yes or no", "yes", 0), ("Yes/no", "yes", 0), ("Yes, there is no cat", "yes", 1), ("**No**", "no", 1),
        ("Nobody", "no", 0), ("yesterday", "yes", 0),
    ],
)  # fmt: skip
def test_yes_no(answer, truth, value):
    assert score("yes/no", answer, truth) == value


def test_a_group_of_yes_and_no():
    """PRIMO's code returns the first rollout's reward for the whole group."""
    assert [score("yes/no", answer, "yes") for answer in ("yes", "no", "yes", "no")] == [1, 0, 1, 0]


# ------------------------------------------------------------------------------------------------------------ truths


@pytest.mark.parametrize(
    "problem_type, solution, message",
    [
        ("temporal grounding", "10 to 6", "start before its end"),
        ("temporal grounding", "6 to 6", "start before its end"),
        ("temporal grounding", "around 6", "expected spans"),
        ("temporal grounding", "6 to inf", "expected spans"),
        ("temporal grounding", "-1 to 6", "expected spans"),
        ("temporal grounding", "the answer is 1 to 6", "expected spans"),
        ("temporal grounding", "1 to 6, then later", "expected spans"),
        ("grounded choice", "B; C; 5 to 11", "expected spans"),  # C would be lost
        ("temporal grounding", "5 to 21.6 of 20", "within the duration"),
        ("temporal grounding", "20 to 21 of 20", "within the duration"),
        ("temporal grounding", "5 to 6 of 0", "expected spans"),
        ("grounded choice", "B", "a letter, ';' and spans"),
        ("grounded choice", "Z; 5 to 11", "not among the options"),
        ("grounded choice", "B; 11 to 5", "start before its end"),
        ("object and time", "2", "an id, ';' and one span"),
        ("object and time", "x; 5 to 11", "an id, ';' and one span"),
        ("object and time", "2; 5 to 11; 12 to 13", "an id, ';' and one span"),
        ("object and time", "2; 11 to 5", "start before its end"),
        ("box grounding", "[300,100,100,300]", "one box"),
        ("box grounding", "[100,100,1300,300]", "from 0 to 1000"),
        ("box grounding", "[1, 2, 3]", "one box"),
        ("yes/no", "maybe", "'yes' or 'no'"),
        ("yes/no", "The answer is no", "'yes' or 'no'"),
    ],
)
def test_a_malformed_truth_is_refused(problem_type, solution, message):
    with pytest.raises(SolutionError, match=message):
        check_solution(problem_type=problem_type, solution=solution, options=OPTIONS)


def test_truths():
    assert true_spans("5.0 to 11.0 of 33.75") == (((5, 11),), 33.75)
    assert true_spans("1 to 3; 5 to 8") == (((1, 3), (5, 8)), None)
    assert true_spans("24.3 to 30.9 of 29.46").duration == 29.46  # Charades-STA: ends are up to 1.5 s over
    for problem_type, solution in (
        ("temporal grounding", "00:05 to 00:11 of 00:33.75"), ("object and time", "0; 5.0 to 11.0 of 20.0"),
        ("grounded choice", "B; 5.0 to 11.0"), ("box grounding", "[0, 0, 1000, 1000]"), ("yes/no", "No, it falls"),
    ):  # fmt: skip
        check_solution(problem_type=problem_type, solution=solution, options=OPTIONS)
    with pytest.raises(SolutionError, match="needs the clip's duration; write '5 to 11 of"):
        score("temporal grounding", "5 to 11", "5 to 11", score=tiou_time_r1)


# ----------------------------------------------------------------------------------------------- matching, metrics


@pytest.mark.parametrize(
    "problem_type, a, b, same",
    [
        ("temporal grounding", "5 to 11", "00:05 - 00:11", True),
        ("temporal grounding", "5 to 11", "5.1 to 11", True),
        ("temporal grounding", "5 to 11", "6 to 11", False),
        ("temporal grounding", "soon", "soon", False),
        ("grounded choice", "B; 5 to 11", "the cat; 5.1 to 11", True),
        ("grounded choice", "B; 5 to 11", "A; 5 to 11", False),
        ("grounded choice", "B", "B; 5 to 11", True),  # what a judge may conclude
        ("grounded choice", "B", "A; 5 to 11", False),
        ("grounded choice", "B", "5 to 11", False),
        ("grounded choice", "B; 5 to 11", "B; 8 to 14", False),
        ("object and time", "2; 5 to 11", "Target ID: 2, Time range: 5 to 11", True),
        ("object and time", "2; 5 to 11", "1; 5 to 11", False),
        ("box grounding", BOX, '{"bbox_2d": [100, 100, 300, 305]}', True),
        ("box grounding", BOX, "[100, 100, 300, 340]", False),
        ("box grounding", "[300, 300, 100, 100]", "[300, 300, 100, 100]", False),
        ("yes/no", "Yes, it does.", "yes", True),
        ("yes/no", "no", "yes", False),
    ],
)
def test_answers_match(problem_type, a, b, same):
    for first, second in ((a, b), (b, a)):
        assert answers_match(first, second, problem_type=problem_type, options=OPTIONS) is same


@pytest.mark.parametrize(
    "problem_type, answer, solution, metrics",
    [
        ("temporal grounding", "0 to 3", "0 to 10", {"mIoU": 0.3, "R@.3": 1, "R@.5": 0, "R@.7": 0}),  # equality counts
        ("temporal grounding", "soon", "0 to 10", {"mIoU": 0, "R@.3": 0, "R@.5": 0, "R@.7": 0}),
        ("object and time", "2; 8 to 14", "2; 5 to 11", {"ID accuracy": 1, "m_tIoU": 1 / 3, "R@.3": 1, "R@.5": 0}),
        ("object and time", "2", "2; 5 to 11", {"ID accuracy": 0, "m_tIoU": 0, "R@.3": 0, "R@.5": 0}),
        ("box grounding", "[150,150,250,250]", BOX, {"mean IoU": 0.25, "IoU ≥ .25": 1, "IoU ≥ .5": 0}),
        ("box grounding", "here", BOX, {"mean IoU": 0, "IoU ≥ .25": 0, "IoU ≥ .5": 0}),
        ("regression", "47%", "50", {"MAE": 3}),
        ("regression", "many", "50", {}),  # no value: counted as unreadable
        ("numerical", "47", "50", {}),
        ("yes/no", "no", "yes", {}),
    ],
)
def test_metrics(problem_type, answer, solution, metrics):
    found = answer_metrics(answer, problem_type=problem_type, solution=solution)
    assert found == pytest.approx(metrics)
    assert answer_metrics(None, problem_type=problem_type, solution=solution) == {
        name: 0 for name in metrics if name != "MAE"
    }


# ------------------------------------------------------------------------------------------------------------ traces

T, T2, A = (
    "<time>00:02-00:05</time> <caption>red ball</caption> <think>first</think>",
    "<time>00:06-00:08</time>\n<caption>x < y</caption>\n<think>then</think>",
    "<answer>A</answer>",
)


@pytest.mark.parametrize(
    "text, duration, fine, spans",
    [
        (f"{T} so {A}", None, True, ((2, 5),)),
        (f"First {T}\n{T2} and then {A}\n", None, True, ((2, 5), (6, 8))),
        (f"<think>first</think> {A}", None, False, ()),
        (T.replace("<caption>red ball</caption> ", "") + A, None, False, ()),
        (T.replace("00:02-00:05", "00:05-00:02") + A, None, False, None),
        (T.replace("00:02-00:05", "00:02-00:02") + A, None, False, None),
        (T.replace("00:02-00:05", "00:02-00:75") + A, None, False, None),
        (T.replace("00:02-00:05", "about 2") + A, None, False, None),
        (T.replace("00:02-00:05", "00:09-00:12") + A, 8, False, None),
        (T.replace("00:02-00:05", "00:06-00:12") + A, 8, True, ((6, 8),)),
        (T.replace("00:02-00:05", "00:01:02 – 00:01:10.5") + A, None, True, ((62, 70.5),)),
        (T + A + A, None, False, ((2, 5),)),
        (T + A + " ok", None, False, ((2, 5),)),
        (T + "<think>" + A, None, False, ((2, 5),)),
        (T, None, False, ((2, 5),)),
        (A + T, None, False, ((2, 5),)),
        (f"{T}<answer>{T2}</answer>", None, False, ((2, 5), (6, 8))),
        ("", None, False, ()),
    ],
)
def test_segments(text, duration, fine, spans):
    assert are_segments(text, duration) is fine
    assert read_segments(text, duration) == spans


PLAN, SEEN, WHY = "<planning>p</planning>", "<observation>o</observation>", "<reasoning>r</reasoning>"


@pytest.mark.parametrize(
    "inside, after, fine",
    [
        (PLAN + SEEN + WHY, A, True),
        (f"{PLAN}\n{SEEN}\n{WHY}", f"\n{A}\n", True),
        (f"\n{PLAN}{SEEN}{WHY}\n", A, True),  # 0 there: its pattern takes no white space after <think>
        (SEEN + PLAN + WHY, A, False),
        (PLAN + WHY, A, False),
        (f"{PLAN} and {SEEN}{WHY}", A, False),
        (PLAN + SEEN + WHY, A + " so", False),
        # 1 there: its lazy pattern runs over what stands between
        (PLAN + PLAN + SEEN + WHY, A, False),
        (PLAN + "<observation> </observation>" + WHY, A, False),
        (PLAN + SEEN + WHY, A + A, False),
        (PLAN + SEEN + f"<reasoning>r {A}</reasoning>", A, False),
    ],
)
def test_sections(inside, after, fine):
    text = f"<think>{inside}</think>{after}"
    assert is_structured(text, ("planning", "observation", "reasoning")) is fine
    assert is_structured(text.replace("planning", "plan"), ("plan", "observation", "reasoning")) is fine
