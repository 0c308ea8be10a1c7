"""equip serve under load and under clients that do not behave: it lives, and nobody is answered from another's text."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dropin_text import say
from load_clients import HOST, Answer, Client, ask, run, run_for, send
from serving import Served, equip_serve, need_program

BUDGET = 128
N_LANES = 4
LONG = [pytest.mark.full, pytest.mark.real]

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="signals"),
    pytest.mark.timeout(900),
]


def port_of(served: Served) -> int:
    return int(served.url.rsplit(":", 1)[1])


# ---- load ------------------------------------------------------------------------------------------------------------


def check_load(served: Served, clients: list[Client], answers: list[Answer], budget: int) -> None:
    """Every answer is right: its numbers, its secret, and the prompt that was read."""
    secrets = {client.number: client.secret for client in clients}
    assert len(set(secrets.values())) == len(clients)
    for answer in answers:
        assert answer.status == 200, answer
        timings = answer.timings
        assert timings["n_kept"] <= timings["budget"] <= budget
        assert timings["budget"] == budget or "n_evicted_pool" in timings
        # the last token was never read
        assert timings["n_kept"] + timings["n_evicted"] == answer.n_prompt + timings["predicted_n"] - 1
        told = {number for number, word in secrets.items() if word in answer.text.lower()}
        assert told <= {answer.client}, answer
    # what was read is what was sent: the last prompt of each client, told again by the tokenizer
    for client in clients:
        own = [each for each in answers if each.client == client.number and each.kind != "anthropic"]
        body = own[-1].body
        if "prompt" in body:
            text = body["prompt"]
        else:
            text = send(client.port, "/apply-template", {"messages": body["messages"]})[1]["prompt"]
        tokens = {"content": text, "add_special": True, "parse_special": True}
        assert own[-1].n_prompt == len(send(client.port, "/tokenize", tokens)[1]["tokens"])
    served.check()


@pytest.mark.parametrize(
    ("policy", "n_requests", "n_long"),
    [
        ("streaming", 2, 100),
        pytest.param("streaming", 50, 100, marks=[*LONG, pytest.mark.timeout(1800)]),
        pytest.param("h2o", 25, 100, marks=LONG),
    ],
)
def test_no_client_is_answered_from_anothers_text(
    real_file: Callable[[str], Path], tmp_path: Path, policy: str, n_requests: int, n_long: int
) -> None:
    need_program()
    budget = 128
    given = ("--policy", policy, "--budget", budget, "-np", N_LANES, "-ub", 64)
    with equip_serve(tmp_path / "serve.log", real_file("smollm2"), *given) as served:
        clients = [Client(port_of(served), number, (2, 20), n_long, max_tokens=12) for number in range(8)]
        answers = run(clients, n_requests)
        assert len(answers) == 8 * n_requests
        check_load(served, clients, answers, budget)
    # the check above would see a secret: the model repeats those that it was told
    secrets = {client.number: client.secret for client in clients}
    assert sum(secrets[each.client] in each.text.lower() for each in answers) > len(answers) / 4
    if n_requests > 10:  # chats that are longer than the budget, with answers of their own in them
        for client in clients:
            own = [each for each in answers if each.client == client.number and each.kind == "chat"]
            assert own[-1].timings["n_evicted"] > budget


@pytest.mark.parametrize(
    ("policy", "n_requests"),
    [
        ("streaming", 2),
        pytest.param("streaming", 8, marks=[*LONG, pytest.mark.timeout(1800)]),
        pytest.param("h2o", 8, marks=[*LONG, pytest.mark.timeout(1800)]),
    ],
)
def test_sixteen_lanes_share_a_pool_of_four_budgets(
    real_file: Callable[[str], Path], tmp_path: Path, policy: str, n_requests: int
) -> None:
    """Nobody is refused, none is answered from another's text, and whoever has more than its share gives."""
    need_program()
    n_lanes, budget, pool = 16, 512, 2048
    given = ("--policy", policy, "--budget", budget, "--pool", pool, "-np", n_lanes, "-ub", 64)
    with equip_serve(tmp_path / "serve.log", real_file("smollm2"), *given) as served:
        clients = [Client(port_of(served), number, (20, 60), 400, max_tokens=12) for number in range(n_lanes)]
        answers = run(clients, n_requests)
        assert len(answers) == n_lanes * n_requests
        check_load(served, clients, answers, budget)
        found = lanes(port_of(served))
        assert sum(each["budget"] for each in found) <= pool
        assert all(each["n_kept"] <= each["budget"] for each in found)
        share = pool // n_lanes
        assert all(each["budget"] >= share - 64 for each in found if each["n_evicted"] > 0), found
        if n_requests > 2:
            assert sum(each.timings["n_evicted_pool"] for each in answers) > 0
        assert f"16 lanes, each keeps up to {budget} tokens of {pool} ({policy})" in served.log


