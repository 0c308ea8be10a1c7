"""Upstream's own llama-server, built on the patched tree: bounded by LLAMA_KV_POLICY and nothing else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from dropin_support import (
    BUDGET,
    N_CTX,
    POLICY,
    ProgramError,
    Server,
    clean_environment,
    free_port,
    serve,
    server_program,
    spec,
)
from dropin_text import Messages, say
from models import Spec

pytestmark = pytest.mark.timeout(3600)  # the first run builds the server

EOG = [[2, False], [32000, False], [32007, False]]  # random weights must not end an answer early
ARCHS = ("llama", "gemma3")

Start = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(scope="module")
def program() -> Path:
    return server_program()


@pytest.fixture(scope="module", params=ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model_of(upstream_file: Callable[[str], Path], model_file: Callable[[Spec | str], Path]) -> Callable[[str], Path]:
    return lambda arch: model_file(spec(upstream_file, arch))


@pytest.fixture
def start(program: Path, model_of: Callable[[str], Path], tmp_path: Path) -> Start:
    """start(arch, *arguments): a server of its own."""

    @contextmanager
    def run(arch: str, *arguments: str, policy: str = POLICY) -> Iterator[Server]:
        command = [str(program), "-m", str(model_of(arch)), "-c", str(N_CTX), "-t", "1", "-tb", "1", *arguments]
        log = tmp_path / f"server-{len(list(tmp_path.iterdir()))}.log"
        with serve(command, clean_environment(LLAMA_KV_POLICY=policy), "/health", log) as server:
            yield server

    return run


@dataclass(frozen=True)
class Answer:
    text: str
    n_prompt: int
    n_cached: int  # tokens of the prompt that were not read again


def post(server: Server, messages: Messages, **options: Any) -> dict[str, Any]:
    body = {
        "messages": messages,
        "max_tokens": 24,
        "temperature": 0,
        "seed": 1,
        "logit_bias": EOG,
        "cache_prompt": True,
    }
    return server.call("/v1/chat/completions", body | options)


def ask(server: Server, messages: Messages, **options: Any) -> Answer:
    answer = post(server, messages, **options)
    n_prompt = answer["usage"]["prompt_tokens"]
    return Answer(answer["choices"][0]["message"]["content"], n_prompt, answer["timings"]["cache_n"])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def talk(server: Server, messages: Messages, texts: Iterable[str]) -> list[Answer]:
    """Append turns to the chat."""
    answers = []
    for text in texts:
        messages.append(user(text))
        answers.append(ask(server, messages))
        messages.append({"role": "assistant", "content": answers[-1].text})
    return answers


def texts(answers: Iterable[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def test_chats_go_on_without_reading_again_and_from_their_own_text(start: Start, arch: str) -> None:
    first: Messages = []
    second: Messages = []
    first_texts = [say(i, 120) for i in range(10)]
    second_texts = [say(50 + i, 120) for i in range(10)]
    with start(arch, "-np", "1") as server:
        turns = talk(server, first, first_texts)
        question = user(say(98, 60))
        unedited = ask(server, [*first, question])
        others = talk(server, second, second_texts)
        changed = [user(say(99, 120)), *first[1:], question]
        edited = talk(server, changed[:-1], [question["content"], say(97, 60)])
    assert unedited.n_prompt + others[-1].n_prompt > 10 * BUDGET

    # a continued chat reads its new message and at most the last answer
    for answers in (turns, others):
        assert all(b.n_cached >= a.n_prompt for a, b in zip(answers, answers[1:], strict=False))
    assert unedited.n_cached >= turns[-1].n_prompt
    assert edited[1].n_cached >= edited[0].n_prompt

    # one that starts otherwise is read from the first token, and nothing of the other chat is left
    assert (others[0].n_cached, edited[0].n_cached) == (0, 0)
    assert edited[0].text != unedited.text, "the test cannot tell one prefix from the other"
    with start(arch, "-np", "1") as server:
        assert texts(talk(server, [], second_texts)) == texts(others)
    with start(arch, "-np", "1") as server:
        assert texts(talk(server, changed[:-1], [question["content"], say(97, 60)])) == texts(edited)


@pytest.mark.parametrize("scope", ["head", "token"])
def test_chats_under_h2o_go_on_from_their_own_text(start: Start, arch: str, scope: str) -> None:
    # the server takes a few tokens of the last answer back, because it reads them otherwise than they were written: at every
    # scope the newest tokens can go
    policy, chat = f"h2o:budget=512,scope={scope}", list[dict[str, str]]()
    with start(arch, "-np", "1", policy=policy) as server:
        turns = talk(server, chat, [say(i, 120) for i in range(8)])
        changed = [user(say(99, 120)), *chat[1:]]
        edited = talk(server, list(changed), [say(98, 60)])
        shorter = ask(server, [*chat[:-3], user(say(97, 60))])
    assert turns[-1].n_prompt > 2 * 512
    for a, b in zip(turns, turns[1:], strict=False):
        assert b.n_cached >= a.n_prompt
    assert (edited[0].n_cached, shorter.n_cached) == (0, 0)
    with start(arch, "-np", "1", policy=policy) as server:
        assert texts(talk(server, list(changed), [say(98, 60)])) == texts(edited)


def test_streams_under_h2o_do_not_disturb_one_another(start: Start) -> None:
    with start("llama", "-np", "2", "--no-kv-unified", policy="h2o:budget=256") as server:
        got = [talk(server, [], [say(10 * i + turn, 120) for turn in range(3)]) for i in range(2)]
    for i in range(2):
        with start("llama", "-np", "2", "--no-kv-unified", policy="h2o:budget=256") as server:
            assert texts(talk(server, [], [say(10 * i + turn, 120) for turn in range(3)])) == texts(got[i])


@pytest.mark.parametrize("n_turns", [1, 4], ids=["before-evictions", "after-evictions"])
def test_a_chat_that_comes_back_is_answered_from_its_own_text(start: Start, arch: str, n_turns: int) -> None:
    # the server keeps the state of a chat that another one pushes out, and takes it back when the chat goes on: the answer is that
    # of a server that has held this chat alone, and as little is read for it
    words = [[say(10 * i + t, 120 + 10 * i) for t in range(n_turns)] for i in range(2)]
    chats: list[Messages] = [[], []]
    with start(arch, "-np", "1") as server:
        for chat, texts_ in zip(chats, words, strict=True):
            talk(server, chat, texts_)
        back = [talk(server, chat, [say(90 + i, 40)])[0] for i, chat in enumerate(chats)]
    for i, answer in enumerate(back):
        with start(arch, "-np", "1") as server:
            alone = talk(server, [], [*words[i], say(90 + i, 40)])[-1]
        assert (answer.text, answer.n_cached) == (alone.text, alone.n_cached)


def test_a_unified_cache_with_several_sequences_is_refused(program: Path, model_of: Callable[[str], Path]) -> None:
    command = [str(program), "-m", str(model_of("llama")), "-c", str(N_CTX), "--port", str(free_port())]
    for arguments in ([], ["-np", "4", "--kv-unified"]):  # the first is the server's default
        env = clean_environment(LLAMA_KV_POLICY=POLICY)
        done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1, done.stderr[-2000:]
        sentences = {line for line in done.stderr.splitlines() if line.startswith("LLAMA_KV_POLICY: ")}
        assert len(sentences) == 1
        assert "4 sequences" in (said := sentences.pop()) and "-np 1" in said and "--no-kv-unified" in said


def test_sequences_with_a_stream_each_do_not_disturb_one_another(start: Start) -> None:
    chats: list[Messages] = [[], []]
    answers: list[list[Answer]] = [[], []]
    with start("llama", "-np", "4", "--no-kv-unified") as server:
        for turn in range(4):
            for i, chat in enumerate(chats):
                answers[i] += talk(server, chat, [say(10 * i + turn, 120)])
    for i, got in enumerate(answers):
        assert all(b.n_cached >= a.n_prompt for a, b in zip(got, got[1:], strict=False))
        with start("llama", "-np", "4", "--no-kv-unified") as server:
            assert texts(talk(server, [], [say(10 * i + turn, 120) for turn in range(4)])) == texts(got)


def test_no_second_choice_is_written_from_an_empty_cache(start: Start) -> None:
    # the server copies the sequence of the first choice, and a bounded cache cannot be copied
    with start("llama", "-np", "4", "--no-kv-unified") as server:
        try:
            choices = post(server, [user(say(1, 300))], n=2)["choices"]
        except ProgramError:
            server.check()  # a refusal is honest
        else:
            assert choices[0]["message"]["content"] == choices[1]["message"]["content"]


def test_an_overridden_context_length_lets_a_chat_go_past_the_trained_one(
    program: Path,
    upstream_file: Callable[[str], Path],
    model_file: Callable[[Spec | str], Path],
    tmp_path: Path,
) -> None:
    # docs/drop-in.md: the server caps its lanes there, whatever -c says
    model = model_file(replace(spec(upstream_file), n_ctx_train=512))
    command = [str(program), "-m", str(model), "-c", str(N_CTX), "-np", "1", "-t", "1"]
    override = ["--override-kv", f"llama.context_length=int:{N_CTX}"]
    env = clean_environment(LLAMA_KV_POLICY=POLICY)
    with serve([*command, *override], env, "/health", tmp_path / "server.log") as server:
        assert post(server, [user(say(1, 20))], max_tokens=1500)["usage"]["completion_tokens"] == 1500


def test_a_saved_slot_goes_on_without_reading_again(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "slots"
    folder.mkdir()
    chat = [user(say(1, 300))]
    with start("llama", "-np", "1", "--slot-save-path", f"{folder}{os.sep}") as server:
        before = ask(server, chat)
        saved = server.call("/slots/0?action=save", {"filename": "slot"})
        chat += [{"role": "assistant", "content": before.text}, user(say(2, 20))]
        straight = ask(server, chat)
        ask(server, [user(say(3, 300))])
        assert server.call("/slots/0?action=restore", {"filename": "slot"})["n_restored"] == saved["n_saved"]
        restored = ask(server, chat)
    assert (restored.text, restored.n_cached) == (straight.text, straight.n_cached)
    assert restored.n_cached >= before.n_prompt
    with start("llama", "-np", "1", "--slot-save-path", f"{folder}{os.sep}") as server:  # and after a restart
        server.call("/slots/0?action=restore", {"filename": "slot"})
        again = ask(server, chat)
    assert (again.text, again.n_cached) == (straight.text, straight.n_cached)
