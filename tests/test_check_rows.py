"""The check command: real files good and bad, the manifest it writes, going on after a break, and the training rows."""

import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from conftest import load_script, make_row, write_video

from veripo_trl.data.manifest import read_manifest
from veripo_trl.data.rows import load_rows
from veripo_trl.data.schema import COLUMNS, RowError
from veripo_trl.errors import ConfigError
from veripo_trl.files.journal import JournalError
from veripo_trl.media import downloads
from veripo_trl.media.process import DecoderError
from veripo_trl.model.encoding import PromptEncoder
from veripo_trl.model.policy import save_settings

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
REASONS = {
    "good": None,
    "image": None,
    "text": None,
    "missing": "videos: expected a file",
    "empty": "videos: expected a media file",
    "folder": "videos: expected a regular file",
    "outside": "videos: expected a file inside of media_root",
    "truncated": "video: is a truncated mp4",
    "cut": "video: is a truncated mp4",
    "words": "video: is a text file",
    "playlist": "video: is a playlist",
    "picture": "image: is not an image",
    "strip": "image: aspect ratio over 200",
    "long": "prompt longer than max_prompt_tokens",
    "tags": "does not fit the prompt template",
    "unsolved": "solution: expected a non-empty string",
    "twice": "question_id: expected an id used once",
}
BAD = {name for name, reason in REASONS.items() if reason}


def reasons_of(manifest) -> dict:
    reasons = {question_id: line["reason"] for question_id, line in read_manifest(str(manifest)).items()}
    return {question_id: reason and reason.partition(" '")[0] for question_id, reason in reasons.items()}


@pytest.fixture(scope="module")
def check_rows():
    return load_script("recipes/check_rows.py")


@pytest.fixture
def run(tmp_path, model_paths):
    """`run(rows, **changes)` writes a recipe's YAML over these rows: its path. Media are in tmp_path/media."""
    media = tmp_path / "media"
    media.mkdir()

    def write(rows, **changes):
        data = tmp_path / "rows.jsonl"
        kept = [c for c in COLUMNS if c != "media_root"]
        data.write_text("".join(json.dumps({c: row[c] for c in kept if c in row}) + "\n" for row in rows))
        settings = {
            "model_name_or_path": str(model_paths["qwen2_5_vl"]),
            "datasets": [{"path": str(data), "media_root": str(media)}],
            "prompt_template": "tiny",
            "max_frames": 8,
            "max_pixels": 3136,
            "min_pixels": 3136,
            "max_prompt_tokens": 200,
            # of the training recipe, and not to be acted on: one process cannot hold this batch, nor this machine bf16
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 1,
            "num_generations": 8,
            "bf16": True,
            "rewards": ["accuracy", "format"],
        }
        config = tmp_path / "grpo.yaml"
        config.write_text(json.dumps(settings | changes))  # JSON is YAML
        return config

    return write


def clip_rows(media, count):
    for place in range(count):
        write_video(media / f"{place}.mp4", frames=4, height=56, width=56, seed=place)
    return [make_row(f"q{place}", media, videos=[f"{place}.mp4"]) for place in range(count)]


