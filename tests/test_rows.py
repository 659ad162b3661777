import gzip
import json
import logging
import os
import pickle
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers import documented
from hub_server import HubServer

from veripo_trl.data import media_paths
from veripo_trl.data import rows as rows_module
from veripo_trl.data.files import COMPRESSED
from veripo_trl.data.media_paths import check_media, resolve_media
from veripo_trl.data.rows import DatasetSource, load_rows, read_rows
from veripo_trl.data.schema import COLUMNS, RowError, rows_to_dataset
from veripo_trl.errors import ConfigError
from veripo_trl.files.disk import FileError
from veripo_trl.hub.push import push_folder

CHOICE = {
    "question_id": "q1",
    "problem": "Which colour comes last?",
    "options": ["A. red", "B. blue"],
    "problem_type": "multiple choice",
    "solution": "B",
    "process": "Red, then blue: B.",
    "videos": ["v/1.mp4"],
    "images": [],
    "data_source": "unit",
}
NUMBER = {"question_id": "q2", "problem": "How many?", "problem_type": "numerical", "solution": "3"}
VIDEO_R1 = {
    "problem_id": 7,
    "problem": "Which one?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. a cat", "B. a dog"],
    "solution": "<answer>A</answer>",
    "path": "./STAR/7.mp4",
    "data_source": "STAR",
}


def numbers(count, first=0):
    return [NUMBER | {"question_id": f"n{i}", "solution": str(i)} for i in range(first, first + count)]


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix in COMPRESSED:
        plain = Path(write(file.with_suffix(""), rows))
        with pyarrow.output_stream(file, compression=COMPRESSED[file.suffix]) as stream:
            stream.write(plain.read_bytes())
        plain.unlink()
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return str(file)


def ids(dataset):
    return list(dataset["question_id"])


def load(path, **source):
    return load_rows([{"path": path, **source}], shuffle=False)


# ---- reading


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet", "rows.jsonl.gz", "rows.json.zst"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    dataset = load(write(tmp_path / name, [CHOICE, NUMBER]))
    defaults = {"options": [], "process": None, "videos": [], "images": [], "data_source": "rows"}
    root = {"media_root": str(tmp_path)}
    assert list(dataset) == [CHOICE | root, NUMBER | defaults | root]
    assert tuple(dataset.column_names) == COLUMNS
    assert not isinstance(dataset, datasets.IterableDataset)


def test_column_types_are_fixed_so_that_any_two_datasets_concatenate(tmp_path):
    texts = load(write(tmp_path / "a.json", [NUMBER]))  # every optional column empty
    videos = load(write(tmp_path / "b.json", [CHOICE]))
    assert texts.features == videos.features
    assert ids(datasets.concatenate_datasets([texts, videos])) == ["q2", "q1"]


def test_directories(tmp_path):
    write(tmp_path / "d" / "data" / "train-00000-of-00002.parquet", numbers(2))
    write(tmp_path / "d" / "data" / "train-00001-of-00002.parquet", numbers(2, first=2))
    write(tmp_path / "d" / "data" / "test.parquet", numbers(1, first=9))
    assert ids(load(str(tmp_path / "d"))) == ["n0", "n1", "n2", "n3"]
    assert ids(load(str(tmp_path / "d"), split="test")) == ["n9"]
    with pytest.raises(RowError, match=r"dev\.\* or dev-\*; data files here: test.parquet"):
        load(str(tmp_path / "d"), split="dev")
    assert load(str(tmp_path / "d"))[0]["media_root"] == str(tmp_path / "d")

    saved = load(write(tmp_path / "a.json", numbers(2)))
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(str(tmp_path / "saved"))
    assert ids(load(str(tmp_path / "saved"), split="test")) == ["n1"]
    saved.select([1, 0]).save_to_disk(str(tmp_path / "one"))
    assert ids(load(str(tmp_path / "one"))) == ["n1", "n0"]
    with pytest.raises(RowError, match="no split 'dev'; it has train, test"):
        load(str(tmp_path / "saved"), split="dev")


