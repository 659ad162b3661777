"""VerIPO's loop as a user runs it: whole, again, from a stage, broken off by SIGKILL anywhere, with a judge's server."""

import json
import os
import re
import runpy
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
from veripo_trl.loop import run as loop_run
from veripo_trl.loop.check import check_settings
from veripo_trl.loop.judge_server import answers, judge_server
from veripo_trl.loop.plan import STAGE, LoopError, plan, read_loop, shown
from veripo_trl.loop.run import stop
from veripo_trl.loop.state import MARKER, end_leftovers
from veripo_trl.tiny.judge import conclude

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
LOOP = str(RECIPES / "veripo.py")
# A loop whose trainings are started without accelerate's launcher, which takes seconds to start.
DIRECT = (
    "import runpy, sys; from veripo_trl.loop import plan\n"
    "plan.command_of = lambda stage, _: [sys.executable, stage['script'], '--config', str(stage['config'])]\n"
    f"runpy.run_path({LOOP!r}, run_name='__main__')"
)
ONE_PROCESS = yaml.safe_load((RECIPES / "configs" / "tiny" / "veripo.yaml").read_text())["accelerate"]


def call(*arguments: str) -> None:
    """The recipe's `main`, in this process."""
    runpy.run_path(LOOP)["main"](list(arguments))


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
                 "logging_steps": 1, "report_samples": 1, "learning_rate": 1e-5},
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
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runpy.run_path(str(RECIPES / "sft_video.py"))["main"](["--config", "sft.yaml", "--output_dir", "outputs/start"])
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
    loop = {"output_dir": output_dir, "accelerate": ONE_PROCESS, "iteration": iteration}
    (folder / name).write_text(yaml.safe_dump(loop))


def start(folder, *arguments, env: dict | None = None, script: tuple = (LOOP,)) -> subprocess.Popen:
    command, env = [sys.executable, *script, *arguments], {**os.environ, **(env or {})}
    del env["TQDM_DELAY"]  # of conftest.py: here the output is captured as a user's
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(folder, *arguments, code: int = 0, **options) -> str:
    process = start(folder, *arguments, **options)
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
def test_what_the_loop_prints(workplace, whole):
    """Short lines, and nothing that nobody can act on; the logs hold the same."""
    assert re.search(r"^step 1/4  reward \S+  accuracy \S+  format \S+  tokens [\d.]+  \d+\.\d s a step$", whole, re.M)
    assert re.search(r"^step 1/\d+  loss \S+  token accuracy \S+  chosen preferred \S+  \d+\.\d s a step$", whole, re.M)
    for noise in ("Warning", "deprecated", "{'loss'", "defaults used instead", "kernels", "mtime", "\r", "it/s"):
        assert noise not in whole, noise
    assert len(whole.splitlines()) < 150
    for name in ("search-1", "verify-1", "align-1"):
        log = (workplace / f"outputs/whole/logs/{name}.log").read_text()
        assert log.partition("\n")[2] in whole


