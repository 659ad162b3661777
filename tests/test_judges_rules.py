"""The rules judge: conclusions read out of thinking, by tables."""

import json
import time
from pathlib import Path

import pytest

from veripo_trl.tiny.judge import judge as judge_by_templates
from veripo_trl.tiny.questions import SplitSize, make_split
from veripo_trl.verifier.judges import conclude_by_rules, judge_by_rules

DATA = Path(__file__).resolve().parent / "data"
COLOURS = ["A. red", "B. green", "C. blue", "D. dark red"]
MOVES = ["A. left", "B. right", "C. up", "D. It stands still"]

CHOICE = [
    # the tiny world's template; the letter is the conclusion even where the colour beside it is another option's
    ("I see red then blue then green, last is green: B.", COLOURS, "B"),
    ("I see red then blue then green, first is red: A.", COLOURS, "A"),
    ("I see red then blue then green, last is green: C.", COLOURS, "C"),
    # letters
    ("The ball rolls away. So the answer is B.", MOVES, "B"),
    ("The ball rolls away. So the answer is B", MOVES, "B"),
    ("Therefore B.", MOVES, "B"),
    ("It goes right, therefore, B.", MOVES, "B"),
    ("Thus, the correct answer is (B).", MOVES, "B"),
    ("Thus the correct option is B: right.", MOVES, "B"),
    ("Thus the correct option is B. right", MOVES, "B"),
    ("Hence option B.", MOVES, "B"),
    ("Option B is correct.", MOVES, "B"),
    ("A is wrong because it never goes left. B is the correct answer.", MOVES, "B"),
    ("I choose B.", MOVES, "B"),
    ("We'll go with C.", MOVES, "C"),
    ("Answer: C", MOVES, "C"),
    ("**Answer:** C", MOVES, "C"),
    ("The final answer is \\boxed{C}.", MOVES, "C"),
    ("\\boxed{\\text{C}}", MOVES, "C"),
    ("So the answer is A.", MOVES, "A"),
    ("So A.", MOVES, "A"),
    ("So the answers are A and C.", MOVES, "A,C"),
    ("So the answer is B because it drifts.", None, "B"),
    ("The answer is J.", None, "J"),
    # the last conclusion counts
    ("First I thought the answer is A. Then it turned, so the answer is B.", MOVES, "B"),
    ("So the answer is A. Wait, it turns at the end. So the answer is B.", MOVES, "B"),
    ("So the answer is B. The video ends there.", MOVES, "B"),
    # an option's own text
    ("It must be red.", COLOURS, "A"),
    ("It must be dark red.", COLOURS, "D"),
    ("The object drifts, so it moves right.", MOVES, "B"),
    ("The frames are equal, therefore it stands still.", MOVES, "D"),
    # ambiguous, hedged, negated, hypothetical, taken back: None
    ("So the answer is A or B.", MOVES, None),
    ("So it is either A or B.", MOVES, None),
    ("So the answer is A/B.", MOVES, None),
    ("So it moves left or right.", MOVES, None),
    ("So it is not left.", MOVES, None),
    ("So the answer is not B.", MOVES, None),
    ("If the answer is B, the ball would leave.", MOVES, None),
    ("Is the answer B?", MOVES, None),
    ("The answer could be B.", MOVES, None),
    ("So the answer is B. Wait, it turns at the end.", MOVES, None),
    ("So the answer is B. Hmm, maybe C.", MOVES, None),
    ("so the answer is b or so B. wait, no", MOVES, None),
    ("so B. wait, no", MOVES, None),
    ("The answer is B. Right.", MOVES, "B"),
    ("The answer cannot be B.", MOVES, None),
    ("I would not choose B.", MOVES, None),
    ("So B is wrong.", MOVES, None),
    ("It turns right, so the first one is B.", MOVES, "B"),
    ("It turns right, so the first one is not B.", MOVES, None),
    ("So the one that does not move is C.", MOVES, None),  # a negation we cannot place: no guess
    ("So option C is out.", MOVES, None),
    ("So we compare A with B.", MOVES, None),
    ("The ball goes right so the option is clear.", MOVES, None),
    ("So let us look at option C.", MOVES, None),
    ("Since it moves right, the answer is **B**.", MOVES, "B"),
    ("Looking at the video, the answer would be option (C).", MOVES, "C"),
    ("This matches option B.", MOVES, "B"),
    ("So the best choice is B) right.", MOVES, "B"),
    ("So the answer is: B", MOVES, "B"),
    ("So the answer is $B$.", MOVES, "B"),
    ("So the answer is B (left).", MOVES, None),
    ("A ball is seen. So a ball moves.", MOVES, None),
    ("So A ball moves.", MOVES, None),
    ("I see red then blue then green.", COLOURS, None),
    ("The options are A. red, B. green.", COLOURS, None),
    ("", COLOURS, None),
    ("So the answer is Z.", COLOURS, None),
    # a remark on another option after the conclusion, or in place of one
    ("That is option B. Option A describes the start.", MOVES, "B"),
    ("So the answer is B. Option A only matches the first frame.", MOVES, "B"),
    ("So the answer is B. It drifts for long. Option A only matches the first frame.", MOVES, "B"),
    ("Therefore B. Option D confirms nothing.", MOVES, "B"),
    ("The frames match B. A fits only the beginning.", MOVES, None),
    ("So the answer is A. Wait, it turns at the end. This matches option B.", MOVES, "B"),
    # the letter may be a thing's name
    ("So team B's shirt is red.", COLOURS, None),
    ("So in phase C the lid is red.", COLOURS, None),
    ("So the lid is red in frame B.", COLOURS, None),
    ("So it must be B.", COLOURS, "B"),
]