def test_a_hub_dataset_is_asked_for_by_name_split_and_revision_and_needs_a_media_root(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([CHOICE, NUMBER | {"options": []}]).select([1, 0])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"path": "someone/some-rows", "name": "video", "split": "test", "revision": "abc"}
    dataset = load_rows([source | {"media_root": str(tmp_path)}], shuffle=False)
    assert asked == [(("someone/some-rows", "video"), {"split": "test", "revision": "abc"})]
    assert ids(dataset) == ["q2", "q1"]
    with pytest.raises(RowError, match="someone/some-rows.*media_root"):
        load_rows([source])
    assert load_rows([source | {"where": {"question_id": "q2"}}])[0]["media_root"] == ""


def test_options_are_normalised_only_when_unambiguous(tmp_path):
    rows = [
        CHOICE | {"question_id": "dict", "options": {"B": "blue", "A": "red"}},
        NUMBER | {"question_id": "none", "options": None},
        NUMBER | {"question_id": "int", "solution": 3, "process": " "},
    ]
    dataset = load(write(tmp_path / "a.json", rows))
    assert list(dataset["options"]) == [["A. red", "B. blue"], [], []]
    assert dataset[2]["solution"] == "3" and dataset[2]["process"] is None


def test_video_r1_is_read_as_it_is(tmp_path):
    rows = [
        VIDEO_R1,
        VIDEO_R1
        | {
            "problem_id": 8,
            "data_type": "image",
            "path": "./Math/8.png",
            "problem_type": "free-form",
            "options": [],
            "solution": "<answer> two red cups </answer>",
            "process": "<think>\nI see two.\n</think>",
            "data_source": "Math",
        },
    ]
    dataset = load(write(tmp_path / "Video-R1-260k.json", rows))
    root = {"media_root": str(tmp_path)}
    assert list(dataset) == [
        {
            "question_id": "7",
            "problem": "Which one?",
            "options": ["A. a cat", "B. a dog"],
            "problem_type": "multiple choice",
            "solution": "A",
            "process": None,
            "videos": ["STAR/7.mp4"],
            "images": [],
            "data_source": "STAR",
        }
        | root,
        {
            "question_id": "8",
            "problem": "Which one?",
            "options": [],
            "problem_type": "free-form",
            "solution": "two red cups",
            "process": "\nI see two.\n",
            "videos": [],
            "images": ["Math/8.png"],
            "data_source": "Math",
        }
        | root,
    ]


def test_video_r1_rows_may_leave_data_source_blank(tmp_path):
    dataset = load(write(tmp_path / "Video-R1-260k.json", [VIDEO_R1 | {"data_source": ""}]))
    assert dataset["data_source"][:] == ["Video-R1-260k"]


# ---- choosing and mixing


@pytest.mark.parametrize(
    "where, limit, expected",
    [
        ({"data_type": "video"}, None, ["0", "2", "4"]),
        ({"data_type": "image", "data_source": ["s1", "s5"]}, None, ["1", "5"]),
        ({"problem_id": [4, 2]}, None, ["2", "4"]),
        ({"data_type": "video"}, 2, ["0", "2"]),
        (None, 3, ["0", "1", "2"]),
    ],
)
def test_where_and_limit(tmp_path, where, limit, expected):
    kinds = ["video", "image"]
    rows = [VIDEO_R1 | {"problem_id": i, "data_type": kinds[i % 2], "data_source": f"s{i}"} for i in range(6)]
    assert ids(load(write(tmp_path / "a.json", rows), where=where, limit=limit)) == expected


def test_rows_left_out_are_not_checked(tmp_path):
    path = write(tmp_path / "a.json", [CHOICE, NUMBER | {"solution": "many"}])
    assert ids(load(path, where={"problem_type": "multiple choice"})) == ["q1"]
    assert ids(load(path, limit=1)) == ["q1"]


