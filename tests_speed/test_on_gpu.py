"""speed/on_gpu.py on a CPU, at tiny size: every stage; killed and continued; what fails is a line of the table."""

import importlib
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "speed"
sys.path.insert(0, str(BENCHMARKS))

import gpu_cases  # noqa: E402
import gpu_hardware  # noqa: E402
import gpu_parity  # noqa: E402
import gpu_runs  # noqa: E402
import gpu_update  # noqa: E402
import on_gpu  # noqa: E402
import update_step as part  # noqa: E402
from models import random_model  # noqa: E402

from veripo_trl.errors import VeripoError  # noqa: E402

NUMBERS = {  # what a stage's first case must say; parity runs below, by the command
    "update": {"ratio", "limit", "memory", "plain", "tokens a s", "share of peak", "log_probs", "rounding, mean"},
    "dpo": {"ratio", "limit", "gradients"},
    "rollout": {"tower s", "prefill s", "tokens a s"},
    "step": {"generate s", "update s", "whole s", "clips a s", "loading on one core s", "waits"},
    "loading": {"decord, 1 threads, frames a s"},
    "hardware": {"prompt tokens", "generate s", "update s"},
    "frames": set(),
    "sizes": {"ratio", "limit"},
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_runs, "SCRATCH", tmp_path / "scratch")
    yield
    gpu_update.release()


def perform(tmp_path, stage, cases, **options) -> dict:
    file = tmp_path / "results.json"
    on_gpu.perform(stage, cases, file, **{"device": "cpu", "until": math.inf, **options})
    return on_gpu.read(file)["stages"].get(stage, {})


@pytest.mark.parametrize("stage", NUMBERS)
def test_every_stage_runs(stage, tmp_path):
    cases = [case for case in on_gpu.plan("cpu", "tiny")[stage] if case.name != "tiny loop"]
    records = perform(tmp_path, stage, cases)
    assert list(records) == [case.name for case in cases]
    for name, record in records.items():
        needs_cuda = record.get("message") == "needs cuda"
        assert record["state"] == ("skipped" if needs_cuda else "done"), (name, record)
    assert NUMBERS[stage] <= records[cases[0].name].keys()
    assert ("parity", *NUMBERS) == on_gpu.STAGES


def test_half_an_hour_reaches_every_stage_of_a_shape():
    """Three calls of the default, by the estimates: in order, what is left of the minutes for each, without vLLM."""
    todo = [(stage, [*on_gpu.plan("cuda", shape)[stage]]) for stage, shape in on_gpu.in_order(["3b", "7b"])]
    for _ in range(3):
        left = 9 * 60
        for _, cases in todo:
            if any(case.seconds <= left - on_gpu.START_S for case in cases):
                left -= on_gpu.START_S
                for case in list(cases):
                    if case.seconds <= left:
                        cases.remove(case)
                        left -= 0 if "vllm" in case.needs else case.seconds
    first = dict(todo[: len(on_gpu.STAGES) - 1])  # of the first shape, all but `sizes`
    assert [case.name for cases in first.values() for case in cases] == ["3b, 80 GiB, plain"]


def test_every_configuration_for_gpus_takes_its_step():
    """Those that a training recipe is launched with on a GPU; of VerIPO's relatives, which differ in rewards and numbers,
    one system's."""
    folder = BENCHMARKS.parent / "recipes" / "configs"
    training = re.compile(r"^# Launch: .*--config_file \S+ recipes/(sft|grpo|dpo)_video.py --config (\S+)", re.M)
    found = {match[2] for file in folder.rglob("*.yaml") if (match := training.search(file.read_text()))}
    relatives = {name for name in found if (folder / name).with_name("README.md").is_file()}
    assert found - relatives == {name for name in gpu_cases.CONFIGS if not name.startswith("video_r1/")}
    assert set(gpu_cases.CONFIGS) & relatives == {"video_r1/sft.yaml", "video_r1/grpo.yaml"}


@pytest.mark.slow
def test_the_loop_runs(tmp_path):
    assert set(gpu_runs.loop("cpu", quick=True)) == {f"{name} minutes" for name in ("cold-start", "search-1", "verify-1")}


def test_the_loops_quality_is_compared_with_the_cpus():
    def stage(low, high):
        sampled = {"accuracy": (low + high) / 2, "accuracy_low": low, "accuracy_high": high}
        sampled |= {"inconsistency": 0.03, "inconsistency_low": 0.02, "inconsistency_high": 0.04}
        return [{"name": "align-1", "results": {"after": {"sampled": sampled}}}, {"name": "verify-1", "results": {}}]

    assert gpu_runs.quality(stage(0.70, 0.74))["align-1 accuracy, CPU"] == "0.714–0.798"
    assert "state" not in gpu_runs.quality(stage(0.70, 0.74))
    assert "accuracy of align-1" in gpu_runs.quality(stage(0.60, 0.70))["message"]


