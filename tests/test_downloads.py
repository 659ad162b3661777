"""Media by URL, from a real server on a socket."""

import asyncio
import http.server
import threading
import time
from functools import partial

import pytest
from conftest import make_row

from veripo_trl.data.schema import RowError
from veripo_trl.media import downloads
from veripo_trl.media.video import MediaError

REPLIES = {
    "/short.mp4": (200, {"Content-Length": "1000"}, b"x" * 10),
    "/large.mp4": (200, {"Content-Length": "2000000000"}, b"x"),
    "/endless.mp4": (200, {}, b""),
    "/drip.mp4": (200, {}, b""),
    "/empty.mp4": (200, {"Content-Length": "0"}, b""),
    "/error.mp4": (200, {}, b"<html>Sign in first</html>" * 99),
    "/error.png": (200, {}, b"<html>Sign in first</html>"),
    "/away.mp4": (302, {"Location": "ftp://127.0.0.1/wide.mp4"}, b""),
    "/file.mp4": (302, {"Location": "file:///etc/passwd"}, b""),
    "/loop.mp4": (302, {"Location": "/loop.mp4"}, b""),
    "/near.mp4": (302, {"Location": "/wide.mp4"}, b""),
}


@pytest.fixture
def server(media_root):
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

        def do_GET(self):
            path = self.path.partition("?")[0]
            status, headers, body = REPLIES.get(path, (None, {}, b""))
            if status is None:  # a file
                return super().do_GET()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(body)
                while path == "/endless.mp4":
                    self.wfile.write(bytes(1 << 20))
                while path == "/drip.mp4":
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            except OSError:  # the client has gone
                pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(media_root)))
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", requests
    httpd.shutdown()


def test_a_url_is_fetched_once_and_encodes_as_the_file_does(server, load, media_root, tmp_path, monkeypatch):
    url, requests = server
    monkeypatch.setattr("veripo_trl.model.encoding.fetch", partial(downloads.fetch, folder=tmp_path))
    _, encoder = load(allow_urls=True)
    local = encoder.encode(make_row("q", media_root, videos=["wide.mp4"], images=["square.png"]))
    for _ in range(2):
        row = make_row("q", media_root, videos=[f"{url}/wide.mp4"], images=[f"{url}/square.png"])
        remote = encoder.encode(row)
        assert remote.input_ids.tolist() == local.input_ids.tolist()
        assert remote.pixel_values_videos.equal(local.pixel_values_videos)
        assert remote.pixel_values.equal(local.pixel_values)
    assert len(requests) == 2  # one per file


def test_a_url_is_refused_unless_allowed(server, load, media_root):
    url, requests = server
    _, encoder = load()
    with pytest.raises(RowError, match="allow_urls"):
        encoder.encode(make_row("q7", media_root, videos=[f"{url}/wide.mp4"]))
    assert requests == []


@pytest.mark.parametrize(
    "path, message",
    [
        ("/none.mp4", "404"),
        ("/short.mp4", "received 10 of 1000 bytes"),
        ("/large.mp4", "2000000000 bytes, over the limit of 10000000"),
        ("/endless.mp4", "over the limit of 10000000 bytes"),
        ("/drip.mp4", "not done in 1 s"),
        ("/empty.mp4", "empty file"),
        ("/error.mp4", "is a text file; expected mp4"),
        ("/error.png", "is not an image; expected PNG"),
        ("/square.png", "is an image; expected mp4"),
        ("/away.mp4", "ftp://127.0.0.1/wide.mp4"),
        ("/file.mp4", "file:///etc/passwd"),
        ("/loop.mp4", "TooManyRedirects|url="),
        (":99999/wide.mp4", "cannot be downloaded"),
        ("[::1/wide.mp4", "cannot be downloaded"),
        ("." * 300 + "/wide.mp4", "cannot be downloaded"),
    ],
)
def test_failures_name_row_and_url_and_leave_nothing(path, message, server, tmp_path):
    url = server[0] + path if path.startswith("/") else "http://127.0.0.1" + path
    kind = "image" if path == "/error.png" else "video"
    with pytest.raises(MediaError, match=message) as caught:
        downloads.fetch(
            url + "?sign=secret", row_id="q9", kind=kind, folder=tmp_path,
            timeout_s=1.0 if path == "/drip.mp4" else 60.0, max_bytes=10_000_000,
        )  # fmt: skip
    assert "row 'q9'" in str(caught.value) and f"{kind} '{url}?…'" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_redirect_is_followed_where_a_loop_runs_too(server, media_root, tmp_path):
    async def fetch():
        return downloads.fetch(f"{server[0]}/near.mp4", row_id="q9", kind="video", folder=tmp_path)

    with open(asyncio.run(fetch()), "rb") as file:
        assert file.read() == (media_root / "wide.mp4").read_bytes()


def test_what_cannot_be_decoded_is_called_by_its_url(server, load, media_root, tmp_path, monkeypatch):
    monkeypatch.setattr("veripo_trl.model.encoding.fetch", partial(downloads.fetch, folder=tmp_path))
    head = (media_root / "wide.mp4").read_bytes()
    monkeypatch.setitem(REPLIES, "/noise.mp4", (200, {}, head.replace(b"avcC", b"xxxx")))
    with pytest.raises(MediaError, match=rf"row 'q9', video '{server[0]}/noise.mp4': cannot be decoded"):
        load(allow_urls=True)[1].encode(make_row("q9", media_root, videos=[f"{server[0]}/noise.mp4"]))
