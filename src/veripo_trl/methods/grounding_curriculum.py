"""A curriculum for temporal grounding: rows chosen by difficulty (Time-R1, arXiv 2503.13377, and its code), and frames
outside the span of hard ones hidden at first (after VideoTG-R1, arXiv 2510.23397).

A row's difficulty is told by p in [0, 1], the mean score (tIoU, for grounding) of its answers in evaluations of the rows
by the policy that is about to be trained: `difficulty_files` names what `evaluation/evaluation_vllm.py` wrote, one file
or several of different seeds.

- **Rows** (`row_choice`), of those with p > 0: `weighted`, Time-R1's first choice, draws `chosen_rows` with weights
  exp(−(p − 0.3)² / (2 · 0.2²)); `spaced`, its choice for every next epoch, sorts those with p ≤ 0.7 by p and takes
  evenly spaced ones. There as here each epoch is a run of its own, after an evaluation of the policy before; chosen rows
  are seeded by the run's seed.
- **Masking**, of rows of type temporal grounding with p < `mask_below`: at step s of S, with u = s / (`mask_until` · S),
  the share min(max(1 − u, 0), `mask_largest`) of the frames outside of the true spans is shown in the video's mean
  colour. Which ones is drawn by the question's id; a frame that has been shown stays shown. Frames in a span, times and
  the number of tokens are as they were. What is seen alone would be the answer: hence `mask_largest`, under 1.

Masking is **ours**: VideoTG-R1's paper and code could not be read; it is known to mask hard videos, less as steps go on.
Not here: its boundary check (rows whose query also fits times outside of the annotated span are dropped), which needs a
judge that sees the video; rows that are found otherwise are left out by `manifest`.

**Place** in the step: which rows, and how they look (4 in `trainers.grpo`). The share of a generation batch is told by
its place in the sampler's order alone, so that workers that load ahead and a resumed run see the same. Logged:
`curriculum/masked`, and `curriculum/reward_masked` beside `curriculum/reward_whole`: easier by what they hide, the
former say little of the policy. Never in evaluation; the verifier leaves masked rollouts out.

**Cost**: none, but for the evaluation.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from veripo_trl.answers.spans import Spans, true_spans
from veripo_trl.errors import ConfigError
from veripo_trl.evaluate.questions import read_predictions
from veripo_trl.evaluate.scores import our_score
from veripo_trl.media.video import Clip
from veripo_trl.methods import Method
from veripo_trl.model.encoding import Shown
from veripo_trl.options import option
from veripo_trl.trainers.grpo import total_rewards
from veripo_trl.trainers.loading import WithMarks
from veripo_trl.verifier.pairs import seeded_order

TYPE = "temporal grounding"


@dataclass
class GroundingCurriculumOptions:
    difficulty_files: list[str] | None = option("What an evaluation of the training rows wrote.")
    row_choice: str = option(
        "Rows to train on: all, weighted (Time-R1's first epoch), spaced (its others).", "all",
        choices=("all", "weighted", "spaced"),
    )  # fmt: skip
    chosen_rows: int = option("How many, where they are chosen.", 2500)
    mask_below: float = option("Rows of lower tIoU are masked; 0: none.", 0.3)
    mask_largest: float = option("Largest share of the frames outside that is hidden.", 0.75)
    mask_until: float = option("Share of the steps after which nothing is hidden.", 0.5)


def read_difficulty(files: list[str]) -> dict[str, float]:
    """{question_id: mean score of its answers} of evaluations' output files. A row that failed there has none."""
    scores = defaultdict(list)
    for prediction in (prediction for file in files for prediction in read_predictions(file)):
        if prediction["model_output"]:
            scores[str(prediction["question"].get("question_id"))].append(our_score(prediction))
    return {name: float(np.mean(own)) for name, own in scores.items()}


def weight(p: float, how: str) -> float:
    if how == "spaced":
        return float(0 < p <= 0.7)
    return math.exp(-((p - 0.3) ** 2) / (2 * 0.2**2)) if p > 0 else 0.0


