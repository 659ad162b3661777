"""Pushing, verifying, fetching and cards, against a Hub on a socket with the real clients."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trl
import yaml
from helpers import make_rollouts, push_rollouts
from hub_server import HubServer, Repo
from peft import LoraConfig

from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.hub import ask
from veripo_trl.hub.ask import HubError
from veripo_trl.hub.cards import dataset_card, rollout_counts, shown_name
from veripo_trl.hub.locate import fetch, is_local, locate
from veripo_trl.hub.push import prepare_repo, push_folder
from veripo_trl.hub.runs import push_model, run_card
from veripo_trl.model.policy import LANGUAGE_MODEL_LINEAR, load_policy, save_settings

SOURCE = {"repo_id": "tester/questions", "revision": "a" * 40}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer(page_size=2) as server:
        server.use_in_this_process(monkeypatch, tmp_path / "hf_home")
        monkeypatch.setattr(ask, "RETRY_WAITS_S", (0.01,) * 3)
        yield server


def arrived(hub, repo: str = "datasets/tester/rollouts", branch: str = "main") -> list[str]:
    return sorted(set(hub.files(repo, branch)) - {".gitattributes"})


def test_rollouts_go_to_a_private_dataset_and_come_back(hub, tmp_path):
    store = make_rollouts(tmp_path)
    pushed = push_rollouts(store)
    assert hub.repos["datasets/tester/rollouts"].private
    assert arrived(hub) == ["README.md", *(f"rollouts/{file.name}" for file in store.files())]
    sha = hub.repos["datasets/tester/rollouts"].branches["main"]
    found = locate("tester/rollouts", "dataset")
    assert found == {"repo_id": "tester/rollouts", "revision": sha}
    assert pushed == found | {"url": f"{hub.url}/datasets/tester/rollouts"}
    assert RolloutStore(fetch(**found) / "rollouts").read() == store.read()
    rows = datasets.load_dataset("tester/rollouts", split="train", revision=sha)
    assert len(rows) == 8 and rows[0]["rewards"] == {"accuracy_reward": 1.0} and rows[0]["videos"] == ["clips/1.mp4"]


def test_a_second_push_sends_nothing_and_a_revision_stays_what_it_was(hub, tmp_path):
    store = make_rollouts(tmp_path)
    first = push_rollouts(store)
    sent = len(hub.requests("put"))
    assert push_rollouts(store) == first
    assert hub.commits("datasets/tester/rollouts") == 1 and len(hub.requests("put")) == sent
    make_rollouts(tmp_path, files=3)  # as after a run of more steps: one new file, a new card
    second = push_rollouts(store)
    assert len(hub.requests("put")) == sent + 1
    for pushed, rows in ((first, 8), (second, 12)):
        assert len(RolloutStore(fetch("tester/rollouts", pushed["revision"]) / "rollouts").read()) == rows


def test_files_of_an_earlier_run_leave_the_newest_revision(hub, tmp_path):
    push_rollouts(make_rollouts(tmp_path / "long", files=3))
    shorter = make_rollouts(tmp_path / "short", files=1)
    push_rollouts(shorter)
    held = hub.files("datasets/tester/rollouts")
    assert sorted(held) == [".gitattributes", "README.md", f"rollouts/{shorter.files()[0].name}"]


def test_only_what_is_meant_is_sent(hub, tmp_path):
    store = make_rollouts(tmp_path)
    for name in ("_arguments.json", "training_args.bin", "notes.txt", ".hidden.parquet", "_x.parquet", "x.parquet.tmp-1"):
        (store.folder / name).write_text("secret")
    (store.folder / "set_aside" / "001").mkdir(parents=True)
    pq.write_table(pa.table({"x": [1]}), store.folder / "set_aside" / "001" / "r.parquet")
    push_rollouts(store)
    assert arrived(hub) == ["README.md", *(f"rollouts/{file.name}" for file in store.files())]
    push_folder(store.folder, "tester/all", repo_type="dataset", card="# x\n", patterns=["**/*"])
    every = arrived(hub, "datasets/tester/all")
    assert {"notes.txt", "set_aside/001/r.parquet"} < set(every)
    assert not [name for name in every if name.startswith(("_", ".")) or name.endswith(".bin")]


@pytest.mark.parametrize(
    "changes",
    [
        {"videos": ["/data/clips/1.mp4"]},
        {"images": ["~/1.png"]},
        {"videos": ["a.mp4", "C:\\clips\\1.mp4"]},
        {"videos": ["file:///data/1.mp4"]},
        {"policy": "/data/models/sft"},
        {"policy": "../../scratch/alice/sft"},
        {"policy": "outputs/../../sft"},
    ],
)
def test_a_path_of_this_machine_is_not_pushed(hub, tmp_path, changes):
    with pytest.raises(HubError, match="Nothing was pushed") as caught:
        push_rollouts(make_rollouts(tmp_path, **changes))
    assert next(iter(changes)) in str(caught.value) and hub.repos == {}


def test_nothing_to_push_is_an_error(hub, tmp_path):
    (tmp_path / "x.parquet").write_text("not parquet")
    with pytest.raises(HubError, match="x.parquet: not a readable Parquet file .*Nothing was pushed"):
        push_folder(tmp_path, "tester/x", repo_type="dataset", card="# x\n")
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(HubError, match=r"no file matches \*.parquet"):
        push_folder(tmp_path, "tester/x", repo_type="dataset", card="# x\n")


def test_what_is_meant_to_be_private_does_not_go_to_a_public_repository(hub, tmp_path):
    push_rollouts(make_rollouts(tmp_path), "tester/open", private=False)
    assert not hub.repos["datasets/tester/open"].private
    longer = make_rollouts(tmp_path, files=3)
    sent = len(hub.requests("put"))
    for branch in ("main", "new"):
        with pytest.raises(HubError, match="tester/open.* is public.*hub_private_repo: false.*hub_private: false"):
            push_rollouts(longer, "tester/open", branch=branch)
        with pytest.raises(HubError, match="^tester/open.* is public.*nothing was sent"):
            prepare_repo("tester/open", repo_type="dataset", private=True, branch=branch)
    assert len(hub.requests("put")) == sent and hub.commits("datasets/tester/open") == 1
    assert list(hub.repos["datasets/tester/open"].branches) == ["main"]
    push_rollouts(longer, "tester/open", private=False)
    assert hub.commits("datasets/tester/open") == 2


FOREIGN = {
    "data without a card": ({"data/train.parquet": b"mine", "a.parquet": b"mine"}, r"a\.parquet, data/train\.parquet"),
    "a card without the tag": ({"README.md": b"---\ntags: [veripo, 5]\n---\n# Mine\n", "a.parquet": b"x"}, "a.parquet"),
    "the tag below the header": ({"README.md": b"# Mine\n---\ntags: [veripo_trl]\n---\n", "a.txt": b"x"}, "a.txt"),
    "a header that cannot be read": ({"README.md": b"---\ntags: [\n---\n", "a.txt": b"x"}, "a.txt"),
    "a written card alone": ({"README.md": b"# My plans\n"}, "README.md"),
    "many files": ({f"{n}.bin": b"x" for n in range(9)}, r"4\.bin and 4 more"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_repository_that_is_not_ours_is_left_alone(name, hub, tmp_path):
    files, message = FOREIGN[name]
    store, key = make_rollouts(tmp_path), "datasets/tester/theirs"
    hub.repos[key] = Repo(private=True)
    hub.repos[key].add("main", "by hand", {".gitattributes": b"x", **files})
    held = dict(hub.files(key))
    for branch in ("main", "new"):
        with pytest.raises(HubError, match=f"tester/theirs.*veripo_trl.*{message}.*Nothing was sent. Give another id"):
            push_folder(store.folder, "tester/theirs", repo_type="dataset", card="# x\n", branch=branch)
        with pytest.raises(HubError, match="^tester/theirs.*Nothing was sent"):
            prepare_repo("tester/theirs", repo_type="dataset", private=True, branch=branch)
    assert hub.files(key) == held and list(hub.repos[key].branches) == ["main"] and not hub.requests("put")


def test_a_repository_made_on_the_site_is_as_good_as_empty(hub, tmp_path):
    """The site makes a README.md of a header alone."""
    store, key = make_rollouts(tmp_path, files=3), "datasets/tester/rollouts"
    hub.repos[key] = Repo(private=True)
    hub.repos[key].add("main", "by hand", {".gitattributes": b"x", "README.md": b"---\r\nlicense: mit\r\n---\r\n"})
    push_rollouts(store)
    store.files()[-1].unlink()
    hub.fail("resolve", status=503)
    push_rollouts(store)
    assert len([file for file in hub.files(key) if file.endswith(".parquet")]) == 2


def test_a_name_without_owner_and_a_branch(hub, tmp_path):
    pushed = push_rollouts(make_rollouts(tmp_path), "mine", branch="second")
    assert pushed["repo_id"] == "tester/mine"
    assert hub.repos["datasets/tester/mine"].branches["second"] == pushed["revision"]
    assert "README.md" not in hub.files("datasets/tester/mine", "main")


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("outputs/tiny_sft", True),
        ("./model", True),
        ("../model", True),
        ("/data/model", True),
        ("~/model", True),
        ("a/b/c", True),
        ("models/", True),
        ("with space/model", True),
        ("verify/solved.json", True),
        ("rows/train.jsonl.gz", True),
        ("gpt2", True),
        ("", True),
        ("tester/here", True),
        ("Qwen/Qwen2.5-VL-3B-Instruct", False),
    ],
)
def test_names_that_can_only_be_here(name, local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tester" / "here").mkdir(parents=True)
    assert is_local(name) is local


def test_names_on_the_hub_at_their_commits(hub, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    store = make_rollouts(tmp_path)
    assert locate("rollouts", "dataset") is None and locate("./somewhere/else", "dataset") is None
    sha = push_rollouts(store)["revision"]
    wanted = {"repo_id": "tester/rollouts", "revision": sha}
    assert locate("tester/rollouts", "dataset") == locate("tester/rollouts", "dataset", sha) == wanted
    with pytest.raises(HubError, match="'none'.*Correct the name or the revision"):
        locate("tester/rollouts", "dataset", "none")
    with pytest.raises(HubError, match="tester/nothing"):
        locate("tester/nothing", "dataset")
    with pytest.raises(HubError, match="tester/nothing"):
        fetch("tester/nothing", sha)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        locate("tester/rollouts", "dataset")
    refs = tmp_path / "hf_home" / "hub" / "datasets--tester--rollouts" / "refs"
    refs.mkdir(parents=True, exist_ok=True)
    (refs / "main").write_text(sha)
    assert locate("tester/rollouts", "dataset") == wanted and "as cached" in caplog.text


def test_models_and_adapters_load_by_revision(hub, tmp_path, model_paths):
    def push(folder, name: str, **results) -> str:
        args = SimpleNamespace(hub_model_id=f"tester/{name}", hub_private_repo=None, hub_revision=None)
        return push_model(folder, args, {"stage": "GRPO", "steps": 1, **results})["revision"]

    base = push(model_paths["qwen2_5_vl"], "base", model="Qwen/Qwen2.5-VL-3B-Instruct")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files("models/tester/base"))
    lora = LoraConfig(target_modules=LANGUAGE_MODEL_LINEAR, init_lora_weights=False)
    model, _ = load_policy("tester/base", revision=base, lora=lora)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load_policy("tester/adapter", revision=push(tmp_path / "adapter", "adapter"))
    mine, other = model.state_dict(), again.state_dict()
    assert mine.keys() == other.keys() and all(mine[name].equal(other[name]) for name in mine)
    card = hub.files("models/tester/adapter")["README.md"].decode()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "peft" and header["base_model"] == "tester/base" and base in card


@pytest.mark.parametrize("kind", ["rollouts", "verdicts", "pairs"])
def test_dataset_cards_say_what_happened(kind):
    card = dataset_card(
        kind, repo_id="me/x", counts={"rollouts": 1234, "a | b": 0.25}, data_files=f"{kind}/*.parquet",
        inputs={"questions": SOURCE, "media": "/data/secret/clips"}, policy="/data/secret/sft",
        judge="server:qwen", prompt_version="3f2a", license="cc-by-4.0",
    )  # fmt: skip
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "cc-by-4.0" and kind in header["tags"]
    assert header["configs"][0]["data_files"] == [{"split": "train", "path": f"{kind}/*.parquet"}]
    for text in ("2505.19000", "1,234", "a \\| b", "server:qwen", "3f2a", "tester/questions", "a" * 40, "| clips |"):
        assert text in card
    assert "/data/secret" not in card and "veripo_trl" in header["tags"]
    assert "run started from" in card or kind == "verdicts"
    assert "| Policy that the GRPO run started from | sft |" in card and "that sampled it" not in card


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("outputs/sft", "outputs/sft"),
        ("outputs/../models/sft", "outputs/../models/sft"),
        ("/data/secret/sft/", "sft"),
        ("../../scratch/alice/sft", "sft"),
        ("outputs/../../alice/sft", "sft"),
        ("~/sft", "sft"),
        ("~alice/sft", "sft"),
    ],
)
def test_names_that_others_see(given, shown):
    assert shown_name(given) == shown


@pytest.mark.parametrize(("adapter", "library"), [(True, "peft"), (False, "transformers")])
@pytest.mark.parametrize("base_on_hub", [True, False])
def test_model_cards_name_adapter_and_base(adapter, library, base_on_hub, tmp_path):
    base, revision = ("Qwen/Qwen2.5-VL-3B-Instruct", "b" * 40) if base_on_hub else ("/data/secret/base", None)
    results = {"stage": "DPO", "steps": 7, "model": base, "inputs": {"pairs": SOURCE}}
    if adapter:
        config = {"base_model_name_or_path": base, "revision": revision}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    elif base_on_hub:
        results["inputs"]["model"] = {"repo_id": base, "revision": revision}
    card = run_card(tmp_path, results, repo_id="me/x", license="unknown")
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == library and header["license"] == "unknown" and "dpo" in header["tags"]
    assert header.get("base_model") == (base if base_on_hub else None)
    for text in ("DPO on preference pairs", revision or "base (a local f", "| optimizer steps | 7 |", "tester/questions"):
        assert text in card
    assert "/data/secret" not in card


def test_a_policy_s_card_tells_what_it_reached_and_how_to_ask_it(load, model_paths, media_root, tmp_path, monkeypatch):
    """On a policy in a folder, and by its own snippet; shares that cannot be told are no numbers."""
    model, encoder = load()
    folder = tmp_path / "policy"
    shutil.copytree(model_paths["qwen2_5_vl"], folder)
    save_settings(folder, encoder, model)
    (folder / "curves.png").touch()
    groups = {
        "ReportArguments": {"report_judge": "tiny"}, "ModelConfig": {"use_peft": False, "lora_r": 16},
        "VideoGRPOConfig": {"learning_rate": 1e-4, "loss_type": "dapo", "beta": 0.0},
        "GRPOArguments": {"rewards": ["accuracy", "mine|my_rewards:brevity"], "methods": []},
        "DataArguments": {"train_vision_tower": True},
    }  # fmt: skip
    (folder / "_arguments.json").write_text(json.dumps(groups))
    told = {
        "questions": 1450, "accuracy": 0.5, "accuracy_low": 0.4321, "accuracy_high": 0.5678, "inconsistency": math.nan,
        "inconsistency_low": math.nan, "inconsistency_high": math.nan, "unknown": 1.0, "accurate_and_consistent": 0.0,
        "accuracy: numerical": 0.25, "mIoU: temporal grounding": 0.61, "ROUGE: free-form": 0.5,
    }  # fmt: skip
    results = {"stage": "GRPO", "steps": 7, "model": "some/base", "before": None, "after": {"sampled": told}}
    card = run_card(folder, results, repo_id="policy", license="mit")
    for line in (
        "| after | sampled | 1,450 | 50.0% (43.2%–56.8%) | – | 100.0% | 0.0% | "
        "numerical 0.25, mIoU: temporal grounding 0.61, ROUGE: free-form 0.5 |",
        " counts *unknown* as a miss. Free text is in the accuracy by its ROUGE.\n\n",
        "![Curves of the training](curves.png)",
        f"| prompt template | tiny (hash {encoder.template.hash}) |",
        "| fps | 2 |",
        "| max_frames | 24 |",
        "| learning_rate | 0.0001 |",
        "| loss_type | dapo |",
        "| rewards | accuracy, mine\\|my_rewards:brevity |",
        "| train_vision_tower | True |",
        f"trl {trl.__version__}",
        "(`tiny`)",
        "## Limits",
    ):
        assert line in card, line
    assert "lora_r" not in card and "methods" not in card and "base_weights" not in card
    (snippet,) = re.findall(r"```python\n(.+?)```", card, re.S)
    (tmp_path / "clip.mp4").symlink_to(media_root / "fast.mp4")
    names = {}
    monkeypatch.chdir(tmp_path)
    exec(snippet.replace('"right"]', '"right"], decoding={"max_new_tokens": 8}'), names)
    assert names["reply"].completion_tokens == 8  # of an untrained model
    seen = names["chat"].encoder
    assert seen.template.hash == encoder.template.hash and seen.loader.settings == encoder.loader.settings


def test_a_score_of_free_text_alone_is_no_accuracy_on_a_card(tmp_path):
    told = {"questions": 3, "accuracy": 0.5, "ROUGE: free-form": 0.5}
    results = {"stage": "SFT", "steps": 1, "model": "some/base", "after": {"greedy": told}}
    card = run_card(tmp_path, results, repo_id="me/x", license="mit")
    assert "| questions | ROUGE (95%) |" in card and "Free text is in" not in card


def test_cards_without_facts_have_no_empty_parts(tmp_path):
    card = run_card(tmp_path, {"stage": "SFT", "steps": 1, "model": "some/base"}, repo_id="me/x", license="mit")
    for part in ("## Results", "curves.png", "veripo_trl.json", "| setting |", "| origin |"):
        assert part not in card
    assert "It was not evaluated on held-out questions" in card and 'Chat("me/x")' in card


def test_rollout_counts(tmp_path):
    counts, policy = rollout_counts(make_rollouts(tmp_path).files())
    assert counts == {
        "rollouts": 8, "questions": 4, "steps": 2, "cut off at the limit": 1, "rollouts on multiple choice": 8,
        "mean accuracy_reward": 1.0,
    }  # fmt: skip
    assert policy == "outputs/sft"
