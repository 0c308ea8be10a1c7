"""equip check: whether this machine's backend computes what it should."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from itertools import cycle, islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equip_cli.commands.setup import engine, options
from equip_cli.core import limits
from equip_cli.core.errors import UnsupportedModelError, UsageError
from equip_cli.core.policy import CHOICE, choice, choice_words
from equip_cli.models import embedded
from equip_cli.terminal import output
from equip_cli.terminal.columns import BLANK, WIDTH, Column, fold, fold_by, paragraph, table

if TYPE_CHECKING:
    from equip_cli.checking.measure import Row, Settings
    from equip_cli.core.model import Model


def _budget(model: Model, wanted: int | None) -> int:
    """The budget of the rows. Raises UsageError if a stream would leave the trained context."""
    n_ctx_train = model.n_ctx_train
    if wanted is None:
        return max(int(limits.CHECK_BUDGET.low), min(256, n_ctx_train // 2))
    if wanted > n_ctx_train:
        raise UsageError(
            f"a budget of {wanted} is more than the trained context: give {limits.CHECK_BUDGET.low} to {n_ctx_train}"
        )
    return wanted


def _tokens(model: Model, n: int) -> list[int]:
    """What is read: prose, because a trained model amplifies rounding many times more in text that makes no sense to it;
    random tokens where there is no tokenizer."""
    from equip_cli.benchmark import filler

    try:
        text = model.tokenize(embedded.prose())
    except UnsupportedModelError:
        return filler(model, n)
    return list(islice(cycle(text), n))


def _device(gpu_layers: str) -> tuple[str, bool]:
    """Name of the device that runs the model, and whether it is the CPU."""
    from equip_cli.core import native

    names = [str(each["name"]) for each in native.load().info()["devices"]]
    # BLAS helps the CPU with chunks
    others = [name for name in names if name not in ("CPU", "BLAS")]
    if not others or engine.parse_gpu_layers(gpu_layers) == 0:
        return "CPU", True
    return "+".join(others), False


def _record(row: Row, about: dict[str, Any], model: Model, settings: Settings) -> dict[str, Any]:
    from equip_cli import __version__

    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    return {
        "equip": __version__,
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
    from equip_cli.checking.measure import TOLERANCE

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

    def column(title: str, phrase: str | None, cell: Callable[[dict[str, Any]], str]) -> Column:
        return Column(title, [cell(record) for record in records], phrase)

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


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _markdown(records: list[dict[str, Any]], processor: str) -> str:
    first = next(record for record in records if record["passed"] is not None)
    words, columns = _columns(records)
    remarks = []
    for record in records:
        why = [*record["faults"], *filter(None, [record["remark"]])]
        if why:
            policy = ", ".join([record["policy"], record["scope"], *choice_words(record)])
            label = ", ".join([_cache(record), policy, record["update"], record["positions"], record["device"]])
            remarks.append(_wrapped(f"- {label}: {'; '.join(why)}", "  "))
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
            paragraph([*about, *words]) + _wrapped(f"instruction sets {processor}") + "\n",
            table(columns),
            *remarks,
            *([""] if remarks else []),
            _wrapped(legend),
            *([_wrapped(rounding)] if (rounding := _rounding(records)) else []),
            verdict + "\n",
        ]
    )


def check(
    model: options.ModelArgument = None,
    budget: Annotated[
        int | None,
        options.number(
            "--budget",
            metavar="B",
            limit=limits.CHECK_BUDGET,
            group=options.CACHE,
            help="Most tokens kept.",
            default="min(256, half the trained context)",
        ),
    ] = None,
    n_evictions: Annotated[
        int | None,
        options.number(
            "-n",
            "--evictions",
            limit=limits.EVICTIONS,
            group=options.MEASURES,
            help="Evictions per row.",
            default="64 to 384, as time allows",
        ),
    ] = None,
    update: Annotated[
        str,
        options.option("--update", metavar="HOW,..", group=options.CACHE, help="What inplace is compared with."),
    ] = "shift,gather",
    threads: options.Threads = None,
    gpu_layers: options.GpuLayers = "all",
    as_json: options.JsonList = False,
    verbose: options.Verbose = False,
) -> None:
    """Check that this machine computes what it should, in about 30 seconds.

    The same tokens go through the updates inplace, shift and gather on the loaded backend, and through inplace on the CPU,
    with three types of cache; and through h2o, a policy that reads attention weights, with one of them. They must keep the
    right tokens and give the same logits. The table is made to be pasted into an issue. The exit code is 1 if something
    differs.
    """
    from equip_cli.checking.measure import CACHES, SCORED, UPDATES, Settings, run
    from equip_cli.core import native
    from equip_cli.core.model import Model

    updates = engine.some_words(update, "--update")
    unknown = [word for word in updates if word not in UPDATES]
    if unknown:
        raise UsageError(f"there is no update {unknown[0]!r}: choose of {', '.join(UPDATES)}")
    device, on_cpu = _device(gpu_layers)
    with engine.load_model(model, gpu_layers, verbose=verbose) as loaded:
        supports = loaded.info["supports"]
        rules = supports["positions"]
        settings = Settings(
            budget=_budget(loaded, budget),
            positions="cache" if "cache" in rules or not rules else "true",
            updates=updates,
            n_evictions=n_evictions,
            n_threads=threads,
            scored=SCORED[0] in supports["policies"] and SCORED[1] in supports["scopes"],
        )
        tokens = _tokens(loaded, settings.n_tokens)
        cpu_model = loaded if on_cpu else Model(loaded.path, n_gpu_layers=0)
        bar = output.Progress("checking", len(CACHES))
        try:
            rows = run(loaded, cpu_model, device, settings, tokens, bar.advance)
        finally:
            bar.done()
            cpu_model.close()
        about = native.load().info()
        records = [_record(row, about, loaded, settings) for row in rows]
    if as_json:
        output.result_json(records)
    else:
        output.result(_markdown(records, native.load().processor()))
    if not all(record["passed"] in (True, None) for record in records):
        raise typer.Exit(1)
