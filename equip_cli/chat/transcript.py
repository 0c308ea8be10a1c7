"""Conversations on disk: the state folder's copy of every chat, and files that the user asks for."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from equip_cli.chat import thinking
from equip_cli.core import text
from equip_cli.core.errors import EquipError, UsageError

if TYPE_CHECKING:
    from equip_cli.chat.conversation import Conversation

FORMAT = 2


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


def folder() -> Path:
    """Of the saved chats. Raises EquipError as `state_folder()` does."""
    return state_folder() / "chats"


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


class SavedTurn(NamedTuple):
    """A message and its answer, as text and as tokens; without tokens where an older release has saved it."""

    user: str
    reply: str
    prompt_ids: array[int] | None = None
    reply_ids: array[int] | None = None
    complete: bool = True


@dataclass
class Transcript:
    """What is needed to go on with a chat.

    model: MODEL as it was typed. policy: as text, with its budget; options: of the session, where they are not the default.
    n_kept: tokens that can still be read. cache: what the saved cache holds, `{n, tokens, file}`: its number of tokens, their
    digest, and the checksum of the file that was written with them.
    """

    model: str | None
    system: str | None = None
    turns: list[SavedTurn] = field(default_factory=list)
    name: str | None = None
    policy: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    n_kept: int | None = None
    cache: dict[str, Any] | None = None

    @property
    def n_tokens(self) -> int:
        """Of all turns; 0 where an older release has saved them."""
        return sum(len(ids) for turn in self.turns for ids in (turn.prompt_ids, turn.reply_ids) if ids is not None)

    def save(self, path: Path) -> None:
        """Write it, atomically. Raises EquipError."""
        record = {"format": FORMAT, **vars(self)}
        record["turns"] = [[list(each) if isinstance(each, array) else each for each in turn] for turn in self.turns]
        content = json.dumps(record, ensure_ascii=False)
        try:
            content.encode()
        except UnicodeEncodeError:  # the path of a model may be any bytes
            content = json.dumps(record)
        write_atomically(path, content + "\n")

    @classmethod
    def load(cls, path: Path) -> Transcript:
        """Read what `save()` wrote, also that of the release before. Raises EquipError."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] == 1:
                turns = [SavedTurn(str(user), str(reply)) for user, reply in record["turns"]]
                return cls(record["model"], record["system"], turns)
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']}")
            turns = [_turn(each) for each in record["turns"]]
            keys = ("model", "system", "name", "policy", "n_kept")
            return cls(
                turns=turns,
                options=dict(record["options"]),
                cache=record["cache"],
                **{key: record[key] for key in keys},
            )
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise EquipError(f"the saved chat {path} cannot be read ({error}): start a new one") from error


def _turn(record: Sequence[Any]) -> SavedTurn:
    user, reply, prompt_ids, reply_ids, complete = record
    first, second = (None if each is None else array("i", each) for each in (prompt_ids, reply_ids))
    return SavedTurn(str(user), str(reply), first, second, bool(complete))


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
