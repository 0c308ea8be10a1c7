"""Bounded memories of every kind as llama.h's callers and libequip meet them: what cannot be done changes nothing, or says that it has."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from dropin_models import write_hybrid
from models import MODELS, Array, Spec
from native_api import CANCELLED, Library, Model, NativeError, Session

Run = Callable[..., "subprocess.CompletedProcess[str]"]
ModelFile = Callable[[Spec | str], Path]

ALL_SWA = Spec("gemma3", n_layer=5, n_embd=64, n_head=2, n_head_kv=1, rope_base=1e6, swa_period=0, seed=21)
DEEP = Spec(n_layer=32, n_embd=64, n_head=2, n_head_kv=1, n_ff=32, seed=22)
HUGE = Spec(n_ctx_train=4294967040, seed=23)
LONGROPE = Spec(n_ctx_train=8192, longrope=1024, seed=24)


@pytest.fixture(scope="module")
def hybrid_file(upstream_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hybrid(
        tmp_path_factory.mktemp("hybrid") / "lfm2.gguf", upstream_file("models/ggml-vocab-llama-spm.gguf")
    )


def passes(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0 and "OK" in result.stdout, result.stdout[-4000:] + result.stderr[-4000:]


@pytest.mark.parametrize(
    "model",
    [
        "llama-gqa",
        "gemma3",
        pytest.param("gpt-oss", marks=pytest.mark.full),
        pytest.param(ALL_SWA, id="all-swa", marks=pytest.mark.full),
    ],
)
def test_no_caller_of_llama_h_is_led_astray(run_native: Run, model_file: ModelFile, model: Spec | str) -> None:
    """Cancelled chunks, drafts, ids that are not there, refused copies and restores, small contexts, drafts' contexts."""
    threads = "2" if model == "llama-gqa" else "1"
    passes(run_native("test-memory", model_file(model), EQUIP_TEST_THREADS=threads))


def test_no_caller_of_a_hybrid_memory_is_led_astray(run_native: Run, hybrid_file: Path) -> None:
    passes(run_native("test-memory", hybrid_file))


@pytest.mark.parametrize("where", ["host", "graph"])
def test_graph_of_many_sequences_has_room_for_their_sinks(run_native: Run, model_file: ModelFile, where: str) -> None:
    passes(run_native("test-memory", model_file(DEEP), "sequences", LLAMA_KV_SINKS=where))


def test_context_length_that_cannot_be_counted_is_refused(run_native: Run, model_file: ModelFile) -> None:
    passes(run_native("test-memory", model_file(HUGE), "budget"))


def logits_of(model: Model, tokens: list[int], **options: object) -> Array:
    with Session(model, type_k="f32", type_v="f32", flash_attn="off", **options) as session:
        return session.eval(tokens)


def test_ranks_within_the_original_context_have_the_short_factors(model_file: ModelFile) -> None:
    """LongRoPE: no two tokens of a bounded cache are further apart than it is long, whatever the trained context is; with true
    positions the context size decides, as without a policy."""
    model = Model(Library(), model_file(LONGROPE))
    text = [t % model.n_vocab for t in range(3, 303)]
    short, long = (logits_of(model, text, policy="none", n_ctx=n_ctx) for n_ctx in (1024, 8192))
    spread = float(np.ptp(short))
    assert np.abs(short - long).max() > 0.01 * spread  # the factors matter
    for options, want in (
        (dict(policy="streaming", budget=512), short),
        (dict(policy="h2o", budget=512, positions="cache"), short),
        (dict(policy="streaming", budget=2048), long),
        (dict(policy="h2o", budget=512), long),
        (dict(policy="h2o", budget=512, n_ctx=1024), short),
        (dict(policy="streaming", budget=512, positions="true"), long),
    ):
        got = logits_of(model, text, **options)
        assert np.abs(got - want).max() <= 1e-4 * spread, options
    model.close()


def test_cancelled_hybrid_session_keeps_what_it_has_read(hybrid_file: Path) -> None:
    """A recurrent state has no way back out of a torn chunk: a cancel is looked for between chunks."""
    model, delays = Model(Library(), hybrid_file), Random(3)
    tokens = [1 + t % 200 for t in range(3000)]
    with Session(model, policy="random", budget=128, recent=16, positions="true", n_ubatch=64) as session:
        done = cancelled = 0
        while done < len(tokens):
            timer = threading.Timer(delays.uniform(0.0, 0.03), session.cancel)
            timer.start()
            try:
                session.eval(tokens[done:])
            except NativeError as error:
                assert error.status == CANCELLED
                cancelled += 1
            timer.join()
            done += session.n_done
            stats = session.stats()
            assert stats["n_past"] == done and stats["n_used"] <= 128 and len(session.kept()) == stats["n_used"]
            if cancelled == 20:
                break
        assert cancelled > 0
        try:
            logits = session.eval(tokens[done : done + 64])
        except NativeError as error:  # the last timer came late
            assert error.status == CANCELLED
            logits = session.eval(tokens[done + session.n_done : done + 64])
        assert np.isfinite(logits).all()
    model.close()


def test_models_of_the_tests_are_told_apart() -> None:
    """What the cases above rest on: a model without a layer of full attention, and one with both kinds."""
    assert all(ALL_SWA.is_swa(il) for il in range(ALL_SWA.n_layer))
    assert 0 < sum(MODELS["gemma3"].is_swa(il) for il in range(6)) < 6
