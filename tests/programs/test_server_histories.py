"""llama-server on bounded caches, with the histories that clients make: it lives, and no answer comes from another text."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from dropin_models import write_hybrid
from dropin_support import Server, server_program
from models import MODELS, Spec
from scopes import SCOPES
from server_histories import N_CTX, Client, Lane, ServedModel, compare, complete, launch, post

pytestmark = pytest.mark.timeout(3600)  # the first run builds the server

BUDGET = 96
LIMIT = 400  # tokens of a prompt: four budgets
DRAFT = 8

ALL = [(policy, scope) for policy, scopes in SCOPES.items() for scope in scopes]
HYBRID = [("streaming", "token"), ("random", "token")]  # others need attention in every layer

# ngram-simple repeats what followed the last two tokens before: with few words in use it drafts all the time, mostly wrong
SPECULATE = ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "2", "--spec-ngram-simple-size-m", str(DRAFT)]


@pytest.fixture(scope="module")
def program() -> Path:
    return server_program()


@pytest.fixture(scope="module")
def model_of(
    model_file: Callable[[Spec | str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], ServedModel]:
    """Tiny models with random weights, one per kind of memory; their text is in few tokens, so that n-grams come back."""

    def spec(name: str) -> Spec:
        return replace(MODELS[name], tokenizer="bytes", n_vocab=384, n_ctx_train=N_CTX)

    def get(memory: str) -> ServedModel:
        if memory == "hybrid":
            path = tmp_path_factory.getbasetemp() / "hybrid.gguf"
            path = path if path.is_file() else write_hybrid(path, model_file(spec("llama-gqa")))
        else:
            path = model_file(spec({"plain": "llama-gqa", "iswa": "gemma3"}[memory]))
        return ServedModel(path, [*range(320, 336)], [*range(259)])

    return get


Start = Callable[..., AbstractContextManager[Server]]


@pytest.fixture
def start(program: Path, tmp_path: Path) -> Start:
    """start(model, policy, *arguments, lanes=N): a server of its own."""

    def run(model: ServedModel, policy: str, *arguments: str, lanes: int = 1) -> AbstractContextManager[Server]:
        log = tmp_path / f"server-{len(list(tmp_path.iterdir()))}.log"
        log.touch()
        return launch(program, model, policy, log, *arguments, lanes=lanes)

    return run


def text(policy: str, scope: str, budget: int = BUDGET) -> str:
    return f"{policy}:budget={budget},scope={scope}"


def one_lane(
    start: Start, model: ServedModel, policy: str, n: int, speculate: bool, seed: int, restores: bool, limit: int
) -> None:
    """One request after the other; every prompt that was read as a whole is answered as by a fresh server."""
    arguments = SPECULATE if speculate else []
    with start(model, policy, *arguments) as server, start(model, policy, "--cache-ram", "0") as fresh:
        draft = DRAFT if speculate else 0
        client = Client(server, seed, model.alphabet, model.banned, BUDGET, limit, draft, pinned=0, restores=restores)
        client.run(n)
        assert client.n_reused > n // 5, "nothing is reused: the history is no test"
        # a draft is verified in a chunk of its own, after which other tokens are kept than after single ones
        answers = client.whole + ([] if speculate else client.unread)
        n_compared = compare(answers, fresh, model)
        assert n_compared > n, f"{n_compared} tokens were compared"


def four_lanes(
    start: Start, model: ServedModel, policy: str, n: int, speculate: bool, seed: int, restores: bool, limit: int
) -> None:
    """Four clients at once, each with a lane of its own, then one that leaves the choice to the server."""
    arguments = SPECULATE if speculate else []
    with start(model, policy, *arguments, lanes=4) as server, start(model, policy, "--cache-ram", "0") as fresh:
        draft = DRAFT if speculate else 0
        past: list[Lane] = []
        clients = [
            Client(
                server,
                seed + i,
                model.alphabet,
                model.banned,
                BUDGET,
                limit,
                draft,
                pinned=i,
                restores=restores,
                past=past,
                alone=False,
            )
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
        free = Client(
            server, seed + 4, model.alphabet, model.banned, BUDGET, limit, draft, restores=restores, past=past
        )
        free.lanes = {i: lane for i, client in enumerate(clients) for lane in client.lanes.values()}
        free.run(n // 5)
        # what other lanes do moves the limits of chunks, and with them what is kept
        answers = [answer for client in [*clients, free] for answer in client.whole]
        assert compare(answers, fresh, model) > n


def history(
    start: Start, model: ServedModel, policy: str, n: int, seed: int, restores: bool = False, limit: int = LIMIT
) -> None:
    """n requests: half of them in one lane, half in four; one half with speculation."""
    one_lane(start, model, policy, n // 2, seed % 2 == 1, seed, restores, limit)
    four_lanes(start, model, policy, n // 2, seed % 2 == 0, seed + 100, restores, limit)


@pytest.mark.parametrize(
    ("memory", "policy", "scope"),
    [
        ("plain", "streaming", "token"),
        ("plain", "h2o", "head"),
        ("iswa", "h2o", "layer"),
        ("hybrid", "random", "token"),
    ],
)
def test_a_short_history_is_answered_from_its_own_text(
    start: Start, model_of: Callable[[str], ServedModel], memory: str, policy: str, scope: str
) -> None:
    seed = len(memory) + len(policy) + len(scope)
    history(start, model_of(memory), text(policy, scope), 200, seed, restores=memory == "hybrid")


@pytest.mark.parametrize(
    ("memory", "policy", "scope"),
    [("plain", "h2o", "head"), ("plain", "streaming", "token"), ("iswa", "tova", "token")],
)
def test_a_draft_that_is_longer_than_the_recent_tokens_does_not_end_the_server(
    start: Start, model_of: Callable[[str], ServedModel], memory: str, policy: str, scope: str
) -> None:
    # 48 drafted tokens are two chunks here, and a budget of 64 protects 16
    model, draft, budget = model_of(memory), 48, 64
    with start(model, text(policy, scope, budget), *SPECULATE[:-1], str(draft)) as server:
        client = Client(server, 3, model.alphabet, model.banned, budget, LIMIT, draft, pinned=0)
        client.run(40)
        assert client.n_reused > 8


def test_a_hybrid_takes_back_no_state_of_another_text(start: Start, model_of: Callable[[str], ServedModel]) -> None:
    # a server keeps the state before the last four tokens of a prompt, here the one behind the first token
    model = model_of("hybrid")
    a, b, *rest = model.alphabet
    prompts = [a, *rest[:4]], [b, *rest[:9]], [b, *rest[5:12]]
    with start(model, "none") as server, start(model, "none", "--cache-ram", "0") as fresh:
        answers = [complete(server, prompt, 8, model.banned, id_slot=0) for prompt in prompts]
        assert compare(answers, fresh, model) == 24, "the third answer comes from the first text's state"


@pytest.mark.full
@pytest.mark.parametrize(("policy", "scope"), ALL, ids=lambda x: x)
@pytest.mark.parametrize("memory", ["plain", "iswa"])
def test_a_history_is_answered_from_its_own_text(
    start: Start, model_of: Callable[[str], ServedModel], memory: str, policy: str, scope: str
) -> None:
    seed = ALL.index((policy, scope)) + (memory == "iswa")
    history(start, model_of(memory), text(policy, scope), 200, seed)


@pytest.mark.full
@pytest.mark.parametrize(("policy", "scope"), HYBRID, ids=lambda x: x)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_history_of_a_hybrid_is_answered_from_its_own_text(
    start: Start, model_of: Callable[[str], ServedModel], policy: str, scope: str, seed: int
) -> None:
    history(start, model_of("hybrid"), text(policy, scope), 200, seed, restores=True)


@pytest.mark.real
@pytest.mark.parametrize("policy", ["streaming", "h2o"])
def test_a_history_of_a_real_model_is_answered_from_its_own_text(
    start: Start, real_file: Callable[[str], Path], policy: str
) -> None:
    # weights in f32: with quantised ones, what an f16 cache rounds moves logits by 0.8 (docs/lab-notes.md)
    path = real_file("smollm2-f32")
    words = "the river runs to the sea and the old man looks at it from his window every day"
    with start(ServedModel(path, [], []), "none") as server:
        alphabet = sorted(set(post(server, "/tokenize", {"content": words})["tokens"]))
    # banned: what llama.cpp takes for an end
    history(
        start,
        ServedModel(path, alphabet, [0, 2, 4]),
        text(policy, SCOPES[policy][0]),
        120,
        len(policy),
        limit=200,
    )
