"""Conversations on disk: the state folder's copy of every chat, and files that the user asks for."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equip_cli import thinking
from equip_cli.errors import EquipError, UsageError

if TYPE_CHECKING:
    from equip_cli.conversation import Conversation

FORMAT = 1


def state_folder() -> Path:
    """Where chats and the input history are kept: EQUIP_STATE_DIR, else the platform's state folder for `equip`."""
    import platformdirs

    given = os.environ.get("EQUIP_STATE_DIR")
    return Path(given).expanduser() if given else Path(platformdirs.user_state_dir("equip", appauthor=False))


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing. Raises EquipError with one sentence."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
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
        write_atomically(path, json.dumps(record, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Transcript:
        """Read what `save()` wrote. Raises EquipError."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']}")
            return cls(record["model"], record["system"], [(str(user), str(reply)) for user, reply in record["turns"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EquipError(f"the saved chat {path} cannot be read ({error}): start a new one") from error


def new_path() -> Path:
    """A name for a new chat's file, unique within the folder; later names sort behind earlier ones."""
    stamp = time.strftime("%Y-%m-%dT%H-%M-%S")
    return state_folder() / "chats" / f"{stamp}-{os.getpid()}.json"


def newest() -> Path:
    """The file of the chat that was saved last. Raises UsageError if there is none."""
    found = list((state_folder() / "chats").glob("*.json"))
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
