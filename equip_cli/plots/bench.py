"""The records of `equip bench` as panels."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Collection, Sequence

from equip_cli.core.errors import EquipError
from equip_cli.core.memory import megabytes
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
    is_ours,
    lines,
    name_of,
    number,
    tell_apart,
    tokens,
)

_KINDS = ("tg", "pp", "ttft", "latency", "growth")  # the rest sums these up
_MOST_LINES = 8  # of a panel, and _MOST_ROWS of one with bars: beyond, only the faster attention of each is drawn
_MOST_ROWS = 16
_MOST_BARS = 24
_WORTH = 0.75  # share of the rows that may be left for that
_MOST_STRIPS = 8  # beyond, a bar per row
_ENOUGH = 3  # samples from which on medians are drawn
_SPIKY = 10.0  # longest step / median from which time per token is drawn on a logarithmic axis

_WHICHEVER = ", whichever attention is faster"
_ATTENTION = re.compile(r", fa [a-z]+( \(ours\))?")
_BATCHES = ("n_batch", "n_ubatch")
# what follows the budget unless it is given, so it does not tell lines over budgets apart
_OF_BUDGET = ("budget", "recent", *_BATCHES)

Point = tuple[float, float, float, float]


def _speeds(records: Sequence[Record], xs: Sequence[float | None]) -> tuple[list[Point | None], str]:
    """Tokens per second at each x, and what is drawn of them: medians as in the tables of ratios, or means of few samples."""
    samples = [[value for value in item.get("samples_ts") or [] if number(value) is not None] for item in records]
    if samples and min(map(len, samples)) >= _ENOUGH:
        found: list[Point | None] = []
        for speeds, x in zip(samples, xs, strict=True):
            low, median, high = statistics.quantiles(speeds, n=4, method="inclusive")
            found.append(None if x is None else (x, median, low, high))
        return found, "median and quartiles"
    found = []
    for item, x in zip(records, xs, strict=True):
        y = number(item.get("avg_ts"))
        spread = number(item.get("stddev_ts")) or 0.0
        found.append(None if x is None or y is None else (x, y, max(y - spread, 0.0), y + spread))
    return found, "mean and standard deviation"


def _merged_labels(records: Sequence[Record], without: Collection[str] = ()) -> list[str]:
    """Labels that do not say which attention ran; of `none` they do, where llama.cpp's own and our kernel are there."""
    labels = tell_apart(records, (*without, "flash_attn"))
    if len({is_ours(item) for item in records if name_of(item) == NONE}) > 1:
        ours = [name_of(item) == NONE and is_ours(item) for item in records]
        labels = [f"{label}, our kernel" if own else label for label, own in zip(labels, ours, strict=True)]
    return labels


def _best(labels: Sequence[str], points: Sequence[Point | None], highest: bool) -> list[Point | None]:
    """A point per record; of those with one label and one x only the highest (the lowest)."""
    chosen: dict[tuple[str, float], int] = {}
    for i, (label, point) in enumerate(zip(labels, points, strict=True)):
        if point is None:
            continue
        other = points[chosen.setdefault((label, point[0]), i)]
        if other is not None and (point[1] > other[1] if highest else point[1] < other[1]):
            chosen[label, point[0]] = i
    kept = set(chosen.values())
    return [point if i in kept else None for i, point in enumerate(points)]


def _attention_lines(
    records: Sequence[Record],
    points: Sequence[Point | None],
    without: Collection[str],
    *,
    highest: bool = True,
    most: int = _MOST_LINES,
) -> tuple[list[Line], str]:
    """A line per cache and attention, and what to add to the title: of too many, only the faster attention of each cache."""
    labels, merged = tell_apart(records, without), _merged_labels(records, without)
    n, n_merged = len(set(labels)), len(set(merged))
    if n <= most or n_merged > _WORTH * n:
        return lines(records, labels, _best(labels, points, highest)), ""
    return lines(records, merged, _best(merged, points, highest)), _WHICHEVER


def _between(line: Line, x: float) -> float | None:
    """y of the drawn line at `x`: straight between its points, on an axis of powers of two."""
    points = list(zip(line.x, line.y, strict=True))
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if 0 < x0 <= x <= x1:
            return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0) if x1 > x0 else max(y0, y1)
    return None


