"""The conversation as the model can still read it: the fewer layers or heads keep a token, the dimmer it is.

Where there is no colour, evicted tokens are counted, and those that some layers or heads keep stand in braces.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from rich.text import Text

from equip_cli.core.text import visible

if TYPE_CHECKING:
    from equip_cli.chat.conversation import Conversation
    from equip_cli.core.model import Model


@dataclass(frozen=True)
class Passage:
    """What one side said: its tokens, and for each one how much of the model can still read it.

    shares: one per token, the share of units that keep it: 1.0 all, 0.0 none.
    units: what keeps a set of its own, `layers` or `KV heads`; None where all of the model keeps one, and a share is 0 or 1.
    """

    label: str
    tokens: list[int]
    shares: list[float]
    units: str | None = None

    @property
    def readable(self) -> list[bool]:
        """For each token whether anything of it can still be read."""
        return [share > 0 for share in self.shares]


def _units(conversation: Conversation) -> str | None:
    return {"layer": "layers", "head": "KV heads"}.get(str(conversation.session.stats()["scope"]))


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
    kept, units = session.shares(), _units(conversation)
    n_read = conversation.n_read

    def passage(label: str, position: int, tokens: Sequence[int]) -> Passage:
        # what waits to be read counts as readable: it will be
        shares = [1.0 if p >= n_read else kept.get(p, 0.0) for p in range(position, position + len(tokens))]
        return Passage(label, list(tokens), shares, units)

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


def _step(share: float) -> int:
    """3: kept by all units, 2: by half of them or more, 1: by fewer, 0: by none."""
    return 3 if share >= 1 else 2 if share >= 0.5 else 1 if share > 0 else 0


def _texts(model: Model, tokens: Sequence[int]) -> Iterator[str]:
    """Text of each token; a character of several tokens stands with its last one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i, token in enumerate(tokens):
        yield decoder.decode(model.piece(token), final=i == len(tokens) - 1)


def render(model: Model, passage: Passage, *, colour: bool) -> Text:
    """One passage as text that rich can wrap; `legend()` says what the marks mean."""
    text = Text(f"{passage.label}: ", style="bold")
    styles = ("not bold dim strike", "not bold dim", "not bold", "bold" if passage.units else "not bold")
    # without colour 0: kept by none, 1: by some, 2: by all
    steps = [_step(share) if colour else (_step(share) + 1) // 2 for share in passage.shares]
    for step, run in groupby(zip(steps, _texts(model, passage.tokens), strict=True), key=itemgetter(0)):
        parts = [visible(part) for _, part in run]
        n, part = len(parts), "".join(parts)
        if text.plain.endswith(" "):
            part = part.lstrip(" ")
        if colour:
            text.append(part, style=styles[step])
        elif step == 2:
            text.append(part, style="not bold")
        elif step == 1 and part:
            begin = part[: len(part) - len(part.lstrip())]
            text.append(f"{begin}{{{part.lstrip()}}}", style="not bold")
        elif step == 0:
            gap = "" if text.plain.endswith(" ") else " "
            text.append(f"{gap}[... {n} token{'s' if n > 1 else ''} no longer readable ...] ", style="not bold")
    text.rstrip()
    return text


def summary(conversation: Conversation) -> str:
    """One line: how much of the conversation can still be read."""
    shares, n, units = conversation.session.shares(), conversation.n_read, _units(conversation)
    if units is None:
        return f"{len(shares)} of {n} tokens readable, {n - len(shares)} no longer"
    n_all = sum(share >= 1 for share in shares.values())
    return (
        f"{n_all} of {n} tokens readable by all {units}, {len(shares) - n_all} by some, {n - len(shares)} by none, "
        f"{conversation.session.stats()['n_used']} by each"
    )


def legend(conversation: Conversation, *, colour: bool) -> str | None:
    """One line: what the marks mean, where layers or KV heads keep different tokens; None where they do not."""
    units = _units(conversation)
    if units is None:
        return None
    if colour:
        return f"bold: all {units} can read it; plain: half or more; dim: fewer; struck: none"
    return f"{{in braces}}: some {units} can read it; without: all"
