"""From what was measured to what is printed: llama-bench's fields, ours, and ratios of paired samples."""

from __future__ import annotations

import json
import platform
import random
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equip_cli.benchmark.rows import Row, is_our_kernel
from equip_cli.core import text
from equip_cli.core.errors import UsageError
from equip_cli.core.policy import choice

if TYPE_CHECKING:
    from equip_cli.core.model import Model

Record = dict[str, Any]

INSTALLED = "installed"  # the library of a record that was measured beside other builds of it

_BOOTSTRAP_ROUNDS = 2000


def compare(row_ns: Sequence[int], base_ns: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Median of the paired time ratios, and its 95% interval by bootstrap over the pairs (fixed seed).

    Both sequences hold nanoseconds per sample, in the order measured.
    """
    ratios = [a / b for a, b in zip(row_ns, base_ns, strict=True)]
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(_BOOTSTRAP_ROUNDS))
    low, high = medians[int(0.025 * _BOOTSTRAP_ROUNDS)], medians[int(0.975 * _BOOTSTRAP_ROUNDS) - 1]
    return {"time_ratio_median": statistics.median(ratios), "ci95": [low, high], "n_pairs": len(ratios)}


def percentiles(steps_ns: Sequence[int]) -> dict[str, float] | None:
    """Microseconds per token: p50, p95, p99 (the smallest time that so many percent do not exceed), max, and n of them."""
    if not steps_ns:
        return None
    ordered = sorted(steps_ns)
    rank = {f"p{p}": ordered[-(-p * len(ordered) // 100) - 1] / 1000 for p in (50, 95, 99)}
    return {**rank, "max": ordered[-1] / 1000, "n": len(ordered)}


# ---- what a row is compared with


def _median(row: Row) -> float:
    return statistics.median(row.samples_ns)


def fastest(rows: Sequence[Row]) -> Row | None:
    """The measured row whose median sample is the shortest."""
    return min((row for row in rows if row.samples_ns), key=_median, default=None)


def _measured(row: Row, rows: Sequence[Row]) -> list[Row]:
    return [other for other in rows if other.samples_ns and (other.kind, other.test) == (row.kind, row.test)]


def is_ours(row: Row) -> bool:
    """Whether our own attention kernel ran, not llama.cpp's."""
    return is_our_kernel(str(row.stats.get("attn_kernel", "upstream")))


def _same_setting(row: Row, other: Row) -> bool:
    """The same policy, scope and rule of positions: rows that differ in how the victim goes."""
    return (
        row.policy.name == other.policy.name
        and all(other.stats[key] == row.stats[key] for key in ("positions", "scope"))
        and row.sharing == other.sharing
    )


def baseline_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row that `row` is compared with: the faster `none`, of those with the same attention kernel if there are any;
    without a `none` the `inplace` row of the same policy."""
    measured = _measured(row, rows)
    plain = [other for other in measured if other.is_plain]
    if plain:
        return fastest([other for other in plain if is_ours(other) == is_ours(row)] or plain)
    same = [
        other
        for other in measured
        if other.stats["update"] == "inplace" and other.flash_attn == row.flash_attn and _same_setting(row, other)
    ]
    return same[0] if same else None


def _is_apart(row: Row, other: Row) -> bool:
    """Whether the other one differs by giving each lane a cache of its own, and in nothing else."""
    same = all(other.stats[key] == row.stats[key] for key in ("policy", "positions", "scope", "update"))
    return same and other.sharing == "streams" and other.flash_attn == row.flash_attn


def _other_baselines(row: Row, rows: Sequence[Row]) -> dict[str, Row | None]:
    """Baselines by field, where they are not the one of `ratio_vs`."""
    measured = _measured(row, rows)
    plain = [other for other in measured if other.is_plain]
    stock = fastest([other for other in plain if not is_ours(other)])
    same_fa = fastest(
        [other for other in plain if other.flash_attn == row.flash_attn and is_ours(other) == is_ours(row)]
    )
    inplace = None
    if row.policy.name == "none" or row.stats["update"] != "inplace":
        inplace = fastest(
            [
                other
                for other in measured
                if other.stats["update"] == "inplace" and (row.policy.name == "none" or _same_setting(row, other))
            ]
        )
    first = baseline_of(row, rows)
    return {
        "ratio_vs_stock": stock if stock is not first else None,
        "ratio_vs_same_fa": same_fa if same_fa is not first else None,
        "ratio_vs_streams": fastest([other for other in measured if row.sharing == "pool" and _is_apart(row, other)]),
        "ratio_vs_inplace": inplace if not row.is_plain and inplace is not first else None,
    }


def _ratio(row: Row, base: Row | None) -> dict[str, Any] | None:
    if base is None or base is row or row.kind == "latency":  # a single sum each, no pairs
        return None
    return {"baseline": base.label, **compare(row.samples_ns, base.samples_ns)}


# ---- records


def cpu_name() -> str:
    """The processor's name, as /proc/cpuinfo has it, else what Python knows."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def about_machine(library: dict[str, Any], gpu_layers: int) -> dict[str, Any]:
    """What every record says of library and machine. library: `Native.info()`; gpu_layers: -1 = all."""
    gpus = [each["description"] for each in library["devices"] if each["name"] != "CPU"]
    return {
        "build_commit": library["llama_cpp"],
        "backends": ",".join(library["backends"]),
        "cpu_info": cpu_name(),
        "gpu_info": ", ".join(gpus),
        "n_gpu_layers": gpu_layers,
    }


def record(model: Model, row: Row, rows: Sequence[Row], machine: Mapping[str, Any]) -> Record:
    """One measured row as llama-bench's JSON fields plus ours (docs/schemas/bench.json). Times are nanoseconds per sample.

    rows: those that were measured in turns with it.
    """
    info, stats, n = model.info, row.stats, row.n_tokens
    speeds = [n * 1e9 / sample for sample in row.samples_ns]
    shift = None
    if row.is_context_shift:
        shift = {"cycle_tokens": row.cycle, "shift_ms": statistics.median(row.shift_ns) / 1e6 if row.shift_ns else None}
    return {
        "kind": row.kind,
        "test": row.test,
        **machine,
        "model_filename": model.path.name,
        "model_type": info.get("name") or info["arch"],
        "model_size": info["file_bytes"],
        "model_n_params": info.get("n_params"),
        "n_batch": stats["n_batch"],
        "n_ubatch": stats["n_ubatch"],
        "n_threads": stats["n_threads"],
        "type_k": stats["type_k"],
        "type_v": stats["type_v"],
        "flash_attn": row.flash_attn,
        "n_prompt": row.n_prompt,
        "n_gen": row.n_gen,
        "n_depth": row.depth,
        "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "avg_ns": round(statistics.mean(row.samples_ns)),
        "stddev_ns": round(statistics.stdev(row.samples_ns)) if len(row.samples_ns) > 1 else 0,
        "avg_ts": statistics.mean(speeds),
        "stddev_ts": statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
        "samples_ns": row.samples_ns,
        "samples_ts": speeds,
        **{key: stats[key] for key in ("policy", "scope", "positions", "rotate_every", "update")},
        "budget": row.policy.budget if row.is_context_shift else stats["budget"],
        "sinks": stats["sinks"],
        **choice(stats),
        "lanes": max(row.lanes, 1),
        "sharing": row.sharing,
        "pool": row.policy.pool if isinstance(row.policy.pool, int) else None,
        "attn_kernel": stats["attn_kernel"],
        "rope_kernel": stats["rope_kernel"],
        "fill": row.fill,
        "kv_bytes": stats["kv_bytes"],
        "rss_bytes": row.rss_bytes,
        "graphs_reused": stats["graphs_reused"],
        "host_us_per_token": statistics.median(row.host_ns) / n / 1000 if row.host_ns else None,
        "latency_us": percentiles(row.steps_ns),
        "steps_us": [ns / 1000 for ns in row.steps_ns] if row.kind == "latency" else None,
        "context_shift": shift,
        "sample_order": row.sample_order,
        "ratio_vs": _ratio(row, baseline_of(row, rows)),
        **{key: _ratio(row, base) for key, base in _other_baselines(row, rows).items()},
    }


KINDS = ("pp", "tg", "ttft", "latency", "growth", "summary", "paper")


def read(path: str) -> list[Record]:
    """The records of an earlier measurement, a JSON list or an object per line. Raises UsageError."""
    words = text.read(path, "file of records")
    try:
        found = json.loads(words)
        found = found if isinstance(found, list) else [found]
    except (ValueError, RecursionError):
        try:
            found = [json.loads(line) for line in words.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            found = []
    if not found or not all(isinstance(each, dict) and each.get("kind") in KINDS for each in found):
        raise not_records(path)
    return found


def not_records(path: str) -> UsageError:
    """The error for a file that holds something else."""
    return UsageError(f"{path} does not hold what equip bench measured: give it a file of equip bench -o json or jsonl")
