"""Chat: as a command, as a function; what it prints, and what it says of bad input."""

import os
import shutil

import numpy as np
import pytest
from conftest import make_row
from transformers import TextIteratorStreamer

from veripo_trl import chat
from veripo_trl.chat import Chat, Printer
from veripo_trl.data.prompts import PromptError
from veripo_trl.errors import ConfigError, run
from veripo_trl.media.video import MediaError

SMALL = {"prompt_template": "tiny", "min_frames": 2, "max_frames": 4, "min_pixels": 56 * 56, "max_pixels": 112 * 56}
SMALL_WORDS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def loaded(model_paths):
    return Chat(str(model_paths["qwen2_5_vl"]), device="cpu", **SMALL)


def test_one_question_as_a_command(model_paths, media_root, monkeypatch, capsys):
    """Relative paths, a video and an image, options: frames, tokens and the completion on the screen."""
    monkeypatch.chdir(media_root)
    words = ["--model", str(model_paths["qwen3_vl"]), "--video", "long.mp4", "--video", "wide.mp4"]
    words += ["--image", "square.png", *SMALL_WORDS, "--max_new_tokens", "6", "--temperature", "1"]
    # The question after `--image`: it must not be taken for another file.
    assert chat.main(["--options", "red", "blue", *words, "Which colour is first?"]) is None
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].startswith("# long.mp4: 4 frames × ") and lines[1].startswith("# wide.mp4: 4 frames")
    assert lines[2].startswith("# square.png: image ") and lines[3].startswith("# prompt: ")
    assert lines[-1].startswith("# 6 tokens in ") and "cut at --max_new_tokens 6" in lines[-1]
    assert "\x1b" not in said  # no colours where no terminal is


def test_bad_input_is_one_line_before_the_model_loads(model_paths, media_root, tmp_path, capsys):
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
        words = [*words, *([] if "--prompt_template" in words else ["--prompt_template", "tiny"])]
        assert run(lambda words=words: chat.main(words)) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "Error: " in line]
        assert expected in line


def test_prompts_are_those_of_training(loaded, load, media_root):
    """The same ids, positions and pixels as a row of a data set gets."""
    _, encoder = load(**SMALL)
    row = make_row("row", media_root, videos=["long.mp4"], images=["tall.png"])
    expected = encoder.encode(row)
    media = {"videos": [media_root / "long.mp4"], "images": [str(media_root / "tall.png")]}
    texts = {"lettered": row["options"], "bare": [option[3:] for option in row["options"]]}
    for options in texts.values():
        prompt = loaded.encode(row["problem"], options=options, **media)
        assert np.array_equal(prompt.input_ids, expected.input_ids)
        assert np.array_equal(prompt.positions, expected.positions)
        assert chat.torch.equal(prompt.pixel_values_videos, expected.pixel_values_videos)
        assert chat.torch.equal(prompt.pixel_values, expected.pixel_values)


def test_a_stream_is_the_completion_and_seeds_repeat(loaded, media_root):
    replies, videos = [], [media_root / "fast.mp4"]
    for seed in (1, 1, 2):
        streamer = TextIteratorStreamer(loaded.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        decoding = {"seed": seed, "streamer": streamer, "max_new_tokens": 30, "temperature": 1.0}
        replies.append(loaded.ask("What?", videos=videos, decoding=decoding))
        assert "".join(streamer) == replies[-1].completion
    assert len(replies[0].completion) > 10 and replies[0].completion_tokens == 30
    assert replies[0].finish_reason == "length" and replies[0].answer is None
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
    question = {"question": "What?", "videos": [media_root / "wide.mp4"],
                "decoding": {"max_new_tokens": 12}}  # fmt: skip
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
        ({"question": "?", "decoding": {"temperature": -1.0}}, ConfigError, "temperature >= 0"),
        ({"question": "?", "options": [f"number {n}" for n in range(27)]}, PromptError, "26 options, came 27"),
    ):
        with pytest.raises(error, match=words):
            loaded.ask(**question)


def test_a_link_may_lead_anywhere(loaded, media_root, tmp_path):
    """Whoever asks names the file itself: it may be a link."""
    os.symlink(media_root / "wide.mp4", tmp_path / "link.mp4")
    shutil.copy(media_root / "wide.mp4", tmp_path / "name with ü.mp4")
    for name in ("link.mp4", "name with ü.mp4"):
        assert loaded.encode("?", videos=[tmp_path / name]).media


def test_the_screen_obeys_no_completion(loaded, capsys):
    tokenizer = loaded.processor.tokenizer
    for text, expected in (
        ("<think>\nso it is</think>\n<answer>B</answer>", "<think>\nso it is</think>\n<answer>B</answer>\n"),
        ("<answer>\x1b]0;t\x07\x9b31m B\u202e</answer>", "<answer>\ufffd]0;t\ufffd\ufffd31m B\ufffd</answer>\n"),
    ):
        printer = Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        printer.put(chat.torch.tensor([[1, 2, 3]]))  # the prompt
        for token in tokenizer(text)["input_ids"]:
            printer.put(chat.torch.tensor([token]))
        printer.end()
        assert capsys.readouterr().out == expected
