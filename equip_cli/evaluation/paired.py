"""Differences between rows, paired token by token: two caches that read one text find the same tokens hard, so a difference is
known far better than either value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from equip_cli.core.policy import CONTEXT_SHIFT
from equip_cli.evaluation.agreement import block_bootstrap
from equip_cli.evaluation.tables import labels

Record = dict[str, Any]

BASELINES = ("streaming", "random")

_BYTES = 0.05  # two caches keep as many bytes where these differ by no larger share


@dataclass(frozen=True)
class Series:
    """What a row gives token by token, in nats, rounded to 1e-6.

    nll: -log p of each token of the text but the first, `[n_tokens]`; kl: KL(full || row) after each token that was read beside
    the full cache, `[n_agreement]`; empty where it was not measured.
    """

    nll: Sequence[float] = ()
    kl: Sequence[float] = ()

    @classmethod
    def of(cls, nll: Sequence[float], kl: Sequence[float]) -> Series:
        return cls(*([round(value, 6) for value in values] for values in (nll, kl)))


def difference(a: Sequence[float], b: Sequence[float], first: int, seed: int = 0) -> Record | None:
    """Mean of a - b over the tokens from `first` on, and its 95% interval: the blocks of `block_bootstrap()` are drawn of the
    differences, so that each draw takes the same tokens of both. None if a token is missing in one of them.
    """
    if len(a) != len(b) or len(a) <= first:
        return None
    values = (numpy.asarray(a, dtype=numpy.float64) - numpy.asarray(b, dtype=numpy.float64))[first:]
    return {
        "difference": float(values.mean()),
        "ci95": list(block_bootstrap(list(values), seed)),
        "n_tokens": len(values),
    }


def baseline_of(record: Record, records: Mapping[int, Record], name: str) -> int | None:
    """Which of the rows is the baseline `name` of this one: of the same budget and types, else of as many bytes kept.

    Of several, one with as many sinks. `streaming` without sinks is no baseline here, and the full cache has none. A row that
    could be the baseline itself is compared with those before it.
    """

    def is_bounded(other: Record) -> bool:
        return bool(other["policy"] != "none" or other["update"] == CONTEXT_SHIFT)

    def distance(other: Record) -> tuple[bool, bool, float]:
        same = all(other[key] == record[key] for key in ("budget", "type_k", "type_v"))
        ratio = abs(math.log(other["kept_bytes"] / record["kept_bytes"]))
        return not same, other["sinks"] != record["sinks"], ratio

    if not is_bounded(record):
        return None

    def is_baseline(other: Record) -> bool:
        return bool(other["policy"] == name and (name != "streaming" or other["sinks"] > 0))

    others = list(records.items())
    if is_baseline(record):
        others = list(itertools.takewhile(lambda item: item[1] is not record, others))
    found = [(distance(other), i) for i, other in others if is_baseline(other)]
    near = [(key, i) for key, i in found if not key[0] or key[2] <= _BYTES]
    return min(near)[1] if near else None


def with_differences(records: Mapping[int, Record], series: Mapping[int, Series], seed: int = 0) -> dict[int, Record]:
    """The records, each with `paired`: its differences to `BASELINES`, from the first token on before which one of the two
    has evicted. Negative values are better than the baseline.
    """
    names = dict(zip(records, labels(list(records.values())), strict=True))
    made = {}
    for i, record in records.items():
        paired: Record = {}
        for name in BASELINES:
            j = baseline_of(record, records, name)
            if j is None or i not in series or j not in series:
                continue
            first = min(record["budget"], records[j]["budget"])
            found = {
                "log_loss": difference(series[i].nll, series[j].nll, first, seed),
                "kl": difference(series[i].kl, series[j].kl, first, seed),
            }
            if any(found.values()):
                paired[name] = {"with": names[j], **found}
        made[i] = record | {"paired": paired}
    return made