@pytest.fixture
def in_workplace(workplace, whole, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    before = signal.getsignal(signal.SIGINT)
    yield lambda: capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before, "a loop leaves its signal handlers behind"


@pytest.mark.slow
def test_a_second_start_runs_nothing_and_shows_the_table(in_workplace):
    call("--config", "loop.yaml")
    again = in_workplace()
    assert "===" not in again and "search-1: done" in again and "accurate+consistent" in again


@pytest.mark.slow
def test_other_settings_for_a_finished_stage_are_refused(in_workplace):
    config = yaml.safe_load(Path("loop.yaml").read_text())
    config["iteration"][1]["overrides"]["drop_solved_share"] = 0.5
    Path("changed.yaml").write_text(yaml.safe_dump(config))
    message = r"verify-1 is finished, with other settings \(drop_solved_share: 0.8 → 0.5\).*--from verify-1"
    with pytest.raises(LoopError, match=message):
        call("--config", "changed.yaml")


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
def test_killed_in_grpo_in_a_push_in_verification_and_in_dpo(workplace, whole, monkeypatch):
    """The same command goes on each time: no rollout doubled or missing, the same pairs, nothing finished done again,
    everything pushed once."""
    folder, unbroken = workplace / "outputs" / "broken", workplace / "outputs" / "whole"
    store = RolloutStore(folder / "search-1" / "rollouts")
    with HubServer() as hub, JudgeServer(judge_of_templates(delay_s=1.0)) as judge:
        how = {"env": hub.environment(workplace / "hf_home"), "script": ("-c", DIRECT)}
        served = {"judge": "server", "judge_url": judge.url, "judge_model": "judge", "judge_concurrency": 2}
        write_loop(workplace, "broken.yaml", "outputs/broken", verify={"overrides": served})
        config = yaml.safe_load((workplace / "broken.yaml").read_text())
        config |= {"push_to_hub": True, "hub_prefix": "tester/loop"}
        (workplace / "broken.yaml").write_text(yaml.safe_dump(config))

        process = start(workplace, "--config", "broken.yaml", **how)
        said = kill_when(process, lambda: store.files(), "step 1 of GRPO", number=signal.SIGTERM)
        assert process.returncode == 143 and "ended by SIGTERM: the same command goes on" in said, said[-3000:]
        step = re.search(r"terminated after step (\d) of 4; the same command goes on", said)[1]
        assert last_checkpoint(folder / "search-1") == str(folder / "search-1" / f"checkpoint-{step}")
        assert state(workplace, "broken")["search-1"]["status"] == "stopped"

        hub.fail("put", delay_s=4.0, times=1)
        process = start(workplace, "--config", "broken.yaml", **how)
        kill_when(process, lambda: not hub.faults[0].times, "the push of GRPO's model")
        whole_store = RolloutStore(unbroken / "search-1" / "rollouts").read()
        for column in ("rollout_id", "completion", "rewards", "advantage"):
            assert [row[column] for row in store.read()] == [row[column] for row in whole_store], column

        process = start(workplace, "--config", "broken.yaml", **how)
        kill_when(process, lambda: len(judge.log) > 2, "verification")
        asked = len(judge.log)

        process = start(workplace, "--config", "broken.yaml", **how)
        kill_when(process, lambda: (folder / "align-1" / "checkpoint-2").exists(), "step 3 of DPO")
        texts = [entry["body"]["messages"][-1]["content"] for entry in judge.log]
        said = {re.sub(r"-\w+>", ">", text) for text in texts}
        assert asked < len(texts) <= len(said) + 2 * served["judge_concurrency"]  # kept verdicts are not asked for again

        last = run(workplace, "--config", "broken.yaml", **how)
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
        monkeypatch.chdir(workplace)
        runpy.run_path(str(RECIPES / "verify_rollouts.py"))["main"](["--config", "again.yaml"])
    assert pairs_of(workplace, "again") == pairs_of(workplace, "broken")


OWN = """
import json, sys, yaml, pathlib
assert yaml.__file__.startswith(sys.prefix), "not the working directory's"
settings = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
print("mine:", settings["colour"], settings["model_name_or_path"])
if settings["colour"] == "red":
    sys.exit("no red, please")
folder = pathlib.Path(settings["output_dir"])
folder.mkdir()
(folder / "results.json").write_text(json.dumps({"minutes": 0.1}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["mine", "."])
def test_a_recipe_of_ones_own(beside, tmp_path):
    """Its script lies beside the YAML or in the working directory; no file there is taken for a library. A stage that
    fails says where its log is, and the same command goes on."""
    (tmp_path / "mine").mkdir()
    (tmp_path / beside / "own.py").write_text(OWN)
    (tmp_path / "mine" / "own.yaml").write_text("{colour: blue, model_name_or_path: start}")
    for library in ("yaml", "av", "accelerate", "veripo_trl", "torch") if beside == "mine" else ():
        (tmp_path / f"{library}.py").write_text("raise SystemExit('the wrong library')")
    own = {"recipe": "own.py", "kind": "grpo", "config": "own.yaml"}
    iteration = [{**own, "name": "a"}, {**own, "name": "b", "overrides": {"colour": "red"}}]
    loop = {"output_dir": "run", "accelerate": ONE_PROCESS, "iteration": iteration}
    (tmp_path / "mine" / "loop.yaml").write_text(yaml.safe_dump(loop))
    told = run(tmp_path, "--config", "mine/loop.yaml", code=1)
    assert "mine: blue start\n" in told and "mine: red run/a-1\nno red, please\n" in told
    assert "LoopError: b-1 failed (exit code 1, no results.json). Its log: run/logs/b-1.log." in told
    assert "Traceback" not in told
    stages = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
    assert [entry["status"] for entry in stages] == ["done", "failed"]


GRPO = {"name": "a", "recipe": "grpo_video.py", "config": "tiny/grpo.yaml"}
VERIFY = {"name": "a", "recipe": "verify_rollouts.py", "config": "tiny/verify.yaml"}


def test_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call("--dry-run")
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    names = re.findall(r"^([\w-]+) \(to do\): (?:accelerate launch|python) ", said, re.M)
    assert names == ["cold-start", "search-1", "verify-1", "align-1", "search-2", "verify-2", "align-2"]
    assert 'model_name_or_path: "outputs/veripo/align-1"' in said
    assert 'leave_out: ["outputs/veripo/verify-1/solved.json"]' in said


def test_trainings_are_started_by_the_launcher(tmp_path, monkeypatch):
    """Which a cluster's is; the head node's name is known to the batch script alone."""
    monkeypatch.setenv("HEAD", "node7")
    loop = {
        "output_dir": str(tmp_path / "run"),
        "launcher": ["srun", "--label"],
        "accelerate": ["--num_machines", 2, "--main_process_ip", "$HEAD"],
        "iteration": [GRPO, VERIFY | {"name": "b"}],
    }
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump(loop))
    training, verification = (shown(stage["command"]) for stage in plan(read_loop(tmp_path / "loop.yaml")))
    start = "srun --label accelerate launch --quiet --num_machines 2 --main_process_ip node7 "
    assert training.startswith(start) and verification.startswith("python ")
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump(loop | {"launcher": "srun"}))
    with pytest.raises(LoopError, match="launcher: expected a list of words, got 'srun'"):
        read_loop(tmp_path / "loop.yaml")


def test_dry_run_finds_what_the_stages_would_stop_at(tmp_path, capsys, monkeypatch):
    """Clips, held-out rows, models, other pairs, the judge's program: all of it at once, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    row = {"question_id": "q1", "problem": "?", "problem_type": "free-form", "solution": "x", "videos": ["gone.mp4"]}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    Path("held.jsonl").write_text(json.dumps(row | {"videos": [], "problem_type": "odd"}) + "\n")
    bare = {"tiny_world": None, "eval_datasets": None}
    iteration = [
        {"name": "a", "recipe": "grpo_video.py", "config": "tiny/grpo.yaml",
         "overrides": {**bare, "datasets": [{"path": "rows.jsonl"}]}},
        {"name": "b", "recipe": "sft_video.py", "config": "tiny/sft.yaml",
         "overrides": {**bare, "datasets": [{"path": "held.jsonl"}]}},
        {"name": "c", "recipe": "grpo_video.py", "config": "tiny/grpo.yaml",
         "overrides": {**bare, "datasets": [{"path": "outputs/loop/a-1/rows.jsonl"}],
                       "model_name_or_path": "outputs/none"}},
        {"name": "d", "recipe": "verify_rollouts.py", "config": "tiny/verify.yaml", "judge_command": ["no-such"]},
        {"name": "e", "recipe": "dpo_video.py", "config": "dpo.yaml"},
        {"name": "f", "recipe": "dpo_video.py", "config": "dpo.yaml",
         "overrides": {"pairs": [{"path": "outputs/loop/d-1/pairs", "media_root": "no/videos"}]}},
    ]  # fmt: skip
    Path("dpo.yaml").write_text(yaml.safe_dump({"pairs": [{"path": "own"}, {"path": "./none/pairs"}]}))
    Path("loop.yaml").write_text(yaml.safe_dump({"output_dir": "outputs/loop", "iterations": 2, "iteration": iteration}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LoopError) as ended:
        call("--config", "loop.yaml", "--dry-run")
    assert "e-2 (to do)" in capsys.readouterr().out  # the plan is shown whatever is missing
    lines = str(ended.value).strip().splitlines()
    assert lines[0] == "this would not run:" and sorted(tmp_path.rglob("*")) == before
    for told in (
        "judge_command: no program 'no-such'", "stage a-1: .*gone.mp4", "stage b-1: .*'odd'",
        "stage c-1: 'outputs/none': no such folder", "stage e-1: pairs ./none/pairs: expected a folder",
        "stage f-1: pairs .*media_root 'no/videos': no such folder",
    ):  # fmt: skip
        assert len(re.findall(told, str(ended.value), re.DOTALL)) == 1, (told, lines)
    assert "-2: " not in str(ended.value)  # said once, and what stages make is not looked for


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "whole number of 1 or more"),
        ({"iteratoins": 2}, "unknown ['iteratoins']"),
        ({"iteration": [{"name": "a", "recipe": "grpo_video.py"}]}, "missing ['config']"),
        ({"iteration": [{"name": "a", "recipe": "rm.py", "config": "tiny/grpo.yaml"}]}, "rm.py: no such file in"),
        ({"iteration": [{"name": "a", "recipe": "grpo_video.py", "config": "none.yaml"}]}, "none.yaml: no such file"),
        ({"iteration": [VERIFY]}, "a-1: expected a GRPO stage before it"),
        ({"push_to_hub": True}, "expected `hub_prefix` beside push_to_hub"),
        ({"iteration": [{**GRPO, "overrides": {"hub_token": "hf_x"}}]}, "hub_token would be written to run.json"),
        ({"iteration": [{**GRPO, "overrides": {"env": {"WANDB_API_KEY": "x"}}}]}, "env WANDB_API_KEY would be written"),
        ({"iteration": [{**GRPO, "judge_command": "vllm serve x"}]}, "judge_command: expected a list of words"),
        ({"iteration": [{**GRPO, "recipe": __file__}]}, "expected `kind`, one of sft, grpo"),
        ({"iteration": [GRPO, GRPO]}, "a-1: expected stages of different names"),
        ({"iteration": ["grpo_video.py"]}, "expected a list of stages, each a mapping"),
        ({"iteration": [{**GRPO, "judge_command": ["no-such-program", "x"]}]}, "no program 'no-such-program'"),
        ({"iteration": [{**GRPO, "judge_command": ["python3", "--api-key", "sk-1"]}]}, "--host 127.0.0.1 only this"),
        ({"iteration": [{**GRPO, "judge_command": ["vllm", "serve", "x"]}]}, "without it vLLM listens"),
    ],
)
def test_loops_that_cannot_run(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loop = {"output_dir": "run", "iteration": [{"name": "a", "recipe": "grpo_video.py", "config": "tiny/grpo.yaml"}]}
    Path("loop.yaml").write_text(yaml.safe_dump({**loop, **change}))
    with pytest.raises(LoopError, match=re.escape(message)):
        call("--config", "loop.yaml")
    assert not Path("run").exists()


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
        {"overrides": {"report_to": "sk-SECRETSECRETSECRETSECRET"}},
    ],
)
def test_a_secret_anywhere_is_refused_and_not_printed(setting, tmp_path, capsys):
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump({"output_dir": "run", "iteration": [{**GRPO, **setting}]}))
    with pytest.raises(LoopError, match="iteration .* would be written to run.json") as ended:
        call("--config", str(tmp_path / "loop.yaml"), "--dry-run")
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

    from veripo_trl.recipe.prepare import save_arguments

    arguments = SFTConfig(hub_token="hf_x", model_init_kwargs={"token": "t0p"}, eos_token="<|im_end|>", use_cpu=True)
    save_arguments(str(tmp_path), arguments)
    record = (tmp_path / "_arguments.json").read_text()
    assert "hf_x" not in record and "t0p" not in record and json.loads(record)["SFTConfig"]["eos_token"] == "<|im_end|>"


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """`quick(*options)` runs the shipped tiny loop with stages that do nothing but finish; `quick.ran`, `quick.fail`."""
    monkeypatch.chdir(tmp_path)
    ran, broken = [], set()

    def finish(command, log, env, output_dir):
        settings = yaml.safe_load(Path(command[-1]).read_text())
        output = Path(settings["output_dir"])
        ran.append(output.name)
        output.mkdir(parents=True, exist_ok=True)
        if output.name in broken:
            return 1
        pairs = {"penalty": 0 if output.name in quick.bare else 2}
        (output / "results.json").write_text(json.dumps({"counts": {"pairs": pairs}}))
        return 0

    monkeypatch.setattr("veripo_trl.loop.run.run_logged", finish)
    monkeypatch.setattr("veripo_trl.loop.run.check_settings", lambda stages: None)
    monkeypatch.setattr("veripo_trl.loop.run.show", lambda run, stages: None)

    def quick(*options) -> list[str]:
        ran.clear()
        call(*options)
        return list(ran)

    quick.fail, quick.ran, quick.bare = broken, ran, set()
    return quick


