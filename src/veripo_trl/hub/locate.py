"""Whether a name means something here or a repository on the Hub; the commit and the files of the latter.

huggingface_hub is imported where it is asked: reading local rows does not wait for it.
"""

import logging
import re
from pathlib import Path

logger = logging.getLogger(__name__)

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_DATA_FILE = re.compile(r"\.(jsonl?|parquet)(\.\w+)?$")
SHA = re.compile(r"[0-9a-f]{40}")


def is_local(name: str) -> bool:
    """Whether a name means a folder or file here, be it there or not: it exists, or it can be no repository (which is
    `owner/name`), or it is the name of a data file, or it lies in `outputs/`, where runs write."""
    return (
        _REPOSITORY.fullmatch(name) is None
        or _DATA_FILE.search(name) is not None
        or name.startswith("outputs/")
        or Path(name).exists()
    )


def locate(name: str, kind: str, revision: str | None = None) -> dict | None:
    """{"repo_id", "revision"} of a repository on the Hub, its revision a commit; None for what `is_local`.

    Args:
        kind: "model" or "dataset". revision: a branch, tag or commit; "main" by default. Without a connection the
            commit that the local cache has of it, with a warning.

    Raises:
        HubError: no such repository or revision, or the Hub cannot be reached and the cache does not have it.
    """
    if is_local(name):
        return None
    revision = revision or "main"
    if not SHA.fullmatch(revision):
        revision = _commit(name, kind, revision)
    return {"repo_id": name, "revision": revision}


def fetch(repo_id: str, revision: str, patterns: tuple[str, ...] = ("*.parquet",)) -> Path:
    """The files of a Hub dataset at a commit that match a pattern, as a folder here. Raises HubError."""
    from huggingface_hub import snapshot_download

    from veripo_trl.hub.ask import ask

    def download() -> str:
        return snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=list(patterns))

    return Path(ask(download, f"{repo_id} (dataset) at {revision}", "Then start the same command again."))


def _commit(repo_id: str, kind: str, revision: str) -> str:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import repo_folder_name

    from veripo_trl.hub.ask import CLIENT_ERRORS, ask

    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=kind) / "refs" / revision

    def look() -> str:
        try:
            return HfApi().repo_info(repo_id, repo_type=kind, revision=revision).sha
        except CLIENT_ERRORS as error:
            if isinstance(error, HfHubHTTPError) or not cache.is_file():
                raise
            sha = cache.read_text(encoding="utf-8").strip()
            logger.warning("%s: the Hub was not reached; %s is taken to be %s, as cached.", repo_id, revision, sha)
            return sha

    remedy = "Correct the name or the revision, or log in if it is private."
    return ask(look, f"{repo_id} ({kind}) at {revision!r}", remedy)