NUMBERS = [
    ("I count one two three shapes, so 3.", "3"),
    ("I count one two three, so 3.", "3"),
    ("I count one two three, so three.", "3"),
    ("I count one two three, so 4.", "4"),
    ("There are 2 red and 1 blue. That makes 3.", "3"),
    ("There are 2 red and 1 blue shapes, that makes 3 shapes in all.", "3"),
    ("2 + 10 = 12", "12"),
    ("2 + 10 = 12.", "12"),
    ("So 2 + 3 = 5.", "5"),
    ("So the total is 5, as expected.", "5"),
    ("Answer: 12", "12"),
    ("The answer is 1,234 metres.", "1234"),
    ("The final answer is \\boxed{3}.", "3"),
    ("Therefore, the distance is about 3.5 meters.", "3.5"),
    ("The share is 12 of 100, so 12%.", "12%"),
    ("So there are 3. I looked at every frame.", "3"),
    ("I count the chairs in frames 1 to 8, giving 4.", "4"),
    ("So half of it, therefore \\frac{1}{2}.", "1/2"),
    ("At first 3, so 3. Wait, one was hidden. So 4.", "4"),
    ("So 3. Wait, I missed one.", None),
    ("So 3 or 4.", None),
    ("So there are 2 red and 3 blue shapes.", None),
    ("So not 3.", None),
    ("So I need to count from frame 3 to frame 8.", None),
    ("so 3. wait, one more", None),
    ("The ball is 2 m away. So it takes 4 seconds to reach it.", "4"),
    ("Total: 7", "7"),
    ("The total is 7.", "7"),
    ("In total, there are 7 chairs.", "7"),
    ("There are 7 chairs in total.", "7"),
    ("I count 7 chairs.", None),
    ("If one is hidden, so 4.", None),
    ("Is it 3?", None),
    ("I see 3 shapes then 2 shapes.", None),
    ("So there are many.", None),
    ("So at least 3.", None),
    ("", None),
]

TEXTS = [
    ("I see red then blue then green, so red blue green.", "free-form", "red blue green"),
    ("I see red then blue then green, so red, blue and green.", "free-form", "red blue green"),
    ('The sign reads "MAIN STREET".', "OCR", "MAIN STREET"),
    ("So the text is STOP.", "OCR", "STOP"),
    ("It is a long video.", "free-form", None),
    ("We get $x = \\frac{1}{2}$, so the answer is $\\frac{1}{2}$.", "math", "0.5"),
    ("Thus x = 7", "math", "7"),
    ("So \\boxed{2\\pi}", "math", "2\\pi"),
    ("Therefore the answer is 3 apples.", "math", "3"),
    ("Let x be small.", "math", None),
]


@pytest.mark.parametrize("think, options, expected", CHOICE)
def test_choice_conclusions(think, options, expected):
    assert conclude_by_rules(think, problem_type="multiple choice", options=options) == expected


@pytest.mark.parametrize("problem_type", ["numerical", "regression"])
@pytest.mark.parametrize("think, expected", NUMBERS)
def test_number_conclusions(think, expected, problem_type):
    concluded = conclude_by_rules(think, problem_type=problem_type, options=[])
    if expected is None:
        assert concluded is None
    else:
        completion = f"<think>{think}</think><answer>{expected}</answer>"
        assert concluded is not None
        assert judge_by_rules(completion, problem_type=problem_type, options=[]) == "consistent"
        other = completion.replace(f"<answer>{expected}", f"<answer>7{expected}")
        assert judge_by_rules(other, problem_type=problem_type, options=[]) == "inconsistent"


