"""In-place streaming against the float64 oracle, through the C API.

Two criteria decide (an f32 cache under flash attention is cast to f16 by upstream, which also adds f16 values in f16):

- f32 cache, flash attention off: every checked step within 1e-4 of the logit range.
- everything else: the RMS error against the oracle, over all single-token steps at a full cache, is at most 1.1 times that
  of policy `none` on the same kept set. `none` gets that set from the caller: native/tests/logits-dump.cpp drops the
  victims with upstream's own llama_memory_seq_rm, token for token the same text, chunks, types and attention path. It
  keeps true positions; the positions do not move the rounding error (by under 5% on these models), only the logits, and
  each run is compared with the oracle for its own positions.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measures import relative, rms
from models import MODELS, Array, Spec
from native_api import CANCELLED, REWIND, Model, NativeError, Session, eval_until_cancelled
from oracle import EXACT, SHORTENED, Oracle
from pairs import pairwise
from stopped import stopped_decodes

Load = Callable[["Spec | str"], Model]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

TOLERANCE = 1e-4  # of the logit range
NOISE_RATIO = 1.1


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: a prompt, single tokens, a chunk in mid-stream, single tokens. `calls` are the sizes of the eval calls."""

    model: str
    kv: str = "f32"  # K type, or K-V types
    fa: int = 0
    positions: str = "cache"
    budget: int = 64
    n_ubatch: int = 32
    sinks: int = 4
    pinned: int = 0
    prompt: str = "long"

    def __str__(self) -> str:
        budget = f"b{self.budget}u{self.n_ubatch}"
        keep = f"s{self.sinks}" + (f"p{self.pinned}" if self.pinned else "")
        return "-".join([self.model, self.kv, f"fa{self.fa}", self.positions, budget, keep, self.prompt])

    @property
    def types(self) -> tuple[str, str]:
        """Upstream loads a quantised V only with flash attention on."""
        k, _, v = self.kv.partition("-")
        v = v or k
        return k, "f16" if v.startswith("q") and not self.fa else v

    @property
    def exact(self) -> bool:
        return self.types == ("f32", "f32") and not self.fa

    @property
    def calls(self) -> tuple[int, ...]:
        b, u = self.budget, self.n_ubatch
        prompt = {"short": b // 2, "budget": b, "long": b + 2 * u + 7, "single-tail": (b // u + 2) * u + 1}[self.prompt]
        return (prompt, *[1] * (b - b // 2 + 160), u + u // 2, *[1] * 60)

    @property
    def chunks(self) -> list[int]:
        """The ubatches that the calls become."""
        cut = ([self.n_ubatch] * (n // self.n_ubatch) + [n % self.n_ubatch] for n in self.calls)
        return [n for n in itertools.chain.from_iterable(cut) if n]

    @property
    def tokens(self) -> list[int]:
        rng = np.random.default_rng(len(self.model))
        return [int(t) for t in rng.integers(0, MODELS[self.model].n_vocab, 2000)]

    def session(self, load: Load, **options: object) -> Session:
        k, v = self.types
        n_ctx = (self.budget + self.n_ubatch + 255) // 256 * 256
        given: dict[str, object] = dict(policy="streaming", budget=self.budget, sinks=self.sinks, n_ctx=n_ctx)
        given |= dict(positions=self.positions, rotate_every=1)
        given |= dict(n_ubatch=self.n_ubatch, n_batch=4 * self.n_ubatch, flash_attn="on" if self.fa else "off")
        session = Session(load(self.model), **(given | dict(type_k=k, type_v=v) | options))
        if self.pinned:
            session.pin(self.pinned)
        return session


@dataclasses.dataclass
class Reference:
    logits: Array  # (chunks, n_vocab), float64
    kept: list[list[int]]  # positions after each chunk
    full: Array  # (chunks,), whether the chunk is one token at a full cache


@functools.cache
def _reference(model: str, positions: str, budget: int, protect: int, chunks: tuple[int, ...]) -> Reference:
    oracle = Oracle(MODELS[model], budget=budget, sinks=protect, positions=positions)
    text, pos = Case(model).tokens, 0
    logits, kept, full = [], [], []
    for n in chunks:
        full.append(n == 1 and len(oracle.kept) == budget)
        logits.append(oracle.chunk(text[pos : pos + n]))
        kept.append(list(oracle.kept))
        pos += n
    return Reference(np.array(logits), kept, np.array(full))


def reference(case: Case, positions: str | None = None) -> Reference:
    protect = max(case.sinks, case.pinned)
    return _reference(case.model, positions or case.positions, case.budget, protect, tuple(case.chunks))


def check_slots(case: Case, before: dict[int, int], after: dict[int, int]) -> None:
    """After a single token: distinct slots below the budget, nobody moved, and the newcomer sits where the victim was."""
    assert len(set(after.values())) == len(after)
    assert all(0 <= slot < case.budget for slot in after.values())
    stayed = before.keys() & after.keys()
    if all(slot < case.budget for slot in before.values()):  # else the survivors of a chunk have just moved
        assert all(before[p] == after[p] for p in stayed)
        gone = before.keys() - after.keys()
        if gone:
            assert {before[p] for p in gone} == {after[max(after)]}


def noise_of_none(case: Case, run_native: Run, path: Path, tmp_path: Path) -> float:
    """RMS error of `none` on the same kept sets; see the module's text."""
    truth = reference(case, "true")
    k, v = case.types
    np.array(case.tokens, dtype=np.int32).tofile(tmp_path / "tokens")
    result = run_native(
        "logits-dump",
        path,
        tmp_path / "logits",
        f"tokens={tmp_path / 'tokens'}",
        "chunks=" + ",".join(map(str, case.chunks)),
        f"evict={case.budget}",
        f"protect={max(case.sinks, case.pinned)}",
        f"n_ctx={(case.budget + case.n_ubatch + 255) // 256 * 256}",
        f"n_ubatch={case.n_ubatch}",
        f"fa={case.fa}",
        f"type_k={k}",
        f"type_v={v}",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    logits = np.fromfile(tmp_path / "logits", dtype=np.float32).reshape(truth.logits.shape)
    return rms((logits - truth.logits)[truth.full])


# ---- the matrix ------------------------------------------------------------------------------------------------------

LLAMA = ["llama-gqa", "llama-mha", "llama-gqa-128", "llama-gqa-32"]
AXES: dict[str, list[Any]] = {
    "model": [*LLAMA, "qwen2-gqa", "qwen2-gqa-128", "gemma3", "gpt-oss"],
    "kv": ["f32", "f16", "q8_0", "q4_0", "bf16"],
    "fa": [0, 1],
    "positions": ["true", "cache"],
    "shape": [(64, 64), (64, 16), (100, 33), (256, 64), (300, 96)],
    "keep": [(4, 0), (0, 0), (4, 9), (1, 0)],
    "prompt": ["short", "budget", "long", "single-tail"],
}


def cases() -> list[Case]:
    """Every model with both position rules at the exact criterion, then all pairs of everything."""
    rest = zip(*(itertools.cycle(AXES[name]) for name in ("shape", "keep", "prompt")), strict=True)
    made = []
    for model, positions in itertools.product([*AXES["model"], "gemma3-128", "gemma3-period6"], AXES["positions"]):
        (budget, n_ubatch), (sinks, pinned), prompt = next(rest)
        made.append(Case(model, "f32", 0, positions, budget, n_ubatch, sinks, pinned, prompt))
    for row in pairwise(AXES):
        (budget, n_ubatch), (sinks, pinned) = row.pop("shape"), row.pop("keep")
        made.append(Case(**row, budget=budget, n_ubatch=n_ubatch, sinks=sinks, pinned=pinned))
    return list(dict.fromkeys(made))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_streaming_agrees_with_the_oracle(
    load: Load, run_native: Run, model_file: Callable[[str], Path], tmp_path: Path, case: Case
) -> None:
    want, text = reference(case), case.tokens
    assert want.full.sum() >= 150
    got, seen = np.zeros_like(want.logits), np.zeros(len(want.logits), bool)  # a chunk inside a call shows no logits
    with case.session(load) as session:
        assert session.stats()["n_ubatch"] == case.n_ubatch
        pos, chunk = 0, -1
        kept: dict[int, int] = {}
        for n in case.calls:
            got_now = session.eval(text[pos : pos + n])
            pos, chunk = pos + n, chunk + (n + case.n_ubatch - 1) // case.n_ubatch
            got[chunk], seen[chunk] = got_now, True
            before, kept = kept, session.kept()
            assert list(kept) == want.kept[chunk]
            if n == 1:
                check_slots(case, before, kept)
        stats = session.stats()
        assert stats["n_evicted"] == pos - case.budget and stats["n_used"] == case.budget and stats["n_past"] == pos
    assert np.isfinite(got).all() and seen[want.full].all()
    if case.exact:
        worst = max(relative(a, b) for a, b in zip(got[seen], want.logits[seen], strict=True))
        assert worst <= TOLERANCE
    else:
        noise = noise_of_none(case, run_native, model_file(case.model), tmp_path)
        assert 0.0 < rms((got - want.logits)[want.full]) <= NOISE_RATIO * noise


@pytest.mark.parametrize("model", ["llama-gqa", "gemma3"])
@pytest.mark.parametrize("positions", ["true", "cache"])
def test_the_error_is_what_rounding_explains(load: Load, model: str, positions: str) -> None:
    """An absolute check beside the ratio to `none`: the error of an f16 cache is what the oracle makes when it rounds K and
    V to f16. Upstream rounds the query and the weights too, hence the factor."""
    case, spec = Case(model, kv="f16", positions=positions), MODELS[model]
    text = case.tokens
    true, rounded = (
        Oracle(spec, budget=64, sinks=4, positions=positions, round_kv=rounding)
        for rounding in (None, lambda x: x.astype(np.float16).astype(np.float64))
    )
    with case.session(load) as session:
        for step in (session.eval, true.chunk, rounded.chunk):
            step(text[:32])
        rows = [(session.eval([t]), true.chunk([t]), rounded.chunk([t])) for t in text[32:250]]
    got, want, expected = np.array(rows).transpose(1, 0, 2)
    error, explained = rms(got - want), rms(expected - want)
    assert 0.5 * explained <= error <= 2.0 * explained


# ---- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama-gqa", "qwen2-gqa-128", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("fa", [0, 1])
@pytest.mark.parametrize("positions", ["true", "cache"])
def test_a_budget_above_the_length_gives_the_bits_of_none(load: Load, model: str, fa: int, positions: str) -> None:
    """Same slots in the same order, same n_kv: the same bits."""
    case = Case(model, kv="f16", fa=fa, positions=positions, budget=256, n_ubatch=32)
    text = case.tokens
    with case.session(load, policy="none", cpu_attn=1) as none, case.session(load) as bounded:
        for a, b in [(0, 90), *((i, i + 1) for i in range(90, 150)), (150, 200), (200, 201), (201, 256)]:
            x, y = none.eval(text[a:b]), bounded.eval(text[a:b])
            assert np.array_equal(x.view(np.uint32), y.view(np.uint32)), f"at token {b}"
        assert list(bounded.kept()) == list(range(256)) and bounded.stats()["n_evicted"] == 0


@pytest.mark.parametrize("positions", ["true", "cache"])
@pytest.mark.parametrize(("kv", "fa"), [("f32", 0), ("f16", 1), ("q8_0", 1)])
def test_the_order_of_slots_does_not_show_in_the_logits(load: Load, positions: str, kv: str, fa: int) -> None:
    """With one layer a token's K and V depend on nothing but itself, so that two fillings that leave the same tokens in
    other slots must agree: one token at a time, and in chunks of 48."""
    spec = dataclasses.replace(MODELS["llama-gqa"], n_layer=1)
    case = Case("llama-gqa", kv=kv, fa=fa, positions=positions, n_ubatch=48)
    text, errors = case.tokens, []
    oracle = Oracle(spec, budget=64, sinks=4, positions=positions)
    oracle.eval(text[:201], 1)
    want = np.array([oracle.chunk([t]) for t in text[201:301]])
    layouts = []
    for step in (1, 48):
        with case.session(lambda _: load(spec)) as session:
            for i in range(0, 200, step):
                session.eval(text[i : min(i + step, 200)])
            session.eval(text[200:201])
            layouts.append(session.kept())
            got = np.array([session.eval([t]) for t in text[201:301]])
            errors.append(rms(got - want))
            if case.exact:
                assert max(relative(a, b) for a, b in zip(got, want, strict=True)) <= TOLERANCE
    assert layouts[0].keys() == layouts[1].keys() and layouts[0] != layouts[1]
    assert max(errors) <= NOISE_RATIO * min(errors)


@pytest.mark.parametrize("positions", ["true", "cache"])
def test_the_error_does_not_grow_past_the_trained_context(load: Load, positions: str) -> None:
    """Three trained contexts: nothing drifts. (float32 angles lose 1e-7 per position, far below the tolerance here.)"""
    spec = MODELS["llama-gqa"]
    case = Case("llama-gqa", positions=positions)
    text = case.tokens[: 3 * spec.n_ctx_train]
    oracle = Oracle(spec, budget=64, sinks=4, positions=positions)
    with case.session(load) as session:
        session.eval(text[:64])
        oracle.eval(text[:64], 32)
        for t in text[64:]:
            assert relative(session.eval([t]), oracle.chunk([t])) <= TOLERANCE
        assert list(session.kept()) == oracle.kept


@pytest.mark.parametrize("model", ["llama-gqa", "gemma3"])
@pytest.mark.parametrize("n", [4 * 16, 3 * 16 + 1])
@pytest.mark.parametrize("fa", [0, 1])
def test_a_batch_of_several_ubatches_is_several_calls(load: Load, model: str, n: int, fa: int) -> None:
    case = Case(model, kv="f16", fa=fa, budget=40, n_ubatch=16)
    text = case.tokens
    with case.session(load, n_batch=64) as whole, case.session(load, n_batch=16) as cut:
        for a in range(0, 5 * n, n):
            x = whole.eval(text[a : a + n])
            for i in range(a, a + n, 16):
                y = cut.eval(text[i : min(i + 16, a + n)])
            assert relative(x, y) <= 1e-6 and whole.kept() == cut.kept()


@pytest.mark.parametrize(
    ("model", "spec", "options"),
    [
        ("llama-gqa", "streaming:budget=64,sinks=4", "n_ubatch=16 type_k=f32 type_v=f32"),
        ("qwen2-gqa", "streaming:budget=64,sinks=4,positions=true", "n_ubatch=16 n_batch=49 fa=1"),
        ("gemma3", "streaming:budget=100,sinks=4", "n_ubatch=32 fa=1 type_k=q8_0 type_v=q8_0"),
        ("gpt-oss", "streaming:budget=64,sinks=0", "n_ubatch=16"),
    ],
)
def test_a_llama_decode_of_several_ubatches_is_several_calls(
    run_native: Run, model_file: Callable[[str], Path], model: str, spec: str, options: str
) -> None:
    result = run_native("batch-equiv", model_file(model), spec, "n_ctx=4096", "rounds=5", *options.split())
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert result.stdout.count("difference") == 10


@pytest.mark.parametrize("model", ["llama-gqa", "qwen2-gqa", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("positions", ["true", "cache"])
def test_the_graph_is_reused_where_none_reuses_it(load: Load, model: str, positions: str) -> None:
    case, steps, reused = Case(model, kv="f16", positions=positions), 50, {}
    text = case.tokens
    for policy in ("none", "streaming"):
        with case.session(load, policy=policy) as session:
            session.eval(text[:100])
            for t in text[100:110]:
                session.eval([t])
            before = session.stats()["graphs_reused"]
            for t in text[110 : 110 + steps]:
                session.eval([t])
            reused[policy] = session.stats()["graphs_reused"] - before
    assert reused["streaming"] == reused["none"] and reused["none"] >= steps - 1


def test_a_reset_leaves_nothing_behind(load: Load) -> None:
    case = Case("qwen2-gqa", kv="f16")
    text = case.tokens
    with case.session(load) as session:
        first = [session.eval(text[:100]), *(session.eval([t]) for t in text[100:200])]
        layout = session.kept()
        session.reset()
        assert session.kept() == {} and session.logits() is None
        second = [session.eval(text[:100]), *(session.eval([t]) for t in text[100:200])]
        assert session.kept() == layout
        assert np.array_equal(np.array(first), np.array(second))


# ---- rewinds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama-gqa", "gemma3"])
@pytest.mark.parametrize("positions", ["true", "cache"])
def test_an_exact_rewind_is_a_run_that_stopped_there(load: Load, model: str, positions: str) -> None:
    case = Case(model, positions=positions)
    text = case.tokens
    with case.session(load) as session, case.session(load) as fresh:
        session.eval(text[:30])
        for t in text[900:920]:
            session.eval([t])
        assert session.rewind(50) == EXACT and len(session.kept()) == 50  # nothing at or after 50: no change
        assert session.rewind(30) == EXACT and list(session.kept()) == list(range(30))
        assert session.logits() is None
        fresh.eval(text[:30])
        for a, b in [(30, 31), (31, 60), *((i, i + 1) for i in range(60, 140))]:
            assert relative(session.eval(text[a:b]), fresh.eval(text[a:b])) <= 1e-6
        assert session.kept() == fresh.kept()
        assert session.rewind(0) == EXACT and session.kept() == {}
        fresh.reset()
        assert relative(session.eval(text[:90]), fresh.eval(text[:90])) <= 1e-6


@pytest.mark.parametrize("model", ["llama-gqa", "qwen2-gqa", "gemma3"])
@pytest.mark.parametrize("positions", ["true", "cache"])
@pytest.mark.parametrize("dropped", [1, 7, 25])
def test_a_shortened_rewind_keeps_the_oracles_tokens(load: Load, model: str, positions: str, dropped: int) -> None:
    """What is left is a subset of what a run that stopped there keeps, and the refill is what the oracle computes on it."""
    case = Case(model, positions=positions, n_ubatch=16)
    text, n = case.tokens, 150
    oracle = Oracle(MODELS[model], budget=64, sinks=4, positions=positions)
    stopped = Oracle(MODELS[model], budget=64, sinks=4, positions=positions)
    stopped.eval(text[:100], 16)
    stopped.eval(text[100 : n - dropped], 1)
    with case.session(load) as session:
        session.eval(text[:100])
        oracle.eval(text[:100], 16)
        for t in text[100:n]:
            session.eval([t])
            oracle.chunk([t])
        assert session.rewind(n - dropped) == SHORTENED == oracle.rewind(n - dropped)
        assert list(session.kept()) == oracle.kept and set(oracle.kept) < set(stopped.kept)
        assert session.logits() is None
        pos = 300  # other tokens than before
        for k in [1, 1, 5, *[1] * 40, 20, *[1] * 40]:
            got, want = session.eval(text[pos : pos + k]), oracle.eval(text[pos : pos + k], 16)
            pos += k
            assert list(session.kept()) == oracle.kept
            assert relative(got, want) <= TOLERANCE


@pytest.mark.parametrize("model", ["llama-gqa", "gemma3"])
def test_an_impossible_rewind_changes_nothing(load: Load, model: str) -> None:
    case = Case(model)
    text = case.tokens
    oracle = Oracle(MODELS[model], budget=64, sinks=4, positions="cache")
    with case.session(load) as session:
        session.eval(text[:150])
        oracle.eval(text[:150], 32)
        kept = session.kept()
        newest_evicted = 150 - 60 - 1
        assert newest_evicted not in kept and newest_evicted + 1 in kept
        for p0 in (1, 4, 50, newest_evicted):
            with pytest.raises(NativeError) as error:
                session.rewind(p0)
            assert error.value.status == REWIND
        assert session.kept() == kept and session.stats()["n_past"] == 150
        for t in text[150:200]:
            assert relative(session.eval([t]), oracle.chunk([t])) <= TOLERANCE
        assert session.rewind(150) == SHORTENED


def test_a_rewind_leaves_a_sliding_window_whole(load: Load) -> None:
    """The sliding-window layers hold fewer tokens than the budget: a rewind further than they reach back is refused, and
    the first one that is not refused finds its window whole."""
    spec = dataclasses.replace(MODELS["gemma3"], n_ctx_train=1024)
    case = Case("gemma3", budget=512, n_ubatch=64)
    text, newest_evicted = case.tokens, 600 - 508 - 1
    oracle = Oracle(spec, budget=512, sinks=4, positions="cache")
    oracle.eval(text[:600], 64)
    with case.session(lambda _: load(spec)) as session:
        session.eval(text[:600])
        assert len(session.kept()) == 512  # the last chunk's evictions are carried out, and its tokens no longer exact
        refused = []
        for p0 in range(newest_evicted + 1, 600):
            try:
                assert session.rewind(p0) == SHORTENED == oracle.rewind(p0)
                break
            except NativeError as error:
                assert error.status == REWIND
                refused.append(p0)
        assert refused and p0 < 600 - spec.n_swa
        assert list(session.kept()) == oracle.kept
        for t in text[1000:1050]:
            assert relative(session.eval([t]), oracle.chunk([t])) <= TOLERANCE


# ---- failed steps and cancel ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama-gqa", "qwen2-gqa-128", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("positions", ["true", "cache"])
def test_a_stopped_decode_leaves_the_cache_right(
    run_native: Run, model_file: Callable[[str], Path], tmp_path: Path, model: str, positions: str
) -> None:
    """A decode that stops between two graph nodes: a single token's victim is gone and nothing took its place, a longer
    chunk leaves no trace, and carrying on is what the oracle computes on that."""
    spec = MODELS[model]
    chunks = [30, 30, 20, 11, 1, *[1] * 80, 7, 16, 3, 20, 9, *[1] * 60]
    text = Case(model).tokens[: sum(chunks)]
    oracle = Oracle(spec, budget=64, sinks=4, positions=positions)
    policy = f"streaming:budget=64,sinks=4,positions={positions}"
    stopped = []
    decodes = stopped_decodes(run_native, model_file(model), policy, tmp_path, text, chunks, spec.n_vocab, every=2)
    for n, kept, got in decodes:
        if kept is not None:
            if n == 1 and len(oracle.kept) == 64:
                oracle.fail()
            assert kept == oracle.kept
            stopped.append((n, len(kept)))
        assert relative(got, oracle.chunk(text[oracle.n_past : oracle.n_past + n])) <= TOLERANCE
    assert {(1, 63), (30, 30), (11, 64), (7, 64)} <= set(stopped)


@pytest.mark.parametrize(("model", "n_ubatch"), [("llama-mha-128", 64), ("llama-gqa", 1), ("gemma3", 32)])
def test_a_cancelled_session_goes_on(load: Load, model: str, n_ubatch: int) -> None:
    """Cancel a prompt at many moments, then carry on from where the session says it is: the oracle, told the same, agrees."""
    case = Case(model, n_ubatch=n_ubatch)
    oracle = Oracle(MODELS[model], budget=64, sinks=4, positions="cache")
    text = case.tokens * 4
    delays = random.Random(1)
    in_the_middle, pos = 0, 0
    with case.session(load) as session:
        begin = time.monotonic()
        session.eval(text[:700])
        seconds = time.monotonic() - begin  # of a prompt, here and now
        session.reset()
        for _ in range(60):
            if in_the_middle == 3:
                break
            prompt = text[pos % 2000 :][:700]
            cancelled = eval_until_cancelled(session, prompt, delays.uniform(0.0, 1.2 * seconds))
            n = session.n_done
            assert n == len(prompt) or (cancelled and n % n_ubatch == 0)
            in_the_middle += cancelled and 0 < n < len(prompt)
            if n > 0:
                oracle.eval(prompt[:n], n_ubatch)
            pos += n
            kept = session.kept()
            if list(kept) != oracle.kept:  # the victim of a single token that did not finish is gone
                assert cancelled and n_ubatch == 1
                oracle.kept.remove(min(p for p in oracle.kept if p >= 4))
            assert list(kept) == oracle.kept and session.stats()["n_past"] == pos
            assert session.logits() is None or n == 0 or not cancelled
            while True:  # a cancel that came too late may stop the next call, before it has done anything
                try:
                    got = session.eval(text[5:6])
                    break
                except NativeError as error:
                    assert error.status == CANCELLED and session.n_done == 0
            want = oracle.chunk(text[5:6])
            pos += 1
            assert list(session.kept()) == oracle.kept
            assert relative(got, want) <= TOLERANCE
            if pos > 4000:  # float32 angles: see the trained-context test
                session.reset()
                oracle.rewind(0)
                pos = 0
    assert in_the_middle == 3, "no eval was cancelled half way"
