"""The Hub: folders pushed and compared with what arrived, datasets fetched at a revision."""

import fnmatch
import functools
import glob
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from veripo_trl.errors import VeripoError
from veripo_trl.files.disk import FileError, read_parquet, write_whole
from veripo_trl.hub.cards import TAG, dataset_card, model_card, read_card, shown_name, tagged, tags_of

__all__ = ["HubError", "Pushed", "dataset_card", "fetch_dataset", "fetch_file", "input_revision", "model_card",
           "push_folder", "resolve_revision"]  # fmt: skip
logger = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_WAITS_S = (1, 2, 4, 8, 16)
RETRIED_STATUS = {408, 409, 412, 429, 500, 502, 503, 504}
PATTERNS = {
    "dataset": ["*.parquet"],
    "model": [
        "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
        "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
        "processor_config.json", "*preprocessor_config.json", "chat_template*", "veripo_trl.json",
    ],
}  # fmt: skip
# Ours that may hold paths of this machine; pickles, one of which (training_args.bin) may hold the token.
NEVER = ("_*", ".*", "*.bin", "*.pt", "*.pth", "*.pkl")
HUB_ID = re.compile(r"[\w.\-]+(/[\w.\-]+)?")
SHA = re.compile(r"[0-9a-f]{40}")
_ABSOLUTE = re.compile(r"/|~|\\|[A-Za-z]:[\\/]|file:", re.IGNORECASE)
# What the client raises: answers that are errors and connections that break, uploads given up (RuntimeError), answers
# that it cannot read and ids it refuses (ValueError), offline mode (OSError).
_CLIENT_ERRORS = (HTTPError, RuntimeError, ValueError, OSError)
_AGAIN = "Start the same command again: it sends what is missing, and nothing twice."


class HubError(VeripoError):
    """The Hub refused, or does not hold what it should; the message names the repository and what to do."""


