"""Make the offline world on first use and find it again later.

    python -m veripo_trl.tiny.world --root outputs/tiny_world --seed 0
    python -m veripo_trl.tiny.world --root outputs/tiny_when --questions when       # a relative's,
    see relatives.py
    python -m veripo_trl.tiny.world --root outputs/tiny_long --hold 32    # clips of 256 frames

    <root>/clips/*   train.jsonl  rl.jsonl  dev.jsonl  heldout.jsonl
    <root>/model/        untrained, with its processor
    <root>/world.json

The folder appears whole or not at all: everything is written beside it and renamed at the end,
under a file lock, so that several processes may ask for the same world at once. `world.json` holds
the settings it was made from.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from veripo_trl.errors import VeripoError
from veripo_trl.files.disk import read_json
from veripo_trl.tiny import relatives
from veripo_trl.tiny.clips import make_clip
from veripo_trl.tiny.questions import PLANTED_SHARE, SHARES, SIZES, SPLITS, SplitSize, make_split

VERSION = 2  # raise it when the same settings no longer give the same world


class WorldError(VeripoError):
    """The folder holds something other than the world asked for."""


@dataclasses.dataclass(frozen=True)
class World:
    """Where a world's parts are. Rows' video paths are relative to `root`, which is their
    `media_root`."""

    root: Path
    train: Path
    rl: Path
    dev: Path
    heldout: Path
    model: Path


def make_world(
    root: str | os.PathLike = "outputs/tiny_world",
    *,
    seed: int = 0,
    sizes: dict[str, SplitSize] | None = None,
    planted_share: float = PLANTED_SHARE,
    questions: list[str] | None = None,
    hold: int = 1,
) -> World:
    """Return the world at `root`, making it first if the folder is missing or empty.

    `questions`: families of `relatives.FAMILIES` instead of the world's own questions, without
    `planted_share`. `sizes` overrides splits by name (a number of questions each where `questions`
    is given). `hold`: each frame of a clip is shown so many times. Raises WorldError if the folder
    holds a world of other settings, a damaged one or something else: it is never deleted.
    """
    unknown = set(sizes or {}) - set(SPLITS)
    if unknown:
        raise ValueError(f"sizes: expected only {SPLITS}, got {sorted(unknown)} too")
    if strange := set(questions or []) - set(relatives.FAMILIES):
        raise WorldError(
            f"questions: expected some of {', '.join(relatives.FAMILIES)}; got {', '.join(strange)}."
        )
    root = Path(root).absolute()
    settings = {"version": VERSION, "seed": seed}
    if questions:
        settings |= {"questions": list(questions), "sizes": {**relatives.SIZES, **(sizes or {})}}
    else:
        settings |= {
            "sizes": {
                name: dataclasses.asdict({**SIZES, **(sizes or {})}[name]) for name in SPLITS
            },
            "shares": SHARES,
            "planted_share": planted_share,
        }
    if hold > 1:
        settings["hold"] = hold
    root.parent.mkdir(parents=True, exist_ok=True)
    with _lock(root.with_name(f".{root.name}.lock")):
        if not root.is_dir() or not any(root.iterdir()):
            _build(root, settings)
        return _open(root, settings)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    # The file stays: removing it would let two processes lock two files of the same name.
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _open(root: Path, settings: dict) -> World:
    remedy = f"choose another --root, or remove {root} so that it is made again"
    marker = root / "world.json"
    if not marker.is_file():
        raise WorldError(
            f"{root}: expected a tiny world or an empty folder, but there is no world.json: {remedy}"
        )
    found = read_json(marker, remedy=f"To go on, {remedy}.")
    if found != settings:
        differing = [
            f"{name} {found.get(name)} instead of {value}"
            for name, value in settings.items()
            if found.get(name) != value
        ]
        raise WorldError(
            f"{root}: this world was made with {'; '.join(differing) or 'further settings'}: {remedy}"
        )
    splits, model = [root / f"{split}.jsonl" for split in SPLITS], root / "model"
    for path in (*splits, model / "model.safetensors", root / "clips"):
        if not path.exists():
            raise WorldError(f"{path}: missing from the world at {root}: {remedy}")
    return World(root, *splits, model)


def _build(root: Path, settings: dict) -> None:
    for leftover in root.parent.glob(f".{root.name}.building-*"):
        shutil.rmtree(leftover)  # of a process that was killed: whoever builds holds the lock
    building = root.with_name(f".{root.name}.building-{os.getpid()}")
    building.mkdir()  # not mkdtemp, which makes it for the owner alone
    try:
        clips = {}
        for split in SPLITS:
            rows, needed = _split(split, settings)
            clips.update(needed)
            (building / f"{split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
            )
        (building / "clips").mkdir()
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # the encoder works outside Python's lock

            def make(item: tuple[str, tuple]) -> None:
                make_clip(building / item[0], *item[1], hold=settings.get("hold", 1))

            for _ in tqdm(
                pool.map(make, clips.items()), total=len(clips), desc="tiny world", unit="clip"
            ):
                pass
        from veripo_trl.tiny import model  # here: opening a world needs no torch

        words = {}
        if "questions" in settings:
            words["tokenizer"] = model.build_tokenizer(
                relatives.template_texts(settings["questions"]), relatives.TOKENS
            )
        model.save_tiny_model(building / "model", seed=settings["seed"], **words)
        (building / "world.json").write_text(
            json.dumps(settings, indent=2) + "\n", encoding="utf-8"
        )
        building.rename(root)  # onto nothing, or onto an empty folder
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _split(split: str, settings: dict) -> tuple:
    """(rows, media) of a split, by a world's settings."""
    seed, size = settings["seed"], settings["sizes"][split]
    if "questions" in settings:
        return relatives.make_split(split, questions=settings["questions"], seed=seed, size=size)
    planted_share = settings["planted_share"]
    return make_split(split, seed=seed, size=SplitSize(**size), planted_share=planted_share)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make the tiny offline world, or check that it is there."
    )
    parser.add_argument(
        "--root", default="outputs/tiny_world", help="folder (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--questions", nargs="+", choices=relatives.FAMILIES, help="default: the world's own"
    )
    parser.add_argument("--hold", type=int, default=1, help="how often each frame is shown")
    options = vars(parser.parse_args())
    print(make_world(options.pop("root"), **options).root)


if __name__ == "__main__":
    main()
