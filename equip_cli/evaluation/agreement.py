"""Agreement with the full cache, token by token: it needs no labels, so it works with any model and any text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy

from equip_cli.core.policy import CachePolicy
from equip_cli.evaluation import quality

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from equip_cli.core.session import Session
    from equip_cli.evaluation.quality import Advance

_BLOCK = 32  # neighbouring tokens are alike, so they are drawn together
_ROUNDS = 1000


@dataclass(frozen=True)
class Agreement:
    """How near a cache's next-token distributions are to those of the full cache.

    top1: share of tokens after which both find the same token most likely; its interval is Wilson's (1927).
    kl: mean of KL(full || cache) in nats per token; its interval is drawn by `block_bootstrap()`.
    """

    top1: float
    top1_ci95: tuple[float, float]
    kl: float
    kl_ci95: tuple[float, float]
    n_tokens: int


class Distribution:
    """Next-token distribution of logits, f32 `[n_vocab]`: the exponentials are taken in f32 from the largest logit on, and
    everything is summed in f64, so that its parts are off by less than 1e-6 nats.
    """

    def __init__(self, logits: NDArray[numpy.float32]) -> None:
        self.top = int(logits.argmax())
        self._x = logits.astype(numpy.float64)
        self._p = numpy.exp(logits - logits[self.top])
        total = float(self._p.sum(dtype=numpy.float64))
        self._log_sum = float(logits[self.top]) + math.log(total)
        self._total = total

    def nll(self, token: int) -> float:
        """-log p(token), in nats."""
        return self._log_sum - float(self._x[token])

    @cached_property
    def _weights(self) -> NDArray[numpy.float64]:
        """Probabilities, f64 `[n_vocab]`."""
        weights: NDArray[numpy.float64] = self._p.astype(numpy.float64)
        weights /= self._total
        return weights

    @cached_property
    def _entropy(self) -> float:
        return self._log_sum - float(self._weights @ self._x)

    def divergence(self, other: Distribution) -> float:
        """KL(self || other) = sum of p (log p - log p_other), in nats, over the whole vocabulary."""
        return max(0.0, other._log_sum - float(self._weights @ other._x) - self._entropy)


def block_bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of a series: blocks of 32 neighbours, drawn with replacement (Carlstein 1986).

    Blocks are shorter where the series has less than 8 of them. Raises ValueError for an empty series.
    """
    if not values:
        raise ValueError("there is no interval of no values")
    n = min(_BLOCK, max(1, len(values) // 8))
    starts = numpy.arange(0, len(values), n)
    sums = numpy.add.reduceat(numpy.asarray(values, dtype=numpy.float64), starts)
    counts = numpy.minimum(n, len(values) - starts)
    drawn = numpy.random.default_rng(seed).integers(0, len(starts), (_ROUNDS, len(starts)))
    low, high = numpy.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), (0.025, 0.975))
    return float(low), float(high)


def summary(same: Sequence[bool], kl: Sequence[float], seed: int = 0) -> Agreement | None:
    """Of per-token results; None if there are none."""
    if not kl:
        return None
    n, hits = len(kl), sum(same)
    return Agreement(hits / n, quality.wilson(hits, n), float(numpy.mean(kl)), block_bootstrap(kl, seed), n)


@dataclass(frozen=True)
class Compared:
    """What one reading tells. agreements: of each session, None where nothing counted; nll: -log p(token | all before it) in
    nats of all tokens but the first, of each session, and of the reference; kl: KL(full || session) in nats after each token.
    """

    agreements: list[Agreement | None]
    nll: list[list[float]]
    kl: list[list[float]]
    reference_nll: list[float]


def compare(
    reference: Session, sessions: Sequence[Session], tokens: Sequence[int], advance: Advance, seed: int = 0
) -> Compared:
    """Read `tokens` one per step in all sessions together, and compare each one's logits with the reference's.

    reference: policy `none`, with room for all tokens. A bounded session counts from its first eviction on, one with the
    policy `none` (and other types of K and V) from the first token on.
    seed: of the bootstrap. Raises what `Session.eval()` raises.
    """
    everyone = (reference, *sessions)
    for session in everyone:
        session.reset()
    counts = [session.policy == CachePolicy("none") for session in sessions]
    same: list[list[bool]] = [[] for _ in sessions]
    kl: list[list[float]] = [[] for _ in sessions]
    n_before = [0 for _ in sessions]  # tokens that do not count
    nll: list[list[float]] = [[] for _ in everyone]
    for i, token in enumerate(tokens):
        rows: list[Distribution] = []
        for session in everyone:
            session.eval([token])
            rows.append(Distribution(session.logits()))
        for session_nll, row in zip(nll, rows, strict=True):
            if i + 1 < len(tokens):
                session_nll.append(row.nll(tokens[i + 1]))
        full = rows[0]
        for j, (session, row) in enumerate(zip(sessions, rows[1:], strict=True)):
            counts[j] = counts[j] or session.stats()["n_evicted"] > 0
            n_before[j] += not counts[j]
            same[j].append(full.top == row.top)
            kl[j].append(full.divergence(row))
        advance(len(everyone))
    agreements = [summary(s[n:], d[n:], seed) for s, d, n in zip(same, kl, n_before, strict=True)]
    return Compared(agreements, nll[1:], kl, nll[0])