@dataclass(frozen=True)
class Pushed:
    """What the Hub says it holds: `files`: paths in the repository whose content was compared."""

    repo_id: str
    repo_type: str
    revision: str
    url: str
    files: tuple[str, ...]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: str,
    card: str,
    private: bool = True,
    patterns: list[str] | None = None,
    path_in_repo: str = "",
    message: str = "Push by veripo_trl",
    branch: str = "main",
    token: str | None = None,
) -> Pushed:
    """Make a repository hold a folder's files and a card, and make sure that it does.

    A push that broke is finished by the same push again: what arrived is not sent twice. Files of the same kind that
    the repository has in the same folders and the local folder has not are removed from the branch (its history keeps
    them). So only a repository that is empty, or that such a push made, is pushed to: its card has the tag
    `hub_cards.TAG`.

    Args:
        repo_type: "dataset" or "model". patterns: globs relative to `folder`, by default `PATTERNS`; never what
            matches `NEVER`.
        card: text of the README.md, kept in `folder` too. It gets the tag.
        private: of a repository that is created; one that is public already is refused. Without it, one that exists
            keeps what it is.
        path_in_repo: folder in the repository for the files, the card excepted.

    Raises:
        HubError: nothing to push, a path of this machine in a dataset, a repository that holds something else or is
            public; or the Hub refuses, cannot be reached, or does not hold every file in the end.
    """
    folder, patterns = Path(folder), patterns or PATTERNS[repo_type]
    files = find_files(folder, patterns)
    if not files:
        raise HubError(f"{folder}: no file matches {', '.join(patterns)}; nothing was pushed to {repo_id}.")
    if repo_type == "dataset":
        for name in files:
            if name.endswith(".parquet"):
                refuse_absolute_paths(folder / name)
    write_card(folder, tagged(card))
    api, what = HfApi(token=token), f"{repo_id} ({repo_type}): push not finished"
    repo_id = prepare_repo(repo_id, repo_type=repo_type, private=private, branch=branch, token=token)
    repository = {"repo_id": repo_id, "repo_type": repo_type, "revision": branch}
    for broken_off in folder.glob("_push.*"):
        shutil.rmtree(broken_off)
    # A folder with the repository's layout, of links where the disk has them.
    with tempfile.TemporaryDirectory(dir=folder, prefix="_push.") as staged:
        staged = Path(staged)
        link(folder / "README.md", staged / "README.md")
        for name in files:
            link(folder / name, staged / path_in_repo / name)
        local = {path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()}

        def upload():
            head = api.repo_info(**repository).sha
            held = api.list_repo_files(**repository | {"revision": head})
            stale = [glob.escape(path) for path in _stale(held, local, patterns)]
            # With its parent named, a commit of somebody else in between is no part of ours.
            api.upload_folder(folder_path=staged, commit_message=message, parent_commit=head,
                              delete_patterns=stale or None, **repository)  # fmt: skip

        for _ in range(2):  # the second time for what the Hub did not keep
            _asking(upload, what, token=token)
            head = _asking(lambda: api.repo_info(**repository).sha, what, token=token)
            found = _asking(
                lambda head=head: api.verify_repo_checksums(local_dir=staged, **repository | {"revision": head}),
                what, token=token,
            )  # fmt: skip
            differing = sorted([*found.extra_paths, *(item["path"] for item in found.mismatches)])
            if not differing:
                break
        else:
            raise HubError(
                f"{repo_id}: the Hub took every commit, but at its revision {head} it does not hold "
                f"{', '.join(differing[:5])} ({len(differing)} files) as they are in {folder}."
            )
    url = f"{api.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    return Pushed(repo_id, repo_type, head, url, tuple(sorted(local)))


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def find_files(folder: Path, patterns: list[str]) -> list[str]:
    """Paths below `folder` that a push with these patterns sends, with slashes, sorted."""
    found = {path.relative_to(folder) for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    allowed = (path for path in found if not any(fnmatch.fnmatch(part, never) for part in path.parts for never in NEVER))
    return sorted(path.as_posix() for path in allowed if path.as_posix() != "README.md")


def refuse_absolute_paths(file: Path) -> None:
    """Raise HubError if a parquet file names media or a policy by a path of this machine, or cannot be read."""
    try:
        table = read_parquet(file)
    except FileError as error:
        raise HubError(f"{error} Nothing was pushed.") from error
    for name in ("videos", "images", "policy"):
        for column in table[name].chunks if name in table.column_names else ():
            values = column if name == "policy" else column.flatten()
            for value in values.unique().to_pylist():
                leaves = name == "policy" and value is not None and shown_name(value) != value
                if leaves or (value is not None and _ABSOLUTE.match(value)):
                    raise HubError(
                        f"{file}: column {name!r} has {value!r}, a path of this machine. Expected a path relative to "
                        f"media_root (or, for a policy, a Hub name or a folder below the working directory). Nothing "
                        f"was pushed."
                    )


def write_card(folder: Path, card: str) -> None:
    """Write a folder's README.md whole or not at all."""
    write_whole(folder / "README.md", card.encode())


def prepare_repo(repo_id: str, *, repo_type: str, private: bool, branch: str = "main", token: str | None = None) -> str:
    """Make sure that a repository can be pushed to, and create it, before hours are spent on what goes there.

    Returns:
        Its full name, owner included.

    Raises:
        HubError: it is public where `private` is asked for, it holds what no push of ours made, or the Hub refuses.
    """
    api = HfApi(token=token)

    def prepare() -> str:
        full = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        repository = {"repo_id": full, "repo_type": repo_type}
        try:
            info = api.repo_info(**repository)
        except RepositoryNotFoundError:
            api.create_repo(**repository, private=private, exist_ok=True)
            info = api.repo_info(**repository)
        if private and not info.private:
            raise HubError(
                f"{full} ({repo_type}) is public, and the push is meant to be private: nothing was sent. Make it "
                f"private in its settings on the Hub, or give another id. To push publicly, set hub_private_repo: false "
                f"(training) or hub_private: false (verify_rollouts.py)."
            )
        _refuse_foreign(api, repository, info.sha)
        if branch != "main":
            api.create_branch(**repository, branch=branch, exist_ok=True)
            _refuse_foreign(api, repository, api.repo_info(**repository, revision=branch).sha)
        return full

    return _asking(prepare, f"{repo_id} ({repo_type})", "Then start the same command again.", token=token)


def fetch_dataset(repo_id: str, *, revision: str | None = None) -> tuple[Path, str]:
    """The parquet files and the card of a Hub dataset as a local folder, and the commit that they are of.

    Raises:
        HubError: no such dataset or revision, or the Hub cannot be reached and the cache does not have it.
    """
    sha = resolve_revision(repo_id, repo_type="dataset", revision=revision)
    download = functools.partial(
        snapshot_download, repo_id, repo_type="dataset", revision=sha, allow_patterns=["*.parquet", "README.md"]
    )
    return Path(_asking(download, f"{repo_id} (dataset) at {sha}")), sha


def fetch_file(repo_id: str, name: str, *, revision: str | None = None) -> tuple[Path, str]:
    """One file of a Hub dataset as a local one, and the commit that it is of. Raises HubError as `fetch_dataset` does,
    and if the dataset has no such file."""
    sha = resolve_revision(repo_id, repo_type="dataset", revision=revision)
    what = f"{repo_id} (dataset) at {sha}"
    download = functools.partial(hf_hub_download, repo_id, name, repo_type="dataset", revision=sha)
    try:
        return Path(_asking(download, what)), sha
    except RemoteEntryNotFoundError:
        raise HubError(f"{what} holds no {name}. Name another dataset or revision.") from None


def resolve_revision(repo_id: str, *, repo_type: str, revision: str | None = None) -> str:
    """The commit that a branch or tag ("main" by default) of a repository is at; a commit is returned as it is.

    Without a connection the one of the local cache, with a warning. Raises HubError.
    """
    revision = revision or "main"
    if SHA.fullmatch(revision):
        return revision
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type) / "refs" / revision

    def ask() -> str:
        try:
            return HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision).sha
        except _CLIENT_ERRORS as error:
            if isinstance(error, HfHubHTTPError) or not cache.is_file():
                raise
            sha = cache.read_text(encoding="utf-8").strip()
            logger.warning("%s: the Hub was not reached; %s is taken to be %s, as cached.", repo_id, revision, sha)
            return sha

    remedy = "Correct the name or the revision, or log in if it is private."
    return _asking(ask, f"{repo_id} ({repo_type}) at {revision!r}", remedy)


