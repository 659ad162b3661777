"""Chat: as a command, as a session, as a function; what it prints, and what it says of bad input."""

import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import make_row

from veripo_trl import chat
from veripo_trl.chat import Chat, Printer, Sections, ask
from veripo_trl.data.prompts import PromptError
from veripo_trl.media.video import MediaError

SMALL = {"prompt_template": "tiny", "min_frames": 2, "max_frames": 4, "min_pixels": 56 * 56, "max_pixels": 112 * 56}
SMALL_WORDS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]


def command(*words, stdin: str = "", cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "veripo_trl.chat", *map(str, words), *SMALL_WORDS, "--max_new_tokens", "6"],
        input=stdin, capture_output=True, text=True, timeout=200, cwd=cwd,
    )  # fmt: skip


@pytest.fixture(scope="module")
def loaded(model_paths):
    return Chat(str(model_paths["qwen2_5_vl"]), device="cpu", **SMALL)


@pytest.mark.slow
def test_one_question_as_a_command(model_paths, media_root):
    """Relative paths, a video and an image, options: frames, tokens and the completion on the screen."""
    model = model_paths["qwen2_5_vl"]
    words = ["--model", model, "--video", "long.mp4", "--video", "wide.mp4", "--image", "square.png"]
    # The question after `--video`, as the README has it: it must not be taken for another file.
    done = command("--options", "red", "blue", *words, "Which colour is first?", cwd=media_root)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("# long.mp4: 4 frames × 56 × 56 of 24 at 2 fps")
    assert lines[1].startswith("# wide.mp4: 4 frames")
    assert lines[2].startswith("# square.png: image 56 × 56 → 4 tokens")
    assert lines[3].startswith("# prompt: ") and lines[-1].startswith("# 6 tokens in ")
    assert "cut at --max_new_tokens 6" in lines[-1]


@pytest.mark.slow
def test_a_session_goes_on_after_a_question_that_cannot_be_asked(model_paths, media_root):
    questions = f"What is this?\n\nWhat is {'this ' * 99}?\nHow many shapes are there?"
    words = ["--model", model_paths["qwen3_vl"], "--video", media_root / "fast.mp4", "--temperature", "1", "--seed", "1"]
    words += ["--max_prompt_tokens", "90"]
    done = command(*words, stdin=questions)
    assert done.returncode != 0  # one of the three was refused
    assert "the limit is max_prompt_tokens=90" in done.stderr and "1 question could not be asked" in done.stderr
    assert done.stdout.count("# prompt: ") == 2 and done.stdout.count("# 6 tokens in ") == 2
    assert "\x1b" not in done.stdout  # no colours where no terminal is


def test_bad_input_is_one_line_before_the_model_loads(model_paths, media_root, tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    model = ["--model", str(model_paths["qwen2_5_vl"])]
    cases = [
        (["?", *model, "--video", "gone.mp4"], "gone.mp4: no such file"),
        (["?", *model, "--image", str(tmp_path)], "a folder"),
        (["?", "--model", "outputs/nothing"], "outputs/nothing"),
        (["?", *model, "--fps", "0"], "fps must be above 0"),
        (["?", *model, "--device", "cuda:7"], "torch sees no GPU"),
        (["?", *model, "--prompt_template", "nowhere"], "no prompt template"),
        (["?", *model, "--video", str(tmp_path / "text.mp4")], "text.mp4"),
        (["?", *model, "--max_prompt_tokens", "3"], "the limit is max_prompt_tokens=3"),
        ([" ", *model], "The question is empty"),
        (["?", *model, "--max_new_tokens", "0"], "max_new_tokens >= 1"),
    ]
    for words, expected in cases:
        if expected == "torch sees no GPU" and chat.torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit) as raised:
            chat.main([*words, *([] if "--prompt_template" in words else ["--prompt_template", "tiny"])])
        assert str(raised.value).startswith("chat: ") and expected in str(raised.value), words
        assert "\n" not in str(raised.value).strip(), raised.value


