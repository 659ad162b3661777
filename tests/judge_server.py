"""A scripted judge: an OpenAI-compatible endpoint on a real socket that answers, delays, refuses, breaks off and lies as
it is told.

In a test it runs in a thread, and its script is a function: `with JudgeServer(script) as server: server.url`. As a
process of its own it answers honestly after a delay: `python tests/judge_server.py --delay_s 0.05` prints its URL.
Raw asyncio rather than a web framework: faults need the socket itself, and a benchmark needs a fast one.
"""

import argparse
import asyncio
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

REASONS = {
    200: "OK", 307: "Temporary Redirect", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found",
    429: "Too Many Requests", 500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable",
}  # fmt: skip


@dataclass
class Reply:
    """What the server does with one request."""

    content: str | None = None  # of the assistant's message; None: an honest verdict on what was sent
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # instead of a chat completion
    finish_reason: str = "stop"
    delay_s: float = 0.0
    drop: str = ""  # "before": the connection closes without a byte; "within": after half of the response


Script = Callable[[int, dict], Reply]


def honest(number: int, body: dict) -> Reply:
    return Reply()


def honest_verdict(message: str) -> dict:
    """Reads the last "the answer is X." of the thinking and compares it with the given answer, letter by letter."""
    thinking = re.search(r"<thinking-(\w+)>\n(.*)\n</thinking-\1>", message, re.S)[2]
    given = re.search(r"<given-answer-(\w+)>\n(.*)\n</given-answer-\1>", message, re.S)[2]
    found = re.findall(r"the answer is ([^\s.]+(?:\.\d+)?)", thinking)
    if not found:
        return {"concluded_answer": None, "consistent": None, "reason": "no conclusion"}
    return {"concluded_answer": found[-1], "consistent": found[-1] == given, "reason": "its last sentence"}


class JudgeServer:
    """`log`: one dict per request: `number, at (monotonic seconds), status, headers, body (parsed)`."""

    def __init__(
        self, script: Script = honest, *, api_key: str | None = None, json_schema: bool = True, keep_log: bool = True,
        port: int = 0,
    ):  # fmt: skip
        self.script, self.api_key, self.json_schema, self.keep_log = script, api_key, json_schema, keep_log
        self.port, self.log = port, []
        self.requests = self.in_flight = self.most_in_flight = 0
        self.connections: set[asyncio.Transport] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.server = await self.loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    def __enter__(self):
        started = threading.Event()

        async def serve():
            await self.start()
            self.stopping = asyncio.Event()
            started.set()
            await self.stopping.wait()
            self.server.close()
            for transport in list(self.connections):
                transport.abort()

        self.thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self.thread.start()
        assert started.wait(10), "the judge's server did not start"
        return self

    def stop(self) -> None:
        """As a crash: connections are broken off, later ones refused."""
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.stopping.set)
            self.thread.join(10)

    def __exit__(self, *exc_info):
        self.stop()


class _Connection(asyncio.Protocol):
    def __init__(self, judge: JudgeServer):
        self.judge, self.buffer = judge, b""

    def connection_made(self, transport):
        self.transport = transport
        self.judge.connections.add(transport)

    def connection_lost(self, error):
        self.judge.connections.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            lines = self.buffer[:end].decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            length = int(headers.get("content-length", 0))
            if len(self.buffer) < end + 4 + length:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + length], self.buffer[end + 4 + length :]
            self.answer(*lines[0].split()[:2], headers, body)

    def answer(self, method: str, path: str, headers: dict, body: bytes) -> None:
        judge = self.judge
        if path in ("/health", "/v1/models"):
            return self.send(Reply(body=b'{"data": []}'), b"")
        number, judge.requests = judge.requests, judge.requests + 1
        parsed = json.loads(body) if body else {}
        if path != "/v1/chat/completions" or method != "POST":
            reply = Reply(status=404, body=b'{"error": {"message": "no such path"}}')
        elif judge.api_key is not None and headers.get("authorization") != f"Bearer {judge.api_key}":
            reply = Reply(status=401, body=b'{"error": {"message": "wrong key"}}')
        elif not judge.json_schema and parsed.get("response_format"):
            reply = Reply(status=400, body=b'{"error": {"message": "response_format is not supported"}}')
        else:
            reply = judge.script(number, parsed)
        content = b""
        if reply.body is None and reply.status == 200:
            text = reply.content
            if text is None:
                text = json.dumps(honest_verdict(parsed["messages"][-1]["content"]))
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
            content = json.dumps({"id": str(number), "object": "chat.completion", "choices": [choice]}).encode()
        if judge.keep_log:
            entry = {"number": number, "at": time.monotonic(), "status": reply.status, "headers": headers}
            judge.log.append({**entry, "body": parsed})
        judge.in_flight += 1
        judge.most_in_flight = max(judge.most_in_flight, judge.in_flight)
        if reply.delay_s:
            judge.loop.call_later(reply.delay_s, self.finish, reply, content)
        else:
            self.finish(reply, content)

    def finish(self, reply: Reply, content: bytes) -> None:
        self.judge.in_flight -= 1
        if reply.drop == "before":
            self.transport.abort()
        else:
            self.send(reply, content)

    def send(self, reply: Reply, content: bytes) -> None:
        content = content or reply.body or b""
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **reply.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        data = f"HTTP/1.1 {reply.status} {REASONS[reply.status]}\r\n{head}\r\n".encode() + content
        if reply.drop == "within":
            self.transport.write(data[: len(data) // 2])
            self.transport.close()
        else:
            self.transport.write(data)


async def main(delay_s: float) -> None:
    judge = JudgeServer(lambda number, body: Reply(delay_s=delay_s), keep_log=False)
    await judge.start()
    print(judge.url, flush=True)
    await judge.server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay_s", type=float, default=0.05)
    asyncio.run(main(parser.parse_args().delay_s))
