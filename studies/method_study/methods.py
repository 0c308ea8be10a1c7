"""The methods of the study, each as its paper says it, with what is ours named.

A method that was made for prompts chooses here every 32 tokens while the text is read token by token, by its last 32
queries, as `snapkv` does in the library.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .eviction import Evicting, Layer, Method, Slots
from .network import Full, Network, attend, attend_all, causal

# ---- in the library --------------------------------------------------------------------------------------------------


@dataclass
class Everything(Method):
    """The full cache."""

    name: str
    budget: int

    def attended(self, layer: Layer) -> Tensor:
        return attend_all(layer.q[:, layer.start :], layer.k, layer.v, layer.start)


@dataclass
class Streaming(Method):
    """Sinks and the newest tokens; positions `cache`: the sinks follow the window (StreamingLLM, arXiv 2309.17453)."""

    name: str
    budget: int
    sinks: int = 4
    chunk: int = 128

    def attended(self, layer: Layer) -> Tensor:
        start, n, (n_head_kv, _, head_dim) = layer.start, layer.n, layer.k.shape
        q, size = layer.q[:, start:], self.budget - self.sinks
        # to every query a sink is as far away as it is to the last token of the first full cache
        q_sinks = layer.network.turn(q, self.budget - 1 - torch.arange(start, n), layer.layer)
        parts = []
        for begin in range(start, n, self.chunk):
            end = min(begin + self.chunk, n)
            first = max(self.sinks, begin - size + 1)
            scores = [
                each[:, begin - start : end - start].reshape(n_head_kv, -1, head_dim) @ k.transpose(1, 2)
                for each, k in ((q_sinks, layer.k[:, : self.sinks]), (q, layer.k[:, first:end]))
            ]
            visible = causal(begin, end, size)[:, first:]
            scores[1].view(n_head_kv, -1, *visible.shape).masked_fill_(~visible, -math.inf)
            weights = (torch.cat(scores, -1) * head_dim**-0.5).softmax(-1)
            v = torch.cat([layer.v[:, : self.sinks], layer.v[:, first:end]], 1)
            parts.append((weights @ v).view(-1, end - begin, head_dim))
        return torch.cat(parts, 1)


def attend_visible(layer: Layer, visible: Tensor, chunk: int = 128) -> Tensor:
    """visible: (n, n), which positions each query sees."""
    parts = []
    for begin in range(layer.start, layer.n, chunk):
        rows = visible[begin : begin + chunk]
        columns = rows.any(0).nonzero()[:, 0]
        k, v = layer.k[:, columns], layer.v[:, columns]
        parts.append(attend(layer.q[:, begin : begin + chunk], k, v, rows[:, columns])[0])
    return torch.cat(parts, 1)


def drawn(position: int) -> int:
    """splitmix64 of the position, as the library draws at scope token."""
    mask = 2**64 - 1
    z = (position + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


@dataclass
class Random(Method):
    """A uniform sample, the same in all layers and heads."""

    name: str
    budget: int
    sinks: int = 4
    recent: int = 0  # 0: max(16, a quarter of the budget)

    def begin(self, network: Network, full: Full) -> None:
        n, recent = len(full.x), self.recent or max(16, self.budget // 4)
        kept, old = set(range(self.budget)), [(drawn(p), p) for p in range(self.sinks, self.budget - recent + 1)]
        heapq.heapify(old)
        self._visible = torch.zeros(n, n, dtype=torch.bool)
        for t in range(self.budget, n):
            kept.remove(heapq.heappop(old)[1])
            kept.add(t)
            heapq.heappush(old, (drawn(t - recent + 1), t - recent + 1))
            self._visible[t, list(kept)] = True

    def attended(self, layer: Layer) -> Tensor:
        return attend_visible(layer, self._visible)


@dataclass
class Summed(Evicting):
    """What all queries so far give a token: a sum that fades by `decay` per query, or the largest weight.

    decay 1 is H2O (arXiv 2306.14048), 0.95 A2SF (2407.20485), 0 with `by_layer` TOVA (2401.06104).
    """

    decay: float = 1.0
    queries: Literal["sum", "max"] = "sum"
    heads: Literal["sum", "max"] = "sum"  # of the query heads that share a KV head

    def observe(self, slots: Slots, weights: Tensor) -> None:
        each = weights.sum(1) if self.heads == "sum" else weights.amax(1)  # (n_head_kv, queries, columns)
        total = slots.sums[0, :, : each.shape[-1]]
        if self.queries == "max":
            torch.maximum(total, each.amax(1), out=total)
        else:
            fading = self.decay ** torch.arange(each.shape[1] - 1, -1, -1.0)
            total.mul_(self.decay ** each.shape[1]).add_((each * fading[:, None]).sum(1))

    def worth(self, slots: Slots) -> Tensor:
        return slots.sums[0]


@dataclass
class Windowed(Evicting):
    """What the last `window` queries give a token, averaged over 5 neighbours (SnapKV, arXiv 2404.14469)."""

    block: int = 32
    window: int = 32
    kernel: int = 5
    queries: Literal["sum", "max"] = "sum"
    heads: Literal["sum", "max"] = "sum"

    def observe(self, slots: Slots, weights: Tensor) -> None:
        each = (weights.sum(1) if self.heads == "sum" else weights.amax(1))[:, -self.window :]
        slots.sums[0, :, : each.shape[-1]] = each.sum(1) if self.queries == "sum" else each.amax(1)

    def worth(self, slots: Slots) -> Tensor:
        """Zeros stand beyond both ends of the tokens that are not recent."""
        pos = slots.pos
        order = torch.where(pos < 0, slots.layer.n, pos).argsort(1)
        score = slots.sums[0] * ((pos >= 0) & (pos <= slots.t - self.recent))
        pooled = functional.avg_pool1d(score.gather(1, order), self.kernel, 1, self.kernel // 2)
        return torch.empty_like(pooled).scatter_(1, order, pooled)


# ---- budgets that differ ---------------------------------------------------------------------------------------------


def shared_out(wanted: Sequence[float], total: int, least: int) -> list[int]:
    """Whole numbers whose sum is `total`, each at least `least` and beyond that in proportion to `wanted`.

    What rounding leaves goes to the largest remainders.
    """
    extra = [max(0.0, each - least) for each in wanted]
    room = total - least * len(extra)
    exact = [each * room / sum(extra) for each in extra]
    whole = [int(each) for each in exact]
    for i in sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])[: room - sum(whole)]:
        whole[i] += 1
    return [least + each for each in whole]


@dataclass
class Pyramid(Windowed):
    """SnapKV with layer budgets that fall linearly (PyramidKV, arXiv 2406.02069).

    The window apart, the last layer has a beta-th of the mean and the first as much as makes the mean right. Ours: no layer
    has less than sinks, recent tokens and a block, since each chooses 32 victims at a time.
    """

    beta: float = 20.0

    def budgets(self, n_bounded: int) -> list[int]:
        room = self.budget - self.window
        first, steps = 2 * room - room / self.beta, max(1, n_bounded - 1)
        wanted = [self.window + first - i * (first - room / self.beta) / steps for i in range(n_bounded)]
        return shared_out(wanted, self.budget * n_bounded, self.sinks + self.recent + self.block)


@dataclass
class Compose(Evicting):
    """KVCompose (arXiv 2509.05165): a token's score in a head is the largest weight that any query has given it.

    Of a query head; then the mean over the group; then the mean over the KV heads of the layer is added. Each head keeps
    its own best: its r-th best and those of the other heads make the r-th composite token. `layered`: the composite tokens
    of all layers compete for the budget, so layers differ. Theirs is for a prompt, scored by a second pass over it. Ours
    takes the queries as they come, and settles the budgets once, by the first `calibration` tokens of the same text: a
    look ahead, to the method's advantage. Ours, too, is the least budget of a layer.
    """

    block: int = 32
    layered: bool = False
    calibration: int = 1024

    def begin(self, network: Network, full: Full) -> None:
        super().begin(network, full)
        self.n_sums = network.spec.group
        self._budgets = self._settled(network, full) if self.layered else [self.budget] * len(network.spec.bounded)

    def budgets(self, n_bounded: int) -> list[int]:
        return self._budgets

    def attended(self, layer: Layer) -> Tensor:
        self._known = torch.zeros(len(layer.k), layer.n)  # each token's last score in a head, evicted or not
        return super().attended(layer)

    def observe(self, slots: Slots, weights: Tensor) -> None:
        largest = slots.sums[:, :, : weights.shape[-1]]
        torch.maximum(largest, weights.amax(2).transpose(0, 1), out=largest)

    def worth(self, slots: Slots) -> Tensor:
        own, held = slots.sums.mean(0), slots.pos >= 0
        heads = torch.arange(len(own))[:, None].expand_as(own)
        self._known[heads[held], slots.pos[held]] = own[held]
        return own + self._known.mean(0)[slots.pos.clamp(min=0)]

    def _settled(self, network: Network, full: Full) -> list[int]:
        spec, composites = network.spec, []
        for layer in spec.bounded:
            q, k, v = full.rows[layer]
            n = min(self.calibration, k.shape[1])
            largest = torch.zeros(spec.n_head, n)
            for begin in range(0, n, 256):
                end = min(begin + 256, n)
                weights = attend(q[:, begin:end], k[:, :end], v[:, :end], causal(begin, end))[1]
                torch.maximum(largest[:, :end], weights.amax(2).flatten(0, 1), out=largest[:, :end])
            score = largest.view(spec.n_head_kv, -1, n).mean(1)
            composites.append((score + score.mean(0)).sort(1, descending=True).values.mean(0))
        total = self.budget * len(composites)
        least = torch.cat(composites).topk(total).values[-1]
        wanted = [int((each >= least).sum()) for each in composites]
        return shared_out(wanted, total, self.sinks + self.recent + self.block)


# ---- cascades: what a layer drops is gone for all deeper ones --------------------------------------------------------


@dataclass
class Cascade(Evicting):
    """A layer keeps only what the layer before it keeps, and fewer tokens: 1.5 budgets at first, half of one at last.

    `importance` all: SpAtten's cascade (arXiv 2012.09852), attention summed over heads, queries and the layers so far.
    `importance` last: LazyLLM's score (arXiv 2407.14057), the newest query's, mean over heads, as an eviction: what it
    drops does not come back. Its own rule is `Lazy`. Ours: budgets that fall linearly.
    """

    importance: Literal["all", "last"] = "all"
    by_layer: bool = True

    def budgets(self, n_bounded: int) -> list[int]:
        steps = max(1, n_bounded - 1)
        wanted = [self.budget * (1.5 - i / steps) for i in range(n_bounded)]
        return shared_out(wanted, self.budget * n_bounded, self.sinks + self.recent + self.block)

    def begin(self, network: Network, full: Full) -> None:
        super().begin(network, full)
        n = len(full.x)
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # by block: importance (n,) and kept (n,) of the last layer
        self._now: dict[int, tuple[Tensor, Tensor]] = {}
        self._nothing = torch.zeros(n), torch.ones(n, dtype=torch.bool)

    def attended(self, layer: Layer) -> Tensor:
        self._before, self._now = self._now, {}
        return super().attended(layer)

    def observe(self, slots: Slots, weights: Tensor) -> None:
        each = weights.sum((0, 1))  # (queries, columns); all heads of a layer have the same tokens in the same slots
        total = slots.sums[0, :, : each.shape[-1]]
        total.copy_(total + each.sum(0) if self.importance == "all" else each[-1].expand_as(total))

    def worth(self, slots: Slots) -> Tensor:
        before, kept = self._before.get(slots.t, self._nothing)
        own, pos = slots.sums[0], slots.pos.clamp(min=0)
        if self.importance == "all":
            own = own + before[pos]
            summed = before.clone()
            summed[pos[0][slots.pos[0] >= 0]] = own[0][slots.pos[0] >= 0]
            self._summed = summed
        else:
            self._summed = before
        return torch.where(kept[pos], own, -1.0)

    def _leaving(self, slots: Slots, budget: int, m: int) -> Tensor:
        self.worth(slots)  # deeper layers may be full when this one is not
        leaves = super()._leaving(slots, budget, m)
        kept = torch.zeros_like(self._nothing[1])
        kept[slots.pos[0][(leaves[0] >= m) & (slots.pos[0] >= 0)]] = True
        kept[slots.t :] = True
        self._now[slots.t] = self._summed, kept
        return leaves


@dataclass
class Lazy(Method):
    """LazyLLM (arXiv 2407.14057) while decoding: a query sees in each layer the best of what it saw in the layer before.

    By its own weights there, mean over heads; from 1.5 budgets down to half of one. Nothing is evicted: its Aux cache keeps
    what may come back, so bytes are those of the full cache and only the attention is smaller. Ours: the numbers of tokens,
    which fall linearly, that the first layer sees everything, and that sinks and recent tokens go on.
    """

    name: str
    budget: int
    sinks: int = 4
    recent: int = 32

    def attended(self, layer: Layer) -> Tensor:
        start, n, parts, chosen = layer.start, layer.n, [], []
        steps = max(1, layer.n_bounded - 1)
        size = round(self.budget * (1.5 - min(layer.index + 1, steps) / steps))  # that the next layer sees
        for begin in range(start, n, 128):
            end = min(begin + 128, n)
            visible = causal(begin, end)
            if layer.index:
                visible = visible & self._chosen[begin - start : end - start, :end]
            out, weights = attend(layer.q[:, begin:end], layer.k[:, :end], layer.v[:, :end], visible)
            parts.append(out)
            mean = weights.sum((0, 1))
            mean[:, : self.sinks] = math.inf
            mean.masked_fill_(causal(begin, end, self.recent), math.inf)
            best = mean.topk(min(size, end), sorted=False).indices
            chosen.append(torch.zeros(end - begin, n, dtype=torch.bool).scatter_(1, best, True))
        self._chosen = torch.cat(chosen)
        return torch.cat(parts, 1)


# ---- other scores ----------------------------------------------------------------------------------------------------


@dataclass
class Expected(Evicting):
    """Expected Attention (arXiv 2510.00636): the weight that queries of the next 512 positions would give a token.

    Queries are taken as normal, with the mean and covariance that the last `memory` of them had before their rotation, and
    rotated by the mean rotation of those positions; the softmax's mean over the group, times the norm of the value.
    """

    block: int = 32
    memory: int = 256
    ahead: int = 512

    def begin(self, network: Network, full: Full) -> None:
        super().begin(network, full)
        axes = torch.eye(network.spec.head_dim)[:, None].expand(-1, self.ahead, -1)
        self._mean_turn = {
            layer: network.turn(axes, torch.arange(self.ahead), layer).mean(1)  # row i: of axis i
            for layer in network.spec.bounded
        }

    def observe(self, slots: Slots, weights: Tensor) -> None:
        pass

    def worth(self, slots: Slots) -> Tensor:
        layer, t = slots.layer, slots.t
        first = max(self.sinks, t - self.memory)
        q = layer.network.turn(layer.q[:, first:t], -torch.arange(first, t), layer.layer)
        n_head_kv, _, head_dim = slots.k.shape
        mean = q.mean(1)
        q = q - mean[:, None]
        covariance = q.transpose(1, 2) @ q / q.shape[1]
        mean_turn = self._mean_turn[layer.layer]
        rotation = layer.network.turn(mean_turn, torch.full((head_dim,), t), layer.layer)
        mean = (mean @ rotation).view(n_head_kv, -1, head_dim, 1)
        covariance = (rotation.T @ covariance @ rotation).view(n_head_kv, -1, head_dim, head_dim)
        k = slots.k[:, None]  # (n_head_kv, 1, columns, head_dim)
        scores = (k @ mean)[..., 0] * head_dim**-0.5 + ((k @ covariance) * k).sum(-1) / (2 * head_dim)
        protected = (slots.pos < self.sinks)[:, None]  # sinks, and slots that are free
        weights = scores.masked_fill(protected, -math.inf).softmax(-1).mean(1)
        return weights * slots.v.norm(dim=-1)


@dataclass
class Vase(Windowed):
    """VaSE (arXiv 2606.03928): values of large magnitude are protected, and the rest goes by chance.

    Ours, since we had its abstract and no formula: the base score (SnapKV's) times the value's norm, to its logarithm
    Gumbel noise of the size `noise` is added, and the largest `spared` of the budget by the value's norm never go.
    """

    spared: float = 0.1
    noise: float = 1.0

    def worth(self, slots: Slots) -> Tensor:
        size = slots.v.norm(dim=-1)
        score = (super().worth(slots) * size).clamp(min=1e-30).log()
        if self.noise:
            generator = torch.Generator().manual_seed(slots.t + (slots.layer.layer << 20))
            uniform = torch.rand(score.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
            score = score - self.noise * (-uniform.log()).log()
        held = size.masked_fill(slots.pos < 0, -1.0)
        return score.scatter(1, held.topk(int(self.spared * self.budget)).indices, 1e9)


@dataclass
class Filtered(Method):
    """Token Filtering (arXiv 2512.07090): a token that is like its past writes nothing and attends to nothing.

    In the second half of the bounded layers, after the first `budget` tokens. Its key and value are compared, by their
    cosine, with running means that fade by `fade` per token; the two similarities, mean over heads, are weighted by how
    little each varies over the heads. Ours, since the weights and thresholds are not in what we have read: weights are
    inverse variances, keys are compared without their rotation, and a token is filtered if it is more alike than the share
    `share` of the last `memory` tokens. Nothing is evicted.
    """

    name: str
    budget: int
    share: float
    fade: float = 0.9
    memory: int = 256

    def attended(self, layer: Layer) -> Tensor:
        start, n = layer.start, layer.n
        if layer.index < layer.n_bounded // 2:
            return attend_all(layer.q[:, start:], layer.k, layer.v, start)
        raw = layer.network.turn(layer.k, -torch.arange(n), layer.layer)
        age = torch.arange(n)[:, None] - 1 - torch.arange(n)
        past = torch.where(age >= 0, self.fade ** age.clamp(min=0), 0.0)  # row t: of the tokens before t
        alike = torch.stack(
            [functional.cosine_similarity(past @ x, x, dim=-1) for x in (raw, layer.v)]
        )  # (2, heads, n)
        steady = 1.0 / (alike.var(1, correction=0) + 1e-6)
        score = (alike.mean(1) * steady).sum(0) / steady.sum(0)  # (n,)
        before = score[max(0, start - self.memory) : -1].unfold(0, min(self.memory, start), 1)
        is_filtered = torch.zeros(n, dtype=torch.bool)
        is_filtered[start:] = score[start:] > before.quantile(1.0 - self.share, dim=1)
        out = attend_visible(layer, causal(0, n) & (~is_filtered | torch.eye(n, dtype=torch.bool)))
        return out * ~is_filtered[start:, None]
