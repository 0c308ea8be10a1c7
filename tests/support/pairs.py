"""Few rows for a wide matrix of tests."""

from __future__ import annotations

import itertools
import random
from typing import Any

Row = dict[str, Any]


def pairwise(axes: dict[str, list[Any]]) -> list[Row]:
    """Rows that hold every pair of values of two axes at least once (greedy, the same rows in every run)."""
    rng, names, rows = random.Random(0), list(axes), list[Row]()
    todo = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]}

    def pairs(row: Row) -> set[tuple[tuple[str, object], tuple[str, object]]]:
        return todo & set(itertools.combinations(row.items(), 2))

    while todo:
        seed = dict(min(todo, key=repr))
        candidates = [{name: seed.get(name, rng.choice(axes[name])) for name in names} for _ in range(60)]
        rows.append(max(candidates, key=lambda row: len(pairs(row))))
        todo -= pairs(rows[-1])
    return rows
