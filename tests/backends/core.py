"""The core of the streaming tests on another backend, all layers on its device; tests/backends/run.sh starts this.

What the CPU is held to exactly (tests/native/test_streaming.py, an f32 cache without flash attention) cannot be asked of
a backend that multiplies in its own way. So everything here is held to policy `none` on the same backend: the RMS error
against the float64 oracle, over all single-token steps at a full cache, is at most 1.1 times that of `none` on the same
kept sets. Kept sets and slots are compared with the oracle's, exactly.

The tests that two runs on one backend decide (graph reuse, a large budget, a reset, batches of several ubatches) are those
of tests/native/test_streaming.py, unchanged.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import test_filter
import test_positions
import test_scores
import test_streaming
from measures import relative, rms
from models import MODELS
from native_api import Library, Model, Session
from test_streaming import (  # noqa: F401  (collected here too)
    Case,
    Load,
    Run,
    check_slots,
    noise_of_none,
    reference,
    test_a_batch_of_several_ubatches_is_several_calls,
    test_a_budget_above_the_length_gives_the_bits_of_none,
    test_a_llama_decode_of_several_ubatches_is_several_calls,
    test_a_reset_leaves_nothing_behind,
    test_the_graph_is_reused_where_none_reuses_it,
)

BACKEND = os.environ.get("EQUIP_TEST_BACKEND", "")
NOISE_RATIO = test_streaming.NOISE_RATIO

CASES = [
    Case("llama-gqa-32", "f32", 0, "true", 64, 32, 4, 0, "short"),
    Case("llama-gqa-32", "f32", 0, "cache", 64, 16, 4, 0, "long"),
    Case("llama-gqa", "f32", 0, "cache", 64, 32, 4, 9, "long"),
    Case("llama-gqa", "f16", 0, "cache", 64, 32, 4, 0, "budget"),
    Case("llama-gqa", "f16", 1, "cache", 64, 32, 4, 0, "long"),
    Case("llama-gqa", "q8_0", 1, "cache", 100, 33, 4, 0, "single-tail"),
    Case("llama-mha-128", "f16", 1, "true", 64, 32, 1, 0, "long"),
    Case("llama-mha-128", "f32", 0, "cache", 64, 32, 0, 0, "short"),
    Case("llama-mha-128", "q4_0", 1, "cache", 64, 16, 4, 0, "long"),
    Case("qwen2-gqa", "f32", 0, "cache", 64, 32, 4, 0, "short"),
    Case("qwen2-gqa", "q8_0", 0, "cache", 64, 32, 4, 9, "long"),
    Case("qwen2-gqa-128", "f16", 1, "cache", 64, 32, 4, 0, "long"),
    Case("gemma3-128", "f32", 0, "cache", 64, 32, 4, 0, "long"),
    Case("gemma3-128", "f16", 1, "cache", 64, 32, 4, 0, "short"),
    Case("gemma3-period6", "f16", 0, "true", 64, 32, 4, 0, "long"),
    Case("gpt-oss", "f16", 0, "cache", 64, 32, 4, 0, "long"),
    Case("gpt-oss", "q8_0", 1, "cache", 64, 16, 4, 0, "short"),
]


@pytest.fixture(scope="session", autouse=True)
def device(library: Library, model_file: Callable[[str], Path]) -> Iterator[str]:
    """Nothing here means anything unless the layers are on the device."""
    assert BACKEND, "start this with tests/backends/run.sh"
    if endpoint := os.environ.get("EQUIP_TEST_RPC_HERE"):
        import rpc

        rpc.add_server(library.folder, endpoint)
    yield BACKEND


@pytest.mark.parametrize("model", ["llama-gqa-32", "gemma3-128"])
def test_no_layer_stays_on_the_cpu(
    library: Library, model_file: Callable[[str], Path], capfd: pytest.CaptureFixture[str], model: str
) -> None:
    library.c.equip_set_verbosity(2)
    try:
        loaded = Model(library, model_file(model))
        with Session(loaded, policy="streaming", budget=64, n_ubatch=32, n_ctx=256) as session:
            session.eval([1, 2, 3])
        loaded.close()
    finally:
        library.c.equip_set_verbosity(0)
    log = capfd.readouterr().err
    layers = MODELS[model].n_layer + 1
    assert f"offloaded {layers}/{layers} layers to GPU" in log
    caches = re.findall(r"(\w+)(?:\[.*?\])? KV buffer size", log)
    assert caches and all(name.lower().startswith(BACKEND) for name in caches), caches


@pytest.mark.parametrize("case", CASES, ids=str)
def test_streaming_errs_no_more_than_none(
    load: Load,
    run_native: Run,
    model_file: Callable[[str], Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    case: Case,
) -> None:
    want, text = reference(case), case.tokens
    got, seen = np.zeros_like(want.logits), np.zeros(len(want.logits), dtype=bool)
    with case.session(load) as session:
        pos, chunk = 0, -1
        kept: dict[int, int] = {}
        for n in case.calls:
            logits = session.eval(text[pos : pos + n])
            pos, chunk = pos + n, chunk + (n + case.n_ubatch - 1) // case.n_ubatch
            got[chunk], seen[chunk] = logits, True
            before, kept = kept, session.kept()
            assert list(kept) == want.kept[chunk]
            if n == 1:
                check_slots(case, before, kept)
        stats = session.stats()
        assert stats["n_evicted"] == pos - case.budget and stats["n_used"] == case.budget
    assert np.isfinite(got[seen]).all() and seen[want.full].all()
    noise = noise_of_none(case, run_native, model_file(case.model), tmp_path)
    error = rms((got - want.logits)[want.full])
    scale = float(np.ptp(want.logits[want.full], axis=1).mean())
    worst = max(relative(a, b) for a, b in zip(got[seen], want.logits[seen], strict=True))
    print(
        f"{case}: rms/range {error / scale:.2e}, none {noise / scale:.2e}, ratio {error / noise:.3f}, max {worst:.1e}"
    )
    assert 0.0 < error <= NOISE_RATIO * noise


def error_of(load: Load, case: test_positions.Case, **options: object) -> float:
    """RMS error against the oracle over 120 single-token steps at a full cache, in units of the logits' range."""
    text, oracle, errors = test_positions.text_of(MODELS[case.model], 400), case.oracle(), []
    with case.session(load(case.model), **options) as session:
        session.eval(text[:80])
        oracle.eval(text[:80], case.n_ubatch)
        for t in text[80:200]:
            got, want = session.eval([t]), oracle.chunk([t])
            errors.append(rms(got - want) / float(np.ptp(want)))
        assert list(session.kept()) == oracle.kept
    return rms(np.array(errors))


