"""A program in a real terminal: pexpect types, pyte draws, and the test reads the screen and all that scrolled off it."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Mapping
from types import TracebackType

import pexpect
import pyte

PATIENCE = 60.0  # seconds; the machine may be busy


def _with_default_signals() -> None:
    """A background job, or one that nohup started, hands the signals that it ignores on to its children."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class Terminal:
    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        rows: int = 24,
        columns: int = 100,
        term: str = "xterm-256color",
    ) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=5000, ratio=0.5)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.process = pexpect.spawn(
            command[0],
            command[1:],
            env=dict(environment) | {"TERM": term},
            dimensions=(rows, columns),
            timeout=PATIENCE,
            preexec_fn=_with_default_signals,
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.close(force=True)

    def _read(self) -> bool:
        """Take in what the program has written; False once it has ended."""
        try:
            data = self.process.read_nonblocking(65536, timeout=0.1)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self._stream.feed(data)
        if b"\x1b[6n" in data:  # where is the cursor?
            self.process.send(f"\x1b[{self.screen.cursor.y + 1};{self.screen.cursor.x + 1}R")
        return True

    @property
    def text(self) -> str:
        """Everything from the beginning to the last line of the screen."""
        above = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display])

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        begin = time.monotonic()
        while not condition():
            alive = self._read()
            assert condition() or alive, f"ended before {what}:\n{self.text}"
            assert time.monotonic() - begin < PATIENCE, f"no {what} within {PATIENCE:.0f} s:\n{self.text}"

    def wait_for(self, pattern: str, count: int = 1) -> None:
        self.wait(lambda: len(re.findall(pattern, self.text, re.MULTILINE)) >= count, pattern)

    def at_prompt(self) -> bool:
        return self.screen.display[self.screen.cursor.y].rstrip() in (">", "...")

    def wait_for_prompt(self) -> None:
        self.wait(self.at_prompt, "prompt")

    def type(self, line: str) -> None:
        """Type a line at the prompt, and wait until it shows."""
        self.wait_for_prompt()
        self.process.send(line)
        self.wait(lambda: not line or not self.at_prompt(), f"echo of {line!r}")
        self.process.send("\r")

    def say(self, line: str) -> str:
        """Type a message; returns what came between it and the next prompt."""
        self.wait_for_prompt()
        before = len(self.text.rstrip())
        self.type(line)
        self.wait(lambda: self.at_prompt() and len(self.text.rstrip()) > before + len(line) + 2, f"answer to {line!r}")
        return self.text.rstrip()[before:].removeprefix(" " + line)

    def interrupt(self) -> None:
        self.process.sendintr()

    def resize(self, rows: int, columns: int) -> None:
        self.process.setwinsize(rows, columns)
        self.screen.resize(rows, columns)

    def end(self) -> int:
        """Wait until the program has ended; its exit code."""
        while self._read():
            pass
        self.process.close()
        return int(self.process.exitstatus) if self.process.exitstatus is not None else -int(self.process.signalstatus)
