"""Media named by URL, for users who allow that: fetched once, kept in a folder."""

import asyncio
import hashlib
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp

from veripo_trl.media.containers import BadFile, check_file, recognise_container
from veripo_trl.media.images import read_image
from veripo_trl.media.video import MediaError

DEFAULT_FOLDER = Path.home() / ".cache" / "veripo_trl" / "downloads"
MAX_BYTES = 4 * 1024**3
# What the network is to blame for, or a server that is down: not the row.
_NETWORK = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError)


class NetworkError(MediaError):
    """A download that may go well another time: the row is no worse for it."""


def fetch(
    url: str,
    *,
    row_id: str,
    kind: str,
    folder: str | Path = DEFAULT_FOLDER,
    timeout_s: float = 600.0,
    max_bytes: int = MAX_BYTES,
) -> str:
    """The local copy of an http or https file, downloaded whole or not at all. Proxies and logins are those of the
    environment (`https_proxy`, `~/.netrc`).

    Args:
        kind: "video" or "image": what does not begin as one (an error page, nothing) is not kept.
        timeout_s: of the whole transfer.

    Raises:
        MediaError: names `row_id` and the URL. NetworkError, of these: its server was not reached, or was not up to it.
    """
    folder = Path(folder)
    path = folder / hashlib.sha256(url.encode()).hexdigest()
    if path.is_file():
        return str(path)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        _run(_download(url, temporary, timeout_s=timeout_s, max_bytes=max_bytes))
        if kind == "image":
            read_image(temporary)
        else:
            check_file(temporary)
            recognise_container(temporary)
        os.replace(temporary, path)
    except BadFile as error:
        raise MediaError(f"row {row_id!r}, {kind} {url!r}: {error}") from None
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        reason = f"not done in {timeout_s:g} s" if isinstance(error, TimeoutError) else str(error) or repr(error)
        status = error.status if isinstance(error, aiohttp.ClientResponseError) else 0
        outage = isinstance(error, _NETWORK) and not isinstance(error, aiohttp.ClientSSLError)
        later = outage or status == 429 or status >= 500
        raise (NetworkError if later else MediaError)(
            f"row {row_id!r}, {kind} {url!r}: cannot be downloaded ({reason}). "
            f"{'Try again when the network is up; else download' if later else 'Download'} it yourself and name the "
            "file, or leave the row out."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return str(path)


async def _download(url: str, path: Path, *, timeout_s: float, max_bytes: int) -> None:
    # aiohttp follows redirects to http and https only, and raises where a body ends early
    limit, headers = aiohttp.ClientTimeout(total=timeout_s), {"Accept-Encoding": "identity"}
    async with (
        aiohttp.ClientSession(timeout=limit, trust_env=True) as session,
        session.get(url, headers=headers, raise_for_status=True) as answer,
    ):
        with open(path, "wb") as file:
            if (answer.content_length or 0) > max_bytes:
                raise BadFile(f"{answer.content_length} bytes, over the limit of {max_bytes}; make it smaller")
            async for part in answer.content.iter_any():
                file.write(part)
                if file.tell() > max_bytes:
                    raise BadFile(f"over the limit of {max_bytes} bytes; make it smaller")


def _run(coroutine) -> None:
    """`asyncio.run`; where a loop runs already, as in a notebook, in a thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
