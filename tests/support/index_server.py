"""A package index on 127.0.0.1: the pages of the simple repository API and the wheels, with the switches of HubServer."""

from __future__ import annotations

import base64
import hashlib
import re
import ssl
from dataclasses import dataclass, field

from hub_server import HubServer, Request, _Handler
from places import DATA

# a certificate of 127.0.0.1 that nobody vouches for, with its key
CERTIFICATE = DATA / "localhost.pem"


def speak_tls(server: HubServer) -> None:
    """Make all ports of a server https."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    for each in server._servers:
        each.socket = context.wrap_socket(each.socket, server_side=True)
    server.url = server.url.replace("http://", "https://")


@dataclass
class IndexServer(HubServer):
    """Wheels by file name."""

    wheels: dict[str, bytes] = field(default_factory=dict)
    hashes: bool = True  # the page names the sha256 of a wheel
    login: str = ""  # user:password that the index wants
    pages: bool = True  # False: every page is out of order, no wheel is

    def __post_init__(self) -> None:
        self._servers = [self._serve(_Index)]
        self.url = f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    def transfers(self) -> list[Request]:
        """The requests for a wheel."""
        return [request for request in self.requests if "/files/" in request.path]


class _Index(_Handler):
    """/simple/{package}/ and /files/{wheel}."""

    hub: IndexServer

    def _answer(self, path: str) -> None:
        if self.hub.login:
            word = base64.b64encode(self.hub.login.encode()).decode()
            if self.headers["Authorization"] != f"Basic {word}":
                return self._send(401, b"who are you?")
        if match := re.fullmatch(r"/simple/([a-z0-9\-]+)/", path):
            names = [n for n in self.hub.wheels if re.sub(r"[-_.]+", "-", n.split("-")[0]).lower() == match[1]]
            if not self.hub.pages:
                return self._send(503, b"out of order")
            if not names:
                return self._send(404, b"no such package")
            page = "".join(f'<a href="../../files/{n}{self._fragment(n)}">{n}</a><br>\n' for n in names)
            return self._send(200, f"<!DOCTYPE html><html><body>{page}</body></html>".encode())
        name = path.removeprefix("/files/")
        if name not in self.hub.wheels:
            return self._send(404, b"no such file")
        return self._send_content(self.hub.wheels[name], {})

    def _fragment(self, name: str) -> str:
        return f"#sha256={hashlib.sha256(self.hub.wheels[name]).hexdigest()}" if self.hub.hashes else ""
