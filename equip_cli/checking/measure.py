"""The three updates against each other and against the CPU: the same tokens, the same kept sets, the same logits.

Every row reads one stream of tokens, under the policy `streaming` but for point 5: a prompt and single tokens up to the
budget, then single tokens that each evict one, and a chunk in their midst. Logits are read at every fourth step. A row
passes if

1. it keeps the tokens that the policy prescribes, each in a slot of its own;
2. with an f32 cache and flash attention off, no logit differs from another update's on the same device by more than
   1e-4 of the logit range: `gather` re-rotates every key from an un-rotated copy and `shift` is llama.cpp's own code, so a
   wrong victim, slot or position of one shows against the others;
3. its RMS error against the reference (f32, flash attention off, `inplace`, on the CPU) is noise. Twice the error of its
   *twin* is: the same cache under positions `true`, which holds the same tokens in the same slots and rotates nothing (it
   has a reference of its own). A baseline would be no such yardstick: `gather` keeps the slots in order, and where flash
   attention sums in f16 the order alone is worth a factor of 8; `shift` rotates stored keys at every eviction, and what it
   rounds each time piles up. That is why `shift` is measured and not judged in a cache that rounds;
4. that error, and the twin's, is at most 32 times what the same cache had before its first eviction, when nothing was
   overwritten yet. So a twin that is wrong itself excuses nothing;
5. under `h2o` at scope head (f32, flash attention off, `inplace` and `gather`, where the model supports it) 2 holds, and
   each KV head keeps as many tokens as the budget says, the first and the newest ones among them. Which others stay is up to
   the last bits of the weights, so the error is measured there and not judged.

Errors up to 1e-4 pass. Where the weights are below 32 bits, llama.cpp rounds activations to multiply them, and one that
rounds the other way is amplified by every layer after it: then 2 and 3 allow an f32 cache, RMS, twice what rounding the
cache to f16 makes in this model before any eviction (`Row.amplified`). All errors are shares of the logit range.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy

from equip_cli.core.errors import BackendError, BudgetError, UnsupportedModelError
from equip_cli.core.policy import CachePolicy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equip_cli.core.model import Model
    from equip_cli.core.session import Session

    # Row.rule -> logits [n_vocab] of the reference, by reading
    Truth = dict[tuple[str, str], list[NDArray[numpy.float32]]]

TOLERANCE = 1e-4
SINKS = 4
UPDATES = ("inplace", "shift", "gather")
SCORED = ("h2o", "head")  # policy and scope of the rows that read attention weights

_TWIN_FACTOR, _GROSS_FACTOR, _AMPLIFIED_FACTOR = 2.0, 32.0, 2.0
_BLOCK, _READ_EVERY = 16, 4  # steps of a row's turn; steps per reading of the logits
_N_BEFORE = 4 * _BLOCK  # single steps before the first eviction
_MIN_BLOCKS, _MAX_BLOCKS = 4, 24  # turns with evictions
_SECONDS = 24.0  # for all of them
# llama.cpp hands chunks of 32 tokens and more to a GPU even where no layer is on it
_N_UBATCH = 16


@dataclass(frozen=True)
class Cache:
    """Type of the cached keys and values, and flash attention (`on` or `off`)."""

    kind: str
    flash_attn: str

    @property
    def exact(self) -> bool:
        """Nothing is rounded, so logits can be compared one by one."""
        return self.kind == "f32" and self.flash_attn == "off"


CACHES = (Cache("f32", "off"), Cache("f16", "on"), Cache("q8_0", "on"))


@dataclass(frozen=True)
class Settings:
    """What every row shares.

    budget: tokens, below the trained context; positions: `cache`, or `true` for a model that has no others.
    scored: add the rows of SCORED, a policy that reads attention weights.
    n_evictions: single steps past the budget, rounded up to whole turns; None = 64 to 384, what takes about 24 seconds.
    """

    budget: int
    positions: str = "cache"
    updates: Sequence[str] = UPDATES
    n_evictions: int | None = None
    n_threads: int | None = None
    scored: bool = False

    @property
    def n_before(self) -> int:
        """Single steps before the first eviction."""
        return min(_N_BEFORE, self.budget // 2)

    @property
    def n_tokens(self) -> int:
        """Tokens that a row reads at most."""
        return self.budget + max(self.n_evictions or 0, _MAX_BLOCKS * _BLOCK) + _BLOCK + _N_UBATCH


@dataclass
class Row:
    """One cache on one device.

    remark: why the row was not run, or did not end.
    difference, rms_difference: the largest, and the RMS one, from the update `peer`; exact caches only.
    rms_before, rms_error: from the reference, before the first eviction and since. graphs_reused: share of the steps since.
    amplified: the RMS that an exact cache is allowed because llama.cpp rounds activations; None where it does not.
    """

    cache: Cache
    update: str
    positions: str
    device: str
    on_cpu: bool
    policy: str = "streaming"
    scope: str = "token"
    ran: bool = False
    remark: str | None = None
    kept_as_prescribed: bool = True
    peer: str | None = None
    difference: float | None = None
    rms_difference: float | None = None
    rms_before: float = 0.0
    rms_error: float = 0.0
    rms_limit: float | None = None
    amplified: float | None = None
    faults: list[str] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    n_evictions: int = 0
    graphs_reused: float = 0.0
    speeds: list[float] = field(default_factory=list)  # tokens per second of each turn

    @property
    def rule(self) -> tuple[str, str]:
        """Rows that agree in this keep the same tokens at the same positions."""
        return self.policy, self.positions

    @property
    def is_reference(self) -> bool:
        return self.cache.exact and self.on_cpu and self.update == "inplace"

    @property
    def tokens_per_second(self) -> float | None:
        return statistics.median(self.speeds) if self.speeds else None

    @property
    def passed(self) -> bool | None:
        """None if the model rules the row out."""
        return not self.faults if self.ran or self.faults else None


def prescribed(n_past: int, budget: int) -> list[int]:
    """Positions that `streaming` keeps of `n_past` tokens."""
    if n_past <= budget:
        return list(range(n_past))
    return [*range(SINKS), *range(n_past - budget + SINKS, n_past)]


def _n_recent(budget: int) -> int:
    """Newest tokens that the rows of SCORED never evict."""
    return budget // 4


def plan(device: str, on_cpu: bool, settings: Settings) -> list[list[Row]]:
    """Rows by cache: the updates, the twin and SCORED on the device; the CPU's `inplace`, and its twin as a reference."""
    groups = []
    for cache in CACHES:
        row = partial(Row, cache, device=device, on_cpu=on_cpu)
        updates = ["inplace", *(update for update in settings.updates if update != "inplace")]
        group = [row(update, settings.positions) for update in updates]
        rules = list(dict.fromkeys([settings.positions, "true"]))
        group += [row("inplace", rule) for rule in rules[1:]]
        if not on_cpu:
            group += [Row(cache, "inplace", rule, "CPU", True) for rule in (rules if cache.exact else rules[:1])]
        if settings.scored and cache.exact:
            name, scope = SCORED
            scored = partial(row, policy=name, scope=scope)
            group += [scored(update, settings.positions) for update in updates if update != "shift"]
            if not on_cpu:
                group.append(scored("inplace", settings.positions, device="CPU", on_cpu=True))
        groups.append(group)
    return groups


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
            if i % _READ_EVERY == _READ_EVERY - 1:
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
        """Whether every lane keeps its budget, and the tokens among it that must stay."""
        n = self._n_past
        protected = range(n) if n <= self._budget else [*range(SINKS), *range(n - _n_recent(self._budget), n)]
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
        words |= {"recent": _n_recent(settings.budget), "rotate_every": 1}
    policy = CachePolicy(row.policy, settings.budget, SINKS, **words)
    try:
        session = stack.enter_context(
            model.session(
                policy,
                n_ubatch=_N_UBATCH,
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
    n = len(tokens) // _READ_EVERY
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
    n_blocks = settings.n_evictions and -(-settings.n_evictions // _BLOCK)
    for rows in groups:
        with ExitStack() as stack:
            opened = [_open(row, cpu_model if row.on_cpu else model, settings, stack) for row in rows]
            runs = [each for each in opened if each is not None]
            if rows is groups[0]:
                runs = _with_reference(runs)
            stream, at = iter(tokens), 0
            _each(runs, partial(_Run.read, tokens=list(islice(stream, settings.budget - settings.n_before))))
            for done in range(0, settings.n_before, _BLOCK):
                n = min(_BLOCK, settings.n_before - done)
                at = _turn(runs, list(islice(stream, n)), truth, at, evicting=False)
            _each(runs, _Run.begin_evicting)
            block = 0
            while n_blocks is None or block < n_blocks:
                begin = time.perf_counter()
                at = _turn(runs, list(islice(stream, _BLOCK)), truth, at, evicting=True)
                block += 1
                if n_blocks is None:
                    share = _SECONDS / len(groups) / (time.perf_counter() - begin)
                    n_blocks = min(max(int(share), _MIN_BLOCKS), _MAX_BLOCKS)
                if block == max(n_blocks // 2, 1):
                    _each(runs, partial(_Run.read, tokens=list(islice(stream, _N_UBATCH))))
                advance(1 / n_blocks)
            _each(runs, _Run.finish)
    found = [row for rows in groups for row in rows]
    info = model.info
    judge(found, rounded_weights=8 * info["file_bytes"] < 24 * info["n_params"])
    return found


def judge(rows: Sequence[Row], *, rounded_weights: bool) -> None:
    """Fill in `rms_limit`, `amplified` and `faults`; see the module's text for the criteria."""
    ran = [row for row in rows if row.ran]
    twins = {(row.cache, row.device): row.rms_error for row in ran if row.rule == ("streaming", "true")}
    amplified = {row.device: _AMPLIFIED_FACTOR * row.rms_before for row in ran if row.cache.kind == "f16"}
    for row in ran:
        if not math.isfinite(row.rms_error):
            row.faults.append("its logits are not finite")
            continue
        if not row.kept_as_prescribed:
            row.faults.append("it keeps other tokens than the policy prescribes")
        if rounded_weights and row.cache.exact:
            row.amplified = amplified.get(row.device)
        slack = row.amplified or 0.0
        if row.difference is not None and row.rms_difference is not None:
            if not (row.difference <= TOLERANCE or row.rms_difference <= slack):
                row.faults.append(f"its logits are not those of {row.peer}")
        if row.policy != "streaming" or (row.update == "shift" and not row.cache.exact):
            continue
        limits = [_GROSS_FACTOR * row.rms_before]
        if row.positions != "true" and (row.cache, row.device) in twins:
            limits.append(_TWIN_FACTOR * twins[row.cache, row.device])
        row.rms_limit = max(min(limits), TOLERANCE, slack)
        if not row.rms_error <= row.rms_limit:
            row.faults.append("its error is above the limit")
