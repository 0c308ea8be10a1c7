"""A chat as its user sees it: answers as they come, commands that begin with a slash, and a file of every chat."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from equip_cli.chat import chat_list, context_view, saved, thinking, transcript
from equip_cli.chat.answer import Answer
from equip_cli.chat.keeper import Keeper
from equip_cli.chat.messages import Message, is_dumb
from equip_cli.core import text
from equip_cli.core.errors import ContextFullError, EquipError, UsageError
from equip_cli.core.memory import megabytes
from equip_cli.core.policy import choice, choice_words
from equip_cli.terminal import output, signals
from equip_cli.terminal.columns import listing

if TYPE_CHECKING:
    from rich.console import Console

    from equip_cli.chat.conversation import Conversation

HELP = {
    "/help": "this list",
    "/clear": "start over; the system prompt stays",
    "/regen": "answer the last message anew",
    "/undo": "take the last message and its answer back",
    "/read FILE": "put a text file before the next message",
    "/system TEXT": "replace the system prompt; without TEXT, show it",
    "/save NAME": "keep the chat under this name; with .md or .json: write it to a file",
    "/load NAME": "go on with another saved chat",
    "/rename NAME": "give the chat another name",
    "/delete NAME": "remove a saved chat",
    "/list": "the saved chats",
    "/stats": "tokens, speed and memory",
    "/context": "what the model can still read; /context all: from the beginning",
    "/exit": "leave, as Ctrl-D does",
}
# options that somebody may try to change by a command: why that is impossible, and what to write in the option's place
_RULE = "keys rotated under one rule cannot be mixed with those of another"
_SIZE = "the cache is laid out when a chat begins"
_GONE = "what is gone was chosen by the old rule"
FIXED = {
    "/policy": (_RULE, "NAME"),
    "/positions": (_RULE, "RULE"),
    "/rotate-every": (_RULE, "N"),
    "/scope": (_RULE, "SCOPE"),
    "/score-queries": (_GONE, "N"),
    "/evict-every": (_GONE, "N"),
    "/page-size": (_GONE, "N"),
    "/budget": (_SIZE, "B"),
    "/sinks": (_SIZE, "S"),
    "/recent": (_SIZE, "R"),
}
KEYS = (
    '""" begins and ends a message of several lines; Alt-Enter is a line break',
    "Ctrl-C stops an answer",
)
COMMANDS = [usage.split()[0] for usage in HELP]


class Leave(Exception):
    """The user wants to go."""


def _is_command(message: Message) -> bool:
    """A slash begins a command, but not in a block, twice, or in what can only be a path."""
    name = message.text.split(maxsplit=1)[0] if message.text.strip() else ""
    return message.text.startswith("/") and not message.is_text and "/" not in name[1:]


def make_console(*, stderr: bool = False) -> Console:
    """rich's console for stdout or stderr; NO_COLOR switches off every escape sequence, not only colours, and so does a
    terminal that cannot move its cursor."""
    from rich.console import Console

    plain = bool(os.environ.get("NO_COLOR")) or is_dumb()
    return Console(stderr=stderr, highlight=False, color_system=None if plain else "auto", no_color=plain)


