"""Where a chat's messages come from: a terminal with line editing and history, or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from equip_cli.errors import UsageError

QUOTES = '"""'


def join_lines(read_line: Callable[[bool], str]) -> str:
    '''One message: a line, or all that stands between """ and """.

    read_line: gives the next line without its end; it is told whether a block has begun. Raises what it raises, EOFError
    among them; a block that the end of the input cuts off counts as closed.
    '''
    first = read_line(False)
    if not first.lstrip().startswith(QUOTES):
        return first
    text = first.lstrip()[len(QUOTES) :]
    while QUOTES not in text:
        try:
            text += "\n" + read_line(True)
        except EOFError:
            break
    return text.partition(QUOTES)[0].strip("\n")


def piped_messages() -> Iterator[str]:
    """The messages on stdin, blank lines left out. Raises UsageError if stdin is not UTF-8 or cannot be read."""
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError("stdin is closed: give messages with -p")
    number = 0

    def read_line(_in_block: bool) -> str:
        nonlocal number
        number += 1
        try:
            line = sys.stdin.buffer.readline()
            if not line:
                raise EOFError
            return line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise UsageError(f"line {number} of stdin is not UTF-8: convert it to UTF-8") from None
        except OSError as error:
            raise UsageError(f"stdin cannot be read ({error.strerror}): give messages with -p") from None

    while True:
        try:
            message = join_lines(read_line)
        except EOFError:
            return
        if message.strip():
            yield message


class Terminal:
    """Line editing, history and completion of commands. What it draws goes to stderr, so stdout holds answers alone."""

    def __init__(self, history: Path, commands: Iterable[str]) -> None:
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
            history.parent.mkdir(parents=True, exist_ok=True)
            history.touch()
            kept = FileHistory(str(history))
        except OSError:
            kept = InMemoryHistory()
        self._session: PromptSession[str] = PromptSession(
            history=kept,
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            key_bindings=keys,
            output=create_output(stdout=sys.stderr),
        )

    def read(self) -> str:
        """The next message. Raises KeyboardInterrupt for Ctrl-C, EOFError for Ctrl-D."""
        return join_lines(lambda in_block: self._session.prompt("... " if in_block else "> "))
