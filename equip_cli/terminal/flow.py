"""Text on a terminal as it comes, broken between words: nothing that stands is moved or written again."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from rich.cells import get_character_cell_size

from equip_cli.core.text import visible
from equip_cli.terminal import output

BOLD, DIM, ITALIC, UNDERLINE, CYAN = "1", "2", "3", "4", "36"  # parameters of the escape sequence; joined by semicolons

# no line begins with one of these, none ends with one of those
_CLOSING = frozenset("、。，．：；？！）」』】》〉〕］｝”’…—～,.:;?!)]}%ー々ぁぃぅぇぉっゃゅょァィゥェォッャュョ")
_OPENING = frozenset("（「『【《〈〔［｛“‘([{")
_JOINER, _EMOJI_STYLE = "\u200d", "\ufe0f"


def width() -> int:
    """Columns of the terminal on stdout, as wide as it is now; 80 where nobody knows."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80


def is_wide(char: str) -> bool:
    """Whether a character takes two columns."""
    return char != "" and get_character_cell_size(char) == 2


def has_no_spaces(char: str) -> bool:
    """Whether a character belongs to a writing that does not part its words: Chinese, Japanese, emoji."""
    return is_wide(char) and not ("\u1100" <= char <= "\u11ff" or "\uac00" <= char <= "\ud7a3")


def _may_part(before: str, after: str) -> bool:
    """Whether a line may end between two characters that no space parts."""
    if before.isascii() and after.isascii():
        return False
    if before in _OPENING or after in _CLOSING or not (has_no_spaces(before) or has_no_spaces(after)):
        return False
    if "\U0001f3fb" <= after <= "\U0001f3ff":  # a colour of skin
        return False
    return all(is_wide(char) or char.isalnum() for char in (before, after))


class _Cell(NamedTuple):
    """A character, the parameters of its style, and how many columns it takes; a tab's depend on where it stands."""

    char: str
    style: str
    n: int


class Flow:
    """A place for text that is broken into lines of the terminal's width.

    A word is held back until its end is known, or until it is longer than a line; then the terminal cuts it.
    margin: what wrapped lines begin with, no more of it than half of a line.
    coloured: whether styles are shown. width: columns, asked for again and again, since a terminal may be resized.
    """

    def __init__(
        self,
        *,
        coloured: bool,
        width: Callable[[], int] = width,
        write: Callable[[str], None] = lambda text: output.result(text, is_drawing=True),
    ) -> None:
        self.margin = ""
        self.coloured = coloured
        self._width, self._write = width, write
        self._column = 0  # how much of the line is taken
        self._spaces: list[_Cell] = []  # before the word
        self._word: list[_Cell] = []
        self._n_word = 0  # columns of the word
        self._last = ""  # character of the word, "" between words
        self._is_loose = False  # the word is longer than a line: its characters go out as they come
        self._out: list[_Cell] = []

    def write(self, text: str, style: str = "") -> None:
        """Prose. style: as BOLD, or several with semicolons between."""
        for char in visible(text):
            if char == "\n":
                self._end_line()
            elif char in " \t":
                self._end_word()
                self._spaces.append(_Cell(char, style, 1))
            else:
                self._add(char, style)
        self._send()

    def write_raw(self, text: str, style: str = "") -> None:
        """What must not be wrapped."""
        self._end_word()
        self._put(self._spaces)
        self._spaces = []
        self._put([_Cell(char, style, get_character_cell_size(char)) for char in visible(text)])
        self._send()

    def close(self) -> None:
        """Show what was held back, and end the line if one has begun."""
        self._end_word()
        if self._column or self._spaces:
            self._end_line()
        self._send()

    def _add(self, char: str, style: str) -> None:
        """A character of a word."""
        if self._last != _JOINER and _may_part(self._last, char):
            self._end_word()
        n = get_character_cell_size(char)
        if char == _EMOJI_STYLE and self._last and get_character_cell_size(self._last) == 1:
            n = 1  # the character before it becomes a wide one
        self._last = char
        if self._is_loose:
            self._put([_Cell(char, style, n)])
            return
        self._word.append(_Cell(char, style, n))
        self._n_word += n
        if len(self._indent()) + self._n_word > self._width():
            self._place_word()
            self._is_loose = True

    def _indent(self) -> str:
        return self.margin[: self._width() // 2]

    def _place_word(self) -> None:
        if self._after(self._spaces) + self._n_word <= self._width():
            self._put(self._spaces)
        elif self._column > len(self._indent()):
            self._put([_Cell("\n", "", 0), *(_Cell(char, "" if char == " " else DIM, 1) for char in self._indent())])
        self._put(self._word)
        self._spaces, self._word, self._n_word = [], [], 0

    def _end_word(self) -> None:
        if self._word:
            self._place_word()
        self._last, self._is_loose = "", False

    def _end_line(self) -> None:
        self._end_word()
        if self._after(self._spaces) <= self._width():
            self._put(self._spaces)
        self._spaces = []
        self._put([_Cell("\n", "", 0)])

    def _after(self, cells: list[_Cell]) -> int:
        """The column behind these cells."""
        column = self._column
        for char, _, n in cells:
            column += 8 - column % 8 if char == "\t" else n
        return column

    def _put(self, cells: list[_Cell]) -> None:
        for cell in cells:
            self._out.append(cell)
            column = self._after([cell])
            # past the last column the terminal goes on below
            self._column = 0 if cell.char == "\n" else column if column <= self._width() else cell.n

    def _send(self) -> None:
        """Write what was put, with one escape sequence before and after each run of a style."""
        parts: list[str] = []
        current = ""
        for char, style, _ in self._out:
            style = style if self.coloured and char != "\n" else ""
            if style != current:
                parts.append(("\x1b[0m" if current else "") + (f"\x1b[{style}m" if style else ""))
                current = style
            parts.append(char)
        self._out = []
        if parts:
            self._write("".join(parts) + ("\x1b[0m" if current else ""))
