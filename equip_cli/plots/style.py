"""Colours, dashes, markers and settings that all figures share."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import matplotlib

from equip_cli.plots.panels import CONTEXT_SHIFT, NONE, POLICIES, WINDOW_ONLY, Line

# Okabe and Ito's colours, which colour-blind readers tell apart; without black, which is `none`, and yellow, which is
# too pale for a line
_HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v")

# plain llama.cpp and the controls are grey: colour, first dash, marker
_GREYS = {
    NONE: ("#333333", 0, "X"),
    CONTEXT_SHIFT: ("#777777", 3, "<"),
    WINDOW_ONLY: ("#777777", 1, ">"),
    "random": ("#999999", 2, "P"),
}

FRAME = "#555555"
FAINT = "#dddddd"

_SETTINGS = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "axes.edgecolor": FRAME,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "xtick.color": FRAME,
    "ytick.color": FRAME,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 150,
    # text stays text, and the same data gives the same bytes
    "svg.fonttype": "none",
    "svg.hashsalt": "equip",
}


def context() -> AbstractContextManager[None]:
    """Our settings on top of matplotlib's own defaults, whatever the user's matplotlibrc says."""
    settings: dict[Any, Any] = dict(matplotlib.rcParamsDefault)
    del settings["backend"]
    return matplotlib.rc_context(settings | _SETTINGS)


class Look(NamedTuple):
    """How a line is drawn; width in points."""

    colour: str
    dash: str
    marker: str
    width: float


class Palette:
    """The look of each line of a figure: a colour per policy, a dash and a marker per line of that policy."""

    def __init__(self, drawn: Iterable[Line]) -> None:
        present = dict.fromkeys(line.policy for line in drawn if line.policy not in _GREYS)
        known = [policy for policy in POLICIES if policy in present]
        self._order = known + [policy for policy in present if policy not in known]

    def look(self, line: Line) -> Look:
        """Colour, dash, marker and width of `line`."""
        if line.policy in _GREYS:
            colour, first, marker = _GREYS[line.policy]
            return Look(colour, _DASHES[(first + line.variant) % len(_DASHES)], marker, 1.1)
        turn, hue = divmod(self._order.index(line.policy), len(_HUES))
        variant = line.variant + turn
        return Look(_HUES[hue], _DASHES[variant % len(_DASHES)], _MARKERS[(variant + 2 * turn) % len(_MARKERS)], 1.7)

    def sorted(self, labels: Iterable[str]) -> list[str]:
        """Labels of one policy together; the controls and `none` at the end."""
        order = [*self._order, WINDOW_ONLY, "random", CONTEXT_SHIFT, NONE]
        return sorted(labels, key=lambda label: order.index(label.split(", ")[0]))
