"""A conversation in a bounded cache: turns are appended, sampled tokens stay as sampled, and nothing is read twice."""

from __future__ import annotations

import codecs
import contextlib
import io
import threading
from array import array
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from equip_cli.chat import thinking
from equip_cli.chat.template import ChatTemplate, literal_tokens
from equip_cli.core.errors import (
    BudgetError,
    CancelledError,
    ContextFullError,
    EquipError,
    RewindError,
    StateError,
    UsageError,
)
from equip_cli.terminal import signals

if TYPE_CHECKING:
    from equip_cli.chat.transcript import SavedTurn
    from equip_cli.core.session import Session


@dataclass
class Turn:
    """A user's message and the answer to it.

    prompt_ids: the tokens appended for the message: end of the turn before, message, beginning of the answer.
    reply_ids, reply: the answer as sampled, without the token that ends it; `reply` has the marks of thinking in it.
    complete: the model ended its answer by itself.
    """

    user: str
    prompt_ids: array[int]
    reply_ids: array[int] = field(default_factory=lambda: array("i"))
    reply: str = ""
    complete: bool = False


class Conversation:
    """Turns on one session, which must be fresh.

    system: the system prompt, or None; pin: never evict it. pin_first: never evict the first turn either, the system prompt and
    what the user said first, if the latter takes no more than a quarter of the budget. `turns` is the transcript, evicted
    tokens included.
    on_reread: called with a number of tokens when that many must be read again, before they are.

    Raises UnsupportedModelError if the model has no chat template, BudgetError if the pinned prompt does not fit.
    """

    def __init__(
        self,
        session: Session,
        system: str | None = None,
        *,
        template: str | None = None,
        pin: bool = True,
        pin_first: bool = False,
        on_reread: Callable[[int], object] = lambda n: None,
    ) -> None:
        self.session = session
        self.system = system
        self.turns: list[Turn] = []
        self._template = ChatTemplate(session.model, template)
        self._template.following("-", system)  # fails now rather than at the second turn
        self._mark_tokens = thinking.mark_tokens(session.model)
        self._pin = pin and session.policy.name != "none"
        self._pin_first = pin_first and session.policy.name != "none"
        self._on_reread = on_reread
        self._cancelled = False  # a cancel was asked for that no call has reported yet

    def warning(self) -> str | None:
        """What the user should know of the system prompt, None if all is well."""
        return self._template.warning(self.system)

    # ---- the transcript

    @property
    def ids(self) -> list[int]:
        """Every token of the conversation, evicted ones included; its index is its position."""
        return [token for turn in self.turns for part in (turn.prompt_ids, turn.reply_ids) for token in part]

    @property
    def n_read(self) -> int:
        """How many of `ids` the session has seen."""
        return int(self.session.stats()["n_past"])

    def prompt_text(self, turn: Turn) -> str:
        """The turn's prompt as text, control tokens included."""
        return self.session.model.detokenize(turn.prompt_ids, special=True)

    def _prompt_ids(self, user: str) -> array[int]:
        return array("i", (self._template.following if self.turns else self._template.first)(user, self.system))

    def restore(self, turns: Iterable[SavedTurn]) -> None:
        """Take up a conversation; it is read by `catch_up()` or with the next message.

        What was saved as text alone, and what another template or system prompt makes other tokens of, is put into tokens
        anew.
        """
        model = self.session.model
        same = True  # the turns so far, as tokens
        for saved in turns:
            prompt_ids = self._prompt_ids(saved.user)
            same = same and saved.prompt_ids == prompt_ids and saved.reply_ids is not None
            if same and saved.reply_ids is not None and all(0 <= token < model.n_vocab for token in saved.reply_ids):
                reply_ids = saved.reply_ids
            else:
                reply_ids = array("i", literal_tokens(model, saved.reply, self._mark_tokens))
            self.turns.append(Turn(saved.user, prompt_ids, reply_ids, saved.reply, saved.complete))

    def go_on(self, turn: Turn, tokens: Sequence[int]) -> None:
        """Put tokens of an answer in place that was being made when its process ended."""
        model = self.session.model
        if all(0 <= token < model.n_vocab for token in tokens):
            turn.reply_ids, turn.reply, turn.complete = array("i", tokens), self.reply_text(tokens), False

    def reply_text(self, tokens: Sequence[int]) -> str:
        """The text of an answer's tokens, marks of thinking included."""
        data = b"".join(self._reply_piece(token) for token in tokens)
        return data.decode("utf-8", "replace").lstrip()

    def _reply_piece(self, token: int) -> bytes:
        data = self.session.model.piece(token)
        if data:
            return data
        data = self.session.model.piece(token, special=True)
        return data if data.decode("utf-8", "replace") in self._mark_tokens else b""

    def load_cache(self, path: Path) -> None:
        """Take over a saved cache in place of reading; what it does not hold is read by `catch_up()`.

        Raises StateError and what else `Session.load()` raises, and for a cache that holds anything but the first tokens
        of this conversation; the session is empty then.
        """
        try:
            self.session.load(path)
            if not 0 < self.n_read <= len(self.ids):
                raise StateError(f"it holds {self.n_read} tokens and the conversation has {len(self.ids)}")
        except EquipError:
            self.session.reset()
            raise

    # ---- turns

    def say(self, user: str, n: int = -1) -> Generator[str, None, None]:
        """Append a message and yield the answer's text as it comes, at most `n` tokens of it.

        A KeyboardInterrupt, or closing the generator, stops the turn and keeps what was said so far.
        Raises ContextFullError (the turn is taken back if it has no answer yet), BackendError.
        """
        if not user.strip():
            raise UsageError("the message is empty: type something")
        turn = Turn(user, self._prompt_ids(user))
        self.turns.append(turn)
        yield from self._answer(turn, n)

    def regenerate(self, n: int = -1) -> Generator[str, None, None]:
        """Answer the last message anew; see `say()`. Raises UsageError if there is none."""
        turn = self._last()
        turn.reply_ids, turn.reply, turn.complete = array("i"), "", False
        # the last token of the prompt is read once more, for its logits
        self._rewind(len(self.ids) - 1)
        yield from self._answer(turn, n)

    def undo(self) -> Turn:
        """Take the last message and its answer back, and return them. Raises UsageError if there is none."""
        turn = self._last()
        self.turns.pop()
        self._rewind(len(self.ids))
        return turn

    def catch_up(self) -> None:
        """Read what is not in the cache yet, now rather than with the next message. Ctrl-C leaves the rest for then."""
        if self.turns:
            for _ in self._answer(self.turns[-1], 0):
                pass

    def set_system(self, system: str | None) -> None:
        """Replace the system prompt; the conversation must be read again."""
        self.system = system
        if self.turns:
            self.turns[0].prompt_ids = array("i", self._template.first(self.turns[0].user, system))
        if self.n_read:
            self._start_over()

    def clear(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.turns.clear()
        self.session.reset()

    def _last(self) -> Turn:
        if not self.turns:
            raise UsageError("there is no turn yet: say something first")
        return self.turns[-1]

    # ---- the cache

    def _rewind(self, n: int) -> None:
        """Leave at most the first `n` tokens in the cache.

        What those that go have evicted does not come back; where they themselves were evicted, all is read again.
        """
        if self.n_read <= n:
            return
        try:
            self.session.rewind(n)
        except RewindError:
            self._start_over()

    def _start_over(self) -> None:
        self.session.reset()
        if self.turns:
            self._on_reread(len(self.ids))

    def _read(self) -> None:
        """Bring the cache up to the end of `ids`."""
        while True:
            n_read = self.n_read
            if n_read == 0 and self.turns:
                self._pin_beginning(self.turns[0])
            try:
                self.session.eval(self.ids[n_read:])
                return
            except CancelledError:
                if not self._cancelled:
                    raise
                self._cancelled = False  # it was meant for a call that had ended by then

    def _pin_beginning(self, first: Turn) -> None:
        """Of a sequence that is empty."""
        if not (self._pin or self._pin_first):
            return
        n_system = self._template.n_system(list(first.prompt_ids), self.system, first.user)
        n_first = len(first.prompt_ids)
        if self._pin_first and 4 * (n_first - n_system) <= self.session.stats()["budget"]:
            with contextlib.suppress(BudgetError):  # a long system prompt leaves no room for it
                self.session.pin(n_first)
                return
        self.session.pin(n_system if self._pin else 0)

    def _answer(self, turn: Turn, n: int) -> Generator[str, None, None]:
        session, model = self.session, self.session.model
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        written = io.StringIO(turn.reply)
        written.seek(0, io.SEEK_END)
        tokens: SimpleQueue[int | BaseException | None] = SimpleQueue()

        def work() -> None:
            try:
                self._read()
                for token in session.iter_tokens(n):
                    tokens.put(token)
                tokens.put(None)
            except BaseException as error:
                tokens.put(error)

        def take(token: int) -> str:
            if model.is_eog(token):
                turn.complete = True
                return ""
            turn.reply_ids.append(token)
            text = decoder.decode(self._reply_piece(token))
            text = text if written.tell() else text.lstrip()
            written.write(text)
            return text

        # the calls run beside this thread, so that Ctrl-C is noticed at once and not at the end of a chunk
        worker = threading.Thread(target=work, name="equip-answer")
        item: int | BaseException | None = 0
        try:
            with signals.deferred():  # an interrupt within it would leave a thread that nobody waits for
                worker.start()
            while isinstance(item := tokens.get(), int):
                text = take(item)
                if text:
                    yield text
        finally:
            try:
                with signals.deferred():
                    if isinstance(item, int):  # stopped from outside
                        self._cancelled = True
                        session.cancel()
                    _join(worker)
            finally:
                while not tokens.empty():
                    late = tokens.get()
                    if isinstance(late, int):
                        take(late)
                    elif isinstance(late, CancelledError):
                        self._cancelled = False
                rest = decoder.decode(b"", final=True)
                written.write(rest)
                turn.reply = written.getvalue()
        if isinstance(item, ContextFullError) and not turn.reply_ids:
            self.turns.pop()
            self._rewind(len(self.ids))
        if isinstance(item, BaseException):
            raise item
        if rest:
            yield rest


def _join(worker: threading.Thread) -> None:
    """Wait for the thread, also when Ctrl-C comes meanwhile: the session must not be freed under it."""
    interrupt: KeyboardInterrupt | None = None
    while worker.is_alive():
        try:
            worker.join()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
