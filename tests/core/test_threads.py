"""How many threads: within what this process may use, fewer where other programs are busy, and never another result."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from equip_cli import CachePolicy, Model, Sampling, Session, UsageError
from equip_cli.core import native
from equip_cli.models import embedded

LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="affinity, control groups and load are read on Linux"
)
DEFAULT = "from equip_cli.core import native; print(native.load().info()['n_threads'])"


def test_the_rule_follows_load_and_rests(run_native: Any) -> None:
    result = run_native("test-threads")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("OK")


def default_threads(**variables: str) -> int:
    result = subprocess.run(
        [sys.executable, "-c", DEFAULT], env=os.environ | variables, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@LINUX
def test_the_default_respects_affinity() -> None:
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    try:
        assert default_threads() == 1
    finally:
        os.sched_setaffinity(0, processors)
    assert 1 <= default_threads() <= len(processors)


@LINUX
@pytest.mark.parametrize(
    ("group", "files", "quota"),
    [
        ("0::/", {"cpu.max": "100000 100000"}, 1.0),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5),
        ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, 1.5),
        ("0::/host/path", {"cpu.max": "100000 100000"}, 1.0),
        (
            "4:cpu,cpuacct:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "100000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            1.0,
        ),
        (
            "4:cpu,cpuacct:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("4:memory:/a", {"memory/a/cpu.cfs_quota_us": "100000", "memory/a/cpu.cfs_period_us": "100000"}, None),
        ("", {}, None),
    ],
)
def test_the_default_respects_quotas(tmp_path: Path, group: str, files: dict[str, str], quota: float | None) -> None:
    free = default_threads(EQUIP_CGROUP_ROOT="/nowhere")
    (tmp_path / "self").write_text(group + "\n")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    wanted = free if quota is None else min(free, max(1, int(quota + 0.25)))
    assert default_threads(EQUIP_CGROUP_ROOT=str(tmp_path)) == wanted


@pytest.mark.parametrize("policy", ["streaming", "h2o"])
@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
def test_no_result_depends_on_the_number_of_threads(model: Model, policy: str, type_k: str) -> None:
    """What lets it change between two steps: past 512 slots, where llama.cpp's own flash attention splits by threads."""
    tokens = model.tokenize(embedded.prose())[:900]
    seen = []
    for n_threads in (1, 2, 3):
        session = model.session(
            CachePolicy(policy, 700), n_threads=n_threads, type_k=type_k, type_v=type_k, flash_attn="on"
        )
        with session:
            assert session.stats()["attn_kernel"] == "equip-cpu"
            session.set_sampler(Sampling(temp=0.0, ignore_eos=True))
            session.eval(tokens)
            seen.append((session.generate_tokens(24), session.logits().tobytes()))
    assert seen[0] == seen[1] == seen[2]


