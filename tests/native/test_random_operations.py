"""Steps, chunks, drafts that are rejected, rewinds and readings again, in any order, under every policy at every scope.

The float64 oracle replays each operation: kept sets are equal in every unit, and what cannot be taken back is refused and
changes nothing. This is what speculation and an edited chat do to a cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from measures import relative
from models import MODELS, Array, Spec
from native_api import REWIND, Model, NativeError, Session
from oracle import IMPOSSIBLE, Oracle
from oracle_heads import Kept
from test_scores import POLICIES, TOLERANCE, Case, follow, kept_by_unit, twin

Load = Callable[["Spec | str"], Model]

PAIRS = [(policy, scope) for policy in POLICIES for scope in POLICIES[policy]["scopes"]]
N_UBATCH = 16


class StreamingOracle(Oracle):
    """As the oracle of policies that score is asked."""

    def __init__(self, spec: Spec, **options: object) -> None:
        super().__init__(spec, **options)  # type: ignore[arg-type]
        self.units = [[(next(il for il in range(spec.n_layer) if not spec.is_swa(il)), 0)]]

    @property
    def n_chosen(self) -> int:
        return len(self.evictions)

    def kept_by_unit(self) -> list[list[int]]:
        return [list(self.kept)]

    def chunk(self, tokens: Sequence[int], theirs: Kept | None = None) -> Array:
        logits = super().chunk(tokens)
        assert theirs is None or [list(each) for each in theirs] == self.kept_by_unit()
        return logits

    def settle(self, theirs: Kept | None = None) -> None:
        super().settle()


def case_of(policy: str, scope: str) -> Case:
    i = PAIRS.index((policy, scope))
    case = Case(
        policy, scope, ["llama-gqa", "qwen2-gqa", "gemma3"][i % 3], n_ubatch=N_UBATCH, recent=[8, 3, 12][i // 2 % 3]
    )
    case = dataclasses.replace(case, positions=["cache", "true", "auto"][i // 3 % 3], n_vocab=1024, n_ctx_train=256)
    if policy == "lagkv":  # ranks jump where float32 has two tokens change places
        case = dataclasses.replace(case, parameters=(("cross", 1),))
    # a window that is longer than a batch never starts over
    return dataclasses.replace(case, evict_every=twin(policy).window + 3 if twin(policy).window else None)


class Life:
    """One sequence in the library and in the oracle."""

    def __init__(self, session: Session, oracle: Any, seed: int) -> None:
        self.session, self.oracle, self.random = session, oracle, np.random.default_rng(seed)
        self.text: list[int] = []
        self.n_refused = self.n_taken_back = 0
        # the most that a rewind asks for: sometimes more than can be had
        self.n_most = 60 if oracle.policy == "streaming" else oracle.recent + 4

    @property
    def tolerance(self) -> float:
        """float32 angles lose 1e-7 per position."""
        return TOLERANCE * max(1.0, len(self.text) / 1024)

    def tokens(self, n: int) -> list[int]:
        """That are nowhere in the cache: keys of equal tokens have equal norms in the first layer."""
        used = {self.text[p] for unit in self.oracle.kept_by_unit() for p in unit}
        free = [t for t in range(self.oracle.spec.n_vocab) if t not in used]
        return [int(t) for t in self.random.choice(free, n, replace=False)]

    def read(self, tokens: list[int]) -> None:
        self.text += tokens
        assert follow(self.session, self.oracle, tokens) <= self.tolerance

    def draft(self) -> None:
        tokens = self.tokens(int(self.random.integers(2, N_UBATCH + 1)))
        n_accepted = int(self.random.integers(0, len(tokens) + 1))
        first = self.oracle.n_past
        before = kept_by_unit(self.session, self.oracle)
        logits = self.session.eval(tokens)
        if n_accepted < len(tokens):
            assert self.session.rewind(first + n_accepted) >= 0, "a draft could not be taken back"
        assert relative(logits, self.oracle.draft(tokens, n_accepted)) <= self.tolerance
        self.text += tokens[:n_accepted]
        theirs = kept_by_unit(self.session, self.oracle)
        if n_accepted == 0:
            assert theirs == before, "a draft that was rejected has evicted something"
        self.oracle.settle(theirs)

    def rewind(self) -> None:
        p0 = max(0, self.oracle.n_past - int(self.random.integers(1, self.n_most)))
        before = kept_by_unit(self.session, self.oracle)
        answer = self.oracle.rewind(p0)
        if answer == IMPOSSIBLE:
            self.n_refused += 1
            with pytest.raises(NativeError) as error:
                self.session.rewind(p0)
            assert error.value.status == REWIND
            assert kept_by_unit(self.session, self.oracle) == before
            return
        self.n_taken_back += 1
        assert self.session.rewind(p0) == answer
        again, self.text = self.text[p0:], self.text[:p0]
        if again and self.random.random() < 0.3:  # an answer is read again; else another one comes
            self.check()
            self.read(again[:N_UBATCH])

    def operate(self) -> None:
        what = self.random.random()
        if what < 0.45:
            self.read(self.tokens(1))
        elif what < 0.6:
            self.read(self.tokens(int(self.random.integers(2, N_UBATCH + 1))))
        elif what < 0.8:
            self.draft()
        elif what < 0.998:
            self.rewind()
        else:
            assert self.session.rewind(0) == self.oracle.rewind(0) == 0
            self.text = []
        self.check()

    def check(self) -> None:
        assert kept_by_unit(self.session, self.oracle) == self.oracle.kept_by_unit()
        assert self.session.stats()["n_past"] == self.oracle.n_past == len(self.text)


def live(load: Load, policy: str, scope: str, n: int) -> None:
    oracle: Any
    if policy == "streaming":
        spec = dataclasses.replace(MODELS["gemma3"], n_vocab=1024)
        oracle = StreamingOracle(spec, budget=48, positions="cache", recent=1)
        options: dict[str, object] = dict(
            n_ubatch=N_UBATCH, flash_attn="off", type_k="f32", type_v="f32", rotate_every=1
        )
        session = Session(load(spec), policy=policy, budget=48, **options)
    else:
        case = case_of(policy, scope)
        oracle, session = case.oracle(), case.session(load)
    with session:
        life = Life(session, oracle, seed=[("streaming", "token"), *PAIRS].index((policy, scope)))
        for i in range(n):
            try:
                life.operate()
            except AssertionError as error:
                raise AssertionError(f"operation {i}: {error}") from error
    assert life.n_taken_back > n / 20
    assert life.oracle.n_chosen > n / 10


@pytest.mark.parametrize("policy", ["streaming", *POLICIES])
def test_kept_sets_are_those_of_the_oracle_after_any_operations(load: Load, policy: str) -> None:
    live(load, policy, "token" if policy == "streaming" else POLICIES[policy]["scopes"][0], 150)


@pytest.mark.full
@pytest.mark.parametrize(("policy", "scope"), [("streaming", "token"), *PAIRS])
def test_two_thousand_operations(load: Load, policy: str, scope: str) -> None:
    live(load, policy, scope, 2000)
