"""A judge behind an OpenAI-compatible endpoint, such as vLLM's, asked by many requests at once.

By aiohttp, which `datasets` brings: the openai client takes eight times as long for a request, which is half of what 64
requests in flight allow.
"""

import asyncio
import email.utils
import hashlib
import itertools
import json
import logging
import math
import os
import random
import time
from urllib.parse import urlsplit

from veripo_trl.errors import VeripoError
from veripo_trl.verifier.judge_prompts import MAX_THINK_CHARS, REPLY_SCHEMA, JudgePrompt, ModelJudge, ReplyError
from veripo_trl.verifier.judges import shown_model

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1_000_000
MAX_BACKOFF_S = 30.0
FIRST_FAILURES = 3  # requests that may fail before any has succeeded
RESPONSE_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "verdict", "strict": True, "schema": REPLY_SCHEMA},
}


class JudgeError(VeripoError):
    """The judge cannot go on. What it had said is in the cache: the same command continues from there."""


class _Failure(ReplyError):
    """One request failed: whether another try may help, and the wait the server asked for; `gone`: no server is there."""

    def __init__(self, cause: str, detail: str = "", *, again=False, wait_s: float | None = None, gone=False):
        super().__init__(cause, detail)
        self.again, self.wait_s, self.gone = again, wait_s, gone


