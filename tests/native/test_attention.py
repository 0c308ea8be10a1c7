"""Our CPU kernel for the attention of a few tokens: against double precision (native/tests/test-attn.cpp), and in sessions: which
contexts take it, what it changes, and that the order of slots means nothing to it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from equip_cli import CachePolicy, Model, Session, UsageError, cli

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def kernel(session: Session) -> str:
    return str(session.stats()["attn_kernel"])


def single(session: Session, tokens: list[int], n_prompt: int) -> NDArray[np.float32]:
    """Logits after a prompt, and then one token per step."""
    session.eval(tokens[:n_prompt])
    for token in tokens[n_prompt:]:
        session.eval([token])
    return session.logits()


def apart(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Largest difference in units of the range."""
    return float(np.abs(a - b).max() / (b.max() - b.min()))


# ---- against double precision


@pytest.mark.parametrize("program", ["test-attn", "test-attn-scalar"])
def test_the_kernel_errs_no_more_than_upstreams(run_native: Run, native_program: Any, program: str) -> None:
    """Error no larger than upstream's, the same bits for every number of threads, scores that are the exact column sums."""
    if program == "test-attn-scalar" and not list(native_program("test-attn")[1].glob("*ggml-cpu.*")):
        pytest.skip("a build with a library per instruction set: the scalar one among them is what old machines load")
    result = run_native(program, "quick")
    assert result.returncode == 0 and " 0 failures" in result.stdout, result.stdout[-3000:] + result.stderr[-3000:]
    n_shapes = int(result.stdout.splitlines()[-1].split()[0])
    assert n_shapes > 50


@pytest.mark.full
def test_the_kernel_errs_no_more_than_upstreams_on_all_shapes(run_native: Run) -> None:
    result = run_native("test-attn")
    assert result.returncode == 0 and " 0 failures" in result.stdout, result.stdout[-3000:] + result.stderr[-3000:]


# ---- who takes it


