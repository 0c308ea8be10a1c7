"""The policies of native/tests/toy-policies.cpp against their formulas in numpy: for what no policy of the product asks yet.

Run by tests/native/test_adding_a_policy.py in a process whose libllama has them in place of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle_formulas
import pytest
from models import MODELS, Array, Spec
from native_api import Library, Model, NativeError, Session
from oracle_formulas import ALL, NORMS, ROWS, Formula, Head
from oracle_heads import HeadOracle, Wrong

Load = Callable[["Spec | str"], Model]


def axis(u: Head) -> Array:
    """The component of the un-rotated key along a fixed direction and that of the protected keys."""
    return np.asarray(u.k @ (np.cos(np.arange(u.k.shape[1])) + u.k[: u.n_protect].sum(axis=0)))


def outlived(u: Head) -> Array:
    """Minus the number of choices that a token has seen: the oldest one has seen most."""
    return u.pos.astype(float)


def middle(u: Head) -> Array:
    """Twice the distance from the middle of what may go."""
    return np.asarray(np.abs(2.0 * np.arange(len(u.pos)) - (u.n_protect + u.n_old - 1)))


TOYS = {
    "plain_axis": Formula(axis, ROWS, ALL),
    "stored_axis": Formula(axis, ROWS, ALL),  # the library's has the stored keys, so it is another one
    "state": Formula(outlived, frozenset(), ALL),
    "middle": Formula(middle, frozenset(), ALL),
    "pages": Formula(lambda u: np.linalg.norm(u.v, axis=1), NORMS, ALL, eager=True, pages=True, evict_every=8),
}
oracle_formulas.FORMULAS.update(TOYS)

import test_scores  # noqa: E402  # reads what the library has
from test_position_rules import write_mrope  # noqa: E402
from test_scores import POLICIES, WORTH_NOISE, Case, check_flips, follow, kept_by_unit, rounding  # noqa: E402

UNROTATED = [
    Case("plain_axis", scope, model, positions=positions, update=update)
    for scope, model, positions, update in (
        ("head", "llama-gqa", "true", "inplace"),
        ("head", "llama-gqa", "cache", "inplace"),
        ("head", "qwen2-gqa", "auto", "inplace"),
        ("layer", "qwen2-gqa", "cache", "inplace"),
        ("token", "gemma3", "auto", "inplace"),
        ("layer", "llama-gqa", "auto", "gather"),
        ("token", "llama-gqa-32", "cache", "gather"),
    )
]


def limited(case: Case) -> Case:
    """`auto` goes over to ranks within the text; pinned tokens are rewritten later than sinks."""
    n_ctx = 128 if case.positions == "auto" else case.n_ctx_train
    return dataclasses.replace(case, n_ctx_train=n_ctx, sinks=3, pinned=9)


def check(load: Load, case: Case, **options: Any) -> None:
    oracle = case.oracle()
    with case.session(load, **options) as session:
        for tokens in case.calls:
            assert follow(session, oracle, tokens) <= test_scores.TOLERANCE
        assert session.stats()["positions_now"] == oracle.positions
    assert case.positions != "auto" or oracle.positions == "cache", "it never switched"
    check_flips(oracle)


def check_rounded(load: Load, case: Case) -> None:
    """The victims alone: logits differ by the rounding."""
    oracle = case.oracle(tolerance=WORTH_NOISE[case.kv], round_kv=rounding(case.kv))
    with case.session(load) as session:
        for tokens in case.calls:
            session.eval(tokens)
            oracle.chunk(tokens, kept_by_unit(session, oracle))
    assert oracle.n_chosen > 100


def test_the_toys_are_the_registry() -> None:
    assert set(POLICIES) == set(TOYS)
    assert {name for name, each in POLICIES.items() if each["pages"]} == {"pages"}


@pytest.mark.parametrize("case", UNROTATED, ids=str)
def test_unrotated_keys_are_those_of_the_model(load: Load, case: Case) -> None:
    check(load, limited(case))


def test_debts_do_not_show_in_unrotated_keys(load: Load) -> None:
    """Keys that stand where they stood some evictions ago. The reference always has them at their ranks, so its logits are
    others, but in the first layer the keys do not depend on them."""
    case = limited(Case("plain_axis", "head", positions="cache"))
    spec = dataclasses.replace(case.spec, n_layer=1)
    oracle = HeadOracle(spec, **case.given, pinned=case.pinned)
    with case.session(lambda _: load(spec), rotate_every=5) as session:
        for tokens in case.calls:
            session.eval(tokens)
            oracle.chunk(tokens, kept_by_unit(session, oracle))
        assert session.stats()["n_rotations"] > 10
    check_flips(oracle)


@pytest.mark.parametrize("scope", ["head", "token"])
def test_a_rebase_does_not_show_in_unrotated_keys(load: Load, monkeypatch: pytest.MonkeyPatch, scope: str) -> None:
    monkeypatch.setenv("LLAMA_KV_REBASE_AT", "97")
    check(load, limited(Case("plain_axis", scope, positions="cache")))


# f16 keys by rank are rounded anew by each rotation, which adds up to more than they differ by
@pytest.mark.parametrize(("kv", "positions"), [("f16", "true"), ("q8_0", "cache")])
def test_unrotated_keys_of_a_rounded_cache(load: Load, kv: str, positions: str) -> None:
    """Quantised keys are stored multiplied with the Hadamard matrix."""
    check_rounded(load, limited(Case("plain_axis", "layer", "llama-gqa-128", kv, 1, positions=positions)))


def test_several_positions_per_key_are_refused_by_name(
    library: Library, model_file: Callable[[str], Path], tmp_path: Path
) -> None:
    half = MODELS["qwen2-gqa"].head_dim // 2
    path = write_mrope(model_file("qwen2-gqa"), tmp_path / "model.gguf", [half // 4, half // 4, half // 2, 0])
    model = Model(library, path)
    with pytest.raises(NativeError, match="M-RoPE.* plain_axis reads keys without their rotation"):
        Session(model, policy="plain_axis", budget=64)
    with Session(model, policy="stored_axis", budget=64) as session:
        assert session.stats()["positions"] == "true"
    model.close()


@pytest.mark.parametrize("positions", ["true", "cache", "auto"])
def test_stored_keys_are_others(load: Load, positions: str) -> None:
    with pytest.raises(Wrong):
        check(load, limited(Case("stored_axis", "head", positions=positions)))


def test_stored_keys_of_a_rounded_cache_are_others(load: Load) -> None:
    with pytest.raises(Wrong):
        check_rounded(load, limited(Case("stored_axis", "layer", "llama-gqa-128", "q8_0", 1)))


@pytest.mark.parametrize(
    ("policy", "scope"),
    [("state", "head"), ("state", "layer"), ("middle", "token"), ("pages", "layer"), ("pages", "token")],
)
def test_what_the_view_holds(load: Load, policy: str, scope: str) -> None:
    check(load, limited(Case(policy, scope, positions="cache", update="gather" if scope == "layer" else "inplace")))


def test_a_policys_own_recent(load: Load) -> None:
    case = Case("state")
    with case.session(load) as given, Session(load(case.spec), policy="state", budget=64) as own:
        assert (given.stats()["recent"], own.stats()["recent"]) == (case.recent, 11)
        for t in case.text[:100]:
            own.eval([t])
        assert [*own.head(0, 0)][-60:] == [*range(40, 100)]
    with Session(load(case.spec), policy="middle", budget=80) as other:
        assert other.stats()["recent"] == 20
