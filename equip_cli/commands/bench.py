"""equip bench: speed, side by side."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from equip_cli.commands.setup import loading
from equip_cli.commands.setup.bench_options import CacheLists, ComputeLists, Given, Measures, RowLists, with_preset
from equip_cli.commands.setup.bench_options import request as to_measure
from equip_cli.commands.setup.declaring import OUTPUT, expanded, option
from equip_cli.commands.setup.groups import ChoiceLists, ModelArgument, Verbose
from equip_cli.commands.setup.values import parse_gpu_layers, some_words
from equip_cli.core.errors import UsageError
from equip_cli.terminal import output

if TYPE_CHECKING:
    from equip_cli.benchmark.jobs import Request, Table

Record = dict[str, Any]

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


class _Progress:
    """The bar of one model's tables."""

    def __init__(self, request: Request) -> None:
        from equip_cli.benchmark.jobs import jobs

        self._bar = output.Progress("measuring", max(sum(job.work() for job in jobs(request)), 1))

    def __enter__(self) -> Callable[[float], None]:
        return self._bar.advance

    def __exit__(self, *_: object) -> None:
        self._bar.done()


def _tables(
    model: str | None, request: Request, compute: ComputeLists, verbose: bool, first_sample: int
) -> Iterator[Table]:
    """The tables of one model, with the installed library, or with others in turns."""
    from equip_cli.benchmark import jobs, libraries
    from equip_cli.benchmark.records import about_machine
    from equip_cli.core import native

    def begin(n_ctx_train: int) -> None:
        if request.upto and request.upto > n_ctx_train:
            output.note(
                f"none goes beyond the {n_ctx_train} tokens that the model was trained on: its speed counts, not its text"
            )

    n_gpu_layers = parse_gpu_layers(compute.gpu_layers)
    others = compute.libraries()
    if others and compute.rpc is not None:
        raise UsageError("--rpc and --other-lib exclude each other: a worker serves one program at a time")
    if others:
        task = libraries.Task(loading.checked_path(model), n_gpu_layers, request, verbose)
        with _Progress(request) as advance:
            yield from libraries.measured_in_turns(others, task, advance, begin, first_sample)
        return
    with loading.load_model(model, compute.gpu_layers, rpc=compute.rpc, verbose=verbose) as loaded:
        begin(loaded.n_ctx_train)
        machine = about_machine(native.load().info(), n_gpu_layers)
        with _Progress(request) as advance:
            yield from jobs.measured(loaded, request, machine, advance, first_sample)


def _shape_files(shapes: Sequence[str]) -> Iterator[str]:
    """Random weights of each shape, written when its turn comes."""
    from equip_cli.models.random_gguf import shape_file

    for shape in shapes:
        output.note(f"using random weights of the shape {shape}")
        yield str(shape_file(shape))


def _measure(
    models: Iterable[str | None], request: Request, compute: ComputeLists, verbose: bool, records: list[Record]
) -> None:
    """Append the records as their tables are done."""
    for model in models:
        first_sample = 1 + max((n for record in records for n in record["sample_order"]), default=-1)
        for table in _tables(model, request, compute, verbose, first_sample):
            for text in table.refused:
                output.warn(f"not measured: {text}")
            records += [record for _, record in table.rows]


def _text(records: Sequence[Record], form: str) -> str:
    from equip_cli.benchmark import tables

    if form == "json":
        return json.dumps(records, ensure_ascii=False, indent=2) + "\n"
    if form == "jsonl":
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return tables.as_csv(records) if form == "csv" else tables.markdown(records)


def _recorded(path: str, form: str, plot: str | None) -> None:
    """Print what was measured before. Raises UsageError for a file of something else."""
    from equip_cli import plots
    from equip_cli.benchmark import records as made

    found = made.read(path)
    try:
        text = _text(found, form)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise made.not_records(path) from None
    output.result(text)
    if plot is not None:
        plots.bench_figure(found, plot)


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
    recorded: Annotated[
        str | None,
        option("--from", metavar="FILE", group=OUTPUT, help="Measure nothing: print what an earlier -o json holds."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Measure speed side by side: prompts, tokens, growing sequences, first tokens, latency.

    Every row's cache is alive at once, and the samples are taken in turns. The policy none is plain llama.cpp with the
    cache held at -d tokens. It runs with flash attention on and off, and the faster one is what the other rows are
    compared with: time of the row / time of the baseline. docs/benchmarks.md tells what each number means.
    """
    from equip_cli import plots
    from equip_cli.benchmark import summary
    from equip_cli.models.shapes import parse_shape

    if form not in _FORMS:
        raise UsageError(f"-o is {form!r}: give {', '.join(_FORMS[:-1])} or {_FORMS[-1]}")
    if measures.fill not in ("copied", "read"):
        raise UsageError(f"--fill is {measures.fill!r}: give copied or read")
    if model is not None and measures.shape is not None:
        raise UsageError("give either a MODEL or --shape NAME[:TYPE]")
    if plot is not None:
        plots.check_target(plot)
    given = Given(measures, rows, choices, cache, compute)
    if recorded is not None:
        if model is not None or given != Given(Measures(), RowLists(), ChoiceLists(), CacheLists(), ComputeLists()):
            raise UsageError("--from measures nothing: give it no other options than -o and --plot")
        _recorded(recorded, form, plot)
        return
    request = to_measure(with_preset(given))
    compute.libraries()
    shapes = [] if measures.shape is None else list(dict.fromkeys(some_words(measures.shape, "--shape")))
    for shape in shapes:
        parse_shape(shape)
    _warn_about(request)
    found: list[Record] = []
    interrupted = False
    try:
        _measure(_shape_files(shapes) if shapes else [model], request, compute, verbose, found)
    except KeyboardInterrupt:
        interrupted = True
        if found:
            output.note("interrupted: the tables that were complete follow")
    _uneven(found)
    measured = list(found)
    if measures.compare or measures.preset is not None:
        found += summary.of_each(measured, summary.baselines)
    found += summary.of_each(measured, summary.growth)
    if measures.preset == "paper":
        found += summary.of_each(measured, summary.paper)
    if found:
        output.result(_text(found, form))
        if plot is not None:
            plots.bench_figure(found, plot)
    if interrupted:
        raise KeyboardInterrupt
