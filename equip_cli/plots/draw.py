"""Panels as matplotlib figures. Everything is placed in inches, so no text can run into the next panel."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from equip_cli.plots.axes import set_bar_scale, set_value_scale, set_x_scale, set_y_scale
from equip_cli.plots.panels import Bars, Grid, Line, Panel, Sheet, Strips
from equip_cli.plots.style import FRAME, Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 8.0
_LEFT = 0.8
_TITLE = 0.3  # height of a panel's title
_BELOW = 0.55  # tick labels and the label of the x axis
_GAP = 0.2
_LABEL_SIZE = 8.0
_LABEL_HEIGHT = 0.145  # of one line of a label
_LABEL_SPACE = 0.05  # between two labels
_LABEL_GAP = 0.22  # between the axes and the labels at their right
_WRAP, _WRAP_ROW = 34, 46  # characters per line of a label beside the axes, and of a row's
_STRIP = 0.62
_BAR = 0.23
_MOST_POINTS = 4000  # of a strip; more are thinned to the extremes of each piece


class _Page:
    """A figure that is filled from the top; lengths are inches."""

    def __init__(self, width: float, height: float, title: str, subtitle: str) -> None:
        self.figure = Figure(figsize=(width, height))
        FigureCanvasAgg(self.figure)
        self.width, self.height = width, height
        self.figure.text(0.12 / width, 1 - 0.12 / height, title, va="top", size=11, weight="bold", parse_math=False)
        at = 1 - (0.12 + 0.19 * (title.count("\n") + 1)) / height
        self.figure.text(0.12 / width, at, subtitle, va="top", size=8.5, color=FRAME, parse_math=False)

    def axes(self, left: float, top: float, width: float, height: float, **options: Any) -> Axes:
        """Axes whose upper left corner is `left` and `top` from that of the page."""
        box = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box, **options)


def _head(title: str, subtitle: str, width: float) -> tuple[str, str, float]:
    """Title and subtitle, wrapped, and the inches they take."""
    title = textwrap.fill(title, int(width * 11))
    parts = [part.replace(" ", "\0") for part in subtitle.split(" · ")]
    subtitle = textwrap.fill("\0· ".join(parts), int(width * 14)).replace("\0", " ")
    return title, subtitle, 0.2 + 0.19 * (title.count("\n") + 1) + 0.15 * (subtitle.count("\n") + 1)


def _text_width(text: str, size: float) -> float:
    """Inches that the widest line of `text` takes."""
    figure = Figure(figsize=(1, 1))
    FigureCanvasAgg(figure)
    box = figure.add_artist(Text(0, 0, text, size=size, parse_math=False)).get_window_extent()
    return box.width / figure.dpi


def _fill(label: str, most: int) -> str:
    """The label in lines of at most so many characters, broken behind commas."""
    kept_together = ", ".join(part.replace(" ", "\0") for part in label.split(", "))
    return textwrap.fill(kept_together, most).replace("\0", " ")


def _wrap(line: Line) -> str:
    text = _fill(line.label, _WRAP)
    return f"{text}\n{line.note}" if line.note else text


def _draw_lines(ax: Axes, panel: Panel, palette: Palette) -> None:
    size = 1.0 if len(panel.lines) <= 8 else 0.75
    for line in panel.lines:
        look = palette.look(line)
        faint = look.width < 1.5
        ax.plot(
            line.x,
            line.y,
            color=look.colour,
            linestyle=look.dash,
            linewidth=look.width * size,
            marker=look.marker,
            markersize=(3.5 if faint else 4.5) * size,
            label=line.label,
            zorder=2 if faint else 3,
            clip_on=panel.y_range is not None,
        )
        if line.low is not None and line.high is not None:
            ax.vlines(line.x, line.low, line.high, color=look.colour, linewidth=0.9, alpha=0.8)
        if line.mark is not None:
            x, y = line.mark
            ax.plot([x], [y], "o", markersize=8, markerfacecolor="none", markeredgecolor=look.colour, zorder=4)
    for level in panel.levels:
        look = palette.look(level)
        ax.axhline(
            level.y[0], color=look.colour, linestyle=look.dash, linewidth=look.width, label=level.label, zorder=1.5
        )
    set_x_scale(ax, panel)
    if panel.remark and not panel.title:
        ax.text(1, 1.04, panel.remark, transform=ax.transAxes, ha="right", size=_LABEL_SIZE, color=FRAME)
    ax.set_title(panel.title, parse_math=False)
    ax.set_xlabel(panel.xlabel)
    ax.set_ylabel(f"{panel.ylabel}, {panel.spread}" if panel.spread else panel.ylabel)


def _spread(wanted: Sequence[float], heights: Sequence[float], lowest: float, highest: float) -> list[float]:
    """Centres near the wanted ones, in their order, so that boxes of these heights do not overlap."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    centres = list(wanted)
    floor = lowest
    for i in order:
        centres[i] = max(centres[i], floor + heights[i] / 2)
        floor = centres[i] + heights[i] / 2
    ceiling = highest
    for i in reversed(order):
        centres[i] = min(centres[i], ceiling - heights[i] / 2)
        ceiling = centres[i] - heights[i] / 2
    return centres


