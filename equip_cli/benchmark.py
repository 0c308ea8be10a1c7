"""Decode speed of several caches side by side: all alive at once, measured in turns, compared pair by pair.

Turns (A B A B ...) because a machine's speed drifts: two samples taken one after the other share the drift, so their
ratio does not. A baseline row (policy `none`) at depth D is plain decode with D tokens in the cache before and after
each step: the token is dropped again, so that both sides attend over the same padded n_kv.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from equip_cli.memory import rss_bytes
from equip_cli.policy import BASELINE_UPDATES, CachePolicy, choice, choice_words

if TYPE_CHECKING:
    from equip_cli.model import Model
    from equip_cli.session import Session

_WARM_UP_STEPS = 4
_STEPS_PER_CALL = 4  # Ctrl-C is seen between two native calls
_BOOTSTRAP_ROUNDS = 2000


@dataclass(frozen=True)
class Settings:
    """What every row shares.

    n_gen: tokens per sample; repetitions: samples per row; depth: tokens read before, None = each row's budget.
    """

    n_gen: int = 64
    repetitions: int = 5
    depth: int | None = None
    n_threads: int | None = None
    n_batch: int | None = None
    n_ubatch: int | None = None
    type_k: str = "f16"
    type_v: str = "f16"


@dataclass
class Row:
    """One cache and what was measured on it."""

    policy: CachePolicy
    flash_attn: str
    depth: int
    samples_ns: list[int] = field(default_factory=list)
    host_ns: list[int] = field(default_factory=list)
    sample_order: list[int] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    rss_bytes: int = 0
    error: str | None = None

    @property
    def label(self) -> str:
        """Words that tell this row from its neighbours."""
        policy = self.policy
        every = policy.rotate_every and f"rotate every {policy.rotate_every}"
        words = [policy.name, policy.scope, policy.positions, every, policy.update]
        words += [*choice_words(asdict(policy)), f"fa {self.flash_attn}"]
        return ", ".join(word for word in words if word)


def padded(n: int) -> int:
    """n_kv that upstream attends over when `n` slots are in use."""
    return -(-n // 256) * 256


def compare(row_ns: Sequence[int], base_ns: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Median of the paired time ratios, and its 95% interval by bootstrap over the pairs (fixed seed).

    Both sequences hold nanoseconds per sample, in the order measured.
    """
    ratios = [a / b for a, b in zip(row_ns, base_ns, strict=True)]
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(_BOOTSTRAP_ROUNDS))
    low, high = medians[int(0.025 * _BOOTSTRAP_ROUNDS)], medians[int(0.975 * _BOOTSTRAP_ROUNDS) - 1]
    return {"time_ratio_median": statistics.median(ratios), "ci95": [low, high], "n_pairs": len(ratios)}


def plan(policies: Iterable[CachePolicy], flash_attn: Sequence[str], settings: Settings, budget: int) -> list[Row]:
    """The rows of one budget. `none` always runs with flash attention on and off: the faster one is the baseline."""
    depth = settings.depth or budget
    rows: list[Row] = []
    for policy in policies:
        modes = ["on", "off"] if policy.name == "none" else list(flash_attn)
        rows += [Row(policy, mode, depth) for mode in modes]
    return rows


def filler(model: Model, n: int) -> list[int]:
    """`n` tokens to fill a cache with; which ones does not matter for speed."""
    rng = random.Random(0)
    return [rng.randrange(model.n_vocab) for _ in range(n)]


def _open(model: Model, row: Row, settings: Settings, stack: ExitStack) -> Session:
    unbounded = row.policy.name == "none"
    session = stack.enter_context(
        model.session(
            row.policy,
            n_ctx=padded(row.depth) if unbounded else None,
            n_batch=settings.n_batch,
            n_ubatch=settings.n_ubatch,
            n_threads=settings.n_threads,
            flash_attn=row.flash_attn,
            type_k=settings.type_k,
            type_v=settings.type_v,
        )
    )
    # a dropped token's step is the one that makes it `depth`
    session.eval(filler(model, row.depth - 1 if unbounded else row.depth))
    return session


def _time(session: Session, row: Row, n: int) -> tuple[int, int]:
    """Nanoseconds of `n` steps: in all, and outside graph compute."""
    total = host = 0
    while n > 0:
        k = min(n, _STEPS_PER_CALL)
        n -= k
        step_ns, step_host_ns = session.time_decode(k, rewind=row.policy.name == "none")
        total += sum(step_ns)
        host += sum(step_host_ns)
    return total, host


