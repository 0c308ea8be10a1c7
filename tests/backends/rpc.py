"""ggml's RPC backend, through the libraries under test: `python rpc.py FOLDER HOST:PORT` serves the CPU of this machine.

    add_server(folder, endpoint)   make the devices of a server known to the libggml in `folder`

The server uses upstream's own entry point, the one behind its rpc-server program.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

Pointer = ctypes.c_void_p


class Registry:
    """The backend registry of the libggml in `folder`; a library that is loaded already is the same one."""

    def __init__(self, folder: Path) -> None:
        self.ggml = ctypes.CDLL(str(next(folder.glob("libggml.*"))))
        self.base = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))

    def call(self, library: ctypes.CDLL, name: str, result: type | None, *args: object) -> int | None:
        function = getattr(library, name)
        function.restype = result
        value: int | None = function(*args)
        return value

    def rpc_function(self, name: str) -> int:
        reg = self.call(self.ggml, "ggml_backend_reg_by_name", Pointer, b"RPC")
        if not reg:
            sys.exit("rpc.py: this library has no RPC backend; build it with -DGGML_RPC=ON")
        address = self.call(self.base, "ggml_backend_reg_get_proc_address", Pointer, Pointer(reg), name.encode())
        if not address:
            sys.exit(f"rpc.py: the RPC backend has no {name}")
        return address

    def cpu(self) -> int:
        device = self.call(self.ggml, "ggml_backend_dev_by_type", Pointer, 0)
        assert device
        return device


def add_server(folder: Path, endpoint: str) -> None:
    registry = Registry(folder)
    add = ctypes.CFUNCTYPE(Pointer, ctypes.c_char_p)(registry.rpc_function("ggml_backend_rpc_add_server"))
    reg = add(endpoint.encode())
    if not reg:
        raise ConnectionError(f"no RPC server answers at {endpoint}")
    registry.call(registry.ggml, "ggml_backend_register", None, Pointer(reg))


def serve(folder: Path, endpoint: str) -> None:
    registry = Registry(folder)
    arguments = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(Pointer))
    start = ctypes.CFUNCTYPE(None, *arguments)(registry.rpc_function("ggml_backend_rpc_start_server"))
    devices = (Pointer * 1)(registry.cpu())
    threads = int(os.environ.get("EQUIP_RPC_THREADS", "1"))
    start(endpoint.encode(), None, threads, 1, devices)  # does not return


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
