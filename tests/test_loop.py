"""VerIPO's loop as a user runs it: whole, again, from a stage, broken off by SIGKILL anywhere, with a judge's server."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from hub_server import HubServer
from judge_server import JudgeServer, Reply

from veripo_trl.data.rollouts import RolloutStore
from veripo_trl.files.disk import FileError
from veripo_trl.files.run_folder import last_checkpoint
from veripo_trl.files.secrets import without_secrets
from veripo_trl.tiny.parser import conclude

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
LOOP = str(RECIPES / "veripo.py")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a small world, a policy that knows it by half, and a loop of one iteration over them."""
    from veripo_trl.tiny.questions import SplitSize
    from veripo_trl.tiny.world import make_world

    folder = tmp_path_factory.mktemp("loop")
    sizes = {split: SplitSize(clips=12, questions=16) for split in ("train", "rl", "dev", "heldout")}
    make_world(folder / "outputs" / "tiny_world", sizes=sizes, planted_share=0.4)
    train = {"datasets": [{"path": "outputs/tiny_world/train.jsonl"}], "eval_datasets": [{"path": "held.jsonl"}]}
    lines = (folder / "outputs" / "tiny_world" / "heldout.jsonl").read_text().splitlines()[:4]
    (folder / "held.jsonl").write_text("\n".join(lines) + "\n")
    train["eval_datasets"][0]["media_root"] = "outputs/tiny_world"
    small = {
        "sft": {**train, "max_steps": 110, "stop_at_accuracy": None, "save_strategy": "no", "warmup_steps": 10,
                "per_device_train_batch_size": 16, "eval_datasets": None},
        "grpo": {**train, "max_steps": 4, "save_steps": 1, "save_total_limit": 9, "per_device_train_batch_size": 64,
                 "logging_steps": 1, "report_samples": 1, "cold_start": None, "learning_rate": 1e-5},
        "verify": {},
        "dpo": {"eval_datasets": train["eval_datasets"], "num_train_epochs": 3, "save_steps": 1, "logging_steps": 1,
                "save_total_limit": 99, "per_device_train_batch_size": 4, "report_samples": 1},
    }  # fmt: skip
    for name, changes in small.items():
        config = yaml.safe_load((RECIPES / "configs" / "tiny" / f"{name}.yaml").read_text())
        config.pop("tiny_world", None)  # the shipped size is not needed here
        if name != "verify":
            changes = {**changes, "report_max_new_tokens": 12, "dataloader_num_workers": 0}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**config, **changes}))
    write_loop(folder, "loop.yaml", "outputs/whole")
    command = [sys.executable, str(RECIPES / "sft_video.py"), "--config", "sft.yaml", "--output_dir", "outputs/start"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def write_loop(folder: Path, name: str, output_dir: str, **stages) -> None:
    """A loop of search, verify and align; `stages`: what is added to one of them."""
    iteration = [
        {"name": "search", "recipe": "grpo_video.py", "config": "grpo.yaml",
         "overrides": {"model_name_or_path": "outputs/start"}},
        {"name": "verify", "recipe": "verify_rollouts.py", "config": "verify.yaml", "overrides": {}},
        {"name": "align", "recipe": "dpo_video.py", "config": "dpo.yaml", "overrides": {}},
    ]  # fmt: skip
    for stage in iteration:
        extra = dict(stages.get(stage["name"], {}))
        stage["overrides"] |= extra.pop("overrides", {})
        stage |= extra
    (folder / name).write_text(yaml.safe_dump({"output_dir": output_dir, "iteration": iteration}))


def start(folder, *arguments, env: dict | None = None) -> subprocess.Popen:
    command, env = [sys.executable, LOOP, *arguments], {**os.environ, **(env or {})}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(folder, *arguments, code: int = 0, env: dict | None = None) -> str:
    process = start(folder, *arguments, env=env)
    output, _ = process.communicate(timeout=1500)
    assert process.returncode == code, output[-5000:]
    return output


def kill_when(process: subprocess.Popen, ready, what: str, timeout_s: float = 200, number=signal.SIGKILL) -> str | None:
    """A signal to the loop alone, as the system sends it. Killed, what it started goes on; else its words."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert process.poll() is None, f"ended before {what}:\n{process.stdout.read()[-3000:]}"
        assert time.monotonic() < deadline, f"never came to {what}"
        time.sleep(0.02)
    process.send_signal(number)
    if number != signal.SIGKILL:
        return process.communicate(timeout=timeout_s)[0]
    process.wait()


def state(folder: Path, run_name: str) -> dict[str, dict]:
    content = json.loads((folder / "outputs" / run_name / "run.json").read_text())
    return {entry["name"]: entry for entry in content["stages"]}


def starts(folder: Path, run_name: str, stage: str) -> int:
    """How often a stage was started."""
    log = (folder / "outputs" / run_name / "logs" / f"{stage}.log").read_bytes()
    return len(re.findall(rb"^\$ ", log, re.M))


def pairs_of(folder: Path, run_name: str) -> list[dict]:
    files = sorted((folder / "outputs" / run_name / "verify-1" / "pairs").glob("*.parquet"))
    assert files
    return [pair for file in files for pair in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def whole(workplace):
    """What an unbroken run printed."""
    return run(workplace, "--config", "loop.yaml")


@pytest.mark.slow
def test_the_loop_runs_whole(workplace, whole):
    entries = state(workplace, "whole")
    assert list(entries) == ["search-1", "verify-1", "align-1"]
    assert {entry["status"] for entry in entries.values()} == {"done"}
    counts = entries["verify-1"]["results"]["counts"]
    assert counts["rollouts"] == 4 * 64 == RolloutStore(workplace / "outputs/whole/search-1/rollouts").count()
    pairs = pairs_of(workplace, "whole")
    assert len(pairs) == sum(counts["pairs"].values()) > 0
    align = entries["align-1"]
    assert align["settings"]["model_name_or_path"] == "outputs/whole/search-1"
    assert align["settings"]["pairs"] == [{"path": "outputs/whole/verify-1/pairs", "media_root": "outputs/tiny_world"}]
    history = json.loads((workplace / "outputs/whole/align-1/results.json").read_text())["history"]
    assert history[0]["loss"] > 0 and abs(history[0]["rewards/margins"]) < 1e-5  # the reference is search-1's policy
    table = whole[whole.rindex("outputs/whole: held-out questions") :]
    for column in ("accuracy", "inconsistent", "unknown", "accurate+consistent", "think tokens", "rollouts", "pairs"):
        assert column in table
    assert re.search(r"verify-1 +– .* 256 ", table)
    assert "reported by tiny" in table and "reports too" not in table
    for name in ("loop.png", "report.html", "configs/align-1.yaml", "logs/search-1.log", "align-1/model.safetensors"):
        assert (workplace / "outputs" / "whole" / name).stat().st_size > 0, name


@pytest.mark.slow
def test_a_second_start_runs_nothing_and_shows_the_table(workplace, whole):
    again = run(workplace, "--config", "loop.yaml")
    assert "===" not in again and "search-1: done" in again and "accurate+consistent" in again
    assert [starts(workplace, "whole", stage) for stage in ("search-1", "verify-1", "align-1")] == [1, 1, 1]


@pytest.mark.slow
def test_other_settings_for_a_finished_stage_are_refused(workplace, whole):
    config = yaml.safe_load((workplace / "loop.yaml").read_text())
    config["iteration"][1]["overrides"]["drop_solved_share"] = 0.5
    (workplace / "changed.yaml").write_text(yaml.safe_dump(config))
    output = run(workplace, "--config", "changed.yaml", code=1)
    assert "verify-1 is finished, with other settings (drop_solved_share: 0.8 → 0.5)" in output
    assert "--from verify-1" in output
    redone = run(workplace, "--config", "changed.yaml", "--from", "verify-1", "--until", "verify-1")
    assert "verify-1: moved to" in redone and "align-1: moved to" in redone and "=== verify-1" in redone
    assert (workplace / "outputs/whole/set_aside/001/align-1/model.safetensors").exists()
    for stage in ("verify-1", "align-1"):  # back as it was, for the tests after this one
        shutil.rmtree(workplace / "outputs/whole" / stage, ignore_errors=True)
        shutil.move(workplace / "outputs/whole/set_aside/001" / stage, workplace / "outputs/whole" / stage)
    content = json.loads((workplace / "outputs/whole/run.json").read_text())
    assert [entry["name"] for entry in content["stages"]] == ["search-1", "verify-1"]


def judge_of_templates(delay_s: float = 0.0):
    """A judge's script that reads the tiny world's thoughts."""

    def script(number: int, body: dict) -> Reply:
        thinking = re.search(r"<thinking-(\w+)>\n(.*)\n</thinking-\1>", body["messages"][-1]["content"], re.S)[2]
        given = re.search(r"<given-answer-(\w+)>\n(.*)\n</given-answer-\1>", body["messages"][-1]["content"], re.S)[2]
        found = conclude(thinking)
        verdict = {"concluded_answer": found, "consistent": found and found == given.strip(), "reason": "template"}
        return Reply(content=json.dumps(verdict), delay_s=delay_s)

    return script


@pytest.mark.slow
def test_killed_in_grpo_in_a_push_in_verification_and_in_dpo(workplace, whole):
    """The same command goes on each time: no rollout doubled or missing, the same pairs, nothing finished done again,
    everything pushed once."""
    folder, unbroken = workplace / "outputs" / "broken", workplace / "outputs" / "whole"
    store = RolloutStore(folder / "search-1" / "rollouts")
    with HubServer() as hub, JudgeServer(judge_of_templates(delay_s=1.0)) as judge:
        env = hub.environment(workplace / "hf_home")
        served = {"judge": "server", "judge_url": judge.url, "judge_model": "judge", "judge_concurrency": 2}
        write_loop(workplace, "broken.yaml", "outputs/broken", verify={"overrides": served})
        config = yaml.safe_load((workplace / "broken.yaml").read_text())
        config |= {"push_to_hub": True, "hub_prefix": "tester/loop"}
        (workplace / "broken.yaml").write_text(yaml.safe_dump(config))

        process = start(workplace, "--config", "broken.yaml", env=env)
        said = kill_when(process, lambda: store.files(), "step 1 of GRPO", number=signal.SIGTERM)
        assert process.returncode == 143 and "ended by SIGTERM: the same command goes on" in said, said[-3000:]
        step = re.search(r"terminated after step (\d) of 4; the same command goes on", said)[1]
        assert last_checkpoint(folder / "search-1") == str(folder / "search-1" / f"checkpoint-{step}")
        assert state(workplace, "broken")["search-1"]["status"] == "stopped"

        hub.fail("put", delay_s=4.0, times=1)
        process = start(workplace, "--config", "broken.yaml", env=env)
        kill_when(process, lambda: not hub.faults[0].times, "the push of GRPO's model")
        whole_store = RolloutStore(unbroken / "search-1" / "rollouts").read()
        for column in ("rollout_id", "completion", "rewards", "advantage"):
            assert [row[column] for row in store.read()] == [row[column] for row in whole_store], column

        process = start(workplace, "--config", "broken.yaml", env=env)
        kill_when(process, lambda: len(judge.log) > 2, "verification")
        asked = len(judge.log)

        process = start(workplace, "--config", "broken.yaml", env=env)
        kill_when(process, lambda: (folder / "align-1" / "checkpoint-2").exists(), "step 3 of DPO")
        texts = [entry["body"]["messages"][-1]["content"] for entry in judge.log]
        said = {re.sub(r"-\w+>", ">", text) for text in texts}
        assert asked < len(texts) <= len(said) + 2 * served["judge_concurrency"]  # kept verdicts are not asked for again

        last = run(workplace, "--config", "broken.yaml", env=env)
        assert "search-1: done" in last and "going on from" in last
        for stage, repositories in {
            "search-1": ["models/tester/loop-search-1", "datasets/tester/loop-search-1-rollouts"],
            "verify-1": ["datasets/tester/loop-verify-1-pairs", "datasets/tester/loop-verify-1-verdicts"],
            "align-1": ["models/tester/loop-align-1"],
        }.items():
            recorded = state(workplace, "broken")[stage]["results"]["hub"]
            for repository in repositories:
                assert hub.commits(repository) == 1 and hub.repos[repository].private, repository
                revisions = {item["revision"] for item in recorded.values()}
                assert hub.repos[repository].find("main") in revisions, repository
    entries = state(workplace, "broken")
    assert {entry["status"] for entry in entries.values()} == {"done"}
    assert starts(workplace, "broken", "search-1") == 3 and starts(workplace, "broken", "verify-1") == 2

    with JudgeServer(judge_of_templates()) as judge:  # the same verification, unbroken
        settings = yaml.safe_load((folder / "configs" / "verify-1.yaml").read_text())
        settings |= {"judge_url": judge.url, "output_dir": "outputs/again/verify-1", "push_to_hub": False}
        settings["verdict_cache"] = "outputs/again/cache.sqlite"
        (workplace / "again.yaml").write_text(yaml.safe_dump(settings))
        command = [sys.executable, str(RECIPES / "verify_rollouts.py"), "--config", "again.yaml"]
        result = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr[-3000:]
    assert pairs_of(workplace, "again") == pairs_of(workplace, "broken")


@pytest.mark.slow
def test_a_stage_that_fails_says_where_its_log_is(workplace, whole):
    write_loop(workplace, "failing.yaml", "outputs/failing", search={"overrides": {"num_generations": 7}})
    output = run(workplace, "--config", "failing.yaml", code=1)
    assert "search-1 failed (exit code 1" in output and "outputs/failing/logs/search-1.log" in output
    assert state(workplace, "failing")["search-1"]["status"] == "failed"


GRPO = {"name": "a", "recipe": "grpo_video.py", "config": "tiny/grpo.yaml"}


def test_dry_run_writes_nothing(tmp_path):
    result = subprocess.run([sys.executable, LOOP, "--dry-run"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())
    names = re.findall(r"^([\w-]+) \(to do\): ", result.stdout, re.M)
    assert names == ["cold-start", "search-1", "verify-1", "align-1", "search-2", "verify-2", "align-2"]
    assert 'model_name_or_path: "outputs/veripo/align-1"' in result.stdout
    assert 'leave_out: ["outputs/veripo/verify-1/solved.json"]' in result.stdout


def test_dry_run_finds_what_the_stages_would_stop_at(tmp_path, capsys, monkeypatch):
    """Clips, held-out rows, models, other pairs, the judge's program: all of it at once, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    row = {"question_id": "q1", "problem": "?", "problem_type": "free-form", "solution": "x", "videos": ["gone.mp4"]}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    Path("held.jsonl").write_text(json.dumps(row | {"videos": [], "problem_type": "odd"}) + "\n")
    bare = {"tiny_world": None, "eval_datasets": None}
    iteration = [
        {"name": "a", "recipe": "grpo_video.py", "config": "tiny/grpo.yaml",
         "overrides": {**bare, "cold_start": None, "datasets": [{"path": "rows.jsonl"}]}},
        {"name": "b", "recipe": "sft_video.py", "config": "tiny/sft.yaml",
         "overrides": {**bare, "datasets": [{"path": "held.jsonl"}]}},
        {"name": "c", "recipe": "grpo_video.py", "config": "tiny/grpo.yaml",
         "overrides": {**bare, "cold_start": None, "datasets": [{"path": "outputs/loop/a-1/rows.jsonl"}],
                       "model_name_or_path": "outputs/none"}},
        {"name": "d", "recipe": "verify_rollouts.py", "config": "tiny/verify.yaml", "judge_command": ["no-such"]},
        {"name": "e", "recipe": "dpo_video.py", "config": "dpo.yaml"},
    ]  # fmt: skip
    Path("dpo.yaml").write_text(yaml.safe_dump({"pairs": [{"path": "own"}, {"path": "./none/pairs"}]}))
    Path("loop.yaml").write_text(yaml.safe_dump({"output_dir": "outputs/loop", "iterations": 2, "iteration": iteration}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        loop_module().main(["--config", "loop.yaml", "--dry-run"])
    assert "e-2 (to do)" in capsys.readouterr().out  # the plan is shown whatever is missing
    lines = str(ended.value).strip().splitlines()
    assert lines[0] == "This would not run:" and sorted(tmp_path.rglob("*")) == before
    for told in (
        "judge_command: no program 'no-such'", "stage a-1: .*gone.mp4", "stage b-1: .*'odd'",
        "stage c-1: 'outputs/none': no such folder", "stage e-1: pairs ./none/pairs: expected a folder",
    ):  # fmt: skip
        assert len(re.findall(told, str(ended.value), re.DOTALL)) == 1, (told, lines)
    assert "-2: " not in str(ended.value)  # said once, and what stages make is not looked for


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "whole number of 1 or more"),
        ({"iteratoins": 2}, "unknown key iteratoins"),
        ({"iteration": [{"name": "a", "recipe": "grpo_video.py"}]}, "missing ['config']"),
        ({"iteration": [{"name": "a", "recipe": "rm.py", "config": "tiny/grpo.yaml"}]}, "no recipe 'rm.py'"),
        ({"iteration": [{"name": "a", "recipe": "grpo_video.py", "config": "none.yaml"}]}, "none.yaml: no such file"),
        ({"iteration": [{"name": "a", "recipe": "verify_rollouts.py", "config": "tiny/verify.yaml"}]}, "no GRPO stage"),
        ({"push_to_hub": True}, "needs `hub_prefix`"),
        ({"iteration": [{**GRPO, "overrides": {"hub_token": "hf_x"}}]}, "hub_token would be written to run.json"),
        ({"iteration": [{**GRPO, "overrides": {"env": {"WANDB_API_KEY": "x"}}}]}, "env WANDB_API_KEY would be written"),
        ({"iteration": [{**GRPO, "judge_command": "vllm serve x"}]}, "expected a list of words"),
        ({"iteration": [{**GRPO, "judge_command": ["no-such-program", "x"]}]}, "no program 'no-such-program'"),
        ({"iteration": [{**GRPO, "judge_command": ["python3", "--api-key", "sk-1"]}]}, "--host 127.0.0.1 only this"),
        ({"iteration": [{**GRPO, "judge_command": ["vllm", "serve", "x"]}]}, "listens on every interface"),
    ],
)
def test_loops_that_cannot_run(change, message, tmp_path):
    loop = {"output_dir": "run", "iteration": [{"name": "a", "recipe": "grpo_video.py", "config": "tiny/grpo.yaml"}]}
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump({**loop, **change}))
    result = subprocess.run(
        [sys.executable, LOOP, "--config", "loop.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1 and message in result.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "setting",
    [
        {"judge_command": ["vllm", "serve", "x", "--hf-token", "SECRET"]},
        {"judge_command": ["vllm", "serve", "x", "--hf-token=SECRET", "--port", 1]},
        {"judge_command": ["env", "OPENAI_API_KEY=SECRET", "vllm", "serve"]},
        {"judge_command": ["bash", "-c", "export PORT=1 HF_TOKEN='SECRET'; vllm serve"]},
        {"judge_command": ["bash", "-c", "vllm serve x --api-key SECRET"]},
        {"judge_command": "vllm serve x --api-key SECRET"},
        {"judge_command": ["proxy", "--header", "X-Api-Key: SECRET"]},
        {"judge_command": ["proxy", "--header", "Authorization: Bearer SECRET"]},
        {"judge_command": ["proxy", "hf_SECRETSECRETSECRETSECRET"]},
        {"judge_command": ["curl", "-H", "Authorization: Basic SECRET"]},
        {"judge_command": ["curl", "-u", "me:SECRET"]},
        {"judge_command": ["bash", "-c", "DB_PASS=SECRET curl --user me:SECRET http://127.0.0.1:1"]},
        {"judge_command": ["proxy", "--hf-tokens", "SECRET"]},
        {"judge_command": ["proxy", "gsk_SECRETSECRETSECRETSECRET"]},
        {"judge_command": ["proxy", "ya29.SECRETSECRET"]},
        {"judge_health": "http://SECRET@127.0.0.1:1/health"},
        {"judge_health": "http://me:SECRET@127.0.0.1:1/health"},
        {"overrides": {"judge_url": "http://127.0.0.1:1/v1?api_key=SECRET"}},
        {"overrides": {"judge_request_options": '{"extra_body": {"token": "SECRET"}}'}},
        {"overrides": {"model_init_kwargs": {"password": "SECRET"}}},
        {"overrides": {"judge_request_options": {"extra_headers": {"authorization": "SECRET"}}}},
        {"overrides": {"model_init_kwargs": {"api_key": 12345}}},
        {"later_overrides": {"report_to": "sk-SECRETSECRETSECRETSECRET"}},
    ],
)
def test_a_secret_anywhere_is_refused_and_not_printed(setting, tmp_path, capsys):
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump({"output_dir": "run", "iteration": [{**GRPO, **setting}]}))
    with pytest.raises(SystemExit, match="iteration .* would be written to run.json") as ended:
        loop_module().main(["--config", str(tmp_path / "loop.yaml"), "--dry-run"])
    assert "SECRET" not in f"{ended.value} {capsys.readouterr()}"


