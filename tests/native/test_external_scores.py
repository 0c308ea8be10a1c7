"""The policy `external`: scores that a caller sets decide which tokens go. The matrix of test_scores.py has them set before the
tokens are read; here they come afterwards, change, are missing, and are lost with their tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from models import MODELS, Array, Spec
from native_api import Model, NativeError, Session
from oracle_formulas import gate

Load = Callable[["Spec | str"], Model]

BUDGET, SINKS, RECENT = 48, 4, 8
MODEL = "llama-gqa"
TEXT = [int(t) for t in np.random.default_rng(5).integers(3, 200, 400)]
HEADS = [*itertools.product(range(MODELS[MODEL].n_layer), range(MODELS[MODEL].n_head_kv))]
USAGE = -1

SCOPES = ["head", "layer", "token"]


def opened(load: Load, scope: str, policy: str = "external", **options: Any) -> Session:
    given = dict(budget=BUDGET, sinks=SINKS, recent=RECENT, scope=scope, n_ubatch=64) | options
    return Session(load(MODEL), policy=policy, **given)


def units(scope: str) -> list[list[tuple[int, int]]]:
    by_layer = [[u for u in HEADS if u[0] == il] for il in range(MODELS[MODEL].n_layer)]
    return {"token": [HEADS], "layer": by_layer, "head": [[u] for u in HEADS]}[scope]


def worth(unit: Sequence[tuple[int, int]], pos: int) -> float:
    """The sum that decides, as float32 adds it up."""
    total = np.float32(0)
    for head in unit:
        total += np.float32(gate(*head, pos))
    return float(total)


def set_all(session: Session, pos: Sequence[int]) -> None:
    for head in HEADS:
        session.set_scores(*head, pos, [gate(*head, p) for p in pos])


def best(unit: Sequence[tuple[int, int]], kept: Sequence[int], n: int, newest: int) -> list[int]:
    """The n tokens that are left of these: the protected ones and the highest, of equals the newer."""
    safe = [p for p in kept if p < SINKS or p > newest - RECENT]
    others = sorted((p for p in kept if p not in safe), key=lambda p: (worth(unit, p), p))
    return sorted([*safe, *others[len(kept) - n :]])


@pytest.mark.parametrize(("update", "positions"), [("inplace", "true"), ("gather", "cache")])
@pytest.mark.parametrize("scope", SCOPES)
def test_scores_that_are_set_after_a_chunk_decide_what_it_evicts(
    load: Load, scope: str, update: str, positions: str
) -> None:
    with opened(load, scope, update=update, positions=positions) as session:
        kept = [list(range(40)) for _ in units(scope)]
        session.eval(TEXT[:40])
        set_all(session, range(40))
        for begin, n in ((40, 30), (70, 64), (134, 20)):
            session.eval(TEXT[begin : begin + n])
            set_all(session, range(begin, begin + n))
            for i, unit in enumerate(units(scope)):
                kept[i] = best(unit, [*kept[i], *range(begin, begin + n)], BUDGET, begin + n - 1)
                for head in unit:
                    assert list(session.head(*head)) == kept[i]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_single_token_evicts_the_lowest(load: Load, scope: str, ahead: bool) -> None:
    with opened(load, scope) as session:
        session.eval(TEXT[:BUDGET])
        set_all(session, range(BUDGET))
        kept = [list(range(BUDGET)) for _ in units(scope)]
        for t in range(BUDGET, BUDGET + 60):
            if ahead:
                set_all(session, [t])
            session.eval([TEXT[t]])
            if not ahead:
                set_all(session, [t])
            for i, unit in enumerate(units(scope)):
                # the candidates are those before the token was there
                kept[i] = [*best(unit, kept[i], BUDGET - 1, t), t]
                assert list(session.head(*unit[0])) == kept[i]


def test_a_score_that_changes_decides_anew(load: Load) -> None:
    """Also where several victims were chosen at once."""
    for evict_every in (1, 6):
        with opened(load, "head", evict_every=evict_every) as session:
            session.eval(TEXT[:BUDGET])
            session.set_scores(-1, -1, range(BUDGET), [float(p) for p in range(BUDGET)])
            for t in range(BUDGET, BUDGET + 20):
                oldest = min(p for p in session.head(0, 1) if p >= SINKS)
                victim = sorted(p for p in session.head(0, 1) if p >= SINKS)[10]
                session.set_scores(0, 1, [victim], [-1.0])
                session.eval([TEXT[t]])
                assert victim not in session.head(0, 1) and oldest in session.head(0, 1)
                assert victim in session.head(1, 0) or victim < t - BUDGET + SINKS + 1


@pytest.mark.parametrize(("unscored", "gone"), [(0.0, "unscored"), (2.0, "scored")])
def test_a_token_without_a_score_is_worth_what_the_policy_says(load: Load, unscored: float, gone: str) -> None:
    with opened(load, "head", unscored=unscored) as session:
        session.eval(TEXT[:BUDGET])
        scored = range(10, 20)
        session.set_scores(-1, -1, scored, [1.0] * len(scored))
        told = session.head(0, 0)
        assert all(math.isnan(x) == (p not in scored) for p, x in told.items())
        for t in range(BUDGET, BUDGET + 10):
            session.eval([TEXT[t]])
        kept = session.head(1, 1)
        assert (set(scored) <= set(kept)) == (gone == "unscored") and (not set(scored) & set(kept)) == (
            gone == "scored"
        )


def test_without_scores_the_oldest_go(load: Load) -> None:
    with opened(load, "head") as session:
        for t in TEXT[:150]:
            session.eval([t])
        want = [*range(SINKS), *range(150 - BUDGET + SINKS, 150)]
        assert all(list(session.head(*head)) == want for head in HEADS)


def test_a_head_that_has_evicted_a_token_takes_no_score_for_it(load: Load) -> None:
    with opened(load, "head") as session:
        session.eval(TEXT[:60])
        session.set_scores(0, 0, range(60), [float(p) for p in range(60)])
        session.set_scores(1, 1, range(60), [-float(p) for p in range(60)])
        kept = [set(session.head(*head)) for head in ((0, 0), (1, 1))]
        assert kept[0] != kept[1]
        for head, those in zip(((0, 0), (1, 1)), kept, strict=True):
            assert session.set_scores(*head, range(60), [1.0] * 60) == BUDGET
            assert session.head(*head) == dict.fromkeys(sorted(those), 1.0)
        assert session.set_scores(-1, -1, range(70), [2.0] * 70) == len(set(session.shares())) + 10


def test_a_rewind_forgets_the_scores_of_what_it_drops(load: Load) -> None:
    with opened(load, "head") as session:
        session.eval(TEXT[:40])
        session.set_scores(-1, -1, range(60), [float(p) for p in range(60)])
        session.rewind(40)  # drops nothing
        session.eval(TEXT[40:44])
        assert session.head(0, 0) == {p: float(p) for p in range(44)}
        assert session.rewind(42) == 0
        session.eval(TEXT[42:48])
        told = session.head(1, 0)
        assert {p: x for p, x in told.items() if not math.isnan(x)} == {p: float(p) for p in range(42)}
        session.set_scores(-1, -1, range(60), [1.0] * 60)
        session.reset()
        session.eval(TEXT[:48])
        assert all(map(math.isnan, session.head(1, 0).values()))


def test_a_call_with_a_bad_argument_changes_nothing(load: Load) -> None:
    with opened(load, "head") as session:
        session.eval(TEXT[:40])
        session.set_scores(-1, -1, range(50), [3.0] * 50)
        for arguments, words in (
            ((9, 0, [1, 2], [1.0, 2.0]), "layer 9 has no KV head 0"),
            ((0, 5, [1, 2], [1.0, 2.0]), "layer 0 has no KV head 5"),
            ((-2, 0, [1], [1.0]), "layer -2 has no KV head 0"),
            ((0, 0, [1, -1], [1.0, 2.0]), "position -1 is none of a token"),
            ((0, 0, [1, 2**31 - 1], [1.0, 2.0]), "is none of a token"),
            ((0, 0, [1, 2], [1.0, math.nan]), "position 2 is not a finite number"),
            ((0, 0, [1, 60], [1.0, math.inf]), "position 60 is not a finite number"),
        ):
            with pytest.raises(NativeError, match=words) as error:
                session.set_scores(*arguments)
            assert error.value.status == USAGE and "\n" not in str(error.value)
        n = session.lib.c.equip_session_set_scores(session.handle, 0, 0, session.lib.ffi.NULL, session.lib.ffi.NULL, 2)
        assert n == USAGE
        session.eval(TEXT[40:48])
        assert session.head(0, 0) == dict.fromkeys(range(48), 3.0)


@pytest.mark.parametrize("policy", ["h2o", "streaming", "none", "random"])
def test_another_policy_takes_no_scores(load: Load, policy: str) -> None:
    options: dict[str, Any] = {} if policy == "none" else {"budget": 64}
    with Session(load(MODEL), policy=policy, **options) as session:
        session.eval(TEXT[:20])
        with pytest.raises(NativeError, match="use the policy external") as error:
            session.set_scores(0, 0, [1], [1.0])
        assert error.value.status == USAGE


@pytest.mark.parametrize("policy", ["external", "lagkv"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_device_evicts_the_same_tokens(load: Load, monkeypatch: pytest.MonkeyPatch, policy: str, scope: str) -> None:
    """Where the victims are chosen on the host, from rows that are read back."""
    text: Array = np.random.default_rng(7).permutation(MODELS[MODEL].n_vocab)
    runs = []
    for where in ("", "graph"):
        monkeypatch.setenv("LLAMA_KV_SCORES", where)
        with opened(load, scope, policy, type_k="f32", type_v="f32", flash_attn="off") as session:
            told = []
            for i in range(0, 180, 60):
                session.eval([int(t) % 200 for t in text[i : i + 30]])
                if policy == "external":
                    set_all(session, range(i, i + 30))
                for t in range(i + 30, i + 60):
                    session.eval([int(text[t]) % 200])
                told.append([list(session.head(*head)) for head in HEADS])
            runs.append(told)
    assert runs[0] == runs[1]


def test_a_restored_session_has_its_scores(load: Load) -> None:
    with opened(load, "layer") as one, opened(load, "layer") as other:
        for begin in (0, 30):  # before the first token, and in mid-text
            set_all(one, range(begin, begin + 20))
            other.load(one.save())
            for session in (one, other):
                session.eval(TEXT[begin : begin + 30])
            told = [str(session.head(*head)) for session in (one, other) for head in HEADS]
            assert told[: len(HEADS)] == told[len(HEADS) :] and "nan" in told[0]
