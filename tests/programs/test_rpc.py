"""A model's layers on other machines: two workers on loopback, which `equip rpc` runs."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rpc_run
from dropin_support import free_port
from native_api import library_folder
from serving import environment, equip_serve, need_program

from equip_cli.core import workers
from equip_cli.core.errors import BackendError, UsageError

RUN = Path(__file__).parents[1] / "support" / "rpc_run.py"
ASKED = 1 / rpc_run.N_STEADY  # a read per device when the test asks, after so many steps
READY = re.compile(r"^ready: CPU \(\d+ MB free\) at 127\.0\.0\.1:(\d+); Ctrl-C ends it$", re.MULTILINE)

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="signals"),
    pytest.mark.skipif(
        not any(library_folder().glob("libggml-rpc.*")), reason="the libraries were built with -DEQUIP_RPC=OFF"
    ),
]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "equip_cli", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


@dataclass
class Running:
    """A worker. address: HOST:PORT, as --rpc takes it."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path


@contextmanager
def running(log: Path, *arguments: object, ready: re.Pattern[str] = READY) -> Iterator[Running]:
    port = free_port()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command("rpc", "--port", port, "-t", 1, *arguments),
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 60
        while not ready.search(log.read_text(encoding="utf-8")):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.05)
        yield Running(process, f"127.0.0.1:{port}", log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Callable[[], AbstractContextManager[Running]]:
    """start(): a worker of its own."""
    n = iter(range(10))
    return lambda: running(tmp_path / f"worker{next(n)}.log")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Running]]:
    folder = tmp_path_factory.mktemp("workers")
    with running(folder / "first.log") as first, running(folder / "second.log") as second:
        yield first, second


def both(pair: tuple[Running, Running]) -> str:
    return ",".join(worker.address for worker in pair)


