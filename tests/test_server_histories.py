"""llama-server on bounded caches, with the histories that clients make: it lives, and no answer comes from another text."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from dropin_support import Server, clean_environment, serve
from models import MODELS, Spec
from server_histories import Client, Tokens, compare, write_hybrid

pytestmark = pytest.mark.timeout(3600)  # the first run builds the server

BUDGET = 96
N_UBATCH = 32
N_CTX = 1024  # of a lane
LIMIT = 400  # tokens of a prompt: four budgets
DRAFT = 8

SCOPES = {
    "streaming": ["token"],
    "h2o": ["head", "layer", "token"],
    "tova": ["layer", "head", "token"],
    "snapkv": ["head", "layer", "token"],
    "a2sf": ["head", "layer", "token"],
    "vatp": ["head", "layer"],
    "caote": ["head", "layer"],
    "fastcaote": ["head", "layer"],
    "pagedeviction": ["layer", "token"],
    "keydiff": ["head", "layer"],
    "knorm": ["head", "layer"],
    "rkv": ["head"],
    "random": ["token", "layer", "head"],
}
ALL = [(policy, scope) for policy, scopes in SCOPES.items() for scope in scopes]
HYBRID = [("streaming", "token"), ("random", "token")]  # others need attention in every layer

# ngram-simple repeats what followed the last two tokens before: with few words in use it drafts all the time, mostly wrong
SPECULATE = ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "2", "--spec-ngram-simple-size-m", str(DRAFT)]


@dataclass(frozen=True)
class Tested:
    """A model, the tokens that clients write, and those that an answer must not have because they end it."""

    path: Path
    alphabet: Tokens
    banned: Tokens


@pytest.fixture(scope="module")
def program() -> Path:
    given = os.environ.get("EQUIP_TEST_SERVER")
    build: Any = (lambda _: given) if given else importlib.import_module("upstream_tests").build
    return Path(build("server")) / ("llama-server.exe" if os.name == "nt" else "llama-server")


@pytest.fixture(scope="module")
def model_of(
    model_file: Callable[[Spec | str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Tested]:
    """Tiny models with random weights, one per kind of memory; their text is in few tokens, so that n-grams come back."""

    def spec(name: str) -> Spec:
        return replace(MODELS[name], tokenizer="bytes", n_vocab=384, n_ctx_train=N_CTX)

    def get(memory: str) -> Tested:
        if memory == "hybrid":
            path = tmp_path_factory.getbasetemp() / "hybrid.gguf"
            path = path if path.is_file() else write_hybrid(path, model_file(spec("llama-gqa")))
        else:
            path = model_file(spec({"plain": "llama-gqa", "iswa": "gemma3"}[memory]))
        return Tested(path, [*range(320, 336)], [2])

    return get


Start = Callable[..., Any]


@pytest.fixture
def start(program: Path, tmp_path: Path) -> Start:
    """start(model, policy, *arguments, lanes=N): a server of its own."""

    @contextmanager
    def run(tested: Tested, policy: str, *arguments: str, lanes: int = 1) -> Iterator[Server]:
        command = [str(program), "-m", str(tested.path), "-c", str(N_CTX * lanes), "-np", str(lanes), "--no-kv-unified"]
        command += ["-b", str(2 * N_UBATCH), "-ub", str(N_UBATCH), "-t", "1", "-tb", "1", "--no-warmup", *arguments]
        log = tmp_path / f"server-{len(list(tmp_path.iterdir()))}.log"
        with serve(command, clean_environment(LLAMA_KV_POLICY=policy), "/health", log) as server:
            yield server

    return run


def text(policy: str, scope: str, budget: int = BUDGET) -> str:
    return f"{policy}:budget={budget},scope={scope}"


def one_lane(start: Start, tested: Tested, policy: str, n: int, speculate: bool, seed: int, refuses: bool) -> None:
    """One request after the other; every prompt that was read as a whole is answered as by a fresh server."""
    arguments = SPECULATE if speculate else []
    with start(tested, policy, *arguments) as server, start(tested, policy, "--cache-ram", "0") as fresh:
        draft = DRAFT if speculate else 0
        client = Client(
            server, seed, tested.alphabet, tested.banned, BUDGET, LIMIT, draft, pinned=0, may_refuse=refuses
        )
        client.run(n)
        assert client.n_reused > n // 5, "nothing is reused: the history is no test"
        # a draft is verified in a chunk of its own, after which other tokens are kept than after single ones
        answers = client.whole + ([] if speculate else client.unread)
        n_compared = compare(answers, fresh, tested.banned)
        assert n_compared > 3 * n, f"{n_compared} tokens were compared"


def four_lanes(start: Start, tested: Tested, policy: str, n: int, speculate: bool, seed: int, refuses: bool) -> None:
    """Four clients at once, each with a lane of its own, then one that leaves the choice to the server."""
    arguments = SPECULATE if speculate else []
    with start(tested, policy, *arguments, lanes=4) as server, start(tested, policy, "--cache-ram", "0") as fresh:
        draft = DRAFT if speculate else 0
        clients = [
            Client(server, seed + i, tested.alphabet, tested.banned, BUDGET, LIMIT, draft, pinned=i, may_refuse=refuses)
            for i in range(4)
        ]
        failures: list[BaseException] = []

        def work(client: Client) -> None:
            try:
                client.run(n // 5)
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=work, args=[client]) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        free = Client(server, seed + 4, tested.alphabet, tested.banned, BUDGET, LIMIT, draft, may_refuse=refuses)
        free.lanes = {i: lane for i, client in enumerate(clients) for lane in client.lanes.values()}
        free.run(n // 5)
        # what other lanes do moves the limits of chunks, and with them what is kept
        answers = [answer for client in [*clients, free] for answer in client.whole]
        assert compare(answers, fresh, tested.banned) > n


def history(start: Start, tested: Tested, policy: str, n: int, seed: int, refuses: bool = False) -> None:
    """n requests: half of them in one lane, half in four; one half with speculation."""
    one_lane(start, tested, policy, n // 2, seed % 2 == 1, seed, refuses)
    four_lanes(start, tested, policy, n // 2, seed % 2 == 0, seed + 100, refuses)


@pytest.mark.parametrize(
    ("memory", "policy", "scope"),
    [
        ("plain", "streaming", "token"),
        ("plain", "h2o", "head"),
        ("iswa", "h2o", "layer"),
        ("hybrid", "random", "token"),
    ],
)
def test_short_history_ends_the_server_or_is_answered_from_another_text(
    start: Start, model_of: Callable[[str], Tested], memory: str, policy: str, scope: str
) -> None:
    seed = len(memory) + len(policy) + len(scope)
    history(start, model_of(memory), text(policy, scope), 60, seed, refuses=memory == "hybrid")


@pytest.mark.full
@pytest.mark.parametrize(("policy", "scope"), ALL, ids=lambda x: x)
@pytest.mark.parametrize("memory", ["plain", "iswa"])
def test_history_ends_the_server_or_is_answered_from_another_text(
    start: Start, model_of: Callable[[str], Tested], memory: str, policy: str, scope: str
) -> None:
    seed = ALL.index((policy, scope)) + (memory == "iswa")
    history(start, model_of(memory), text(policy, scope), 200, seed)


@pytest.mark.full
@pytest.mark.parametrize(("policy", "scope"), HYBRID, ids=lambda x: x)
@pytest.mark.parametrize("seed", [1, 2])
def test_history_of_a_hybrid_ends_the_server_or_is_answered_from_another_text(
    start: Start, model_of: Callable[[str], Tested], policy: str, scope: str, seed: int
) -> None:
    history(start, model_of("hybrid"), text(policy, scope), 200, seed, refuses=True)