@pytest.mark.parametrize("model", ["llama-gqa-32", "qwen2-gqa", "gemma3-128"])
@pytest.mark.parametrize("kv", ["f32", "q8_0"])
def test_rotations_on_the_device_cost_roundings_alone(
    load: Load, monkeypatch: pytest.MonkeyPatch, model: str, kv: str
) -> None:
    """Debts, pinned tokens, a re-base every 50 positions and gather, against streaming with true positions, which rotates
    nothing. Rotating stored keys again costs roundings, and a device's sine is not the CPU's: up to twice the error with f32
    keys that are rotated a hundred times, up to three times with quantised ones."""
    fa = "on" if kv == "q8_0" else "off"
    types = {"type_k": kv, "type_v": kv if fa == "on" else "f16", "flash_attn": fa}
    plain = error_of(load, test_positions.Case(model, positions="true"), **types)
    monkeypatch.setenv("LLAMA_KV_REBASE_AT", "50")
    for policy, update in (("streaming", "inplace"), ("streaming", "gather"), ("random", "inplace")):
        case = test_positions.Case(model, policy, update, pinned=9)
        if policy == "random" and kv == "q8_0":
            continue  # a rounding per step and key: hundreds of them
        error = error_of(load, case, **types)
        print(f"{case} {kv}: {error:.2e}, without rotations {plain:.2e}, ratio {error / plain:.2f}")
        assert 0.0 < error <= (2.0 if kv == "f32" else 3.0) * plain


