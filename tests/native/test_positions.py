"""Positions by rank, every update and a policy that evicts from the middle, against the float64 oracle.

Everything here is exact (f32 cache, flash attention off): 1e-4 of the logit range. `shift` and `gather` round twice in
other types, and `shift` drifts; what `inplace` does there is test_streaming's matter.
"""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measures import relative
from models import MODELS, Spec
from native_api import Model, NativeError, Session
from oracle import EXACT, SHORTENED, Oracle

Load = Callable[["Spec | str"], Model]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

TOLERANCE = 1e-4  # of the logit range
USAGE, UNSUPPORTED = -1, -3

LLAMA = ["llama-gqa", "llama-mha", "llama-gqa-128", "llama-gqa-32"]
ALL = [*LLAMA, "smollm3", "qwen2-gqa", "qwen2-gqa-128", "gemma3", "gemma3-period6", "gpt-oss"]


def text_of(spec: Spec, n: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(7).integers(0, spec.n_vocab, n)]


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    policy: str = "streaming"
    update: str = "inplace"
    positions: str = "cache"
    budget: int = 64
    n_ubatch: int = 32
    sinks: int = 4
    pinned: int = 0
    recent: int = 8

    def __str__(self) -> str:
        return "-".join(str(value) for value in dataclasses.astuple(self))

    @property
    def keep(self) -> dict[str, Any]:
        return {"recent": self.recent} if self.policy == "random" else {}

    def session(self, model: Model, **options: object) -> Session:
        given: dict[str, object] = dict(policy=self.policy, budget=self.budget, sinks=self.sinks, update=self.update)
        given |= dict(positions=self.positions, rotate_every=1, n_ubatch=self.n_ubatch, n_batch=4 * self.n_ubatch)
        given |= dict(flash_attn="off", type_k="f32", type_v="f32", **self.keep)
        session = Session(model, **(given | options))
        if self.pinned:
            session.pin(self.pinned)
        return session

    def oracle(self, spec: Spec | None = None) -> Oracle:
        return Oracle(
            spec or MODELS[self.model],
            budget=self.budget,
            sinks=self.sinks,
            pinned=self.pinned,
            positions=self.positions,
            policy=self.policy,
            **self.keep,
        )


def follow(session: Session, oracle: Oracle, text: Sequence[int], calls: Sequence[int], n_ubatch: int) -> float:
    """The largest relative difference over the calls; the kept sets must agree after each."""
    worst, pos = 0.0, 0
    for n in calls:
        got, want = session.eval(text[pos : pos + n]), oracle.eval(text[pos : pos + n], n_ubatch)
        pos += n
        worst = max(worst, relative(got, want))
        assert list(session.kept()) == oracle.kept
    return worst


