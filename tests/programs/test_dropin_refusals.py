"""llama-cpp-python on a bounded cache that refuses: no answer comes from another chat, and what no policy is for is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dropin_models import write_hybrid
from dropin_support import ProgramError, binding_environment, binding_python, run_scenario, serve, spec
from dropin_text import say
from models import Spec

pytestmark = pytest.mark.timeout(900)  # the first run sets the binding up

CAT, DOG = "My cat is called Tobelin. " * 30, "My dog is called Rusk. " * 30
POLICY = "streaming:budget=128"


@pytest.fixture(scope="module")
def model_of(
    upstream_file: Callable[[str], Path],
    model_file: Callable[[Spec | str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """A model per kind of memory, all with the same tokenizer."""

    def get(memory: str) -> Path:
        if memory != "hybrid":
            return model_file(spec(upstream_file, {"plain": "llama", "iswa": "gemma3"}[memory]))
        path = tmp_path_factory.getbasetemp() / "hybrid-words.gguf"
        return path if path.is_file() else write_hybrid(path, model_file(spec(upstream_file)))

    return get


# ---- restores --------------------------------------------------------------------------------------------------------


def check_calls(calls: list[dict[str, Any]]) -> None:
    """Each answer is the prompt's own."""
    for call in calls:
        assert "error" not in call and call["text"] in call["may"], call


@pytest.mark.parametrize(
    ("memory", "policy"),
    [
        ("plain", POLICY),
        ("plain", "h2o:budget=128"),
        ("plain", "h2o:budget=128,scope=token"),
        ("iswa", POLICY),
        ("hybrid", POLICY),
    ],
)
def test_a_chat_after_a_refused_restore_is_answered_from_its_own_text(
    model_of: Callable[[str], Path], memory: str, policy: str
) -> None:
    # the binding sets its list of tokens before it asks for the restore; what is in the cache is the other chat's
    report = run_scenario("switched_chats", model_of(memory), policy, prompts=[CAT, DOG], order="0100").result
    calls = report["calls"]
    assert calls[1]["evicted"] > 0 and set(calls[0]["may"]).isdisjoint(calls[1]["may"])
    check_calls(calls)


def test_a_chat_within_the_budget_is_answered_from_its_own_text(model_of: Callable[[str], Path]) -> None:
    # the state can be saved then
    prompts = [CAT[:130], DOG[:115]]
    report = run_scenario(
        "switched_chats", model_of("plain"), "streaming:budget=256", prompts=prompts, order="01001100"
    ).result
    calls = report["calls"]
    assert calls[-1]["evicted"] == 0 and set(calls[0]["may"]).isdisjoint(calls[1]["may"])
    check_calls(calls)


def test_the_openai_server_with_a_cache_answers_from_the_right_chat(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    command = [str(binding_python()), "-m", "llama_cpp.server", "--model", str(model_of("plain")), "--n_ctx", "8192"]
    command += ["--n_threads", "1", "--n_threads_batch", "1"]
    ban = {"2": -100, "32000": -100, "32007": -100}

    def ask(server: Any, prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "logit_bias": ban}
        return str(server.call("/v1/completions", body)["choices"][0]["text"])

    may: dict[str, list[str]] = {}
    for prompt in (CAT, DOG):
        log = tmp_path / f"alone-{len(prompt)}.log"
        with serve(command, binding_environment(POLICY), "/v1/models", log) as server:
            may[prompt] = [ask(server, prompt), ask(server, prompt)]
    assert set(may[CAT]).isdisjoint(may[DOG])
    with serve([*command, "--cache", "true"], binding_environment(POLICY), "/v1/models", tmp_path / "log") as server:
        failed = False
        for prompt in (CAT, DOG, CAT, CAT, DOG, DOG):
            try:
                assert ask(server, prompt) in may[prompt]
                failed = False
            except ProgramError:
                server.check()
                assert not failed, "the request after a refusal fails too"
                failed = True
        assert not failed


@pytest.mark.parametrize("memory", ["plain", "iswa", "hybrid"])
def test_a_refused_restore_leaves_an_empty_cache_that_takes_no_rest(
    model_of: Callable[[str], Path], memory: str
) -> None:
    report = run_scenario("refused_restore", model_of(memory), "streaming:budget=128").result
    assert not report["restored"] and report["after"] == [-1, -1]
    assert report["tail"] == [False] * 4 and report["decoded"] == [False] * 3
    assert report["cleared"] and report["decoded_again"]
    assert report["logits"] == report["logits_fresh"]


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "uncut"])
@pytest.mark.parametrize("n_after", [20, 400], ids=["before-evictions", "after-evictions"])
@pytest.mark.parametrize("policy", [POLICY, "random:budget=128,scope=token"])
def test_a_checkpoint_of_a_hybrid_goes_on_from_one_place(
    model_of: Callable[[str], Path], policy: str, n_after: int, cut: bool
) -> None:
    # attention goes back to the checkpoint with the recurrent layers, also where a program does not remove what came after it
    report = run_scenario("checkpoint", model_of("hybrid"), policy, n_after=n_after, cut=cut).result
    assert report["accepted"] and report.get("cut", True) and report["decoded"]
    np.testing.assert_allclose(report["logits"], report["logits_fresh"], atol=1e-2)
    assert report["cleared"] and report["decoded_again"]


# ---- drafts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [POLICY, "h2o:budget=128", "h2o:budget=128,scope=layer", "h2o:budget=128,scope=token", "random:budget=128"],
)
def test_a_rejected_draft_does_not_end_the_answer(model_of: Callable[[str], Path], policy: str) -> None:
    prompt = " ".join([say(1, 12)] * 4)
    report = run_scenario("looked_up", model_of("plain"), policy, prompt=prompt, n=300).result
    assert report["drafted_evicted"] > 128 and report["plain_evicted"] > 128
    assert any(n > 1 for n in report["drafted_evals"][1:]), "nothing was drafted"
    assert len(report["drafted_evals"]) > 300 / 11, "every draft was accepted"


def test_a_draft_leaves_an_answer_within_the_budget(model_of: Callable[[str], Path]) -> None:
    prompt = " ".join([say(1, 12)] * 4)
    report = run_scenario("looked_up", model_of("plain"), "h2o:budget=512", prompt=prompt, n=100).result
    assert (report["drafted_evicted"], report["plain_evicted"]) == (0, 0)
    assert report["drafted"] == report["plain"]


# ---- contexts that no policy is for ----------------------------------------------------------------------------------


def test_an_embedding_context_is_left_alone(model_of: Callable[[str], Path]) -> None:
    texts = [say(1, 300), say(2, 40), say(3, 200)]
    outcome = run_scenario("embeddings", model_of("plain"), POLICY, texts=texts)
    report = outcome.result
    assert "LLAMA_KV_POLICY:" not in outcome.stderr and not report["policy-bounded"]
    for pooling in (-1, 1):
        np.testing.assert_allclose(report[f"policy-{pooling}"], report[f"plain-{pooling}"], rtol=0, atol=1e-6)
