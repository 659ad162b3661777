"""The evaluation's command of all controls on a small world: five runs, then the table; a minute.

python -m pytest tests_configs
"""

import json
import subprocess
import sys
from pathlib import Path

from veripo_trl.evaluate.compare import control_files
from veripo_trl.tiny.questions import SplitSize
from veripo_trl.tiny.world import make_world

SCRIPT = Path(__file__).resolve().parent.parent / "evaluation" / "evaluation_vllm.py"


def test_one_command_asks_all_and_goes_on(tmp_path):
    sizes = {split: SplitSize(clips=4, questions=6) for split in ("train", "rl", "dev", "heldout")}
    world, output = make_world(tmp_path / "world", sizes=sizes), tmp_path / "out.json"
    command = [
        sys.executable, str(SCRIPT), "--model_path", str(tmp_path / "world" / "model"),
        "--prompt_path", str(world.heldout),
        "--output_path", str(output), "--engine", "transformers", "--prompt_template", "tiny", "--max_new_tokens", "8",
        "--video_min_pixels", "3136", "--video_max_pixels", "3136", "--num_workers", "0", "--votes", "2", "--controls",
    ]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    files = [path for path, _ in control_files(output).values()]
    assert (
        len({json.dumps(json.loads(path.read_text())) for path in files}) == 5
    )  # no two were asked alike
    assert all(f"{name}: " in said for name in control_files(output))
    table = json.loads(output.with_suffix(".controls.json").read_text())["lines"]
    assert [line["questions"] for line in table] == [6] * 8 and table[0]["control"] == "thinking"
    settings = [
        json.loads(path.with_suffix(".record.json").read_text())["settings"] for path in files
    ]
    assert [(own.get("direct"), own.get("perturb"), own.get("votes")) for own in settings] == [
        (None, None, None), (True, None, None), (None, ["shuffle"], None), (None, ["no_video"], None), (None, None, 2),
    ]  # fmt: skip
    files[1].unlink()
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.count("going on, 6 of 6 rows are answered already") == 5 and files[1].exists()
