"""Measuring in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from equip_cli.benchmark.lanes import Lanes
from equip_cli.benchmark.rows import Row, Settings, filler, is_our_kernel, padded
from equip_cli.core.errors import EquipError, UnsupportedModelError, UsageError
from equip_cli.core.memory import rss_bytes
from equip_cli.core.policy import BASELINE_UPDATES

if TYPE_CHECKING:
    from equip_cli.core.model import Model
    from equip_cli.core.session import Session

Advance = Callable[[float], object]  # called with work done, in the units of `work()`

_WARM_UP_STEPS = 4
_STEPS_PER_CALL = 4  # Ctrl-C is seen between two native calls
_PROMPT_SPEED = 8  # a token of a chunk costs about an eighth of a single one


def work(rows: Sequence[Row], settings: Settings) -> float:
    """What `run()` will do, in tokens generated; for a progress bar."""
    return sum(_fill_work(row) + settings.repetitions * _sample_work(row) for row in rows)


def _sample_work(row: Row) -> float:
    return row.n_tokens + (row.n_prompt + row.depth * (row.kind == "pp")) / _PROMPT_SPEED


def _fill_work(row: Row) -> float:
    return 0 if row.kind in ("pp", "ttft") else row.depth * max(row.lanes, 1) / _PROMPT_SPEED


def n_ctx_of(row: Row) -> int | None:
    """Size of the cache, which a policy settles by itself."""
    if row.is_context_shift:
        return row.policy.budget
    if row.is_plain:
        return padded(row.depth + row.n_prompt + (row.n_gen if row.kind == "latency" else 0))
    return None


def empty_session(model: Model, row: Row, settings: Settings, n_ctx: int | None) -> Session | Lanes:
    """A session of the row's kind, or its lanes. Raises what `Session` raises."""
    options = {
        "n_ctx": n_ctx,
        "flash_attn": row.flash_attn,
        "cpu_attn": row.cpu_attn,
        "adapt_threads": False,  # a record names one number of threads
        **settings.session_options(),
    }
    if row.lanes:
        return Lanes(model.pool(row.policy, row.lanes, shares=row.shares, **options), row.lanes)
    return model.session(row.policy, rope_upstream=row.rope_upstream and row.policy.update == "shift", **options)


