"""Keep maps: which positions of a sequence a cache still held, over the tokens that were read."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy

from equip_cli.core.errors import EquipError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from equip_cli.evaluation.keep_map import KeepMap

_MOST_PANELS = 64
_MOST_COLUMNS = 512  # of an image
_DOTS = 150  # rows of an image per inch
_KEPT, _EVICTED, _UNWRITTEN = 0.13, 1.0, 0.86  # brightness
_SHADES = " ░▒▓█"


def _check(frames: KeepMap) -> None:
    if not frames.n_read or not frames.panels:
        raise EquipError("there is nothing to draw: the cache was never looked at")
    for label, columns in frames.panels:
        if len(columns) != len(frames.n_read):
            raise ValueError(f"{label} has {len(columns)} columns for {len(frames.n_read)} looks")


def image(n_read: Sequence[int], columns: Sequence[Sequence[int]], n_rows: int, n_columns: int) -> numpy.ndarray:
    """Share of the positions that were kept, `(n_rows, n_columns)`; NaN where none was written yet.

    Row r stands for the positions from r/n_rows to (r+1)/n_rows of the longest sequence. A column shows the last look
    at the cache up to its middle, on an even scale from the first look to the last.
    """
    length = max(max(n_read), 1)
    edges = numpy.linspace(0, length, n_rows + 1)
    positions = numpy.arange(length)
    made = numpy.full((n_rows, n_columns), numpy.nan)
    starts = numpy.asarray(n_read, dtype=float)
    ends = _ends(n_read)
    for column, x in enumerate(ends[0] + (numpy.arange(n_columns) + 0.5) * (ends[1] - ends[0]) / n_columns):
        look = int(numpy.argmin(numpy.abs(starts - x)))
        written, _ = numpy.histogram(positions[: n_read[look]], bins=edges)
        kept, _ = numpy.histogram(columns[look], bins=edges)
        some = written > 0
        made[some, column] = kept[some] / written[some]
    return made


def _ends(n_read: Sequence[int]) -> tuple[float, float]:
    """Left and right end of the x axis: half a step beyond the first and the last look."""
    if len(n_read) == 1:
        return n_read[0] - 0.5, n_read[0] + 0.5
    step = (n_read[-1] - n_read[0]) / (len(n_read) - 1)
    return max(n_read[0] - step / 2, 0.0), n_read[-1] + step / 2


def _across(n: int) -> int:
    """Columns of a grid of `n` panels: near a square, with few places left empty."""
    return min(range(min(n, 10), 0, -1), key=lambda c: round(abs(math.log(c / math.sqrt(n))) + 2 * (-n % c) / n, 6))


def _short(value: float, _: int | None = None) -> str:
    return f"{value / 1000:g}k" if value >= 10000 else f"{value:g}"


def figure(frames: KeepMap) -> Figure:
    """A grid of images with shared axes; call it within `style.context()`. Raises EquipError if there is none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    _check(frames)
    panels = frames.panels[:_MOST_PANELS]
    n_across = _across(len(panels))
    n_down = -(-len(panels) // n_across)
    side = 3.6 if len(panels) == 1 else max(1.25, 7.0 / n_across - 0.15)
    high = min(side, 2.6) if len(panels) > 1 else 3.0
    left, top, below, gap, title_height = 0.75, 0.62, 0.4, 0.2, 0.22
    width = max(left + n_across * (side + gap) + 0.1, 4.5)
    height = top + n_down * (high + title_height + gap) + below
    made = Figure(figsize=(width, height))
    FigureCanvasAgg(made)
    title = frames.title
    if len(frames.panels) > len(panels):
        title += f" (the first {len(panels)} of {len(frames.panels)})"
    made.text(0.12 / width, 1 - 0.12 / height, title, va="top", size=11, weight="bold", parse_math=False)
    patches = [
        Patch(facecolor=str(shade), edgecolor="#888888", linewidth=0.6, label=label)
        for shade, label in ((_KEPT, "kept"), (_EVICTED, "evicted"), (_UNWRITTEN, "not yet written"))
    ]
    place = (0.12 / width, 1 - 0.38 / height)
    made.legend(handles=patches, loc="upper left", bbox_to_anchor=place, borderaxespad=0, borderpad=0, ncols=3,
                frameon=False, fontsize=8, handlelength=1.2, columnspacing=1.4)  # fmt: skip
    length = max(frames.n_read)
    n_rows = min(length, int(high * _DOTS)) or 1
    ends = _ends(frames.n_read)
    even = len({b - a for a, b in zip(frames.n_read, frames.n_read[1:], strict=False)}) <= 1
    n_columns = len(frames.n_read) if even and len(frames.n_read) <= _MOST_COLUMNS else _MOST_COLUMNS
    for i, (label, columns) in enumerate(panels):
        down, across = divmod(i, n_across)
        y = top + down * (high + title_height + gap) + title_height
        x = left + across * (side + gap)
        ax = made.add_axes((x / width, 1 - (y + high) / height, side / width, high / height))
        share = image(frames.n_read, columns, n_rows, n_columns)
        # a single token among many evicted ones must still show
        darkness = numpy.where(share > 0, 0.35 + 0.65 * numpy.sqrt(numpy.nan_to_num(share)), 0.0)
        shades = numpy.where(numpy.isnan(share), _UNWRITTEN, _EVICTED + (_KEPT - _EVICTED) * darkness)
        ax.imshow(shades, cmap="gray", vmin=0, vmax=1, aspect="auto", origin="lower", interpolation="nearest",
                  extent=(*ends, 0, length), label=label)  # fmt: skip
        ax.grid(visible=False)
        ax.set_title(label, size=8.5, weight="normal", pad=3, parse_math=False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(3 if side < 2 else 5, integer=True, steps=[1, 2, 5, 10]))
            axis.set_major_formatter(FuncFormatter(_short))
        lowest = i + n_across >= len(panels)
        ax.tick_params(labelbottom=lowest, labelleft=across == 0, length=2.5)
    made.text((left + n_across * (side + gap) / 2) / width, 0.12 / height, "tokens read", ha="center", size=9)
    middle = 1 - (top + (height - top - below) / 2) / height
    made.text((left - 0.62) / width, middle, "position", rotation=90, va="center", size=9)
    return made


def text(frames: KeepMap) -> str:
    """The panels as blocks of characters, as wide as the terminal. Raises EquipError if there is none."""
    _check(frames)
    width = max(shutil.get_terminal_size().columns, 40)
    length = max(frames.n_read)
    margin = len(str(length)) + 2
    n_columns = min(width - margin - 1, 100)
    parts = [frames.title, "█ kept, blank evicted, · not yet written"]
    for label, columns in frames.panels[:_MOST_PANELS]:
        share = image(frames.n_read, columns, min(16, max(length, 1)), n_columns)
        rows = ["".join("·" if math.isnan(v) else _SHADES[math.ceil(v * 4)] for v in row) for row in share[::-1]]
        names = [str(length), *[""] * (len(rows) - 2), "0"] if len(rows) > 1 else ["0"]
        body = [f"{name:>{margin - 1}}┤{row}" for name, row in zip(names, rows, strict=True)]
        first, last = str(frames.n_read[0]), str(frames.n_read[-1])
        scale = first + "tokens read".center(n_columns - len(first) - len(last)) + last
        parts.append("\n".join([f"\n{label} (position over tokens read)", *body, " " * margin + scale]))
    return "\n".join(parts) + "\n"
