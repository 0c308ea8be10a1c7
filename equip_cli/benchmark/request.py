"""From the options of `equip bench` to what is measured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from equip_cli import engine, native
from equip_cli.benchmark.jobs import Request
from equip_cli.benchmark.presets import PRESETS, UPDATES, Preset
from equip_cli.benchmark.rows import Settings
from equip_cli.errors import UsageError
from equip_cli.policy import CACHE_TYPES


@dataclass(frozen=True)
class Given:
    """The options as typed, None where a preset or a default holds."""

    n_prompt: str | None
    n_gen: str | None
    depth: str | None
    repetitions: int | None
    policy: str | None
    budget: str | None
    update: str | None
    positions: str | None
    compare: bool
    shift_rope: str | None
    upto: int | None
    ttft: str | None
    latency: int | None


def _preset(name: str | None) -> Preset | None:
    if name is not None and name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name] if name is not None else None


def with_preset(given: Given, name: str | None) -> Given:
    """The values of the preset of this name where an option was not given, then what `--compare` implies. Raises UsageError."""
    preset = _preset(name)
    if preset is not None:
        given = replace(given, **{key: value for key, value in vars(preset).items() if getattr(given, key) is None})
    if given.compare:
        names = engine.words(given.policy or "streaming")
        given = replace(given, policy=",".join(dict.fromkeys(["none", *names])), update=given.update or UPDATES)
    return given


def _tests(given: Given) -> tuple[list[int], list[int]]:
    """Prompts and tokens to generate, as llama-bench has them: 512 and 128 if none is given; where one is, the other is not
    measured, and neither is beside a sequence that grows, first tokens or latencies alone."""
    prompts = engine.numbers(given.n_prompt or "", "-p")
    tokens = engine.numbers(given.n_gen or "", "-n")
    if given.n_prompt is None and given.n_gen is None and not (given.upto or given.ttft or given.latency):
        prompts, tokens = ([] if given.compare else [512]), [64 if given.compare else 128]
    if given.compare and given.n_gen is None and not tokens:
        tokens = [64]
    if any(n < 0 for n in [*prompts, *tokens]):
        raise UsageError("-p and -n are numbers of tokens: give 0 (not measured) or more")
    return [n for n in prompts if n], [n for n in tokens if n]


def numbers_or_none(text: str | None, option: str) -> Sequence[int | None]:
    """A comma list, or the one value None where the option was not given. Raises UsageError."""
    return [None] if text is None else engine.numbers(text, option)


def positive(values: Sequence[int | None], option: str) -> Sequence[int | None]:
    """The values, if none is below 1. Raises UsageError."""
    if any(value is not None and value < 1 for value in values):
        raise UsageError(f"{option} is a list of numbers from 1 on")
    return values


def cache_types(text: str) -> list[str]:
    """A comma list of types of K or V. Raises UsageError."""
    types = engine.words(text)
    for name in types:
        if name not in CACHE_TYPES:
            raise UsageError(f"there is no cache type {name!r}: choose one of {', '.join(CACHE_TYPES)}")
    return types


def request(
    given: Given,
    flash_attn: str,
    sweeps: dict[str, Any],
    choices: dict[str, str | None],
    sinks: int | None,
    warm_up: bool,
    copied: bool,
) -> Request:
    """All options together, checked against each other and against the library's policies.

    sweeps: `numbers_or_none()` of -t, -b and -ub, the cache types, and cpu_attn; choices: other options of
    `engine.cache_policies()`. Raises UsageError, BudgetError.
    """
    prompts, tokens = _tests(given)
    depths = positive(numbers_or_none(given.depth, "-d"), "-d")
    only = depths[0] if len(depths) == 1 else None
    budgets = engine.numbers(given.budget, "--budget") if given.budget is not None else [only or 1024]
    modes = [engine.parse_flash_attention(word) for word in engine.words(flash_attn)]
    policies = engine.cache_policies(
        given.policy if given.policy is not None else "none",
        budgets=budgets,
        sinks=[sinks],
        positions=given.positions,
        update=given.update or None,
        **choices,
    )
    multiples = engine.numbers(given.ttft or "", "--ttft")
    if 0 in budgets:
        raise UsageError("--budget is 0: give the number of tokens here")
    if not policies or not modes or not budgets or not (prompts or tokens or given.upto or multiples or given.latency):
        raise UsageError("there is nothing to measure: name a policy, a budget, a test and a mode of flash attention")
    if any(multiple < 1 for multiple in multiples):
        raise UsageError("--ttft is a list of multiples of the budget, from 1 on")
    if given.upto and given.upto < max(256, *budgets):
        raise UsageError(f"--upto is {given.upto}: give 256 or more, and at least the budget")
    kernels = engine.words(given.shift_rope or "upstream")
    if not kernels or set(kernels) - {"upstream", "cached"}:
        raise UsageError(f"--shift-rope is {given.shift_rope!r}: give upstream, cached or both")
    for policy in policies:
        policy.check_known(native.load().policies())
    axes = (sweeps["threads"], sweeps["batch"], sweeps["ubatch"], sweeps["type_k"], sweeps["type_v"])
    settings = [
        Settings(
            n_gen=0,
            repetitions=given.repetitions or 5,
            n_threads=threads,
            n_batch=batch,
            n_ubatch=ubatch,
            type_k=type_k,
            type_v=type_v,
            warm_up=warm_up,
            shift_rope=tuple(dict.fromkeys(kernels)),
            cpu_attn=sweeps["cpu_attn"],
        )
        for threads, batch, ubatch, type_k, type_v in itertools.product(*axes)
    ]
    return Request(
        policies,
        budgets,
        modes,
        settings,
        prompts,
        tokens,
        depths,
        given.upto,
        min(tokens, default=16),
        copied,
        multiples,
        given.latency,
    )
