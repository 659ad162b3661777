import dataclasses
import json
import re

import pytest

from veripo_trl.answers.grammars import are_segments, is_structured
from veripo_trl.answers.score import PROBLEM_TYPES, is_well_formed
from veripo_trl.data.prompts import (
    PromptError,
    build_messages,
    build_target,
    check_targets,
    load_template,
    read_template,
)
from veripo_trl.evaluate.questions import from_released

ROW = {
    "question_id": "q1",
    "problem": "Which colour comes last?",
    "options": ["A. red", "B. blue"],
    "problem_type": "multiple choice",
    "solution": "B",
    "process": "Red, then blue: B.",
    "videos": ["v.mp4"],
    "images": [],
    "data_source": "unit",
}
INSTRUCTIONS = "".join(f"  {kind}: say {kind}\n" for kind in PROBLEM_TYPES)
NO_INSTRUCTIONS = "".join(f'  {kind}: ""\n' for kind in PROBLEM_TYPES)


def template(tmp_path, layout=r'"{problem}\n{options}\n{instruction}"', instructions=INSTRUCTIONS, more=""):
    file = tmp_path / "mine.yaml"
    file.write_text(f"layout: {layout}\ninstructions:\n{instructions}{more}")
    return load_template(str(file))


def text(row, template):
    (message,) = build_messages(row, template)
    return message["content"][-1]["text"]


def test_messages_put_videos_then_images_then_text_in_one_user_message(tmp_path):
    row = ROW | {"videos": ["a.mp4", "b.mp4"], "images": ["c.png"]}
    (message,) = build_messages(row, template(tmp_path))
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["video", "video", "image", "text"]
    # no empty keys: the processor takes a part with a "video" key for a video, whatever its value
    assert all(set(part) == {"type"} for part in message["content"][:-1])
    assert message["content"][-1]["text"] == "Which colour comes last?\nA. red\nB. blue\nsay multiple choice"
    assert [part["type"] for part in build_messages(ROW | {"videos": []}, template(tmp_path))[0]["content"]] == [
        "text"
    ]


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"options": [], "problem_type": "numerical"}, "Which colour comes last?\nsay numerical"),
        # braces are text, in a problem and in an option, whatever they spell
        (
            {"problem": r"\frac{options}{instruction} {0} {problem}", "options": ["A. {problem}", "B. {"]},
            "\\frac{options}{instruction} {0} {problem}\nA. {problem}\nB. {\nsay multiple choice",
        ),
        ({"problem": "Last?\nA. red\nB. blue"}, "Last?\nA. red\nB. blue\nsay multiple choice"),
        ({"problem": "Last? A. red"}, "Last? A. red\nA. red\nB. blue\nsay multiple choice"),
        # listed: doubly lettered as Video-MME's, on one line, lettered or on lines where the column has bare texts
        ({"problem": "Last?\nA. A. red\nB. B. blue"}, "Last?\nA. A. red\nB. B. blue\nsay multiple choice"),
        ({"problem": "Last? A. red, B. blue."}, "Last? A. red, B. blue.\nsay multiple choice"),
        ({"problem": "Last?\n(A) 1\n(B) 2", "options": ["1", "2"]}, "Last?\n(A) 1\n(B) 2\nsay multiple choice"),
        ({"problem": "Last?\nyes\nno\nSay.", "options": ["yes", "no"]}, "Last?\nyes\nno\nSay.\nsay multiple choice"),
        # not listed: their texts occur in it
        ({"problem": "How many of the 12 cats?", "options": ["1", "2"]},
         "How many of the 12 cats?\n1\n2\nsay multiple choice"),
        ({"problem": "What grows on Vitamin A. yes", "options": ["yes"]},
         "What grows on Vitamin A. yes\nyes\nsay multiple choice"),
        ({"problem": "Is 1 2 next?", "options": ["1", "2"]}, "Is 1 2 next?\n1\n2\nsay multiple choice"),
        ({"problem": "Is it red or blue?", "options": ["red", "blue"]},
         "Is it red or blue?\nred\nblue\nsay multiple choice"),
        ({"problem": "Which?\nA. red\nB. blue sky", "options": ["A. red", "B. blue"]},
         "Which?\nA. red\nB. blue sky\nA. red\nB. blue\nsay multiple choice"),
        ({"problem": "Which?\nA. 1.5\nB. 2.5", "options": ["A. 1", "B. 2"]},
         "Which?\nA. 1.5\nB. 2.5\nA. 1\nB. 2\nsay multiple choice"),
    ],
)  # fmt: skip
def test_text(tmp_path, change, expected):
    assert text(ROW | change, template(tmp_path)) == expected


