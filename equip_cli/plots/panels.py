"""What is drawn, apart from how: lines in panels, and the labels that tell rows of a record list apart."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from equip_cli.benchmark.rows import is_our_kernel
from equip_cli.core.policy import CONTEXT_SHIFT as CONTEXT_SHIFT  # the figures take it from here

Record = dict[str, Any]

NONE = "none"
WINDOW_ONLY = "window only"

# colours go to policies in this order, so that a policy mostly has the same one in all figures
POLICIES = (
    *("streaming", "h2o", "snapkv", "tova", "keydiff", "a2sf", "vatp", "caote", "fastcaote", "pagedeviction"),
    *("knorm", "rkv"),
)

# what a label may say after the policy's name, in this order
_WORDS = {
    "model": "{}",
    "model_type": "{}",
    "model_filename": "{}",
    "library": "{}",
    "scope": "{}",
    "positions": "positions {}",
    "update": "{}",
    "rope_kernel": "{}",
    "budget": "budget {}",
    "flash_attn": "fa {}",
    "cache_type": "{}",
    "rotate_every": "rotate every {}",
    "sinks": "sinks {}",
    "recent": "recent {}",
    "score_queries": "score queries {}",
    "evict_every": "evict every {}",
    "page_size": "pages of {}",
    "n_batch": "batch {}",
    "n_ubatch": "ubatch {}",
    "n_threads": "threads {}",
}
# these say what a row costs, so they are named as soon as they differ between any two rows
_TELLING = ("update", "budget", "flash_attn", "cache_type")
# all that plain llama.cpp has
_UNBOUNDED = (
    "model",
    "model_type",
    "model_filename",
    "library",
    "flash_attn",
    "cache_type",
    "n_batch",
    "n_ubatch",
    "n_threads",
)


@dataclass
class Line:
    """Points in order of x. low, high: ends of each point's interval; note: more words for the label.

    variant: which of its policy's lines this is; mark: a point to be ringed.
    """

    label: str
    policy: str
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    variant: int = 0
    note: str = ""
    mark: tuple[float, float] | None = None


@dataclass
class Panel:
    """Axes and their lines.

    levels: horizontal lines, with one y each and no x; y_range: lowest and highest y, None = what the points take;
    remark: a line of text inside of the axes; spread: what points and intervals are, in words.
    """

    title: str
    xlabel: str
    ylabel: str
    lines: list[Line] = field(default_factory=list)
    x_log: bool = False
    y_log: bool = False
    y_zero: bool = False
    levels: list[Line] = field(default_factory=list)
    y_range: tuple[float, float] | None = None
    remark: str = ""
    spread: str = ""


@dataclass
class Strips:
    """One series of milliseconds per token for each row, on shared axes."""

    title: str
    xlabel: str
    ylabel: str
    rows: list[tuple[Line, str]]
    y_log: bool


@dataclass
class Bars:
    """One value with its interval per row. text: what is written beside it; reference: x of a vertical line."""

    title: str
    xlabel: str
    rows: list[tuple[Line, str]]
    reference: float | None = None


@dataclass
class Sheet:
    """A figure with one panel below the other."""

    title: str
    subtitle: str
    panels: list[Panel | Strips | Bars]


@dataclass
class Grid:
    """A figure with rows of panels; all rows have as many."""

    title: str
    subtitle: str
    rows: list[list[Panel]]


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def tokens(n: float) -> str:
    """`4096` -> `4k`, as context sizes are named; other numbers as they are."""
    if n >= 1024 and n % 1024 == 0:
        return f"{n / 1024:g}k"
    return f"{n:g}"


def cache_type(record: Record) -> str:
    """`f16`, or `K q8_0, V q4_0` where they differ."""
    k, v = record.get("type_k"), record.get("type_v")
    return str(k or v or "") if k == v or not (k and v) else f"K {k}, V {v}"


def is_ours(record: Record) -> bool:
    """Whether our own attention kernel ran, not llama.cpp's."""
    return is_our_kernel(str(record.get("attn_kernel", "")))


