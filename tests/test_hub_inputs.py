"""Questions that a stage leaves out, and the pairs that a DPO run's card names."""

import json
from types import SimpleNamespace

import pytest
import yaml

from veripo_trl.data.schema import content_of
from veripo_trl.errors import VeripoError
from veripo_trl.hub import runs as hub_runs
from veripo_trl.hub.runs import local_pairs
from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.training_rows import load_training_rows

ROW = {"problem": "Which?", "options": ["red", "blue"], "problem_type": "multiple choice", "solution": "B"}


def arguments(tmp_path, leave_out: list[str]) -> DataArguments:
    rows = [{**ROW, "question_id": f"q{number}"} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataArguments(datasets=[{"path": "rows.jsonl"}], leave_out=leave_out)


def test_solved_questions_of_other_data_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {**ROW, "videos": [], "images": []}
    for solved, gone in ((row, {"q1"}), ({**row, "problem": "Who?"}, None)):
        (tmp_path / "solved.json").write_text(json.dumps({"dropped": ["q1"], "contents": [content_of(solved)]}))
        data = arguments(tmp_path, ["solved.json"])
        if gone:
            assert {f"q{n}" for n in range(8)} - set(load_training_rows(data, seed=0)["question_id"]) == gone
        else:
            with pytest.raises(VeripoError, match="'q1' is another question in `datasets`.*id_prefix"):
                load_training_rows(data, seed=0)


@pytest.mark.parametrize("file", ["verify/solved.json", "outputs/verify", "tester/pairs", "pa@irs/solved.json"])
def test_what_is_no_file_of_solved_questions_is_refused(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tester" / "pairs").mkdir(parents=True)
    with pytest.raises(VeripoError, match=f"leave_out: {file}: expected a solved.json"):
        load_training_rows(arguments(tmp_path, [file]), seed=0)


def test_rows_left_out_are_counted_as_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "solved.json").write_text(json.dumps({"dropped": ["q1", "other-1", "other-2"]}))
    everything = load_training_rows(arguments(tmp_path, []), seed=3)["question_id"]
    assert "left out" not in capsys.readouterr().out
    rows = load_training_rows(arguments(tmp_path, ["solved.json", "solved.json"]), seed=3)
    assert "left out 1 rows of 3 solved questions, 7 rows stay" in capsys.readouterr().out
    assert list(rows["question_id"]) == [question for question in everything if question != "q1"]
    (tmp_path / "solved.json").write_text(json.dumps({"dropped": list(everything)}))
    with pytest.raises(VeripoError, match="all 8 rows are of solved questions"):
        load_training_rows(arguments(tmp_path, ["solved.json"]), seed=3)


PUSHED = {"repo_id": "tester/pairs", "revision": "c" * 40}


@pytest.mark.parametrize(
    ("pairs", "results", "shown"),
    [
        (["outputs/verify/pairs"], {"hub": {"pairs": {**PUSHED, "url": "x"}}}, "| pairs | tester/pairs at `ccc"),
        (["outputs/verify/pairs/a.parquet"], {"hub": {"pairs": PUSHED}}, "| pairs | tester/pairs at `ccc"),
        (["outputs/verify/pairs"], {"hub": None}, "| pairs | outputs/verify/pairs (a local folder, not on the Hub) |"),
        (["outputs/verify/pairs"], None, "| pairs | outputs/verify/pairs (a local folder, not on the Hub) |"),
        (["{here}/outputs/verify/pairs"], None, "| pairs | outputs/verify/pairs (a local folder, not on the Hub) |"),
        (["tester/pairs"], None, "| tester/pairs | tester/pairs at `ccc"),
        (["outputs/verify/pairs", "tester/pairs"], {"hub": {"pairs": {**PUSHED, "repo_id": "tester/other"}}},
         "| pairs of outputs/verify/pairs | tester/other at `ccc"),
    ],
)  # fmt: skip
def test_a_dpo_card_names_its_pairs(pairs, results, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "verify" / "pairs").mkdir(parents=True)
    (tmp_path / "outputs" / "verify" / "pairs" / "a.parquet").touch()
    run = tmp_path / "outputs" / "dpo"
    run.mkdir()
    (run / "config.json").write_text("{}")
    if results is not None:
        (tmp_path / "outputs" / "verify" / "results.json").write_text(json.dumps(results))
    pairs = [path.format(here=tmp_path) for path in pairs]
    sources = {"PairArguments": {"pairs": [{"path": path} for path in pairs]}}
    (run / "_arguments.json").write_text(json.dumps(sources))
    cards = {}

    def push(folder, repo_id, *, card, **options):
        cards[repo_id] = card
        return {"repo_id": repo_id, "revision": "d" * 40, "url": "url"}

    monkeypatch.setattr(hub_runs, "push_folder", push)
    inputs = {path: PUSHED for path in pairs if path == "tester/pairs"}
    result = {"stage": "DPO", "model": "org/base", "steps": 2, "pairs": {"penalty": 3}, "inputs": inputs}
    args = SimpleNamespace(hub_model_id="tester/dpo", hub_private_repo=None, hub_revision=None)
    hub_runs.push_run(run, args, result, license="mit")
    card = cards["tester/dpo"]
    assert shown in card and "| penalty pairs | 3 |" in card and str(tmp_path) not in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/base"


def test_runs_without_pairs_name_none(tmp_path):
    assert local_pairs(tmp_path) == {}
    (tmp_path / "_arguments.json").write_text('{"DataArguments": {}}')
    assert local_pairs(tmp_path) == {}
