"""The hub's protocol on 127.0.0.1, as far as huggingface_hub uses it to list a repository and to fetch its files.

Two ports, as in the real thing: the hub answers for names and sends large files elsewhere, to a storage that must not
see the token. The fields of `HubServer` are switches that a test sets and resets.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None
    storage: bool


@dataclass
class HubServer:
    """Repositories by name, each a dictionary of file names and contents."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    small: set[str] = field(default_factory=set)  # files that are no LFS files: served at once, the ETag is no sha256
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)  # repository: status and X-Error-Code
    accept_token: str = ""  # opens what `refuse` closes
    status: int = 0  # answer this to everything
    cut_at: list[int] = field(default_factory=list)  # each entry: one transfer that breaks after so many bytes
    stall_at: int = 0  # a transfer that waits for `go_on` after so many bytes
    go_on: threading.Event = field(default_factory=threading.Event)
    damage: bool = False  # the content has another first byte
    append: int = 0  # the content is so many bytes longer than the hub says, or shorter
    mute: bool = False  # no answer until `go_on`
    no_headers: bool = False  # a proxy's login page in place of the hub
    ignore_range: bool = False
    xet: bool = False  # say that the content is in xet storage too
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._servers = [self._serve(_Hub), self._serve(_Storage)]
        self.url, self.storage_url = (f"http://127.0.0.1:{s.server_address[1]}" for s in self._servers)

    def _serve(self, handler: type[_Handler]) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": self}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    def close(self) -> None:
        self.go_on.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def transfers(self) -> list[Request]:
        """The requests for a large file's content."""
        return [request for request in self.requests if request.storage and request.method == "GET"]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    storage = False
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def _handle(self) -> None:
        headers = self.headers
        self.hub.requests.append(
            Request(self.command, self.path, headers["Range"], headers["Authorization"], self.storage)
        )
        if self.hub.mute:
            self.hub.go_on.wait(30)
        if self.hub.status:
            self._send(self.hub.status, b"out of order")
        elif self.hub.no_headers:
            self._send(200, b"<html>please log in</html>", {"Content-Type": "text/html"})
        else:
            self._answer(unquote(urlsplit(self.path).path))

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": f"{code} says the hub", "X-Repo-Commit": COMMIT}
        self._send(status, b"{}", headers)

    def _send_content(self, content: bytes, headers: dict[str, str]) -> None:
        if self.command == "GET":
            if self.hub.damage:
                content = bytes([content[0] ^ 1]) + content[1:]
            if self.hub.append:
                content = (content + bytes(max(0, self.hub.append)))[: len(content) + self.hub.append]
        begin, status = 0, 200
        match = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if match and not self.hub.ignore_range:
            begin, status = int(match[1]), 206
            if begin >= len(content):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            headers = headers | {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if self.command != "GET":
            return None
        if self.hub.cut_at:
            self.wfile.write(content[begin : max(begin, self.hub.cut_at.pop(0))])
            self.close_connection = True
            return None
        if self.hub.stall_at > begin:
            self.wfile.write(content[begin : self.hub.stall_at])
            begin = self.hub.stall_at
            self.hub.go_on.wait(30)
        try:
            self.wfile.write(content[begin:])
        except OSError:  # an interrupted client
            self.close_connection = True
        return None

    def _answer(self, path: str) -> None:
        raise NotImplementedError


class _Hub(_Handler):
    """/api/models/{repo}[/revision/{rev}] and /{repo}/resolve/{revision}/{file}."""

    def _answer(self, path: str) -> None:
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path)
        match = match or re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            return self._send(404, b"no such route")
        repo = match[1]
        token = self.headers["Authorization"]
        if repo in self.hub.refuse and not (token and token == f"Bearer {self.hub.accept_token}"):
            return self._error(*self.hub.refuse[repo])
        if repo not in self.hub.repos:
            return self._error(404, "RepoNotFound")
        files = self.hub.repos[repo]
        if path.startswith("/api/"):
            about = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self._send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
        if match[2] not in ("main", COMMIT):
            return self._error(404, "RevisionNotFound")
        if match[3] not in files:
            return self._error(404, "EntryNotFound")
        content, headers = files[match[3]], {"X-Repo-Commit": COMMIT}
        if match[3] in self.hub.small:
            headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
            return self._send_content(content, headers)
        headers |= {
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
            "ETag": '"of the redirect"',
            "Location": f"{self.hub.storage_url}/{repo}/{quote(match[3])}",
        }
        if self.hub.xet:
            auth = f"{self.hub.url}/api/models/{repo}/xet-read-token/{COMMIT}"
            headers |= {"X-Xet-Hash": "5" * 64, "Link": f'<{auth}>; rel="xet-auth"'}
        return self._send(302, b"", headers)


class _Storage(_Handler):
    """/{repo}/{file}, ranges included."""

    storage = True

    def _answer(self, path: str) -> None:
        owner, name, file = path.lstrip("/").split("/", 2)
        self._send_content(self.hub.repos[f"{owner}/{name}"][file], {"ETag": '"of the storage"'})