@pytest.mark.parametrize(
    ("policy", "seconds"),
    [("streaming", 10), *(pytest.param(policy, 90, marks=[*LONG, pytest.mark.timeout(1800)]) for policy in ("streaming", "h2o"))],
)  # fmt: skip
def test_no_lane_of_a_pool_starves(
    real_file: Callable[[str], Path], tmp_path: Path, policy: str, seconds: float
) -> None:
    """Sixteen chats that all go on as fast as they can, in room for four of them: each gets as many answers as the others."""
    need_program()
    n_lanes, budget, pool = 16, 512, 2048
    given = ("--policy", policy, "--budget", budget, "--pool", pool, "-np", n_lanes, "-ub", 64)
    with equip_serve(tmp_path / "serve.log", real_file("smollm2"), *given) as served:
        options = {"ignore_eos": True}  # else some have less to say
        clients = [
            Client(port_of(served), number, (10, 10), max_tokens=12, kinds=("chat",), options=options)
            for number in range(n_lanes)
        ]
        answers = run_for(clients, seconds)
        check_load(served, clients, answers, budget)
    n_told = [0] * n_lanes
    for answer in answers:
        n_told[answer.client] += answer.timings["predicted_n"]
    # what is under way at the end is finished, so that short runs may differ by an answer
    assert min(n_told) >= min(0.8 * max(n_told), max(n_told) - 12), n_told
    if seconds > 60:
        assert min(n_told) >= 0.8 * max(n_told), n_told
        kept = [[each for each in answers if each.client == number][-1].timings["n_kept"] for number in range(n_lanes)]
        assert min(kept) >= 0.5 * max(kept), kept  # a page is half of a share


# ---- clients that do not behave --------------------------------------------------------------------------------------


QUESTIONS = [say(seed, n) for seed, n in ((1, 20), (2, 100), (3, 400))]


def quiet(port: int) -> list[Any]:
    """Tokens and log probabilities of the answers to some questions, one at a time, on lanes that forget what they held.

    Where nobody else is served meanwhile they are the same each time, bit for bit.
    """
    found = []
    for question in QUESTIONS:
        body = {"prompt": question, "n_predict": 24, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        status, answer = send(port, "/completion", body | {"n_probs": 1})
        assert status == 200, answer
        assert answer["timings"]["cache_n"] == 0
        found.append([(each["id"], each["logprob"]) for each in answer["completion_probabilities"]])
        assert len(found[-1]) == 24
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, list[Any]]]:
    """A server with the embedded model, and what it answered before anybody did it harm."""
    need_program()
    log = tmp_path_factory.mktemp("load") / "serve.log"
    with equip_serve(log, "--budget", BUDGET, "-np", N_LANES, "-ub", 64) as served:
        answers = quiet(port_of(served))
        assert answers[0] != answers[1] != answers[2]
        yield served, answers


@pytest.fixture
def port(shared: tuple[Served, list[Any]]) -> Iterator[int]:
    """Its port; behind each test it lives, no lane is at work any more, and its answers are right."""
    served, answers = shared
    yield port_of(served)
    until_idle(port_of(served))
    assert quiet(port_of(served)) == answers
    served.check()


