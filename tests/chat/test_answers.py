"""How an answer looks on a terminal: lines, Markdown, a resize in its middle, and what stays raw."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from places import DATA, SUPPORT
from rich.cells import cell_len

POSIX = pytest.mark.skipif(os.name == "nt", reason="a pseudo terminal")

PAUSE = "<<<>>>\n"
ANSWER = (DATA / "answer.md").read_bytes().decode()
BEFORE, AFTER = ANSWER.split(PAUSE)
CODE = AFTER.split("```")[1].split("\n")[1:-1]


def unmarked(text: str) -> str:
    """What is left of an answer without its marks and without the places of its line ends."""
    return re.sub(r"[*`#>\s]", "", text)


@pytest.fixture
def scripted(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A chat at a terminal whose answer is given; `gate` lets its second half come."""
    pytest.importorskip("pexpect")
    from terminal import Terminal

    opened: list[Terminal] = []

    def start(*flags: str, answer: str = ANSWER, env: dict[str, str] | None = None, **options: Any) -> Terminal:
        (tmp_path / "answer").write_bytes(answer.encode())
        command = [sys.executable, str(SUPPORT / "scripted_chat.py"), str(tmp_path / "answer"), str(tmp_path / "gate")]
        opened.append(Terminal([*command, *flags], environment | (env or {}), **options))
        return opened[-1]

    yield start
    for each in opened:
        each.process.close(force=True)


def ask(screen: Any, gate: Path) -> None:
    gate.touch()
    screen.type("Hello")
    screen.wait_for("slots used")
    screen.wait_for_prompt()


def written(screen: Any) -> str:
    """What the terminal got between the message and the next prompt."""
    answer: str = re.split(r"\x1b\[6n|\x1b\[\?2004h", screen.raw.decode().split("\x1b[?2004l")[1])[0]
    return answer.replace("\r\n", "\n")


