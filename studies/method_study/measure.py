"""How far a row is from the full cache: KL, the same most likely token, perplexity, and paired intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .network import Network

BLOCK = 32  # neighbouring tokens are alike, so they are drawn together
N_DRAWS = 4000

Array = np.ndarray


@dataclass
class Row:
    """One value per scored position (n,)."""

    kl: Array  # KL(full || row), nats
    same: Array  # both have the same most likely token
    nll: Array  # of the token that follows, nats
    positions: Array

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll.mean())

    def save(self, path: Path) -> None:
        unfinished = path.with_suffix(".part")
        with unfinished.open("wb") as out:
            np.savez(out, kl=self.kl, same=self.same, nll=self.nll, positions=self.positions)
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> Row:
        with np.load(path) as saved:
            return cls(**{name: saved[name] for name in ("kl", "same", "nll", "positions")})


class Judge:
    """Compares hidden states with those of the full cache, at every `every`-th position from `first` on."""

    def __init__(self, network: Network, tokens: list[int], hidden: Tensor, first: int, every: int) -> None:
        """hidden: (n, n_embd) behind the last norm."""
        self.network, self.tokens = network, torch.tensor(tokens)
        self.positions = torch.arange(first, len(tokens) - 1, every)
        self.full = [network.log_probs(hidden[positions]) for positions in self.positions.split(128)]

    def row(self, hidden: Tensor, start: int) -> Row:
        """hidden: (n - start, n_embd), from position `start` on."""
        kl, same, nll = [], [], []
        for positions, full in zip(self.positions.split(128), self.full, strict=True):
            ours = self.network.log_probs(hidden[positions - start])
            kl.append((full.exp() * (full - ours)).sum(-1))
            same.append(full.argmax(-1) == ours.argmax(-1))
            nll.append(-ours.gather(1, self.tokens[positions + 1][:, None])[:, 0])
        return Row(*(torch.cat(each).double().numpy() for each in (kl, same, nll)), self.positions.numpy())


def draws(positions: Array, seed: int = 0) -> Array:
    """How often each position is drawn, (N_DRAWS, n): whole blocks of the text, with replacement."""
    block = (positions - positions[0]) // BLOCK
    n = int(block[-1]) + 1
    return np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=N_DRAWS)[:, block]


def interval(values: Array, weights: Array) -> tuple[float, float]:
    """95%, of a mean: values (n,), weights from draws()."""
    low, high = np.quantile((weights @ values) / weights.sum(1), [0.025, 0.975])
    return float(low), float(high)


def ratio(row: Row, base: Row, weights: Array) -> tuple[float, float, float]:
    """Of the KL to that of a base at the same positions, with its 95% interval, paired: the same blocks are drawn."""
    low, high = np.quantile((weights @ row.kl) / (weights @ base.kl), [0.025, 0.975])
    return float(row.kl.mean() / base.kl.mean()), float(low), float(high)
