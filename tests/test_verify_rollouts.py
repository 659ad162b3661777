"""The verify recipe on real rollout files: what it writes, refuses, and does after being killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import documented, files_of_at_most
from hub_server import HubServer
from judge_server import JudgeServer, Reply

from conftest import load_script
from veripo_trl.data.prompts import load_template
from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.data.schema import RowError, content_of
from veripo_trl.errors import VeripoError
from veripo_trl.hub.cards import dataset_card
from veripo_trl.hub.push import push_folder
from veripo_trl.recipe.verify_stage import VerifyArguments, load_tokenizer, make_judge, say_other_accuracy
from veripo_trl.verifier import files, pair_dataset
from veripo_trl.verifier.pair_dataset import load_pairs
from veripo_trl.verifier.summary import card_facts, shown

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "verify_rollouts.py"
OPTIONS = ["A. red", "B. blue", "C. green", "D. yellow"]
TEMPLATE = load_template("tiny")


@pytest.fixture(scope="module")
def recipe():
    return load_script("recipes/verify_rollouts.py")


def completion(answer: str, concluded: str | None = None, words: str = "I look at it") -> str:
    end = f"so the answer is {concluded or answer}." if concluded != "" else "hard to say."
    return f"<think>{words}, {end}</think><answer>{answer}</answer>"


# What the eight rollouts of a generation say, over and over: (answer, concluded).
SAYS = {
    "mixed": [("B", "B"), ("B", "C"), ("A", "A"), ("B", "B"), ("D", "D"), ("B", ""), ("C", "A"), ("B", "B")],
    "solved": [("B", "B")] * 8,
    "unsolved": [("A", "A")] * 8,
}


def make_rollouts(folder, policy, *, questions=("mixed", "solved", "unsolved"), steps=2, run="run", copies=1, **changes):
    """A store of `steps` generations. A question's kind is the start of its id."""
    store = RolloutStore(folder)
    for step in range(steps):
        rollouts = []
        for question in [f"{kind}-{copy}" for kind in questions for copy in range(copies)]:
            for place, (answer, concluded) in enumerate(SAYS[question.split("-")[0]]):
                words = f"I look at {question}, try {place} of step {step}"
                rollouts.append(
                    {
                        "rollout_id": f"{run}/step{step}-part0-rank0-{len(rollouts)}",
                        "question_id": question,
                        "problem": f"Which colour is first in {question}?",
                        "options": OPTIONS,
                        "problem_type": "multiple choice",
                        "solution": "B",
                        "videos": ["clips/1.mp4"],
                        "images": [],
                        "data_source": "test",
                        "step": step,
                        "completion": completion(answer, concluded, words),
                        "completion_tokens": 20,
                        "finish_reason": "stop",
                        "advantage": 0.0,
                        "policy": str(policy),
                        "prompt_template": TEMPLATE.hash,
                        "seed": 0,
                        "rewards": {"accuracy_reward": float(answer == "B")},
                    }
                    | changes
                )
        store.write(rollouts, step=step, part=0, rank=0, reward_names=["accuracy_reward"])
    return store


def config(tmp_path, **settings) -> list[str]:
    """The command line for a YAML with these settings."""
    content = {"prompt_template": "tiny", "rollouts": [str(tmp_path / "rollouts")]}
    content |= {"output_dir": str(tmp_path / "outputs" / "verify"), **settings}
    file = tmp_path / "verify.yaml"
    file.write_text(json.dumps(content))
    return ["--config", str(file)]


