"""equip serve on the embedded model, whose trained context has 1024 tokens."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from dropin_text import say
from native_api import library_folder
from serving import Served, command, environment, equip_serve, need_program

from equip_cli.models import embedded

BUDGET = 128
TRAINED = 1024

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")

Start = Callable[..., AbstractContextManager[Served]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """start(*arguments, NAME=value): a server of its own, with these variables."""
    need_program()
    return lambda *arguments, **settings: equip_serve(tmp_path / "serve.log", *arguments, **settings)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One lane of BUDGET tokens, shared by the tests of this module."""
    need_program()
    log = tmp_path_factory.mktemp("serve") / "serve.log"
    with equip_serve(log, "--budget", BUDGET, "-np", 1, "-ub", 64) as served:
        yield served


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def chat(served: Served, messages: list[dict[str, str]], **options: Any) -> dict[str, Any]:
    body = {"messages": messages, "max_tokens": 16, "temperature": 0, "ignore_eos": True, **options}
    status, answer = served.post("/v1/chat/completions", body)
    assert status == 200, answer
    return answer


# ---- length ----------------------------------------------------------------------------------------------------------


def test_a_chat_goes_on_past_the_trained_context(server: Served) -> None:
    messages: list[dict[str, str]] = []
    n_before = 0
    for turn in range(12):
        messages.append(user(say(turn, 100)))
        answer = chat(server, messages)
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        timings = answer["timings"]
        n_text = timings["cache_n"] + timings["prompt_n"] + timings["predicted_n"]
        # a chat that goes on reads its new message, and at most the last answer once more
        assert timings["cache_n"] >= n_before
        assert timings["n_kept"] <= BUDGET
        assert timings["n_kept"] + timings["n_evicted"] == n_text - 1  # the last token was never read
        n_before = timings["cache_n"] + timings["prompt_n"] - 1
    assert n_text > TRAINED and timings["n_evicted"] > TRAINED - BUDGET


def test_a_prompt_longer_than_the_trained_context_is_answered(server: Served) -> None:
    answer = chat(server, [user(say(50, 2 * TRAINED))])
    assert answer["usage"]["prompt_tokens"] > TRAINED
    assert answer["timings"]["n_kept"] == BUDGET


def test_an_answer_without_a_limit_ends_after_as_many_tokens_as_the_trained_context(server: Served) -> None:
    answer = chat(server, [user("Hello")], max_tokens=None)
    assert answer["usage"]["completion_tokens"] == TRAINED
    assert answer["choices"][0]["finish_reason"] == "length"
    assert chat(server, [user("Hello")], max_tokens=TRAINED + 20)["usage"]["completion_tokens"] == TRAINED + 20


def test_true_positions_end_at_the_trained_context_and_say_so(start: Start) -> None:
    with start("--budget", BUDGET, "--positions", "true") as served:
        # each of the four lanes has all of it
        assert chat(served, [user(say(1, 700))], max_tokens=4)["usage"]["prompt_tokens"] > TRAINED // 2
        status, answer = served.post("/v1/chat/completions", {"messages": [user(say(2, 2 * TRAINED))]})
    assert status == 400
    assert f"({TRAINED} tokens)" in answer["error"]["message"]
    assert "positions=true ends at the trained context: use positions=cache" in answer["error"]["message"]


