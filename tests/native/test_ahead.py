"""Victims that devices choose in the model's graph: the same tokens, to the bit, as where the host chooses them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from architectures import Variant, make_variant
from models import MODELS, Spec
from native_api import Model
from test_scores import Case, check_flips, check_heads, check_rounded, follow

Load = Callable[[Spec | str], Model]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
ModelFile = Callable[[Spec | str], Path]

# scores of 0 everywhere: all weights of a query are equal, so that the oldest token goes wherever the newest query decides
TIES = dataclasses.replace(MODELS["llama-gqa"], peak=0.0)

# what a rotation by 0 rounds once more: 1 + 0.1 log 12 times its inverse is not 1 in float32
YARN = "YaRN x12"
YARN_X12: dict[str, str | int | float] = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 12.0,
    "rope.scaling.original_context_length": 128,
}


@pytest.mark.parametrize("form", ["graph", "node"])
@pytest.mark.parametrize(
    "model",
    [
        "llama-gqa",
        "gpt-oss",
        YARN,
        *(pytest.param(each, marks=pytest.mark.full) for each in ("llama-mha", "gemma3", TIES)),
    ],
    ids=str,
)
def test_devices_choose_what_the_host_would(
    run_native: Run, model_file: ModelFile, tmp_path: Path, model: Spec | str, form: str
) -> None:
    """Random steps, chunks, rewinds, copies, saved states and cancelled steps, by the operations that a device composes, and by
    kernels of ours."""
    if model == YARN:
        path = make_variant(Variant("", YARN_X12), model_file("llama-gqa"), tmp_path / "variant.gguf")
    else:
        path = model_file(model)
    result = run_native("test-ahead", path, 80, LLAMA_KV_SCORES=form, LLAMA_KV_SINKS="graph")
    assert result.returncode == 0 and result.stdout.endswith("OK\n"), result.stdout[-4000:] + result.stderr[-4000:]

    # a full cache: nothing is read but what the test asks for at the end, and one write per token goes the other way, which a
    # kernel of ours does without
    moved = re.findall(r"(.*), (\d) sequences: (\d+) reads and (\d+) writes in (\d+) steps", result.stdout)
    assert len(moved) == 19
    for policy, sequences, reads, writes, steps in moved:
        # how far the sinks of each sequence are rotated
        n_more = int(sequences) if "positions=cache" in policy and "sinks=0" not in policy else 0
        n_now = 1 if form == "graph" or sequences != "1" or policy.startswith("random") else 0
        assert int(reads) == 1
        assert int(steps) * (n_now + n_more) <= int(writes) <= int(steps) * (n_now + n_more) + (1 - n_now)


@pytest.mark.parametrize(
    "case",
    [
        Case("h2o", "head", n_vocab=2304, n_ctx_train=4096),
        pytest.param(Case("h2o", "layer", n_vocab=2304, n_ctx_train=4096), marks=pytest.mark.full),
        pytest.param(Case("h2o", "token", model="qwen2-gqa", n_vocab=2304, n_ctx_train=4096), marks=pytest.mark.full),
        pytest.param(
            Case("tova", "head", model="llama-gqa-32", n_vocab=2304, n_ctx_train=4096), marks=pytest.mark.full
        ),
        pytest.param(
            Case("a2sf", "head", model="llama-gqa-128", n_vocab=2304, n_ctx_train=4096), marks=pytest.mark.full
        ),
    ],
    ids=str,
)
def test_weights_on_a_device_are_those_of_float64(load: Load, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """2,000 evictions in each unit, with the weights of every head after each of them, in units of the largest within 1e-5.

    And within 3e-7 more for each position: float32 angles lose 1e-7 of it, in queries and in keys.
    """
    monkeypatch.setenv("LLAMA_KV_SCORES", "graph")
    oracle, text = case.oracle(), case.text
    with case.session(load) as session:
        follow(session, oracle, text[:32])
        for t in text[32 : case.budget + 2000]:
            follow(session, oracle, [t])
            check_heads(session, oracle, 1e-5 + 3e-7 * oracle.n_past)
        assert session.stats()["n_evicted"] >= 2000
    check_flips(oracle)


@pytest.mark.parametrize("form", ["graph", "node"])
@pytest.mark.parametrize(
    "case",
    [
        Case("h2o", fa=1, kv="f16"),
        Case("a2sf", scope="layer", model="gemma2", fa=1, kv="f16"),
        Case("vatp", model="llama-gqa-32", fa=1, kv="f16"),
        Case("tova", scope="head", model="qwen2-gqa", fa=1, kv="q8_0"),
    ],
    ids=str,
)
def test_weights_beside_flash_attention_err_no_more_than_the_cache(
    load: Load, monkeypatch: pytest.MonkeyPatch, case: Case, form: str
) -> None:
    """Computed once more from Q and K: by kernels of ours, or by ggml's operations of all layers at once, or layer by layer
    where keys are quantised."""
    monkeypatch.setenv("LLAMA_KV_SCORES", form)
    check_rounded(load, case)
