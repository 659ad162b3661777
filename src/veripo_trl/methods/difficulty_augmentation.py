"""Difficulty-aware augmentation: at its next visit a hard question comes with a hint, an easy one with noise on its
frames (DeepVideo-R1, arXiv 2506.07464; its code could not be read, so that what the paper leaves open is ours).

With R̄ the mean reward of a question's group, however it was shown, and the reference the mean R̄ of the last W questions
before its batch:

    Δ = reference − R̄        level = min(|Δ| / scale, 1)        Δ > 0: hard        Δ < 0: easy

- **hard**: the first ⌈level · share · n⌉ of the n sentences of the row's own thinking (`process`) are written behind the
  question, as "Hint: …", without those that may give the answer away (`verifier.conclusions.may_tell`: for choices,
  numbers and OCR; of other types nothing is told). The paper's hints are parts of traces that the policy samples when it
  is given the answer; it takes the one of the highest reward.
- **easy**: N(0, (level · std)²) on every value (0 to 255) of the frames of its videos, before the processor.

A row without thinking has no hint, one without a video no noise, and until W questions have been seen nobody has either.
Ours: W, scale, share, std, and that it is the next visit, which is in another epoch: in a run that sees each question
once this method does nothing. Whether the paper augments at once is not said; that would be a rollout more.

**Place** in the step: which rows, and how they look (4 in `trainers.grpo`). Levels travel with the sampler's index. Those
of an epoch are all made in the epochs before, so that neither workers that load ahead nor a resumed run see others. The
update sees what the rollout saw; the rollout store has kind and level (`shown`), and the verifier leaves such rollouts
out, since they do not answer the row itself. Never in evaluation.

**Cost**: none for hints; of noise a draw for each value of the frames. Published: W 100, in one of two places.
"""

import math
import re
from collections import deque
from dataclasses import dataclass
from functools import partial

import numpy as np
from accelerate.utils import gather_object

from veripo_trl.errors import ConfigError, VeripoError
from veripo_trl.media.video import Clip
from veripo_trl.methods import Method
from veripo_trl.model.encoding import Shown
from veripo_trl.options import option
from veripo_trl.trainers.grpo import total_rewards
from veripo_trl.trainers.loading import WithMarks
from veripo_trl.verifier.conclusions import may_tell, sentences
from veripo_trl.verifier.pairs import seeded_order


@dataclass
class DifficultyAugmentationOptions:
    difficulty_window: int = option("Questions whose mean reward is the reference.", 100)
    difficulty_scale: float = option(
        "How far from it, in reward, a question has the strongest hint or noise.", 0.5
    )
    hint_share: float = option(
        "Strongest hint, as a share of a thinking's sentences; 0: none.", 0.5
    )
    noise_std: float = option(
        "Strongest noise, as a standard deviation of values from 0 to 255; 0: none.", 32.0
    )


def signed_level(mean: float, window: deque, scale: float) -> float:
    """The level of a question with this mean reward, below 0 for noise; 0 while the window is not full."""
    if len(window) < window.maxlen or math.isnan(mean):
        return 0.0
    return max(-1.0, min(1.0, (math.fsum(window) / len(window) - mean) / scale))


def hint(row: dict, level: float, share: float) -> str:
    """What a hint of this level says, "" for nothing."""
    thinking = re.sub(r"<[^<>]*>", " ", (row["process"] or "").partition("<answer>")[0])
    told = sentences(thinking)
    count = math.ceil(level * share * len(told) - 1e-9)
    task = {key: row[key] for key in ("problem_type", "solution", "options")}
    return " ".join(sentence for sentence in told[:count] if not may_tell(sentence, **task))


def noisy(clip: Clip, std: float, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(clip.frames.shape, np.float32)
    return (clip.frames + std * noise).round().clip(0, 255).astype(np.uint8)


def augmented(
    row: dict, level: float, options: DifficultyAugmentationOptions, seed: int
) -> Shown | None:
    """How a row is shown at a signed level, None for as it is."""
    if level > 0 and (text := hint(row, level, options.hint_share)):
        return Shown("hint", level, problem=f"{row['problem']}\nHint: {text}")
    if level < 0 and row["videos"] and options.noise_std:
        std = -level * options.noise_std
        return Shown("noise", -level, frames=partial(noisy, std=std, seed=seed))
    return None


class DifficultyAugmentation(Method):
    """Measures questions in training, and augments them from the next epoch on, see the top of this file."""

    NAME, OPTIONS = "difficulty_augmentation", DifficultyAugmentationOptions

    def __init__(self, *args, difficulty_augmentation: DifficultyAugmentationOptions, **kwargs):
        given = difficulty_augmentation
        fine = given.difficulty_window >= 1 and given.difficulty_scale > 0
        if not (fine and 0 <= given.hint_share <= 1 and 0 <= given.noise_std < math.inf):
            raise ConfigError(
                f"difficulty_augmentation: expected a window of 1 or more, a scale above 0, a hint_share from 0 to 1 and "
                f"a noise_std of 0 or more; got {given}."
            )
        self._augmentation = given
        self._window: deque[float] = deque(maxlen=given.difficulty_window)
        # Signed levels by question: of the epoch that is drawn, and measured in it, for the next.
        self._level_epoch, self._levels, self._measured = 0, {}, {}
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, dataset=None):
        questions = list(self.train_dataset["question_id"])

        def marks(index: int, marks: dict) -> dict:
            if marks["epoch"] > self._level_epoch:
                self._level_epoch, self._levels = marks["epoch"], self._levels | self._measured
                self._measured = {}
            if not (level := self._levels.get(questions[index], 0.0)):
                return {}
            seed = seeded_order(self.args.seed, "noise", str(marks["epoch"]), questions[index])
            shown = augmented(self.train_dataset[index], level, self._augmentation, seed)
            return {"shown": shown} if shown else {}

        return WithMarks(super()._get_train_sampler(dataset), marks)

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            rows = [
                (row["question_id"], row["shown"].kind if "shown" in row else None)
                for row in inputs
            ]
            self._measure(gather_object(rows)[:: self.num_generations])
        return output

    def _measure(self, questions: list[tuple[str, str | None]]) -> None:
        """Of the groups of all processes' generation batch, in order: question, and as what it was shown."""
        totals = total_rewards(self._scored["rewards"], self.reward_weights)
        means = totals.view(-1, self.num_generations).nanmean(1).tolist()
        for (question, _), mean in zip(questions, means, strict=True):
            level = signed_level(mean, self._window, self._augmentation.difficulty_scale)
            self._measured[question] = level
        self._window.extend(mean for mean in means if not math.isnan(mean))
        for kind in ("hint", "noise"):
            share = sum(shown == kind for _, shown in questions) / len(questions)
            self._metrics["train"][f"augmentation/{kind}"].append(share)

    def _save_rng_state(self, output_dir: str) -> None:
        levels = {"epoch": self._level_epoch, "levels": self._levels, "measured": self._measured}
        self.state.stateful_callbacks[self.NAME] = {**levels, "window": list(self._window)}
        super()._save_rng_state(output_dir)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        if (saved := self.state.stateful_callbacks.get(self.NAME)) is None:
            raise VeripoError(
                "difficulty_augmentation: the checkpoint is of a run without it. Start anew."
            )
        self._level_epoch, self._levels, self._measured = (
            saved[name] for name in ("epoch", "levels", "measured")
        )
        self._window.extend(saved["window"])
