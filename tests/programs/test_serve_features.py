"""What llama-server can do beside chats, behind `equip serve`, under a policy: embeddings, reranking, images, adapters, drafts,
states of earlier chats.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dropin_models import write_hybrid, write_lora
from dropin_text import say
from load_clients import send
from models import MODELS, Spec
from projector import png, write_projector, write_qwen2vl, write_reranker
from serving import Served, command, environment, equip_serve, need_program

BUDGET = 96
N_TOKENS = 12  # of an answer
DRAFTS = ("--spec-type", "draft-simple", "--spec-draft-n-max", 4, "--spec-draft-p-min", 0)
# repeats what followed the last token before
LOOKUPS = ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", 1, "--spec-ngram-simple-size-m", 4)

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="signals"),
    pytest.mark.timeout(600),
]

ModelFile = Callable[[Spec | str], Path]
Start = Callable[..., AbstractContextManager[Served]]


def spec(name: str) -> Spec:
    """A tiny model of text: a token for each byte, and a few more."""
    return replace(MODELS[name], tokenizer="bytes", n_vocab=384, n_ctx_train=1024)


@pytest.fixture(scope="module")
def text_model(model_file: ModelFile) -> Path:
    return model_file(spec("llama-gqa"))


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """start(model, *options, policy="none", lanes=1): a server of its own; options go to llama-server."""
    need_program()
    n_started = iter(range(100))

    def run(model: Path, *options: object, policy: str, lanes: int = 1, n_ubatch: int = 64) -> Any:
        bounded = () if policy == "none" else ("--budget", BUDGET)
        given = ("--policy", policy, *bounded, "-np", lanes, "-ub", n_ubatch)
        return equip_serve(tmp_path / f"serve-{next(n_started)}.log", model, *given, "--", *options)

    return run


def post(served: Served, path: str, body: dict[str, Any]) -> dict[str, Any]:
    status, answer = send(int(served.url.rsplit(":", 1)[1]), path, body)
    assert status == 200, answer
    return answer


def refusal(served: Served, path: str, body: dict[str, Any], expected: int) -> str:
    """The sentence of an error of this status; the server lives."""
    status, answer = send(int(served.url.rsplit(":", 1)[1]), path, body)
    assert status == expected, answer
    served.check()
    return str(answer["error"]["message"])


def complete(served: Served, prompt: str, n: int = N_TOKENS, **options: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    return post(served, "/completion", body | options)


def message(text: str, image: int | None = None, size: int = 32) -> dict[str, Any]:
    """What a user says; with an image that this seed makes."""
    if image is None:
        return {"role": "user", "content": text}
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(image, size)}"}}
    return {"role": "user", "content": [{"type": "text", "text": text}, picture]}


def chat(served: Served, messages: list[Any], **options: Any) -> dict[str, Any]:
    """An answer; `text` and `tokens` of it, as they were chosen, beside the server's own fields."""
    body = {"messages": messages, "max_tokens": N_TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": True}
    answer = post(served, "/v1/chat/completions", body | options)
    choice = answer["choices"][0]
    return answer | {
        "text": choice["message"]["content"],
        "tokens": [each["id"] for each in choice["logprobs"]["content"]],
    }


def talk(served: Served, turns: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """The answers of a chat with these messages of the user."""
    messages, answers = list[Any](), []
    for turn in turns:
        messages.append(turn)
        answers.append(chat(served, messages, **options))
        messages.append({"role": "assistant", "content": answers[-1]["text"]})
    return answers


def go_on(served: Served, turns: list[Any], answers: list[dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
    """The next answer of a chat that has these messages and answers."""
    said: list[Any] = []
    for turn, answer in zip(turns, answers, strict=True):
        said += [turn, {"role": "assistant", "content": answer["text"]}]
    return chat(served, [*said, more])


def n_prompt(answer: dict[str, Any]) -> int:
    return int(answer["timings"]["cache_n"] + answer["timings"]["prompt_n"])


def check_bounded(answers: list[dict[str, Any]], policy: str) -> None:
    """Of a chat that goes past the budget: what is kept, and that only new text is read."""
    for answer in answers:
        timings = answer["timings"]
        assert timings["policy"] == policy and timings["n_kept"] <= BUDGET == timings["budget"]
        # the last token was never read
        assert timings["n_kept"] + timings["n_evicted"] == n_prompt(answer) + timings["predicted_n"] - 1
    for before, answer in zip(answers, answers[1:], strict=False):
        assert answer["timings"]["cache_n"] >= n_prompt(before) - 1
    assert answers[-1]["timings"]["n_evicted"] > 4 * BUDGET


# ---- embeddings ------------------------------------------------------------------------------------------------------


POOLED = [("llama-gqa", "mean"), ("llama-gqa", "last"), ("bert", "mean")]


def embeddings(served: Served, texts: list[str]) -> list[list[float]]:
    answer = post(served, "/v1/embeddings", {"input": texts})
    return [each["embedding"] for each in sorted(answer["data"], key=lambda each: int(each["index"]))]


@pytest.mark.parametrize(("name", "pooling"), POOLED)
def test_embeddings_are_those_without_a_policy(model_file: ModelFile, start: Start, name: str, pooling: str) -> None:
    model, texts = model_file(spec(name)), [say(1, 20), say(2, 3), say(1, 20)]
    options, found = ("--embeddings", "--pooling", pooling), {}
    for policy in ("h2o", "none"):
        with start(model, *options, policy=policy, n_ubatch=512) as served:
            found[policy] = embeddings(served, texts)
            told = "this context is made for embeddings: LLAMA_KV_POLICY leaves it alone" in served.log
            assert told == (policy != "none") and "1 lane, policy none; " in served.log
            assert f"try: curl {served.url}/v1/embeddings -d" in served.log
    first, second, again = found["h2o"]
    assert first == pytest.approx(again, abs=1e-5) and first != pytest.approx(second, abs=0.1)
    assert sum(x * x for x in first) == pytest.approx(1, abs=1e-4)
    for ours, theirs in zip(found["h2o"], found["none"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(("name", "pooling"), POOLED)
def test_embeddings_do_not_depend_on_the_texts_beside_them(
    model_file: ModelFile, start: Start, name: str, pooling: str
) -> None:
    options = ("--embeddings", "--pooling", pooling)
    with start(model_file(spec(name)), *options, policy="streaming", lanes=2, n_ubatch=512) as served:
        [alone] = embeddings(served, [say(1, 20)])
        beside, _ = embeddings(served, [say(1, 20), say(2, 3)])
    assert beside == pytest.approx(alone, abs=1e-4)


def test_documents_are_ranked_as_without_a_policy(model_file: ModelFile, tmp_path: Path, start: Start) -> None:
    bert = spec("bert")
    model = write_reranker(model_file(bert), tmp_path / "reranker.gguf", bert.n_embd)
    documents, found = [say(seed, 3) for seed in range(5)], {}
    for policy in ("streaming", "none"):
        with start(model, "--reranking", policy=policy, lanes=2, n_ubatch=512) as served:
            answer = post(served, "/v1/rerank", {"query": "river", "documents": documents})
            found[policy] = {each["index"]: each["relevance_score"] for each in answer["results"]}
            turned = post(served, "/v1/rerank", {"query": "river", "documents": documents[::-1], "top_n": 2})
            best = [4 - each["index"] for each in turned["results"]]
            assert best == sorted(range(5), key=lambda i: -found[policy][i])[:2]
    assert len({round(score, 4) for score in found["none"].values()}) == 5
    assert found["streaming"] == pytest.approx(found["none"], abs=1e-5)


def test_what_was_not_asked_for_at_the_start_is_refused_with_a_sentence(text_model: Path, start: Start) -> None:
    with start(text_model, policy="streaming") as served:
        assert "Start it with `--embeddings`" in refusal(served, "/v1/embeddings", {"input": "Hello"}, 501)
        ranked = {"query": "Hello", "documents": ["a", "b"]}
        assert "Start it with `--reranking`" in refusal(served, "/v1/rerank", ranked, 501)
        asked = {"messages": [message("Hello", 1)], "max_tokens": 4}
        assert "provide the mmproj" in refusal(served, "/v1/chat/completions", asked, 500)
        assert chat(served, [message("Hello")])["tokens"]


def test_models_that_cannot_do_what_is_asked_of_them_do_not_start(
    text_model: Path, model_file: ModelFile, tmp_path: Path
) -> None:
    need_program()
    for model in (text_model, model_file(spec("bert"))):
        assert "error: this model has no head that scores documents" in fails(tmp_path, model, "--reranking")
    assert "error: this model cannot write text token after token" in fails(tmp_path, model_file(spec("bert")))


# ---- images ----------------------------------------------------------------------------------------------------------

KINDS = {"mlp": "llama-gqa", "gemma3": "gemma3"}  # what reads images, and the model that it is for
N_IMAGE = {"mlp": 64, "gemma3": 16}  # tokens


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def seeing(
    kind: str, model_file: ModelFile, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str, Path]]:
    """A model and the option that gives it eyes."""
    shape = spec(KINDS[kind])
    file = write_projector(tmp_path_factory.mktemp("mmproj") / f"{kind}.gguf", kind, shape.n_embd)
    yield model_file(shape), "--mmproj", file


def test_an_image_is_read_as_without_a_policy(kind: str, seeing: tuple[Any, ...], start: Start) -> None:
    # nothing is evicted yet
    asked = [[message("", 1)], [message("", 2)]]
    found = {}
    for policy in ("streaming", "h2o", "none"):
        with start(*seeing, policy=policy, n_ubatch=128) as served:
            found[policy] = [chat(served, each, max_tokens=6) for each in asked]
            blind = chat(served, [message("")], max_tokens=6)
        for each in found[policy]:
            assert n_prompt(each) >= n_prompt(blind) + N_IMAGE[kind] and each["timings"].get("n_evicted", 0) == 0
    for policy in ("streaming", "h2o"):
        assert [each["tokens"] for each in found[policy]] == [each["tokens"] for each in found["none"]]
    first, second = found["streaming"]
    assert first["tokens"] != second["tokens"]
    # what stands before the image is not read again; the image is, since it is another one
    assert second["timings"]["cache_n"] < n_prompt(second) - N_IMAGE[kind]


@pytest.mark.parametrize("policy", ["streaming", "h2o", pytest.param("random", marks=pytest.mark.full)])
def test_a_chat_with_images_goes_on_past_the_budget(seeing: tuple[Any, ...], start: Start, policy: str) -> None:
    turns = [message(say(turn, 8), turn if turn % 2 else None) for turn in range(10)]
    with start(*seeing, policy=policy) as served:
        answers = talk(served, turns)
    check_bounded(answers, policy)
    # an answer depends on the image that was shown last
    turns[-1] = message(say(9, 8), 100)
    with start(*seeing, policy=policy) as served:
        others = talk(served, turns)
    assert [each["tokens"] for each in others[:-1]] == [each["tokens"] for each in answers[:-1]]
    assert others[-1]["tokens"] != answers[-1]["tokens"]


def test_an_image_that_is_larger_than_the_budget_is_read(
    kind: str, model_file: ModelFile, tmp_path: Path, start: Start
) -> None:
    shape, size = spec(KINDS[kind]), 96
    file = write_projector(tmp_path / "mmproj.gguf", kind, shape.n_embd, size)
    with start(model_file(shape), "--mmproj", file, policy="streaming", n_ubatch=256) as served:
        timings = chat(served, [message("Hello", 1, size)])["timings"]
    assert timings["prompt_n"] > 9 * N_IMAGE[kind] > BUDGET
    assert timings["n_kept"] == BUDGET and timings["n_evicted"] > 9 * N_IMAGE[kind] - BUDGET


def test_anthropics_images_are_those_of_openai(seeing: tuple[Any, ...], start: Start) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": png(5)}
    content = [{"type": "text", "text": say(1, 30)}, {"type": "image", "source": source}]
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": N_TOKENS, "temperature": 0}
    with start(*seeing, policy="streaming") as served:
        ours = post(served, "/v1/messages", asked)
        theirs = chat(served, [message(say(1, 30), 5)], ignore_eos=False, cache_prompt=False)
    assert ours["timings"]["n_evicted"] > 0
    assert n_prompt(ours) == n_prompt(theirs)
    assert "".join(part["text"] for part in ours["content"]) == theirs["text"]


@pytest.mark.parametrize("policy", ["streaming", pytest.param("h2o", marks=pytest.mark.full)])
def test_a_chat_with_images_comes_back_from_memory_and_from_disk(
    seeing: tuple[Any, ...], start: Start, tmp_path: Path, policy: str
) -> None:
    # the same text with another image is another chat
    chats = [[message(say(turn, 12), image + turn) for turn in range(3)] for image in (10, 20)]
    after, alone = message(say(9, 4)), []
    given = ("--policy", policy, "--budget", BUDGET, "-np", 1, "-ub", 64, "--slots-dir", tmp_path)

    def serve(number: int) -> AbstractContextManager[Served]:
        return equip_serve(tmp_path / f"lane-{number}.log", seeing[0], *given, "--", *seeing[1:])

    for number, turns in enumerate(chats):
        with serve(number) as served:
            alone.append(talk(served, [*turns, after])[-1])
    assert alone[0]["tokens"] != alone[1]["tokens"]

    with serve(2) as served:
        spoken = [talk(served, turns) for turns in chats]
        post(served, "/slots/0?action=save", {"filename": "second"})
        back = [go_on(served, turns, answers, after) for turns, answers in zip(chats, spoken, strict=True)]
    for ours, expected in zip(back, alone, strict=True):
        assert ours["tokens"] == expected["tokens"]
        assert ours["timings"]["cache_n"] == expected["timings"]["cache_n"] > 3 * BUDGET
    with serve(3) as served:
        post(served, "/slots/0?action=restore", {"filename": "second"})
        restored = go_on(served, chats[1], spoken[1], after)
    assert restored["tokens"] == alone[1]["tokens"]
    assert restored["timings"]["cache_n"] == alone[1]["timings"]["cache_n"]


def test_images_with_rows_and_columns_as_positions_are_refused_at_the_start(
    model_file: ModelFile, tmp_path: Path, start: Start
) -> None:
    shape = spec("qwen2-gqa")
    model = write_qwen2vl(model_file(shape), tmp_path / "model.gguf", shape.head_dim)
    file = write_projector(tmp_path / "mmproj.gguf", "qwen2vl_merger", shape.n_embd)
    assert fails(tmp_path, model, "--mmproj", file).endswith("leave --mmproj out, or use --policy none")
    with start(model, policy="streaming") as served:
        assert chat(served, [message("Hello")])["tokens"]
    with start(model, "--mmproj", file, policy="none") as served:
        assert chat(served, [message("Hello", 1)])["tokens"]


def test_an_image_that_is_larger_than_a_chunk_is_refused_and_leaves_nothing_behind(
    model_file: ModelFile, tmp_path: Path, start: Start
) -> None:
    shape, asked = spec("gemma3"), [message(say(1, 6))]
    file = write_projector(tmp_path / "mmproj.gguf", "gemma3", shape.n_embd)
    with start(model_file(shape), "--mmproj", file, policy="streaming", n_ubatch=N_IMAGE["gemma3"] - 1) as served:
        before = chat(served, asked)
        assert before["timings"]["n_evicted"] == 0
        for seed in range(3):
            shown = {"messages": [message(say(1, 6), seed)], "max_tokens": 4}
            assert "-ub 16 " in refusal(served, "/v1/chat/completions", shown, 400)
            assert chat(served, asked)["tokens"] == before["tokens"]
    with start(model_file(shape), "--mmproj", file, policy="streaming", n_ubatch=N_IMAGE["gemma3"]) as served:
        assert chat(served, [message("Hello", 1)])["tokens"]


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["streaming", "h2o"])
def test_an_adapter_is_applied_as_each_request_says(
    text_model: Path, tmp_path: Path, start: Start, policy: str
) -> None:
    shape = spec("llama-gqa")
    adapter = write_lora(tmp_path / "lora.gguf", shape.n_layer, shape.n_embd, shape.n_head_kv * shape.head_dim)
    prompt, scales = say(1, 40), (1.0, 0.0, 1.0, 0.5, 0.0)
    with start(text_model, "--lora", adapter, policy=policy) as served:
        answers = [complete(served, prompt, lora=[{"id": 0, "scale": scale}]) for scale in scales]
        chats = talk(served, [message(say(turn, 12)) for turn in range(8)])
    check_bounded(chats, policy)
    found: dict[float, Any] = {}
    for scale, answer in zip(scales, answers, strict=True):
        # a lane keeps nothing that was read with other weights
        assert answer["timings"]["cache_n"] == 0 and answer["timings"]["n_evicted"] > BUDGET
        assert found.setdefault(scale, answer["tokens"]) == answer["tokens"]
    assert len({tuple(tokens) for tokens in found.values()}) == 3
    with start(text_model, policy=policy) as served:
        assert complete(served, prompt)["tokens"] == found[0.0]


def test_a_request_that_names_no_adapter_is_not_answered_from_another_ones(
    text_model: Path, tmp_path: Path, start: Start
) -> None:
    shape = spec("llama-gqa")
    adapter = write_lora(tmp_path / "lora.gguf", shape.n_layer, shape.n_embd, shape.n_head_kv * shape.head_dim)
    with start(text_model, "--lora", adapter, policy="streaming") as served:
        expected = complete(served, say(1, 5))
        complete(served, say(1, 5), lora=[{"id": 0, "scale": 0.0}])
        again = complete(served, say(1, 5))
        assert again["tokens"] == expected["tokens"] and again["timings"]["cache_n"] == 0
        # nothing has changed since
        assert complete(served, say(1, 5))["timings"]["cache_n"] > 0


def test_a_chat_that_comes_back_is_not_answered_from_another_adapters_states(
    text_model: Path, tmp_path: Path, start: Start
) -> None:
    shape, chats = spec("llama-gqa"), [say(1, 30), say(2, 30)]
    adapter = write_lora(tmp_path / "lora.gguf", shape.n_layer, shape.n_embd, shape.n_head_kv * shape.head_dim)
    with start(text_model, policy="streaming") as served:
        expected = complete(served, chats[0])
    with start(text_model, "--lora", adapter, policy="streaming") as served:
        complete(served, chats[0])
        complete(served, chats[1], lora=[{"id": 0, "scale": 0.0}])  # the other chat's state is stored
        back = complete(served, chats[0], lora=[{"id": 0, "scale": 0.0}])
    assert back["tokens"] == expected["tokens"] and back["timings"]["cache_n"] == 0


# ---- drafts ----------------------------------------------------------------------------------------------------------


def drafting(model_file: ModelFile, what: str) -> tuple[object, ...]:
    """Options that speculate: with a smaller model, or with what was said before."""
    smaller = replace(spec("llama-gqa"), n_layer=1, seed=33)
    return ("-md", model_file(smaller), *DRAFTS) if what == "a model" else LOOKUPS


@pytest.mark.parametrize("policy", ["streaming", "h2o"])
@pytest.mark.parametrize("what", ["a model", "n-grams"])
def test_drafts_are_made_and_taken_back_past_the_budget(
    text_model: Path, model_file: ModelFile, start: Start, what: str, policy: str
) -> None:
    with start(text_model, *drafting(model_file, what), policy=policy, lanes=2) as served:
        answers = [complete(served, say(seed, 30), n=200) for seed in range(2)]
        chats = talk(served, [message(say(turn, 10)) for turn in range(9)])
        assert "no speculative decoding" not in served.log
    check_bounded(chats, policy)
    n_drafted = sum(each["timings"].get("draft_n", 0) for each in answers)
    n_accepted = sum(each["timings"].get("draft_n_accepted", 0) for each in answers)
    assert 0 < n_accepted < n_drafted
    assert all(each["timings"]["predicted_n"] == 200 for each in answers)


@pytest.mark.parametrize("what", ["a model", "n-grams"])
def test_text_with_drafts_is_that_without_a_policy_while_nothing_is_evicted(
    text_model: Path, model_file: ModelFile, start: Start, what: str
) -> None:
    found = []
    for policy in ("streaming", "none"):
        with start(text_model, *drafting(model_file, what), policy=policy) as served:
            found.append([complete(served, say(seed, 3), n=60) for seed in range(2)])
        assert all(each["timings"].get("n_evicted", 0) == 0 for each in found[-1])
        assert sum(each["timings"].get("draft_n", 0) for each in found[-1]) > 0
    ours, theirs = found
    assert [each["tokens"] for each in ours] == [each["tokens"] for each in theirs]


def test_drafts_that_could_not_be_taken_back_are_not_made_and_a_line_says_so(
    text_model: Path, model_file: ModelFile, tmp_path: Path
) -> None:
    need_program()
    given = ("--policy", "h2o", "--budget", BUDGET, "--recent", 2, "-np", 1, "--")
    with equip_serve(tmp_path / "serve.log", text_model, *given, *drafting(model_file, "a model")) as served:
        assert "warning: no speculative decoding: " in served.log and "give recent=5 or more" in served.log
        timings = complete(served, say(1, 30), n=100)["timings"]
    assert timings["predicted_n"] == 100 and "draft_n" not in timings


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("hybrid", "the draft model has a recurrent state, which cannot take tokens back"),
        ("bert", "the draft model cannot write text token after token"),
        ("other", "draft model vocab type must match target model to use speculation"),
    ],
)
def test_a_draft_model_that_is_of_no_use_is_told_of_and_left_alone(
    text_model: Path, model_file: ModelFile, tmp_path: Path, start: Start, kind: str, why: str
) -> None:
    draft = {
        "hybrid": lambda: write_hybrid(tmp_path / "hybrid.gguf", text_model),
        "bert": lambda: model_file(spec("bert")),
        "other": lambda: model_file(replace(spec("llama-gqa"), n_vocab=900)),
    }[kind]()
    with start(text_model, "-md", draft, *DRAFTS, policy="streaming") as served:
        assert f"warning: no speculative decoding: {why}" in served.log
        timings = complete(served, say(1, 30), n=100)["timings"]
    assert timings["predicted_n"] == 100 and "draft_n" not in timings


def test_a_hybrid_model_takes_a_hybrid_draft(text_model: Path, tmp_path: Path, start: Start) -> None:
    # both are brought back by a checkpoint
    model = write_hybrid(tmp_path / "hybrid.gguf", text_model)
    with start(model, "-md", model, *DRAFTS, policy="streaming") as served:
        assert "no speculative decoding" not in served.log
        timings = complete(served, say(1, 30), n=100)["timings"]
    assert timings["predicted_n"] == 100 and timings["draft_n"] > 0


def test_a_draft_model_without_a_kind_of_speculation_is_warned_of(
    text_model: Path, model_file: ModelFile, start: Start
) -> None:
    with start(text_model, *drafting(model_file, "a model")[:2], policy="streaming") as served:
        assert "warning: a draft model alone drafts nothing: add --spec-type draft-simple" in served.log
        assert "draft_n" not in complete(served, say(1, 30))["timings"]


def test_a_chat_ends_where_the_draft_models_context_does(text_model: Path, model_file: ModelFile, start: Start) -> None:
    with start(text_model, *drafting(model_file, "a model"), policy="streaming") as served:
        said = refusal(served, "/completion", {"prompt": say(1, 400)}, 400)
        assert "(1024 tokens)" in said and said.endswith("the context of a draft model is not bounded")
        assert complete(served, say(1, 10))["tokens"]


# ---- states of earlier chats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["streaming", "random"])
def test_a_hybrid_model_is_brought_back_by_what_the_server_keeps(
    text_model: Path, tmp_path: Path, start: Start, policy: str
) -> None:
    model = write_hybrid(tmp_path / "hybrid.gguf", text_model)
    chats = [[message(say(10 * number + turn, 12)) for turn in range(4)] for number in range(2)]
    after, alone = message(say(90, 4)), []
    for turns in chats:
        with start(model, policy=policy) as served:
            alone.append(talk(served, [*turns, after])[-1])
    with start(model, policy=policy) as served:
        spoken = [talk(served, turns) for turns in chats]
        back = [go_on(served, turns, answers, after) for turns, answers in zip(chats, spoken, strict=True)]
        # the last message once more, otherwise: a recurrent state cannot go back, so a checkpoint is taken back
        edited = go_on(served, chats[1], spoken[1], message(say(91, 4)))
    for ours, expected in zip(back, alone, strict=True):
        assert ours["tokens"] == expected["tokens"]
        assert ours["timings"]["cache_n"] == expected["timings"]["cache_n"] > 2 * BUDGET
        assert ours["timings"]["n_evicted"] == expected["timings"]["n_evicted"] > BUDGET
    assert edited["timings"]["cache_n"] > 2 * BUDGET


# ---- files that are not there, or of another model -------------------------------------------------------------------


def fails(folder: Path, model: Path, *options: object) -> str:
    """The sentence with which a server does not start."""
    given = ("--port", 0, "--budget", BUDGET, "-np", 1, "--", *options)
    words = command(model, *given)
    done = subprocess.run(words, env=environment(), cwd=folder, capture_output=True, text=True, timeout=120)
    *notes, sentence = done.stderr.strip().splitlines()
    assert done.returncode == 1 and sentence.startswith("error: "), done.stderr
    assert not [note for note in notes if note.startswith("error")]
    return sentence


def test_files_that_do_not_fit_are_refused_at_the_start(text_model: Path, tmp_path: Path) -> None:
    need_program()
    shape, missing = spec("llama-gqa"), tmp_path / "missing.gguf"
    for option in ("--mmproj", "--lora", "-md"):
        assert f"{missing}" in fails(tmp_path, text_model, option, missing)
    narrow = write_projector(tmp_path / "narrow.gguf", "mlp", shape.n_embd // 2)
    assert "mismatch between text model" in fails(tmp_path, text_model, "--mmproj", narrow)
    assert "Failed to load CLIP model" in fails(tmp_path, text_model, "--mmproj", text_model)
    wide = write_lora(tmp_path / "wide.gguf", shape.n_layer, 2 * shape.n_embd, shape.n_head_kv * shape.head_dim)
    assert "incorrect shape" in fails(tmp_path, text_model, "--lora", wide)
