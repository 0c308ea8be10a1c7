"""Conversations on disk: the state folder's copy of every chat, and files that the user asks for."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equip_cli.chat import thinking
from equip_cli.core import text
from equip_cli.core.errors import EquipError, UsageError

if TYPE_CHECKING:
    from equip_cli.chat.conversation import Conversation

FORMAT = 1


def state_folder() -> Path:
    """Where chats and the input history are kept: EQUIP_STATE_DIR, else the platform's state folder for `equip`.

    Raises EquipError where nobody knows the home folder.
    """
    import platformdirs

    given = os.environ.get("EQUIP_STATE_DIR")
    if given:
        return text.expand(given)
    try:
        folder = Path(platformdirs.user_state_dir("equip", appauthor=False))
    except RuntimeError:
        folder = Path()
    if not folder.is_absolute():
        raise EquipError("nobody knows the home folder: set HOME, or EQUIP_STATE_DIR to a folder for chats")
    return folder


def history_path() -> Path | None:
    """The file of what was typed; None where there is no place for it."""
    try:
        return state_folder() / "history"
    except EquipError:
        return None


def write_atomically(path: Path, content: str) -> None:
    """Write a whole file, which its owner alone may read, or nothing. Raises EquipError with one sentence."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(content)
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise EquipError(f"{path} cannot be written ({error.strerror}): choose another place or make room") from error


@dataclass
class Transcript:
    """What is needed to go on with a chat: MODEL as it was typed, the system prompt, and (message, reply) texts."""

    model: str | None
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it, atomically. Raises EquipError."""
        record = {"format": FORMAT, "model": self.model, "system": self.system, "turns": self.turns}
        content = json.dumps(record, ensure_ascii=False, indent=1)
        try:
            content.encode()
        except UnicodeEncodeError:  # the path of a model may be any bytes
            content = json.dumps(record, indent=1)
        write_atomically(path, content + "\n")

    @classmethod
    def load(cls, path: Path) -> Transcript:
        """Read what `save()` wrote. Raises EquipError."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']}")
            return cls(record["model"], record["system"], [(str(user), str(reply)) for user, reply in record["turns"]])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise EquipError(f"the saved chat {path} cannot be read ({error}): start a new one") from error


def new_path() -> Path:
    """A file for a new chat, empty, that no other chat has; later names sort behind earlier ones. Raises EquipError."""
    folder, stamp = state_folder() / "chats", time.strftime("%Y-%m-%dT%H-%M-%S")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for i in itertools.count(1):
            path = folder / f"{stamp}-{i:03d}.json"
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                break
    except OSError as error:
        raise EquipError(f"{folder} cannot be written ({error.strerror}): choose another place or make room") from error
    return path


def newest() -> Path:
    """The file of the chat that was saved last. Raises UsageError if there is none."""
    # an empty file belongs to a chat in which nothing was said yet
    found = [path for path in (state_folder() / "chats").glob("*.json") if path.stat().st_size]
    if not found:
        raise UsageError("there is no chat to continue: start one without --continue")
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if conversation.system is not None:
        messages.append({"role": "system", "content": conversation.system})
    for turn in conversation.turns:
        thought, answer = thinking.split(turn.reply, conversation.prompt_text(turn))
        messages.append({"role": "user", "content": turn.user})
        message = {"role": "assistant", "content": answer}
        messages.append(message | {"reasoning_content": thought} if thought else message)
    return messages


def export(conversation: Conversation, path: Path) -> None:
    """Write the conversation as Markdown (.md) or as a JSON list of messages (.json). Raises UsageError, EquipError."""
    messages = _messages(conversation)
    if path.suffix == ".json":
        write_atomically(path, json.dumps(messages, ensure_ascii=False, indent=2) + "\n")
    elif path.suffix == ".md":
        parts = []
        for message in messages:
            quoted = "".join(f"> {line}\n" for line in message.get("reasoning_content", "").splitlines())
            parts.append(f"## {message['role']}\n\n{quoted}{chr(10) if quoted else ''}{message['content']}\n")
        write_atomically(path, "\n".join(parts))
    else:
        raise UsageError(f"{path.name} ends neither in .md nor in .json: give one of them")
