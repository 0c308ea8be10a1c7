"""Nothing grows while a bounded session runs: 20k tokens in the full tier, 200k by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from equip_cli import CachePolicy, Model, Session
from equip_cli.core.memory import rss_bytes

MAX_BYTES_PER_TOKEN = 16  # the transcript
SLACK = 1 << 20  # an allocator keeps pages


def grown(session: Session, n_tokens: int, step: int) -> int:
    """Bytes of resident memory that n_tokens single-token steps at a full cache add."""
    session.time_decode(step)
    before = rss_bytes()
    for _ in range(n_tokens // step):
        session.time_decode(step)
    return rss_bytes() - before


@pytest.mark.parametrize("positions", ["cache", "true"])
@pytest.mark.parametrize(
    "n_tokens", [pytest.param(20_000, marks=pytest.mark.full), pytest.param(200_000, marks=pytest.mark.soak)]
)
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_the_stream(tiny_model: Path, positions: str, n_tokens: int) -> None:
    policy = CachePolicy("streaming", budget=256, positions=positions)
    with Model(tiny_model) as model, model.session(policy, n_threads=1) as session:
        session.eval([1] * 300)
        growth = grown(session, n_tokens, 1000)
        stats = session.stats()
        assert stats["n_used"] == 256 and stats["n_past"] == 300 + 1000 + n_tokens
        assert stats["n_evicted"] == stats["n_past"] - 256
        assert stats["graphs_reused"] >= n_tokens
        assert growth <= MAX_BYTES_PER_TOKEN * n_tokens + SLACK, f"{growth} bytes for {n_tokens} tokens"
