"""From official columns to our rows: each source on made-up records, and on the traps that its docstring names."""

import importlib
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import load_script
from veripo_trl.data.official import find_source, make_rows, read_official
from veripo_trl.data.prompts import build_messages, load_template
from veripo_trl.data.rows import load_rows
from veripo_trl.data.schema import RowError
from veripo_trl.evaluate.questions import read_questions
from veripo_trl.media.sampling import VideoSettings
from veripo_trl.media.video import VideoLoader
from veripo_trl.sources import BENCHMARKS, mvbench, ovo_bench, seed_bench_r1, sole_r1, tempcompass, tw_grpo, video_mmmu
from veripo_trl.sources.record import ground_truths, is_number, mean_of_means, read_options
from veripo_trl.tiny import clips as tiny
from veripo_trl.tiny.clips import write_clip

EVALUATION = Path(__file__).resolve().parent.parent / "evaluation"


def vsi(name, kind, truth, options):
    return {"id": name, "dataset": "scannet", "scene_name": "scene0149_00", "question_type": kind,
            "question": "How far?", "ground_truth": truth, "options": options}  # fmt: skip


def mmmu(name, answer, options, kind="multiple-choice"):
    return {"id": name, "question": "What is it?", "options": options, "answer": answer, "question_type": kind,
            "qa_type": "x", "link_selected": "https://www.youtube.com/watch?v=x"}  # fmt: skip


def mmvu(name, kind, choices, answer):
    return {"id": name, "video": "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/Art/0.mp4",
            "youtube_url": "", "question_type": kind, "metadata": {"subject": "Art", "textbook": ""},
            "question": "Which?", "choices": choices, "answer": answer}  # fmt: skip


def tomato(key, answer):
    return {"question": "How many?", "options": ["2", "1", "3"], "answer": answer, "key": key, "motion_type": "count",
            "demonstration_type": "human", "variation": {"zoom": 1}, "note": "", "video_source_url": ""}  # fmt: skip


EMPTY = dict.fromkeys("ABCDE", "")
MME = {"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "History", "url": "u",
       "videoID": "fFjv93ACGo8", "question_id": "001-1", "task_type": "Counting Problem", "question": "Which?",
       "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. None."], "answer": "C"}  # fmt: skip
LV = {"key": "Vk_Af", "type": "cartoon", "video_info": {"duration_minutes": 60},
      "qa": [{"uid": 7, "question": "Why?\n(A) a joke\n(B) a dog\n(C) rain\n(D) a song", "answer": "D",
              "question_type": ["reasoning", "entity recognition"], "time_reference": "04:19-04:25"},
             {"uid": 8, "question": "Who?\n(A) he\n(B) she\n(C) they\n(D) it", "answer": "A",
              "question_type": ["summarization"], "time_reference": "00:00-60:00"}]}  # fmt: skip

# benchmark, file name, records, then per row: problem type, options, solution, video, categories
CASES = [
    ("vsi_bench", "test-00000-of-00001.parquet",
     [vsi(78, "object_counting", "2", None), vsi(5, "object_rel_direction_hard", "B", ["A. front-left",
      "B. back-left"])],
     [("regression", [], "2", "VSI-Bench/scannet/scene0149_00.mp4", {"part": "numeric", "task": "object_counting"}),
      ("multiple choice", ["A. front-left", "B. back-left"], "B", "VSI-Bench/scannet/scene0149_00.mp4",
       {"part": "choice", "task": "object_rel_direction_hard"})]),
    ("video_mmmu", "Perception/test-00000-of-00001.parquet",
     [mmmu("dev_Architecture_and_Engineering_26", "B", ["A. one", "B. two"])],
     [("multiple choice", ["A. one", "B. two"], "B", "VideoMMMU/Engineering/dev_Architecture_and_Engineering_26.mp4",
       {"track": "Perception", "group": "Engineering", "subject": "Architecture_and_Engineering"})]),
    ("video_mmmu", "Adaptation/test.jsonl",
     [mmmu("validation_Math_3", "A", ["one", "two"]), mmmu("new_Finance_4", "['24/7', '3.429', '3.43]", [], "open"),
      mmmu("validation_Physics_9", "['x+1', '1 + x']", [], "open"),
      mmmu("validation_Music_1", "the Baroque", [], "open")],
     [("multiple choice", ["A. one", "B. two"], "A", "VideoMMMU/Science/validation_Math_3.mp4",
       {"track": "Adaptation", "group": "Science", "subject": "Math"}),
      ("numerical", [], "24/7", "VideoMMMU/Business/new_Finance_4.mp4",
       {"track": "Adaptation", "group": "Business", "subject": "Finance"}),
      ("math", [], "x+1", "VideoMMMU/Science/validation_Physics_9.mp4",
       {"track": "Adaptation", "group": "Science", "subject": "Physics"}),
      ("free-form", [], "the Baroque", "VideoMMMU/Art/validation_Music_1.mp4",
       {"track": "Adaptation", "group": "Art", "subject": "Music"})]),
    ("mmvu", "validation.json",
     [mmvu("validation_0", "open-ended", EMPTY, "Dolly Zoom"),
      mmvu("validation_1", "multiple-choice", {**EMPTY, "A": "10.0", "B": "5.0"}, "A")],
     [("multiple choice", ["A. 10.0", "B. 5.0"], "A", "MMVU/videos/Art/0.mp4", {"subject": "Art"})]),
    ("tomato", "count.json", {"0": tomato("0209-03", 2), "1": tomato("0209-03", 0)},
     [("multiple choice", ["A. 2", "B. 1", "C. 3"], "C", "TOMATO/videos/human/0209-03.mp4",
       {"motion": "count", "demonstration": "human"}),
      ("multiple choice", ["A. 2", "B. 1", "C. 3"], "A", "TOMATO/videos/human/0209-03.mp4",
       {"motion": "count", "demonstration": "human"})]),
    ("tomato", "count-00000-of-00001.parquet", [tomato("0209-03", 1)],
     [("multiple choice", ["A. 2", "B. 1", "C. 3"], "B", "TOMATO/videos/human/0209-03.mp4",
       {"motion": "count", "demonstration": "human"})]),
    ("lvbench", "video_info.meta.jsonl", [LV],
     [("multiple choice", ["(A) a joke", "(B) a dog", "(C) rain", "(D) a song"], "D", "LVBench/Vk_Af.mp4",
       {"question type": ["reasoning", "entity recognition"], "video": "cartoon"}),
      ("multiple choice", ["(A) he", "(B) she", "(C) they", "(D) it"], "A", "LVBench/Vk_Af.mp4",
       {"question type": ["summarization"], "video": "cartoon"})]),
    ("lvbench", "test-00000-of-00001.parquet", [{"key": "Vk_Af", "type": "cartoon", **LV["qa"][0]}],
     [("multiple choice", ["(A) a joke", "(B) a dog", "(C) rain", "(D) a song"], "D", "LVBench/Vk_Af.mp4",
       {"question type": ["reasoning", "entity recognition"], "video": "cartoon"})]),
    ("video_mme", "videomme/test-00000-of-00001.parquet", [MME],
     [("multiple choice", ["A. Apples.", "B. Candles.", "C. Berries.", "D. None."], "C",
       "Video-MME/videos/fFjv93ACGo8.mp4", {"duration": "short", "domain": "Knowledge", "task": "Counting Problem"})]),
]  # fmt: skip


