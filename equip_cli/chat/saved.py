"""The chats that are kept: one file each, with a name, a lock, and beside it the cache as it was left.

The transcript is what counts. The cache only saves reading it again, is checked against it, and may be missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock

from equip_cli.chat.transcript import Transcript, folder
from equip_cli.core.errors import EquipError, UsageError

_LOCKED = "this chat is open in another process: close it there, or start a new chat"


@dataclass(frozen=True)
class SavedChat:
    """A chat on disk. size: bytes, its cache included; when: seconds since 1970; n_kept: None where nobody knows."""

    path: Path
    name: str
    first_words: str
    model: str | None
    n_tokens: int
    n_kept: int | None
    when: float
    size: int


def cache_path(path: Path) -> Path:
    """The file of a chat's cache."""
    return path.with_suffix(".cache")


def journal_path(path: Path) -> Path:
    """The file of the answer that is being made."""
    return path.with_suffix(".answer")


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _files() -> list[Path]:
    """Of all chats, the newest first; an empty file belongs to a chat in which nothing was said yet."""
    found = [path for path in folder().glob("*.json") if _size(path)]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def all_chats() -> list[SavedChat]:
    """Every chat that can be read, the newest first."""
    chats = []
    for path in _files():
        with contextlib.suppress(EquipError):
            kept = Transcript.load(path)
            words = " ".join(kept.turns[0].user.split()) if kept.turns else ""
            size = _size(path) + _size(cache_path(path))
            chats.append(
                SavedChat(
                    path,
                    kept.name or path.stem,
                    words,
                    kept.model,
                    kept.n_tokens,
                    kept.n_kept,
                    path.stat().st_mtime,
                    size,
                )
            )
    return chats


def find(name: str) -> Path | None:
    """The file of the chat with this name, or of the one whose name alone begins so; None if there is none."""
    chats = all_chats()
    exact = [chat.path for chat in chats if name in (chat.name, chat.path.stem)]
    begun = [chat.path for chat in chats if chat.name.startswith(name)] if name else []
    return exact[0] if exact else begun[0] if len(begun) == 1 else None


def newest() -> Path:
    """The file of the chat that was saved last. Raises UsageError if there is none."""
    found = _files()
    if not found:
        raise UsageError("there is no chat to continue: start one without --continue")
    return found[0]


def named(name: str) -> Path:
    """The file of a chat. Raises UsageError that tells of others."""
    path = find(name)
    if path is None:
        names = [chat.name for chat in all_chats()[:5]]
        others = f"the newest are {', '.join(names)}" if names else "there is none"
        raise UsageError(f"there is no saved chat {name}: {others}; equip chat --list shows all of them")
    return path


def check_name(name: str, path: Path | None) -> str:
    """A name that a chat may have. Raises UsageError if another chat than `path` has it, or if it is none."""
    name = " ".join(name.split())
    if not name or name.startswith("-") or len(name) > 80 or "/" in name:
        raise UsageError("a chat's name has 1 to 80 characters, no slash, and begins with no hyphen")
    other = next((chat for chat in all_chats() if name in (chat.name, chat.path.stem)), None)
    if other is not None and other.path != path:
        raise UsageError(f"another chat has the name {name}: give another name, or /delete that one")
    return name


def new_path() -> Path:
    """A file for a new chat, empty, that no other chat has; later names sort behind earlier ones. Raises EquipError."""
    place, stamp = folder(), time.strftime("%Y-%m-%dT%H-%M-%S")
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        for i in itertools.count(1):
            path = place / f"{stamp}-{i:03d}.json"
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                break
    except OSError as error:
        raise EquipError(f"{place} cannot be written ({error.strerror}): choose another place or make room") from error
    return path


class Lock:
    """A chat is open in one process at a time. Raises UsageError if it is in another one."""

    def __init__(self, path: Path) -> None:
        self._lock = filelock.FileLock(path.with_suffix(".lock"), timeout=0, mode=0o600)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise UsageError(_LOCKED) from None
        except OSError as error:
            raise EquipError(
                f"{path.parent} cannot be written ({error.strerror}): choose another place or make room"
            ) from error

        # what a process left behind that was killed while it wrote
        for left in (*path.parent.glob(f"{path.stem}.cache.*.tmp"), *path.parent.glob(f".{path.name}.*")):
            with contextlib.suppress(OSError):
                left.unlink()

    def release(self) -> None:
        """Others may have it. The file goes: it says nothing."""
        place = Path(self._lock.lock_file)
        self._lock.release()
        with contextlib.suppress(OSError):
            place.unlink()


def delete(path: Path) -> None:
    """Remove a chat and all that belongs to it. Raises UsageError if it is open elsewhere, EquipError."""
    lock = Lock(path)
    try:
        for each in (cache_path(path), journal_path(path), path):
            each.unlink(missing_ok=True)
    except OSError as error:
        raise EquipError(
            f"{error.filename} cannot be removed ({error.strerror}): check what you may do there"
        ) from error
    finally:
        lock.release()


def prune_caches(n_most: int, bytes_most: int, current: Path) -> None:
    """Keep the caches of the newest chats: at most so many, of at most so many bytes together; that of `current` counts first."""
    n, total = 1, _size(cache_path(current))
    for path in _files():
        cache = cache_path(path)
        if path == current or not cache.is_file():
            continue
        n, total = n + 1, total + _size(cache)
        if n > n_most or total > bytes_most:
            with contextlib.suppress(OSError):
                cache.unlink()


def digest(tokens: Iterable[int]) -> str:
    """What tells one sequence of tokens from another."""
    state = hashlib.sha256()
    for token in tokens:
        state.update(int(token).to_bytes(4, "little", signed=True))
    return state.hexdigest()


def checksum(cache: Path) -> str:
    """The last bytes of a saved cache, where its checksum stands; empty if there is no such file."""
    with contextlib.suppress(OSError), cache.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 8))
        return file.read().hex()
    return ""


class Journal:
    """The tokens of the answer that is being made, on disk as they come: what was answered outlives a process that is killed."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._path = journal_path(path)
        self._file = os.open(self._path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        self._n = 0

    def write(self, tokens: Iterable[int]) -> None:
        """All tokens of the answer so far; those that are new are appended."""
        new = list(itertools.islice(tokens, self._n, None))
        self._n += len(new)
        if new:
            os.write(self._file, "".join(f"{token}\n" for token in new).encode("ascii"))

    def close(self) -> None:
        """The answer is in the transcript."""
        os.close(self._file)
        with contextlib.suppress(OSError):
            self._path.unlink()


def journaled(path: Path) -> list[int]:
    """The tokens of an answer that was being made when its process ended; none if there is nothing of the kind."""

    def tokens() -> Iterator[int]:
        # the last line may be cut off
        lines = journal_path(path).read_text(encoding="ascii").split("\n")[:-1]
        yield from (int(line) for line in lines)

    with contextlib.suppress(OSError, ValueError):
        return list(tokens())
    return []