ALL_STAGES = ["cold-start", "search-1", "verify-1", "align-1", "search-2", "verify-2", "align-2"]


def test_a_stage_made_anew_does_not_leave_its_followers_finished(quick):
    assert quick() == ALL_STAGES
    assert quick() == []
    shutil.rmtree("outputs/veripo/search-1")
    with pytest.raises(LoopError, match="verify-1 is finished, but a stage before it was made anew.*--from verify-1"):
        quick()
    assert quick.ran == ["search-1"]
    assert quick("--from", "verify-1") == ALL_STAGES[2:]
    assert quick() == []


def test_a_broken_redo_goes_on_with_the_same_command(quick):
    quick()
    quick.fail.add("align-2")
    with pytest.raises(LoopError, match="align-2 failed"):
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
        "import os, pathlib, resource, sys; from veripo_trl.loop.run import run_logged\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"  # less than the log's first line
        "stage = [sys.executable, '-c', 'for n in range(3): print(\"step\", n, flush=True)']\n"
        f"sys.exit(run_logged(stage, pathlib.Path({str(log)!r}), dict(os.environ), '.'))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(f"The log is not whole, the stage goes on. {tmp_path}: File too large: stage.log") == 1
    assert "step 2" in found.stdout and log.stat().st_size <= 10


