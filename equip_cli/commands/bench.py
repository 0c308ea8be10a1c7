"""equip bench: speed, side by side."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from equip_cli.commands.setup import engine, options
from equip_cli.core import limits
from equip_cli.core.errors import UsageError
from equip_cli.terminal import output

if TYPE_CHECKING:
    from equip_cli.benchmark.jobs import Request
    from equip_cli.core.model import Model

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
        options.option(
            "--shape",
            metavar="NAME[:TYPE]",
            group=options.MEASURES,
            help="Random weights of a real model's shape instead of MODEL.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        options.option(
            "--preset",
            metavar="quick|full|paper",
            group=options.MEASURES,
            help="Measurements that go together; other options win over it.",
        ),
    ] = None,
    compare: Annotated[
        bool,
        options.option(
            "--compare",
            group=options.MEASURES,
            help="The policies beside none, context-shift, shift and gather. [--policy: streaming]",
        ),
    ] = False,
    n_prompt: Annotated[
        str | None,
        options.numbers(
            "-p",
            "--n-prompt",
            limit=limits.TEST_TOKENS,
            group=options.MEASURES,
            help="Tokens of a prompt.",
            default="512 if no -n is given",
        ),
    ] = None,
    n_gen: Annotated[
        str | None,
        options.numbers(
            "-n",
            "--n-gen",
            limit=limits.TEST_TOKENS,
            group=options.MEASURES,
            help="Tokens per sample.",
            default="128 if no -p is given",
        ),
    ] = None,
    depth: Annotated[
        str | None,
        options.numbers(
            "-d",
            "--n-depth",
            metavar="D,..",
            limit=limits.DEPTH,
            group=options.MEASURES,
            help="Tokens read before.",
            default="the budget; none before a prompt",
        ),
    ] = None,
    repetitions: Annotated[
        int | None,
        options.number(
            "-r",
            "--repetitions",
            limit=limits.REPETITIONS,
            group=options.MEASURES,
            help="Samples per row.",
            default="5",
        ),
    ] = None,
    upto: Annotated[
        int | None,
        options.number(
            "--upto",
            limit=limits.UPTO,
            group=options.MEASURES,
            help="Time per token as a sequence grows to N tokens, and with a bounded cache.",
        ),
    ] = None,
    fill: Annotated[
        str,
        options.option(
            "--fill",
            metavar="copied|read",
            group=options.MEASURES,
            help="How --upto reaches a length: copies of rows, or tokens read.",
        ),
    ] = "copied",
    ttft: Annotated[
        str | None,
        options.numbers(
            "--ttft",
            metavar="M,..",
            limit=limits.TTFT,
            group=options.MEASURES,
            help="Time to the first token of prompts of M times the budget.",
        ),
    ] = None,
    latency: Annotated[
        int | None,
        options.number(
            "--latency",
            limit=limits.LATENCY,
            group=options.MEASURES,
            help="Time of each of N tokens in a row, with percentiles.",
        ),
    ] = None,
    warm_up: Annotated[
        bool,
        options.option("--warmup/--no-warmup", group=options.MEASURES, help="Measure once and forget it first."),
    ] = True,
    policy: Annotated[
        str | None,
        options.option("--policy", metavar="NAME,..", group=options.CACHE, help="Policies to compare.", default="none"),
    ] = None,
    budget: Annotated[
        str | None,
        options.numbers(
            "--budget",
            metavar="B,..",
            limit=limits.ROW_BUDGET,
            group=options.CACHE,
            help="Budgets; each has rows of its own.",
            default="-d, else 1024",
        ),
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
        options.option(
            "--update",
            metavar="HOW,..",
            group=options.CACHE,
            help="inplace, shift, gather; context-shift with none.",
            default="inplace",
        ),
    ] = None,
    shift_rope: Annotated[
        str | None,
        options.option(
            "--shift-rope",
            metavar="KERNEL,..",
            group=options.CACHE,
            help="RoPE kernel of the update shift: upstream, cached.",
            default="upstream",
        ),
    ] = None,
    cache_type_k: options.CacheTypeKList = "f16",
    cache_type_v: options.CacheTypeVList = "f16",
    threads: options.ThreadsList = None,
    gpu_layers: options.GpuLayers = "all",
    batch: options.BatchList = None,
    ubatch: options.UbatchList = None,
    flash_attn: Annotated[
        str,
        options.option(
            "-fa",
            "--flash-attn",
            metavar="on|off|auto,..",
            group=options.COMPUTE,
            help="For the rows other than none.",
        ),
    ] = "on,off",
    cpu_attn: options.CpuAttention = None,
    form: Annotated[
        str,
        options.option("-o", "--output", metavar="md|csv|json|jsonl", group=options.OUTPUT, help="Form of the result."),
    ] = "md",
    plot: options.Plot = None,
    verbose: options.Verbose = False,
) -> None:
    """Measure speed side by side: prompts, tokens, growing sequences, first tokens, latency.

    Every row's cache is alive at once, and the samples are taken in turns. The policy none is plain llama.cpp with the
    cache held at -d tokens. It runs with flash attention on and off, and the faster one is what the other rows are
    compared with: time of the row / time of the baseline. docs/benchmarks.md tells what each number means.
    """
    from equip_cli import plots
    from equip_cli.benchmark import records as made
    from equip_cli.benchmark import summary
    from equip_cli.commands.setup import request as asked
    from equip_cli.core import native
    from equip_cli.models.random_gguf import shape_file

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
        "threads": engine.numbers_or_none(threads, "-t", limits.THREADS),
        "batch": engine.numbers_or_none(batch, "-b", limits.BATCH),
        "ubatch": engine.numbers_or_none(ubatch, "-ub", limits.UBATCH),
        "cpu_attn": cpu_attn,
        "type_k": asked.cache_types(cache_type_k, "-ctk"),
        "type_v": asked.cache_types(cache_type_v, "-ctv"),
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
