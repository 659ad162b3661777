"""Which solved questions the next iteration leaves out, and which are never trained on."""

import json
import random
from pathlib import Path

import pytest
import yaml
from conftest import load_script, make_row
from helpers import stored_pair, write_pairs

from veripo_trl.errors import ConfigError
from veripo_trl.recipe.arguments import DataArguments
from veripo_trl.recipe.training_rows import _solved_questions, load_eval_rows, load_training_rows
from veripo_trl.verifier.curriculum import choose_solved


def accuracies(solved=50, mixed=30, unsolved=20):
    found = []
    for n in range(solved):
        found += [(f"solved{n}", step, 1.0) for step in (0, 1) for _ in range(4)]
    for n in range(mixed):
        found += [(f"mixed{n}", 0, accuracy) for accuracy in (1.0, 0.0, 1.0, 0.4)]
    for n in range(unsolved):
        found += [(f"unsolved{n}", 0, 0.0) for _ in range(4)]
    return found


def test_counts_and_share():
    result = choose_solved(accuracies(), share=0.8, seed=3)
    assert len(result["dropped"]) == 40 and all(name.startswith("solved") for name in result["dropped"])
    counts = {key: result[key] for key in ("kept", "solved", "mixed", "unsolved", "share", "seed", "groups")}
    assert counts == {"kept": 10, "solved": 50, "mixed": 30, "unsolved": 20, "share": 0.8, "seed": 3, "groups": 150}
    assert result["zero_variance"] == 120 / 150


@pytest.mark.parametrize(("share", "dropped"), [(0, 0), (0.5, 25), (1, 50)])
def test_other_shares(share, dropped):
    assert len(choose_solved(accuracies(), share=share)["dropped"]) == dropped


def test_order_does_not_matter_and_the_seed_does():
    shuffled = accuracies()
    random.Random(0).shuffle(shuffled)
    assert choose_solved(iter(shuffled), seed=1) == choose_solved(accuracies(), seed=1)
    assert choose_solved(accuracies(), seed=1)["dropped"] != choose_solved(accuracies(), seed=2)["dropped"]


def test_once_wrong_is_not_solved_and_graded_answers_count():
    rows = [("a", 0, 1.0), ("a", 0, 1.0), ("a", 1, 0.9), ("b", 0, 0.1), ("b", 0, 0.1), ("c", 0, 1.0)]
    result = choose_solved(rows, share=1)
    assert result["dropped"] == ["c"] and (result["mixed"], result["unsolved"]) == (2, 0)
    assert (result["groups"], result["zero_variance"]) == (2, 1.0)  # of one rollout there is no variance


def test_nothing_and_a_wrong_share():
    assert choose_solved([])["zero_variance"] is None
    with pytest.raises(ValueError, match="drop_solved_share"):
        choose_solved([], share=80)


def rows_file(path, names) -> list[dict]:
    """A file of questions without media, as an entry of `datasets`."""
    rows = [make_row(name, path.parent, problem=f"{name}?") for name in names]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "media_root"}) + "\n" for row in rows))
    return [{"path": str(path)}]


def sides(datasets, *, seed=0, **options) -> tuple[set, list]:
    """(ids trained on, ids held out) of a stage."""
    data = DataArguments(datasets=datasets, **{"holdout": 8, **options})
    train, held = load_training_rows(data, seed=seed)["question_id"], load_eval_rows(data)["question_id"]
    return set(train), list(held)


def test_held_out_rows_are_taken_by_id(tmp_path):
    """The same in every order, under every seed, with solved questions left out; a part of the rows trains on none."""
    names = [f"q{number}" for number in range(60)]
    train, held = sides(rows_file(tmp_path / "a.jsonl", names))
    assert len(held) == 8 and train == set(names) - set(held)
    (tmp_path / "solved.json").write_text(json.dumps({"dropped": names[:20]}))
    random.Random(1).shuffle(names)
    later, again = sides(rows_file(tmp_path / "b.jsonl", names), seed=7, leave_out=[str(tmp_path / "solved.json")])
    assert sorted(again) == sorted(held) and later == train - {f"q{number}" for number in range(20)}
    part, _ = sides(rows_file(tmp_path / "c.jsonl", names[:30]))
    assert len(part) == 22 and not part & set(held)


def test_held_out_rows_that_cannot_be(tmp_path):
    datasets = rows_file(tmp_path / "a.jsonl", ["q1", "q2"])
    with pytest.raises(ConfigError, match="8 of 2 rows of `datasets` leave none to train on"):
        sides(datasets)
    for options in ({"eval_datasets": datasets}, {"holdout": -1}):
        with pytest.raises(ConfigError, match="holdout: expected a number of rows"):
            sides(datasets, **options)


def test_pairs_of_held_out_questions_are_refused(model_paths, tmp_path):
    dpo = load_script("recipes/dpo_video.py")
    datasets = rows_file(tmp_path / "a.jsonl", ["q1", "q2", "q3"])
    pairs = write_pairs(tmp_path / "pairs", [stored_pair(make_row(name, tmp_path)) for name in ("q1", "q2", "q3")])
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump({
        "model_name_or_path": str(model_paths["qwen2_5_vl"]), "output_dir": str(tmp_path / "run"), "use_cpu": True,
        "bf16": False, "pairs": [{"path": pairs}], "datasets": datasets, "holdout": 1, "prompt_template": "tiny",
    }))  # fmt: skip
    with pytest.raises(ConfigError, match=r"1 of the 1 questions have pairs \(q[123], …\): the GRPO run trained on them"):
        dpo.main(["--config", str(tmp_path / "dpo.yaml")])


def test_a_folder_with_an_at_sign_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path("runs/exp@lr1/verify-1/solved.json")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"dropped": ["q1"]}))
    assert _solved_questions(str(file)) == {"q1": None}
