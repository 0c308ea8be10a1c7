"""equip chat at a real terminal: pastes, job control, a terminal that closes, and words that no terminal should obey."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pexpect = pytest.importorskip("pexpect")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a pseudo terminal")

# at this temperature the tiny model hardly ever ends a turn by itself
ENDLESS = ("--temp", "100", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--seed", "1")


@pytest.fixture
def terminal(equip_bin: Path, environment: dict[str, str]) -> Iterator[Callable[..., Any]]:
    from terminal import Terminal

    opened: list[Terminal] = []

    def start(*args: object, command: str = "chat", rows: int = 40) -> Terminal:
        threads = [] if command == "info" else ["-t", "1"]
        opened.append(Terminal([str(equip_bin), command, *threads, *map(str, args)], environment, rows=rows))
        return opened[-1]

    yield start
    for each in opened:
        each.process.close(force=True)


def saved_turns(environment: dict[str, str]) -> list[tuple[str, str]]:
    folder = Path(environment["EQUIP_STATE_DIR"]) / "chats"
    return [
        tuple(turn[:2]) for path in sorted(folder.glob("*.json")) for turn in json.loads(path.read_bytes())["turns"]
    ]


@pytest.mark.parametrize("pasted", ["/etc/hosts\nis what?", "/clear\nthat", '"""Doc."""\nimport os', "a\nb\n\nc"])
def test_a_paste_is_one_message(terminal: Any, environment: dict[str, str], pasted: str) -> None:
    with terminal("-n", 8) as screen:
        screen.wait_for_prompt()
        # as a terminal sends it: marked, and with the line ends of the return key
        screen.process.send("\x1b[200~" + pasted.replace("\n", "\r") + "\x1b[201~")
        screen.wait(lambda: not screen.at_prompt(), "the paste")
        screen.process.send("\r")
        screen.wait_for("slots used")
        screen.type("/exit")
        assert screen.end() == 0
    assert [said for said, _ in saved_turns(environment)] == [pasted]


def test_bytes_that_are_no_text_are_refused_and_the_chat_goes_on(terminal: Any, environment: dict[str, str]) -> None:
    with terminal("-n", 8) as screen:
        screen.wait_for_prompt()
        os.write(screen.process.child_fd, b"caf\xe9 \r")
        screen.wait_for("error: the message is not UTF-8")
        screen.say("Hello!")
        screen.type("/exit")
        assert screen.end() == 0
        assert "Traceback" not in screen.text
    assert [said for said, _ in saved_turns(environment)] == ["Hello!"]


def test_a_closed_terminal_saves_what_there_is(terminal: Any, environment: dict[str, str]) -> None:
    screen = terminal(*ENDLESS, "--budget", 256)
    screen.type("Hello!")
    screen.wait(lambda: len(screen.text.split("> Hello!")[-1]) > 300, "an answer under way")
    pid = screen.process.pid
    screen.process.close(force=False)  # the kernel tells the process by SIGHUP
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    ((said, answer),) = saved_turns(environment)
    assert said == "Hello!"
    assert len(answer) > 200


@pytest.mark.skipif(shutil.which("bash") is None, reason="job control is a shell's")
@pytest.mark.parametrize("where", ["at the prompt", "in an answer"])
def test_a_stopped_chat_goes_on_in_the_foreground(equip_bin: Path, environment: dict[str, str], where: str) -> None:
    shell = pexpect.spawn(
        "bash",
        ["--norc", "--noprofile", "-i"],
        env=environment | {"PS1": "shell% ", "TERM": "xterm-256color"},
        timeout=60,
        dimensions=(40, 100),
    )
    try:
        shell.expect("shell% ")
        shell.sendline(f"'{equip_bin}' chat -t 1 {' '.join(ENDLESS)} --budget 256")
        answer_cursor(shell, "leaves")
        if where == "in an answer":
            shell.send("Hello!\r")
            shell.expect("Hello!.*[a-z]{3}.*[a-z]{3}.*[a-z]{3}")
        else:
            time.sleep(0.5)
        shell.send("\x1a")
        shell.expect("Stopped")
        shell.expect("shell% ")
        shell.sendline("echo still $((6*7))")
        shell.expect("still 42")
        shell.sendline("fg")
        shell.expect("equip")  # the shell names what goes on
        if where == "at the prompt":
            answer_cursor(shell, ">")
            shell.send("Hello!\r")
        answer_cursor(shell, "slots used")
    finally:
        shell.close(force=True)
    ((said, answer),) = saved_turns(environment)
    assert said == "Hello!"
    assert answer


def answer_cursor(shell: Any, pattern: str) -> None:
    """Wait for a pattern, and tell prompt_toolkit where the cursor is when it asks."""
    while shell.expect([re.escape("\x1b[6n"), pattern]) == 0:
        shell.send("\x1b[1;1R")


def test_a_models_escape_sequences_do_nothing(terminal: Any, tmp_path: Path) -> None:
    grammar = tmp_path / "g.gbnf"
    grammar.write_text('root ::= "A\\x1b[2JB\\x1b]0;owned\\x07C"\n')
    with terminal("-p", "Hello", "--grammar-file", grammar, command="generate") as screen:
        assert screen.end() == 0
        assert b"\x1b[2J" not in screen.raw
        assert b"\x07" not in screen.raw
        assert "A\u241b[2JB\u241b]0;owned\u2407C" in screen.text


def test_a_pipe_gets_them_as_they_are(equip_bin: Path, environment: dict[str, str], tmp_path: Path) -> None:
    import subprocess

    grammar = tmp_path / "g.gbnf"
    grammar.write_text('root ::= "A\\x1b[2JB"\n')
    result = subprocess.run(
        [str(equip_bin), "generate", "-p", "Hello", "--grammar-file", str(grammar)], capture_output=True, env=environment,
        timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.stdout.strip() == b"A\x1b[2JB"


@pytest.mark.parametrize("flags", [(), ("-v",)], ids=["quiet", "verbose"])
def test_a_files_escape_sequences_do_nothing(terminal: Any, tmp_path: Path, flags: tuple[str, ...]) -> None:
    import gguf
    from gguf_copy import copy_metadata, finish

    from equip_cli.models import embedded

    path = tmp_path / "named.gguf"
    reader = gguf.GGUFReader(embedded.MODEL)
    writer = gguf.GGUFWriter(str(path), reader.fields["general.architecture"].contents())
    copy_metadata(reader, writer, leave_out=["general.name"])
    writer.add_name("fine\x1b[2Jname\x1b]0;owned\x07")
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)
    with terminal(path, *flags, command="info") as screen:
        assert screen.end() == 0, screen.text
        assert b"\x1b[2J" not in screen.raw
        assert b"\x07" not in screen.raw
        assert "fine" in screen.text
