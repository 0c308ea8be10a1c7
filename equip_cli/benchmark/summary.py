"""What the records come to: the fastest baseline of each policy, the length from which a bounded cache is faster, the paper."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from equip_cli.benchmark.rows import is_our_kernel

Record = dict[str, Any]

# Speedups that EQUIP's abstract states (ACL 2026): geometric means on a CPU and on a GPU
PAPER = {"StreamingLLM": (1.62, 1.47), "H2O": (3.45, 1.86), "long generation, paged attention": (4.18, 2.61)}


def _setting(record: Record) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("policy", "scope", "positions", "budget", "type_k", "type_v", "n_threads"))


def _how(record: Record) -> str:
    if record["update"] == "shift":
        return "shift, cached rotation" if record["rope_kernel"] == "cached" else "shift"
    return str(record["update"])


def baselines(records: Sequence[Record]) -> list[Record]:
    """For each policy and budget, each other way for the victim to go over `inplace`: both with the faster flash attention.

    Objects of kind `summary`: speedup = time of the baseline / time in place, the median of paired ratios, with its 95%
    interval; fastest: no other baseline of this setting is faster.
    """
    found: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        if record["kind"] != "tg" or record["policy"] == "none" or record["update"] == "inplace":
            continue
        if record["ratio_vs_inplace"] or (record["ratio_vs"] and "inplace" in record["ratio_vs"]["baseline"]):
            how = found.setdefault((_setting(record), record["n_gen"], record["n_depth"]), {})
            if _how(record) not in how or record["avg_ns"] < how[_how(record)]["avg_ns"]:
                how[_how(record)] = record
    rows = []
    for how in found.values():
        fastest = min(how.values(), key=lambda record: record["avg_ns"])
        for name, record in how.items():
            ratio = record["ratio_vs_inplace"] or record["ratio_vs"]
            rows.append(
                {
                    "kind": "summary",
                    "test": record["test"],
                    **{key: record[key] for key in ("policy", "scope", "positions", "budget", "type_k", "type_v")},
                    "baseline": name,
                    "flash_attn": record["flash_attn"],
                    "speedup": ratio["time_ratio_median"],
                    "ci95": ratio["ci95"],
                    "fastest": record is fastest,
                }
            )
    return rows


def geomean(values: Sequence[float]) -> float:
    """Geometric mean of positive numbers, at least one."""
    return math.exp(sum(map(math.log, values)) / len(values))


def of_each(records: Sequence[Record], make: Callable[[Sequence[Record]], list[Record]]) -> list[Record]:
    """`make` of the records of each model and library by themselves; where there are several, its objects name theirs."""
    keys = [key for key in ("model_filename", "library") if len({record.get(key) for record in records}) > 1]
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    return [{**row, **dict(zip(keys, named, strict=True))} for named, own in groups.items() for row in make(own)]


# ---- growing sequences


def _plain_ns(records: Sequence[Record], ours: bool) -> dict[int, float]:
    """ns per token of the faster `none`, by length; of those with our attention kernel, or of stock llama.cpp."""
    found: dict[int, float] = {}
    for record in records:
        if record["kind"] == "growth" and record["policy"] == "none" and is_our_kernel(record["attn_kernel"]) == ours:
            ns = _median(record) / record["n_gen"]
            found[record["n_depth"]] = min(ns, found.get(record["n_depth"], ns))
    return found


def _median(record: Record) -> float:
    return float(statistics.median(record["samples_ns"]))


def _bounded_ns(records: Sequence[Record]) -> dict[tuple[Any, ...], dict[int, float]]:
    """The same of each bounded cache, the faster of its rows."""
    found: dict[tuple[Any, ...], dict[int, float]] = {}
    for record in records:
        if record["kind"] == "growth" and record["policy"] != "none":
            by_length = found.setdefault(_setting(record)[:4], {})
            ns = _median(record) / record["n_gen"]
            by_length[record["n_depth"]] = min(ns, by_length.get(record["n_depth"], ns))
    return found


def _crossing(plain: dict[int, float], bounded: dict[int, float]) -> float | None:
    """Tokens from which on `none` takes longer, linear between two lengths; None if it never does."""
    before: tuple[int, float] | None = None
    for length in sorted(set(plain) & set(bounded)):
        gap = plain[length] - bounded[length]
        if gap > 0:
            return float(length) if before is None else before[0] + (length - before[0]) * before[1] / (before[1] - gap)
        before = (length, gap)
    return None


def _total_ns(by_length: dict[int, float], before: dict[int, float], upto: int) -> float:
    """Time to generate `upto` tokens one by one: trapezoids between the lengths; before the first one of `by_length`, as `before`."""
    points = {0: before[min(before)]} | {n: ns for n, ns in before.items() if n < min(by_length)} | by_length
    lengths = sorted(n for n in points if n <= upto)
    return sum((b - a) * (points[a] + points[b]) / 2 for a, b in zip(lengths, lengths[1:], strict=False))


def growth(records: Sequence[Record]) -> list[Record]:
    """For each bounded cache beside a growing one: where the growing one becomes slower, the ratio at the end, and the ratio of
    the times for the whole text. Objects of kind `summary`; two for a cache with our attention kernel: against `none` with
    the same kernel, and against stock llama.cpp."""
    return [
        row
        for n in dict.fromkeys(record.get("lanes", 1) for record in records)
        for sharing in ("alone", "pool", "streams")
        for row in _growth_of(
            [each for each in records if each.get("lanes", 1) == n and _counts(each, sharing)], n, sharing
        )
    ]


def _counts(record: Record, sharing: str) -> bool:
    """Whether a record is a bounded cache of this kind, or one that it is compared with: the fastest of all growing ones."""
    return bool(record.get("policy") == "none" or record.get("sharing", "alone") == sharing)


def _growth_of(records: Sequence[Record], n_lanes: int, sharing: str) -> list[Record]:
    stock, ours, rows = _plain_ns(records, False), _plain_ns(records, True), []
    for (policy, scope, positions, budget), bounded in _bounded_ns(records).items():
        for name, plain in (("none, our kernel", ours), ("none", stock)):
            if not plain or max(plain) not in bounded:
                continue
            last, crossing = max(plain), _crossing(plain, bounded)
            rows.append(
                {
                    "kind": "summary",
                    "test": f"generate {last}" + (f" x {n_lanes}" if n_lanes > 1 else ""),
                    "sharing": sharing,
                    "policy": policy,
                    "scope": scope,
                    "positions": positions,
                    "budget": budget,
                    "baseline": name,
                    "crossing_tokens": None if crossing is None else round(crossing),
                    "speedup_at_end": plain[last] / bounded[last],
                    "speedup": _total_ns(plain, plain, last) / _total_ns(bounded, plain, last),
                }
            )
    return rows


# ---- the paper


def paper(records: Sequence[Record]) -> list[Record]:
    """The rows of the paper's abstract beside ours: geometric means over the budgets. Objects of kind `paper`.

    StreamingLLM: its fastest baseline of `shift`, `shift` with cached rotations, and `gather` over `inplace`; H2O: `gather`,
    which is what its own code does; long generation: a growing cache over a bounded one, for the whole text.
    """
    ways, rows = baselines(records), []
    for name, policy in (("StreamingLLM", "streaming"), ("H2O", "h2o")):
        of_policy = [row for row in ways if row["policy"] == policy]
        hows = {
            how: [r["speedup"] for r in of_policy if r["baseline"] == how]
            for how in dict.fromkeys(r["baseline"] for r in of_policy)
        }
        fastest = [row["speedup"] for row in of_policy if row["fastest"]]
        for how, speedups in [*hows.items(), ("the fastest of them", fastest)]:
            if speedups:
                rows.append(_paper_row(name, how, geomean(speedups), len(speedups), PAPER[name]))
    long: list[Record] = []
    paged: list[Record] = []
    for row in growth(records):
        in_pages = row["sharing"] == "pool"
        name = (
            f"long generation{', paged attention' if in_pages else ''}, {row['test'].removeprefix('generate ')} tokens"
        )
        baseline = f"{row['baseline']}, against {row['policy']} {row['budget']}"
        stated = PAPER["long generation, paged attention"] if in_pages else None
        (paged if in_pages else long).append(_paper_row(name, baseline, row["speedup"], 1, stated))
    rows += [*long, *paged]
    if not paged:
        name = "long generation, paged attention"
        rows.append(_paper_row(name, "none", None, 0, PAPER[name]))
    return rows


def _paper_row(name: str, baseline: str, speedup: float | None, n: int, stated: tuple[float, float] | None) -> Record:
    return {
        "kind": "paper",
        "test": name,
        "baseline": baseline,
        "speedup": speedup,
        "n_budgets": n,
        "paper_cpu": stated and stated[0],
        "paper_gpu": stated and stated[1],
        "note": "with --lanes" if speedup is None else None,
    }
