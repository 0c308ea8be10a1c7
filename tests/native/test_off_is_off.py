"""Policy `none` is upstream: the same program on our libllama and on one built from the unpatched tree, byte for byte."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models import MODELS, Spec

Run = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.timeout(3600)  # the first one may have to build the reference

# every model with both attention paths; thread count, cache and weight types are spread over them
CASES = [
    (model, fa, threads, types, weights)
    for model, rows in {
        "llama-gqa": [(0, 1, "f16", "f32"), (1, 2, "f16", "q4_0"), (1, 1, "q8_0", "f32"), (0, 2, "f32", "f16")],
        "qwen2-gqa": [(0, 2, "f16", "q8_0"), (1, 1, "f16", "f32"), (1, 2, "q8_0", "f16")],
        "gemma3": [(0, 2, "f16", "f32"), (1, 1, "f16", "f16"), (1, 2, "q8_0", "f32")],
        "gpt-oss": [(0, 1, "f16", "f16"), (1, 2, "f16", "f32"), (1, 1, "q8_0", "f32")],
    }.items()
    for fa, threads, types, weights in rows
]


@pytest.mark.parametrize(("model", "fa", "threads", "types", "weights"), CASES)
def test_policy_none_gives_the_bits_of_upstream(
    run_native: Run,
    pristine: Path,
    model_file: Callable[[Spec], Path],
    tmp_path: Path,
    model: str,
    fa: int,
    threads: int,
    types: str,
    weights: str,
) -> None:
    spec = dataclasses.replace(MODELS[model], dtype=weights)
    chunks, n_greedy = (150, 80, 1, 9), 40  # several ubatches of 64, and past a step of n_kv
    out: list[Path] = []
    for folder in (pristine, None):
        out.append(tmp_path / f"{len(out)}.bin")
        result = run_native(
            "logits-dump",
            model_file(spec),
            out[-1],
            "chunks=" + ",".join(map(str, chunks)),
            f"greedy={n_greedy}",
            "all=1",
            f"fa={fa}",
            f"threads={threads}",
            f"type_k={types}",
            f"type_v={types}",
            library=folder,
        )
        assert result.returncode == 0, result.stderr[-2000:]
    upstream, ours = (np.fromfile(path, dtype=np.float32) for path in out)
    assert upstream.size == (sum(chunks) + n_greedy) * spec.n_vocab
    assert np.isfinite(upstream).all() and upstream.std() > 0.1
    differs = np.flatnonzero(upstream.view(np.uint32) != ours.view(np.uint32))
    assert differs.size == 0, f"first at token {differs[0] // spec.n_vocab}, {differs.size} values"
