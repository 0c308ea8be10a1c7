"""Sessions that share one cache, and take their steps together."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from equip_cli.core import limits, native
from equip_cli.core.closing import Owner
from equip_cli.core.errors import UsageError
from equip_cli.core.policy import CachePolicy
from equip_cli.core.session import Session
from equip_cli.core.session_options import native_arguments

if TYPE_CHECKING:
    from equip_cli.core.model import Model


class Pool(Owner):
    """Any number of conversations in one bounded cache: each evicts in place, and none is refused.

    Its sessions share the policy's `pool` of tokens: each keeps up to the budget. When the pool is full, the one that holds
    most above its share (pool / sessions that hold any) gives way to the one that grows. `step()`, `eval()` and
    `generate_tokens()` compute several of them in one batch, which costs little more than one does alone.

    policy: as `Session`'s. Where it names no `pool`, that is `"auto"`: a budget for each session, less where that would take more
        than half of the free memory. With the policy `none` they share llama.cpp's own cache, with room for n_ctx tokens of each.
    n_sessions: how many there can be at a time, up to 256.
    shares: False = each has a cache of its own, as large as the budget asks for, in the same batch.
    options: `Session`'s, but for `rope_upstream`.

    Sessions may be used from several threads: they wait for each other. Raises what `Session` raises; UnsupportedModelError for a
    model that has no pool (hybrid ones), BudgetError for a pool that cannot hold the least of each session.
    """

    _closed = "the pool is closed: make a new one"

    def __init__(
        self,
        model: Model,
        policy: CachePolicy | str | None = None,
        n_sessions: int = 4,
        *,
        shares: bool = True,
        **options: Any,
    ) -> None:
        limits.LANES.check(n_sessions, "n_sessions")
        if policy is None:
            policy = os.environ.get("LLAMA_KV_POLICY") or CachePolicy()
        if isinstance(policy, str):
            policy = CachePolicy.parse(policy)
        if policy.name != "none" and policy.pool is None and shares:
            policy = replace(policy, pool="auto")
        if policy.pool is not None and not shares:
            raise UsageError(
                "a pool that its sessions do not share has no size: leave pool out of the policy, or shares"
            )
        self.model = model
        self._native = native.load()
        text, given = native_arguments(policy, **options)
        out = self._native.ffi.new("equip_pool **")
        own: dict[str, object] = {"n_sessions": n_sessions, "unified": shares if policy.name == "none" else None}
        words = b",".join(part for part in (given, native.option_text(own)) if part)
        self._native.check(self._native.lib.equip_pool_create(out, model.handle, text, words))
        self._own(out[0], self._native.lib.equip_pool_free)
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        model.register(self)
        about = self.stats()
        if policy.name != "none":
            policy = replace(policy, budget=int(about["budget"]), pool=int(about["pool"]) or None)
        self.policy = policy
        self._chunk = int(about["n_ubatch"])

    def close(self) -> None:
        """Close its sessions and free the cache. A second call does nothing."""
        for session in list(self._sessions):
            session.close()
        self._free()

    def session(self) -> Session:
        """An empty session; closed, it gives its tokens' room back. Raises UsageError if all `n_sessions` are open."""
        out = self._native.ffi.new("equip_session **")
        self._native.check(self._native.lib.equip_pool_session(out, self.handle))
        session = Session.of_pool(self.model, out[0], self.policy)
        self._sessions.add(session)
        return session

    def stats(self) -> dict[str, Any]:
        """`{text, policy, budget, pool, n_sessions, n_open, n_slots, n_ubatch, kv_bytes}`; pool: 0 where each session has a cache
        of its own; n_slots: rows of the cache in all.
        """
        return dict(json.loads(self._native.text(self._native.lib.equip_pool_info(self.handle))))

    def step(
        self, sessions: Sequence[Session], tokens: Mapping[Session, Sequence[int]] | None = None
    ) -> list[int | None]:
        """A step of several sessions in one batch: each reads its `tokens`, or where it has none samples one.

        Returns what was sampled, None for those that read. A token that ends a turn is not in the cache, and sets `stopped`.
        Raises what `Session.eval()` and `Session.iter_tokens()` raise, UsageError for a session of another pool, one that is given
        twice, or one that has nothing to go on from; a session that has failed to evaluate what it sampled does so first
        in its next step.
        """
        given = {} if tokens is None else tokens
        if not given.keys() <= set(sessions):
            raise UsageError(
                "there are tokens for a session that takes no part in the step: name it among the sessions"
            )
        ffi, n = self._native.ffi, len(sessions)
        counts = [len(given.get(session, ())) for session in sessions]
        ids = [token for session in sessions for token in given.get(session, ())]
        sampled, told = ffi.new("int32_t[]", max(n, 1)), ffi.new("int32_t[]", counts)
        with self._busy(sessions) as handles:
            status = self._native.lib.equip_pool_step(handles, n, ffi.new("int32_t[]", ids), told, sampled, ffi.NULL)
        self._native.check(status)
        found: list[int | None] = [None if counts[i] else int(sampled[i]) for i in range(n)]
        for session, token in zip(sessions, found, strict=True):
            session.stopped = token is not None and self.model.is_eog(token)
        return found

    @contextmanager
    def _busy(self, sessions: Sequence[Session]) -> Iterator[Any]:
        """cffi's `equip_session *[]` of sessions that nobody closes meanwhile."""
        if len(set(sessions)) < len(sessions):
            raise UsageError("a session is given twice")
        with ExitStack() as stack:
            for session in sorted(sessions, key=id):  # in one order, so that two threads do not wait for each other
                stack.enter_context(session.busy)
            yield self._native.ffi.new("equip_session *[]", [session.handle for session in sessions])

    def eval(self, tokens: Mapping[Session, Sequence[int]]) -> None:
        """Append tokens to several sessions, a chunk of n_ubatch of all of them per native call.

        Raises what `step()` raises; each session's `stats()["n_past"]` counts what was read until then.
        """
        left = {session: list(ids) for session, ids in tokens.items() if len(ids) > 0}
        while left:
            n = max(1, self._chunk // len(left))
            self.step(list(left), {session: ids[:n] for session, ids in left.items()})
            left = {session: ids[n:] for session, ids in left.items() if len(ids) > n}

    def iter_tokens(self, sessions: Sequence[Session], n: int = -1) -> Iterator[tuple[Session, int]]:
        """Sample up to `n` tokens of each session (-1: until each ends its turn), a step at a time; yields them as they come."""
        limits.PREDICT.check(n, "n")
        active, done = list(sessions), 0
        while active and done != n:
            for session, token in zip(active, self.step(active), strict=True):
                assert token is not None
                yield session, token
            active = [session for session in active if not session.stopped]
            done += 1

    def generate_tokens(self, sessions: Sequence[Session], n: int = -1) -> list[list[int]]:
        """The same as lists, one per session."""
        found: dict[Session, list[int]] = {session: [] for session in sessions}
        for session, token in self.iter_tokens(sessions, n):
            found[session].append(token)
        return list(found.values())

    def time_decode(self, sessions: Sequence[Session], n: int, *, rewind: bool = False) -> tuple[list[int], list[int]]:
        """Time `n` steps of one token of each session, without sampling: nanoseconds per step, and the part outside graph compute.

        rewind: drop the tokens after each step, so that the cache stays at its size.
        """
        limits.COUNT.check(n, "n")
        ffi, lib = self._native.ffi, self._native.lib
        total, host = ffi.new("int64_t[]", max(n, 1)), ffi.new("int64_t[]", max(n, 1))
        with self._busy(sessions) as handles:
            status = lib.equip_pool_time_decode(handles, len(sessions), n, rewind, total, host)
        self._native.check(status)
        return (ffi.unpack(total, n), ffi.unpack(host, n)) if n > 0 else ([], [])