def test_what_is_no_secret_is_left_alone():
    command = ["bash", "-c", "HF_TOKEN=$HF_TOKEN vllm serve", "--hf-token", "--port", 1, "--lora-modules", "monkey=x"]
    command += ["--ssl-keyfile", "/etc/key.pem", "--revision", "a" * 40, "--served-model-name", "task-sk-learn"]
    settings = {"judge_command": command, "eos_token": "<|im_end|>", "pad_token": "x", "hub_token": None}
    command += ["sort", "--key", "2", "-u", "--max_tokens", "5", "Basic reasoning", "docker run -u 1000:1000", "PWD=/x"]
    settings |= {"image_token": "<image>", "max_tokens": 512, "url": "https://$ME@host", "first_pass": True}
    settings |= {"judge_api_key_env": "MY_KEY", "tokenizer": "x", "env": {"HF_TOKEN": "$MINE", "MAX_TOKENS": "5"}}
    shipped = [yaml.safe_load(file.read_text()) for file in (RECIPES / "configs").rglob("*.yaml")]
    for value in (settings, shipped):
        assert without_secrets(value, held := []) == value and not held


def test_recorded_arguments_hold_no_secret(tmp_path):
    from trl import SFTConfig

    from veripo_trl.recipe import stages

    arguments = SFTConfig(hub_token="hf_x", model_init_kwargs={"token": "t0p"}, eos_token="<|im_end|>", use_cpu=True)
    stages.save_arguments(str(tmp_path), arguments)
    record = (tmp_path / "_arguments.json").read_text()
    assert "hf_x" not in record and "t0p" not in record and json.loads(record)["SFTConfig"]["eos_token"] == "<|im_end|>"


