"""A judge behind an OpenAI-compatible endpoint, such as vLLM's, asked by many requests at once.

The event loop runs in a thread of its own, so that requests stay in flight while the caller checks, compares and writes.
"""

import asyncio
import contextlib
import email.utils
import hashlib
import json
import logging
import os
import queue
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit

from ..errors import VeripoError
from .judge_prompts import MAX_THINK_CHARS, REPLY_SCHEMA, JudgePrompt, ReplyError, judge_messages, read_reply, settle
from .judges import shown_model

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


class _Failure(Exception):
    """One request failed: `cause` to count it under, whether another try may help, and the wait the server asked for."""

    def __init__(self, cause: str, detail: str = "", *, again: bool = False, wait_s: float | None = None):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause, self.again, self.wait_s = cause, again, wait_s


class ServerJudge:
    """Asks `<url>/chat/completions`, at temperature 0, for a verdict in JSON.

    A request that stays without a readable verdict gives "unknown", is counted in `failures`, and is asked again by the
    next run. Requests are repeated after time-outs, broken connections, 429 and 5xx, with growing pauses. Where the
    server refuses `response_format`, the run goes on without it: the reply is read just as strictly.
    """

    caches = True

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
        max_retry_after_s: float = 300.0,
        max_failures: int | None = None,
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
            max_retry_after_s: a longer Retry-After is a failure.
            max_failures: failed requests in a row after which the run stops, max(8, concurrency) by default.
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
        self.url, self.model, self.prompt = url.rstrip("/"), model, prompt
        self.api_key_env, self.concurrency, self.timeout_s = api_key_env, concurrency, timeout_s
        self.max_retries, self.backoff_s, self.max_retry_after_s = retries, backoff_s, max_retry_after_s
        self.max_failures = max(8, concurrency) if max_failures is None else max_failures
        self.max_think_chars = max_think_chars
        self.request = {"model": model, "temperature": 0, "seed": seed, "max_tokens": max_tokens}
        self.request |= request_options or {}
        # Another reply is to be expected from other options. The URL is not in it: a server may move. The model is, for
        # the name shows no more than the last part of a path.
        digest = hashlib.sha256(json.dumps([self.request, max_think_chars], sort_keys=True).encode()).hexdigest()[:8]
        self.name, self.prompt_version = f"server:{shown_model(model)}:{digest}", prompt.version
        self.requests, self.retries, self.failures = 0, 0, Counter()
        self.json_schema: bool | None = None  # whether the server takes one; None: not known yet
        self.succeeded, self._in_a_row, self._paused_until = False, 0, 0.0
        _read_key(api_key_env)

    def judge_stream(self, items: Iterable[dict | None]) -> Iterator[tuple[int | None, dict | None]]:
        """See `RulesJudge`. At most `concurrency` requests are in flight and as many wait to be sent.

        Raises:
            JudgeError: the server refuses the key or does not know the model or path; nothing succeeds at all; or
                `max_failures` requests in a row failed.
        """
        source, open_items, worker = iter(items), {}, _Worker(self)
        more = True
        try:
            while more or open_items:
                idle = False
                while more and len(open_items) < 2 * self.concurrency:
                    item = next(source, _END)
                    more = item is not _END
                    idle = item is None
                    if not more or idle:
                        break
                    open_items[item["place"]] = item
                    worker.submit(item)
                if idle and not open_items:
                    yield None, None
                for place, reply, failure in worker.results(wait=bool(open_items)):
                    yield place, self._verdict(open_items.pop(place), reply, failure)
        finally:
            worker.stop()

    def _verdict(self, item: dict, reply: dict | None, failure: str | None) -> dict:
        if reply is None:
            return {"consistency": "unknown", "concluded_answer": None, "reason": failure, "reply": None}
        verdict = settle(reply, item)
        if verdict["reason"].startswith("contradiction:") and verdict["consistency"] == "unknown":
            self.failures["contradiction"] += 1
        return {**verdict, "reply": reply}

    def summary(self) -> str:
        """One line: requests, repeated ones, and verdicts that are unknown because of the judge, by cause."""
        text = f"{self.requests:,} requests to {self.model} at {self.url}, {self.retries:,} of them repeated"
        if not self.failures:
            return f"{text}; every reply was readable."
        causes = ", ".join(f"{cause} {count:,}" for cause, count in self.failures.most_common())
        return f"{text}; without a usable verdict: {causes}."

    # ------------------------------------------------------------------------------- in the worker's event loop

    async def ask(self, session, item: dict) -> tuple[dict | None, str | None]:
        """(reply, None), or (None, why there is none)."""
        messages = judge_messages(self.prompt, item, max_think_chars=self.max_think_chars)
        failure = None
        for attempt in range(self.max_retries + 1):
            if attempt:
                self.retries += 1
                pause_s = min(self.backoff_s * 2 ** (attempt - 1), MAX_BACKOFF_S) * random.uniform(0.5, 1.0)
                await asyncio.sleep(0 if failure.wait_s is not None else pause_s)
            while (left_s := self._paused_until - time.monotonic()) > 0:
                await asyncio.sleep(left_s + random.uniform(0, self.backoff_s / 10))
            try:
                text, cut_off = await self._post(session, messages)
                self.succeeded, self._in_a_row = True, 0
                if cut_off:
                    raise ReplyError("cut off", "the reply reached the limit on its tokens")
                return read_reply(text), None
            except ReplyError as error:  # at temperature 0 another try would say the same
                self.failures[error.cause] += 1
                return None, str(error)
            except _Failure as error:
                failure = error
                if error.wait_s is not None:
                    self._paused_until = max(self._paused_until, time.monotonic() + error.wait_s)
                if not error.again:
                    break
        self.failures[failure.cause] += 1
        # A refusal of this one text says nothing about the next.
        if not self.succeeded or failure.cause not in ("HTTP 400", "HTTP 413", "HTTP 422"):
            self._in_a_row += 1
        self._stop_if_hopeless(failure)
        return None, str(failure)

    def _stop_if_hopeless(self, failure: _Failure) -> None:
        tries = "1 try" if not failure.again else f"{self.max_retries + 1} tries"
        if not self.succeeded and (failure.cause == "connection" or self._in_a_row >= FIRST_FAILURES):
            raise JudgeError(
                f"The judge at {self.url} (model {self.model!r}) has not answered a single request; the last one failed "
                f"after {tries} with {failure}. Check that the server runs and is ready, that the URL ends where "
                "/chat/completions begins, and that it serves this model; then start the same command again."
            )
        if self._in_a_row >= self.max_failures:
            raise JudgeError(
                f"The judge at {self.url} (model {self.model!r}) has failed {self._in_a_row} requests in a row, the last "
                f"one after {tries} with {failure}. The verdicts so far are in the cache: once the server answers again, "
                "the same command continues from there."
            )

    async def _post(self, session, messages: list[dict]) -> tuple[str | None, bool]:
        """(text of the reply, whether it was cut off). A request refused with `response_format` is tried without."""
        body = {**self.request, "messages": messages}
        if self.json_schema is False:
            return await self._send(session, body)
        try:
            answer = await self._send(session, {"response_format": RESPONSE_FORMAT, **body})
            self.json_schema = True
            return answer
        except _Failure as failure:
            if self.json_schema or failure.cause not in ("HTTP 400", "HTTP 422", "HTTP 501"):
                raise
            refusal = failure
        answer = await self._send(session, body)
        self.json_schema = False
        logger.warning("The judge's server refuses response_format (%s). Going on without it.", refusal)
        return answer

    async def _send(self, session, body: dict) -> tuple[str | None, bool]:
        import aiohttp

        self.requests += 1
        try:
            url, data = f"{self.url}/chat/completions", json.dumps(body).encode()
            # A redirect would carry rollouts to a place that nobody named.
            async with session.post(url, data=data, allow_redirects=False) as response:
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
            raise _Failure("connection", self._cleaned(str(error) or type(error).__name__), again=True) from None
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
        if wait_s is not None and wait_s > self.max_retry_after_s:
            return _Failure(f"HTTP {status}", f"asks to wait for {wait_s:.0f} s")
        return _Failure(f"HTTP {status}", said, again=again, wait_s=wait_s)

    def _cleaned(self, text: str) -> str:
        """Servers quote the key in their errors, and the model by its path."""
        text, key = text.replace(self.model, shown_model(self.model)), _read_key(self.api_key_env)
        return text.replace(key, f"<{self.api_key_env}>") if key else text


