"""Workers: other machines that lend their devices to a model, through ggml's RPC backend. `equip rpc` runs one."""

from __future__ import annotations

import os
import socket
import struct
import sys
from dataclasses import dataclass

from equip_cli.core import limits, native
from equip_cli.core.errors import BackendError, UsageError

PORT = 50052  # llama.cpp's own default
_PATIENCE = 5.0  # seconds in which a worker that is free answers

# the first message of ggml's protocol, and of its answer the head: the command, the size of what follows, 24 bytes of it
_HELLO = struct.pack("<BQ24x", 14, 24)
_ANSWER = struct.Struct("<Q")


@dataclass(frozen=True)
class Worker:
    """Where a worker listens."""

    host: str
    port: int = PORT

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def check(self) -> None:
        """Raises BackendError unless a worker answers there that serves nobody else at the moment."""
        try:
            with socket.create_connection((self.host, self.port), timeout=_PATIENCE) as connection:
                connection.sendall(_HELLO)
                answer = connection.recv(_ANSWER.size, socket.MSG_WAITALL)
        except TimeoutError:
            raise BackendError(
                f"the worker at {self} does not answer: it serves one program at a time, so end the other one, "
                "or the network keeps them apart"
            ) from None
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "unknown host"
            raise BackendError(f"no worker answers at {self} ({reason}): start one there with equip rpc") from None
        if len(answer) < _ANSWER.size or _ANSWER.unpack(answer)[0] > 1024:
            raise BackendError(f"what listens at {self} is no worker: start one there with equip rpc")


def parse(text: str, name: str = "rpc") -> list[Worker]:
    """`HOST[:PORT],...` as workers. Raises UsageError that names the option `name`."""
    found: list[Worker] = []
    for word in filter(None, (each.strip() for each in text.split(","))):
        host, colon, port = word.rpartition(":")
        host, port = (host, port) if colon else (port, str(PORT))
        if not host or ":" in host or any(c.isspace() or c == "/" for c in host):
            raise UsageError(f"{name} has {word!r}: give HOST or HOST:PORT of each worker, separated by commas")
        worker = Worker(host, limits.WORKER_PORT.parse(port, f"the port of {name}"))
        if worker not in found:
            found.append(worker)
    if not found:
        raise UsageError(f"{name} is {text!r}: give HOST:PORT of a worker, or of several separated by commas")
    return found


def add(workers: list[Worker]) -> None:
    """Models that are loaded after this use the devices of these workers, too. Raises BackendError, UnsupportedModelError.

    If a worker ends while it is used, this process ends as well: a sentence on stderr says so.
    """
    library = native.load()
    for worker in workers:
        worker.check()
    text = native.c_string(",".join(map(str, workers)), "the list of workers")
    library.check(library.lib.equip_rpc_add(text, _lost_callback(library)))


_callback: object = None  # must live as long as the library


def _lost_callback(library: native.Native) -> object:
    global _callback
    if _callback is None:

        def lost(sentence: object) -> None:
            said = library.string(sentence)
            if sys.stderr is not None:
                print(f"\nerror: {said}, and then this program", file=sys.stderr, flush=True)
            os._exit(1)

        _callback = library.ffi.callback("void(const char *)", lost)
    return _callback