def _label_ends(ax: Axes, panel: Panel, palette: Palette, width: float, height: float) -> None:
    """Each line's label at the right of the axes, joined to the line's end. width, height: of the axes, inches."""
    texts = [_wrap(line) for line in panel.lines]
    ends = [ax.transAxes.inverted().transform(ax.transData.transform((line.x[-1], line.y[-1]))) for line in panel.lines]
    heights = [_LABEL_HEIGHT * (text.count("\n") + 1) + _LABEL_SPACE for text in texts]
    centres = _spread([end[1] * height for end in ends], heights, -0.1, height + 0.1)
    for line, text, end, centre in zip(panel.lines, texts, ends, centres, strict=True):
        colour = palette.look(line).colour
        x, y = 1 + _LABEL_GAP / width, centre / height
        ax.text(
            x, y, text, transform=ax.transAxes, color=colour, size=_LABEL_SIZE, va="center", linespacing=1.15,
            parse_math=False,
        )  # fmt: skip
        leader = Line2D(
            [end[0], 1 + 0.05 / width, x - 0.04 / width],
            [end[1], end[1] if end[0] > 0.97 else y, y],
            transform=ax.transAxes,
            color=colour,
            linewidth=0.6,
            linestyle="-" if end[0] > 0.9 else ":",
            alpha=0.7,
            clip_on=False,
        )
        ax.add_artist(leader)


def _panel(page: _Page, top: float, height: float, panel: Panel, palette: Palette) -> None:
    labels = max((_text_width(_wrap(line), _LABEL_SIZE) for line in panel.lines), default=0.0)
    width = page.width - _LEFT - _LABEL_GAP - labels - 0.15
    ax = page.axes(_LEFT, top, width, height)
    _draw_lines(ax, panel, palette)
    set_y_scale(ax, [panel])
    _label_ends(ax, panel, palette, width, height)


