"""Scales, limits and ticks: round numbers, none of them over another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from equip_cli.plots.panels import Panel, tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_STEPS = [1, 2, 2.5, 5, 10]
_FEW = 5.0  # highest / lowest value up to which a logarithmic axis has evenly spaced ticks


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:g}"


def _log_ticks(axis: Axis, lowest: float, highest: float, most: int) -> None:
    if highest / lowest <= _FEW:
        axis.set_major_locator(MaxNLocator(most, steps=_STEPS))
    else:
        decades = math.log10(highest / lowest)
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades * 3 <= most + 1 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_locator(NullLocator())


def _margins(lowest: float, highest: float, log: bool) -> tuple[float, float]:
    if log:
        room = (highest / lowest) ** 0.06 if highest > lowest else 1.5
        return lowest / room, highest * room
    room = (highest - lowest) * 0.06 if highest > lowest else abs(highest) * 0.1 or 1.0
    return lowest - room, highest + room


def set_value_scale(ax: Axes, values: Sequence[float], log: bool, *, zero: bool, height: float) -> None:
    """The y axis for these values. Where a logarithm has no place for a zero, the axis is linear below the rest."""
    most = 3 if height < 1 else 6
    positive = [value for value in values if value > 0]
    if log and positive:
        if len(positive) == len(values):
            ax.set_yscale("log")
            ax.set_ylim(*_margins(min(positive), max(positive), True))
            _log_ticks(ax.yaxis, min(positive), max(positive), most)
            return
        lowest = min(min(positive), max(positive) / 10)
        ax.set_yscale("symlog", linthresh=lowest, linscale=0.5)
        ax.set_ylim(-0.15 * lowest, _margins(lowest, max(positive), True)[1])
        _log_ticks(ax.yaxis, lowest, max(positive), most)
        ticks = ax.yaxis.get_major_locator().tick_values(lowest, max(positive))
        ax.set_yticks([0.0, *(tick for tick in ticks if lowest <= tick <= max(positive))])
        ax.yaxis.set_major_formatter(FuncFormatter(_plain))
        ax.yaxis.set_minor_locator(NullLocator())
        return
    low, high = _margins(min(values, default=0.0), max(values, default=1.0), False)
    ax.set_ylim(0.0 if zero else low, high)
    ax.yaxis.set_major_locator(MaxNLocator(most, steps=_STEPS))
    ax.yaxis.set_major_formatter(FuncFormatter(_plain))


def _inches(ax: Axes) -> tuple[float, float]:
    box = ax.get_window_extent()
    figure = ax.figure
    return box.width / figure.dpi, box.height / figure.dpi


def set_y_scale(ax: Axes, panels: Sequence[Panel]) -> None:
    """The y axis that these panels share, for their points, intervals and levels."""
    panel, height = panels[0], _inches(ax)[1]
    if panel.y_range is not None:
        values = list(panel.y_range)
    else:
        drawn = [line for each in panels for line in each.lines]
        values = [y for line in drawn for y in line.y] + [line.y[0] for each in panels for line in each.levels]
        if not panel.y_log:  # on a logarithmic axis an interval that ends near zero would press the points together
            values += [y for line in drawn for y in (*(line.low or ()), *(line.high or ()))]
    set_value_scale(ax, values, panel.y_log, zero=panel.y_zero, height=height)


def set_x_scale(ax: Axes, panel: Panel) -> None:
    """The x axis of a panel: ticks at the points where these are whole numbers."""
    width = _inches(ax)[0]
    xs = sorted({x for line in panel.lines for x in line.x})
    if not xs:
        return
    log = panel.x_log and xs[0] > 0
    if log:
        ax.set_xscale("log", base=2)
    ax.set_xlim(*_margins(xs[0], xs[-1], log))
    if not log:
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
        return
    whole = all(x == int(x) for x in xs)
    if whole:
        ticks = _apart(xs, width / (math.log2(xs[-1] / xs[0]) * 1.12 or 1.0))
        ax.set_xticks(ticks, [tokens(x) for x in ticks])
    elif xs[-1] / xs[0] <= _FEW:
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        ax.xaxis.set_major_formatter(FuncFormatter(_plain))
    else:
        base = 2.0 if math.log2(xs[-1] / xs[0]) <= width / 0.4 else 10.0
        ax.xaxis.set_major_locator(LogLocator(base=base))
        ax.xaxis.set_major_formatter(FuncFormatter(_plain))
    ax.xaxis.set_minor_locator(NullLocator())


def _apart(xs: Sequence[float], inches: float) -> list[float]:
    """Those of `xs` that leave room for a tick label; inches: per factor of two."""
    kept = [xs[0]]
    for x in xs[1:]:
        if math.log2(x / kept[-1]) * inches >= 0.42:
            kept.append(x)
    return kept


def set_bar_scale(ax: Axes, values: Sequence[float]) -> None:
    """The x axis for values with intervals: logarithmic where they differ by more than a factor of eight."""
    positive = [value for value in values if value > 0]
    if len(positive) == len(values) and max(values) / min(values) > 8:
        ax.set_xscale("log")
        ax.set_xlim(*_margins(min(values), max(values), True))
        _log_ticks(ax.xaxis, min(values), max(values), 7)
        return
    low, high = _margins(min(values), max(values), False)
    ax.set_xlim(0.0 if min(values) == 0 else low, high)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
