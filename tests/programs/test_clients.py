"""Python's openai, anthropic and langchain-openai, as people install them, against `equip serve`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dropin_support import clean_environment
from places import DATA, SUPPORT
from serving import Served, equip_serve, need_program
from upstream import cache_dir
from upstream_tests import digest, locked

from equip_cli import Model
from equip_cli.models import embedded

CLIENTS = ("anthropic>=2.14", "langchain-openai>=1.7", "openai>=3.57")
BUDGET = 128
N_TURNS, N_WORDS, MAX_TOKENS = 32, 60, 16  # the second turn passes the budget

pytestmark = [
    pytest.mark.clients,
    pytest.mark.timeout(900),  # the first run installs them
    pytest.mark.skipif(os.name == "nt", reason="signals"),
]


@pytest.fixture(scope="module")
def python() -> Path:
    """An interpreter with the newest CLIENTS of the package index, set up once in the cache folder."""
    folder = cache_dir() / f"clients-{digest(*CLIENTS)}-py{sys.version_info.major}.{sys.version_info.minor}"
    program = folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        if not (folder / "done").is_file():
            venv.create(folder, with_pip=True, clear=True)
            command = [str(program), "-m", "pip", "install", "--disable-pip-version-check", *CLIENTS]
            done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
            if done.returncode != 0:
                why = f"pip could not install {', '.join(CLIENTS)}: {done.stderr.strip().splitlines()[-1]}"
                if os.environ.get("EQUIP_CI_FULL") == "1" or os.environ.get("CI") == "true":
                    raise AssertionError(why)
                pytest.skip(why)
            (folder / "done").touch()
    return program


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    need_program()
    log = tmp_path_factory.mktemp("clients") / "serve.log"
    with equip_serve(log, "--budget", BUDGET, "--alias", "tiny") as server:
        yield server


@pytest.fixture
def run(python: Path, served: Served) -> Callable[..., dict[str, Any]]:
    """run(name, of=SERVER, **arguments): a scenario of client_scenarios.py."""

    def call(name: str, of: Served = served, **arguments: Any) -> dict[str, Any]:
        command = [str(python), str(SUPPORT / "client_scenarios.py"), name, of.url, json.dumps(arguments)]
        done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:] + served.log[-2000:]
        return dict(json.loads(done.stdout))

    return call


@pytest.mark.parametrize(
    ("client", "finish"),
    # ignore_eos is no field of Anthropic's API, and is left out there
    [("openai", {"length"}), ("anthropic", {"max_tokens", "end_turn"}), ("langchain", {"length"})],
    ids=["openai", "anthropic", "langchain"],
)
def test_a_conversation_goes_on_past_the_budget(
    run: Callable[..., dict[str, Any]], client: str, finish: set[str]
) -> None:
    turns = run(f"{client}_turns", n=N_TURNS, n_words=N_WORDS, max_tokens=MAX_TOKENS)["turns"]
    assert len(turns) == N_TURNS
    for turn in turns:
        timings = turn["timings"]
        assert turn["text"] and turn["finish"] in finish
        assert 1 < timings["predicted_n"] <= MAX_TOKENS
        assert timings["n_kept"] <= BUDGET == timings["budget"]
        # the last token was never read
        assert timings["n_kept"] + timings["n_evicted"] == turn["n_prompt"] + timings["predicted_n"] - 1
        assert timings.get("n_reread", 0) == 0
    for before, turn in zip(turns, turns[1:], strict=False):
        # nothing but the new message and the last answer is read
        assert turn["timings"]["cache_n"] >= before["n_prompt"] - 1
        assert turn["timings"]["prompt_n"] <= turn["n_prompt"] - before["n_prompt"] + 1 < BUDGET
        assert turn["timings"]["n_evicted"] > before["timings"]["n_evicted"]
    assert sum(turn["timings"]["n_evicted"] > 0 for turn in turns) >= 30


@pytest.mark.parametrize(
    ("client", "finish"), [("openai", "tool_calls"), ("anthropic", "tool_use"), ("langchain", "tool_calls")]
)
def test_functions_are_called(run: Callable[..., dict[str, Any]], tmp_path: Path, client: str, finish: str) -> None:
    # the embedded model knows of no functions: it is made to prefer the token that a call begins with, and still more the end
    # of an answer, which the grammar allows after the call alone
    with Model(embedded.MODEL) as model:
        at, end = model.tokenize("@")[-1], model.tokenize("<|end|>", parse_special=True)[-1]
    given = ["--chat-template-file", DATA / "tools.jinja", "--logit-bias", f"{at}+100", "--logit-bias", f"{end}+200"]
    with equip_serve(tmp_path / "serve.log", "--budget", BUDGET, "--", *given) as server:
        said = run(f"{client}_tools", of=server)
        # the description alone is longer than the budget
        assert said["n_before"] > BUDGET
    for name, arguments in (said["call"], said["streamed"]):
        assert name == "weather" and arguments["city"] in ("Oslo", "Rome")
    assert said["finish"] == finish
    assert said["n_after"] > said["n_before"]


def check_person(person: dict[str, Any]) -> None:
    assert set(person) == {"name", "age"}
    assert isinstance(person["name"], str) and len(person["name"]) <= 12 and 0 <= person["age"] <= 150


def check_logprobs(answers: list[Any]) -> None:
    """Of four tokens that were chosen greedily, with the three likeliest; as a whole, and streamed."""
    whole, streamed = answers
    assert len(whole) == len(streamed) == 4
    for chosen, top in [*whole, *streamed]:
        assert chosen == max(top) <= 0 and len(top) == 3


def test_openais_forms_of_an_answer_hold(run: Callable[..., dict[str, Any]]) -> None:
    said = run("openai_forms")
    check_person(json.loads(said["json"]))
    check_logprobs(said["logprobs"])
    assert "temperature" in said["error"]
    assert said["models"] == ["tiny"]


def test_langchains_forms_of_an_answer_hold(run: Callable[..., dict[str, Any]]) -> None:
    said = run("langchain_forms")
    check_person(said["parsed"])
    check_logprobs(said["logprobs"])
    assert "top_k" in said["error"]


def test_anthropics_forms_of_an_answer_hold(run: Callable[..., dict[str, Any]]) -> None:
    said = run("anthropic_forms")
    assert said["n_counted"] > 5
    assert "temperature" in said["error"]
