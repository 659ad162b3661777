"""A video in turns: windows, memory, prompts, the loop of evaluation and chat, rows of SFT."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import contents, plain_positions, released
from helpers import evaluation_command as command

from conftest import load_script, make_row
from veripo_trl import chat
from veripo_trl.data.prompts import PromptError, build_messages, build_target, load_template
from veripo_trl.data.streaming import Memory, taught_rows, turn_row, windows
from veripo_trl.errors import ConfigError
from veripo_trl.evaluate.generate import Decoding, TransformersEngine
from veripo_trl.evaluate.questions import read_questions
from veripo_trl.evaluate.run import OutputFiles, answer_questions
from veripo_trl.files.journal import Journal
from veripo_trl.model.encoding import PromptTooLongError, Shown
from veripo_trl.model.streaming import StreamEncoder
from veripo_trl.tiny.model import build_tokenizer
from veripo_trl.tiny.world import make_world

WINDOWS = [  # frames, clip tokens, tokens of a pair of frames; turns in pairs, the last one
    (16, 8, 4, [(0, 2), (2, 4), (4, 6)], (6, 8)),
    (18, 8, 4, [(0, 2), (2, 4), (4, 6), (6, 8)], (8, 9)),
    (4, 8, 4, [], (0, 2)),
    (2, 8, 4, [], (0, 1)),
    (10, 8, 4, [(0, 2), (2, 4)], (4, 5)),
    (8, 6, 4, [(0, 1), (1, 2), (2, 3)], (3, 4)),
    (8, 3, 4, [(0, 1), (1, 2), (2, 3)], (3, 4)),  # a clip of less than a pair
    (200, 5000, 50, [], (0, 100)),
    (400, 5000, 50, [(0, 100)], (100, 200)),  # VST's own rule shows 4 frames of the second clip
]


@pytest.mark.parametrize("frames, clip, pair, before, last", WINDOWS)
def test_windows(frames, clip, pair, before, last):
    assert windows(frames, clip_tokens=clip, pair_tokens=pair) == [*before, last]


def test_windows_are_all_pairs_once():
    for pairs in range(1, 13):
        for size in range(1, 13):
            for frames in (2 * pairs - 1, 2 * pairs):
                found = windows(frames, clip_tokens=4 * size, pair_tokens=4)
                assert [pair for first, end in found for pair in range(first, end)] == list(range(pairs))
                assert [end - first for first, end in found[:-1]] == [size] * (len(found) - 1)


@pytest.fixture(scope="module")
def script():
    return load_script("evaluation/evaluation_vllm.py")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_the_memory_lets_the_oldest_go(tokenizer):
    size = len(tokenizer("t1 I see red.\n")["input_ids"])
    memory = Memory(2 * size + size // 2)
    for turn, colour in enumerate(("red", "blue", "green")):
        memory.add(f"t{turn}", f" I see {colour}.\n", tokenizer)
    assert memory.entries == ["t1 I see blue.\n", "t2 I see green.\n"] and (memory.evicted, memory.cut) == (1, 0)
    memory.add("t3", "I see " + "red then " * 30, tokenizer)
    assert (memory.evicted, memory.cut) == (3, 1) and memory.sizes == [2 * size + size // 2]
    assert memory.text.startswith("t3 I see red then") and memory.text.endswith("\n") and len(memory.entries) == 1
    memory.add("t4", "🙂" * 30, tokenizer)
    assert memory.cut == 2 and set(memory.text) == set("t4 🙂\n")  # no half of a sign
    for limit, kept in ((0, []), (None, ["t0 <|im_end|>\n"])):
        memory = Memory(limit)
        memory.add("t0", "<|im_end|>", tokenizer)
        assert memory.entries == kept and memory.cut == (limit == 0)
    spelled = Memory(100)
    spelled.add("t0", "<|im_end|>", tokenizer)  # text, not one token
    assert spelled.sizes[0] > 8


def test_a_turn_of_four_four_four_tokens(tokenizer):
    """The worked example: 10 tokens, entries of 4."""
    memory = Memory(10)
    for text in ("red", "blue", "green"):
        memory.add("", f"{text} then red", tokenizer)
    assert memory.sizes == [4, 4] and memory.evicted == 1 and "red then" not in memory.text


# ------------------------------------------------------------------------------------------------------------- prompts

ROW = {"question_id": "q", "problem": "Which colour is first?", "options": ["A. red", "B. blue"], "solution": "B",
       "problem_type": "multiple choice", "process": "So B.", "videos": ["a.mp4"], "images": ["i.png"],
       "data_source": "t"}  # fmt: skip


def text_of(row, name="default"):
    return build_messages(row, load_template(name))[0]["content"][-1]["text"]


def test_the_question_comes_last():
    first, second, last = taught_rows(ROW, [("T0", "It is red.", {}), ("T1", "It is blue.", {})], last="T2")
    assert text_of(first).startswith("T0\nYou are shown one part") and text_of(first, "tiny") == "T0"
    assert text_of(second, "tiny") == "Notes so far:\nT0 It is red.\nT1"
    assert not any(word in text_of(second) for word in ("Which", "A. red", "<answer>"))
    start = "Notes so far:\nT0 It is red.\nT1 It is blue.\nT2\nWhich colour is first?\nA. red\nB. blue\nLook closely"
    assert text_of(last).startswith(start) and text_of(last).count("letter of the right option") == 1
    template = load_template("default")
    assert [build_target(row, template) for row in (first, second)] == ["It is red.", "It is blue."]
    assert build_target(last, template) == "<think>So B.</think>\n<answer>B</answer>"
    assert [len(row["images"]) for row in (first, second, last)] == [0, 0, 1]
    assert turn_row(ROW, "T2", "", last=True)["problem"] == "T2\nWhich colour is first?"


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_prompts_of_turns(kind, load, media_root, counted):
    """Ids, positions and pixels are those of the turn's own frames, in their true rate; the clip is read once."""
    _, encoder = load(kind, fps=1.5)
    row = make_row("q", media_root, videos=["long.mp4"], images=["square.png"])
    whole, clip = encoder.encode(row), encoder.read_media(row)[0][0]
    pixels, per_pair = len(clip.frames), len(whole.pixel_values_videos) // (len(clip.frames) // 2)
    before = len(counted())
    stream = StreamEncoder(encoder, clip_tokens=17, max_memory_tokens=60).encode(row)
    assert [line[0] for line in counted()[before:]].count("decode") == 1
    factor = encoder.loader.settings.size_factor
    size = max(1, 17 // (clip.frames.shape[1] * clip.frames.shape[2] // factor**2))
    expected = windows(pixels, clip_tokens=size, pair_tokens=1)
    assert len(stream.turns) == len(expected) > 2
    for turn, (first, end) in enumerate(expected):
        prompt, last = stream.prompt(encoder), turn == len(expected) - 1
        start, stop = (round(frame * (23 / (pixels - 1))) / 2 if frame < pixels else 12 for frame in (2 * first, 2 * end))
        assert stream.time == f"Time={start:.1f}-{stop:.1f}s" and stream.is_last == last
        asked = turn_row(row, stream.time, stream.memory.text, last=last)
        alone = encoder.encode_media(asked, [clip.part(2 * first, 2 * end)], encoder.read_media(row)[1] if last else [])
        assert np.array_equal(prompt.input_ids, alone.input_ids) and np.array_equal(prompt.positions, alone.positions)
        shown = whole.pixel_values_videos[per_pair * first : per_pair * end]
        assert torch.equal(prompt.pixel_values_videos, shown)
        assert prompt.second_per_grid_ts == whole.second_per_grid_ts  # to the last bit: positions are rounded down
        grids = {"image_grid_thw": prompt.image_grid_thw, "video_grid_thw": prompt.video_grid_thw}
        batch = {name: torch.tensor(grid) for name, grid in grids.items() if grid is not None}
        if prompt.second_per_grid_ts:
            batch["second_per_grid_ts"] = prompt.second_per_grid_ts
        positions = plain_positions(torch.tensor(prompt.input_ids), batch, encoder.config)
        assert np.array_equal(prompt.positions, positions.numpy())
        assert (prompt.pixel_values is not None) == last
        assert len(prompt) <= len(stream)
        if not last:
            stream.add({"completion": f"I see {turn}, <|im_end|> it moves on."}, encoder.processor.tokenizer)
    assert stream.memory.evicted > 0 and "<|im_end|>" in stream.memory.text
    record = stream.record(encoder)
    assert record["prompt_tokens"] == len(prompt) and len(record["thoughts"]) == len(expected) - 1
    stream.memory.entries.clear()  # the control: an emptied memory is another prompt
    assert len(stream.prompt(encoder)) < len(prompt)


def test_a_row_shown_otherwise_in_turns(load, media_root):
    """Other frames in every turn; another text with the question alone, whatever the memory."""
    _, encoder = load()
    row = make_row("q", media_root, videos=["long.mp4"])
    hinted = {**row, "problem": f"{row['problem']}\nHint: look closely."}
    shown = Shown("hint", 0.5, problem=hinted["problem"], frames=lambda clip: 255 - clip.frames)
    streams = StreamEncoder(encoder, clip_tokens=16, max_memory_tokens=60)
    stream, expected, plain = (streams.encode(each) for each in ({**row, "shown": shown}, hinted, row))
    for *_, own in plain.turns:
        prompt, same, unhinted = (each.prompt(encoder) for each in (stream, expected, plain))
        assert np.array_equal(prompt.input_ids, same.input_ids) and np.array_equal(prompt.positions, same.positions)
        assert np.array_equal(prompt.input_ids, unhinted.input_ids) != stream.is_last
        assert not torch.equal(prompt.pixel_values_videos, own.pixel_values_videos)
        if not stream.is_last:
            for each in (stream, expected, plain):
                each.add({"completion": "I see red."}, encoder.processor.tokenizer)
    assert len(stream.thoughts) == 2


def test_a_full_memory_has_to_fit(load, media_root):
    _, encoder = load()
    row = make_row("q", media_root, videos=["long.mp4"])
    longest = len(StreamEncoder(encoder, clip_tokens=16, max_memory_tokens=60).encode(row))
    for limit in (longest, longest - 1):
        streams = StreamEncoder(replace(encoder, max_prompt_tokens=limit), clip_tokens=16, max_memory_tokens=60)
        if limit == longest:
            assert len(streams.encode(row)) == limit
        else:
            with pytest.raises(PromptTooLongError, match=f"with a full memory a turn has {longest} tokens"):
                streams.encode(row)


def test_what_is_not_shown_in_turns(load, media_root):
    _, encoder = load()
    streams = StreamEncoder(encoder)
    for row in (make_row("text", media_root), make_row("image", media_root, images=["square.png"])):
        stream = streams.encode(row)
        assert stream.is_last and np.array_equal(stream.prompt(encoder).input_ids, encoder.encode(row).input_ids)
    with pytest.raises(PromptError, match="'q'.*expected one video, came 2"):
        streams.encode(make_row("q", media_root, videos=["wide.mp4", "fast.mp4"]))
    for limits in ({"clip_tokens": 0}, {"max_memory_tokens": -1}):
        with pytest.raises(ConfigError, match="clip_tokens >= 1 and max_memory_tokens >= 0"):
            StreamEncoder(encoder, **limits)


# ---------------------------------------------------------------------------------------------------------------- loop


@pytest.fixture
def prompts(tmp_path):
    """Rows on clips of 12, 3 and 2 pairs of frames, and one that names no file."""
    rows = [released(place, ("long.mp4", "wide.mp4", "fast.mp4")[place % 3]) for place in range(5)]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([*rows, released(5, "gone.mp4")]))
    return file


