"""equip bench: speed, side by side."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equip_cli import engine, options, output
from equip_cli.errors import UsageError

if TYPE_CHECKING:
    from equip_cli.benchmark.jobs import Request
    from equip_cli.model import Model

_FORMS = ("md", "csv", "json", "jsonl")


def _warn_about(request: Request) -> None:
    """What would make a table unfair, said before it is measured."""
    from equip_cli.benchmark.rows import padded

    has_none = any(policy.name == "none" for policy in request.policies)
    bounded = [policy for policy in request.policies if policy.budget]
    for depth, budget in itertools.product(request.depths, request.budgets):
        if depth is not None and has_none and bounded and request.n_gens and padded(depth) != padded(budget):
            output.warn(f"none attends over {depth} tokens and the budget over {budget}: set -d to the budget")


def _uneven(records: Sequence[dict[str, Any]]) -> None:
    """Samples that hold no whole number of batches of rotations differ by one batch."""
    single = [r for r in records if r["kind"] in ("tg", "growth") and r["positions"] == "cache"]
    rotated = [r for r in single if r["policy"] not in ("none", "streaming") and r["update"] == "inplace"]
    uneven = [r["rotate_every"] for r in rotated if r["n_gen"] % r["rotate_every"]]
    if uneven:
        output.warn(
            f"keys are rotated every {uneven[0]} tokens: make -n a multiple of it, so that all samples hold as many rotations"
        )


def _measure(loaded: Model, request: Request, machine: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Append the records as their tables are done."""
    from equip_cli import benchmark
    from equip_cli.benchmark.jobs import jobs

    planned = list(jobs(request))
    bar = output.Progress("measuring", max(sum(job.work() for job in planned), 1))
    n_samples = 0
    try:
        for job in planned:
            groups, n_samples = job.run(loaded, n_samples, bar.advance)
            for rows in groups:
                for row in rows:
                    if row.error is not None:
                        output.warn(f"not measured: {row.label}: {row.error}")
                    elif not row.is_void:
                        records.append(benchmark.record(loaded, row, rows, machine))
    finally:
        bar.done()


