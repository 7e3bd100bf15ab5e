"""A Hub on 127.0.0.1: the endpoints that pushing a folder and loading it again use, over real HTTP.

Keeps repositories in memory: branches of commits, each a whole tree of files. Large files arrive by LFS, as on the Hub.
Clients are separate processes whose HF_ENDPOINT is `url`, because the Hub client reads it when it is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_stand_in"
USER = "somebody"
LARGE = (".safetensors",)


@dataclass
class Fault:
    """Answers requests that match with an error; `times` at most."""

    method: str
    path: str
    status: int
    message: str = "no"
    times: int = 1_000_000


@dataclass
class Repository:
    """`branches` maps a name to its commits, the latest last: (id, {path: content})."""

    private: bool
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)

    def tree(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = [commit for branch in self.branches.values() for commit in branch]
        return next((commit for commit in commits if commit[0] == revision), None)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        kept = self.branches.setdefault(branch, [])
        name = hashlib.sha1(f"{branch} {len(kept)} {sorted(files)}".encode()).hexdigest()
        kept.append((name, files))
        return name


class HubStandIn(ThreadingHTTPServer):
    """`requests` holds (method, path) of everything that was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo: str, files: dict[str, bytes], *, private: bool = False, branch: str = "main") -> Repository:
        repository = self.repositories.setdefault(repo, Repository(private))
        repository.commit(branch, files)
        return repository

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        tree = self.repositories[repo].tree(revision)
        assert tree is not None
        return tree[1]


@contextmanager
def running_hub() -> Iterator[HubStandIn]:
    hub = HubStandIn()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubStandIn

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        self.server.requests.append((self.command, path))
        try:
            self._faults(path)
            for method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    getattr(self, name)(**match.groupdict())
                    return
            raise Refused(404, f"{self.command} {path} is no endpoint of the stand-in")
        except Refused as error:
            self._send(error.status, {"error": str(error)}, {"X-Error-Code": error.code, "X-Error-Message": str(error)})
        except ConnectionAbortedError:
            self.close_connection = True
            self.connection.close()

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _faults(self, path: str) -> None:
        for fault in self.server.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, path):
                fault.times -= 1
                if fault.status == 0:
                    raise ConnectionAbortedError
                raise Refused(fault.status, fault.message)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.body or b"{}")
        return content

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _need_token(self) -> None:
        if not self._authorised():
            raise Refused(401, "Invalid credentials in Authorization header")

    def _repository(self, repo: str) -> Repository:
        repository = self.server.repositories.get(repo)
        if repository is None or (repository.private and not self._authorised()):
            raise Refused(404 if self._authorised() else 401, "Repository not found", "RepoNotFound")
        return repository

    def _tree(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        tree = self._repository(repo).tree(revision)
        if tree is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return tree

    def whoami(self) -> None:
        self._need_token()
        self._send(200, {"type": "user", "name": USER, "orgs": []})

    def create(self) -> None:
        self._need_token()
        asked = self._json()
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        address = {"url": f"{self.server.url}/{repo}"}
        if repo in self.server.repositories:
            self._send(409, address | {"error": "You already created this model repo"})
            return
        if not repo.startswith(f"{USER}/"):
            raise Refused(403, f"You don't have the rights to create a model under the namespace {repo.split('/')[0]}")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.add(repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._send(200, address)

    def validate(self) -> None:
        content = self._json()["content"]
        if not re.match(r"---\n[\s\S]+?\n---\n", content):
            raise Refused(400, "no metadata in README.md")
        self._send(200, {"errors": [], "warnings": []})

    def info(self, repo: str, revision: str = "main") -> None:
        repository = self._repository(repo)
        name, files = self._tree(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._send(200, {"id": repo, "sha": name, "private": repository.private, "siblings": siblings})

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        _, files = self._tree(repo, revision)
        inside = {path: data for path, data in sorted(files.items()) if path.startswith((folder or "").lstrip("/"))}
        if folder and not inside:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        self._send(200, [self._entry(path, data) for path, data in inside.items()])

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def branch(self, repo: str, revision: str) -> None:
        self._need_token()
        repository = self._repository(repo)
        if revision in repository.branches:
            raise Refused(409, f"Reference already exists: {revision}")
        repository.commit(revision, dict(self._tree(repo, "main")[1]))
        self._send(200, {})

    def preupload(self, repo: str, revision: str) -> None:
        self._need_token()
        _, files = self._tree(repo, revision)
        modes = []
        for file in self._json()["files"]:
            path = file["path"]
            large = path.endswith(LARGE)
            mode = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in files:
                mode["oid"] = hashlib.sha256(files[path]).hexdigest() if large else _blob(files[path])
            modes.append(mode)
        self._send(200, {"files": modes})

    def batch(self, repo: str) -> None:
        self._need_token()
        self._repository(repo)
        objects = []
        for one in self._json()["objects"]:
            answer: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.server.blobs:
                answer["actions"] = {
                    "upload": {"href": f"{self.server.url}/lfs/{one['oid']}"},
                    "verify": {"href": f"{self.server.url}/lfs/verify"},
                }
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, f"content is not {oid}")
        self.server.blobs[oid] = self.body
        self._send(200, {})

    def verify_blob(self) -> None:
        if self._json()["oid"] not in self.server.blobs:
            raise Refused(404, "never uploaded")
        self._send(200, {})

    def commit(self, repo: str, revision: str) -> None:
        self._need_token()
        repository = self._repository(repo)
        files = dict(self._tree(repo, revision)[1])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "deletedFile":
                del files[value["path"]]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        name = repository.commit(revision, files)
        self._send(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{name}", "commitOid": name})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        name, files = self._tree(repo, revision)
        if path not in files:
            raise Refused(404, f"{path} is not there", "EntryNotFound")
        etag = hashlib.sha256(files[path]).hexdigest() if path.endswith(LARGE) else _blob(files[path])
        self._send(200, files[path], {"X-Repo-Commit": name, "ETag": f'"{etag}"'})


def _blob(data: bytes) -> str:
    """The name git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    (("GET",), r"/api/whoami-v2", "whoami"),
    (("POST",), r"/api/repos/create", "create"),
    (("POST",), r"/api/validate-yaml", "validate"),
    (("GET",), rf"/api/models/{_REPO}", "info"),
    (("GET",), rf"/api/models/{_REPO}/revision/(?P<revision>.+)", "info"),
    (("GET",), rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", "tree"),
    (("POST",), rf"/api/models/{_REPO}/branch/(?P<revision>.+)", "branch"),
    (("POST",), rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", "preupload"),
    (("POST",), rf"/api/models/{_REPO}/commit/(?P<revision>.+)", "commit"),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    (("POST",), r"/lfs/verify", "verify_blob"),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", "put"),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
