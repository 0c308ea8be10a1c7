"""Where a chat's messages come from: a terminal with line editing and history, or a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from equip_cli.core import text
from equip_cli.core.errors import UsageError

QUOTES = '"""'


@dataclass(frozen=True)
class Message:
    """What was said. is_text: it came as a block or as several lines, so it is no command whatever it begins with."""

    text: str
    is_text: bool = False


def join_lines(read_line: Callable[[bool], str]) -> Message:
    '''One message: a line, several that were pasted at once, or all that stands between """ and the next """.

    In a block, quotation marks that come in pairs on a line, or that begin an indented line (a docstring), belong to the
    text; so does what stands behind the closing ones. Pasted lines that have quotation marks of their own stay as they are.

    read_line: gives what was entered next without its end; it is told whether a block has begun. Raises what it raises,
    EOFError among them; a block that the end of the input cuts off counts as closed.
    '''
    first = read_line(False)
    inner = first.lstrip().removeprefix(QUOTES)
    if not first.lstrip().startswith(QUOTES):
        return Message(first, is_text="\n" in first)
    if "\n" in first and inner.rstrip().count(QUOTES) > inner.rstrip().endswith(QUOTES):
        return Message(first, is_text=True)
    if QUOTES in inner:
        before, _, behind = inner.partition(QUOTES)
        return Message(before.removeprefix("\n").removesuffix("\n") + behind.rstrip("\n"), is_text=True)
    lines = [inner.removeprefix("\n")] if inner.strip() else []
    is_nested = False
    while True:
        try:
            line = read_line(True)
        except EOFError:
            break
        if line.count(QUOTES) % 2 == 1:
            if not is_nested and not (line[:1].isspace() and line.lstrip().startswith(QUOTES)):
                before, _, behind = line.rpartition(QUOTES)
                lines += [before + behind] if before or behind.strip() else []
                break
            is_nested = not is_nested
        lines.append(line)
    return Message("\n".join(lines), is_text=True)


def _decoded(line: bytes, what: str) -> str:
    """A line without its end; raises UsageError if it is not text."""
    return text.decode(line.removesuffix(b"\n").removesuffix(b"\r"), what)


def _piped_lines() -> Iterator[str]:
    """The lines on stdin as they come, without their ends. Raises UsageError if one is not UTF-8."""
    stdin = sys.stdin.buffer
    line = stdin.readline()
    if text.encoding_of(line)[0] != "utf-8":  # a line of UTF-16 does not end where its bytes have a line end
        yield from text.decode(line + stdin.read(text.MAX_BYTES), "stdin").removesuffix("\n").split("\n")
        return
    number = 1
    while line:
        yield _decoded(line, f"line {number} of stdin")
        line, number = stdin.readline(), number + 1


def piped_messages() -> Iterator[Message]:
    """The messages on stdin, blank lines left out. Raises UsageError if stdin is not text or cannot be read."""
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError("stdin is closed: give messages with -p")
    lines = _piped_lines()

    def read_line(_in_block: bool) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None
        except OSError as error:
            raise UsageError(f"stdin cannot be read ({error.strerror}): give messages with -p") from None

    while True:
        try:
            message = join_lines(read_line)
        except EOFError:
            return
        if message.text.strip():
            yield message


def is_dumb() -> bool:
    """Whether the terminal cannot move its cursor, or nobody says what it can."""
    return os.name != "nt" and os.environ.get("TERM", "").lower() in ("", "dumb", "unknown")


class PlainTerminal:
    """Lines as they come, for a terminal without line editing."""

    def read(self) -> Message:
        """The next message. Raises what `Terminal.read()` raises."""

        def read_line(in_block: bool) -> str:
            print("... " if in_block else "> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.buffer.readline()
            if not line:
                print(file=sys.stderr, flush=True)
                raise EOFError
            return _decoded(line, "the message")

        return join_lines(read_line)


class Terminal:
    """Line editing, history and completion of commands. What it draws goes to stderr, so stdout holds answers alone."""

    def __init__(self, history: Path | None, commands: Iterable[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.output import create_output

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        kept: History
        try:
            if history is None:
                raise OSError
            history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # what was typed is as personal as what was answered
            os.close(os.open(history, os.O_CREAT | os.O_RDWR, 0o600))
            history.chmod(0o600)
            kept = FileHistory(str(history))
        except OSError:
            kept = InMemoryHistory()
        self._session: PromptSession[str] = PromptSession(
            history=kept,
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            key_bindings=keys,
            enable_suspend=True,  # Ctrl-Z
            output=create_output(stdout=sys.stderr),
        )

    def read(self) -> Message:
        """The next message. Raises KeyboardInterrupt for Ctrl-C, EOFError for Ctrl-D, UsageError for what is not UTF-8."""

        def read_line(in_block: bool) -> str:
            return text.clean(self._session.prompt("... " if in_block else "> "), "the message")

        return join_lines(read_line)
