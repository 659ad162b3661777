"""A Hub of the tests' own: the parts of the real API that the real clients use, in memory, on a socket.

    python tests/hub_server.py --port 0 --token hf_any_string                    # prints its URL, then one line a request

In a test:

    with HubServer() as hub:
        hub.fail("commit", status=500, times=2)          # or drop="before" | "after", delay_s=…
        subprocess.run(..., env={**os.environ, **hub.environment(tmp_path / "hf_home")})
        assert hub.commits("datasets/tester/rows") == 1

Clients read HF_ENDPOINT when they are imported, so they run in processes of their own. Large files take the LFS way:
`HF_HUB_DISABLE_XET=1`.
"""

import argparse
import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

USER = "tester"
LFS_SUFFIXES = (".parquet", ".safetensors", ".bin", ".pt", ".png", ".mp4", ".arrow")
REPO = r"(?P<name>[\w.\-]+/[\w.\-]+?)"
KIND = r"/api/(?P<kind>models|datasets)/" + REPO
SITE = r"/(?P<site>datasets/)?" + REPO
REV = r"(?P<rev>[^/]+)"
ROUTES = [
    ("whoami", "GET", "/api/whoami-v2"),
    ("create", "POST", "/api/repos/create"),
    ("delete", "DELETE", "/api/repos/delete"),
    ("yaml", "POST", "/api/validate-yaml"),
    ("put", "PUT", r"/storage/(?P<oid>\w+)"),
    ("verify", "POST", r"/storage/(?P<oid>\w+)/verify"),
    ("batch", "POST", SITE + r"\.git/info/lfs/objects/batch"),
    ("resolve", "GET|HEAD", SITE + f"/resolve/{REV}/(?P<path>.+)"),
    ("preupload", "POST", f"{KIND}/preupload/{REV}"),
    ("commit", "POST", f"{KIND}/commit/{REV}"),
    ("tree", "GET", f"{KIND}/tree/{REV}(?:/(?P<path>.+))?"),
    ("paths", "POST", f"{KIND}/paths-info/{REV}"),
    ("refs", "GET", f"{KIND}/refs"),
    ("commits", "GET", f"{KIND}/commits/{REV}"),
    ("ref", "POST|DELETE", f"{KIND}/(?P<ref>branch|tag)/{REV}"),
    ("settings", "PUT", f"{KIND}/settings"),
    ("info", "GET", f"{KIND}(?:/revision/{REV})?"),
]
ROUTES = [(name, methods.split("|"), re.compile(pattern)) for name, methods, pattern in ROUTES]
WRITES = {"create", "delete", "preupload", "batch", "commit", "ref", "settings"}


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "", **extra):
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra


@dataclass
class Fault:
    """What the next `times` requests of an operation meet."""

    operation: str
    times: int
    status: int | None
    drop: str | None
    delay_s: float
    message: str


@dataclass
class Repo:
    """`commits`: {oid: {title, date, files: {path: bytes}}} in the order of their making."""

    private: bool
    commits: dict[str, dict] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, title: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {title} {time.time_ns()}".encode()).hexdigest()
        parent = self.branches.get(branch)
        self.commits[oid] = {"title": title, "date": "2025-01-01T00:00:00.000Z", "files": files, "parent": parent}
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str:
        oid = self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


