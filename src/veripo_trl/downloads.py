"""Media named by URL, for users who allow that: fetched once, kept in a folder."""

import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from .video import MediaError

DEFAULT_FOLDER = Path.home() / ".cache" / "veripo_trl" / "downloads"
MAX_BYTES = 20 * 1024**3


def fetch(url: str, *, row_id: str, folder: str | Path = DEFAULT_FOLDER, timeout_s: float = 60.0) -> str:
    """The local copy of an http or https file, downloaded whole or not at all.

    Args:
        timeout_s: longest wait for the server at any one time.

    Raises:
        MediaError: names `row_id` and the URL.
    """
    folder = Path(folder)
    path = folder / hashlib.sha256(url.encode()).hexdigest()
    if path.is_file():
        return str(path)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer, open(temporary, "wb") as file:
            size = int(answer.headers.get("Content-Length") or 0)
            if size > MAX_BYTES:
                raise MediaError(f"row {row_id!r}, {url}: {size} bytes, over the limit of {MAX_BYTES}.")
            shutil.copyfileobj(answer, file)
            if size and file.tell() != size:
                raise MediaError(f"row {row_id!r}, {url}: broke off after {file.tell()} of {size} bytes. Try again.")
        os.replace(temporary, path)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise MediaError(
            f"row {row_id!r}, {url}: cannot be downloaded ({error}). Download it yourself and name the file, or leave "
            f"the row out."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return str(path)