def test_all_questions_of_a_turn_together(load, media_root, prompts, tmp_path):
    model, encoder = load()
    questions = read_questions(prompts, video_dir=media_root)
    engine = TransformersEngine(model.eval(), encoder, Decoding(max_new_tokens=6, temperature=1.0, seed=1))
    asked, complete = [], engine.complete
    engine.complete = lambda prompts, indices, **of: asked.append((indices, prompts)) or complete(prompts, indices, **of)
    streams = StreamEncoder(encoder, clip_tokens=16, max_memory_tokens=100)
    journal = Journal(tmp_path / "a.jsonl", {})
    answer_questions(questions, engine, streams, journal, batch_size=6, num_workers=0)
    # 24 frames at 4 tokens a pair: 3 turns; 6 frames at 8: 2; 4 frames at 4: 1
    assert [indices for indices, _ in asked] == [[(0, 0), (1, 0), (3, 0), (4, 0)], [(0, 1), (3, 1)], [0, 1, 2, 3, 4]]
    lines = sorted(journal.lines.values(), key=lambda line: line["position"])
    assert [len(line.get("thoughts", [])) for line in lines] == [2, 1, 0, 2, 1, 0]
    assert "error" in lines[5] and lines[0]["memory_evicted"] == lines[0]["memory_cut"] == 0
    tokenizer = encoder.processor.tokenizer
    for (indices, prompts), turn in zip(asked, (0, 1, 2), strict=True):
        for prompt in prompts:  # the question in the last turn alone
            assert ("Which colour" in tokenizer.decode(prompt.input_ids)) == (turn == 2), indices
    thoughts = lines[0]["thoughts"]
    assert [thought["time"] for thought in thoughts] == ["Time=0.0-4.0s", "Time=4.0-8.0s"]
    memory = "".join(f"{thought['time']} {thought['completion'].strip()}\n" for thought in thoughts)
    assert lines[0]["memory"] == memory and thoughts[0]["completion_tokens"] == 6
    assert lines[0]["prompt_tokens"] == len(asked[-1][1][0]) and len(lines[0]["media"]) == 3

    # a half done batch is computed whole again
    written = journal.path.read_bytes().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_bytes(b"".join(written[:3]))
    again = Journal(tmp_path / "b.jsonl", {})
    answer_questions(questions, engine, streams, again, batch_size=6, num_workers=0)
    assert again.lines == journal.lines and len(again.lines) == 6

    # without a memory the last turn is another prompt
    forgetful = Journal(tmp_path / "c.jsonl", {})
    answer_questions(
        questions, engine, StreamEncoder(encoder, 16, 0), forgetful, batch_size=6, num_workers=0
    )
    line = next(line for line in forgetful.lines.values() if line["position"] == 0)
    assert line["memory"] == "" and line["memory_cut"] == 2 and line["prompt_tokens"] < lines[0]["prompt_tokens"]
    # a memory that may not fit is an error of the row, before anything is asked
    large = Journal(tmp_path / "d.jsonl", {})
    answer_questions(questions[:3], engine, StreamEncoder(encoder, 16, 5000), large, batch_size=6, num_workers=0)
    errors = {line["position"]: "context of 4096" in line.get("error", "") for line in large.lines.values()}
    assert errors == {0: True, 1: True, 2: False}