class ServerJudge(ModelJudge):
    """Asks `<url>/chat/completions`, at temperature 0, for a verdict in JSON.

    A request that stays without a readable verdict gives "unknown", is counted in `failures`, and is asked again by the
    next run. Requests are repeated after time-outs, broken connections, 429 and 5xx, with growing pauses. A server that
    has answered and is gone (no connection, 502, 503) is waited for. Where it refuses `response_format`, the run goes on
    without it: the reply is read just as strictly.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompt: JudgePrompt,
        *,
        api_key_env: str | None = None,
        concurrency: int = 64,
        timeout_s: float = 120.0,
        retries: int = 5,
        backoff_s: float = 0.5,
        max_wait_s: float = 300.0,
        max_tokens: int = 1024,
        seed: int = 0,
        max_think_chars: int = MAX_THINK_CHARS,
        request_options: dict | None = None,
    ):
        """
        Args:
            url: the API's base, like http://127.0.0.1:8000/v1.
            api_key_env: name of the environment variable that holds the API key; None for a server without one.
            concurrency: requests in flight. timeout_s: of one try, from its start to the end of the reply.
            retries: further tries of a request. backoff_s: before the first of them, doubled for each further one, to
                30 s at most, with half of it at random; a Retry-After header replaces it, for all requests.
            max_wait_s: for a server that is gone. A longer Retry-After is a failure.
            max_tokens: of a reply; a reply cut off there is unknown.
            request_options: more of the request's body, like {"chat_template_kwargs": {"enable_thinking": false}}.

        Raises:
            JudgeError: a URL that is none, or an environment variable without a key.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise JudgeError(
                f"judge URL {_without_user(url)!r}: expected the API's base, like http://127.0.0.1:8000/v1"
            )
        if parts.username or parts.password:
            raise JudgeError(
                f"judge URL {_without_user(url)!r} holds a user name or password; put the key into an environment "
                "variable and give the variable's name."
            )
        if concurrency < 1 or retries < 0 or timeout_s <= 0:
            raise JudgeError(
                f"expected concurrency >= 1, retries >= 0, timeout_s > 0; came {concurrency}, {retries}, {timeout_s}"
            )
        super().__init__(prompt, max_think_chars=max_think_chars)
        self.url, self.model = url.rstrip("/"), model
        self.api_key_env, self.concurrency, self.timeout_s = api_key_env, concurrency, timeout_s
        self.max_retries, self.backoff_s, self.max_wait_s = retries, backoff_s, max_wait_s
        self.request = {"model": model, "temperature": 0, "seed": seed, "max_tokens": max_tokens}
        self.request |= request_options or {}
        # Another reply is to be expected from other options. The URL is not in it: a server may move. The model is, for
        # the name shows no more than the last part of a path.
        digest = hashlib.sha256(json.dumps([self.request, max_think_chars], sort_keys=True).encode()).hexdigest()[:8]
        self.name = f"server:{shown_model(model)}:{digest}"
        self.json_schema: bool | None = None  # whether the server takes one; None: not known yet
        self.succeeded, self._in_a_row, self._paused_until = False, 0, 0.0
        self._gone_at: float | None = None
        self._session = None
        _read_key(api_key_env)

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
            if not self.succeeded:
                verdict = await self._judge(item)
                self._first.release()  # not after an error: it stops the run, and nobody else is to ask until it does
                return verdict
            self._first.release()
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
        messages, gone_since = self.messages(item), math.inf
        for attempt in itertools.count():
            self.retries += attempt > 0
            while (left_s := self._paused_until - time.monotonic()) > 0:
                await asyncio.sleep(left_s + random.uniform(0, self.backoff_s / 10))
            try:
                text, cut_off = await self._post(messages)
                self.succeeded, self._in_a_row = True, 0
                self._note_gone(None)
                if cut_off:  # at temperature 0 another try would say the same
                    return self.unknown(ReplyError("cut off", "the reply reached the limit on its tokens"))
                return self.read(item, text)
            except _Failure as error:
                failure = error
            now = time.monotonic()
            if failure.wait_s is not None:
                self._paused_until = max(self._paused_until, now + failure.wait_s)
            wait = failure.gone and self.succeeded
            if wait:
                self._note_gone(failure)
                gone_since = min(gone_since, now)
                wait = now - gone_since < self.max_wait_s
            if not failure.again or (attempt >= self.max_retries and not wait):
                self._stop_if_hopeless(failure, attempt + 1)
                return self.unknown(failure)
            if failure.wait_s is None:
                pause_s = min(self.backoff_s * 2 ** min(attempt, 20), MAX_BACKOFF_S)
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))

    def _note_gone(self, failure: _Failure | None) -> None:
        if failure is not None and self._gone_at is None:
            self._gone_at = time.monotonic()
            logger.warning(
                "The judge at %s is gone (%s). Waiting for it, %g s at most.", self.url, failure, self.max_wait_s
            )
        elif failure is None and self._gone_at is not None:
            logger.warning("The judge at %s is back after %.0f s.", self.url, time.monotonic() - self._gone_at)
            self._gone_at = None

    def _stop_if_hopeless(self, failure: _Failure, tries: int) -> None:
        # A refusal of this one text says nothing about the next.
        if not self.succeeded or failure.cause not in ("HTTP 400", "HTTP 413", "HTTP 422"):
            self._in_a_row += 1
        gone = failure.gone and failure.cause == "connection"
        if not self.succeeded and (failure.cause == "connection" or self._in_a_row >= FIRST_FAILURES):
            what = "not answered a single request"
            remedy = (
                "Check that the server runs and is ready, that the URL ends where /chat/completions begins, and that it "
                "serves this model; then start the same command again."
            )
        elif gone or self._in_a_row >= max(8, self.concurrency):
            what = f"been gone for {self.max_wait_s:g} s" if gone else f"failed {self._in_a_row} requests in a row"
            remedy = (
                "The verdicts so far are in the cache: once the server answers again, the same command continues from "
                "there."
            )
        else:
            return
        raise JudgeError(
            f"The judge at {self.url} (model {self.model!r}) has {what}; the last one failed after {tries} "
            f"{'try' if tries == 1 else 'tries'} with {failure}. {remedy}"
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
                    raise self._refusal(response.status, response.headers, bytes(content))
        except asyncio.TimeoutError:
            raise _Failure("time-out", f"no reply within {self.timeout_s:g} s", again=True) from None
        except aiohttp.ClientError as error:
            # A name that does not resolve or a certificate that does not fit may still be a passing fault.
            gone = isinstance(error, aiohttp.ClientConnectorError)
            said = self._cleaned(str(error) or type(error).__name__)
            raise _Failure("connection", said, again=True, gone=gone) from None
        return _message_text(bytes(content))

    def _refusal(self, status: int, headers, content: bytes) -> Exception:
        said = self._cleaned(" ".join(content[:2000].decode("utf-8", "replace").split()))[:300]
        if status in (401, 403):
            key = f"the key in {self.api_key_env}" if self.api_key_env else "a request without a key; set api_key_env"
            return JudgeError(f"The judge at {self.url} refuses {key} (HTTP {status}): {said}")
        if status == 404:
            return JudgeError(
                f"The judge at {self.url} knows no such path or no model {self.model!r} (HTTP 404): {said}. Expected the "
                "base of an OpenAI-compatible API, like http://127.0.0.1:8000/v1, and a model that /models lists."
            )
        again = status in (408, 409, 425, 429) or status >= 500 and status != 501
        wait_s = _retry_after_s(headers.get("Retry-After")) if status in (429, 503) else None
        if wait_s is not None and wait_s > self.max_wait_s:
            return _Failure(f"HTTP {status}", f"asks to wait for {wait_s:.0f} s")
        return _Failure(f"HTTP {status}", said, again=again, wait_s=wait_s, gone=status in (502, 503))

    def _cleaned(self, text: str) -> str:
        """Servers quote the key in their errors, and the model by its path."""
        text, key = text.replace(self.model, shown_model(self.model)), _read_key(self.api_key_env)
        return text.replace(key, f"<{self.api_key_env}>") if key else text


def _read_key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise JudgeError(f"api_key_env names the environment variable {name!r}, which is not set: export it first.")
    return key


def _without_user(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _retry_after_s(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def _message_text(content: bytes) -> tuple[str | None, bool]:
    """(text of the message, whether it was cut off at max_tokens)."""
    try:
        choice = json.loads(content)["choices"][0]
        text, cut_off = choice["message"]["content"], choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Failure("not a chat completion", f"{content[:80]!r}") from None
    if text is not None and not isinstance(text, str):
        raise _Failure("not a chat completion", f"its content is {text!r:.80}")
    return text, cut_off