@pytest.mark.parametrize("scope", ["token", "layer", "head"])
def test_slots_tell_which_tokens_are_kept_while_an_answer_is_written_too(start: Start, scope: str) -> None:
    with start("--policy", "h2o", "--scope", scope, "--budget", 64, "-np", 1, "-ub", 32) as served:
        writing = threading.Thread(target=chat, args=(served, [user(say(3, 200))]), kwargs={"max_tokens": 400})
        writing.start()
        n_asked = 0
        while writing.is_alive() or n_asked == 0:
            (slot,) = json.loads(served.get("/slots?kept=1"))
            ranges = [
                (begin, end, share)
                for begin, end, share in (each if len(each) == 3 else [*each, 1] for each in slot["kept"])
            ]
            assert all(0 <= begin < end for begin, end, _ in ranges)
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(ranges))
            # each head keeps as many; a share is rounded to a thousandth
            kept = sum((end - begin) * share for begin, end, share in ranges)
            assert kept <= 64.5
            n_asked += 1
        writing.join()
        (slot,) = json.loads(served.get("/slots?kept=1"))
        shares = [each[2] for each in slot["kept"] if len(each) == 3]
        assert bool(shares) == (scope != "token") and all(0 < share < 1 for share in shares)
        kept = sum((each[1] - each[0]) * (each[2] if len(each) == 3 else 1) for each in slot["kept"])
        assert abs(kept - slot["n_kept"]) < 0.5 and slot["n_kept"] == 64
        assert slot["kept"][0][:2] == [0, 4] and slot["kept"][-1][1] == slot["n_kept"] + slot["n_evicted"]


def test_without_a_policy_the_context_has_an_end(start: Start) -> None:
    with start("--policy", "none", "-np", 1) as served:
        timings = chat(served, [user("Hello")])["timings"]
        assert not {"policy", "budget", "n_kept", "n_evicted", "n_reread"} & set(timings)
        (slot,) = json.loads(served.get("/slots?kept=1"))
        assert (slot["policy"], slot["n_evicted"], slot["budget"]) == ("none", 0, TRAINED)
        assert slot["n_kept"] == timings["prompt_n"] + timings["predicted_n"] - 1
        assert slot["kept"] == [[0, slot["n_kept"]]]
        status, answer = served.post("/v1/chat/completions", {"messages": [user(say(2, 2 * TRAINED))]})
    assert status == 400 and answer["error"]["message"].endswith("try increasing it")


# ---- truth -----------------------------------------------------------------------------------------------------------


KEPT = {"policy", "budget", "n_kept", "n_evicted", "n_reread"}


def test_every_api_says_what_is_kept(server: Served) -> None:
    messages = [user(say(60, 300))]
    body: dict[str, Any] = {"messages": messages, "max_tokens": 8, "model": "any"}
    answers = [
        server.post("/v1/chat/completions", body)[1],
        server.post("/v1/completions", {"prompt": say(61, 300), "max_tokens": 8})[1],
        server.post("/completion", {"prompt": say(62, 300), "n_predict": 8})[1],
        server.post("/v1/messages", body)[1],
        server.post("/v1/responses", {"input": say(63, 300), "max_output_tokens": 8})[1],
        server.events("/v1/chat/completions", body)[-1],
        server.events("/v1/completions", {"prompt": say(61, 300), "max_tokens": 8})[-1],
        server.events("/completion", {"prompt": say(62, 300), "n_predict": 8})[-1],
        next(each for each in server.events("/v1/messages", body) if each["type"] == "message_delta"),
        server.events("/v1/responses", {"input": say(63, 300), "max_output_tokens": 8})[-1],
    ]
    for answer in answers:
        timings = answer["timings"]
        assert set(timings) >= KEPT, answer
        assert (timings["policy"], timings["budget"], timings["n_kept"]) == ("streaming", BUDGET, BUDGET)
        assert timings["n_evicted"] > 300 - BUDGET


def test_tokens_that_are_read_again_are_counted(server: Served) -> None:
    said = user(say(70, 200))
    before = chat(server, [said, {"role": "assistant", "content": say(71, 200)}, user(say(72, 30))])["timings"]
    edited = chat(server, [said, {"role": "assistant", "content": say(74, 200)}, user(say(72, 30))])["timings"]
    assert before["n_reread"] < 50  # what the template begins every chat with
    # the first message is the same, but it was evicted, so it is read again, and all that follows anew
    assert edited["cache_n"] == 0
    assert 200 < edited["n_reread"] < edited["prompt_n"] - 200
    # of a message that is read again for its end alone the lane still has the beginning
    shorter = chat(server, [said, {"role": "assistant", "content": say(74, 200)}, user(say(72, 20))])["timings"]
    assert shorter["cache_n"] > 400 and shorter["n_reread"] <= 1