def test_as_a_command(script, model_paths, media_root, prompts, tmp_path, capsys):
    output, more = tmp_path / "out.json", {"clip_tokens": 16, "max_memory_tokens": 40}
    options = [*command(model_paths, media_root, prompts, output, **more), "--streaming"]
    assert script.main(options) == 3 and len(json.loads(output.read_text())) == 6
    record = json.loads(OutputFiles(output).record.read_text())
    assert record["settings"]["streaming"] == more
    assert [len(row.get("thoughts", [])) for row in record["rows"]] == [2, 1, 0, 2, 1, 0]
    assert any(row.get("memory_evicted") or row.get("memory_cut") for row in record["rows"])
    assert all("model_output" not in row for row in record["rows"])
    # one by one, without workers: the same
    alone = tmp_path / "alone.json"
    script.main([*command(model_paths, media_root, prompts, alone, batch_size=1, num_workers=0, **more), "--streaming"])
    assert contents(alone)["output"] == contents(output)["output"]
    plain = tmp_path / "plain.json"
    plain_options = command(model_paths, media_root, prompts, plain)
    script.main(plain_options)
    assert "streaming" not in json.loads(OutputFiles(plain).record.read_text())["settings"]
    for word in ("--clip_tokens", "--max_memory_tokens"):
        for given, value in ((options, "-1"), (plain_options, "7")):  # out of range; of no streaming
            with pytest.raises(SystemExit):
                script.parse_arguments([*given, word, value])
            assert word in capsys.readouterr().err
    # the limit of the memory counts as part of a prompt, and is what an error names
    long, more = tmp_path / "long.json", {"clip_tokens": 16, "max_memory_tokens": 10**6}
    assert script.main([*command(model_paths, media_root, prompts, long, **more), "--streaming"]) == 3
    errors = [row.get("error", "") for row in json.loads(OutputFiles(long).record.read_text())["rows"]]
    assert any("Lower clip_tokens, max_memory_tokens" in error for error in errors)