def input_revision(name_or_path: str, repo_type: str, revision: str | None = None) -> dict | None:
    """{"repo_id", "revision"} of something read from the Hub, its revision a commit; None for what lies here."""
    if not HUB_ID.fullmatch(name_or_path) or Path(name_or_path).exists():
        return None
    return {
        "repo_id": name_or_path,
        "revision": resolve_revision(name_or_path, repo_type=repo_type, revision=revision),
    }


def _refuse_foreign(api: HfApi, repository: dict, sha: str) -> None:
    """Raise HubError unless the repository is as empty as the Hub makes them, or its card has our tag: a push replaces
    the card and files of the same names, and removes others."""
    header, text = {}, ""
    held = set(api.list_repo_files(**repository, revision=sha))
    if "README.md" in held:
        file = api.hf_hub_download(**repository, filename="README.md", revision=sha)
        header, text = read_card(Path(file).read_text(encoding="utf-8", errors="replace"))
    others = sorted(held - {"README.md", ".gitattributes", ".gitignore"})
    if TAG in tags_of(header) or not (others or text.strip()):
        return
    shown = others or ["README.md"]
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    raise HubError(
        f"{repository['repo_id']} ({repository['repo_type']}) was not made by a push of veripo_trl (its README.md has no "
        f"tag {TAG!r}) and holds {', '.join(shown[:5])}{more}, which a push could replace or remove. Nothing was sent. "
        f"Give another id: a repository that is empty or does not exist."
    )


def _stale(held: list[str], local: set[str], patterns: list[str]) -> list[str]:
    """Files of an earlier push that this folder has not: they would be read together with the new ones."""
    folders = {PurePosixPath(path).parent for path in local if path != "README.md"}
    kinds = [pattern.rsplit("/", 1)[-1] for pattern in patterns]
    found = (path for path in map(PurePosixPath, held) if str(path) not in local and path.parent in folders)
    return sorted(
        str(path)
        for path in found
        if not path.name.startswith(".") and any(fnmatch.fnmatch(path.name, kind) for kind in kinds)
    )


def _asking(call: Callable[[], T], what: str, remedy: str = _AGAIN, *, token: str | None = None) -> T:
    """What `call` returns, tried again after faults that may pass and that the client does not retry by itself.

    Raises:
        HubError: what was said in the end, secrets left out. RemoteEntryNotFoundError: as it comes.
    """
    waits = list(RETRY_WAITS_S)
    while True:
        try:
            return call()
        except (HubError, RemoteEntryNotFoundError):
            raise
        except _CLIENT_ERRORS as error:
            reason = _reason(error)
            for secret in filter(None, (token, get_token())):
                reason = reason.replace(secret, "(token)")
            if not waits or not _may_pass(error):
                raise HubError(f"{what}: {reason}. {remedy}") from None
            logger.warning("%s: %s. Trying again in %s s.", what, reason, waits[0])
            time.sleep(waits.pop(0))


def _may_pass(error: Exception) -> bool:
    """Whether trying again may help. What the client retries itself is final when it arrives here."""
    if isinstance(error, HfHubHTTPError):
        url = str(error.response.url)
        final = "/preupload/" in url or ".git/info/lfs" in url
        return error.response.status_code in RETRIED_STATUS and not final
    return isinstance(error, HTTPError) and not isinstance(error, OfflineModeIsEnabled)


def _reason(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    if isinstance(cause, OfflineModeIsEnabled):
        return "the Hub was not asked, because HF_HUB_OFFLINE is set: unset it"
    if not isinstance(cause, HfHubHTTPError):
        return f"{error} {cause if cause is not error else ''}".strip().splitlines()[0] or type(error).__name__
    status = cause.response.status_code
    said = cause.server_message or str(cause).strip().splitlines()[0]
    meaning = {
        401: "no valid token: log in (`hf auth login`) or set HF_TOKEN",
        402: "the account's storage or plan does not allow it",
        403: "the token may not write there: it needs the write role and the owner's rights",
        404: "no such repository or revision, or the token may not see it",
    }.get(status, "the Hub answered with an error")
    return f"{meaning} (HTTP {status}: {said.splitlines()[0]})"
