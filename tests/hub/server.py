"""A small Hub on this machine, for the real huggingface_hub client.

It answers what the client asks of the Hub: commits of revisions, lists of files (in pages), and
the files themselves, by range, small ones by way of a redirect to itself and large ones of one to
a CDN, another server with links that expire. Access by token: public, private and gated
repositories.
Every request is recorded, so that a test can check what was fetched.

A route is a method, a pattern of the path and a function of the handler and the match: other
endpoints are added to `ROUTES`.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.hub.faults import Fault, Faults
from tests.hub.store import Repo, etag_of, files_in, is_large

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PAGE = 1000
"""How many files a page of a list has; tests make it less."""

_BLOCK = 1 << 16


@dataclass
class Request:
    """A request, recorded before its answer is sent.

    Attributes:
        method: such as ``"GET"``.
        path: with the query, unquoted; the CDN's begin with ``/cdn/``.
        status: the answer's.
        sent: the bytes of its body that were sent, or are being sent.
        token: the token of the client.
        wanted: the Range header.
        received: the bytes of the request's body that arrived.
    """

    method: str
    path: str
    status: int
    sent: int
    token: str | None
    wanted: str | None
    received: int = 0


@dataclass
class Reply:
    """An answer.

    Attributes:
        status: HTTP's.
        headers: more than the length.
        body: its bytes, or the file that has them.
        start: the first byte of the body that is sent.
        stop: the byte after the last one; None for the end.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Path = b""
    start: int = 0
    stop: int | None = None


