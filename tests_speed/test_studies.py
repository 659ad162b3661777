"""The comparison of methods runs at a very small size, and goes on from what is there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# From an untrained model in the place of a cold start, on a world of a dozen questions.
SMALL = """
import json, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
import methods
from veripo_trl.tiny import questions
from veripo_trl.tiny.world import make_world

for split in questions.SPLITS:
    questions.SIZES[split] = questions.SplitSize(clips=8, questions=12)
start = Path("outputs/methods_study/seed0/cold_start")
if not start.exists():
    shutil.copytree(make_world("outputs/tiny_world").model, start)
    (start / "results.json").write_text("{}")
sys.exit(methods.main())
"""
LINES = [
    "GRPO",
    "T-GRPO",
    "T-GRPO, random groups",
    "TW-GRPO",
    "TW-GRPO, permuted",
    "Reg-GRPO, rewards shuffled",
]


def small(program: str, folder: Path, file: str, *given: str) -> tuple[dict, str]:
    """(what a study wrote to `file`, what it said), from a program that makes it small."""
    found = subprocess.run(
        [sys.executable, "-c", program, str(ROOT / "evaluation" / "studies"), "--seeds", "0", "--json", file, *given],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    return json.loads((folder / file).read_text()), found.stdout


def study(folder: Path, *lines: str) -> tuple[dict, str]:
    options = ["--per_device_train_batch_size", "16", "--report_max_new_tokens", "8", "--logging_steps", "1"]
    return small(SMALL, folder, "methods.json", "--steps", "2", "--only", *lines, *options)


def test_methods(tmp_path):
    result, said = study(tmp_path, *LINES[:2])
    assert said.count("$ grpo_video.py") == 2
    result, said = study(tmp_path, *LINES)
    assert said.count("$ grpo_video.py") == len(LINES) - 2  # a finished run is not repeated
    assert [line["arm"] for line in result["lines"]] == LINES
    for line in result["lines"]:
        assert line["sampled"] is not None and line["seconds a step"] > 0 and line["peak MB"] > 100
    own = {line["arm"]: line["own"] for line in result["lines"]}
    assert {"token_weights/said", "token_weights/template"} <= set(own["TW-GRPO"])
    assert (
        "t_grpo/bonus_rate" in own["T-GRPO"]
    )  # an untrained model's rewards are alike: no regression
    assert [row["against"] for row in result["means"]][:2] == ["", "T-GRPO, bonus 0"]


# From an untrained model in the place of the base; its rollouts are replaced by thoughts of the world.
SMALL_PARTS = """
import shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
import numpy as np
import parts
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.tiny import relatives, steps
from veripo_trl.tiny.world import make_world

relatives.SIZES.update(train=24, rl=12, dev=6, heldout=6)
for name in ("sft", "grpo", "dpo"):
    parts.SETTINGS[name] |= {"max_steps": 2, "per_device_train_batch_size": 16}
    parts.SHARED["report_max_new_tokens"] = parts.SETTINGS["grpo"]["max_completion_length"] = 6
base = Path("outputs/parts_study/base")
if not base.exists():
    shutil.copytree(make_world(parts.WORLD, questions=["steps"]).model, base)
    (base / "results.json").write_text("{}")
run = parts.in_own_process

def with_thoughts(recipe, folder, *change, **options):
    if recipe == "verify_rollouts":
        store, rng = RolloutStore(options["rollouts"][0]), np.random.default_rng(0)
        rollouts = [row | {"finish_reason": "stop"} for row in store.read()]
        for row in rollouts:
            answer = row["solution"] if rng.random() < 0.7 else "0"
            said = answer if rng.random() < 0.7 else "4"
            row["completion"] = f"<think>{rng.integers(9)}.0 red. red, so {said}.</think><answer>{answer}</answer>"
        shutil.rmtree(store.folder)
        store.write(rollouts, step=0, part=0, rank=0, reward_names=list(rollouts[0]["rewards"]))
    return run(recipe, folder, *change, **options)

parts.in_own_process = with_thoughts
sys.exit(parts.main())
"""


def parts(folder: Path, *lines: str) -> tuple[dict, str]:
    return small(SMALL_PARTS, folder, "parts.json", "--lines", *lines)


def test_parts(tmp_path):
    _, said = parts(tmp_path, "cold start")
    assert said.count("$ sft_") == 1
    names = ["20% flipped", "direct, cold start", "two loops", "one loop, twice the steps"]
    result, said = parts(tmp_path, *names)
    assert [said.count(f"$ {name}_") for name in ("sft", "grpo", "verify", "dpo")] == [1, 3, 4, 4]
    assert [line["line"] for line in result["lines"]] == names
    assert [line["steps"] for line in result["lines"]] == [2] * 3 + [40]
    lines = {line["line"]: line for line in result["lines"]}
    assert all(line["CPU s"] > 0 for line in lines.values())
    assert lines["20% flipped"]["pairs"]["consistency"] > 0 == len(lines["direct, cold start"]["pairs"])
    assert lines["two loops"]["pairs"]["wronged"] == 0 < lines["20% flipped"]["pairs"]["wronged"] < 1
    assert [row["seeds"] for row in result["means"]] == [1] * 4
    left = [int(count) for count in re.findall(r"solved questions, (\d+) rows stay", said)]
    assert len(left) == 2 and left[1] == 4 >= left[0]  # of 2 steps of 2 questions; less what was solved
    assert len(re.findall(r"\$ verify_.*rollouts \S+ \S+rollouts ", said)) == 1


# Of one answered question: two thoughts that check again, one of which mends and one spoils; one that does not.
THOUGHTS = """
import asyncio, json, sys
sys.path.insert(0, sys.argv[1])
import controls, parts
from veripo_trl.verifier.pairs import RECHECK
row = {"problem_type": "numerical", "options": [], "solution": "2"}
said = [f"So 3.\\n{RECHECK}\\nSo 2.", f"So 2.\\n{RECHECK}\\nSo 1.", "3.0 red, so 2."]
answers = [{"row": 0, "completion": f"<think>{each}</think><answer>2</answer>"} for each in said]
items = [{"think": f"So {n % 3}.", "answer": "1", **row} for n in range(3000)]
def judged(judge):
    async def all_of_them():
        return [(await judge(item))["consistency"] for item in items]
    return asyncio.run(all_of_them())
judges = (controls._RULES, controls.flipped_20, controls.dealt_on)
print(json.dumps([parts.rechecks(answers, [row]), *map(judged, judges)]))
"""


def test_rechecks_and_faulty_judges():
    command = [sys.executable, "-c", THOUGHTS, str(ROOT / "evaluation" / "studies")]
    shares, right, wrong, dealt = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    assert shares == {
        "named": 1 / 3, "rechecked": 2 / 3, "first right": 0.5, "second right": 0.5, "mended": 1, "spoilt": 1,
    }  # fmt: skip
    assert right.count("consistent") == 1000 and right.count("inconsistent") == 2000
    assert 0.17 < sum(a != b for a, b in zip(right, wrong, strict=True)) / 3000 < 0.23
    assert dealt[1:] == right[:-1]
