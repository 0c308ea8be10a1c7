"""Measurements with a course of their own: sequences that grow, latency token by token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from equip_cli.benchmark.lanes import Lanes
from equip_cli.benchmark.measure import Advance, add_steps, empty_session, has_our_kernel, open_rows, time_steps
from equip_cli.benchmark.rows import Row, Settings, filler, padded, plan
from equip_cli.core.errors import UnsupportedModelError, UsageError
from equip_cli.core.memory import rss_bytes
from equip_cli.core.policy import CachePolicy

if TYPE_CHECKING:
    from equip_cli.core.model import Model
    from equip_cli.core.session import Session

_COPIED_FROM = 128  # tokens that are read, and whose rows are copied
_PIECE = 16  # tokens of a row before the next one's turn


def lengths(upto: int, first: int = 256) -> list[int]:
    """256, 512, ... below `upto`, and `upto`."""
    found = []
    while first < upto:
        found.append(first)
        first *= 2
    return [*found, upto]


def _fill(model: Model, session: Session | Lanes, row: Row, copied: bool) -> None:
    """To one token below the row's depth. Rows are copied from those of 128 tokens, where the cache is a plain one."""
    n = row.depth - 1
    head = min(n, _COPIED_FROM) if copied else n
    session.eval(filler(model, head))
    if n > head:
        try:
            session.fill(n - head)
            row.fill = "copied"
        except UnsupportedModelError:
            session.eval(filler(model, n - head))


def _open_plain(model: Model, row: Row, settings: Settings, stack: ExitStack, copied: bool) -> Session | Lanes | None:
    """A plain cache of the row's length, filled to it; `rss_bytes` is what that added. None, with the reason in `error`, where the
    model cannot run with these settings."""
    row.kind = "growth"
    before = rss_bytes()
    try:
        session = empty_session(model, row, settings, padded(row.depth))
        stack.push(session)
    except (UnsupportedModelError, UsageError) as error:
        row.error = str(error)
        return None
    _fill(model, session, row, copied)
    row.rss_bytes = max(rss_bytes() - before, 0)
    return session


def growth(
    model: Model,
    policies: Sequence[CachePolicy],
    flash_attn: Sequence[str],
    settings: Settings,
    upto: int,
    *,
    copied: bool,
    first_sample: int = 0,
    advance: Advance = lambda n: None,
) -> tuple[list[list[Row]], int]:
    """Time per token as the sequence grows: the rows of each length, and the index of the next sample.

    `none` gets a cache of each length in turn, filled to it, by copies of rows if `copied`, since what a step costs does
    not depend on what is in the rows; bounded caches are there from the length of their budget on. A bounded cache does
    not grow, so it is filled once.
    Raises what `Session` raises.
    """
    order, found = first_sample, list[list[Row]]()
    plain = [policy for policy in policies if policy.name == "none" and policy.update is None]
    bounded = [policy for policy in policies if policy.name != "none"]
    with ExitStack() as outer:
        kept: list[tuple[Row, Session | Lanes]] = []
        for policy in bounded:
            rows = plan([policy], flash_attn, replace(settings, depth=policy.budget), policy.budget or 0)
            kept += open_rows(model, rows, settings, outer, advance)
        base = rss_bytes() if not kept else min(row.rss_bytes for row, _ in kept)
        cpu_attn = settings.cpu_attn if not bounded else settings.cpu_attn is not False
        shown = [
            not row.cpu_attn or has_our_kernel(model, row, settings)
            for row in plan(plain, flash_attn, replace(settings, cpu_attn=cpu_attn), 1)
        ]
        for length in lengths(upto):
            with ExitStack() as inner:
                alive: list[tuple[Row, Session | Lanes]] = []
                refused: list[Row] = []
                each = replace(settings, depth=length, cpu_attn=cpu_attn)
                for row in itertools.compress(plan(plain, flash_attn, each, length), shown):
                    opened = _open_plain(model, row, settings, inner, copied)
                    if opened is not None:
                        row.rss_bytes += base
                        alive.append((row, opened))
                    elif not found and row.error is not None:
                        refused.append(row)
                    advance(length / 64 if copied else length / 8)
                for row, session in kept:
                    if length >= row.depth:
                        alive.append((_at_length(row, length), session))
                for row, session in alive:
                    time_steps(session, row, 4)
                for _ in range(settings.repetitions):
                    for row, session in alive:
                        add_steps(row, *time_steps(session, row, row.n_gen))
                        row.sample_order.append(order)
                        order += 1
                        advance(row.n_tokens)
                for row, session in alive:
                    row.stats = session.stats()
                found.append([*(row for row, _ in alive), *refused])
    return found, order


def _at_length(row: Row, length: int) -> Row:
    """The row of a bounded cache at this length of the sequence, not measured yet."""
    return Row(
        row.policy,
        row.flash_attn,
        length,
        "growth",
        0,
        row.n_gen,
        row.rope_upstream,
        row.cpu_attn,
        row.lanes,
        row.shares,
        rss_bytes=row.rss_bytes,
    )


def growth_work(n_rows: int, settings: Settings, upto: int, copied: bool) -> float:
    """What `growth()` does at most, in tokens generated."""
    n_rows *= max(settings.lanes, 1) * (2 if settings.lanes > 1 else 1)
    per_length = n_rows * settings.repetitions * settings.n_gen
    return sum(per_length + n_rows * length / (64 if copied else 8) for length in lengths(upto))


def latency(
    model: Model, rows: list[Row], settings: Settings, first_sample: int = 0, advance: Advance = lambda n: None
) -> int:
    """n_gen tokens in a row for each cache, in pieces that take turns. Returns the index of the next sample.

    `steps_ns` has them all, in order; `samples_ns` a single sum.
    """
    order = first_sample
    with ExitStack() as stack:
        alive = open_rows(model, rows, settings, stack, advance)
        for begin in range(0, settings.n_gen, _PIECE):
            for row, session in alive:
                n = min(_PIECE, settings.n_gen - begin)
                steps, host = time_steps(session, row, n)
                row.steps_ns += steps
                row.host_ns.append(host)
                row.sample_order.append(order)
                order += 1
                advance(n)
        for row, session in alive:
            row.samples_ns, row.host_ns = [sum(row.steps_ns)], [sum(row.host_ns)]
            row.stats = session.stats()
    return order
