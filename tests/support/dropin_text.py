"""What the users of the drop-in tests say; without any import that one of the interpreters may lack."""

from __future__ import annotations

import random

WORDS = "river stone light winter garden music paper silver window bridge forest letter ocean candle mirror".split()

Messages = list[dict[str, str]]


def say(seed: int, n: int) -> str:
    """A message of n words; another seed gives another message."""
    return " ".join(random.Random(seed).choices(WORDS, k=n))
