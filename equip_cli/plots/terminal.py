"""Panels as text, drawn by plotext as wide as the terminal."""

from __future__ import annotations

import math
import os
import shutil
import string
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import plotext

from equip_cli.plots.panels import Bars, Grid, Panel, Sheet, Strips, tokens

_HEIGHT = 18  # lines of a chart
_LETTERS = string.ascii_lowercase + string.ascii_uppercase


def _colourless() -> bool:
    return bool(os.environ.get("NO_COLOR")) or sys.stdout is None or not sys.stdout.isatty()


def _width() -> int:
    return max(shutil.get_terminal_size().columns, 40)


def _log_ticks(lowest: float, highest: float, base: float) -> list[float]:
    """Round values on a logarithmic axis, at most nine."""
    first, last = math.floor(math.log(lowest, base)), math.ceil(math.log(highest, base))
    factors = (1.0, 2.0, 5.0) if base == 10 and last - first <= 3 else (1.0,)
    found = [factor * base**power for power in range(first, last + 1) for factor in factors]
    found = [value for value in found if lowest * 0.999 <= value <= highest * 1.001]
    return found[:: -(-len(found) // 9)] if len(found) > 1 else _ticks(lowest, highest)


def _ticks(lowest: float, highest: float) -> list[float]:
    """Round values on a linear axis, three to six."""
    if highest <= lowest:
        return [lowest]
    size = 10.0 ** math.floor(math.log10((highest - lowest) / 3))
    step = max(factor * size for factor in (1.0, 2.0, 2.5, 5.0) if factor * size <= (highest - lowest) / 2.5)
    return [i * step for i in range(math.ceil(lowest / step), math.floor(highest / step + 1e-9) + 1)]


class _Axis:
    """One axis: the range of its values, and where a value lies on it. An axis of whole numbers has powers of two."""

    def __init__(self, values: Sequence[float], log: bool, limits: tuple[float, float] | None = None) -> None:
        usable = [value for value in values if value > 0 or not log]
        self.log = log and bool(usable)
        self.low, self.high = limits or (min(usable or values), max(usable or values))
        self.base = 2.0 if self.log and all(value == int(value) for value in values) else 10.0

    def shows(self, value: float) -> bool:
        return self.low <= value <= self.high and (value > 0 or not self.log)

    def at(self, value: float) -> float:
        return math.log(value, self.base) if self.log else value

    def apply(self, ruler: Any) -> None:
        low, high = self.at(self.low), self.at(self.high)
        room = 0.0 if high > low else 1.0
        ruler.lim(low - room, high + room)
        found = _log_ticks(self.low, self.high, self.base) if self.log else _ticks(self.low, self.high)
        ruler.ticks([self.at(x) for x in found], [tokens(x) if self.base == 2 else f"{x:.4g}" for x in found])


def _chart(panel: Panel, width: int, height: int = _HEIGHT) -> str:
    """One chart and, below it, what each letter stands for. What has no place on the axes is left out."""
    if not panel.lines:
        return ""
    x_axis = _Axis([x for line in panel.lines for x in line.x], panel.x_log)
    values = [y for line in (*panel.lines, *panel.levels) for y in line.y]
    zero = (0.0, max(values) * 1.1 or 1.0) if panel.y_zero else None
    y_axis = _Axis(values, panel.y_log, panel.y_range or zero)
    figure = plotext.figure
    figure.clear()
    plotext.terminal.limit(False, False)
    figure.plot_size(width, height)
    figure.theme("colorless" if _colourless() else "simple")
    legend = []
    for letter, line in zip(_LETTERS, panel.lines, strict=False):
        shown = [(x, y) for x, y in zip(line.x, line.y, strict=True) if x_axis.shows(x) and y_axis.shows(y)]
        if not shown:
            continue
        xs, ys = [x_axis.at(x) for x, _ in shown], [y_axis.at(y) for _, y in shown]
        if len(xs) > 1:
            figure.draw(figure.signal(xs, ys, marker="braille").lines())
        if len(panel.lines) > 1 or len(xs) == 1:
            figure.draw(figure.signal(xs, ys, marker=letter))
            legend.append(f"{letter}  {line.label}" + (f": {line.note}" if line.note else ""))
    for level in panel.levels:
        if y_axis.shows(level.y[0]):
            figure.line(y_axis.at(level.y[0]), "horizontal")
            legend.append(f"─  {level.label}")
    if panel.remark:
        legend.append(panel.remark)
    figure.title(panel.title)
    figure.label(panel.xlabel, "x")
    figure.label(panel.ylabel, "y")
    x_axis.apply(figure.ruler("x"))
    y_axis.apply(figure.ruler("y"))
    drawn = figure.build().string(colorless=_colourless())
    rows = [textwrap.fill(row, width, initial_indent="  ", subsequent_indent="     ") for row in legend]
    return "\n".join([*(line.rstrip() for line in drawn.splitlines()), *rows]) + "\n"


def _strips(strips: Strips, width: int) -> str:
    """A chart per row, all with one y axis."""
    values = [y for line, _ in strips.rows for y in line.y]
    limits = (min(values) if strips.y_log else 0.0, max(values))
    charts = [
        _chart(
            Panel(f"{line.label}: {text}", strips.xlabel, strips.ylabel, [line], y_log=strips.y_log, y_range=limits),
            width,
            12,
        )
        for line, text in strips.rows
    ]
    return "\n".join([strips.title, *charts])


def _bars(bars: Bars, width: int) -> str:
    """`label  [--o--]  text` per row, on one scale."""
    ends = [x for line, _ in bars.rows for x in (*line.x, *(line.low or ()), *(line.high or ()))]
    ends.append(bars.reference if bars.reference is not None else 0.0)
    low, high = min(ends), max(ends)
    label_width = min(max(len(line.label) for line, _ in bars.rows), width * 2 // 5)
    text_width = max(len(text) for _, text in bars.rows)
    room = max(width - label_width - text_width - 4, 10)

    def at(x: float) -> int:
        return round((x - low) / (high - low) * (room - 1)) if high > low else room // 2

    rows = [textwrap.fill(bars.title, width)]
    for line, text in bars.rows:
        cells = [" "] * room
        for i in range(at((line.low or line.x)[0]), at((line.high or line.x)[0]) + 1):
            cells[i] = "─"
        if bars.reference is not None:
            cells[at(bars.reference)] = "│"
        cells[at(line.x[0])] = "●"
        parts = textwrap.wrap(line.label, label_width)
        rows.append(f"{parts[0]:<{label_width}}  {''.join(cells)}  {text}")
        rows += parts[1:]
    rows.append(" " * (label_width + 2) + f"{low:.3g}".ljust(room - len(f"{high:.3g}")) + f"{high:.3g}")
    rows.append(textwrap.fill(bars.xlabel, width))
    return "\n".join(rows) + "\n"


def sheet_text(sheet: Sheet) -> str:
    """All panels, one below the other."""
    width = _width()
    parts = [sheet.title, sheet.subtitle]
    for panel in sheet.panels:
        if isinstance(panel, Panel):
            parts.append(_chart(panel, width))
        else:
            parts.append(_strips(panel, width) if isinstance(panel, Strips) else _bars(panel, width))
    return "\n".join(part for part in parts if part) + "\n"


def grid_text(grid: Grid) -> str:
    """The first column, each measure against the budget."""
    parts = [grid.title, grid.subtitle, *(_chart(row[0], _width()) for row in grid.rows)]
    return "\n".join(part for part in parts if part) + "\n"
