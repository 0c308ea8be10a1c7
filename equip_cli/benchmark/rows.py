"""What is measured: one row per cache."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from equip_cli.core.policy import CONTEXT_SHIFT, CachePolicy, choice_words

if TYPE_CHECKING:
    from equip_cli.core.model import Model


@dataclass(frozen=True)
class Settings:
    """What the rows of one table share, so that they can be compared.

    n_gen: tokens per sample; n_prompt: tokens of a prompt, read in chunks, 0 = single tokens are measured;
    repetitions: samples per row; depth: tokens read before, None = each row's budget, or nothing before a prompt;
    shift_rope: the RoPE kernels that the update `shift` is measured with: `upstream`, `cached` (one row of cos and sin for
    all tokens that move by the same distance).
    cpu_attn: our attention kernel: None = with the bounded rows, and with `none` beside them once more.
    lanes: sequences in one batch, 0 = a single session; pool: tokens that they keep together, None = `auto`.
    """

    n_gen: int = 64
    repetitions: int = 5
    depth: int | None = None
    n_threads: int | None = None
    n_batch: int | None = None
    n_ubatch: int | None = None
    type_k: str = "f16"
    type_v: str = "f16"
    n_prompt: int = 0
    warm_up: bool = True
    shift_rope: tuple[str, ...] = ("upstream",)
    cpu_attn: bool | None = None
    lanes: int = 0
    pool: int | None = None

    def session_options(self) -> dict[str, Any]:
        """Keywords of `Model.session()`."""
        return {
            "n_batch": self.n_batch,
            "n_ubatch": self.n_ubatch,
            "n_threads": self.n_threads,
            "type_k": self.type_k,
            "type_v": self.type_v,
        }


@dataclass
class Row:
    """One cache and what was measured on it.

    kind: `tg` single tokens, `pp` a prompt in chunks, `ttft` from the first token of a prompt to the logits behind its
    last one, `latency` single tokens in a row, `growth` single tokens at one length of many.
    depth: tokens before the measured ones; n_prompt, n_gen: tokens per sample, one of them 0.
    samples_ns, host_ns: per sample, in all and outside graph compute; steps_ns: per token; sample_order: the samples'
    numbers over all rows of a command. shift_ns, cycle: context-shift: the time of a shift beyond a plain step, and the
    tokens between two shifts. fill: how the depth was reached, `read` or `copied`. rss_bytes: resident memory of a process
    with this cache alone.
    lanes: sequences in one batch, which share one cache or not; 0 = a single session. n_prompt, n_gen, depth: of each of them.
    """

    policy: CachePolicy
    flash_attn: str
    depth: int
    kind: str = "tg"
    n_prompt: int = 0
    n_gen: int = 64
    rope_upstream: bool = False
    cpu_attn: bool | None = None
    lanes: int = 0
    shares: bool = True
    samples_ns: list[int] = field(default_factory=list)
    host_ns: list[int] = field(default_factory=list)
    steps_ns: list[int] = field(default_factory=list)
    sample_order: list[int] = field(default_factory=list)
    shift_ns: list[int] = field(default_factory=list)
    cycle: int = 0
    fill: str = "read"
    stats: dict[str, Any] = field(default_factory=dict)
    rss_bytes: int = 0
    error: str | None = None
    is_void: bool = False  # not measured, since it would be another row again

    @property
    def is_plain(self) -> bool:
        """llama.cpp as it is, with room for all tokens."""
        return self.policy.name == "none" and not self.is_context_shift

    @property
    def is_context_shift(self) -> bool:
        """llama.cpp as it is, whose full cache loses half of its tokens at once."""
        return self.policy.update == CONTEXT_SHIFT

    @property
    def n_tokens(self) -> int:
        """Tokens per sample, of all lanes."""
        return (self.n_prompt or self.n_gen) * max(self.lanes, 1)

    @property
    def sharing(self) -> str:
        """How lanes lie in memory: `alone` (a single session), `pool`, `unified` (llama.cpp's own cache), or `streams`."""
        if not self.lanes:
            return "alone"
        if self.policy.name == "none":
            return "unified" if self.shares else "streams"
        return "streams" if self.policy.pool is None else "pool"

    @property
    def test(self) -> str:
        """The name of the test, as llama-bench writes it."""
        depth = f" @ d{self.depth}" if self.depth else ""
        if self.kind in ("pp", "ttft"):
            return f"{self.kind}{self.n_prompt}{depth}"
        lanes = f" x {self.lanes}" if self.lanes else ""
        return f"{'lat' if self.kind == 'latency' else 'tg'}{self.n_gen}{lanes}{depth}"

    @property
    def label(self) -> str:
        """Words that tell this row from its neighbours."""
        policy = self.policy
        every = policy.rotate_every and f"rotate every {policy.rotate_every}"
        words = [policy.name, policy.scope, policy.positions, every, policy.update]
        if policy.update == "shift" and not self.rope_upstream:
            words.append("cached rotation")
        if policy.name == "none" and self.cpu_attn:
            words.append("our kernel")
        if self.lanes:
            words.append(self.sharing)
        words += [*choice_words(asdict(policy)), f"fa {self.flash_attn}"]
        return ", ".join(word for word in words if word)


def is_our_kernel(attn_kernel: str) -> bool:
    """Whether `Session.stats()["attn_kernel"]` names our own attention kernel, not llama.cpp's."""
    return attn_kernel.startswith("equip")


def padded(n: int) -> int:
    """n_kv that upstream attends over when `n` slots are in use."""
    return -(-n // 256) * 256


def filler(model: Model, n: int) -> list[int]:
    """`n` tokens to fill a cache with; which ones does not matter for speed."""
    rng = random.Random(0)
    return [rng.randrange(model.n_vocab) for _ in range(n)]


def plan(
    policies: Iterable[CachePolicy], flash_attn: Sequence[str], settings: Settings, budget: int, kind: str = "tg"
) -> list[Row]:
    """The rows of one budget.

    `none` runs with flash attention on and off, since the faster one counts, and the others with those of `flash_attn`;
    single tokens of `none` also with our attention kernel, where other rows have it: a method is compared on one kernel.
    """
    if settings.lanes:
        return _plan_lanes(policies, flash_attn, settings, budget)
    depth = settings.depth if settings.depth is not None else budget
    if kind == "ttft" or (kind == "pp" and settings.depth is None):
        depth = 0
    n_prompt, n_gen = (settings.n_prompt, 0) if kind in ("pp", "ttft") else (0, settings.n_gen)
    policies = list(policies)
    bounded = any(policy.name != "none" for policy in policies) and set(flash_attn) != {"off"}
    ours = settings.cpu_attn or (settings.cpu_attn is None and bounded)
    rows: list[Row] = []
    for policy in policies:
        plain = policy.name == "none"
        modes: list[tuple[str, bool | None]] = [(mode, settings.cpu_attn) for mode in flash_attn]
        if plain:
            modes = [("on", False), ("off", False)]
            if ours and not n_prompt and policy.update is None:
                modes.append(("on", True))
        kernels = settings.shift_rope if policy.update == "shift" else ("cached",)
        rows += [
            Row(policy, mode, depth, kind, n_prompt, n_gen, kernel == "upstream", cpu_attn)
            for kernel in kernels
            for mode, cpu_attn in modes
        ]
    return rows


def _plan_lanes(
    policies: Iterable[CachePolicy], flash_attn: Sequence[str], settings: Settings, budget: int
) -> list[Row]:
    """The rows of several sequences: each that one sequence has, in one cache that they share and in a cache each."""
    n = settings.lanes
    alone = plan(
        [policy for policy in policies if policy.update in (None, "inplace")],
        flash_attn,
        replace(settings, lanes=0),
        budget,
    )
    rows: list[Row] = []
    for row in alone:
        bounded = row.policy.name != "none"
        # one sequence has nothing to share, but a pool can be asked for
        for shares in (True, False) if n > 1 else (True,):
            pool: int | Literal["auto"] | None = (
                (settings.pool or "auto") if bounded and shares and (n > 1 or settings.pool) else None
            )
            policy = replace(row.policy, pool=pool) if bounded else row.policy
            rows.append(
                Row(policy, row.flash_attn, row.depth, n_gen=row.n_gen, cpu_attn=row.cpu_attn, lanes=n, shares=shares)
            )
    return rows
