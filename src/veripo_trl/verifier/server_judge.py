"""The judge that asks a model behind an OpenAI-compatible endpoint, such as vLLM's, by many requests at once.

By aiohttp, which `datasets` brings: the openai client takes eight times as long for a request, which is half of what 64
requests in flight allow.
"""

import asyncio
import hashlib
import itertools
import json
import logging
import os
import random
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from veripo_trl.verifier.judge_prompts import MAX_THINK_CHARS, REPLY_SCHEMA, JudgePrompt, ModelJudge, ReplyError
from veripo_trl.verifier.judges import JudgeError, shown_model

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1_000_000
MAX_BACKOFF_S = 30.0
FIRST_FAILURES = 3  # requests that may fail before any has succeeded
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": REPLY_SCHEMA}}


class _Failure(ReplyError):
    """One request failed: whether another try may help, and the wait the server asked for; `gone`: no server is there."""

    def __init__(self, cause: str, detail: str = "", *, again=False, wait_s: float | None = None, gone=False):
        super().__init__(cause, detail)
        self.again, self.wait_s, self.gone = again, wait_s, gone


@dataclass(eq=False)
class ServerJudge(ModelJudge):
    """Asks `<url>/chat/completions`, at temperature 0, for a verdict in JSON.

    A request that stays without a readable verdict gives "unknown", is counted in `failures`, and is asked again by the
    next run. Requests are repeated after time-outs, broken connections, 429 and 5xx, with growing pauses. A server that
    has answered and is gone (no connection, 502, 503) is waited for. Where it refuses `response_format`, the run goes on
    without it: the reply is read just as strictly.

    Args:
        url: the API's base, like http://127.0.0.1:8000/v1.
        api_key_env: name of the environment variable that holds the API key; None for a server without one.
        concurrency: requests in flight. timeout_s: of one try, from its start to the end of the reply.
        max_retries: further tries of a request. backoff_s: before the first of them, doubled for each further one, to
            30 s at most, with half of it at random; a Retry-After header in seconds replaces it, for all requests.
        max_wait_s: for a server that is gone. A longer Retry-After is a failure.
        request_options: more of the request's body, or other than `temperature` 0, `seed` 0, `max_tokens` 1024 (a
            reply cut off there is unknown), like {"chat_template_kwargs": {"enable_thinking": false}}.

    Raises:
        JudgeError: a URL that is none, or an environment variable without a key.
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
        parts = urlsplit(self.url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
            or parts.username
        ):
            raise JudgeError(
                f"judge URL {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}: expected the API's base, "
                "like http://127.0.0.1:8000/v1; a key goes into an environment variable whose name is given."
            )
        if self.concurrency < 1 or self.max_retries < 0 or self.timeout_s <= 0:
            raise JudgeError(
                "expected judge_concurrency >= 1, judge_retries >= 0, judge_timeout_s > 0; came "
                f"{self.concurrency}, {self.max_retries}, {self.timeout_s}"
            )
        self.url = self.url.rstrip("/")
        self.request = {"model": self.model, "temperature": 0, "seed": 0, "max_tokens": 1024}
        self.request |= self.request_options or {}
        # Another reply is to be expected from other options. The URL is not in it: a server may move. The model is, for
        # the name shows no more than the last part of a path.
        digest = hashlib.sha256(json.dumps([self.request, MAX_THINK_CHARS], sort_keys=True).encode()).hexdigest()[:8]
        self.name = f"server:{shown_model(self.model)}:{digest}"
        self.json_schema: bool | None = None  # whether the server takes one; None: not known yet
        self.succeeded, self._in_a_row, self._paused_until = False, 0, 0.0
        self._gone_at: float | None = None
        self._session = None
        _read_key(self.api_key_env)

    async def __call__(self, item: dict) -> dict:
        """
        Raises:
            JudgeError: the server refuses the key or does not know the model or path; nothing succeeds at all; it is
                gone for `max_wait_s`; or requests failed in a row, as many as are in flight (8 at least).
        """
        if self._session is None:
            self._open()
        if not self.succeeded:
            # One at a time until one has: a server that is down, refuses the key or has no JSON schema is asked once, not
            # by every slot.
            await self._first.acquire()
            verdict = None if self.succeeded else await self._judge(item)
            self._first.release()  # not after an error: it stops the run, and nobody else is to ask until it does
            if verdict is not None:
                return verdict
        return await self._judge(item)

    def _open(self) -> None:
        import aiohttp

        key = _read_key(self.api_key_env)
        self._first = asyncio.Lock()
        self._session = aiohttp.ClientSession(
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            connector=aiohttp.TCPConnector(limit=self.concurrency),
            timeout=aiohttp.ClientTimeout(total=self.timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def summary(self) -> str:
        """One line: requests, repeated ones, and verdicts that are unknown because of the judge, by cause."""
        return (
            f"{self.requests:,} requests to {self.model} at {self.url}, {self.retries:,} of them repeated; "
            f"{self.unusable()}"
        )

    async def _judge(self, item: dict) -> dict:
        """Asks until there is a reply, or no use in asking again."""
        messages, gone_since = self.messages(item), None
        for attempt in itertools.count():
            self.retries += attempt > 0
            while (left_s := self._paused_until - time.monotonic()) > 0:
                await asyncio.sleep(left_s + random.uniform(0, self.backoff_s / 10))
            try:
                text, cut_off = await self._post(messages)
                break
            except _Failure as error:
                failure = error
            now, waits = time.monotonic(), False
            self._paused_until = max(self._paused_until, now + (failure.wait_s or 0))
            if failure.gone and self.succeeded:
                if self._gone_at is None:
                    self._gone_at = now
                    logger.warning(
                        "The judge at %s is gone (%s). Waiting for it, %g s at most.",
                        self.url,
                        failure,
                        self.max_wait_s,
                    )
                gone_since = gone_since or now
                waits = now - gone_since < self.max_wait_s
            if not failure.again or (attempt >= self.max_retries and not waits):
                self._stop_if_hopeless(failure, attempt + 1)
                return self.unknown(failure)
            if failure.wait_s is None:
                pause_s = min(self.backoff_s * 2 ** min(attempt, 20), MAX_BACKOFF_S)
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
        self.succeeded, self._in_a_row = True, 0
        if self._gone_at is not None:
            logger.warning("The judge at %s is back after %.0f s.", self.url, time.monotonic() - self._gone_at)
            self._gone_at = None
        if cut_off:  # at temperature 0 another try would say the same
            return self.unknown(ReplyError("cut off", "the reply reached the limit on its tokens"))
        return self.read(item, text)

    def _stop_if_hopeless(self, failure: _Failure, tries: int) -> None:
        # A refusal of this one text says nothing about the next.
        if not self.succeeded or failure.cause not in ("HTTP 400", "HTTP 413", "HTTP 422"):
            self._in_a_row += 1
        gone = failure.cause == "connection" and (failure.gone or not self.succeeded)
        if not gone and self._in_a_row < (max(8, self.concurrency) if self.succeeded else FIRST_FAILURES):
            return
        what = f"been gone for {self.max_wait_s:g} s" if gone else f"failed {self._in_a_row} requests in a row"
        if not self.succeeded:
            what = "not answered a single request"
        raise JudgeError(
            f"The judge at {self.url} (model {self.model!r}) has {what}; the last one failed after {tries} "
            f"{'try' if tries == 1 else 'tries'} with {failure}. Check that the server runs, that it serves this model, "
            "and that the URL ends where /chat/completions begins; then start the same command again: it continues with "
            "the verdicts in the cache."
        )

    async def _post(self, messages: list[dict]) -> tuple[str | None, bool]:
        """(text of the reply, whether it was cut off). A request refused with `response_format` is tried without."""
        body = {**self.request, "messages": messages}
        if self.json_schema is False:
            return await self._send(body)
        try:
            answer = await self._send({"response_format": RESPONSE_FORMAT, **body})
            self.json_schema = True
            return answer
        except _Failure as failure:
            if self.json_schema or failure.cause not in ("HTTP 400", "HTTP 422", "HTTP 501"):
                raise
            refusal = failure
        answer = await self._send(body)
        self.json_schema = False
        logger.warning("The judge's server refuses response_format (%s). Going on without it.", refusal)
        return answer

    async def _send(self, body: dict) -> tuple[str | None, bool]:
        import aiohttp

        self.requests += 1
        try:
            url, data = f"{self.url}/chat/completions", json.dumps(body).encode()
            # A redirect would carry rollouts to a place that nobody named.
            async with self._session.post(url, data=data, allow_redirects=False) as response:
                content = bytearray()
                async for chunk in response.content.iter_any():
                    content += chunk
                    if len(content) > MAX_BODY_BYTES:
                        raise _Failure("not a chat completion", f"more than {MAX_BODY_BYTES} bytes")
                if response.status != 200:
                    raise self._refusal(response.status, response.headers.get("Retry-After"), content)
        except asyncio.TimeoutError:
            raise _Failure("time-out", f"no reply within {self.timeout_s:g} s", again=True) from None
        except aiohttp.ClientError as error:
            # A name that does not resolve or a certificate that does not fit may still be a passing fault.
            gone = isinstance(error, aiohttp.ClientConnectorError)
            said = self._cleaned(str(error) or type(error).__name__)
            raise _Failure("connection", said, again=True, gone=gone) from None
        return _message_text(content)

    def _refusal(self, status: int, retry_after: str | None, content: bytes) -> Exception:
        cause, said = f"HTTP {status}", content[:2000].decode("utf-8", "replace")
        said = self._cleaned(" ".join(said.split()))[:300]
        if status in (401, 403, 404):
            key = f"the key in {self.api_key_env}" if self.api_key_env else "no key (none is named: judge_api_key_env)"
            return JudgeError(
                f"The judge at {self.url}, asked with {key}, refuses with {cause}: {said}. Expected the base of an "
                f"OpenAI-compatible API, like http://127.0.0.1:8000/v1, whose /models lists {self.model!r}, and its key."
            )
        again = status in (408, 409, 425, 429) or status >= 500 and status != 501
        wait_s = float(retry_after) if status in (429, 503) and (retry_after or "").isdecimal() else None
        if wait_s is not None and wait_s > self.max_wait_s:
            return _Failure(cause, f"asks to wait for {wait_s:.0f} s")
        return _Failure(cause, said, again=again, wait_s=wait_s, gone=status in (502, 503))

    def _cleaned(self, text: str) -> str:
        """Servers quote the key in their errors, and the model by its path."""
        text, key = text.replace(self.model, shown_model(self.model)), _read_key(self.api_key_env)
        return text.replace(key, f"<{self.api_key_env}>") if key else text


def _read_key(name: str | None) -> str | None:
    key = os.environ.get(name, "").strip() if name else None
    if key == "":
        raise JudgeError(f"api_key_env names the environment variable {name!r}, which is not set: export it first.")
    return key


def _message_text(content: bytes) -> tuple[str | None, bool]:
    """(text of the message, whether it was cut off at max_tokens)."""
    try:
        choice = json.loads(content)["choices"][0]
        text, cut_off = choice["message"]["content"], choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Failure("not a chat completion", f"{bytes(content[:80])!r}") from None
    if text is not None and not isinstance(text, str):
        raise _Failure("not a chat completion", f"its content is {text!r:.80}")
    return text, cut_off