SCORED = [
    test_scores.Case("h2o", fa=0, score_queries=64),
    test_scores.Case("h2o", fa=1, kv="f16", score_queries=64, evict_every=8),
    test_scores.Case("h2o", scope="layer", model="gemma3", fa=1, kv="f16", score_queries=20),
    test_scores.Case("h2o", scope="token", model="qwen2-gqa", fa=0, positions="cache", score_queries=64),
    test_scores.Case("h2o", positions="cache", fa=0, score_queries=64),
    test_scores.Case("tova", fa=1, kv="f16", score_queries=64),
    test_scores.Case("a2sf", fa=0, score_queries=64),
    test_scores.Case("snapkv", fa=1, kv="f16", score_queries=64),
    test_scores.Case("vatp", fa=1, kv="q8_0", score_queries=64),
    test_scores.Case("caote", fa=0, score_queries=64),
    test_scores.Case("pagedeviction", fa=1, kv="f16"),
    test_scores.Case("keydiff", fa=1, kv="f16"),
    test_scores.Case("knorm", scope="layer", fa=0),
    test_scores.Case("rkv", fa=1, kv="f16", score_queries=64),
    test_scores.Case("random", scope="head", fa=1, kv="f16"),
]


@pytest.mark.parametrize("case", SCORED, ids=str)
def test_scores_on_the_device_are_the_oracles(load: Load, case: test_scores.Case) -> None:
    """The oracle follows the kept sets; a victim that is worth more than the lowest by more than the device's rounding fails.

    Logits and weights: within twice what streaming with true positions is off by, which the tests above hold to `none`.
    """
    types = {"type_k": case.kv, "type_v": case.kv if case.fa else "f16", "flash_attn": "on" if case.fa else "off"}
    plain = error_of(load, test_positions.Case(case.model), **types)
    oracle = case.oracle(tolerance=max(0.02, 5 * plain) if case.policy != "random" else 1e-6)
    text, errors, pos = case.text, [], 0
    every = {} if oracle.formula.pages else {"evict_every": oracle.evict_every}  # a device has another default
    with case.session(load, type_v=types["type_v"], **every) as session:
        for n in [32, 32, *[1] * 60, 32, *[1] * 60]:
            got = session.eval(text[pos : pos + n])
            theirs = [sorted(session.head(*unit[0])) for unit in oracle.units]
            want = oracle.chunk(text[pos : pos + n], theirs)
            pos += n
            if len(oracle.evictions) > 0:
                errors.append(rms(got - want) / float(np.ptp(want)))
        worst = 0.0
        for il, head in oracle.heads:
            ours, his = oracle.weights_of(il, head), session.head(il, head)
            assert list(ours) == list(his)
            worst = max(worst, *(abs(ours[p] - his[p]) for p in ours)) / max(1e-9, *ours.values(), worst)
    error = rms(np.array(errors))
    flips = oracle.n_differed / max(1, oracle.n_chosen)
    print(f"{case}: {error:.2e}, streaming {plain:.2e}, weights {worst:.1e}, other victims {flips:.2%}")
    assert oracle.n_chosen > 100
    assert 0.0 < error <= 2.0 * plain
    assert flips < (0.01 if case.kv == "f32" else 0.2)


FILTERED = [
    test_scores.Case("h2o", model="llama-gqa-32", fa=0, score_queries=64),
    test_scores.Case("a2sf", model="llama-gqa-32", fa=1, kv="f16", score_queries=64),
    test_scores.Case("knorm", scope="layer", model="llama-gqa-32", fa=1, kv="f16"),
    test_scores.Case("random", scope="head", model="qwen2-gqa", fa=0, kv="f16"),
]