def open_session(model: Model, row: Row, settings: Settings, stack: ExitStack) -> Session | Lanes:
    """The row's session, filled to its depth where single tokens are measured. Raises what `Session` raises."""
    session = empty_session(model, row, settings, n_ctx_of(row))
    stack.push(session)
    if row.kind == "latency" and row.is_context_shift:
        session.eval(
            filler(model, max(2, (row.policy.budget or 0) - row.n_gen // 4))
        )  # a shift after a quarter of them
    elif row.kind == "tg":
        # a dropped token's step is the one that makes it `depth`
        session.eval(filler(model, row.depth - 1 if row.is_plain else row.depth))
    elif row.kind == "latency":
        session.eval(filler(model, row.depth))
    return session


def has_our_kernel(model: Model, row: Row, settings: Settings) -> bool:
    """Whether a small cache of this row runs on our attention kernel: a matter of the model's shape and of the device."""
    with empty_session(model, row, settings, 256) as session:
        return is_our_kernel(session.stats()["attn_kernel"])


def open_rows(
    model: Model, rows: Sequence[Row], settings: Settings, stack: ExitStack, advance: Advance
) -> list[tuple[Row, Session | Lanes]]:
    """All sessions at once; fills in `rss_bytes`, or `error` where a baseline is not possible.

    Raises what `Session` raises for the other rows, and if no row is left.
    """
    alive: list[tuple[Row, Session | Lanes]] = []
    base = rss_bytes()
    for row in rows:
        before = rss_bytes()
        try:
            if row.is_plain and row.cpu_attn and not has_our_kernel(model, row, settings):
                row.is_void = True  # the same as another row
                continue
            session = open_session(model, row, settings, stack)
        except (UnsupportedModelError, UsageError) as error:
            ruled_out = row.policy.update in BASELINE_UPDATES and isinstance(error, UnsupportedModelError)
            row.error = str(error)
            if (row.policy.name != "none" and not ruled_out) or all(other.error for other in rows):
                raise
            continue
        row.rss_bytes = base + max(rss_bytes() - before, 0)
        alive.append((row, session))
        advance(_fill_work(row))
    return alive


def time_steps(session: Session | Lanes, row: Row, n: int) -> tuple[list[int], int]:
    """Nanoseconds of `n` single-token steps, one by one, and of all their time outside graph compute."""
    steps: list[int] = []
    host = 0
    while len(steps) < n:
        step_ns, host_ns = session.time_decode(
            min(n - len(steps), _STEPS_PER_CALL), rewind=row.is_plain and row.kind != "latency"
        )
        steps += step_ns
        host += sum(host_ns)
    return steps, host


def _time_context_shift(session: Session, row: Row, n: int, phase: float) -> tuple[int, int]:
    """A sample of llama.cpp's half-context shift: `n` steps at this phase (0 to 1) between two shifts, and their share of one.

    The time of a shift is what the step after it takes more than the three that follow; its share is n / cycle, with cycle
    the tokens between two shifts. A cycle that is not longer than `n` is measured as it comes.
    """
    stats = session.stats()
    session.eval(filler(session.model, stats["n_ctx"] - stats["n_used"]))
    first, _ = session.time_decode(1)
    after, _ = session.time_decode(3)
    n_used = session.stats()["n_used"]
    row.cycle = stats["n_ctx"] - (n_used - 4)
    extra = max(first[0] - int(statistics.median(after)), 0)
    row.shift_ns.append(extra)
    room = stats["n_ctx"] - n_used - n
    if room > 0:
        session.eval(filler(session.model, round(phase * room)))
    steps, host = time_steps(session, row, n)
    share = round(extra * n / row.cycle) if room > 0 else 0
    return sum(steps) + share, host


def _time_prompt(session: Session, row: Row) -> int:
    """Nanoseconds for reading n_prompt tokens after `depth` others."""
    n_past = session.stats()["n_past"]
    if row.depth == 0 and n_past > 0:
        session.reset()
    elif row.is_plain and n_past > row.depth:
        try:
            session.rewind(row.depth)
        except EquipError:
            session.reset()
    if session.stats()["n_past"] < row.depth:
        session.eval(filler(session.model, row.depth))
    tokens = filler(session.model, row.n_prompt)
    begin = time.perf_counter_ns()
    session.eval(tokens)
    session.logits()
    return time.perf_counter_ns() - begin


def sample(session: Session | Lanes, row: Row, phase: float) -> None:
    """One sample more in `row`. phase: which part of the samples are taken, 0 to 1."""
    if isinstance(session, Lanes):
        session.hold(row.depth)
    elif row.n_prompt:
        row.samples_ns.append(_time_prompt(session, row))
        return
    elif row.is_context_shift and row.kind != "latency":
        total, host = _time_context_shift(session, row, row.n_gen, phase)
        row.samples_ns.append(total)
        row.host_ns.append(host)
        return
    add_steps(row, *time_steps(session, row, row.n_gen))


def add_steps(row: Row, steps: list[int], host: int) -> None:
    """A sample of single steps."""
    row.steps_ns += steps
    row.samples_ns.append(sum(steps))
    row.host_ns.append(host)


def run(
    model: Model, rows: list[Row], settings: Settings, first_sample: int = 0, advance: Advance = lambda n: None
) -> int:
    """Measure the rows in turns and fill them in. Returns the index of the next sample.

    A row of policy `none` that this model cannot run (quantised values without flash attention, say) keeps its `error`,
    and so does one whose update is a baseline that the model rules out; unless no row is left.
    Raises what `Session` raises for the other rows.
    """
    with ExitStack() as stack:
        alive = open_rows(model, rows, settings, stack, advance)
        if settings.warm_up:
            for row, session in alive:
                if row.n_prompt and not isinstance(session, Lanes):
                    _time_prompt(session, row)
                elif not row.is_context_shift:
                    time_steps(session, row, _WARM_UP_STEPS)
        order = first_sample
        for repetition in range(settings.repetitions):
            for row, session in alive:
                sample(session, row, (repetition + 0.5) / settings.repetitions)
                row.sample_order.append(order)
                order += 1
                advance(_sample_work(row))
        for row, session in alive:
            row.stats = session.stats()
    return order