def test_plain_rows_one_by_one_give_the_gradient_of_all():
    """Where they do not fit at once, they are measured so."""
    made = gpu_parity.small_part("grpo", "tiny", "cpu", torch.float32, half=False)
    gpu_update.load(made, "tiny", 64, 6, 3)
    made.step("plain", "everything")
    whole, ids = made.results("plain"), made.ids
    found = gpu_update.row_by_row(made, "everything")
    assert torch.equal(made.ids, ids) and found["how"] == "row by row, GB calculated from 1 and 2 rows"
    assert not part.over_limits(part.differences(found["results"], whole))


def test_a_hardware_line_names_one_size_of_a_card_or_two():
    line = "one GPU of 24 to 80 GB (our estimate)."
    assert gpu_hardware.verdict(30.0, line) == {"says": line, "fits 24 GB": False, "fits 80 GB": True}
    found = gpu_hardware.verdict(81.0, "one node of 8 GPUs with 80 GB (our estimate); `pip install deepspeed`.")
    assert found["state"] == "failed" and found["fits 80 GB"] is False


@pytest.mark.parametrize("largest", [0, 40, 96, 1000])
def test_the_most_frames_are_found(largest):
    asked = []

    def fits(frames):
        asked.append(frames)
        return frames <= largest

    assert gpu_update.most(fits, start=100, step=4, factor=1.25) == largest
    assert len(asked) <= 20


def test_frames_are_computed_as_they_are_searched_for():
    config = random_model("3b", device="meta")[0].config
    found = [gpu_update.computed_frames(config, "3b", 48, offloading=offloading) for offloading in (False, True)]
    assert 2000 < found[0] < 0.5 * found[1]


# ---- the command ------------------------------------------------------------------------------------------------------