def read(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.fixture
def policy(model_paths):
    return model_paths["qwen2_5_vl"]


def test_a_run_from_rollouts_to_pairs(recipe, tmp_path, policy, capsys):
    store = make_rollouts(tmp_path / "rollouts", policy, copies=3)
    recipe.main(config(tmp_path, drop_solved_share=0.67))
    folder = tmp_path / "outputs" / "verify"
    rollouts, verdicts, pairs = store.read(), read(folder / "verdicts"), read(folder / "pairs")
    assert [v["rollout_id"] for v in verdicts] == [r["rollout_id"] for r in rollouts]
    assert pq.read_schema(folder / "verdicts" / "verdicts-00000.parquet") == files.VERDICT_SCHEMA
    assert pq.read_schema(folder / "pairs" / "pairs-00000.parquet") == files.PAIR_SCHEMA
    by_kind = {kind: sum(p["kind"] == kind for p in pairs) for kind in ("consistency", "penalty", "reflection")}
    # of each of the 3 mixed questions: two of a kind, four in all, taken in turn
    assert by_kind == {"consistency": 6, "penalty": 3, "reflection": 3}
    texts = {r["rollout_id"]: r["completion"] for r in rollouts}
    for pair in pairs:
        assert pair["question_id"].startswith("mixed")
        assert pair["rejected"] == [{"role": "assistant", "content": texts[pair["rejected_id"]]}]
        assert pair["videos"] == ["clips/1.mp4"] and pair["policy"] == str(policy)
        assert pair["prompt"][0]["content"][0]["type"] == "video"
    solved = json.loads((folder / "solved.json").read_text())
    assert (solved["solved"], solved["mixed"], solved["unsolved"], len(solved["dropped"])) == (3, 3, 3, 2)
    assert all(name.startswith("solved") for name in solved["dropped"]) and solved["share"] == 0.67
    contents = {rollout["question_id"]: content_of(rollout) for rollout in rollouts}
    assert solved["contents"] == [contents[name] for name in solved["dropped"]]
    results = json.loads((folder / "results.json").read_text())
    counts = results["counts"]
    assert (counts["rollouts"], counts["questions"], counts["pairs"]) == (144, 9, by_kind)
    assert counts["verdicts"] == {"consistent": 126, "inconsistent": 12, "unknown": 6}
    assert counts["inconsistency"] == 12 / 138 and counts["unknown"] == 6 / 144
    assert results["solved"]["zero_variance"] == 12 / 18
    assert results["judge"] == {"name": "rules", "prompt_version": "", "requests": 0, "retries": 0, "failures": {}}
    assert results["rollouts"] == [str(tmp_path / "rollouts")] and results["inputs"] == {} and results["hub"] is None
    screen = capsys.readouterr().out
    expected = ("consistency: inconsistent", "inconsistent %", "unknown %", "8.7", "4.2", "A reflection pair")
    assert not [text for text in expected if text not in screen]
    assert not list(folder.rglob("*.tmp-*"))


def test_what_dpo_reads(recipe, tmp_path, policy):
    """The pairs' files through the readers that come after: the datasets library, and the DPO stage's."""
    from datasets import load_dataset
    from trl.data_utils import is_conversational

    make_rollouts(tmp_path / "rollouts", policy)
    recipe.main(config(tmp_path))
    folder = tmp_path / "outputs" / "verify" / "pairs"
    row = load_dataset("parquet", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))[0]
    assert is_conversational(row) and row["chosen"][0]["content"].startswith("<think>")
    pairs, _ = load_pairs([{"path": str(folder), "media_root": str(tmp_path)}], template=TEMPLATE)
    assert len(pairs) == 4 and pairs[0]["problem"] == "Which colour is first in mixed-0?"


def test_finished_run_is_moved_aside_and_gives_the_same_again(recipe, tmp_path, policy):
    make_rollouts(tmp_path / "rollouts", policy, copies=2)
    for _ in range(2):
        recipe.main(config(tmp_path))
    folder, previous = (tmp_path / "outputs" / name for name in ("verify", "verify.previous-1"))
    for name in ("pairs/pairs-00000.parquet", "verdicts/verdicts-00000.parquet", "solved.json"):
        assert (folder / name).read_bytes() == (previous / name).read_bytes()
    (folder / "results.json").unlink()  # now it is unfinished: made anew in place, what it left is not kept
    (folder / "pairs" / "pairs-00007.parquet").write_bytes(b"left by a run with other settings")
    recipe.main(config(tmp_path, max_pairs_per_question=1))
    assert [file.name for file in (folder / "pairs").iterdir()] == ["pairs-00000.parquet"]
    assert len(read(folder / "pairs")) == 2 and not (tmp_path / "outputs" / "verify.previous-2").exists()


def test_no_pairs(recipe, tmp_path, policy, capsys):
    make_rollouts(tmp_path / "rollouts", policy, questions=["solved", "unsolved"])
    recipe.main(config(tmp_path))
    folder = tmp_path / "outputs" / "verify"
    assert pq.read_schema(folder / "pairs" / "pairs-00000.parquet") == files.PAIR_SCHEMA and not read(folder / "pairs")
    assert (folder / "results.json").exists()
    screen = capsys.readouterr().out
    assert "No pairs." in screen and "groups: with none right" in screen


def test_several_folders_and_limit(recipe, tmp_path, policy):
    make_rollouts(tmp_path / "one", policy, questions=["mixed"], run="one")
    make_rollouts(tmp_path / "two" / "rollouts", policy, questions=["solved"], run="two")
    set_aside = RolloutStore(tmp_path / "one")
    assert set_aside.set_aside_from(1) == 1  # as a resumed run does: not read
    recipe.main(config(tmp_path, rollouts=[str(tmp_path / "one"), str(tmp_path / "two")]))
    results = tmp_path / "outputs" / "verify" / "results.json"
    assert json.loads(results.read_text())["counts"]["rollouts"] == 8 + 16
    recipe.main([*config(tmp_path, rollouts=[str(tmp_path / "one"), str(tmp_path / "two")]), "--limit", "10"])
    assert json.loads(results.read_text())["counts"]["rollouts"] == 10


