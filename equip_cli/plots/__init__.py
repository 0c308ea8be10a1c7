"""Figures of benchmark and quality records, as PNG or SVG files or as text in the terminal.

    check_target("speed.svg")           # before the measurement: refuses what cannot be written
    bench_figure(records, "speed.svg")  # what `equip bench -o json` prints
    eval_figure(records, "-")           # what `equip eval --json` prints; - is the terminal

Records become panels (`bench`, `quality`), and `draw` or `terminal` draws them. matplotlib and plotext are optional
(the extra `plot`) and imported only by a call that draws.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equip_cli.core.errors import EquipError, UsageError
from equip_cli.evaluation.keep_map import KeepMap
from equip_cli.terminal import output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["KeepMap", "bench_figure", "check_target", "eval_figure", "keep_map"]

TERMINAL = "-"
SUFFIXES = (".png", ".svg")


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UsageError(f'{package} is not installed: pip install "equip-llama[plot]"')


def check_target(target: str) -> None:
    """Whether a figure can go to `target`: a path that ends in .png or .svg, or `-` for the terminal.

    Leaves no file and imports nothing. Raises UsageError.
    """
    if target == TERMINAL:
        _need("plotext")
        if importlib.metadata.version("plotext").startswith(("4.", "5.")):
            raise UsageError('this plotext is too old: pip install --upgrade "plotext>=6"')
        return
    path = Path(target)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"a figure cannot be written to {target!r}: give a file that ends in .png or .svg, or - for the terminal"
        )
    if path.is_dir():
        raise UsageError(f"{target} is a folder: give a file for the figure")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist: make it, or write the figure to another place")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"the folder {path.parent} cannot be written to: write the figure to another place")
    _need("matplotlib")


def bench_figure(records: list[dict[str, Any]], target: str) -> None:
    """Draw what `equip bench` measured: growth, speed by budget, ratios, time to first token, time per token.

    records: as `equip bench -o json` prints them; a panel is there where its data is.
    Raises UsageError for the target, EquipError if there is nothing to draw or the file cannot be written.
    """
    from equip_cli.plots import bench

    check_target(target)
    sheet = bench.sheet(records)
    if target == TERMINAL:
        from equip_cli.plots import terminal

        return output.result(terminal.sheet_text(sheet), is_drawing=True)
    from equip_cli.plots import draw

    return _save(lambda: draw.sheet_figure(sheet), target)


def eval_figure(records: list[dict[str, Any]], target: str) -> None:
    """Draw what `equip eval` measured: each measure of quality against the budget and against the bytes kept.

    records: as `equip eval --json` prints them; a row is there where its measure is.
    Raises UsageError for the target, EquipError if there is nothing to draw or the file cannot be written.
    """
    from equip_cli.plots import quality

    check_target(target)
    grid = quality.grid(records)
    if target == TERMINAL:
        from equip_cli.plots import terminal

        return output.result(terminal.grid_text(grid), is_drawing=True)
    from equip_cli.plots import draw

    return _save(lambda: draw.grid_figure(grid), target)


def keep_map(frames: KeepMap, target: str) -> None:
    """Draw which positions were kept, over the tokens read: kept dark, evicted white, not yet written light grey.

    Raises UsageError for the target, EquipError if there is nothing to draw or the file cannot be written.
    """
    from equip_cli.plots import keep

    check_target(target)
    if target == TERMINAL:
        return output.result(keep.text(frames), is_drawing=True)
    return _save(lambda: keep.figure(frames), target)


def _save(make: Callable[[], Figure], target: str) -> None:
    """Write the figure through a temporary name in the same folder, then rename. Same data, same bytes."""
    from equip_cli.plots import style

    path = Path(target)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    kind = path.suffix.lower().removeprefix(".")
    try:
        with style.context():
            make().savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None)
        temporary.replace(path)
    except OSError as error:
        raise EquipError(
            f"the figure {target} cannot be written ({error.strerror or error}): write it to another place"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
