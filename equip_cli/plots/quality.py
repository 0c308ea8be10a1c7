"""The records of `equip eval` as panels: each measure of quality against the budget, and against the bytes kept."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from equip_cli.core.errors import EquipError
from equip_cli.plots.panels import (
    NONE,
    WINDOW_ONLY,
    Grid,
    Line,
    Panel,
    Record,
    constants,
    lines,
    name_of,
    number,
    tell_apart,
    tokens,
)

_BUCKET = 128  # tokens of distance per recall bucket, as in equip_cli.quality
_OF_BUDGET = ("budget", "recent", "n_batch", "n_ubatch")
_FAR = 3.0  # times the worst of the others, from which on a window without sinks is left off the scale

Value = tuple[float, float, float]  # value and the ends of its interval


class _Measure(NamedTuple):
    """value: of a record, given the budget that is looked at; None if it was not measured."""

    title: str
    ylabel: str
    log: bool
    share: bool  # of 1
    value: Callable[[Record, float], Value | None]


def _perplexity(record: Record, budget: float) -> Value | None:
    value = number(record.get("ppl"))
    return None if value is None else (value, value, value)


def _agreement(key: str) -> Callable[[Record, float], Value | None]:
    def value(record: Record, budget: float) -> Value | None:
        found = record.get("agreement") or {}
        mean = number(found.get(key))
        if mean is None:
            return None
        low, high = found.get(f"{key}_ci95") or (mean, mean)
        return mean, low, high

    return value


def recall_beyond(record: Record, budget: float) -> Value | None:
    """Mean recall over the distances of `budget` tokens and more; a key is the upper end of 128 tokens of distance."""
    found = record.get("recall") or {}
    far = [value for key, value in found.items() if int(key) - _BUCKET >= budget and number(value) is not None]
    mean = statistics.mean(far) if far else None
    return None if mean is None else (mean, mean, mean)


def _passkey(record: Record, budget: float) -> Value | None:
    found = record.get("passkey") or {}
    values = [value for depths in found.values() for value in depths.values() if number(value) is not None]
    mean = statistics.mean(values) if values else None
    return None if mean is None else (mean, mean, mean)


def _told(key: str) -> Callable[[Record, float], Value | None]:
    """Mean share of `facts` or `chat` over lengths; the ends of one length's interval, where there is but one."""

    def value(record: Record, budget: float) -> Value | None:
        found = record.get(key) or {}
        values = [(length, share) for length, share in found.items() if number(share) is not None]
        if not values:
            return None
        mean = statistics.mean(share for _, share in values)
        low, high = (record.get(f"{key}_ci95") or {}).get(values[0][0]) or (mean, mean)
        return (mean, low, high) if len(values) == 1 else (mean, mean, mean)

    return value


_MEASURES = (
    _Measure("Perplexity, lower is better", "perplexity", True, False, _perplexity),
    _Measure("Divergence from the full cache, lower is better", "KL, nats per token", True, False, _agreement("kl")),
    _Measure("Same next token as the full cache", "top-1 agreement", False, False, _agreement("top1")),
    _Measure("Recall of what lies beyond the budget", "mean recall", False, True, recall_beyond),
    _Measure("Passkey found", "mean accuracy", False, True, _passkey),
    _Measure("Facts of a text answered", "share", False, True, _told("facts")),
    _Measure("Facts of a chat's beginning answered", "share", False, True, _told("chat")),
)


def _unbounded(records: Sequence[Record], measure: _Measure, budgets: Sequence[float], panel: Panel) -> None:
    """`none` on the budget's axis: a level, or a line where what is measured depends on the budget."""
    labels = tell_apart(records, _OF_BUDGET)
    for variant, (record, label) in enumerate(zip(records, labels, strict=True), start=1):
        found = [(budget, value) for budget in budgets if (value := measure.value(record, budget)) is not None]
        values = {value[0] for _, value in found}
        if len(values) == 1 and len(found) == len(budgets):
            panel.levels.append(Line(label, NONE, [], [values.pop()], variant=variant))
        elif found:
            x, y = [budget for budget, _ in found], [value[0] for _, value in found]
            panel.lines.append(Line(label, NONE, x, y, variant=variant))


