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
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

TOLERANCE = 1e-4
SINKS = 4
UPDATES = ("inplace", "shift", "gather")
SCORED = ("h2o", "head")  # policy and scope of the rows that read attention weights

BLOCK, READ_EVERY = 16, 4  # steps of a row's turn; steps per reading of the logits
MIN_BLOCKS, MAX_BLOCKS = 4, 24  # turns with evictions
# llama.cpp hands chunks of 32 tokens and more to a GPU even where no layer is on it
N_UBATCH = 16

_TWIN_FACTOR, _GROSS_FACTOR, _AMPLIFIED_FACTOR = 2.0, 32.0, 2.0
_N_BEFORE = 4 * BLOCK  # single steps before the first eviction


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
        return self.budget + max(self.n_evictions or 0, MAX_BLOCKS * BLOCK) + BLOCK + N_UBATCH


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


def n_recent(budget: int) -> int:
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
