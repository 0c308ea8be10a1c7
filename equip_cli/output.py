"""Who reads what: results go to stdout, everything else to stderr. Nothing is coloured, so NO_COLOR always holds."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import Any

from equip_cli.errors import EquipError


def note(text: str) -> None:
    """One line on stderr. A closed stderr is no reason to fail."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """A note that begins with `warning:`."""
    note(f"warning: {text}")


def result(text: str) -> None:
    """Part of the result on stdout, at once.

    Raises EquipError if stdout is closed or full, BrokenPipeError if its reader has left.
    """
    if sys.stdout is None:
        raise EquipError("stdout is closed: give the output a place to go")
    try:
        sys.stdout.write(text)
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
    """`loading 42%` on a terminal's stderr, when it takes longer than a second; silent elsewhere."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._begin = time.monotonic()
        self._shown = -1

    def __call__(self, fraction: float) -> None:
        if sys.stderr is None or not sys.stderr.isatty() or time.monotonic() - self._begin < 1.0:
            return
        percent = int(fraction * 100)
        if percent != self._shown:
            self._shown = percent
            sys.stderr.write(f"\r{self._label} {percent}%")
            sys.stderr.flush()

    def done(self) -> None:
        """Remove the line."""
        if self._shown >= 0 and sys.stderr is not None:
            sys.stderr.write("\r" + " " * (len(self._label) + 6) + "\r")
            sys.stderr.flush()


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