def test_a_number_that_was_asked_for_stays(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with model.session(CachePolicy("streaming", 128), n_threads=3) as session:
        session.eval(model.tokenize("Hello"))
        assert session.stats()["n_threads"] == session.stats()["n_threads_now"] == 3
    monkeypatch.setenv("LLAMA_KV_POLICY", "streaming:budget=128,adapt_threads=2")
    with pytest.raises(UsageError, match="adapt_threads is 2: give 0 .* or 1"):
        model.session()
    monkeypatch.setenv("LLAMA_KV_POLICY", "none:budget=1")
    with pytest.raises(UsageError, match="the policy none takes no settings but cpu_attn and adapt_threads"):
        model.session()
    monkeypatch.setenv("LLAMA_KV_POLICY", "streaming:budget=128,adapt_threads=0")
    with model.session() as session:
        assert session.policy.name == "streaming"


@LINUX
@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2 if hasattr(os, "sched_getaffinity") else True, reason="one processor"
)
def test_a_busy_machine_gets_fewer_threads(model: Model) -> None:
    if native.load().info()["n_threads"] < 2:
        pytest.skip("one core")

    def made(**options: Any) -> Session:
        session = model.session(CachePolicy("streaming", 256), **options)
        session.set_sampler(Sampling(temp=0.0, ignore_eos=True))
        session.eval(model.tokenize("Hello"))
        return session

    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        with made() as session, made(n_threads=2) as pinned, made(n_threads=2, adapt_threads=True) as both:
            assert session.stats()["n_threads"] >= 2
            end = time.monotonic() + 120
            while time.monotonic() < end and not session.stats()["n_threads_now"] == both.stats()["n_threads_now"] == 1:
                session.generate_tokens(4)
                both.generate_tokens(4)
            assert session.stats()["n_threads_now"] == both.stats()["n_threads_now"] == 1
            # graphs are reused as before
            before = session.stats()
            session.generate_tokens(16)
            assert session.stats()["graphs_reused"] - before["graphs_reused"] >= 15
            pinned.generate_tokens(16)
            assert pinned.stats()["n_threads_now"] == 2
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_too(model: Model) -> None:
    """As after `gunicorn --preload`, or in multiprocessing: with what it inherits, and with a model of its own.

    libgomp would wait for the parent's threads, for ever.
    """
    context = multiprocessing.get_context("fork")
    inlet, outlet = context.Pipe(duplex=False)
    tokens = model.tokenize(embedded.prose())[:200]

    def answer(session: Session) -> tuple[list[int], bytes]:
        return session.generate_tokens(16), session.logits().tobytes()

    def opened(model: Model) -> Session:
        session = model.session(CachePolicy("h2o", 128), n_threads=2)
        session.set_sampler(Sampling(temp=0.0, ignore_eos=True))
        session.eval(tokens)
        return session

    def compute() -> None:
        outlet.send(answer(inherited))
        with Model(embedded.MODEL) as own, opened(own) as session:
            outlet.send(answer(session))

    with opened(model) as inherited:
        for _ in range(2):  # the parent has threads again, and forks again
            child = context.Process(target=compute)
            child.start()
            try:
                assert inlet.poll(120), "the child does not go on"
                seen = [inlet.recv()]
                assert inlet.poll(120), "the child does not load a model"
                seen.append(inlet.recv())
            finally:
                child.kill()
                child.join()
            with opened(model) as session:
                assert seen == [answer(session)] * 2
        assert answer(inherited) == seen[0]


BUSY_FORK = """
import os, signal, sys, threading
from equip_cli import Model
from equip_cli.models import embedded

model = Model(embedded.MODEL)
session = model.session("streaming:budget=256", n_threads=1)
tokens = model.tokenize(embedded.prose())[:500]
is_over = False

def work():
    while not is_over:
        session.eval(tokens)

thread = threading.Thread(target=work)
thread.start()
codes = []
while codes.count(0) < 5 and set(codes) <= {0, 7}:
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        if not session.busy.locked():
            os._exit(7)
        if sys.argv[1] == "close":
            session.close()
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    codes.append(os.waitstatus_to_exitcode(status))
is_over = True
thread.join()
print(set(codes) <= {0, 7}, session.stats()["n_past"] > 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("end", ["exit", "close"])
def test_a_forked_process_waits_for_no_thread_of_its_parents(end: str) -> None:
    """The lock of a session that another thread was using is held for ever there."""
    result = subprocess.run([sys.executable, "-c", BUSY_FORK, end], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "True True\n"), result.stderr


def test_a_benchmark_has_one_number_of_threads(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from equip_cli.benchmark import Settings
    from equip_cli.benchmark.measure import empty_session
    from equip_cli.benchmark.rows import Row

    asked: dict[str, Any] = {}
    monkeypatch.setattr(Model, "session", lambda self, policy, **options: asked.update(options))
    empty_session(model, Row(CachePolicy("streaming", 256), flash_attn="auto", depth=0), Settings(), None)
    assert asked["adapt_threads"] is False


@LINUX
def test_stats_and_version_name_the_threads(equip_bin: Path) -> None:
    result = subprocess.run([str(equip_bin), "--version", "-v"], capture_output=True, text=True, timeout=60)
    assert f"threads {native.load().info()['n_threads']}\n" in result.stdout
    result = subprocess.run(
        [str(equip_bin), "chat", "-n", "2"], input="Hello\n/stats\n", capture_output=True, text=True, timeout=60,
        env=os.environ | {"EQUIP_STATE_DIR": os.devnull},
    )  # fmt: skip
    assert "threads" in result.stdout, json.dumps(result.stderr)
