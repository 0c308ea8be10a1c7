"""What the study of methods that the library does not have rests on: its simulated eviction (`studies/method_study/`).

On tiny random tensors. It needs torch, which is too large to be a requirement of the tests: without it they are skipped.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from places import REPOSITORY

pytestmark = [pytest.mark.real]

N, BUDGET, START = 60, 24, 24
N_HEAD, N_HEAD_KV, HEAD_DIM = 6, 3, 8
Array = np.ndarray


@pytest.fixture(scope="module")
def study() -> Iterator[Any]:
    pytest.importorskip("torch", reason="torch is missing; run: pip install torch")
    sys.path.insert(0, str(REPOSITORY / "studies"))
    try:
        names = ("eviction", "measure", "methods", "network", "rows")
        yield SimpleNamespace(
            torch=importlib.import_module("torch"), **{n: importlib.import_module(f"method_study.{n}") for n in names}
        )
    finally:
        sys.path.remove(str(REPOSITORY / "studies"))


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def network(request: pytest.FixtureRequest, study: Any) -> Any:
    """Random weights; of six layers gemma3's first five see a window, of three llama's none does. gemma3 has one KV head."""
    torch, gemma = study.torch, request.param == "gemma3"
    n_layer, n_embd, n_ff, n_vocab = 6 if gemma else 3, 16, 24, 50
    windows = (7,) * 5 + (0,) if gemma else (0,) * 3
    n_head_kv = 1 if gemma else N_HEAD_KV
    spec = study.network.Spec(
        n_layer, n_embd, N_HEAD, n_head_kv, HEAD_DIM, 1e-6, (10000.0,) * n_layer, windows, is_gemma=gemma
    )
    generator = torch.Generator().manual_seed(1)

    def matrix(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator) / 3

    tensors = {"token_embd.weight": matrix(n_vocab, n_embd), "output_norm.weight": torch.ones(n_embd)}
    for layer in range(n_layer):
        shapes = {"attn_q": (N_HEAD * HEAD_DIM, n_embd), "attn_output": (n_embd, N_HEAD * HEAD_DIM)}
        shapes |= {name: (n_head_kv * HEAD_DIM, n_embd) for name in ("attn_k", "attn_v")}
        shapes |= {"ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff)}
        ones = {name: n_embd for name in ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")}
        ones |= {name: HEAD_DIM for name in ("attn_q_norm", "attn_k_norm")}
        tensors |= {f"blk.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        tensors |= {f"blk.{layer}.{name}.weight": torch.ones(n) for name, n in ones.items()}
    return study.network.Network(spec, tensors)


TOKENS = [7 * i % 50 for i in range(N)]


def layer_of(study: Any, network: Any, start: int = START) -> Any:
    """Random queries, keys and values of one layer."""
    generator = study.torch.Generator().manual_seed(2)
    q, k, v = (study.torch.randn(heads, N, HEAD_DIM, generator=generator) for heads in (N_HEAD, N_HEAD_KV, N_HEAD_KV))
    return study.eviction.Layer(network, network.spec.bounded[0], 0, 1, start, q, k, v)


def weights_of(q: Array, k: Array) -> Array:
    """Of the query heads (group, head_dim) of one KV head, over its keys (n, head_dim)."""
    scores = q @ k.T / np.sqrt(HEAD_DIM)
    each = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights: Array = each / each.sum(axis=1, keepdims=True)
    return weights


History = list[dict[int, Array]]  # for each query so far: the weights (group,) that it gave to a position
Worth = Callable[[History, list[int], int], list[float]]  # of these positions, before token t is read


def step_by_step(
    layer: Any, worth: Worth, sinks: int, recent: int, block: int, by_layer: bool
) -> tuple[Array, list[set[int]]]:
    """The plain loop: outputs (n_head, n, head_dim) of all tokens, and what each head keeps at the end."""
    q, k, v = (tensor.double().numpy() for tensor in (layer.q, layer.k, layer.v))
    group, heads = N_HEAD // N_HEAD_KV, range(N_HEAD_KV)
    kept: list[list[int]] = [[] for _ in heads]
    history: list[History] = [[] for _ in heads]
    victims: list[list[int]] = [[] for _ in heads]
    out = np.zeros(q.shape)
    for t in range(N):
        if len(kept[0]) == BUDGET and not victims[0]:
            values = np.array([worth(history[h], kept[h], t) for h in heads])
            if by_layer:
                values = np.broadcast_to(values.sum(axis=0), values.shape)
            for h in heads:
                may_go = [(value, p) for value, p in zip(values[h], kept[h], strict=True) if sinks <= p <= t - recent]
                victims[h] = [p for _, p in sorted(may_go)[:block]]
        for h in heads:
            if len(kept[h]) == BUDGET:
                kept[h].remove(victims[h].pop(0))
            kept[h].append(t)
            queries = slice(h * group, (h + 1) * group)
            scores = q[queries, t] @ k[h, kept[h]].T / np.sqrt(HEAD_DIM)
            weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
            out[queries, t] = weights @ v[h, kept[h]]
            history[h].append(dict(zip(kept[h], weights.T, strict=True)))
    return out, [set(each) for each in kept]


def summed(decay: float = 1.0, heads: Callable[[Array], float] = np.sum) -> Worth:
    def worth(history: History, positions: list[int], t: int) -> list[float]:
        of = [[decay ** (t - 1 - i) * heads(each[p]) for i, each in enumerate(history) if p in each] for p in positions]
        return [sum(each) for each in of]

    return worth


def largest(history: History, positions: list[int], t: int) -> list[float]:
    return [max(float(each[p].sum()) for each in history if p in each) for p in positions]


def pooled(history: History, positions: list[int], t: int) -> list[float]:
    """Of the last four queries, averaged over five neighbours; six tokens are recent and count as zeros."""
    plain = [sum(float(each[p].sum()) for each in history[-4:] if p in each) * (p <= t - 6) for p in positions]
    padded = np.pad(plain, 2)
    return [float(padded[i : i + 5].mean()) for i in range(len(plain))]


# settings, and the same as a plain formula
SUMMED: dict[str, tuple[dict[str, Any], Worth]] = {
    "h2o": ({}, summed()),
    "h2o, four at once": ({"block": 4}, summed()),
    "a2sf": ({"decay": 0.9}, summed(0.9)),
    "tova": ({"decay": 0.0, "by_layer": True}, summed(0.0)),
    "max of queries": ({"queries": "max"}, largest),
    "max of heads": ({"heads": "max"}, summed(heads=np.max)),
}


@pytest.mark.parametrize("network", ["llama"], indirect=True)
@pytest.mark.parametrize("case", SUMMED)
def test_eviction_by_summed_weights_equals_a_plain_loop(study: Any, network: Any, case: str) -> None:
    settings, worth = SUMMED[case]
    layer = layer_of(study, network)
    method = study.methods.Summed(case, BUDGET, sinks=2, recent=5, **settings)
    expected, kept = step_by_step(layer, worth, 2, 5, method.block, method.by_layer)
    np.testing.assert_allclose(method.attended(layer).numpy(), expected[:, START:], atol=1e-5)
    assert [set(head.tolist()) for head in method.kept[0]] == kept


@pytest.mark.parametrize("network", ["llama"], indirect=True)
def test_eviction_by_a_window_equals_a_plain_loop(study: Any, network: Any) -> None:
    layer = layer_of(study, network)
    method = study.methods.Windowed("snapkv", BUDGET, sinks=2, recent=6, block=4, window=4)
    expected, kept = step_by_step(layer, pooled, 2, 6, 4, by_layer=False)
    np.testing.assert_allclose(method.attended(layer).numpy(), expected[:, START:], atol=1e-5)
    assert [set(head.tolist()) for head in method.kept[0]] == kept


@pytest.mark.parametrize("network", ["llama"], indirect=True)
@pytest.mark.parametrize("name", ["streaming", "random"])
def test_a_window_and_a_sample_equal_a_plain_loop(study: Any, network: Any, name: str) -> None:
    torch, layer = study.torch, layer_of(study, network)
    method = study.rows.ROWS[name].make(name, BUDGET)
    method.begin(network, SimpleNamespace(x=torch.zeros(N, 1)))
    out = method.attended(layer)
    kept = list(range(BUDGET))
    raw_q, raw_k = (network.turn(x, -torch.arange(N), layer.layer) for x in (layer.q, layer.k))
    for t in range(START, N):
        old = [p for p in kept if 4 <= p <= t - (1 if name == "streaming" else 16)]
        kept.remove(old[0] if name == "streaming" else min(old, key=study.methods.drawn))
        kept.append(t)
        # positions: ranks for streaming, as its authors have it; true ones for the sample
        ranks = torch.arange(BUDGET) if name == "streaming" else torch.tensor(kept)
        q = network.turn(raw_q[:, t : t + 1], ranks[-1:], layer.layer)
        k = network.turn(raw_k[:, kept], ranks, layer.layer)
        everything = torch.ones(1, BUDGET, dtype=torch.bool)
        expected, _ = study.network.attend(q, k, layer.v[:, kept], everything)
        np.testing.assert_allclose(out[:, t - START].numpy(), expected[:, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["none", "h2o", "snapkv", "SpAtten", "Ada-KV"])
def test_without_eviction_a_row_is_the_full_cache(study: Any, network: Any, name: str) -> None:
    full = study.network.run_full(network, TOKENS)
    method = study.rows.ROWS[name].make(name, 2 * N)  # half of it is enough for all layers of a cascade
    method.first_eviction = lambda n_bounded: START
    hidden = study.eviction.run(network, method, full)
    np.testing.assert_allclose(hidden.numpy(), full.hidden[START:].numpy(), atol=1e-4)
    row = study.measure.Judge(network, TOKENS, full.hidden, START, 1).row(hidden, START)
    assert abs(row.kl).max() < 1e-6 and row.same.all() and len(row.kl) == N - 1 - START


def small(study: Any, name: str) -> Any:
    """A row whose blocks and windows fit a budget of 24."""
    make, methods = study.rows.ROWS[name].make, study.methods
    method = make(name, BUDGET)
    if isinstance(method, study.eviction.Evicting):
        method.sinks, method.recent, method.block = min(method.sinks, 2), min(method.recent, 4), min(method.block, 4)
    if isinstance(method, methods.Windowed):
        method.window = 4
    if isinstance(method, methods.Random):
        method.recent = 4
    return method


def test_every_row_reads_a_text_and_keeps_its_budget(study: Any, network: Any) -> None:
    full = study.network.run_full(network, TOKENS)
    bounded, n_head_kv = network.spec.bounded, network.spec.n_head_kv
    for name in study.rows.ROWS:
        method = small(study, name)
        hidden = study.eviction.run(network, method, full)
        assert hidden.isfinite().all(), name
        if isinstance(method, study.eviction.Evicting):
            budgets = method.budgets(len(bounded))
            assert sum(budgets) == BUDGET * len(bounded), name
            assert len(method.kept) == len(bounded), name
            for budget, kept in zip(budgets, method.kept, strict=True):
                sizes = [len({p for p in head if p >= 0}) for head in kept.tolist()]
                assert sum(sizes) == budget * n_head_kv, name
                assert method.pooled or sizes == [budget] * n_head_kv, name
                assert min(sizes) >= method.pooled * budget, name
                for head in kept.tolist():  # protected tokens are there
                    assert {*range(method.sinks), *range(N - min(method.recent, 4), N)} <= set(head), name


@pytest.mark.parametrize("network", ["llama"], indirect=True)
@pytest.mark.parametrize("name", ["SpAtten", "LazyLLM, evicting"])
def test_a_cascade_keeps_nothing_that_the_layer_before_dropped(study: Any, network: Any, name: str) -> None:
    method = small(study, name)
    study.eviction.run(network, method, study.network.run_full(network, TOKENS))
    sizes = [len(layer[0]) for layer in method.kept]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    for before, after in zip(method.kept, method.kept[1:], strict=False):
        assert set(after[0].tolist()) <= set(before[0].tolist())
        assert all(head == after.tolist()[0] for head in after.tolist())


def test_budgets_are_shared_out_to_the_last_token(study: Any) -> None:
    assert study.methods.shared_out([10, 20, 30], 30, 5) == [7, 10, 13]
    assert study.methods.shared_out([0, 0, 11], 31, 10) == [10, 10, 11]
    for seed in range(20):
        wanted = np.random.default_rng(seed).uniform(0, 100, 7).tolist()
        shares = study.methods.shared_out(wanted, 333, 17)
        assert sum(shares) == 333 and min(shares) >= 17
        assert [shares[i] for i in np.argsort(wanted)] == sorted(shares)


def test_a_ratio_is_paired(study: Any) -> None:
    """Rows that differ by a factor have that ratio in every draw, however much the text varies."""
    measure, n = study.measure, 640
    positions = np.arange(n)
    kl = np.random.default_rng(3).exponential(1.0, n) * (1 + positions)
    row, base = (measure.Row(each, kl > 0, kl, positions) for each in (0.8 * kl, kl))
    weights = measure.draws(positions)
    assert (weights.sum(axis=1) == n).all()
    assert measure.ratio(row, base, weights) == pytest.approx((0.8, 0.8, 0.8))
    low, high = measure.interval(kl, weights)
    assert low < 0.95 * kl.mean() < 1.05 * kl.mean() < high
