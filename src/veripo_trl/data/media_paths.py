"""Paths of videos and images: relative to a row's `media_root`, and in it once symbolic links are resolved."""

import os
import re
from typing import TYPE_CHECKING, Any

from veripo_trl.data.schema import FieldError, RowError, line_of, row_error, show

if TYPE_CHECKING:
    from datasets import Dataset


URL = re.compile(r"[a-z][a-z0-9+.\-]*://|data:", re.IGNORECASE)


def check_media(dataset: "Dataset", *, allow_urls: bool = False) -> None:
    """Every media file of every row exists, is not empty, and lies in its row's media_root; else one RowError that
    names rows and files. Each file is looked at once. Decodes nothing."""
    columns = ["question_id", "videos", "images", "data_source", "media_root"]
    table = dataset.select_columns(columns).with_format("arrow")[:]  # arrow: a row at a time is ten times slower
    seen: dict[tuple[str, str], dict | None] = {}
    problems = []
    for question_id, videos, images, data_source, root in zip(*(table[c].to_pylist() for c in columns), strict=True):
        for field, paths in (("videos", videos), ("images", images)):
            for path in paths:
                if (root, path) not in seen:
                    seen[root, path] = None
                    try:
                        resolve(root, path, field, allow_urls)
                    except FieldError as error:
                        seen[root, path] = error.problem
                if seen[root, path]:
                    problem = {"file": os.path.join(root, path), "row": None, "question_id": question_id}
                    problems.append(problem | seen[root, path] | {"field": field, "data_source": data_source})
    if problems:
        raise row_error(problems)


def resolve_media(row: dict[str, Any], *, allow_urls: bool = False) -> tuple[list[str], list[str]]:
    """Absolute paths of the row's (videos, images), symbolic links resolved; allowed URLs pass as they are.
    Raises RowError with the row's id and file if one is missing, empty, or outside of media_root."""
    try:
        videos = [resolve(row["media_root"], path, "videos", allow_urls) for path in row["videos"]]
        images = [resolve(row["media_root"], path, "images", allow_urls) for path in row["images"]]
    except FieldError as error:
        file = row.get("data_source") or "row"
        problem = {"file": file, "row": None, "question_id": row.get("question_id"), **error.problem}
        raise RowError(line_of(problem), [problem]) from None
    return videos, images


def check_path(path: str, field: str, allow_urls: bool) -> bool:
    """Whether the path is an allowed URL; raises for what is neither that nor a path that stays below its root."""
    if URL.match(path):
        if re.match("[^/]*//[^/?#]*@", path):
            remedy = "Take them out and put them into ~/.netrc: a row's URLs are written to rollouts and logs."
            raise FieldError(field, "a URL without user name and password", "one with them", remedy)
        if allow_urls and path.lower().startswith(("https://", "http://")):
            return True
        remedy = "Download the file, or allow URLs (allow_urls: http and https only)."
        raise FieldError(field, "a path relative to media_root", f"the URL {show(path)}", remedy)
    if os.path.isabs(path) or ".." in re.split(r"[/\\]", path) or "\0" in path:
        remedy = "Choose a media_root above the files and write their paths below it."
        raise FieldError(field, "a path relative to media_root, without '..'", show(path), remedy)
    return False


def resolve(root: str, path: str, field: str, allow_urls: bool) -> str:
    if check_path(path, field, allow_urls):
        return path
    real_root = os.path.realpath(root)
    real = os.path.realpath(os.path.join(real_root, path))
    if not root or os.path.commonpath([real_root, real]) != real_root:
        remedy = "Choose a media_root that holds the file itself, or replace the symbolic link by the file."
        raise FieldError(field, f"a file inside of media_root {root!r}", f"{path} -> {real}", remedy)
    if not os.path.isfile(real):
        remedy = "Put the file there, correct media_root, or remove the row."
        if os.path.exists(real):
            what = "a directory" if os.path.isdir(real) else "a pipe, socket or device"
            raise FieldError(field, "a regular file", f"{os.path.join(root, path)}, which is {what}", remedy)
        raise FieldError(field, "a file", f"{os.path.join(root, path)}, which does not exist", remedy)
    if not os.path.getsize(real):
        raise FieldError(field, "a media file", f"{os.path.join(root, path)}, which is empty", "Fetch it again.")
    return real
