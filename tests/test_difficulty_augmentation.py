"""Difficulty-aware augmentation: levels and hints by the worked numbers, and what the next visit is shown."""

from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
from helpers import StoppedError, make_grpo_trainer, state, stop_at, video_rows
from transformers import set_seed

from conftest import make_row
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.errors import ConfigError, VeripoError
from veripo_trl.media.video import Clip
from veripo_trl.methods import with_methods
from veripo_trl.methods.difficulty_augmentation import (
    DifficultyAugmentationOptions,
    augmented,
    hint,
    noisy,
    signed_level,
)
from veripo_trl.trainers.grpo import VideoGRPOTrainer
from veripo_trl.verifier.conclusions import may_tell
from veripo_trl.verifier.files import read_rollouts
from veripo_trl.verifier.pairs import seeded_order


@pytest.mark.parametrize(
    ("mean", "seen", "level"),
    [
        (0.25, 100, 0.7),  # hard
        (0.9, 100, -0.6),  # easy
        (0.6, 100, 0.0),
        (0.25, 99, 0.0),  # not yet
        (-1.0, 100, 1.0),
        (1.4, 100, -1.0),
        (float("nan"), 100, 0.0),  # nobody could be scored
    ],
)
def test_levels(mean, seen, level):
    window = deque([0.2, 1.0] * (seen // 2) + [0.6] * (seen % 2), maxlen=100)
    assert signed_level(mean, window, 0.5) == pytest.approx(level)


def test_noise_has_the_spread_of_its_level_and_is_the_same_again():
    grey = Clip(np.full((4, 64, 64, 3), 128, np.uint8), 2.0, 4, [0, 1, 2, 3], "made up")
    row = make_row("q", "", videos=["a.mp4"])
    shown = augmented(row, -0.6, DifficultyAugmentationOptions(), 7)
    assert (shown.kind, shown.level, shown.problem) == ("noise", 0.6, None)
    frames = shown.frames(grey)
    assert (frames.dtype, frames.shape) == (np.uint8, grey.frames.shape)
    assert frames.std() == pytest.approx(19.2, rel=0.02) and frames.mean() == pytest.approx(128, abs=0.5)
    assert np.array_equal(frames, noisy(grey, 19.2, 7)) and not np.array_equal(frames, noisy(grey, 19.2, 8))
    assert (grey.frames == 128).all()  # another method may still need it
    assert augmented({**row, "videos": []}, -0.6, DifficultyAugmentationOptions(), 7) is None
    assert augmented(row, -0.6, DifficultyAugmentationOptions(noise_std=0.0), 7) is None


FIVE = "The camera turns. Someone comes in. It gets dark. A dog barks. The door shuts."


@pytest.mark.parametrize(
    ("process", "level", "expected"),
    [
        (FIVE, 0.7, "The camera turns. Someone comes in."),  # ⌈1.75⌉
        (FIVE, 0.8, "The camera turns. Someone comes in."),  # 2 of 2.0
        (FIVE, 1.0, "The camera turns. Someone comes in. It gets dark."),  # ⌈2.5⌉
        (FIVE, 0.01, "The camera turns."),
        ("The camera turns. It is blue. It gets dark. A dog barks.", 1.0, "The camera turns."),  # one tells
        ("So B. It is blue. The door shuts.", 1.0, ""),
        ("<planning>Look for the door.</planning> <b>Then wait.</b>", 1.0, "Look for the door."),
        ("<think>Look. Wait. Then.</think><answer>B</answer>", 0.6, "Look."),  # 1 of 0.9
        (None, 1.0, ""),
    ],
)
def test_hints(process, level, expected):
    row = make_row("q", "", process=process)
    assert hint(row, level, 0.5) == expected
    shown = augmented(row, level, DifficultyAugmentationOptions(), 0)
    if not expected:
        assert shown is None
    else:
        assert (shown.kind, shown.level, shown.frames) == ("hint", level, None)
        assert shown.problem == f"Which colour is first?\nHint: {expected}"
    assert augmented(row, level, DifficultyAugmentationOptions(hint_share=0.0), 0) is None


OPTIONS = ["A. opening the old window", "B. blue", "C. neither", "D. red"]


@pytest.mark.parametrize(
    ("kind", "solution", "sentence", "tells"),
    [
        ("multiple choice", "B", "It is Blue.", True),
        ("multiple choice", "B", "So (b) fits.", True),
        ("multiple choice", "B", "Option B is left.", True),
        ("multiple choice", "B", "It cannot be red.", False),
        ("multiple choice", "B", "Rule out B.", True),  # rather too often
        ("multiple choice", "A", "A man walks.", False),
        ("multiple choice", "A", "He opens an old, dirty window.", True),
        ("multiple choice", "A", "He opens a door.", False),
        ("multiple choice", "A,D", "One is red.", True),
        ("multiple choice", "B", "D. blue seems wrong.", True),
        ("grounded choice", "B; 5 to 11", "The blue one moves.", True),
        ("grounded choice", "B; 5 to 11", "It begins after four seconds.", True),
        ("grounded choice", "B; 5 to 11", "He looks around.", False),
        ("numerical", "3", "Three dogs run.", True),
        ("numerical", "3", "There are 4, no, fewer.", True),
        ("numerical", "3", "Dogs run on the grass.", False),
        ("regression", "0.5", "It is half full.", True),
        ("temporal grounding", "5 to 11", "At 0:05 he comes.", True),
        ("temporal grounding", "5 to 11", "He comes, then leaves.", False),
        ("box grounding", "[1, 2, 3, 4]", "It is on the left.", False),
        ("OCR", "Stop here", "The sign says STOP.", True),
        ("OCR", "Stop here", "The sign is red.", False),
        ("yes/no", "yes", "The ball is red.", True),
        ("free-form", "a cat sleeps", "The sun shines.", True),
        ("math", "x^2", "Factor it.", True),
    ],
)
def test_what_may_give_the_answer_away(kind, solution, sentence, tells):
    assert may_tell(sentence, problem_type=kind, solution=solution, options=OPTIONS) is tells


# With a window of two, and two questions a batch, those of the second batch are the first that are measured.
REWARDS = {"row0": 0.5, "row1": 0.5, "row2": 1.0, "row3": 0.3}


SAID = []  # prompts that rewards were given


def by_question(prompts, question_id, **kwargs):
    SAID.extend((name, prompt[0]["content"][-1]["text"]) for name, prompt in zip(question_id, prompts, strict=True))
    return [REWARDS[name] + 0.01 * (place % 2) for place, name in enumerate(question_id)]


@pytest.fixture
def rows(media_root):
    return [{**row, "process": f"Look at {row['question_id']} closely. Wait. So it is blue."}
            for row in video_rows(media_root, 4)]  # fmt: skip


SETTINGS = {
    "num_generations": 2, "per_device_train_batch_size": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 1,
    "max_completion_length": 4,
}  # fmt: skip
GIVEN = DifficultyAugmentationOptions(difficulty_window=2)


@pytest.fixture
def seen(monkeypatch):
    """The prompts of each chunk that was sampled from, and of each that was updated."""
    from veripo_trl.trainers import grpo

    chunks, updated, sample = [], [], grpo.sample_completions
    score = VideoGRPOTrainer._get_per_token_logps_and_entropies

    def sampling(model, prompts, **kwargs):
        chunks.append(prompts)
        return sample(model, prompts, **kwargs)

    def scoring(self, *args, **kwargs):
        updated.append(list(self._active))
        return score(self, *args, **kwargs)

    monkeypatch.setattr(grpo, "sample_completions", sampling)
    monkeypatch.setattr(grpo, "drop_pixels", lambda *args: None)  # they are looked at afterwards
    monkeypatch.setattr(VideoGRPOTrainer, "_get_per_token_logps_and_entropies", scoring)
    return chunks, updated


def make_trainer(load, rows, folder, *, methods=("difficulty_augmentation",), given=(GIVEN,), **changes):
    model, encoder = load()
    make = with_methods(VideoGRPOTrainer, list(methods), list(given))
    options = {**SETTINGS, **changes}
    trainer = make_grpo_trainer(model, encoder, rows, folder, make=make, reward=by_question, **options)
    trainer.rollout_store = RolloutStore(folder / "rollouts")
    set_seed(0)
    return trainer


def test_the_next_visit_is_augmented_and_the_first_is_plain_grpos(load, rows, tmp_path, seen):
    chunks, updated = seen
    runs = {}
    for name in ("plain", "augmented"):
        names = ("difficulty_augmentation",) if name == "augmented" else ()
        trainer = make_trainer(
            load, rows, tmp_path / name, methods=names, given=(GIVEN,) * len(names), max_steps=4 + 4 * len(names),
            logging_steps=1,
        )
        chunks.clear(), updated.clear(), SAID.clear()
        trainer.train()
        runs[name] = trainer.rollout_store.read()
        if names:
            sampled = {}
            for chunk in chunks:
                sampled.setdefault(chunk[0].question_id, []).append(chunk[0])
    first = [row for row in runs["augmented"] if row["step"] < 4]
    assert [(row["rollout_id"].split("/")[1], row["completion"], row["advantage"]) for row in first] == [
        (row["rollout_id"].split("/")[1], row["completion"], row["advantage"]) for row in runs["plain"]
    ]
    # Epoch 1 measured row2 and row3 against row0's and row1's .505: .5 over it, and .2 under it, by a scale of .5.
    shown = {row["question_id"]: row["shown"] for row in runs["augmented"] if row["step"] >= 4}
    assert all(row["shown"] is None for row in first) and shown["row0"] is None and shown["row1"] is None
    assert (shown["row2"]["kind"], shown["row3"]["kind"]) == ("noise", "hint")
    assert (shown["row2"]["level"], shown["row3"]["level"]) == pytest.approx((1.0, 0.4))
    assert {row["problem"] for row in runs["augmented"]} == {"Which colour is first?"}  # as rewards see it

    encode = trainer.encoder.encode
    (plain, noised), (unhinted, hinted) = sampled["row2"], sampled["row3"]
    assert torch.equal(plain.pixel_values_videos, encode(rows[2]).pixel_values_videos)
    seed = seeded_order(trainer.args.seed, "noise", "1", "row2")
    expected = augmented(rows[2], -1.0, GIVEN, seed)
    assert torch.equal(noised.pixel_values_videos, encode({**rows[2], "shown": expected}).pixel_values_videos)
    assert not torch.equal(noised.pixel_values_videos, plain.pixel_values_videos)
    assert np.array_equal(noised.input_ids, plain.input_ids)
    text = partial(trainer.processing_class.tokenizer.decode, skip_special_tokens=True)
    assert "Hint: Look at row3 closely." in text(hinted.input_ids) and "blue." not in text(hinted.input_ids)
    assert "Hint" not in text(unhinted.input_ids)
    assert torch.equal(hinted.pixel_values_videos, unhinted.pixel_values_videos)
    told = ["Hint: Look at row3 closely." in prompt for name, prompt in SAID if name == "row3"]
    assert told == [False, False, True, True]
    # the update has the very prompts that were sampled from
    assert {id(prompt) for chunk in updated for prompt in chunk} == {id(p) for own in sampled.values() for p in own}
    logged = {key: [entry[key] for entry in trainer.state.log_history if key in entry]
              for key in ("augmentation/hint", "augmentation/noise")}  # fmt: skip
    assert logged == {"augmentation/hint": [0, 0, 0, 0.5], "augmentation/noise": [0, 0, 0, 0.5]}

    # Rollouts that saw something else than their row say nothing of it: pairs and solved questions are without them.
    assert len(read_rollouts(trainer.rollout_store.files())) == len(runs["augmented"]) - 4

    chunks.clear()
    trainer.evaluate(eval_dataset=trainer.train_dataset)
    prompts = {prompt.question_id: prompt for chunk in chunks for prompt in chunk}
    assert torch.equal(prompts["row2"].pixel_values_videos, plain.pixel_values_videos)
    assert np.array_equal(prompts["row3"].input_ids, unhinted.input_ids)


def test_levels_of_what_an_epoch_leaves_out_or_cannot_score(load, rows, tmp_path):
    trainer = make_trainer(load, rows, tmp_path)
    added = trainer._get_train_sampler().added
    trainer._levels, trainer._measured = {"row0": -0.5, "row1": -0.5}, {"row1": 0.0, "row2": -1.0}

    def levels(epoch) -> list:
        shown = [added(index, {"epoch": epoch}).get("shown") for index in range(4)]
        return [each and each.level for each in shown]

    assert levels(0) == [0.5, 0.5, None, None]
    assert levels(1) == [0.5, None, 1.0, None] and trainer._measured == {}

    # of a group, what could be scored
    nan = float("nan")
    trainer._window.extend([0.5, 0.5])
    trainer._scored = {"rewards": torch.tensor([[0.75], [nan], [nan], [nan]])}
    trainer._measure([("row0", None), ("row1", None)])
    assert trainer._measured == {"row0": -0.5, "row1": 0.0} and list(trainer._window) == [0.5, 0.75]


def test_resume_and_workers_show_the_same(load, rows, tmp_path, seen):
    """In the second epoch, amid a generation batch, and with workers in the loader, a run goes on as if unbroken."""
    chunks, _ = seen
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, "shuffle_dataset": True, "seed": 3}

    def run(folder, *, workers=0, stop=None, resume=None):
        chunks.clear()
        trainer = make_trainer(load, rows, folder, dataloader_num_workers=workers, **options)
        stop_at(trainer, stop)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return trainer, [(p.question_id, p.input_ids.tolist(), p.pixel_values_videos) for c in chunks for p in c[:1]]

    whole, prompts = run(tmp_path / "whole" / "run")
    with pytest.raises(StoppedError):
        run(tmp_path / "broken" / "run", workers=1, stop=6)
    resumed, again = run(tmp_path / "broken" / "run", workers=1, resume=tmp_path / "broken" / "run" / "checkpoint-5")
    assert len(again) == 2 and all(
        one[:2] == other[:2] and torch.equal(one[2], other[2])
        for one, other in zip(again, prompts[-len(again) :], strict=True)
    )
    stored, expected = resumed.rollout_store.read(), whole.rollout_store.read()
    assert len({str(row["shown"]) for row in expected if row["step"] >= 4}) >= 2
    for key in ("rollout_id", "completion", "shown", "rewards", "advantage"):
        assert [row[key] for row in stored] == [row[key] for row in expected], key
    weights = state(whole.model)
    assert all(torch.equal(value, weights[name]) for name, value in state(resumed.model).items())
    assert (resumed._window, resumed._measured) == (whole._window, whole._measured)  # of the third epoch's levels

    plain = make_trainer(load, rows, tmp_path / "plain" / "run", methods=(), given=(), **{**options, "max_steps": 1})
    plain.train()
    with pytest.raises(VeripoError, match="of a run without it"):
        make_trainer(load, rows, tmp_path / "plain" / "run", **options).train(
            resume_from_checkpoint=str(tmp_path / "plain" / "run" / "checkpoint-1")
        )


@pytest.mark.parametrize(
    "options", [{"difficulty_window": 0}, {"difficulty_scale": 0.0}, {"hint_share": 1.5}, {"noise_std": -1.0}]
)
def test_what_makes_no_sense_is_refused(options, load, rows, tmp_path):
    with pytest.raises(ConfigError, match="difficulty_augmentation: expected a window of 1 or more"):
        make_trainer(load, rows, tmp_path, given=(DifficultyAugmentationOptions(**options),))