def test_video_mmmus_own_wording_and_mmvus_open_questions(tmp_path):
    name = "veripo_trl.sources.video_mmmu:official"
    for track, record, problem in (
        ("Perception", mmmu("dev_Math_1", "B", ["A. one", "B. two"]),
         "What is it?\nA. one\nB. two\nPlease ignore the Quiz question in last frame of the video."),
        ("Adaptation", mmmu("validation_Math_3", "A", ["one", "two"]),
         "You should watch and learn the video content. Then apply what you learned to answer the following multi-choice "
         "question. The image for this question is at the end of the video.\nWhat is it?\nA. one\nB. two"),
    ):  # fmt: skip
        (tmp_path / track).mkdir()
        (tmp_path / track / "test.jsonl").write_text(json.dumps(record))
        ((*_, row),), _ = make_rows(read_official(tmp_path / track / "test.jsonl", name), name)
        (message,) = build_messages({**row, "images": []}, load_template("question"))
        assert message["content"][-1]["text"] == problem and row["data_source"] == "VideoMMMU"
    name = "veripo_trl.sources.mmvu:with_open"
    records = [mmvu("v_0", "open-ended", EMPTY, "Dolly Zoom"), mmvu("v_1", "multiple-choice", {"A": "1"}, "A")]
    (tmp_path / "validation.json").write_text(json.dumps(records))
    rows, _ = make_rows(read_official(tmp_path / "validation.json", name), name)
    assert [(row["problem_type"], row["options"], row["categories"]["question"]) for *_, row in rows] == [
        ("free-form", [], "open-ended"), ("multiple choice", ["A. 1"], "multiple-choice")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "output, options, truths, score",
    [  # each as lmms-eval's functions score it
        ("B. blue, not A. red", "red blue", ["A"], 1),  # the last with a full stop
        ("It is (A) or (B)", "red blue", ["B"], 1),
        ("A: red", "red blue", ["A"], 1),
        ("So A it is", "red blue", ["A"], 1),
        ("B", "red blue", ["B"], 1),
        ("<answer>B</answer>", "red blue", ["B"], 1),  # of ours the span
        ("<think>A.</think><answer>B</answer>", "red blue", ["B"], 1),
        ("I think that it must be Blue there", "red blue", ["B"], 1),
        ("must be blue", "red blue", ["B"], 0),  # five words or fewer need the letter
        ("", "red blue", ["A"], 0),
        ("The result is 1,234.", "", ["1234"], 1),
        ("x = 3.141", "", ["3.14"], 1),  # rounded to two places
        ("the answer is a small cat", "", ["cat"], 1),  # contained
        ("a small cat\nso a dog", "", ["cat"], 0),  # the line with "so " counts
        ("it is 7 or 8", "", ["8"], 1),
        ("", "", ["8"], 0),
        ("so x", "", ["x"], 1),
        ("so maxi", "", ["x"], 0),  # a single letter needs a space beside it
        ("24/7", "", ["24/7", "3.43"], 1),
    ],
)  # fmt: skip
def test_video_mmmus_own_matching(output, options, truths, score):
    options = [f"{letter}. {text}" for letter, text in zip("AB", options.split(), strict=False)]
    assert video_mmmu.official_score(output, options=options, truths=truths) == score


