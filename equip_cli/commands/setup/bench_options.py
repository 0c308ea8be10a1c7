"""The options of `equip bench`, and what is measured for them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from equip_cli.commands.setup import policies, values
from equip_cli.commands.setup.declaring import CACHE, COMPUTE, MEASURES, number, numbers, option
from equip_cli.commands.setup.groups import ChoiceLists, several, shared
from equip_cli.commands.setup.presets import PRESETS, UPDATES
from equip_cli.core import limits
from equip_cli.core.errors import UsageError

if TYPE_CHECKING:
    from equip_cli.benchmark.jobs import Request
    from equip_cli.benchmark.rows import Settings


@dataclass(frozen=True)
class Measures:
    """What is measured, and how often."""

    shape: Annotated[
        str | None,
        option(
            "--shape",
            metavar="NAME[:TYPE],..",
            group=MEASURES,
            help="Random weights of real models' shapes instead of MODEL.",
        ),
    ] = None
    preset: Annotated[
        str | None,
        option(
            "--preset",
            metavar="quick|full|paper",
            group=MEASURES,
            help="Measurements that go together; other options win over it.",
        ),
    ] = None
    compare: Annotated[
        bool,
        option(
            "--compare",
            group=MEASURES,
            help="The policies beside none, context-shift, shift and gather. [--policy: streaming]",
        ),
    ] = False
    n_prompt: Annotated[
        str | None,
        numbers(
            "-p",
            "--n-prompt",
            limit=limits.TEST_TOKENS,
            group=MEASURES,
            help="Tokens of a prompt.",
            default="512 if no -n is given",
        ),
    ] = None
    n_gen: Annotated[
        str | None,
        numbers(
            "-n",
            "--n-gen",
            limit=limits.TEST_TOKENS,
            group=MEASURES,
            help="Tokens per sample.",
            default="128 if no -p is given",
        ),
    ] = None
    depth: Annotated[
        str | None,
        numbers(
            "-d",
            "--n-depth",
            metavar="D,..",
            limit=limits.DEPTH,
            group=MEASURES,
            help="Tokens read before.",
            default="the budget; none before a prompt",
        ),
    ] = None
    repetitions: Annotated[
        int | None,
        number(
            "-r",
            "--repetitions",
            limit=limits.REPETITIONS,
            group=MEASURES,
            help="Samples per row.",
            default="5",
        ),
    ] = None
    upto: Annotated[
        int | None,
        number(
            "--upto",
            limit=limits.UPTO,
            group=MEASURES,
            help="Time per token as a sequence grows to N tokens, and with a bounded cache.",
        ),
    ] = None
    fill: Annotated[
        str,
        option(
            "--fill",
            metavar="copied|read",
            group=MEASURES,
            help="How --upto reaches a length: copies of rows, or tokens read.",
        ),
    ] = "copied"
    ttft: Annotated[
        str | None,
        numbers(
            "--ttft",
            metavar="M,..",
            limit=limits.TTFT,
            group=MEASURES,
            help="Time to the first token of prompts of M times the budget.",
        ),
    ] = None
    latency: Annotated[
        int | None,
        number(
            "--latency",
            limit=limits.LATENCY,
            group=MEASURES,
            help="Time of each of N tokens in a row, with percentiles.",
        ),
    ] = None
    lanes: Annotated[
        str | None,
        numbers(
            "--lanes",
            metavar="L,..",
            limit=limits.LANES,
            group=MEASURES,
            help="Single tokens of L sequences in one batch: in one cache, and in a cache each.",
        ),
    ] = None
    warm_up: Annotated[
        bool, option("--warmup/--no-warmup", group=MEASURES, help="Measure once before, and drop that result.")
    ] = True


@dataclass(frozen=True)
class RowLists:
    """The rows: each policy with each budget."""

    policy: Annotated[
        str | None, option("--policy", metavar="NAME,..", group=CACHE, help="Policies to compare.", default="none")
    ] = None
    budget: Annotated[
        str | None,
        numbers(
            "--budget",
            metavar="B,..",
            limit=limits.ROW_BUDGET,
            group=CACHE,
            help="Budgets; each has rows of its own.",
            default="-d, else 1024",
        ),
    ] = None
    sinks: Annotated[int | None, shared("sinks")] = None


@dataclass(frozen=True)
class CacheLists:
    """The caches of each policy and budget."""

    shift_rope: Annotated[
        str | None,
        option(
            "--shift-rope",
            metavar="KERNEL,..",
            group=CACHE,
            help="RoPE kernel of the update shift: upstream, cached.",
            default="upstream",
        ),
    ] = None
    pool: Annotated[
        int | None,
        number(
            "--pool",
            limit=limits.POOL,
            group=CACHE,
            help="Most tokens of all lanes together, in a cache that they share.",
            default="a budget for each, as far as half of the free memory holds them",
        ),
    ] = None
    cache_type_k: Annotated[str, several("cache_type_k")] = "f16"
    cache_type_v: Annotated[str, several("cache_type_v")] = "f16"


@dataclass(frozen=True)
class ComputeLists:
    """What computes, and how."""

    threads: Annotated[str | None, several("threads")] = None
    gpu_layers: Annotated[str, shared("gpu_layers")] = "all"
    rpc: Annotated[str | None, shared("rpc")] = None
    other_lib: Annotated[
        str | None,
        option(
            "--other-lib",
            metavar="DIR,..",
            group=COMPUTE,
            help="Folders of other builds of the library, measured in turns with the installed one.",
        ),
    ] = None
    batch: Annotated[str | None, several("batch")] = None
    ubatch: Annotated[str | None, several("ubatch")] = None
    flash_attn: Annotated[str, several("flash_attn", "For the rows other than none.")] = "on,off"
    cpu_attn: Annotated[bool | None, shared("cpu_attn")] = None

    def libraries(self) -> dict[str, Path]:
        """The folders of `--other-lib` by the names that they get in the tables. Raises UsageError."""
        from equip_cli.core import native

        found: list[Path] = []
        for word in [] if self.other_lib is None else values.some_words(self.other_lib, "--other-lib"):
            folder, is_there = native.library_in(word)
            if not is_there:
                name = native.library_name("equip")
                raise UsageError(f"--other-lib is {word}, but there is no {name} in it: give the folder of a build")
            found.append(folder)
        return {f"other {i}" if len(found) > 1 else "other": folder for i, folder in enumerate(found, 1)}


@dataclass(frozen=True)
class Given:
    """The options as typed, None where a preset or a default holds."""

    measures: Measures
    rows: RowLists
    choices: ChoiceLists
    cache: CacheLists
    compute: ComputeLists


def with_preset(given: Given) -> Given:
    """The values of the preset where an option was not given, then what `--compare` implies. Raises UsageError."""
    name = given.measures.preset
    if name is not None and name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
    if name is not None:
        given = replace(
            given, **{each.name: _filled(getattr(given, each.name), vars(PRESETS[name])) for each in fields(given)}
        )
    if given.measures.compare:
        names = values.some_words("streaming" if given.rows.policy is None else given.rows.policy, "--policy")
        update = UPDATES if given.choices.update is None else given.choices.update
        given = replace(
            given,
            rows=replace(given.rows, policy=",".join(dict.fromkeys(["none", *names]))),
            choices=replace(given.choices, update=update),
        )
    return given


def _filled(group: Any, defaults: dict[str, Any]) -> Any:
    """`group` with these values where it has none."""
    return replace(
        group, **{key: defaults[key] for key, value in vars(group).items() if value is None and key in defaults}
    )


def _tests(given: Measures) -> tuple[list[int], list[int]]:
    """Prompts and tokens to generate, as llama-bench has them: 512 and 128 if none is given; where one is, the other is not
    measured, and neither is beside a sequence that grows, first tokens or latencies alone."""
    prompts = _numbers(given.n_prompt, "-p", limits.TEST_TOKENS)
    tokens = _numbers(given.n_gen, "-n", limits.TEST_TOKENS)
    if given.n_prompt is None and given.n_gen is None and not (given.upto or given.ttft or given.latency):
        if given.lanes is not None:
            return [], [16]
        prompts, tokens = ([] if given.compare else [512]), [64 if given.compare else 128]
    if given.compare and given.n_gen is None and not tokens:
        tokens = [64]
    return [n for n in prompts if n], [n for n in tokens if n]


def _numbers(text: str | None, option: str, limit: limits.Limit) -> list[int]:
    """A comma list, empty where the option was not given. Raises UsageError."""
    return [] if text is None else values.numbers(text, option, limit)


def _settings(given: Given) -> list[Settings]:
    """Every combination of threads, batches and types. Raises UsageError."""
    from equip_cli.benchmark.rows import Settings

    measures, compute = given.measures, given.compute
    kernels = values.some_words(
        "upstream" if given.cache.shift_rope is None else given.cache.shift_rope, "--shift-rope"
    )
    if set(kernels) - {"upstream", "cached"}:
        raise UsageError(f"--shift-rope is {given.cache.shift_rope!r}: give upstream, cached or both")
    axes: tuple[Sequence[Any], ...] = (
        values.numbers_or_none(compute.threads, "-t", limits.THREADS),
        values.numbers_or_none(compute.batch, "-b", limits.BATCH),
        values.numbers_or_none(compute.ubatch, "-ub", limits.UBATCH),
        values.cache_types(given.cache.cache_type_k, "-ctk"),
        values.cache_types(given.cache.cache_type_v, "-ctv"),
    )
    return [
        Settings(
            n_gen=0,
            repetitions=5 if measures.repetitions is None else measures.repetitions,
            n_threads=threads,
            n_batch=batch,
            n_ubatch=ubatch,
            type_k=type_k,
            type_v=type_v,
            warm_up=measures.warm_up,
            shift_rope=tuple(dict.fromkeys(kernels)),
            cpu_attn=compute.cpu_attn,
        )
        for threads, batch, ubatch, type_k, type_v in itertools.product(*axes)
    ]


def request(given: Given) -> Request:
    """All options together, checked against each other and against the library's policies. Raises UsageError, BudgetError."""
    from equip_cli.benchmark.jobs import Request

    measures, rows = given.measures, given.rows
    settings = _settings(given)
    prompts, tokens = _tests(measures)
    depths = values.numbers_or_none(measures.depth, "-d", limits.DEPTH)
    only = depths[0] if len(depths) == 1 else None
    budgets = _numbers(rows.budget, "--budget", limits.ROW_BUDGET) or [only or 1024]
    modes = [values.parse_flash_attention(word) for word in values.some_words(given.compute.flash_attn, "-fa")]
    wanted = policies.cache_policies(
        "none" if rows.policy is None else rows.policy, budgets=budgets, sinks=[rows.sinks], **asdict(given.choices)
    )
    multiples = _numbers(measures.ttft, "--ttft", limits.TTFT)
    lanes = _numbers(measures.lanes, "--lanes", limits.LANES)
    if given.cache.pool is not None and not lanes:
        raise UsageError("--pool is for several sequences: give --lanes too")
    if not wanted or not (prompts or tokens or measures.upto or multiples or measures.latency):
        raise UsageError("there is nothing to measure: name a policy, a budget, a test and a mode of flash attention")
    if multiples and max(multiples) * max(budgets) > limits.TEST_TOKENS.high:
        raise UsageError(
            f"--ttft is {measures.ttft}: {max(multiples)} times a budget of {max(budgets)} is more than the "
            f"{limits.TEST_TOKENS.high} tokens that a prompt may have, so lower one of them"
        )
    if measures.upto and measures.upto < max(budgets):
        raise UsageError(f"--upto is {measures.upto}: give at least the budget, {max(budgets)}")
    return Request(
        wanted,
        budgets,
        modes,
        settings,
        prompts,
        tokens,
        depths,
        measures.upto,
        min(tokens, default=16),
        measures.fill == "copied",
        multiples,
        measures.latency,
        lanes or (0,),
        given.cache.pool,
    )