def test_a_function_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text(
        documented("own rows") + "\ndef none():\n    yield {'problem': 'Why?'}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    source = {"path": "my_rows:colours", "media_root": str(tmp_path), "limit": 2}
    rows, problems = read_rows([source])
    assert [row["question_id"] for row in rows] == ["colour-0", "colour-1"] and not problems
    assert {row["media_root"] for row in rows} == {str(tmp_path)} and rows[1]["videos"] == ["001.mp4"]
    for changes, error, says in (
        ({"media_root": None}, RowError, "my_rows:colours: its rows have media: give the `media_root`"),
        ({"revision": "main"}, RowError, "my_rows:colours is local: `name` and `revision`"),
        ({"path": "my_rows:none"}, RowError, "my_rows:none: no column question_id"),
        ({"path": "my_rows:colors"}, ConfigError, "my_rows:colors cannot be imported .*no attribute"),
    ):
        with pytest.raises(error, match=says):
            read_rows([{**source, **changes}])


def test_sources_are_mixed_and_shuffled_by_seed(tmp_path):
    sources = [
        DatasetSource(write(tmp_path / "a" / "a.json", numbers(20))),
        {"path": write(tmp_path / "b" / "b.jsonl", numbers(20)), "id_prefix": "b-", "media_root": str(tmp_path)},
    ]
    in_order = [f"n{i}" for i in range(20)] + [f"b-n{i}" for i in range(20)]
    assert ids(load_rows(sources, shuffle=False)) == in_order
    one = load_rows(sources, seed=1)
    assert ids(one) == ids(load_rows(sources, seed=1)) != in_order
    assert sorted(ids(one)) == sorted(in_order)
    assert ids(load_rows(sources, seed=2)) != ids(one)
    roots = {row["question_id"]: (row["media_root"], row["data_source"]) for row in one}
    assert roots["n3"] == (str(tmp_path / "a"), "a")
    assert roots["b-n3"] == (str(tmp_path), "b")


def test_a_file_listed_twice_is_parsed_once(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", [CHOICE, NUMBER])
    read, calls = rows_module.read_file, []
    monkeypatch.setattr(rows_module, "read_file", lambda file: calls.append(file) or read(file))
    assert len(load_rows([{"path": path, "where": {"question_id": q}} for q in ("q1", "q2")])) == 2
    assert len(calls) == 1


@pytest.mark.parametrize(
    "source, message",
    [
        ({"limits": 3}, r"expected `path` and any of split, where, limit, media_root, name, revision, id_prefix"),
        ({"where": {"datasource": "x"}}, r"`where` names \['datasource'\]; the columns are question_id, problem"),
        ({"where": {"data_source": "x"}}, r"no row has data_source = 'x'; values there: 'unit', null"),
        ({"where": "data_source == 'x'"}, "`where` must be a dict"),
        ({"limit": 0}, "`limit` must be 1 or more"),
        ({"limit": True}, "`limit` must be a int"),
        ({"limit": "3"}, "`limit` must be a int"),
        ({"split": "test"}, "a file has no split 'test'"),
        ({"revision": "main"}, "`name` and `revision` are for Hub datasets"),
        ({"media_root": "/no/such/place"}, "media_root /no/such/place is not a directory"),
        ({"path": "no-such.json"}, "no-such.json: no such file"),
        ({"path": "/no/such/directory"}, "no such directory"),
        ({"path": 3}, "`path` must be a str"),
        ({"path": ""}, "`path` is empty"),
    ],
)
def test_a_wrong_source_is_refused(tmp_path, source, message):
    path = write(tmp_path / "a.json", [CHOICE, NUMBER])
    with pytest.raises(RowError, match=message):
        load_rows([{"path": path} | source])


@pytest.mark.parametrize("sources", [[], None, "a.json", {"path": "a.json"}, ["a.json"], [{"split": "train"}]])
def test_sources_must_be_a_list_of_dicts(sources):
    with pytest.raises(RowError, match="expected `path`|must be a list"):
        load_rows(sources)


# ---- bad files and bad rows


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", b"", r"a.json, line 1: not JSON"),
        ("a.json", b"[]", "no rows in it"),
        ("a.jsonl", b"\n\n", "no rows in it"),
        ("a.jsonl", b'[{"question_id": "q1"}]', "a.jsonl: expected a row a line, came one list"),
        ("a.json", b'{"data": []}', "expected a JSON list"),
        ("a.json", b'[{"question_id": "q1"},\n  {"question_id": }]', r"a.json, line 2: not JSON"),
        ("a.jsonl", json.dumps(NUMBER).encode() + b'\n\n{"question_id"', r"a.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"question_id": "\xff"}', "not UTF-8"),
        ("a.json", b'[1,\n' + b"[" * 100_000, "a.json, line 1: .*nested hundreds deep. Remove it"),
        ("a.jsonl", b"{}\n" + b'{"a":' * 1000 + b"1" + b"}" * 1000, "a.jsonl, line 2: .*nested"),
        ("a.json", b'[{"question_id": 1},\n{"solution": ' + b"7" * 5000 + b"}]", "line 1: .*over 4,300 digits"),
        ("a.jsonl.gz", gzip.compress(json.dumps(NUMBER).encode(), mtime=0)[:40], "not a readable file"),
        ("a.jsonl.zst", b'{"question_id": 1}', "not a readable file"),
        ("a.csv", b"question_id,problem", "expected a .parquet, .jsonl, .json file"),
        ("a.parquet", b"PAR1 but not really", "not a readable Parquet file"),
        ("a.parquet", b"", "not a readable Parquet file"),
        (
            "a.json",
            b'[{"question_id": 1, "question": "?", "answer": "A"}]',
            "no column problem, problem_type, solution",
        ),
        (
            "a.json",
            json.dumps([NUMBER | {"video": "1.mp4"}]).encode(),
            "'video' would be ignored; rename it to 'videos'",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((RowError, FileError), match=message) as caught:
        load(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def cut(file):
    file.write_bytes(file.read_bytes()[:-200])


def scramble(file):
    """Other bytes where the texts are, which are then no UTF-8."""
    content = file.read_bytes()
    assert b"How many?" in content
    file.write_bytes(content.replace(b"How many?", b"How \xff\xfe\xff\xfd?"))


def exchange(file):
    """Another text, which only a checksum tells."""
    file.write_bytes(file.read_bytes().replace(b"How many?", b"Who many?"))


DAMAGE = {
    "a.parquet": [cut, scramble, exchange],
    "saved/data-00000-of-00001.arrow": [cut, scramble, Path.unlink],
    "saved/state.json": [cut, lambda file: file.write_text("{}")],
    "saved/dataset_info.json": [cut, lambda file: file.write_text('{"features": {"a": "b"}}')],
}


@pytest.mark.parametrize("name, damage", [(name, damage) for name, kinds in DAMAGE.items() for damage in kinds])
def test_damaged_tables_are_named(tmp_path, name, damage):
    table = pyarrow.Table.from_pylist(numbers(30))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="none", write_page_checksum=True)
    datasets.Dataset.from_list(numbers(30)).save_to_disk(str(tmp_path / "saved"))
    path = str((tmp_path / name.split("/")[0]))
    assert len(load(path)) == 30
    damage(tmp_path / name)
    with pytest.raises((RowError, FileError), match=f"{path}: not a readable .* Copy it again"):
        load(path)


def test_a_hub_dataset_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    with HubServer() as hub:
        hub.use_in_this_process(monkeypatch, tmp_path / "hf_home")
        (tmp_path / "rows.py").write_text("raise SystemExit('run')")
        push_folder(tmp_path, "tester/rows", repo_type="dataset", card="# x\n", patterns=["*.py"])
        with pytest.raises(RowError, match="tester/rows: .*scripts.*Nothing of it is run: convert it to Parquet"):
            load("tester/rows")


BAD_ROWS = [
    # change to a good row, the field named, what the error says of what came
    ({"problem": None}, "problem", "null"),
    ({"problem": ""}, "problem", "''"),
    ({"problem": ["?"]}, "problem", r"\['\?'\]"),
    ({"problem": "a \ud800 b"}, "problem", "surrogate"),
    ({"options": ["A. red", "C. blue"]}, "solution", "'B'"),
    ({"options": "A. red B. blue"}, "options", "'A. red B. blue'"),
    ({"options": {"1": "red", "2": "blue"}}, "options", "'1': 'red'"),
    ({"options": ["A. red", None]}, "options", r"\['A. red', None\]"),
    ({"problem_type": "riddle"}, "problem_type", "'riddle'"),
    ({"problem_type": None}, "problem_type", "null"),
    ({"problem_type": "numerical", "solution": "a few"}, "solution", "'a few'"),
    ({"solution": ""}, "solution", "''"),
    ({"solution": " "}, "solution", "' '"),
    ({"solution": None}, "solution", "null"),
    ({"solution": True}, "solution", "True"),
    ({"solution": "<answer>B</answer>"}, "solution", "<answer>B</answer>"),
    ({"process": "<think>B"}, "process", "<think>B"),
    ({"process": 3}, "process", "3"),
    ({"videos": "v/1.mp4"}, "videos", "'v/1.mp4'"),
    ({"videos": [1]}, "videos", r"\[1\]"),
    ({"images": [""]}, "images", r"\[''\]"),
    ({"videos": ["/etc/passwd"]}, "videos", "'/etc/passwd'"),
    ({"videos": ["v/../../x.mp4"]}, "videos", r"\.\./\.\./x.mp4"),
    ({"videos": ["v\0.mp4"]}, "videos", "v.x00"),
    ({"videos": ["https://example.org/1.mp4"]}, "videos", "the URL 'https://example.org/1.mp4'"),
    ({"videos": ["file:///etc/passwd"]}, "videos", "the URL"),
    ({"images": ["data:image/png;base64,AAAA"]}, "images", "the URL"),
    ({"data_source": 3}, "data_source", "3"),
    ({"question_id": None}, "question_id", "null"),
    ({"question_id": " "}, "question_id", "' '"),
    ({"question_id": "q2"}, "question_id", "the id of .*a.jsonl row 2 too"),
]


@pytest.mark.parametrize("change, field, came", BAD_ROWS, ids=[f"{i}-{b[1]}" for i, b in enumerate(BAD_ROWS)])
def test_a_bad_row_is_named_with_its_file_row_id_and_field(tmp_path, change, field, came):
    path = tmp_path / "a.jsonl"
    write(path, [CHOICE | {"question_id": "good"}, NUMBER, CHOICE | change])
    with pytest.raises(RowError, match=came) as caught:
        load(str(path))
    (problem,) = caught.value.problems
    assert (problem["file"], problem["row"], problem["field"]) == (str(path), 3, field)
    if "question_id" not in change:
        assert problem["question_id"] == "q1"
    for key in ("file", "row", "question_id", "field", "expected", "came", "remedy"):
        assert str(problem[key]) in str(caught.value)


@pytest.mark.parametrize(
    "change, field",
    [
        ({"problem_id": None}, "problem_id"),
        ({"problem": None}, "problem"),
        ({"data_type": "audio"}, "data_type"),
        ({"path": None}, "path"),
        ({"path": "../x.mp4"}, "videos"),
        ({"solution": "<answer></answer>"}, "solution"),
        ({"solution": "<answer>A</answer><answer>B</answer>"}, "solution"),
        ({"solution": "<answer>C</answer>"}, "solution"),
        ({"process": "<think>A"}, "process"),
        ({"problem_id": 8}, "problem_id"),
    ],
)
def test_a_bad_video_r1_row_is_named(tmp_path, change, field):
    path = write(tmp_path / "a.json", [VIDEO_R1 | {"problem_id": 8}, VIDEO_R1 | change])
    with pytest.raises(RowError) as caught:
        load(path)
    (problem,) = caught.value.problems
    assert (problem["row"], problem["field"]) == (2, field)


def test_a_row_that_is_no_object(tmp_path):
    with pytest.raises(RowError, match=r"row 2, question_id None, \(row\): expected an object .* came 'text'"):
        load(write(tmp_path / "a.json", [NUMBER, "text"]))


def test_ten_problems_are_shown_and_the_rest_counted(tmp_path):
    path = write(tmp_path / "a.json", [row | {"problem": None} for row in numbers(424)] + [CHOICE])
    with pytest.raises(RowError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith("424 rows cannot be used")
    assert message.count("'problem'") + message.count(", problem:") == 10
    assert message.endswith("… and 414 more.")
    assert len(caught.value.problems) == 424
    good, problems = read_rows([{"path": path}])
    assert [row["question_id"] for row in good] == ["q1"] and len(problems) == 424
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.problems) == (message, caught.value.problems)


def test_ids_may_repeat_where_the_caller_says_so(tmp_path):
    path = write(tmp_path / "a.json", [NUMBER, NUMBER])
    assert len(load_rows([{"path": path}], unique_ids=False)) == 2
    with pytest.raises(RowError, match="id_prefix"):
        load_rows([{"path": path}])


def test_columns_that_are_ignored_are_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load(write(tmp_path / "a.json", [NUMBER | {"difficulty": 3}]))
    assert "difficulty" in caplog.text


# ---- media


@pytest.fixture
def media(tmp_path):
    """A root with v/1.mp4, empty.mp4, a link inside and links out of it, beside a file that is not to be read."""
    root = tmp_path / "root"
    (root / "v").mkdir(parents=True)
    (root / "v" / "1.mp4").write_bytes(b"1")
    (root / "empty.mp4").touch()
    (root / "folder.mp4").mkdir()
    os.mkfifo(root / "pipe.mp4")
    (tmp_path / "root-secret").mkdir()
    (tmp_path / "root-secret" / "s.mp4").write_bytes(b"s")
    (root / "inside.mp4").symlink_to(root / "v" / "1.mp4")
    (root / "out.mp4").symlink_to(tmp_path / "root-secret" / "s.mp4")
    (root / "out").symlink_to(tmp_path / "root-secret")
    (root / "dangling.mp4").symlink_to(root / "none.mp4")
    (tmp_path / "link").symlink_to(root)
    return root


BAD_MEDIA = [
    ("none.mp4", "none.mp4, which does not exist"),
    ("dangling.mp4", "dangling.mp4, which does not exist"),
    ("folder.mp4", "folder.mp4, which is not one"),
    ("pipe.mp4", "pipe.mp4, which is not one"),
    ("no\x1b[2J\u202e.mp4", r"no\\x1b\[2J\\u202e.mp4, which does not exist"),
    ("empty.mp4", "empty.mp4, which is empty"),
    ("out.mp4", "inside of media_root .*out.mp4 -> .*root-secret"),
    ("out/s.mp4", "inside of media_root .*out/s.mp4 -> .*root-secret"),
    ("../root-secret/s.mp4", r"without '\.\.'"),
    ("v/../../root-secret/s.mp4", r"without '\.\.'"),
    ("{root}/v/1.mp4", "relative to media_root"),
    ("http://127.0.0.1/1.mp4", "the URL"),
    ("FILE:///etc/passwd", "the URL"),
    ("data:video/mp4;base64,AAAA", "the URL"),
]


def media_row(root, **change):
    return CHOICE | {"media_root": str(root)} | change


@pytest.mark.parametrize("path, message", BAD_MEDIA, ids=[bad[0] for bad in BAD_MEDIA])
@pytest.mark.parametrize("field", ["videos", "images"])
def test_bad_media_are_refused_with_the_row_and_file(media, path, message, field):
    path = path.format(root=media)
    row = media_row(media, **{"videos": [], field: [path]})
    with pytest.raises(RowError, match=message) as caught:
        resolve_media(row)
    assert "'q1'" in str(caught.value) and "unit" in str(caught.value)
    with pytest.raises(RowError, match=message) as caught:
        check_media(rows_to_dataset([row]))
    assert "'q1'" in str(caught.value) and field in str(caught.value)


def test_resolve_media(media, tmp_path):
    real = os.path.realpath(media / "v" / "1.mp4")
    row = media_row(media, videos=["v/1.mp4", "inside.mp4"], images=["./v/1.mp4"])
    assert resolve_media(row) == ([real, real], [real])
    assert resolve_media(row | {"media_root": str(tmp_path / "link")}) == ([real, real], [real])
    assert resolve_media(row | {"media_root": "/", "videos": [real[1:]], "images": []}) == ([real], [])
    assert resolve_media(media_row("", videos=[])) == ([], [])
    with pytest.raises(RowError, match="media_root"):
        resolve_media(row | {"media_root": ""})


def test_urls_pass_when_allowed_and_only_http(tmp_path):
    url = "https://example.org/a%20b/../1.mp4?x=1"
    path = write(tmp_path / "a.json", [CHOICE | {"videos": [url]}])
    dataset = load_rows([{"path": path}], allow_urls=True)
    assert resolve_media(dataset[0], allow_urls=True) == ([url], [])
    check_media(dataset, allow_urls=True)
    with pytest.raises(RowError, match="the URL"):
        check_media(dataset)
    others = ["https://me:word@example.org/1.mp4", "file:///etc/passwd", "data:video/mp4;base64,AA", "HLS://x"]
    for other in (*others, "ftp://example.org/1.mp4"):
        with pytest.raises(RowError, match="the URL|a URL without") as caught:
            resolve_media(media_row(tmp_path, videos=[other]), allow_urls=True)
        assert "word@" not in str(caught.value)


def test_check_media_looks_at_each_file_once_and_names_every_row(media, monkeypatch):
    rows = [media_row(media, question_id=f"q{i}", videos=["v/1.mp4", "none.mp4"]) for i in range(30)]
    resolve, calls = media_paths.resolve, []
    monkeypatch.setattr(
        media_paths, "resolve", lambda root, path, *rest: calls.append(path) or resolve(root, path, *rest)
    )
    with pytest.raises(RowError) as caught:
        check_media(rows_to_dataset(rows))
    assert calls == ["v/1.mp4", "none.mp4"]
    assert [problem["question_id"] for problem in caught.value.problems] == [f"q{i}" for i in range(30)]
    assert "30 rows cannot be used" in str(caught.value) and "… and 20 more." in str(caught.value)
    check_media(rows_to_dataset([media_row(media), media_row("", videos=[])]))


# ---- manifest


def write_manifest(file, lines, header=None):
    return write(file, [header or {"manifest": 1}, *lines])


def verdict(question_id, reason=None):
    return {"question_id": question_id, "ok": reason is None, "reason": reason, "prompt_tokens": 40}


def test_rows_that_the_manifest_marks_bad_are_dropped_and_counted(tmp_path, caplog):
    # n1 is malformed too: a row that is known to be bad is no error
    rows = numbers(5)
    rows[1]["problem"] = None
    path = write(tmp_path / "a.json", rows)
    lines = [verdict("n0"), verdict("n1", "no question"), verdict("n2", "audio only"), verdict("n3", "audio only")]
    manifest = write_manifest(tmp_path / "manifest.jsonl", [*lines, verdict("n4"), verdict("elsewhere")])
    with caplog.at_level(logging.INFO):
        assert sorted(ids(load_rows([{"path": path}], manifest=manifest))) == ["n0", "n4"]
    assert "kept 2 rows, dropped 3 (2 × audio only; 1 × no question)" in caplog.text
    with pytest.raises(RowError, match="cannot be used"):
        load_rows([{"path": path}])


@pytest.mark.parametrize(
    "lines, header, message",
    [
        ([verdict("x")], None, "does not know 3 rows"),
        ([verdict("n0")], None, "does not know 2 rows .'n1', 'n2'"),
        ([verdict(f"n{i}", "bad") for i in range(3)], None, "no rows left"),
        ([verdict("n0")], {"manifest": 2}, "not a manifest"),
        ([verdict("n0")], verdict("n0"), "not a manifest"),
        ([{"question_id": "n0"}], None, "entry 2: expected"),
        ([{"question_id": "n0", "ok": "yes"}], None, "entry 2: expected"),
        ([{**verdict(f"n{i}"), "content": "another"} for i in range(3)], None, "by this id; came another.*check command"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, lines, header, message):
    path = write(tmp_path / "a.json", numbers(3))
    manifest = write_manifest(tmp_path / "manifest.jsonl", lines, header)
    with pytest.raises(RowError, match=message):
        load_rows([{"path": path}], manifest=manifest)
    with pytest.raises(RowError, match="no such file"):
        load_rows([{"path": path}], manifest=str(tmp_path / "none.jsonl"))
