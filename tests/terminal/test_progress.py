"""Signs of life of long work where stderr is no terminal: plain lines, one after a few seconds, then at growing intervals."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from build_steps import EVERY, BuildSteps

from equip_cli.terminal import output


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[..., output.Progress]:
    """Progress without its thread: the test alone decides when it tells."""
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    return functools.partial(output.Progress, clock=clock)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err and "\x1b" not in err
    return err.splitlines()


def test_short_work_says_nothing(
    progress: Callable[..., output.Progress], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = progress("loading")
    for _ in range(9):
        clock.now += 0.5
        bar.advance(0.1)
    bar.done()
    clock.now += 100
    bar.tell()  # it is over
    assert lines(capsys) == []


def test_long_work_says_how_far_it_is_and_how_long_it_takes(
    progress: Callable[..., output.Progress], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = progress("loading")
    clock.now += 5.5
    bar(0.2)
    assert lines(capsys) == ["loading: 20%, about 22 s left"]
    clock.now += 4
    bar(0.3)
    assert lines(capsys) == []  # not yet again
    clock.now += 6.5
    bar(0.4)
    assert lines(capsys) == ["loading: 40%, about 24 s left"]


def test_work_that_reports_nothing_is_alive_all_the_same(
    progress: Callable[..., output.Progress], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """A native call may take minutes; what the thread calls is `tell()`."""
    bar = progress("measuring", 1000)
    clock.now += 6
    bar.tell()
    clock.now += 200
    bar.tell()
    assert lines(capsys) == ["measuring: 0%, 6 s so far", "measuring: 0%, 3 min so far"]


def test_lines_grow_rare(
    progress: Callable[..., output.Progress], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = progress("fetching", 3600)
    told = []
    for second in range(1, 3601):
        clock.now += 1
        bar.advance(1)
        told += [second] * len(lines(capsys))
    gaps = [b - a for a, b in zip(told, told[1:], strict=False)]
    assert told[0] == 5 and gaps[:3] == [10, 10, 10] and gaps == sorted(gaps) and gaps[-1] == 60
    assert len(told) < 80


def test_a_thread_tells_while_the_work_is_silent(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    """The real thread, once: the clock is far ahead when it looks for the first time."""
    before = threading.active_count()
    bar = output.Progress("checking", 4, clock=clock)
    assert threading.active_count() == before + 1
    clock.now += 60
    bar.tell()
    bar.done()
    assert lines(capsys) == ["checking: 0%, 60 s so far"]


def test_a_terminal_gets_no_lines(
    progress: Callable[..., output.Progress], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    bar = progress("loading")
    clock.now += 0.9
    bar(0.5)
    bar.tell()
    bar.done()
    assert screen.getvalue() == ""


def test_a_closed_stderr_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        bar = output.Progress("loading", clock=clock)
        clock.now += 100
        bar(0.5)
        bar.done()


def test_durations_have_the_unit_that_is_read_best() -> None:
    assert [output.duration(s) for s in (0.4, 20, 99, 100, 170, 5900, 7000)] == [
        "0 s", "20 s", "99 s", "2 min", "3 min", "98 min", "2 h",
    ]  # fmt: skip


def test_writing_random_weights_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shape of gigabytes takes minutes to write."""
    from equip_cli.models import random_gguf

    monkeypatch.setattr(output, "FIRST_LINE", 0.0)
    monkeypatch.setenv("EQUIP_CACHE_DIR", str(tmp_path))
    random_gguf.shape_file("tiny:q8_0")
    assert lines(capsys)[0].startswith("making random weights: ")


# ---- builds


def test_a_build_tells_its_steps_every_so_often(clock: Clock) -> None:
    said: list[str] = []
    steps = BuildSteps(said.append, clock)
    steps.read("-- The CXX compiler identification is GNU")
    for n in range(1, 189):
        clock.now += 1
        assert steps.read(f"  [{n}/188] Building CXX object llama.cpp.o\n") == (n, 188)
    assert said[:2] == ["compiled 20 of 188", "compiled 40 of 188"] and len(said) == 188 // int(EVERY)


def test_a_build_with_make_tells_its_share(clock: Clock) -> None:
    said: list[str] = []
    steps = BuildSteps(said.append, clock)
    clock.now += EVERY
    assert steps.read("[  7%] Building CXX object") is None
    assert said == ["compiled 7%"]


def test_upstreams_build_is_not_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import build_steps
    import upstream_tests

    monkeypatch.setattr(build_steps, "EVERY", 0.0)
    log = tmp_path / "server.log"
    upstream_tests.run([sys.executable, "-c", "print('[3/9] Building'); print('what a compiler says')"], log)
    out, err = capfd.readouterr()
    assert out == "" and "server: compiled 3 of 9" in err.splitlines()
    assert log.read_text().splitlines()[1:] == ["[3/9] Building", "what a compiler says"]
    with pytest.raises(upstream_tests.BuildError, match=r"failed with code 3(.|\n)*it broke"):
        upstream_tests.run([sys.executable, "-c", "print('it broke'); raise SystemExit(3)"], log)


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands for Python")
def test_the_installer_tells_the_steps_off_a_terminal(tmp_path: Path) -> None:
    """pip is a script that prints what ninja does."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import install, build_steps; from pathlib import Path\n"
        "build_steps.EVERY = 0.0; install.PYTHON = Path(sys.argv[2]); install.LOG = Path(sys.argv[3]) / 'log'\n"
        "install.install('')"
    )
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\necho '  equip: patch: applied'\necho '  [1/2] Building'\necho '  [2/2] Linking'\n")
    pip.chmod(0o755)
    root = Path(output.__file__).parents[2]
    command = [sys.executable, "-c", code, str(root), str(pip), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = [line.partition("] ")[2] for line in result.stdout.splitlines()]
    assert said[1:] == ["patch: applied", "compiled 1 of 2", "compiled 2 of 2"]
