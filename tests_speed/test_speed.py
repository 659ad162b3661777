"""Every benchmark runs, at a very small size, and writes what its table has. Speed is not tested here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "speed"
MACHINE = {"processor", "cores", "memory_gib", "accelerator", "python", "torch", "transformers", "trl"}

# Program -> (arguments, tables in its JSON and what each of their lines has).
SMALL = {
    "bench_rollout": (
        ["--quick", "--clips", "{tmp}/clips"],
        {"table": {"P:C:G", "stock s", "ours s", "ratio", "equal sampled", "equal greedy", "ok"}},
    ),
    "bench_loading": (
        ["--quick", "--folder", "{tmp}/clips"],
        {
            "decoders": {"decoder", "threads", "s a clip"},
            "cache": {"frames", "load s", "processor s", "clips decoded", "cache hits"},
            "batch": {"one prompt, G 8", "videos decoded", "processor calls", "seconds", "ratio"},
        },
    ),
    "bench_step": (
        ["--quick", "--folder", "{tmp}/clips"],
        {
            "grpo": {"model", "path", "wait for data", "generate", "score", "rest of rollout", "update", "whole"},
            "dpo": {"model", "path", "wait for data", "reference", "update", "whole"},
            "loading": {"epoch", "videos decoded", "wait for data", "load (in workers)", "whole step"},
            "costs": {"grpo s a question", "dpo s a question", "DPO faster by"},
        },
    ),
    "bench_update": (
        ["--cases", "grpo:128:8:2", "--repeats", "1", "--threads", "1"],
        {"cases": {"part", "P", "C", "G", "limit", "everything", "features given"}},
    ),
    "bench_methods": (
        ["--steps", "2", "--sizes", "104:4:2", "--threads", "1",
         "--only", "T-GRPO", "TW-GRPO", "GRPO, twice", "Reg-GRPO, twice"],
        {"table": {"step", "seconds", "over GRPO", "memory, MB", "first gradient differs"}},
    ),
    "long_video": (
        ["--shape", "tiny", "--frames", "600", "--group", "2", "--completion", "8", "--threads", "1",
         "--processes", "1", "2"],
        {"table": {"frames", "way", "processes", "tokens", "TFLOP", "memory MB of one", "log-prob", "gradient"}},
    ),
    "bench_verifier": (["--only", "rules", "--rollouts", "200", "--repeats", "1"], {}),
    "bench_evaluation": (["--world", "{tmp}/world", "--questions", "6", "--batch_size", "3", "--num_workers", "1"], {}),
}


def run(program: str, folder: Path) -> tuple[dict, str]:
    arguments = [argument.format(tmp=folder) for argument in SMALL[program][0]]
    result = folder / f"{program}.json"
    found = subprocess.run(
        [sys.executable, str(FOLDER / f"{program}.py"), *arguments, "--json", str(result)],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    return json.loads(result.read_text()), found.stdout


@pytest.mark.slow
@pytest.mark.parametrize("program", SMALL)
def test_small(program, tmp_path):
    result, _ = run(program, tmp_path)
    assert MACHINE <= set(result["machine"])
    for table, columns in SMALL[program][1].items():
        assert result[table], table
        for line in result[table]:
            assert columns <= set(line), table
    if program == "bench_step":  # from an empty cache in the first epoch, nothing in the second
        first, second = [line["videos decoded"] for line in result["loading"] if line["step"] == "grpo"]
        assert first >= 6 and second == 0
    if program == "long_video":  # the prompt is shared out, and so is its work; "all" computes MLPs once more
        halves = [line for line in result["table"] if line["processes"] == 2]
        assert [line["way"] for line in halves] == ["whole", "all"]
        assert all(0.49 < line["TFLOP of one"] < 0.55 and line["tokens"] < 650 for line in halves)
    if program == "bench_loading":
        assert all(result["checks"].values())
        assert [line["videos decoded"] for line in result["batch"]] == [16, 1, 0]


def test_every_benchmark_is_run():
    programs = {path.stem for path in FOLDER.glob("bench_*.py")}
    assert programs | {"long_video"} == set(SMALL)


@pytest.mark.parametrize("difference", ["tokens", "gradient"])
def test_a_wrong_result_fails(difference, monkeypatch, tmp_path):
    """A benchmark whose two ways disagree ends with an error, whatever its ratio."""
    monkeypatch.syspath_prepend(str(FOLDER))
    if difference == "tokens":
        import bench_rollout

        sample = bench_rollout.sample_completions
        monkeypatch.setattr(bench_rollout, "sample_completions", lambda *args, **kw: (sample(*args, **kw) + 1) % 100)
        arguments, program = ["--quick", "--clips", str(tmp_path)], bench_rollout
    else:
        import bench_step

        def fake(method, shape, args, *, shared, **kwargs):
            step = {"whole": 1.0, "wait for data": 0.0, "decoded": 0}
            runs = {"steps": [step] * 6, "loss": [0.5], "questions": 2, "prompt tokens": 9}
            return {**runs, "grad_norm": [1.0 if shared else 1.01]}

        monkeypatch.setattr(bench_step, "run", fake)
        arguments, program = ["--quick", "--folder", str(tmp_path)], bench_step
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--json", str(tmp_path / "result.json")])
    with pytest.raises(SystemExit, match="differ"):
        program.main()
    assert (tmp_path / "result.json").exists()