def test_without_pairs_the_policy_before_goes_on(quick):
    quick.bare.add("verify-1")
    assert quick() == [name for name in ALL_STAGES if name != "align-1"]
    settings = yaml.safe_load(Path("outputs/veripo/configs/search-2.yaml").read_text())
    assert settings["model_name_or_path"] == "outputs/veripo/search-1"
    assert quick() == []


def test_a_lost_terminal_keeps_no_loop_from_ending(monkeypatch):
    """After a hang-up a print fails, and the trainer must still be signalled, which `SystemExit` has done."""
    terminal = os.fdopen(os.pipe()[1], "w", buffering=1)
    os.close(terminal.fileno())
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.stderr", terminal)
    with pytest.raises(SystemExit):
        stop(signal.SIGHUP, None)


def test_a_skipped_dpo_hands_on_the_policy_that_it_starts_from(tmp_path):
    (tmp_path / "own.yaml").write_text("model_name_or_path: their/base\n")
    stages = [
        {"name": "v", "recipe": "verify_rollouts.py", "config": "tiny/verify.yaml", "overrides": {"rollouts": ["r"]}},
        {"name": "d", "recipe": "dpo_video.py", "config": "tiny/dpo.yaml", "overrides": {"model_name_or_path": "mine"}},
        {"name": "g", "recipe": "grpo_video.py", "config": str(tmp_path / "own.yaml")},
    ]
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump({"output_dir": "run", "iterations": 1, "iteration": stages}))
    settings = plan(read_loop(str(tmp_path / "loop.yaml")), {"d-1"})[2]["settings"]
    assert settings["model_name_or_path"] == "mine"


