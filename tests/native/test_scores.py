"""Every policy that scores, against the float64 oracle that follows the library's kept sets unit by unit.

The names come from the library: a policy that is new there is tested here as soon as oracle_formulas.py has its formula. Two
criteria, as in test_streaming:

- f32 cache, flash attention off: logits within 1e-4 of their range, weights within 1e-4 of the largest one, and every
  victim is the oracle's own or one that float32 cannot tell from it (below 1% of them).
- everything else: the RMS error against the oracle, in units of what rounding K and V explains on the same kept sets, is
  at most 1.25 times that of policy `streaming`, which test_streaming holds to `none`. (Kept sets alone move it: on the
  pairs below from 0.90 to 1.17.)

No token occurs twice in a text: the keys of equal tokens have equal norms in the first layer, and rounding breaks the tie.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from measures import relative, rms
from models import MODELS, Array, Spec
from native_api import CANCELLED, REWIND, Library, Model, NativeError, Session, eval_until_cancelled
from oracle import EXACT, IMPOSSIBLE, SHORTENED, Oracle
from oracle_formulas import FORMULAS, Formula
from oracle_heads import HeadOracle, Kept, Wrong
from pairs import pairwise
from stopped import stopped_decodes

Load = Callable[["Spec | str"], Model]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

TOLERANCE = 1e-4  # of the logit range, or of the largest weight
NOISE_RATIO = 1.25  # of what `streaming` errs by, which our kernel makes as small as the cache's rounding allows
FLIPS = 0.01  # of the victims
USAGE, BUDGET = -1, -4


def policies() -> dict[str, dict[str, Any]]:
    """What the library says of each; without a library to collect from, what the oracle knows."""
    try:
        library = Library()
    except FileNotFoundError:
        return {name: {"scopes": list(formula.scopes)} for name, formula in FORMULAS.items()}
    described = json.loads(library.ffi.string(library.c.equip_policies()))
    return {policy["name"]: policy for policy in described if policy["name"] not in ("none", "streaming")}


POLICIES = policies()


def twin(policy: str) -> Formula:
    if policy not in FORMULAS:
        pytest.fail(
            f"The policy {policy} has no twin: write its formula in numpy into FORMULAS of tests/support/oracle_formulas.py."
        )
    return FORMULAS[policy]


@dataclasses.dataclass(frozen=True)
class Case:
    policy: str
    scope: str = ""  # "": the policy's own
    model: str = "llama-gqa"
    kv: str = "f32"
    fa: int = 0
    positions: str = "true"
    n_ubatch: int = 32
    sinks: int = 4
    pinned: int = 0
    recent: int = 8
    score_queries: int | None = None
    evict_every: int | None = None
    page_size: int = 16
    parameters: tuple[tuple[str, float], ...] = ()
    update: str = "inplace"
    fixed_budget: int = 0
    n_vocab: int = 640
    n_ctx_train: int = 512

    def __str__(self) -> str:
        default = Case(self.policy)
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return "-".join([self.policy, *(f"{k}={v}" for k, v in named.items() if v != getattr(default, k))])

    @property
    def spec(self) -> Spec:
        return dataclasses.replace(MODELS[self.model], n_vocab=self.n_vocab, n_ctx_train=self.n_ctx_train)

    @property
    def text(self) -> list[int]:
        return [int(t) for t in np.random.default_rng(7).permutation(self.n_vocab)]

    @property
    def room(self) -> int:
        """Candidates that there must be."""
        formula = twin(self.policy)
        return max(24, self.evict_every or formula.evict_every, 2 * self.page_size - 1 if formula.pages else 0)

    @property
    def budget(self) -> int:
        needed = max(self.sinks, self.pinned) + self.recent + self.room
        return self.fixed_budget or -(-max(48, needed, twin(self.policy).min_budget) // 16) * 16  # whole pages

    @property
    def chunks(self) -> list[int]:
        """Ubatches: a prompt, single tokens, a chunk in mid-stream, single tokens, and so on."""
        u, b = self.n_ubatch, self.budget
        prompt = [u] * (b // 2 // u) + [b // 2 % u]
        return [n for n in [*prompt, *[1] * (b - b // 2 + 70), u, *[1] * 20, 7, *[1] * 30, u, u, *[1] * 10] if n]

    @property
    def calls(self) -> Iterator[list[int]]:
        pos, text = 0, self.text
        for n in self.chunks:
            pos += n
            yield text[pos - n : pos]

    @property
    def given(self) -> dict[str, Any]:
        """The settings that library and oracle call alike."""
        given: dict[str, Any] = dict(policy=self.policy, budget=self.budget, sinks=self.sinks, recent=self.recent)
        given |= dict(positions=self.positions)
        optional = dict(scope=self.scope, score_queries=self.score_queries, evict_every=self.evict_every)
        if twin(self.policy).pages:
            optional |= dict(page_size=self.page_size)
        return given | {key: value for key, value in optional.items() if value}

    def session(self, load: Load, **options: object) -> Session:
        given = dict(update=self.update, rotate_every=1, n_ubatch=self.n_ubatch, n_batch=4 * self.n_ubatch)
        given |= dict(flash_attn="on" if self.fa else "off", type_k=self.kv, type_v=self.kv)
        session = Session(load(self.spec), **(self.given | dict(self.parameters) | given | options))
        if "given" in twin(self.policy).needs and options.get("policy", self.policy) == self.policy:
            session.gates = self.oracle().heads
        if self.pinned:
            session.pin(self.pinned)
        return session

    def oracle(self, **options: Any) -> HeadOracle:
        return HeadOracle(
            self.spec, **(self.given | dict(pinned=self.pinned, parameters=dict(self.parameters)) | options)
        )


def published(policy: str, **changes: Any) -> Case:
    """The protection of the paper or its code, at the smallest budget that leaves enough to choose from."""
    formula, case = twin(policy), Case(policy, **changes)
    for budget in itertools.count(-(-max(48, formula.min_budget) // 16) * 16, 16):
        sinks, recent = formula.protection(budget)
        if budget - sinks - recent >= case.room:
            return dataclasses.replace(case, sinks=sinks, recent=recent, fixed_budget=budget)
    raise AssertionError


def kept_by_unit(session: Session, oracle: HeadOracle) -> Kept:
    return [list(session.head(*unit[0])) for unit in oracle.units]


def follow(session: Session, oracle: HeadOracle, tokens: Sequence[int]) -> float:
    """Both process one ubatch; the relative difference of the logits."""
    got = session.eval(tokens)
    return relative(got, oracle.chunk(tokens, kept_by_unit(session, oracle)))


def check_heads(session: Session, oracle: HeadOracle, tolerance: float = TOLERANCE) -> None:
    """Kept set and weights of every KV head."""
    for il, h in oracle.heads:
        got, want = session.head(il, h), oracle.weights_of(il, h)
        assert list(got) == list(want)
        off = np.abs(np.array([*got.values()]) - [*want.values()])
        assert off.max(initial=0.0) <= tolerance * max(want.values(), default=0.0), (il, h)


def check_flips(oracle: HeadOracle) -> None:
    assert 0 < oracle.n_chosen and oracle.n_differed <= FLIPS * oracle.n_chosen
    # a formula that tells no candidates apart has not been run at all: raise its min_budget in oracle_formulas.py
    assert 2 * oracle.n_constant <= oracle.n_choices, (
        f"{oracle.n_constant} of {oracle.n_choices} choices between equals"
    )


# ---- the matrix ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_described_as_its_twin(policy: str) -> None:
    formula, described = twin(policy), POLICIES[policy]
    assert set(described["scopes"]) == set(formula.scopes)
    assert described["scopes"][0] == described["default_scope"] == formula.scope
    assert described["scores"] == ("weights" in formula.needs) and described["pages"] == formula.pages
    assert described["evict_every"] == (
        0 if formula.by_position and formula.scopes == ("token",) else formula.evict_every
    )
    assert set(described["positions"]) == {"true", "cache", "auto"}
    assert set(described["updates"]) - {"shift"} == {"inplace", "gather"}
    assert ("shift" in described["updates"]) == formula.by_position


@pytest.mark.parametrize("policy", POLICIES)
def test_a_published_policy_evicts_the_oracles_tokens(load: Load, policy: str) -> None:
    """2,000 evictions in each unit, as its authors protect."""
    case = published(policy, n_vocab=2304)
    oracle, text = case.oracle(), case.text
    with case.session(load) as session:
        stats = session.stats()
        assert (stats["policy"], stats["scope"]) == (policy, twin(policy).scope)
        follow(session, oracle, text[:32])
        for t in text[32 : case.budget + 2000]:
            off = follow(session, oracle, [t])
            # float32 angles lose 1e-7 per position
            assert off <= TOLERANCE or oracle.n_past > case.n_ctx_train
            if oracle.n_past == case.n_ctx_train:
                check_heads(session, oracle)
        check_heads(session, oracle, 1e-3)
        stats = session.stats()
        assert stats["n_evicted"] == oracle.n_past - len(oracle.kept) >= 2000 and stats["n_used"] == len(oracle.kept)
    check_flips(oracle)


SHAPES = ["llama-gqa", "llama-mha", "llama-gqa-128", "llama-gqa-32", "qwen2-gqa", "gemma2", "gemma3", "gpt-oss"]
ROUNDED = ["llama-gqa", "qwen2-gqa", "gemma2", "gpt-oss"]  # in the default tier
ATTENTION = [("f32", 1), ("f16", 0), ("f16", 1), ("q8_0", 1), ("q4_0", 1)]
KEEPS = [(4, 0, 8), (0, 0, 1), (4, 9, 16), (1, 20, 3)]  # sinks, pinned, recent


def settings(policy: str, scope: str, i: int) -> dict[str, Any]:
    """The i-th way to set what this policy takes."""
    formula = FORMULAS.get(policy)
    sinks, pinned, recent = KEEPS[i % len(KEEPS)]
    chosen: dict[str, Any] = dict(sinks=sinks, pinned=pinned, recent=recent, n_ubatch=[32, 16, 33][i % 3])
    if formula is not None and "weights" in formula.needs:
        chosen["score_queries"] = [None, 1, 5][i // 2 % 3]
    if formula is not None and formula.pages:
        chosen["page_size"] = [16, 8][i % 2]
    elif formula is not None and i % 3 and not (formula.by_position and scope == "token"):
        # a window that is longer than a batch never starts over
        chosen["evict_every"] = formula.window + 3 + i % 4
    return chosen


def exact_cases() -> list[Case]:
    """Every policy at every scope; the rest in turn."""
    made = []
    units = [(policy, scope) for policy in POLICIES for scope in POLICIES[policy]["scopes"]]
    for i, (policy, scope) in enumerate(units):
        case = Case(policy, scope, SHAPES[i % len(SHAPES)], positions=["cache", "true", "auto"][i // 2 % 3])
        case = dataclasses.replace(case, **settings(policy, scope, i))
        if case.positions == "auto":
            # units without a common first token would disagree on when to switch
            case = dataclasses.replace(case, n_ctx_train=128, sinks=max(1, case.sinks))
        made.append(case)
    # numbers of a formula that are not the published ones; each policy that has such rows
    for policy, parameters, options in (
        ("a2sf", {"decay": 0.5}, {}),
        ("a2sf", {"decay": 0.0}, {"scope": "layer"}),
        ("snapkv", {"window": 8, "kernel": 3}, {"evict_every": 11, "recent": 16}),
        ("snapkv", {"kernel": 1}, {"evict_every": 35, "positions": "cache"}),
        ("rkv", {"window": 4, "kernel": 3, "lambda": 0.7, "threshold": 0.2}, {"evict_every": 9}),
        ("rkv", {"lambda": 1.0}, {"evict_every": 12, "positions": "cache"}),
        ("lagkv", {"lag": 5}, {"evict_every": 7, "positions": "cache"}),
        ("h2o", {"graph": 0.3}, {}),
        ("h2o", {"graph": 0.5, "graph_near": 1}, {"scope": "layer", "positions": "cache", "pinned": 9}),
        ("snapkv", {"graph": 0.25, "graph_near": 16}, {"scope": "token"}),
        ("caote", {"graph": 1.0, "graph_near": 3}, {"positions": "auto", "n_ctx_train": 128, "sinks": 1}),
        ("lagkv", {"cross": 1, "lag": 9}, {"scope": "layer", "evict_every": 3, "pinned": 9}),
    ):
        made.append(Case(policy, model="qwen2-gqa", parameters=tuple(parameters.items()), **options))
    # its numbers tell whether a unit is counted by its layer's place in the model
    return [*made, *(Case("random", "layer", model) for model in ("gemma3", "gpt-oss") if "random" in POLICIES)]


def rounded_cases(axes: dict[str, list[Any]]) -> list[Case]:
    """Pairwise; the scope in turn. Positions stay true: ranks round the keys anew, which test_positions measures."""
    made = []
    for i, row in enumerate(pairwise(axes)):
        kv, fa = row["attention"]
        policy = str(row.get("policy", [*POLICIES][i % len(POLICIES)]))
        scopes = POLICIES[policy]["scopes"]
        case = Case(policy, scopes[i // len(POLICIES) % len(scopes)], str(row["model"]), kv, fa)
        if policy == "lagkv":  # ranks jump where rounding has two tokens change places
            case = dataclasses.replace(case, parameters=(("cross", 1),))
        made.append(dataclasses.replace(case, **settings(policy, case.scope, i)))
    return made


@pytest.mark.parametrize("case", exact_cases(), ids=str)
def test_every_setting_evicts_the_oracles_tokens(load: Load, case: Case) -> None:
    oracle = case.oracle()
    with case.session(load) as session:
        for i, tokens in enumerate(case.calls):
            assert follow(session, oracle, tokens) <= TOLERANCE, i
            if i % 50 == 0:
                check_heads(session, oracle)
        check_heads(session, oracle)
        stats = session.stats()
        assert stats["positions_now"] == oracle.positions
        assert case.positions != "auto" or oracle.positions == "cache", "it never switched"
        assert list(session.kept()) == oracle.kept
    check_flips(oracle)


def rounding(kv: str) -> Callable[[Array], Array]:
    kind = gguf.GGMLQuantizationType[{"f32": "F16"}.get(kv, kv.upper())]  # flash attention casts an f32 cache
    return lambda x: gguf.quants.dequantize(gguf.quants.quantize(x.astype(np.float32), kind), kind).astype(np.float64)


Row = tuple[Array, Array, Array]  # logits of the library, of the oracle, of the oracle that rounds


def in_units_of_rounding(rows: list[Row]) -> float:
    got, want, rounded = np.array(rows).transpose(1, 0, 2)
    assert np.isfinite(got).all() and len(got) >= 100
    return rms(got - want) / rms(rounded - want)


@functools.cache
def noise_of_streaming(load: Load, spec: Spec, kv: str, fa: int, budget: int) -> float:
    exact, rounded = (Oracle(spec, budget=budget, round_kv=f) for f in (None, rounding(kv)))
    options = dict(policy="streaming", budget=budget, positions="true", n_ubatch=32)
    text = [int(t) for t in np.random.default_rng(7).permutation(spec.n_vocab)[: budget + 120]]
    with Session(load(spec), **options, flash_attn="on" if fa else "off", type_k=kv, type_v=kv) as session:
        session.eval(text[:budget])
        for oracle in (exact, rounded):
            oracle.eval(text[:budget], 32)
        rows = [(session.eval([t]), exact.chunk([t]), rounded.chunk([t])) for t in text[budget:]]
    return in_units_of_rounding(rows)


# how much more than the oracle's lowest a victim may be worth, relative: about three times what rounding K and V moves
WORTH_NOISE = {"f32": 1.5e-2, "f16": 1.5e-2, "q8_0": 0.1, "q4_0": 1.0}


def check_rounded(load: Load, case: Case) -> None:
    oracles = [case.oracle(tolerance=WORTH_NOISE[case.kv]), case.oracle(tolerance=np.inf, round_kv=rounding(case.kv))]
    rows = list[Row]()
    with case.session(load) as session:
        for tokens in case.calls:
            got, theirs = session.eval(tokens), kept_by_unit(session, oracles[0])
            want, rounded = (oracle.chunk(tokens, theirs) for oracle in oracles)
            if len(tokens) == 1 and oracles[0].n_past > case.budget:
                rows.append((got, want, rounded))
    noise = noise_of_streaming(load, case.spec, case.kv, case.fa, case.budget)
    assert 0.0 < in_units_of_rounding(rows) <= NOISE_RATIO * noise


@pytest.mark.parametrize("case", rounded_cases({"model": [*ROUNDED], "attention": [*ATTENTION]}), ids=str)
def test_a_rounded_cache_errs_no_more_than_streaming(load: Load, case: Case) -> None:
    check_rounded(load, case)


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    rounded_cases({"policy": [*POLICIES], "model": [*SHAPES], "attention": [*ATTENTION]}),
    ids=str,
)
def test_a_rounded_cache_errs_no_more_than_streaming_in_any_pair(load: Load, case: Case) -> None:
    check_rounded(load, case)


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [*SHAPES, "qwen2-gqa-128"])
@pytest.mark.parametrize("policy", ["h2o", "a2sf"])
def test_weights_are_softmax_sums(load: Load, model: str, policy: str) -> None:
    """Grouped queries, attention sinks, soft-capping, layers beside sliding windows; chunks of every size."""
    case = Case(policy, "head", model, score_queries=[None, 3][policy == "a2sf"], recent=16)
    oracle, text = case.oracle(), case.text
    with case.session(load) as session:
        for n in [32, 1, 5, 10, 1, 1, 31, 32, 1, 1, 2, 3, 1]:
            pos = oracle.n_past
            assert follow(session, oracle, text[pos : pos + n]) <= TOLERANCE
            check_heads(session, oracle)


@pytest.mark.parametrize("model", ["llama-gqa", "llama-mha", "qwen2-gqa", "llama-gqa-32"])
@pytest.mark.parametrize("policy", ["h2o", "tova"])
def test_weights_beside_flash_attention_are_softmax_sums(load: Load, model: str, policy: str) -> None:
    """They are computed again from Q and K there. One layer: nothing that flash attention rounds comes before them."""
    spec = dataclasses.replace(MODELS[model], n_layer=1, n_vocab=640)
    case = Case(policy, "head", model, fa=1)
    text = case.text
    oracle = HeadOracle(spec, policy=policy, scope="head", budget=case.budget, sinks=case.sinks, recent=case.recent)
    with case.session(lambda _: load(spec)) as session:
        for n in [32, *[1] * 60, 5, 31, *[1] * 40, 32, 2]:
            pos = oracle.n_past
            follow(session, oracle, text[pos : pos + n])
            check_heads(session, oracle)


def test_heads_and_shares_are_what_the_lanes_keep(load: Load) -> None:
    case = Case("h2o", "head", "gemma3", recent=16)
    oracle, layers = case.oracle(), {il for il, _ in case.oracle().heads}
    with case.session(load) as session, case.session(load, policy="none") as none:
        assert session.head(min(layers), 0) == {} and session.shares() == {}
        for tokens in case.calls:
            follow(session, oracle, tokens)
        count = dict[int, int]()
        for unit in oracle.kept_by_unit():
            for p in unit:
                count[p] = count.get(p, 0) + 1
        assert len(count) > case.budget
        assert session.shares() == pytest.approx({p: count[p] / len(oracle.units) for p in sorted(count)})
        for il, h in [(min(layers), 2), (min(layers), -1), (-1, 0), (6, 0), *((il, 0) for il in {*range(6)} - layers)]:
            with pytest.raises(NativeError):
                session.head(il, h)
        pos, weight = (session.lib.ffi.new(f"{kind}[]", [-1] * 4) for kind in ("int32_t", "float"))
        n = session.lib.c.equip_session_head(session.handle, min(layers), 0, pos, weight, 3)
        assert n == case.budget and list(pos) == [*list(session.head(min(layers), 0))[:3], -1] and weight[3] == -1
        none.eval(case.text[:20])
        assert none.shares() == dict.fromkeys(range(20), 1.0)
    with Case("random").session(load) as session:
        session.eval(case.text[:100])
        assert session.head(1, 1) == dict.fromkeys(session.kept(), 0.0)
        assert session.shares() == dict.fromkeys(session.kept(), 1.0)


def test_stats_name_the_settings(load: Load) -> None:
    def stats(policy: str, scope: str = "", **options: Any) -> tuple[object, ...]:
        with Case(policy, scope, **options).session(load) as session:
            told = session.stats()
            assert told["ledger_bytes"] > 0 and (told["score_bytes"] > 0) == (policy != "random")
            return told["score_queries"], told["evict_every"], told["page_size"]

    assert stats("h2o") == ("all", 1, 0)
    assert stats("h2o", score_queries=7, evict_every=5) == (7, 5, 0)
    assert stats("snapkv") == ("all", 32, 0)
    assert stats("pagedeviction", page_size=8) == ("none", 8, 8)
    assert stats("rkv") == ("all", 128, 0)
    assert stats("random", "head") == ("none", 1, 0)


# ---- updates ---------------------------------------------------------------------------------------------------------

UPDATES = [
    *itertools.product(["h2o"], ["head", "layer", "token"], ["true", "cache", "auto"]),
    ("tova", "layer", "cache"),
    ("snapkv", "head", "auto"),
    ("keydiff", "head", "cache"),
    ("random", "layer", "cache"),
    ("pagedeviction", "layer", "cache"),
    ("pagedeviction", "token", "auto"),
    ("rkv", "head", "cache"),
    ("lagkv", "head", "cache"),
    ("external", "head", "auto"),
    ("external", "token", "cache"),
]


def check_updates(load: Load, case: Case, rebased: bool = False) -> None:
    """Each is right by its own oracle, so two kept sets can differ only where one oracle has adopted a choice."""
    cases = [dataclasses.replace(case, update=update) for update in ("inplace", "gather")]
    oracles = [case.oracle() for _ in cases]
    with cases[0].session(load) as inplace, cases[1].session(load) as gather:
        for tokens in case.calls:
            one, other = (follow(*pair, tokens) for pair in zip((inplace, gather), oracles, strict=True))
            assert max(one, other) <= TOLERANCE
            if oracles[0].kept_by_unit() == oracles[1].kept_by_unit():
                ours, copied = inplace.logits(), gather.logits()
                assert ours is not None and copied is not None and relative(ours, copied) <= TOLERANCE
            else:
                assert oracles[0].n_differed + oracles[1].n_differed
        assert gather.stats()["update"] == "gather"
        assert not rebased or inplace.stats()["n_rotations"] >= 3
    for oracle in oracles:
        check_flips(oracle)


@pytest.mark.parametrize(("policy", "scope", "positions"), UPDATES)
def test_gather_agrees_with_inplace(load: Load, policy: str, scope: str, positions: str) -> None:
    check_updates(load, Case(policy, scope, positions=positions, n_ctx_train=128))


@pytest.mark.parametrize(
    ("model", "policy", "scope"),
    [
        ("llama-gqa", "h2o", "head"),
        ("qwen2-gqa", "h2o", "token"),
        ("gemma3", "tova", "layer"),
        ("gpt-oss", "h2o", "head"),
        ("llama-gqa-32", "pagedeviction", "layer"),
        ("llama-mha", "keydiff", "head"),
    ],
)
def test_a_rebase_shows_in_no_lane(
    load: Load, monkeypatch: pytest.MonkeyPatch, model: str, policy: str, scope: str
) -> None:
    monkeypatch.setenv("LLAMA_KV_REBASE_AT", "97")
    check_updates(load, Case(policy, scope, model, positions="cache", pinned=6), rebased=True)


# ---- GraphKV ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "scope"), [("h2o", "head"), ("snapkv", "layer"), ("lagkv", "token")])
def test_tokens_like_the_best_ones_go_first_when_a_chunk_evicts(load: Load, policy: str, scope: str) -> None:
    """The chosen cases of exact_cases() would say nothing if the setting changed no victim."""
    case = Case(policy, scope, parameters=(("graph", 0.3), ("graph_near", 16)))
    plain = dataclasses.replace(case, parameters=()).oracle()
    with case.session(load) as session, pytest.raises(Wrong):
        for tokens in case.calls:
            follow(session, plain, tokens)
    assert "graph=0.3,graph_near=16" in session_text(load, case)
    assert "graph" not in session_text(load, dataclasses.replace(case, parameters=()))


def session_text(load: Load, case: Case) -> str:
    with case.session(load) as session:
        return str(session.stats()["text"])


def test_without_a_chunk_nothing_is_lowered(load: Load) -> None:
    """Single tokens evict as without GraphKV."""
    runs = []
    for parameters in ((), (("graph", 0.5),)):
        case = Case("h2o", parameters=parameters)
        with case.session(load) as session:
            for t in case.text[:200]:
                session.eval([t])
            runs.append([session.head(*u) for u in case.oracle().heads])
    assert runs[0] == runs[1]


# ---- none, batches, reset --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fa", [0, 1])
def test_a_budget_above_the_length_gives_the_bits_of_none(load: Load, policy: str, fa: int) -> None:
    """Same slots in the same order, same n_kv, same attention kernel: the same bits."""
    case = Case(policy, kv="f16", fa=fa, fixed_budget=256)
    text = case.text
    with case.session(load) as bounded, case.session(load, policy="none", n_ctx=512, cpu_attn=1) as none:
        for a, b in [(0, 90), *((i, i + 1) for i in range(90, 130)), (130, 200), (200, 201), (201, 256)]:
            x, y = none.eval(text[a:b]), bounded.eval(text[a:b])
            assert np.array_equal(x.view(np.uint32), y.view(np.uint32)), f"at token {b}"
        assert bounded.shares() == dict.fromkeys(range(256), 1.0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("n", [4 * 16, 3 * 16 + 1])
def test_a_batch_of_several_ubatches_is_several_calls(load: Load, policy: str, n: int) -> None:
    case = Case(policy, n_ubatch=16)
    text, heads = case.text, case.oracle().heads
    with case.session(load, n_batch=64) as whole, case.session(load, n_batch=16) as cut:
        for a in range(0, 5 * n, n):
            x = whole.eval(text[a : a + n])
            for i in range(a, a + n, 16):
                y = cut.eval(text[i : min(i + 16, a + n)])
            assert relative(x, y) <= 1e-6
            assert [whole.head(*u) for u in heads] == [cut.head(*u) for u in heads]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_reset_leaves_no_scores_behind(load: Load, policy: str) -> None:
    case = Case(policy, evict_every=5 if POLICIES[policy]["evict_every"] == 1 else None)
    text, heads, runs = case.text, case.oracle().heads, []
    with case.session(load) as session:
        for i, tokens in enumerate([text[300:600], text, text]):
            logits = [session.eval(tokens[: case.budget])]
            logits += [session.eval([t]) for t in tokens[case.budget : case.budget + 43]]
            runs.append((np.array(logits), [session.head(*u) for u in heads]))
            if i < 2:
                session.reset()
                assert session.kept() == {} == session.shares() == session.head(0, 0)
    with case.session(load) as fresh:
        logits = [fresh.eval(text[: case.budget]), *(fresh.eval([t]) for t in text[case.budget : case.budget + 43])]
        runs.append((np.array(logits), [fresh.head(*u) for u in heads]))
    for again, kept in runs[1:3]:
        assert np.array_equal(again, runs[3][0]) and kept == runs[3][1]


@pytest.mark.parametrize(
    "case",
    [
        Case("snapkv", n_ubatch=16),
        Case("snapkv", n_ubatch=24, model="gpt-oss"),
        Case("snapkv", "layer", n_ubatch=8, positions="cache"),
        Case("snapkv", "token", n_ubatch=11, model="gemma2"),
        Case("snapkv", evict_every=4),
        Case("rkv", n_ubatch=5),
        Case("rkv", n_ubatch=3, positions="cache", update="gather"),
    ],
    ids=str,
)
def test_window_is_that_of_the_policy_whatever_the_chunks(load: Load, case: Case) -> None:
    """Chunks shorter than the window, and choices more often than once a window: the weights are those of the last queries."""
    oracle = case.oracle()
    with case.session(load) as session:
        for tokens in case.calls:
            assert follow(session, oracle, tokens) <= TOLERANCE
        check_heads(session, oracle)
    check_flips(oracle)


# ---- rewinds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_rewind_keeps_count(load: Load, policy: str) -> None:
    """Before the first eviction anything goes, and what the dropped queries have added stays. After it the newest tokens can
    be taken back at every scope, down to the newest one that some head has evicted."""
    for scope in POLICIES[policy]["scopes"]:
        case = Case(policy, scope)
        oracle, text = case.oracle(), case.text
        with case.session(load) as session:
            for tokens in (text[:32], text[32:40], text[40:41]):
                follow(session, oracle, tokens)
            assert session.rewind(25) == EXACT == oracle.rewind(25)
            assert kept_by_unit(session, oracle) == oracle.kept_by_unit()
            for t in text[100 : 85 + case.budget]:
                assert follow(session, oracle, [t]) <= TOLERANCE
            n_past = oracle.n_past
            assert session.rewind(n_past) >= 0
            for p0 in (1, n_past - 1, n_past - 3):
                answer = oracle.rewind(p0)
                assert (answer == IMPOSSIBLE) == (p0 == 1)
                if answer == IMPOSSIBLE:
                    with pytest.raises(NativeError) as error:
                        session.rewind(p0)
                    assert error.value.status == REWIND
                else:
                    assert session.rewind(p0) == answer in (EXACT, SHORTENED)
                assert kept_by_unit(session, oracle) == oracle.kept_by_unit()
            for t in text[300:330]:
                assert follow(session, oracle, [t]) <= TOLERANCE
            assert session.rewind(0) == EXACT == oracle.rewind(0)
            assert session.shares() == {} and session.stats()["n_past"] == 0
            for t in text[:20]:
                assert follow(session, oracle, [t]) <= TOLERANCE
        check_flips(oracle)


# ---- failed steps and cancel -----------------------------------------------------------------------------------------

# weights are unspecified after a failed step, so these read none; nobody sets scores in native/tests/abort-step.cpp
UNWEIGHED = [policy for policy in POLICIES if policy in FORMULAS and not FORMULAS[policy].needs & {"weights", "given"}]


@pytest.mark.parametrize("model", ["llama-gqa", "gemma3"])
@pytest.mark.parametrize("positions", ["true", "cache"])
@pytest.mark.parametrize("policy", UNWEIGHED)
def test_a_stopped_decode_leaves_every_lane_right(
    run_native: Run, model_file: Callable[[Spec], Path], tmp_path: Path, model: str, positions: str, policy: str
) -> None:
    """A decode that stops between two graph nodes: a single token's victims are gone in every unit and nothing took their
    place, a longer chunk leaves no trace. The program tells what the first unit keeps, the logits tell the rest."""
    scope = next((s for s in POLICIES[policy]["scopes"] if s != "token"), "token")
    case = Case(policy, scope, model, positions=positions, fixed_budget=64)
    chunks = [30, 30, 20, 11, 1, *[1] * 80, 7, 16, 3, 20, 9, *[1] * 60]
    text, oracle, stopped = case.text[: sum(chunks)], case.oracle(), []
    given = ",".join(f"{key}={value}" for key, value in case.given.items() if key != "policy")
    spec = f"{policy}:{given},rotate_every=1"
    decodes = stopped_decodes(run_native, model_file(case.spec), spec, tmp_path, text, chunks, case.n_vocab, every=2)
    for n, kept, got in decodes:
        if kept is not None:
            if n == 1 and len(oracle.kept) == case.budget:
                oracle.fail()
            oracle.batch = None  # whatever failed, the next victims are chosen anew
            assert kept == oracle.kept
            stopped.append((n, len(kept)))
        assert relative(got, oracle.chunk(text[oracle.n_past : oracle.n_past + n])) <= TOLERANCE
    gone = 16 if twin(policy).pages else 1
    assert {(1, 64 - gone), (30, 30), (11, 64), (7, 64)} <= set(stopped) or gone > 1


@pytest.mark.parametrize(
    ("policy", "scope"),
    [("h2o", "head"), ("rkv", "head"), ("knorm", "head"), ("random", "layer"), ("pagedeviction", "layer")],
)
def test_a_cancelled_session_goes_on(load: Load, policy: str, scope: str) -> None:
    """Cancel single tokens at many moments: all units keep equally many, and without weights the session carries on as the
    oracle does, told the same."""
    case, delays = Case(policy, scope, n_ubatch=1), np.random.default_rng(1)
    text, oracle, in_the_middle = case.text, case.oracle(), 0
    with case.session(load) as session:
        for _ in range(40):
            if in_the_middle == 3:
                break
            session.reset()
            oracle.rewind(0)
            cancelled = eval_until_cancelled(session, text[:500], delays.uniform(0.0, 0.06))
            n = session.n_done
            in_the_middle += cancelled and case.budget < n < 500
            assert session.stats()["n_past"] == n
            if policy in UNWEIGHED:
                oracle.eval(text[:n], 1)
                if kept_by_unit(session, oracle) != oracle.kept_by_unit():
                    oracle.fail()
                assert kept_by_unit(session, oracle) == oracle.kept_by_unit()
            for i, t in enumerate(text[500:540]):
                try:
                    got = session.eval([t])
                except NativeError as error:  # a cancel that came too late may stop the next call
                    assert error.status == CANCELLED and session.n_done == 0 and i == 0
                    got = session.eval([t])
                n, units = n + 1, kept_by_unit(session, oracle)
                if policy in UNWEIGHED:
                    assert relative(got, oracle.chunk([t], units)) <= TOLERANCE
                safe = {*range(min(n, case.sinks)), *range(max(0, n - case.recent), n)}
                assert all(safe <= set(unit) for unit in units) and np.isfinite(got).all()
                assert {len(unit) for unit in units} == {session.stats()["n_used"]}
    assert in_the_middle == 3, "no eval was cancelled half way"


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "options", "status", "words"),
    [
        ("pagedeviction", {"budget": 100}, {USAGE, BUDGET}, "page"),
        ("pagedeviction", {"page_size": 48, "budget": 96}, {USAGE, BUDGET}, "page"),
        ("pagedeviction", {"page_size": 0}, {USAGE}, "page_size"),
        ("h2o", {"page_size": 16}, {USAGE}, "page"),
        ("random", {"page_size": 16}, {USAGE}, "page"),
        ("h2o", {"score_queries": 0}, {USAGE}, "score_queries"),
        ("h2o", {"score_queries": -1}, {USAGE}, "score_queries"),
        ("h2o", {"score_queries": "most"}, {USAGE}, "score_queries"),
        ("h2o", {"evict_every": 0}, {USAGE}, "evict_every"),
        ("h2o", {"evict_every": -2}, {USAGE}, "evict_every"),
        ("h2o", {"evict_every": "often"}, {USAGE}, "evict_every|whole number"),
        ("h2o", {"scope": "model"}, {USAGE}, "scope.*head, layer, token"),
        ("rkv", {"scope": "layer"}, {USAGE}, "scope.*head"),
        ("vatp", {"scope": "token"}, {USAGE}, "scope.*head, layer"),
        ("h2o", {"update": "shift"}, {USAGE}, "update.*inplace, gather"),
        ("random", {"update": "shift", "positions": "cache", "scope": "head"}, {USAGE}, "shift"),
        ("h2o", {"budget": 12}, {BUDGET}, "budget"),
        ("h2o", {"graph": 1.5}, {USAGE}, "graph is 1.5: give a number from 0 to 1"),
        ("knorm", {"graph": 0.3}, {USAGE}, "the policy knorm has no parameter graph"),
        ("random", {"graph": 0.3}, {USAGE}, "the policy random has no parameter graph"),
        ("lagkv", {"lag": 0}, {USAGE}, "lag is 0: give a whole number from 1"),
        ("external", {"unscored": "none"}, {USAGE}, "unscored"),
    ],
)
def test_a_bad_option_is_refused(
    load: Load, policy: str, options: dict[str, object], status: set[int], words: str
) -> None:
    with pytest.raises(NativeError, match=words) as error:
        Case(policy).session(load, **options)
    assert error.value.status in status and "\n" not in str(error.value)


@pytest.mark.parametrize("policy", POLICIES)
def test_too_many_pinned_tokens_are_refused(load: Load, policy: str) -> None:
    case = Case(policy)
    with case.session(load) as session:
        with pytest.raises(NativeError, match="pin") as error:
            session.pin(case.budget)
        assert error.value.status == BUDGET
        session.pin(4)
        session.eval(case.text[:200])