class Hub:
    """A Hub; use it as a context manager.

    Args:
        root: an empty folder, for the repositories.

    Attributes:
        url: the value for `HF_ENDPOINT`.
        repos: by id.
        tokens: the ids that each token opens, beside the public ones. Other tokens are invalid.
        users: the name behind each token, ``"someone"`` by default.
        faults: what goes wrong.
        requests: what was asked, in the order of the answers.
        page: how many files a page of a list has.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, set[str]] = {}
        self.faults = Faults()
        self.requests: list[Request] = []
        self.page = PAGE
        self.state: dict[str, Any] = {}  # what routes of other modules keep
        self._signature = 0
        self._lock = threading.Lock()
        handler = type("Handler", (Handler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.cdn = (f"http://127.0.0.1:{s.server_address[1]}" for s in self._servers)

    def __enter__(self) -> Hub:
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            for server in self._servers
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop answering."""
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
        self._servers.clear()
        self._threads.clear()

    def add(
        self,
        repo_id: str,
        folder: Path | None = None,
        *,
        private: bool = False,
        gated: bool = False,
    ) -> Repo:
        """Make a repository, of a folder's files if there is one."""
        repo = self.repos[repo_id] = Repo(repo_id, self.root / repo_id, private, gated)
        if folder is not None:
            repo.commit_folder(folder)
        return repo

    def record(self, request: Request) -> None:
        """Record a request."""
        with self._lock:
            self.requests.append(request)

    def asked(self, pattern: str, method: str | None = None) -> list[Request]:
        """The requests whose path matches, of one method or all."""
        with self._lock:
            return [
                request
                for request in self.requests
                if method in (None, request.method) and re.search(pattern, request.path)
            ]

    def received(self, pattern: str = "") -> int:
        """The number of body bytes in requests whose paths match."""
        return sum(request.received for request in self.asked(pattern))

    def sent(self, pattern: str = "") -> int:
        """The number of body bytes in answers to paths that match."""
        return sum(request.sent for request in self.asked(pattern))

    def forget(self) -> None:
        """Forget all requests."""
        with self._lock:
            self.requests.clear()

    def sign(self) -> int:
        """The signature of links to the CDN, good until `expire`."""
        return self._signature

    def expire(self) -> None:
        """Let every link to the CDN that was given expire."""
        self._signature += 1


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: Hub
    fault: Fault | None = None
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(split.query).items()}
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if not self._receive(int(self.headers.get("Content-Length") or 0)):
            return
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, split.path)
            if match is not None and method == self._verb():
                groups = {
                    name: unquote(value) for name, value in match.groupdict().items() if value
                }
                self._answer(answer, groups)
                return
        self.send(refused(404, "", f"no such endpoint: {self.command} {self.path}"))

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 the names are http.server's

    def _receive(self, length: int) -> bool:
        """Read the request's body, or as much as a fault allows."""
        path = unquote(self.path)
        fault = self.hub.faults.of(self.command, path, "", takes=True)
        taken = length if fault is None or fault.takes is None else min(length, fault.takes)
        self.data = self.rfile.read(taken)
        if fault is not None:
            self.hub.record(Request(self.command, path, 0, 0, self.token, None, taken))
            self.close_connection = True
        return fault is None

    def _verb(self) -> str:
        return "GET" if self.command == "HEAD" else self.command

    def _answer(self, answer: Answer, groups: dict[str, str]) -> None:
        self.fault = fault = self.hub.faults.of(
            self.command, unquote(self.path), self.headers.get("Range") or ""
        )
        try:
            if fault is not None and fault.status is not None:
                fault.wait()
                reply = Reply(fault.status, fault.headers, b"{}")
            elif fault is not None and fault.page is not None:
                reply = Reply(200, {"Content-Type": "text/html"}, fault.page)
            else:
                reply = answer(self, **groups)
        except RefusedError as exc:
            reply = exc.reply
        self.send(reply, fault)

    def send(self, reply: Reply, fault: Fault | None = None) -> None:
        """Send an answer, or as much as a fault allows."""
        size = reply.body.stat().st_size if isinstance(reply.body, Path) else len(reply.body)
        stop = size if reply.stop is None else min(size, reply.stop)
        if fault is not None and fault.at_most is not None:
            stop = min(stop, reply.start + fault.at_most)
        length = stop - reply.start
        if fault is not None and not length:
            fault.wait()  # an answer without a body is whole with its headers
        self.send_response(reply.status)
        self.send_header("Content-Length", str(length))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        path, wanted = unquote(self.path), self.headers.get("Range")
        told = Request(self.command, path, reply.status, 0, self.token, wanted, len(self.data))
        self.hub.record(told)
        self.end_headers()
        cut_at = fault.after if fault is not None else None
        try:
            for block in self._blocks(reply, stop):
                if fault is not None:
                    fault.wait()
                part = block if cut_at is None else block[: cut_at - told.sent]
                told.sent += len(part)
                self.wfile.write(part)
                if len(part) < len(block):
                    break
        except (BrokenPipeError, ConnectionResetError):
            told.sent -= len(part)
            self.close_connection = True  # the client is gone
        if cut_at is not None and told.sent < length:
            self.close_connection = True

    def _blocks(self, reply: Reply, stop: int) -> Iterator[bytes]:
        if self.command == "HEAD":
            return
        if isinstance(reply.body, bytes):
            yield reply.body[reply.start : stop]
            return
        with reply.body.open("rb") as file:
            file.seek(reply.start)
            for at in range(reply.start, stop, _BLOCK):
                yield file.read(min(_BLOCK, stop - at))

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def repo(self, repo_id: str, *, files: bool = False) -> Repo:
        """The repository of a request, if the client may see it.

        Args:
            repo_id: its id.
            files: whether its files are asked for, which a gate may keep.
        """
        hub, token = self.hub, self.token
        if token is not None and token not in hub.tokens:
            raise RefusedError(refused(401, "", "Invalid credentials in Authorization header"))
        repo = hub.repos.get(repo_id)
        may = repo_id in hub.tokens.get(token or "", ())
        if repo is None or (repo.private and not may):
            raise RefusedError(
                refused(404 if token else 401, "RepoNotFound", "Repository not found")
            )
        if files and repo.gated and not may:
            ask = "Access to model is restricted. You must have access to it and be authenticated."
            raise RefusedError(refused(403 if token else 401, "GatedRepo", ask))
        return repo


class RefusedError(Exception):
    """A request that is answered by an error."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self.reply = reply


def refused(status: int, code: str, message: str) -> Reply:
    """An error answer in the Hub's words."""
    headers = {"X-Error-Message": message, "Content-Type": "application/json"}
    headers |= {"X-Error-Code": code} if code else {}
    return Reply(status, headers, json.dumps({"error": message}).encode())


def as_json(value: Any, **headers: str) -> Reply:
    """An answer in JSON."""
    headers = {"Content-Type": "application/json", **headers}
    return Reply(200, headers, json.dumps(value).encode())


def _commit(repo: Repo, revision: str) -> str:
    commit = repo.commit_of(revision)
    if commit is None:
        raise RefusedError(refused(404, "RevisionNotFound", f"Invalid rev id: {revision}"))
    return commit


def _models(handler: Handler) -> Reply:
    """The public repositories of an author, or whose ids have a word."""
    query = handler.query
    found = [
        {"id": repo.id, "modelId": repo.id, "private": False, "tags": [], "downloads": 0}
        for repo in handler.hub.repos.values()
        if not repo.private
        and repo.id.startswith(f"{query['author']}/" if "author" in query else "")
        and query.get("search", "").lower() in repo.id.lower()
    ]
    return as_json(found[: int(query.get("limit", 1000))])


