"""Real weights: SmolLM2-135M-Instruct (llama, quantised) and Gemma-3-270M (sliding-window layers), on prose.

They are small, and their answers are worth little: what is tested is what holds for any model, at activations, norms and
vocabularies that random weights do not have.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_setup import MODELS, N_THREADS, Load, prose
from test_scores import POLICIES

from equip_cli import CachePolicy
from equip_cli.core.sampling import Sampling

Run = Callable[..., "subprocess.CompletedProcess[str]"]

# the first one may have to download the models, or build the pristine library
pytestmark = pytest.mark.timeout(3600)

BUDGET, SINKS, RECENT = 256, 4, 64


# ---- long generation -------------------------------------------------------------------------------------------------

CHOICES = [("streaming", "token"), *((name, scope) for name in POLICIES for scope in POLICIES[name]["scopes"])]
IN_SHORT = [("streaming", "token"), ("h2o", "head")]  # 2,000 tokens of each; the default tier has them on SmolLM2


def generations() -> list[Any]:
    made = []
    for model in MODELS:
        # every scope on SmolLM2, on the larger one those of the policies; EQUIP_REAL_TOKENS=2000: all, for an hour or more
        own = [(name, POLICIES[name]["scopes"][0] if name in POLICIES else "token") for name, _ in CHOICES]
        for choice in CHOICES if model == "smollm2" or "EQUIP_REAL_TOKENS" in os.environ else dict.fromkeys(own):
            marks = () if model == "smollm2" and choice in IN_SHORT else (pytest.mark.real,)
            made.append(pytest.param(model, *choice, id="-".join([model, *choice]), marks=marks))
    return made


@pytest.mark.parametrize(("name", "policy", "scope"), generations())
def test_generation_far_past_the_budget_stays_within_it(load_real: Load, name: str, policy: str, scope: str) -> None:
    model, n_new = (
        load_real(name),
        int(os.environ.get("EQUIP_REAL_TOKENS", 2000 if (policy, scope) in IN_SHORT else 400)),
    )
    recent = None if policy == "streaming" else RECENT
    settings = CachePolicy(policy, BUDGET, SINKS, recent=recent, scope=None if policy == "streaming" else scope)
    with model.session(settings, n_threads=N_THREADS) as session:
        assert session.stats()["scope"] == scope
        session.set_sampler(Sampling(seed=1, ignore_eos=True))
        session.eval(prose(model)[:BUDGET])
        before = session.stats()
        for done in range(0, n_new, 200):
            assert len(session.generate_tokens(200)) == 200
            n_past, shares, logits = BUDGET + done + 200, session.shares(), session.logits()
            stats = session.stats()
            assert stats["n_past"] == n_past and stats["n_used"] <= BUDGET, stats
            assert np.isfinite(logits).all() and np.ptp(logits) > 1
            newest = BUDGET - SINKS if policy == "streaming" else RECENT
            protected = [*range(SINKS), *range(n_past - newest, n_past)]
            assert [p for p in protected if shares.get(p) != 1] == []
            # pages and batches that go at once leave room until the next
            assert sum(shares.values()) == pytest.approx(stats["n_used"], rel=1e-5)
        assert stats["n_evicted"] == n_past - stats["n_used"]
        # one graph for each shape of the cache, and one more after each whole rotation
        assert stats["graphs_reused"] - before["graphs_reused"] > 0.8 * n_new, stats


# ---- off is off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fa"),
    [
        ("smollm2", 0),
        pytest.param("smollm2", 1, marks=pytest.mark.real),
        pytest.param("gemma3", 0, marks=pytest.mark.real),
        pytest.param("gemma3", 1, marks=pytest.mark.real),
    ],
)
def test_policy_none_gives_the_bits_of_the_pristine_library(
    load_real: Load, run_native: Run, pristine: Path, tmp_path: Path, name: str, fa: int
) -> None:
    model, chunks, n_greedy = load_real(name), (200, 120, 1, 9), 40  # past a step of n_kv
    text = tmp_path / "tokens.bin"
    np.array(prose(model)[: sum(chunks)], dtype=np.int32).tofile(text)
    out: list[Path] = []
    for folder in (pristine, None):
        out.append(tmp_path / f"{len(out)}.bin")
        options = [f"fa={fa}", f"threads={N_THREADS}", f"tokens={text}", "chunks=" + ",".join(map(str, chunks))]
        result = run_native("logits-dump", model.path, out[-1], f"greedy={n_greedy}", *options, library=folder)
        assert result.returncode == 0, result.stderr[-2000:]
    upstream, ours = (np.fromfile(path, dtype=np.float32) for path in out)
    assert upstream.size == (len(chunks) + n_greedy) * model.n_vocab
    assert np.isfinite(upstream).all() and upstream.std() > 0.1
    assert np.array_equal(upstream.view(np.uint32), ours.view(np.uint32))
