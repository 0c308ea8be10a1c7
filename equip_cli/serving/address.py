"""Where a server listens: whether it can, and who can reach it."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket

from equip_cli.core.errors import EquipError, UsageError


def is_loopback(host: str) -> bool:
    """Whether programs of this machine alone can reach a server on this host."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def check(host: str, port: int) -> None:
    """Raises EquipError where nobody can listen there, UsageError for a host that is unknown.

    The port may be taken between this and the server's start; the server says so then.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise UsageError(f"--host is {host!r}: there is no address of that name, so give one of this machine") from None
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as trial:
        if os.name != "nt":  # as the server does: a port is free again as soon as its last server has ended
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(address)
            trial.listen(1)
        except OSError as error:
            raise EquipError(_refusal(error, host, port)) from None


def _refusal(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return taken(host, port)
    if error.errno == errno.EACCES:
        return f"port {port} is for administrators: give --port a number from 1024 on"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host is {host}: this machine does not have that address, so give one that it has"
    return f"nobody can listen on {host}, port {port} ({error.strerror}): give another --host or --port"


def taken(host: str, port: int) -> str:
    """The sentence for a port where another program listens."""
    return f"port {port} of {host} is taken: end the program that listens there, or give another --port"
