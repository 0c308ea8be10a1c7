"""What of a running chat is on disk: the transcript after every turn, each token of an answer as it comes, and the cache."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equip_cli.chat import saved
from equip_cli.chat.saved import Journal, Lock
from equip_cli.chat.transcript import SavedTurn, Transcript
from equip_cli.core.errors import EquipError, UsageError
from equip_cli.core.memory import megabytes
from equip_cli.terminal import output, signals

if TYPE_CHECKING:
    from equip_cli.chat.conversation import Conversation

# a cache is saved again once this many times the time it took has gone by, so that saving costs a few percent at most
_REST = 20


@dataclass(frozen=True)
class CacheLimits:
    """How much is kept of caches: of the newest chats, n_most of them, at most bytes_most together; 0 = none."""

    n_most: int = 8
    bytes_most: int = 2 << 30


class Keeper:
    """One chat on disk. It gets its file when there is something to save.

    model_name: MODEL as it was typed, for a later call; options: of the session, as it was asked for.
    """

    def __init__(
        self,
        conversation: Conversation,
        model_name: str | None = None,
        options: dict[str, Any] | None = None,
        limits: CacheLimits | None = None,
    ) -> None:
        self.conversation = conversation
        self.model_name = model_name
        self.options = options or {}
        self.limits = limits or CacheLimits()
        self.path: Path | None = None
        self.name: str | None = None
        self._lock: Lock | None = None
        self._journal: Journal | None = None
        self._cache: dict[str, Any] | None = None  # what the saved cache holds
        self._cache_from = 0.0  # time at which it may be saved again
        self._saving = True

    # ---- turns

    def begin(self, user: str) -> None:
        """A message was entered: it is saved before it is answered."""
        self.save(with_cache=False, pending=user)

    def journaled(self, pieces: Iterator[str]) -> Generator[str, None, None]:
        """The pieces of an answer; what it is made of is on disk before they are shown."""
        with contextlib.suppress(OSError):
            self._journal = Journal(self.path) if self.path is not None and self._saving else None
        for piece in pieces:
            if self._journal is not None and self.conversation.turns:
                try:
                    self._journal.write(self.conversation.turns[-1].reply_ids)
                except OSError:
                    self._journal = None  # a full disk: the transcript will say so
            yield piece

    def save(self, *, with_cache: bool = True, pending: str | None = None) -> None:
        """Write the transcript, and the cache where that costs little. Says once if it fails.

        pending: a message that has no turn yet.
        """
        conversation = self.conversation
        if not self._saving or not (conversation.turns or pending):
            return
        try:
            with signals.deferred():
                self._open()
                if with_cache and time.monotonic() >= self._cache_from:
                    self.save_cache()
                self._write(pending)
                if self._journal is not None:
                    self._journal.close()
                    self._journal = None
        except EquipError as error:
            self._saving = False
            output.warn(f"this chat is not saved: {error}")

    def _open(self) -> Path:
        if self.path is None:
            path = saved.new_path()
            self._lock = Lock(path)
            self.path = path
        return self.path

    def _write(self, pending: str | None = None) -> None:
        conversation, stats = self.conversation, self.conversation.session.stats()
        turns = [
            SavedTurn(turn.user, turn.reply, turn.prompt_ids, turn.reply_ids, turn.complete)
            for turn in conversation.turns
        ]
        if pending is not None:
            turns.append(SavedTurn(pending, "", complete=False))
        Transcript(
            self.model_name,
            conversation.system,
            turns,
            name=self.name,
            policy=conversation.session.policy.text,
            options=self.options,
            n_kept=int(stats["n_used"]),
            cache=self._cache,
        ).save(self._open())

    # ---- the cache

    def save_cache(self) -> None:
        """Write the cache as it is; one warning where that fails, and the chat goes on."""
        if self.limits.n_most == 0 or self.limits.bytes_most == 0:
            return
        cache, session = saved.cache_path(self._open()), self.conversation.session
        n = self.conversation.n_read
        if self._cache is not None and self._cache["n"] == n and self._cache["file"] == saved.checksum(cache):
            return
        begin = time.monotonic()
        try:
            session.save(cache)
            if cache.stat().st_size > self.limits.bytes_most:
                cache.unlink()
                raise EquipError("it is larger than all saved caches may be together: raise --cache-limit")
            tokens = saved.digest(self.conversation.ids[:n])
            self._cache = {"n": n, "tokens": tokens, "file": saved.checksum(cache)}
            saved.prune_caches(self.limits.n_most, self.limits.bytes_most, self._open())
        except (EquipError, OSError) as error:
            self.limits = CacheLimits(0, 0)
            output.warn(f"the cache of this chat is not saved, its text is: {error}")
        now = time.monotonic()
        self._cache_from = now + _REST * (now - begin)

    def cache_words(self) -> str:
        """For /stats: size of the saved cache."""
        size = saved.cache_path(self.path).stat().st_size if self._cache and self.path else 0
        return f"{megabytes(size)}, {self._cache['n']} tokens" if size and self._cache else "(none)"

    # ---- going on

    def resume(self, path: Path, before: Transcript, *, same_cache: bool = True) -> None:
        """Go on with a saved chat, from its cache where that is possible, else by reading it; says which.

        same_cache: the session has the policy and the options that the chat was saved with.
        Raises UsageError if it is open in another process.
        """
        self._lock, self.path, self.name = Lock(path), path, before.name
        conversation = self.conversation
        conversation.restore(before.turns)
        tokens = saved.journaled(path)
        if tokens and conversation.turns and not conversation.turns[-1].complete:
            conversation.go_on(conversation.turns[-1], tokens)
        if before.model != self.model_name:
            why = "it was with another model"
        else:
            why = self._load_cache(path, before) if same_cache else "its policy or its options are other ones"
        n = len(conversation.ids) - conversation.n_read
        turns = f"{len(conversation.turns)} turns go on"
        if why:
            output.note(f"{turns}; reading {n} tokens again: {why}")
        else:
            output.note(f"{turns} where they were" + (f"; reading the newest {n} tokens" if n else ""))
        if conversation.turns and not conversation.turns[-1].complete:
            begun = conversation.turns[-1].reply
            output.note(f"the last answer was {'cut off' if begun else 'not begun'}: /regen answers anew")
        self.save(with_cache=False)  # with what the journal had
        with contextlib.suppress(OSError):
            saved.journal_path(path).unlink()
        conversation.catch_up()

    def _load_cache(self, path: Path, before: Transcript) -> str:
        """Take over the saved cache; why not, if that cannot be."""
        cache, held, ids = saved.cache_path(path), before.cache, self.conversation.ids
        if held is None or not cache.is_file():
            return "no cache of it is saved"
        if held["file"] != saved.checksum(cache) or held["tokens"] != saved.digest(ids[: held["n"]]):
            return "the saved cache is of another state of this chat"
        try:
            self.conversation.load_cache(cache)
        except EquipError as error:
            return str(error)
        self._cache = held
        return ""

    # ---- names

    def saved_name(self) -> str:
        """The chat's name, or that of its file."""
        self.save()
        if self.path is None:
            raise UsageError("nothing was said yet: there is nothing to save")
        return self.name or self.path.stem

    def rename(self, name: str) -> str:
        """Give the chat a name; returns it. Raises UsageError if another one has it."""
        self.saved_name()
        self.name = saved.check_name(name, self.path)
        self.save(with_cache=False)
        return self.name

    def delete(self, name: str) -> str:
        """Remove a saved chat, the open one too, which goes on as one that is not saved yet. Raises UsageError."""
        path = saved.named(name)
        if path == self.path:
            self._release()
        saved.delete(path)
        return name

    def load(self, name: str) -> None:
        """Go on with another chat in this session. Raises UsageError where that takes another model or policy."""
        path = saved.named(name)
        if path == self.path:
            raise UsageError(f"{name} is the chat that is open")
        before, session = Transcript.load(path), self.conversation.session
        if before.model != self.model_name or before.policy not in (None, session.policy.text):
            raise UsageError(
                f'that chat has another model or policy: leave with /exit, then: equip chat --continue "{name}"'
            )
        self.close()
        self.conversation.clear()
        self.conversation.system = before.system
        self.resume(path, before)

    def close(self) -> None:
        """Save what there is, the cache too, and let others have the chat."""
        self._cache_from = 0.0
        self.save()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = self.path = self.name = self._cache = None
