"""The one writer of tables, in Markdown that fits a terminal: what is the same in all rows stands above them, and only what
differs is a column."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

WIDTH = 100  # characters, where the rows allow it
BLANK = "-"  # the cell of a row that the column does not apply to


@dataclass(frozen=True)
class Column:
    """A column of a table.

    cells: one per row, BLANK where the column does not apply. phrase: how the one value of all rows reads above the table,
    with `{}` in its place; None = a measure, which always stays in the table.
    """

    title: str
    cells: Sequence[str]
    phrase: str | None = None

    def of(self, rows: Sequence[int]) -> Column:
        """The same column of some rows."""
        return replace(self, cells=[self.cells[row] for row in rows])

    @property
    def width(self) -> int:
        return max(map(len, [self.title, *self.cells]))

    def said(self, value: str) -> list[str]:
        """The value in words; nothing for BLANK."""
        return [] if self.phrase is None or value == BLANK else [self.phrase.format(value)]


def of_records(
    records: Sequence[dict[str, Any]],
) -> Callable[[str, str | None, Callable[[dict[str, Any]], Any]], Column]:
    """What makes columns of these records: from a title, a phrase or None, and the cell of a record."""

    def column(title: str, phrase: str | None, cell: Callable[[dict[str, Any]], Any]) -> Column:
        return Column(title, [str(cell(record)) for record in records], phrase)

    return column


def from_rows(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Column]:
    """The columns of a table that is written row by row."""
    return [Column(title, [row[i] for row in rows]) for i, title in enumerate(titles)]


def the_same(cells: Sequence[str]) -> str | None:
    """The value of all rows that have one: BLANK if none has, None if they differ."""
    found = {cell for cell in cells if cell != BLANK} or {BLANK}
    return found.pop() if len(found) == 1 else None


def fold(columns: Sequence[Column]) -> tuple[list[str], list[Column]]:
    """What is the same in all rows, in words; and the columns that differ, with the measures."""
    words: list[str] = []
    left: list[Column] = []
    for column in columns:
        value = the_same(column.cells) if column.phrase is not None else None
        if value is None:
            left.append(column)
        else:
            words += column.said(value)
    return words, left


def fold_by(keys: Sequence[str], columns: Sequence[Column]) -> tuple[list[str], list[Column]]:
    """What is the same in all rows of a key, as `key: words`; and the columns that differ within one.

    keys: one per row, the policy's name for instance.
    """
    rows = {key: [row for row, each in enumerate(keys) if each == key] for key in keys}
    said: dict[str, list[str]] = {key: [] for key in rows}
    left: list[Column] = []
    for column in columns:
        values = {key: the_same(column.of(own).cells) for key, own in rows.items()}
        if column.phrase is None or None in values.values():
            left.append(column)
            continue
        for key, value in values.items():
            said[key] += column.said(value or BLANK)
    return [f"{key}: {', '.join(words)}" for key, words in said.items() if words], left


def width(columns: Sequence[Column]) -> int:
    """Characters of a line of the table."""
    return sum(column.width + 3 for column in columns) + 1


def table(columns: Sequence[Column]) -> str:
    """Markdown; the first column is left-aligned, the others right-aligned."""
    widths = [column.width for column in columns]

    def line(cells: Sequence[str]) -> str:
        return _line(
            [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))]
        )

    rule = _line(["-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)])
    rows = zip(*(column.cells for column in columns), strict=True)
    return "\n".join([line([column.title for column in columns]), rule, *map(line, rows)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def paragraph(words: Sequence[str]) -> str:
    """The words in lines of at most WIDTH characters, with an empty line behind; nothing where there are none."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(word) + 5 <= WIDTH:
            lines[-1] += f" | {word}"
        else:
            lines.append(word)
    # Markdown joins the lines again
    return " |\n".join(lines) + "\n\n" if lines else ""


def blocks(first: Column, others: Sequence[Column]) -> str:
    """A table of these columns; where it is too wide, several below each other, each with the first column."""
    parts: list[list[Column]] = [[first]]
    for column in others:
        if len(parts[-1]) > 1 and width([*parts[-1], column]) > WIDTH:
            parts.append([first])
        parts[-1].append(column)
    return "\n".join(map(table, parts))


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph of prose in lines of at most WIDTH characters; indent: of all lines but the first."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def listing(facts: Mapping[str, Any]) -> str:
    """A line for each key, with the values below each other."""
    widest = max(map(len, facts))
    return "".join(f"{key.ljust(widest)}  {value}\n" for key, value in facts.items())


def interval(middle: float, ends: Sequence[float], decimals: int) -> str:
    """A value with its interval: `1.05 [0.98, 1.11]`."""
    low, high = ends
    return f"{middle:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"
