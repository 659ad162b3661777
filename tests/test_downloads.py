"""Media by URL, from a real server on a socket."""

import http.server
import threading
from functools import partial

import pytest
from conftest import make_row

from veripo_trl import downloads
from veripo_trl.rows import RowError
from veripo_trl.video import MediaError


@pytest.fixture
def server(media_root):
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

        def do_GET(self):
            if self.path == "/short.mp4":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"x" * 10)
            else:
                super().do_GET()

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(media_root)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", requests
    httpd.shutdown()


def test_a_url_is_fetched_once_and_encodes_as_the_file_does(server, load, media_root, tmp_path, monkeypatch):
    url, requests = server
    monkeypatch.setattr("veripo_trl.encoding.fetch", partial(downloads.fetch, folder=tmp_path))
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


@pytest.mark.parametrize(("path", "message"), [("none.mp4", "404"), ("short.mp4", "after 10 of 1000 bytes")])
def test_failures_name_row_and_url_and_leave_nothing(path, message, server, tmp_path):
    url, _ = server
    with pytest.raises(MediaError, match=message) as caught:
        downloads.fetch(f"{url}/{path}", row_id="q9", folder=tmp_path)
    assert "q9" in str(caught.value) and path in str(caught.value)
    assert list(tmp_path.iterdir()) == []
