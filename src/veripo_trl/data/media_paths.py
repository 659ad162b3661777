"""Paths of videos and images: relative to a row's `media_root`, and in it once symbolic links are resolved."""

import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

from veripo_trl.data.schema import FieldError, RowError, line_of, row_error, show

if TYPE_CHECKING:
    from datasets import Dataset


LOOKS_AT_ONCE = 32  # a network disk answers each after milliseconds
URL = re.compile(r"[a-z][a-z0-9+.\-]*://|data:", re.IGNORECASE)


def check_media(dataset: "Dataset", *, allow_urls: bool = False) -> None:
    """Every media file of every row exists, is not empty, and lies in its row's media_root; else one RowError that
    names rows and files. Decodes nothing."""
    columns = ["question_id", "videos", "images", "data_source", "media_root"]
    rows = dataset.select_columns(columns).with_format("arrow")[:].to_pylist()  # ten times faster than row by row
    files = {
        (row["media_root"], path, field): None
        for row in rows
        for field in ("videos", "images")
        for path in row[field]
    }
    real = cache(os.path.realpath)  # of folders: most files share theirs

    def look(file: tuple[str, str, str]) -> dict[str, str] | None:
        try:
            resolve(*file, allow_urls, real)
        except FieldError as error:
            return error.problem
        return None

    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        found = dict(zip(files, pool.map(look, files), strict=True))
    problems = [
        {
            "file": os.path.join(row["media_root"], path),
            "row": None,
            "question_id": row["question_id"],
            "data_source": row["data_source"],
            **problem,
        }
        for row in rows
        for field in ("videos", "images")
        for path in row[field]
        if (problem := found[row["media_root"], path, field])
    ]
    if problems:
        raise row_error(problems)


def resolve_media(row: dict[str, Any], *, allow_urls: bool = False) -> tuple[list[str], list[str]]:
    """Absolute paths of the row's (videos, images), symbolic links resolved; allowed URLs pass as they are.
    Raises RowError with the row's id and file if one is missing, empty, or outside of media_root."""
    try:
        videos, images = (
            [resolve(row["media_root"], path, field, allow_urls) for path in row[field]] for field in ("videos", "images")
        )
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


def resolve(root: str, path: str, field: str, allow_urls: bool, real=os.path.realpath) -> str:
    """The absolute path of one file, see `resolve_media`.

    Args:
        real: `os.path.realpath`, of folders.
    """
    if check_path(path, field, allow_urls):
        return path
    real_root, whole = real(root), os.path.join(root, path)
    folder, name = os.path.split(whole)
    file = os.path.realpath(whole) if os.path.islink(whole) or name == "." else os.path.join(real(folder), name)
    if not root or os.path.commonpath([real_root, file]) != real_root:
        remedy = "Choose a media_root that holds the file itself, or replace the symbolic link by the file."
        raise FieldError(field, f"a file inside of media_root {root!r}", f"{path} -> {file}", remedy)
    try:
        found = os.stat(file)
    except OSError:
        remedy = "Put the file there, correct media_root, or remove the row."
        raise FieldError(field, "a file", f"{whole}, which does not exist", remedy) from None
    if not stat.S_ISREG(found.st_mode):
        remedy = "Put the file there, correct media_root, or remove the row."
        raise FieldError(field, "a regular file", f"{whole}, which is not one", remedy)
    if not found.st_size:
        raise FieldError(field, "a media file", f"{whole}, which is empty", "Fetch it again.")
    return file