def test_every_type_has_an_instruction_of_its_own_in_default():
    default = load_template("default")
    texts = {text(ROW | {"problem_type": kind}, default) for kind in PROBLEM_TYPES}
    assert len(texts) == len(PROBLEM_TYPES)
    for shown in texts - {text(ROW | {"problem_type": "thought"}, default)}:
        assert [shown.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")] == [1, 1, 1, 1]
        assert not re.search(r"\{(problem|options|instruction)\}", shown)


def test_tiny_is_the_problem_and_its_options_on_one_line():
    tiny = load_template("tiny")
    assert text(ROW, tiny) == "Which colour comes last? A. red B. blue"
    assert text(ROW | {"options": [], "problem_type": "numerical"}, tiny) == "Which colour comes last?"


NUMBER = {"problem_type": "numerical", "options": []}


def test_veripo_asks_before_the_question_and_for_numbers_after_it_too():
    veripo = load_template("veripo")
    asked, *rest = text(ROW, veripo).split("\n")
    assert asked.endswith("</answer>.") and "<answer> $B$ </answer>" in asked
    assert rest == ["Question:", "Which colour comes last?", "A. red", "B. blue"]
    asks_directly = "Answer with the option's letter from the given choices directly."
    released = {"question_id": 1, "video_path": "MMVU/1.mp4", "answer": "B",
                "processed_question": f"Last?\nA. red\nB. blue\n{asks_directly}"}  # fmt: skip
    row = {"images": []} | from_released(released)
    assert text(row, veripo).split("\n") == [asked, "Question:", "Last?", "A. red", "B. blue"]
    for kind in ("numerical", "regression"):
        asked, *rest, closing = text(ROW | NUMBER | {"problem_type": kind}, veripo).split("\n")
        assert "<answer> $2$ </answer>" in asked and rest == ["Question:", "Which colour comes last?"]
        assert "number" in closing and "<answer>" in closing
    asked, *rest = text(ROW | {"problem_type": "yes/no", "options": []}, veripo).split("\n")  # theirs has no such rows
    assert asked.endswith("The answer is yes or no.") and "$" not in asked
    assert rest == ["Question:", "Which colour comes last?"]


def test_video_r1_glues_the_options_to_the_question_and_asks_on_one_line():
    video_r1 = load_template("video_r1")
    question, asked = text(ROW, video_r1).split("\n\n")
    assert question == "Which colour comes last?Options:\nA. red\nB. blue"
    common = asked.split(". Between <answer>")[0]
    for kind in ("numerical", "regression", "OCR", "free-form", "yes/no"):
        question, line = text(ROW | {"problem_type": kind, "options": []}, video_r1).split("\n")
        assert question == "Which colour comes last?"
        assert line.startswith(common + ". ") and line != asked
    target = build_target(ROW, video_r1)
    assert target == "<think>Red, then blue: B.</think>\n<answer>B</answer>"


@pytest.mark.parametrize("name", ["veripo", "video_r1"])
def test_shapes_of_released_prompts_have_no_system_message_and_the_video_first(name):
    (message,) = build_messages(ROW | {"images": ["c.png"]}, load_template(name))
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["video", "image", "text"]


def test_what_primo_and_video_thinker_ask_for_is_what_their_rewards_accept():
    progress = NUMBER | {"problem_type": "regression", "solution": "40", "images": ["start.png", "now.png"]}
    sections = "<planning>lift</planning><observation>it is up</observation><reasoning>half</reasoning>"
    (message,) = build_messages(ROW | progress, load_template("primo"))
    assert [part["type"] for part in message["content"]] == ["image", "video", "image", "text"]
    shown = re.search("<planning>.*</reasoning>", message["content"][-1]["text"])[0]
    for process in (shown, sections):
        target = build_target(ROW | progress | {"process": process}, load_template("primo"))
        assert is_structured(target, ("planning", "observation", "reasoning"))
    thinker = load_template("video_thinker")
    shown = re.search("<time>.*</think>", text(ROW, thinker))[0]
    for process in (shown, TRACE):
        assert are_segments(build_target(ROW | {"process": process}, thinker))


@pytest.mark.parametrize("name, joiner", [("default", "\n"), ("tiny", "")])
def test_target(name, joiner):
    target = build_target(ROW, load_template(name))
    assert target == f"<think>Red, then blue: B.</think>{joiner}<answer>B</answer>"
    assert is_well_formed(target)


def test_target_of_a_row_without_thinking_names_the_row():
    with pytest.raises(PromptError, match=r"'q1'.*'unit'.*process"):
        build_target(ROW | {"process": None}, load_template("default"))


def test_a_row_of_another_type_is_refused_by_name():
    with pytest.raises(PromptError, match=r"'q1'.*'riddle'.*'tiny'.*multiple choice"):
        build_messages(ROW | {"problem_type": "riddle"}, load_template("tiny"))


def test_hash_is_of_the_content(tmp_path):
    first = template(tmp_path)
    assert re.fullmatch("[0-9a-f]{16}", first.hash)
    assert (first.name, load_template("default").name) == ("mine", "default")
    same = [
        template(tmp_path, more="# a comment\n"),
        template(tmp_path, more='target_joiner: "\\n"\n'),  # the default, written out
        template(tmp_path, layout='"{problem}\\n{options}\\n{instruction}"  # as before'),
    ]
    assert {other.hash for other in same} == {first.hash}
    other = [
        template(tmp_path, layout='"{problem} {options}\\n{instruction}"'),
        template(tmp_path, instructions=INSTRUCTIONS.replace("say OCR", "read it")),
        template(tmp_path, more='target_joiner: ""\n'),
        template(tmp_path, more='option_separator: " "\n'),
        load_template("default"),
        load_template("tiny"),
    ]
    assert len({first.hash, *(t.hash for t in other)}) == 7


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layout": '"{options} {instruction}"'}, r"layout needs \{problem\} \{options\} \{instruction\}"),
        ({"layout": '"{problem} {options}"'}, r"layout needs .*\{instruction\}"),
        ({"layout": '"{problem} {instruction}"'}, r"layout needs .*came \{problem\} \{instruction\}"),
        ({"layout": '"{problem} {problem} {options} {instruction}"'}, "once each"),
        ({"layout": '"{question} {problem} {options} {instruction}"'}, r"no other placeholder, came \{question\}"),
        ({"layout": "[1]"}, "expected a text under layout"),
        ({"instructions": INSTRUCTIONS + "  riddle: guess\n"}, "multiple choice, .*came .*riddle"),
        ({"instructions": INSTRUCTIONS.replace("say OCR", "7")}, "expected a text under instructions: OCR"),
        ({"more": "layuot: x\n"}, "came .*layuot"),
        ({"more": "layouts: {riddle: x}\n"}, "layouts: expected some of multiple choice"),
        ({"more": "layouts: {OCR: '{problem} {options}'}\n"}, r"layout needs .*\{instruction\}"),
        ({"more": "layouts: {OCR: 7}\n"}, "expected a text under layouts: OCR"),
        ({"more": "layouts:\n"}, "layouts: expected a text for each type, came None"),
        ({"more": "layouts: [x]\n"}, "layouts: expected a text for each type, came"),
        ({"more": "media_order: [[video]]\n"}, "media_order: expected a list of video and image"),
        ({"more": "media_order: [audio]\n"}, "media_order: expected a list of video and image"),
        ({"more": "target: all\n"}, "target: expected thinking or process"),
        ({"more": "target_joiner: null\n"}, "expected a text under target_joiner"),
        ({"more": "x: [\n"}, "not readable YAML"),
    ],
)
def test_a_wrong_template_is_refused(tmp_path, arguments, message):
    with pytest.raises(PromptError, match=message) as caught:
        template(tmp_path, **arguments)
    assert "mine.yaml" in str(caught.value)


