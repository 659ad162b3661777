"""Files on full disks, damaged files, and what is synced: written whole or not at all, read as they were written."""

import json
import os
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import files_of_at_most
from safetensors.torch import save_file

from veripo_trl import errors
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.files.disk import FileError, open_parquet, read_json, read_parquet, write_parquet
from veripo_trl.files.journal import Journal
from veripo_trl.files.tables import write_json
from veripo_trl.report.write import write_report
from veripo_trl.verifier.reply_cache import CacheError, VerdictCache

ROWS = [{"id": f"q{number}", "text": " ".join(random.Random(number).choices("abcdefgh", k=40))} for number in range(200)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WRITERS = {
    "a.json": lambda folder: write_json(folder / "a.json", ROWS),
    "a.parquet": lambda folder: write_parquet(pa.Table.from_pylist(ROWS), folder / "a.parquet"),
    "rollouts-step0000003-part0000-rank0000.parquet": lambda folder: RolloutStore(folder / "new").write(
        [{"rollout_id": row["id"], "completion": row["text"]} for row in ROWS], step=3, part=0, rank=0, reward_names=["a"]
    ),
    "report.html": lambda folder: write_report([folder]),
    "journal.jsonl": lambda folder: Journal(folder / "journal.jsonl", {}).append([{"key": "q", "text": "x" * 9000}]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_said_with_the_folder_and_the_bytes(name, tmp_path):
    (tmp_path / "results.json").write_text('{"counts": {}}')
    (tmp_path / "a.json").write_text("before")
    Journal(tmp_path / "journal.jsonl", {})
    before = contents(tmp_path)
    with files_of_at_most(1500), pytest.raises(FileError) as error:
        WRITERS[name](tmp_path)
    message = str(error.value)
    folder = tmp_path / "new" if name.startswith("rollouts") else tmp_path
    assert message.startswith(f"{folder}: File too large: {name} needs ") and "\n" not in message
    assert int(message.split(" needs ")[1].split()[0].replace(",", "")) > 1500 and "Make room" in message
    if name == "journal.jsonl":  # what was written of a line goes when the journal is opened
        Journal(tmp_path / "journal.jsonl", {})
    assert contents(tmp_path) == before
    WRITERS[name](tmp_path)


def test_a_full_disk_under_the_verdict_cache(tmp_path):
    reply = {"concluded_answer": "B", "consistent": True, "reason": "x" * 2000}
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        cache.put(b"1", reply, judge="j", prompt_version="v")
        cache.connection.execute(f"PRAGMA max_page_count = {cache.connection.execute('PRAGMA page_count').fetchone()[0]}")
        with pytest.raises(CacheError, match=r"c.sqlite: a reply of 2,0\d\d bytes cannot be stored: .* full. Make room"):
            for key in range(9):
                cache.put(bytes([key]), reply, judge="j", prompt_version="v")
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        cache.put(b"2", reply, judge="j", prompt_version="v")
        assert cache.get(b"1") == cache.get(b"2") == reply


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "journal.jsonl"])
def test_a_file_is_on_the_disk_before_it_has_its_name(name, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text('{"counts": {}}')
    synced, named, fsync, replace = set(), [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), synced.add(os.fstat(file).st_ino)))
    monkeypatch.setattr(os, "replace", lambda a, b: (named.append(os.stat(a).st_ino in synced), replace(a, b)))
    WRITERS[name](tmp_path)
    assert named == [True]


@pytest.mark.parametrize("save", [torch.save, save_file, lambda what, path: path.write_bytes(b"x" * 9999)])
def test_a_full_disk_that_a_library_finds(save, tmp_path, capsys):
    with files_of_at_most(1500):
        assert errors.run(lambda: save({"weight": torch.zeros(9999)}, tmp_path / "weights")) == 1
    assert re.match(r"No room on the disk: .*\. Make room where this run", capsys.readouterr().err)
    assert errors.run(lambda: 1 / 0) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


# ---- damaged files --------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_never_read_as_something_else(tmp_path):
    path, flip, refused = tmp_path / "a.parquet", random.Random(0), 0
    write_parquet(pa.Table.from_pylist(ROWS), path)
    content = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(content)
        damaged[flip.randrange(len(content))] ^= 1 << flip.randrange(8)
        path.write_bytes(damaged)
        try:
            table = read_parquet(path)
        except FileError as error:
            assert str(error).startswith(f"{path}: not a readable Parquet file")
            refused += 1
        else:  # a bit that says nothing; or a column's name, which readers look at
            assert table.to_pylist() == ROWS or table.column_names != list(ROWS[0])
    assert refused > 200


def test_files_of_others_have_no_checksums(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read_parquet(tmp_path / "a.parquet", ["id"]).to_pylist() == [{"id": row["id"]} for row in ROWS]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"\xff\xfe", b"[" * 100_000], ids=repr)
def test_json_that_is_none(content, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(FileError, match=r"run.json is damaged: expected a JSON object: .*Take it from a copy\."):
        read_json(tmp_path / "run.json", remedy="Take it from a copy.")


def test_a_truncated_parquet_file(tmp_path):
    write_parquet(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    os.truncate(tmp_path / "a.parquet", 3000)
    with pytest.raises(FileError, match="a.parquet: not a readable Parquet file"), open_parquet(tmp_path / "a.parquet"):
        pass
    with pytest.raises(FileError, match="none.parquet"):
        read_parquet(tmp_path / "none.parquet")


def test_a_truncated_verdict_cache(tmp_path):
    reply = {"concluded_answer": "B", "consistent": True, "reason": "x" * 500}
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        for key in range(200):
            cache.put(bytes([key]), reply, judge="j", prompt_version="v")
    os.truncate(tmp_path / "c.sqlite", 40_000)
    with pytest.raises(CacheError, match="verdict_cache .*c.sqlite: .*remove this one"):
        with VerdictCache(tmp_path / "c.sqlite") as cache:
            for key in range(200):
                assert cache.get(bytes([key])) == reply


def test_a_damaged_journal(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path, {}).append([{"key": "a", "model_output": "1"}, {"key": "b", "model_output": "2"}])
    header, first, second = path.read_bytes().splitlines(keepends=True)
    for damaged in (first[:10], b"[1]", b'{"keys": 1}', b"\xff", b'{"error": "x"}', b"[" * 99_999):
        path.write_bytes(header + damaged + b"\n" + second)
        assert Journal(path, {}).lines == {"b": json.loads(second)}  # the other row is done again
    for damaged in (b"[1]\n", b"\xff\n", b"{\n"):
        path.write_bytes(damaged + first)
        with pytest.raises(errors.VeripoError, match="j.jsonl: not a journal, or a damaged one.*remove it"):
            Journal(path, {})
