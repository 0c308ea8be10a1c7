"""Token ids of a conversation's turns, so that a new turn is appended and nothing before it is read again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from equip_cli.errors import UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from equip_cli.model import Model

# stands for an earlier answer, whose end of turn begins right behind it
_ANSWER = "(the answer of a turn before)"


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template, or `source` (Jinja) in its place."""

    model: Model
    source: str | None = None

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        return self.model.render_chat(messages, template=self.source, add_generation_prompt=add_generation_prompt)

    def first(self, user: str, system: str | None) -> list[int]:
        """Everything up to the first answer. Raises UnsupportedModelError, UsageError."""
        return self.model.tokenize(self._render([*_system(system), {"role": "user", "content": user}]))

    def following(self, user: str, system: str | None) -> list[int]:
        """What comes between an answer and the next one: the end of its turn, the user's turn, the beginning of an answer.

        It is cut out of a conversation in which the earlier answer is a mark, so it does not matter what the template
        does to earlier answers (thinking is usually removed). Raises UnsupportedModelError, UsageError.
        """
        before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _ANSWER}]
        text = self._render([*_system(system), *before, {"role": "user", "content": user}])
        _, mark, rest = text.partition(_ANSWER)
        if not mark:
            raise UnsupportedModelError(
                "the chat template leaves earlier answers out, so a conversation cannot be continued: give another one"
            )
        return self.model.tokenize(rest, add_special=False)

    def n_system(self, tokens: list[int], system: str | None, user: str) -> int:
        """How many of the first tokens of `first(user, system)` do not depend on the user's message."""
        if system is None:
            return 0
        try:
            head = self._render(_system(system), add_generation_prompt=False)
        except (UnsupportedModelError, UsageError):
            # a template that insists on a user's turn: compare with another one
            other = "0" if user[:1] != "0" else "1"
            head = self._render([*_system(system), {"role": "user", "content": other}], add_generation_prompt=False)
        n = 0
        for mine, its in zip(tokens, self.model.tokenize(head), strict=False):
            if mine != its:
                break
            n += 1
        return n


def _system(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]