def _attention(record: Record) -> str:
    """`on`, `off`, or `on (ours)` as the tables have it."""
    value = record.get("flash_attn")
    word = {True: "on", False: "off", None: ""}.get(value, str(value))
    return f"{word} (ours)" if word and is_ours(record) else word


def _rope_kernel(record: Record) -> str:
    """Only the update `shift` has a choice."""
    return "cached rotation" if (record.get("update"), record.get("rope_kernel")) == ("shift", "cached") else ""


_DERIVED = {"cache_type": cache_type, "flash_attn": _attention, "rope_kernel": _rope_kernel}


def name_of(record: Record) -> str:
    """The policy as figures name it."""
    if record.get("update") == CONTEXT_SHIFT:
        return CONTEXT_SHIFT
    if record.get("policy") == "streaming" and record.get("sinks") == 0:
        return WINDOW_ONLY
    return str(record.get("policy") or NONE)


def _word(record: Record, key: str, name: str) -> str:
    if name == NONE and key not in _UNBOUNDED:
        return ""
    if (name == CONTEXT_SHIFT and key == "update") or (name == WINDOW_ONLY and key == "sinks"):
        return ""
    value = _DERIVED[key](record) if key in _DERIVED else record.get(key)
    return "" if value is None or value == "" else _WORDS[key].format(value)


def tell_apart(records: Sequence[Record], without: Collection[str] = ()) -> list[str]:
    """A label per record: the policy, and no more words than it takes. `without`: keys that the axes show."""
    names = [name_of(record) for record in records]
    labels = list(names)
    two_kernels = len({is_ours(record) for record in records}) > 1
    for bounded in (False, True):
        rows = [i for i, name in enumerate(names) if (name != NONE) == bounded]
        for key in _WORDS:
            if key in without:
                continue
            found = {i: _word(records[i], key, names[i]) for i in rows}
            by_label: dict[str, set[str]] = {}
            for i in rows:
                by_label.setdefault(labels[i], set()).add(found[i])
            splits = any(len(words) > 1 for words in by_label.values())
            differs = len({word for word in found.values() if word}) > 1
            if splits or (key in _TELLING and differs) or (key == "flash_attn" and two_kernels):
                labels = [f"{label}, {found[i]}" if found.get(i) else label for i, label in enumerate(labels)]
    return labels


def lines(
    records: Sequence[Record],
    labels: Sequence[str],
    points: Sequence[tuple[float, float, float, float] | None],
) -> list[Line]:
    """One line per label, in order of first appearance. points: x, y and the ends of the interval; None = no point."""
    made: dict[str, Line] = {}
    data: dict[str, list[tuple[float, float, float, float]]] = {}
    in_place: dict[str, list[Line]] = {}
    others: dict[str, list[Line]] = {}
    for record, label, point in zip(records, labels, points, strict=True):
        if point is None:
            continue
        if label not in made:
            made[label] = Line(label, name_of(record), [], [])
            group = in_place if record.get("update") == "inplace" else others
            group.setdefault(made[label].policy, []).append(made[label])
        data.setdefault(label, []).append(point)
    for policy in {line.policy for line in made.values()}:  # solid lines are in place
        for variant, line in enumerate([*in_place.get(policy, []), *others.get(policy, [])]):
            line.variant = variant
    for label, line in made.items():
        x, y, low, high = zip(*sorted(data[label]), strict=True)
        line.x, line.y = list(x), list(y)
        if low != y or high != y:
            line.low, line.high = list(low), list(high)
    return list(made.values())


def constants(records: Sequence[Record], keys: Sequence[str]) -> list[str]:
    """What all bounded rows share (all rows, where none is bounded), in words: for the subtitle."""
    rows = [record for record in records if name_of(record) != NONE] or list(records)
    shared = []
    for key in keys:
        words = {_word(record, key, name_of(record)) for record in rows}
        if len(words) == 1 and "" not in words:
            shared.append(words.pop() + (" cache" if key == "cache_type" else ""))
    return shared
