import collections
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import decord
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from veripo_trl.files.disk import FileError
from veripo_trl.tiny import model as tiny_model
from veripo_trl.tiny.clips import (
    COLOURS,
    FPS,
    KINDS,
    NUM_FRAMES,
    ORDER_LENGTH,
    SIZE,
    clip_spec,
    draw_clip,
    make_clip,
    write_clip,
)
from veripo_trl.tiny.judge import conclude, judge
from veripo_trl.tiny.questions import PLANTED_SHARE, SPLITS, SplitSize, make_split, plan_split
from veripo_trl.tiny.world import WorldError, make_world

SMALL = {
    "train": SplitSize(12, 18),
    "rl": SplitSize(6, 8),
    "dev": SplitSize(6, 6),
    "heldout": SplitSize(6, 6),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("tiny") / "world", sizes=SMALL)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Clips


@pytest.mark.parametrize("kind", KINDS)
def test_same_key_same_bytes_and_moving_shapes(tmp_path, kind):
    for name in ("a", "b"):
        make_clip(tmp_path / f"{name}.mp4", kind, [0, 1, 2])
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    frames = draw_clip(clip_spec(kind, [0, 1, 2]))
    assert frames.shape == (NUM_FRAMES, SIZE, SIZE, 3) and frames.dtype == np.uint8
    assert not np.array_equal(frames, draw_clip(clip_spec(kind, [0, 1, 3])))
    assert any(not np.array_equal(frames[0], frame) for frame in frames[1:])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "marked"])  # whose marks are in the middle
def test_colours_survive_the_file(tmp_path, kind):
    for number in range(4):
        spec = clip_spec(kind, [0, number])
        frames = draw_clip(spec)
        write_clip(tmp_path / "clip.mp4", frames)
        reader = decord.VideoReader(str(tmp_path / "clip.mp4"), num_threads=1)
        decoded = reader[:].asnumpy()
        assert decoded.shape == frames.shape and reader.get_avg_fps() == FPS
        assert np.abs(decoded.astype(int) - frames.astype(int)).mean() < 4
        for shape in spec["shapes"]:  # the middle of every shape is nearest to its own colour
            y, x = (int(value) for value in shape["start"])
            distances = {
                name: np.abs(decoded[shape["first"], y, x].astype(int) - colour).sum()
                for name, colour in COLOURS.items()
            }
            assert min(distances, key=distances.get) == shape["colour"]


def test_count_clips_show_as_many_separate_shapes_as_they_say():
    seen = collections.Counter()
    for number in range(60):
        spec = clip_spec("count", [0, number])
        seen[len(spec["colours"])] += 1
        for i, one in enumerate(spec["shapes"]):
            for other in spec["shapes"][:i]:
                for end in ("start", "end"):
                    gap = np.abs(np.subtract(one[end], other[end])).max() - one["radius"] - other["radius"]
                    assert gap >= 1
    assert set(seen) == {1, 2, 3, 4, 5, 6}


def test_order_clips_show_one_colour_after_another():
    for number in range(30):
        spec = clip_spec("order", [0, number])
        assert len(set(spec["colours"])) == ORDER_LENGTH
        bounds = [(shape["first"], shape["last"]) for shape in spec["shapes"]]
        assert bounds[0][0] == 0 and bounds[-1][1] == NUM_FRAMES
        assert all(last == first for (_, last), (first, _) in zip(bounds, bounds[1:], strict=False))


# Questions and the parser


@pytest.fixture(scope="module")
def train_rows():
    return make_split("train", size=SplitSize(600, 900))


