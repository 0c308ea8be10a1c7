"""Token Filtering (`filter=RATIO`): later layers leave a token out, and everything that is kept, answered, taken back and saved says so.

The float64 oracle (oracle_filter.py) decides, evicts and attends on its own; where a similarity lies within a margin of the
threshold, or two candidates are worth the same, it follows the library. The criteria are those of test_scores.
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measures import relative
from models import MODELS, Spec
from native_api import REWIND, Model, NativeError, Session
from oracle import IMPOSSIBLE
from oracle_filter import FilterOracle
from oracle_heads import HeadOracle
from stopped import stopped_decodes
from test_scores import (
    NOISE_RATIO,
    TOLERANCE,
    WORTH_NOISE,
    Case,
    Row,
    check_flips,
    check_heads,
    follow,
    in_units_of_rounding,
    kept_by_unit,
    noise_of_streaming,
    rounding,
)

Load = Callable[["Spec | str"], Model]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
ModelFile = Callable[["Spec | str"], Path]

USAGE, UNSUPPORTED = -1, -3  # enum equip_status

WARM = {"filter": 0.3, "filter_warmup": 16}

# how near a similarity may be to the threshold when the cache rounds, or flash attention does
MARGIN = {"f32": 1e-2, "f16": 1e-2, "q8_0": 0.05}


def oracle_of(case: Case, **options: Any) -> FilterOracle:
    given = case.given | dict(pinned=case.pinned, parameters=dict(case.parameters))
    return FilterOracle(case.spec, **(given | options))


@pytest.fixture(params=["cpu", "device"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Who judges: operations of the CPU's, or those that any device has, in the graph; the variables that native programs need for it."""
    variables = {"LLAMA_KV_SCORES": "graph"} if request.param == "device" else {}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


def calls(case: Case, chunks: Sequence[int]) -> Iterator[list[int]]:
    pos = 0
    for n in chunks:
        yield case.text[pos : pos + n]
        pos += n


CHUNKS = [32, *[1] * 150, 20, *[1] * 80, 5, *[1] * 60]

