"""llama-server's other contexts and what it changes in mid-chat: drafts, embeddings, adapters, copies of a lane."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dropin_models import write_hybrid, write_lora
from dropin_support import Server, clean_environment, serve, server_program
from models import MODELS, Spec
from server_histories import (
    N_CTX,
    Answer,
    Client,
    Refusal,
    ServedModel,
    Tokens,
    compare,
    complete,
    launch,
    post,
    tokens_of,
)

pytestmark = pytest.mark.timeout(3600)  # the first run builds the server

BUDGET = 96
POLICY = f"streaming:budget={BUDGET}"
SHAPE = replace(MODELS["llama-gqa"], tokenizer="bytes", n_vocab=384, n_ctx_train=N_CTX)
SMALLER = replace(SHAPE, n_layer=1, seed=33)
WORDS = [*range(320, 336)]

Start = Callable[..., AbstractContextManager[Server]]
ModelFile = Callable[[Spec], Path]


@pytest.fixture(scope="module")
def program() -> Path:
    return server_program()


@pytest.fixture
def model(model_file: ModelFile) -> ServedModel:
    return ServedModel(model_file(SHAPE), WORDS, [*range(259)])


@pytest.fixture
def start(program: Path, model: ServedModel, tmp_path: Path) -> Start:
    """start(policy, *arguments, lanes=N): a server of its own."""

    def run(policy: str, *arguments: str, **options: Any) -> AbstractContextManager[Server]:
        log = tmp_path / f"server-{len(list(tmp_path.iterdir()))}.log"
        log.touch()
        return launch(program, options.pop("model", model), policy, log, *arguments, **options)

    return run


def n_bounded(server: Server) -> int:
    """Contexts of the server that have a policy."""
    return server.log.count("KV cache bounded")


# ---- contexts that no policy is for ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [POLICY, f"h2o:budget={BUDGET}"])
def test_a_draft_model_is_left_alone_and_its_rejected_drafts_end_nothing(
    start: Start, model_file: ModelFile, model: ServedModel, policy: str
) -> None:
    # the server takes rejected drafts back from both contexts, and aborts where either refuses
    drafts = ["-md", str(model_file(SMALLER)), "--spec-type", "draft-simple", "-fit", "off"]
    drafts += ["--spec-draft-n-max", "6", "--spec-draft-p-min", "0"]
    with start(policy, *drafts) as server, start(policy, "--cache-ram", "0") as fresh:
        client = Client(server, 4, WORDS, model.banned, BUDGET, 400, 6, pinned=0)
        client.run(30)
        assert n_bounded(server) == 1
        assert client.n_reused > 5
        body = {"prompt": tokens_of(1, WORDS, 20), "n_predict": 40, "temperature": 0, "ignore_eos": True}
        assert post(server, "/completion", body)["timings"]["draft_n"] > 0
        assert compare(client.whole, fresh, model) > 20


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_embedding_server_is_left_alone(program: Path, model: ServedModel, tmp_path: Path, pooling: str) -> None:
    # without -np: four requests share one cache then, which a policy would refuse
    command = [str(program), "-m", str(model.path), "-c", "2048", "-b", "512", "-ub", "512", "-t", "1", "--embedding"]
    got = {}
    for policy in (POLICY, ""):
        env = clean_environment(LLAMA_KV_POLICY=policy)
        with serve([*command, "--pooling", pooling], env, "/health", tmp_path / f"{policy[:4]}.log") as server:
            vectors = [
                server.call("/v1/embeddings", {"input": tokens_of(i, WORDS, n)}) for i, n in enumerate((300, 20))
            ]
            got[policy] = [vector["data"][0]["embedding"] for vector in vectors]
            assert n_bounded(server) == 0
    np.testing.assert_allclose(got[POLICY], got[""], rtol=0, atol=1e-6)


# ---- adapters --------------------------------------------------------------------------------------------------------


def talk(server: Server, model: ServedModel, scales: list[float], n_words: int) -> list[Answer]:
    """One chat; each turn asks for the adapter at another scale."""
    prompt: Tokens = []
    answers = []
    for turn, scale in enumerate(scales):
        prompt = prompt + tokens_of(turn, WORDS, n_words)
        lora = [{"id": 0, "scale": scale}]
        answers.append(complete(server, prompt, 12, model.banned, cache_prompt=True, lora=lora))
        prompt = prompt + answers[-1].tokens
    return answers


@pytest.mark.parametrize("policy", [POLICY, f"h2o:budget={BUDGET}", f"tova:budget={BUDGET},scope=token"])
def test_an_adapter_that_is_switched_in_mid_chat_keeps_nothing_of_the_other(
    start: Start, model: ServedModel, tmp_path: Path, policy: str
) -> None:
    adapter = write_lora(tmp_path / "lora.gguf", SHAPE.n_layer, SHAPE.n_embd, SHAPE.n_head_kv * SHAPE.head_dim)
    lora = ["--lora", str(adapter)]
    scales = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    with start(policy, *lora) as server, start(policy, *lora, "--cache-ram", "0") as fresh:
        for n_words in (4, 60):  # within the budget, and beyond it
            answers = talk(server, model, scales, n_words)
            for turn, (answer, scale) in enumerate(zip(answers, scales, strict=True)):
                if turn > 0 and scale == scales[turn - 1]:
                    assert answer.n_cached > 0
                    continue
                assert answer.n_cached == 0
                options: dict[str, Any] = {"cache_prompt": False, "lora": [{"id": 0, "scale": scale}]}
                assert answer.tokens == complete(fresh, answer.prompt, 12, model.banned, **options).tokens
                options["lora"] = [{"id": 0, "scale": 1 - scale}]
                assert answer.tokens != complete(fresh, answer.prompt, 12, model.banned, **options).tokens


def test_an_adapter_of_all_requests_keeps_nothing_of_the_other(
    start: Start, model: ServedModel, tmp_path: Path
) -> None:
    adapter = write_lora(tmp_path / "lora.gguf", SHAPE.n_layer, SHAPE.n_embd, SHAPE.n_head_kv * SHAPE.head_dim)
    got: dict[str, list[Tokens]] = {}
    for policy in (f"h2o:budget={BUDGET}", ""):
        got[policy] = []
        with start(policy, "--lora", str(adapter)) as server:
            prompt: Tokens = []
            for turn in range(8):
                post(server, "/lora-adapters", [{"id": 0, "scale": turn // 2 % 2}])
                prompt = prompt + tokens_of(turn, WORDS, 20)
                answer = complete(server, prompt, 4, model.banned, cache_prompt=True)
                assert answer.n_cached == (len(prompt) - 21 if turn % 2 else 0)
                prompt = prompt + answer.tokens
                got[policy].append(answer.tokens)
    for policy in got:
        assert got[policy][:3] == got[""][:3], "within the budget"


# ---- copies of a lane ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "policy"),
    [
        ("plain", f"h2o:budget={BUDGET}"),
        ("plain", f"streaming:budget={BUDGET},update=gather"),
        ("iswa", f"h2o:budget={BUDGET},scope=token"),
        ("hybrid", POLICY),
    ],
)
@pytest.mark.parametrize("n_words", [40, 300], ids=["before-evictions", "after-evictions"])
def test_no_second_choice_is_written_from_an_empty_cache(
    start: Start, model_file: ModelFile, tmp_path: Path, memory: str, policy: str, n_words: int
) -> None:
    # the server copies the lane of the first choice, and is not told when that is refused
    path = model_file(
        replace(MODELS["gemma3"], tokenizer="bytes", n_vocab=384, n_ctx_train=N_CTX) if memory == "iswa" else SHAPE
    )
    if memory == "hybrid":
        path = write_hybrid(tmp_path / "hybrid.gguf", path)
    model = ServedModel(path, WORDS, [*range(259)])
    prompt = tokens_of(7, WORDS, n_words)
    with start(policy, lanes=2, model=model) as server:
        body: dict[str, Any] = {"prompt": prompt, "n_predict": 12, "temperature": 0, "n_cmpl": 2, "return_tokens": True}
        body["logit_bias"] = [[token, False] for token in model.banned]
        try:
            choices = post(server, "/completion", body)
        except Refusal:
            server.check()  # a refusal is honest
        else:
            assert len(choices) == 2 and choices[0]["tokens"] == choices[1]["tokens"]
        again = complete(server, prompt, 12, model.banned, cache_prompt=False)
        assert again.n_cached == 0
