"""Text that comes in: one meaning for bytes, byte order marks and line ends, whatever the route (options, files, pipes, pastes)."""

from __future__ import annotations

import codecs
import os
import shlex
import stat
import sys
from pathlib import Path

from equip_cli.core.errors import UsageError

MAX_BYTES = 256 * 2**20  # of a text; a device may have no end

# the longer mark first: UTF-32's little-endian one begins with UTF-16's
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def encoding_of(data: bytes) -> tuple[str, int]:
    """(encoding, length of its byte order mark) of a text that begins with `data`: UTF-8, unless a mark or zeros tell otherwise.

    Text in UTF-16 without a mark has a zero in every second byte wherever it is ASCII.
    """
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name, len(mark)
    head = data[:4096]
    half = len(head) // 2
    for first, name in ((0, "utf-16-be"), (1, "utf-16-le")):
        zeros, others = head[first::2].count(0), head[1 - first :: 2].count(0)
        if half >= 2 and zeros * 2 > half and others * 10 <= half:
            return name, 0
    return "utf-8", 0


def decode(data: bytes, what: str) -> str:
    """The text of these bytes, without a byte order mark, its lines ended by \\n alone.

    what: what the bytes are, for the sentence of a UsageError.
    """
    encoding, n_mark = encoding_of(data)
    try:
        return _lines(data[n_mark:].decode(encoding))
    except UnicodeDecodeError as error:
        name = encoding.upper().removesuffix("-LE").removesuffix("-BE")
        raise UsageError(f"{what} is not {name} (byte {n_mark + error.start}): convert it to UTF-8") from None


def clean(text: str, what: str) -> str:
    """The same for text that is decoded already: an option's value, a line that was typed, an argument from Python.

    Raises UsageError for half of a surrogate pair, as which a command line's bytes arrive that are not UTF-8.
    """
    at = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
    if at is not None:
        raise UsageError(f"{what} is not UTF-8 (character {at}): convert it to UTF-8")
    return _lines(text.removeprefix("\ufeff"))


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read(path: str, what: str) -> str:
    """The text of a file, of a pipe, or of what stands in for one (`/dev/stdin`, `<(command)`).

    what: `prompt file`, `grammar file`, ... Raises UsageError with one sentence.
    """
    place = f"the {what} {path}"
    try:
        full = expand(path)
        with full.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISBLK(mode):
                raise UsageError(f"{place} is a disk: give a text file")
            data = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise UsageError(f"{place} is a folder: give a text file") from None
    except OSError as error:
        raise UsageError(f"{place} cannot be read ({error.strerror}): check the path") from None
    except ValueError:
        raise UsageError(f"{place!r} is no path: it has a zero byte in it") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{place} has more than {MAX_BYTES // 2**20} MB: give a shorter text")
    return decode(data, place)


def read_stdin(what: str, instead: str) -> str:
    """All of stdin. what: `prompt`; instead: what to do if there is none, for the sentence of a UsageError."""
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError(f"stdin is closed: {instead}")
    try:
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"stdin cannot be read ({error.strerror}): {instead}") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"the {what} on stdin has more than {MAX_BYTES // 2**20} MB: give a shorter one")
    return decode(data, f"the {what} on stdin")


def expand(path: str) -> Path:
    """`path` with a leading ~ replaced; as it is where nobody knows the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def typed_path(argument: str) -> str:
    """A path as people type and drop it behind a command: the quotes and backslashes of a shell are not part of it."""
    if os.path.exists(expand(argument)) or not any(char in argument for char in "'\"\\"):
        return argument
    try:
        words = shlex.split(argument)
    except ValueError:
        return argument
    return words[0] if len(words) == 1 else argument


def visible(text: str) -> str:
    """`text` for a terminal: control characters become the pictures that stand for them, all but tab and line end.

    A model, or the file of one, must not move the cursor, colour the screen or set the title.
    """
    return text.translate(_PICTURES)


_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