def loop_module():
    spec = importlib.util.spec_from_file_location("veripo_loop", LOOP)
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    return loop


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """`quick(*options)` runs the shipped tiny loop with stages that do nothing but finish; `quick.ran`, `quick.fail`."""
    monkeypatch.chdir(tmp_path)
    loop = loop_module()
    ran, broken = [], set()

    def finish(command, log, env):
        settings = yaml.safe_load(Path(command[-1]).read_text())
        output = Path(settings["output_dir"])
        ran.append(output.name)
        output.mkdir(parents=True, exist_ok=True)
        if output.name in broken:
            return 1
        pairs = {"penalty": 0 if output.name in quick.bare else 2}
        (output / "results.json").write_text(json.dumps({"counts": {"pairs": pairs}}))
        return 0

    monkeypatch.setattr(loop, "run_logged", finish)
    monkeypatch.setattr(loop, "check_settings", lambda stages: None)
    monkeypatch.setattr(loop, "show", lambda run, stages: None)
    monkeypatch.setattr(loop.signal, "signal", lambda *_: None)

    def quick(*options) -> list[str]:
        ran.clear()
        loop.main(list(options))
        return list(ran)

    quick.fail, quick.ran, quick.bare = broken, ran, set()
    return quick


ALL_STAGES = ["cold-start", "search-1", "verify-1", "align-1", "search-2", "verify-2", "align-2"]


