"""The reference for `filter=`: HeadOracle with later layers that leave single tokens out (Token Filtering, arXiv 2512.07090).

- Each filtered layer has an anchor per KV head, for keys and for values: A = 0.9 A + 0.1 x over all tokens that it has seen, left
  out or not, keys as they are attended with, before the cache rounds them.
- The similarity of a token: r = w mean_h cos(k_h, AK_h) + (1 - w) mean_h cos(v_h, AV_h), w = var_V / (var_K + var_V), the
  variances over the heads; w = 1/2 where both are 0.
- A single token is alike if r >= threshold. Then distance and mean of r, as means over up to 64 tokens, follow, and the
  threshold moves by 0.2 * distance * (1 - ratio) if it was, and by -0.2 * distance * ratio if it was not. The first one
  with an anchor gives mean and threshold.
- A token that is alike is left out if it is single, the cache is full, and the layer has judged `warmup` tokens before it.
  Then the layer attends to nothing, adds nothing to its weights, and evicts nothing; its victims stay the next ones.
- A rewind leaves what the first layer has left; of a layer that has more, the oldest that are not protected go.

The threshold is near a similarity now and then: the library's decision is adopted if both differ by less than `margin`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from models import Array, Spec
from oracle import IMPOSSIBLE
from oracle_heads import Choice, HeadOracle, Kept, Wrong


@dataclass
class Anchor:
    """What a layer remembers of its tokens; k, v: (n_head_kv, head_dim)."""

    k: Array
    v: Array
    n_added: int = 0
    n_judged: int = 0
    mean: float = 0.0
    distance: float = 0.0
    threshold: float = 0.0

    def similarity(self, k: Array, v: Array) -> float:
        def cosines(x: Array, anchor: Array) -> Array:
            norm = np.linalg.norm(x, axis=1) * np.linalg.norm(anchor, axis=1)
            cos: Array = np.divide((x * anchor).sum(axis=1), norm, out=np.zeros(len(x)), where=norm > 0)
            return cos

        of_k, of_v = cosines(k, self.k), cosines(v, self.v)
        both = of_k.var() + of_v.var()
        weight = of_v.var() / both if both > 1e-12 else 0.5
        return float(weight * of_k.mean() + (1.0 - weight) * of_v.mean())

    def judge(self, r: float, ratio: float, is_alike: bool) -> None:
        if self.n_judged == 0:
            self.mean = self.threshold = r
        self.n_judged += 1
        share = max(1 / 64, 1 / self.n_judged)
        self.distance += share * (abs(r - self.mean) - self.distance)
        self.mean += share * (r - self.mean)
        self.threshold += 0.2 * self.distance * (is_alike - ratio)

    def add(self, k: Array, v: Array) -> None:
        self.k, self.v, self.n_added = 0.9 * self.k + 0.1 * k, 0.9 * self.v + 0.1 * v, 1


class FilterOracle(HeadOracle):
    def __init__(
        self,
        spec: Spec,
        *,
        filter: float,
        filter_layers: int | None = None,
        filter_warmup: int = 64,
        margin: float = 1e-4,
        **options: Any,
    ) -> None:
        self.ratio, self.warmup, self.margin = filter, filter_warmup, margin
        self.n_filtered, self.n_filterable, self.n_adopted = 0, 0, 0
        self.left_out: list[tuple[int, int]] = []  # (position, layer)
        layers = [il for il in range(spec.n_layer) if not spec.is_swa(il)]
        self.filtered = layers[-(len(layers) // 2 if filter_layers is None else filter_layers) :]
        super().__init__(spec, **options)

    def _clear(self) -> None:
        super()._clear()
        shape = (self.spec.n_head_kv, self.spec.head_dim)
        self.anchors = {il: Anchor(np.zeros(shape), np.zeros(shape)) for il in self.filtered}
        self.waiting: dict[int, tuple[Array, Array]] = {}  # of units that kept their victim: candidates and worth
        self.owed: Choice | None = None  # of the units whose layer has not decided yet
        self.theirs: Kept | None = None
        self.out: set[int] = set()  # layers that leave the token of this step out
        self.going = np.zeros(self.spec.n_head_kv, dtype=int)  # victims of the layer at hand, one per head

    def chunk(self, tokens: Sequence[int], theirs: Kept | None = None) -> Array:
        self.owed, self.theirs, self.out = None, theirs, set()
        if len(tokens) > 1:
            self.waiting = {}
        return super().chunk(tokens, theirs)

    def rewind(self, p0: int) -> int:
        answer = super().rewind(p0)
        if answer == IMPOSSIBLE or p0 <= 0:
            return answer
        self.waiting = {} if p0 <= self.n_past else self.waiting
        for rows in self.rows.values():
            excess = len(rows.pos) - len(self.kept)
            if excess > 0:
                first = int((rows.pos[:, 0] < self.protect).sum())
                mask = np.ones(rows.pos.shape, dtype=bool)
                mask[first : first + excess] = False
                self.newest_evicted = max(self.newest_evicted, int(rows.pos[first : first + excess].max()))
                rows.keep(mask)
        return answer

    def fail(self, theirs: Kept | None = None) -> None:
        """The victims of all units are gone, whatever their layers would have decided; the anchors know nothing of it."""
        self.theirs, self.out = theirs, set()
        self._make_room(self.n_past, theirs)
        for i, unit in enumerate(self.units):
            if unit[0][0] in self.filtered:
                self._evict_one(i, self.n_past)
        self.owed, self.waiting = None, {}

    # ---- victims ----------------------------------------------------------------------------------------------------

    def _make_room(self, t: int, theirs: Kept | None) -> None:
        choice = self._choice(t, pages=False)
        for i, (pos, worth) in self.waiting.items():
            choice.pos[i], choice.worth[i] = pos, worth
        self.owed = choice
        for i, unit in enumerate(self.units):
            if unit[0][0] not in self.filtered:
                self._evict_one(i, t)
        self.kept = self.kept_of(*self.heads[0])

    def _evict_one(self, i: int, t: int) -> None:
        assert self.owed is not None
        pos, worth = self.owed.pos[i], self.owed.worth[i]
        own = np.argsort(worth, kind="stable")[:1]
        picked = own if self.theirs is None else self._followed(i, pos, worth, own, self.theirs[i])
        victim = int(pos[picked][0, 0])
        self.newest_evicted = max(self.newest_evicted, victim)
        self.n_chosen += 1
        self.n_differed += victim != int(pos[own][0, 0])
        rows = self.rows[self.units[i][0][0]]
        heads = [h for _, h in self.units[i]]
        self.going[heads], is_last = victim, heads[-1] == self.spec.n_head_kv - 1
        if is_last:  # the heads of a layer keep equally many
            rows.keep(rows.pos != self.going)
        if i == 0:
            self.evictions.append((t, victim))
        self.waiting.pop(i, None)

    # ---- the model --------------------------------------------------------------------------------------------------

    def _store(self, il: int, k: Array, v: Array) -> None:
        if il not in self.filtered:
            super()._store(il, k, v)
            return
        anchor = self.anchors[il]
        turned = self._rotated(il, k, np.arange(self.n_past, self.n_past + len(k)))
        if len(k) == 1:
            self._decide(il, anchor, turned[0], v[0])
        for each in zip(turned, v, strict=True):
            anchor.add(*each)
        if il not in self.out:
            super()._store(il, k, v)

    def _decide(self, il: int, anchor: Anchor, k: Array, v: Array) -> None:
        t, units = self.n_past, [i for i, unit in enumerate(self.units) if unit[0][0] == il]
        is_warm, alike = anchor.n_judged >= self.warmup, False
        if anchor.n_added:
            r = anchor.similarity(k, v)
            alike = anchor.n_judged > 0 and r >= anchor.threshold
            if self.owed is not None and is_warm and self.theirs is not None:
                they = t not in self.theirs[units[0]]
                if they != alike and abs(r - anchor.threshold) > self.margin:
                    raise Wrong(f"layer {il}, position {t}: similarity {r:.9g}, threshold {anchor.threshold:.9g}")
                self.n_adopted += they != alike
                alike = they
            anchor.judge(r, self.ratio, alike)
        if self.owed is None:
            return
        self.n_filterable += is_warm
        if alike and is_warm:
            self.out.add(il)
            self.n_filtered += 1
            self.left_out.append((t, il))
            self.waiting |= {i: (self.owed.pos[i], self.owed.worth[i]) for i in units}
        else:
            for i in units:
                self._evict_one(i, t)

    def _attention(self, il: int, q: Array, keys: Array, key_pos: Array, mask: Array) -> Array:
        if il in self.out:
            return np.zeros((len(q), self.spec.n_head * self.spec.head_dim))
        return super()._attention(il, q, keys, key_pos, mask)