class _Worker:
    """A thread with an event loop that keeps `judge.concurrency` requests in flight."""

    def __init__(self, judge: ServerJudge):
        self.judge = judge
        self.inbox: deque[dict] = deque()
        self.outbox: queue.SimpleQueue = queue.SimpleQueue()
        self.done: list[tuple] = []
        self.loop = asyncio.new_event_loop()
        self.idle: deque[asyncio.Future] = deque()
        self.woken = False
        self.main = None
        self.thread = threading.Thread(target=self._run, name="judge", daemon=True)
        self.thread.start()

    def submit(self, item: dict) -> None:
        self.inbox.append(item)
        if not self.woken and self.thread.is_alive():
            self.woken = True
            self.loop.call_soon_threadsafe(self._wake)

    def results(self, *, wait: bool) -> list[tuple]:
        """What has come in; with `wait`, at least one. Raises what stopped the worker."""
        found = []
        while True:
            try:
                result = self.outbox.get(block=wait and not found)
            except queue.Empty:
                return found
            if isinstance(result, BaseException):
                if found:
                    self.outbox.put(result)  # the next call's
                    return found
                raise result
            found += result

    def stop(self) -> None:
        if self.thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has just closed
                self.loop.call_soon_threadsafe(lambda: self.main.cancel())
        self.thread.join()

    def _wake(self) -> None:
        self.woken = False
        for _ in range(min(len(self.inbox), len(self.idle))):
            future = self.idle.popleft()
            if not future.done():
                future.set_result(None)

    def _run(self) -> None:
        try:
            self.main = self.loop.create_task(self._serve())
            self.loop.run_until_complete(self.main)
        except asyncio.CancelledError:
            pass  # the caller has stopped listening
        except BaseException as error:  # handed to the caller's thread, which raises it, after what came in before
            self._hand_over()
            self.outbox.put(error)
        finally:
            self.loop.close()

    async def _serve(self) -> None:
        import aiohttp

        judge, key = self.judge, _read_key(self.judge.api_key_env)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        first = asyncio.Lock()
        async with aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=judge.concurrency),
            timeout=aiohttp.ClientTimeout(total=judge.timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:

            slots = [self.loop.create_task(self._slot(session, first)) for _ in range(judge.concurrency)]
            try:
                await asyncio.gather(*slots)
            finally:
                for slot in slots:
                    slot.cancel()
                await asyncio.gather(*slots, return_exceptions=True)

    async def _slot(self, session, first: asyncio.Lock) -> None:
        while True:
            while not self.inbox:
                self.idle.append(self.loop.create_future())
                await self.idle[-1]
            item = self.inbox.popleft()
            reply, failure = await self._ask(session, first, item)
            self.done.append((item["place"], reply, failure))
            # Handed over once per turn of the loop: waking the caller for each costs more than the rest of the hand-over.
            if len(self.done) == 1:
                self.loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        self.outbox.put(self.done)
        self.done = []

    async def _ask(self, session, first: asyncio.Lock, item: dict) -> tuple[dict | None, str | None]:
        # One at a time until one has succeeded: a server that is down, refuses the key or has no JSON schema is asked
        # once, not by every slot.
        if self.judge.succeeded:
            return await self.judge.ask(session, item)
        await first.acquire()
        alone = not self.judge.succeeded
        if not alone:
            first.release()
        answer = await self.judge.ask(session, item)
        if alone:
            first.release()  # not after an error: it stops the run, and nobody else is to ask until it does
        return answer


_END = object()


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