def write_official(path: Path, records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("name, file, records, expected", CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_official_columns_become_rows(tmp_path, capsys, name, file, records, expected):
    source = write_official(tmp_path / "official" / file, records)
    questions = read_questions(source, benchmark=name)  # every check of `rows` passes
    assert ("left out" in capsys.readouterr().out) == (len(records) > len(expected))
    made = [
        (q["row"]["problem_type"], q["row"]["options"], q["row"]["solution"], q["row"]["videos"][0],
         q["raw"]["categories"])
        for q in questions
    ]  # fmt: skip
    assert made == expected
    if file.startswith("Adaptation"):
        assert all("end of the video" in q["row"]["problem"] for q in questions)
        assert questions[1]["raw"]["alternatives"] == ["24/7", "3.429", "3.43"]


def test_a_folder_is_read_whole_and_other_columns_are_refused(tmp_path):
    for track in ("Perception", "Comprehension", "Adaptation"):
        write_official(tmp_path / "data" / track / "test-00000-of-00001.parquet", [mmmu("dev_Art_1", "A", ["x", "y"])])
    tracks = [q["raw"]["categories"]["track"] for q in read_questions(tmp_path / "data", benchmark="video_mmmu")]
    assert sorted(tracks) == ["Adaptation", "Comprehension", "Perception"]
    with pytest.raises(RowError, match="row 1, .*official columns of Video-MME.*Its columns: id, question"):
        read_questions(tmp_path / "data", benchmark="video_mme")
    (tmp_path / "half.json").write_text('{"1": {"id": 1},\n"2":')
    with pytest.raises(RowError, match="half.json, line 2: not JSON"):
        read_questions(tmp_path / "half.json", benchmark="video_mme")
    lost = write_official(tmp_path / "lost.jsonl", [mmmu("dev_Art_1", "A", ["x", "y"])])
    with pytest.raises(RowError, match="a path with the track in it"):
        read_questions(lost, benchmark="video_mmmu")
    with pytest.raises(RowError, match="source 'video_xyz': expected module:function, or one of .*video_mme"):
        read_questions(lost, benchmark="video_xyz")


def test_the_readme_names_every_benchmark():
    text = (EVALUATION / "README.md").read_text()
    assert set(re.findall(r"^\| [\w -]+ \| `(\w+)` \|", text, re.MULTILINE)) == set(BENCHMARKS)


def test_adding_a_benchmark_as_the_readme_says(tmp_path, monkeypatch):
    section = (EVALUATION / "README.md").read_text().split("## Adding a benchmark")[1]
    (tmp_path / "my_bench.py").write_text(re.search(r"```python\n(.*?)```", section, re.S)[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    record = {"id": "7", "question": "Which?", "options": ["A. red", "B. blue"], "answer": "B", "topic": "colour"}
    source = write_official(tmp_path / "official.jsonl", [record])
    (question,) = read_questions(source, benchmark="my_bench:convert")
    assert question["row"]["videos"] == ["MyBench/7.mp4"] and question["raw"]["categories"] == {"topic": "colour"}


TAIL = "\nAnswer with the option's letter from the given choices directly."


def released(answer, question="Which?\nA. red\nB. blue" + TAIL, **more):
    return {"question_id": "q", "video_path": "MMVU/videos/Art/0.mp4", "question": "Which?", "answer": answer,
            "processed_question": question, **more}  # fmt: skip


@pytest.mark.parametrize(
    "raw, kind, options, solution",
    [
        (released("B"), "multiple choice", ["A. red", "B. blue"], "B"),
        (released("B", "Which?\nA. A. red.\nB. B. blue." + TAIL), "multiple choice", ["A. red.", "B. blue."], "B"),
        (released("B", "Which?\n(A) red\n(B) blue"), "multiple choice", ["(A) red", "(B) blue"], "B"),
        (released("B", "Which?", options=["A. l", "B. r"]), "multiple choice", ["A. l", "B. r"], "B"),
        (released("12", "How many?"), "numerical", [], "12"),
        (released("1.5", "How far?", scene_name="s"), "regression", [], "1.5"),
        (released(2, "How far?", scene_name="s"), "regression", [], "2"),
        (released("['24/7', '3.429', '3.43]", "How much?"), "numerical", [], "24/7"),
        (released("x^2+1", "Which formula?"), "math", [], "x^2+1"),
        (released("['3', 'as many as there are days in May']", "How many?"), "free-form", [], "3"),  # what all are
    ],
)
def test_released_rows_are_read_as_they_are(tmp_path, raw, kind, options, solution):
    (tmp_path / "x.json").write_text(json.dumps([raw, raw]))
    questions = read_questions(tmp_path / "x.json")
    row = questions[0]["row"]
    assert (row["problem_type"], row["options"], row["solution"]) == (kind, options, solution)
    assert row["videos"] == ["MMVU/videos/Art/0.mp4"] and row["data_source"] == "MMVU"
    assert not row["problem"].endswith(TAIL.strip()) and row["problem"].startswith(("Which", "How"))
    assert questions[0]["key"] != questions[1]["key"]  # ids and even whole rows repeat
    assert questions[0]["key"].split("-")[1] == questions[1]["key"].split("-")[1]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([released("B"), {"problem": "p"}], "1 of 2 rows are in the released form"),
        ([{key: v for key, v in released("B").items() if key != "answer"}], r"row with .*; came none in \['answer'\]"),
        ([released("B", image="aGVsbG8=")], "image: expected no base64 image"),
        ([released("Z")], "row 1, question_id 'q', solution"),
        ([released("B", video_path="../../etc/passwd")], "without '..'"),
        ([{**released("B"), "video_path": "https://x.org/a.mp4"}], "URL"),
        ([{"question_id": 1, "problem": "p", "problem_type": "riddle", "solution": "1"}], "problem_type"),
        ([{"problem": "p", "problem_type": "numerical", "solution": "1"}], "question_id"),
        ([{"question_id": 1, "problem": "p", "problem_type": "numerical", "solution": "1", "alternatives": ["1", "m"]}],
         "row 1, question_id 1, alternatives.*'m' of a row with numbers"),
        ([{"question_id": 1, "problem": "p", "problem_type": "numerical", "solution": "1", "alternatives": "12"}],
         "alternatives: expected a list of answers"),
        ([released("['', '2']", "How many?")], "row 1, question_id 'q', solution"),
        ([released("['1', " + "-" * 100_000 + "1]", "How many?")], "row 1, question_id 'q', answer: expected answers"),
        ([released("['1', (2", "How many?")], "row 1, question_id 'q', answer: expected answers"),
        (["text"], "each an object"),
    ],
)
def test_rows_that_cannot_be_asked(tmp_path, rows, message):
    (tmp_path / "x.json").write_text(json.dumps(rows))
    with pytest.raises(RowError, match=message):
        read_questions(tmp_path / "x.json")


@pytest.mark.parametrize(
    "text, options",
    [
        ("Which?\nA. red\nB. blue", ["A. red", "B. blue"]),
        ("Which?\nA. red\nC. blue", []),  # not a list of options
        ("A. Smith is who?\nA. a man\nB. a dog\n", ["A. a man", "B. a dog"]),
        ("Which?\nA) red\nB) blue", ["A) red", "B) blue"]),
        ("How many?", []),
    ],
)
def test_options_at_the_end_of_a_question(text, options):
    assert read_options(text) == options and all(option in text for option in options)


@pytest.mark.parametrize("text, truths", [("B", ["B"]), (3, ["3"]), ("['1', '2']", ["1", "2"]), ("['1', '2]",
                                                                                                 ["1", "2"]),
                                          ("[1, 2]", ["[1, 2]"])])  # fmt: skip
def test_several_truths_in_one_text(text, truths):
    assert ground_truths(text) == truths


@pytest.mark.parametrize("text, bare", [("3", True), ("-3.5", True), ("$4$", True), ("1,000", True), ("24/7", True),
                                        ("12%", True), ("x+1", False), ("m^2", False), ("about 3", False)])  # fmt: skip
def test_bare_numbers(text, bare):
    assert is_number(text) == bare


# ---- sources: source, file, official content, per row what must stand in it, and what is counted

SBR1 = {"sample_id": 17, "video_source": "EpicKitchens", "video_id": "P01_01", "video_basename": "P01_01_0.mp4",
        "current_observation_basename": "P01_01_0.png", "task_goal": "make tea", "question": "What should be next?",
        "task_progress_metadata": [{"narration_text": "open cupboard", "start_frame": 10, "stop_frame": 40}],
        "current_observation_frame": 60, "answer": "take cup",
        "negative_answers": ["wash knife", "open fridge", "close door"]}  # fmt: skip
SBR1_TEST = {key: value for key, value in SBR1.items() if key not in ("answer", "negative_answers")}
SBR1_TEST |= {"choice_a": "take cup", "choice_b": "wash", "choice_c": "open", "choice_d": "close",
              "golden_choice_idx": "C"}
VIDEO_R1 = {"problem_id": 7, "problem": "How many lids are opened?", "data_type": "video", "problem_type": "numerical",
            "options": [], "solution": "<answer>3</answer>", "path": "./Demo/7.mp4", "data_source": "Demo"}  # fmt: skip
PRIMO = VIDEO_R1 | {"problem_id": 5, "solution": "<answer>40</answer>", "path": "./robotwin/ep5_0_120.mp4",
                    "init_frame_path": "./robotwin/ep5_f0.png",
                    "current_frame_path": "./robotwin/ep5_f120.png"}  # fmt: skip
PRIMO_SFT = PRIMO | {"problem_id": 6, "process": "<think>…</think>", "planning": "p", "observation": "o",
                     "reasoning": "<reasoning>r</reasoning>", "select": True}  # fmt: skip
HALLU = VIDEO_R1 | {"problem_id": 3.0, "problem": "Does the feather fall faster?", "problem_type": "free-form",
                    "solution": "<answer>No, both fall together.</answer>", "path": "./video/veo_12.mp4"}  # fmt: skip
HALLU_TEST = {"RowID": 4, "video_path": "video/veo_12.mp4", "Question": "What falls?", "Answer": "A feather.",
              "Categorization-1": "Physics", "Categorization-2": "Gravity"}  # fmt: skip
GROUNDING = {"duration": 33.75, "timestamps": [[5, 11], [20.0, 34.5], [7, 7]],
             "sentences": ["a person puts a cup on the shelf.", "He leaves", "nothing"]}  # fmt: skip
TIME_R1 = {"video": "v/1.mp4", "duration": 100.0, "timestamp": [5.0, 11.0], "sentence": "A dog runs.", "qid": "q9",
           "video_start": None, "video_end": None, "difficulty": 30, "pred": [1, 2]}  # fmt: skip
TVG = {"path": "t/1.mp4", "question": "the dog runs", "answer": "13.4-28.1", "start": None, "end": None,
       "duration": 40.0, "dataset_name": "x"}  # fmt: skip
CLEVRER = {"scene_index": 12, "video_filename": "video_10012.mp4", "questions": [
    {"question_id": 0, "question": "What shape?", "question_type": "descriptive", "answer": "cube"},
    {"question_id": 1, "question": "What will happen without the cube?", "question_type": "counterfactual", "choices": [
        {"choice_id": 2, "choice": "third", "answer": "correct"}, {"choice_id": 0, "choice": "first",
                                                                   "answer": "correct"},
        {"choice_id": 1, "choice": "second", "answer": "wrong"}]},
    {"question_id": 2, "question": "And?", "question_type": "counterfactual",
     "choices": [{"choice_id": 0, "choice": "first", "answer": "wrong"}]}]}  # fmt: skip
GQA = {"id": 1, "video": "77", "question": "Why does he run?", "options": ["(A) fear", "(B) joy"], "answer": "(B)",
       "glue": [[5, 11], [12.5, 14]], "duration": 20.0, "type": "CW"}  # fmt: skip
TRACE = "<time>00:04-00:11</time> <caption>A knife.</caption> <think>First.</think> So the whisk is second."
THINKER = {"id": "1", "video": "yt/a.mp4", "question": "Second?", "options": ["A. knife", "B. whisk"], "answer": "B",
           "trace": TRACE + " <answer>B</answer>"}  # fmt: skip
VST = {"data_source": "multiple choice", "question": "Which is first?\nA. red\nB. blue", "video_context": "v/1.mp4",
       "reward_model": {"ground_truth": ["A"], "style": "rule"},
       "extra_info": {"duration": 96.0, "origin_id": "x1"}}  # fmt: skip
SOLE = {"image_name": "ep7_012.png", "data_source": "sim",
        "solution": "<think>The cup is above the shelf.</think> <answer>45%</answer>",
        "prompt": json.dumps([{"role": "system", "content": "expert"}, {"role": "user", "content": [
            {"type": "image"}, {"type": "text", "text": "previous progress 30%"}]},
            {"role": "assistant", "content": "45%"}])}  # fmt: skip


def vst_sft(video):
    stream = {"type": "text_stream", "text_stream": [[20, 24.0, "A man sits."], [24, 26, " "], [26, 30, "He goes."]],
              "qa_stream": [[30, 30, "Who goes?", "The man."]]}  # fmt: skip
    shown = [{"type": "video", "video": video, "video_start": 20, "video_end": 30},
             {"type": "text", "text": "Watch.", "previous": "Time=0.0-20.0s A door.\n"}]  # fmt: skip
    return [{"role": "user", "content": shown}, {"role": "assistant", "content": [stream]}]


WATCHED = {"question_id": "w", "problem": "Which is first?", "options": ["A. red", "B. blue"], "solution": "A",
           "problem_type": "multiple choice", "process": "So A.", "videos": ["v/1.mp4"], "data_source": "mine",
           "thoughts": [[0, 4, "It is red."], [4, 8.5, "It is blue."]], "end": 10}  # fmt: skip
SWIFT = {"messages": [{"role": "user", "content": "<video>Which way?\nA. left\nB. right"},
                      {"role": "assistant", "content": "<think>It turns.</think>\n<answer>B</answer>"}],
         "videos": ["v/1.mp4"]}  # fmt: skip
FACTORY = {"conversations": [{"from": "human", "value": "<image>How many?"}, {"from": "gpt", "value": "3"}],
           "images": ["i/1.png"], "system": "You count."}  # fmt: skip
HOLMES = {"video ID": "f1", "Question ID": 2, "Question Type": "SR", "Question": "Who?", "Answer": "B",
          "Explanation": "x",
          "Options": {"B": "she", "A": "he", "C": "they", "D": "it", "E": "he", "F": "none"}}  # fmt: skip
MV = {"video": "a.mp4", "question": "What?", "candidates": ["run", "sit", "go"], "answer": "sit"}
OVO = {"id": 3, "task": "EPM", "video": "x.mp4", "realtime": 30, "question": "What was it?", "options": ["cup", "pen"],
       "answer": "cup", "gt": 1}  # fmt: skip
SB = {"time": "[0:00]", "video_categories": "x", "video_path": "real/s1.mp4", "questions": [
    {"task_type": "OCR", "question": "What is read?", "time_stamp": "0:01:30", "answer": "B",
     "options": ["A. one", "B. two"], "required_ability": "x"},
    {"task_type": "OCR", "question": "And now?", "time_stamp": "00:00:20", "answer": "A", "options": ["one",
     "two"]}]}  # fmt: skip

LONG = {"problem": "Who wins?\nA. red\nB. blue", "answer": "<answer>B</answer>", "videos": ["games/1.mp4"]}
CUT = "changed: an end beyond the video's, set to its duration"
NO_LENGTH = "left out: its start is not before its end"
SOURCES = [
    ("longvideo_reason", "a.json", [LONG, LONG | {"videos": "games/2.mp4"}, LONG | {"problem": "Who wins?"}],
     [{"question_id": "lvr-0", "options": ["A. red", "B. blue"], "solution": "B", "videos": ["games/1.mp4"]},
      {"question_id": "lvr-1", "videos": ["games/2.mp4"]}], {"left out: an open question": 1}),
    ("video_r1", "a.json", [VIDEO_R1], [{"question_id": "7", "solution": "3", "videos": ["Demo/7.mp4"]}], {}),
    ("seed_bench_r1", "training_6k.jsonl",
     [SBR1, SBR1 | {"sample_id": 18, "task_progress_metadata": [],
                    "negative_answers": ["take cup", "wash", "wash", "x", "y", "z"]},
      SBR1 | {"sample_id": 19, "negative_answers": ["take cup"]}],
     [{"question_id": "sbr1-17", "videos": ["videos/EpicKitchens/P01_01_0.mp4"],
       "images": ["images/EpicKitchens/P01_01_0.png"], "problem": "What should be next?"},
      {"question_id": "sbr1-18", "videos": []}],
     {"changed: a wrong option dropped, it repeats the answer or another": 3, "left out: no wrong option": 1}),
    ("seed_bench_r1", "all_L2/validation_L3.jsonl", [SBR1_TEST | {"domain": "Work"}],
     [{"options": ["A. take cup", "B. wash", "C. open", "D. close"], "solution": "C",
       "categories": {"level": "L3", "domain": "Work"}}], {}),
    ("primo_r1", "rl.json", [PRIMO, PRIMO | {"problem_id": 8, "problem_type": "boolean",
     "solution": "<answer>Yes</answer>"}],
     [{"question_id": "5", "problem_type": "regression", "solution": "40", "videos": ["robotwin/ep5_0_120.mp4"],
       "images": ["robotwin/ep5_f0.png", "robotwin/ep5_f120.png"]}, {"problem_type": "yes/no", "solution": "Yes"}], {}),
    ("primo_r1", "sft.json", [PRIMO_SFT, PRIMO_SFT | {"select": False}, PRIMO_SFT | {"observation": ""}],
     [{"process": "<planning>p</planning><observation>o</observation><reasoning>r</reasoning>"}],
     {"left out: thinking that was not selected": 1, "left out: thinking without its sections": 1}),
    ("video_hallu", "synthetic_data_split.json", [HALLU, HALLU],  # 58 ids of 800 rows differ
     [{"question_id": "vh-syn-0000", "problem_type": "yes/no", "solution": "No, both fall together."},
      {"question_id": "vh-syn-0001"}],
     {"said: its video is in VideoHallu's benchmark too, so that is not held out": 2}),
    ("video_hallu", "physbench_train_split.json",
     [HALLU | {"problem": None}, HALLU | {"problem": "Which of the options?",
      "solution": "<answer>The first</answer>"}],
     [{"question_id": "vh-phy-0001", "problem_type": "free-form", "solution": "The first"}],
     {"left out: no problem (null)": 1}),
    ("video_hallu", "data.jsonl", [HALLU_TEST, HALLU_TEST | {"RowID": 9}, HALLU_TEST | {"Answer": "A stone."}],
     [{"question_id": "vh-dat-0000", "problem_type": "free-form", "categories": {"kind": ["Physics", "Gravity"]}},
      {"question_id": "vh-dat-0002", "solution": "A stone."}],
     {"said: not known whether its video is in the training data": 2, "left out: asked before of the same video": 1,
      "said: asked before of the same video, with another answer": 1}),
    ("charades_sta", "test.json", {"9AX": GROUNDING},
     [{"question_id": "cha-9AX-0", "solution": "5.0 to 11.0 of 33.75", "videos": ["Charades_v1_480/9AX.mp4"],
       "problem": "When does this happen in the video: a person puts a cup on the shelf?"},
      {"question_id": "cha-9AX-1", "solution": "20.0 to 33.75 of 33.75"}], {CUT: 1, NO_LENGTH: 1}),
    ("charades_sta", "charades_sta_test.txt", "9AX 5.0 11.25##a person sits.\n9AX 3 3##x\nB 0.0 2##he\n",
     [{"question_id": "cha-9AX-0", "solution": "5.0 to 11.25"}, {"question_id": "cha-B-0"}], {NO_LENGTH: 1}),
    ("activitynet", "val_2.json", {"v_a": GROUNDING, "v_b": {"duration": 9, "timestamps": [[9.5, 11]],
     "sentences": ["x"]}},
     [{"question_id": "anet-v_a-0", "videos": ["ActivityNet/v_a.mp4"]}, {}],
     {CUT: 1, NO_LENGTH: 1, "left out: it begins after the end of the video": 1}),
    ("time_r1", "train_2k5.json", [TIME_R1, TIME_R1 | {"qid": "q10", "video_start": 40.0, "video_end": 60.5}],
     [{"question_id": "tr1-q9", "solution": "5.0 to 11.0 of 100.0", "videos": ["v/1.mp4"]},
      {"solution": "5.0 to 11.0 of 20.5", "videos": ["v/1_40.00-60.50.mp4"],
       "cut": {"video": "v/1.mp4", "start": 40.0, "end": 60.5}}], {}),
    ("time_r1", "tvgbench.json", [TVG, TVG | {"start": 10.0, "end": 40.5}, TVG | {"answer": "5.0-5.0"}],
     [{"solution": "13.4 to 28.1 of 40.0", "data_source": "TVGBench", "question_id": "tvg-000"},
      {"solution": "13.4 to 28.1 of 30.5", "videos": ["t/1_10.00-40.50.mp4"]}], {NO_LENGTH: 1}),
    ("stvg_r1", "train.json", {"31": GROUNDING | {"objectid": [2, None, 1]}},
     [{"question_id": "stvg-31-0", "problem_type": "object and time", "solution": "2; 5.0 to 11.0 of 33.75",
       "problem": "a person puts a cup on the shelf.", "videos": ["31.mp4"]}],
     {CUT: 1, NO_LENGTH: 1, "left out: no mark on the object": 1}),
    ("sole_r1", "a.jsonl", [SOLE, SOLE | {"solution": "<answer>about a fifth</answer>"}],
     [{"question_id": "sole-ep7_012.png", "problem": "previous progress 30%", "solution": "45",
      "images": ["ep7_012.png"],
       "problem_type": "regression", "process": "The cup is above the shelf."}],
     {"left out: the answer is no number of per cent": 1}),
    ("clevrer", "validation.json", [CLEVRER],
     [{"question_id": "clv-12-1", "options": ["A. first", "B. second", "C. third"], "solution": "A,C",
       "videos": ["CLEVRER/video_10012.mp4"], "categories": {"answers": "several"}}],
     {"left out: a descriptive question": 1, "left out: no choice is right": 1}),
    ("next_gqa", "val.json", [GQA, GQA | {"id": 2, "glue": [[3, 3]]}],
     [{"problem_type": "grounded choice", "solution": "B; 5.0 to 11.0; 12.5 to 14.0 of 20.0",
       "options": ["(A) fear", "(B) joy"], "videos": ["NExTQA/videos/77.mp4"]}], {NO_LENGTH: 1, "left out: no span": 1}),
    ("tw_grpo", "clevrer_train.json",
     [{"id": 1, "video": "/clv/v_1.mp4", "question": "Which doesn't?", "options": ["A. x", "B. y", "C. z"],
       "is_negated": True, "problem": "…", "solution": "<answer>B,C</answer>"},
      {"id": 2, "video": "v_1", "question": "how did he", "options": ["(A) x", "(B) y"], "is_negated": True,
       "solution": "<answer>B</answer>"}],
     [{"question_id": "tw-1", "solution": "B,C", "videos": ["clv/v_1.mp4"]}],
     {"left out: its answer is inverted, its question is not": 1}),
    ("tw_grpo", "several.json",  # what is no single choice is not inverted, though the ids would be
     [GQA | {"id": 6, "question": "What did he do?", "options": ["A. x", "B. y", "C. z"], "answer": "B,C"},
      GQA | {"id": 10, "question": "What did he do?", "options": ["A. x"], "answer": "A"}],
     [{"question_id": "tw-6", "solution": "B,C"}, {"question_id": "tw-10", "solution": "A"}], {}),
    ("video_thinker", "a.json", [THINKER, THINKER | {"trace": "<think>no marks</think>"}],
     [{"question_id": "vt-1", "solution": "B", "process": TRACE}],
     {"left out: no time, caption and thought in its trace": 1}),
    ("vst", "train.parquet", [VST, VST | {"data_source": "yes or no", "question": "Is it red?",
                                          "reward_model": {"ground_truth": ["Yes"], "style": "rule"}}],
     [{"question_id": "vst-x1-0", "options": ["A. red", "B. blue"], "solution": "A", "problem_type": "multiple choice"},
      {"question_id": "vst-x1-1", "problem_type": "yes/no", "solution": "yes"}], {}),
    ("vst_sft", "train.jsonl", [vst_sft("v/1.mp4"), vst_sft(["1.png"]), [0, 512]],
     [{"question_id": "vst-sft-train-0-0", "problem_type": "thought", "process": "A man sits.", "options": [],
       "problem": "Notes so far:\nTime=0.0-20.0s A door.\nTime=20.0-24.0s", "solution": "A man sits.",
       "videos": ["v/1_20.00-24.00.mp4"], "cut": {"video": "v/1.mp4", "start": 20, "end": 24.0}},
      {"question_id": "vst-sft-train-0-2", "videos": ["v/1_26.00-30.00.mp4"], "process": "He goes.",
       "problem": "Notes so far:\nTime=0.0-20.0s A door.\nTime=20.0-24.0s A man sits.\nTime=26.0-30.0s"}],
     {"left out: its video is a list of images": 1, "left out: a question, without thinking": 1,
      "left out: a thought without a text or a time": 1}),
    ("turns", "a.jsonl", [WATCHED],
     [{"question_id": "w-0", "problem_type": "thought", "problem": "Time=0.0-4.0s", "process": "It is red.",
       "options": [], "videos": ["v/1_0.00-4.00.mp4"], "cut": {"video": "v/1.mp4", "start": 0, "end": 4}},
      {"question_id": "w-1", "problem": "Notes so far:\nTime=0.0-4.0s It is red.\nTime=4.0-8.5s",
       "process": "It is blue.", "videos": ["v/1_4.00-8.50.mp4"]},
      {"question_id": "w", "problem_type": "multiple choice", "process": "So A.", "videos": ["v/1_8.50-10.00.mp4"],
       "problem": "Notes so far:\nTime=0.0-4.0s It is red.\nTime=4.0-8.5s It is blue.\nTime=8.5-10.0s\nWhich is first?"}],
     {}),
    ("ms_swift", "a.jsonl",
     [SWIFT, SWIFT | {"messages": SWIFT["messages"] * 2}, SWIFT | {"messages": SWIFT["messages"][:1]},
      SWIFT | {"messages": SWIFT["messages"][:1], "solution": "A. left", "id": "x"},
      {"messages": [{"role": "user", "content": "Look: <video> How far?"}], "videos": "v/1.mp4", "solution": 0}],
     [{"question_id": "row-0", "problem": "Which way?\nA. left\nB. right", "options": ["A. left", "B. right"],
       "problem_type": "multiple choice", "solution": "B", "process": "It turns.", "videos": ["v/1.mp4"]},
      {"question_id": "x", "solution": "A"}, {"problem_type": "numerical", "problem": "Look: \n How far?",
                                              "solution": "0"}],
     {"left out: several turns": 1, "left out: no solution": 1, "changed: videos, then images, before the text": 1}),
    ("ms_swift", "no_mark.jsonl", [SWIFT | {"messages": [{"role": "user", "content": "Who?"}], "solution": "he"}],
     [{"problem": "Who?", "videos": ["v/1.mp4"]}], {"said: a file without its <video> comes before the text": 1}),
    ("llama_factory", "a.json",
     [FACTORY, {"instruction": "Who?", "input": "<video>", "output": "a man", "videos": ["v/1.mp4"]},
      FACTORY | {"conversations": [{"from": "human", "value": "Who?"}], "rejected": {"from": "gpt", "value": "x"}}],
     [{"problem": "How many?", "problem_type": "numerical", "solution": "3", "images": ["i/1.png"]},
      {"problem_type": "free-form", "solution": "a man", "videos": ["v/1.mp4"]}],
     {"said: its system message is not used": 1, "left out: a preference, not a question": 1,
      "changed: videos, then images, before the text": 1}),
    ("video_holmes", "test_Video-Holmes.json", [HOLMES],
     [{"question_id": "f1-2", "options": ["A. he", "B. she", "C. they", "D. it", "E. he", "F. none"], "solution": "B",
       "videos": ["videos_cropped/f1.mp4"], "categories": {"type": "SR"}}],
     {"said: two of its options are the same text": 1}),
    ("mvbench", "action_sequence.json", [MV, MV | {"start": 1.5, "end": 9}, MV | {"candidates": ["sit"]}],
     [{"solution": "B", "videos": ["MVBench/star/Charades_v1_480/a.mp4"], "categories": {"task": "action_sequence"}},
      {"videos": ["MVBench/star/Charades_v1_480/a_1.50-9.00.mp4"]}], {"left out: one candidate, right by default": 1}),
    ("tempcompass", "multi-choice.json", {"v1": {"order": [{"question": "Which?\nA. up\nB. down",
     "answer": "B. down"}]}},
     [{"solution": "B", "options": ["A. up", "B. down"], "videos": ["TempCompass/v1.mp4"],
       "categories": {"task": "multi-choice", "dimension": "order"}}], {}),
    ("tempcompass", "yes_no.json", {"v1": {"speed": [{"question": "Is it fast?", "answer": "no"}]}},
     [{"problem_type": "yes/no", "solution": "no", "question_id": "tc-yes_no-v1-speed-0"}], {}),
    ("tempcompass", "caption_matching.json",
     {"v1": {"action": [{"question": "Which fits?\nCaption A: he runs\nCaption B: he sits",
      "answer": "Caption B: he sits"},
                        {"question": "Which?\nOption 1: up\nOption 2: down", "answer": "Option 1"},
                        {"question": "Which?\nSentence A: up\nSentence B: down", "answer": "down"}]}},
     [{"problem": "Which fits?", "options": ["A. he runs", "B. he sits"], "solution": "B"}, {"solution": "A"},
      {"solution": "B"}], {}),
    ("tempcompass", "captioning.json",
     {"v1": {"order": [{"question": "Find it.\nInformation A: {'speed': 'up'}\nInformation B: {'speed': 'down'}",
                        "answer": "B. down"}]}},
     [{"solution": "B", "problem_type": "multiple choice", "options": ["A. {'speed': 'up'}", "B. {'speed': 'down'}"],
       "problem": "Which of these pieces of information agrees with the video?"}], {}),
    ("ovo_bench", "ovo_bench_new.json",
     [OVO, {"id": 4, "task": "REC", "activity": "jump", "test_info": [{"realtime": 3, "count": 0},
      {"realtime": 9, "count": 2}]},
      {"id": 5, "task": "SSR", "test_info": [{"realtime": 3, "type": 1, "step": "cut the leek"}]},
      {"id": 6, "task": "CRR", "question": "Who came?", "test_info": [{"realtime": 3, "type": 0}]}],
     [{"solution": "B", "categories": {"category": "backward", "task": "EPM"}, "videos": ["OVO-Bench/3.mp4"]},
      {"problem_type": "numerical", "solution": "0"}, {"solution": "2", "videos": ["OVO-Bench/4_1.mp4"]},
      {"problem_type": "yes/no", "solution": "yes"}, {"solution": "no"}],
     {"said: its answer is not the text of options[gt]; gt is taken": 1}),
    ("streaming_bench", "questions_real.json",
     [SB, SB | {"questions": [SB["questions"][0] | {"time_stamp": "00:12450"}]}],
     [{"solution": "B", "videos": ["real/s1_30.00-90.00.mp4"], "problem": "What is read?"},
      {"options": ["A. one", "B. two"], "videos": ["real/s1_0.00-20.00.mp4"], "problem": "And now?"}],
     {"left out: its time stamp is none": 1}),
    ("streaming_bench", "questions_sqa.json", [[SB | {"questions": [question]} for question in SB["questions"]]],
     [{}, {"problem": "Asked before: What is read? Answered: B. two\nAnd now?"}], {}),
]  # fmt: skip


@pytest.mark.parametrize("source, file, content, expected, counted", SOURCES, ids=[f"{c[0]}-{c[1]}" for c in SOURCES])
def test_a_source_makes_rows_and_counts_the_rest(tmp_path, capsys, source, file, content, expected, counted):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content) if isinstance(content, str) else write_official(path, content)
    made, counts = make_rows(read_official(path, source), source)
    assert counts == counted
    loaded = load_rows([{"path": str(path), "source": source}], shuffle=False, unique_ids=False)  # every check
    assert len(made) == len(loaded) == len(expected)
    for (*_, raw), row, wanted in zip(made, loaded, expected, strict=True):
        assert {key: {**raw, **row}[key] for key in wanted} == wanted
    told = capsys.readouterr().out
    assert all(reason in told for reason in counted) and (f"source {source}" in told) == bool(counted)


BROKEN = [  # of the official format: source, file, content, what the error says
    ("video_r1", "a.json", [VIDEO_R1 | {"data_type": "audio"}],
     r"row 1, question_id '7', data_type: expected 'video' or"),
    ("longvideo_reason", "a.json", [LONG | {"videos": ["1.mp4", "2.mp4"]}], "videos: expected one path"),
    ("seed_bench_r1", "a.json", [SBR1_TEST], r"\(file\): expected a name that ends in _L1, _L2 or _L3"),
    ("seed_bench_r1", "x_L1.jsonl", [SBR1, SBR1_TEST | {"golden_choice_idx": 2}],
     "row 2, .*golden_choice_idx: expected one"),
    ("primo_r1", "a.json", [PRIMO | {"problem_type": "guess"}],
     "row 1, question_id '5', problem_type: expected one of num"),
    ("primo_r1", "a.json", [{k: v for k, v in PRIMO.items() if k != "current_frame_path"}],
     "current_frame_path: .* no such"),
    ("seed_bench_r1", "a.jsonl", [SBR1 | {"negative_answers": "wash"}],
     "negative_answers: expected a list of texts; came 'w"),
    ("primo_r1", "a.json", [PRIMO | {"init_frame_path": None}], "init_frame_path: expected a non-empty text; came null"),
    ("vst", "a.json", [VST | {"reward_model": {"ground_truth": "12"}}], "reward_model: expected ground_truth as a list"),
    ("turns", "a.jsonl", [WATCHED | {"thoughts": [[0, 4, "x"], [5, 8, "y"]]}], "thoughts: expected clips from 0"),
    ("vst_sft", "a.jsonl", [vst_sft("v.mp4"), [{"role": "user", "content": []}]], "not in the official form of .*_sft"),
    ("turns", "a.jsonl", [WATCHED | {"end": 8}], "thoughts: expected clips from 0"),
    ("turns", "a.jsonl", [WATCHED | {"videos": ["a", "b"]}], "videos: expected one video"),
    ("stvg_r1", "a.json", {"31": GROUNDING | {"objectid": ["2", None, 1]}}, "objectid: expected a whole number or null"),
    ("stvg_r1", "a.json", {"31": GROUNDING | {"objectid": [2]}}, "objectid: expected a whole number or null for each"),
    ("frame_list", "a.json", [{"frames": ["1.png"], "frames_fps": 2, "frames_indices": [0], "videos": ["a.mp4"]}],
     r"videos: expected none beside frames; came \['a.mp4'\]"),
    ("video_hallu", "synthetic.json", [HALLU, HALLU | {"path": None}],
     "row 2, .*path: expected a non-empty text; came null"),
    ("charades_sta", "a.txt", "9AX 5.0 11.25##a\n9AX 5.0##b\n",
     r"line 2: expected 'VID start end##sentence', came '9AX 5"),
    ("charades_sta", "a.json", {"9AX": GROUNDING | {"sentences": ["a"]}}, "timestamps: expected as many as sentences"),
    ("charades_sta", "a.json", {"9AX": GROUNDING | {"timestamps": [[-1, 5]], "sentences": ["a"]}},
     "expected seconds from 0"),
    ("time_r1", "a.json", [TIME_R1, TIME_R1 | {"video_end": 60.0}], "row 2, .*start: expected both ends of a part"),
    ("mvbench", "state_change.json", [MV | {"start": 9, "end": 1.5}], r"start: expected both ends .* came \[9, 1.5\]"),
    ("time_r1", "a.json", [TVG | {"answer": "from 3 on"}], "row 1, .*answer: expected a span like '13.4-28.1'"),
    ("sole_r1", "a.json", [SOLE | {"prompt": "no JSON"}], "row 1, .*official columns of SOLE-R1; came JSONDecodeError"),
    ("clevrer", "a.json", [{"scene_index": 1}],
     "row 1, .*questions: expected the official columns of CLEVRER; came KeyError"),
    ("tw_grpo", "a.json", [{"id": 1, "question": "?", "options": [], "solution": "left"}],
     "solution: expected the letter of"),
    ("ms_swift", "a.json", [SWIFT | {"videos": []}], "videos: expected a file for each <video>; came 0 files, 1 marks"),
    ("ms_swift", "a.json", [{"messages": [{"role": "me", "content": "?"}]}],
     "role: expected one of system, user, assis"),
    ("video_holmes", "a.json", [HOLMES | {"Answer": "G"}], "Answer: expected one of A, B, C, D, E, F; came 'G'"),
    ("mvbench", "state_change.json", [MV, MV | {"answer": "fly"}], "row 2, .*'fly', 0 times there"),
    ("mvbench", "state_change.json", [MV | {"candidates": ["sit", "sit"]}], "'sit', 2 times there"),
    ("mvbench", "my_task.json", [MV], r"my_task.json.*\(file\): expected one of action_sequence.*came 'my_task'"),
    ("tempcompass", "yes_no.json", {"v": {"order": [{"question": "?", "answer": "maybe"}]}},
     "answer: expected one of yes, no"),
    ("tempcompass", "caption_matching.json", {"v": {"order": [{"question": "?\nA. x\nB. y", "answer": "A"}]}},
     "two last lines"),
    ("ovo_bench", "a.json", [OVO | {"gt": 2}], "gt: expected an index of 2 options; came 2"),
    ("streaming_bench", "questions_omni.json", [SB],
     "expected one of questions_real, questions_sqa; came 'questions_omni'"),
]  # fmt: skip


@pytest.mark.parametrize("source, file, content, message", BROKEN, ids=[f"{i}-{c[0]}" for i, c in enumerate(BROKEN)])
def test_a_record_that_breaks_the_official_format_is_an_error_with_its_row(tmp_path, source, file, content, message):
    path = tmp_path / file
    path.write_text(content) if isinstance(content, str) else write_official(path, content)
    with pytest.raises(RowError, match=message):
        load_rows([{"path": str(path), "source": source}])


def test_primos_columns_are_not_taken_for_video_r1s(tmp_path):
    with pytest.raises(RowError, match="these are PRIMO's columns. Set `source: primo_r1`"):
        load_rows([{"path": str(write_official(tmp_path / "a.json", [PRIMO]))}])


def test_where_chooses_among_official_columns_and_limit_among_rows(tmp_path):
    rows = [HALLU | {"problem": None}, HALLU, HALLU | {"data_source": "other"}, HALLU]
    entry = {"path": str(write_official(tmp_path / "phys.json", rows)), "source": "video_hallu"}
    assert load_rows([entry | {"limit": 2}], shuffle=False)["question_id"][:] == ["vh-phy-0001", "vh-phy-0002"]
    chosen = load_rows([entry | {"where": {"data_source": "other"}}])
    assert chosen["question_id"][:] == ["vh-phy-0002"]


def test_a_source_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_source.py").write_text(
        "def numbers(record, *, file):\n"
        "    if record['n'] > 1:\n        return ['left out: large']\n"
        "    return [{'question_id': record['n'], 'problem': '?', 'problem_type': 'numerical', 'solution': '1'}]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write_official(tmp_path / "n.jsonl", [{"n": 0}, {"n": 1}, {"n": 2}])
    rows = load_rows([{"path": str(path), "source": "my_source:numbers"}], shuffle=False)
    assert rows["question_id"][:] == ["0", "1"] and "left out: large" in capsys.readouterr().out
    with (tmp_path / "my_source.py").open("a") as module:
        module.write("\n\ndef one(record, *, file):\n    return numbers(record, file=file)[0]\n")
    importlib.reload(importlib.import_module("my_source"))
    with pytest.raises(RowError, match="row 1, .*TypeError: my_source:one gave .* not a list of rows"):
        load_rows([{"path": str(path), "source": "my_source:one"}])


def test_options_follow_from_the_id_alone():
    letters = []
    for sample in range(40):
        record = SBR1 | {"sample_id": sample}
        (row,), (again,) = seed_bench_r1.convert(record, file="a"), seed_bench_r1.convert(dict(record), file="b")
        assert row == again and row["options"][ord(row["solution"]) - ord("A")].endswith("take cup")
        letters.append(row["solution"])
    assert set(letters) == set("ABCD")


def test_videohallus_leak_is_told_by_the_training_file_beside(tmp_path):
    write_official(tmp_path / "synthetic_data_split.json", [HALLU])
    path = write_official(tmp_path / "data.jsonl", [HALLU_TEST, HALLU_TEST | {"video_path": "video/other.mp4"}])
    questions = read_questions(path, benchmark="video_hallu")
    assert [q["raw"]["categories"]["video"] for q in questions] == ["also in the training data", "held out"]


@pytest.mark.parametrize(
    "question, negated",
    [("What did he do after that?", "What didn't he do after that?"), ("Which event will happen?",
     "Which event won't happen?"),
     ("Where is she?", "Where isn't she?"), ("Why did he run?", None), ("How does it end?", None),
     ("What the man is able to do?", None), ("What did he not do?", None), ("Which able dog runs?", None)],
)  # fmt: skip
def test_a_question_is_negated_or_not_inverted(question, negated):
    assert tw_grpo.negate(question) == negated


def test_inversion_negates_the_question_whenever_it_inverts_the_answer():
    inverted = kept = 0
    for number in range(60):
        record = GQA | {"id": number, "options": ["(A) one", "(B) two", "(C) three", "(D) four"], "answer": "(C)"}
        record["question"] = "What did he do?" if number % 2 else "Why did he run?"
        row, *counted = tw_grpo.convert(record, file="a.json")
        if row["question_id"].endswith("-inv"):
            inverted += 1
            texts = {option[:1]: option[3:] for option in row["options"]}
            right = {texts[letter] for letter in row["solution"].split(",")}
            assert row["problem"] == "What didn't he do?" and "three" in texts.values()
            assert right == set(texts.values()) - {"three"} and right
        else:
            assert (row["problem"], row["solution"], len(row["options"])) == (record["question"], "C", 4)
            kept += counted == ["kept: it cannot be negated"]
        assert tw_grpo.convert(record, file="b.json")[0] == row
    assert 8 <= inverted <= 22 and 8 <= kept <= 22


@pytest.mark.parametrize("columns, rows, size", [(3, 2, (1162, 773)), (3, 1, (1162, 384)), (2, 1, (773, 384)),
                                                 (2, 2, (773, 773))])  # fmt: skip
def test_sole_r1s_composite(columns, rows, size):
    frames = [[Image.new("RGB", (640, 480), (x + 1, y + 1, 9)) for x in range(columns)] for y in range(rows)]
    picture = sole_r1.make_composite(frames)
    assert picture.size == size and picture.tobytes() == sole_r1.make_composite(frames).tobytes()
    pixels = picture.load()
    for x, first in enumerate((0, 389, 778)[:columns]):
        for y in range(rows):
            top = 389 * y + 48  # 640 × 480 becomes 384 × 288, centred
            colour, black = (x + 1, y + 1, 9), (0, 0, 0)
            inside = [(first, top), (first + 383, top), (first, top + 287)]
            assert [pixels[place] for place in inside] == [colour] * 3
            assert pixels[first, top - 1] == pixels[first, top + 288] == black
    assert all(pixels[x, 100] == (0, 0, 0) for x in range(384, 389))


def test_macro_means():
    ones, zeros = np.ones(1), np.zeros(9)
    assert mean_of_means({"a": ones, "b": zeros}) == 0.5  # not .1, the mean over rows
    (told,) = mvbench.totals({"task": {"a": ones, "b": zeros}}).items()
    assert told == ("mean of 2 tasks (the benchmark's own total)", 0.5)
    tasks = {"EPM": ones, "HLD": zeros, "OJR": ones, "REC": zeros, "SSR": zeros}
    assert list(ovo_bench.totals({"task": tasks}).values()) == pytest.approx([(0.5 + 1 + 0) / 3, 0.75])
    drawn = {"EPM": np.array([[1.0, 0.0], [1.0, 1.0]])}  # (rows, draws), of the bootstrap
    assert list(ovo_bench.totals({"task": drawn}).values())[0].tolist() == [1.0, 0.5]
    assert tempcompass.totals({"task": {"multi-choice": ones, "yes_no": zeros}}) == {"multiple choice alone": 1.0}


# ---- parts of videos


@pytest.fixture(scope="module")
def cutter():
    return load_script("evaluation/cut_videos.py")


def grey(count: int, step: int = 20) -> np.ndarray:
    """Frames (T, 32, 48, 3) whose brightness is their index times `step`."""
    return (np.arange(count, dtype=np.uint8) * step)[:, None, None, None] * np.ones((32, 48, 3), np.uint8)


def shown(path) -> tuple[float, list[int]]:
    """(fps, the indices that the brightness of its frames tells) of a whole clip."""
    clip = VideoLoader(VideoSettings(100.0, 2, 64, 16 * 16, 64 * 64)).load(path, row_id="q")
    return clip.fps, [round(float(frame.mean()) / 20) for frame in clip.frames]


def test_parts_are_cut_at_their_times(cutter, tmp_path, capsys):
    videos = tmp_path / "videos"
    (videos / "v").mkdir(parents=True)
    write_clip(videos / "v" / "1.mp4", grey(12))
    fps = tiny.FPS
    whole = shown(videos / "v" / "1.mp4")
    assert whole == (fps, list(range(12)))
    rows = [TIME_R1 | {"qid": n, "video_start": a / fps, "video_end": b / fps, "timestamp": [0.0, 1.0]}
            for n, (a, b) in enumerate([(4, 8), (2.5, 6), (90, 99)])]  # fmt: skip
    path = write_official(tmp_path / "train_2k5.json", rows)
    command = ["--source", "time_r1", "--path", str(path), "--video_dir", str(videos)]
    assert cutter.main(command) == 3
    told = capsys.readouterr().out
    assert "3 parts of videos, 0 are there" in told and "shows nothing between start and end" in told
    names = [row["videos"][0] for row in load_rows([{"path": str(path), "source": "time_r1"}], shuffle=False)]
    assert shown(videos / names[0]) == (fps, [4, 5, 6, 7])
    assert shown(videos / names[1])[1][0] == 2  # what is on the screen when the part begins
    assert cutter.main(command) == 3 and "2 are there already" in capsys.readouterr().out
    assert not list(videos.rglob("*.part"))


def test_a_part_late_in_a_video_is_sought(cutter, tmp_path):
    frames = np.concatenate([grey(12)] * 50)  # a key frame every 250
    write_clip(tmp_path / "1.mp4", frames)
    cutter.write_video(tmp_path / "part.mp4", cutter.frames_of(tmp_path / "1.mp4", 554 / tiny.FPS, 558 / tiny.FPS, 1.0))
    assert shown(tmp_path / "part.mp4") == (tiny.FPS, [554 % 12, 555 % 12, 556 % 12, 557 % 12])


def test_a_folder_of_frames_becomes_a_video_with_its_times(cutter, tmp_path):
    folder = tmp_path / "MVBench" / "tvqa" / "frames_fps3_hq" / "clip"
    folder.mkdir(parents=True)
    for index, pixels in enumerate(grey(12)):
        Image.fromarray(pixels).save(folder / f"{index + 1:05d}.png")
    path = write_official(tmp_path / "episodic_reasoning.json", [MV | {"video": "clip", "start": 1.0, "end": 3.0}])
    assert cutter.main(["--source", "mvbench", "--path", str(path), "--video_dir", str(tmp_path)]) == 0
    (row,) = load_rows([{"path": str(path), "source": "mvbench"}])
    fps, indices = shown(tmp_path / row["videos"][0])
    assert indices == [3, 4, 5, 6, 7, 8] and fps == pytest.approx(3.0)


def test_a_list_of_frames_becomes_a_video_with_their_times(cutter, tmp_path, capsys):
    names = []
    for index, pixels in enumerate(grey(4)):
        names.append(f"f/{index}.png")
        (tmp_path / "f").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / names[-1])
    row = {"question_id": "q", "problem": "?", "problem_type": "numerical", "solution": "1", "frames": names,
           "frames_fps": 30, "frames_indices": [0, 15, 60, 75]}  # fmt: skip
    path = write_official(tmp_path / "rows.jsonl", [row])
    assert cutter.main(["--source", "frame_list", "--path", str(path), "--video_dir", str(tmp_path)]) == 0
    (made,) = load_rows([{"path": str(path), "source": "frame_list"}])
    clip = VideoLoader(VideoSettings(2.0, 2, 64, 16 * 16, 64 * 64)).load(tmp_path / made["videos"][0], row_id="q")
    seen = [(round(i / clip.fps, 2), round(float(f.mean()) / 20)) for i, f in zip(clip.frames_indices, clip.frames)]
    starts = {0: 0.0, 1: 0.5, 2: 2.0, 3: 2.5}  # what is on the screen at a time is the last that has begun
    assert {shown for _, shown in seen} == set(starts)
    assert all(shown == max(i for i, start in starts.items() if start <= time + 1e-3) for time, shown in seen), seen
    others = [row | {"frames": [*names[:3], last]} for last in ("f/9.png", "../9.png")]
    lost = write_official(tmp_path / "lost.jsonl", [other | {"question_id": n} for n, other in enumerate(others)])
    assert cutter.main(["--source", "frame_list", "--path", str(lost), "--video_dir", str(tmp_path)]) == 3
    told = capsys.readouterr().out
    assert "f/9.png: No such file" in told and "videos: expected a path relative to media_root, without '..'" in told
    bad = write_official(tmp_path / "bad.jsonl", [row | {"frames_indices": [0, 15, 15, 75]}])
    with pytest.raises(RowError, match="frames_indices: expected rising indices"):
        cutter.main(["--source", "frame_list", "--path", str(bad), "--video_dir", str(tmp_path)])
    with pytest.raises(RowError, match="frames_indices: expected rising indices"):
        load_rows([{"path": str(bad), "source": "frame_list"}])


