"""equip bench: decode speed, side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from equip_cli import engine, options, output
from equip_cli.errors import UsageError
from equip_cli.memory import megabytes
from equip_cli.policy import CHOICE


def _markdown(records: list[dict[str, Any]]) -> str:
    settings = ["positions", "update", "budget"]
    if engine.differ_in_rotation(records):
        settings.insert(1, "rotate_every")
    if engine.differ_in_scope(records):
        settings.insert(0, "scope")
    settings += [key for key in CHOICE if any(key in item for item in records)]
    header = ["model", "policy", *(key.replace("_", " ") for key in settings)]
    header += ["fa", "cache", "test", "t/s", "host us", "time ratio"]
    rows = []
    for item in records:
        ratio, unbounded = item["ratio_vs"], item["policy"] == "none"
        shown = "1 (baseline)"
        if ratio is not None:
            low, high = ratio["ci95"]
            shown = f"{ratio['time_ratio_median']:.3f} [{low:.3f}, {high:.3f}]"
        rows.append(
            [
                item["model_type"],
                item["policy"],
                *("-" if unbounded else str(item.get(key) or "-") for key in settings),
                item["flash_attn"],
                megabytes(item["kv_bytes"]),
                f"tg{item['n_gen']} @ d{item['n_depth']}",
                f"{item['avg_ts']:.2f} ± {item['stddev_ts']:.2f}",
                f"{item['host_us_per_token']:.0f}",
                shown,
            ]
        )
    return output.table(rows, header)


def bench(
    model: options.ModelArgument = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="NAME[:TYPE]", help="Random weights of a real model's shape instead of MODEL."),
    ] = None,
    n_gen: Annotated[int, typer.Option("-n", "--n-gen", metavar="N", min=1, help="Tokens per sample.")] = 64,
    depth: Annotated[
        int | None,
        typer.Option("-d", "--n-depth", metavar="D", min=2, help="Tokens read before. [default: the budget]"),
    ] = None,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", metavar="N", min=1, help="Samples per row.")] = 5,
    policy: Annotated[str, typer.Option("--policy", metavar="NAME,..", help="Policies to compare.")] = "none",
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="B,..", help="Budgets; each has rows of its own. [default: -d, else 1024]"),
    ] = None,
    sinks: options.Sinks = None,
    scope: options.ScopeList = None,
    positions: options.PositionsList = None,
    rotate_every: options.RotateEveryList = None,
    score_queries: options.ScoreQueriesList = None,
    evict_every: options.EvictEveryList = None,
    page_size: options.PageSizeList = None,
    update: options.UpdateList = None,
    threads: options.Threads = None,
    gpu_layers: options.GpuLayers = "all",
    batch: options.Batch = None,
    ubatch: options.Ubatch = None,
    flash_attn: Annotated[
        str, typer.Option("-fa", "--flash-attn", metavar="on|off|auto,..", help="For the rows other than none.")
    ] = "on,off",
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    form: Annotated[str, typer.Option("-o", "--output", metavar="md|json", help="Form of the result.")] = "md",
    verbose: options.Verbose = False,
) -> None:
    """Measure decode speed side by side.

    Every row's cache is alive at once, and the samples are taken in turns. The policy none is plain llama.cpp with the
    cache held at -d tokens. It runs with flash attention on and off, and the faster one is what the other rows are
    compared with: time of the row / time of the baseline.
    """
    from equip_cli import benchmark, native
    from equip_cli.random_gguf import shape_file

    if form not in ("md", "json"):
        raise UsageError(f"-o is {form!r}: give md or json")
    if model is not None and shape is not None:
        raise UsageError("give either a MODEL or --shape NAME[:TYPE]")
    modes = [engine.parse_flash_attention(word) for word in engine.words(flash_attn)]
    budgets = engine.numbers(budget, "--budget") if budget is not None else [depth or 1024]
    wanted = engine.cache_policies(
        policy,
        budgets=budgets,
        sinks=[sinks],
        scope=scope,
        positions=positions,
        update=update,
        rotate_every=rotate_every,
        score_queries=score_queries,
        evict_every=evict_every,
        page_size=page_size,
    )
    groups = {b: [item for item in wanted if item.name == "none" or item.budget == b] for b in budgets}
    if not modes or not all(groups.values()):
        raise UsageError("there is nothing to measure: name a policy, a budget and a mode of flash attention")
    if 0 in groups:
        raise UsageError("--budget is 0: give the number of tokens here")
    for item in wanted:
        item.check_known(native.load().policies())
    settings = benchmark.Settings(
        n_gen,
        repetitions,
        depth,
        threads if threads and threads > 0 else None,
        batch,
        ubatch,
        cache_type_k,
        cache_type_v,
    )
    if shape is not None:
        output.note(f"using random weights of the shape {shape}")
        model = str(shape_file(shape))
    with engine.load_model(model, gpu_layers, verbose=verbose) as loaded:
        about = native.load().info()
        records: list[dict[str, Any]] = []
        n_samples = 0
        for size, policies in groups.items():
            rows = benchmark.plan(policies, modes, settings, size)
            if any(row.policy.name == "none" for row in rows) and benchmark.padded(rows[0].depth) != benchmark.padded(
                size
            ):
                output.warn(
                    f"none attends over {rows[0].depth} tokens and the budget over {size}: set -d to the budget"
                )
            n_samples = benchmark.run(loaded, rows, settings, n_samples, output.note)
            for row in rows:
                if row.error is not None:
                    output.warn(f"not measured: {row.label}: {row.error}")
                else:
                    records.append(benchmark.record(loaded, row, rows, settings, about))
    if form == "json":
        output.result_json(records)
    else:
        output.result(_markdown(records))