def test_a_function_of_a_few_lines(model_paths, media_root):
    loading = {"device": "cpu", **SMALL}
    reply = ask(
        "Which colour is first?", model=str(model_paths["qwen2_5_vl"]), video=media_root / "wide.mp4",
        loading=loading, max_new_tokens=5,
    )  # fmt: skip
    assert reply.completion_tokens == 5 and reply.finish_reason == "length" and reply.answer is None
    assert len(reply.media) == 1 and reply.prompt_tokens > 5


def test_prompts_are_those_of_training(loaded, load, media_root):
    """The same ids, positions and pixels as a row of a data set gets."""
    _, encoder = load(**SMALL)
    row = make_row("row", media_root, videos=["long.mp4"], images=["tall.png"])
    expected = encoder.encode(row)
    seen = []
    media = {"videos": [media_root / "long.mp4"], "images": [str(media_root / "tall.png")]}
    texts = {"lettered": row["options"], "bare": [option[3:] for option in row["options"]]}
    for options in texts.values():
        loaded.ask(row["problem"], options=options, max_new_tokens=1, on_prompt=seen.append, **media)
    for prompt in seen:
        assert np.array_equal(prompt.input_ids, expected.input_ids)
        assert np.array_equal(prompt.positions, expected.positions)
        assert chat.torch.equal(prompt.pixel_values_videos, expected.pixel_values_videos)
        assert chat.torch.equal(prompt.pixel_values, expected.pixel_values)


def test_a_stream_is_the_completion_and_seeds_repeat(loaded, media_root):
    options = {"videos": [media_root / "fast.mp4"], "max_new_tokens": 30, "temperature": 1.0}
    replies, streams = [], []
    for seed in (1, 1, 2):
        pieces = []
        replies.append(loaded.ask("What?", seed=seed, on_text=pieces.append, **options))
        streams.append("".join(pieces))
    assert streams == [reply.completion for reply in replies] and len(replies[0].completion) > 10
    assert replies[0].completion == replies[1].completion != replies[2].completion


def test_an_adapter_and_four_bits(model_paths, media_root, tmp_path):
    """An adapter that changes the answer is really used; full weights load in 4 bits."""
    import torch
    from peft import LoraConfig

    from veripo_trl.model.policy import LANGUAGE_MODEL_LINEAR, load_policy

    base = str(model_paths["qwen2_5_vl"])
    model, _ = load_policy(base, lora=LoraConfig(r=4, target_modules=LANGUAGE_MODEL_LINEAR))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    question = {"question": "What?", "videos": [media_root / "wide.mp4"], "max_new_tokens": 12}
    with_adapter = Chat(str(tmp_path / "adapter"), device="cpu", **SMALL)
    assert not any(parameter.requires_grad for parameter in with_adapter.model.parameters())
    plain = Chat(base, device="cpu", **SMALL).ask(**question).completion
    assert with_adapter.ask(**question).completion != plain
    four_bits = Chat(base, device="cpu", load_in_4bit=True, **SMALL)
    assert four_bits.model.is_loaded_in_4bit and four_bits.ask(**question).completion_tokens
    both = Chat(str(tmp_path / "adapter"), device="cpu", load_in_4bit=True, **SMALL)
    assert both.model.get_base_model().is_loaded_in_4bit
    assert both.ask(**question).completion != four_bits.ask(**question).completion


def test_refusals_name_what_is_wrong(loaded, tmp_path):
    for question, error, words in (
        ({"question": "?", "videos": [tmp_path / "gone.mp4"]}, MediaError, "no such file"),
        ({"question": "?", "temperature": -1.0}, PromptError, "temperature >= 0"),
        ({"question": "?", "options": [f"number {n}" for n in range(27)]}, PromptError, "26 options, came 27"),
    ):
        with pytest.raises(error, match=words):
            loaded.ask(**question)


