"""Tables that fit a terminal: what is the same in all rows stands above them, and only what differs is a column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from equip_cli.terminal import output

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
    rows = [list(row) for row in zip(*(column.cells for column in columns), strict=True)]
    return output.table(rows, [column.title for column in columns])


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
