"""Speculative decoding in upstream's programs on bounded caches: drafts from n-grams, which are often rejected.

A rewind that is refused ends llama-server. What a random model writes repeats itself soon, so drafts are made and half of
them rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from dropin_support import Server, clean_environment, run_scenario, serve, server_program, spec
from models import Spec

pytestmark = pytest.mark.timeout(3600)  # the first run builds the server

N_DRAFT = 6
DRAFTS = ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "1", "--spec-ngram-simple-size-m", str(N_DRAFT))
BOUNDED = {
    "streaming": "streaming:budget=128",
    "h2o per head": "h2o:budget=128,recent=16",
    "tova per token": "tova:budget=128,recent=8,scope=token",
    "snapkv, gather": "snapkv:budget=128,recent=12,update=gather",
    "pages": "pagedeviction:budget=128,recent=16",
    "eager": "rkv:budget=256,recent=7,evict_every=64",
    "random": "random:budget=128,recent=7,positions=cache",
}

Start = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(scope="module")
def program() -> Path:
    return server_program()


@pytest.fixture
def start(
    program: Path, upstream_file: Callable[[str], Path], model_file: Callable[[Spec | str], Path], tmp_path: Path
) -> Start:
    """start(arch, policy, *arguments): a server of its own."""

    @contextmanager
    def run(arch: str, policy: str, *arguments: str) -> Iterator[Server]:
        model = model_file(spec(upstream_file, arch))
        command = [str(program), "-m", str(model), "-c", "4096", "-b", "64", "-ub", "32", "-t", "1", "-tb", "1"]
        log = tmp_path / f"server-{len(list(tmp_path.iterdir()))}.log"
        environment = clean_environment(LLAMA_KV_POLICY=policy)
        with serve(
            [*command, "-ctk", "f32", "-ctv", "f32", "-fa", "off", *arguments], environment, "/health", log
        ) as server:
            yield server

    return run


def complete(server: Server, prompt: str, n: int, **options: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
    return server.call("/completion", body | options)


PROMPTS = [
    f"Tell me about the {what} of the sea, and about the {what} of the land."
    for what in ("salt", "wind", "birds", "light")
]


@pytest.mark.parametrize("name", BOUNDED)
def test_drafts_never_end_the_server(start: Start, name: str) -> None:
    """Two slots at once, so that a batch with a draft is split, far past the budget."""
    arch = "gemma3" if name == "streaming" else "llama"
    with start(arch, BOUNDED[name], "-np", "2", "--no-kv-unified", *DRAFTS) as server, ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda prompt: complete(server, prompt, 300), PROMPTS))
        # a chat that goes on, and one whose answer is made again
        more = [complete(server, PROMPTS[0] + answers[0]["content"] + " And then?", 40) for _ in range(2)]
        assert "no speculative decoding" not in server.log
    assert [answer["timings"]["predicted_n"] for answer in answers] == [300] * len(PROMPTS)
    drafted = sum(answer["timings"].get("draft_n", 0) for answer in answers)
    accepted = sum(answer["timings"].get("draft_n_accepted", 0) for answer in answers)
    assert 0 < accepted < drafted, "no draft was made, or none was rejected"
    assert len(more) == 2


@pytest.fixture(scope="module")
def unbounded() -> dict[str, list[str]]:
    """Answers of the policy none, made once."""
    return {}


@pytest.mark.parametrize("policy", ["h2o:budget=1024", "streaming:budget=1024", "tova:budget=1024,scope=token"])
def test_text_with_drafts_is_that_of_an_unbounded_cache_while_nothing_is_evicted(
    start: Start, unbounded: dict[str, list[str]], policy: str
) -> None:
    """Not that of a run without drafts: upstream's products round otherwise for several tokens at once."""

    def answer(policy: str) -> list[str]:
        with start("llama", policy, "-np", "1", *DRAFTS) as server:
            answers = [complete(server, prompt, 120) for prompt in PROMPTS[:2]]
        assert sum(each["timings"].get("draft_n", 0) for each in answers) > 0
        return [each["content"] for each in answers]

    if "none" not in unbounded:
        unbounded["none"] = answer("none")
    assert answer(policy) == unbounded["none"]


@pytest.mark.parametrize("recent", [1, N_DRAFT])
def test_a_draft_that_recent_does_not_cover_is_not_made(start: Start, recent: int) -> None:
    with start("llama", f"h2o:budget=128,recent={recent}", "-np", "2", "--no-kv-unified", *DRAFTS) as server:
        answer = complete(server, PROMPTS[0], 300)
        assert server.log.count("no speculative decoding") == 1
        assert f"give recent={N_DRAFT + 1} or more" in server.log
    assert answer["timings"]["predicted_n"] == 300 and answer["timings"].get("draft_n", 0) == 0


@pytest.mark.parametrize("policy", [BOUNDED["h2o per head"], BOUNDED["streaming"], "h2o:budget=128,recent=1"])
def test_prompt_lookup_of_the_binding_goes_on(
    upstream_file: Callable[[str], Path], model_file: Callable[[Spec | str], Path], policy: str
) -> None:
    """A draft is one batch: it can be taken back whatever is recent."""
    found = run_scenario("prompt_lookup", model_file(spec(upstream_file)), policy).result
    assert found["n"] == 300
    assert found["drafted"] > 0
    assert found["n_evicted"] > 0
