"""equip check: whether this machine's backend computes what it should."""

from __future__ import annotations

from itertools import cycle, islice
from typing import TYPE_CHECKING, Annotated

import typer

from equip_cli.commands.setup import loading
from equip_cli.commands.setup.declaring import CACHE, MEASURES, expanded, number, option
from equip_cli.commands.setup.groups import DeviceOptions, JsonList, ModelArgument, Verbose
from equip_cli.commands.setup.values import parse_gpu_layers, some_words
from equip_cli.core import limits
from equip_cli.core.errors import UnsupportedModelError, UsageError
from equip_cli.models import embedded
from equip_cli.terminal import output

if TYPE_CHECKING:
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
    if not others or parse_gpu_layers(gpu_layers) == 0:
        return "CPU", True
    return "+".join(others), False


@expanded
def check(
    *,
    model: ModelArgument = None,
    budget: Annotated[
        int | None,
        number(
            "--budget",
            metavar="B",
            limit=limits.CHECK_BUDGET,
            group=CACHE,
            help="Most tokens kept.",
            default="min(256, half the trained context)",
        ),
    ] = None,
    n_evictions: Annotated[
        int | None,
        number(
            "-n",
            "--evictions",
            limit=limits.EVICTIONS,
            group=MEASURES,
            help="Evictions per row.",
            default="64 to 384, as time allows",
        ),
    ] = None,
    update: Annotated[
        str,
        option("--update", metavar="HOW,..", group=CACHE, help="What inplace is compared with."),
    ] = "shift,gather",
    machine: DeviceOptions,
    as_json: JsonList = False,
    verbose: Verbose = False,
) -> None:
    """Check that this machine computes what it should, in about 30 seconds.

    The same tokens go through the updates inplace, shift and gather on the loaded backend, and through inplace on the CPU,
    with three types of cache; and through h2o, a policy that reads attention weights, with one of them. They must keep the
    right tokens and give the same logits. The table is made to be pasted into an issue. The exit code is 1 if something
    differs.
    """
    from equip_cli import __version__
    from equip_cli.checking.measure import run
    from equip_cli.checking.rows import CACHES, SCORED, UPDATES, Settings
    from equip_cli.checking.tables import markdown, record
    from equip_cli.core import native
    from equip_cli.core.model import Model

    updates = some_words(update, "--update")
    unknown = [word for word in updates if word not in UPDATES]
    if unknown:
        raise UsageError(f"there is no update {unknown[0]!r}: choose of {', '.join(UPDATES)}")
    with loading.load_model(model, machine.gpu_layers, rpc=machine.rpc, verbose=verbose) as loaded:
        device, on_cpu = _device(machine.gpu_layers)
        supports = loaded.info["supports"]
        rules = supports["positions"]
        settings = Settings(
            budget=_budget(loaded, budget),
            positions="cache" if "cache" in rules or not rules else "true",
            updates=updates,
            n_evictions=n_evictions,
            n_threads=machine.threads,
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
        records = [record(row, __version__, about, loaded, settings) for row in rows]
    if as_json:
        output.result_json(records)
    else:
        output.result(markdown(records, native.load().processor()))
    if not all(record["passed"] in (True, None) for record in records):
        raise typer.Exit(1)