def run_python(*arguments: str) -> str:
    """What Python prints, where this machine too keeps no weights in AMX's layout: its sums are others."""
    found = subprocess.run(
        [sys.executable, *arguments],
        env=environment(EQUIP_PROBE_FAULT="amx"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def generated(where: str, policy: str, *n_layers: str) -> dict[str, Any]:
    """What tests/support/rpc_run.py prints."""
    return dict(json.loads(run_python(str(RUN), where, policy, *n_layers)))


@pytest.mark.parametrize(
    "policy",
    [
        "streaming:budget=64,positions=cache",
        "h2o:budget=64,scope=head,evict_every=4,score_queries=8",
        "snapkv:budget=64,scope=layer,evict_every=4,score_queries=8",
        "keydiff:budget=64,scope=layer,evict_every=4",
        "h2o:budget=64,scope=token,evict_every=4,score_queries=8",
    ],
)
def test_two_workers_keep_what_one_keeps(pair: tuple[Running, Running], policy: str) -> None:
    one, two = generated(pair[0].address, policy), generated(both(pair), policy)
    assert one["n_evicted"] > 100
    assert [two[key] for key in ("tokens", "kept")] == [one[key] for key in ("tokens", "kept")]
    # f32 without flash attention: the CPU of this machine computes the same but for rounding
    assert generated("", policy)["kept"] == one["kept"]


@pytest.mark.parametrize(
    ("policy", "reads", "writes"),
    [
        # how far the sinks have to be rotated is one number; where they lie is told once
        ("streaming:budget=64,positions=cache", 0, 1),
        ("streaming:budget=64,positions=true", 0, 0),
        # victims that the device chooses: they are read when the test asks; what changes from token to token
        ("h2o:budget=64,positions=true,scope=head", ASKED, 1),
        ("h2o:budget=64,positions=true,scope=layer", ASKED, 1),
        ("h2o:budget=64,positions=cache,rotate_every=1000", ASKED, 2),
        ("random:budget=64,positions=true,scope=head", ASKED, 1),
        ("vatp:budget=64,positions=true", ASKED, 1),
        ("knorm:budget=64,positions=true", ASKED, 1),
        # where the host chooses: the scores of all layers at once; the rows of the new token, and where its values go, which lie
        # element by element without flash attention
        ("vatp:budget=64,positions=true,evict_every=2", 1 / 2, 2),
        ("h2o:budget=64,positions=true,evict_every=8", 1 / 8, 2),
    ],
)
def test_a_step_moves_little_between_the_machines(
    pair: tuple[Running, Running], policy: str, reads: float, writes: float
) -> None:
    for address, n in ((pair[0].address, 1), (both(pair), 2)):
        found = generated(address, f"{policy},score_queries=8" if policy.startswith(("h2o", "vatp")) else policy)
        assert (found["device_reads"], found["device_writes"]) == (n * reads, n * writes)


def test_what_is_read_of_keys_is_counted(pair: tuple[Running, Running]) -> None:
    found = generated(both(pair), "keydiff:budget=64,positions=true")
    assert found["device_reads"] == 6  # layers


def test_one_victim_for_all_layers_is_chosen_where_all_layers_are(pair: tuple[Running, Running]) -> None:
    policy = "h2o:budget=64,positions=true,scope=token,score_queries=8"
    one, two = generated(pair[0].address, policy), generated(both(pair), policy)
    assert (one["device_reads"], one["device_writes"]) == (ASKED, 1)
    # on two devices the host sums over the layers
    assert (two["device_reads"], two["device_writes"]) == (2, 2)
    assert one["kept"] == two["kept"] and one["tokens"] == two["tokens"]


@pytest.mark.parametrize("n", [1, 2])
def test_workers_choose_the_victims_that_the_host_would(
    pair: tuple[Running, Running],
    run_native: Callable[..., subprocess.CompletedProcess[str]],
    model_file: Callable[[str], Path],
    n: int,
) -> None:
    workers_of = [pair[0].address, both(pair)][n - 1]
    found = run_native("test-ahead", model_file("llama-gqa-32"), "40", EQUIP_TEST_RPC=workers_of, EQUIP_TEST_NGL="99")
    assert found.returncode == 0 and found.stdout.endswith("OK\n"), found.stdout[-4000:] + found.stderr[-4000:]
    assert f"positions=true, 1 sequences: {n} reads and {20 * n} writes in 20 steps" in found.stdout


@pytest.mark.parametrize(
    "variables", [{"EQUIP_TEST_NGL": "3"}, {"EQUIP_TEST_NGL": "99", "EQUIP_TEST_KV_ON_HOST": "1"}], ids=str
)
def test_a_cache_that_lies_partly_or_all_on_the_host_is_the_hosts_to_choose_in(
    pair: tuple[Running, Running],
    run_native: Callable[..., subprocess.CompletedProcess[str]],
    model_file: Callable[[str], Path],
    variables: dict[str, str],
) -> None:
    """Some layers on a worker, and all of them with their keys here: both twins take the same way."""
    found = run_native("test-ahead", model_file("llama-gqa-32"), "40", EQUIP_TEST_RPC=pair[0].address, **variables)
    assert found.returncode == 0 and found.stdout.endswith("OK\n"), found.stdout[-4000:] + found.stderr[-4000:]


@pytest.mark.parametrize("fa", [0, 1])
@pytest.mark.parametrize(
    "policy",
    ["h2o:budget=64,recent=8", "tova:budget=64,recent=8,filter=0.3,filter_warmup=8,scope=head", "streaming:budget=64"],
)
def test_a_cache_on_the_host_keeps_the_same_whatever_computes_the_weights(
    pair: tuple[Running, Running],
    run_native: Callable[..., subprocess.CompletedProcess[str]],
    model_file: Callable[[str], Path],
    tmp_path: Path,
    policy: str,
    fa: int,
) -> None:
    """`--no-kv-offload`: what only this process can compute stays here, though a worker says that it can do anything."""
    policy += ",cpu_attn=0"  # as it is where there is a device
    logits = []
    for name, variables in (("here", {}), ("there", {"EQUIP_TEST_RPC": pair[0].address, "EQUIP_TEST_NGL": "99"})):
        options = ("chunks=40,40,1x60,7,1x60", f"fa={fa}", "offload_kqv=0")
        found = run_native(
            "logits-dump", model_file("llama-gqa"), tmp_path / name, *options, LLAMA_KV_POLICY=policy, **variables
        )
        assert found.returncode == 0, found.stderr[-4000:]
        logits.append(np.fromfile(tmp_path / name, np.float32))
    assert np.abs(logits[0] - logits[1]).max() <= 1e-5 * np.ptp(logits[0])


@pytest.mark.parametrize("n_layers", ["0", "2", "3", "99"])
@pytest.mark.parametrize(
    "policy", ["streaming:budget=64,positions=cache", "h2o:budget=64,positions=cache,scope=head,score_queries=64"]
)
def test_layers_on_either_side_keep_the_same(pair: tuple[Running, Running], policy: str, n_layers: str) -> None:
    here, part = generated("", policy), generated(pair[0].address, policy, n_layers)
    assert [part[key] for key in ("tokens", "kept")] == [here[key] for key in ("tokens", "kept")]


def test_layers_divided_between_devices_are_refused(
    pair: tuple[Running, Running],
    run_native: Callable[..., subprocess.CompletedProcess[str]],
    model_file: Callable[[str], Path],
) -> None:
    variables = {"EQUIP_TEST_RPC": both(pair), "EQUIP_TEST_NGL": "99", "EQUIP_TEST_SPLIT_TENSORS": "1"}
    found = run_native("test-ahead", model_file("llama-gqa"), "1", **variables)
    assert found.returncode == 1
    assert "a bounded cache needs each of them whole: use --split-mode layer" in found.stderr


@pytest.mark.parametrize("n_layers", ["99", "2"])
def test_a_pool_on_a_worker_keeps_what_sequences_alone_keep(
    pair: tuple[Running, Running],
    run_native: Callable[..., subprocess.CompletedProcess[str]],
    model_file: Callable[[str], Path],
    n_layers: str,
) -> None:
    found = run_native(
        "test-pool", model_file("llama-gqa"), "quick", EQUIP_TEST_RPC=pair[0].address, EQUIP_TEST_NGL=n_layers
    )
    assert found.returncode == 0 and "OK" in found.stdout, found.stdout[-4000:] + found.stderr[-4000:]


@pytest.mark.parametrize("policy", ["h2o:scope=head,score_queries=64", "tova:scope=layer", "random:scope=head"])
def test_workers_leave_out_the_tokens_that_the_cpu_would(pair: tuple[Running, Running], policy: str) -> None:
    policy += ",budget=64,recent=16,filter=0.4,filter_warmup=8"
    here, one, two = (generated(where, policy) for where in ("", pair[0].address, both(pair)))
    # a few layers on a worker, so that both forms are in one graph
    part = generated(pair[0].address, f"{policy},filter_layers=4", "3")
    assert part["kept"] == generated("", f"{policy},filter_layers=4")["kept"] and part["n_filtered"] > 20
    for found in (one, two):
        assert [found[key] for key in ("tokens", "kept", "n_filtered")] == [
            here[key] for key in ("tokens", "kept", "n_filtered")
        ]
    assert here["n_filtered"] > 20
    # what was decided is read once a step, beside the sums where there are any
    assert one["device_reads"] == (1 if policy.startswith("random") else 2)


def test_the_layers_and_their_cache_are_shared_out(pair: tuple[Running, Running]) -> None:
    found = run("generate", "-p", "Hello", "-n", 4, "--budget", 64, "--rpc", both(pair), "-v")
    assert found.returncode == 0, found.stderr
    caches = dict(re.findall(r"RPC\d\[(\S+)\] KV buffer size = +([\d.]+) MiB", found.stderr))
    assert set(caches) == {worker.address for worker in pair}, found.stderr[-3000:]
    assert all(float(size) > 0 for size in caches.values())


@pytest.mark.parametrize(
    "arguments",
    [
        ("chat", "-p", "Hello", "-n", 8),
        ("bench", "-p", 16, "-n", 8, "-r", 1, "--policy", "none,streaming", "--budget", 64, "-o", "json"),
        ("check", "-n", 8, "--budget", 64),
    ],
    ids=lambda arguments: str(arguments[0]),
)
def test_commands_take_workers(pair: tuple[Running, Running], arguments: tuple[object, ...]) -> None:
    found = run(*arguments, "--rpc", both(pair))
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()


def test_serve_takes_workers_and_says_which_tokens_are_kept(pair: tuple[Running, Running], tmp_path: Path) -> None:
    need_program()
    log = tmp_path / "serve.log"
    with equip_serve(log, "--budget", 64, "-np", 1, "-ub", 32, "--rpc", both(pair)) as served:
        status, answer = served.post("/completion", {"prompt": "one two three " * 40, "n_predict": 8})
        assert status == 200
        assert answer["timings"]["n_kept"] == 64 and answer["timings"]["n_evicted"] > 0
        (slot,) = json.loads(served.get("/slots?kept=1"))
        newest = slot["n_kept"] + slot["n_evicted"]
        assert slot["kept"] == [[0, 4], [newest - 60, newest]]


def test_a_program_that_loses_a_worker_ends_with_a_sentence(start: Callable[[], Any]) -> None:
    with start() as worker:
        process = subprocess.Popen(
            command("generate", "-p", "Hello", "-n", 100000, "--ignore-eos", "--budget", 64, "--rpc", worker.address),
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        assert process.stdout is not None
        assert process.stdout.read(40)
        worker.process.kill()
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "error: a worker has ended, or the connection to it has: start it again" in said
        assert "RPC server crashed" not in said


def test_a_server_that_loses_a_worker_ends_with_a_sentence(start: Callable[[], Any], tmp_path: Path) -> None:
    need_program()
    with start() as worker, equip_serve(tmp_path / "serve.log", "--budget", 64, "--rpc", worker.address) as served:
        worker.process.kill()
        worker.process.wait()
        with pytest.raises(OSError):
            served.post("/completion", {"prompt": "one", "n_predict": 8})
        assert served.process.wait(60) == 1
        assert "error: a worker of --rpc has ended" in served.log


def test_a_worker_that_is_taken_says_so(start: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_PATIENCE", 0.5)
    with start() as worker:
        (place,) = workers.parse(worker.address)
        place.check()
        process = subprocess.Popen(
            command("generate", "-p", "Hello", "-n", 100000, "--ignore-eos", "--budget", 64, "--rpc", worker.address),
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.read(10)
            with pytest.raises(BackendError, match="serves one program at a time"):
                place.check()
        finally:
            process.kill()
            process.communicate()
        # and is free again
        until = time.monotonic() + 30
        while True:
            try:
                place.check()
                break
            except BackendError:
                assert time.monotonic() < until


@pytest.mark.parametrize("name", ["CUSTOM", "MAP_CUSTOM1", "MAP_CUSTOM2", "MAP_CUSTOM3"])
def test_a_worker_calls_no_function_of_a_clients(start: Callable[[], Any], name: str) -> None:
    """A custom operation is an address, in its parameters: a graph of one such node, in the RPC's own form."""
    base = ctypes.CDLL(str(next(library_folder().glob("libggml-base.*"))))
    base.ggml_op_name.restype = ctypes.c_char_p
    op = next(op for op in itertools.count() if base.ggml_op_name(op) == name.encode())
    # id, type; buffer; ne, nb; op, op_params, flags; sources; view; data; name; uses
    tensor = struct.Struct("<QIQ4I4II16iI10Q2QQ64sI")
    shape = (1, 1, 1, 1, 4, 4, 4, 4)
    node = tensor.pack(1, 0, 0, *shape, op, *[0x7] * 16, 0, *[0] * 10, 0, 0, 0, b"", 0)
    graph = struct.pack("<IIQI", 0, 1, 1, 1) + node
    with start() as worker:
        host, port = worker.address.split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(workers._HELLO)
            (size,) = struct.unpack("<Q", connection.recv(8, socket.MSG_WAITALL))
            assert connection.recv(size, socket.MSG_WAITALL)[0] == 7  # the protocol whose forms these are
            connection.sendall(struct.pack("<BQ", 10, len(graph)) + graph)
            assert connection.recv(1) == b""
        workers.parse(worker.address)[0].check()


FORKING = """
import json, os, signal, sys
from equip_cli import CachePolicy, EquipError, Model, Sampling
from equip_cli.core import native
from equip_cli.models import embedded

def opened(model):
    session = model.session(CachePolicy("h2o", 128), n_threads=1)
    session.set_sampler(Sampling(temp=0.0, ignore_eos=True))
    session.eval(model.tokenize(embedded.prose())[:200])
    return session
"""

PARENTS_WORKER = """
def tried(call):
    try:
        return call() and "done"
    except EquipError as error:
        return str(error)

model = Model(embedded.MODEL, rpc=sys.argv[1])
session, pool = opened(model), model.pool("streaming:budget=64")
wanted = opened(model).generate_tokens(8)
inlet, outlet = os.pipe()
child = os.fork()
if child == 0:
    signal.alarm(60)
    calls = [
        lambda: session.generate_tokens(1), session.stats, pool.session, model.session, model.pool,
        lambda: Model(embedded.MODEL), native.load().info,
    ]
    said = [tried(call) for call in calls]
    text = model.detokenize(model.tokenize("Hello"))
    if sys.argv[2] == "close":
        model.close()
    os.write(outlet, json.dumps([said, text]).encode())
    sys.exit(0)
_, status = os.waitpid(child, 0)
print(json.dumps([status, *json.loads(os.read(inlet, 65536)), session.generate_tokens(8) == wanted]))
"""

OWN_WORKER = """
def answer(model):
    return opened(model).generate_tokens(8)

model = Model(embedded.MODEL)
wanted = answer(model)
if os.fork() == 0:
    signal.alarm(60)
    sys.exit(0 if answer(Model(embedded.MODEL, rpc=sys.argv[1])) == answer(model) == wanted else 7)
_, status = os.wait()
print(os.waitstatus_to_exitcode(status), answer(model) == wanted)
"""


def test_a_forked_process_may_find_workers_itself(start: Callable[[], Any]) -> None:
    with start() as worker:
        assert run_python("-c", FORKING + OWN_WORKER, worker.address) == "0 True\n"


@pytest.mark.parametrize("end", ["exit", "close"])
def test_a_forked_process_leaves_its_parents_workers_alone(start: Callable[[], Any], end: str) -> None:
    """It has their connections, and not the thread that speaks with them."""
    with start() as worker:
        status, said, text, is_right = json.loads(run_python("-c", FORKING + PARENTS_WORKER, worker.address, end))
    assert set(said) == {
        "this process was forked from one that had found a GPU or a worker, which a fork cannot use: start a process of "
        "its own (in Python: multiprocessing's method spawn)"
    }
    assert (status, text, is_right) == (0, " Hello", True)


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_worker_ends_when_it_is_told(start: Callable[[], Any], how: signal.Signals, code: int) -> None:
    with start() as worker:
        worker.process.send_signal(how)
        assert worker.process.wait(30) == code


def test_a_taken_port_is_a_sentence(start: Callable[[], Any]) -> None:
    with start() as worker:
        found = run("rpc", "--port", worker.address.split(":")[1])
        assert found.returncode == 1
        assert "is taken: end the program that listens there, or give another --port" in found.stderr


def test_nobody_there_is_a_sentence() -> None:
    found = run("generate", "-p", "Hello", "--rpc", f"127.0.0.1:{free_port()}")
    assert found.returncode == 1
    assert re.search(
        r"error: no worker answers at 127\.0\.0\.1:\d+ \(Connection refused\): start one there", found.stderr
    )


@pytest.mark.parametrize(
    "text", ["", ",", ":50052", "host:", "host:0", "host:x", "http://host:1", "a b:1", "::1:50052"]
)
def test_malformed_addresses_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^(the port of )?--rpc (is|has) "):
        workers.parse(text, "--rpc")


def test_addresses_may_leave_the_port_out_and_repeat() -> None:
    assert workers.parse("a, b:1,a:50052") == [workers.Worker("a", 50052), workers.Worker("b", 1)]


def test_an_open_worker_is_warned_of(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(log, "--host", "0.0.0.0", ready=re.compile("ready: ")):
        assert "warning: whoever reaches 0.0.0.0 can use this worker" in log.read_text(encoding="utf-8")