def test_policies_take_the_kernel_and_none_does_not(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(policy: CachePolicy, **options: Any) -> str:
        with model.session(policy, n_ctx=256, n_threads=1, **options) as session:
            return kernel(session)

    none, streaming = CachePolicy("none"), CachePolicy("streaming", 64)
    assert name(none, flash_attn="on") == name(none) == "upstream-fa"
    assert name(none, flash_attn="on", cpu_attn=True) == "equip-cpu"
    assert name(streaming, flash_attn="on") == name(streaming) == "equip-cpu"
    assert name(streaming, flash_attn="on", cpu_attn=False) == "upstream-fa"
    assert name(streaming, flash_attn="off") == "upstream"
    assert name(CachePolicy("streaming", 64, update="shift"), flash_attn="on") == "equip-cpu"
    monkeypatch.setenv("EQUIP_CPU_ATTN", "0")
    assert name(streaming, flash_attn="on") == "upstream-fa"
    assert name(none, flash_attn="on", cpu_attn=True) == "upstream-fa"


def test_environment_chooses_the_kernel(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, name in (("1", "equip-cpu"), ("0", "upstream-fa")):
        monkeypatch.setenv("LLAMA_KV_POLICY", f"streaming:budget=64,cpu_attn={value}")
        with model.session(flash_attn="on", n_threads=1) as session:
            assert kernel(session) == name
    monkeypatch.setenv("LLAMA_KV_POLICY", "streaming:budget=64,cpu_attn=2")
    with pytest.raises(UsageError, match="cpu_attn is 2"):
        model.session()
    monkeypatch.setenv("LLAMA_KV_POLICY", "none:budget=64")
    with pytest.raises(UsageError, match="takes no settings but cpu_attn"):
        model.session()


@pytest.mark.parametrize(("args", "name"), [((), "equip-cpu"), (("--no-cpu-attn",), "upstream-fa")])
def test_records_name_the_kernel(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], name: str
) -> None:
    monkeypatch.delenv("LLAMA_KV_POLICY", raising=False)
    command = [
        "bench",
        "-t",
        "1",
        "--policy",
        "none,streaming",
        "--budget",
        "64",
        "-n",
        "2",
        "-r",
        "2",
        "-fa",
        "on",
        "-o",
        "json",
    ]
    assert cli.main([*command, *args]) == 0
    records = json.loads(capfd.readouterr()[0])
    rows = [(r["policy"], r["flash_attn"], r["attn_kernel"]) for r in records]
    ours = [("none", "on", "equip-cpu")] if not args else []
    assert rows == [("none", "on", "upstream-fa"), ("none", "off", "upstream"), *ours, ("streaming", "on", name)]
    bounded = records[-1]
    if args:
        assert bounded["ratio_vs_stock"] is None and "our kernel" not in bounded["ratio_vs"]["baseline"]
    else:  # the method's effect, and what a user gains
        assert bounded["ratio_vs"]["baseline"] == "none, our kernel, fa on"
        assert bounded["ratio_vs_stock"]["baseline"] in ("none, fa on", "none, fa off")


# ---- what it changes


@pytest.mark.parametrize("types", [("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "f16"), ("bf16", "bf16"), ("f32", "f32")])
def test_the_kernel_computes_the_same_attention(model: Model, prose: list[int], types: tuple[str, str]) -> None:
    """As upstream's flash attention within what that rounds; with f16 nearer to f32 sums than upstream is."""
    options: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "type_k": types[0], "type_v": types[1]}
    tokens = prose[:260]
    found = []
    for cpu_attn in (True, False):
        with model.session(CachePolicy("none"), flash_attn="on", cpu_attn=cpu_attn, **options) as session:
            found.append(single(session, tokens, 200))
    assert 0 < apart(found[0], found[1]) < 0.02
    if types == ("f16", "f16"):
        with model.session(CachePolicy("none"), flash_attn="off", **options) as session:
            reference = single(session, tokens, 200)
        assert apart(found[0], reference) < apart(found[1], reference)


def test_the_number_of_threads_does_not_change_a_bit(model: Model, prose: list[int]) -> None:
    found = []
    for n in (1, 2, 3):
        with model.session(
            CachePolicy("none"), n_ctx=512, flash_attn="on", cpu_attn=True, n_threads=n, n_threads_batch=1
        ) as session:
            found.append(single(session, prose[:330], 300))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


@pytest.mark.parametrize("policy", ["streaming", "random", "h2o"])
def test_order_of_slots_means_little_at_f16(model: Model, prose: list[int], policy: str) -> None:
    """`inplace` scatters the tokens over the slots, `gather` keeps them in order. With true positions both hold the same keys,
    so only the order of the sums differs: 1e-6 in the kernel (test-attn), which moves a rounding of what is stored in f16 now
    and then. Upstream's sums in f16 differ four times as much here."""
    far = {}
    for cpu_attn in (True, False):
        found = []
        for update in ("inplace", "gather"):
            made = CachePolicy(policy, 192, positions="true", update=update)
            with model.session(made, flash_attn="on", n_threads=1, n_ubatch=64, cpu_attn=cpu_attn) as session:
                session.eval(prose[:1])
                rows = []
                for token in prose[1:400]:
                    session.eval([token])
                    rows.append(session.logits())
                found.append((rows, [p for p, _ in session.kept()]))
        assert found[0][1] == found[1][1]
        far[cpu_attn] = float(
            np.median([apart(a, b) for a, b in zip(found[0][0][200:], found[1][0][200:], strict=True)])
        )
    assert far[True] < 2e-4
    assert far[True] < far[False] / 2


@pytest.mark.parametrize("decay", ["h2o", "a2sf", "tova", "snapkv"])
def test_scores_are_those_of_the_softmax(model: Model, prose: list[int], decay: str) -> None:
    """With flash attention off the softmax itself is summed; f32, so that only the kernel differs."""
    weights = []
    for flash_attn in ("on", "off"):
        options = {"flash_attn": flash_attn, "type_k": "f16", "type_v": "f16", "n_threads": 2, "n_ubatch": 64}
        with model.session(CachePolicy(decay, 128, positions="true"), **options) as session:
            session.eval(prose[:100])
            for i in range(100, 124):
                session.eval(prose[i : i + 1])
            session.eval(prose[124:128])  # four at once
            assert session.stats()["n_evicted"] == 0
            layers = range(int(model.info["n_layer"]))
            weights.append(np.array([[w for _, w in session.head(layer, h)] for layer in layers for h in range(2)]))
    scale = weights[1].max()
    assert np.abs(weights[0] - weights[1]).max() / scale < 2e-3
    assert weights[0].sum() == pytest.approx(weights[1].sum(), rel=1e-4)