def test_a_stage_made_anew_does_not_leave_its_followers_finished(quick):
    assert quick() == ALL_STAGES
    assert quick() == []
    shutil.rmtree("outputs/veripo/search-1")
    with pytest.raises(SystemExit, match="verify-1 is finished, but a stage before it was made anew.*--from verify-1"):
        quick()
    assert quick.ran == ["search-1"]
    assert quick("--from", "verify-1") == ALL_STAGES[2:]
    assert quick() == []


def test_a_broken_redo_goes_on_with_the_same_command(quick):
    quick()
    quick.fail.add("align-2")
    with pytest.raises(SystemExit, match="align-2 failed"):
        quick("--from", "search-2")
    assert quick.ran == ["search-2", "verify-2", "align-2"]
    quick.fail.clear()
    assert quick("--from", "search-2") == ["align-2"]  # what was redone stays
    assert quick("--from", "search-2") == ["search-2", "verify-2", "align-2"]  # it was through: this is another redo


def test_damaged_state_is_named(quick):
    quick("--until", "search-1")
    for file, remedy in (("search-1/results.json", "Remove it, and start the same"), ("run.json", "Take it from a copy")):
        path = Path("outputs/veripo") / file
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(FileError, match=f"^outputs/veripo/{file} is damaged: expected a JSON object: .*{remedy}"):
            quick()
        path.write_bytes(content)
    assert quick() == ALL_STAGES[2:]


