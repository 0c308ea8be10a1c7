"""The native tests: ledger, units and rules alone (test-ledger.cpp, test-units.cpp and test-formulas.cpp, under ASan and UBSan where the compiler
has them), and what a caller of llama.h meets under a policy (test-policy.cpp)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_the_ledger_keeps_its_invariants(run_native: Run) -> None:
    result = run_native("test-ledger")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "ERROR" not in result.stderr and "runtime error" not in result.stderr, result.stderr[-4000:]


def test_kept_sets_of_heads_follow_the_ledger(run_native: Run) -> None:
    result = run_native("test-units")
    assert result.returncode == 0 and "OK" in result.stdout, result.stdout[-4000:] + result.stderr[-4000:]
    assert "ERROR" not in result.stderr and "runtime error" not in result.stderr, result.stderr[-4000:]


def test_every_rule_is_its_formula(run_native: Run) -> None:
    result = run_native("test-formulas")
    assert result.returncode == 0 and "OK" in result.stdout, result.stdout[-4000:] + result.stderr[-4000:]
    assert "ERROR" not in result.stderr and "runtime error" not in result.stderr, result.stderr[-4000:]


@pytest.mark.parametrize("model", ["llama-gqa", "qwen2-gqa", "gemma3", "gpt-oss"])
def test_no_caller_of_llama_h_gets_a_wrong_answer(
    run_native: Run, model_file: Callable[[str], Path], model: str
) -> None:
    threads = "2" if model == "llama-gqa" else "1"  # victims are chosen by all threads
    result = run_native("test-policy", model_file(model), EQUIP_TEST_THREADS=threads)
    assert result.returncode == 0 and "OK" in result.stdout, result.stdout[-4000:] + result.stderr[-4000:]


@pytest.mark.parametrize("model", ["llama-gqa", "gemma3"])
def test_sums_composed_of_ggmls_operations_do_not_show_to_the_caller(
    run_native: Run, model_file: Callable[[str], Path], model: str
) -> None:
    """As on a device, which chooses victims itself where it can."""
    result = run_native("test-policy", model_file(model), LLAMA_KV_SCORES="graph")
    assert result.returncode == 0 and "OK" in result.stdout, result.stdout[-4000:] + result.stderr[-4000:]


@pytest.mark.parametrize("model", ["llama-gqa", "gemma3"])
def test_sinks_in_the_graph_and_a_rebase_do_not_show_to_the_caller(
    run_native: Run, model_file: Callable[[str], Path], model: str
) -> None:
    """The same with several sequences whose sinks are rewritten in the model's graph, and a re-base every 61 positions."""
    result = run_native("test-policy", model_file(model), LLAMA_KV_SINKS="graph", LLAMA_KV_REBASE_AT="61")
    assert result.returncode == 0 and "OK" in result.stdout, result.stdout[-4000:] + result.stderr[-4000:]
