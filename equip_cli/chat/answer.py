"""An answer as it comes: wrapped and with its Markdown on a terminal, raw elsewhere; thinking dimmed, or left out."""

from __future__ import annotations

from equip_cli.terminal import output, signals
from equip_cli.terminal.flow import DIM, Flow
from equip_cli.terminal.markdown import Markdown


class Answer:
    """Parts of an answer are shown by `show()`; `close()` ends it in any case.

    formatted: broken into lines, with styles for Markdown; else its characters as they are. coloured: styles are shown,
    and what the model thinks is.
    """

    def __init__(self, *, formatted: bool, coloured: bool) -> None:
        self._coloured = coloured
        self._flow = Flow(coloured=coloured)
        self._markdown = Markdown(self._flow) if formatted else None
        self._is_thinking = False  # the part that was shown last
        self._last = ""  # character of the answer itself

    def show(self, is_thinking: bool, text: str) -> None:
        """A part. Raises what `output.result()` raises."""
        if is_thinking and not self._coloured:
            return
        with signals.deferred():  # a Ctrl-C within it would lose words
            self._show(is_thinking, text)

    def _show(self, is_thinking: bool, text: str) -> None:
        if is_thinking:
            self._is_thinking = True
            self._flow.write(text, DIM)
            return
        text = text if self._last else text.lstrip()
        if not text:
            return
        if self._is_thinking:
            self._flow.close()
            output.result("\n")
        self._is_thinking, self._last = False, text[-1]
        if self._markdown is None:
            output.result(text)
        else:
            self._markdown.feed(text)

    def close(self) -> None:
        """Show what was held back, and end the last line."""
        if self._markdown is not None:
            self._markdown.close()
        elif self._last and self._last != "\n":
            output.result("\n")
        self._flow.close()
