"""equip rpc: lend this machine to a model that runs on another one."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from typing import Annotated

from equip_cli.commands.setup.declaring import SERVER, expanded, number
from equip_cli.commands.setup.groups import Host, Verbose, shared
from equip_cli.core import limits
from equip_cli.core.errors import BackendError, UsageError
from equip_cli.core.memory import megabytes
from equip_cli.core.workers import PORT, Worker
from equip_cli.terminal import output, signals

_PATIENCE = 10.0  # seconds in which it listens
_VISIT = 1.0  # seconds that a program stays which is worth a line


def _ipv4(host: str) -> str:
    """ggml's RPC backend knows no other addresses. Raises UsageError."""
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0])
    except (OSError, UnicodeError):
        raise UsageError(f"--host is {host!r}: give an IPv4 address of this machine, or its name") from None


def _tell(lines: int) -> None:
    """Say who comes and goes, but for programs that only ask how much memory there is."""

    def come() -> None:
        output.note(f"{time.strftime('%H:%M:%S')} a program has connected")

    timer = threading.Timer(0, come)
    with os.fdopen(lines, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if line.startswith("Accepted client connection"):
                timer = threading.Timer(_VISIT, come)
                timer.start()
            elif line.startswith("Client connection closed"):
                if timer.is_alive():
                    timer.cancel()
                else:
                    output.note(f"{time.strftime('%H:%M:%S')} it has left")


@expanded
def rpc(
    *,
    host: Host = "127.0.0.1",
    port: Annotated[int, number("-p", "--port", limit=limits.WORKER_PORT, group=SERVER, help="The port.")] = PORT,
    threads: Annotated[int | None, shared("threads")] = None,
    verbose: Verbose = False,
) -> None:
    """Lend this machine's memory and processor, or its GPU, to a model that runs on another one.

    There, --rpc HOST:PORT spreads the layers of a model over several workers, each with its share of the cache. A worker
    serves one program at a time. Whoever reaches its port can do with it what this user can: open it to machines that you
    trust, and to no other network. Ctrl-C ends it. See docs/serving.md.
    """
    from equip_cli.core import native
    from equip_cli.serving import address

    library = native.load()
    library.set_verbosity(2 if verbose else 0)
    here = _ipv4(host)
    address.check(here, port)
    if not address.is_loopback(here):
        output.warn(
            f"whoever reaches {host} can use this worker, and do what this user can: open it to machines that you trust alone"
        )

    # upstream says on stdout who comes and goes
    read, write = os.pipe()
    sys.stdout.flush()
    os.dup2(write, 1)
    os.close(write)
    threading.Thread(target=_tell, args=(read,), daemon=True).start()

    failed: list[Exception] = []

    def work() -> None:
        endpoint = native.c_string(f"{here}:{port}", "the address")
        try:
            library.check(library.lib.equip_rpc_serve(endpoint, max(threads or 0, 0)))
        except Exception as error:
            failed.append(error)

    worker = threading.Thread(target=work, daemon=True)
    try:
        worker.start()
        _wait(Worker("127.0.0.1" if here == "0.0.0.0" else here, port), worker)
        if not failed:
            output.note(f"ready: {_devices(library)} at {host}:{port}; Ctrl-C ends it")
            output.note(f"try, on another machine: equip chat MODEL --rpc {_address(host)}:{port}")
        while worker.is_alive():
            worker.join(0.5)
    except KeyboardInterrupt:
        # it cannot be told to end, and may be computing
        os._exit(128 + (signals.received() or signal.SIGINT))
    raise failed[0]


def _wait(worker: Worker, thread: threading.Thread) -> None:
    """Until it listens. Raises BackendError if it does not."""
    until = time.monotonic() + _PATIENCE
    while thread.is_alive():
        try:
            return worker.check()
        except BackendError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def _address(host: str) -> str:
    return socket.gethostname() if host == "0.0.0.0" else host


def _devices(library: object) -> str:
    """What is lent: the CPU where there is nothing else."""
    from equip_cli.core import native

    assert isinstance(library, native.Native)
    devices = library.info()["devices"]
    lent = [each for each in devices if each["name"] not in ("CPU", "BLAS")] or devices[:1]
    return ", ".join(f"{each['name']} ({megabytes(each['free_bytes'])} free)" for each in lent)
