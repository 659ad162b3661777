"""The notebook, every cell of it, as Jupyter runs it: about three minutes on two cores.

pip install -e '.[notebook]' && python -m pytest tests_configs/test_quickstart.py
"""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[notebook]'")
nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[notebook]'")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(a checkout made of links, the code cells that ran there, from the folder in which the notebook lies).

    A cell that raises, or a command that fails, raises here. What installs is left out: whoever runs this has done so.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # the repository holds none
    installs = [cell for cell in notebook.cells if "install" in cell.metadata.get("tags", [])]
    assert [cell.source for cell in installs] == ["%pip install -q -e ."]
    notebook.cells = [cell for cell in notebook.cells if cell not in installs]
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "src"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs").mkdir()
    place = {"metadata": {"path": str(folder / "docs")}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place).execute()
    return folder, [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(run, part: str, kind: str = "text/plain") -> str:
    """What the one code cell that holds `part` prints and displays."""
    (cell,) = [cell for cell in run[1] if part in cell.source]
    return "".join(output.get("text") or str(output.get("data", {}).get(kind, "")) for output in cell.outputs)


def test_the_loop_learns_and_its_report_is_shown(run):
    folder, _ = run
    table = shown(run, "recipes/veripo.py --config").split("stage       accuracy")[-1]
    reached = {name: float(share) for name, share in re.findall(r"^(\S+) +([\d.]+)%", table, re.M)}
    assert reached.keys() == {"cold-start", "search-1", "align-1"} and reached["align-1"] > reached["cold-start"]
    assert (folder / "outputs/quickstart/report.html").exists()
    sample = (folder / "outputs/quickstart/sample.html").stat().st_size
    assert sample < 2e6
    inline = shown(run, "iframe", "text/html")
    assert len(inline) > sample and "Content-Security-Policy" in inline
    assert shown(run, "loop.png", "image/png")


def test_a_clip_and_rows_of_ones_own(run):
    folder, _ = run
    answer = re.search(r"I see (.+) → ([A-D])\n", shown(run, 'Chat("outputs/quickstart/align-1"'))
    assert answer, shown(run, 'Chat("outputs/quickstart/align-1"')
    assert "3 good rows" in shown(run, "check_rows.py")
    assert len((folder / "outputs/mine/manifest.jsonl").read_text().splitlines()) == 1 + 3
    said = shown(run, 'Chat("outputs/mine/sft"')
    losses = [float(loss) for loss in re.search(r"loss: \[(.+)\]", said)[1].split(", ")]
    assert losses[-1] < losses[0] and "yellow then green then red, second is green: B. → B" in said
    card = shown(run, "RepoCard.load", "text/markdown")
    assert "## Ask it" in card and "| after | greedy | 3 | 100.0%" in card


def test_what_the_notebook_names_exists():
    text = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
    named = set(re.findall(r"recipes/[\w./-]+\.py", text)) | {f"docs/{name}" for name in re.findall(r"\((\w+\.md)", text)}
    named |= {f"recipes/configs/{name}" for name in re.findall(r"(?:config:|--config) (\w+/\w+\.yaml)", text)} - {
        "recipes/configs/outputs/quickstart.yaml"
    }
    assert len(named) > 10 and not [name for name in named if not (ROOT / name).exists()]