def test_rows_follow_the_schema_and_their_truth_is_true(train_rows):
    rows, clips = train_rows
    assert len(rows) == 900 and len(clips) == 600
    assert len({row["question_id"] for row in rows}) == 900
    assert {path for row in rows for path in row["videos"]} == set(clips)
    assert len({(row["problem"], *row["videos"]) for row in rows}) == 900
    for row in rows:
        colours = clip_spec(*clips[row["videos"][0]])["colours"]
        if row["data_source"] == "tiny-count":
            expected = str(len(colours))
        elif row["data_source"] == "tiny-list":
            expected = " ".join(colours)
        else:
            ordinal = row["problem"].split()[-1].rstrip("?")
            asked = colours[{"first": 0, "second": 1, "last": -1}[ordinal]]
            assert [option[0] for option in row["options"]] == list("ABCD")
            expected = next(option[0] for option in row["options"] if option[3:] == asked)
        assert row["solution"] == expected


def test_solutions_pass_the_projects_own_check(train_rows):
    answers = pytest.importorskip("veripo_trl.answers.score")
    for row in train_rows[0]:
        truth = {name: row[name] for name in ("problem_type", "solution", "options")}
        answers.check_solution(**truth)
        assert answers.score_answer(row["solution"], **truth) == 1


def test_a_fifth_of_the_thoughts_contradict_the_right_answer(train_rows):
    verdicts = collections.defaultdict(collections.Counter)
    for row in train_rows[0]:
        text = f"<think>{row['process']}</think><answer>{row['solution']}</answer>"
        verdicts[row["data_source"]][judge(text)] += 1
    assert set(verdicts) == {"tiny-count", "tiny-order", "tiny-list"}
    for counts in verdicts.values():
        assert counts["unknown"] == 0
        assert counts["inconsistent"] / counts.total() == pytest.approx(PLANTED_SHARE, abs=0.01)


def test_shares_and_answers_are_balanced(train_rows):
    sources = collections.Counter(row["data_source"] for row in train_rows[0])
    assert sources == {"tiny-count": 315, "tiny-order": 495, "tiny-list": 90}
    letters = collections.Counter(row["solution"] for row in train_rows[0] if row["options"])
    assert min(letters.values()) > 0.18 * letters.total()


def test_splits_depend_on_the_seed_and_share_nothing():
    size = SplitSize(30, 40)
    made = {split: make_split(split, size=size) for split in SPLITS}
    assert make_split("train", size=size) == made["train"]
    assert make_split("train", size=size, seed=1)[0] != made["train"][0]
    paths = [path for _, clips in made.values() for path in clips]
    keys = [str(key) for _, clips in made.values() for key in clips.values()]
    drawn = {draw_clip(clip_spec(*key)).tobytes() for _, clips in made.values() for key in clips.values()}
    assert len(set(paths)) == len(set(keys)) == len(drawn) == 4 * 30
    for split, (rows, _) in made.items():
        assert all((row["process"] is not None) == (split == "train") for row in rows)


def test_too_few_clips_are_refused():
    with pytest.raises(ValueError, match="raise clips or lower questions"):
        plan_split(SplitSize(clips=10, questions=100))


@pytest.mark.parametrize(
    ("think", "expected"),
    [
        ("I count one two three, so 3.", "3"),
        ("I count one two three, so 4.", "4"),
        ("I see red then blue then green, last is green: B.", "B"),
        ("I see red then blue then green, so red green blue.", "red green blue"),
        ("I see red then blue then green, last is green", None),
        ("Maybe B.", None),
        ("", None),
    ],
)
def test_conclude(think, expected):
    assert conclude(think) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>I count one, so 1.</think><answer>1</answer>", "consistent"),
        ("<think>I count one, so 1.</think>\n<answer> 1 </answer>", "consistent"),
        ("<think>I count one, so 2.</think><answer>1</answer>", "inconsistent"),
        ("<think>I see red then blue then green, first is red: A.</think><answer>B</answer>", "inconsistent"),
        ("<think>I count one, so 1.</think>", "unknown"),
        ("<think>one</think><answer>1</answer>", "unknown"),
        ("<think>I count one, so 1.</think><answer>1</answer><answer>1</answer>", "unknown"),
    ],
)
def test_judge(completion, expected):
    assert judge(completion, problem_type="numerical", options=[]) == expected


