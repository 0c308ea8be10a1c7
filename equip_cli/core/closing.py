"""What `with` closes, and what the library holds until then."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from equip_cli.core.errors import UsageError

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


class Closing(ABC):
    """A context manager that calls `close()` at the end."""

    @abstractmethod
    def close(self) -> None:
        """Free what it holds. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _free_in(process: int, free: Callable[[Any], None], handle: Any) -> None:
    if os.getpid() == process:
        free(handle)


class Owner(Closing):
    """Has one of the library's handles, which `close()` frees; or else the garbage collector, or the exit of the process.

    The latter two free nothing in a forked process: another thread, which it lacks, may have been using it.
    """

    _closed = ""  # what is said of its use after `close()`

    def _own(self, handle: Any, free: Callable[[Any], None]) -> None:
        self._handle = handle
        self._free_handle = free
        self._process = os.getpid()
        # finalizers run in reverse order of creation at exit, so sessions go before their model
        self._finalizer = weakref.finalize(self, _free_in, self._process, free, handle)

    def _free(self) -> None:
        if self._finalizer.detach() is not None:
            self._free_handle(self._handle)
        self._handle = None

    def _abandon(self) -> None:
        self._finalizer.detach()
        self._handle = None

    @property
    def is_inherited(self) -> bool:
        """Whether this process is a fork of the one that made it."""
        return os.getpid() != self._process

    @property
    def handle(self) -> Any:
        """cffi's pointer to it; raises UsageError once it is closed."""
        if self._handle is None:
            raise UsageError(self._closed)
        return self._handle
