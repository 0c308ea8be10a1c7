"""equip bench: speed, side by side."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from equip_cli.commands.setup import loading
from equip_cli.commands.setup.bench_options import CacheLists, ComputeLists, Given, Measures, RowLists, with_preset
from equip_cli.commands.setup.bench_options import request as to_measure
from equip_cli.commands.setup.declaring import OUTPUT, expanded, option
from equip_cli.commands.setup.groups import ChoiceLists, ModelArgument, Verbose
from equip_cli.commands.setup.values import parse_gpu_layers
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


@expanded
def bench(
    *,
    model: ModelArgument = None,
    measures: Measures,
    rows: RowLists,
    choices: ChoiceLists,
    cache: CacheLists,
    compute: ComputeLists,
    form: Annotated[
        str, option("-o", "--output", metavar="md|csv|json|jsonl", group=OUTPUT, help="Form of the result.")
    ] = "md",
    plot: Annotated[
        str | None,
        option("--plot", metavar="FILE.png|svg|-", group=OUTPUT, help="Draw it, into a file or on the terminal."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Measure speed side by side: prompts, tokens, growing sequences, first tokens, latency.

    Every row's cache is alive at once, and the samples are taken in turns. The policy none is plain llama.cpp with the
    cache held at -d tokens. It runs with flash attention on and off, and the faster one is what the other rows are
    compared with: time of the row / time of the baseline. docs/benchmarks.md tells what each number means.
    """
    from equip_cli import plots
    from equip_cli.benchmark import records as made
    from equip_cli.benchmark import summary
    from equip_cli.core import native
    from equip_cli.models.random_gguf import shape_file

    if form not in _FORMS:
        raise UsageError(f"-o is {form!r}: give {', '.join(_FORMS[:-1])} or {_FORMS[-1]}")
    if measures.fill not in ("copied", "read"):
        raise UsageError(f"--fill is {measures.fill!r}: give copied or read")
    if model is not None and measures.shape is not None:
        raise UsageError("give either a MODEL or --shape NAME[:TYPE]")
    if plot is not None:
        plots.check_target(plot)
    request = to_measure(with_preset(Given(measures, rows, choices, cache, compute)))
    _warn_about(request)
    if measures.shape is not None:
        output.note(f"using random weights of the shape {measures.shape}")
        model = str(shape_file(measures.shape))
    found: list[dict[str, Any]] = []
    interrupted = False
    with loading.load_model(model, compute.gpu_layers, verbose=verbose) as loaded:
        machine = made.about_machine(native.load().info(), parse_gpu_layers(compute.gpu_layers))
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
    if measures.compare or measures.preset is not None:
        found += summary.baselines(found)
    found += summary.growth(found)
    if measures.preset == "paper":
        found += summary.paper(found)
    if found:
        _print(found, form)
        if plot is not None:
            plots.bench_figure(found, plot)
    if interrupted:
        raise KeyboardInterrupt
