"""The rollout store: every training rollout of a run, as Parquet files that are whole or absent."""

import logging
import os
import re
from pathlib import Path

import pyarrow as pa

from veripo_trl.files.disk import read_parquet, write_parquet

logger = logging.getLogger(__name__)

SCHEMA_FIELDS = [
    ("rollout_id", pa.string()),
    ("question_id", pa.string()),
    ("problem", pa.string()),
    ("options", pa.list_(pa.string())),
    ("problem_type", pa.string()),
    ("solution", pa.string()),
    ("videos", pa.list_(pa.string())),
    ("images", pa.list_(pa.string())),
    ("data_source", pa.string()),
    ("step", pa.int64()),
    ("completion", pa.string()),
    ("completion_tokens", pa.int64()),
    ("finish_reason", pa.string()),
    ("advantage", pa.float64()),
    ("policy", pa.string()),
    ("prompt_template", pa.string()),
    ("seed", pa.int64()),
    ("shown", pa.struct([("kind", pa.string()), ("level", pa.float64())])),
]
FILE_NAME = re.compile(r"rollouts-step(\d+)-part(\d+)-rank(\d+)\.parquet")


class RolloutStore:
    """Writes and reads the rollouts of one run under `<run>/rollouts/`.

    A file holds what one process generated at one step: the row's fields, `rollout_id, step, completion,
    completion_tokens, finish_reason ("stop" or "length"), rewards (per function), advantage, policy, prompt_template
    (its hash), seed, shown` ({kind, level} of what a method showed in place of the row: a hint, noise; null for the row).
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def write(self, rollouts: list[dict], *, step: int, part: int, rank: int, reward_names: list[str]) -> Path:
        """Write one file atomically.

        Args:
            step: optimizer steps done when these were generated; part: micro-step within it, since one optimizer step
                may take several generations; rank: the process.
        """
        rewards = pa.struct([(name, pa.float64()) for name in reward_names])
        schema = pa.schema([*SCHEMA_FIELDS, ("rewards", rewards)])
        path = self.folder / f"rollouts-step{step:07d}-part{part:04d}-rank{rank:04d}.parquet"
        write_parquet(pa.Table.from_pylist(rollouts, schema=schema), path)
        return path

    def files(self) -> list[Path]:
        """The store's files in the order of steps and processes."""
        return sorted(path for path in self.folder.glob("*.parquet") if FILE_NAME.fullmatch(path.name))

    def read(self) -> list[dict]:
        """All rollouts, in the order of steps and processes."""
        return [row for path in self.files() for row in read_parquet(path).to_pylist()]

    def count(self) -> int:
        """The number of rollouts in the store."""
        return sum(len(read_parquet(path, ["rollout_id"])) for path in self.files())

    def set_aside_from(self, step: int) -> int:
        """Move the files of `step` and later out of the store, into `set_aside/`.

        A run that resumes from a checkpoint at `step` generates them again; kept apart, none is doubled and none lost.

        Returns:
            The number of files moved.
        """
        late = [path for path in self.files() if int(FILE_NAME.fullmatch(path.name)[1]) >= step]
        if not late:
            return 0
        number = 1
        while (target := self.folder / "set_aside" / f"{number:03d}").exists():
            number += 1
        target.mkdir(parents=True)
        for path in late:
            os.replace(path, target / path.name)
        logger.warning(
            "Set aside %d rollout files of step %d and later in %s: they were written after the checkpoint that this "
            "run resumes from.",
            len(late),
            step,
            target,
        )
        return len(late)
