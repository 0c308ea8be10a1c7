"""Every row of a check reads the same tokens in turns with the others, and is compared with its reference."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy

from equip_cli.checking.rows import (
    BLOCK,
    MAX_BLOCKS,
    MIN_BLOCKS,
    N_UBATCH,
    READ_EVERY,
    SINKS,
    Row,
    Settings,
    judge,
    n_recent,
    plan,
    prescribed,
)
from equip_cli.core.errors import BackendError, BudgetError, UnsupportedModelError
from equip_cli.core.policy import CachePolicy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equip_cli.core.model import Model
    from equip_cli.core.session import Session

    # Row.rule -> logits [n_vocab] of the reference, by reading
    Truth = dict[tuple[str, str], list[NDArray[numpy.float32]]]

_SECONDS = 24.0  # for all turns with evictions


class _Run:
    """A row's session at work."""

    def __init__(self, row: Row, session: Session, budget: int) -> None:
        self.row, self._session, self._budget = row, session, budget
        self._n_past, self._n_reused, self._n_calls = 0, 0, 0
        self.logits: list[NDArray[numpy.float64]] = []  # of the last turn, [n_vocab] each
        self.squares: dict[bool, list[float]] = {False: [], True: []}  # mean squared errors, by: since an eviction
        self.differences: list[tuple[float, float]] = []  # largest and mean squared

    def read(self, tokens: Sequence[int]) -> None:
        """Tokens in chunks of n_ubatch."""
        self._n_past += self._session.eval(tokens)
        self._n_calls += 1
        self._look()

    def steps(self, tokens: Sequence[int], *, timed: bool) -> None:
        """Tokens one by one; fills `logits`."""
        self.logits = []
        seconds = 0.0
        for i, token in enumerate(tokens):
            begin = time.perf_counter()
            self._session.eval([token])
            seconds += time.perf_counter() - begin
            if i % READ_EVERY == READ_EVERY - 1:
                self.logits.append(self._session.logits().astype(numpy.float64))
        self._n_past += len(tokens)
        self._n_calls += len(tokens)
        if timed:
            self.row.speeds.append(len(tokens) / max(seconds, 1e-9))
        self._look()

    def _look(self) -> None:
        if self.row.policy != "streaming":
            self.row.kept_as_prescribed &= self._is_full(self._session.shares())
            return
        kept = self._session.kept()
        positions, slots = [position for position, _ in kept], {slot for _, slot in kept}
        if positions != prescribed(self._n_past, self._budget) or len(slots) != len(kept):
            self.row.kept_as_prescribed = False

    def _is_full(self, shares: dict[int, float]) -> bool:
        """Whether every unit keeps its budget, and the tokens among it that must stay."""
        n = self._n_past
        protected = range(n) if n <= self._budget else [*range(SINKS), *range(n - n_recent(self._budget), n)]
        total = math.fsum(shares.values())
        return math.isclose(total, min(n, self._budget), rel_tol=1e-6) and all(shares.get(p) == 1 for p in protected)

    def compare(self, expected: list[NDArray[numpy.float64]], peer: _Run | None, *, evicting: bool) -> None:
        """The logits of the last turn with the reference's, and with another update's."""
        self.row.peer = peer.row.update if peer is not None else None
        for i, (logits, wanted) in enumerate(zip(self.logits, expected, strict=True)):
            span = float(numpy.ptp(wanted)) or 1.0
            self.squares[evicting].append(float(numpy.mean(numpy.square((logits - wanted) / span))))
            if peer is not None:
                apart = numpy.abs(logits - peer.logits[i]) / span
                self.differences.append((float(apart.max()), float(numpy.mean(numpy.square(apart)))))

    def begin_evicting(self) -> None:
        self._n_reused, self._n_calls = self._session.stats()["graphs_reused"], 0

    def finish(self) -> None:
        """Write what was measured into the row."""
        row = self.row
        row.stats, row.ran = self._session.stats(), True
        row.n_evictions = self._n_past - self._budget
        row.graphs_reused = (row.stats["graphs_reused"] - self._n_reused) / max(self._n_calls, 1)
        row.rms_before, row.rms_error = (float(numpy.sqrt(numpy.mean(self.squares[since]))) for since in (False, True))
        if self.differences:
            # numpy's maximum, unlike Python's, is NaN if one of them is
            row.difference = float(numpy.max([largest for largest, _ in self.differences]))
            row.rms_difference = float(numpy.sqrt(numpy.mean([square for _, square in self.differences])))


