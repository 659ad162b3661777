"""Training runs that push, as a user starts them, against a Hub on a socket."""

import json

import datasets
import pytest
import yaml
from conftest import load_script
from hub_server import HubServer

from veripo_trl import errors
from veripo_trl.hub import ask
from veripo_trl.hub.push import push_folder
from veripo_trl.model.policy import load_policy

SECRET = "hf_veryVerySecretToken"
COMMON = {
    "prompt_template": "tiny", "min_frames": 8, "max_frames": 8, "min_pixels": 3136, "max_pixels": 3136,
    "decode_threads": 1, "gradient_checkpointing": False, "dtype": "float32", "bf16": False, "use_cpu": True,
    "dataloader_num_workers": 0, "logging_steps": 1, "report_to": "none", "seed": 0, "max_steps": 2,
    "learning_rate": 1.0e-4, "save_steps": 1, "save_total_limit": 1, "push_to_hub": True,
}  # fmt: skip
SFT = {
    **COMMON, "model_name_or_path": "world/model", "output_dir": "outputs/sft", "hub_model_id": "tester/sft",
    "datasets": [{"path": "world/train.jsonl"}], "per_device_train_batch_size": 2,
}  # fmt: skip
GRPO = {
    **COMMON, "model_name_or_path": "outputs/sft", "output_dir": "outputs/grpo", "hub_model_id": "tester/grpo",
    "datasets": [{"path": "world/rl.jsonl"}], "per_device_train_batch_size": 4, "num_generations": 2,
    "steps_per_generation": 1, "max_completion_length": 6, "rewards": ["accuracy", "format"],
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from veripo_trl.tiny.questions import SplitSize
    from veripo_trl.tiny.world import make_world

    folder = tmp_path_factory.mktemp("world") / "world"
    make_world(folder, sizes={split: SplitSize(clips=8, questions=8) for split in ("train", "rl", "dev", "heldout")})
    return folder


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    (tmp_path / "world").symlink_to(world)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ask, "RETRY_WAITS_S", (0.01,) * 3)
    with HubServer(token=SECRET) as hub:
        hub.use_in_this_process(monkeypatch, tmp_path / "hf_home")
        yield hub, tmp_path


@pytest.fixture
def run(place, capfd, caplog):
    """Run a recipe to its end; the token must not be in what it prints or writes, nor this machine's paths on the Hub."""
    hub, folder = place

    def run(name: str, settings: dict, *, fails: bool = False) -> str:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        recipe = load_script(f"recipes/{name}.py")
        code = errors.run(lambda: recipe.main(["--config", "config.yaml"]))
        said = "".join(capfd.readouterr()) + caplog.text
        caplog.clear()
        assert bool(code) == fails, said[-4000:]
        assert SECRET not in said
        for path in (folder / "outputs").rglob("*"):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
        for repo in hub.repos:
            for file, data in hub.files(repo).items():
                assert SECRET.encode() not in data and str(folder).encode() not in data, (repo, file)
                assert not file.endswith((".bin", ".pt")) and "_arguments" not in file
        return said

    return run


def results(folder, name: str) -> dict:
    return json.loads((folder / "outputs" / name / "results.json").read_text())