def test_lanes_and_metrics_have_the_same_numbers(server: Served) -> None:
    timings = chat(server, [user(say(80, 300))])["timings"]
    [lane] = json.loads(server.get("/slots"))
    assert {key: lane[key] for key in KEPT - {"n_reread"}} == {key: timings[key] for key in KEPT - {"n_reread"}}
    metrics = server.get("/metrics")
    label = '{lane="0",policy="streaming"}'
    assert f"llamacpp:kv_tokens_kept{label} {BUDGET}\n" in metrics
    assert f"llamacpp:kv_tokens_budget{label} {BUDGET}\n" in metrics
    assert f"llamacpp:kv_tokens_evicted{label} {timings['n_evicted']}\n" in metrics
    total = re.search(r"^llamacpp:kv_tokens_evicted_total (\d+)$", metrics, re.MULTILINE)
    assert total is not None and int(total[1]) >= timings["n_evicted"]
    chat(server, [user(say(81, 300))])
    later = re.search(r"^llamacpp:kv_tokens_evicted_total (\d+)$", server.get("/metrics"), re.MULTILINE)
    assert later is not None and int(later[1]) > int(total[1])


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_each_request_is_a_line(start: Start) -> None:
    with start("--budget", BUDGET, "-np", 1, "--alias", "tiny") as served:
        assert "ready: " in served.log and "serves tiny; 1 lane, keeps 128 tokens (streaming)" in served.log
        assert f"try: curl {served.url}/v1/chat/completions -d" in served.log
        timings = chat(served, [user(say(1, 300))])["timings"]
        n, rest = timings["prompt_n"], f"generated 16, kept {BUDGET}, evicted {timings['n_evicted']}"
        served.wait_for(
            rf"^\d\d:\d\d:\d\d 127\.0\.0\.1 POST /v1/chat/completions 200: read {n} of {n}, {rest}, [\d.]+ s$"
        )
        served.events("/v1/messages", {"messages": [user("Hello")], "max_tokens": 4})
        served.wait_for(r"POST /v1/messages 200: read \d+ of \d+.*, generated \d+, kept \d+, evicted 0, ")
        assert served.post("/v1/chat/completions", {"messages": 7})[0] == 400
        served.wait_for(r"POST /v1/chat/completions 400$")
        served.post("/nowhere%FF%1B", {})
        served.wait_for(r"POST /nowhere\S* 404$")
        # llama-server's own log is for -v
        assert not re.search(r"^[\d.]+ [IWED] ", served.log, re.MULTILINE)


def test_verbose_shows_the_servers_own_log(start: Start) -> None:
    with start("--budget", BUDGET, "-v") as served:
        assert re.search(r"^[\d.]+ I srv .*model loaded$", served.log, re.MULTILINE)


# ---- the end ---------------------------------------------------------------------------------------------------------


def port_of(served: Served) -> int:
    return int(served.url.rsplit(":", 1)[1])


def is_there(served: Served) -> bool:
    """Whether a program accepts connections there."""
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port_of(served))) == 0


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"])
def test_a_signal_ends_the_server(start: Start, how: signal.Signals, code: int) -> None:
    with start("--budget", BUDGET) as served:
        assert is_there(served)
        assert served.end(how) == code
        assert not is_there(served)
        assert "error" not in served.log


