"""Training sequences: a BOS, then one dialogue or a stream of prose, cut to length; and what is held out of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import dialogues
import prose
from dialogues import KINDS, Dialogue, Fact, Turn
from names import SYLLABLES, held_out_name, is_held_out, train_name
from tokenizer import ASSISTANT, BOS, END, SPACE, SYSTEM, USER, Tokenizer

# loss weights: what a user will say cannot be guessed, a made-up name in it least of all; what must be recalled counts most
W_USER, W_NEW_NAME, W_ASSISTANT, W_RECALL = 0.2, 0.0, 1.0, 4.0

PASSAGE_END = "\n\n"

_NO_NAME = "\u0001"  # stands for a name in the tokenizer's texts, so that it learns no name


def tokenizer_texts(seed: int) -> Iterator[str]:
    """Texts with all words of the corpus in about its frequencies, without names."""
    rng = random.Random(seed)
    for _ in range(4000):
        yield prose.passage(rng, lambda: _NO_NAME)
    for _ in range(20000):
        yield from dialogues.small_talk(rng)
    for kind in KINDS:
        for text in (*kind.says, *kind.asks, kind.answer, kind.unknown, kind.echo):
            for _ in range(100):
                yield text.format(v=_NO_NAME)
    for text in (*dialogues.ACKNOWLEDGED, *dialogues.SYSTEM):
        for _ in range(200):
            yield text


def held_out_pairs(tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Pairs of token ids that no training sequence may contain."""
    pairs = []
    for i, first in enumerate(SYLLABLES):
        for j, second in enumerate(SYLLABLES):
            if is_held_out(i, j):
                for start in (first, SPACE + first.capitalize()):
                    pairs.append(tuple(tokenizer.first_id + tokenizer.rank[piece] for piece in (start, second)))
    return pairs


@dataclass
class Sample:
    """Token ids, and the weight of each one in the loss."""

    ids: list[int]
    weights: list[float]

    def add(self, ids: Sequence[int], weight: float) -> None:
        """Append tokens of equal weight."""
        self.ids += ids
        self.weights += [weight] * len(ids)

    def weigh(self, part: Sequence[int], weight: float, begin: int) -> None:
        """Set the weight of every occurrence of `part` from index `begin` on."""
        n = len(part)
        for i in range(begin, len(self.ids) - n + 1):
            if self.ids[i : i + n] == part:
                self.weights[i : i + n] = [weight] * n


