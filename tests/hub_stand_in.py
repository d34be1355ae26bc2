"""A stand-in of the Hugging Face Hub: its HTTP interface on this machine, as far as push and load need it.

The real client of ``huggingface_hub`` talks to it. Large files (``.safetensors``, ``.npz``, ``.pt``) go through the Git
LFS batch and are served by a redirect to another host, like the Hub's; all others are regular. Attributes make it
refuse or lie.
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
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_standin"
PAGE = 2
"""Files per page of a repository's list: few, so that the tests turn pages."""


@dataclass
class Repository:
    """Commits by hash, each the files by path; branches and tags name commits."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit with exactly these files and return its hash."""
        sha = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """Return the commit that a branch or a hash names."""
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """The state of the stand-in, and the lies it tells.

    Args:
        listed: entries added to every repository's list of files, as JSON.
        sizes: sizes that the list states for some paths in place of the true ones.
        heads: headers of the answer to HEAD for some paths, in place of the true ones.
        bodies: what GET sends for some paths.
        gated: repositories whose files are refused.
        broken: whether every request fails with status 503.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    listed: list[dict[str, Any]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    heads: dict[str, dict[str, str]] = field(default_factory=dict)
    bodies: dict[str, bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken: bool = False
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def add(self, name: str, files: dict[str, bytes]) -> str:
        """Commit files to the main branch of a repository, made if need be, and return the commit's hash."""
        return self.repositories.setdefault(name, Repository()).commit(files)

    def fetched(self) -> list[str]:
        """Return the paths of the files whose content was sent, in order."""
        return [line.partition(" ")[2] for line in self.asked if line.startswith("CONTENT ")]


def files_of(folder: Path, under: str = "") -> dict[str, bytes]:
    """Return the files of a folder, with their paths in a repository."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {f"{under}{name}": path.read_bytes() for name, path in found.items()}


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".pt", ".npz"))


def _digest(path: str, content: bytes) -> str:
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        self.body = self._read()
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        self.hub.asked.append(f"{method} {path}")
        if self.hub.broken:
            return self._refuse(503, "", "the stand-in is broken")
        writes = method in ("POST", "PUT") and not path.startswith(("/lfs/", "/api/validate-yaml"))
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "", "Invalid username or password.")
        for pattern, handle in _ROUTES:
            if match := re.fullmatch(pattern, path):
                handle(self, method, *match.groups())
                return None
        return self._refuse(404, "EntryNotFound", f"no such address {path}")

    def _read(self) -> bytes:
        """Return the body of the request, which the client may send in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, /, *, status: int = 200, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), **({"Content-Type": "application/json"} | headers))

    def _refuse(self, status: int, code: str, message: str) -> None:
        content = json.dumps({"error": message}).encode()
        self._send(status, content, X_Error_Code=code, X_Error_Message=message)

    def _find(self, name: str, revision: str = "main") -> tuple[Repository, str] | None:
        """Return a repository and a commit of it; without one, answer why not."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._refuse(404 if self.headers.get("Authorization") else 401, "RepoNotFound", "Repository not found")
            return None
        sha = repository.find(revision)
        if sha is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, sha

    def create(self, _method: str) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self._json({"url": f"{self.hub.url}/{name}"}, status=409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = Repository(private=private)
        self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._json({"url": f"{self.hub.url}/{name}"})

    def info(self, _method: str, name: str, revision: str | None = None) -> None:
        if (found := self._find(name, revision or "main")) is not None:
            siblings = [{"rfilename": path} for path in found[0].commits[found[1]]]
            self._json(
                {"id": name, "modelId": name, "sha": found[1], "siblings": siblings, "private": found[0].private}
            )

    def tree(self, _method: str, name: str, revision: str) -> None:
        if (found := self._find(name, revision)) is None:
            return
        entries: list[dict[str, Any]] = []
        for path, content in sorted(found[0].commits[found[1]].items()):
            size = self.hub.sizes.get(path, len(content))
            entry = {"type": "file", "path": path, "size": size, "oid": _digest("", content)}
            if is_large(path):
                entry["lfs"] = {"oid": _digest(path, content), "size": size, "pointerSize": 130}
            entries.append(entry)
        folders = {entry["path"].rpartition("/")[0] for entry in entries} - {""}
        entries += [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in sorted(folders)]
        entries += self.hub.listed
        start = int(self.query.get("cursor", ["0"])[0])
        more: dict[str, Any] = {}
        if start + PAGE < len(entries):
            address = f"{self.hub.url}/api/models/{name}/tree/{revision}?recursive=True&cursor={start + PAGE}"
            more = {"Link": f'<{address}>; rel="next"'}
        self._json(entries[start : start + PAGE], **more)

    def resolve(self, method: str, name: str, revision: str, path: str) -> None:
        if (found := self._find(name, revision)) is None:
            return None
        if name in self.hub.gated:
            return self._refuse(403, "GatedRepo", "Access to model is restricted")
        content = found[0].commits[found[1]].get(path)
        if content is None:
            return self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=found[1])
        etag, size = f'"{_digest(path, content)}"', str(len(content))
        lies = self.hub.heads.get(path, {})
        if is_large(path):
            linked = {"X_Linked_Etag": etag, "X_Linked_Size": size, "X_Repo_Commit": found[1]} | lies
            place = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{etag.strip(chr(34))}?path={path}"
            self.hub.blobs[_digest(path, content)] = content
            return self._send(302, b"", **({"Location": place} | linked))
        if method == "GET":
            self.hub.asked.append(f"CONTENT {path}")
        body = self.hub.bodies.get(path, content)
        return self._send(200, body, **({"ETag": etag, "X_Repo_Commit": found[1]} | lies))

    def cdn(self, method: str, digest: str) -> None:
        path = self.query["path"][0]
        if method == "GET":
            self.hub.asked.append(f"CONTENT {path}")
        self._send(200, self.hub.bodies.get(path, self.hub.blobs[digest]), ETag=f'"{digest}"')

    def yaml(self, _method: str) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, _method: str, name: str, revision: str) -> None:
        if self._find(name, revision) is not None:
            files = [one["path"] for one in json.loads(self.body)["files"]]
            modes = [(path, "lfs" if is_large(path) else "regular") for path in files]
            self._json({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]})

    def batch(self, _method: str, name: str) -> None:
        objects = [
            one | {"authenticated": True, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            for one in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, _method: str, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            return self._refuse(400, "", "wrong digest")
        self.hub.blobs[digest] = self.body
        return self._send(200, b"")

    def branch(self, _method: str, name: str, branch: str) -> None:
        if (found := self._find(name)) is None:
            return None
        if branch in found[0].branches:
            return self._refuse(409, "", "Reference already exists")
        found[0].branches[branch] = found[1]
        return self._json({})

    def commit(self, _method: str, name: str, revision: str) -> None:
        if (found := self._find(name, revision)) is None:
            return
        files = dict(found[0].commits[found[1]])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = found[0].commit(files, revision)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, Any]] = [
    ("/api/repos/create", _Handler.create),
    ("/api/validate-yaml", _Handler.yaml),
    (f"/api/models/{_NAME}", _Handler.info),
    (f"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    (f"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    (f"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (f"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    (f"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (f"/{_NAME}.git/info/lfs/objects/batch", _Handler.batch),
    (f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("/cdn/([0-9a-f]+)", _Handler.cdn),
    ("/lfs/([0-9a-f]+)", _Handler.upload),
]


@contextmanager
def serve() -> Iterator[Hub]:
    """Run the stand-in on a free port of this machine while the block runs."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