def test_the_runs_state_holds_no_curves(quick):
    quick("--until", "cold-start")
    history = [{"step": step, "loss": 0.1} for step in range(1000)]
    Path("outputs/veripo/cold-start/results.json").write_text(json.dumps({"steps": 1000, "history": history}))
    state_file = Path("outputs/veripo/run.json")
    content = json.loads(state_file.read_text())
    content["stages"][0]["status"] = "running"  # killed before the loop could note that it was finished
    state_file.write_text(json.dumps(content))
    quick("--until", "search-1")
    assert state(Path("."), "veripo")["cold-start"]["results"] == {"steps": 1000}


def test_a_full_disk_does_not_end_a_stage_for_its_log(tmp_path):
    log = tmp_path / "stage.log"
    code = (
        "import os, resource, sys; from test_loop import loop_module\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"  # less than the log's first line
        "stage = [sys.executable, '-c', 'for n in range(3): print(\"step\", n, flush=True)']\n"
        f"sys.exit(loop_module().run_logged(stage, __import__('pathlib').Path({str(log)!r}), dict(os.environ)))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(f"The log is not whole, the stage goes on. {tmp_path}: File too large: stage.log") == 1
    assert "step 2" in found.stdout and log.stat().st_size <= 10


def test_without_pairs_the_policy_before_goes_on(quick):
    quick.bare.add("verify-1")
    assert quick() == [name for name in ALL_STAGES if name != "align-1"]
    settings = yaml.safe_load(Path("outputs/veripo/configs/search-2.yaml").read_text())
    assert settings["model_name_or_path"] == "outputs/veripo/search-1"
    assert quick() == []


def test_a_key_that_a_later_stage_does_not_know_is_found_before_the_first(tmp_path):
    loop = loop_module()
    stage = {"name": "align-1", "recipe": "dpo_video.py", "settings": {"beta": 0.1, "betta": 0.1}, "judge": {}}
    with pytest.raises(SystemExit, match="stage align-1: dpo_video.py knows no betta. Nothing was run"):
        loop.check_settings([stage])


def test_other_pairs_of_a_configuration_are_kept(tmp_path):
    config = {"pairs": ['{"path": "x", "media_root": "clips"}', {"path": "mine", "kinds": ["penalty"]}]}
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(config))
    iteration = [
        {"name": "s", "recipe": "grpo_video.py", "config": "tiny/grpo.yaml"},
        {"name": "v", "recipe": "verify_rollouts.py", "config": "tiny/verify.yaml"},
        {"name": "a", "recipe": "dpo_video.py", "config": str(tmp_path / "dpo.yaml")},
    ]
    loop = {"output_dir": "run", "iterations": 1, "stages": [], "iteration": iteration, "push_to_hub": False}
    assert loop_module().plan(loop)[2]["settings"]["pairs"] == [
        {"path": "run/v-1/pairs", "media_root": "clips"}, {"path": "mine", "kinds": ["penalty"]}
    ]  # fmt: skip