# policy, scope, model, ratio, layers that leave tokens out, protection
EXACT: list[tuple[str, str, str, float, int, dict[str, Any]]] = [
    ("h2o", "head", "llama-gqa-32", 0.3, 2, {}),
    ("h2o", "layer", "llama-gqa-32", 0.9, 3, {"pinned": 9}),
    ("tova", "layer", "llama-gqa-32", 0.5, 3, {"sinks": 0, "recent": 1}),
    ("tova", "head", "qwen2-gqa", 0.1, 1, {}),
    ("a2sf", "head", "llama-mha", 0.2, 2, {}),
    ("vatp", "head", "gemma3", 0.4, 1, {}),
    ("caote", "head", "gpt-oss", 0.3, 1, {}),
    ("fastcaote", "layer", "gemma2", 0.3, 1, {}),
    ("keydiff", "layer", "llama-gqa-32", 0.3, 2, {"recent": 20}),
    ("knorm", "head", "smollm3", 0.5, 3, {}),
    ("random", "layer", "llama-mha", 0.3, 2, {}),
    ("h2o", "head", "llama-gqa-128", 0.3, 1, {}),  # one head: nothing to compare variances of
]


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize(("policy", "scope", "model", "ratio", "n", "protect"), EXACT, ids=lambda x: str(x))
def test_filtered_layers_keep_and_answer_what_the_oracle_says(
    load: Load, policy: str, scope: str, model: str, ratio: float, n: int, protect: dict[str, Any]
) -> None:
    case = dataclasses.replace(Case(policy, scope, model), **protect)
    oracle = oracle_of(case, filter=ratio, filter_layers=n, filter_warmup=16)
    with case.session(load, filter=ratio, filter_layers=n, filter_warmup=16) as session:
        for i, tokens in enumerate(calls(case, CHUNKS)):
            assert follow(session, oracle, tokens) <= TOLERANCE, i
            if i % 50 == 0:
                check_heads(session, oracle)
        check_heads(session, oracle)
        stats = session.stats()
        assert (stats["n_filtered"], stats["n_filterable"]) == (oracle.n_filtered, oracle.n_filterable)
        assert 0 < oracle.n_filtered < oracle.n_filterable and oracle.n_adopted <= 2
        assert list(session.kept()) == oracle.kept
    check_flips(oracle)


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize(
    ("policy", "scope", "model", "kv", "fa", "cpu_attn"),
    [
        ("h2o", "head", "llama-gqa-32", "f16", 1, 1),
        ("h2o", "head", "llama-gqa-32", "f16", 1, 0),
        ("h2o", "layer", "qwen2-gqa", "q8_0", 1, 1),
        ("vatp", "head", "llama-gqa-32", "f16", 0, 1),
        ("knorm", "head", "gpt-oss", "f16", 1, 1),
        ("tova", "layer", "gemma2", "f32", 1, 1),
    ],
)
def test_a_rounded_cache_errs_no_more_beside_a_filter(
    load: Load, policy: str, scope: str, model: str, kv: str, fa: int, cpu_attn: int
) -> None:
    """Our kernel leaves the work out; elsewhere the result is multiplied by zero."""
    case = Case(policy, scope, model, kv, fa)
    near = dict(filter_layers=1, margin=MARGIN[kv], **WARM)

    def error(oracles: Sequence[HeadOracle], **options: Any) -> float:
        rows = list[Row]()
        with case.session(load, cpu_attn=cpu_attn, **options) as session:
            assert not fa or session.stats()["attn_kernel"] == ("equip-cpu" if cpu_attn else "upstream-fa")
            for tokens in calls(case, CHUNKS):
                got, theirs = session.eval(tokens), kept_by_unit(session, oracles[0])
                want, rounded = (oracle.chunk(tokens, theirs) for oracle in oracles)
                if len(tokens) == 1 and oracles[0].n_past > case.budget:
                    rows.append((got, want, rounded))
        return in_units_of_rounding(rows)

    rounds = dict(tolerance=np.inf, round_kv=rounding(kv))
    filtered = [oracle_of(case, tolerance=WORTH_NOISE[kv], **near), oracle_of(case, **rounds, **near)]
    found = error(filtered, filter_layers=1, **WARM)
    assert filtered[0].n_filtered > 20
    # upstream's own kernel errs by more than ours, without a filter too
    without = [case.oracle(tolerance=WORTH_NOISE[kv]), case.oracle(**rounds)]
    noise = noise_of_streaming(load, case.spec, kv, fa, case.budget) if cpu_attn else error(without)
    assert 0.0 < found <= NOISE_RATIO * noise


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_so_many_tokens_are_left_out(load: Load, ratio: float) -> None:
    """In each of the layers, whatever the text; and none before the cache is full, or in a chunk."""
    case = Case("h2o", "layer", "llama-gqa-32", n_vocab=1280)
    oracle = oracle_of(case, filter=ratio)
    with case.session(load, filter=ratio) as session:
        text = case.text
        for t in text[: case.budget]:
            session.eval([t])
        assert [len(session.head(il, 0)) for il in range(4)] == [case.budget] * 4
        assert session.stats()["n_filtered"] == 0
        for t in text[case.budget : 900]:
            session.eval([t])
        stats = session.stats()
        assert stats["n_filtered"] / stats["n_filterable"] == pytest.approx(ratio, abs=0.03)
        # recent tokens are never victims: those that are missing were left out, in the later half of the layers alone
        recent = set(range(900 - case.recent, 900))
        assert recent <= set(session.head(0, 0)) and recent <= set(session.head(1, 0))
        before = stats["n_filterable"]
        session.eval(text[900:930])
        assert all(set(range(922, 930)) <= set(session.head(il, 0)) for il in range(4))
        assert session.stats()["n_filterable"] == before
    assert oracle.filtered == [2, 3]


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize(
    ("policy", "scope"), [("h2o", "head"), ("tova", "layer"), ("knorm", "head"), ("random", "head")]
)
def test_a_rewind_leaves_what_all_layers_have(load: Load, policy: str, scope: str) -> None:
    """Steps, chunks and rewinds in any order; as many tokens everywhere, the same as the oracle's."""
    case = Case(policy, scope, "llama-gqa-32", n_vocab=2048)
    text, rng = case.text, np.random.default_rng(3)
    oracle, n_back, n_refused = oracle_of(case, filter_layers=2, **WARM), 0, 0
    with case.session(load, filter_layers=2, **WARM) as session:
        while oracle.n_past < 700:
            pos = oracle.n_past
            for n in [1] * int(rng.integers(1, 24)) if rng.random() < 0.85 else [int(rng.integers(2, 9))]:
                pos = oracle.n_past
                assert follow(session, oracle, text[pos : pos + n]) <= TOLERANCE
            p0 = oracle.n_past - int(rng.integers(1, 12))
            if p0 < case.budget:
                continue
            before = oracle.kept_by_unit()
            answer = oracle.rewind(p0)
            if answer == IMPOSSIBLE:
                with pytest.raises(NativeError) as refused:
                    session.rewind(p0)
                assert refused.value.status == REWIND and kept_by_unit(session, oracle) == before
                n_refused += 1
                continue
            assert session.rewind(p0) == answer
            n_back += 1
            assert kept_by_unit(session, oracle) == oracle.kept_by_unit()
            assert {len(unit) for unit in oracle.kept_by_unit()} == {len(session.kept())}
        assert n_back > 20 and oracle.n_filtered > 50
        check_heads(session, oracle, 1e-3)
        session.rewind(0)
        assert session.kept() == {} and session.stats()["n_filterable"] == 0
        # nothing of the anchors is left behind
        again = oracle_of(case, filter_layers=2, **WARM)
        for tokens in calls(case, [32, *[1] * 120]):
            assert follow(session, again, tokens) <= TOLERANCE