def _row(measure: _Measure, bounded: Sequence[Record], unbounded: Sequence[Record]) -> list[Panel]:
    """The panels of one measure: budget, bytes. Empty if no row has it."""
    values = [measure.value(item, number(item.get("budget")) or 0.0) for item in bounded]
    if not any(values):
        return []
    panels = []
    by_bytes = tell_apart(bounded, (*_OF_BUDGET, "positions"))
    small = max((number(item.get("kept_bytes")) or 0.0 for item in bounded), default=0.0) < 2**20
    for labels, key, factor, xlabel in (
        (tell_apart(bounded, _OF_BUDGET), "budget", 1.0, "budget, tokens"),
        (
            _unique(by_bytes, bounded),
            "kept_bytes",
            2.0 ** (-10 if small else -20),
            "keys and values kept, " + ("KiB" if small else "MiB"),
        ),
    ):
        points = []
        for item, value in zip(bounded, values, strict=True):
            x = number(item.get(key))
            points.append((x * factor, *value) if x and value is not None else None)
        panel = Panel(measure.title, xlabel, measure.ylabel, lines(bounded, labels, points), True, measure.log)
        panels.append(panel)
    budgets = sorted({x for item in bounded if (x := number(item.get("budget")))})
    _unbounded(unbounded, measure, budgets, panels[0])
    panels[1].levels = list(panels[0].levels)
    panels[1].title = ""
    for panel in panels:
        panel.y_range = (0.0, 1.0) if measure.share else _without_outlier(panel) if measure.log else None
    return panels


def _without_outlier(panel: Panel) -> tuple[float, float] | None:
    """Where the window without sinks is far worse than all others, the axis ends below it and a remark names it."""
    rest = [y for line in panel.lines if line.policy != WINDOW_ONLY for y in line.y]
    rest += [level.y[0] for level in panel.levels]
    above = [y for line in panel.lines if line.policy == WINDOW_ONLY for y in line.y]
    if not rest or not above or min(above) < _FAR * max(rest):
        return None
    low, high = (f"{y:.3g}" for y in (min(above), max(above)))
    panel.remark = f"{WINDOW_ONLY}: {low}" + (f" to {high}" if high != low else "") + ", above the scale"
    return min(rest), max(rest)


def _unique(labels: Sequence[str], records: Sequence[Record]) -> list[str]:
    """The labels, unless two rows would share a point of a line: then with all that tells rows apart."""
    points = [(label, item.get("kept_bytes")) for label, item in zip(labels, records, strict=True)]
    return list(labels) if len(set(points)) == len(points) else tell_apart(records, _OF_BUDGET)


def _same_variants(column: Sequence[Panel]) -> None:
    """A label looks the same in all panels of a column, also where a measure lacks some of the lines."""
    labels: dict[str, list[str]] = {}
    for line in [line for panel in column for line in panel.lines if line.policy != NONE]:
        own = labels.setdefault(line.policy, [])
        if line.label not in own:
            own.append(line.label)
        line.variant = own.index(line.label)


def grid(records: Sequence[Record]) -> Grid:
    """A row per measure that was taken, a column each for budget and bytes. Raises EquipError if there is none."""
    bounded = [item for item in records if name_of(item) != NONE]
    unbounded = [item for item in records if name_of(item) == NONE]
    rows = [row for measure in _MEASURES if (row := _row(measure, bounded, unbounded))]
    if not rows:
        raise EquipError("there is nothing to draw: no record of a bounded cache has a measured quality")
    for column in zip(*rows, strict=True):
        _same_variants(column)
    models = list(dict.fromkeys(str(item["model"]) for item in records if item.get("model")))
    words = []
    lengths = {item.get("n_tokens") for item in records}
    if len(lengths) == 1 and (length := number(lengths.pop())):
        words.append(f"{length:,.0f} tokens")
    budgets = sorted({int(b) for item in bounded if (b := number(item.get("budget")))})
    if budgets:
        words.append("budget " + ", ".join(tokens(b) for b in budgets))
    words += constants(records, ("positions", "cache_type"))
    return Grid(", ".join(models) or "Quality of what is kept", " · ".join(words), rows)