def mixed(media):
    """A row of each kind in REASONS."""
    from PIL import Image

    write_video(media / "good.mp4", frames=6, height=56, width=56)
    data = (media / "good.mp4").read_bytes()
    (media / "truncated.mp4").write_bytes(data[: len(data) // 2])
    (media / "cut.mp4").write_bytes(data[:-100])
    (media / "empty.mp4").touch()
    (media / "folder.mp4").mkdir()
    (media / "words.mp4").write_text("no video\n" * 100)
    (media / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:4,\ngood.mp4\n#EXT-X-ENDLIST\n")
    (media / "picture.png").write_text("no picture")
    (media.parent / "secret.mp4").write_bytes(data)
    (media / "outside.mp4").symlink_to(media.parent / "secret.mp4")
    Image.new("RGB", (56, 56)).save(media / "image.png")
    Image.new("RGB", (3000, 2)).save(media / "strip.png")
    names = ("good", "missing", "empty", "folder", "outside", "truncated", "cut", "words", "playlist")
    rows = [make_row(name, media, videos=[f"{name}.mp4"]) for name in names]
    rows += [make_row(name, media, images=[f"{name}.png"]) for name in ("image", "picture", "strip")]
    rows += [make_row("tags", media, process="<think>B</think>")]
    rows += [make_row("text", media), make_row("long", media, problem="Which colour is first? " * 200)]
    return rows + [make_row("unsolved", media, solution=""), make_row("twice", media), make_row("twice", media)]


def test_rows_are_checked_as_the_policy_was_trained_to_see(check_rows, run, load, model_paths, tmp_path):
    shutil.copytree(model_paths["qwen2_5_vl"], tmp_path / "policy")
    save_settings(tmp_path / "policy", load(max_frames=6)[1], None)
    unsaid = dict.fromkeys(("prompt_template", "max_frames", "min_pixels", "max_pixels"))
    config = run(clip_rows(tmp_path / "media", 1), model_name_or_path=str(tmp_path / "policy"), **unsaid)
    manifest = tmp_path / "manifest.jsonl"
    assert check_rows.main(["--config", str(config), "--output", str(manifest), "--num_workers", "0"]) == 0
    header = json.loads(manifest.read_text().splitlines()[0])
    assert (header["max_frames"], header["max_pixels"], header["prompt_template"]["name"]) == (6, 112 * 56, "tiny")


@pytest.mark.slow
def test_the_real_script(run, tmp_path):
    rows = mixed(tmp_path / "media")
    config, manifest = run(rows, frame_cache=str(tmp_path / "frames")), tmp_path / "out" / "manifest.jsonl"
    command = [sys.executable, str(RECIPES / "check_rows.py"), "--config", str(config), "--output", str(manifest)]
    command += ["--num_workers", "2"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    header, *lines = map(json.loads, manifest.read_text().splitlines())
    assert header["manifest"] == 1 and header["max_frames"] == 8 and header["prompt_template_hash"]
    assert [line["question_id"] for line in lines].count("twice") == 2
    for line in lines:
        assert line["ok"] == (line["question_id"] not in BAD)
        assert (line["prompt_tokens"] or 0) > 10 if line["ok"] else line["prompt_tokens"] is None
        if not line["ok"]:
            assert line["detail"]
    by_id = {line["question_id"]: line for line in lines}
    assert "truncated.mp4" in by_id["truncated"]["detail"] and "again" in by_id["truncated"]["detail"]
    assert "raise the limit" in by_id["long"]["detail"].lower()
    assert by_id["good"]["prompt_tokens"] > by_id["text"]["prompt_tokens"]
    assert re.search(r"^18 +3 +15 ", done.stdout, re.MULTILINE), done.stdout
    for text in (f"--manifest {manifest}", "tokens median"):
        assert text in done.stdout, done.stdout
    assert "rows: 100%" in done.stderr
    assert sorted(path.name for path in manifest.parent.glob("[!.]*")) == ["manifest.jsonl"]
    assert any(path.is_file() for path in (tmp_path / "frames").rglob("*"))  # the cache is warm
    assert not (tmp_path / "run").exists()

    sources = json.loads(run(rows).read_text())["datasets"]
    assert reasons_of(manifest) == REASONS
    with pytest.raises(RowError):
        load_rows(sources)
    left = load_rows(sources, manifest=str(manifest))
    assert sorted(left["question_id"]) == sorted(REASONS.keys() - BAD)
    run([row | {"problem": "Another question?"} if row["question_id"] == "good" else row for row in rows])
    with pytest.raises(RowError, match="'good'.*the question that .*manifest.jsonl knows by this id; came another"):
        load_rows(sources, manifest=str(manifest))


@pytest.fixture
def encoded(monkeypatch):
    """Ids in the order in which their rows are encoded here; `encoded.stop_at` breaks off at that one."""

    class Encoded(list):
        stop_at = None

    ids, encode = Encoded(), PromptEncoder.encode

    def counting(self, row, **kwargs):
        if row["question_id"] == ids.stop_at:
            raise KeyboardInterrupt
        ids.append(row["question_id"])
        return encode(self, row, **kwargs)

    monkeypatch.setattr(PromptEncoder, "encode", counting)
    return ids


def test_a_broken_check_goes_on_where_it_stopped(check_rows, run, tmp_path, encoded, capsys):
    rows = clip_rows(tmp_path / "media", 5)
    (tmp_path / "media" / "1.mp4").write_text("no video")
    output, partial = tmp_path / "m.jsonl", tmp_path / "m.jsonl.partial"
    arguments = ["--config", str(run(rows)), "--output", str(output), "--num_workers", "0"]
    encoded.stop_at = "q3"
    with pytest.raises(KeyboardInterrupt):
        check_rows.main(arguments)
    assert encoded == ["q0", "q1", "q2"] and not output.exists()
    with open(partial, "a") as file:
        file.write('{"question_id": "q3", "ok": fal')  # killed while it wrote

    for change, key in (({"max_frames": 4}, "max_frames"), ({"max_prompt_tokens": 20}, "max_prompt_tokens")):
        before = partial.read_bytes()
        run(rows, **change)
        with pytest.raises(JournalError, match=f"m.jsonl.partial is of a run with other settings or rows .*{key}"):
            check_rows.main(arguments)
        assert partial.read_bytes() == before
    run([*rows[:4], rows[4] | {"problem": "Another question?"}])
    with pytest.raises(JournalError, match="rows_sha256"):
        check_rows.main(arguments)

    run(rows, frame_cache=str(tmp_path / "frames"))  # the cache changes no verdict
    encoded.stop_at = None
    assert check_rows.main(arguments) == 0
    assert encoded == ["q0", "q1", "q2", "q3", "q4"]
    assert "3 rows are checked already" in capsys.readouterr().out
    assert not partial.exists()
    assert {i for i, reason in reasons_of(output).items() if reason} == {"q1"}

    assert check_rows.main(arguments) == 0  # a finished check starts anew: files may have been repaired
    assert len(encoded) == 10


def test_the_first_rows_only(check_rows, run, tmp_path, encoded):
    config, output = run(rows := clip_rows(tmp_path / "media", 4)), str(tmp_path / "m.jsonl")
    assert check_rows.main(["--config", str(config), "--output", output, "--num_workers", "0", "--limit", "2"]) == 0
    assert encoded == ["q0", "q1"] and list(read_manifest(output)) == encoded
    sources = [{"path": str(tmp_path / "rows.jsonl"), "media_root": str(tmp_path / "media")}]
    with pytest.raises(RowError, match="does not know 2 rows"):  # never taken for good
        load_rows(sources, manifest=output)
    assert len(rows) == 4


def test_rows_that_no_manifest_can_name_are_refused(check_rows, run, tmp_path):
    config = run([make_row("good", tmp_path), make_row(None, tmp_path), make_row(" ", tmp_path)])
    with pytest.raises(RowError, match="(?s)2 rows without a usable id.*rows.jsonl row 2, .*rows.jsonl row 3, "):
        check_rows.main(["--config", str(config), "--output", str(tmp_path / "m.jsonl")])


def test_workers_give_what_one_process_gives(check_rows, run, tmp_path):
    config = run(clip_rows(tmp_path / "media", 4))
    contents = []
    for workers in ("0", "2"):
        output = tmp_path / f"{workers}.jsonl"
        assert check_rows.main(["--config", str(config), "--output", str(output), "--num_workers", workers]) == 0
        contents.append(output.read_text())
    assert contents[0] == contents[1]


def test_what_no_row_is_to_blame_for_stops_the_check(check_rows, run, tmp_path, monkeypatch):
    def broken(self, row, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(PromptEncoder, "encode", broken)
    config = run([make_row("q", tmp_path)])
    with pytest.raises(ZeroDivisionError):
        check_rows.main(["--config", str(config), "--output", str(tmp_path / "m.jsonl"), "--num_workers", "0"])
    assert not (tmp_path / "m.jsonl").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_decoder_that_cannot_start_is_no_fault_of_the_rows(check_rows, run, tmp_path, monkeypatch, workers):
    (tmp_path / "av.py").write_text("raise ImportError('no decoder here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ["--config", str(run(clip_rows(tmp_path / "media", 2))), "--output", str(tmp_path / "m.jsonl")]
    with pytest.raises(DecoderError, match="^the process that decodes .*: no decoder here.*") as caught:
        check_rows.main([*arguments, "--num_workers", workers])
    assert "Traceback" not in str(caught.value)
    assert len((tmp_path / "m.jsonl.partial").read_text().splitlines()) == 1 and not (tmp_path / "m.jsonl").exists()


def test_no_good_rows(check_rows, run, tmp_path, capsys):
    config = run([make_row("q", tmp_path, videos=["none.mp4"])])
    arguments = ["--config", str(config), "--output", str(tmp_path / "m.jsonl"), "--num_workers", "0"]
    assert check_rows.main(arguments) == 1
    said = capsys.readouterr().out
    assert "No good rows" in said and "question_id 'q'" in said


@pytest.mark.parametrize(
    "changes, arguments, message",
    [
        ({"max_frame": 4}, [], "'max_frame' .close: .*max_frames"),
        ({"holdout": None}, [], "holdout: expected a value, came null. .* default, 0"),
        ({}, ["--no_such_option", "3"], "'no_such_option'"),
        ({}, ["--max_frame", "3"], "'max_frame' .close: .*max_frames"),  # not taken for the one that begins so
        ({}, ["word"], "'word'"),
        ({}, ["--output", "manifest.json"], "ends in .jsonl"),
        ({"datasets": None}, [], "datasets"),
    ],
)
def test_refused(check_rows, run, tmp_path, monkeypatch, changes, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_rows.main(["--config", str(run([make_row("q", tmp_path)], **changes)), *arguments])
    assert not (tmp_path / "manifest.jsonl").exists()


def test_options_of_the_training_command_are_taken(check_rows, run, tmp_path):
    config, output = run([make_row("q", tmp_path)], manifest="none.jsonl"), tmp_path / "m.jsonl"
    options = [
        "--max_steps",
        "3",
        "--learning_rate=1e-5",
        "--rewards",
        "accuracy",
        "format",
        "--max_prompt_tokens",
        "5",
    ]
    arguments = ["--config", str(config), "--output", str(output), "--num_workers", "0", *options]
    assert check_rows.main(arguments) == 1
    assert reasons_of(output) == {"q": "prompt longer than max_prompt_tokens"}


def test_help_says_what_else_it_does(check_rows, capsys):
    with pytest.raises(SystemExit) as stopped:
        check_rows.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "fills that folder" in out


def test_a_network_that_is_down_is_no_fault_of_the_rows(check_rows, run, tmp_path, monkeypatch):
    """The check ends in a message and goes on later; what a server refuses is a row's fault."""
    monkeypatch.setattr(downloads, "fetch", partial(downloads.fetch, folder=tmp_path / "downloads"))
    monkeypatch.setattr("veripo_trl.model.encoding.fetch", downloads.fetch)
    media, output = tmp_path / "media", tmp_path / "m.jsonl"
    write_video(media / "good.mp4", frames=4, height=56, width=56)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(media))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
    # closed: nobody listens there
    rows = [make_row(name, media, videos=[f"{url}/{name}.mp4"]) for name in ("good", "missing")]
    arguments = ["--config", str(run(rows, allow_urls=True)), "--output", str(output), "--num_workers", "0"]
    with pytest.raises(downloads.NetworkError, match="row 'good', video .*cannot be downloaded .*Try again when"):
        check_rows.main(arguments)
    assert not output.exists()
    with http.server.ThreadingHTTPServer(("127.0.0.1", server.server_port), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        assert check_rows.main(arguments) == 0
        server.shutdown()
    assert reasons_of(output) == {"good": None, "missing": "video: cannot be downloaded"}
