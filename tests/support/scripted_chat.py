"""A chat with the real screen, and a model that says what a file holds: scripted_chat.py ANSWER GATE [--plain]

A line `<<<>>>` of the file is not said: there the answer waits until the file GATE exists. A piece of the answer is three
characters long.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from equip_cli.chat.messages import PlainTerminal, Terminal, is_dumb, piped_messages
from equip_cli.chat.screen import COMMANDS, Chat, stdin_is_terminal

STATS = {
    "n_ctx": 4096, "policy": "streaming", "budget": 1024, "predicted_n": 0, "predicted_us": 0, "n_used": 1024,
    "n_evicted": 123456,
}  # fmt: skip


class Session:
    def __init__(self) -> None:
        self.now: dict[str, Any] = dict(STATS)

    def stats(self) -> dict[str, Any]:
        return dict(self.now)


class Conversation:
    def __init__(self, answer: str, gate: Path) -> None:
        self.session = Session()
        self.system = None
        self.turns: list[SimpleNamespace] = []
        self._parts, self._gate = answer.split("<<<>>>\n"), gate

    def prompt_text(self, _turn: object) -> str:
        return ""

    def say(self, user: str, _n: int = -1) -> Generator[str, None, None]:
        turn = SimpleNamespace(user=user, reply="", complete=True)
        self.turns.append(turn)
        for part in self._parts:
            if turn.reply:
                while not self._gate.exists():
                    time.sleep(0.02)
            for at in range(0, len(part), 3):
                turn.reply += part[at : at + 3]
                self.session.now["predicted_n"] += 1
                self.session.now["predicted_us"] += 10_000
                yield part[at : at + 3]


def main() -> int:
    answer, gate, *flags = sys.argv[1:]
    conversation: Any = Conversation(Path(answer).read_bytes().decode(), Path(gate))
    keeper: Any = SimpleNamespace(begin=lambda user: None, journaled=lambda pieces: pieces, save=lambda: None)
    chat = Chat(conversation, interactive=stdin_is_terminal(), plain="--plain" in flags, keeper=keeper)
    if not stdin_is_terminal():
        chat.run_messages(piped_messages())
        return 0
    return chat.run_terminal(Terminal(None, COMMANDS).read if not is_dumb() else PlainTerminal().read)


if __name__ == "__main__":
    sys.exit(main())
