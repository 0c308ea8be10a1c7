"""Records as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from equip_cli import engine, output
from equip_cli.benchmark.rows import is_our_kernel
from equip_cli.memory import megabytes
from equip_cli.policy import CHOICE

Record = dict[str, Any]

_RATIOS = {
    "ratio_vs": "time / baseline",
    "ratio_vs_stock": "/ stock llama.cpp",
    "ratio_vs_same_fa": "/ none, same fa",
    "ratio_vs_inplace": "/ inplace",
}


def _params(n: int | None) -> str:
    return "-" if not n else f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


def _ratio(ratio: Record | None, missing: str) -> str:
    if ratio is None:
        return missing
    low, high = ratio["ci95"]
    return f"{ratio['time_ratio_median']:.3f} [{low:.3f}, {high:.3f}]"


def _settings(records: Sequence[Record]) -> list[str]:
    """Keys that describe a bounded cache, those that tell its neighbours apart."""
    keys = ["positions", "update", "budget"]
    if engine.differ_in_rotation([record for record in records if record["update"] != "context-shift"]):
        keys.insert(1, "rotate_every")
    if engine.differ_in_scope(records):
        keys.insert(0, "scope")
    return keys + [key for key in CHOICE if any(key in item for item in records)]


def _cell(record: Record, key: str) -> str:
    plain = record["policy"] == "none"
    if plain and not (record["update"] == "context-shift" and key in ("update", "budget")):
        return "-"
    if key == "update" and record["rope_kernel"] == "cached":
        return "shift, cached rotation"
    return str(record.get(key) or "-")


def _shared(records: Sequence[Record]) -> list[tuple[str, str]]:
    """(key, title) of llama-bench's columns: types and batch sizes only where they are not the default or differ."""
    columns = [("backends", "backend"), ("n_threads", "threads")]
    for key, default in (("type_k", "f16"), ("type_v", "f16")):
        if any(record[key] != default for record in records):
            columns.append((key, key))
    for key in ("n_batch", "n_ubatch"):
        if len({(record["test"], record[key]) for record in records if record["policy"] == "none"}) > len(
            {record["test"] for record in records if record["policy"] == "none"}
        ):
            columns.append((key, key))
    return columns


def _table(records: Sequence[Record], measures: Sequence[tuple[str, list[str]]]) -> str:
    keys, shared = _settings(records), _shared(records)
    ratios = [key for key in _RATIOS if key == "ratio_vs" or any(record[key] for record in records)]
    if records[0]["kind"] == "latency":
        ratios = []
    header = ["model", "size", "params", *(title for _, title in shared), "policy"]
    header += [*(key.replace("_", " ") for key in keys), "fa", "cache", "test"]
    header += [*(title for title, _ in measures), *(_RATIOS[key] for key in ratios)]
    rows = [
        [
            record["model_type"],
            megabytes(record["model_size"]),
            _params(record["model_n_params"]),
            *(str(record[key]) for key, _ in shared),
            record["policy"],
            *(_cell(record, key) for key in keys),
            record["flash_attn"] + (" (ours)" if is_our_kernel(record["attn_kernel"]) else ""),
            megabytes(record["kv_bytes"]),
            record["test"],
            *(cells[i] for _, cells in measures),
            *(_ratio(record[key], "1 (baseline)" if key == "ratio_vs" else "-") for key in ratios),
        ]
        for i, record in enumerate(records)
    ]
    return output.table(rows, header)


def _speeds(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    columns = [("t/s", [f"{record['avg_ts']:.2f} ± {record['stddev_ts']:.2f}" for record in records])]
    if any(record["host_us_per_token"] is not None for record in records):
        columns.append(("host us", [_number(record["host_us_per_token"]) for record in records]))
    return columns


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _milliseconds(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    return [
        (f"{key}, ms", [f"{record['latency_us'][key] / 1000:.2f}" for record in records])
        for key in ("p50", "p95", "p99", "max")
    ]


def _seconds(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    seconds = [f"{record['avg_ns'] / 1e9:.3f} ± {record['stddev_ns'] / 1e9:.3f}" for record in records]
    return [("first token after, s", seconds), _speeds(records)[0]]


def _growth_columns(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    columns = _speeds(records)[:1]
    columns.append(("process", [megabytes(record["rss_bytes"]) for record in records]))
    return [*columns, ("filled", [record["fill"] for record in records])]


def _baselines(rows: Sequence[Record]) -> str:
    cells = [
        [
            row["policy"],
            row["scope"],
            row["positions"],
            str(row["budget"]),
            row["baseline"] + (" (the fastest)" if row["fastest"] else ""),
            row["flash_attn"],
            _ratio({"time_ratio_median": row["speedup"], "ci95": row["ci95"]}, "-"),
        ]
        for row in rows
    ]
    return output.table(cells, ["policy", "scope", "positions", "budget", "baseline", "fa", "time / in place"])


def _growth_lines(rows: Sequence[Record]) -> str:
    lines = ""
    for row in rows:
        where = "at no length" if row["crossing_tokens"] is None else f"from {row['crossing_tokens']} tokens on"
        lines += (
            f"{row['policy']} {row['budget']}: faster than {row['baseline']} {where}; {row['speedup_at_end']:.2f} times at "
            f"{row['test'].split()[1]}, {row['speedup']:.2f} times for the whole text\n"
        )
    return lines


def _paper(rows: Sequence[Record]) -> str:
    cells = [
        [
            row["test"],
            row["baseline"],
            row["note"] or f"{row['speedup']:.2f}",
            *(f"{row[key]:.2f}" if row[key] else "-" for key in ("paper_cpu", "paper_gpu")),
        ]
        for row in rows
    ]
    header = ["method", "baseline / in place", "here", "paper, CPU", "paper, GPU"]
    return output.table(cells, header)


def markdown(records: Sequence[Record]) -> str:
    """Tables by kind of measurement, with the summaries behind them."""
    measures = {"pp": _speeds, "tg": _speeds, "latency": _milliseconds, "ttft": _seconds, "growth": _growth_columns}
    by_kind: dict[str, list[Record]] = {}
    for record in records:
        by_kind.setdefault("tg" if record["kind"] == "pp" else record["kind"], []).append(record)
    parts = [_table(rows, measures[kind](rows)) for kind, rows in by_kind.items() if kind in measures]
    summaries = by_kind.get("summary", [])
    ways = [row for row in summaries if "fastest" in row]
    grown = [row for row in summaries if "crossing_tokens" in row]
    if ways:
        parts.append(_baselines(ways))
    if grown:
        parts.append(_growth_lines(grown))
    if "paper" in by_kind:
        parts.append(_paper(by_kind["paper"]))
    return "\n".join(parts)


def _flat(record: Record) -> Record:
    """Without nesting: a ratio is four columns, percentiles are one each, and a list is JSON."""
    flat: Record = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{key}_{inner}": each for inner, each in value.items()}
        else:
            flat[key] = value
    return {key: json.dumps(value) if isinstance(value, (list, tuple)) else value for key, value in flat.items()}


def as_csv(records: Sequence[Record]) -> str:
    """One line per record; a column that a record lacks is empty."""
    flat = [_flat(record) for record in records if record["kind"] not in ("summary", "paper")]
    names = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
