"""How far a build is, from the lines that ninja or make print: a line every so often, so that a log shows that it is alive."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

EVERY = 20.0  # seconds

_NINJA = re.compile(r"\[(\d+)/(\d+)\]")
_MAKE = re.compile(r"\[ *(\d+)%\]")


class BuildSteps:
    """say: called with one line; clock: seconds."""

    def __init__(self, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._told = clock()
        self._where = ""

    def read(self, line: str) -> tuple[int, int] | None:
        """Take a line of the build's output; returns (steps done, steps in all) if it tells them."""
        ninja, make = _NINJA.search(line), _MAKE.search(line)
        if ninja:
            self._where = f"compiled {ninja[1]} of {ninja[2]}"
        elif make:
            self._where = f"compiled {make[1]}%"
        now = self._clock()
        if self._where and now - self._told >= EVERY:
            self._told = now
            self._say(self._where)
        return (int(ninja[1]), int(ninja[2])) if ninja else None