# The model


def test_tokenizer_has_whole_words_and_keeps_the_tags():
    tokenizer = tiny_model.build_tokenizer()
    assert tokenizer.get_vocab() == tiny_model.build_tokenizer().get_vocab()
    assert 350 < len(tokenizer) < 450
    text = "<think>I see red then blue then green, last is green: B.</think><answer>B</answer>"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert tokens[0] == "<think>" and tokens[-3:] == ["<answer>", "B", "</answer>"] and len(tokens) == 19
    for piece in ("user", "assistant", *tiny_model.SPECIAL_TOKENS, *tiny_model.TAGS, "A", "D", " C"):
        assert len(tokenizer(piece)["input_ids"]) == 1, piece
    ids = tokenizer(text + "<|im_end|><|endoftext|>")["input_ids"]
    assert tokenizer.batch_decode([ids], skip_special_tokens=True) == [text]
    odd = "Ünïcode 3.5%\n\t{x}"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd


@pytest.mark.parametrize(("kind", "patch", "prompt_range"), [("qwen2_5_vl", 14, (32, 45)), ("qwen3_vl", 16, (60, 85))])
def test_saved_model_and_processor_take_a_clip(tmp_path, train_rows, kind, patch, prompt_range):
    state = torch.random.get_rng_state()
    path = tiny_model.save_tiny_model(tmp_path / "model", kind, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    model = AutoModelForImageTextToText.from_pretrained(path)
    assert model.config.model_type == kind
    for (name, saved), again in zip(
        model.state_dict().items(), tiny_model.build_model(kind, seed=3).state_dict().values(), strict=True
    ):
        assert torch.equal(saved, again), name
    assert not torch.equal(model.lm_head.weight, tiny_model.build_model(kind, seed=4).lm_head.weight)

    processor = AutoProcessor.from_pretrained(path)
    tokenizer = processor.tokenizer
    assert tokenizer.get_vocab() == tiny_model.build_tokenizer().get_vocab()
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    for name in ("image_token_id", "video_token_id"):
        assert getattr(model.config, name) == getattr(processor, name)
    video_config = json.loads((path / "video_preprocessor_config.json").read_text())
    assert video_config["patch_size"] == processor.video_processor.patch_size == patch

    rows, clips = train_rows
    metadata = [{"total_num_frames": NUM_FRAMES, "fps": float(FPS), "frames_indices": list(range(NUM_FRAMES))}]
    for source in ("tiny-count", "tiny-order", "tiny-list"):
        row = next(row for row in rows if row["data_source"] == source)
        text = " ".join([row["problem"], *row["options"]])
        message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}
        prompt = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        assert "system" not in prompt and prompt.endswith(f"{text}<|im_end|>\n<|im_start|>assistant\n")
        inputs = processor(
            text=[prompt],
            videos=[draw_clip(clip_spec(*clips[row["videos"][0]]))],
            videos_kwargs={"do_sample_frames": False, "video_metadata": metadata},
            return_tensors="pt",
        )
        ids = inputs["input_ids"][0]
        assert (ids == processor.video_token_id).sum() == 16
        assert prompt_range[0] <= len(ids) <= prompt_range[1]
        target = f"<think>{row['process']}</think><answer>{row['solution']}</answer>"
        assert 13 <= len(tokenizer(target)["input_ids"]) <= 20
        with torch.no_grad():
            assert model(**inputs).logits.shape == (1, len(ids), len(tokenizer))


def test_parameter_count():
    assert 1.3e6 < sum(parameter.numel() for parameter in tiny_model.build_model().parameters()) < 1.5e6
    with pytest.raises(ValueError, match="expected one of"):
        tiny_model.build_model("qwen9")


