"""Made-up names. A held-out name consists of pairs of syllables that no training name contains."""

from __future__ import annotations

import random

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
SYLLABLES = [c + v for c in CONSONANTS for v in VOWELS]
ENDINGS = "nrslm"


def is_held_out(first: int, second: int) -> bool:
    """True for one ordered pair of syllables (their indices) in seven."""
    return (3 * first + (1 + first % 6) * second) % 7 == 0


def _has_held_out_pair(name: str) -> bool:
    text = name.lower()
    windows = ((text[i : i + 2], text[i + 2 : i + 4]) for i in range(len(text) - 3))
    return any(
        a in SYLLABLES and b in SYLLABLES and is_held_out(SYLLABLES.index(a), SYLLABLES.index(b)) for a, b in windows
    )


# what people type in place of a made-up name; the tokenizer splits most of them into pieces of other shapes
_REAL = (
    "Max Luna Bella Rex Tom Anna Oscar Milo Bruno Ginger Pip Coco Daisy Charlie Lucy Molly Simba Felix Otto Emma Noah "
    "Olivia Liam Mia Ben Sam Jack Ella Henry Alice Grace Leo Ruby Oliver Sofia Hugo Clara Jonas Ida Peter Maria Paul "
    "Paris London Rome Berlin Oslo Madrid Vienna Lisbon Boston Dublin Prague Athens Kyoto Lima Cairo Bristol York Bergen "
    "Tiger Shadow Biscuit Pepper Snowball Whiskers Buddy Rocky Patch Smokey Zorro Nemo".split()
)
COMMON = tuple(name for name in _REAL if not _has_held_out_pair(name))


def train_name(rng: random.Random) -> str:
    """A name for training; one in eight is a real one."""
    if rng.random() < 0.125:
        return rng.choice(COMMON)
    parts = [rng.randrange(len(SYLLABLES))]
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 2, 2, 3))):
        following = rng.randrange(len(SYLLABLES))
        while is_held_out(parts[-1], following):
            following = rng.randrange(len(SYLLABLES))
        parts.append(following)
    ending = rng.choice(ENDINGS) if rng.random() < 0.25 else ""
    return ("".join(SYLLABLES[i] for i in parts) + ending).capitalize()


def held_out_name(rng: random.Random) -> str:
    """A name of two or three syllables, each neighbouring pair held out."""
    parts = [rng.randrange(len(SYLLABLES))]
    for _ in range(rng.choice((1, 2))):
        parts.append(rng.choice([i for i in range(len(SYLLABLES)) if is_held_out(parts[-1], i)]))
    return "".join(SYLLABLES[i] for i in parts).capitalize()
