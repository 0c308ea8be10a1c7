"""Quality of what a bounded cache keeps: perplexity of a stream, and recall of facts by distance."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy

from equip_cli.core.errors import UsageError
from equip_cli.core.sampling import Sampling
from equip_cli.models.embedded import RecallDialogue

if TYPE_CHECKING:
    from equip_cli.core.model import Model
    from equip_cli.core.session import Session

Advance = Callable[[int], object]  # called with the number of tokens that were done

_BLOCK = 1024  # tokens per Session.nll(), which divides them into short native calls

BUCKET = 128  # tokens of distance that are counted together


def _nll(session: Session, token: int) -> float:
    """-log p(token | what the session has read), in nats."""
    logits = session.logits().astype(numpy.float64)
    top = logits.max()
    return float(top + math.log(numpy.exp(logits - top).sum()) - logits[token])


def read(session: Session, tokens: Sequence[int], advance: Advance, chunk: int = 1) -> list[float]:
    """-log p of each token in nats, read `chunk` tokens per step; see `Session.nll()`, which is called."""
    return session.nll(tokens, advance) if chunk == 1 else session.nll(tokens, advance, chunk=chunk)


def perplexity(session: Session, tokens: Sequence[int], advance: Advance, chunk: int = 1) -> float:
    """exp of the mean negative log-likelihood of `tokens[1:]`, read `chunk` tokens per step.

    One token per step evicts as generation does (StreamingLLM's `eval_long_ppl.py`); a chunk evicts once it was read, as
    a prompt does (CAOTE, arXiv 2504.14051, reads blocks of 128). With the policy `none` a full cache starts over with
    the first token and the newest half of what it held, which is read again but not scored: so every token sees between
    half of the context and all of it. chunk: at most the session's `n_outputs`.
    Raises UsageError for less than two tokens, and what `Session.nll()` raises.
    """
    return of_nll(log_losses(session, tokens, advance, chunk))


def of_nll(values: Sequence[float]) -> float:
    """The perplexity of tokens with these -log p, in nats."""
    mean = math.fsum(values) / len(values)
    return math.exp(mean) if mean < 700 else math.inf


def log_losses(session: Session, tokens: Sequence[int], advance: Advance, chunk: int = 1) -> list[float]:
    """-log p of each of `tokens[1:]`, in nats, read `chunk` tokens per step; see `perplexity()`, which is their mean."""
    if len(tokens) < 2:
        raise UsageError("the text has less than two tokens: give a longer one")
    session.reset()
    session.eval(tokens[:1])
    return more_log_losses(session, tokens, 1, advance, chunk)


def more_log_losses(
    session: Session, tokens: Sequence[int], first: int, advance: Advance, chunk: int = 1
) -> list[float]:
    """The same of `tokens[first:]`, in a session that has read `tokens[:first]`."""
    stats = session.stats()
    n_ctx = int(stats["n_ctx"]) if (stats["policy"], stats["update"]) == ("none", "none") else None
    block = max(chunk, _BLOCK // chunk * chunk)
    n_past, found = first, list[float]()
    i = first  # the token to be scored next
    while i < len(tokens):
        # the last token, and one for which there is no room, are scored but not read
        n = min(block, len(tokens) - 1 - i, block if n_ctx is None else n_ctx - n_past)
        if n > 0:
            found += read(session, tokens[i : i + n], advance, chunk)
            n_past, i = n_past + n, i + n
            continue
        found.append(_nll(session, tokens[i]))
        advance(1)
        if n_past == n_ctx and i + 1 < len(tokens):
            session.reset()
            n_past = session.eval([tokens[0], *tokens[i - n_ctx // 2 : i]]) + session.eval([tokens[i]])
        i += 1
    return found


def _word(value: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(value)}(?!\w)")


def distance(model: Model, prompt: str, dialogue: RecallDialogue, n_prompt: int | None = None) -> int:
    """Tokens between the last mention of the value in `prompt` and the place in the answer where it is due.

    n_prompt: tokens of `prompt`, where they are known.
    """
    end = [match.end() for match in _word(dialogue.value).finditer(prompt)][-1]
    answer = dialogue.answer[: dialogue.answer.rindex(dialogue.value)].rstrip()
    n_answer = len(model.tokenize(answer, add_special=False))
    return (n_prompt or len(model.tokenize(prompt))) - len(model.tokenize(prompt[:end])) + n_answer + 1


def greedy(session: Session, prompt: Sequence[int], n: int) -> str:
    """What the model most likely says after `prompt`, at most `n` tokens; the session starts over."""
    session.reset()
    session.set_sampler(Sampling(temp=0.0))
    return "".join(session.generate(prompt, n, per_call=0))


def recalls(session: Session, prompt: Sequence[int], dialogue: RecallDialogue) -> bool:
    """Whether the greedy answer to the rendered prompt contains the value as a word of its own."""
    limit = len(session.model.tokenize(dialogue.answer, add_special=False)) + 8
    return _word(dialogue.value).search(greedy(session, prompt, limit)) is not None


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927): `hits` of `n`."""
    z = 1.959964
    p, d = hits / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / d
    half = z / d * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def recall(session: Session, dialogues: Sequence[RecallDialogue], advance: Advance) -> dict[int, tuple[int, int]]:
    """(hits, dialogues) by distance: the key is the upper end of a range of BUCKET tokens, exclusive.

    The dialogues are read through the model's chat template; raises UnsupportedModelError if it has none.
    """
    model = session.model
    counts: dict[int, tuple[int, int]] = {}
    for dialogue in dialogues:
        prompt = model.render_chat(dialogue.messages)
        tokens = model.tokenize(prompt)
        key = (distance(model, prompt, dialogue, len(tokens)) // BUCKET + 1) * BUCKET
        hits, n = counts.get(key, (0, 0))
        counts[key] = (hits + recalls(session, tokens, dialogue), n + 1)
        advance(1)
    return dict(sorted(counts.items()))