def _info(handler: Handler, repo: str, revision: str = "main") -> Reply:
    """The Hub's information about a repository at a revision."""
    found = handler.repo(repo)
    commit = _commit(found, revision)
    return as_json(
        {
            "id": repo,
            "modelId": repo,
            "sha": commit,
            "private": found.private,
            "gated": "manual" if found.gated else False,
            "tags": [],
            "downloads": 0,
            "siblings": [{"rfilename": name} for name in files_in(found.at(commit))],
        }
    )


def _refs(handler: Handler, repo: str) -> Reply:
    """The branches of a repository."""
    found = handler.repo(repo)
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
        for name, commit in found.refs.items()
    ]
    return as_json({"branches": branches, "tags": [], "converts": []})


def _tree(handler: Handler, repo: str, revision: str) -> Reply:
    """The files of a commit, a page at a time."""
    found = handler.repo(repo)
    folder = found.at(_commit(found, revision))
    entries = []
    for name, file in files_in(folder).items():
        size, etag = file.stat().st_size, etag_of(file)
        entry: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": etag}
        if is_large(name):
            entry["lfs"] = {"oid": etag, "size": size, "pointerSize": 134}
        entries.append(entry)
    for name, size in handler.hub.state.get("listed", {}).items():  # a list that lies
        entries.append({"type": "file", "path": name, "size": size, "oid": "0" * 40})
    first = int(handler.query.get("cursor", 0))
    last = first + handler.hub.page
    headers = {}
    if last < len(entries):
        path = f"/api/models/{repo}/tree/{quote(revision, safe='')}"
        url = f"{handler.hub.url}{path}?recursive=True&cursor={last}"
        headers = {"Link": f'<{url}>; rel="next"'}
    return as_json(entries[first:last], **headers)


def _resolve(handler: Handler, repo: str, revision: str, name: str) -> Reply:
    """Where a file is: small ones on the Hub itself, large ones on the CDN."""
    found = handler.repo(repo, files=True)
    commit = _commit(found, revision)
    file = found.at(commit) / name
    if not file.is_file():
        raise RefusedError(
            Reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"{}")
        )
    etag, size = etag_of(file), file.stat().st_size
    headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(size)}
    place = f"{repo}/{commit}/{quote(name)}"
    if is_large(name):
        location = f"{handler.hub.cdn}/cdn/{place}?signature={handler.hub.sign()}"
    else:
        location = f"/api/resolve-cache/models/{place}"
    return Reply(302 if is_large(name) else 307, {**headers, "Location": location})


def _cached(handler: Handler, repo: str, revision: str, name: str) -> Reply:
    """A small file, from the Hub itself."""
    found = handler.repo(repo, files=True)
    file = found.at(revision) / name
    return _part(handler, file, {"X-Repo-Commit": revision, "ETag": f'"{etag_of(file)}"'})


def _blob(handler: Handler, repo: str, revision: str, name: str) -> Reply:
    """A large file from the CDN, for clients with a link that has not expired."""
    if handler.query.get("signature") != str(handler.hub.sign()):
        return Reply(403, {"Content-Type": "application/xml"}, b"<Code>AccessDenied</Code>")
    file = handler.hub.repos[repo].at(revision) / name
    return _part(handler, file, {"ETag": f'"{etag_of(file)}"'})


def _part(handler: Handler, file: Path, headers: dict[str, str]) -> Reply:
    """A file, or the range of it that was asked for."""
    fault = handler.fault or Fault("")
    file = fault.instead or file
    size = file.stat().st_size
    headers["Accept-Ranges"] = "bytes"
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", handler.headers.get("Range") or "")
    if wanted is None or fault.whole:
        return Reply(200, headers, file)
    first, last = wanted.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    start, stop = start + fault.shifted, min(size, stop + fault.shifted)
    if start >= size:
        return Reply(416, {**headers, "Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Reply(206, headers, file, start, stop)


Answer = Callable[..., Reply]

_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_AT = r"(?P<revision>[^/]+)"

ROUTES: list[tuple[str, str, Answer]] = [
    ("GET", r"/api/models", _models),
    ("GET", rf"/api/models/{_REPO}", _info),
    ("GET", rf"/api/models/{_REPO}/revision/{_AT}", _info),
    ("GET", rf"/api/models/{_REPO}/refs", _refs),
    ("GET", rf"/api/models/{_REPO}/tree/{_AT}", _tree),
    ("GET", rf"/{_REPO}/resolve/{_AT}/(?P<name>.+)", _resolve),
    ("GET", rf"/api/resolve-cache/models/{_REPO}/{_AT}/(?P<name>.+)", _cached),
    ("GET", rf"/cdn/{_REPO}/{_AT}/(?P<name>.+)", _blob),
]
"""Method, pattern of the path, and what answers: `HEAD` is answered as `GET`, without a body."""
