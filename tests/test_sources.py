"""From official columns to our rows: each source on made-up records, and on the traps that its docstring names."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from veripo_trl.data.schema import RowError
from veripo_trl.evaluate.questions import read_questions
from veripo_trl.sources import BENCHMARKS
from veripo_trl.sources.record import ground_truths, is_number, read_options

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
     [vsi(78, "object_counting", "2", None), vsi(5, "object_rel_direction_hard", "B", ["A. front-left", "B. back-left"])],
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
    with pytest.raises(RowError, match="source 'video_xyz': expected module:convert, or one of .*video_mme"):
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
         "row 1, question_id 1, alternatives.*'m' of a numerical row"),
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


@pytest.mark.parametrize("text, truths", [("B", ["B"]), (3, ["3"]), ("['1', '2']", ["1", "2"]), ("['1', '2]", ["1", "2"]),
                                          ("[1, 2]", ["[1, 2]"])])  # fmt: skip
def test_several_truths_in_one_text(text, truths):
    assert ground_truths(text) == truths


@pytest.mark.parametrize("text, bare", [("3", True), ("-3.5", True), ("$4$", True), ("1,000", True), ("24/7", True),
                                        ("12%", True), ("x+1", False), ("m^2", False), ("about 3", False)])  # fmt: skip
def test_bare_numbers(text, bare):
    assert is_number(text) == bare
