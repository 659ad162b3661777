"""The judge that asks a model behind an OpenAI-compatible endpoint, such as vLLM's, by many requests at once.

By aiohttp, which `datasets` brings: the openai client takes eight times as long for a request, which is half of what 64
requests in flight allow.
"""

import asyncio
import itertools
import json
import logging
import os
import random
import re
import time
from dataclasses import dataclass, fields

from veripo_trl.verifier.judge_prompts import (
    JudgePrompt,
    ModelJudge,
    ReplyError,
    judge_messages,
    reply_schema,
)
from veripo_trl.verifier.judges import JudgeError, shown_model

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1_000_000
MAX_BACKOFF_S = 30.0
FIRST_FAILURES = 3  # requests that may fail before any has succeeded
GONE = ("no connection", "HTTP 502", "HTTP 503")


class _Failure(ReplyError):
    """One request failed: whether another try may help, and the wait that the server asked for."""

    def __init__(self, cause: str, detail: str = "", *, again=False, wait_s=0.0):
        super().__init__(cause, detail)
        self.again, self.wait_s = again, wait_s


@dataclass(eq=False)
class ServerJudge(ModelJudge):
    """Asks `<url>/chat/completions`, at temperature 0, for a verdict in JSON.

    A request that stays without a readable verdict gives "unknown", is counted in `failures`, and is asked again by the
    next run. Requests are repeated after time-outs, broken connections, 429 and 5xx, with growing pauses. A server that
    has answered and is gone (no connection, 502, 503) is waited for.

    Args:
        url: the API's base, like http://127.0.0.1:8000/v1.
        api_key_env: name of the environment variable that holds the API key; None for a server without one.
        concurrency: requests in flight. timeout_s: of one try, from its start to the end of the reply.
        max_retries: further tries of a request. backoff_s: before the first of them, doubled for each further one, to
            30 s at most, with half of it at random; a Retry-After header in seconds is the least.
        max_wait_s: for a server that is gone, since the request began. A longer Retry-After is a failure.
        request_options: more of the request's body, or other than `temperature` 0, `seed` 0, `max_tokens` 1024 (a
            reply cut off there is unknown) and our `response_format`, like {"chat_template_kwargs":
            {"enable_thinking": false}}, or {"response_format": null} for a server that has no JSON schemas: the reply
            is read just as strictly.

    Raises:
        JudgeError: a URL that is none, a number out of its range, or an environment variable without a key.
    """

    url: str
    model: str
    prompt: JudgePrompt
    api_key_env: str | None = None
    concurrency: int = 64
    timeout_s: float = 120.0
    max_retries: int = 5
    backoff_s: float = 0.5
    max_wait_s: float = 300.0
    request_options: dict | None = None

    def __post_init__(self):
        super().__init__(self.prompt)
        for item in fields(self):
            value, least = getattr(self, item.name), int(item.name == "concurrency")
            if item.type in (int, float) and not (type(value) in (int, item.type) and value >= least):
                raise JudgeError(f"judge: {item.name}: expected {item.type.__name__}, {least} or more; got {value!r}.")
        if not re.fullmatch(r"https?://[^/@?#\s]+(/[^?#\s]*)?", str(self.url)):
            raise JudgeError(
                f"judge URL {re.sub(r'//.*@|[?#].*', '…', str(self.url))}: expected the API's base, like "
                "http://127.0.0.1:8000/v1; a key goes into an environment variable whose name is given."
            )
        self.url = self.url.rstrip("/")
        body = {"model": self.model, "temperature": 0, "seed": 0, "max_tokens": 1024}
        body |= self.request_options or {}
        # The URL is not in it: a server may move. The model is, since of a path only the last part is shown.
        self.identify(f"server:{shown_model(self.model)}", body)
        form = {"name": "verdict", "strict": True, "schema": reply_schema(self.prompt.asks)}
        self.request = {"response_format": {"type": "json_schema", "json_schema": form}, **body}
        self.succeeded, self._failed_in_a_row, self._said_gone = False, 0, False
        self._session, self._in_flight = None, 0
        _read_key(self.api_key_env)

    async def __call__(self, item: dict) -> dict:
        """
        Raises:
            JudgeError: the server refuses the key or does not know the model or path; nothing succeeds at all; it is
                gone for `max_wait_s`; or requests failed in a row, as many as are in flight (8 at least).
        """
        if self._session is None:
            self._open()
        self._in_flight += 1
        try:
            return await self._judge(item)
        finally:
            self._in_flight -= 1

    def _open(self) -> None:
        import aiohttp

        key, headers = _read_key(self.api_key_env), {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=self.concurrency),
            timeout=aiohttp.ClientTimeout(total=self.timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def asked(self) -> str:
        to = f"{self.model} at {self.url}"
        return f"{self.requests:,} requests to {to}, {self.retries:,} of them repeated"

    async def _judge(self, item: dict) -> dict:
        """Asks until there is a reply, or no use in asking again."""
        messages, started = judge_messages(self.prompt, item), time.monotonic()
        for attempt in itertools.count():
            self.retries += attempt > 0
            try:
                text, cut_off = await self._send(messages)
                break
            except _Failure as error:
                failure = error
            gone = failure.cause in GONE and self.succeeded
            waits = gone and time.monotonic() - started < self.max_wait_s
            if waits and not self._said_gone:
                self._said_gone, wait = True, f"Waiting for it, {self.max_wait_s:g} s at most."
                logger.warning("The judge at %s is gone (%s). %s", self.url, failure, wait)
            if not failure.again or (attempt >= self.max_retries and not waits):
                self._stop_if_hopeless(failure, attempt + 1)
                return self.unknown(failure)
            pause_s = min(self.backoff_s * 2 ** min(attempt, 20), MAX_BACKOFF_S)
            await asyncio.sleep(max(failure.wait_s, pause_s * random.uniform(0.5, 1.0)))
        self.succeeded, self._failed_in_a_row, self._said_gone = True, 0, False
        # Whatever it says: at temperature 0 another try would say the same.
        return self.read(item, text, cut_off=cut_off)

    def _stop_if_hopeless(self, failure: _Failure, tries: int) -> None:
        # A refusal of this one text says nothing about the next.
        if not self.succeeded or failure.cause not in ("HTTP 400", "HTTP 413", "HTTP 422"):
            self._failed_in_a_row += 1
        gone = failure.cause == "no connection"
        # A refusal overtakes the replies that are being written: few mean nothing until no other request is under way.
        nothing_came = not self.succeeded and self._in_flight == 1
        most = FIRST_FAILURES if nothing_came else max(8, self.concurrency)
        if gone or self._failed_in_a_row >= most:
            state = "no longer answers" if self.succeeded else "has not answered a single request"
            raise JudgeError(
                f"The judge at {self.url} (model {self.model!r}) {state}; the last one failed after {tries} "
                f"{'try' if tries == 1 else 'tries'} with {failure}. Check that the server runs, that it serves this "
                "model, and that the URL ends where /chat/completions begins; one that refuses response_format needs "
                'judge_request_options {"response_format": null}. Then start the same command again: it continues with '
                "the verdicts in the cache."
            )

    async def _send(self, messages: list[dict]) -> tuple[str | None, bool]:
        """(text of the reply, whether it was cut off at max_tokens)."""
        import aiohttp

        self.requests += 1
        url = f"{self.url}/chat/completions"
        data = json.dumps({**self.request, "messages": messages}).encode()
        content = bytearray()
        try:
            # A redirect would carry rollouts to a place that nobody named.
            async with self._session.post(url, data=data, allow_redirects=False) as response:
                async for chunk in response.content.iter_any():
                    content += chunk
                    if len(content) > MAX_BODY_BYTES:
                        raise _Failure("not a chat completion", f"more than {MAX_BODY_BYTES} bytes")
        except asyncio.TimeoutError:
            late = f"no reply within {self.timeout_s:g} s"
            raise _Failure("time-out", late, again=True) from None
        except aiohttp.ClientError as error:
            # A name that does not resolve or a certificate that does not fit may still be a passing fault.
            gone = isinstance(error, aiohttp.ClientConnectorError)
            said = self._cleaned(str(error) or type(error).__name__)
            raise _Failure("no connection" if gone else "connection", said, again=True) from None
        if response.status != 200:
            raise self._refusal(response.status, response.headers.get("Retry-After", ""), content)
        try:
            choice = json.loads(content)["choices"][0]
            return choice["message"]["content"], choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _Failure("not a chat completion", f"{bytes(content[:80])!r}") from None

    def _refusal(self, status: int, retry_after: str, content: bytes) -> Exception:
        cause, said = f"HTTP {status}", content[:2000].decode("utf-8", "replace")
        said = self._cleaned(" ".join(said.split()))[:300]
        if status in (401, 403, 404):
            key = f"with the key in {self.api_key_env}" if self.api_key_env else "without a key (judge_api_key_env)"
            return JudgeError(
                f"The judge at {self.url}, asked {key}, refuses with {cause}: {said}. Expected the base "
                "of an OpenAI-compatible API, like http://127.0.0.1:8000/v1, whose /models lists "
                f"{self.model!r}, and its key."
            )
        again = status in (408, 409, 425, 429) or status >= 500 and status != 501
        wait_s = float(retry_after) if again and retry_after.isdecimal() else 0.0
        if wait_s > self.max_wait_s:
            return _Failure(cause, f"asks to wait for {wait_s:.0f} s")
        return _Failure(cause, said, again=again, wait_s=wait_s)

    def _cleaned(self, text: str) -> str:
        """Servers quote the key in their errors, and the model by its path."""
        text, key = text.replace(self.model, shown_model(self.model)), _read_key(self.api_key_env)
        return text.replace(key, f"<{self.api_key_env}>") if key else text


def _read_key(name: str | None) -> str | None:
    key = os.environ.get(name, "").strip() if name else None
    if key == "":
        raise JudgeError(
            f"api_key_env names {name!r}, which is not set: export that variable first."
        )
    return key