def cases() -> list[Case]:
    """Each update and policy on each model, the rest in turn."""
    shapes = itertools.cycle([(64, 32), (64, 16), (100, 33), (128, 64)])
    keeps = itertools.cycle([(4, 0), (0, 0), (4, 9), (1, 20)])
    made = []
    for model, (policy, update, positions) in itertools.product(
        ALL,
        [
            ("streaming", "gather", "cache"),
            ("streaming", "shift", "cache"),
            ("random", "inplace", "cache"),
            ("random", "inplace", "true"),
            ("random", "gather", "cache"),
        ],
    ):
        (budget, n_ubatch), (sinks, pinned) = next(shapes), next(keeps)
        if update == "shift" and (MODELS[model].has_swa or model == "smollm3"):
            continue  # refused: see test_shift_refusals
        made.append(Case(model, policy, update, positions, budget, n_ubatch, sinks, pinned))
    made += [
        Case("llama-gqa", "streaming", "gather", "true"),
        Case("gemma3", "random", "gather", "true", 100, 33),
        Case("qwen2-gqa", "random", "shift", "cache", 64, 32, 4, 9, 16),
        Case("llama-gqa-32", "random", "shift", "cache", 100, 33, 0, 0, 1),
    ]
    return made


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_update_agrees_with_the_oracle(load: Load, case: Case) -> None:
    text, u = text_of(MODELS[case.model], 2000), case.n_ubatch
    calls = [case.budget // 2, *[1] * (case.budget // 2 + 100), u + u // 2, *[1] * 40, 4 * u + 1, *[1] * 30]
    with case.session(load(case.model)) as session:
        assert follow(session, case.oracle(), text, calls, u) <= TOLERANCE
        stats = session.stats()
        assert (stats["policy"], stats["update"], stats["positions"]) == (case.policy, case.update, case.positions)
        assert stats["n_evicted"] == sum(calls) - case.budget and stats["n_used"] == case.budget


@pytest.mark.parametrize("model", ["llama-gqa", "qwen2-gqa", "gemma3", "gpt-oss"])
def test_updates_agree_with_each_other(load: Load, model: str) -> None:
    """The same tokens, and the logits of 512 evictions within 1e-4 of their range."""
    cases = [Case(model, update=update) for update in ("inplace", "gather", "shift")]
    if MODELS[model].has_swa:
        cases = cases[:2]
    text, handle = text_of(MODELS[model], 700), load(model)
    sessions = [case.session(handle) for case in cases]
    for session in sessions:
        session.eval(text[:100])
    for t in text[100:612]:
        first, *others = [session.eval([t]) for session in sessions]
        assert all(relative(other, first) <= TOLERANCE for other in others)
    kept = [list(session.kept()) for session in sessions]
    assert all(other == kept[0] for other in kept)
    for session in sessions:
        session.__exit__(None, None, None)


# ---- auto -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama-gqa", "qwen2-gqa-128", "gemma3", "gpt-oss"])
@pytest.mark.parametrize(("policy", "update"), [("streaming", "inplace"), ("random", "inplace"), ("random", "gather")])
def test_auto_switches_at_the_oracles_token(load: Load, model: str, policy: str, update: str) -> None:
    spec = dataclasses.replace(MODELS[model], n_ctx_train=128)
    case = Case(model, policy, update, "auto", pinned=6)
    text = text_of(spec, 400)
    with case.session(load(spec)) as session:
        oracle, seen = case.oracle(spec), []
        calls = [40, *[1] * 85, 30, *[1] * 120]
        pos = 0
        for n in calls:
            got, want = session.eval(text[pos : pos + n]), oracle.eval(text[pos : pos + n], 32)
            pos += n
            assert relative(got, want) <= TOLERANCE, pos
            assert session.stats()["positions_now"] == oracle.positions.replace("auto", "true")
            seen.append(session.stats()["positions_now"])
        assert session.stats()["positions"] == "auto" and seen.count("true") > 80 and seen.count("cache") > 100
        session.reset()
        assert session.stats()["positions_now"] == "true"


# ---- re-base --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama-gqa", "qwen2-gqa", "gemma3", "gpt-oss", "llama-gqa-32", "smollm3"])
@pytest.mark.parametrize(
    ("policy", "update", "positions"),
    [("streaming", "inplace", "cache"), ("random", "inplace", "auto"), ("streaming", "gather", "cache")],
)
def test_a_rebase_does_not_show(
    load: Load, monkeypatch: pytest.MonkeyPatch, model: str, policy: str, update: str, positions: str
) -> None:
    """Every 97 positions in place of 65536: callers see true positions, sliding windows follow, nothing jumps."""
    monkeypatch.setenv("LLAMA_KV_REBASE_AT", "97")
    spec = dataclasses.replace(MODELS[model], n_ctx_train=128)
    case = Case(model, policy, update, positions, pinned=6)
    text = text_of(spec, 900)
    with case.session(load(spec)) as session:
        calls = [40, *[1] * 130, 50, *[1] * 120, 200, *[1] * 150]
        assert follow(session, case.oracle(spec), text, calls, 32) <= TOLERANCE
        assert (
            session.stats()["n_past"] == sum(calls) and session.stats()["n_rotations"] >= 3 - (update == "gather") * 3
        )


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_a_rebase_costs_one_rounding(load: Load, monkeypatch: pytest.MonkeyPatch, kv: str) -> None:
    """One more rounding of each key per re-base: over three of them the error stays within 1.5 times that without."""
    case, errors = Case("llama-gqa"), []
    text = text_of(MODELS["llama-gqa"], 600)
    for at in ("120", "100000"):
        monkeypatch.setenv("LLAMA_KV_REBASE_AT", at)
        oracle = case.oracle()
        with case.session(load("llama-gqa"), type_k=kv, type_v=kv, flash_attn="on") as session:
            session.eval(text[:64])
            oracle.eval(text[:64], 32)
            errors.append(np.sqrt(np.mean([np.square(session.eval([t]) - oracle.chunk([t])) for t in text[64:560]])))
            assert (session.stats()["n_rotations"] >= 3) == (at == "120")
    assert 0.0 < errors[0] <= 1.5 * errors[1]


# ---- debts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "pinned"), [("streaming", 20), ("random", 0), ("random", 20)])
def test_no_debt_is_lost(load: Load, policy: str, pinned: int) -> None:
    """Right after a batch of rotations nothing is owed, so the keys are those of a run that rotates at each step."""
    case, text = Case("llama-gqa", policy, pinned=pinned), text_of(MODELS["llama-gqa"], 500)
    # layer 0 alone: later layers' values were computed while debts were owed
    spec = dataclasses.replace(MODELS["llama-gqa"], n_layer=1)
    apart, paid = [], 0
    with case.session(load(spec), rotate_every=16) as session, case.session(load(spec)) as exact:
        for s in (session, exact):
            s.eval(text[:64])
        batches = session.stats()["n_rotations"]
        for t in text[64:400]:
            difference = relative(session.eval([t]), exact.eval([t]))
            now = session.stats()["n_rotations"]
            if now != batches:
                assert difference <= TOLERANCE
                paid += 1
            apart.append(difference)
            batches = now
        assert list(session.kept()) == list(exact.kept())
    assert 15 <= paid <= 21 and max(apart) > 10 * TOLERANCE


@pytest.mark.parametrize("policy", ["streaming", "random"])
@pytest.mark.parametrize("positions", ["cache", "auto"])
@pytest.mark.parametrize("dropped", [1, 9])
def test_a_rewind_with_debts_keeps_the_positions(load: Load, policy: str, positions: str, dropped: int) -> None:
    spec = dataclasses.replace(MODELS["llama-gqa"], n_ctx_train=128)
    case = Case("llama-gqa", policy, positions=positions, recent=12, pinned=8)
    text = text_of(spec, 600)
    oracle = case.oracle(spec)
    with case.session(load(spec)) as session:
        session.eval(text[:100])
        oracle.eval(text[:100], 32)
        for t in text[100:200]:
            session.eval([t])
            oracle.chunk([t])
        p0 = 200 - dropped
        kind = oracle.rewind(p0)
        if kind < 0:
            with pytest.raises(NativeError):
                session.rewind(p0)
            return
        assert session.rewind(p0) == kind == SHORTENED
        assert list(session.kept()) == oracle.kept
        for t in text[300:420]:
            assert relative(session.eval([t]), oracle.chunk([t])) <= TOLERANCE
            assert list(session.kept()) == oracle.kept


@pytest.mark.parametrize("update", ["shift", "gather"])
def test_baselines_rewind_and_reset_as_the_oracle(load: Load, update: str) -> None:
    case, text = Case("qwen2-gqa", update=update, pinned=7), text_of(MODELS["qwen2-gqa"], 600)
    oracle = case.oracle()
    with case.session(load("qwen2-gqa")) as session:
        for _ in range(2):
            assert follow(session, oracle, text, [40, *[1] * 80, 20], 32) <= TOLERANCE
            assert session.rewind(130) == SHORTENED == oracle.rewind(130)
            assert list(session.kept()) == oracle.kept
            for t in text[200:260]:
                assert relative(session.eval([t]), oracle.chunk([t])) <= TOLERANCE
            with pytest.raises(NativeError):
                session.rewind(30)
            session.reset()
            session.pin(7)
            oracle.rewind(0)
        session.eval(text[:10])
        assert session.rewind(5) == EXACT and list(session.kept()) == list(range(5))


# ---- drift ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "type_k", "layers"),
    [("llama-gqa", "f32", "0,1"), ("llama-gqa", "f16", "0"), ("qwen2-gqa", "f16", "0"), ("llama-gqa-32", "q8_0", "0")],
)
@pytest.mark.parametrize("where", ["host", "graph"])
def test_sinks_do_not_drift(
    run_native: Run, model_file: Callable[[str], Path], model: str, type_k: str, layers: str, where: str
) -> None:
    """After 3000 evictions the stored keys are, bit for bit, one rotation of their originals. (q8_0: of a model whose
    head_dim upstream does not Hadamard-rotate; that step has roundings of its own.)"""
    spec = MODELS[model]
    result = run_native(
        "sink-keys",
        model_file(model),
        "streaming:budget=64,sinks=4,positions=cache",
        f"type_k={type_k}",
        f"type_v={'f32' if type_k == 'f32' else 'f16'}",
        f"n_head_kv={spec.n_head_kv}",
        f"head_dim={spec.head_dim}",
        f"rope_base={spec.rope_base}",
        f"norm={int(spec.norm_rope)}",
        f"layers={layers}",
        LLAMA_KV_SINKS=where,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert "OK" in result.stdout and f"{6 * 4 * len(layers.split(','))} keys compared" in result.stdout


# ---- graphs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama-gqa", "gemma3"])
@pytest.mark.parametrize("policy", ["streaming", "random"])
def test_a_rotation_does_not_cost_the_graph(load: Load, model: str, policy: str) -> None:
    """Every batch of rotations is a graph of its own, and the model's is reused all the same."""
    case, text = Case(model, policy, pinned=20), text_of(MODELS[model], 400)
    with case.session(load(model), rotate_every=4) as session:
        session.eval(text[:100])
        session.eval(text[100:101])
        before, batches = session.stats()["graphs_reused"], session.stats()["n_rotations"]
        for t in text[101:161]:
            session.eval([t])
        assert session.stats()["graphs_reused"] - before >= 59 and session.stats()["n_rotations"] - batches >= 14


@pytest.mark.parametrize("model", ["llama-gqa", "qwen2-gqa-128", "gemma3", "llama-gqa-32"])
@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
def test_sinks_in_the_graph_are_those_on_the_host(
    load: Load, monkeypatch: pytest.MonkeyPatch, model: str, kv: str
) -> None:
    """The way for devices whose memory is not the host's: same rotation, same rounding, graph reused."""
    case, text = Case(model, pinned=9), text_of(MODELS[model], 400)
    fa = "on" if kv == "q8_0" else "off"
    kept, logits, reused = [], [], []
    for where in ("host", "graph"):
        monkeypatch.setenv("LLAMA_KV_SINKS", where)
        with case.session(load(model), type_k=kv, type_v=kv, flash_attn=fa) as session:
            rows = [session.eval(text[:90])]
            rows += [session.eval([t]) for t in text[90:200]]
            rows.append(session.eval(text[200:240]))
            before = session.stats()["graphs_reused"]
            rows += [session.eval([t]) for t in text[240:300]]
            reused.append(session.stats()["graphs_reused"] - before)
            logits.append(np.array(rows))
            kept.append(session.kept())
    assert kept[0] == kept[1] and reused[0] == reused[1] >= 58
    assert relative(logits[0], logits[1]) <= (1e-6 if kv == "f32" else 1e-3)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"rotate_every": 0}, USAGE, "rotate_every is 0"),
        ({"rotate_every": -3}, USAGE, "rotate_every is -3"),
        ({"rotate_every": "often"}, USAGE, "whole number"),
        ({"positions": "random"}, USAGE, "cache, true, auto"),
        ({"update": "shift", "positions": "true"}, USAGE, "rank"),
        ({"update": "shift", "positions": "auto"}, USAGE, "rank"),
        ({"update": "copy"}, USAGE, "inplace, shift, gather"),
    ],
)
def test_a_bad_option_is_refused(load: Load, options: dict[str, object], status: int, words: str) -> None:
    with pytest.raises(NativeError, match=words) as error:
        Case("llama-gqa").session(load("llama-gqa"), **options)
    assert error.value.status == status


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("llama-gqa-32", {"type_k": "q8_0"}, "head_dim of 32"),
        ("gemma3", {}, "sliding-window"),
        ("gpt-oss", {"budget": 400}, "sliding-window"),
        ("smollm3", {}, "layers without rotary positions"),
    ],
)
def test_shift_is_refused_where_llama_cpp_is_wrong(
    load: Load, model: str, options: dict[str, object], words: str
) -> None:
    with pytest.raises(NativeError, match=words) as error:
        Case(model, update="shift").session(load(model), **options)
    assert error.value.status == UNSUPPORTED