def test_chat_template_orders_images_and_turns():
    processor = tiny_model.build_processor()
    vision = "<|vision_start|><|{}_pad|><|vision_end|>"
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "B"},
    ]
    assert processor.apply_chat_template(messages, tokenize=False) == (
        f"<|im_start|>user\n{vision.format('video')}{vision.format('image')}Which?<|im_end|>\n"
        "<|im_start|>assistant\nB<|im_end|>\n"
    )


# The world


def test_world_has_its_files_and_is_reused(world):
    for split in SPLITS:
        rows = read_rows(world.root / f"{split}.jsonl")
        assert len(rows) == SMALL[split].questions
        for row in rows:
            assert (world.root / row["videos"][0]).is_file()
    assert len(list((world.root / "clips").iterdir())) == sum(size.clips for size in SMALL.values())
    assert (world.model / "model.safetensors").is_file()
    before = {path: path.stat().st_mtime_ns for path in world.root.rglob("*")}
    assert make_world(world.root, sizes=SMALL) == world
    for kind in (Path.is_file, Path.is_dir):  # by the umask, the weights and the folder itself too
        assert len({path.stat().st_mode for path in (world.root, *world.root.rglob("*")) if kind(path)}) == 1
    assert before == {path: path.stat().st_mtime_ns for path in world.root.rglob("*")}


def test_world_is_the_same_from_the_same_seed(world, tmp_path):
    again = make_world(tmp_path / "again", sizes=SMALL)
    for path in world.root.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (again.root / path.relative_to(world.root)).read_bytes(), path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: None, "seed 0 instead of 5"),
        (lambda root: (root / "world.json").write_text("{"), "expected a JSON object.*choose another --root"),
        (lambda root: (root / "world.json").unlink(), "no world.json"),
    ],
)
def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path, damage, message):
    root = tmp_path / "world"
    root.mkdir()
    (root / "world.json").write_text(json.dumps({"seed": 0}))
    (root / "mine.txt").write_text("mine")
    damage(root)
    with pytest.raises((WorldError, FileError), match=message):
        make_world(root, seed=5, sizes=SMALL)
    assert (root / "mine.txt").read_text() == "mine"


def test_a_missing_part_is_named(world, tmp_path):
    root = tmp_path / "world"
    root.mkdir()
    (root / "world.json").write_bytes((world.root / "world.json").read_bytes())
    with pytest.raises(WorldError, match="train.jsonl: missing"):
        make_world(root, sizes=SMALL)


def test_what_a_killed_build_left_is_cleared(tmp_path):
    leftover = tmp_path / ".world.building-abc"
    leftover.mkdir()
    make_world(tmp_path / "world", sizes=SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".world.lock", "world"]


def test_two_processes_at_once_make_one_world(world, tmp_path):
    sizes = {name: dataclasses.astuple(size) for name, size in SMALL.items()}
    # The model's part is replaced by a slow stand-in: no torch to import, and a wide window for a collision.
    script = f"""
import pathlib, sys, time, types
def save_tiny_model(path, seed):
    path.mkdir()
    time.sleep(0.5)
    (path / "model.safetensors").write_text(str(seed))
sys.modules["veripo_trl.tiny.model"] = types.SimpleNamespace(save_tiny_model=save_tiny_model)
from veripo_trl.tiny.world import SplitSize, make_world
sizes = {{name: SplitSize(*pair) for name, pair in {sizes}.items()}}
make_world({str(tmp_path / "world")!r}, sizes=sizes)
"""
    source = str(Path(tiny_model.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE) for _ in range(2)
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sum("tiny world" in error for error in errors) == 1  # one made it, the other waited
    assert sorted(path.name for path in tmp_path.iterdir()) == [".world.lock", "world"]
    for path in (*world.root.glob("*.json*"), *world.root.glob("clips/*")):
        assert path.read_bytes() == (tmp_path / "world" / path.relative_to(world.root)).read_bytes(), path
