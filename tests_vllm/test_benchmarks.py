"""The rollout benchmark with vLLM beside the other two: same greedy answers, or it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent.parent / "speed" / "bench_rollout.py"


def test_rollout(tmp_path):
    file = tmp_path / "bench.json"
    arguments = ["--engine", "vllm", "--quick", "--clips", str(tmp_path / "clips"), "--json", str(file)]
    found = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    (line,) = json.loads(file.read_text())["table"]
    assert line["ok"] and line["vllm equal greedy"] == 1 and line["vllm s"] > 0
