"""The published formulas in float64, each written from its paper: what a token is worth to one KV head; higher is kept.

A formula sees the kept tokens of one KV head, ordered by position. Protection, units and ties are oracle_heads.py's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from models import Array
from oracle import drawn, softmax


@dataclass(frozen=True)
class Head:
    """The n kept tokens of one KV head; the first n_protect of them are sinks or pinned, the first n_old are not recent."""

    pos: Array  # (n,)
    n_old: int
    group: int  # query heads of this KV head
    unit: int | None  # number of the unit that decides, None at scope token
    weights: Array  # (n,), accumulated attention weights
    k: Array  # (n, head_dim), as the model made them, un-rotated
    v: Array  # (n, head_dim), as the model made them
    k_stored: Array  # (n, head_dim), rotated to where they stand, rounded as the cache does; only if a formula needs it
    v_stored: Array  # (n, head_dim)
    n_protect: int = 0
    n_sinks: int = 0  # of the protected ones
    given: Array | None = None  # (n,), scores that the caller has set


def h2o(u: Head) -> Array:
    """Accumulated attention, not normalised by age (Zhang et al. 2023, arXiv 2306.14048, algorithm 1)."""
    return u.weights


def random(u: Head) -> Array:
    """A number that each position draws once per unit (reservoir sampling: Vitter 1985, algorithm R).

    24 bits of splitmix64(position + unit * 2^32), as a float32 holds them; all 64 bits at scope token.
    """
    if u.unit is None:
        return np.array([drawn(int(p)) / 2**64 for p in u.pos])
    return np.array([(drawn(int(p) + (u.unit << 32)) >> 40) / 2**24 for p in u.pos])


def tova(u: Head) -> Array:
    """The newest query's attention (TOVA: Oren et al. 2024, arXiv 2401.06104); decay 0 leaves no other."""
    return u.weights