@pytest.mark.parametrize("think, problem_type, expected", TEXTS)
def test_text_and_math_conclusions(think, problem_type, expected):
    concluded = conclude_by_rules(think, problem_type=problem_type, options=[])
    if expected is None:
        assert concluded is None
    else:
        completion = f"<think>{think}</think><answer>{expected}</answer>"
        assert judge_by_rules(completion, problem_type=problem_type, options=[]) == "consistent", concluded
        other = f"<think>{think}</think><answer>{'green red blue' if 'red' in expected else 'EXIT 91'}</answer>"
        assert judge_by_rules(other, problem_type=problem_type, options=[]) == "inconsistent"


@pytest.mark.parametrize(
    "completion, verdict",
    [
        ("<think>last is green: B.</think><answer>B</answer>", "consistent"),
        ("<think>last is green: B.</think><answer>B. green</answer>", "consistent"),
        ("<think>last is green: B.</think><answer>green</answer>", "consistent"),
        ("<think>It must be green.</think><answer>B</answer>", "consistent"),
        ("<think>last is green: B.</think><answer>A</answer>", "inconsistent"),
        ("<think>last is green: B.</think><answer>A or B</answer>", "inconsistent"),
        ("<think>I see red then blue.</think><answer>A</answer>", "unknown"),
        ("<think></think><answer>A</answer>", "unknown"),
        ("<think>last is green: B.</think><answer></answer>", "unknown"),
        ("<answer>B</answer>", "unknown"),
        ("<think>last is green: B.</think>", "unknown"),
        ("<think>so B.</think><answer>B</answer><answer>B</answer>", "unknown"),
        ("<think>so B.<answer>B</answer>", "unknown"),
        ("", "unknown"),
    ],
)
def test_verdicts(completion, verdict):
    assert judge_by_rules(completion, problem_type="multiple choice", options=COLOURS) == verdict


@pytest.mark.parametrize(
    "problem_type, think, answer, verdict",
    [
        ("yes/no", "So the answer is yes.", "no", "inconsistent"),
        ("yes/no", "So no ball falls, and the statement is true: yes.", "yes", "unknown"),
        ("yes/no", "Yes, it does. Therefore no change of colour is seen.", "no", "unknown"),
        ("yes/no", "So no, it does not fall.", "no", "consistent"),
        ("yes/no", "So the answer is no because it falls.", "yes", "inconsistent"),
        ("regression", "<planning>p</planning><reasoning>So the progress is 40.</reasoning>", "40", "consistent"),
        ("regression", "<planning>p</planning>\n<reasoning>So the progress is 40%</reasoning>\n", "70", "inconsistent"),
        ("regression", "So the answer is <strong>40</strong>.", "40", "consistent"),
        ("free-form", "So the color of the lid is blue", "Blue", "consistent"),
        ("free-form", "So the color of the lid is blue", "The lid is red.", "inconsistent"),
        ("free-form", "So it is not red but blue.", "Red", "inconsistent"),
        ("free-form", "So he opens the door.", "opening the red door", "consistent"),
        ("free-form", "So he does not open the door.", "He opens the door", "unknown"),
        ("free-form", "So there are three apples.", "3", "consistent"),
        ("free-form", "So the animal is a dog.", "A puppy", "unknown"),  # other words may say the same
        ("free-form", "So the man walks across the street and buys food.", "A man crosses a road for fruit", "unknown"),
        ("free-form", "Answer: a red car", "a blue car", "inconsistent"),
        ("OCR", "Therefore, the number on the shirt is 10", "10", "consistent"),
        ("OCR", "Therefore, the number on the shirt is 10", "16", "inconsistent"),
        ("OCR", "So the letters spell S T O P.", "STOP", "consistent"),
        ("OCR", "So the sign says Main Street.", "Main Road", "unknown"),
        ("OCR", "So the year is 2000.", "200", "inconsistent"),
        ("OCR", "So the price shown is 1,200 dollars.", "1200", "consistent"),
        ("OCR", "So the clock shows 10:30.", "11:45", "inconsistent"),
        ("OCR", "So the answer is 5 pm.", "17:00", "unknown"),  # other ways of writing
        ("OCR", "Hence the year is 1998.", "'98", "unknown"),
        ("OCR", "So the answer is Monday.", "Mon", "unknown"),
        ("OCR", "So the answer is the United States.", "USA", "unknown"),
        ("OCR", "The brand on the bottle is Coca-Cola.", "Coke", "unknown"),
        ("OCR", "So the answer is kilometres.", "km", "unknown"),
        ("free-form", "So the ball is gray.", "grey", "consistent"),
        ("free-form", "So the lid is violet.", "Purple", "consistent"),
        ("free-form", "So the tree is right of the man.", "The man is left of the tree", "unknown"),
        ("numerical", "So 5 balls in total, 3 of them red.", "5", "unknown"),
        ("numerical", "So he scores twice in 10 minutes.", "2", "unknown"),
        ("numerical", "So none of the 3 cats is black.", "0", "unknown"),
        ("numerical", "So the total is 3 pairs, i.e. 6 shoes.", "6", "consistent"),
        ("numerical", "So there are 1.5k people.", "1500", "consistent"),
        ("math", "So the probability is 1/3, i.e. about 33%.", "1/3", "unknown"),
        ("math", "So AB = 5 cm, where BC = 3.", "5", "unknown"),
        ("regression", "So the distance is 250 cm.", "2.5", "unknown"),
        ("regression", "So the distance is 250 cm.", "2.5 cm", "inconsistent"),
        ("regression", "So it takes 2 minutes.", "120", "unknown"),
        ("regression", "So the height is 2.37 m.", "2.4", "consistent"),
        ("regression", "So the height is 2.37 m.", "2.5", "inconsistent"),
    ],
)
def test_verdicts_on_texts_and_rounded_numbers(problem_type, think, answer, verdict):
    completion = f"<think>{think}</think><answer>{answer}</answer>"
    assert judge_by_rules(completion, problem_type=problem_type, options=[]) == verdict


