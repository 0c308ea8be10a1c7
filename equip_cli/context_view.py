"""The conversation as the model can still read it: evicted tokens are dimmed, or counted where there is no colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from equip_cli.conversation import Conversation
    from equip_cli.model import Model


@dataclass(frozen=True)
class Passage:
    """What one side said: its tokens, and for each one whether it can still be read."""

    label: str
    tokens: list[int]
    readable: list[bool]


def _span(model: Model, tokens: Sequence[int], text: str) -> tuple[int, int]:
    """The tokens (begin, end) whose text overlaps the last occurrence of `text`; all of them if it does not occur."""
    pieces = [model.piece(token) for token in tokens]
    whole, wanted = b"".join(pieces), text.strip().encode()
    at = whole.rfind(wanted)
    if at < 0:
        return 0, len(tokens)
    begin, end, offset = len(tokens), 0, 0
    for i, piece in enumerate(pieces):
        if piece and offset < at + len(wanted) and offset + len(piece) > at:
            begin, end = min(begin, i), i + 1
        offset += len(piece)
    return begin, end


def passages(conversation: Conversation) -> Iterator[Passage]:
    """What was said, in order, without the template's own tokens."""
    session, model = conversation.session, conversation.session.model
    kept = {position for position, _ in session.kept()}
    n_read = conversation.n_read

    def passage(label: str, position: int, tokens: Sequence[int]) -> Passage:
        # what waits to be read counts as readable: it will be
        readable = [p in kept or p >= n_read for p in range(position, position + len(tokens))]
        return Passage(label, list(tokens), readable)

    position = 0
    for i, turn in enumerate(conversation.turns):
        begin, end = _span(model, turn.prompt_ids, turn.user)
        if i == 0 and conversation.system:
            first, last = _span(model, turn.prompt_ids[:begin], conversation.system)
            yield passage("system", position + first, turn.prompt_ids[first:last])
        yield passage("you", position + begin, turn.prompt_ids[begin:end])
        position += len(turn.prompt_ids)
        if turn.reply_ids:
            yield passage("model", position, turn.reply_ids)
        position += len(turn.reply_ids)


def render(model: Model, passage: Passage, *, colour: bool) -> Text:
    """One passage as text that rich can wrap."""
    text = Text(f"{passage.label}: ", style="bold")
    at = 0
    for readable, run in groupby(passage.readable):
        n = len(list(run))
        part = model.detokenize(passage.tokens[at : at + n])
        if at == 0 or text.plain.endswith(" "):
            part = part.lstrip(" ")
        at += n
        if readable:
            text.append(part, style="not bold")
        elif colour:
            text.append(part, style="not bold dim strike")
        else:
            gap = "" if text.plain.endswith(" ") else " "
            text.append(f"{gap}[... {n} token{'s' if n > 1 else ''} no longer readable ...] ", style="not bold")
    text.rstrip()
    return text


def summary(conversation: Conversation) -> str:
    """One line: how much of the conversation can still be read."""
    stats = conversation.session.stats()
    n = conversation.n_read
    return f"{stats['n_used']} of {n} tokens readable, {stats['n_evicted']} no longer"