def chosen(difficulty: list[float], count: int, *, how: str, seed: int) -> list[int]:
    """Indices, sorted, of the rows that are trained on."""
    weights = np.array([weight(p, how) for p in difficulty])
    fit = np.flatnonzero(weights)
    if not 0 < count <= len(fit):
        raise ConfigError(
            f"grounding_curriculum: chosen_rows: expected 1 to {len(fit)}, the rows that are fit for row_choice: {how} "
            f"(of {len(difficulty)}); got {count}."
        )
    if how == "weighted":
        shares, rng = weights / weights.sum(), np.random.default_rng(seed)
        return sorted(rng.choice(len(weights), count, replace=False, p=shares).tolist())
    order = sorted(fit.tolist(), key=lambda index: difficulty[index])
    return sorted(order[round(place)] for place in np.linspace(0, len(order) - 1, count))


def masked(clip: Clip, *, spans: Spans, share: float, seed: int) -> np.ndarray:
    times = np.array(clip.frames_indices) / clip.fps
    inside = np.any([(start <= times) & (times <= end) for start, end in spans], axis=0)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(~inside))
    frames = clip.frames.copy()
    frames[order[: int(share * len(order) + 1e-9)]] = clip.frames.mean((0, 1, 2)).round()
    return frames


class GroundingCurriculum(Method):
    """Chooses the rows of a run, and masks hard ones in training, see the top of this file."""

    NAME, OPTIONS = "grounding_curriculum", GroundingCurriculumOptions
    EXCLUDES = {"difficulty_augmentation": "each decides how a row is shown."}

    def __init__(self, *args, grounding_curriculum: GroundingCurriculumOptions, **kwargs):
        given, dataset = grounding_curriculum, kwargs["train_dataset"]
        fine = 0 <= given.mask_largest < 1 and 0 < given.mask_until <= 1
        if not (fine and given.difficulty_files):
            raise ConfigError(
                f"grounding_curriculum: expected difficulty_files, a mask_largest from 0 to under 1 and a mask_until "
                f"over 0 to 1; got {given}."
            )
        found, names = read_difficulty(given.difficulty_files), list(dataset["question_id"])
        if unknown := [name for name in names if name not in found]:
            raise ConfigError(
                f"difficulty_files: {len(unknown)} of {len(names)} training rows are not answered in them "
                f"({unknown[0]!r} first). Evaluate the rows that are trained on; the same command asks failed ones again."
            )
        difficulty = [found[name] for name in names]
        if (how := given.row_choice) != "all":
            rows = chosen(difficulty, given.chosen_rows, how=how, seed=kwargs["args"].seed)
            kwargs["train_dataset"] = dataset.select(rows)
            difficulty = [difficulty[row] for row in rows]
        self._curriculum, self._difficulty = given, difficulty
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, dataset=None):
        sampler, given = super()._get_train_sampler(dataset), self._curriculum
        per_step = self.args.generation_batch_size * self.args.gradient_accumulation_steps
        epochs = self.args.num_train_epochs
        if self.args.max_steps > 0:
            epochs = self.args.max_steps / max(1, math.ceil(len(sampler) / per_step))

        def marks(index: int, marks: dict) -> dict:
            share = min(1 - marks["epochs"] / (given.mask_until * epochs), given.mask_largest)
            row = self.train_dataset[index]
            fit = row["problem_type"] == TYPE and self._difficulty[index] < given.mask_below
            if share <= 0 or not fit:
                return {}
            spans = true_spans(row["solution"]).spans
            seed = seeded_order(self.args.seed, "mask", row["question_id"])
            hide = partial(masked, spans=spans, share=share, seed=seed)
            return {"shown": Shown("mask", share, frames=hide)}

        return WithMarks(sampler, marks)

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            hidden = torch.tensor(
                ["shown" in row for row in inputs], device=self.accelerator.device
            )
            hidden, metrics = self.accelerator.gather(hidden), self._metrics["train"]
            totals = total_rewards(self._scored["rewards"], self.reward_weights)
            metrics["curriculum/masked"].append(hidden.float().mean().item())
            for name, which in (("masked", hidden), ("whole", ~hidden)):
                if which.any():
                    metrics[f"curriculum/reward_{name}"].append(totals[which].nanmean().item())
        return output
