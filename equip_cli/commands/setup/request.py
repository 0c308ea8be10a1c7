"""From the options of `equip bench` to what is measured."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from equip_cli.benchmark.jobs import Request
from equip_cli.benchmark.rows import Settings
from equip_cli.commands.setup import engine
from equip_cli.commands.setup.presets import PRESETS, UPDATES, Preset
from equip_cli.core import limits, native
from equip_cli.core.errors import UsageError
from equip_cli.core.policy import CACHE_TYPES


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
        names = engine.some_words("streaming" if given.policy is None else given.policy, "--policy")
        update = UPDATES if given.update is None else given.update
        given = replace(given, policy=",".join(dict.fromkeys(["none", *names])), update=update)
    return given


def _tests(given: Given) -> tuple[list[int], list[int]]:
    """Prompts and tokens to generate, as llama-bench has them: 512 and 128 if none is given; where one is, the other is not
    measured, and neither is beside a sequence that grows, first tokens or latencies alone."""
    prompts = _numbers(given.n_prompt, "-p", limits.TEST_TOKENS)
    tokens = _numbers(given.n_gen, "-n", limits.TEST_TOKENS)
    if given.n_prompt is None and given.n_gen is None and not (given.upto or given.ttft or given.latency):
        prompts, tokens = ([] if given.compare else [512]), [64 if given.compare else 128]
    if given.compare and given.n_gen is None and not tokens:
        tokens = [64]
    return [n for n in prompts if n], [n for n in tokens if n]


def _numbers(text: str | None, option: str, limit: limits.Limit) -> list[int]:
    """A comma list, empty where the option was not given. Raises UsageError."""
    return [] if text is None else engine.numbers(text, option, limit)


def cache_types(text: str, option: str) -> list[str]:
    """A comma list of types of K or V. Raises UsageError."""
    types = engine.some_words(text, option)
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

    sweeps: `engine.numbers_or_none()` of -t, -b and -ub, the cache types, and cpu_attn; choices: other options of
    `engine.cache_policies()`. Raises UsageError, BudgetError.
    """
    prompts, tokens = _tests(given)
    depths = engine.numbers_or_none(given.depth, "-d", limits.DEPTH)
    only = depths[0] if len(depths) == 1 else None
    budgets = _numbers(given.budget, "--budget", limits.ROW_BUDGET) or [only or 1024]
    modes = [engine.parse_flash_attention(word) for word in engine.some_words(flash_attn, "-fa")]
    policies = engine.cache_policies(
        given.policy if given.policy is not None else "none",
        budgets=budgets,
        sinks=[sinks],
        positions=given.positions,
        update=given.update,
        **choices,
    )
    multiples = _numbers(given.ttft, "--ttft", limits.TTFT)
    if not policies or not (prompts or tokens or given.upto or multiples or given.latency):
        raise UsageError("there is nothing to measure: name a policy, a budget, a test and a mode of flash attention")
    if multiples and max(multiples) * max(budgets) > limits.TEST_TOKENS.high:
        raise UsageError(
            f"--ttft is {given.ttft}: {max(multiples)} times a budget of {max(budgets)} is more than the "
            f"{limits.TEST_TOKENS.high} tokens that a prompt may have, so lower one of them"
        )
    if given.upto and given.upto < max(budgets):
        raise UsageError(f"--upto is {given.upto}: give at least the budget, {max(budgets)}")
    kernels = engine.some_words("upstream" if given.shift_rope is None else given.shift_rope, "--shift-rope")
    if set(kernels) - {"upstream", "cached"}:
        raise UsageError(f"--shift-rope is {given.shift_rope!r}: give upstream, cached or both")
    for policy in policies:
        policy.check_known(native.load().policies())
    axes = (sweeps["threads"], sweeps["batch"], sweeps["ubatch"], sweeps["type_k"], sweeps["type_v"])
    settings = [
        Settings(
            n_gen=0,
            repetitions=5 if given.repetitions is None else given.repetitions,
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
