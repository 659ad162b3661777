"""The direction of imports, and that the README, CI and the package say the same."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "veripo_trl"

# Rank by rank: a module imports ours from its own rank or a lower one.
RANKS = [
    {"errors", "disk", "secrets", "run_folder", "answers", "math_worker", "rows", "prompts", "containers",
     "verifier.conclusions", "verifier.judges", "tiny.clips", "tiny.questions", "tiny.parser",
     "hub_cards", "plots", "report_page", "tables", "verifier.checks", "verifier.cache", "verifier.judge_prompts",
     "verifier.local", "verifier.server", "verifier.pairs", "verifier.curriculum",
     "verifier.summary"},
    {"positions", "preferences", "questions", "rollouts", "rewards", "frame_cache", "video_process", "video_worker",
     "policy", "tiny.model", "report_read", "verifier.verify", "verifier.files", "hub", "hub_runs"},
    {"video", "tiny.world"},
    {"downloads", "features", "report"},
    {"encoding", "prefix_attention"},
    {"generation", "vllm_rollouts"},
    {"shared_prefix"},
    {"evaluate", "journal", "scoring", "vllm_engine", "trainers.checkpoints", "trainers.guards", "trainers.vllm"},
    {"trainers.dpo", "trainers.grpo", "trainers.sft"},
    {"stages"},
    {"chat"},
]
RANK = {module: rank for rank, modules in enumerate(RANKS) for module in modules}
PURE = ["answers", "rows", "prompts", "questions", "rewards", "verifier.judges", "verifier.checks", "verifier.cache",
        "verifier.server", "verifier.verify", "verifier.pairs", "verifier.curriculum", "verifier.files",
        "tiny.parser", "video_worker"]  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for path in SOURCE.rglob("*.py"):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = path
    return found


def imported(name: str, path: Path) -> set[str]:
    """Our modules that a file imports, anywhere in it."""
    ours = set()
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            base += node.module.split(".") if node.module else []
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "veripo_trl":
            base = node.module.split(".")[1:]
        elif isinstance(node, ast.Import):
            ours |= {alias.name.removeprefix("veripo_trl.") for alias in node.names if "veripo_trl." in alias.name}
            continue
        else:
            continue
        dotted = ".".join(base)
        ours |= {dotted} if dotted in RANK else {".".join([*base, alias.name]) for alias in node.names}
    return {module for module in ours if module in modules()}


def test_every_module_has_a_rank():
    assert set(modules()) == set(RANK)


@pytest.mark.parametrize("name", sorted(RANK))
def test_imports_go_down(name):
    up = {module for module in imported(name, modules()[name]) if RANK[module] > RANK[name]}
    assert not up, f"{name} imports {sorted(up)} of a higher rank"


def test_the_package_imports_no_recipe():
    for name, path in modules().items():
        assert not re.search(r"^\s*(from|import) (recipes|evaluation|benchmarks)\b", path.read_text(), re.M), name


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_load_without_torch(name):
    code = f"import sys, veripo_trl.{name}; print('torch' in sys.modules, 'transformers' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "False"]


def test_a_locale_without_utf_8_ends_no_script():
    code, environment = "import veripo_trl; print('12 → 3')", {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "12 \\u2192 3\n"
    scripts = [*(ROOT / "recipes").glob("*.py"), *(ROOT / "evaluation").glob("*.py")]
    for path in [*scripts, *(ROOT / "evaluation").rglob("*.py"), *SOURCE.rglob("*.py")]:
        tree = ast.parse(path.read_text())
        if path in scripts:  # what makes the screen take anything
            assert re.search(r"^(from|import) veripo_trl\b", path.read_text(), re.M), path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
                assert "encoding" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"


def readme_command(name: str) -> str:
    text = (ROOT / "README.md").read_text()
    return re.search(rf"<!-- {name} -->\n```bash\n(.+?)\n```", text, re.S)[1]


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert readme_command("test command").replace(".venv", "$VENV") in script


def test_the_readmes_main_command_needs_no_arguments():
    assert readme_command("main command").endswith("python recipes/veripo.py")


def test_the_readmes_files_exist():
    text = (ROOT / "README.md").read_text()
    assert "@@" not in text  # a place that was to be filled in
    named = set(re.findall(r"(?:recipes|src|tests|benchmarks)/[\w./-]+\.(?:py|yaml|json)", text))
    named |= {f"recipes/configs/{path}" for path in re.findall(r"--config ([\w/]+\.yaml)", text)}
    missing = [path for path in sorted(named) if not (ROOT / path).exists()]
    assert named and not missing


def test_no_file_is_large_and_none_names_a_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        path = ROOT / name
        assert path.stat().st_size < 100_000, name
        if path.suffix in (".py", ".md", ".yaml", ".cfg", ".toml"):
            assert not re.search(r"(^|[^\w.])/(root|home)/", path.read_text()), name
