"""Being told to stop: SIGTERM, and SIGHUP when the terminal closes, end a command as Ctrl-C does, with what there is saved.

The exit code tells which it was: 128 + the signal's number (143, 129).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

_NAMES = ("SIGTERM", "SIGHUP")
_GRACE = 5.0  # seconds in which more signals are taken for the same wish: a closing session sends several

_received: int | None = None
_since = 0.0
_is_deferred = False
_is_pending = False


def received() -> int | None:
    """The number of the signal that asked the process to end, None if there was none."""
    return _received


def _handle(number: int, _frame: FrameType | None) -> None:
    global _received, _since, _is_pending
    if number != signal.SIGINT:
        if _received is not None:
            if time.monotonic() - _since > _GRACE:
                os._exit(128 + number)
            return
        _received, _since = number, time.monotonic()
    if _is_deferred:
        _is_pending = True
    else:
        raise KeyboardInterrupt


def install() -> None:
    """Raise KeyboardInterrupt on these signals, unless the process was started to ignore them (nohup)."""
    for name in _NAMES:
        number = getattr(signal, name, None)
        # ValueError: not the main thread
        with contextlib.suppress(ValueError, OSError):
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _handle)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """What must be done whole, such as writing a chat: KeyboardInterrupt comes after it, not in it."""
    global _is_deferred, _is_pending
    if _is_deferred or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    _is_deferred, _is_pending = True, False
    try:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, _handle)
        yield
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)
        _is_deferred = False
        if _is_pending:
            raise KeyboardInterrupt
