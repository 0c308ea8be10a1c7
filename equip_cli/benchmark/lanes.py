"""Several sequences in one batch, measured as one cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from equip_cli.core.closing import Closing

if TYPE_CHECKING:
    from equip_cli.core.model import Model
    from equip_cli.core.pool import Pool


class Lanes(Closing):
    """All sessions of a pool, with what a measurement asks of a `Session`: each reads, and writes, as many tokens."""

    def __init__(self, pool: Pool, n: int) -> None:
        self._pool = pool
        self._sessions = [pool.session() for _ in range(n)]

    def close(self) -> None:
        """Close their pool. A second call does nothing."""
        self._pool.close()

    @property
    def model(self) -> Model:
        """Theirs."""
        return self._pool.model

    def eval(self, tokens: Sequence[int]) -> None:
        """Append these tokens to each."""
        self._pool.eval(dict.fromkeys(self._sessions, tokens))

    def fill(self, n: int) -> None:
        """As `Session.fill()`, each. Raises what that raises."""
        for session in self._sessions:
            session.fill(n)

    def hold(self, depth: int) -> None:
        """Take back what was added to `depth` tokens, where nothing was evicted for it."""
        for session in self._sessions:
            stats = session.stats()
            if stats["n_evicted"] == 0 and stats["n_past"] > depth:
                session.rewind(depth)

    def time_decode(self, n: int, *, rewind: bool = False) -> tuple[list[int], list[int]]:
        """As `Pool.time_decode()`, with all of them."""
        return self._pool.time_decode(self._sessions, n, rewind=rewind)

    def stats(self) -> dict[str, Any]:
        """The first one's, with the budget that each may have at most."""
        return self._sessions[0].stats() | {"budget": self._pool.stats()["budget"]}