class Breaks:
    """In the place of a policy: each question ends in the next of these errors, or is answered."""

    errors = []

    def __init__(self, *args, **loading):
        pass

    def ask(self, question, on_text, **options):
        on_text("<think>so")
        if error := self.errors.pop(0):
            raise error
        return chat.Reply("", "so", "B", "stop", [], 5, 3, 0.1, 0.1)


FULL = chat.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB. GPU 0 has a total capacity …")


def test_a_full_gpu_and_ctrl_c_end_an_answer_only(monkeypatch, capsys):
    monkeypatch.setattr(chat, "Chat", Breaks)
    monkeypatch.setattr("sys.stdin", io.StringIO("one?\ntwo?\nthree?\n"))
    Breaks.errors = [FULL, KeyboardInterrupt(), None]
    with pytest.raises(SystemExit, match="1 question could not be asked"):
        chat.main(["--model", "m"])
    said = capsys.readouterr()
    assert said.err == (
        "chat: CUDA out of memory. Give fewer or smaller frames (--max_frames, --max_pixels), or load with "
        "--load_in_4bit.\n"
    )
    assert said.out.count("thinking: so\n") == 3 and said.out.count("# stopped") == 1 and "# 3 tokens in" in said.out


def test_a_full_gpu_and_ctrl_c_of_one_question_are_a_line(monkeypatch, capsys):
    monkeypatch.setattr(chat, "Chat", Breaks)
    for error, code in ((FULL, "chat: CUDA out of memory. Give fewer"), (KeyboardInterrupt(), "130")):
        Breaks.errors = [error]
        with pytest.raises(SystemExit) as raised:
            chat.main(["--model", "m", "what?"])
        assert str(raised.value).startswith(code)
    assert capsys.readouterr().out.endswith("# stopped\n")


def test_a_link_may_lead_anywhere(loaded, media_root, tmp_path):
    """Whoever asks names the file itself: it may be a link."""
    os.symlink(media_root / "wide.mp4", tmp_path / "link.mp4")
    shutil.copy(media_root / "wide.mp4", tmp_path / "name with ü.mp4")
    for name in ("link.mp4", "name with ü.mp4"):
        assert loaded.ask("?", videos=[tmp_path / name], max_new_tokens=1).media


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("<think>a < b</think><answer>B</answer>", [("thinking", "a < b"), ("answer", "B")]),
        ("a <think>b</think> c <answer>d", [("", "a "), ("thinking", "b"), ("", " c "), ("answer", "d")]),
        ("no tags <thin", [("", "no tags <thin")]),
        ("</think></answer><answer></answer>", []),
    ],
)  # fmt: skip
def test_sections_whatever_the_pieces(text, sections, size):
    splitter, found = Sections(), []
    pieces = [text[place : place + size] for place in range(0, len(text), size)]
    for place, piece in enumerate(pieces):
        for section, part in splitter.feed(piece, last=place == len(pieces) - 1):
            if found and found[-1][0] == section:
                found[-1] = (section, found[-1][1] + part)
            else:
                found.append((section, part))
    assert found == sections


def test_what_the_screen_shows():
    for styled, expected in (
        (False, "thinking: so\nanswer: B\n"),
        (True, "thinking: \x1b[2mso\x1b[0m\nanswer: \x1b[1mB\x1b[0m\n"),
    ):
        stream = io.StringIO()
        printer = Printer(stream, styled=styled)
        for piece in ("<thi", "nk>\nso</think>\n", "<answer>B</ans", "wer>"):
            printer.write(piece)
        printer.write("", last=True)
        assert stream.getvalue() == expected
    stream = io.StringIO()
    printer = Printer(stream, styled=True)
    printer.write("<answer>\x1b]0;title\x07\x9b31m\rB\u202e</answer>", last=True)  # orders to a terminal
    assert stream.getvalue() == "answer: \x1b[1m\ufffd]0;title\ufffd\ufffd31m\ufffdB\ufffd\x1b[0m\n"
