"""Push files to the Hub, into repositories of ours alone; a push counts when what arrived matches."""

import fnmatch
import os
import re
import shutil
from pathlib import Path

import yaml
from huggingface_hub import HfApi, RepoCard
from huggingface_hub.errors import RepositoryNotFoundError

from veripo_trl.files.disk import FileError, read_parquet, write_whole
from veripo_trl.hub.ask import HubError, ask
from veripo_trl.hub.cards import TAG, shown_name

PATTERNS = {
    "dataset": ["*.parquet"],
    "model": [
        "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
        "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
        "processor_config.json", "*preprocessor_config.json", "chat_template*", "veripo_trl.json", "curves.png",
    ],
}  # fmt: skip
# Ours that may hold paths of this machine; pickles, one of which (training_args.bin) may hold the token.
NEVER = ("_*", ".*", "*.bin", "*.pt", "*.pth", "*.pkl")
_ABSOLUTE = re.compile(r"/|~|\\|[A-Za-z]:[\\/]|file:", re.IGNORECASE)
_AGAIN = "Start the same command again: it sends what is missing, and nothing twice."


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: str,
    card: str,
    private: bool = True,
    patterns: list[str] | None = None,
    path_in_repo: str = "",
    replaced: dict[str, str] | None = None,
    message: str = "Push by veripo_trl",
    branch: str = "main",
) -> dict:
    """Make a repository hold a folder's files and a card, and make sure that it does.

    A push that broke is finished by the same push again: what arrived is not sent twice. Files that the repository has
    below `path_in_repo`, that match the patterns and that the folder has not are removed from the branch (its history
    keeps them). So only a repository that is empty, or whose card has our tag, is pushed to.

    Args:
        repo_type: "dataset" or "model". card: text of the README.md, of `hub.cards`.
        private: of a repository that is created; one that is public already is refused. Without it, one that exists
            keeps what it is.
        patterns: globs relative to `folder`, by default `PATTERNS`; never what matches `NEVER`.
        path_in_repo: folder in the repository for the files, the card excepted.
        replaced: {path in the repository: text} that stands there instead of the folder's file.

    Returns:
        {"repo_id", "revision", "url"}, as the Hub says.

    Raises:
        HubError: nothing to push, a path of this machine in a dataset, a repository that holds something else or is
            public; or the Hub refuses, cannot be reached, or does not hold every file in the end.
    """
    folder, patterns = Path(folder), patterns or PATTERNS[repo_type]
    files = find_files(folder, patterns)
    if not files:
        raise HubError(f"{folder}: no file matches {', '.join(patterns)}; nothing was pushed to {repo_id}.")
    for name in files:
        if repo_type == "dataset" and name.endswith(".parquet"):
            refuse_absolute_paths(folder / name)
    staged = folder / "_push"
    shutil.rmtree(staged, ignore_errors=True)  # of a push that was killed
    for name in files:
        _link(folder / name, staged / path_in_repo / name)
    for name, text in {**(replaced or {}), "README.md": card}.items():
        write_whole(staged / name, text.encode())
    stale = [f"{path_in_repo}/{pattern}".lstrip("/") for pattern in patterns]
    try:
        return _send(staged, repo_id, repo_type, private=private, stale=stale, message=message, branch=branch)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _send(
    staged: Path, repo_id: str, repo_type: str, *, private: bool, stale: list[str], message: str, branch: str
) -> dict:
    api, what = HfApi(), f"{repo_id} ({repo_type}): push not finished"
    repo_id = prepare_repo(repo_id, repo_type=repo_type, private=private, branch=branch)
    repository = {"repo_id": repo_id, "repo_type": repo_type, "revision": branch}

    def upload() -> None:
        head = api.repo_info(**repository).sha
        # With its parent named, a commit of somebody else in between is no part of ours: it is refused, and tried again.
        api.upload_folder(
            folder_path=staged, commit_message=message, parent_commit=head, delete_patterns=stale, **repository
        )

    ask(upload, what, _AGAIN)
    repository["revision"] = ask(lambda: api.repo_info(**repository).sha, what, _AGAIN)
    found = ask(lambda: api.verify_repo_checksums(local_dir=staged, **repository), what, _AGAIN)
    if differing := sorted([*found.extra_paths, *(item["path"] for item in found.mismatches)]):
        raise HubError(
            f"{repo_id}: the Hub took every commit, but at its revision {repository['revision']} it does not hold "
            f"{', '.join(differing[:5])} ({len(differing)} files) as they are here. {_AGAIN}"
        )
    url = f"{api.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    return {"repo_id": repo_id, "revision": repository["revision"], "url": url}


def _link(source: Path, target: Path) -> None:
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
            for value in filter(None, values.unique().to_pylist()):
                if _ABSOLUTE.match(value) or (name == "policy" and shown_name(value) != value):
                    raise HubError(
                        f"{file}: column {name!r} has {value!r}, a path of this machine. Expected a path relative to "
                        f"media_root (or, for a policy, a Hub name or a folder below the working directory). Nothing "
                        f"was pushed."
                    )


def prepare_repo(repo_id: str, *, repo_type: str, private: bool, branch: str = "main") -> str:
    """Make sure that a repository can be pushed to, and create it, before hours are spent on what goes there.

    Returns:
        Its full name, owner included.

    Raises:
        HubError: it is public where `private` is asked for, it holds what no push of ours made, or the Hub refuses.
    """
    api = HfApi()

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

    return ask(prepare, f"{repo_id} ({repo_type})", "Then start the same command again.")


def _refuse_foreign(api: HfApi, repository: dict, sha: str) -> None:
    """Raise HubError unless the repository is as empty as the Hub makes them, or its card has our tag: a push replaces
    the card and files of the same names, and removes others."""
    found, text, tags = api.list_repo_files(**repository, revision=sha), "", None
    if "README.md" in found:
        file = api.hf_hub_download(**repository, filename="README.md", revision=sha)
        text = Path(file).read_text(encoding="utf-8-sig", errors="replace")
        try:
            card = RepoCard(text, ignore_metadata_errors=True)
            text, tags = card.text, card.data.get("tags")
        except (ValueError, yaml.YAMLError):
            pass  # not a card of ours: its text says so
    others = sorted(set(found) - {"README.md", ".gitattributes", ".gitignore"})
    if TAG in (tags if isinstance(tags, list) else [tags]) or not (others or text.strip()):
        return
    shown = others or ["README.md"]
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    raise HubError(
        f"{repository['repo_id']} ({repository['repo_type']}) was not made by a push of veripo_trl (its README.md has no "
        f"tag {TAG!r}) and holds {', '.join(shown[:5])}{more}, which a push could replace or remove. Nothing was sent. "
        f"Give another id: a repository that is empty or does not exist."
    )
