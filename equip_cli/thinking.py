"""Tell what a model thinks from what it answers, while the text arrives in pieces."""

from __future__ import annotations

# how reasoning models mark their thinking, beginning and end
MARKS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
)


def is_mark_part(text: str) -> bool:
    """Whether a control token's text belongs to a mark; other control tokens are not text."""
    return any(text in mark for pair in MARKS for mark in pair)


def _held_back(text: str, marks: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of a mark."""
    longest = max(map(len, marks)) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-n:]) for mark in marks):
            return n
    return 0


class Splitter:
    """Feed it text; it gives back (is_thinking, text) without the marks.

    prompt: the text before the answer; a template may have opened the thinking there.
    """

    def __init__(self, prompt: str = "") -> None:
        self._end: str | None = next((end for begin, end in MARKS if prompt.rstrip().endswith(begin)), None)
        self._rest = ""

    def feed(self, text: str, *, final: bool = False) -> list[tuple[bool, str]]:
        """The parts of what has arrived so far; what may be half a mark is kept until more comes or `final`."""
        self._rest += text
        parts: list[tuple[bool, str]] = []
        while True:
            marks = (self._end,) if self._end is not None else tuple(begin for begin, _ in MARKS)
            at, mark = min(((self._rest.find(m), m) for m in marks if m in self._rest), default=(-1, ""))
            if at < 0:
                keep = 0 if final else _held_back(self._rest, marks)
                parts.append((self._end is not None, self._rest[: len(self._rest) - keep]))
                self._rest = self._rest[len(self._rest) - keep :]
                return [part for part in parts if part[1]]
            parts.append((self._end is not None, self._rest[:at]))
            self._rest = self._rest[at + len(mark) :]
            self._end = None if self._end is not None else dict(MARKS)[mark]


def split(text: str, prompt: str = "") -> tuple[str, str]:
    """(thinking, answer) of a whole reply, both stripped."""
    parts = Splitter(prompt).feed(text, final=True)
    thinking, answer = (
        "".join(part for is_thinking, part in parts if is_thinking == wanted) for wanted in (True, False)
    )
    return thinking.strip(), answer.strip()
