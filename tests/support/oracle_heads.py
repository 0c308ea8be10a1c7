"""The reference for policies that score: float64, with a kept set per unit, accumulated weights, and logits from them.

It adds to oracle.py what policies choose by (oracle_formulas.py) and who chooses: a unit is the whole cache (scope token), a
layer (scope layer) or a KV head of a layer (scope head). Sliding-window layers are outside the policy.

- Weights: a chunk of T queries makes A = decay^T * A + sum over its last `score_queries` queries t and the query heads of
  the KV head of decay^(T-1-t) * softmax weight. A new token starts at 0. With a window of w queries A starts over right
  before the first of the w queries that precede a choice, and a chunk of w or more queries starts it over too. Where A
  holds other queries when a choice is due (shorter chunks, rewinds), the last w queries are multiplied with what is kept
  then.
- One token at a full cache: a victim goes first, a position in [P, t - recent], by the scores after token t-1.
  evict_every > 1: so many are chosen at once, lowest first, and go one by one. Eager: they all go at once.
- A longer chunk sees everything kept and itself; then each unit evicts down to the budget at once.
- A token's worth in a unit is the sum over the unit's heads; the lowest goes, of equals the smaller position.

Two candidates whose float64 scores nearly agree may be chosen either way in float32. So a test hands over the kept sets
of the library (`theirs`): a victim that is worth more than the oracle's own by more than `tolerance` raises Wrong, and
else the library's choice is adopted. n_differed of n_chosen victims were not the oracle's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from models import Array, Spec
from oracle import EXACT, IMPOSSIBLE, Oracle, Rounding
from oracle_formulas import Head, formula, gate

Kept = Sequence[Sequence[int]]  # positions of each unit, ascending


class Wrong(AssertionError):
    """The library evicted what the formula keeps."""


@dataclass
class Rows:
    """The kept tokens of one layer, each head ordered by position."""

    pos: Array  # (n, n_head_kv)
    stand: Array  # (n, n_head_kv), where its key was rotated to last
    k: Array  # (n, n_head_kv, head_dim), un-rotated
    v: Array  # (n, n_head_kv, head_dim)
    weights: Array  # (n, n_head_kv)

    @classmethod
    def empty(cls, spec: Spec) -> Rows:
        numbers, vectors = np.zeros((0, spec.n_head_kv)), np.zeros((0, spec.n_head_kv, spec.head_dim))
        return cls(numbers.astype(int), numbers.astype(int), vectors, vectors, numbers)

    def append(self, pos: Array, k: Array, v: Array) -> None:
        pos = np.repeat(pos[:, None], k.shape[1], axis=1)
        self.pos, self.stand = np.concatenate([self.pos, pos]), np.concatenate([self.stand, pos])
        self.k, self.v = np.concatenate([self.k, k]), np.concatenate([self.v, v])
        self.weights = np.concatenate([self.weights, np.zeros(pos.shape)])

    def keep(self, mask: Array) -> None:
        """mask (n, n_head_kv): as many tokens of each head."""
        heads = np.arange(mask.shape[1])
        order = np.nonzero(mask.T)[1].reshape(len(heads), -1).T
        for name in ("pos", "stand", "k", "v", "weights"):
            setattr(self, name, getattr(self, name)[order, heads])


@dataclass
class Choice:
    """The candidates of each unit: tokens (c, 1) or pages (c, page_size) with their worth (c,), and how many may go."""

    pos: list[Array]
    worth: list[Array]
    left: int = 0


class HeadOracle(Oracle):
    def __init__(
        self,
        spec: Spec,
        *,
        policy: str,
        budget: int | None = None,
        scope: str | None = None,
        sinks: int = 4,
        recent: int = 1,
        pinned: int = 0,
        positions: str = "true",
        score_queries: int | None = None,
        evict_every: int | None = None,
        parameters: Mapping[str, float] | None = None,
        page_size: int = 16,
        round_kv: Rounding | None = None,
        tolerance: float = 1e-5,
    ) -> None:
        super().__init__(
            spec,
            budget=budget,
            sinks=sinks,
            pinned=pinned,
            positions=positions,
            policy=policy,
            recent=recent,
            round_kv=round_kv,
        )
        own = dict(parameters or {})
        self.graph, self.graph_near = own.pop("graph", 0.0), int(own.pop("graph_near", 16))
        self.formula, self.given_positions = formula(policy, own), positions
        self.scope = scope or self.formula.scope
        self.score_queries, self.page_size, self.sinks = score_queries, page_size, sinks
        self.evict_every = page_size if self.formula.pages else evict_every or self.formula.evict_every
        self.tolerance, self.n_chosen, self.n_differed = tolerance, 0, 0
        self.n_choices, self.n_constant = 0, 0  # of them: all candidates were worth the same
        layers = [il for il in range(spec.n_layer) if not spec.is_swa(il)]
        self.heads = [(il, h) for il in layers for h in range(spec.n_head_kv)]
        self.units = {
            "token": [self.heads],
            "layer": [[u for u in self.heads if u[0] == il] for il in layers],
            "head": [[u] for u in self.heads],
        }[self.scope]
        self._clear()

    def _clear(self) -> None:
        self.rows = {il: Rows.empty(self.spec) for il, _ in self.heads}
        self.batch: Choice | None = None  # victims that go one by one
        self.queries: dict[int, list[tuple[int, Array]]] = {
            il: [] for il in self.rows
        }  # (position, (n_head, head_dim))
        self.counted: int | None = 0  # queries in A; None: unknown
        self.n_visible = 0  # tokens that the last query saw
        self.newest_evicted = -1  # by any unit
        self.positions = self.given_positions

    def kept_of(self, il: int, head: int) -> list[int]:
        return [int(p) for p in self.rows[il].pos[:, head]]

    def kept_by_unit(self) -> list[list[int]]:
        return [self.kept_of(*unit[0]) for unit in self.units]

    def weights_of(self, il: int, head: int) -> dict[int, float]:
        """Position -> accumulated weight, 0 where the policy reads none, or the score that was set."""
        kept = self.kept_of(il, head)
        if "given" in self.formula.needs:
            return {p: gate(il, head, p) for p in kept}
        weights = self.rows[il].weights[:, head] if "weights" in self.formula.needs else np.zeros(len(kept))
        return dict(zip(kept, weights.tolist(), strict=True))

    # ---- steps ------------------------------------------------------------------------------------------------------

    def chunk(self, tokens: Sequence[int], theirs: Kept | None = None) -> Array:
        """Process one ubatch; returns the logits of its last token. theirs: what the library keeps after it."""
        n, last = len(tokens), self.n_past + len(tokens) - 1
        if n == 1 and len(self.kept) == self.budget:
            self._make_room(last, theirs)
        if self.formula.window and self._starts_window(n):
            for rows in self.rows.values():
                rows.weights = np.zeros(rows.weights.shape)
            self.counted = 0
        if self.counted is not None:
            self.counted = self.formula.window if n >= self.formula.window else self.counted + n
        visible = np.array([*self.kept, *range(self.n_past, last + 1)])
        self.n_visible = len(visible)
        oldest = min([int(visible[0]), *(kept[0] for kept in self.kept_by_unit() if kept)])
        if self.positions == "auto" and last - oldest >= self.spec.n_ctx_train:
            self.positions = "cache"
        rank = np.arange(len(visible)) if self.positions == "cache" else visible
        logits = self._forward(np.asarray(tokens), visible, rank)
        self.kept, self.n_past = self.kept_of(*self.heads[0]), self.n_past + n
        excess = len(visible) - (self.budget or len(visible))
        if excess > 0:
            self.batch = None
            self._evict_lowest(self._lowered(self._choice(last, pages=False), excess), excess, last, theirs)
        if theirs is not None:
            for i, unit in enumerate(self.kept_by_unit()):
                if list(theirs[i]) != unit:
                    raise Wrong(f"unit {i}: the library keeps {list(theirs[i])}, the formula {unit}")
        return logits

    def draft(self, tokens: Sequence[int], n_accepted: int) -> Array:
        """As Oracle.draft(); whatever stays of it, victims that were chosen before it are chosen anew."""
        logits = super().draft(tokens, n_accepted)
        self.batch = None if n_accepted > 0 else self.batch
        return logits

    def settle(self, theirs: Kept | None = None) -> None:
        """The evictions that the last ubatch still owes."""
        excess = len(self.kept) - (self.budget or len(self.kept))
        if excess > 0:
            choice = self._lowered(self._choice(self.n_past - 1, pages=False), excess)
            self._evict_lowest(choice, excess, self.n_past - 1, theirs)

    def eval(self, tokens: Sequence[int], n_ubatch: int, theirs: Kept | None = None) -> Array:
        """Process a batch as upstream splits it; theirs: what the library keeps after the last ubatch."""
        for i in range(0, len(tokens), n_ubatch):
            logits = self.chunk(tokens[i : i + n_ubatch], theirs if i + n_ubatch >= len(tokens) else None)
        return logits

    def fail(self, theirs: Kept | None = None) -> None:
        """A single-token step at a full cache was placed, but not computed: its victims are gone all the same.

        The weights are unspecified from now on.
        """
        self._make_room(self.n_past, theirs)

    def rewind(self, p0: int) -> int:
        """Drop the tokens at positions >= p0, unless some unit has evicted one of them; the sums keep their queries."""
        if 0 < p0 < self.n_past and p0 <= self.newest_evicted:
            return IMPOSSIBLE
        if p0 >= self.n_past:
            return EXACT
        n_past = self.n_past
        answer = super().rewind(p0)
        if p0 <= 0:
            self._clear()
        elif answer >= 0:
            self.batch, self.counted, self.n_visible = None, None, self.n_visible - (n_past - p0)
            for il, rows in self.rows.items():
                rows.keep(rows.pos < p0)
                self.queries[il] = [item for item in self.queries[il] if item[0] < p0]
        return answer

    # ---- victims ----------------------------------------------------------------------------------------------------

    def _make_room(self, t: int, theirs: Kept | None) -> None:
        """A single token arrives at position t, and the cache is full."""
        if self.batch is None or self.batch.left == 0:
            self.batch = self._choice(t, self.formula.pages)
            self.batch.left = min(1 if self.formula.pages else self.evict_every, len(self.batch.worth[0]))
        n = self.batch.left if self.formula.eager else 1
        self._evict_lowest(self.batch, n, t, theirs)
        self.batch.left -= n

    def _starts_window(self, n: int) -> bool:
        if n > 1 or self.budget is None:
            return n >= self.formula.window
        free = self.budget - len(self.kept) - 1
        left = self.batch.left if self.batch is not None and self.batch.left else free
        return left == self.formula.window - 1

    def _choice(self, newest: int, pages: bool) -> Choice:
        """All candidates, where the token at `newest` is the last of the sequence."""
        limit = newest - self.recent
        if self.formula.window and self.counted != min(self.formula.window, len(next(iter(self.queries.values())))):
            self._sum_window()
        choice = Choice([], [])
        for unit in self.units:
            pos = self.rows[unit[0][0]].pos[:, unit[0][1]]
            scores = sum(self.formula.score(self._head(il, h, limit)) for il, h in unit)
            n = len(pos) // self.page_size * self.page_size
            items = np.arange(n).reshape(-1, self.page_size) if pages else np.arange(len(pos))[:, None]
            may_go = (self.protect <= pos) & (pos <= limit)
            items = items[may_go[items].all(axis=1)]
            summed = np.asarray(scores)[..., items].sum(axis=-1)
            choice.pos.append(pos[items])
            choice.worth.append(summed[0] / summed[1] if summed.ndim == 2 else summed)
            if len(items) > 1:
                self.n_choices += 1
                self.n_constant += np.ptp(choice.worth[-1]) == 0.0
        return choice

    def _lowered(self, choice: Choice, n: int) -> Choice:
        """GraphKV (Li et al. 2025, arXiv 2509.00388, section 4.3, one round), where n candidates of each unit will go.

        The best ones, a share of those that stay, each multiply the worth of the graph_near others nearest to them by
        1 - cosine, which is that of their stored keys, the mean over the unit's heads, and at least 0.
        """
        for unit, pos, worth in zip(self.units, choice.pos, choice.worth, strict=True):
            n_best, factor = int(self.graph * max(0, len(pos) - n)), np.ones(len(pos))
            if n_best == 0:
                continue
            cosines = np.zeros((len(pos), len(pos)))
            for il, h in unit:
                rows = self.rows[il]
                k, _ = self._as_stored(il, rows.k[:, h, None], rows.v[:, h, None], rows.stand[:, h, None])
                k = k[np.searchsorted(rows.pos[:, h], pos[:, 0]), 0]
                k /= np.linalg.norm(k, axis=1, keepdims=True)
                cosines += k @ k.T / len(unit)
            np.fill_diagonal(cosines, -np.inf)
            for i in np.argsort(worth, kind="stable")[::-1][:n_best]:
                near = np.argsort(-cosines[i], kind="stable")[: min(self.graph_near, len(pos) - 1)]
                factor[near] *= 1.0 - np.clip(cosines[i][near], 0.0, 1.0)
            worth *= factor
        return choice

    def _sum_window(self) -> None:
        """A = the weights that the last queries give to what is kept now, each to the tokens up to its own."""
        if not any(self.queries.values()):  # all of them were taken back
            for rows in self.rows.values():
                rows.weights = np.zeros(rows.weights.shape)
            self.counted = 0
            return
        for il, rows in self.rows.items():
            pos = np.array([item[0] for item in self.queries[il]])
            q = np.stack([item[1] for item in self.queries[il]])
            stand = pos - (self.n_past - 1) + self.n_visible - 1 if self.positions == "cache" else pos
            k, _ = self._as_stored(il, rows.k, rows.v, rows.stand)
            mask = np.where(rows.pos.T[:, None, None, :] > pos[None, None, :, None], -np.inf, 0.0)
            rows.weights = self._weights(il, q, stand, k, mask).sum(axis=(1, 2)).T
        self.counted = min(self.formula.window, len(pos))

    def _head(self, il: int, h: int, limit: int) -> Head:
        rows, needs, spec = self.rows[il], self.formula.needs, self.spec
        k, v = rows.k[:, h], rows.v[:, h]
        stored = k, v
        if "rows" in needs:
            k_stored, v_stored = self._as_stored(il, k[:, None], v[:, None], rows.stand[:, h, None])
            stored = k_stored[:, 0], v_stored[:, 0]
        number = {"token": None, "layer": list(self.rows).index(il), "head": self.heads.index((il, h))}[self.scope]
        n_old = int((rows.pos[:, h] <= limit).sum())
        group = spec.n_head // spec.n_head_kv
        n_protect = int((rows.pos[:, h] < self.protect).sum())
        given = np.array([gate(il, h, int(p)) for p in rows.pos[:, h]]) if "given" in needs else None
        return Head(
            rows.pos[:, h], n_old, group, number, rows.weights[:, h], k, v, *stored, n_protect, self.sinks, given
        )

    def _evict_lowest(self, choice: Choice, n: int, newest: int, theirs: Kept | None) -> None:
        """The n lowest of each unit go, or what the library took in their place."""
        masks = {il: np.ones(rows.pos.shape, dtype=bool) for il, rows in self.rows.items()}
        for i, unit in enumerate(self.units):
            pos, worth = choice.pos[i], choice.worth[i]
            own = np.argsort(worth, kind="stable")[:n]
            picked = own if theirs is None else self._followed(i, pos, worth, own, theirs[i])
            victims = np.sort(pos[picked], axis=None)
            self.newest_evicted = max([self.newest_evicted, *victims.tolist()])
            self.n_chosen += len(victims)
            self.n_differed += len(set(victims.tolist()) - set(pos[own].ravel().tolist()))
            for il, h in unit:
                masks[il][np.searchsorted(self.rows[il].pos[:, h], victims), h] = False
            if i == 0:
                in_chunk = self.batch is None
                self.evictions += [(newest - j * in_chunk, int(p)) for j, p in enumerate(victims)]
            left = np.ones(len(pos), dtype=bool)
            left[picked] = False
            choice.pos[i], choice.worth[i] = pos[left], worth[left]
        for il, rows in self.rows.items():
            rows.keep(masks[il])
        self.kept = self.kept_of(*self.heads[0])

    def _followed(self, i: int, pos: Array, worth: Array, own: Array, theirs: Sequence[int]) -> Array:
        """The candidates that the library took, if they are as good as the oracle's own."""
        gone, best = sorted(set(self.kept_of(*self.units[i][0])) - set(theirs)), sorted(pos[own].ravel().tolist())
        if gone == best:
            return own
        picked = np.flatnonzero(np.isin(pos, gone).all(axis=1))
        if len(picked) != len(own) or len(gone) != len(best):
            raise Wrong(f"unit {i}: the library evicted {gone}, the formula {best}")
        highest, limit = worth[picked].max(), worth[own].max()
        scale = max(abs(highest), abs(limit), float(np.median(np.abs(worth))))
        if highest > limit + self.tolerance * scale:
            raise Wrong(
                f"unit {i}: the library evicted {gone} (up to {highest:.9g}), the formula {best} (up to {limit:.9g})"
            )
        return picked

    # ---- the model --------------------------------------------------------------------------------------------------

    def _store(self, il: int, k: Array, v: Array) -> None:
        if il in self.rows:
            self.rows[il].append(np.arange(self.n_past, self.n_past + len(k)), k, v)
        else:
            super()._store(il, k, v)

    def _attention(self, il: int, q: Array, keys: Array, key_pos: Array, mask: Array) -> Array:
        if il not in self.rows:
            return super()._attention(il, q, keys, key_pos, mask)
        rows = self.rows[il]
        if self.positions == "cache":
            rows.stand = np.repeat(key_pos[:, None], rows.pos.shape[1], axis=1)
        k, v = self._as_stored(il, rows.k, rows.v, rows.stand)
        if self.formula.window:
            new = [(self.n_past + i, x) for i, x in enumerate(q)]
            self.queries[il] = [*self.queries[il], *new][-self.formula.window :]
        a = self._weights(il, q, key_pos[-len(q) :], k, mask)
        self._accumulate(rows, a)
        return self._mix(a, v)

    def _accumulate(self, rows: Rows, a: Array) -> None:
        """a: (n_head_kv, group, n, n_keys)"""
        n, formula = a.shape[2], self.formula
        counted = min(n, self.score_queries or n, formula.window if formula.window and n >= formula.window else n)
        share = formula.decay ** np.arange(n - 1, -1, -1.0)
        share[: n - counted] = 0.0
        rows.weights = formula.decay**n * rows.weights + np.einsum("ghtj,t->jg", a, share)
