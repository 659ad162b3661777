"""The Hub's faults: everything arrives exactly once, or one clear error names the command that finishes it."""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import make_rollouts, push_rollouts
from hub_server import HubServer

from veripo_trl.hub import ask
from veripo_trl.hub.ask import HubError
from veripo_trl.hub.locate import fetch, locate
from veripo_trl.hub.push import push_folder

SECRET = "hf_veryVerySecretToken"
REPO = "datasets/tester/rollouts"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer(token=SECRET) as server:
        server.use_in_this_process(monkeypatch, tmp_path / "hf_home")
        monkeypatch.setattr(ask, "RETRY_WAITS_S", (0.01,) * 3)
        yield server


def assert_whole(hub, store, pushed) -> None:
    held = hub.files(REPO)
    for file in store.files():
        assert held[f"rollouts/{file.name}"] == file.read_bytes()
    assert pushed["revision"] == hub.repos[REPO].branches["main"]


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        *((operation, {"status": 500}) for operation in ("commit", "create", "info", "tree", "whoami")),
        ("commit", {"status": 503, "times": 2}),
        *(("commit", {"status": status}) for status in (409, 412, 429, 502, 504)),
        ("create", {"status": 409, "message": "Cannot create repo: another conflicting operation is in progress"}),
        ("commit", {"drop": "before"}),
    ],
    ids=str,
)
def test_a_fault_that_passes_is_waited_out(hub, tmp_path, operation, fault):
    """What the client itself does not retry."""
    store = make_rollouts(tmp_path)
    hub.fail(operation, **fault)
    pushed = push_rollouts(store, "rollouts" if operation == "whoami" else "tester/rollouts")
    assert_whole(hub, store, pushed)
    assert hub.commits(REPO) == 1 and all(not fault.times for fault in hub.faults)
    assert len(hub.requests("put")) == 2


def test_a_fault_that_the_client_retries(hub, tmp_path):
    store = make_rollouts(tmp_path, files=1)
    hub.fail("put", status=503)
    assert_whole(hub, store, push_rollouts(store))
    assert hub.commits(REPO) == 1


def test_a_fault_that_stays_ends_in_one_error_and_the_same_push_finishes(hub, tmp_path):
    store = make_rollouts(tmp_path)
    hub.fail("commit", times=4, status=500)
    with pytest.raises(HubError, match="tester/rollouts .*push not finished.*same command again"):
        push_rollouts(store)
    assert hub.commits(REPO) == 0 and len(hub.requests("put")) == 2
    assert_whole(hub, store, push_rollouts(store))
    assert hub.commits(REPO) == 1
    assert len(hub.requests("put")) == 2  # what had arrived was not sent again
    assert_whole(hub, store, push_rollouts(store))
    assert hub.commits(REPO) == 1


def test_every_answer_lost_and_still_one_commit(hub, tmp_path):
    """The repository is made and the commit done, both answers lost, and the next question fails too."""
    store = make_rollouts(tmp_path)
    hub.fail("commit", drop="after")
    hub.fail("create", drop="after")
    hub.fail("tree", status=500)
    assert_whole(hub, store, push_rollouts(store))
    assert hub.commits(REPO) == 1 and len(hub.requests("commit")) == 1


def test_a_commit_of_somebody_else_in_between_is_kept(hub, tmp_path):
    store = make_rollouts(tmp_path)
    push_rollouts(store)
    repo = hub.repos[REPO]
    original = hub.next_fault

    def interfere(operation):
        if operation == "commit":
            hub.next_fault = original
            repo.add("main", "by hand", {**hub.files(REPO), "NOTES.md": b"mine"})
        return original(operation)

    hub.next_fault = interfere
    make_rollouts(tmp_path, files=3)
    push_rollouts(store)
    assert hub.files(REPO)["NOTES.md"] == b"mine" and len(hub.requests("commit", status=412)) == 1
    assert hub.commits(REPO) == 3


