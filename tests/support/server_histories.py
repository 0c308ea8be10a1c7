"""Random histories of requests to a llama-server whose cache is bounded, and what must hold of every answer.

The requests are raw tokens for /completion, so that no template comes between. A client keeps a few conversations; each of
its requests goes on with one of them, edits an earlier turn, asks for another answer, forks, repeats, shrinks, or starts anew.
The client knows the server's rules well enough to say of each answer:

- how much of the prompt may have come from the cache. It must be common to the prompt and to what the lane (llama-server's
  word: slot) holds. Once tokens were evicted, only what follows the newest evicted one is whole: of `peak` tokens that the
  lane has held at once `peak - budget` are gone, none of them a sink, so the newest of them is at
  `sinks + peak - budget - 1` or later. What a prompt shares with a lane must reach further than that, or be read again.
- what its tokens must be: those of a server that reads the prompt for the first time. With evictions that holds for prompts
  that were read from the first token on, in the same chunks. It does not for a conversation that goes on: its chunks are
  others, and each chunk chooses what to keep (docs/drop-in.md).
"""

from __future__ import annotations

import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dropin_support import ProgramError, Server, clean_environment, serve

SINKS = 4

Tokens = list[int]


# ---- a server --------------------------------------------------------------------------------------------------------

N_UBATCH = 32
N_CTX = 1024  # of a lane


@dataclass(frozen=True)
class ServedModel:
    """A model, the tokens that clients write, and those that an answer must not have: they end it, or are no whole text.

    Two tokens whose log-probabilities differ by `tie` or less may change places by rounding: prompts are read in other chunks.
    """

    path: Path
    alphabet: Tokens
    banned: Tokens
    tie: float = 0.05


@contextmanager
def launch(
    program: Path, model: ServedModel, policy: str, log: Path, *arguments: str, lanes: int = 1, n_ctx: int = N_CTX
) -> Iterator[Server]:
    """llama-server with `lanes` lanes of n_ctx tokens, small chunks and one thread."""
    command = [str(program), "-m", str(model.path), "-c", str(n_ctx * lanes), "-np", str(lanes), "--no-kv-unified"]
    command += ["-b", str(2 * N_UBATCH), "-ub", str(N_UBATCH), "-t", "1", "-tb", "1", "--no-warmup", *arguments]
    with serve(command, clean_environment(LLAMA_KV_POLICY=policy, GGML_NO_BACKTRACE="1"), "/health", log) as server:
        yield server


# ---- one request -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    prompt: Tokens
    tokens: Tokens
    n_cached: int  # tokens of the prompt that were not read again
    n_read: int
    lane: int
    margins: list[float]  # how far each token's log-probability is above the next one's; empty unless asked for


class Refusal(Exception):
    """The server answered with an error, as it may; the message is the error's."""


def post(server: Server, path: str, body: Any) -> Any:
    """Raises Refusal if the server says no, ProgramError if it is gone or talks nonsense."""
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=240) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        server.check()
        try:
            raise Refusal(str(json.loads(text)["error"]["message"])) from None
        except (ValueError, KeyError) as unclear:
            raise ProgramError(f"{error.code} without a reason: {text[:300]}\n{server.log[-2000:]}") from unclear
    except OSError as error:
        time.sleep(0.5)  # a process that aborts closes its socket first
        server.check()
        raise ProgramError(f"{path}: {error}\n{server.log[-3000:]}") from error


def complete(
    server: Server, prompt: Sequence[int], n: int, banned: Sequence[int], margins: bool = False, **options: Any
) -> Answer:
    """n tokens at temperature 0; raises what post() raises."""
    body: dict[str, Any] = {
        "prompt": list(prompt),
        "n_predict": n,
        "temperature": 0,
        "seed": 1,
        "logit_bias": [[token, False] for token in banned],
        "return_tokens": True,
        "n_probs": len(banned) + 2 if margins else 0,
    }
    got = post(server, "/completion", body | options)
    gaps = []  # in step with the tokens as long as each of them is whole text
    for entry in got.get("completion_probabilities", []):
        top = [item["logprob"] for item in entry["top_logprobs"] if item["id"] not in banned]
        gaps.append(top[0] - top[1])
    assert not margins or len(gaps) == len(got["tokens"]), "bytes of a character were generated"
    timings = got["timings"]
    return Answer(list(prompt), got["tokens"], timings["cache_n"], timings["prompt_n"], got["id_slot"], gaps)


# ---- a client --------------------------------------------------------------------------------------------------------


@dataclass
class Lane:
    """What the client believes a lane of the server to hold."""

    tokens: Tokens = field(default_factory=list)
    peak: int = 0  # the most tokens it may have held since it was empty
    least: int = 0  # and at least this many: which state the server took back is not known