def start(out: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(BENCHMARKS / "on_gpu.py"), "--device", "cpu", "--out", str(out), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_and_continued(tmp_path):
    """In the middle of a case: what is done is not done again, the case that was running is."""
    file = tmp_path / "results.json"
    process = start(tmp_path, "--only", "parity")
    deadline = time.monotonic() + 200
    while len(before := on_gpu.read(file)["stages"].get("parity", {})) < 7:
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.01)
    (stage,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    stage.wait(timeout=20)  # it does not go on beside the next command
    before = on_gpu.read(file)["stages"]["parity"]
    assert on_gpu.running(on_gpu.read(file), "parity", since=0)[0] is not None
    process = start(tmp_path, "--only", "parity")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    results = json.loads(file.read_text())
    records = results["stages"]["parity"]
    assert {record["state"] for record in records.values()} == {"done"}
    assert list(records) == [case.name for case in on_gpu.plan("cpu", "tiny")["parity"]]
    for name, record in before.items():
        assert (records[name] == record) == (record["state"] == "done")
    assert {"torch", "python"} <= results["machine"].keys() and results["device"]
    assert "against_cpu" in output and (tmp_path / "log.txt").exists()


CASES = '''
import atexit, os, subprocess, time, torch
from pathlib import Path

def fine(device, number): return {"number": number}
def wrong(device): return {"state": "failed", "message": "too different", "log_probs": 0.5}
def breaks(device): raise ValueError("no such thing\\nat all")
def large(device): raise torch.OutOfMemoryError("CUDA out of memory")
def full(device): raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
def dies(device): os._exit(9)
def hangs(device):
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    Path(__file__).with_name("child").write_text(str(child.pid))
    child.wait()
def dies_later(device):
    atexit.register(os._exit, 7)
    return {}
'''


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Cases that go wrong in every way."""
    (tmp_path / "made_up.py").write_text(CASES)
    monkeypatch.syspath_prepend(str(tmp_path))

    def case(name, *needs, **options):
        return on_gpu.Case(name, 0.0, f"made_up:{name}", options, needs)

    return case


def test_what_fails_is_a_line_of_its_own(made_up, tmp_path, capsys):
    cases = [made_up(name) for name in ("breaks", "large", "full", "wrong")]
    cases += [made_up("dies", "cuda"), made_up("hangs", "no_such_module"), made_up("fine", number=7)]
    cases.append(on_gpu.Case("too long", 100.0, "made_up:fine", {"number": 8}))
    records = perform(tmp_path, "parity", cases, until=time.time() + 50)
    states = {name: (record["state"], record.get("message")) for name, record in records.items()}
    assert states == {
        "breaks": ("failed", "ValueError: no such thing"),
        "large": ("does not fit", "OutOfMemoryError: CUDA out of memory"),
        "full": ("does not fit", "RuntimeError: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        "wrong": ("failed", "too different"), "dies": ("skipped", "needs cuda"),
        "hangs": ("skipped", "needs no_such_module"), "fine": ("done", None),
    }  # fmt: skip
    assert records["fine"]["number"] == 7 and records["wrong"]["log_probs"] == 0.5
    assert "too long: not begun, takes 100 s" in capsys.readouterr().out
    again = perform(tmp_path, "parity", cases, until=time.time() + 50)
    assert again == records
    again = perform(tmp_path, "parity", cases, until=time.time() + 50, again_before=time.time())
    assert [name for name in records if again[name]["at"] != records[name]["at"]] == [*records][:-1]
    on_gpu.show("parity", again)
    assert "breaks  failed" in capsys.readouterr().out


def test_what_ends_its_process_or_hangs_costs_only_itself(made_up, tmp_path, monkeypatch, capsys):
    """And a case that an earlier command was killed in, for which there is no time now, waits for the next."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys\nsys.path[:0] = [{str(BENCHMARKS)!r}, {str(tmp_path)!r}]\nimport on_gpu\n"
        "cases = [on_gpu.Case(name, 0.0, f'made_up:{name}') for name in ('dies', 'hangs')]\n"
        "cases += [on_gpu.Case('dies_later', 0.0, 'made_up:dies_later'), on_gpu.Case('late', 1e6, 'made_up:dies')]\n"
        "on_gpu.plan = lambda *args: {'parity': cases}\non_gpu.limit_s = lambda case: 1\n"
        "if __name__ == '__main__':\n    on_gpu.main()\n"
    )
    monkeypatch.setattr(on_gpu, "__file__", str(driver))
    for name in ("limit_s", "plan"):  # as the driver has them
        monkeypatch.setattr(on_gpu, name, getattr(on_gpu, name))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("driver")
    out = tmp_path / "out"
    late = {"state": "running", "at": 1.0}
    on_gpu.write_json(out / "results.json", {"stages": {"parity": {"late": late}}})
    on_gpu.main(["--device", "cpu", "--out", str(out), "--only", "parity"])
    records = on_gpu.read(out / "results.json")["stages"]["parity"]
    assert records.pop("late") == late
    assert [record["state"] for record in records.values()] == ["failed", "failed", "done"]
    assert records["dies"]["message"] == "its process ended with code 9, see the log"
    assert records["hangs"]["message"].startswith("time limit")
    assert "in hangs" in (out / "log.txt").read_text()  # where it was
    child = int((tmp_path / "child").read_text())  # what it had started has ended, too
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert "parity: 1 cases not begun" in capsys.readouterr().out


def test_list_and_too_little_time(tmp_path, capsys):
    on_gpu.main(["--device", "cpu", "--out", str(tmp_path), "--list", "--only", "dpo", "loading"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("to do" in line for line in lines) and lines[0].startswith("dpo")
    on_gpu.main(["--device", "cpu", "--out", str(tmp_path), "--only", "dpo", "--minutes", "0.01"])
    output = capsys.readouterr().out
    assert "dpo: 1 cases not begun: too little time" in output and "\nnothing was begun; 0.0 minutes" in output
    assert not (tmp_path / "results.json").exists()


def test_wrong_arguments_and_a_damaged_file(tmp_path, capsys):
    out, file = ["--device", "cpu", "--out", str(tmp_path)], tmp_path / "results.json"
    file.write_text('{"stages": {"parity"')
    wrong = {"only": ["--only", "no-such-stage"], "more than 0": ["--minutes", "0"], "a folder": ["--out", str(file)]}
    for expected, arguments in wrong.items():
        with pytest.raises(SystemExit):
            on_gpu.main([*out, *arguments])
        assert expected in capsys.readouterr().err
    with pytest.raises(VeripoError, match="damaged: .* Move it away, or give another --out"):
        on_gpu.main([*out, "--list"])


def test_results_of_another_device_are_not_mixed(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text('{"device": "NVIDIA H100", "stages": {}}')
    with pytest.raises(SystemExit, match="results of NVIDIA H100, but this is .* Give another --out"):
        on_gpu.main(["--device", "cpu", "--out", str(tmp_path), "--stage", "dpo", "--until", "0"])
