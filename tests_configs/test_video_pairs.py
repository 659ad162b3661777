"""The guide's loop with pairs from perturbed videos, run for one iteration on a small world; minutes.

python -m pytest tests_configs
"""

import json
import re
import runpy
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from veripo_trl.tiny.questions import SplitSize
from veripo_trl.tiny.world import make_world

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "recipes" / "configs" / "tiny"
SMALL = {
    "search": {"max_steps": 4, "per_device_train_batch_size": 64, "save_strategy": "no", "learning_rate": 1e-5,
               "model_name_or_path": "outputs/start", "report_before": False},
    "perturb": {},
    "verify": {},
    "align": {"per_device_train_batch_size": 4, "save_strategy": "no", "report_before": False},
}  # fmt: skip


@pytest.fixture
def workplace(tmp_path):
    """A working directory with a small world and a policy that knows it by half."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        sizes = {split: SplitSize(clips=12, questions=16) for split in ("train", "rl", "dev", "heldout")}
        make_world(tmp_path / "outputs" / "tiny_world", sizes=sizes, planted_share=0.4)
        changes = {"max_steps": 110, "stop_at_accuracy": None, "save_strategy": "no", "warmup_steps": 10,
                   "per_device_train_batch_size": 16, "output_dir": "outputs/start", "tiny_world": None}  # fmt: skip
        start = yaml.safe_load((CONFIGS / "sft.yaml").read_text()) | changes
        Path("sft.yaml").write_text(yaml.safe_dump(start))
        assert not runpy.run_path(str(ROOT / "recipes" / "sft_video.py"))["main"](["--config", "sft.yaml"])
        yield


def test_the_loop_of_the_guide(workplace):
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- video pairs -->\n```yaml\n(.+?)```", guide, re.S)[1]
    loop = yaml.safe_load((CONFIGS / "veripo.yaml").read_text()) | yaml.safe_load(shown)
    loop |= {"stages": [], "iterations": 1, "output_dir": "outputs/loop"}
    for stage in loop["iteration"]:
        training = {"tiny_world": None, "report_max_new_tokens": 12, "report_samples": 1}
        few = {} if stage["name"] in ("perturb", "verify") else training
        stage["overrides"] = stage.get("overrides", {}) | SMALL[stage["name"]] | few
    Path("loop.yaml").write_text(yaml.safe_dump(loop))
    runpy.run_path(str(ROOT / "recipes" / "veripo.py"))["main"](["--config", "loop.yaml"])

    stages = {entry["name"]: entry for entry in json.loads(Path("outputs/loop/run.json").read_text())["stages"]}
    assert {entry["status"] for entry in stages.values()} == {"done"}
    counts = stages["verify-1"]["results"]["counts"]
    asked = stages["perturb-1"]["results"]["counts"]["rollouts"]
    assert counts["perturbed"]["rollouts"] == asked > 0 and counts["rollouts"] == 4 * 64
    assert counts["perturbed"]["accuracy"] < 1 and counts["pairs"]["video"] > 0
    pairs = pq.read_table("outputs/loop/verify-1/pairs").to_pylist()
    video = [pair for pair in pairs if pair["kind"] == "video"]
    assert len(video) == counts["pairs"]["video"]
    assert all(pair["rejected_id"].startswith("perturb-1/") for pair in video)
    own = {}
    for row in map(json.loads, Path("outputs/tiny_world/rl.jsonl").read_text().splitlines()):
        own[row["question_id"]] = row["videos"]
    assert all(pair["videos"] == own[pair["question_id"]] for pair in video)
    assert stages["align-1"]["results"]["steps"] > 0
