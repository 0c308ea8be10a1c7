"""The records of `equip bench` as panels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from equip_cli.errors import EquipError
from equip_cli.memory import megabytes
from equip_cli.plots.panels import (
    CONTEXT_SHIFT,
    NONE,
    Bars,
    Line,
    Panel,
    Record,
    Sheet,
    Strips,
    constants,
    lines,
    name_of,
    number,
    tell_apart,
    tokens,
)

_KINDS = ("tg", "pp", "ttft", "latency", "growth")  # the rest sums these up
_MOST_BARS = 16
_WHICHEVER = ", flash attention on or off, whichever is faster"
_MOST_STRIPS = 24
_SPIKY = 10.0  # longest step / median from which time per token is drawn on a logarithmic axis

# what follows the budget unless it is given, so it does not tell lines over budgets apart
_OF_BUDGET = ("budget", "recent", "n_batch", "n_ubatch")

Point = tuple[float, float, float, float]


def _speed(record: Record, x: float | None) -> Point | None:
    """Tokens per second with their standard deviation, at `x`."""
    y = number(record.get("avg_ts"))
    if y is None or x is None:
        return None
    spread = number(record.get("stddev_ts")) or 0.0
    return x, y, max(y - spread, 0.0), y + spread


def _between(line: Line, x: float) -> float | None:
    """y of the drawn line at `x`: straight between its points, on an axis of powers of two."""
    points = list(zip(line.x, line.y, strict=True))
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if 0 < x0 <= x <= x1:
            return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0) if x1 > x0 else max(y0, y1)
    return None


def crossing(line: Line, unbounded: Sequence[Line]) -> tuple[float, float] | None:
    """(length, tokens/s) from which on `line` is faster than all rows of `none`; None if there is no such point.

    The time per token is taken as linear between two lengths, as in the summary of `equip bench`. Only a crossing after
    which it stays faster counts: below the budget both do the same work and noise decides.
    """
    gaps = []
    for x, y in zip(line.x, line.y, strict=True):
        base = max((speed for other in unbounded if (speed := _between(other, x)) is not None), default=None)
        if base and y and x > 0:
            gaps.append((x, 1 / base - 1 / y))
    behind = [i for i, (_, gap) in enumerate(gaps) if gap <= 0]
    if not behind or behind[-1] == len(gaps) - 1:
        return None
    (x0, gap0), (x1, gap1) = gaps[behind[-1] : behind[-1] + 2]
    at = x0 + (x1 - x0) * gap0 / (gap0 - gap1)
    height = _between(line, at)
    return None if height is None else (at, height)


def _growth(records: Sequence[Record]) -> list[Panel]:
    labels = tell_apart(records, ("n_batch", "n_ubatch"))
    found = lines(records, labels, [_speed(item, number(item.get("n_depth"))) for item in records])
    unbounded = [line for line in found if line.policy == NONE]
    for line in found:
        mark = crossing(line, unbounded) if line.policy not in (NONE, CONTEXT_SHIFT) else None
        if mark is not None:
            line.mark = mark
            step = 10 ** max(math.floor(math.log10(mark[0])) - 1, 0)
            line.note = f"faster from {round(mark[0] / step) * step:,} tokens"
    title = "Decode speed as the sequence grows"
    return [Panel(title, "tokens in the sequence", "tokens/s", found, x_log=True, y_zero=True)] if found else []


def _fastest(records: Sequence[Record], labels: Sequence[str], xs: Sequence[float | None]) -> list[Point | None]:
    """A point per record; of those with one label and one x, only the fastest."""
    points = [_speed(item, x) for item, x in zip(records, xs, strict=True)]
    best: dict[tuple[str, float], Point] = {}
    for label, point in zip(labels, points, strict=True):
        if point is not None and ((label, point[0]) not in best or point[1] > best[label, point[0]][1]):
            best[label, point[0]] = point
    taken = set()
    kept: list[Point | None] = []
    for label, point in zip(labels, points, strict=True):
        first = point is not None and best[label, point[0]] is point and (label, point[0]) not in taken
        if point is not None and first:
            taken.add((label, point[0]))
        kept.append(point if first else None)
    return kept


def _by_budget(records: Sequence[Record]) -> list[Panel]:
    if len({item.get("budget") for item in records if name_of(item) != NONE}) < 2:
        return []
    labels = tell_apart(records, (*_OF_BUDGET, "flash_attn"))
    xs = [number(item.get("n_depth" if name_of(item) == NONE else "budget")) for item in records]
    found = lines(records, labels, _fastest(records, labels, xs))
    xlabel = "tokens kept (none: tokens in the cache)"
    title = "Decode speed by budget" + _WHICHEVER * (len({item.get("flash_attn") for item in records}) > 1)
    return [Panel(title, xlabel, "tokens/s", found, x_log=True, y_zero=True)] if found else []


def _row_labels(records: Sequence[Record]) -> list[str]:
    """Labels for rows that stand alone: `none` with its length, all with the test where it takes that to tell them apart."""
    labels = tell_apart(records)
    if len({item.get("n_depth") for item in records}) > 1:
        for i, item in enumerate(records):
            if name_of(item) == NONE:
                labels[i] += f", depth {item.get('n_depth')}"
    if len(set(labels)) < len(labels) and len({item.get("test") for item in records}) > 1:
        labels = [f"{label}, {item.get('test')}" for label, item in zip(labels, records, strict=True)]
    return labels


def _ratios(records: Sequence[Record]) -> list[Bars]:
    rows = [item for item in records if isinstance(item.get("ratio_vs"), dict)]
    rows = [item for item in rows if number(item["ratio_vs"].get("time_ratio_median")) is not None]
    if not rows:
        return []
    title = "Time per token against the baseline, median and 95% interval"
    if len(rows) > _MOST_BARS:
        best: dict[tuple[str, str], Record] = {}
        for item, label in zip(rows, tell_apart(rows, ("flash_attn",)), strict=True):
            key = (label, str(item.get("test")))
            if key not in best or item["ratio_vs"]["time_ratio_median"] < best[key]["ratio_vs"]["time_ratio_median"]:
                best[key] = item
        rows = list(best.values())
    made = []
    for item, label in list(zip(rows, _row_labels(rows), strict=True))[:_MOST_BARS]:
        median = float(item["ratio_vs"]["time_ratio_median"])
        low, high = item["ratio_vs"].get("ci95") or (median, median)
        line = Line(label, name_of(item), [median], [0.0], [low], [high])
        made.append((line, f"{median:.2f} [{low:.2f}, {high:.2f}]"))
    if len(rows) > _MOST_BARS:
        title += f" (the first {_MOST_BARS} of {len(rows)} rows)"
    baselines = {str(item["ratio_vs"].get("baseline")) for item in rows}
    of = baselines.pop() if len(baselines) == 1 else "the baseline"
    return [Bars(title, f"time of the row / time of {of}; below 1 is faster", made, reference=1.0)]


def _first_token(records: Sequence[Record]) -> list[Panel]:
    points: list[Point | None] = []
    for item in records:
        x, speed = number(item.get("n_prompt")), number(item.get("avg_ts"))
        seconds = [sample / 1e9 for sample in item.get("samples_ns") or []]
        if not seconds and x and speed:
            seconds = [x / speed]
        usable = seconds and x and min(seconds) > 0
        points.append((x, statistics.median(seconds), min(seconds), max(seconds)) if usable and x else None)
    found = lines(records, tell_apart(records, ("n_batch", "n_ubatch")), points)
    panel = Panel("Time to the first token", "prompt tokens", "seconds", found, x_log=True, y_log=True)
    return [panel] if found else []


def _quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def _latency(records: Sequence[Record]) -> list[Strips]:
    rows = [item for item in records if item.get("steps_us")]
    made, ratios = [], []
    for item, label in list(zip(rows, _row_labels(rows), strict=True))[:_MOST_STRIPS]:
        ms = [step / 1000 for step in item["steps_us"]]
        ordered = sorted(ms)
        given = item.get("latency_us") or {}
        p50, p99, longest = (
            given[key] / 1000 if number(given.get(key)) is not None else _quantile(ordered, q)
            for key, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
        )
        ratios.append(longest / p50 if p50 > 0 else 1.0)
        line = Line(label, name_of(item), [float(i) for i in range(len(ms))], ms)
        made.append((line, f"p50 {p50:.3g}   p99 {p99:.3g}   max {longest:.3g} ms"))
    if not made:
        return []
    title = "Time per token"
    if len(rows) > _MOST_STRIPS:
        title += f" (the first {_MOST_STRIPS} of {len(rows)} rows)"
    y_log = max(ratios) > _SPIKY and all(y > 0 for line, _ in made for y in line.y)
    return [Strips(title, "token", "ms", made, y_log)]


def _speeds(records: Sequence[Record]) -> list[Bars]:
    """What is left where no other panel has data: tokens per second, row by row."""
    made = []
    for item, label in list(zip(records, _row_labels(records), strict=True))[:_MOST_BARS]:
        point = _speed(item, 0.0)
        if point is not None:
            _, y, low, high = point
            line = Line(label, name_of(item), [y], [0.0], [low], [high])
            made.append((line, f"{y:.1f}"))
    return [Bars("Speed, mean and standard deviation", "tokens/s", made)] if made else []


def sheet(records: Sequence[Record]) -> Sheet:
    """All panels for which there is data. Raises EquipError if there is none."""
    records = [item for item in records if item.get("kind") in _KINDS]
    kinds: dict[str, list[Record]] = {kind: [] for kind in _KINDS}
    for item in records:
        kinds[item["kind"]].append(item)
    decode = kinds["tg"]
    panels: list[Panel | Strips | Bars] = [
        *_growth(kinds["growth"]),
        *_by_budget(decode),
        *_ratios(decode),
        *_first_token(kinds["ttft"]),
        *_latency(kinds["latency"]),
    ]
    panels = panels or [*_speeds([item for item in records if item["kind"] != "latency"])]
    if not panels:
        raise EquipError("there is nothing to draw: no record has a measured speed")
    models = list(dict.fromkeys(str(item.get("model_type") or "model") for item in records))
    sizes = {item.get("model_size") for item in records}
    words = []
    if len(sizes) == 1 and (size := number(sizes.pop())):
        words.append(f"{megabytes(size)} of weights")
    budgets = sorted({int(b) for item in records if name_of(item) != NONE and (b := number(item.get("budget")))})
    if budgets:
        words.append("budget " + ", ".join(tokens(b) for b in budgets))
    words += constants(records, ("update", "flash_attn", "our_kernel", "cache_type", "n_threads"))
    return Sheet(", ".join(models), " · ".join(words), panels)
