"""A hub on this machine: the routes that huggingface_hub requests for a model's files, and the ways they fail."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """A model on the hub: its files by commit, and its commits by branch or tag."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str | None = None  # without it the answer is that there is no such model
    status: int = 200  # any other is the answer to every request

    def push(self, files: dict[str, bytes], *refs: str) -> str:
        """Adds a commit, to which `main` and `refs` then point; gives its hash."""
        digest = hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()
        self.commits[digest] = files
        for ref in ("main", *refs):
            self.refs[ref] = digest
        return digest


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class FakeHub:
    """Serves `repos` on 127.0.0.1 within its context; `asked` are the requests, as 'METHOD path'."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[str] = []
        self.status = 200  # any other is the answer to every request
        self.body: bytes | None = None  # the answer to every request, as of a captive portal
        self.drops: Counter[str] = Counter()  # how many more times a file's bytes end half-way
        self.stalls: set[str] = set()  # files whose bytes end half-way with the connection kept open
        self.silent = threading.Event()  # set: requests are accepted and not answered
        self.half_sent = threading.Event()
        self._released = threading.Event()

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def wait(self) -> None:
        self._released.wait(60)

    def fetched(self) -> set[str]:
        """The names of the files whose bytes were requested."""
        return {line.rsplit("/", 1)[1] for line in self.asked if line.startswith("GET") and "/resolve/" in line}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: FakeHub, *args: object) -> None:
        self.hub = hub
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if "/models/" in path or "/resolve/" in path:  # the client has requests of its own, too
            self.hub.asked.append(f"{self.command} {path}")
        if self.hub.silent.is_set():
            self.hub.wait()
        elif self.hub.status != 200:
            self._answer(self.hub.status, b"")
        elif self.hub.body is not None:
            self._answer(200, self.hub.body)
        elif path.startswith("/api/models/"):
            model, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            self._repository(model, revision or "main", None)
        else:
            model, _, rest = path[1:].partition("/resolve/")
            revision, _, name = rest.partition("/")
            self._repository(model, revision, name)

    def _repository(self, model: str, revision: str, name: str | None) -> None:
        repo = self.hub.repos.get(model)
        if repo is None or (repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}"):
            self._answer(401 if repo is None else 404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        if repo.status != 200:
            self._answer(repo.status, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
            return
        commit = repo.refs.get(revision, revision)
        files = repo.commits.get(commit)
        if files is None:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif name is None:
            siblings = [{"rfilename": file} for file in files]
            listing = {"id": model, "sha": commit, "private": False, "tags": [], "siblings": siblings}
            self._answer(200, json.dumps(listing).encode())
        elif repo.gated:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif name not in files:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            etag = hashlib.sha256(files[name]).hexdigest()
            self._answer(200, files[name], {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, name)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, name: str = "") -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self.hub.stalls or self.hub.drops[name] > 0:
            self.hub.drops[name] -= 1
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.hub.half_sent.set()
            if name in self.hub.stalls:
                self.hub.wait()
            self.close_connection = True
            return
        self.wfile.write(body)
