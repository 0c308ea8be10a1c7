"""Many sequences in one bounded cache, by pages: `pool=N`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from models import Spec

from equip_cli import CachePolicy
from equip_cli.core.errors import BudgetError, UsageError

Run = Callable[..., "subprocess.CompletedProcess[str]"]
ModelFile = Callable[[Spec | str], Path]


def passes(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0 and "OK" in result.stdout, result.stdout[-4000:] + result.stderr[-4000:]


def test_each_sequence_of_a_pool_is_as_it_would_be_alone(run_native: Run, model_file: ModelFile) -> None:
    """A third of the policies."""
    passes(run_native("test-pool", model_file("llama-gqa"), "quick"))


@pytest.mark.full
@pytest.mark.parametrize(("model", "mode"), [("llama-gqa", ()), ("gemma3", ("quick",)), ("gpt-oss", ("quick",))])
def test_each_sequence_of_a_pool_is_as_it_would_be_alone_under_every_policy(
    run_native: Run, model_file: ModelFile, model: str, mode: tuple[str, ...]
) -> None:
    """Logits, weights and kept sets beside others and alone; shares; states; cancelled steps; refusals; any operations."""
    passes(run_native("test-pool", model_file(model), *mode))


def test_sinks_are_rewritten_for_each_sequence_in_the_graph_too(run_native: Run, model_file: ModelFile) -> None:
    passes(run_native("test-pool", model_file("llama-gqa"), "2", "60", LLAMA_KV_SINKS="graph"))


def test_sums_are_composed_for_each_sequence_too(run_native: Run, model_file: ModelFile) -> None:
    passes(run_native("test-pool", model_file("llama-gqa"), "4", "60", LLAMA_KV_SCORES="graph"))


def test_a_pool_is_re_based_one_sequence_at_a_time(run_native: Run, model_file: ModelFile) -> None:
    passes(run_native("test-pool", model_file("gemma3"), "3", "100", LLAMA_KV_REBASE_AT="40"))


@pytest.mark.full
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("model", ["llama-gqa", "gemma3"])
def test_no_row_has_two_owners_and_no_page_is_lost(
    run_native: Run, model_file: ModelFile, model: str, seed: int
) -> None:
    """1,400 operations for each of 15 policies: 100,000 on each model."""
    passes(run_native("test-pool", model_file(model), str(10 + seed), "1400"))


def test_a_pool_is_a_setting_of_a_policy() -> None:
    assert CachePolicy("streaming", budget=512, pool=2048).text == "streaming:budget=512,pool=2048"
    assert CachePolicy.parse("streaming:pool=2048").pool == 2048
    with pytest.raises(UsageError, match="does not divide the pages of a pool"):
        CachePolicy("pagedeviction", pool=2048, page_size=24)
    with pytest.raises(UsageError, match="update=inplace"):
        CachePolicy("streaming", pool=2048, update="gather")
    with pytest.raises(BudgetError, match="pool is 0"):
        CachePolicy("streaming", pool=0)
