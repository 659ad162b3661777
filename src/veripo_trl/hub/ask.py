"""How the Hub is asked: faults that pass are waited out, all others end in one message without the token."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from veripo_trl.errors import VeripoError

logger = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_WAITS_S = (1, 2, 4, 8, 16)
RETRIED_STATUS = {408, 409, 412, 429, 500, 502, 503, 504}
MEANING = {
    401: "no valid token: log in (`hf auth login`) or set HF_TOKEN",
    403: "the token may not write there: it needs the write role and the owner's rights",
    404: "no such repository or revision, or the token may not see it",
}
# What the client raises: answers that are errors and connections that break, uploads given up (RuntimeError), answers
# that it cannot read and ids it refuses (ValueError), offline mode (OSError).
CLIENT_ERRORS = (HTTPError, RuntimeError, ValueError, OSError)


class HubError(VeripoError):
    """The Hub refused, or does not hold what it should; the message names the repository and what to do."""


def ask(call: Callable[[], T], what: str, remedy: str) -> T:
    """What `call` returns, tried again after faults that may pass: huggingface_hub does not retry all of them itself.

    Raises:
        HubError: what was said in the end, after `what` and before `remedy`.
    """
    waits = list(RETRY_WAITS_S)
    while True:
        try:
            return call()
        except CLIENT_ERRORS as error:
            reason = _reason(error)
            if token := get_token():
                reason = reason.replace(token, "(token)")
            if not waits or not _may_pass(error):
                raise HubError(f"{what}: {reason}. {remedy}") from None
            logger.warning("%s: %s. Trying again in %s s.", what, reason, waits[0])
            time.sleep(waits.pop(0))


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in RETRIED_STATUS
    return isinstance(error, HTTPError)  # a connection that broke


def _reason(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    said = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    if not isinstance(cause, HfHubHTTPError):
        return said
    status = cause.response.status_code
    said = (cause.server_message or said).splitlines()[0]
    return f"{MEANING.get(status, 'the Hub answered with an error')} (HTTP {status}: {said})"
