"""Passkey retrieval: a number hidden in filler text, asked back at the end.

The task and its text are those of Mohtashami and Jaggi, "Landmark Attention" (arXiv 2305.16300, section 4.2;
llama/run_test.py of their code). A real model solves it without an example and without a chat template.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

from equip_cli.core.errors import UsageError
from equip_cli.evaluation import quality

if TYPE_CHECKING:
    from equip_cli.core.model import Model
    from equip_cli.core.session import Session
    from equip_cli.evaluation.quality import Advance

N_ANSWER = 12  # tokens within which the number must come
ROOM = 16  # slots that a full cache needs beside the prompt

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
KEY = "The pass key is {0}. Remember it. {0} is the pass key."
QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Prompt:
    """A text that hides `key`.

    length: tokens asked for; `tokens` has as many, or less by at most one sentence of the filler.
    depth: share of the filler that stands before the key, 0 to 1.
    """

    tokens: list[int]
    key: str
    length: int
    depth: float


def text(key: str, n_sentences: int, depth: float) -> str:
    """The prompt with so many sentences of filler, the share `depth` of them before the key."""
    filler = list(islice(cycle(FILLER), n_sentences))
    n_before = round(depth * n_sentences)
    parts = [TASK, " ".join(filler[:n_before]), KEY.format(key), " ".join(filler[n_before:]), QUESTION]
    return "\n".join(part for part in parts if part)


def shortest(model: Model) -> int:
    """Tokens of a prompt in which each sentence of the filler stands once."""
    return len(model.tokenize(text("10000", len(FILLER), 0.5)))


def default_lengths(model: Model, budget: int) -> list[int]:
    """Twice and four times the budget, as far as the task fits in and the trained context goes.

    Raises UsageError if the trained context is too short for the task.
    """
    low, high = shortest(model), model.n_ctx_train - ROOM
    if high < low:
        raise UsageError(
            f"the task of --passkey takes {low + ROOM} tokens and the model was trained on {model.n_ctx_train}: "
            "leave --passkey out"
        )
    return sorted({max(low, min(n * budget, high)) for n in (2, 4)})


def make(model: Model, length: int, depth: float, key: str) -> Prompt:
    """The longest prompt of at most `length` tokens. Raises UsageError if there is no room for any filler."""

    def tokens(n_sentences: int) -> list[int]:
        return model.tokenize(text(key, n_sentences, depth))

    # a sentence has at least two tokens
    n_sentences = bisect_right(range(length // 2 + 1), length, key=lambda n: len(tokens(n))) - 1
    if n_sentences < 1:
        raise UsageError(
            f"--passkey-length is {length}, too short for the task: give at least {shortest(model)} with this model"
        )
    return Prompt(tokens(n_sentences), key, length, depth)


def make_all(
    model: Model, lengths: Sequence[int], depths: Sequence[float], n_trials: int, seed: int = 0
) -> list[Prompt]:
    """`n_trials` prompts for each length and depth, each with a number of five digits of its own.

    The same arguments give the same prompts. Raises UsageError for a length that is too short.
    """
    prompts = []
    for length in lengths:
        for depth in depths:
            draw = random.Random(f"{seed} {length} {depth:g}")
            prompts += [make(model, length, depth, str(draw.randint(10000, 99999))) for _ in range(n_trials)]
    return prompts


def found(answer: str, key: str) -> bool:
    """Whether the answer contains the number, and not as part of a longer one."""
    return re.search(rf"(?<!\d){key}(?!\d)", answer) is not None


def accuracy(session: Session, prompts: Sequence[Prompt], advance: Advance) -> dict[str, dict[str, float]]:
    """Share of numbers that the greedy answer names within 12 tokens: {length: {depth: share}}.

    Each prompt is read in chunks of the session's n_ubatch, with evictions in between. advance: called with the number
    of tokens read and generated. Raises what `Session.eval()` raises: ContextFullError without `ROOM` beside a prompt.
    """
    results: dict[str, dict[str, list[bool]]] = {}
    for prompt in prompts:
        answer = quality.greedy(session, prompt.tokens, N_ANSWER)
        at_length = results.setdefault(str(prompt.length), {})
        at_length.setdefault(f"{prompt.depth:g}", []).append(found(answer, prompt.key))
        advance(len(prompt.tokens) + N_ANSWER)
    return {
        length: {depth: sum(hits) / len(hits) for depth, hits in by_depth.items()}
        for length, by_depth in results.items()
    }