def test_chat_thinks_clip_by_clip(model_paths, media_root, monkeypatch, capsys):
    monkeypatch.chdir(media_root)
    small = {"prompt_template": "tiny", "min_frames": 2, "max_frames": 24, "min_pixels": 56 * 56, "max_pixels": 112 * 56}
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    words += ["--model", str(model_paths["qwen2_5_vl"]), "--video", "long.mp4", "--max_new_tokens", "6", "--seed", "1"]
    words += ["--streaming", "--clip_tokens", "16", "--temperature", "1"]
    assert chat.main(["Which colour is first?", *words]) is None
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    assert [line.split()[1] for line in lines[:3]] == ["Time=0.0-4.0s", "Time=4.0-8.0s", "Time=8.0-12.0s"]
    assert [line.split(", ")[1] for line in lines[:3]] == ["0 notes", "1 notes", "2 notes"]
    assert len(lines) == 4 and lines[3].startswith("# 6 tokens in")
    with pytest.raises(SystemExit):
        chat.main(["?", "--model", "none", "--clip_tokens", "16"])
    assert "are of --streaming" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- rows


def test_taught_prompts_are_those_of_the_turns(tmp_path, load):
    """On the tiny world: given a taught row's thoughts, the turn has the row's ids and positions."""
    sizes = {"train": 12, "rl": 6, "dev": 12, "heldout": 3}
    world = make_world(tmp_path / "world", questions=["stream"], sizes=sizes)
    files = (world.train, world.heldout)
    rows, heldout = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert {row["problem_type"] for row in rows} == {"thought", "multiple choice", "free-form"}
    assert not any(row["process"] for row in heldout) and {len(row["videos"]) for row in heldout} == {1}
    _, encoder = load(min_frames=8, max_frames=8, min_pixels=3136, max_pixels=3136)
    compared = set()
    for row in rows:
        *notes, time = re.findall(r"Time=\S+(?: I see \w+\.)?", row["problem"])
        question = row["problem"].split(time)[1].strip() or "Which?"
        asked = {**heldout[0], **{name: row[name] for name in ("options", "problem_type")}, "problem": question}
        stream = StreamEncoder(encoder, clip_tokens=4).encode({**asked, "media_root": str(world.root)})
        assert len(stream.turns) == 4
        for note in notes:
            stream.add({"completion": note.split(" ", 1)[1]}, encoder.processor.tokenizer)
        found, prompt = encoder.encode({**row, "media_root": str(world.root)}), stream.prompt(encoder)
        assert (stream.time, stream.is_last) == (time, row["problem_type"] != "thought")
        assert np.array_equal(found.input_ids, prompt.input_ids) and np.array_equal(found.positions, prompt.positions)
        assert found.second_per_grid_ts == prompt.second_per_grid_ts == [1.0]
        compared.add(len(notes))
    assert compared == {0, 1, 2, 3}