def test_a_key_that_a_later_stage_does_not_know_is_found_before_the_first():
    script = {"name": "align-1", "recipe": "dpo_video.py", "script": str(RECIPES / "dpo_video.py")}
    with pytest.raises(LoopError, match="stage align-1: dpo_video.py knows no betta. Nothing was run"):
        check_settings([STAGE | script | {"settings": {"beta": 0.1, "betta": 0.1}}])


def test_what_a_configuration_names_itself_is_kept(tmp_path, monkeypatch):
    """Other pairs are mixed in; solved questions are the loop's; its YAML finds what lies beside it."""
    config = {"pairs": ['{"path": "x", "media_root": "clips"}', {"path": "mine", "kinds": ["penalty"]}]}
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "grpo.yaml").write_text("{leave_out: [mine.json]}")
    iteration = [
        {"name": "s", "recipe": "grpo_video.py", "config": "grpo.yaml"},
        {"name": "v", "recipe": "verify_rollouts.py", "config": "tiny/verify.yaml"},
        {"name": "a", "recipe": "dpo_video.py", "config": "dpo.yaml"},
    ]
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump({"output_dir": "run", "iterations": 2, "iteration": iteration}))
    first, _, align, second, *_ = [stage["settings"] for stage in plan(read_loop(str(tmp_path / "loop.yaml")))]
    assert align["pairs"] == [{"path": "run/v-1/pairs", "media_root": "clips"}, {"path": "mine", "kinds": ["penalty"]}]
    assert first["leave_out"] is None
    assert second["leave_out"] == ["run/v-1/solved.json"]
    for own, path in (({"media_root": "videos"}, "run/v-1/pairs"), ({"media_root": "videos", "path": "y"}, "y")):
        iteration[2]["overrides"] = {"pairs": [own]}  # as the guide has it for rows of one's own
        loop = {"output_dir": "run", "iterations": 1, "iteration": iteration}
        (tmp_path / "loop.yaml").write_text(yaml.safe_dump(loop))
        assert plan(read_loop(str(tmp_path / "loop.yaml")))[2]["settings"]["pairs"] == [own | {"path": path}]