def crossing(line: Line, unbounded: Sequence[Line]) -> tuple[float, float] | None:
    """(length, tokens/s) from which on `line` is faster than all rows of `none`: its first length if it always is, None if
    there is no such point.

    The time per token is taken as linear between two lengths, as in the summary of `equip bench`. Only a crossing after
    which it stays faster counts: below the budget both do the same work and noise decides.
    """
    gaps = []
    for x, y in zip(line.x, line.y, strict=True):
        base = max((speed for other in unbounded if (speed := _between(other, x)) is not None), default=None)
        if base and y and x > 0:
            gaps.append((x, 1 / base - 1 / y))
    behind = [i for i, (_, gap) in enumerate(gaps) if gap <= 0]
    if len(gaps) < 2 or (behind and behind[-1] == len(gaps) - 1):
        return None
    if not behind:
        first = gaps[0][0]
        return first, line.y[line.x.index(first)]
    (x0, gap0), (x1, gap1) = gaps[behind[-1] : behind[-1] + 2]
    at = x0 + (x1 - x0) * gap0 / (gap0 - gap1)
    height = _between(line, at)
    return None if height is None else (at, height)


def _fastest(found: Sequence[Line]) -> Line:
    """The line with the least time for one token at each of its lengths."""
    return min(found, key=lambda line: sum(1 / y if y > 0 else math.inf for y in line.y))


def _growth(records: Sequence[Record]) -> list[Panel]:
    points, what = _speeds(records, [number(item.get("n_depth")) for item in records])
    found, whichever = _attention_lines(records, points, _BATCHES)
    unbounded = [line for line in found if line.policy == NONE]
    caches: dict[str, list[Line]] = {}
    for line in found:
        if line.policy not in (NONE, CONTEXT_SHIFT):
            caches.setdefault(_ATTENTION.sub("", line.label), []).append(line)
    for line in map(_fastest, caches.values()):
        mark = crossing(line, unbounded)
        if mark is not None:
            line.mark = mark
            step = 10 ** max(math.floor(math.log10(mark[0])) - 1, 0)
            length = mark[0] if mark[0] in line.x else round(mark[0] / step) * step
            line.note = f"faster from {length:,.0f} tokens"
    title = "Decode speed as the sequence grows" + whichever
    xlabel = "tokens in the sequence" + (" (none: all of them kept)" if unbounded else "")
    return [Panel(title, xlabel, "tokens/s", found, x_log=True, y_zero=True, spread=what)] if found else []


def _by_budget(records: Sequence[Record]) -> list[Panel]:
    if len({item.get("budget") for item in records if name_of(item) != NONE}) < 2:
        return []
    xs = [number(item.get("n_depth" if name_of(item) == NONE else "budget")) for item in records]
    points, what = _speeds(records, xs)
    found, whichever = _attention_lines(records, points, _OF_BUDGET, most=0)
    xlabel = "tokens kept (none: all in the cache)"
    return (
        [Panel("Decode speed by budget" + whichever, xlabel, "tokens/s", found, x_log=True, y_zero=True, spread=what)]
        if found
        else []
    )


def _depths(records: Sequence[Record], labels: Sequence[str]) -> list[str]:
    """The labels, those of `none` with the tokens in the cache where these differ."""
    if len({item.get("n_depth") for item in records}) < 2:
        return list(labels)
    none = [name_of(item) == NONE for item in records]
    return [
        f"{label}, depth {item.get('n_depth')}" if plain else label
        for item, label, plain in zip(records, labels, none, strict=True)
    ]


def _rows(records: Sequence[Record], speeds: Sequence[float]) -> tuple[list[tuple[Record, str]], str]:
    """Rows that stand alone with their labels, and what to add to the title: of too many, only those with the faster
    attention. The labels have the test where it takes that to tell them apart."""
    labels, whichever = _depths(records, tell_apart(records, _BATCHES)), ""
    tests = [str(item.get("test")) for item in records]
    rows = list(range(len(records)))
    merged = _depths(records, _merged_labels(records, _BATCHES))
    if len(rows) > _MOST_ROWS and len(set(merged)) <= _WORTH * len(set(labels)):
        labels, whichever = merged, _WHICHEVER
        best: dict[tuple[str, str], int] = {}
        for i in rows:
            other = best.setdefault((labels[i], tests[i]), i)
            if speeds[i] > speeds[other]:
                best[labels[i], tests[i]] = i
        rows = sorted(best.values())
    elif len(set(zip(labels, tests, strict=True))) < len(rows):
        labels = _depths(records, tell_apart(records))
    if len({labels[i] for i in rows}) < len(rows) and len(set(tests)) > 1:
        labels = [f"{label}, {test}" for label, test in zip(labels, tests, strict=True)]
    return [(records[i], labels[i]) for i in rows], whichever


def _bars(title: str, xlabel: str, rows: list[tuple[Line, str]], reference: float | None = None) -> list[Bars]:
    if len(rows) > _MOST_BARS:
        title += f", {_MOST_BARS} of {len(rows)} rows"
    return [Bars(title, xlabel, rows[:_MOST_BARS], reference)] if rows else []


def _ratio_of(record: Record) -> float | None:
    ratio = record.get("ratio_vs")
    return number(ratio.get("time_ratio_median")) if isinstance(ratio, dict) else None


