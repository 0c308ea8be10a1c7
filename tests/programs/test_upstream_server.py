"""Upstream's own tests of llama-server: the same pass and fail on the unpatched one and on ours."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from server_tests import EXPLAINED, VARIANTS, Results, ServerTestsError, bare, differences, other_failures, run_all
from serving import need_program

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(3600),  # the first run builds the unpatched server
    pytest.mark.skipif(os.name == "nt", reason="ends servers with signals"),
]


def unlike(variant: str, results: dict[str, Results]) -> list[str]:
    """What is not as EXPLAINED says: differences that it does not name, and names that are no difference."""
    found = differences(results["stock"], results[variant])
    explained = EXPLAINED[variant]
    said = [f"{variant}: {name}: {what}" for name, what in found.items() if bare(name) not in explained]
    stale = explained.keys() - {bare(name) for name in found}
    return said + [f"{variant}: {name} is explained, and no difference" for name in sorted(stale)]


# one test, so that one process runs the variants once
def test_upstreams_server_tests_pass_and_fail_as_on_the_unpatched_server(tmp_path: Path) -> None:
    need_program()
    try:
        results = run_all(list(VARIANTS), tmp_path, n_jobs=2)
    except ServerTestsError as error:
        if os.environ.get("EQUIP_CI_FULL") == "1" or os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))

    # most of them run: a model or a server that cannot start fails the same way everywhere
    outcomes = Counter(result.outcome for result in results["stock"].values())
    assert outcomes["passed"] >= 250 and outcomes["passed"] > 0.85 * outcomes.total(), outcomes

    assert not EXPLAINED["none"]
    said = [line for variant in VARIANTS if variant != "stock" for line in unlike(variant, results)]
    assert not said, "\n".join(said)

    # and where both fail, it is for the same reason, as far as the message tells
    assert not other_failures(results["stock"], results["none"])

    # the policies had something to do
    for variant, policy in VARIANTS.items():
        n_evicting = sum(result.n_evicted > 0 for result in results[variant].values())
        assert (n_evicting >= 20) if policy not in (None, "none") else (n_evicting == 0), (variant, n_evicting)