class HubServer:
    """The server. `repos`: {"models/tester/x": Repo}; `log`: a dict a request; `blobs`: {sha256: bytes}."""

    def __init__(self, *, port: int = 0, token: str = "hf_tests_token", verbose: bool = False, page_size: int = 1000):
        self.tokens = {
            token: {"user": USER, "role": "write"},
            "hf_read_only": {"user": USER, "role": "read"},
        }
        self.token, self.verbose, self.page_size = token, verbose, page_size
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[dict] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.httpd = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"

    def __enter__(self):
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.httpd.shutdown()
        self.httpd.server_close()

    def environment(self, hf_home, *, token: str | None = None) -> dict[str, str]:
        """What a client's process needs, with an `HF_HOME` of its own."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(hf_home), "HF_TOKEN": self.token if token is None else token,
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip

    def use_in_this_process(self, monkeypatch, hf_home) -> None:
        """Point the clients of this process here, for a test: what they read at import is replaced."""
        import datasets
        from huggingface_hub import constants, hf_api
        from huggingface_hub.utils import close_session
        from transformers.utils import hub as transformers_hub

        for name, value in {
            "ENDPOINT": self.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(hf_home / "hub"), "HF_TOKEN_PATH": str(hf_home / "token"),
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        for name, value in {
            "HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": False, "HF_DATASETS_CACHE": str(hf_home / "datasets"),
        }.items():  # fmt: skip
            monkeypatch.setattr(datasets.config, name, value)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)  # perhaps made for another server
        monkeypatch.setenv("HF_TOKEN", self.token)
        close_session()  # a session keeps the offline mode that it was made in

    def fail(self, operation: str, *, times: int = 1, status: int | None = None, drop: str | None = None,
             delay_s: float = 0.0, message: str = "made to fail by a test"):  # fmt: skip
        """Let the next requests of an operation (a name of ROUTES) fail: answered with `status` and not done, dropped
        "before" or "after" they are done, or answered late."""
        assert operation in {name for name, *_ in ROUTES}, operation
        self.faults.append(Fault(operation, times, status, drop, delay_s, message))

    def next_fault(self, operation: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.operation == operation and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def requests(self, operation: str, *, status: int | None = None) -> list[dict]:
        """The log's entries of one operation."""
        return [
            entry for entry in self.log if entry["operation"] == operation and status in (None, entry["status"])
        ]

    def commits(self, repo: str) -> int:
        """How many commits a repository has beside the one that its creation made."""
        return len(self.repos[repo].commits) - 1

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The contents of a repository's files at a revision."""
        found = self.repos[repo]
        return found.commits[found.find(revision)]["files"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def serve(self):
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        self.content = self.read_content()
        operation, groups = self.route(url.path)
        entry = {"operation": operation, "method": self.command, "path": url.path, "status": 0, "time": time.time()}
        entry["sent"] = len(self.content)
        with self.hub.lock:
            self.hub.log.append(entry)
        fault = self.hub.next_fault(operation)
        if fault is not None:
            time.sleep(fault.delay_s)
        if fault is not None and fault.drop == "before":
            return self.hang_up(entry)
        try:
            if fault is not None and fault.status is not None:
                raise Refusal(fault.status, fault.message)
            with self.hub.lock:
                answer = self.answer(operation, groups)
            status, headers, body = answer if isinstance(answer, tuple) else (200, {}, answer)
        except Refusal as refusal:
            status, body = refusal.status, {"error": refusal.message, **refusal.extra}
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
        if fault is not None and fault.drop == "after":
            return self.hang_up(entry)
        entry["status"] = status
        if self.hub.verbose:
            print(f"{status} {self.command} {url.path}", flush=True)
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def hang_up(self, entry):
        entry["status"] = -1
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def read_content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def route(self, path: str) -> tuple[str, dict]:
        for name, methods, pattern in ROUTES:
            if self.command in methods and (match := pattern.fullmatch(path)):
                groups = match.groupdict()
                return name, {key: unquote(value) if value else value for key, value in groups.items()}
        return "unknown", {}

    def answer(self, operation: str, groups: dict):
        if operation == "unknown":
            raise Refusal(404, f"no such route: {self.command} {self.path}")
        if operation in ("put", "verify", "yaml"):
            return getattr(self, operation)(**groups)
        who = self.who()
        if operation in WRITES and (who is None or who["role"] == "read"):
            raise Refusal(*((401, "Invalid username or password.") if who is None else (403, "Forbidden: read token")))
        if operation in ("whoami", "create", "delete"):
            return getattr(self, operation)(who)
        kind, name = groups.pop("kind", None), groups.pop("name")
        site = groups.pop("site", None)
        kind = kind or ("datasets" if site else "models")
        repo = self.hub.repos.get(f"{kind}/{name}")
        if repo is None or (repo.private and (who is None or who["user"] != name.split("/")[0])):
            raise Refusal(401 if who is None else 404, "Repository not found", "RepoNotFound")
        if operation in WRITES and who["user"] != name.split("/")[0]:
            raise Refusal(403, "Forbidden: not the owner")
        return getattr(self, operation)(repo, f"{kind}/{name}", **groups)

    def who(self) -> dict | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        if (who := self.hub.tokens.get(header.removeprefix("Bearer "))) is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return who

    # ---- accounts and repositories ----

    def whoami(self, who):
        if who is None:
            raise Refusal(401, "Invalid username or password.")
        token = {"accessToken": {"role": who["role"], "displayName": "tests"}}
        return {"type": "user", "name": who["user"], "fullname": who["user"], "orgs": [], "auth": token}

    def create(self, who):
        asked = json.loads(self.content)
        owner = asked.get("organization") or who["user"]
        kind, name = f"{asked.get('type') or 'model'}s", f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if owner != who["user"]:
            raise Refusal(403, f"You don't have the rights to create a repo under the namespace {owner!r}")
        if f"{kind}/{name}" in self.hub.repos:
            raise Refusal(409, "You already created this repo", url=url)
        repo = Repo(private=asked.get("visibility") == "private")
        repo.add("main", "initial commit", {".gitattributes": b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"})
        self.hub.repos[f"{kind}/{name}"] = repo
        return {"url": url, "name": name, "id": name}

    def delete(self, who):
        asked = json.loads(self.content)
        self.hub.repos.pop(f"{asked.get('type') or 'model'}s/{asked.get('organization') or who['user']}/{asked['name']}")
        return {}

    def settings(self, repo, key):
        asked = json.loads(self.content)
        repo.private = asked.get("private", asked.get("visibility") == "private")
        return {}

    def info(self, repo, key, rev=None):
        name, oid = key.split("/", 1)[1], repo.find(rev or "main")
        return {
            "id": name, "modelId": name, "author": name.split("/")[0], "sha": oid, "private": repo.private,
            "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0,
            "lastModified": repo.commits[oid]["date"], "createdAt": repo.commits[oid]["date"],
            "siblings": [{"rfilename": path} for path in sorted(repo.commits[oid]["files"])],
        }  # fmt: skip

    def refs(self, repo, key):
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in repo.branches.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in repo.tags.items()]
        return {"branches": branches, "tags": tags, "converts": []}

    def commits(self, repo, key, rev):
        oid, found = repo.find(rev), []
        while oid is not None:
            commit = repo.commits[oid]
            found.append({"id": oid, "title": commit["title"], "message": "", "authors": [], "date": commit["date"]})
            oid = commit["parent"]
        return found

    def ref(self, repo, key, ref, rev):
        asked = json.loads(self.content or b"{}")
        named = repo.branches if ref == "branch" else repo.tags
        name, target = (rev, asked.get("startingPoint", "main")) if ref == "branch" else (asked.get("tag", rev), rev)
        if self.command == "DELETE":
            named.pop(rev)
        elif name in named:
            raise Refusal(409, f"{ref} already exists")
        else:
            named[name] = repo.find(target)
        return {}

    # ---- writing ----

    def yaml(self):
        return {"errors": [], "warnings": []}

    def preupload(self, repo, key, rev):
        files, answer = repo.commits[repo.find(rev)]["files"], []
        for asked in json.loads(self.content)["files"]:
            mode = "lfs" if is_lfs(asked["path"], asked["size"]) else "regular"
            held = files.get(asked["path"])
            oid = None if held is None else oid_of(asked["path"], held)
            answer.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def batch(self, repo, key):
        objects = []
        for asked in json.loads(self.content)["objects"]:
            href = f"{self.hub.url}/storage/{asked['oid']}"
            actions = {"upload": {"href": href, "header": {}}, "verify": {"href": f"{href}/verify", "header": {}}}
            objects.append(asked if asked["oid"] in self.hub.blobs else {**asked, "actions": actions})
        return {"transfer": "basic", "objects": objects}

    def put(self, oid):
        if hashlib.sha256(self.content).hexdigest() != oid:
            raise Refusal(400, "content and oid differ")
        self.hub.blobs[oid] = self.content
        return b""

    def verify(self, oid):
        asked = json.loads(self.content)
        if len(self.hub.blobs.get(oid, b"")) != asked["size"]:
            raise Refusal(404, "no such object")
        return {}

    def commit(self, repo, key, rev):
        lines = [json.loads(line) for line in self.content.splitlines() if line.strip()]
        if rev not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        head = repo.branches[rev]
        files, title = dict(repo.commits[head]["files"]), ""
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "header":
                title = value["summary"]
                if value.get("parentCommit", head) != head:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refusal(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif kind == "deletedFile":
                files.pop(value["path"])
            elif kind == "deletedFolder":
                prefix = value["path"].rstrip("/") + "/"
                files = {path: data for path, data in files.items() if not path.startswith(prefix)}
        oid = repo.add(rev, title, files)
        return {"commitOid": oid, "commitUrl": f"{self.hub.url}/{key.removeprefix('models/')}/commit/{oid}"}

    # ---- reading ----

    def tree(self, repo, key, rev, path=None):
        files = repo.commits[repo.find(rev)]["files"]
        prefix = f"{path}/" if path else ""
        below = [name for name in files if name.startswith(prefix)]
        if path and not below:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        rows = {}
        for name in below:
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                folder = prefix + "/".join(parts[:depth])
                rows[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
            rows[name] = file_row(name, files[name])
        if self.query.get("recursive", "").lower() not in ("true", "1"):
            rows = {name: row for name, row in rows.items() if "/" not in name.removeprefix(prefix)}
        rows = [rows[name] for name in sorted(rows)]
        start = int(self.query.get("cursor", 0))
        end, headers = start + self.hub.page_size, {}
        if end < len(rows):
            url = f"{self.hub.url}{urlsplit(self.path).path}?recursive={self.query.get('recursive', '')}&cursor={end}"
            headers["Link"] = f'<{url}>; rel="next"'
        return 200, headers, rows[start:end]

    def paths(self, repo, key, rev):
        files = repo.commits[repo.find(rev)]["files"]
        if self.headers.get("Content-Type", "").startswith("application/json"):
            asked = json.loads(self.content)["paths"]
        else:
            asked = parse_qs(self.content.decode()).get("paths", [])
        rows = []
        for path in asked:
            if path in files:
                rows.append(file_row(path, files[path]))
            elif any(name.startswith(f"{path.rstrip('/')}/") for name in files):
                rows.append({"type": "directory", "path": path, "size": 0, "oid": "0" * 40})
        return rows

    def resolve(self, repo, key, rev, path):
        oid = repo.find(rev)
        data = repo.commits[oid]["files"].get(path)
        if data is None:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{oid_of(path, data)}"', "Accept-Ranges": "bytes"}
        if is_lfs(path, len(data)):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return 206, headers, data[first : last + 1]
        return 200, headers, data


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > 10_000_000)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def oid_of(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if is_lfs(path, len(data)) else git_oid(data)


def file_row(path: str, data: bytes) -> dict:
    row = {"type": "file", "path": path, "size": len(data), "oid": oid_of(path, data)}
    if is_lfs(path, len(data)):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{row['oid']}\nsize {len(data)}\n".encode()
        row |= {"oid": git_oid(pointer), "lfs": {"oid": row["oid"], "size": len(data), "pointerSize": len(pointer)}}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token", default="hf_tests_token")
    parser.add_argument("--fault", action="append", default=[], metavar="OPERATION:STATUS:TIMES")
    arguments = parser.parse_args()
    with HubServer(port=arguments.port, token=arguments.token, verbose=True) as hub:
        for fault in arguments.fault:
            operation, status, times = fault.split(":")
            hub.fail(operation, status=int(status), times=int(times))
        print(hub.url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