def test_a_terminated_loop_ends_what_its_launcher_started(tmp_path):
    """SIGTERM to the loop alone: the launcher dies, and its child with it."""
    child = "import time, pathlib, os; pathlib.Path('child').write_text(str(os.getpid())); time.sleep(99)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    run_folder = tmp_path / "run"
    script = (
        "import importlib.util, signal, sys, pathlib\n"
        f"spec = importlib.util.spec_from_file_location('l', {LOOP!r}); l = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(l)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('terminated'))\n"
        f"folder = pathlib.Path({str(run_folder)!r})\n"
        "with l.only_run(folder):\n"
        f"    env = {{**l.os.environ, l.MARKER: str(folder.resolve())}}\n"
        f"    l.run_logged([sys.executable, '-c', {launcher!r}], folder / 'log', env)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    pid = int((tmp_path / "child").read_text())
    process.terminate()
    process.wait(60)
    time.sleep(0.1)
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] in "ZX"


TRAINER = """
import os, signal, sys, time
from veripo_trl.files.run_folder import only_process
def save(number, frame):
    time.sleep(0.3)
    with open(sys.argv[1] + "/checkpoint", "w") as file:
        file.write(signal.Signals(number).name)
    os._exit(143)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
os.makedirs(sys.argv[1], exist_ok=True)
with only_process(sys.argv[1]):
    print("at work", flush=True)
    time.sleep(99)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_the_trainer_alone_which_is_waited_for(number, tmp_path):
    """The launcher, which would die of it and leave the trainer behind, does not see it."""
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TRAINER!r}, sys.argv[1]]); sys.exit(1)"
    script = (
        "import importlib.util, signal, sys, pathlib\n"
        f"spec = importlib.util.spec_from_file_location('l', {LOOP!r}); l = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(l)\n"
        f"l.command_of = lambda stage, *_: [sys.executable, '-c', {launcher!r}, stage['output_dir']]\n"
        "l.check_settings = lambda stages: None\n"
        "l.main([])\n"
    )
    loop = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while (line := loop.stdout.readline()) != "at work\n":
        assert line
    loop.send_signal(number)
    said = loop.communicate(timeout=60)[0]
    assert loop.returncode == 128 + number
    assert said.splitlines()[-1] == f"outputs/veripo: ended by {number.name}: the same command goes on"
    assert (tmp_path / "outputs/veripo/cold-start/checkpoint").read_text() == number.name
    assert state(tmp_path, "veripo")["cold-start"]["status"] == "stopped" and "ending" not in said


def test_leftovers_are_ended(tmp_path):
    loop = loop_module()
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    env = {**os.environ, loop.MARKER: str(run_folder.resolve())}
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(99)"
    ours = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)
        for code in ("import time; print('up', flush=True); time.sleep(99)", stubborn)
    ]
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], env={**env, loop.MARKER: "/other"})
    for process in ours:
        process.stdout.readline()
    loop.end_leftovers(run_folder, patience_s=1)
    assert [process.wait(5) for process in ours] == [-signal.SIGTERM, -signal.SIGKILL]
    assert other.poll() is None
    other.kill()


JUDGE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
print("starting", flush=True)
if sys.argv[1] == "0": sys.exit("no such model")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_judges_server_is_started_waited_for_and_stopped(tmp_path):
    loop = loop_module()
    port = free_port()
    judge = {
        "judge_command": [sys.executable, "-c", JUDGE, port],
        "judge_health": f"http://127.0.0.1:{port}/health",
        "judge_start_timeout_s": 20,
    }
    assert not loop.answers(judge["judge_health"])
    with loop.judge_server(judge, tmp_path / "judge.log", dict(os.environ)):
        assert loop.answers(judge["judge_health"])
        with pytest.raises(SystemExit, match="another server is there"):
            with loop.judge_server(judge, tmp_path / "judge.log", dict(os.environ)):
                pass
    assert not loop.answers(judge["judge_health"])
    judge["judge_command"][-1] = 0
    with pytest.raises(SystemExit, match="(?s)exit code 1.*no such model"):
        with loop.judge_server(judge, tmp_path / "judge.log", dict(os.environ)):
            pass