def _open(row: Row, model: Model, settings: Settings, stack: ExitStack) -> _Run | None:
    if not CachePolicy.goes_together(row.update, row.positions):
        row.remark = f"{row.update} gives every token its rank as position, and this model's must stay true"
        return None
    words: dict[str, Any] = {"scope": row.scope, "positions": row.positions, "update": row.update}
    if row.policy != "streaming":
        # gather rotates at each step
        words |= {"recent": n_recent(settings.budget), "rotate_every": 1}
    policy = CachePolicy(row.policy, settings.budget, SINKS, **words)
    try:
        session = stack.enter_context(
            model.session(
                policy,
                n_ubatch=N_UBATCH,
                n_threads=settings.n_threads,
                adapt_threads=False,
                flash_attn=row.cache.flash_attn,
                type_k=row.cache.kind,
                type_v=row.cache.kind,
            )
        )
    except (UnsupportedModelError, BudgetError) as error:
        # a baseline may need more room than inplace does, and weights cannot be read in every model
        needed = row.is_reference or (row.update == "inplace" and isinstance(error, BudgetError))
        if needed and row.policy == "streaming":
            raise
        row.remark = str(error)
        return None
    return _Run(row, session, settings.budget)


def _each(runs: list[_Run], action: Callable[[_Run], None]) -> None:
    """In turns; a row that fails drops out."""
    for run in list(runs):
        try:
            action(run)
        except (BackendError, UnsupportedModelError) as error:
            if run.row.is_reference:
                raise
            run.row.remark = str(error)
            if isinstance(error, BackendError):
                run.row.faults.append("it failed")
            runs.remove(run)


def _with_reference(runs: list[_Run]) -> list[_Run]:
    """Those whose reference is among them."""
    rules = {run.row.rule for run in runs if run.row.is_reference}
    for run in runs:
        if run.row.rule not in rules:
            run.row.remark = "there is no reference"
    return [run for run in runs if run.row.rule in rules]


def _peer(run: _Run, runs: Sequence[_Run]) -> _Run | None:
    """The update that a row with an exact cache is compared with."""
    if not run.row.cache.exact:
        return None
    place = (run.row.device, run.row.rule)
    others = {each.row.update: each for each in runs if (each.row.device, each.row.rule) == place}
    others.pop(run.row.update)
    return others.get("inplace") or others.get("gather") or others.get("shift")


def _turn(runs: list[_Run], tokens: Sequence[int], truth: Truth, at: int, *, evicting: bool) -> int:
    """Every row reads these tokens and is compared with `truth` from the reading `at` on; returns the next one.

    The references are in the first group, and fill `truth`.
    """
    _each(runs, partial(_Run.steps, tokens=tokens, timed=evicting))
    for run in runs:
        known = truth.setdefault(run.row.rule, [])
        if run.row.is_reference and len(known) == at:
            known += [logits.astype(numpy.float32) for logits in run.logits]
    n = len(tokens) // READ_EVERY
    for run in runs:
        expected = [logits.astype(numpy.float64) for logits in truth[run.row.rule][at : at + n]]
        run.compare(expected, _peer(run, runs), evicting=evicting)
    return at + n


def run(
    model: Model,
    cpu_model: Model,
    device: str,
    settings: Settings,
    tokens: Sequence[int],
    advance: Callable[[float], object] = lambda n: None,
) -> list[Row]:
    """Read `tokens` into every row, judge the rows and return them.

    cpu_model: `model` itself where `device` is the CPU, else the same file without a layer elsewhere.
    tokens: at least `settings.n_tokens`; advance: called with the number of groups done, parts of one included.
    Raises what `Session` raises for a reference; a row that the model rules out keeps its `remark`.
    """
    groups = plan(device, cpu_model is model, settings)
    truth: Truth = {}
    n_blocks = settings.n_evictions and -(-settings.n_evictions // BLOCK)
    for rows in groups:
        with ExitStack() as stack:
            opened = [_open(row, cpu_model if row.on_cpu else model, settings, stack) for row in rows]
            runs = [each for each in opened if each is not None]
            if rows is groups[0]:
                runs = _with_reference(runs)
            stream, at = iter(tokens), 0
            _each(runs, partial(_Run.read, tokens=list(islice(stream, settings.budget - settings.n_before))))
            for done in range(0, settings.n_before, BLOCK):
                n = min(BLOCK, settings.n_before - done)
                at = _turn(runs, list(islice(stream, n)), truth, at, evicting=False)
            _each(runs, _Run.begin_evicting)
            block = 0
            while n_blocks is None or block < n_blocks:
                begin = time.perf_counter()
                at = _turn(runs, list(islice(stream, BLOCK)), truth, at, evicting=True)
                block += 1
                if n_blocks is None:
                    share = _SECONDS / len(groups) / (time.perf_counter() - begin)
                    n_blocks = min(max(int(share), MIN_BLOCKS), MAX_BLOCKS)
                if block == max(n_blocks // 2, 1):
                    _each(runs, partial(_Run.read, tokens=list(islice(stream, N_UBATCH))))
                advance(1 / n_blocks)
            _each(runs, _Run.finish)
    found = [row for rows in groups for row in rows]
    info = model.info
    judge(found, rounded_weights=8 * info["file_bytes"] < 24 * info["n_params"])
    return found
