"""What the documents name exists: files, links with their anchors, configurations, commands and their flags."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("evaluation/*.md"),
        *ROOT.glob("verifier_prompts/*.md"),
        *ROOT.glob("recipes/configs/*/README.md"),
    ]
)
COMMAND = re.compile(
    r"(?:python|accelerate launch[^\n]*?|torchrun[^\n]*?) ((?:-m )?[\w./]+(?:\.py|veripo_trl\.\w+))((?:[^\n#]|\\\n)*)"
)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    assert "@@" not in text  # a place that was to be filled in
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{path}: {target}"
        assert not anchor or anchor in anchors(linked), f"{path}: {target}"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_configurations_exist(path):
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:recipes|src|tests|speed|evaluation|docs)/[\w./-]+\.(?:py|yaml|md)", text))
    named |= {f"recipes/configs/{config}" for config in re.findall(r"--config ([\w/]+\.yaml)", text)}
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


@pytest.fixture(scope="module")
def known_flags() -> str:
    """Where an option is defined: our sources, and the fields of TRL's and transformers' arguments."""
    from trl import DPOConfig, GRPOConfig, ModelConfig, SFTConfig

    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    ours = "\n".join(
        (ROOT / name).read_text(encoding="utf-8") for name in files.split() if not name.startswith("tests")
    )
    theirs = {
        name for config in (SFTConfig, GRPOConfig, DPOConfig, ModelConfig) for name in config.__dataclass_fields__
    }
    return ours + "\n".join(f"    {name}: field" for name in theirs)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_their_flags_exist(path, known_flags):
    for script, rest in COMMAND.findall(path.read_text(encoding="utf-8").replace("\\\n", " ")):
        if script.startswith("-m "):
            script = f"src/{script[3:].replace('.', '/')}.py"
        if script.startswith("my_"):
            continue
        assert (ROOT / script).exists(), f"{path}: {script}"
        for flag in re.findall(r"\s--([a-z][\w-]*)", rest):
            assert re.search(rf'"--{flag}"|^\s+{flag}: ', known_flags, re.M), f"{path}: {script} --{flag}"