def run(
    model: Model, rows: list[Row], settings: Settings, first_sample: int = 0, note: Callable[[str], None] | None = None
) -> int:
    """Measure the rows in turns and fill them in. Returns the index of the next sample.

    A row of policy `none` that this model cannot run (quantised values without flash attention, say) keeps its `error`,
    and so does one whose update is a baseline that the model rules out; unless no row is left.
    Raises what `Session` raises for the other rows.
    """
    from equip_cli.errors import UnsupportedModelError, UsageError

    with ExitStack() as stack:
        alive: list[tuple[Row, Session]] = []
        for row in rows:
            if note is not None:
                note(f"filling {row.depth} tokens: {row.label}")
            try:
                session = _open(model, row, settings, stack)
            except (UnsupportedModelError, UsageError) as error:
                ruled_out = row.policy.update in BASELINE_UPDATES and isinstance(error, UnsupportedModelError)
                row.error = str(error)
                if (row.policy.name != "none" and not ruled_out) or all(other.error for other in rows):
                    raise
                continue
            _time(session, row, _WARM_UP_STEPS)
            alive.append((row, session))
        order = first_sample
        for repetition in range(settings.repetitions):
            if note is not None:
                note(f"repetition {repetition + 1} of {settings.repetitions}")
            for row, session in alive:
                total, host = _time(session, row, settings.n_gen)
                row.samples_ns.append(total)
                row.host_ns.append(host)
                row.sample_order.append(order)
                order += 1
        for row, session in alive:
            row.stats = session.stats()
            row.rss_bytes = rss_bytes()
    return order


def baseline_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row that `row` is compared with: the faster `none`; without one, the `inplace` row of the same policy."""
    measured = [other for other in rows if other.samples_ns]
    unbounded = [other for other in measured if other.policy.name == "none"]
    if unbounded:
        return min(unbounded, key=lambda other: statistics.median(other.samples_ns))
    same = [
        other
        for other in measured
        if other.stats["update"] == "inplace"
        and (other.policy.name, other.flash_attn) == (row.policy.name, row.flash_attn)
        and all(other.stats[key] == row.stats[key] for key in ("positions", "scope"))
    ]
    return same[0] if same else None


def record(model: Model, row: Row, rows: Sequence[Row], settings: Settings, about: dict[str, Any]) -> dict[str, Any]:
    """One measured row as llama-bench's JSON fields plus ours. Times are nanoseconds per sample of n_gen tokens."""
    info, stats, n = model.info, row.stats, settings.n_gen
    speeds = [n * 1e9 / sample for sample in row.samples_ns]
    base = baseline_of(row, rows)
    ratio = None
    if base is not None and base is not row:
        ratio = {"baseline": base.label, **compare(row.samples_ns, base.samples_ns)}
    return {
        "build_commit": about["llama_cpp"],
        "backends": ",".join(about["backends"]),
        "model_filename": model.path.name,
        "model_type": info.get("name") or info["arch"],
        "model_size": info["file_bytes"],
        "model_n_params": info.get("n_params"),
        "n_batch": stats["n_batch"],
        "n_ubatch": stats["n_ubatch"],
        "n_threads": stats["n_threads"],
        "type_k": stats["type_k"],
        "type_v": stats["type_v"],
        "flash_attn": row.flash_attn,
        "n_prompt": 0,
        "n_gen": n,
        "n_depth": row.depth,
        "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "avg_ns": round(statistics.mean(row.samples_ns)),
        "stddev_ns": round(statistics.stdev(row.samples_ns)) if len(row.samples_ns) > 1 else 0,
        "avg_ts": statistics.mean(speeds),
        "stddev_ts": statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
        "samples_ns": row.samples_ns,
        "samples_ts": speeds,
        **{key: stats[key] for key in ("policy", "scope", "positions", "rotate_every", "update", "budget")},
        **choice(stats),
        **{key: stats[key] for key in ("attn_kernel", "kv_bytes")},
        "rss_bytes": row.rss_bytes,
        "graphs_reused": stats["graphs_reused"],
        "host_us_per_token": statistics.median(row.host_ns) / n / 1000,
        "sample_order": row.sample_order,
        "ratio_vs": ratio,
    }