class Chat:
    """One conversation, shown.

    n_predict: most tokens of an answer, -1 = until the model ends it; as_json: one object per turn on stdout.
    interactive: a person types; keeper: what is saved, and where.
    plain: answers are shown as they are written, on a terminal too.
    """

    def __init__(
        self,
        conversation: Conversation,
        *,
        n_predict: int = -1,
        as_json: bool = False,
        interactive: bool = False,
        plain: bool = False,
        keeper: Keeper | None = None,
        console: Console | None = None,
    ) -> None:
        self.conversation = conversation
        self.n_predict = n_predict
        self.as_json = as_json
        self.interactive = interactive
        self.plain = plain
        self.keeper = keeper or Keeper(conversation)
        self.console = console or make_console()
        self._side = make_console(stderr=True)
        self._attached = ""
        self._exported: set[Path] = set()

    @property
    def _coloured(self) -> bool:
        return self.console.is_terminal and self.console.color_system is not None

    # ---- turns

    def handle(self, message: Message | str) -> None:
        """A message or a command. Raises Leave, KeyboardInterrupt, EquipError."""
        said = message if isinstance(message, Message) else Message(message, is_text="\n" in message)
        words = said.text
        if _is_command(said):
            self._command(words)
        elif words.strip():
            words = words[1:] if words.startswith("//") and not said.is_text else words
            words, self._attached = self._attached + words, ""
            self.keeper.begin(words)
            self._answer(self.conversation.say(words, self.n_predict), len(self.conversation.turns) + 1)

    def _answer(self, pieces: Generator[str, None, None], n_turns: int) -> None:
        """Show an answer; there are `n_turns` turns then, one less if the cache was too full for it."""
        stats = self.conversation.session.stats()
        try:
            self._show(self.keeper.journaled(pieces))
        except ContextFullError:
            raise ContextFullError(
                f"the cache of {stats['n_ctx']} tokens is full and the policy none evicts nothing: go on with "
                "`equip chat --continue --policy streaming`, or with --continue and a larger -c"
            ) from None
        finally:
            pieces.close()  # after a Ctrl-C the answer is still being made
            self.keeper.save()
            if 0 < n_turns == len(self.conversation.turns):
                self._finish(stats)

    def _show(self, pieces: Generator[str, None, None]) -> None:
        """Print the answer as it comes."""
        if self.as_json:
            for _ in pieces:
                pass
            return
        splitter = None
        is_terminal = sys.stdout is not None and sys.stdout.isatty()
        answer = Answer(formatted=is_terminal and not self.plain and not is_dumb(), coloured=self._coloured)
        try:
            for piece in pieces:
                if splitter is None:
                    splitter = thinking.Splitter(self.conversation.prompt_text(self.conversation.turns[-1]))
                for part in splitter.feed(piece):
                    answer.show(*part)
            if splitter is not None:
                for part in splitter.feed("", final=True):
                    answer.show(*part)
        finally:
            answer.close()

    def _finish(self, before: dict[str, Any]) -> None:
        """The object of the last turn, or its status line; `before`: the session's numbers when it began."""
        turn, stats = self.conversation.turns[-1], self.conversation.session.stats()
        n, microseconds = (stats[key] - before[key] for key in ("predicted_n", "predicted_us"))
        rate = n / microseconds * 1e6 if microseconds else 0.0
        if self.as_json:
            thought, answer = thinking.split(turn.reply, self.conversation.prompt_text(turn))
            record = {
                "role": "assistant",
                "content": answer,
                "reasoning_content": thought or None,
                "complete": turn.complete,
                "n_prompt": stats["prompt_n"] - before["prompt_n"],
                "n_gen": n,
                **{key: stats[key] for key in ("policy", "budget", "n_used", "n_evicted", "n_past")},
                **choice(stats),
                "predicted_per_second": rate,
            }
            output.result(json.dumps(record, ensure_ascii=False) + "\n")
        elif self.interactive:
            size = stats["n_ctx"] if stats["policy"] == "none" else stats["budget"]
            self._say(
                (3, f"{n} tokens, {rate:.0f} per second"),
                (1, f"{stats['n_used']} of {size} slots used"),
                (2, f"{stats['n_evicted']} evicted"),
            )

    def _say(self, *parts: tuple[int, str]) -> None:
        """A line beside the conversation, on stderr: parts with their ranks; the last ranks go where the line is too long."""
        from rich.text import Text

        def line(ranks: int) -> str:
            return " | ".join(part for rank, part in parts if rank <= ranks)

        room = self._side.width - 2 if self._side.is_terminal else sys.maxsize
        fitting = next((line(n) for n in range(len(parts), 1, -1) if len(line(n)) <= room), line(1)[: max(room, 0)])
        self._side.print(Text(f"[{fitting}]", style="dim"), soft_wrap=True)

    # ---- commands

    def _command(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/clear": self._clear,
            "/regen": self._regenerate,
            "/undo": self._undo,
            "/read": self._read,
            "/system": self._system,
            "/save": self._save,
            "/load": self._load,
            "/rename": self._rename,
            "/delete": self._delete,
            "/list": self._list,
            "/stats": self._stats,
            "/context": self._context,
            "/exit": self._exit,
            "/quit": self._exit,
        }
        if name in FIXED:
            self._refuse(name, argument.strip())
        if name not in commands:
            raise UsageError(f"there is no command {name}: /help lists them; // begins a message with a slash")
        commands[name](argument.strip())

    def _refuse(self, name: str, argument: str) -> NoReturn:
        reason, value = FIXED[name]
        option = f"--{name[1:]} {argument or value}"
        go_on = f"`equip chat {option}`"
        if self.conversation.turns:
            go_on = f"`equip chat --continue {option}`, which reads the conversation again"
        raise UsageError(
            f"{name[1:]} cannot change within a chat, because {reason}: leave with /exit, and go on with {go_on}"
        )

    def _help(self, _argument: str) -> None:
        if not self.console.is_terminal:
            output.result(listing(HELP) + "".join(f"{line}\n" for line in KEYS))
            return
        widest = max(map(len, HELP))
        lines = [
            *(line for usage, words in HELP.items() for line in self._fitted(words, usage.ljust(widest + 2))),
            *(line for words in KEYS for line in self._fitted(words)),
        ]
        with self._paged(len(lines)):
            for line in lines:
                self.console.print(line, markup=False, emoji=False, no_wrap=True)

    def _fitted(self, words: str, first: str = "") -> list[str]:
        """A sentence in lines of the terminal's width; first: what stands before it, as wide a margin for the others."""
        width = max(self.console.width, len(first) + 10)
        return textwrap.wrap(words, width, initial_indent=first, subsequent_indent=" " * len(first))

    def _paged(self, n: int, beside: int = 0) -> AbstractContextManager[object]:
        """A pager for what the console prints within, if `n` lines and `beside` others do not fit the screen."""
        if self.console.is_terminal and n + beside + 2 > self.console.height:
            os.environ.setdefault("LESS", "-R")  # else it shows the escape sequences of styles
            return self.console.pager(styles=self._coloured)
        return contextlib.nullcontext()

    def _clear(self, _argument: str) -> None:
        self.keeper.close()
        self.conversation.clear()
        output.note("the conversation is empty")

    def _regenerate(self, _argument: str) -> None:
        self._answer(self.conversation.regenerate(self.n_predict), len(self.conversation.turns))

    def _undo(self, _argument: str) -> None:
        turn = self.conversation.undo()
        line = " ".join(turn.user.split())
        output.note(f"taken back: {line if len(line) < 60 else line[:57] + '...'}")
        self.conversation.catch_up()
        self.keeper.save()

    def _read(self, argument: str) -> None:
        if not argument:
            raise UsageError("/read needs the path of a text file")
        argument = text.typed_path(argument)
        content = text.read(argument, "file")
        self._attached += content.rstrip("\n") + "\n\n"
        output.note(f"{len(content)} characters of {argument} will stand before your next message")

    def _system(self, argument: str) -> None:
        if not argument:
            output.result((self.conversation.system or "(no system prompt)") + "\n")
            return
        self.conversation.set_system(argument)
        self.conversation.catch_up()
        self.keeper.save()

    def _save(self, argument: str) -> None:
        argument = text.typed_path(argument)
        if "/" not in argument and not re.search(r"\.\w{1,8}$", argument):
            output.note(f"saved as {self.keeper.rename(argument) if argument else self.keeper.saved_name()}")
            return
        path = text.expand(argument)
        if os.path.lexists(path) and path.absolute() not in self._exported:
            raise UsageError(f"{path} is there already: give another name, or remove it first")
        transcript.export(self.conversation, path)
        self._exported.add(path.absolute())
        output.note(f"saved {path}")

    def _load(self, argument: str) -> None:
        if not argument:
            raise UsageError("/load needs the name of a chat: /list shows them")
        self.keeper.load(argument)

    def _rename(self, argument: str) -> None:
        output.note(f"the chat's name is {self.keeper.rename(argument)}")

    def _delete(self, argument: str) -> None:
        if not argument:
            raise UsageError("/delete needs the name of a chat: /list shows them")
        output.note(f"deleted {self.keeper.delete(argument)}")

    def _list(self, _argument: str) -> None:
        output.result(chat_list.as_text(saved.all_chats(), self.keeper.path))

    def _stats(self, _argument: str) -> None:
        stats = self.conversation.session.stats()

        def rate(n: int, microseconds: int) -> str:
            return f"{n} tokens, {n / microseconds * 1e6:.1f} per second" if microseconds else f"{n} tokens"

        size = stats["n_ctx"] if stats["policy"] == "none" else stats["budget"]
        positions = stats["positions"]
        if positions == "auto":
            positions += f" ({stats['positions_now']} now)"
        words = (stats["policy"], stats["scope"], positions, stats["update"])
        rows = {
            "policy": ", ".join(filter(None, (*words, *choice_words(choice(stats))))),
            "readable": f"{stats['n_used']} of {size} slots",
            "evicted": f"{stats['n_evicted']} of {stats['n_past']} tokens",
            "cache": megabytes(stats["kv_bytes"]),
            "read": rate(stats["prompt_n"], stats["prompt_us"]),
            "generated": rate(stats["predicted_n"], stats["predicted_us"]),
            "graphs reused": str(stats["graphs_reused"]),
            "threads": f"{stats['n_threads_now']} of {stats['n_threads']}",
            "saved as": str(self.keeper.path) if self.keeper.path else "(not saved)",
            "saved cache": self.keeper.cache_words(),
        }
        output.result(listing(rows))

    def _context(self, argument: str) -> None:
        if argument not in ("", "all"):
            raise UsageError(f"/context takes nothing or all, not {argument!r}")
        model = self.conversation.session.model
        texts = [context_view.render(model, p, colour=self._coloured) for p in context_view.passages(self.conversation)]
        lines = [line for each in texts for line in each.wrap(self.console, self.console.width)]
        summary = context_view.summary(self.conversation)
        legend = context_view.legend(self.conversation, colour=self._coloured)
        notes = [summary, *([legend] if legend else [])]
        above = "; {} lines above: /context all"
        longest = [summary + above.format(len(lines)), *notes[1:]]
        n_notes = sum(len(output.note_lines(each)) for each in longest)
        room = max(self.console.height - 2 - n_notes, 1)
        if argument != "all" and self.console.is_terminal and len(lines) > room:
            notes[0] += above.format(len(lines) - room)
            lines = lines[-room:]
        with self._paged(len(lines), n_notes):
            for line in lines:
                self.console.print(line, no_wrap=True)
        for each in notes:
            output.note(each)

    def _exit(self, _argument: str) -> None:
        raise Leave

    # ---- loops

    def run_messages(self, messages: Iterator[Message] | Iterator[str]) -> None:
        """Messages that nobody types. The first error ends it."""
        for message in messages:
            try:
                self.handle(message)
            except Leave:
                return

    def run_terminal(self, read: Callable[[], Message]) -> int:
        """A person at the terminal; returns the exit code. Ctrl-C stops an answer, and leaves if nothing was said since."""
        stopped = False
        while True:
            try:
                message = read()
            except EOFError:
                return 0
            except UsageError as error:
                output.note(f"error: {error}")
                continue
            except KeyboardInterrupt:
                if signals.received() is not None:
                    raise
                if stopped:
                    return 130
                stopped = True
                output.note("Ctrl-C again leaves")
                continue
            stopped = False
            try:
                self.handle(message)
            except Leave:
                return 0
            except KeyboardInterrupt:
                if signals.received() is not None:
                    raise
                stopped = True
                output.note("stopped; Ctrl-C again leaves")
            except EquipError as error:
                output.note(f"error: {error}")


def stdin_is_terminal() -> bool:
    """Whether a person types."""
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