def test_the_tiny_worlds_thoughts_are_judged_as_its_own_parser_does():
    """The rules curate the tiny loop's pairs."""
    rows, _ = make_split("train", size=SplitSize(clips=60, questions=90))
    for row, other in zip(rows, rows[1:] + rows[:1]):
        same_kind = other["data_source"] == row["data_source"]
        for answer in (row["solution"], other["solution"] if same_kind else row["solution"][::-1]):
            completion = f"<think>{row['process']}</think><answer>{answer}</answer>"
            task = {"problem_type": row["problem_type"], "options": row["options"]}
            assert judge_by_rules(completion, **task) == judge_by_templates(completion), completion


def test_scores_on_labelled_chains():
    """Two thirds of the chains are by people who had not seen the patterns; docs/results.md has the table."""
    kinds, columns = ("multiple choice", "numerical", "regression", "math", "OCR", "free-form"), []
    for name in ("own", "blind", "fresh"):
        lines = (DATA / f"consistency_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        chains = [json.loads(line) for line in lines]
        for chain in chains:
            completion = f"<think>{chain['thinking']}</think><answer>{chain['answer']}</answer>"
            task = {"problem_type": chain["problem_type"], "options": chain["options"]}
            chain["verdict"] = judge_by_rules(completion, **task)
        for kind in kinds:
            some = [chain for chain in chains if chain["problem_type"] == kind]
            said = [chain["label"] for chain in some if chain["verdict"] == "inconsistent"]
            clear = [chain["verdict"] for chain in some if chain["label"] != "unclear"]
            columns.append((f"{said.count('inconsistent')}/{len(said)}", f"{clear.count('unknown')}/{len(clear)}"))
    sets = zip(columns[:6], columns[6:12], columns[12:], strict=True)
    table = [f"| {kind} | {' | '.join(sum(row, ()))} |" for kind, row in zip(kinds, sets, strict=True)]
    documented = (DATA.parent.parent / "docs" / "results.md").read_text(encoding="utf-8")
    assert [line for line in table if line not in documented] == []


@pytest.mark.parametrize("problem_type", ["multiple choice", "numerical", "regression", "math", "OCR", "free-form"])
@pytest.mark.parametrize(
    "text",
    ["so " * 30_000, "(" * 50_000, "A" * 50_000, "so 1" + "0" * 50_000, "= " * 30_000, "\\boxed{" * 5_000,
     "\x00\ud7ff",
     "A, " * 20_000, "answer is " * 10_000, " " * 50_000 + "x", "B and " * 10_000],
    ids=lambda text: text[:6].replace("\x00", "nul"),
)  # fmt: skip
def test_strange_thinking_neither_raises_nor_hangs(text, problem_type):
    start = time.monotonic()
    conclude_by_rules(text, problem_type=problem_type, options=COLOURS)
    assert time.monotonic() - start < 5


def test_a_unit_elsewhere_is_not_the_conclusions():
    """24 and 2 differ by 12, as feet and inches do; the seconds are of something else."""
    text = "<think>At 58 seconds the cup is left of the box. So the answer is {}.</think><answer>2</answer>"
    assert judge_by_rules(text.format("24"), problem_type="numerical") == "inconsistent"
    assert judge_by_rules(text.format("24 inches"), problem_type="numerical") == "unknown"