def test_killed_during_an_upload_the_next_push_goes_on(hub, tmp_path):
    """SIGKILL while the second file's PUT hangs: the first is not sent again."""
    store = make_rollouts(tmp_path)
    code = (
        "from veripo_trl.hub.push import push_folder; push_folder("
        f"{str(store.folder)!r}, 'tester/rollouts', repo_type='dataset', card='# x', path_in_repo='rollouts')"
    )
    hub.fail("put", delay_s=0)
    hub.fail("put", delay_s=30, drop="before")
    env = {**os.environ, **hub.environment(tmp_path / "other")}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    deadline = time.time() + 60
    while time.time() < deadline and not (hub.blobs and len(hub.requests("put")) == 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(hub.blobs) == 1 and hub.commits(REPO) == 0
    assert (store.folder / "_push").exists()  # what the kill left
    push_rollouts(store)
    assert not (store.folder / "_push").exists()
    assert hub.commits(REPO) == 1 and len(hub.requests("put")) == 3
    assert all(hub.files(REPO)[f"rollouts/{file.name}"] == file.read_bytes() for file in store.files())


FULL, LIMIT = "Storage quota exceeded", "Private storage limit"
REFUSALS = {
    "read-only token": ("hf_read_only", None, "403.*write role|write role.*403"),
    "bad token": ("hf_wrong", None, "no valid token: log in"),
    "quota at the commit": (SECRET, ("commit", {"status": 402, "message": FULL}), FULL),
    "quota at the upload": (SECRET, ("batch", {"status": 403, "message": LIMIT}), LIMIT),
    "refused upload": (SECRET, ("put", {"status": 403, "message": "AccessDenied"}), "AccessDenied|403"),
    "echo of the token": (SECRET, ("commit", {"status": 400, "message": f"bad {SECRET}"}), r"bad \(token\)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_said_once_at_once_without_the_token(name, hub, tmp_path, monkeypatch, caplog, capsys):
    token, fault, message = REFUSALS[name]
    monkeypatch.setenv("HF_TOKEN", token)
    caplog.set_level(logging.INFO)
    store = make_rollouts(tmp_path)
    if fault:
        hub.fail(fault[0], times=100, **fault[1])
    with pytest.raises(HubError, match=f"(?s)tester/rollouts.*({message})") as caught:
        push_rollouts(store)
    hub.faults.clear()
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert len(hub.requests("commit")) <= 1  # not tried again
    assert str(caught.value).count("\n") == 0
    push_rollouts(store)  # with the right token, or the quota raised
    assert hub.commits(REPO) == 1
    said = str(caught.value) + caplog.text + "".join(capsys.readouterr())
    for secret in (SECRET, "hf_read_only", "hf_wrong"):
        assert secret not in said
        assert all(secret.encode() not in data for data in hub.files(REPO).values())


def test_nobody_there(hub, tmp_path, monkeypatch):
    store = make_rollouts(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="tester/rollouts.*same command again"):
        push_rollouts(store)


def test_a_hub_that_says_yes_and_keeps_nothing(hub, tmp_path):
    """Verification: the commit's own answer is not believed."""
    store = make_rollouts(tmp_path)
    push_rollouts(store)
    repo = hub.repos[REPO]
    make_rollouts(tmp_path, files=3)
    repo.add = lambda branch, title, files: repo.branches["main"]
    with pytest.raises(HubError, match="took every commit, but .* does not hold README.md, rollouts/"):
        push_rollouts(store)


def test_a_hub_that_keeps_other_bytes(hub, tmp_path):
    store = make_rollouts(tmp_path)
    name = f"rollouts/{store.files()[0].name}"
    push_rollouts(store)
    head = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]
    head["files"][name] = bytes(len(head["files"][name]))  # of the same size
    push_rollouts(store)
    assert hub.files(REPO)[name] == store.files()[0].read_bytes() and hub.commits(REPO) == 2


@pytest.mark.parametrize("operation", ["info", "resolve"])
def test_reading_waits_out_a_fault(hub, tmp_path, operation):
    store = make_rollouts(tmp_path)
    push_folder(store.folder, "tester/rollouts", repo_type="dataset", card="# x\n")
    hub.fail(operation, status=503)
    folder = fetch(**locate("tester/rollouts", "dataset"))
    assert len(list(folder.glob("*.parquet"))) == 2