def test_what_a_template_lacks_is_the_defaults_and_in_no_hash(tmp_path):
    """So that a problem type that is added changes no template's hash: rollouts and policies made with it stay usable."""
    default = load_template("default")
    assert (default.hash, load_template("tiny").hash) == ("1244cac5efba743d", "eafe69c4a3ebd39f")  # before there were any
    first = "".join(f"  {kind}: say {kind}\n" for kind in list(PROBLEM_TYPES)[:6])
    six = template(tmp_path, instructions=first)
    assert six.instructions["yes/no"] == default.instructions["yes/no"]
    assert text(ROW | {"problem_type": "yes/no", "options": []}, six).endswith("\nThe answer is yes or no.")
    assert template(tmp_path, instructions=first + "  yes/no: The answer is yes or no.\n").hash == six.hash
    assert template(tmp_path, instructions=first + "  yes/no: Yes or no?\n").hash != six.hash
    assert template(tmp_path, instructions=first.replace("  OCR: say OCR\n", "")).hash != six.hash
    assert load_template("tiny").instructions["yes/no"] == ""  # its layout has no place for one
    for one in (default, six, template(tmp_path, more="target: process\nmedia_order: [image]\n")):
        assert read_template(json.loads(json.dumps(dataclasses.asdict(one))), "veripo_trl.json") == one


