"""Eviction in one layer, simulated: which tokens each head keeps while a text is read token by token.

A head has slots. `block` victims are chosen at once, by the scores before the first of as many new tokens, and they leave
one by one, lowest first, as each new token is written: with a block of 1 that is an eviction per token. So a block of
queries is one matrix product with a mask. A layer reads its whole text before the next layer starts, which changes
nothing for a method that does not look at deeper layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .network import Full, Network, attend, attend_all, causal

NEVER = 1 << 30


@dataclass
class Layer:
    """One bounded layer's queries, keys and values (head, n, head_dim), from position 0 on.

    Tokens before `start` have evicted nothing; the attention of those from there on is wanted.
    """

    network: Network
    layer: int  # of the model
    index: int  # among the bounded layers
    n_bounded: int
    start: int
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def n(self) -> int:
        return self.k.shape[1]


@dataclass
class Slots:
    """What the heads of a layer keep, in no order; the last `block` columns take the tokens that are being read."""

    layer: Layer
    t: int  # position of the first token that is being read
    k: Tensor  # (n_head_kv, n_slots + block, head_dim)
    v: Tensor
    pos: Tensor  # (n_head_kv, n_slots + block), -1: free
    sums: Tensor  # (n_sums, n_head_kv, n_slots + block), what a method accumulates


class Method:
    """What stands in place of the attention of the bounded layers."""

    name: str
    budget: int  # tokens per head, the mean over all

    def begin(self, network: Network, full: Full) -> None:
        """Called before each run."""

    def first_eviction(self, n_bounded: int) -> int:
        """All tokens before this position see everything, in each layer."""
        return self.budget

    def attended(self, layer: Layer) -> Tensor:
        """(n_head, n - start, head_dim)"""
        raise NotImplementedError


@dataclass
class Evicting(Method):
    """A method that evicts. Subclasses say what is summed, `observe()`, and what is kept, `worth()`."""

    name: str
    budget: int
    sinks: int = 4
    recent: int = 0  # 0: max(16, a quarter of the budget)
    block: int = 1
    by_layer: bool = False  # scope: the heads of a layer keep the same tokens
    pooled: float = 0.0  # > 0: the heads of a layer share their budgets; each keeps at least this share of its own

    n_sums = 1

    def __post_init__(self) -> None:
        self.recent = self.recent or max(16, self.budget // 4)
        self.kept: list[Tensor] = []  # positions at the end of a run, per layer (n_head_kv, n_slots), -1: free

    def begin(self, network: Network, full: Full) -> None:
        self.kept = []

    def budgets(self, n_bounded: int) -> list[int]:
        """Of the layers; their mean is the budget."""
        return [self.budget] * n_bounded

    def first_eviction(self, n_bounded: int) -> int:
        return min(self.budgets(n_bounded))

    def observe(self, slots: Slots, weights: Tensor) -> None:
        """Add the weights (n_head_kv, group, queries, columns) of the newest queries to `slots.sums`."""
        raise NotImplementedError

    def worth(self, slots: Slots) -> Tensor:
        """(n_head_kv, n_columns): the lowest goes. Protected and free slots need no care."""
        raise NotImplementedError

    def attended(self, layer: Layer) -> Tensor:
        budget = self.budgets(layer.n_bounded)[layer.index]
        slots = self._prefix(layer, budget)
        n_slots = slots.pos.shape[1] - self.block
        parts = []
        for t in range(layer.start, layer.n, self.block):
            m = min(self.block, layer.n - t)
            slots.t = t
            leaves = self._leaving(slots, budget, m)[:, :n_slots]
            new = slice(n_slots, n_slots + m)
            slots.k[:, new], slots.v[:, new] = layer.k[:, t : t + m], layer.v[:, t : t + m]
            slots.pos[:, new] = torch.arange(t, t + m)
            slots.sums[:, :, new] = 0.0
            stays = (leaves[:, None] > torch.arange(m)[:, None]) & (slots.pos[:, None, :n_slots] >= 0)
            among = causal(0, m).expand(len(leaves), m, m)
            columns = n_slots + m
            out, weights = attend(
                layer.q[:, t : t + m], slots.k[:, :columns], slots.v[:, :columns], torch.cat([stays, among], -1)
            )
            parts.append(out)
            self.observe(slots, weights)
            self._settle(slots, leaves < m, m)
        self.kept.append(slots.pos[:, :n_slots].clone())
        return torch.cat(parts, 1)

    def _prefix(self, layer: Layer, budget: int) -> Slots:
        """The tokens before `start`, and what their queries have summed."""
        n_head_kv, _, head_dim = layer.k.shape
        n_slots = (budget if not self.pooled else n_head_kv * budget) + self.block
        shape = n_head_kv, n_slots
        slots = Slots(
            layer,
            0,
            torch.zeros(*shape, head_dim),
            torch.zeros(*shape, head_dim),
            torch.full(shape, -1),
            torch.zeros(self.n_sums, *shape),
        )
        start = layer.start
        slots.k[:, :start], slots.v[:, :start] = layer.k[:, :start], layer.v[:, :start]
        slots.pos[:, :start] = torch.arange(start)
        _, weights = attend(layer.q[:, :start], slots.k[:, :start], slots.v[:, :start], causal(0, start))
        self.observe(slots, weights)
        return slots

    def _leaving(self, slots: Slots, budget: int, m: int) -> Tensor:
        """For each slot the query from which on it is not seen: (n_head_kv, n_columns)."""
        leaves = torch.full_like(slots.pos, NEVER)
        n_head_kv = len(leaves)
        held = int((slots.pos >= 0).sum())
        room = budget * n_head_kv - held  # a new token comes to each head at once
        free = room // n_head_kv
        if m <= free:
            return leaves
        worth = self.worth(slots)
        if self.by_layer:
            worth = worth.sum(0, keepdim=True).expand_as(worth)
        protected = (slots.pos < self.sinks) | (slots.pos > slots.t - self.recent)
        worth = worth.masked_fill(protected, math.inf)
        need = m - free
        if not self.pooled:
            lowest = worth.topk(need, largest=False)
            assert not lowest.values.isinf().any(), f"{self.name}: a victim would be a protected token"
            return leaves.scatter_(1, lowest.indices, torch.arange(free, m).expand(n_head_kv, -1))
        spared = worth.masked_fill(slots.pos < 0, -math.inf).topk(int(self.pooled * budget)).indices
        worth = worth.scatter(1, spared, math.inf)
        lowest = worth.flatten().topk(need * n_head_kv, largest=False)
        assert not lowest.values.isinf().any(), f"{self.name}: a victim would be a protected token"
        times = free + torch.arange(need * n_head_kv) // n_head_kv
        return leaves.flatten().scatter_(0, lowest.indices, times).view_as(leaves)

    def _settle(self, slots: Slots, gone: Tensor, m: int) -> None:
        """The new tokens move into free slots of their head."""
        n_slots = gone.shape[1]
        pos = slots.pos[:, :n_slots]
        pos[gone] = -1
        into = (pos < 0).int().topk(m).indices  # (n_head_kv, m)
        rows = torch.arange(len(into))[:, None]
        new = slice(n_slots, n_slots + m)
        assert (pos[rows, into] < 0).all(), f"{self.name}: no slot is free"
        slots.k[rows, into], slots.v[rows, into] = slots.k[:, new].clone(), slots.v[:, new].clone()
        slots.pos[rows, into] = slots.pos[:, new].clone()
        slots.sums[:, rows, into] = slots.sums[:, :, new].clone()
        slots.pos[:, n_slots:] = -1


def run(network: Network, method: Method, full: Full) -> Tensor:
    """The hidden states (n - start, n_embd) behind the last norm, from the first eviction on, at `first_eviction()`."""
    bounded = network.spec.bounded
    method.begin(network, full)
    start = method.first_eviction(len(bounded))
    x = full.x[start:]
    for number in range(full.first, network.spec.n_layer):
        q, *kv = network.qkv(number, x, start)
        # nothing before the first eviction differs from the full cache
        k, v = (torch.cat([before[:, :start], new], 1) for before, new in zip(full.rows[number][1:], kv, strict=True))
        if window := network.spec.windows[number]:
            out = attend_all(q, k, v, start, window)
        else:
            q = torch.cat([full.rows[number][0][:, :start], q], 1)
            out = method.attended(Layer(network, number, bounded.index(number), len(bounded), start, q, k, v))
        x = network.finish(number, x, out)
    return network.last_norm(x)