def test_a_hub_dataset_and_one_saved_by_datasets_may_have_a_source(tmp_path, monkeypatch):
    rows = [VST, VST | {"question": "Who?\nA. he\nB. she"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(rows))
    entry = {"path": "someone/vst", "source": "vst", "media_root": str(tmp_path)}
    assert load_rows([entry], shuffle=False)["question_id"][:] == ["vst-x1-0", "vst-x1-1"]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    loaded = load_rows([{"path": str(tmp_path / "saved"), "source": "vst"}], shuffle=False)
    assert loaded["question_id"][:] == ["vst-x1-0", "vst-x1-1"]
    with pytest.raises(RowError, match="what `source` reads has no split 'test'"):
        load_rows([{"path": str(write_official(tmp_path / "a.jsonl", rows)), "source": "vst", "split": "test"}])


def test_each_source_says_where_it_is_from_and_is_in_the_page():
    root = EVALUATION.parent
    page = (root / "docs" / "sources.md").read_text() + (EVALUATION / "README.md").read_text()
    names = {path.stem for path in (root / "src/veripo_trl/sources").glob("*.py")} - {"__init__", "record"}
    assert set(BENCHMARKS) <= names == {case[0] for case in [*SOURCES, *CASES]} | {"frame_list"}
    for name in sorted(names):
        said = find_source(name).__doc__
        assert "\nSource: " in said and "icence" in said or "\nForm: " in said, name
        assert f"`{name}`" in page, name


def test_a_benchmarks_own_total_stands_beside_ours():
    script = load_script("evaluation/calculate_score.py")
    scored = [{"benchmark": "MVBench", "ours": float(task == "a"), "released": 0.0, "categories": {"task": task}}
              for task in "a" + "b" * 9]  # fmt: skip
    told = script.totals_of(scored)
    assert told[0].startswith("MVBench, ours: 50.00%")
    assert told[0].endswith("mean of 2 tasks (the benchmark's own total).")