class Corpus:
    """An endless, seeded source of training sequences."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self._stream: list[int] = []

    def dialogue(self, n: int, most_facts: int) -> Sample:
        """One dialogue of at least `n` tokens, cut to `n`."""
        rng, encode = self.rng, self.tokenizer.encode
        sample = Sample([BOS], [0.0])
        if rng.random() < 0.3:
            sample.add([SYSTEM, *encode(rng.choice(dialogues.SYSTEM)), END], W_USER)
        talk = rng.choice((0.1, 0.3, 0.3, 0.5, 0.7))
        source = Dialogue(rng, train_name, talk, most_facts)
        # in some, all facts stand at the beginning and all questions at the end: the longest distances are rare otherwise
        far, begins, ends = rng.random() < 0.3, n * rng.uniform(0.1, 0.25), n * rng.uniform(0.8, 0.95)
        while len(sample.ids) < n:
            if far:
                source.talk = 1.0 if begins < len(sample.ids) < ends else 0.1
                source.early = 0.9 if len(sample.ids) < begins else 0.0
            turn = source.turn()
            begin = len(sample.ids)
            sample.add([USER, *encode(turn.user), END], W_USER)
            for name in turn.told:
                sample.weigh(encode(name), W_NEW_NAME, begin)
            begin = len(sample.ids)
            sample.add([ASSISTANT, *encode(turn.assistant), END], W_ASSISTANT)
            if turn.value is not None:
                sample.weigh(encode(turn.value), W_RECALL, begin)
        return Sample(sample.ids[:n], sample.weights[:n])

    def prose(self, n: int) -> Sample:
        """A BOS and `n - 1` tokens of prose, which may begin inside a passage."""
        while len(self._stream) < n:
            passage = prose.passage(self.rng, lambda: train_name(self.rng))
            self._stream += self.tokenizer.encode(passage + PASSAGE_END)
        ids = [BOS, *self._stream[: n - 1]]
        del self._stream[: n - 1]
        return Sample(ids, [0.0] + [1.0] * (n - 1))


def held_out_prose(tokenizer: Tokenizer, seed: int, n: int) -> str:
    """Passages with held-out names, at least `n` tokens in all."""
    rng = random.Random(seed)
    text, n_seen = "", 0
    while n_seen < n:
        piece = prose.passage(rng, lambda: held_out_name(rng)) + PASSAGE_END
        text += piece
        n_seen += len(tokenizer.encode(piece))
    return text


@dataclass
class Probe:
    """A held-out dialogue that ends with a question. `distance`: tokens from the value's last mention to where it is due."""

    turns: list[Turn]
    distance: int

    def tokens(self, tokenizer: Tokenizer, *, answered: bool) -> list[int]:
        """BOS, the turns, and the last answer or only its beginning."""
        ids = [BOS]
        for turn in self.turns:
            ids += [USER, *tokenizer.encode(turn.user), END, ASSISTANT, *tokenizer.encode(turn.assistant), END]
        return ids if answered else ids[: -1 - len(tokenizer.encode(self.turns[-1].assistant))]


def _n_tokens(tokenizer: Tokenizer, turn: Turn) -> int:
    return 4 + len(tokenizer.encode(turn.user)) + len(tokenizer.encode(turn.assistant))


def make_probe(tokenizer: Tokenizer, rng: random.Random, low: int, high: int, most: int) -> Probe:
    """A dialogue with four to eight facts whose asked one was stated `low` to `high - 1` tokens ago, at most `most` tokens."""
    while True:
        facts = [Fact(kind, held_out_name(rng)) for kind in rng.sample(KINDS, rng.randint(4, 8))]
        if len({fact.value for fact in facts}) < len(facts):
            continue
        others = [dialogues.state(rng, fact, 0.0) for fact in facts[1:]]
        target, question = dialogues.state(rng, facts[0], 0.0), dialogues.ask(rng, facts[0])
        goal, after = rng.randrange(low, high), list[Turn]()
        n_after = rng.randint(0, len(others))
        after += others[:n_after]
        length = sum(_n_tokens(tokenizer, turn) for turn in after)
        while length < goal - 24:
            after.append(Turn(*dialogues.small_talk(rng)))
            length += _n_tokens(tokenizer, after[-1])
        rng.shuffle(after)
        before = others[n_after:] + [Turn(*dialogues.small_talk(rng)) for _ in range(rng.randint(0, 3))]
        rng.shuffle(before)
        probe = Probe([*before, target, *after, question], 0)
        ids, value = probe.tokens(tokenizer, answered=True), tokenizer.encode(facts[0].value)
        found = [i for i in range(len(ids)) if ids[i : i + len(value)] == value]
        probe.distance = found[-1] - (found[-2] + len(value) - 1)
        if low <= probe.distance < high and len(ids) <= most:
            return probe


def shuffled(probe: Probe, rng: random.Random) -> Probe:
    """The control: the same dialogue with the stated values dealt out anew, the question and its old answer kept."""
    told = [turn for turn in probe.turns if turn.told]
    values = [turn.told[0] for turn in told]
    dealt = rng.sample(values, len(values))
    swap = dict(zip(values, dealt, strict=True))
    turns = [
        Turn(turn.user.replace(turn.told[0], swap[turn.told[0]]), turn.assistant, told=[swap[turn.told[0]]])
        if turn.told
        else turn
        for turn in probe.turns
    ]
    return Probe(turns, probe.distance)