def test_a_layout_for_a_type(tmp_path):
    own = template(tmp_path, more='layouts: {numerical: "Watch. {problem}{options} {instruction}!"}\n')
    number = ROW | {"problem_type": "numerical", "options": []}
    assert text(number, own) == "Watch. Which colour comes last? say numerical!"
    assert text(ROW, own) == text(ROW, template(tmp_path))
    assert own.hash != template(tmp_path).hash
    bare = template(tmp_path, more='layouts: {numerical: "Watch. {problem}{options}"}\n',
                    instructions=INSTRUCTIONS.replace("say numerical", '""'))  # fmt: skip
    assert text(number, bare) == "Watch. Which colour comes last?"


def test_media_in_an_order(tmp_path):
    row = ROW | {"images": ["start.png", "now.png"]}
    ordered = template(tmp_path, more="media_order: [image, video, image]\n")
    (message,) = build_messages(row, ordered)
    assert [part["type"] for part in message["content"]] == ["image", "video", "image", "text"]
    with pytest.raises(PromptError, match=r"'q1'.*\['image', 'video', 'image'\], came \['video'\]"):
        build_messages(ROW, ordered)


TRACE = "<time>00:02-00:05</time> <caption>red</caption> <think>first</think>"


def test_a_target_that_is_the_process_as_it_is(tmp_path):
    own = template(tmp_path, more="target: process\n")
    assert build_target(ROW | {"process": TRACE}, own) == f"{TRACE}\n<answer>B</answer>"
    whole = f"{TRACE} so <answer>B</answer>"
    assert build_target(ROW | {"process": whole}, own) == whole
    with pytest.raises(PromptError, match="'q1'.*process: expected one answer span or none, came several"):
        build_target(ROW | {"process": whole + whole}, own)
    rows = [ROW, ROW | {"question_id": "q2", "process": TRACE}]
    check_targets(rows, own)
    with pytest.raises(PromptError, match=r"'q2'.*process.*<think>.*target: process"):
        check_targets(rows, load_template("default"))


@pytest.mark.parametrize(
    "problem_type, solution, taught",
    [
        ("temporal grounding", "5.0 to 11.0 of 33.75", "5.0 to 11.0"),
        ("object and time", "2; 5 to 11 of 20", "2; 5 to 11"),
        ("grounded choice", "B; 5 to 11", "B; 5 to 11"),
        ("free-form", "one of 3", "one of 3"),
    ],
)
def test_a_duration_is_not_taught(problem_type, solution, taught):
    row = ROW | {"problem_type": problem_type, "solution": solution}
    assert build_target(row, load_template("default")).endswith(f"<answer>{taught}</answer>")


def test_a_layout_without_instruction_needs_empty_instructions(tmp_path):
    assert text(ROW, template(tmp_path, layout='"{problem}{options}"', instructions=NO_INSTRUCTIONS))


def test_an_unknown_template_lists_the_known_ones(tmp_path):
    for name in ("tinny", str(tmp_path / "none.yaml")):
        with pytest.raises(PromptError, match="default, primo, .*tiny"):
            load_template(name)
    (tmp_path / "list.yaml").write_text("- layout\n")
    with pytest.raises(PromptError, match="expected the keys layout"):
        load_template(str(tmp_path / "list.yaml"))
