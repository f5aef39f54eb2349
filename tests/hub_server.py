"""A stand-in for the Hugging Face hub on loopback: as much of its API as pushing and pulling models takes.

Repositories live in memory. Files that end in .safetensors go through the LFS protocol, as on the hub.
"""

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
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

TOKEN = "hf_standin"


@dataclass
class Repository:
    """Commits from old to new, each with the whole content."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=lambda: [("0" * 40, {})])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((one for one in self.commits if one[0] == revision), None)

    def commit(self, files: dict[str, bytes]) -> str:
        text = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
        oid = hashlib.sha1(f"{len(self.commits)}{text}".encode()).hexdigest()
        self.commits.append((oid, {**self.files, **files}))
        return oid


class Hub(ThreadingHTTPServer):
    """The state behind the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.tampered: dict[str, bytes] = {}  # path to what is delivered in place of the file
        self.downloads: list[str] = []
        self.before_commit = lambda: None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the library finds by HF_ENDPOINT, with a token for it and its cache in `folder`."""
    # The protocol of the hub's own storage is not spoken here: the library's other one, LFS, is.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub-cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._model(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        else:
            self._answer(404, {"error": path})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        data = self._body()
        oid = self.path.removeprefix("/lfs/")
        if hashlib.sha256(data).hexdigest() != oid:
            return self._answer(400, {"error": "another digest"})
        self.server.large[oid] = data
        return self._answer(200, {})

    def do_POST(self) -> None:
        body, path = self._body(), unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            return self._answer(200, {"warnings": [], "errors": []})
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [
                {
                    "path": one["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                }
                for one in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {
                    **one,
                    "actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{one['oid']}", "header": {}}},
                }
                for one in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            return self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        return self._answer(404, {"error": path})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.server.repositories:
            return self._answer(409, {"error": "exists", "url": f"{self.server.endpoint}/{name}"})
        self.server.repositories[name] = Repository(wanted.get("visibility") == "private")
        return self._answer(200, {"url": f"{self.server.endpoint}/{name}"})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        self.server.before_commit()
        repository = self.server.repositories[name]
        files: dict[str, bytes] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") != repository.commits[-1][0]:
                return self._answer(
                    412, {"error": "A commit has happened since. Please refresh and try again."}
                )
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        oid = repository.commit(files)
        return self._answer(
            200, {"commitUrl": f"{self.server.endpoint}/{name}/commit/{oid}", "commitOid": oid}
        )

    def _at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.server.repositories.get(name)
        if repository is None or (
            repository.private and self.headers.get("authorization") != f"Bearer {TOKEN}"
        ):
            self._answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        found = repository.at(revision)
        if found is None:
            self._answer(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        return found

    def _model(self, name: str, revision: str) -> None:
        if (found := self._at(name, revision)) is None:
            return
        oid, files = found
        siblings = []
        for path, data in files.items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": "b" * 40}
            if path.endswith(".safetensors"):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        self._answer(200, {"id": name, "sha": oid, "siblings": siblings, "tags": []})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if (found := self._at(name, revision)) is None:
            return None
        oid, files = found
        if path not in files:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        data = self.server.tampered.get(path, files[path])
        if self.command == "GET":
            self.server.downloads.append(path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("ETag", f'"{hashlib.sha256(files[path]).hexdigest()}"')
        self.send_header("X-Repo-Commit", oid)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
        return None

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _answer(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