@dataclass
class Client:
    """Sends the requests of one seeded history and checks how each prompt was read.

    `draft` is the longest speculated draft (0: no speculation): so many evictions may still be owed when the server asks how far it can go
    back. `pinned` is the lane that every request names, -1 leaves the choice to the server.
    """

    server: Server
    seed: int
    alphabet: Tokens
    banned: Tokens
    budget: int
    limit: int  # the longest prompt
    draft: int = 0
    pinned: int = -1
    may_refuse: bool = False
    restores: bool = False  # going back means that a checkpoint of the whole sequence is taken back
    past: list[Lane] = field(
        default_factory=list
    )  # what any lane has held: the server may have kept its state, and take it back
    alone: bool = True  # no other client's requests run at the same time
    lanes: dict[int, Lane] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    whole: list[Answer] = field(default_factory=list)  # nothing was evicted
    unread: list[Answer] = field(default_factory=list)  # with evictions, read from the first token on
    n_reused: int = 0
    n_refused: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.chats: list[list[Tokens]] = []  # turns, the client's and the server's in turn

    # ---- requests

    def words(self, low: int, high: int) -> Tokens:
        return self.rng.choices(self.alphabet, k=self.rng.randint(low, high))

    def next_chat(self) -> list[Tokens]:
        """The turns of the next request; the last one is the client's."""
        rng = self.rng
        if not self.chats:
            return [self.words(8, 60)]
        at = -1 if rng.random() < 0.7 else rng.randrange(len(self.chats))
        chat = [list(turn) for turn in self.chats[at]]
        kind = rng.choices(
            ["append", "regenerate", "edit", "change", "fork", "shrink", "short", "new"], [8, 3, 3, 2, 2, 2, 1, 1]
        )[0]
        if kind in ("short", "new"):
            return [self.words(1, 3) if kind == "short" else self.words(20, self.limit // 2)]
        if kind == "regenerate":
            return chat[:-1]
        mine = 2 * rng.randrange(len(chat) // 2)
        if kind == "edit":  # what followed is gone
            return [*chat[:mine], self.words(4, 40)]
        if kind == "change":  # what followed stays
            chat[mine][rng.randrange(len(chat[mine]))] = rng.choice(self.alphabet)
        if kind == "fork":
            self.chats.append(chat)
            return [*chat[:mine], chat[mine][: rng.randint(1, len(chat[mine]))] + self.words(1, 10)]
        if kind == "shrink":
            return chat[: mine + 1]
        return [*chat, self.words(2, 40)]

    def run(self, n_requests: int) -> None:
        for _ in range(n_requests):
            chat = self.next_chat()
            if sum(map(len, chat)) > self.limit:
                chat = [self.words(8, 60)]
            answer = self.ask([token for turn in chat for token in turn])
            self.chats = [*self.chats[-3:], [*chat, answer.tokens]]

    def ask(self, prompt: Tokens) -> Answer:
        n, use_cache = self.rng.randint(2, 24), self.rng.random() > 0.1
        options: dict[str, Any] = {"cache_prompt": use_cache, "id_slot": self.pinned}
        refused = 0
        while True:
            try:
                answer = complete(self.server, prompt, n, self.banned, **options)
                break
            except Refusal as refusal:
                # the prompt can be read at the next try, unless another lane is refused just then: an error is for all lanes that work
                assert self.may_refuse and refused < (1 if self.alone else 10), f"{refusal}\n{self.server.log[-3000:]}"
                refused += 1
                self.lanes.clear()
        assert refused == 0 or answer.n_cached == 0, "an answer after a refusal comes from a cache that must be empty"
        self.n_refused += refused
        assert len(answer.tokens) == n and answer.n_cached + answer.n_read == len(prompt)
        self.check(answer, use_cache)
        return answer

    # ---- what must hold

    def check(self, answer: Answer, use_cache: bool) -> None:
        lane = self.lanes.setdefault(answer.lane, Lane())
        shared = common_prefix(lane.tokens, answer.prompt)
        sources = [
            each for each in [lane, *self.past] if 0 < answer.n_cached <= common_prefix(each.tokens, answer.prompt)
        ]
        if answer.n_cached > 0:
            self.n_reused += 1
            assert use_cache and sources, (answer.n_cached, shared)
            owed = 1 + self.draft
            peak = min(each.least for each in sources)
            is_cut = peak > self.budget and not self.restores
            first_whole = SINKS + peak - self.budget - owed if is_cut else 0
            assert answer.n_cached >= first_whole, (answer.n_cached, first_whole, peak)
        if use_cache and self.pinned >= 0 and 0 < shared == len(lane.tokens) < len(answer.prompt):
            assert answer.n_cached >= shared, "a conversation that goes on is read again"
        held = len(answer.prompt) + len(answer.tokens) - 1  # the last token is sampled, not read
        # whichever of them it was; a checkpoint is from before what came after it
        sources = [] if self.restores else sources
        most = max([held, *(each.peak for each in sources)])
        least = max(held, min((each.least for each in sources), default=0))
        lane = self.lanes[answer.lane] = Lane([*answer.prompt, *answer.tokens[:-1]], most, least)
        self.past.append(lane)
        self.answers.append(answer)
        if lane.peak + self.draft <= self.budget:
            self.whole.append(answer)
        elif answer.n_cached == 0:
            self.unread.append(answer)


def tokens_of(seed: int, alphabet: Tokens, n: int) -> Tokens:
    return random.Random(seed).choices(alphabet, k=n)


def common_prefix(a: Tokens, b: Tokens) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def compare(answers: Sequence[Answer], fresh: Server, model: ServedModel) -> int:
    """Ask a server that reads every prompt anew; returns how many tokens were compared."""
    known: dict[tuple[int, ...], Answer] = {}
    n_compared = 0
    for got in answers:
        key, n = tuple(got.prompt), len(got.tokens)
        if key not in known or len(known[key].tokens) < n:
            known[key] = complete(fresh, got.prompt, n, model.banned, cache_prompt=False)
            assert known[key].n_cached == 0
        n_same = common_prefix(got.tokens, known[key].tokens)
        n_compared += n_same
        if n_same < n:
            expected = complete(fresh, got.prompt, n, model.banned, margins=True, cache_prompt=False)
            assert expected.tokens == known[key].tokens[:n], "the fresh server does not repeat its answer"
            assert expected.margins[n_same] <= model.tie, (
                f"{n} tokens after a prompt of {len(got.prompt)}, {got.n_cached} of them cached: token {n_same} is "
                f"{got.tokens[n_same]}, a fresh server's is {expected.tokens[n_same]} by {expected.margins[n_same]:.3f}"
            )
    return n_compared
