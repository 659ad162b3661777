"""Each piece of work is done once: decoding, processor, vision tower, prefill, and the prompt in each scoring forward."""

import contextlib
import copy
import time
from collections import Counter

import pytest
from helpers import make_dpo_trainer, pair_dataset, video_rows
from helpers import make_grpo_trainer as make_trainer
from transformers import set_seed

from veripo_trl.media.video import VideoLoader
from veripo_trl.trainers.grpo import VideoGRPOTrainer

# 8 clips, 2 prompts × 2 completions in a generation batch, each batch yielded 2 × 2 times by the loader.
TWICE = {
    "per_device_train_batch_size": 2, "num_generations": 2, "steps_per_generation": 2, "num_iterations": 2,
    "gradient_accumulation_steps": 2, "max_steps": 8, "max_completion_length": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_checks_at_the_start(monkeypatch):
    """They encode and score the first rows once more."""
    monkeypatch.setattr("veripo_trl.trainers.base.VideoMixin._check_first_rows", lambda self: None)
    monkeypatch.setattr("veripo_trl.trainers.base.prefix_can_be_shared", lambda *args, **kwargs: True)


def towers(trainer) -> list:
    """The vision towers of the policy and, if it has a model of its own, of the reference."""
    models = [trainer.model, trainer.ref_model]
    models = [model.get_base_model() if hasattr(model, "get_base_model") else model for model in models if model]
    return [model.model for model in models]


@contextlib.contextmanager
def watch(trainer):
    """Lists that fill while it trains.

    clips: per model a Counter of the clips that its vision tower encoded, by the sum of their pixels. forwards: per
    forward over prompts (model's place, whether in the rollout, videos in its ids, rows).
    """
    seen = {"clips": [Counter(), Counter()], "forwards": []}
    rolling = []
    video_start = trainer.encoder.config.vision_start_token_id
    hooks = []
    for place, model in enumerate(towers(trainer)):

        def encoded(module, args, kwargs, place=place):
            grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
            pixels = args[0] if args else kwargs["hidden_states"]
            parts = pixels.split(grid.prod(dim=1).tolist())
            seen["clips"][place].update(round(part.double().sum().item(), 4) for part in parts)

        def forwarded(module, args, kwargs, place=place):
            ids = kwargs["input_ids"]
            if ids is not None and ids.size(1) > 1:
                seen["forwards"].append((place, bool(rolling), int((ids == video_start).sum()), len(ids)))

        hooks.append(model.visual.register_forward_pre_hook(encoded, with_kwargs=True))
        hooks.append(model.register_forward_pre_hook(forwarded, with_kwargs=True))
    generate = getattr(trainer, "_generate_single_turn", None)

    def generating(*args, **kwargs):
        rolling.append(True)
        result = generate(*args, **kwargs)
        rolling.pop()
        return result

    if generate is not None:
        trainer._generate_single_turn = generating
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("beta,workers", [(0.0, 0), (0.1, 2)])
def test_grpo_with_a_frozen_tower(beta, workers, load, media_root, tmp_path, counted):
    model, encoder = load()  # the vision tower is frozen
    trainer = make_trainer(
        model, encoder, video_rows(media_root, 8), tmp_path / "run", beta=beta, dataloader_num_workers=workers, **TWICE
    )
    before = len(counted())
    with watch(trainer) as seen:
        trainer.train()
    calls = counted()[before:]
    assert Counter(what for kind, what, _ in calls if kind == "decode") == {f"clip{n}.mp4": 1 for n in range(8)}
    assert sum(what for kind, what, _ in calls if kind == "process") == 8
    # Rollout, old log-probabilities, reference and both passes over the batch: one encoding.
    clips = seen["clips"][0] + seen["clips"][1]
    assert len(clips) == 8 and set(clips.values()) == {1}
    prefills = [videos for _, rolling, videos, _ in seen["forwards"] if rolling]
    assert sum(prefills) == 8
    scored = [(place, videos) for place, rolling, videos, _ in seen["forwards"] if not rolling]
    # A forward has one prompt of two completions. Policy: old log-probabilities, and two updates.
    assert Counter(scored) == ({(0, 1): 24, (1, 1): 8} if beta else {(0, 1): 24})


def test_a_group_larger_than_the_batch_is_prefilled_once(load, media_root, tmp_path):
    """One completion a forward: the rollout still takes whole groups."""
    model, encoder = load()
    settings = TWICE | {"per_device_train_batch_size": 1, "steps_per_generation": 4, "gradient_accumulation_steps": 4}
    trainer = make_trainer(model, encoder, video_rows(media_root, 8), tmp_path / "run", beta=0.0, **settings)
    with watch(trainer) as seen:
        trainer.train()
    assert [videos for _, rolling, videos, _ in seen["forwards"] if rolling] == [1] * 8
    assert set(seen["clips"][0].values()) == {1}


def test_grpo_with_a_trained_tower(load, media_root, tmp_path):
    """Then features are made anew in each forward, with the weights of the moment, once per group."""
    model, encoder = load()
    model.model.visual.requires_grad_(True)
    trainer = make_trainer(model, encoder, video_rows(media_root, 8), tmp_path / "run", beta=0.1, **TWICE)
    with watch(trainer) as seen:
        trainer.train()
    policy, reference = seen["clips"]
    assert len(policy) == len(reference) == 8
    assert set(policy.values()) == {4}  # rollout, old log-probabilities, and two updates
    assert set(reference.values()) == {1}


@pytest.mark.parametrize("adapter", [False, True])
def test_dpo(adapter, load, model_paths, media_root, tmp_path, counted):
    """Batches of four pairs, two pairs a question: policy and reference together."""
    from peft import LoraConfig

    from veripo_trl.model.policy import LANGUAGE_MODEL_LINEAR, load_policy

    model, encoder = load()  # the vision tower is frozen
    if adapter:
        lora = LoraConfig(r=4, target_modules=LANGUAGE_MODEL_LINEAR)
        model, _ = load_policy(str(model_paths["qwen2_5_vl"]), lora=lora)
    dataset = pair_dataset(video_rows(media_root, 4))
    trainer = make_dpo_trainer(
        model, encoder, dataset, tmp_path / "run", ref_model=None if adapter else copy.deepcopy(model), max_steps=4
    )
    batches = []
    collate = trainer.data_collator

    def collating(pairs):
        batches.append({pair["question_id"] for pair in pairs})
        return collate(pairs)

    trainer.data_collator = collating
    before = len(counted())
    with watch(trainer) as seen:
        trainer.train()
    unique = sum(map(len, batches))
    assert len(batches) == 4 and unique < 16  # there was something to share
    calls = counted()[before:]
    assert sum(kind == "decode" for kind, *_ in calls) == unique
    assert sum(what for kind, what, _ in calls if kind == "process") == unique
    assert (seen["clips"][0] + seen["clips"][1]).total() == unique
    videos = [videos for *_, videos, _ in seen["forwards"]]
    assert len(videos) == 2 * len(batches) and sum(videos) == 2 * unique  # a policy's and a reference's forward each


def test_the_second_epoch_decodes_nothing(load, media_root, tmp_path, counted):
    model, encoder = load(frame_cache=str(tmp_path / "frames"))
    trainer = make_trainer(
        model, encoder, video_rows(media_root, 8), tmp_path / "run", per_device_train_batch_size=4, num_generations=2,
        max_steps=8, max_completion_length=4, shuffle_dataset=True, dataloader_num_workers=1,
    )  # fmt: skip
    before = len(counted())
    trainer.train()
    assert trainer.state.epoch == 2
    asked = Counter(what for kind, what, _ in counted()[before:] if kind == "decode")
    assert asked == {f"clip{place}.mp4": 2 for place in range(8)}
    decoded = Counter(what for kind, what, _ in counted()[before:] if kind == "cache miss")
    assert decoded == {f"clip{place}.mp4": 1 for place in range(8)}


def test_a_slow_loader_is_hidden_behind_the_step(load, media_root, tmp_path, monkeypatch):
    """Loading takes 0.5 s a clip and a step 1 s more than it needs: only the first batch is waited for."""
    waits = []
    decode, get_batch = VideoLoader.load, VideoGRPOTrainer.get_batch_samples

    def slow(self, path, **kwargs):
        time.sleep(0.5)
        return decode(self, path, **kwargs)

    def timed(self, *args):
        started = time.perf_counter()
        batch = get_batch(self, *args)
        waits.append(time.perf_counter() - started)
        return batch

    monkeypatch.setattr(VideoLoader, "load", slow)
    monkeypatch.setattr(VideoGRPOTrainer, "get_batch_samples", timed)
    set_seed(0)
    model, encoder = load()
    trainer = make_trainer(
        model, encoder, video_rows(media_root, 8), tmp_path, per_device_train_batch_size=2, num_generations=2,
        max_steps=6, max_completion_length=4, dataloader_num_workers=2,
    )  # fmt: skip
    reward = trainer.reward_funcs[0]

    def slow_reward(**kwargs):
        time.sleep(1.0)
        return reward(**kwargs)

    trainer.reward_funcs = [slow_reward]
    trainer.train()
    assert trainer.seconds["load (in workers)"] >= 0.5 * 6
    assert trainer.seconds["wait for data"] == pytest.approx(sum(waits), rel=0.1)
    assert waits[0] > 0.5
    assert sorted(waits[1:])[2] < 0.2  # the median, with a busy machine in mind
