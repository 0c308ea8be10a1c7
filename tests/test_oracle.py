"""Checks of the reference itself: a wrong oracle, or models on which nothing shows, make every other test worthless."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS, Array, Spec
from oracle import EXACT, IMPOSSIBLE, SHORTENED, Oracle, rope

GENERATIVE = [name for name, spec in MODELS.items() if spec.arch != "bert"]
TOLERANCE = 1e-4  # of the logit range: what the library is held to


def tokens(spec: Spec, n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, spec.n_vocab, n)]


def logit_range(logits: Array) -> float:
    return float(logits.max() - logits.min())


class SinkShift(Oracle):
    """The window keeps true positions, sink i stands at i + max(0, t - (C - 1)): the library's way to say `cache`."""

    def _forward(self, tokens: Array, visible: Array, rank: Array) -> Array:
        last, count = visible[-1], len(visible)
        shifted = np.where(visible < self.protect, visible + max(0, last - (count - 1)), visible)
        return super()._forward(tokens, visible, shifted)


class Flawed(Oracle):
    """What a bug in the library would compute, from the moment `flaw` is set."""

    flaw = ""

    def _attention(self, il: int, q: Array, keys: Array, key_pos: Array, mask: Array) -> Array:
        if not self.spec.is_swa(il):
            if self.flaw == "sink rotated by one too many":
                key_pos = key_pos + (np.arange(len(key_pos)) == 1)
            if self.flaw == "one slot holds another token":
                keys = np.where(np.arange(len(keys)) == 7, keys[8], keys)
        return super()._attention(il, q, keys, key_pos, mask)


@pytest.mark.parametrize("model", ["llama-gqa", "qwen2-gqa", "gemma3", "gpt-oss"])
def test_ranks_are_not_what_shifted_sinks_compute(model: str) -> None:
    spec = MODELS[model]
    ranks, shifted = (kind(spec, budget=24, sinks=4, pinned=6, positions="cache") for kind in (Oracle, SinkShift))
    text = tokens(spec, 120)
    for oracle in (ranks, shifted):
        oracle.eval(text[:33], 16)
    for t in text[33:]:
        a, b = ranks.chunk([t]), shifted.chunk([t])
        assert np.abs(a - b).max() <= 1e-9 * logit_range(a)
    for n in (1, 5, 30):
        a, b = ranks.chunk(text[:n]), shifted.chunk(text[:n])
        assert np.abs(a - b).max() <= 1e-9 * logit_range(a)


@pytest.mark.parametrize("model", GENERATIVE)
@pytest.mark.parametrize("positions", ["true", "cache"])
def test_large_budget_is_not_plain_causal_attention(model: str, positions: str) -> None:
    spec = MODELS[model]
    text = tokens(spec, 50)
    plain = Oracle(spec, sinks=0).chunk(text)  # one causal pass without any rule
    bounded = Oracle(spec, budget=50, positions=positions)
    bounded.eval(text[:20], 8)
    for t in text[20:]:
        logits = bounded.chunk([t])
    assert bounded.kept == list(range(50)) and not bounded.evictions
    assert np.abs(plain - logits).max() <= 1e-9 * logit_range(plain)


@pytest.mark.parametrize("model", GENERATIVE)
def test_a_flaw_does_not_show_in_the_logits(model: str) -> None:
    """Each single flaw must move the logits by at least 100 tolerances at some step, or the models are too tame."""
    spec = MODELS[model]
    text = tokens(spec, 110, seed=5)
    right = Oracle(spec, budget=48, sinks=4, positions="cache")
    wrong = {
        "sink rotated by one too many": Flawed(spec, budget=48, sinks=4, positions="cache"),
        "one slot holds another token": Flawed(spec, budget=48, sinks=4, positions="cache"),
        "budget off by one": Oracle(spec, budget=49, sinks=4, positions="cache"),
        "one sink too many": Oracle(spec, budget=48, sinks=5, positions="cache"),
        "true positions": Oracle(spec, budget=48, sinks=4, positions="true"),
    }
    moved = dict.fromkeys(wrong, 0.0)
    right.chunk(text[:48])
    for flaw, oracle in wrong.items():
        oracle.chunk(text[:48])
        if isinstance(oracle, Flawed):
            oracle.flaw = flaw
    for t in text[48:]:
        a = right.chunk([t])
        for flaw, oracle in wrong.items():
            moved[flaw] = max(moved[flaw], float(np.abs(a - oracle.chunk([t])).max()) / logit_range(a))
    assert min(moved.values()) >= 100 * TOLERANCE, moved


def test_single_token_evicts_after_instead_of_before() -> None:
    oracle = Oracle(dataclasses.replace(MODELS["llama-gqa-32"], n_layer=1), budget=4, sinks=1)
    oracle.chunk([1, 2, 3, 4])
    assert oracle.kept == [0, 1, 2, 3]
    oracle.chunk([5])
    assert oracle.kept == [0, 2, 3, 4] and oracle.evictions == [(4, 1)]
    oracle.chunk([6, 7, 8])  # sees all four, then three go
    assert oracle.kept == [0, 5, 6, 7] and oracle.evictions[1:] == [(5, 2), (6, 3), (7, 4)]
    oracle.eval([9, 10, 11], n_ubatch=2)  # the last ubatch has one token
    assert oracle.kept == [0, 8, 9, 10] and [v for _, v in oracle.evictions[4:]] == [5, 6, 7]


def test_rewind_rule_is_wrong() -> None:
    oracle = Oracle(dataclasses.replace(MODELS["llama-gqa-32"], n_layer=1), budget=8, sinks=2)
    oracle.chunk([1] * 6)
    assert oracle.rewind(9) == EXACT and oracle.n_past == 6
    assert oracle.rewind(4) == EXACT and oracle.kept == [0, 1, 2, 3]
    oracle.eval([2] * 7, n_ubatch=1)  # positions 4..10; 8, 9 and 10 evict 2, 3 and 4
    assert oracle.kept == [0, 1, 5, 6, 7, 8, 9, 10]
    assert oracle.rewind(4) == IMPOSSIBLE and oracle.n_past == 11
    assert oracle.rewind(11) == EXACT and oracle.n_past == 11
    assert oracle.rewind(8) == SHORTENED and oracle.kept == [0, 1, 5, 6, 7]
    assert oracle.rewind(0) == EXACT and oracle.kept == []


@settings(max_examples=50, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    budget=st.integers(8, 24),
    sinks=st.integers(0, 4),
    pinned=st.integers(0, 6),
)
def test_kept_set_is_not_prefix_and_tail(chunks: list[int], budget: int, sinks: int, pinned: int) -> None:
    """However a text is cut into chunks, what is left is the protected prefix and the newest tokens."""
    spec = Spec(n_layer=1, n_embd=8, n_head=1, n_head_kv=1, head_dim=8, n_ff=8, n_vocab=16)
    oracle = Oracle(spec, budget=budget, sinks=sinks, pinned=pinned)
    for n in chunks:
        oracle.chunk([3] * n)
    n, protect = sum(chunks), max(sinks, pinned)
    assert oracle.kept == sorted({*range(min(n, protect)), *range(max(0, n - (budget - min(n, protect))), n)})
    assert len(oracle.evictions) == max(0, n - budget)


@pytest.mark.parametrize("norm", [True, False])
def test_rope_depends_on_more_than_distance(norm: bool) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 16))

    def score(pos_q: int, pos_k: int) -> float:
        a, b = rope(q, np.array([pos_q]), 1e4, norm), rope(k, np.array([pos_k]), 1e4, norm)
        return float(np.sum(a * b))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-12)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3