def test_a_signal_ends_an_answer_that_is_being_written(start: Start) -> None:
    with start("--budget", BUDGET) as served, socket.create_connection(("127.0.0.1", port_of(served)), 30) as client:
        body = b'{"prompt": "Hello", "n_predict": 1000000, "ignore_eos": true, "stream": true}'
        client.sendall(b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        assert client.recv(20).startswith(b"HTTP/1.1 200")
        assert served.end(signal.SIGTERM) == 143
        assert not is_there(served)


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is told on Linux alone")
def test_the_server_does_not_outlive_a_command_that_is_killed(start: Start) -> None:
    with start("--budget", BUDGET) as served:
        served.process.kill()
        served.process.wait()
        deadline = time.monotonic() + 30
        while is_there(served):
            assert time.monotonic() < deadline, "llama-server still listens"
            time.sleep(0.05)


# ---- who may come in, and what is refused ----------------------------------------------------------------------------


def test_a_key_is_asked_for_and_shown_nowhere(start: Start) -> None:
    with start("--budget", BUDGET, "--host", "0.0.0.0", LLAMA_API_KEY="open-sesame") as served:
        assert "warning" not in served.log
        url, served.url = served.url, f"http://127.0.0.1:{port_of(served)}"
        body = {"messages": [user("Hello")], "max_tokens": 2}
        assert served.post("/v1/chat/completions", body)[0] == 401
        assert served.post("/v1/chat/completions", body, Authorization="Bearer open-sesame")[0] == 200
        assert served.post("/v1/messages", body, **{"X-Api-Key": "open-sesame"})[0] == 200
        served.wait_for(r"POST /v1/chat/completions 401$")
        assert f"curl {url}/v1/chat/completions -H 'Authorization: Bearer KEY' -d" in served.log
        assert "sesame" not in served.log
        if sys.platform == "linux":
            shown = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True).stdout
            assert "sesame" not in shown


def test_an_open_door_is_warned_of(start: Start) -> None:
    with start("--budget", BUDGET, "--host", "0.0.0.0") as served:
        assert "warning: whoever reaches 0.0.0.0 can use this server: give --api-key" in served.log


def fails(*arguments: object, **settings: str) -> tuple[int, str]:
    """Exit code and what is said; one sentence, behind the notes."""
    done = subprocess.run(command(*arguments), env=environment(**settings), capture_output=True, text=True, timeout=120)
    *notes, sentence = done.stderr.strip().splitlines()
    assert not done.stdout and sentence.startswith("error: ")
    assert not [note for note in notes if note.startswith("error")]
    return done.returncode, sentence


def test_what_cannot_be_served_is_one_sentence(tmp_path: Path) -> None:
    need_program()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        code, said = fails("--port", other.getsockname()[1])
    assert code == 1 and "is taken" in said
    code, said = fails(tmp_path / "no.gguf")
    assert code == 1 and "there is no file" in said
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(embedded.MODEL.read_bytes()[:100_000])
    code, said = fails(torn, "--port", 0)
    assert code == 1 and "torn.gguf is cut short or damaged" in said
    code, said = fails(torn, "--port", 0, "--pool", "off")  # which nobody looked into before the server does
    assert code == 1 and "llama-server could not start" in said and "-v shows" in said
    for pool in ("many", "1.5", "0"):
        code, said = fails("--port", 0, "--pool", pool)
        assert code == 2 and "--pool" in said
    code, said = fails("--port", 0, "-np", 4, "--pool", 100)
    assert code == 1 and "the pool of 100 tokens is too small for 4 sequences: give pool=512 or more" in said
    code, said = fails("--port", 0, "--", "--no-such-option")
    assert code == 2 and "--no-such-option" in said and "llama-server --help" in said
    code, said = fails("--port", 0, "--", "--port", "1")
    assert code == 2 and "--port" in said
    code, said = fails("--budget", 1)
    assert code == 2 and "--budget 6" in said
    code, said = fails("--port", 0, "--budget", TRAINED, "--sinks", TRAINED - 20, "--recent", 200, "--policy", "h2o")
    assert code == 2 and "--budget" in said


def test_a_missing_program_is_one_sentence(tmp_path: Path) -> None:
    for path in library_folder().iterdir():
        if path.suffix in (".so", ".dylib", ".dll", ".json", ".h"):
            shutil.copy(path, tmp_path)
    header = library_folder().parent / "include" / "equip.h"
    if header.is_file():
        shutil.copy(header, tmp_path)
    code, said = fails("--port", 0, EQUIP_LIB_PATH=str(tmp_path))
    assert code == 1 and "there is no llama-server in" in said
