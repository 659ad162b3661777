"""Encoding rows, and what is refused."""

import re

import numpy as np
import pytest
import torch
from conftest import make_row
from helpers import make_clip

from veripo_trl.data.prompts import build_messages
from veripo_trl.model.encoding import PromptTooLongError, encode_unique
from veripo_trl.trainers.sft import SFTCollator


def test_equal_questions_share_one_object(load, mixed_rows):
    _, encoder = load()
    prompts = encode_unique(encoder, [mixed_rows[2], mixed_rows[1], mixed_rows[2]])
    assert prompts[0] is prompts[2] and prompts[0] is not prompts[1]
    assert [prompt.question_id for prompt in prompts] == ["video", "image", "video"]


def test_different_questions_of_one_id_are_different(load, mixed_rows, media_root, tmp_path):
    """Pairs of several sources may share ids, and the names of their files."""
    _, encoder = load()
    (tmp_path / "long.mp4").write_bytes((media_root / "fast.mp4").read_bytes())
    row = mixed_rows[2]
    rows = [row, {**row, "problem": "Why?"}, {**row, "videos": ["fast.mp4"]}, {**row, "media_root": str(tmp_path)}]
    together = encode_unique(encoder, rows)
    for prompt, alone in zip(together, map(encoder.encode, rows), strict=True):
        assert np.array_equal(prompt.input_ids, alone.input_ids)
        assert torch.equal(prompt.pixel_values_videos, alone.pixel_values_videos)


def test_the_sources_frame_rate_gives_the_times(load, media_root):
    """8 fps source sampled at 2 fps: frames 1/2 s apart, 2 per step, 1 token per second: times 0, 1."""
    _, encoder = load()
    prompt = encoder.encode(make_row("fast", media_root, videos=["fast.mp4"]))
    vision = prompt.input_ids == encoder.config.video_token_id
    assert prompt.video_grid_thw.tolist() == [[2, 4, 4]]
    times = prompt.positions[0][vision]
    assert sorted(set((times - times.min()).tolist())) == [0, 1]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_positions_have_the_true_times_of_a_variable_rate(kind, load, tmp_path):
    """24 frames of 14 s, of a header that speaks of 30 fps: 0.585 s apart, 2 per step."""
    _, encoder = load(kind)
    make_clip(tmp_path / "slides.mkv", times_s=[0, 0.5, 1, 6, 6.5, 7, 7.5, 14], fps=30)
    prompt = encoder.encode(make_row("slides", tmp_path, videos=["slides.mkv"]))
    if kind == "qwen2_5_vl":  # one interval for all, 1 position per second
        assert prompt.second_per_grid_ts == [pytest.approx(14.033 / 12)]
        times = prompt.positions[0][prompt.input_ids == encoder.config.video_token_id]
        assert sorted(set((times - times.min()).tolist())) == [int(step * 14.033 / 12) for step in range(12)]
    else:  # the time of each step as text
        steps = np.linspace(0, 14.032, 24).reshape(12, 2).mean(axis=1)
        text = encoder.processor.tokenizer.decode(prompt.input_ids)
        assert re.findall(r"<([\d.]+) seconds>", text) == [f"{step:.1f}" for step in steps]


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_5"])
def test_pictures_one_by_one_have_the_models_own_positions(kind, load, mixed_rows):
    """Blocks without temporal extent, where transformers' rule is the trained one; ids are those of the processor."""
    model, encoder = load(kind)
    for row in mixed_rows:
        prompt = encoder.encode(row)
        ids = torch.from_numpy(prompt.input_ids)[None]
        types = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
        grids = {name: getattr(prompt, name) for name in ("image_grid_thw", "video_grid_thw")}
        grids = {name: torch.from_numpy(grid) for name, grid in grids.items() if grid is not None}
        own, _ = model.model.get_rope_index(ids, types, **grids)
        assert torch.equal(own[:, 0], torch.from_numpy(prompt.positions))
        text = encoder.processor.apply_chat_template(build_messages(row, encoder.template), add_generation_prompt=True)
        clips, images = encoder.read_media(row)
        whole = encoder._call_processor(text.removesuffix("<think>\n"), images, clips)["input_ids"]
        assert torch.equal(ids, whole)


@pytest.mark.parametrize("opened", ["<think>\\n", "<think>\\n\\n</think>\\n\\n"])
def test_a_completion_opens_its_thinking_itself(opened, load, mixed_rows):
    """Whatever the template of Qwen3.5 puts there, thinking and not."""
    _, encoder = load("qwen3_5")
    template = encoder.processor.chat_template
    assert template.count("<think>\\n") == 1
    encoder.processor.chat_template = template.replace("<think>\\n", opened)
    for begun in ("", "<think></think>\n"):
        prompt = encoder.encode({**mixed_rows[1], "problem": "What is <think>?", "begun": begun})
        text = encoder.processor.tokenizer.decode(prompt.input_ids)
        assert text.endswith(f"<|im_end|>\n<|im_start|>assistant\n{begun}") and "What is <think>?" in text


def test_shuffled_frames_are_the_same_frames(load, media_root):
    _, encoder = load()
    row = make_row("long", media_root, videos=["long.mp4"])
    recorded, shuffled = encoder.encode(row), encoder.encode(row, shuffle_seed=0)
    assert not torch.equal(recorded.pixel_values_videos, shuffled.pixel_values_videos)
    assert recorded.pixel_values_videos.sum().item() == pytest.approx(shuffled.pixel_values_videos.sum().item(), rel=1e-4)
    assert torch.equal(encoder.encode(row).pixel_values_videos, recorded.pixel_values_videos)  # nothing was left shuffled


def test_a_long_prompt_is_refused_with_the_knobs(load, mixed_rows):
    _, encoder = load(max_prompt_tokens=60)
    with pytest.raises(PromptTooLongError, match="'video'.*long.mp4.*max_prompt_tokens=60.*max_frames"):
        [encoder.encode(row) for row in mixed_rows]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_control_tokens_that_a_row_spells_stay_text(kind, load, media_root):
    """In prompt and target there are as many of them as without the spelling, and the text is all there."""
    _, encoder = load(kind)
    tokenizer = encoder.processor.tokenizer
    spelled = "".join(tokenizer.all_special_tokens)
    assert "<|im_end|>" in spelled and "<|video_pad|>" in spelled
    found = []
    for word in (spelled, ""):
        options = [f"A. red{word}", "B. blue"]
        texts = {"problem": f"Which?{word}", "options": options, "process": f"B.{word}"}
        row = make_row("row", media_root, videos=["wide.mp4"], **texts)
        ids = SFTCollator(encoder, max_length=None)([row])["input_ids"][0].tolist()
        assert tokenizer.decode(encoder.encode(row).input_ids).count(word or "no") == (2 if word else 0)
        assert f"<think>{row['process']}</think>" in tokenizer.decode(ids)
        found.append([token for token in ids if token in tokenizer.all_special_ids])
    assert found[0] == found[1] and len(found[0]) > 5


@pytest.mark.parametrize(
    "problem", ["7 cats?", "'s it?", "...", "\u0301a", "问题", "🙂 \u200b", "\ufeffWhat\n\n so", "<think>"]
)
def test_other_texts_are_tokenized_within_the_prompt(problem, load, media_root):
    _, encoder = load()
    row = make_row("row", media_root, problem=problem, options=[])
    whole = encoder.processor.apply_chat_template(build_messages(row, encoder.template), add_generation_prompt=True)
    assert encoder.encode(row).input_ids.tolist() == encoder.processor.tokenizer(whole)["input_ids"]
