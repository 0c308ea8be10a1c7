"""The kernels for a token's attention weights and for the next victims: as the CPU runs them, and for CUDA whether they compile."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import upstream
from places import REPOSITORY

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_weights_and_choices_are_those_of_float64(run_native: Run) -> None:
    """f32, f16 and q8_0 keys, heads of 64 to 256 values, groups of 1 to 8, masks, soft caps, attention sinks, several streams."""
    result = run_native("test-score-node", LLAMA_KV_SCORES="node")
    assert result.returncode == 0 and result.stdout.endswith("OK\n"), result.stdout[-2000:] + result.stderr[-4000:]


# what ggml-cuda's headers ask of cuBLAS: enough to compile, where only the compiler is installed
CUBLAS = """
#pragma once
#include <cuda_runtime.h>
typedef struct cublasContext * cublasHandle_t;
typedef enum { CUBLAS_STATUS_SUCCESS } cublasStatus_t;
typedef enum { CUBLAS_TF32_TENSOR_OP_MATH } cublasMath_t;
const char * cublasGetStatusString(cublasStatus_t);
cublasStatus_t cublasCreate(cublasHandle_t *);
cublasStatus_t cublasDestroy(cublasHandle_t);
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t);
cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t);
cublasStatus_t cublasSetWorkspace(cublasHandle_t, void *, size_t);
"""


@pytest.mark.full
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_cuda_kernels_compile_and_keep_their_sums_in_registers(tmp_path: Path) -> None:
    tree = tmp_path / "llama.cpp"
    upstream.prepare(tree, upstream.load_pin(), upstream.series(upstream.PATCHES), None)
    (tmp_path / "cublas_v2.h").write_text(CUBLAS)
    ours = REPOSITORY / "native" / "ggml"
    folders = [tree / "ggml/include", tree / "ggml/src", ours, ours / "cuda"]
    architectures = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 86, 89, 90)]
    command = ["nvcc", "-c", "-std=c++17", "-use_fast_math", "-extended-lambda", *architectures, "-Xptxas=-v"]
    command += ["-DGGML_CUDA_KV_SCORE", "-DGGML_CUDA_USE_GRAPHS", *(f"-I{folder}" for folder in folders)]
    command += ["-isystem", str(tmp_path), "-o", str(tmp_path / "kernels.o"), str(ours / "cuda/ggml-cuda-kv-score.cu")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", result.stderr)
    assert len(found) >= 4 * 14  # by type of the keys and size of the group
    assert max(int(spilled) for _, spilled in found) <= 16