@pytest.mark.slow
def test_cold_start_then_search_each_pushed_once(place, run, monkeypatch):
    """SFT pushes a model; GRPO starts from the Hub's revision of it, loses the answer to its commit and every later
    request, and is finished by the same command without training again."""
    hub, folder = place
    hub.fail("commit", status=500)
    hub.fail("commit", drop="after")
    run("sft_video", SFT)
    sft = results(folder, "sft")["hub"]["model"]
    assert hub.commits("models/tester/sft") == 1 and hub.repos["models/tester/sft"].private
    assert sft["revision"] == hub.repos["models/tester/sft"].branches["main"]
    held = hub.files("models/tester/sft")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "curves.png"} <= set(held)
    assert held["model.safetensors"] == (folder / "outputs" / "sft" / "model.safetensors").read_bytes()
    assert "library_name: transformers" in held["README.md"].decode() and "cold start" in held["README.md"].decode()

    settings = {**GRPO, "model_name_or_path": "tester/sft", "use_peft": True, "lora_r": 4}
    for name in ("prompt_template", "min_frames", "max_frames", "min_pixels", "max_pixels"):
        del settings[name]  # as the policy on the Hub was trained
    hub.fail("commit", status=503, times=4)
    said = run("grpo_video", settings, fails=True)
    assert "tester/grpo (model): push not finished" in said and "Start the same command again" in said
    assert "Traceback" not in said and not (folder / "outputs" / "grpo" / "results.json").exists()
    assert hub.commits("models/tester/grpo") == 0

    written = (folder / "outputs" / "grpo" / "adapter_model.safetensors").stat().st_mtime_ns
    said = run("grpo_video", settings)
    assert "outputs/grpo is trained; pushing it" in said
    assert (folder / "outputs" / "grpo" / "adapter_model.safetensors").stat().st_mtime_ns == written
    finished = results(folder, "grpo")
    assert finished["inputs"] == {"model": {"repo_id": "tester/sft", "revision": sft["revision"]}}
    assert hub.commits("models/tester/grpo") == 1 and hub.commits("datasets/tester/grpo-rollouts") == 1
    for name, repo in (("model", "models/tester/grpo"), ("rollouts", "datasets/tester/grpo-rollouts")):
        assert finished["hub"][name]["revision"] == hub.repos[repo].branches["main"]
        assert hub.repos[repo].private
    card = hub.files("models/tester/grpo")["README.md"].decode()
    assert "base_model: tester/sft" in card and sft["revision"] in card and "library_name: peft" in card
    seen = json.loads(hub.files("models/tester/grpo")["veripo_trl.json"])
    assert seen.pop("base_weights") and seen == {key: json.loads(held["veripo_trl.json"])[key] for key in seen}
    assert (seen["prompt_template"]["name"], seen["max_frames"], seen["max_pixels"]) == ("tiny", 8, 3136)
    rollouts = hub.files("datasets/tester/grpo-rollouts")
    assert len([name for name in rollouts if name.endswith(".parquet")]) == 2
    told = rollouts["README.md"].decode()
    assert "| rollouts | 8 |" in told and "| mean accuracy_reward |" in told and "| prompt template | tiny (hash " in told
    leftovers = {path.name for path in (folder / "outputs" / "grpo").iterdir() if path.name.startswith("_")}
    assert leftovers == {"_arguments.json"}

    hub.use_in_this_process(monkeypatch, folder / "another_home")
    load_policy("tester/grpo", revision=finished["hub"]["model"]["revision"])
    assert len(datasets.load_dataset("tester/grpo-rollouts", split="train")) == 8


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_read_at_one_commit(place, run):
    hub, folder = place
    card = "# rows\n"
    pushed = push_folder("world", "tester/rows", repo_type="dataset", card=card, patterns=["train.jsonl"])["revision"]
    run("sft_video", {**SFT, "datasets": [{"path": "tester/rows", "media_root": "world"}]})
    assert hub.commits("models/tester/sft") == 1  # at the end, and not at each save
    assert results(folder, "sft")["inputs"] == {"tester/rows": {"repo_id": "tester/rows", "revision": pushed}}
    held = hub.files("models/tester/sft")
    assert held["model.safetensors"] == (folder / "outputs" / "sft" / "model.safetensors").read_bytes()
    assert pushed in held["README.md"].decode()


@pytest.mark.slow
def test_what_cannot_be_pushed_is_said_before_training(place, run):
    hub, folder = place
    said = run("sft_video", {**SFT, "hub_model_id": "somebody/x"}, fails=True)
    assert "somebody/x (model): the token may not write there" in said
    assert not list((folder / "outputs").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hub_strategy": "checkpoint"}, "hub_strategy: expected end, got checkpoint"),
        ({"hub_strategy": "every_save"}, "hub_strategy"),
        ({"hub_token": SECRET}, "HF_TOKEN"),
    ],
    ids=["last checkpoint", "every save", "token"],
)
def test_what_would_push_pickles_or_write_a_token_down_is_refused(options, message, tmp_path):
    import torch
    from transformers import Trainer

    from veripo_trl.hub.ask import HubError
    from veripo_trl.trainers.checkpoints import CheckpointMixin
    from veripo_trl.trainers.sft import VideoSFTConfig

    class PushingTrainer(CheckpointMixin, Trainer):
        pass

    arguments = VideoSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, push_to_hub=True, **options)
    with pytest.raises(HubError, match=message) as caught:
        PushingTrainer(model=torch.nn.Linear(1, 1), args=arguments)
    assert SECRET not in str(caught.value)