def bare(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@POSIX
@pytest.mark.parametrize("columns", [40, 80, 120])
def test_words_are_whole_and_marks_are_styles(scripted: Any, tmp_path: Path, columns: int) -> None:
    with scripted(columns=columns, rows=60) as screen:
        ask(screen, tmp_path / "gate")
        assert not re.search(r"\x1b(?!\[[0-9;]*m)|\r|\x08", written(screen))  # it is only ever appended to
        *answer, status = bare(written(screen)).splitlines()
        assert unmarked("".join(answer)) == unmarked(BEFORE + AFTER)
        assert all(line in answer for line in CODE)
        assert all(cell_len(line) <= columns for line in [*answer, status] if line not in CODE)
        # a line ends where the next word does not fit
        prose = answer[: answer.index("")]
        for line, below in zip(prose[1:], prose[2:], strict=False):
            assert len(line) + 1 + len(below.split()[0]) > columns
        at = next(y for y, line in enumerate(screen.screen.display) if line.startswith("A cache that has a budget"))
        row = screen.screen.buffer[at]
        begin = len("A cache that has a ")
        assert [row[x].bold for x in range(begin - 1, begin + 7)] == [False, *[True] * 6, False]


@POSIX
@pytest.mark.parametrize(("first", "then"), [(40, 80), (80, 40), (120, 50)])
def test_a_resize_in_an_answer_counts_from_its_next_line_on(
    scripted: Any, tmp_path: Path, first: int, then: int
) -> None:
    with scripted(columns=first, rows=60) as screen:
        screen.type("Hello")
        screen.wait_for(r"are\.$")
        screen.resize(60, then)
        (tmp_path / "gate").touch()
        screen.wait_for("slots used")
        screen.wait_for_prompt()
        *answer, status = bare(written(screen)).splitlines()
        assert unmarked("".join(answer)) == unmarked(BEFORE + AFTER)
        begin = next(n for n, line in enumerate(answer) if line.startswith("> A quotation"))
        widths = [[cell_len(line) for line in lines if line not in CODE] for lines in (answer[:begin], answer[begin:])]
        assert max(widths[0]) <= first and max(widths[1]) <= then and len(status) <= then
        assert max(widths[0]) > first - 12 and max(widths[1]) > then - 12


@POSIX
@pytest.mark.parametrize("columns", [40, 120])
def test_plain_answers_are_as_they_were_written(scripted: Any, tmp_path: Path, columns: int) -> None:
    with scripted("--plain", columns=columns) as screen:
        ask(screen, tmp_path / "gate")
        assert written(screen).rpartition("\x1b[2m[")[0] == BEFORE + AFTER


@POSIX
def test_no_color_leaves_line_breaks_alone(scripted: Any, tmp_path: Path) -> None:
    with scripted(columns=40, rows=60, env={"NO_COLOR": "1"}) as screen:
        ask(screen, tmp_path / "gate")
        answer = written(screen)
        assert "\x1b" not in answer
        lines = answer.splitlines()
        assert all(cell_len(line) <= 40 for line in lines if line not in CODE)
        assert re.sub(r"[>\s]", "", "".join(lines[:-1])) == re.sub(r"[>\s]", "", BEFORE + AFTER)


@POSIX
def test_a_dumb_terminal_gets_the_characters(scripted: Any, tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    with scripted(columns=40, rows=60, term="dumb") as screen:
        screen.type("Hello")
        screen.wait_for("slots used")
        assert BEFORE + AFTER in screen.raw.decode().replace("\r\n", "\n")
        assert b"\x1b" not in screen.raw


def test_a_pipe_gets_the_bytes(environment: dict[str, str], tmp_path: Path) -> None:
    answer = BEFORE + AFTER + "\x1b[2J\t**a** \r\n" + "word " * 100 + "end\n"
    (tmp_path / "answer").write_bytes(answer.encode())
    command = [sys.executable, str(SUPPORT / "scripted_chat.py"), str(tmp_path / "answer"), str(tmp_path / "gate")]
    result = subprocess.run(command, input=b"Hello\n", capture_output=True, env=environment, timeout=120, check=True)
    assert result.stdout == answer.encode()


@POSIX
@pytest.mark.parametrize("flags", [(), ("--plain",)])
def test_control_characters_do_nothing_in_an_answer(scripted: Any, tmp_path: Path, flags: tuple[str, ...]) -> None:
    evil = "A \x1b[2J**B\x07** `\x1b]0;owned\x07`\n```\n\x1b[HC\x9b2J\n```\nD\n"
    with scripted(*flags, answer=evil) as screen:
        ask(screen, tmp_path / "gate")
        text = bare(written(screen))
        assert "\x1b" not in text and "\x07" not in text and "\x9b" not in text
        assert "A ␛[2J" in text and "␛[HC�2J" in text


@POSIX
def test_thinking_is_dimmed_and_wrapped(scripted: Any, tmp_path: Path) -> None:
    thought = "The question is short, so that a short answer is *enough*, in the end."
    with scripted(answer=f"<think>\n{thought}\n</think>\n\nYes, **it** is.\n", columns=40) as screen:
        ask(screen, tmp_path / "gate")
        lines = bare(written(screen)).splitlines()
        assert all(len(line) <= 40 for line in lines)
        assert " ".join(lines[:-3]).strip() == thought
        assert lines[-3:-1] == ["", "Yes, it is."]
        assert "\x1b[2mThe question is short, so that a short\x1b[0m" in re.sub(
            r"\x1b\[0m\x1b\[2m", "", written(screen)
        )


@POSIX
@pytest.mark.parametrize(
    ("columns", "status"),
    [
        (80, r"\[\d+ tokens, \d+ per second \| 1024 of 1024 slots used \| 123456 evicted\]"),
        (50, r"\[1024 of 1024 slots used \| 123456 evicted\]"),
        (40, r"\[1024 of 1024 slots used\]"),
    ],
)
def test_the_status_line_is_one_line(scripted: Any, tmp_path: Path, columns: int, status: str) -> None:
    with scripted(answer="Yes.\n", columns=columns) as screen:
        ask(screen, tmp_path / "gate")
        line = bare(written(screen)).splitlines()[-1]
        assert re.fullmatch(status, line) and len(line) <= columns
        assert f"\x1b[2m{line}\x1b[0m" in written(screen)


@POSIX
def test_a_narrow_terminal_cuts_no_words_of_the_first_screen_and_the_lists(
    equip_bin: Path, environment: dict[str, str]
) -> None:
    from terminal import Terminal

    command = [str(equip_bin), "chat", "-t", "1", "--budget", "64", "--policy", "h2o", "-sys", "You are kind."]
    with Terminal(command, environment, rows=60, columns=40) as screen:
        screen.wait_for_prompt()
        first = " ".join(screen.text.split())
        assert (
            "keeps the first 4 tokens, the system prompt, a short first message, the newest 16 and what was looked at most"
            in first
        )
        screen.say("Hello!")
        shown = screen.say("/help") + screen.say("/context all")
        words = " ".join(shown.split())
        assert "what the model can still read; /context all: from the beginning" in words
        assert re.search(r"\d+ of \d+ tokens readable by all KV heads, \d+ by some, \d+ by none, \d+ by each", words)
        assert "bold: all KV heads can read it; plain: half or more; dim: fewer; struck: none" in words


@POSIX
def test_what_is_longer_than_the_screen_goes_through_a_pager(equip_bin: Path, environment: dict[str, str]) -> None:
    from terminal import Terminal

    command = [str(equip_bin), "chat", "-t", "1", "--budget", "64"]
    with Terminal(command, environment | {"PAGER": "sed s/^/paged:/"}, rows=10, columns=40) as screen:
        assert "paged:/help " in screen.say("/help")
        for message in ("My cat is called Tobelin.", "I had soup for lunch.", "I like painting.", "Hello!"):
            screen.say(message)
        assert "paged:" in screen.say("/context all")
        assert "paged:" not in screen.say("/context")
