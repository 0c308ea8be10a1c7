"""The saved chats as a table, or as records."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equip_cli.chat.saved import SavedChat
from equip_cli.core import text
from equip_cli.core.memory import megabytes
from equip_cli.terminal.columns import from_rows, table

_HEADER = ["name", "first words", "model", "tokens", "kept", "when", "size"]


def _short(words: str, n: int) -> str:
    words = text.visible(words)
    return words if len(words) <= n else words[: n - 3] + "..."


def as_text(chats: Sequence[SavedChat], current: Path | None = None) -> str:
    """A table, the newest chat first; the one that is open has a star."""
    if not chats:
        return "no chat is saved\n"
    rows = [
        [
            _short(chat.name, 30) + (" *" if chat.path == current else ""),
            _short(chat.first_words, 30),
            _short(Path(chat.model or "(embedded)").name, 30),
            str(chat.n_tokens or "?"),
            "?" if chat.n_kept is None else str(chat.n_kept),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(chat.when)),
            megabytes(chat.size),
        ]
        for chat in chats
    ]
    return table(from_rows(_HEADER, rows))


def as_records(chats: Sequence[SavedChat]) -> list[dict[str, Any]]:
    """For --json: sizes in bytes, times in seconds since 1970."""
    return [
        {
            "name": chat.name,
            "first_words": chat.first_words,
            "model": chat.model,
            "n_tokens": chat.n_tokens,
            "n_kept": chat.n_kept,
            "when": chat.when,
            "bytes": chat.size,
            "path": str(chat.path),
        }
        for chat in chats
    ]
