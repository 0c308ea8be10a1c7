"""Who reads what: results go to stdout, everything else to stderr. Nothing is coloured, so NO_COLOR always holds."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from equip_cli.core.errors import EquipError
from equip_cli.core.text import visible

FIRST_LINE = 5.0  # seconds without a sign of life, where there is no terminal


def note(text: str) -> None:
    """One sentence on stderr. A closed stderr is no reason to fail."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print("\n".join(note_lines(text)), file=sys.stderr, flush=True)


def note_lines(text: str) -> list[str]:
    """The lines that `note()` writes: one, or on a terminal as many as it takes to cut no word."""
    if not sys.stderr.isatty():
        return [text]
    columns = 0
    with contextlib.suppress(OSError, ValueError, AttributeError):
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    text = visible(text)
    if len(text) <= (columns or 80):
        return [text]
    return textwrap.wrap(text, columns or 80, break_long_words=False, break_on_hyphens=False)


def warn(text: str) -> None:
    """A note that begins with `warning:`."""
    note(f"warning: {text}")


def _for(stream: TextIO, text: str) -> str:
    """`text` as it is for a file or a pipe; for a terminal without what would steer it."""
    return visible(text) if stream.isatty() else text


def result(text: str, *, is_drawing: bool = False) -> None:
    """Part of the result on stdout, at once.

    is_drawing: the escape sequences in it are ours; those that a model wrote do nothing on a terminal.
    Raises EquipError if stdout is closed or full, BrokenPipeError if its reader has left.
    """
    if sys.stdout is None:
        raise EquipError("stdout is closed: give the output a place to go")
    try:
        sys.stdout.write(text if is_drawing else _for(sys.stdout, text))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_stdout()
        raise EquipError(f"the output cannot be written ({error.strerror}): give it another place to go") from error


def result_json(value: Any) -> None:
    """A JSON document on stdout."""
    result(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def set_up() -> None:
    """Text that the terminal's encoding lacks is replaced, never an error."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def discard_stdout() -> None:
    """After a broken pipe: what is still buffered must not fail a second time when the interpreter exits."""
    if sys.stdout is None:
        return
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):
        pass


class Progress:
    """A bar with the time left on a terminal's stderr, once the work takes longer than a second. Elsewhere plain lines: one
    once it takes longer than FIRST_LINE, then one at intervals that grow, also while nothing is reported as done.

    total: what the parts add up to, in the units of `advance()`; clock: seconds.
    """

    def __init__(self, label: str, total: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._total, self._clock = label, total, clock
        self._begin = clock()
        self._n_done = 0.0
        self._bar: Any = None
        self._task: Any = None
        self._next_line = self._begin + FIRST_LINE
        self._over = threading.Event()
        self._telling = threading.Lock()
        self._is_terminal = sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
        if not self._is_terminal and sys.stderr is not None:
            # one native call may take minutes
            with contextlib.suppress(RuntimeError):  # no more threads: then nothing is told
                threading.Thread(target=self._keep_telling, daemon=True).start()

    def __call__(self, fraction: float) -> None:
        """So much of the whole is done."""
        self.advance(fraction * self._total - self._n_done)

    def advance(self, n: float) -> None:
        """`n` more units are done."""
        self._n_done += n
        if not self._is_terminal:
            self.tell()
            return
        if self._bar is None:
            if self._clock() - self._begin < 1.0:
                return
            # the import costs as much as a short command
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._label, total=self._total)
            self._bar.start()
        self._bar.update(self._task, completed=self._n_done)

    def tell(self) -> None:
        """A line, if it is time for one."""
        with self._telling:
            now = self._clock()
            if self._over.is_set() or now < self._next_line:
                return
            seconds, share = now - self._begin, min(self._n_done / self._total, 1.0) if self._total else 0.0
            self._next_line = now + min(max(10.0, seconds / 4), 60.0)
            left = f"about {duration(seconds * (1 - share) / share)} left" if share >= 0.005 else None
            note(f"{self._label}: {100 * share:.0f}%, {left or duration(seconds) + ' so far'}")

    def _keep_telling(self) -> None:
        while not self._over.wait(1.0):
            self.tell()

    def done(self) -> None:
        """Remove the bar; no line comes after this."""
        with self._telling:
            self._over.set()
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """In words, as exact as a guess is: `20 s`, `3 min`, `2 h`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.0f} h"
