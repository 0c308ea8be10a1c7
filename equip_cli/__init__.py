"""EQUIP for llama.cpp: language models that run as long as you like in a fixed amount of memory.

>>> from equip_cli import CachePolicy, Model
>>> with Model("model.gguf") as model, model.session(CachePolicy("streaming", budget=1024)) as session:
...     for piece in session.generate("Once upon a time", n=64):
...         print(piece, end="", flush=True)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equip_cli.core.errors import (
        BackendError,
        BudgetError,
        CancelledError,
        ContextFullError,
        EquipError,
        ModelFileError,
        OutOfMemoryError,
        RewindError,
        StateError,
        UnsupportedModelError,
        UsageError,
    )
    from equip_cli.core.model import Model
    from equip_cli.core.policy import CachePolicy
    from equip_cli.core.pool import Pool
    from equip_cli.core.sampling import Sampling
    from equip_cli.core.session import Session

__all__ = [
    "BackendError",
    "BudgetError",
    "CachePolicy",
    "CancelledError",
    "ContextFullError",
    "EquipError",
    "Model",
    "ModelFileError",
    "OutOfMemoryError",
    "Pool",
    "RewindError",
    "Sampling",
    "Session",
    "StateError",
    "UnsupportedModelError",
    "UsageError",
]

_HOMES = {
    "Model": "model",
    "CachePolicy": "policy",
    "Pool": "pool",
    "Sampling": "sampling",
    "Session": "session",
}  # in core


def __getattr__(name: str) -> Any:
    # `equip --help` must not pay for cffi and numpy, so nothing is imported before it is asked for
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("equip-llama")
        except PackageNotFoundError:
            return "0+source"
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.core.{_HOMES.get(name, 'errors')}"), name)
