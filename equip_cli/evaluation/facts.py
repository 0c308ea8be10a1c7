"""Facts that are told and asked back one by one: some in a text of prose, or some at the beginning of a chat.

An answer is begun in the words of the fact, and is right if of all values that this kind of fact may have (7 to 14) the true one
is the likeliest to follow. Ranking instead of generating: a small model that knows the value may still say something else first,
and a guess has a known share of hits.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from equip_cli.core.errors import StateError, UnsupportedModelError, UsageError
from equip_cli.evaluation.told import GREETING, GREETING_ANSWER, IN_A_CHAT, IN_A_TEXT, TALK, Told
from equip_cli.models import embedded

if TYPE_CHECKING:
    from equip_cli.core.model import Model
    from equip_cli.core.session import Session
    from equip_cli.evaluation.quality import Advance

_FEWEST = 4  # values that a model must tell apart by one token
_USER, _ASSISTANT = "User: ", "\n\nAssistant: "
_INTRODUCTION = "Read the following text. Questions about it come at the end.\n\n"

N_ROOM = 64  # slots that a full cache needs beside a task's text


@dataclass(frozen=True)
class Question:
    """What is asked after a text: the tokens of question and begun answer, then one of `choices`, of which `right` is the index.

    choices: the first token of each value, no two alike.
    """

    tokens: list[int]
    choices: list[int]
    right: int


@dataclass(frozen=True)
class Task:
    """A text, or a conversation, and the questions that are asked about it, each as if it came alone.

    length: tokens asked for, or turns of other talk. n_told: the first tokens, which hold all that is asked of a chat.
    """

    tokens: list[int]
    questions: list[Question]
    length: int
    n_told: int = 0


def _question(model: Model, told: Told, value: str, before: str, between: str) -> Question | None:
    """None if this model's tokens tell too few of the values apart.

    before: what is said before the question, behind what the session has read; between: question and answer.
    """
    begun = f"{before}{told.question}{between}{told.answer}"
    # the true value first: the others are left out where their first token is not their own
    values = [value, *(other for other in told.values if other != value)]
    whole = [model.tokenize(f"{begun} {each}", add_special=False) for each in values]
    n = next(i for i, column in enumerate(zip(*whole, strict=False)) if len(set(column)) > 1)
    choices = list(dict.fromkeys(tokens[n] for tokens in whole))
    if len(choices) < _FEWEST:
        return None
    return Question(whole[0][:n], choices, 0)


def _checked(questions: Sequence[Question | None]) -> list[Question]:
    found = [question for question in questions if question is not None]
    if len(found) < len(questions):
        raise UnsupportedModelError(
            "the tokens of this model do not tell the values of --facts and --chat apart: leave these out"
        )
    return found


def _sentences(draw: random.Random) -> itertools.chain[str]:
    """The prose of the package from a passage on."""
    passages = embedded.prose().split("\n\n")
    first = draw.randrange(len(passages))
    return itertools.chain.from_iterable(
        re.findall(r"\S[^.?!]*[.?!]", passage) for passage in (*passages[first:], *passages[:first])
    )


def text_task(model: Model, length: int, seed: int) -> Task:
    """A text of about `length` tokens with eight facts, as much prose between any two; the same seed tells the same.

    Raises UsageError for a length without room for them, UnsupportedModelError.
    """
    draw = random.Random(f"{seed} {length}")
    facts = [(told, draw.choice(told.values)) for told in IN_A_TEXT]
    draw.shuffle(facts)
    said = [told.fact.format(value) for told, value in facts]
    n_said = len(model.tokenize(_INTRODUCTION + "\n\n".join(said)))
    n_gap = (length - n_said) // (len(said) + 1)
    if n_gap < 1:
        raise UsageError(
            f"--facts-length is {length}, too short for {len(said)} facts: give at least {n_said + 2 * len(said)} with this model"
        )
    prose = _sentences(draw)
    parts = []
    for fact in [*said, None]:
        gap: list[str] = []
        n_left = n_gap
        while n_left > 0:
            gap.append(" ".join(next(prose).split()))
            n_left -= len(model.tokenize(f" {gap[-1]}", add_special=False))
        parts += [" ".join(gap), *([fact] if fact is not None else [])]
    questions = _checked([_question(model, told, value, "\n\nQuestion: ", "\nAnswer: ") for told, value in facts])
    return Task(model.tokenize(_INTRODUCTION + "\n\n".join(parts)), questions, length)


def chat_task(model: Model, n_turns: int, seed: int) -> Task:
    """A chat whose first turn tells six facts, which the answer repeats, and `n_turns` turns of other talk; the same seed tells
    the same.

    It is written as a transcript, not in the model's chat template: so base models can do it, and small ones do it better.
    Raises UnsupportedModelError.
    """
    draw = random.Random(f"{seed} chat")
    facts = [(told, draw.choice(told.values)) for told in IN_A_CHAT]
    said = " ".join(told.fact.format(value) for told, value in facts)
    talk = itertools.islice(itertools.cycle(draw.sample(TALK, len(TALK))), n_turns)
    first = _USER + GREETING.format(said) + _ASSISTANT
    answer = GREETING_ANSWER.format(" ".join(f"{told.answer} {value}." for told, value in facts))
    turns = [first + answer, *(_USER + user + _ASSISTANT + assistant for user, assistant in talk)]
    questions = _checked([_question(model, told, value, f"\n\n{_USER}", _ASSISTANT) for told, value in facts])
    return Task(model.tokenize("\n\n".join(turns)), questions, n_turns, len(model.tokenize(first.rstrip())))


def default_lengths(model: Model, budget: int) -> list[int]:
    """Twice and four times the budget, as far as the trained context goes, and at least 256 tokens."""
    high = max(256, model.n_ctx_train - N_ROOM)
    return sorted({max(256, min(n * budget, high)) for n in (2, 4)})


def text_tasks(model: Model, lengths: Sequence[int], n_trials: int, seed: int = 0) -> list[Task]:
    """`n_trials` texts of each length."""
    return [text_task(model, length, seed + trial) for length in lengths for trial in range(n_trials)]


def chat_tasks(model: Model, n_turns: int, n_trials: int, seed: int = 0) -> list[Task]:
    """`n_trials` chats."""
    return [chat_task(model, n_turns, seed + trial) for trial in range(n_trials)]


def n_tokens(tasks: Sequence[Task]) -> int:
    """All that is read of them, for the progress bar."""
    return sum(len(task.tokens) + sum(len(question.tokens) for question in task.questions) for task in tasks)


def pin_told(session: Session, task: Task) -> None:
    """For `hits()`: never evict the turn in which a chat tells its facts."""
    session.pin(task.n_told)


def _read(session: Session, task: Task, before: Callable[[Session, Task], object]) -> bytes | None:
    """Read the text; its state, None where a session under this policy cannot be saved."""
    session.reset()
    session.pin(0)
    before(session, task)
    session.eval(task.tokens)
    try:
        return session.save_bytes()
    except (UnsupportedModelError, StateError):
        return None


def hits(
    session: Session,
    tasks: Sequence[Task],
    advance: Advance,
    *,
    before: Callable[[Session, Task], object] = lambda session, task: None,
) -> dict[int, tuple[int, int]]:
    """(right answers, questions) by `length`.

    A text is read in chunks of the session's n_ubatch, with evictions in between. Each question finds the cache as it was after
    the text: the state is saved once, and where a policy cannot do that the text is read again.
    before: called with the empty session each time that a text is about to be read. advance: called with the tokens that were
    done.
    Raises what `Session.eval()` raises.
    """
    counts: dict[int, tuple[int, int]] = {}
    for task in tasks:
        state = _read(session, task, before)
        advance(len(task.tokens))
        for i, question in enumerate(task.questions):
            if state is not None:
                session.load_bytes(state)
            elif i > 0:
                _read(session, task, before)
            session.eval(question.tokens)
            is_right = int(numpy.argmax(session.logits()[question.choices])) == question.right
            n_right, n = counts.get(task.length, (0, 0))
            counts[task.length] = (n_right + is_right, n + 1)
            advance(len(question.tokens))
    return counts