def _print(records: Sequence[dict[str, Any]], form: str) -> None:
    from equip_cli.benchmark import tables

    if form == "json":
        output.result_json(records)
    elif form == "jsonl":
        output.result("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    else:
        output.result(tables.as_csv(records) if form == "csv" else tables.markdown(records))


def bench(
    model: options.ModelArgument = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="NAME[:TYPE]", help="Random weights of a real model's shape instead of MODEL."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", metavar="quick|full|paper", help="Measurements that go together; other options win over it."
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="The policies beside none, context-shift, shift and gather. [--policy: streaming]"
        ),
    ] = False,
    n_prompt: Annotated[
        str | None,
        typer.Option("-p", "--n-prompt", metavar="N,..", help="Tokens of a prompt. [default: 512 if no -n is given]"),
    ] = None,
    n_gen: Annotated[
        str | None,
        typer.Option("-n", "--n-gen", metavar="N,..", help="Tokens per sample. [default: 128 if no -p is given]"),
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(
            "-d", "--n-depth", metavar="D,..", help="Tokens read before. [default: the budget; 0 before a prompt]"
        ),
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option("-r", "--repetitions", metavar="N", min=1, help="Samples per row. [default: 5]")
    ] = None,
    upto: Annotated[
        int | None,
        typer.Option(
            "--upto", metavar="N", help="Time per token as a sequence grows to N tokens, and with a bounded cache."
        ),
    ] = None,
    fill: Annotated[
        str,
        typer.Option(
            "--fill", metavar="copied|read", help="How --upto reaches a length: copies of rows, or tokens read."
        ),
    ] = "copied",
    ttft: Annotated[
        str | None,
        typer.Option("--ttft", metavar="M,..", help="Time to the first token of prompts of M times the budget."),
    ] = None,
    latency: Annotated[
        int | None,
        typer.Option("--latency", metavar="N", min=8, help="Time of each of N tokens in a row, with percentiles."),
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="NAME,..", help="Policies to compare. [default: none]")
    ] = None,
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
    update: Annotated[
        str | None,
        typer.Option(
            "--update", metavar="HOW,..", help="inplace, shift, gather; context-shift with none. [default: inplace]"
        ),
    ] = None,
    shift_rope: Annotated[
        str | None,
        typer.Option(
            "--shift-rope",
            metavar="KERNEL,..",
            help="RoPE kernel of the update shift: upstream, cached. [default: upstream]",
        ),
    ] = None,
    threads: Annotated[
        str | None, typer.Option("-t", "--threads", metavar="N,..", help="CPU threads. [default: physical cores]")
    ] = None,
    gpu_layers: options.GpuLayers = "all",
    batch: Annotated[str | None, typer.Option("-b", "--batch-size", metavar="N,..", help="Tokens per call.")] = None,
    ubatch: Annotated[
        str | None, typer.Option("-ub", "--ubatch-size", metavar="N,..", help="Tokens per chunk.")
    ] = None,
    flash_attn: Annotated[
        str, typer.Option("-fa", "--flash-attn", metavar="on|off|auto,..", help="For the rows other than none.")
    ] = "on,off",
    cpu_attn: options.CpuAttention = None,
    cache_type_k: Annotated[
        str, typer.Option("-ctk", "--cache-type-k", metavar="TYPE,..", help="Type of the cached keys.")
    ] = "f16",
    cache_type_v: Annotated[
        str, typer.Option("-ctv", "--cache-type-v", metavar="TYPE,..", help="Type of the cached values.")
    ] = "f16",
    warm_up: Annotated[bool, typer.Option("--warmup/--no-warmup", help="Measure once and forget it first.")] = True,
    form: Annotated[
        str, typer.Option("-o", "--output", metavar="md|csv|json|jsonl", help="Form of the result.")
    ] = "md",
    plot: options.Plot = None,
    verbose: options.Verbose = False,
) -> None:
    """Measure speed side by side: prompts, tokens, growing sequences, first tokens, latency.

    Every row's cache is alive at once, and the samples are taken in turns. The policy none is plain llama.cpp with the
    cache held at -d tokens. It runs with flash attention on and off, and the faster one is what the other rows are
    compared with: time of the row / time of the baseline. docs/benchmarks.md tells what each number means.
    """
    from equip_cli import native, plots
    from equip_cli.benchmark import records as made
    from equip_cli.benchmark import request as asked
    from equip_cli.benchmark import summary
    from equip_cli.random_gguf import shape_file

    if form not in _FORMS:
        raise UsageError(f"-o is {form!r}: give {', '.join(_FORMS[:-1])} or {_FORMS[-1]}")
    if fill not in ("copied", "read"):
        raise UsageError(f"--fill is {fill!r}: give copied or read")
    if model is not None and shape is not None:
        raise UsageError("give either a MODEL or --shape NAME[:TYPE]")
    if plot is not None:
        plots.check_target(plot)
    given = asked.with_preset(
        asked.Given(
            n_prompt,
            n_gen,
            depth,
            repetitions,
            policy,
            budget,
            update,
            positions,
            compare,
            shift_rope,
            upto,
            ttft,
            latency,
        ),
        preset,
    )
    sweeps = {
        "threads": [n if n and n > 0 else None for n in asked.numbers_or_none(threads, "-t")],
        "batch": asked.positive(asked.numbers_or_none(batch, "-b"), "-b"),
        "ubatch": asked.positive(asked.numbers_or_none(ubatch, "-ub"), "-ub"),
        "cpu_attn": cpu_attn,
        "type_k": asked.cache_types(cache_type_k),
        "type_v": asked.cache_types(cache_type_v),
    }
    choices = {
        "scope": scope,
        "rotate_every": rotate_every,
        "score_queries": score_queries,
        "evict_every": evict_every,
        "page_size": page_size,
    }
    request = asked.request(given, flash_attn, sweeps, choices, sinks, warm_up, fill == "copied")
    _warn_about(request)
    if shape is not None:
        output.note(f"using random weights of the shape {shape}")
        model = str(shape_file(shape))
    found: list[dict[str, Any]] = []
    interrupted = False
    with engine.load_model(model, gpu_layers, verbose=verbose) as loaded:
        machine = made.about_machine(native.load().info(), engine.parse_gpu_layers(gpu_layers))
        if request.upto and request.upto > loaded.n_ctx_train:
            output.note(
                f"none goes beyond the {loaded.n_ctx_train} tokens that the model was trained on: its speed counts, not its text"
            )
        try:
            _measure(loaded, request, machine, found)
        except KeyboardInterrupt:
            interrupted = True
            output.note("interrupted: the tables that were complete follow")
    _uneven(found)
    if compare or preset is not None:
        found += summary.baselines(found)
    found += summary.growth(found)
    if preset == "paper":
        found += summary.paper(found)
    if found:
        _print(found, form)
        if plot is not None:
            plots.bench_figure(found, plot)
    if interrupted:
        raise KeyboardInterrupt
