"""The rows of a check as records, and the records as Markdown that is made to be pasted into an issue."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from equip_cli.checking.rows import TOLERANCE, Row, Settings
from equip_cli.core.policy import CHOICE, choice, choice_words
from equip_cli.terminal.columns import BLANK, Column, fold, fold_by, of_records, paragraph, table, wrapped

if TYPE_CHECKING:
    from equip_cli.core.model import Model


def record(row: Row, version: str, about: dict[str, Any], model: Model, settings: Settings) -> dict[str, Any]:
    """A row as `--json` prints it. version: of this package; about: `Native.info()`."""

    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    return {
        "equip": version,
        "llama_cpp": about["llama_cpp"],
        "backends": about["backends"],
        "model": model.path.name,
        "arch": model.info["arch"],
        "n_params": model.info["n_params"],
        "policy": row.policy,
        "scope": row.scope,
        **choice(row.stats),
        "positions": row.positions,
        "budget": settings.budget,
        "type_k": row.cache.kind,
        "type_v": row.cache.kind,
        "flash_attn": row.cache.flash_attn,
        "update": row.update,
        "device": row.device,
        "reference": row.is_reference,
        "n_threads": row.stats.get("n_threads"),
        "n_ubatch": row.stats.get("n_ubatch"),
        "n_evictions": row.n_evictions,
        "kept_as_prescribed": row.kept_as_prescribed if row.ran else None,
        "difference": finite(row.difference),
        "rms_difference": finite(row.rms_difference),
        "difference_from": row.peer,
        "rms_error": finite(row.rms_error) if row.ran else None,
        "rms_before_evictions": finite(row.rms_before) if row.ran else None,
        "rms_limit": finite(row.rms_limit),
        "amplified_limit": finite(row.amplified),
        "tokens_per_second": row.tokens_per_second,
        "graphs_reused": row.graphs_reused if row.ran else None,
        "passed": row.passed,
        "faults": row.faults,
        "remark": row.remark,
    }


def _rounding(records: list[dict[str, Any]]) -> str:
    """Why exact caches differ by more than 1e-4 where the weights are quantised, and what they are held to then."""
    rows = [record for record in records if record["amplified_limit"] is not None]
    if not rows:
        return ""
    limits = " and ".join(dict.fromkeys(f"{max(r['amplified_limit'], TOLERANCE):.1e} on {r['device']}" for r in rows))
    apart = [record["rms_difference"] for record in rows if record["rms_difference"] is not None]
    largest = f", at most {max(apart):.1e} here," if apart else ""
    return (
        "This model's weights are rounded, so llama.cpp rounds activations before it multiplies them; one that falls on the "
        "other side in another update is amplified by every layer after it. So the updates of an f32 cache may differ by "
        f"more than {TOLERANCE:.0e}, which is the limit with f32 weights: their RMS difference{largest} may reach {limits}, "
        "twice what an f16 cache errs by in this model before anything is evicted."
    )


def _columns(records: list[dict[str, Any]]) -> tuple[list[str], list[Column]]:
    """What all rows share, in words, and the columns of the table."""
    column = of_records(records)

    def share(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda record: BLANK if record[key] is None else f"{record[key]:.1e}"

    def error(record: dict[str, Any]) -> str:
        return "0 (ref)" if record["reference"] and record["rms_error"] == 0 else share("rms_error")(record)

    def setting(key: str) -> Column:
        return column(key, f"{key.replace('_', ' ')} {{}}", lambda record: str(record.get(key, BLANK)))

    by_type, attention = fold_by(
        [record["type_k"] for record in records], [column("fa", "fa {}", lambda r: r["flash_attn"])]
    )
    by_policy, left = fold_by([record["policy"] for record in records], [setting(key) for key in ("scope", *CHOICE)])
    words, columns = fold(
        [
            column("cache", "cache {}", lambda record: record["type_k"]),
            *attention,
            column("policy", "policy {}", lambda record: record["policy"]),
            *left,
            column("update", "update {}", lambda record: record["update"]),
            column("positions", "positions {}", lambda record: record["positions"]),
            column("device", "on {}", lambda record: record["device"]),
            column(
                "kept",
                "tokens kept: {}",
                lambda r: {True: "same", False: "others", None: BLANK}[r["kept_as_prescribed"]],
            ),
            column("apart", None, share("difference")),
            column("error", None, error),
            column("limit", None, share("rms_limit")),
            column("t/s", None, lambda r: BLANK if r["tokens_per_second"] is None else f"{r['tokens_per_second']:.0f}"),
            column(
                "reuse", None, lambda r: BLANK if r["graphs_reused"] is None else f"{100 * r['graphs_reused']:.0f}%"
            ),
            column("result", None, lambda r: {True: "ok", False: "differs", None: "not run"}[r["passed"]]),
        ]
    )
    return words + by_type + by_policy, columns


def _cache(record: dict[str, Any]) -> str:
    return f"{record['type_k']}, fa {record['flash_attn']}"


def markdown(records: list[dict[str, Any]], processor: str) -> str:
    """The table, what its rows share above it, and what is to be said of them below. processor: `Native.processor()`."""
    first = next(record for record in records if record["passed"] is not None)
    words, columns = _columns(records)
    remarks = []
    for record in records:
        why = [*record["faults"], *filter(None, [record["remark"]])]
        if why:
            policy = ", ".join([record["policy"], record["scope"], *choice_words(record)])
            label = ", ".join([_cache(record), policy, record["update"], record["positions"], record["device"]])
            remarks.append(wrapped(f"- {label}: {'; '.join(why)}", "  "))
    n_failed, n_run = (sum(record["passed"] in wanted for record in records) for wanted in ((False,), (False, True)))
    verdict = f"**{n_failed} of {n_run} rows differ.**" if n_failed else f"All {n_run} rows agree."
    about = [
        f"equip {first['equip']}, llama.cpp {first['llama_cpp']}",
        f"backends {', '.join(first['backends'])}",
        f"threads {first['n_threads']}",
        f"model {first['model']}: {first['arch']}, {first['n_params'] / 1e6:.1f} M parameters",
        f"budget {first['budget']}, {first['n_evictions']} evictions",
    ]
    legend = (
        "apart: the largest difference from another update's logits. error: RMS from the reference of these positions, which "
        "is marked (ref). Both are shares of the logit range. reuse: share of the steps that reused the graph."
    )
    return "\n".join(
        [
            paragraph([*about, *words]) + wrapped(f"instruction sets {processor}") + "\n",
            table(columns),
            *remarks,
            *([""] if remarks else []),
            wrapped(legend),
            *([wrapped(rounding)] if (rounding := _rounding(records)) else []),
            verdict + "\n",
        ]
    )