def _thin(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Index and value of all points, or of the lowest and the highest of each piece where there are too many."""
    size = -(-2 * len(values) // _MOST_POINTS)
    if size <= 2:
        return [float(i) for i in range(len(values))], list(values)
    kept: set[int] = set()
    for begin in range(0, len(values), size):
        piece = range(begin, min(begin + size, len(values)))
        kept |= {min(piece, key=values.__getitem__), max(piece, key=values.__getitem__)}
    return [float(i) for i in sorted(kept)], [values[i] for i in sorted(kept)]


def _strips(page: _Page, top: float, strips: Strips, palette: Palette) -> None:
    first: Axes | None = None
    for i, (line, text) in enumerate(strips.rows):
        shared = {} if first is None else {"sharex": first, "sharey": first}
        ax = page.axes(_LEFT, top + i * (_STRIP + 0.26), page.width - _LEFT - 0.2, _STRIP, **shared)
        look = palette.look(line)
        x, y = _thin(line.y)
        ax.plot(x, y, color=look.colour, linewidth=0.8, drawstyle="steps-mid", label=line.label)
        ordered = sorted(line.y)
        usual = ordered[len(ordered) // 2]
        spikes = [(a, b) for a, b in zip(x, y, strict=True) if b > 2 * usual]
        if spikes and len(spikes) <= 200:
            ax.plot(*zip(*spikes, strict=True), ".", color=look.colour, markersize=5)
        above = 1 + 0.04 / _STRIP
        ax.text(0, above, line.label, transform=ax.transAxes, color=look.colour, size=_LABEL_SIZE, parse_math=False)
        ax.text(1, above, text, transform=ax.transAxes, ha="right", size=_LABEL_SIZE, parse_math=False)
        ax.tick_params(labelbottom=i == len(strips.rows) - 1)
        ax.set_ylabel(strips.ylabel)
        if first is None:
            first = ax
            ax.set_title(strips.title, pad=18, parse_math=False)
        if i == len(strips.rows) - 1:
            ax.set_xlabel(strips.xlabel)
    assert first is not None
    values = [y for line, _ in strips.rows for y in line.y]
    set_value_scale(first, values, strips.y_log, zero=True, height=_STRIP)
    longest = max(len(line.x) for line, _ in strips.rows)
    first.set_xlim(-0.5, max(longest - 0.5, 0.5))


def _bars(page: _Page, top: float, bars: Bars, palette: Palette) -> None:
    left = max(_text_width(_fill(line.label, _WRAP_ROW), _LABEL_SIZE) for line, _ in bars.rows) + 0.3
    right = max(_text_width(text, _LABEL_SIZE) for _, text in bars.rows) + 0.35
    height = _bars_height(bars)
    width = page.width - left - right
    ax = page.axes(left, top, width, height)
    if bars.reference is not None:
        ax.axvline(bars.reference, color="#333333", linewidth=1.1, zorder=1.5)
    at = 0.0
    places = []
    for line, text in bars.rows:
        look = palette.look(line)
        n_lines = _fill(line.label, _WRAP_ROW).count("\n") + 1
        y = at + n_lines / 2
        at += n_lines
        places.append(y)
        low, high = (line.low or line.x)[0], (line.high or line.x)[0]
        ax.plot([low, high], [y, y], color=look.colour, linewidth=2.2, solid_capstyle="butt")
        ax.plot(line.x, [y], look.marker, color=look.colour, markersize=5.5, label=line.label)
        ax.text(1 + 0.12 / width, y, text, transform=ax.get_yaxis_transform(), size=_LABEL_SIZE, va="center")
    ax.set_yticks(places, [_fill(line.label, _WRAP_ROW) for line, _ in bars.rows], parse_math=False)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set_ylim(at, 0)
    ends = [x for line, _ in bars.rows for x in (*line.x, *(line.low or ()), *(line.high or ()))]
    set_bar_scale(ax, [*ends, bars.reference or 0.0])
    ax.set_title(bars.title, parse_math=False, x=-(left - 0.12) / width)
    ax.set_xlabel(bars.xlabel, parse_math=False)


def _bars_height(bars: Bars) -> float:
    return _BAR * sum(_fill(line.label, _WRAP_ROW).count("\n") + 1 for line, _ in bars.rows)


def _height(panel: Panel | Strips | Bars) -> float:
    """Inches of the axes."""
    if isinstance(panel, Bars):
        return _bars_height(panel)
    if isinstance(panel, Strips):
        return len(panel.rows) * (_STRIP + 0.26) - 0.26
    labels = sum(_LABEL_HEIGHT * (_wrap(line).count("\n") + 1) + _LABEL_SPACE for line in panel.lines)
    return max(2.5, labels)


def sheet_figure(sheet: Sheet) -> Figure:
    """The panels, one below the other; call it within `style.context()`."""
    title, subtitle, top = _head(sheet.title, sheet.subtitle, _WIDTH)
    extra = [0.22 if isinstance(panel, Strips) else 0.0 for panel in sheet.panels]
    heights = [_height(panel) for panel in sheet.panels]
    total = top + sum(heights) + sum(extra) + len(heights) * (_TITLE + _BELOW) + (len(heights) - 1) * _GAP
    page = _Page(_WIDTH, total, title, subtitle)
    drawn = [line for panel in sheet.panels for line in _all_lines(panel)]
    palette = Palette(drawn)
    for panel, height, more in zip(sheet.panels, heights, extra, strict=True):
        top += _TITLE + more
        if isinstance(panel, Panel):
            _panel(page, top, height, panel, palette)
        elif isinstance(panel, Strips):
            _strips(page, top, panel, palette)
        else:
            _bars(page, top, panel, palette)
        top += height + _BELOW + _GAP
    return page.figure


def _all_lines(panel: Panel | Strips | Bars) -> list[Line]:
    return panel.lines if isinstance(panel, Panel) else [line for line, _ in panel.rows]


def grid_figure(grid: Grid) -> Figure:
    """Rows of panels with the legend of each column below it; call it within `style.context()`."""
    gap, height = 0.75, 2.1
    title, subtitle, top = _head(grid.title, grid.subtitle, _WIDTH)
    columns = [list(column) for column in zip(*grid.rows, strict=True)]
    width = (_WIDTH - _LEFT - 0.15 - gap * (len(columns) - 1)) / len(columns)
    names = [list(dict.fromkeys(_names(panels))) for panels in columns]
    shared = all(set(names[0]) == set(other) for other in names)
    legends = [_legend_shape(names[0], _WIDTH - _LEFT)] if shared else [_legend_shape(own, width) for own in names]
    below = max(n_rows for _, n_rows in legends) * 0.19 + 0.15
    total = top + len(grid.rows) * (_TITLE + height + _BELOW) + below
    page = _Page(_WIDTH, total, title, subtitle)
    palette = Palette(line for row in grid.rows for panel in row for line in panel.lines)
    entries: list[dict[str, Line2D]] = [{} for _ in columns]
    for row in grid.rows:
        top += _TITLE
        first: Axes | None = None
        for i, panel in enumerate(row):
            ax = page.axes(_LEFT + i * (width + gap), top, width, height, sharey=first)
            if first is None:
                first = ax
                set_y_scale(ax, row)
            if panel.lines:
                _draw_lines(ax, panel, palette)
                handles, labels = ax.get_legend_handles_labels()
                entries[i] |= {
                    label: handle for label, handle in zip(labels, handles, strict=True) if label not in entries[i]
                }
            else:
                ax.set_axis_off()
        top += height + _BELOW
    for i, (n_columns, _) in enumerate(legends):
        order = palette.sorted(entries[i])
        place = ((_LEFT - 0.35 + i * (width + gap)) / page.width, 1 - top / page.height)
        page.figure.legend(
            [entries[i][name] for name in order], order, loc="upper left", bbox_to_anchor=place, borderaxespad=0,
            ncols=n_columns, frameon=False, fontsize=_LABEL_SIZE, handlelength=2.6, columnspacing=1.2,
        )  # fmt: skip
    return page.figure


def _names(panels: Sequence[Panel]) -> list[str]:
    return [name for panel in panels for name in (line.label for line in (*panel.lines, *panel.levels))]


def _legend_shape(names: Sequence[str], width: float) -> tuple[int, int]:
    """Columns and rows of a legend in so many inches."""
    widest = max((_text_width(name, _LABEL_SIZE) for name in names), default=0.0)
    n_columns = max(1, min(len(names), int(width / (widest + 0.62))))
    return n_columns, -(-len(names) // n_columns)