def test_only_the_first_process_of_a_launcher_works(recipe, tmp_path, policy, monkeypatch):
    make_rollouts(tmp_path / "rollouts", policy)
    monkeypatch.setenv("RANK", "1")
    recipe.main(config(tmp_path))
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("place", [".", "checkpoint-4"])
def test_the_tokenizer_is_the_one_that_the_run_has_saved(recipe, tmp_path, policy, place, monkeypatch):
    """A model outside of the working directory is recorded as "qwen": whoever has a repository of that name."""
    store = make_rollouts(tmp_path / "grpo" / "rollouts", "qwen")
    with HubServer() as hub:
        hub.use_in_this_process(monkeypatch, tmp_path / "hf_home")
        with pytest.raises(VeripoError, match="(?s)No tokenizer in 'qwen', the rollouts' policy: no such folder.*Give"):
            recipe.main(config(tmp_path, rollouts=[str(store.folder)]))
        (tmp_path / "grpo" / place).mkdir(exist_ok=True)
        for file in policy.glob("token*"):
            shutil.copy(file, tmp_path / "grpo" / place)
        recipe.main(config(tmp_path, rollouts=[str(store.folder)]))
        assert not hub.log
    assert {verdict["think_tokens"] > 0 for verdict in read(tmp_path / "outputs" / "verify" / "verdicts")} == {True}


def test_what_is_beside_a_folder_that_is_no_runs_is_not_its_tokenizer(tmp_path, policy):
    store = make_rollouts(tmp_path / "mixed" / "pushed", "outputs/absent")
    for file in policy.glob("token*"):
        shutil.copy(file, tmp_path / "mixed")
    with pytest.raises(VeripoError, match="No tokenizer in 'outputs/absent'"):
        load_tokenizer(None, store.files(), ["outputs/absent"])


def test_a_trial_reads_the_files_that_it_needs(tmp_path, policy):
    first, *others = make_rollouts(tmp_path / "rollouts", policy).files()
    others[0].write_bytes(b"damaged")
    assert len(files.read_rollouts([first, *others], limit=2)) == 2
    with pytest.raises(VeripoError, match=others[0].name):
        files.read_rollouts([first, *others])


# ---- refused, before anything is moved or written ----------------------------------------------------------------


def twice(tmp_path, policy):
    make_rollouts(tmp_path / "rollouts", policy)
    make_rollouts(tmp_path / "more", policy)
    return {"rollouts": [str(tmp_path / "rollouts"), str(tmp_path / "more")]}


def foreign_file(tmp_path, policy):
    make_rollouts(tmp_path / "rollouts", policy)
    pq.write_table(pa.table({"question_id": ["a"], "text": ["b"]}), tmp_path / "rollouts" / "table.parquet")


def cut_file(tmp_path, policy):
    store = make_rollouts(tmp_path / "rollouts", policy)
    store.files()[1].write_bytes(store.files()[1].read_bytes()[:-100])


def wrong_type(tmp_path, policy):
    store = make_rollouts(tmp_path / "rollouts", policy)
    table = pq.read_table(store.files()[0])
    ids = pa.array(range(len(table)))
    changed = table.set_column(table.column_names.index("videos"), "videos", ids)
    pq.write_table(changed, store.files()[0])


def one_null(tmp_path, policy):
    make_rollouts(tmp_path / "rollouts", policy, completion=None)


def no_rollouts(tmp_path, policy):
    (tmp_path / "rollouts").mkdir()


def empty_file(tmp_path, policy):
    RolloutStore(tmp_path / "rollouts").write([], step=0, part=0, rank=0, reward_names=["accuracy_reward"])


def other_template(tmp_path, policy):
    make_rollouts(tmp_path / "rollouts", policy, prompt_template="0123456789abcdef")


def two_policies(tmp_path, policy):
    make_rollouts(tmp_path / "rollouts", policy)
    make_rollouts(tmp_path / "more", "other", run="more")
    return {"rollouts": [str(tmp_path / "rollouts"), str(tmp_path / "more")]}


def no_tokenizer(tmp_path, policy):
    make_rollouts(tmp_path / "rollouts", tmp_path / "absent")


def cache_is_another_file(tmp_path, policy):
    file = make_rollouts(tmp_path / "rollouts", policy).files()[0]
    return {"judge": "server", "judge_url": "http://127.0.0.1:1", "judge_model": "x", "verdict_cache": str(file)}


def settings(**given):
    def make(tmp_path, policy):
        make_rollouts(tmp_path / "rollouts", policy)
        return given

    make.__name__ = "-".join(given)
    return make


