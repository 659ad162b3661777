"""The Hub: folders pushed and looked at after they arrived, datasets fetched at a revision, and a small command.

    python -m veripo_trl.hub push outputs/my_grpo/rollouts my-name/my-rollouts --type dataset --path_in_repo rollouts
    python -m veripo_trl.hub fetch my-name/my-pairs --revision main
"""

import argparse
import fnmatch
import functools
import hashlib
import logging
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow.parquet as pq
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from pyarrow import ArrowInvalid

from .hub_cards import TAG, dataset_card, model_card, read_card, shown_name, tagged, tags_of

__all__ = ["HubError", "Pushed", "dataset_card", "fetch_dataset", "fetch_file", "input_revision", "model_card",
           "push_folder", "resolve_revision"]  # fmt: skip
logger = logging.getLogger(__name__)

RETRY_WAITS_S = (1, 2, 4, 8, 16)
RETRIED_STATUS = {408, 409, 412, 429, 500, 502, 503, 504}
FILES_PER_COMMIT = 500  # the Hub gives up on commits of many thousand files
PATTERNS = {
    "dataset": ["*.parquet"],
    "model": [
        "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
        "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
        "processor_config.json", "*preprocessor_config.json", "chat_template*",
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


class HubError(RuntimeError):
    """The Hub refused, or does not hold what it should; the message names the repository and what to do."""


@dataclass(frozen=True)
class Pushed:
    """What the Hub says it holds: `files`: paths in the repository, of which size and content were compared."""

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

    The Hub is asked what it holds, is sent what differs, and is asked again; so a push that broke is finished by the
    next, and one whose answer was lost is not repeated. Files of the same kind that the repository has in the same
    folders and the local folder has not are removed from the branch (its history keeps them). So only a repository
    that is empty, or that such a push made, is pushed to: its card has the tag `hub_cards.TAG`.

    Args:
        repo_type: "dataset" or "model". patterns: globs relative to `folder`, by default `PATTERNS`; never what
            matches `NEVER`.
        card: text of the README.md, kept in `folder` too, where the command `push` finds it. It gets the tag.
        private: of a repository that is created; one that is public already is refused. Without it, one that exists
            keeps what it is.
        path_in_repo: folder in the repository for the files, the card excepted.

    Raises:
        HubError: nothing to push, a path of this machine in a dataset, a repository that holds something else or is
            public; or the Hub refuses, cannot be reached, or does not hold every file in the end: then it names the
            command that finishes the push.
    """
    folder = Path(folder)
    patterns = patterns or PATTERNS[repo_type]
    target = PurePosixPath(path_in_repo)
    local = {str(target / path): folder / path for path in find_files(folder, patterns)}
    if not local:
        raise HubError(f"{folder}: no file matches {', '.join(patterns)}; nothing was pushed to {repo_id}.")
    if repo_type == "dataset":
        for file in local.values():
            if file.suffix == ".parquet":
                refuse_absolute_paths(file)
    write_card(folder, tagged(card))
    local["README.md"] = folder / "README.md"
    command = push_command(folder, repo_id, repo_type, private, patterns, path_in_repo, branch)
    api = HfApi(token=token)
    digest = functools.cache(_digest)
    waits = list(RETRY_WAITS_S)
    commits_left = len(local) // FILES_PER_COMMIT + len(RETRY_WAITS_S) + 1
    ours = False
    while True:
        try:
            repo_id = _full_id(api, repo_id)
            info, held = _repo(api, repo_id, repo_type, private, branch, ours=ours)
            ours = True
            differing = sorted(path for path, file in local.items() if not _same(file, held.get(path), digest))
            stale = _stale(held, local, patterns)
            if not differing and not stale:
                break
            if not commits_left:
                raise HubError(
                    f"{repo_id}: the Hub took every commit, but at its revision {info.sha} it does not hold "
                    f"{', '.join((differing + stale)[:5])} ({len(differing + stale)} files) as they are in {folder}."
                )
            commits_left -= 1
            # The card first: should the push break, it marks the repository as one that the next push may go on with.
            differing.sort(key=lambda path: path != "README.md")
            changes = [CommitOperationAdd(path, str(local[path])) for path in differing]
            changes += [CommitOperationDelete(path) for path in stale]
            # With its parent named, a commit that the Hub has done after all is not done twice.
            api.create_commit(repo_id, changes[:FILES_PER_COMMIT], repo_type=repo_type, revision=branch,
                              commit_message=message, parent_commit=info.sha)  # fmt: skip
            waits = list(RETRY_WAITS_S)
        except HubError:
            raise
        except _CLIENT_ERRORS as error:
            _wait_or_raise(error, waits, f"{repo_id} ({repo_type}): push not finished", token, f"Finish it: {command}")
    url = f"{api.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    return Pushed(repo_id, repo_type, info.sha, url, tuple(sorted(local)))


def find_files(folder: Path, patterns: list[str]) -> list[str]:
    """Paths below `folder` that a push with these patterns sends, with slashes, sorted."""
    found = {path.relative_to(folder) for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    allowed = (path for path in found if not any(fnmatch.fnmatch(part, never) for part in path.parts for never in NEVER))
    return sorted(path.as_posix() for path in allowed if path.as_posix() != "README.md")


def refuse_absolute_paths(file: Path) -> None:
    """Raise HubError if a parquet file names media or a policy by a path of this machine, or cannot be read."""
    try:
        parquet = pq.ParquetFile(file)
    except ArrowInvalid as error:
        raise HubError(f"{file}: expected a parquet file; it cannot be read: {error}. Nothing was pushed.") from error
    columns = [name for name in ("videos", "images", "policy") if name in parquet.schema_arrow.names]
    for batch in parquet.iter_batches(columns=columns) if columns else ():
        for name in columns:
            column = batch.column(name)
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
    temporary = folder / f"_README.{os.getpid()}"
    temporary.write_text(card, encoding="utf-8")
    os.replace(temporary, folder / "README.md")


def push_command(folder, repo_id, repo_type, private, patterns, path_in_repo, branch) -> str:
    """The command line that does the same push again, with the card that lies in the folder."""
    words = ["python", "-m", "veripo_trl.hub", "push", str(folder), repo_id, "--type", repo_type]
    if path_in_repo:
        words += ["--path_in_repo", path_in_repo]
    if patterns != PATTERNS[repo_type]:
        words += [word for pattern in patterns for word in ("--pattern", pattern)]
    words += [] if branch == "main" else ["--branch", branch]
    words += [] if private else ["--public"]
    return shlex.join(words)


def prepare_repo(repo_id: str, *, repo_type: str, private: bool, branch: str = "main", token: str | None = None) -> str:
    """Make sure that a repository can be pushed to, and create it, before hours are spent on what goes there.

    Returns:
        Its full name, owner included. Raises HubError.
    """
    api, waits = HfApi(token=token), list(RETRY_WAITS_S)
    while True:
        try:
            full = _full_id(api, repo_id)
            _repo(api, full, repo_type, private, branch)
            return full
        except HubError:
            raise
        except _CLIENT_ERRORS as error:
            _wait_or_raise(error, waits, f"{repo_id} ({repo_type})", token, "Then start the same command again.")


def fetch_dataset(repo_id: str, *, revision: str | None = None) -> tuple[Path, str]:
    """The parquet files and the card of a Hub dataset as a local folder, and the commit that they are of.

    Raises:
        HubError: no such dataset or revision, or the Hub cannot be reached and the cache does not have it.
    """
    sha = resolve_revision(repo_id, repo_type="dataset", revision=revision)
    wanted = ["*.parquet", "README.md"]
    download = functools.partial(snapshot_download, repo_id, repo_type="dataset", revision=sha, allow_patterns=wanted)
    return _downloaded(download, f"{repo_id} (dataset) at {sha}"), sha


def fetch_file(repo_id: str, name: str, *, revision: str | None = None) -> tuple[Path, str]:
    """One file of a Hub dataset as a local one, and the commit that it is of. Raises HubError as `fetch_dataset` does,
    and if the dataset has no such file."""
    sha = resolve_revision(repo_id, repo_type="dataset", revision=revision)
    what = f"{repo_id} (dataset) at {sha}"
    download = functools.partial(hf_hub_download, repo_id, name, repo_type="dataset", revision=sha)
    try:
        return _downloaded(download, what), sha
    except RemoteEntryNotFoundError:
        raise HubError(f"{what} holds no {name}. Name another dataset or revision.") from None


def _downloaded(download, what: str) -> Path:
    waits = list(RETRY_WAITS_S)
    while True:
        try:
            return Path(download())
        except RemoteEntryNotFoundError:
            raise
        except _CLIENT_ERRORS as error:
            _wait_or_raise(error, waits, what, None, "Then start the same command again.")


def resolve_revision(repo_id: str, *, repo_type: str, revision: str | None = None) -> str:
    """The commit that a branch or tag ("main" by default) of a repository is at; a commit is returned as it is.

    Without a connection the one of the local cache, with a warning. Raises HubError.
    """
    revision = revision or "main"
    if SHA.fullmatch(revision):
        return revision
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type) / "refs" / revision
    waits = list(RETRY_WAITS_S)
    while True:
        try:
            return HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision).sha
        except _CLIENT_ERRORS as error:
            if not isinstance(error, HfHubHTTPError) and cache.is_file():
                sha = cache.read_text().strip()
                logger.warning("%s: the Hub was not reached; %s is taken to be %s, as cached.", repo_id, revision, sha)
                return sha
            hint = "Correct the name or the revision, or log in if it is private."
            _wait_or_raise(error, waits, f"{repo_id} ({repo_type}) at {revision!r}", None, hint)


def input_revision(name_or_path: str, repo_type: str, revision: str | None = None) -> dict | None:
    """{"repo_id", "revision"} of something read from the Hub, its revision a commit; None for what lies here."""
    if not HUB_ID.fullmatch(name_or_path) or Path(name_or_path).exists():
        return None
    return {
        "repo_id": name_or_path,
        "revision": resolve_revision(name_or_path, repo_type=repo_type, revision=revision),
    }


def _full_id(api: HfApi, repo_id: str) -> str:
    return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def _repo(api: HfApi, repo_id: str, repo_type: str, private: bool, branch: str, *, ours: bool = False) -> tuple:
    """(what the Hub says about the repository at the branch, the files it holds there); both are created where missing.

    Raises HubError for a public one where `private` is asked for, and, unless it is known to be `ours`, for one that
    holds what no push of ours made: before anything is sent.
    """
    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        info = api.repo_info(repo_id, repo_type=repo_type)
    if private and not info.private:
        raise HubError(
            f"{repo_id} ({repo_type}) is public, and the push is meant to be private: nothing was sent. Make it private "
            f"in its settings on the Hub, or give another id. To push publicly, set hub_private_repo: false (training) "
            f"or hub_private: false (verify_rollouts.py), or give the command --public."
        )
    held = _held(api, repo_id, repo_type, info.sha)
    if not ours:
        _refuse_foreign(api, repo_id, repo_type, info.sha, held)
    if branch == "main":
        return info, held
    api.create_branch(repo_id, repo_type=repo_type, branch=branch, exist_ok=True)
    info = api.repo_info(repo_id, repo_type=repo_type, revision=branch)
    held = _held(api, repo_id, repo_type, info.sha)
    if not ours:
        _refuse_foreign(api, repo_id, repo_type, info.sha, held)
    return info, held


def _refuse_foreign(api: HfApi, repo_id: str, repo_type: str, sha: str, held: dict) -> None:
    """Raise HubError unless the repository is as empty as the Hub makes them, or its card has our tag: a push replaces
    the card and files of the same names, and removes others."""
    header, text = {}, ""
    if "README.md" in held:
        file = api.hf_hub_download(repo_id, "README.md", repo_type=repo_type, revision=sha)
        header, text = read_card(Path(file).read_text(encoding="utf-8", errors="replace"))
    others = sorted(set(held) - {"README.md", ".gitattributes", ".gitignore"})
    if TAG in tags_of(header) or not (others or text.strip()):
        return
    shown = others or ["README.md"]
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    raise HubError(
        f"{repo_id} ({repo_type}) was not made by a push of veripo_trl (its README.md has no tag {TAG!r}) and holds "
        f"{', '.join(shown[:5])}{more}, which a push could replace or remove. Nothing was sent. Give another id: a "
        f"repository that is empty or does not exist."
    )


def _held(api: HfApi, repo_id: str, repo_type: str, sha: str) -> dict:
    """{path: the Hub's record of the file} at a commit."""
    tree = api.list_repo_tree(repo_id, repo_type=repo_type, revision=sha, recursive=True)
    return {item.path: item for item in tree if hasattr(item, "size")}


def _same(file: Path, held, digest) -> bool:
    if held is None or held.size != file.stat().st_size:
        return False
    return digest(file, "sha256") == held.lfs.sha256 if held.lfs else digest(file, "sha1") == held.blob_id


def _digest(file: Path, kind: str) -> str:
    """SHA-256 of a file's content, or the SHA-1 under which git keeps it."""
    digest = hashlib.new(kind)
    if kind == "sha1":
        digest.update(b"blob %d\0" % file.stat().st_size)
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _stale(held: dict, local: dict[str, Path], patterns: list[str]) -> list[str]:
    """Files of an earlier push that this folder has not: they would be read together with the new ones."""
    folders = {PurePosixPath(path).parent for path in local if path != "README.md"}
    kinds = [pattern.rsplit("/", 1)[-1] for pattern in patterns]
    found = (path for path in map(PurePosixPath, held) if str(path) not in local and path.parent in folders)
    return sorted(
        str(path)
        for path in found
        if not path.name.startswith(".") and any(fnmatch.fnmatch(path.name, kind) for kind in kinds)
    )


def _wait_or_raise(error: Exception, waits: list[float], what: str, token: str | None, remedy: str) -> None:
    """Wait after a fault that may pass; otherwise raise HubError with what was said, secrets left out."""
    reason = _reason(error)
    for secret in filter(None, (token, get_token())):
        reason = reason.replace(secret, "(token)")
    if waits and _may_pass(error):
        wait = waits.pop(0)
        logger.warning("%s: %s. Trying again in %s s.", what, reason, wait)
        time.sleep(wait)
        return
    raise HubError(f"{what}: {reason}. {remedy}") from None


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m veripo_trl.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    push = commands.add_parser("push", help="push a folder, or finish a push that broke, and compare what arrived")
    push.add_argument("folder", help="holds the files and the card, README.md")
    push.add_argument("repo_id", help="owner/name on the Hub; created where missing")
    push.add_argument("--type", choices=sorted(PATTERNS), required=True, help="what kind of repository")
    push.add_argument("--path_in_repo", default="", help="folder in the repository for the files; the card is at its top")
    push.add_argument("--pattern", action="append", help="files to push, relative to the folder; may be repeated. "
                      "Default: parquet files of a dataset; weights, configuration and processor of a model")  # fmt: skip
    push.add_argument("--card", help="another file than <folder>/README.md; it is copied there")
    push.add_argument("--branch", default="main", help="created where missing")
    push.add_argument("--public", action="store_true", help="create the repository as a public one; private otherwise")
    fetch = commands.add_parser("fetch", help="download a dataset's parquet files and print their folder and commit")
    fetch.add_argument("repo_id")
    fetch.add_argument("--revision", help="branch, tag or commit; default main")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "fetch":
            print(*fetch_dataset(arguments.repo_id, revision=arguments.revision), sep="\n")
            return
        card = Path(arguments.card or Path(arguments.folder) / "README.md")
        if not card.is_file():
            raise HubError(f"{card}: no such file. Write a card there, or name one with --card. Nothing was pushed.")
        pushed = push_folder(
            arguments.folder, arguments.repo_id, repo_type=arguments.type, card=card.read_text(encoding="utf-8"),
            private=not arguments.public, patterns=arguments.pattern, path_in_repo=arguments.path_in_repo,
            branch=arguments.branch,
        )  # fmt: skip
    except HubError as error:
        sys.exit(str(error))
    print(f"{pushed.url} holds all {len(pushed.files)} files at revision {pushed.revision}")


if __name__ == "__main__":
    main()
