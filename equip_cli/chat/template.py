"""Token ids of a conversation's turns, so that a new turn is appended and nothing before it is read again.

What a user typed is text: a control token's name in it (`<|im_end|>`) ends no turn.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from equip_cli.core.errors import UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from equip_cli.core.model import Model

# stands for an earlier answer, whose end of turn begins right behind it
_ANSWER = "(the answer of a turn before)"
# stand for a message that is another one
_OTHERS = ("0", "1", "x")
# characters for private use, around the number of a literal while the template is rendered
_BEGIN, _END = "\U0010fff0", "\U0010fff1"


@functools.lru_cache(maxsize=16)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """Matches any of the names, the longest that fits; in a group, so that `split()` keeps what it splits at.

    A vocabulary may have thousands of them: those with the same beginning stand together, and are tried where it matches.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(filter(None, names), key=len, reverse=True):
        groups.setdefault(name[:3], []).append(name[3:])
    heads = sorted(groups, key=len, reverse=True)
    branches = [f"{re.escape(head)}(?:{'|'.join(map(re.escape, groups[head]))})" for head in heads]
    first = "".join(sorted({re.escape(head[0]) for head in heads}))
    return re.compile(f"((?=[{first}])(?:{'|'.join(branches)}))" if heads else "((?!))")


class Literals:
    """What must stay text: the names of control tokens, and a zero byte, which would end a text for the library.

    While the template is rendered each of them is replaced by a mark; `tokenize()` puts them back.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._found: list[str] = []

    def hide(self, text: str, but: Collection[str] = ()) -> str:
        """`text` with a mark in place of each literal; the names in `but` are none."""

        def mark(match: re.Match[str]) -> str:
            if match[0] in but:
                return match[0]
            self._found.append(match[0])
            return f"{_BEGIN}{len(self._found) - 1}{_END}"

        return _pattern((*self._model.control_tokens, "\0", _BEGIN, _END)).sub(mark, text)

    def show(self, text: str) -> str:
        """`text` with the literals where their marks are."""
        return re.sub(f"{_BEGIN}(\\d+){_END}", lambda match: self._found[int(match[1])], text)

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of rendered text: the template's own control tokens are such, the literals are text."""
        if _BEGIN not in text:
            return self._model.tokenize(text, add_special=add_special)
        tokens: list[int] = []
        rest = ""
        # a control token divides the text anyway: what lies between two of them has the same tokens alone
        for part in [*_pattern(self._model.control_tokens).split(text), None]:
            if rest and (part is None or _BEGIN in part):
                tokens += self._model.tokenize(rest, add_special=add_special and not tokens)
                rest = ""
            if part is not None and _BEGIN in part:
                shown = self.show(part)
                tokens += self._model.tokenize(shown, add_special=add_special and not tokens, parse_special=False)
            else:
                rest += part or ""
        return tokens


def control_token_in(model: Model, text: str) -> str | None:
    """The first name of a control token in the text."""
    match = _pattern(model.control_tokens).search(text)
    return None if match is None else match[0]


def literal_tokens(model: Model, text: str, but: Collection[str] = ()) -> list[int]:
    """Token ids of text as it is, without a begin-of-sequence token; of control tokens only the names in `but` are such."""
    literals = Literals(model)
    return literals.tokenize(literals.hide(text, but), add_special=False)


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template, or `source` (Jinja) in its place."""

    model: Model
    source: str | None = None

    def _render(self, literals: Literals, system: str | None, *turns: str, add_generation_prompt: bool = True) -> str:
        """turns: a user's message, the answer to it, the next message, ..."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": literals.hide(text)} for i, text in enumerate(turns)]
        if system is not None:
            messages.insert(0, {"role": "system", "content": literals.hide(system)})
        return self.model.render_chat(messages, template=self.source, add_generation_prompt=add_generation_prompt)

    def first(self, user: str, system: str | None) -> list[int]:
        """Everything up to the first answer. Raises UnsupportedModelError, UsageError."""
        literals = Literals(self.model)
        return literals.tokenize(self._render(literals, system, user))

    def following(self, user: str, system: str | None) -> list[int]:
        """What comes between an answer and the next one: the end of its turn, the user's turn, the beginning of an answer.

        It is cut out of a conversation in which the earlier answer is a mark, so it does not matter what the template
        does to earlier answers (thinking is usually removed). Raises UnsupportedModelError, UsageError.
        """
        rest, literals = self._behind_answer(user, system)
        # templates that put the system prompt into the last turn: here it stands in the first, and stays there
        if (
            system is not None
            and system.strip()
            and literals.show(rest).count(system.strip()) > user.count(system.strip())
        ):
            rest, literals = self._behind_answer(user, None)
        return literals.tokenize(rest, add_special=False)

    def _behind_answer(self, user: str, system: str | None) -> tuple[str, Literals]:
        literals = Literals(self.model)
        _, mark, rest = self._render(literals, system, "-", _ANSWER, user).partition(_ANSWER)
        if not mark:
            raise UnsupportedModelError(
                "the chat template leaves earlier answers out, so a conversation cannot be continued: give another one"
            )
        return rest, literals

    def warning(self, system: str | None) -> str | None:
        """What the user should know if the template leaves the system prompt out of the conversation."""
        literals = Literals(self.model)
        if system is None or system.strip() in literals.show(self._render(literals, system, _OTHERS[0])):
            return None
        return "the chat template leaves the system prompt out: the model will not read it"

    def n_system(self, tokens: list[int], system: str | None, user: str) -> int:
        """How many of the first tokens of `first(user, system)` are the system prompt: all that precedes the user's turn, or,
        where the template folds it into that turn (Gemma, Mistral), all that precedes the message.
        """
        if system is None:
            return 0
        literals = Literals(self.model)
        try:
            head = self._render(literals, system, add_generation_prompt=False)
        except (UnsupportedModelError, UsageError):
            head = ""
        if system.strip() in literals.show(head):
            n = _n_common(tokens, literals.tokenize(head))
        else:
            others = [text for text in _OTHERS if user.lstrip()[:1] != text][:2]
            n = min(_n_common(tokens, self.first(other, system)) for other in others)
        # its last character may share a token with what follows
        return max(n, self._n_covering(tokens, system.strip()))

    def _n_covering(self, tokens: list[int], text: str) -> int:
        """How many of the first tokens it takes to have all of `text`; 0 if it is not in them as it is."""
        pieces, wanted = [self.model.piece(token) for token in tokens], text.encode()
        at = b"".join(pieces).find(wanted)
        if at < 0 or not wanted:
            return 0
        ends = list(itertools.accumulate(map(len, pieces)))
        return bisect.bisect_left(ends, at + len(wanted)) + 1


def _n_common(a: list[int], b: list[int]) -> int:
    """Length of the beginning that both share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