def test_a_terminated_loop_ends_what_its_launcher_started(tmp_path):
    """SIGTERM to the loop alone: the launcher dies, and its child with it."""
    child = "import time, pathlib, os; pathlib.Path('child').write_text(str(os.getpid())); time.sleep(99)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    run_folder = tmp_path / "run"
    script = (
        "import pathlib, signal, sys; from veripo_trl.loop import run as loop\n"
        "signal.signal(signal.SIGTERM, loop.stop)\n"
        f"folder = pathlib.Path({str(run_folder)!r})\n"
        "with loop.only_run(folder):\n"
        f"    command, env = [sys.executable, '-c', {launcher!r}], loop.environment(folder)\n"
        "    loop.run_logged(command, folder / 'log', env, str(folder / 'stage'))\n"
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
        "import sys; from veripo_trl.loop import plan, run as loop; from veripo_trl.loop.plan import CONFIGS, read_loop\n"
        f"plan.command_of = lambda stage, *_: [sys.executable, '-c', {launcher!r}, stage['output_dir']]\n"
        "loop.check_settings = lambda stages: None\n"
        "loop.run_loop(read_loop(str(CONFIGS / 'tiny' / 'veripo.yaml')))\n"
    )
    loop = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while (line := loop.stdout.readline()) != "at work\n":
        assert line
    loop.send_signal(number)
    said = loop.communicate(timeout=60)[0]
    assert loop.returncode == 128 + number
    assert said.count(f"ended by {number.name}: the same command goes on") == 1
    assert (tmp_path / "outputs/veripo/cold-start/checkpoint").read_text() == number.name
    assert state(tmp_path, "veripo")["cold-start"]["status"] == "stopped" and "ending" not in said


def test_no_process_of_this_node_is_signalled_for_a_trainer_on_another(tmp_path, monkeypatch):
    """Its id may be another process's here."""
    bystander = subprocess.Popen(["sleep", "99"])
    monkeypatch.setattr(loop_run, "holder", lambda folder: f"{bystander.pid} on elsewhere")
    read, seen = os.read, []

    def terminated_at_the_second(*args):
        seen.append(args)
        if len(seen) == 2:
            raise SystemExit(128 + signal.SIGTERM)
        return read(*args)

    monkeypatch.setattr(os, "read", terminated_at_the_second)
    launcher = ["sh", "-c", "trap 'echo passed on; exit' TERM; echo up; while :; do sleep 0.05; done"]
    with pytest.raises(SystemExit):
        loop_run.run_logged(launcher, tmp_path / "log", dict(os.environ), str(tmp_path))
    assert bystander.poll() is None and "passed on" in (tmp_path / "log").read_text()
    bystander.kill()
    bystander.wait()


def test_leftovers_are_ended(tmp_path):
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    env = {**os.environ, MARKER: str(run_folder.resolve())}
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(99)"
    ours = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)
        for code in ("import time; print('up', flush=True); time.sleep(99)", stubborn)
    ]
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], env={**env, MARKER: "/other"})
    for process in ours:
        process.stdout.readline()
    end_leftovers(run_folder, patience_s=1)
    assert [process.wait(5) for process in ours] == [-signal.SIGTERM, -signal.SIGKILL]
    assert other.poll() is None
    other.kill()


def test_leftovers_that_nobody_reaps_are_not_waited_for(tmp_path):
    """As in a container whose first process does not."""
    code = (
        "import subprocess, time; child = subprocess.Popen(['sleep', '99'], "
        f"env={{{MARKER!r}: {str(tmp_path.resolve())!r}}}); print('up', flush=True); time.sleep(99)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    parent.stdout.readline()
    started = time.monotonic()
    end_leftovers(tmp_path, patience_s=20)
    assert time.monotonic() - started < 10 and parent.poll() is None
    parent.kill()


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
    health = f"http://127.0.0.1:{(port := free_port())}/health"
    judge = {"judge_command": [sys.executable, "-c", JUDGE, port], "judge_health": health, "judge_start_timeout_s": 20}
    log, env = tmp_path / "judge.log", dict(os.environ)
    assert not answers(health)
    with judge_server(judge, log, env):
        assert answers(health)
        with pytest.raises(LoopError, match="end the server that is there"):
            with judge_server(judge, log, env):
                pass
    assert not answers(health)
    judge["judge_command"][-1] = 0
    with pytest.raises(LoopError, match=r"(?s)the judge ended \(1\).*no such model"):
        with judge_server(judge, log, env):
            pass