def _baseline(records: Sequence[Record]) -> str:
    """What the rows were compared with, in words."""
    found = {str(item["ratio_vs"].get("baseline")) for item in records}
    if len(found) == 1:
        return found.pop()
    if not all(name.startswith("none") for name in found):
        return "the baseline"
    return "the fastest none" + (" with the same kernel" if any("our kernel" in name for name in found) else "")


def _ratios(records: Sequence[Record]) -> list[Bars]:
    if all(_ratio_of(item) is None for item in records):
        return []
    chosen, whichever = _rows(records, [number(item.get("avg_ts")) or 0.0 for item in records])
    made = []
    for item, label in chosen:
        median = _ratio_of(item)
        if median is not None:
            low, high = item["ratio_vs"].get("ci95") or (median, median)
            line = Line(label, name_of(item), [median], [0.0], [low], [high])
            made.append((line, f"{median:.2f} [{low:.2f}, {high:.2f}]"))
    baseline = _baseline([item for item, _ in chosen if _ratio_of(item) is not None])
    xlabel = f"time of the row / time of {baseline}; below 1 is faster"
    return _bars("Time per token, ratio and 95% interval" + whichever, xlabel, made, reference=1.0)


def _first_token(records: Sequence[Record]) -> list[Panel]:
    points: list[Point | None] = []
    for item in records:
        x, speed = number(item.get("n_prompt")), number(item.get("avg_ts"))
        seconds = [sample / 1e9 for sample in item.get("samples_ns") or []]
        if not seconds and x and speed:
            seconds = [x / speed]
        usable = seconds and x and min(seconds) > 0
        points.append((x, statistics.median(seconds), min(seconds), max(seconds)) if usable and x else None)
    found, whichever = _attention_lines(records, points, _BATCHES, highest=False)
    panel = Panel("Time to the first token" + whichever, "prompt tokens", "seconds", found, x_log=True, y_log=True)
    return [panel] if found else []


def _quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def _latency(records: Sequence[Record]) -> list[Strips | Bars]:
    """A strip per row, every token of it; of too many rows the median, p99 and the longest."""
    timed = [item for item in records if item.get("steps_us")]
    figures: list[tuple[float, float, float]] = []
    for item in timed:
        ordered = sorted(step / 1000 for step in item["steps_us"])
        given = item.get("latency_us") or {}
        p50, p99, longest = (
            given[key] / 1000 if number(given.get(key)) is not None else _quantile(ordered, q)
            for key, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
        )
        figures.append((p50, p99, longest))
    chosen, whichever = _rows(timed, [-p50 for p50, _, _ in figures])
    by_row = {id(item): numbers for item, numbers in zip(timed, figures, strict=True)}
    if len(chosen) > _MOST_STRIPS:
        bars = []
        for item, label in chosen:
            p50, p99, longest = by_row[id(item)]
            line = Line(label, name_of(item), [p50], [0.0], [min(item["steps_us"]) / 1000], [longest])
            bars.append((line, f"{p50:.3g} / {p99:.3g} / {longest:.3g}"))
        xlabel = "ms: the fastest token, the median, and the slowest; numbers: median / p99 / slowest"
        return [*_bars("Time per token" + whichever, xlabel, bars)]
    made, ratios = [], []
    for item, label in chosen:
        p50, p99, longest = by_row[id(item)]
        ms = [step / 1000 for step in item["steps_us"]]
        ratios.append(longest / p50 if p50 > 0 else 1.0)
        line = Line(label, name_of(item), [float(i) for i in range(len(ms))], ms)
        made.append((line, f"p50 {p50:.3g}   p99 {p99:.3g}   max {longest:.3g} ms"))
    if not made:
        return []
    y_log = max(ratios) > _SPIKY and all(y > 0 for line, _ in made for y in line.y)
    return [Strips("Time per token" + whichever, "token", "ms", made, y_log)]


def _single_rows(records: Sequence[Record]) -> list[Bars]:
    """What is left where no other panel has data: tokens per second, row by row."""
    points, what = _speeds(records, [0.0] * len(records))
    by_row = {id(item): point for item, point in zip(records, points, strict=True)}
    chosen, whichever = _rows(records, [point[1] if point else 0.0 for point in points])
    made = []
    for item, label in chosen:
        point = by_row[id(item)]
        if point is not None:
            _, y, low, high = point
            made.append((Line(label, name_of(item), [y], [0.0], [low], [high]), f"{y:.1f}"))
    return _bars("Speed" + whichever, f"tokens/s, {what}", made)


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
    panels = panels or [*_single_rows([item for item in records if item["kind"] != "latency"])]
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
    one_kernel = len({is_ours(item) for item in records}) == 1  # otherwise the labels name it
    words += constants(records, ("update", *(["flash_attn"] if one_kernel else []), "cache_type", "n_threads"))
    return Sheet(", ".join(models), " · ".join(words), panels)
