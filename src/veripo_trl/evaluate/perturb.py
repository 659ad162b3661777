"""Questions asked about perturbed videos: as a control of an evaluation, and for what a policy says without having seen
what it is asked about, the rejected side of DPO's `video` pairs.

| perturbation | what is shown |
|---|---|
| shuffle | the frames in another order |
| drop | a quarter of the frames, chosen at random, each held until the next |
| another_clip | the videos of other questions |
| no_video | none |

Each is seeded by the question, and never leaves the video as it was, but for frames where there is only one; times and
number of frames stay.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np

from veripo_trl.answers.score import extract_answer, score_answer
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.data.schema import QUESTION, RowError
from veripo_trl.files.journal import Journal
from veripo_trl.media.video import Clip
from veripo_trl.model.encoding import Shown, shuffled_order
from veripo_trl.verifier.pairs import seeded_order


def shuffled(clip: Clip, seed: int) -> np.ndarray:
    return clip.frames[shuffled_order(len(clip.frames), seed)]


def dropped(clip: Clip, seed: int) -> np.ndarray:
    count = len(clip.frames)
    kept = np.sort(np.random.default_rng(seed).permutation(count)[: max(1, count // 4)])
    held = np.searchsorted(kept, np.arange(count), side="right") - 1
    return clip.frames[kept[held.clip(min=0)]]


FRAMES = {"shuffle": shuffled, "drop": dropped}
PERTURBATIONS = (*FRAMES, "another_clip", "no_video")


def perturb(questions: list[dict], kinds: list[str], *, seed: int) -> list[dict]:
    """Each question with a video once for every kind of `PERTURBATIONS`, as `read_questions` gives them; `perturbed` is
    the kind, `true` the row as it was.

    Raises:
        RowError: no question has a video, or no other file is there to show.
    """
    asked = [(question, kind) for question in questions if question["row"]["videos"] for kind in kinds]
    if not asked:
        raise RowError(f"perturb: expected questions about videos; none of the {len(questions)} has one.")
    files = {path: _file(path, question) for question in questions for path in question["row"]["videos"]}
    found = []
    for position, (question, kind) in enumerate(asked):
        row, number = question["row"], seeded_order(seed, kind, question["row"]["question_id"], question["key"])
        shown = {**row, "videos": []}
        if kind in FRAMES:
            shown = {**row, "shown": Shown(kind, 1.0, frames=partial(FRAMES[kind], seed=number))}
        elif kind == "another_clip":
            shown = {**row, "videos": _others(row["videos"], files, number)}
        key = f"{question['key']}-{kind}"
        found.append({**question, "position": position, "key": key, "row": shown, "true": row, "perturbed": kind})
    return found


def _file(path: str, question: dict) -> str:
    return path if "://" in path else os.path.realpath(Path(question["row"]["media_root"]) / path)


def _others(videos: list[str], files: dict[str, str], number: int) -> list[str]:
    """As many videos of other files, drawn by a number."""
    own = {files[path] for path in videos}
    others = sorted(path for path, file in files.items() if file not in own)
    if not others:
        raise RowError(f"another_clip: expected videos of other questions; all show {', '.join(videos)}.")
    return [others[(number + index) % len(others)] for index in range(len(videos))]


def write_rollouts(folder: Path, questions: list[dict], journal: Journal, *, policy: str, seed: int) -> int:
    """Write what was answered about perturbed videos as rollouts of the true rows, one file; how many there are."""
    rollouts, run = [], (folder.resolve().parent if folder.name == "rollouts" else folder).name
    for question in questions:
        line, row = journal.lines[question["key"]], question["true"]
        if "error" in line:
            continue
        said, task = extract_answer(line["model_output"]), {name: row[name] for name in ("problem_type", "options")}
        rollouts.append(
            {
                **{name: row[name] for name in ("question_id", *QUESTION, "data_source")},
                "rollout_id": f"{run}/{question['perturbed']}-{question['position']}",
                "step": 0,
                "completion": line["model_output"],
                **{name: line[name] for name in ("completion_tokens", "finish_reason", "prompt_template")},
                "rewards": {"accuracy_reward": score_answer(said, solution=row["solution"], **task)},
                "policy": policy,
                "seed": seed,
                "shown": {"kind": question["perturbed"], "level": 1.0},
            }
        )
    RolloutStore(folder).write(rollouts, step=0, part=0, rank=0, reward_names=["accuracy_reward"])
    return len(rollouts)
