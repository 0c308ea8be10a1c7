"""No traceback ever reaches a user: whatever goes wrong ends in one sentence and an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from equip_cli import cli
from equip_cli.chat import transcript
from equip_cli.commands.setup import loading
from equip_cli.core.errors import EquipError

POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX files and limits")


@pytest.fixture(autouse=True)
def hooks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`main()` belongs to a process of its own: what it installs is taken back."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr("equip_cli.terminal.signals.install", lambda: None)
    monkeypatch.setenv("EQUIP_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def equip(equip_bin: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        options["env"] = os.environ | {"EQUIP_STATE_DIR": str(tmp_path / "state")} | options.pop("env", {})
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run(
            [str(equip_bin), *map(str, args)], capture_output=True, encoding="utf-8", timeout=120, **options
        )

    return run


def one_sentence(err: str) -> str:
    assert "Traceback" not in err, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


COMMANDS = [
    ["chat", "-p", "x"],
    ["generate", "-p", "x"],
    ["bench", "-n", "4"],
    ["eval", "-n", "4"],
    ["info"],
    ["check"],
    ["demo"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    "error", [KeyError("x"), AssertionError(), RecursionError("too deep"), OSError("no number")], ids=repr
)
def test_what_nobody_foresaw_is_one_sentence(
    command: list[str], error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(loading, "load_model", fail)
    assert cli.main(command) == 1
    line = one_sentence(capsys.readouterr().err)
    assert f"nobody foresaw ({type(error).__name__}" in line
    assert "report it" in line
    # and for who reports it
    assert cli.main([*command, "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_what_fails_beside_the_main_thread_is_one_sentence_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    capsys.readouterr()

    def fail() -> None:
        raise ValueError("aside")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert "nobody foresaw (ValueError: aside)" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["chat", "\u2013policy", "h2o", "-p", "x"], "write --policy"),
        (["chat", "\u2014budget", "64", "-p", "x"], "write --budget"),
        (["generate", "\u2013n", "4", "-p", "x"], "write -n"),
        (["generate", "\u2014ignore-eos", "-p", "x"], "write --ignore-eos"),
    ],
)
def test_a_dash_that_is_no_hyphen_is_named(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) in (1, 2)
    assert hint in one_sentence(capsys.readouterr().err)


def test_an_empty_grammar_is_refused(equip: Any, tmp_path: Path) -> None:
    (tmp_path / "g.gbnf").write_text("\n")
    for option in (["--grammar", ""], ["--grammar-file", tmp_path / "g.gbnf"]):
        result = equip("generate", "-p", "x", *option)
        assert result.returncode == 2
        assert "the grammar is empty" in one_sentence(result.stderr)


@POSIX
def test_other_libraries_on_the_search_path_are_not_taken(equip: Any, tmp_path: Path) -> None:
    for name in ("libllama.so", "libggml.so", "libggml-base.so", "libggml-cpu.so"):
        (tmp_path / name).write_text("not a library")
    result = equip("generate", "-p", "x", "-n", 1, env={"LD_LIBRARY_PATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr


def test_limits_of_the_system_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error, words in (
        (RuntimeError("can't start new thread"), "no more threads"),
        (MemoryError(), "memory ran out"),
        (OSError(24, "Too many open files", "/some/file"), "/some/file: Too many open files"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ):

        def fail(*_args: object, error: Exception = error, **_options: object) -> None:
            raise error

        monkeypatch.setattr(loading, "load_model", fail)
        assert cli.main(["info"]) == 1
        assert words in one_sentence(capsys.readouterr().err)


@POSIX
def test_an_unknown_home_folder_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import pwd

    def unknown(_number: int) -> None:
        raise KeyError("no such user")

    for name in ("HOME", "EQUIP_STATE_DIR", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EquipError, match="nobody knows the home folder: set HOME"):
        transcript.state_folder()
    assert transcript.history_path() is None
    assert cli.main(["chat", "-p", "Hello", "-n", "2", "-t", "1"]) == 0
    assert "this chat is not saved: nobody knows the home folder" in capsys.readouterr().err
    assert cli.main(["chat", "--continue", "-p", "Hello"]) == 1
    one_sentence(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []  # no folder of the name ~


@POSIX
@pytest.mark.parametrize(
    "command", [["chat", "-p", "Hello", "-n", "2"], ["demo"], ["info"], ["generate", "-p", "x", "-n", "2"]]
)
def test_a_folder_that_is_gone_is_one_sentence(equip_bin: Path, tmp_path: Path, command: list[str]) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd '{gone}' && rmdir '{gone}' && exec '{equip_bin}' {' '.join(command)}"
    result = subprocess.run(
        ["sh", "-c", script], capture_output=True, encoding="utf-8", timeout=120, stdin=subprocess.DEVNULL,
        env=os.environ | {"EQUIP_STATE_DIR": str(tmp_path / "state")},
    )  # fmt: skip
    assert "Traceback" not in result.stderr
    if result.returncode:
        assert "the current folder is gone" in one_sentence(result.stderr)


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Paths that are no plain files."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "empty").touch()
    places = {
        "a pipe": "pipe", "a loop": "loop", "a dangling link": "dangling", "an empty file": "empty", "a folder": ".",
        "below a file": "empty/x", "a long name": "x" * 5000, "nothing": "missing",
    }  # fmt: skip
    devices = {"zeros": "/dev/zero", "null": "/dev/null"}
    yield lambda name: devices.get(name) or str(tmp_path / places[name])


@POSIX
@pytest.mark.parametrize(
    "name",
    [
        "a pipe",
        "a loop",
        "a dangling link",
        "an empty file",
        "a folder",
        "below a file",
        "a long name",
        "nothing",
        "zeros",
        "null",
    ],
)
def test_a_model_that_is_no_file_is_one_sentence(equip: Any, odd: Callable[[str], str], name: str) -> None:
    for command in (["generate", odd(name), "-p", "x"], ["chat", odd(name), "-p", "x"], ["info", odd(name)]):
        result = equip(*command)
        assert result.returncode in (1, 2)
        assert len(one_sentence(result.stderr)) < 600


@POSIX
@pytest.mark.parametrize(
    "name", ["a loop", "a dangling link", "a folder", "below a file", "a long name", "nothing", "zeros"]
)
@pytest.mark.parametrize(
    "option",
    [["-p", "x", "--grammar-file"], ["-p", "x", "-sysf"], ["-p", "x", "-j"], ["-f"]],
    ids=lambda words: words[-1],
)
def test_a_text_that_is_no_file_is_one_sentence(
    equip: Any, odd: Callable[[str], str], option: list[str], name: str
) -> None:
    result = equip("generate", *option, odd(name))
    assert result.returncode == 2
    one_sentence(result.stderr)


@POSIX
def test_a_text_from_a_pipe_is_read(equip: Any, equip_bin: Path) -> None:
    result = subprocess.run(
        ["bash", "-c", f"'{equip_bin}' generate -f <(echo Hello) -n 2 --json"], capture_output=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["n_prompt"] > 1


@pytest.mark.parametrize("depth", [100, 900, 5_000, 100_000])
@pytest.mark.parametrize("shape", ["[", '{"properties": {"a": ', '{"anyOf": [', '{"items": '])
def test_a_schema_however_deep_is_no_traceback(equip: Any, tmp_path: Path, shape: str, depth: int) -> None:
    closing = "".join({"[": "]", "{": "}"}[char] for char in reversed(shape) if char in "[{")
    path = tmp_path / "schema.json"
    path.write_text(shape * depth + "{}" + closing * depth)
    result = equip("generate", "-p", "x", "-n", "1", "-j", path)
    assert result.returncode in (0, 2), result.stderr
    if result.returncode:
        one_sentence(result.stderr)


@POSIX
@pytest.mark.parametrize("term", ["dumb", "", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(equip_bin: Path, tmp_path: Path, term: str) -> None:
    pytest.importorskip("pexpect")
    from terminal import Terminal

    environment = os.environ | {"EQUIP_STATE_DIR": str(tmp_path)}
    with Terminal([str(equip_bin), "chat", "-t", "1", "-n", "16"], environment, term=term) as screen:
        assert "Hello" in screen.say("Hello!")
        screen.type('"""')
        screen.process.send("two\r")
        screen.process.send('lines"""\r')
        screen.wait_for("slots used", 2)
        screen.type("/exit")
        assert screen.end() == 0
        assert b"\x1b" not in screen.raw
    (chat,) = (tmp_path / "chats").glob("*.json")
    assert [turn[0] for turn in json.loads(chat.read_bytes())["turns"]] == ["Hello!", "two\nlines"]


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b'{"error":"Access to model is restricted"}', "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(60), "convert_hf_to_gguf.py"),
        (b"tjgg\x01\0\0\0" + bytes(60), "older format"),
        (b"\x40\0\0\0\0\0\0\0{}" + bytes(60), "safetensors"),
        (b"GGUF\x01\0\0\0" + bytes(60), "version 1"),
        (b"GGUF\x63\0\0\0" + bytes(60), "version 99, newer than this llama.cpp: update"),
        (b"GGUF\0\0\0\x03" + bytes(60), "big-endian"),
        (b"GG", "is not a GGUF file"),
        (b"plain text", "is not a GGUF file"),
    ],
)
def test_what_is_no_model_is_named(equip: Any, tmp_path: Path, head: bytes, words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(head)
    result = equip("info", path)
    assert result.returncode == 1
    assert words in one_sentence(result.stderr)
    assert f"{path} for instance" in one_sentence(equip("info", tmp_path).stderr)


@pytest.mark.parametrize(
    ("kind", "words"), [("adapter", "a LoRA adapter"), ("imatrix", "an importance matrix"), ("mmproj", "vision")]
)
def test_what_lies_beside_models_is_named(equip: Any, tmp_path: Path, kind: str, words: str) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_type(kind)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = equip("info", tmp_path / "x.gguf")
    assert result.returncode == 1
    line = one_sentence(result.stderr)
    assert words in line
    assert "download" not in line