REFUSED = [
    (twice, r"48 rollout ids are there more than once: run/step0-part0-rank0-0, .*Give every run's rollouts once"),
    (foreign_file, r"table.parquet: no column completion, .*rollout_id, .*it has question_id, text. Move it away"),
    (cut_file, r"rollouts-step0000001.*not a readable Parquet file"),
    (wrong_type, r"step0000000.*videos: expected list<.*>, a rollout's, came int64"),
    (one_null, r"48 rollouts without `completion`|24 rollouts without `completion`"),
    (no_rollouts, r"rollouts: expected a folder with the rollouts of a GRPO run.*no parquet file is in it"),
    (empty_file, r"No rollouts in "),
    (other_template, rf"rollouts: made with .* hash 0123456789abcdef; .*'tiny' has the hash {TEMPLATE.hash}"),
    (two_policies, r"several policies .*give `tokenizer`"),
    (no_tokenizer, r"No tokenizer in '.*absent', the rollouts' policy"),
    (settings(judge="model"), r"judge: expected one of rules, server, local, or module:function; got 'model'"),
    (settings(judge="server"), r"judge_url: expected a URL, for judge: server"),
    (settings(judge="local"), r"judge_model: expected a name, for judge: local"),
    (settings(push_to_hub=True), r"hub_pairs_id: expected a name, for push_to_hub"),
    (settings(rollouts=["outputs/absent"]), r"outputs/absent: expected a folder with the rollouts.*no such folder"),
    (settings(judge="server", judge_url="http://127.0.0.1:1", judge_model="x", judge_request_options="{max: 1"),
     r"judge_request_options: expected JSON like .*; got '{max: 1'"),
    (settings(judge_request_options="[1]"), r"judge_request_options: expected JSON like .*; got \[1\]"),
    (settings(judge="local", judge_model="x", judge_request_options={"max_tokens": 9, "dtype": "auto"}),
     r"judge_model 'x', judge_request_options .*: cannot be loaded: .*unexpected keyword argument 'max_tokens'"),
    (settings(judge="local", judge_model="x", judge_request_options={"device": "gpu"}), r"be loaded: .*device type"),
    (settings(judge="local", judge_model="x", judge_request_options={"batch_size": 0}), r"expected 1 or more, got 0"),
    (settings(judge="absent_module:judge"), r"judge: absent_module:judge cannot be imported"),
    (cache_is_another_file, r"rollouts/.*expected a cache of verdicts"),
    (settings(judge="local", judge_model="x", judge_prompt="absent"), r"absent.yaml: expected a YAML file.*No such"),
    (settings(kinds=["length"]), r"kinds: expected some of .*got \['length'\]"),
    (settings(max_repetitions=3), r"unknown key 'max_repetitions' \(close: max_repetition"),
    (settings(drop_solved_share=80), r"drop_solved_share: expected a share"),
    (settings(limit=0), r"limit: expected 1 or more"),
    (settings(rollouts=[]), r"rollouts: expected a list of folders"),
    (settings(rollouts_revision="main"), r"rollouts_revision: expected one Hub dataset as `rollouts`"),
    (settings(accuracy_reward="mse"), r"accuracy_reward: expected one of accuracy, .*or module:function; got 'mse'"),
    (settings(accuracy_reward="format"), r"accuracy_reward: expected one of accuracy, .*; got 'format'"),
    (settings(accuracy_reward="exponential_error"), r"accuracy_reward: expected one of accuracy, .*yes_no_first"),
    (settings(reward_kwargs={"accuracy_soft": {}}), r"reward_kwargs: accuracy_soft: not among rewards \(accuracy\)"),
    (settings(judge_concurrency=0), r"judge_concurrency: expected 1 or more; got 0"),
    (settings(judge_timeout_s=0), r"judge_timeout_s: expected more than 0; got 0"),
    (settings(judge_retries=-1), r"judge_retries: expected 0 or more; got -1"),
    (settings(judge="local", judge_model="x", judge_prompt="my/consistency.yaml"), r"my/consistency.yaml.*No such"),
]  # fmt: skip


def test_the_runs_accuracy_with_its_options():
    arguments = VerifyArguments(
        output_dir="x", rollouts=["x"], accuracy_reward="accuracy_absolute_range",
        reward_kwargs='{"accuracy_absolute_range": {"max_range": 1}}',
    )  # fmt: skip
    assert arguments.reward()(["<answer>.3</answer>"], [".5"], ["regression"]) == [pytest.approx(0.8)]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[make.__name__ for make, _ in REFUSED])
def test_refused(recipe, tmp_path, policy, make, message):
    changes = make(tmp_path, policy) or {}
    finished = tmp_path / "outputs" / "verify"
    finished.mkdir(parents=True)
    (finished / "results.json").write_text("{}")
    with pytest.raises(VeripoError, match=f"(?s){message}"):
        recipe.main(config(tmp_path, **changes))
    assert [path.name for path in (tmp_path / "outputs").glob("[!.]*")] == ["verify"]  # not moved aside


