"""The tokenizer of the embedded model: pieces merged by rank, as llama.cpp's `llama` (SentencePiece BPE) tokenizer does.

Syllables of made-up names are merged first, so that every such name splits into them; then pairs by frequency
(Sennrich et al. 2016, section 3.2).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from names import SYLLABLES

SPACE = "\u2581"
SPECIAL = ("<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
UNK, BOS, EOS, SYSTEM, USER, ASSISTANT, END = range(len(SPECIAL))
N_BYTES = 256

# what a merge never crosses: the pieces of the vocabulary stay inside one of these
_WORDS = re.compile(rf"{SPACE}?[A-Za-z]+|'s|.", re.DOTALL)


def words(text: str) -> list[str]:
    """`text` with a space put before it, in the units that are merged one by one."""
    return _WORDS.findall((" " + text).replace(" ", SPACE))


def _forced() -> list[str]:
    capital = [syllable.capitalize() for syllable in SYLLABLES]
    return SYLLABLES + capital + [SPACE + syllable for syllable in capital]


def _merge(parts: list[str], first: str, second: str) -> list[str]:
    merged, i = [], 0
    while i < len(parts):
        if i + 1 < len(parts) and parts[i] == first and parts[i + 1] == second:
            merged.append(first + second)
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return merged


class Tokenizer:
    """pieces: in order of rank, without the special ones and the bytes, which come first in the ids."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self.rank = {piece: i for i, piece in enumerate(pieces)}
        self.first_id = len(SPECIAL) + N_BYTES
        self._known: dict[str, list[int]] = {}

    @property
    def n_vocab(self) -> int:
        """Size of the vocabulary, special tokens and bytes included."""
        return self.first_id + len(self.pieces)

    @classmethod
    def train(cls, texts: Iterable[str], n_vocab: int) -> Tokenizer:
        """Learn merges from texts without names."""
        counts = Counter(word for text in texts for word in words(text))
        letters = "".join(map(chr, range(33, 127))) + SPACE + "\n"
        pieces = sorted(letters) + _forced()
        seed = cls(pieces)
        split = {word: seed.split(word) for word in counts}
        while len(SPECIAL) + N_BYTES + len(pieces) < n_vocab:
            pairs: Counter[tuple[str, str]] = Counter()
            for word, parts in split.items():
                for pair in zip(parts, parts[1:], strict=False):
                    pairs[pair] += counts[word]
            if not pairs:
                raise ValueError(f"{len(counts)} words are too few for {n_vocab} tokens")
            (first, second), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
            pieces.append(first + second)
            split = {w: _merge(p, first, second) if first in p else p for w, p in split.items()}
        return cls(pieces)

    def split(self, word: str) -> list[str]:
        """The pieces of one unit: the pair of the lowest rank is merged first, the left one of equals."""
        parts = list(word)
        while len(parts) > 1:
            ranked = [(self.rank.get(a + b, -1), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
            best = min(((rank, i) for rank, i in ranked if rank >= 0), default=None)
            if best is None:
                break
            parts[best[1] : best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]
        return parts

    def _ids(self, word: str) -> list[int]:
        ids = []
        for part in self.split(word):
            if part in self.rank:
                ids.append(self.first_id + self.rank[part])
            else:
                ids += [len(SPECIAL) + byte for byte in part.encode()]
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, no BOS."""
        ids: list[int] = []
        for word in words(text):
            if word not in self._known:
                if len(self._known) > 200_000:
                    self._known.clear()  # names are new each time
                self._known[word] = self._ids(word)
            ids += self._known[word]
        return ids