def snapkv(u: Head, kernel: int = 5) -> Array:
    """Attention of the last 32 queries, average-pooled over 5 neighbours (Li et al. 2024, arXiv 2404.14469).

    Zeros beyond both ends count. The window itself is kept by protection.
    """
    old = np.pad(u.weights[: u.n_old], kernel // 2)
    score = np.full(len(u.pos), np.inf)
    score[: u.n_old] = [old[i : i + kernel].sum() / kernel for i in range(u.n_old)]
    return score


def a2sf(u: Head) -> Array:
    """Accumulated attention with a forgetting factor, 0.95 (Jo and Shin 2024, arXiv 2407.20485)."""
    return u.weights


def vatp(u: Head) -> Array:
    """Accumulated attention times the L1 norm of the value (Guo et al. 2024, arXiv 2406.12335)."""
    score: Array = u.weights * np.abs(u.v).sum(axis=1)
    return score


def _output_error(u: Head, centre: Callable[[Array, Array], Array]) -> Array:
    a = u.weights / u.weights.sum()
    x = centre(a, u.v_stored)
    score: Array = a / np.maximum(1.0 - a, 1e-6) * np.linalg.norm(x - u.v_stored, axis=1)
    return score


def caote(u: Head) -> Array:
    """Change of the attention output if the token goes (Goel et al. 2025, arXiv 2504.14051), with H2O's weights."""
    return _output_error(u, lambda a, v: a @ v)


def fastcaote(u: Head) -> Array:
    """CAOTE with the mean of the values in place of the attention output (arXiv 2504.14051)."""
    return _output_error(u, lambda a, v: v.mean(axis=0))


def pagedeviction(u: Head) -> Array:
    """||v|| over ||k|| (Chitty-Venkata et al. 2025, arXiv 2509.04377): numerators and denominators, (2, n), to be summed apart."""
    return np.stack([np.linalg.norm(u.v, axis=1), np.linalg.norm(u.k, axis=1)])


def keydiff(u: Head) -> Array:
    """Minus the cosine to the mean of the normalised keys (Park et al. 2025, arXiv 2504.15364)."""
    k = u.k_stored / np.linalg.norm(u.k_stored, axis=1, keepdims=True)
    anchor = k.mean(axis=0)
    score: Array = -(k @ anchor) / np.linalg.norm(anchor)
    return score


def knorm(u: Head) -> Array:
    """Minus the L2 norm of the key (Devoto et al. 2024, arXiv 2406.11430)."""
    score: Array = -np.linalg.norm(u.k, axis=1)
    return score


def rkv(u: Head, window: int = 8, kernel: int = 7, lambda_: float = 0.1, threshold: float = 0.5) -> Array:
    """0.1 * importance - 0.9 * redundancy of the tokens that are not recent (Cai et al. 2025, arXiv 2505.24133).

    Importance: mean attention of the last 8 queries, max-pooled over 7 neighbours. Redundancy: softmax of the mean cosine
    to the other keys, where each key forgives the newest one that is close to it (cosine above 0.5).
    """
    n = u.n_old
    mean = np.pad(u.weights[:n] / (window * u.group), kernel // 2, constant_values=-np.inf)
    importance = np.array([mean[i : i + kernel].max() for i in range(n)])
    k = u.k_stored[:n] / np.linalg.norm(u.k_stored[:n], axis=1, keepdims=True)
    cos = k @ k.T
    np.fill_diagonal(cos, 0.0)
    for row in cos:
        close = np.flatnonzero(row > threshold)
        row[close[-1:]] = 0.0
    score = np.full(len(u.pos), np.inf)
    score[:n] = lambda_ * importance - (1.0 - lambda_) * softmax(cos.mean(axis=0))
    return score


def gate(il: int, head: int, pos: int) -> float:
    """What the tests set as the score of a token (policy external): 24 bits of splitmix64(position + number of the head * 2^32)."""
    return (drawn(pos + ((64 * il + head + 1) << 32)) >> 40) / 2**24


def external(u: Head, unscored: float = 0.0) -> Array:
    """The score that the caller has set, or `unscored`; heads that decide together add theirs."""
    assert u.given is not None
    return np.where(np.isnan(u.given), unscored, u.given)


def _lag_relative(rows: Array, reference: Array) -> Array:
    low, high = reference.min(axis=0), reference.max(axis=0)
    wide = high > low
    x = np.zeros(rows.shape)
    x[:, wide] = (rows - low)[:, wide] / (high - low)[wide]
    return softmax(x.std(axis=1, ddof=1))


def lagkv(u: Head, lag: int = 128, cross: bool = False) -> Array:
    """The variation of a token's channels, normalised by the range of the partition that follows (arXiv 2504.04704, section 3).

    Partitions of `lag` tokens behind the sinks, at most a quarter of them; the last complete one and what follows it have no
    reference and are kept. Ranks within the partition, or with `cross` the mean of the softmaxes of keys and values.
    """
    first = min(u.n_protect, u.n_sinks)
    n = min(lag, max(1, (len(u.pos) - first) // 4))
    score = np.full(len(u.pos), float(n))
    for i in range(first, len(u.pos) - 2 * n + 1, n):
        these, those = slice(i, i + n), slice(i + n, i + 2 * n)
        worth = (_lag_relative(u.k[these], u.k[those]) + _lag_relative(u.v[these], u.v[those])) / 2
        score[these] = worth if cross else np.argsort(np.argsort(worth, kind="stable"))
    return score


@dataclass(frozen=True)
class Formula:
    """A policy: its score, what that needs, and the protection of its paper or code."""

    score: Callable[[Head], Array]
    needs: frozenset[str]  # of: weights, rows (keys and values as stored), norms (as the model made them), drawn, given
    scopes: tuple[str, ...]  # the first one is the default
    sinks: int = 0
    recent: int | float = 1  # a fraction is one of the budget
    evict_every: int = 1
    eager: bool = False  # the victims of a choice go at once
    pages: bool = False  # and are evict_every tokens of neighbouring ranks
    decay: float = 1.0
    window: int = 0  # > 0: the weights are those of the last queries before a choice
    by_position: bool = False  # at scope token the library needs positions alone: a llama_kv_victim
    min_budget: int = 0  # from which on the formula tells candidates apart, where that is more than a few tokens

    @property
    def scope(self) -> str:
        return self.scopes[0]

    def protection(self, budget: int) -> tuple[int, int]:
        """Sinks and recent tokens, as published."""
        return self.sinks, self.recent if isinstance(self.recent, int) else max(1, int(self.recent * budget))


ALL = ("head", "layer", "token")
PER_HEAD = ("head", "layer")
WEIGHTS, ROWS, NORMS = frozenset({"weights"}), frozenset({"rows"}), frozenset({"norms"})

# H2O: half heavy hitters, half recent, and so what is built on it, but for VATP, which adds 20 sinks (README of its code)
# TOVA, KeyDiff, Knorm: nothing is protected but the newest token. PagedEviction: the first and the newest page.
FORMULAS: dict[str, Formula] = {
    "h2o": Formula(h2o, WEIGHTS, ALL, recent=0.5),
    "random": Formula(random, frozenset({"drawn"}), ("token", "head", "layer"), by_position=True),
    "tova": Formula(tova, WEIGHTS, ("layer", "head", "token"), decay=0.0),
    "snapkv": Formula(snapkv, WEIGHTS, ALL, recent=32, evict_every=32, window=32),
    "a2sf": Formula(a2sf, WEIGHTS, ALL, recent=16, decay=0.95),
    "vatp": Formula(vatp, WEIGHTS | NORMS, PER_HEAD, sinks=20, recent=0.5),
    "caote": Formula(caote, WEIGHTS | ROWS, PER_HEAD, recent=0.5),
    "fastcaote": Formula(fastcaote, WEIGHTS | ROWS, PER_HEAD, recent=0.5),
    "pagedeviction": Formula(
        pagedeviction, NORMS, ("layer", "token"), sinks=16, recent=16, evict_every=16, eager=True, pages=True
    ),
    "keydiff": Formula(keydiff, ROWS, PER_HEAD),
    "knorm": Formula(knorm, NORMS, PER_HEAD),
    "external": Formula(external, frozenset({"given"}), ALL),
    "lagkv": Formula(lagkv, NORMS, ALL, sinks=4, recent=0.25, evict_every=32, min_budget=64),
    "rkv": Formula(rkv, WEIGHTS | ROWS, ("head",), recent=8, evict_every=128, eager=True, window=8),
}


def formula(policy: str, parameters: Mapping[str, float]) -> Formula:
    """The formula with numbers of its formula that are not the published ones."""
    given = dict(parameters)
    base = FORMULAS[policy]
    if not given:
        return base
    if policy == "a2sf":
        return replace(base, decay=given["decay"])
    if policy == "external":
        return replace(base, score=partial(external, unscored=given["unscored"]))
    if policy == "lagkv":
        return replace(base, score=partial(lagkv, lag=int(given.get("lag", 128)), cross=bool(given.get("cross", 0))))
    window = int(given.get("window", base.window))
    kernel = int(given.get("kernel", {"snapkv": 5, "rkv": 7}[policy]))
    if policy == "snapkv":
        return replace(base, window=window, score=partial(snapkv, kernel=kernel))
    lambda_, threshold = given.get("lambda", 0.1), given.get("threshold", 0.5)
    score = partial(rkv, window=window, kernel=kernel, lambda_=lambda_, threshold=threshold)
    return replace(base, window=window, score=score)
