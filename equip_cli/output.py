"""Who reads what: results go to stdout, everything else to stderr. Nothing is coloured, so NO_COLOR always holds."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import Any, TextIO

from equip_cli.errors import EquipError
from equip_cli.text import visible


def note(text: str) -> None:
    """One line on stderr. A closed stderr is no reason to fail."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(_for(sys.stderr, text), file=sys.stderr, flush=True)


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
    """A bar with the time left on a terminal's stderr, once the work takes longer than a second; silent elsewhere.

    total: what the parts add up to, in the units of `advance()`.
    """

    def __init__(self, label: str, total: float = 1.0) -> None:
        self._label, self._total = label, total
        self._begin = time.monotonic()
        self._n_done = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, fraction: float) -> None:
        """So much of the whole is done."""
        self.advance(fraction * self._total - self._n_done)

    def advance(self, n: float) -> None:
        """`n` more units are done."""
        self._n_done += n
        if self._bar is None:
            if time.monotonic() - self._begin < 1.0 or sys.stderr is None or not sys.stderr.isatty():
                return
            # the import costs as much as a short command
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._label, total=self._total)
            self._bar.start()
        self._bar.update(self._task, completed=self._n_done)

    def done(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()


def table(rows: list[list[str]], header: list[str]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([line(header), rule, *map(line, rows)]) + "\n"
