"""The score formulas of native/policies, called one by one, against those in numpy (oracle_formulas.py).

    python tests/support/formula_scores.py LIBRARY POLICY,...

LIBRARY is native/tests/formula-scores.cpp with the registry and the formulas (tools/mutate_policies.py builds it); the exit
code is 1, and the sentence on stderr, where one of them is another.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from models import Array
from oracle import drawn
from oracle_formulas import FORMULAS, Head, formula

# numbers of a formula beside its defaults
PARAMETERS: dict[str, list[dict[str, float]]] = {
    "snapkv": [{"kernel": 3.0}, {"kernel": 1.0, "window": 8.0}],
    "lagkv": [{"lag": 7.0}, {"lag": 3.0, "cross": 1.0}, {"lag": 1.0}],
    "external": [{"unscored": -0.5}],
    "rkv": [{"window": 4.0, "kernel": 3.0, "lambda": 0.7, "threshold": 0.2}, {"lambda": 1.0}],
}


def heads() -> Iterator[Head]:
    """Heads of every size; keys that are alike, all, some or none; with and without recent tokens."""
    rng = np.random.default_rng(1)
    for n in (1, 2, 3, 5, 8, 33, 150):
        for n_embd in (2, 6, 32, 67):
            for common in (0.5, 2.0, 0.0):
                for n_old in sorted({n, n - n // 4, max(1, n // 2)}):
                    pos = np.cumsum(rng.integers(1, 6, n))
                    # as float32 holds them, so that both sides compute with the same
                    weights = rng.uniform(0.0, 3.0, n).astype(np.float32).astype(float)
                    k = rng.uniform(common - 1.0, common + 1.0, (n, n_embd)).astype(np.float32).astype(float)
                    k[:, 0] = 0.5 if common == 2.0 else k[:, 0]  # a channel that never changes
                    v = rng.uniform(-1.0, 1.0, (n, n_embd + 4)).astype(np.float32).astype(float)
                    given = np.where(rng.random(n) < 0.3, np.nan, weights - 1.0)
                    sinks = n // 8  # as formula-scores.cpp has it
                    group = int(rng.integers(1, 8))
                    yield Head(pos, n_old, group, 3, weights, k, v, k, v, n_protect=sinks, n_sinks=sinks, given=given)


def scores(library: ctypes.CDLL, text: str, u: Head) -> Array:
    """(n,), or numerators and denominators (2, n)."""
    n, pos = len(u.pos), u.pos.astype(np.int32)
    numbers = u.given if "given" in FORMULAS[text.partition(":")[0]].needs else u.weights
    arrays = [np.ascontiguousarray(x, dtype=np.float32) for x in (numbers, u.k, u.v)]
    out, den = np.full(n, np.nan, dtype=np.float32), np.full(n, np.nan, dtype=np.float32)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (pos, *arrays)]
    sizes = [ctypes.c_uint32(x) for x in (u.k.shape[1], u.v.shape[1])]
    counts = [ctypes.c_uint32(x) for x in (n, u.n_old, u.group)]
    results = [ctypes.c_void_p(x.ctypes.data) for x in (out, den)]
    is_ratio = library.formula_scores(text.encode(), *counts, *pointers, *sizes, *results)
    return np.stack([out, den]) if is_ratio else out


def check(path: Path, policies: Sequence[str]) -> None:
    """Raises AssertionError for scores that differ by more than float32 sums do, 2e-5 of the largest."""
    library = ctypes.CDLL(str(path))
    for policy in policies:
        for parameters in [{}, *PARAMETERS.get(policy, [])]:
            text = policy + ":" * bool(parameters) + ",".join(f"{key}={value:g}" for key, value in parameters.items())
            twin = formula(policy, parameters)
            for u in heads():
                if "drawn" in twin.needs:
                    u.weights[:] = [(drawn(int(p) + (3 << 32)) >> 40) / 2**24 for p in u.pos]
                with np.errstate(all="ignore"):
                    got, want = scores(library, text, u), twin.score(u)
                matters = np.isfinite(want)  # recent tokens may be worth anything
                assert matters[..., : u.n_old].all() and np.isfinite(got).all(), f"{text}: not finite"
                off = np.abs(got - want, where=matters, out=np.zeros(want.shape))
                scale = np.abs(want, where=matters, out=np.zeros(want.shape)).max()
                assert off.max() <= 2e-5 * scale, f"{text}: {len(u.pos)} tokens, off by {off.max() / scale:.2g}"


if __name__ == "__main__":
    try:
        check(Path(sys.argv[1]), [name for name in sys.argv[2].split(",") if name in FORMULAS])
    except AssertionError as error:
        sys.exit(str(error))
