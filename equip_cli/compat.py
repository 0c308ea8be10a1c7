"""llama-cpp-python on our libllama, with no variable set by hand:

>>> from equip_cli.compat import llama_cpp
>>> model = llama_cpp.Llama("model.gguf")

`LLAMA_KV_POLICY="streaming:budget=1024"` in the environment then bounds its cache.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

from equip_cli.core import native
from equip_cli.core.errors import EquipError
from equip_cli.core.native import library_folder

BINDING_VERSION = "0.3.36"
INSTALL = f'CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" pip install llama-cpp-python=={BINDING_VERSION}'

_VARIABLE = "LLAMA_CPP_LIB_PATH"
_lock = threading.Lock()


class CompatError(EquipError, ImportError):
    """llama-cpp-python is missing, has another version, or already runs on another library."""


def _check_version() -> None:
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        raise CompatError(f"llama-cpp-python is not installed: run {INSTALL}") from None
    if version != BINDING_VERSION:
        raise CompatError(f"llama-cpp-python {version} does not fit this library: run {INSTALL}")


def _check_library(module: ModuleType, folder: Path) -> None:
    loaded = getattr(getattr(sys.modules.get("llama_cpp.llama_cpp"), "_lib", None), "_name", None)
    if loaded is None or not os.path.samefile(Path(loaded).parent, folder):
        raise CompatError(
            f"llama_cpp already runs on {loaded or 'an unknown library'}: "
            "import it through equip_cli.compat before anything else imports it"
        )


def load() -> ModuleType:
    """Import llama_cpp on our library, or give back the import that already runs on it. Raises CompatError."""
    with _lock:
        folder = library_folder()
        module = sys.modules.get("llama_cpp")
        if module is None:
            _check_version()
            native.load().info()  # a portable build's backends lie beside our library, where the binding does not look
            before = os.environ.get(_VARIABLE)
            # read once, while llama_cpp/llama_cpp.py is imported; child processes must not inherit it
            os.environ[_VARIABLE] = str(folder)
            try:
                module = importlib.import_module("llama_cpp")
            except (ImportError, OSError, RuntimeError, AttributeError) as error:
                for name in [name for name in sys.modules if name.split(".")[0] == "llama_cpp"]:
                    del sys.modules[name]
                raise CompatError(f"llama-cpp-python cannot be imported ({error}): run {INSTALL}") from error
            finally:
                if before is None:
                    os.environ.pop(_VARIABLE, None)
                else:
                    os.environ[_VARIABLE] = before
        _check_library(module, folder)
        return module


def __getattr__(name: str) -> Any:
    if name == "llama_cpp":
        return load()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