@pytest.mark.parametrize("case", FILTERED, ids=str)
def test_layers_on_the_device_leave_out_what_the_oracle_says(load: Load, case: test_scores.Case) -> None:
    """The oracle follows what is kept; a decision that the device's rounding does not explain fails. Logits as above."""
    types = {"type_k": case.kv, "type_v": case.kv if case.fa else "f16", "flash_attn": "on" if case.fa else "off"}
    plain, given = error_of(load, test_positions.Case(case.model), **types), {"filter_layers": 1} | test_filter.WARM
    scored = case.policy != "random"
    oracle = test_filter.oracle_of(case, tolerance=max(0.02, 5 * plain) if scored else 1e-6, margin=5 * plain, **given)
    every = {"evict_every": 1} if scored else {}
    text, errors, pos = case.text, [], 0
    with case.session(load, type_v=types["type_v"], **(given | every)) as session:
        for n in test_filter.CHUNKS:
            got, theirs = session.eval(text[pos : pos + n]), test_scores.kept_by_unit(session, oracle)
            want = oracle.chunk(text[pos : pos + n], theirs)
            pos += n
            if n == 1 and len(oracle.evictions) > 0:
                errors.append(rms(got - want) / float(np.ptp(want)))
        stats = session.stats()
    error = rms(np.array(errors))
    print(f"{case}: {error:.2e}, streaming {plain:.2e}, left out {oracle.n_filtered}, adopted {oracle.n_adopted}")
    assert (stats["n_filtered"], stats["n_filterable"]) == (oracle.n_filtered, oracle.n_filterable)
    assert oracle.n_filtered > 40 and stats["device_reads"] > 0
    assert 0.0 < error <= 2.0 * plain


@pytest.mark.parametrize("model", ["llama-gqa", "gemma3"])
@pytest.mark.parametrize(
    "policy",
    [
        "streaming:budget=64",
        "h2o:budget=64,recent=8,positions=cache,rotate_every=4,score_queries=64",
        "snapkv:budget=64,recent=8,scope=layer,score_queries=64",
        "random:budget=64,recent=8,positions=cache,update=gather",
    ],
)
@pytest.mark.parametrize("fa", ["on", "off"])
def test_state_from_the_device_goes_on_otherwise(load: Load, model: str, policy: str, fa: str) -> None:
    """Rows, sums, queries and originals are read back, and written to the device again."""
    options = {"policy": policy, "flash_attn": fa, "n_ubatch": 32, "n_ctx": 512}
    text = [t * 31 % 200 for t in range(3, 403)]
    with Session(load(model), **options) as a, Session(load(model), **options) as b:
        a.eval(text[:100])
        for t in text[100:120]:
            a.eval([t])
        b.eval(text[300:])
        b.load(data := a.save())
        assert b.save() == data
        for t in text[120:160]:
            want, got = a.eval([t]), b.eval([t])
            assert np.abs(want - got).max() <= 1e-6 * np.ptp(want)  # a device may sum in another order
        assert a.kept() == b.kept()


def test_a_pool_stays_sound_under_any_operations(
    run_native: Callable[..., subprocess.CompletedProcess[str]], model_file: Callable[[str], Path]
) -> None:
    """What is kept; the logits beside those of a sequence alone are the CPU's, and those of tests/programs/test_rpc.py."""
    result = run_native("test-pool", model_file("llama-gqa"), "6", "40")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.mark.parametrize("model", ["llama-gqa", "qwen2-gqa"])  # gemma3 takes eight minutes on Vulkan's software driver
def test_a_program_on_llama_h_meets_the_same(
    run_native: Callable[..., subprocess.CompletedProcess[str]], model_file: Callable[[str], Path], model: str
) -> None:
    result = run_native("test-policy", model_file(model))
    assert result.returncode == 0, result.stderr[-3000:]