def lanes(port: int) -> list[dict[str, Any]]:
    return list(json.loads(ask(port, "GET", "/slots")[1]))


def until_idle(port: int, seconds: float = 120) -> None:
    """Waits until no lane writes an answer."""
    deadline = time.monotonic() + seconds
    while any(lane["is_processing"] for lane in lanes(port)):
        assert time.monotonic() < deadline, "a lane still writes an answer that nobody waits for"
        time.sleep(0.05)


def head(n: int, path: str = "/completion") -> bytes:
    """Of a request whose body has n bytes."""
    return b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), n)


def stream(port: int, n_predict: int, **options: Any) -> socket.socket:
    """A connection on which a streamed answer has begun; little fits into it unread."""
    body = {"prompt": "Hello", "n_predict": n_predict, "temperature": 0, "ignore_eos": True, "stream": True, **options}
    raw = json.dumps(body).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(120)
    client.connect((HOST, port))
    client.sendall(head(len(raw)) + raw)
    return client


def reset(client: socket.socket) -> None:
    """The end of a connection without a farewell, as of a program that was killed."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def test_a_stream_that_is_broken_off_frees_its_lane(port: int) -> None:
    for round in range(4):
        clients = [stream(port, 1_000_000) for _ in range(N_LANES)]
        for number, client in enumerate(clients):
            assert client.recv(16).startswith(b"HTTP/1.1 200")
            if (number + round) % 2:
                reset(client)
            else:
                client.close()
        until_idle(port)
    # one that had to wait for a lane is gone before it gets one
    clients = [stream(port, 1_000_000) for _ in range(3 * N_LANES)]
    for client in clients:
        reset(client)
    until_idle(port)


def test_half_a_body_holds_nobody_up(port: int) -> None:
    whole = head(1000, "/v1/chat/completions")
    clients = []
    for number in range(60):
        client = socket.create_connection((HOST, port), 120)
        client.sendall((whole + b'{"messages": [{"role": "us', whole, whole[:30])[number % 3])
        clients.append(client)
    quiet(port)
    for number, client in enumerate(clients):
        if number % 2:
            reset(client)
        else:
            client.close()


@pytest.mark.parametrize("n", [400, pytest.param(4000, marks=pytest.mark.full)])
def test_clients_that_read_nothing_or_slowly_hold_nobody_up(port: int, n: int) -> None:
    # with 20 probabilities each token is 2 kB of text; 4,000 are more than a connection holds
    idle = [stream(port, n, n_probs=20) for _ in range(N_LANES - 1)]
    quiet(port)
    until_idle(port)  # answers are written to the end, whether they are read or not
    slow = stream(port, 60)
    pieces = []
    while piece := slow.recv(200):
        pieces.append(piece)
        time.sleep(0.01)
    raw = b"".join(pieces)
    slow.close()
    events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith(b"data: {")]
    assert sum(len(event["tokens"]) for event in events) == 60
    for client in idle[1:]:
        reset(client)
    # the one that wakes up at last gets all of its answer
    n_bytes, last = 0, b""
    while piece := idle[0].recv(1 << 16):
        n_bytes, last = n_bytes + len(piece), (last + piece)[-200:]
    idle[0].close()
    assert n_bytes > 1_000 * n and last.endswith(b"0\r\n\r\n")


DEEP = 2000  # brackets within brackets
MALFORMED = {
    "empty": b"",
    "no json": b"\x00\xff\xfe",
    "not utf-8": b'{"prompt": "\xff\xc3\x28", "n_predict": 2}',
    "half": b'{"prompt": "Hello", "n_pred',
    "two": b'{"prompt": "a"} {"prompt": "b"}',
    "nan": b'{"prompt": "Hello", "temperature": NaN}',
    "half a surrogate": b'{"prompt": "\\ud800", "n_predict": 2}',
    "huge number": b'{"prompt": "Hello", "n_predict": 1e999}',
    "a list": b"[1, 2, 3]",
    "a number": b"7",
    "null": b"null",
    "only brackets": b"[" * DEEP,
}


def test_what_is_no_request_is_refused(port: int) -> None:
    for what, body in MALFORMED.items():
        for path in ("/completion", "/v1/chat/completions", "/v1/messages", "/apply-template"):
            status, answer = ask(port, "POST", path, body)
            told = json.loads(answer)
            # llama-server answers 500 to JSON without what it needs
            assert status == 400 or (status == 500 and "is required" in told["error"]["message"]), (what, path, told)
            assert told["error"]["message"], (what, path, told)


def test_a_body_that_is_too_large_is_refused_and_a_large_one_is_read(port: int) -> None:
    with socket.create_connection((HOST, port), 120) as client:
        client.sendall(head(200_000_000))
        said = b""
        with contextlib.suppress(ConnectionError):  # it does not listen to the end
            for _ in range(200):
                client.sendall(b" " * 1_000_000)
            said = client.recv(16)
        assert not said or said.startswith(b"HTTP/1.1 413")
    body = {"prompt": "Hello", "n_predict": 1, "nobody_reads_this": "x" * 20_000_000}
    assert send(port, "/completion", body)[0] == 200


def nested(n: int) -> list[tuple[str, str]]:
    """Path and body of requests with n brackets within brackets, where they are read, copied or written out."""
    many = "[" * n + "]" * n
    schema = '{"type": "array", "items": ' * n + '{"type": "integer"}' + "}" * n
    grammar = f'"root ::= {"(" * n}[a-z]{")" * n}"'
    text = '{"n_predict": 1, "prompt": '
    chat = '{"max_tokens": 1, "messages": [{"role": "user", "content": '
    return [
        ("/completion", text + '"Hello", "nobody_reads_this": ' + many + "}"),
        ("/completion", text + many + "}"),
        ("/completion", text + '"Hello", "json_schema": ' + schema + "}"),
        ("/completion", text + '"Hello", "grammar": ' + grammar + "}"),
        ("/v1/chat/completions", chat + '"Hello"}], "chat_template_kwargs": {"x": ' + many + "}}"),
        ("/v1/chat/completions", chat + many + "}]}"),
        ("/v1/chat/completions", chat + '"Hello"}], "tools": ' + many + "}"),
        (
            "/completion",
            text + '"Hello", "json_schema": {"type": "string", "pattern": "^' + "(" * n + "a" + ")" * n + '$"}}',
        ),
        (
            "/completion",
            text
            + '"Hello", "grammar": "root ::= [a-z]", "grammar_lazy": true, "grammar_triggers": [{"type": 2, "value": "'
            + "(" * n
            + "a"
            + ")" * n
            + '"}]}',
        ),
        ("/tokenize", '{"content": ' + many + "}"),
        ("/v1/messages", chat + many + "}]}"),
        ("/v1/responses", '{"input": ' + many + "}"),
    ]


@pytest.mark.parametrize("n", [1_000, 20_000, 200_000])
def test_brackets_within_brackets_are_refused(port: int, n: int) -> None:
    for path, body in nested(n):
        status, answer = ask(port, "POST", path, body.encode())
        assert status == 400, (path, body[:120], answer)
        assert "nest" in json.loads(answer)["error"]["message"], (path, body[:120], answer)


def test_brackets_that_somebody_may_need_are_read(port: int) -> None:
    for path, body in nested(40)[:4]:
        status, answer = ask(port, "POST", path, body.encode())
        assert status in (200, 400) and b"nest" not in answer, (path, body[:120], answer)


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "a"' + "".join(f' "b{i}"?' for i in range(400)),
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} | r{i + 1}\n" for i in range(40)) + 'r40 ::= "a"',
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(30_000)) + 'r30000 ::= "a"',
        "root ::= root [a-z]",
    ],
    ids=["optional", "doubled", "chain", "left"],
)
def test_grammars_that_no_sampler_gets_through_are_refused(port: int, grammar: str) -> None:
    status, answer = send(port, "/completion", {"prompt": "Hello", "n_predict": 2, "grammar": grammar})
    assert status == 400, answer
    assert "the grammar" in answer["error"]["message"]


def test_an_idle_connection_is_open_for_longer_than_clients_keep_one(port: int) -> None:
    # httpx and aiohttp use an idle connection again within 5 and 15 seconds
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    try:
        for pause in (0, 16):
            time.sleep(pause)
            connection.request("GET", "/health")
            assert connection.getresponse().read()
    finally:
        connection.close()


FIELDS = (
    "messages prompt max_tokens n_predict temperature top_p top_k stop seed stream n n_probs logprobs top_logprobs tools tool_choice "
    "response_format json_schema grammar logit_bias samplers id_slot cache_prompt n_keep n_discard stream_options "
    "chat_template_kwargs reasoning_format lora dry_sequence_breakers repeat_last_n dry_penalty_last_n min_keep mirostat "
    "response_fields grammar_triggers preserved_tokens chat_format t_max_predict_ms n_indent system thinking"
).split()
VALUES: list[Any] = [
    None,
    "x",
    "",
    [],
    {},
    [[]],
    [None],
    [{}],
    {"a": None},
    -1,
    0,
    1.5,
    2**31,
    2**63,
    -(2**63),
    1e308,
    True,
]
REFUSED_AS_OURS = {"tools", "reasoning_format", "chat_format"}  # llama-server answers 500 where 400 is meant


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.full)])
def test_fields_of_other_types_are_refused_or_ignored(port: int, every: int) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/completion": {"prompt": "Hello", "n_predict": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
        "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
    }
    counts = dict.fromkeys((200, 400, 500), 0)
    for path, field, value in list(itertools.product(bodies, FIELDS, VALUES))[::every]:
        status, answer = ask(port, "POST", path, json.dumps({**bodies[path], field: value}).encode())
        assert status in (200, 400) or (status == 500 and field in REFUSED_AS_OURS), (path, field, value, answer)
        assert status == 200 or json.loads(answer)["error"]["message"], (path, field, value)
        counts[status] += 1
    assert counts[200] * every > 500 and counts[400] * every > 500, counts


# ---- servers of their own --------------------------------------------------------------------------------------------


def test_wrong_keys_open_nothing(tmp_path: Path) -> None:
    need_program()
    key = "open-sesame"
    wrong = ["", "open", key[:-1], key + "x", key.upper(), f"{key},x", "\xff" * 20, "x" * 5000]
    given = ("--budget", BUDGET, "-np", 1, "--slots-dir", tmp_path / "slots")
    with equip_serve(tmp_path / "serve.log", *given, LLAMA_API_KEY=key) as served:
        port = port_of(served)
        paths = ("/v1/chat/completions", "/v1/messages", "/completion", "/tokenize", "/slots/0?action=save")
        body = json.dumps(
            {"messages": [{"role": "user", "content": "Hello"}], "prompt": "Hello", "filename": "x"}
        ).encode()
        headers: list[dict[str, str]] = [{}, {"Authorization": key[::-1]}, {"Authorization": f"Basic {key}"}]
        headers += [{"Authorization": f"Bearer {each}"} for each in wrong] + [{"X-Api-Key": each} for each in wrong]
        for path in paths:
            for each in headers:
                assert ask(port, "POST", path, body, **each)[0] == 401, (path, each)
        for path in ("/slots", "/metrics"):
            assert ask(port, "GET", path)[0] == 401
        assert ask(port, "POST", "/tokenize", b'{"content": "x"}', Authorization=f"Bearer {key}")[0] == 200
        assert not list((tmp_path / "slots").iterdir())
        assert key not in served.log
        served.check()


def child_of(served: Served) -> int:
    """Process id of the llama-server that the command has started."""
    pid = served.process.pid
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc")


@linux
def test_a_saved_lane_goes_on_after_a_kill(tmp_path: Path) -> None:
    need_program()
    given = ("--budget", BUDGET, "-np", 2, "-ub", 64, "--slots-dir", tmp_path / "slots")
    text = say(5, 300)
    asked = {"temperature": 0, "ignore_eos": True, "id_slot": 0, "n_predict": 24, "n_probs": 1, "return_tokens": True}

    def more(port: int) -> tuple[Any, ...]:
        status, answer = send(port, "/completion", {**asked, "prompt": f"{text} {say(6, 30)}"})
        assert status == 200, answer
        numbers = [answer["timings"][key] for key in ("cache_n", "prompt_n", "n_kept", "n_evicted")]
        return answer["tokens"], [each["logprob"] for each in answer["completion_probabilities"]], numbers

    with equip_serve(tmp_path / "first.log", *given) as served:
        port = port_of(served)
        assert send(port, "/completion", {**asked, "prompt": text, "n_predict": 0})[0] == 200
        status, saved = send(port, "/slots/0?action=save", {"filename": "chat"})
        assert status == 200 and saved["n_saved"] > BUDGET
        expected = more(port)
        assert expected[2][0] > 250  # the text was not read again
        # other lanes and files at work, and a save of the same name under way, when it is killed
        assert send(port, "/slots/0?action=save", {"filename": "later"})[0] == 200
        before = (tmp_path / "slots" / "chat").read_bytes()
        client, other = stream(port, 1_000_000, id_slot=1), threading.Event()

        def saves() -> None:
            with contextlib.suppress(Exception):
                while True:
                    assert send(port, "/slots/0?action=save", {"filename": "later"})[0] == 200
                    other.set()

        thread = threading.Thread(target=saves)
        thread.start()
        assert other.wait(60) and client.recv(16)
        os.kill(child_of(served), signal.SIGKILL)
        assert served.process.wait(30) == 1
        thread.join()
        client.close()
        assert "error: llama-server has ended by itself (signal 9)" in served.log
    assert (tmp_path / "slots" / "chat").read_bytes() == before
    with equip_serve(tmp_path / "second.log", *given) as served:
        port = port_of(served)
        for name in ("later", "chat"):  # the file that was being written is whole, too: the last one that was finished
            status, restored = send(port, "/slots/0?action=restore", {"filename": name})
            assert status == 200, restored
        assert restored["n_restored"] == saved["n_saved"]
        assert more(port) == expected
        served.check()


def resident(pid: int) -> float:
    """MB of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@linux