@pytest.mark.parametrize(("policy", "scope"), [("knorm", "layer"), ("random", "head"), ("keydiff", "layer")])
def test_a_stopped_decode_leaves_no_trace_in_the_anchors(
    run_native: Run, model_file: ModelFile, tmp_path: Path, where: dict[str, str], policy: str, scope: str
) -> None:
    """Between any two nodes: a single token's victims are gone in every layer, and it is judged once, when it comes again."""
    case = Case(policy, scope, "llama-gqa-32", fixed_budget=64)
    chunks = [30, 30, *[1] * 120, 7, 16, *[1] * 90]
    text, oracle, n_stopped = case.text[: sum(chunks)], oracle_of(case, filter_layers=2, **WARM), 0
    given = ",".join(f"{key}={value}" for key, value in (case.given | WARM).items() if key != "policy")
    spec = f"{policy}:{given},filter_layers=2"
    run = functools.partial(run_native, **where)
    decodes = stopped_decodes(run, model_file(case.spec), spec, tmp_path, text, chunks, case.n_vocab, every=7)
    for n, kept, got in decodes:
        if kept is not None:
            if n == 1 and len(oracle.kept) == case.budget:
                oracle.fail()
                n_stopped += 1
            assert kept == oracle.kept
        assert relative(got, oracle.chunk(text[oracle.n_past : oracle.n_past + n])) <= TOLERANCE
    assert n_stopped > 20 and oracle.n_filtered > 40


@pytest.mark.usefixtures("where")
def test_a_filter_costs_no_graph(load: Load) -> None:
    """The decision is data: a graph is reused whenever it is without one."""
    case, reused = Case("h2o", "head", "llama-gqa-32", kv="f16", fa=1), []
    for options in ({}, {"filter_layers": 2, **WARM}):
        with case.session(load, **options) as session:
            for tokens in calls(case, CHUNKS):
                session.eval(tokens)
            reused.append(session.stats()["graphs_reused"])
    assert reused[0] == reused[1] > 250


def test_a_filter_of_nothing_is_none(load: Load) -> None:
    case, runs = Case("h2o", "head", "llama-gqa-32", kv="f16", fa=1), []
    for options in ({}, {"filter": 0}, {"filter": 0, "filter_layers": 2}):
        with case.session(load, **options) as session:
            assert "filter" not in session.stats()["text"]
            runs.append(np.array([session.eval(tokens) for tokens in calls(case, CHUNKS)]))
    assert np.array_equal(runs[0], runs[1]) and np.array_equal(runs[0], runs[2])


@pytest.mark.usefixtures("where")
def test_threads_change_nothing(load: Load) -> None:
    case, runs = Case("h2o", "head", "llama-gqa-32"), []
    for n in (1, 3):
        with case.session(load, filter_layers=2, n_threads=n, n_threads_batch=n, **WARM) as session:
            logits = np.array([session.eval(tokens) for tokens in calls(case, CHUNKS)])
            runs.append((logits, [session.head(il, h).keys() for il in range(4) for h in range(2)]))
    assert runs[0][1] == runs[1][1] and relative(runs[0][0], runs[1][0]) <= TOLERANCE


@pytest.mark.parametrize(
    "text",
    [
        "h2o:budget=64,recent=8,filter=0.4,filter_warmup=4",
        "tova:budget=64,recent=8,filter=0.3,filter_warmup=0",
        "random:budget=64,recent=8,scope=head,filter=0.5,filter_warmup=4",
        "vatp:budget=64,recent=8,scope=layer,filter=0.3,filter_warmup=4",
    ],
)
@pytest.mark.parametrize("fa", ["0", "1"])
def test_a_restored_filter_goes_on_to_the_bit(
    run_native: Run, model_file: ModelFile, where: dict[str, str], text: str, fa: str
) -> None:
    result = run_native("test-state", model_file("llama-gqa-32"), "exact", text, f"fa={fa}", "n_seq=1", **where)
    assert result.returncode == 0 and "OK" in result.stdout, result.stdout[-2000:] + result.stderr[-4000:]


def test_a_damaged_filter_is_refused(
    run_native: Run, model_file: ModelFile, tmp_path: Path, where: dict[str, str]
) -> None:
    text = "h2o:budget=64,recent=8,filter=0.4,filter_warmup=4"
    given = (text, 200, 6, tmp_path / "state", "n_seq=1")
    result = run_native("test-state", model_file("llama-gqa-32"), "mutate", *given, **where)
    assert result.returncode == 0 and "OK" in result.stdout, result.stdout[-2000:] + result.stderr[-4000:]


