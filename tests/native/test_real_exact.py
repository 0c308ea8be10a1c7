"""SmolLM2 with its weights in f32: nothing is rounded, so kept sets and logits are those of the float64 oracle, and of
the update that copies the kept rows together.

Where a file's weights are quantised llama.cpp rounds activations too, and two updates part by far more than 1e-4;
`equip check` has to say so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from models import Spec, Weights
from oracle_heads import HeadOracle
from real_setup import N_THREADS, Load, prose
from test_scores import FLIPS, TOLERANCE

from equip_cli import CachePolicy, Model, Session
from equip_cli.cli import main

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]

BUDGET, SINKS, RECENT = 128, 4, 32


def exact_session(model: Model, policy: str, update: str = "inplace", **settings: Any) -> Session:
    recent = None if policy == "streaming" else RECENT
    chosen = CachePolicy(policy, BUDGET, SINKS, recent=recent, update=update, rotate_every=1, **settings)
    exact = dict(flash_attn="off", type_k="f32", type_v="f32")
    return model.session(chosen, n_threads=N_THREADS, n_threads_batch=N_THREADS, n_ubatch=64, **exact)


# ---- the oracle ------------------------------------------------------------------------------------------------------


class RealOracle(HeadOracle):
    """The oracle with the weights of a file."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path = path
        fields = gguf.GGUFReader(path).fields

        def number(key: str) -> Any:
            return fields[f"llama.{key}"].contents()

        n_embd, n_head = number("embedding_length"), number("attention.head_count")
        assert number("attention.layer_norm_rms_epsilon") == pytest.approx(1e-5), "the oracle's own"
        spec = Spec(
            n_layer=number("block_count"),
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=number("attention.head_count_kv"),
            head_dim=n_embd // n_head,
            n_ff=number("feed_forward_length"),
            n_vocab=len(fields["tokenizer.ggml.tokens"].data),
            n_ctx_train=number("context_length"),
            rope_base=number("rope.freq_base"),
        )
        super().__init__(spec, budget=BUDGET, sinks=SINKS, recent=RECENT, **settings)

    def _read_weights(self) -> Weights:
        return {tensor.name: tensor.data for tensor in gguf.GGUFReader(self.path).tensors}


@pytest.mark.parametrize(
    ("policy", "scope", "positions", "n_steps"),
    [("h2o", "head", "cache", 100), ("tova", "layer", "true", 30), ("snapkv", "head", "cache", 40)],
)
def test_every_head_keeps_the_tokens_that_the_oracle_keeps(
    load_real: Load, policy: str, scope: str, positions: str, n_steps: int
) -> None:
    model = load_real("smollm2-f32")
    oracle = RealOracle(model.path, policy=policy, scope=scope, positions=positions)
    text = prose(model)
    furthest = 0.0
    with exact_session(model, policy, scope=scope, positions=positions) as session:
        for n in [64, 64, *[1] * n_steps, 40, *[1] * (n_steps // 2)]:
            tokens = text[oracle.n_past : oracle.n_past + n]
            session.eval(tokens)
            theirs = [[p for p, _ in session.head(*unit[0])] for unit in oracle.units]
            want = oracle.chunk(tokens, theirs)
            furthest = max(furthest, float(np.abs(session.logits() - want).max() / np.ptp(want)))
        stats = session.stats()
        assert stats["n_evicted"] == oracle.n_past - len(oracle.kept) >= n_steps
    assert furthest <= TOLERANCE
    assert 0 < oracle.n_chosen and oracle.n_differed <= FLIPS * oracle.n_chosen, (oracle.n_differed, oracle.n_chosen)


# ---- two updates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["streaming", "h2o", "tova"])
def test_in_place_and_gather_give_the_same_logits(load_real: Load, policy: str) -> None:
    model = load_real("smollm2-f32")
    text = prose(model)[: 4 * BUDGET]
    with (
        exact_session(model, policy, positions="cache") as ours,
        exact_session(model, policy, "gather", positions="cache") as theirs,
    ):
        for session in (ours, theirs):
            session.eval(text[:BUDGET])
        for i, token in enumerate(text[BUDGET:]):
            for session in (ours, theirs):
                session.eval([token])
            got, want = ours.logits(), theirs.logits()
            assert np.abs(got - want).max() <= TOLERANCE * np.ptp(want), i
        assert ours.shares() == theirs.shares()
        assert ours.stats()["n_evicted"] == len(text) - BUDGET


# ---- equip check -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "is_rounded"), [("smollm2", True), ("gemma3", True), ("smollm2-f32", False)])
def test_check_passes_and_explains_rounded_weights(
    real_file: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    is_rounded: bool,
) -> None:
    monkeypatch.delenv("LLAMA_KV_POLICY", raising=False)
    assert main(["check", str(real_file(name)), "-t", str(N_THREADS), "--budget", "64", "-n", "16"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith(" rows agree.\n")
    assert ("llama.cpp rounds activations" in shown) == is_rounded, shown
    rows = [[cell.strip() for cell in line.split("|")] for line in shown.splitlines() if line.startswith("| ")]
    cells = [row[rows[0].index("apart")] for row in rows[2:] if row[1] == "f32"]
    largest = max(float(cell) for cell in cells if cell != "-")
    # so the explanation is needed, or not
    assert (largest > TOLERANCE) == is_rounded, shown
