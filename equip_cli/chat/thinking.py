"""Tell what a model thinks from what it answers, while the text arrives in pieces.

Marks count at the beginning of an answer only: further on they are text, as everything that a model writes about them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from equip_cli.core.model import Model

# how reasoning models mark their thinking, beginning and end; the names are those of the models' chat templates
MARKS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<thinking>", "</thinking>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss
    ("<|think|>", "<|end|>"),  # Solar
)
# what may stand before an answer, after the thinking or without any
HEADERS = (
    "<|start|>assistant<|channel|>final<|message|>",
    "<|channel|>final<|message|>",
    "<|start|>assistant<|channel|>commentary<|message|>",
    "<|channel|>commentary<|message|>",
    "<|start|>assistant<|channel|>analysis<|message|>",  # thinking again
    "<|START_TEXT|>",
    "<|START_RESPONSE|>",
    "<|open|>response<|sep|>",
    "<|begin|>assistant<|content|>",
)
_ENDS = dict(MARKS)
# gpt-oss thinks several times, and then each part has a header of its own
_AGAIN = {"<|start|>assistant<|channel|>analysis<|message|>": "<|end|>"}


def mark_tokens(model: Model) -> frozenset[str]:
    """The model's control tokens that marks and headers consist of; other control tokens are not text."""
    known = [*_ENDS, *_ENDS.values(), *HEADERS]
    return frozenset(name for name in model.control_tokens if any(name in mark for mark in known))


class Splitter:
    """Feed it text; it gives back (is_thinking, text) without the marks.

    prompt: the text before the answer; a template may have opened the thinking there.
    """

    def __init__(self, prompt: str = "") -> None:
        self._end = next((end for begin, end in MARKS if prompt.rstrip().endswith(begin)), None)
        self._at_beginning = True  # of the answer; nothing of it has come yet
        self._may_think = self._end is None
        self._rest = ""

    def feed(self, text: str, *, final: bool = False) -> list[tuple[bool, str]]:
        """The parts of what has arrived so far; what may be half a mark is kept until more comes or `final`."""
        self._rest += text
        parts: list[tuple[bool, str]] = []
        while self._end is not None or self._at_beginning:
            if self._end is not None:
                at = self._rest.find(self._end)
                n = at if at >= 0 else len(self._rest) - (0 if final else _n_held_back(self._rest, self._end))
                parts.append((True, self._rest[:n]))
                self._rest = self._rest[n + len(self._end) :] if at >= 0 else self._rest[n:]
                if at < 0:
                    break
                self._end = None
            else:
                head = self._rest.lstrip()
                marks = (*HEADERS, *(_ENDS if self._may_think else ()))
                found = max((mark for mark in marks if head.startswith(mark)), key=len, default=None)
                if not final and any(mark.startswith(head) and mark != found for mark in marks):
                    break  # it may become a mark, or a longer one
                if found is None:
                    self._at_beginning = False
                    break
                self._may_think = False
                self._end = _AGAIN.get(found, _ENDS.get(found))
                self._rest = head[len(found) :]
        if self._end is None and not self._at_beginning:
            parts.append((False, self._rest))
            self._rest = ""
        return [part for part in parts if part[1]]


def _n_held_back(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)


def split(text: str, prompt: str = "") -> tuple[str, str]:
    """(thinking, answer) of a whole reply, both stripped."""
    parts = Splitter(prompt).feed(text, final=True)
    thinking, answer = (
        "".join(part for is_thinking, part in parts if is_thinking == wanted) for wanted in (True, False)
    )
    return thinking.strip(), answer.strip()
