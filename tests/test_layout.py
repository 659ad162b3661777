"""The direction of imports, and that the README, CI and the package say the same."""

import ast
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "veripo_trl"

# From the ground up: what is in a room imports from its own and from those before it.
ROOMS = ["start", "errors", "options", "user_functions", "files", "answers", "media", "hub", "data", "sources",
         "model", "shared_prompt", "verifier", "evaluate", "vllm", "trainers", "methods", "report", "tiny",
         "recipe", "loop", "chat"]  # fmt: skip
# Light enough for every start: torch is not loaded with them.
PURE = ["answers.score", "answers.rewards", "data.rows", "data.prompts", "evaluate.questions", "media.worker",
        "verifier.judges", "verifier.checks", "verifier.reply_cache", "verifier.server_judge", "verifier.verify",
        "verifier.pairs", "verifier.curriculum", "verifier.files", "report.write",
        "tiny.judge"]  # fmt: skip
MODULES = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in sorted(SOURCE.rglob("*.py"))}


def imported_rooms(path: Path) -> set[str]:
    """Our rooms that a file imports from, anywhere in it."""
    dotted = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: line {node.lineno}: imports are absolute"
            dotted += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            dotted += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in dotted if name.startswith("veripo_trl.")}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_imports_go_down(name):
    rank = ROOMS.index(name.split(".")[0])
    up = imported_rooms(MODULES[name]) - set(ROOMS[: rank + 1])
    assert not up, f"{name} imports from {sorted(up)}, above it"


@pytest.mark.parametrize("room", [room for room in ROOMS if (SOURCE / room).is_dir()])
def test_every_room_says_what_it_is_for(room):
    assert ast.get_docstring(ast.parse((SOURCE / room / "__init__.py").read_text()))


def test_the_package_imports_no_recipe():
    for name, path in MODULES.items():
        assert not re.search(r"^\s*(from|import) (recipes|evaluation|speed)\b", path.read_text(), re.M), name


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_load_without_torch(name):
    code = f"import sys, veripo_trl.{name}; print('torch' in sys.modules, 'transformers' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "False"]


def test_the_import_changes_nothing_of_its_process():
    code = "import sys; f = list(sys.meta_path), sys.stdout.errors; import veripo_trl, veripo_trl.errors; "
    code += "print(f == (sys.meta_path, sys.stdout.errors), veripo_trl.__version__)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["True", metadata.version("veripo_trl")]


def test_a_locale_without_utf_8_ends_no_script():
    code = "from veripo_trl.errors import run; run(lambda: print('12 → 3'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "12 \\u2192 3\n"
    scripts = [*(ROOT / "recipes").glob("*.py"), *(ROOT / "evaluation").glob("*.py")]
    for path in [*scripts, *(ROOT / "evaluation").rglob("*.py"), *SOURCE.rglob("*.py")]:
        tree = ast.parse(path.read_text())
        if path in scripts:  # what makes the screen take anything
            assert re.search(r"run\w*\(main\)|print_under_any_locale\(\)", path.read_text()), path
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


def test_no_file_is_large_and_none_names_a_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        path = ROOT / name
        assert path.stat().st_size < 100_000, name
        if path.suffix in (".py", ".md", ".yaml", ".cfg", ".toml"):
            assert not re.search(r"(^|[^\w.])/(root|home)/", path.read_text()), name
