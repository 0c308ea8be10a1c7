"""What a command asks for, cut into tables whose rows are measured together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from equip_cli.benchmark import measure, modes
from equip_cli.benchmark.records import Record, record
from equip_cli.benchmark.rows import Row, Settings, plan
from equip_cli.core.policy import CONTEXT_SHIFT, CachePolicy

if TYPE_CHECKING:
    from equip_cli.core.model import Model


@dataclass(frozen=True)
class Request:
    """Everything that `equip bench` can be asked for at once.

    policies: `none` holds for every budget; budgets, flash_attn: of the bounded rows.
    settings: with their n_gen for single tokens. n_prompts, n_gens, depths: sweeps of tables; upto, ttft, latency: the
    longest sequence of a growing one, prompts in multiples of the budget, tokens in a row; None or () = not asked for.
    growth_n: tokens per sample where the sequence grows. lanes: sequences in one batch, of single tokens and of growing sequences,
    0 = a single session; pool: tokens that those of a bounded row keep together, None = as many as the library thinks right.
    """

    policies: Sequence[CachePolicy]
    budgets: Sequence[int]
    flash_attn: Sequence[str]
    settings: Sequence[Settings]
    n_prompts: Sequence[int] = ()
    n_gens: Sequence[int] = ()
    depths: Sequence[int | None] = (None,)
    upto: int | None = None
    growth_n: int = 16
    copied: bool = True
    ttft: Sequence[int] = ()
    latency: int | None = None
    lanes: Sequence[int] = (0,)
    pool: int | None = None

    def of_budget(self, budget: int) -> list[CachePolicy]:
        """The policies of one budget's table."""
        return [each for each in self.policies if each.budget == budget or (each.name == "none" and not each.budget)]


@dataclass
class Job:
    """One table. rows: planned ones, but for a growing sequence, whose rows come with its lengths."""

    kind: str
    settings: Settings
    rows: list[Row] = field(default_factory=list)
    policies: Sequence[CachePolicy] = ()
    flash_attn: Sequence[str] = ()
    upto: int = 0
    copied: bool = True

    def work(self) -> float:
        """What `run()` does, in tokens generated."""
        if self.kind == "growth":
            n_rows = sum(2 if each.name == "none" else len(self.flash_attn) for each in self.policies)
            return modes.growth_work(n_rows, self.settings, self.upto, self.copied)
        once = replace(self.settings, repetitions=1) if self.kind == "latency" else self.settings
        return measure.work(self.rows, once)

    def run(self, model: Model, first_sample: int, advance: measure.Advance) -> tuple[list[list[Row]], int]:
        """Measure; returns groups of rows that were measured in turns, and the index of the next sample."""
        if self.kind == "growth":
            return modes.growth(
                model,
                self.policies,
                self.flash_attn,
                self.settings,
                self.upto,
                copied=self.copied,
                first_sample=first_sample,
                advance=advance,
            )
        call = modes.latency if self.kind == "latency" else measure.run
        return [self.rows], call(model, self.rows, self.settings, first_sample, advance)


def _flash_attn(request: Request, settings: Settings) -> list[str]:
    """Quantised values need flash attention, so `off` is left out beside another mode."""
    modes_ = list(request.flash_attn)
    whole = settings.type_v in ("f32", "f16", "bf16")
    return modes_ if whole or modes_ == ["off"] else [mode for mode in modes_ if mode != "off"]


def jobs(request: Request) -> Iterator[Job]:
    """The tables of a request, in the order in which they are measured."""
    for settings in request.settings:
        flash_attn = _flash_attn(request, settings)
        for budget in request.budgets:
            policies = request.of_budget(budget)
            for n, depth in itertools.product(request.n_prompts, request.depths):
                each = replace(settings, n_prompt=n, n_gen=0, depth=depth)
                prompts = [policy for policy in policies if policy.update != CONTEXT_SHIFT]
                yield Job("pp", each, plan(prompts, flash_attn, each, budget, "pp"))
            for n, depth, lanes in itertools.product(request.n_gens, request.depths, request.lanes):
                each = replace(settings, n_gen=n, depth=depth, lanes=lanes, pool=request.pool)
                yield Job("tg", each, plan(policies, flash_attn, each, budget))
            if request.latency:
                each = replace(settings, n_gen=request.latency, depth=None)
                yield Job("latency", each, plan(policies, flash_attn, each, budget, "latency"))
            for multiple in request.ttft:
                # the first prompt is the slowest that a user sees, and the ways for a token to go differ little
                each = replace(
                    settings,
                    n_prompt=multiple * budget,
                    n_gen=0,
                    repetitions=min(settings.repetitions, 2),
                    warm_up=False,
                )
                prompts = [policy for policy in policies if policy.update in (None, "inplace")]
                yield Job("ttft", each, plan(prompts, flash_attn, each, budget, "ttft"))
        for lanes in request.lanes if request.upto else ():
            each = replace(
                settings,
                n_gen=request.growth_n,
                repetitions=min(settings.repetitions, 5),
                lanes=lanes,
                pool=request.pool,
            )
            assert request.upto is not None
            grown = [policy for policy in request.policies if policy.update in (None, "inplace")]
            yield Job("growth", each, [], grown, flash_attn, request.upto, request.copied)


@dataclass
class Table:
    """What was measured in turns. rows: each with its label; refused: `label: why` of those that could not be measured."""

    rows: list[tuple[str, Record]]
    refused: list[str]


def measured(
    model: Model, request: Request, machine: Mapping[str, Any], advance: measure.Advance, first_sample: int = 0
) -> Iterator[Table]:
    """Measure the tables of a request one after the other. machine: `records.about_machine()`; first_sample: its number.

    Raises what `measure.run()` raises.
    """
    n_samples = first_sample
    for job in jobs(request):
        groups, n_samples = job.run(model, n_samples, advance)
        for rows in groups:
            done = [row for row in rows if row.error is None and not row.is_void]
            refused = [f"{row.label}: {row.error}" for row in rows if row.error is not None]
            yield Table([(row.label, record(model, row, rows, machine)) for row in done], refused)
