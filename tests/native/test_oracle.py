"""Checks of the reference itself: a wrong oracle, or models on which nothing shows, make every other test worthless."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS, Array, Spec
from oracle import EXACT, IMPOSSIBLE, SHORTENED, Oracle, rope
from oracle_formulas import FORMULAS, Head
from oracle_heads import HeadOracle, Rows, Wrong

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
def test_ranks_are_what_shifted_sinks_compute(model: str) -> None:
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
def test_a_large_budget_is_plain_causal_attention(model: str, positions: str) -> None:
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
def test_every_flaw_shows_in_the_logits(model: str) -> None:
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


def test_a_single_token_evicts_before_and_a_chunk_after() -> None:
    oracle = Oracle(dataclasses.replace(MODELS["llama-gqa-32"], n_layer=1), budget=4, sinks=1)
    oracle.chunk([1, 2, 3, 4])
    assert oracle.kept == [0, 1, 2, 3]
    oracle.chunk([5])
    assert oracle.kept == [0, 2, 3, 4] and oracle.evictions == [(4, 1)]
    oracle.chunk([6, 7, 8])  # sees all four, then three go
    assert oracle.kept == [0, 5, 6, 7] and oracle.evictions[1:] == [(5, 2), (6, 3), (7, 4)]
    oracle.eval([9, 10, 11], n_ubatch=2)  # the last ubatch has one token
    assert oracle.kept == [0, 8, 9, 10] and [v for _, v in oracle.evictions[4:]] == [5, 6, 7]


def test_a_rewind_is_exact_shortened_or_impossible() -> None:
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
def test_the_kept_set_is_prefix_and_tail(chunks: list[int], budget: int, sinks: int, pinned: int) -> None:
    """However a text is cut into chunks, what is left is the protected prefix and the newest tokens."""
    spec = Spec(n_layer=1, n_embd=8, n_head=1, n_head_kv=1, head_dim=8, n_ff=8, n_vocab=16)
    oracle = Oracle(spec, budget=budget, sinks=sinks, pinned=pinned)
    for n in chunks:
        oracle.chunk([3] * n)
    n, protect = sum(chunks), max(sinks, pinned)
    assert oracle.kept == sorted({*range(min(n, protect)), *range(max(0, n - (budget - min(n, protect))), n)})
    assert len(oracle.evictions) == max(0, n - budget)


@pytest.mark.parametrize("norm", [True, False])
def test_rope_depends_on_the_distance_alone(norm: bool) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 16))

    def score(pos_q: int, pos_k: int) -> float:
        a, b = rope(q, np.array([pos_q]), 1e4, norm), rope(k, np.array([pos_k]), 1e4, norm)
        return float(np.sum(a * b))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-12)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


# ---- policies that score ---------------------------------------------------------------------------------------------

UNITS = [(policy, scope) for policy, rule in FORMULAS.items() for scope in rule.scopes]


def scoring(policy: str, scope: str | None = None, model: str = "llama-gqa", **options: Any) -> HeadOracle:
    """A budget that leaves every policy enough to choose from."""
    return HeadOracle(MODELS[model], **(dict(policy=policy, scope=scope, budget=144, sinks=4, recent=8) | options))


def head(**given: Any) -> Head:
    rng = np.random.default_rng(3)
    k, v = rng.normal(size=(2, 20, 8))
    made = dict(pos=np.arange(20), n_old=16, group=2, unit=0, weights=rng.random(20), k=k, v=v, k_stored=k, v_stored=v)
    return Head(**(made | given))


@pytest.mark.parametrize("policy", FORMULAS)
@pytest.mark.parametrize("model", ["llama-gqa", "gemma2", "gpt-oss"])
def test_scoring_below_the_budget_is_plain_causal_attention(policy: str, model: str) -> None:
    text = tokens(MODELS[model], 60)
    oracle, plain = scoring(policy, model=model, positions="cache"), Oracle(MODELS[model], sinks=0)
    for a, b in [(0, 20), (20, 21), (21, 59), (59, 60)]:
        x, y = oracle.chunk(text[a:b]), plain.chunk(text[a:b])
        assert np.abs(x - y).max() <= 1e-9 * logit_range(y)
    assert oracle.kept_by_unit() == [list(range(60))] * len(oracle.units) and not oracle.evictions


@pytest.mark.parametrize("positions", ["true", "cache", "auto"])
@pytest.mark.parametrize("model", ["llama-gqa", "gemma3"])
def test_one_lane_is_the_token_oracle(model: str, positions: str) -> None:
    spec = dataclasses.replace(MODELS[model], n_ctx_train=80)
    text = tokens(spec, 200)
    options: dict[str, Any] = dict(policy="random", budget=40, sinks=2, pinned=5, recent=6, positions=positions)
    one, other = HeadOracle(spec, scope="token", **options), Oracle(spec, **options)
    for n in [30, *[1] * 30, 25, 1, 7, *[1] * 30]:
        chunk = text[one.n_past : one.n_past + n]
        a, b = one.chunk(chunk), other.chunk(chunk)
        assert one.kept == other.kept and one.positions == other.positions
        assert np.abs(a - b).max() <= 1e-9 * logit_range(b)
    assert [set(column) for column in zip(*one.evictions, strict=True)] == [
        set(column) for column in zip(*other.evictions, strict=True)
    ]


@pytest.mark.parametrize(("policy", "scope"), UNITS)
def test_lanes_keep_equally_many_and_what_they_must(policy: str, scope: str) -> None:
    oracle, text = scoring(policy, scope, pinned=6), tokens(MODELS["llama-gqa"], 400)
    for n in [32, 32, *[1] * 150, 40, *[1] * 30, 3, 1]:
        oracle.chunk(text[oracle.n_past : oracle.n_past + n])
        units, safe = oracle.kept_by_unit(), {*range(6), *range(oracle.n_past - 8, oracle.n_past)}
        assert {len(unit) for unit in units} == {len(oracle.kept)} and len(oracle.kept) <= 144
        assert all(unit == sorted(unit) and safe <= set(unit) for unit in units)
        assert all(oracle.kept_of(*u) == unit for heads, unit in zip(oracle.units, units, strict=True) for u in heads)
    assert len({tuple(unit) for unit in oracle.kept_by_unit()}) == len(oracle.units)


@pytest.mark.parametrize("policy", ["h2o", "tova", "a2sf"])
def test_weights_do_not_depend_on_the_chunks(policy: str) -> None:
    """Without evictions, the same sums however the text is cut; all of them if all queries count."""
    text, decay, sums = tokens(MODELS["llama-gqa"], 60), FORMULAS[policy].decay, []
    for chunks in ([60], [20, 1, 38, 1], [1] * 60):
        oracle = scoring(policy)
        for n in chunks:
            oracle.chunk(text[oracle.n_past : oracle.n_past + n])
        sums.append([list(oracle.weights_of(*u).values()) for u in oracle.heads])
        expected = 2 * sum(decay**i for i in range(60))  # two query heads per KV head
        assert np.allclose(np.sum(sums[-1], axis=1), expected, rtol=1e-12)
    assert np.allclose(sums, sums[0], rtol=1e-9)


class Counting(HeadOracle):
    """Adds up what evicted tokens take with them."""

    lost = 0.0

    def _evict_lowest(self, *args: Any) -> None:
        def total() -> float:
            return sum(float(rows.weights.sum()) for rows in self.rows.values())

        before = total()
        super()._evict_lowest(*args)
        self.lost += before - total()


@pytest.mark.parametrize("scope", ["head", "layer", "token"])
@pytest.mark.parametrize("score_queries", [None, 1, 5])
def test_no_weight_is_lost_but_with_a_victim(scope: str, score_queries: int | None) -> None:
    oracle = Counting(MODELS["llama-gqa"], policy="h2o", scope=scope, budget=40, recent=8, score_queries=score_queries)
    text, chunks = tokens(MODELS["llama-gqa"], 300), [30, *[1] * 40, 25, *[1] * 20, 3, 1]
    for n in chunks:
        oracle.chunk(text[oracle.n_past : oracle.n_past + n])
    kept = sum(sum(oracle.weights_of(*u).values()) for u in oracle.heads)
    counted = sum(min(n, score_queries or n) for n in chunks)
    assert oracle.lost > 0.0 and kept + oracle.lost == pytest.approx(counted * 2 * len(oracle.heads), rel=1e-12)


@pytest.mark.parametrize(("policy", "window"), [("snapkv", 32), ("rkv", 8)])
def test_the_window_holds_the_last_queries(policy: str, window: int) -> None:
    """At each choice the sums are those of the last queries, whether single tokens or a chunk came before it."""
    oracle, text, seen = scoring(policy), tokens(MODELS["llama-gqa"], 600), []
    for n in [100, *[1] * 300, 40, 1]:
        will_choose = n == 1 and len(oracle.kept) == 144 and (oracle.batch is None or not oracle.batch.left)
        if will_choose:
            seen.append(sum(oracle.weights_of(0, 0).values()))
        oracle.chunk(text[oracle.n_past : oracle.n_past + n])
    assert len(seen) >= 3 and seen[0] == pytest.approx(2 * window)
    # some of it has gone with the victims since then
    assert all(window < total <= 2 * window + 1e-9 for total in seen)


def test_a_batch_goes_lowest_first() -> None:
    oracle, text = scoring("knorm", "head", evict_every=7), tokens(MODELS["llama-gqa"], 300)
    oracle.chunk(text[:144])
    for i in range(21):
        before = oracle.kept_by_unit()
        if i % 7 == 0:
            k = [np.linalg.norm(oracle.rows[il].k[:, h], axis=1) for il, h in oracle.heads]
            worth = [{p: -x for p, x in zip(b, n, strict=True)} for b, n in zip(before, k, strict=True)]
            last = oracle.n_past - 8
            order = [sorted((p for p in w if 4 <= p <= last), key=w.__getitem__)[:7] for w in worth]
        oracle.chunk([text[144 + i]])
        gone = [set(b) - set(a) for a, b in zip(oracle.kept_by_unit(), before, strict=True)]
        assert gone == [{unit[i % 7]} for unit in order]


def test_pages_go_whole() -> None:
    oracle = scoring("pagedeviction", budget=64, page_size=8)
    text = tokens(MODELS["llama-gqa"], 300)
    oracle.chunk(text[:64])
    for t in text[64:120]:
        before = oracle.kept_by_unit()
        oracle.chunk([t])
        if len(before[0]) == 64:
            for kept, after in zip(before, oracle.kept_by_unit(), strict=True):
                ranks = [i for i, p in enumerate(kept) if p not in after]
                assert ranks[0] % 8 == 0 and ranks == list(range(ranks[0], ranks[0] + 8))
    oracle.fail()
    assert len(oracle.kept) == 64 - 8 and len(oracle.evictions) == 8 * 8


def test_failed_steps_and_rewinds_are_followed() -> None:
    oracle, text = scoring("h2o", "head", evict_every=3, budget=40), tokens(MODELS["llama-gqa"], 100)
    oracle.chunk(text[:30])
    assert oracle.rewind(20) == EXACT and oracle.kept_by_unit() == [list(range(20))] * 4
    oracle.chunk(text[20:40])
    oracle.fail()
    assert oracle.n_past == 40 and {len(unit) for unit in oracle.kept_by_unit()} == {39}
    oracle.chunk(text[40:41])
    assert {len(unit) for unit in oracle.kept_by_unit()} == {40}
    # the newest tokens can go, down to what some unit has lost
    newest = max(p for p in range(40) if any(p not in unit for unit in oracle.kept_by_unit()))
    assert oracle.rewind(newest) == IMPOSSIBLE and oracle.rewind(41) == EXACT
    assert oracle.rewind(40) == SHORTENED and {len(unit) for unit in oracle.kept_by_unit()} == {39}
    assert oracle.rewind(0) == EXACT and oracle.kept_by_unit() == [[]] * 4 and oracle.batch is None
    fresh = scoring("h2o", "head", evict_every=3, budget=40)
    for o in (oracle, fresh):
        o.eval(text[:60], 16)
    assert oracle.kept_by_unit() == fresh.kept_by_unit()


def test_a_wrong_victim_is_refused_and_a_near_tie_followed() -> None:
    """The second lowest is wrong unless it is nearly the lowest; then it counts as another choice, and is followed."""
    text = tokens(MODELS["llama-gqa"], 60)
    own, strict, lax = (scoring("a2sf", "head", budget=40, tolerance=t) for t in (0.0, 1e-5, np.inf))
    for oracle in (own, strict, lax):
        oracle.chunk(text[:40])
    candidates = own._choice(40, pages=False)
    second = int(candidates.pos[2][np.argsort(candidates.worth[2])[1], 0])
    own.chunk([text[40]])
    theirs = own.kept_by_unit()
    theirs[2] = [p for p in range(41) if p != second]
    with pytest.raises(Wrong, match=rf"unit 2: the library evicted \[{second}\]"):
        strict.chunk([text[40]], theirs)
    lax.chunk([text[40]], theirs)
    assert lax.kept_by_unit() == theirs and (lax.n_chosen, lax.n_differed) == (4, 1)
    theirs[1] = theirs[1][:-1]
    with pytest.raises(Wrong, match="unit 1: the library keeps"):
        lax.rewind(0)
        lax.eval(text[:41], 40, theirs)


def test_no_two_policies_keep_the_same() -> None:
    """Models on which two formulas agree could not tell them apart."""
    text, kept = tokens(MODELS["llama-gqa"], 180), {}
    for policy in FORMULAS:
        oracle = scoring(policy, FORMULAS[policy].scope)
        oracle.eval(text[:140], 35)
        oracle.eval(text[140:], 1)
        kept[policy] = tuple(map(tuple, oracle.kept_by_unit()))
    assert len(set(kept.values())) == len(FORMULAS)


def test_caote_is_the_change_of_the_output() -> None:
    """||X - X without j|| computed the long way (CAOTE, arXiv 2504.14051)."""
    u = head()
    a = u.weights / u.weights.sum()
    x = a @ u.v
    changes = []
    for j in range(20):
        rest = np.delete(a, j)
        changes.append(np.linalg.norm(x - rest / rest.sum() @ np.delete(u.v, j, axis=0)))
    assert np.allclose(FORMULAS["caote"].score(u), changes)


def test_formulas_are_those_by_hand() -> None:
    loud = head(v=np.repeat([[1.0], [3.0]], 10, axis=0) * np.ones((20, 8)), k=np.ones((20, 8)))
    num, den = FORMULAS["pagedeviction"].score(loud)
    assert num[0] / den[0] < num[-1] / den[-1], "a large value is worth more"
    assert FORMULAS["vatp"].score(loud)[-1] == pytest.approx(loud.weights[-1] * 24.0)
    pooled = FORMULAS["snapkv"].score(head(weights=np.eye(20)[0]))
    assert pooled[:4].tolist() == [0.2, 0.2, 0.2, 0.0]
    same = np.ones((20, 8)) + 0.01 * np.eye(20, 8)
    assert np.argmin(FORMULAS["keydiff"].score(head(k_stored=np.vstack([same[:19], -same[19:]])))) < 19
    # token 3 alone points elsewhere: all others are redundant but for the newest of them
    keys = np.where(np.arange(20)[:, None] == 3, -same, same)
    score = FORMULAS["rkv"].score(head(k_stored=keys, weights=np.zeros(20)))[:16]
    assert np.argmax(score) == 3 and np.argsort(score)[-2] == 15 and np.isinf(FORMULAS["rkv"].score(head())[16:]).all()


def test_rows_keep_their_order() -> None:
    rows, k = Rows.empty(MODELS["llama-gqa"]), np.arange(4 * 2 * 64.0).reshape(4, 2, 64)
    rows.append(np.arange(4), k, -k)
    rows.keep(np.array([[1, 0], [0, 1], [1, 0], [0, 1]], dtype=bool))
    assert rows.pos.T.tolist() == [[0, 2], [1, 3]]
    assert np.array_equal(rows.k[1], np.stack([k[2, 0], k[3, 1]])) and np.array_equal(rows.v, -rows.k)
