"""The comparison of methods runs at a very small size, and goes on from what is there."""

import json
import os
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


def study(folder: Path, *lines: str) -> tuple[dict, str]:
    small = [
        "--per_device_train_batch_size",
        "16",
        "--report_max_new_tokens",
        "8",
        "--logging_steps",
        "1",
    ]
    given = ["--seeds", "0", "--steps", "2", "--json", "methods.json", "--only", *lines, *small]
    found = subprocess.run(
        [sys.executable, "-c", SMALL, str(ROOT / "evaluation" / "studies"), *given],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    return json.loads((folder / "methods.json").read_text()), found.stdout


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