def test_a_state_goes_on_where_others_judge(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the CPU to a device and back: the same decisions."""
    case = Case("h2o", "head", "llama-gqa-32")
    pos, state, runs = 250, b"", []
    for there in (False, True, False):
        oracle = oracle_of(case, filter_layers=2, **WARM)
        monkeypatch.setenv("LLAMA_KV_SCORES", "graph" if there else "")
        with case.session(load, filter_layers=2, **WARM) as session:
            if state:
                session.load(state)
            else:
                for t in case.text[:pos]:
                    session.eval([t])
            for t in case.text[pos : pos + 60]:
                session.eval([t])
            runs.append(kept_by_unit(session, oracle))
            state, pos = session.save(), pos + 60
    oracle = oracle_of(case, filter_layers=2, **WARM)
    for i, kept in enumerate(runs):
        while oracle.n_past < 310 + 60 * i:
            oracle.chunk([case.text[oracle.n_past]])
        assert oracle.kept_by_unit() == kept, i
    assert oracle.n_filtered > 50


def test_a_state_is_for_the_same_filter(load: Load) -> None:
    case = Case("h2o", "head", "llama-gqa-32")
    with case.session(load, filter_layers=2, **WARM) as one, case.session(load) as other:
        one.eval(case.text[:100])
        with pytest.raises(NativeError, match="filter"):
            other.load(one.save())


REFUSED: list[tuple[str, dict[str, object], int, str]] = [
    ("h2o", {"scope": "token", "filter": 0.2}, USAGE, "scope cannot be token: use scope=layer or scope=head"),
    ("streaming", {"filter": 0.2}, USAGE, "scope cannot be token: use another policy, such as h2o"),
    ("random", {"filter": 0.2}, USAGE, "use scope=layer or scope=head"),
    ("snapkv", {"filter": 0.2}, USAGE, "snapkv chooses by its last queries"),
    ("rkv", {"filter": 0.2}, USAGE, "rkv chooses by its last queries"),
    ("pagedeviction", {"filter": 0.2}, USAGE, "pagedeviction evicts pages"),
    ("h2o", {"filter": 0.2, "positions": "cache"}, USAGE, "positions cannot be cache: use positions=true"),
    ("h2o", {"filter": 0.2, "positions": "auto"}, USAGE, "positions cannot be auto: use positions=true"),
    ("h2o", {"filter": 0.2, "update": "gather"}, USAGE, "filter is for update=inplace"),
    ("h2o", {"filter": 0.2, "evict_every": 2}, USAGE, "use evict_every=1, or leave filter out"),
    ("h2o", {"filter": 0.2, "pool": 400}, USAGE, "filter is for one sequence, not for a pool"),
    ("h2o", {"filter": 0.95}, USAGE, "filter is 0.95: give a number from 0 to 0.9"),
    ("h2o", {"filter": -0.1}, USAGE, "filter is -0.1: give a number from 0 to 0.9"),
    ("h2o", {"filter": "nan"}, USAGE, "give a number from 0 to 0.9"),
    ("h2o", {"filter": "some"}, USAGE, "filter is 'some': give a number from 0 to 0.9"),
    ("h2o", {"filter_layers": 2}, USAGE, "filter_layers means nothing without filter"),
    ("h2o", {"filter_warmup": 2}, USAGE, "filter_warmup means nothing without filter"),
    ("h2o", {"filter": 0.2, "filter_layers": 0}, USAGE, "filter_layers is 0: give a whole number from 1"),
    ("h2o", {"filter": 0.2, "filter_warmup": -1}, USAGE, "filter_warmup is -1: give a whole number from 0"),
    ("h2o", {"filter": 0.2, "filter_layers": 4}, UNSUPPORTED, "of which the first sees every token: give 3 or less"),
]


@pytest.mark.parametrize(("policy", "options", "status", "sentence"), REFUSED, ids=lambda x: str(x))
def test_what_a_filter_cannot_do_is_refused_by_name(
    load: Load, policy: str, options: dict[str, object], status: int, sentence: str
) -> None:
    with pytest.raises(NativeError) as refused:
        Session(load("llama-gqa-32"), policy=policy, budget=96, **options)
    assert refused.value.status == status and sentence in str(refused.value)


def test_a_model_without_a_filter_is_refused_by_name(load: Load) -> None:
    one_layer = dataclasses.replace(MODELS["llama-gqa"], n_layer=1)
    with pytest.raises(NativeError, match="this model has 1 layers of full attention") as refused:
        Session(load(one_layer), policy="h2o", budget=64, filter=0.2)
    assert refused.value.status == UNSUPPORTED