@pytest.mark.parametrize(("n_rounds", "n_requests"), [(1, 12), pytest.param(5, 25, marks=pytest.mark.full)])
def test_memory_does_not_grow_with_requests(tmp_path: Path, n_rounds: int, n_requests: int) -> None:
    need_program()
    # a thread that waits for clients, and a heap of its own, are in memory once they were used: with few of them all are,
    # before anything is measured. What llama-server keeps of earlier conversations on purpose, up to 8 GB, is left out.
    few = ("--", "--threads-http", 12, "--cache-ram", 0)
    given = ("--budget", BUDGET, "-np", N_LANES, "-ub", 64, *few)
    with equip_serve(tmp_path / "serve.log", *given, MALLOC_ARENA_MAX="1") as served:
        port, n_answers, before = port_of(served), 0, 0.0
        for round in range(2 + n_rounds):
            if round == 2:
                n_answers, before = 0, resident(child_of(served))
            # new chats, as long as those before
            clients = [Client(port, 8 * round + number, (2, 40), max_tokens=12) for number in range(8)]
            answers = run(clients, n_requests)
            check_load(served, clients, answers, BUDGET)
            n_answers += len(answers)
            for _ in range(N_LANES):
                client = stream(port, 1_000_000)
                assert client.recv(16).startswith(b"HTTP/1.1 200")
                reset(client)
                assert ask(port, "POST", "/completion", b'{"prompt": {}}')[0] == 400
            until_idle(port)
        grown = resident(child_of(served)) - before
        assert n_answers == 8 * n_requests * n_rounds
        # 1.5 kB for each of 1,000 requests: as much as the text of one has. A third of that stays in the heap, and less and
        # less of it the longer it goes on.
        assert grown < 1.5, f"{grown:.2f} MB behind {before:.0f}"
        served.check()