def test_one_id_for_two_questions_ends_in_one_line(recipe, tmp_path, policy):
    make_rollouts(tmp_path / "rollouts", policy, run="one")
    make_rollouts(tmp_path / "more", policy, run="two", problem="Which colour is last?")
    with pytest.raises(VeripoError, match=r"have the question id '\w+-0', but differ in problem"):
        recipe.main(config(tmp_path, rollouts=[str(tmp_path / "rollouts"), str(tmp_path / "more")]))


def test_options_of_a_local_judge_arrive(monkeypatch):
    given = {}

    class Judge:
        def __init__(self, model, prompt, **options):
            given[model] = options

    monkeypatch.setattr("veripo_trl.verifier.local_judge.LocalJudge", Judge)
    for options in (None, '{"batch_size": 2, "dtype": "bfloat16"}'):
        make_judge(VerifyArguments(output_dir="x", rollouts=["x"], judge="local", judge_model=str(options),
                                   judge_request_options=options))  # fmt: skip
    assert list(given.values()) == [{}, {"batch_size": 2, "dtype": "bfloat16"}]


# ---- of the user's own ------------------------------------------------------------------------------------------


def test_a_judge_and_a_reward_of_the_users_own(recipe, tmp_path, policy, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    make_rollouts(tmp_path / "rollouts", policy)
    (tmp_path / "my_judges.py").write_text(documented("own judge"))
    (tmp_path / "my_accuracy.py").write_text(
        "def not_a(completions, **kwargs):\n    return [float('<answer>A' not in c[0]['content']) for c in completions]\n"
    )
    recipe.main(config(tmp_path, judge="my_judges:last_word", accuracy_reward="my_accuracy:not_a"))
    verdicts = read(tmp_path / "outputs" / "verify" / "verdicts")
    assert {verdict["judge"] for verdict in verdicts} == {"my_judges:last_word"}
    says = [say for step in range(2) for question in SAYS.values() for say in question]
    assert [verdict["accuracy"] for verdict in verdicts] == [float(answer != "A") for answer, _ in says]
    expected = ["consistent" if answer == concluded else "inconsistent" for answer, concluded in says]
    assert [verdict["consistency"] for verdict in verdicts] == expected
    assert "Judged by my_judges:last_word, asked 48 times." in capsys.readouterr().out
    (tmp_path / "my_broken_judge.py").write_text("async def judge(item):\n    return {'consistency': 'yes'}\n")
    with pytest.raises(VeripoError, match="judge my_broken_judge:judge: expected a dict of .* came {'consistency'"):
        recipe.main(config(tmp_path, judge="my_broken_judge:judge"))
    (tmp_path / "my_numbers.py").write_text(
        "async def judge(item):\n    return {'consistency': 'unknown', 'concluded_answer': 4, 'reason': ''}\n\n"
        "def of_prompts(prompts, completions, **kwargs):\n    return [1.0]\n\ndef plain(item):\n    return {}\n"
    )
    with pytest.raises(VeripoError, match="judge my_numbers:plain: expected a coroutine, `async def`"):
        recipe.main(config(tmp_path, judge="my_numbers:plain"))
    with pytest.raises(VeripoError, match="judge my_numbers:judge: expected a dict of texts.*'concluded_answer': 4"):
        recipe.main(config(tmp_path, judge="my_numbers:judge"))
    with pytest.raises(VeripoError, match="rollout .*of_prompts.*'prompts'.*no `prompts` and no `completion_ids`"):
        recipe.main(config(tmp_path, accuracy_reward="my_numbers:of_prompts"))


def test_another_accuracy_than_the_runs_is_said(tmp_path, capsys):
    """The verifier's default would score a run's rollouts otherwise than the run did, unseen."""
    for name, reward in (("soft", "accuracy_soft_reward"), ("plain", "accuracy_reward"), ("spans", "tiou_reward")):
        store = RolloutStore(tmp_path / name)
        store.write([], step=0, part=0, rank=0, reward_names=[reward, "format_reward"])
        for accuracy in ("accuracy", "accuracy_soft"):
            arguments = VerifyArguments(output_dir="x", rollouts=["x"], accuracy_reward=accuracy)
            say_other_accuracy(arguments, store.files())
            said = capsys.readouterr().out
            own = {"soft": "accuracy_soft", "plain": "accuracy"}.get(name, accuracy)
            assert (f"trained with {own}; what is right is told by {accuracy}_reward" in said) is (own != accuracy)


def test_prompts_of_the_users_own(recipe, tmp_path, policy, monkeypatch):
    """A judge's prompt and a prompt template, as files seen from the working directory."""
    monkeypatch.chdir(tmp_path)
    shipped = (RECIPE.parent.parent / "verifier_prompts" / "consistency.yaml").read_text()
    (tmp_path / "my_prompt.yaml").write_text(shipped.replace("You check one thing", "You check just one thing"))
    template = RECIPE.parent.parent / "src" / "veripo_trl" / "data" / "prompt_templates" / "tiny.yaml"
    shutil.copy(template, tmp_path / "my_template.yaml")
    make_rollouts(tmp_path / "rollouts", policy, steps=1)
    with JudgeServer() as server:
        own = ["--judge_prompt", "my_prompt.yaml", "--prompt_template", "my_template.yaml"]
        recipe.main([*served(tmp_path, server, "own"), *own])
        asked = {entry["body"]["messages"][0]["content"][:24] for entry in server.log}
    assert asked == {"You check just one thing"}
    assert len(read(tmp_path / "own" / "verify" / "pairs")) == 4


# ---- files --------------------------------------------------------------------------------------------------------


def test_questions_come_in_a_seeded_order_with_their_verdicts(tmp_path, policy):
    """So that the first n pairs, a reader's `limit`, are a fair sample of the questions."""
    store = make_rollouts(tmp_path / "rollouts", policy, copies=9, steps=3)
    orders = []
    for found, seed in ((store.files(), 0), (store.files()[::-1], 0), (store.files(), 1)):
        rollouts = files.read_rollouts(found)
        verdicts = ({"rollout_id": r["rollout_id"], "question_id": r["question_id"]} for r in files.rows_of(rollouts))
        assert files.write_files(verdicts, tmp_path / "verdicts", files.VERDICT_SCHEMA, rows_per_file=300) == 648
        groups = list(files.judged_questions(rollouts, files.read_files(tmp_path / "verdicts"), seed=seed))
        assert len(groups) == 27 and all(len(group) == 24 for group in groups)
        assert all(r["verdict"]["rollout_id"] == r["rollout_id"] for group in groups for r in group)
        orders.append([group[0]["question_id"] for group in groups])
    assert orders[0] == orders[1] != orders[2]
    assert len({name.split("-")[0] for name in orders[0][:9]}) == 3  # not in the order of ids


def test_files_that_another_library_wrote(tmp_path, policy):
    """As after a round trip through the Hub: large strings, other column order, null for an empty list."""
    store = make_rollouts(tmp_path / "rollouts", policy, steps=1)
    table = pq.read_table(store.files()[0]).drop_columns(["images", "rewards"])
    table = table.cast(pa.schema([pa.field(f.name, pa.large_string() if f.type == pa.string() else f.type)
                                  for f in table.schema]))  # fmt: skip
    table = table.append_column("images", pa.array([None] * len(table), pa.list_(pa.string())))
    pq.write_table(table.select(sorted(table.column_names)), tmp_path / "table.parquet")
    assert files.read_rollouts([tmp_path / "table.parquet"]).to_pylist() == files.read_rollouts(store.files()).to_pylist()


def test_text_for_the_screen():
    assert shown("a\x1b[31m\nb\u202e") == "a�[31m b�"
    assert shown("x" * 1000, limit=10) == "xxxxx … xxxxx"


@pytest.mark.parametrize("what", ["rollouts", "pairs"])
def test_a_flipped_bit_is_never_used(recipe, tmp_path, policy, what):
    store = make_rollouts(tmp_path / "rollouts", policy, steps=1)
    recipe.main(config(tmp_path))
    folder = tmp_path / "outputs" / "verify" / "pairs"
    file = store.files()[0] if what == "rollouts" else folder / "pairs-00000.parquet"

    def read_all():
        if what == "rollouts":
            return files.read_rollouts(store.files()).to_pylist()
        return load_pairs([{"path": str(folder), "media_root": str(tmp_path)}], template=TEMPLATE)[0][:]

    content, right, flip, refused = file.read_bytes(), read_all(), random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(content)
        damaged[flip.randrange(len(content))] ^= 1 << flip.randrange(8)
        file.write_bytes(damaged)
        try:
            assert read_all() == right
        except (VeripoError, files.RolloutFilesError, RowError) as error:
            assert file.name in str(error)
            refused += 1
    assert refused > 25


def test_a_full_disk_and_the_same_command_again(recipe, tmp_path, policy, monkeypatch):
    make_rollouts(tmp_path / "rollouts", policy, copies=9)
    folder = tmp_path / "outputs" / "verify"
    with files_of_at_most(100_000), pytest.raises(OSError, match="File too large"):
        recipe.main(config(tmp_path))
    assert not folder.exists()
    # The copy of the rollouts is larger than what is written.
    monkeypatch.setattr(files, "_mapped", lambda tables, *_: pa.concat_tables(tables))
    for at_most, name in ((6_000, "verdicts-00000.parquet"), (12_000, "pairs-00000.parquet")):
        said = rf"^{folder}[/\w]*: File too large: {name} needs"
        with files_of_at_most(at_most), pytest.raises(VeripoError, match=said):
            recipe.main(config(tmp_path))
        assert not list(folder.rglob(".*")) and not (folder / "results.json").exists()
    recipe.main(config(tmp_path))
    recipe.main(config(tmp_path, output_dir=str(tmp_path / "unbroken")))
    for name in ("verdicts/verdicts-00000.parquet", "pairs/pairs-00000.parquet", "solved.json"):
        assert (folder / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


# ---- a judge's server, and SIGKILL ----------------------------------------------------------------------------------


def served(tmp_path, server, name):
    """Settings of a run with its own folder and cache."""
    return config(
        tmp_path,
        judge="server",
        judge_url=server.url,
        judge_model="judge",
        judge_concurrency=4,
        output_dir=str(tmp_path / name / "verify"),
        kinds=["consistency", "penalty", "reflection"],
    )


def test_a_judges_server_is_asked_once(recipe, tmp_path, policy, capsys):
    make_rollouts(tmp_path / "rollouts", policy)
    with JudgeServer() as server:
        recipe.main(served(tmp_path, server, "first"))
        asked = server.requests
        assert 0 < asked <= 48
        recipe.main(served(tmp_path, server, "first"))  # the folder is moved aside, the cache stays
        assert server.requests == asked
    results = json.loads((tmp_path / "first" / "verify" / "results.json").read_text())
    assert results["judge"]["requests"] == 0 and results["judge"]["name"].startswith("server:judge")
    before, after = (read(tmp_path / "first" / name / "pairs") for name in ("verify.previous-1", "verify"))
    assert before == after and before
    assert (tmp_path / "first" / "verdict_cache.sqlite").exists()


def test_a_server_that_is_down_is_said_in_one_line(recipe, tmp_path, policy):
    make_rollouts(tmp_path / "rollouts", policy)
    with JudgeServer() as server:
        arguments = served(tmp_path, server, "down")
    with pytest.raises(VeripoError, match="same command"):
        recipe.main([*arguments, "--judge_retries", "0"])
    assert not (tmp_path / "down" / "verify" / "results.json").exists()


@pytest.mark.slow
def test_killed_and_started_again(recipe, tmp_path, policy):
    """Killed among the verdicts, again when it has pairs, and then left alone: the pairs of an unbroken run."""
    make_rollouts(tmp_path / "rollouts", policy, copies=8)
    folder, log = tmp_path / "broken" / "verify", tmp_path / "log"
    with JudgeServer(lambda number, body: Reply(delay_s=0.01)) as server:
        arguments = served(tmp_path, server, "broken")

        def kill_when(reached) -> None:
            with open(log, "w") as output:
                process = subprocess.Popen([sys.executable, str(RECIPE), *arguments], stdout=output, stderr=output)
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline and not reached():
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, log.read_text()
            assert not (folder / "results.json").exists()

        kill_when(lambda: server.requests > 100)
        assert server.requests < 300
        kill_when(lambda: any(folder.glob("pairs/*")))
        recipe.main(arguments)
        total = server.requests
        recipe.main(served(tmp_path, server, "whole"))
        unbroken = server.requests - total
    # Asked again is what the kill found in flight (4) or answered and not yet taken up: twice judge_concurrency at most.
    assert total <= unbroken + 2 * 4
    whole = tmp_path / "whole" / "verify"
    for name in ("pairs/pairs-00000.parquet", "verdicts/verdicts-00000.parquet", "solved.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert len(read(folder / "pairs")) == 32


# ---- what DPO is given ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kinds": ["penalties"]}, r"`kinds`: expected a list of some of consistency, penalty, reflection, video; came"),
        ({"kinds": "penalty"}, r"`kinds`: expected a list"),
        ({"kinds": []}, r"`kinds`: expected a list"),
        ({"path": "outputs/absent"}, r"outputs/absent: expected a folder of parquet files"),  # not asked of the Hub
        ({"revision": "main"}, r"`revision` is for Hub datasets"),
    ],
)
def test_pairs_that_cannot_be_read(source, message, tmp_path):
    with pytest.raises(RowError, match=message):
        load_pairs([{"path": str(tmp_path), **source}], template=TEMPLATE)


def test_every_process_reads_the_pairs_of_one_commit(recipe, tmp_path, policy, monkeypatch):
    """The branch moves after the main process has looked, and before another reads."""
    make_rollouts(tmp_path / "rollouts", "org/policy")
    recipe.main(config(tmp_path, tokenizer=str(policy)))
    folder, sources = tmp_path / "outputs" / "verify" / "pairs", [{"path": "tester/pairs", "media_root": str(tmp_path)}]
    with HubServer() as hub:
        hub.use_in_this_process(monkeypatch, tmp_path / "hf_home")
        push_folder(folder, "tester/pairs", repo_type="dataset", card="---\ntags: veripo_trl\n---\n")
        said = []
        monkeypatch.setattr(pair_dataset, "broadcast_object_list", lambda found: said.append(*found) or found)
        main, main_inputs = load_pairs(sources, template=TEMPLATE)
        rows = read(folder)
        files.write_files(rows[:1], folder, files.PAIR_SCHEMA)
        push_folder(folder, "tester/pairs", repo_type="dataset", card="---\ntags: veripo_trl\n---\n")
        monkeypatch.setattr(pair_dataset, "PartialState", lambda: SimpleNamespace(is_main_process=False))
        monkeypatch.setattr(pair_dataset, "broadcast_object_list", lambda found: said[:] if found == [None] else found)
        other, other_inputs = load_pairs(sources, template=TEMPLATE)
    assert len(main) == len(other) == len(rows) > 1
    assert main_inputs == other_inputs == {"tester/pairs": said[0]}


# ---- the Hub --------------------------------------------------------------------------------------------------------

HUB_RUN = """
import sys
from veripo_trl.hub.push import push_folder
push_folder(sys.argv[1], "tester/rollouts", repo_type="dataset", card="x", path_in_repo="rollouts")
sys.path.insert(0, sys.argv[2])
import verify_rollouts
verify_rollouts.main(sys.argv[3:])
"""

# In another process: what others do with what was pushed.
HUB_READ = """
import json
from datasets import disable_progress_bars, load_dataset
disable_progress_bars()
print(json.dumps([load_dataset(f"tester/{kind}", split="train")["question_id"][:] for kind in ("pairs", "verdicts")]))
"""


def test_cards_name_the_rollouts_that_a_stage_has_pushed(recipe, tmp_path, policy):
    make_rollouts(tmp_path / "grpo" / "rollouts", policy)
    origin = {"repo_id": "tester/rollouts", "revision": "a" * 40}
    for pushed, expected in (({"rollouts": {**origin, "url": "x"}}, origin), ({"model": {}}, None), (None, None)):
        (tmp_path / "grpo" / "results.json").write_text(json.dumps({"hub": pushed}))
        for name in (str(tmp_path / "grpo" / "rollouts"), str(tmp_path / "grpo")):
            recipe.main(config(tmp_path, rollouts=[name]))
            results = json.loads((tmp_path / "outputs" / "verify" / "results.json").read_text())
            assert results["inputs"] == ({name: expected} if expected else {})
            card = dataset_card("pairs", repo_id="x/y", **card_facts("pairs", results))
            assert ("tester/rollouts at `aaaa" in card) == bool(expected) and str(tmp_path) not in card


def test_pairs_and_verdicts_are_two_datasets(recipe, tmp_path, policy, monkeypatch):
    make_rollouts(tmp_path / "rollouts", policy)
    with HubServer() as hub:
        hub.use_in_this_process(monkeypatch, tmp_path / "hf_home")
        with pytest.raises(VeripoError, match="expected two datasets, both are 'tester/x'"):
            recipe.main(config(tmp_path, push_to_hub=True, hub_pairs_id="tester/x", hub_verdicts_id="tester/X"))


@pytest.mark.slow
def test_from_the_hub_and_back(tmp_path, policy):
    """Rollouts of a Hub dataset in, verdicts and pairs on the Hub; a commit that fails on the way is made again."""
    make_rollouts(tmp_path / "rollouts", "org/policy", copies=2)
    arguments = config(tmp_path, rollouts=["tester/rollouts"], tokenizer=str(policy), push_to_hub=True,
                       hub_pairs_id="tester/pairs", hub_verdicts_id="tester/verdicts", hub_license="mit")  # fmt: skip
    with HubServer() as hub:
        env = {**os.environ, **hub.environment(tmp_path / "hf_home")}
        command = [sys.executable, "-c", HUB_RUN, str(tmp_path / "rollouts"), str(RECIPE.parent), *arguments]
        hub.fail("commit", status=500)
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "outputs" / "verify"
        results = json.loads((folder / "results.json").read_text())
        assert results["inputs"]["tester/rollouts"]["revision"] == hub.repos["datasets/tester/rollouts"].find("main")
        for kind in ("verdicts", "pairs"):
            repo = f"datasets/tester/{kind}"
            stored = hub.files(repo)
            place = "pairs/" if kind == "pairs" else ""
            assert stored[f"{place}{kind}-00000.parquet"] == (folder / kind / f"{kind}-00000.parquet").read_bytes()
            assert "license: mit" in stored["README.md"].decode()
            assert results["hub"][kind]["revision"] == hub.repos[repo].find("main") and hub.repos[repo].private
            card = stored["README.md"].decode()
            assert results["inputs"]["tester/rollouts"]["revision"] in card and "rules" in card and "org/policy" in card
            assert str(tmp_path) not in card and hub.commits(repo) == 1
        assert hub.files("datasets/tester/pairs")["solved.json"] == (folder / "solved.json").read_bytes()
        done = subprocess.run([sys.executable, "-c", HUB_READ, str(policy)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        written = [[row["question_id"] for row in read(folder / kind)] for kind in ("pairs", "verdicts")]
        assert json.loads(done.stdout) == written
        assert hub.token not in done.stdout + done.stderr
