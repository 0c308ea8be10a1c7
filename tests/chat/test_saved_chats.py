"""Chats on disk: they go on where they were, at once, whatever ended them, and nothing typed or answered is lost."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from equip_cli.chat import saved
from equip_cli.chat.transcript import SavedTurn, Transcript
from equip_cli.core.errors import UsageError

POSIX = pytest.mark.skipif(os.name == "nt", reason="a pseudo terminal, POSIX signals")
TALK = [
    "My cat is called Tobelin.",
    "Hello!",
    "I had soup for lunch.",
    "The weather is cold today.",
    "I like painting.",
    "How are you?",
]
BOUNDED = ("-t", 1, "--budget", 128, "--policy", "h2o", "-n", 24)

Chat = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def chats(environment: dict[str, str]) -> Path:
    return Path(environment["EQUIP_STATE_DIR"]) / "chats"


@pytest.fixture
def chat(equip_bin: Path, environment: dict[str, str]) -> Chat:
    def run(*args: object, say: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(equip_bin), "chat", *map(str, args)],
            env=environment | variables,
            input=say,
            stdin=subprocess.DEVNULL if say is None else None,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )

    return run


def ok(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, done.stderr
    return done


def records(chat: Chat) -> list[dict[str, Any]]:
    return list(json.loads(ok(chat("--list", "--json")).stdout))


def context(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout.partition("\nyou: ")[2]


# ---- going on --------------------------------------------------------------------------------------------------------


def test_a_chat_goes_on_from_its_cache_with_its_policy_and_budget(chat: Chat, chats: Path) -> None:
    first = ok(chat(*BOUNDED, "--recent", 40, say="\n".join([*TALK * 3, "/context all"])))
    again = ok(chat("--continue", "-n", 24, "-t", 1, say="/stats\n/context all\n"))
    assert "18 turns go on where they were\n" in again.stderr and "again" not in again.stderr
    assert "budget 128 of" in again.stderr
    assert re.search(r"^policy +h2o, head, auto", again.stdout, re.MULTILINE)
    assert re.search(r"^read +0 tokens$", again.stdout, re.MULTILINE), again.stdout
    assert context(first) == context(again) != ""
    (kept,) = chats.glob("*.json")
    assert "recent=40" in str(Transcript.load(kept).policy)
    assert (chats / kept.name).stat().st_mode & 0o777 == saved.cache_path(kept).stat().st_mode & 0o777 == 0o600


def test_what_follows_is_what_one_run_would_have_answered(chat: Chat) -> None:
    greedy = (*BOUNDED, "--temp", 0)
    whole = ok(chat(*greedy, say="\n".join(TALK * 4)))
    ok(chat(*greedy, say="\n".join((TALK * 4)[:13])))
    rest = ok(chat("--continue", "-n", 24, "-t", 1, "--temp", 0, say="\n".join((TALK * 4)[13:])))
    assert whole.stdout.endswith(rest.stdout) and rest.stdout


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--budget", 256), "its policy or its options are other ones"),
        (("--policy", "streaming"), "its policy or its options are other ones"),
        (("-ctk", "f32"), "its policy or its options are other ones"),
        (("-sys", "Be brief."), "the saved cache is of another state of this chat"),
    ],
)
def test_what_is_given_anew_reads_again_and_says_why(chat: Chat, options: tuple[object, ...], why: str) -> None:
    ok(chat(*BOUNDED, say="\n".join(TALK * 2)))
    again = ok(chat("--continue", *options, "-t", 1, say="Hello!"))
    assert re.search(rf"12 turns go on; reading \d+ tokens again: {why}\n", again.stderr), again.stderr
    budget = 256 if options[0] == "--budget" else 128
    assert f"budget {budget} of" in again.stderr
    # and the time after that it goes on from the new cache
    assert "13 turns go on where they were" in ok(chat("--continue", "-n", 24, "-t", 1, say="/stats")).stderr


@pytest.mark.parametrize("damage", ["missing", "truncated", "another", "older"])
def test_a_cache_that_does_not_fit_falls_back_to_reading(chat: Chat, chats: Path, damage: str) -> None:
    ok(chat(*BOUNDED, say="\n".join(TALK)))
    (path,) = chats.glob("*.json")
    cache = saved.cache_path(path)
    data = cache.read_bytes()
    if damage == "missing":
        cache.unlink()
    elif damage == "truncated":
        cache.write_bytes(data[: len(data) // 2])
    elif damage == "another":
        ok(chat(*BOUNDED, say="Something else."))
        other = max(chats.glob("*.cache"))
        cache.write_bytes(other.read_bytes())
        saved.delete(other.with_suffix(".json"))
    else:  # a turn was taken back by a process that was killed before it saved its cache
        kept = Transcript.load(path)
        kept.turns[-1] = SavedTurn("Another one.", "Yes.", kept.turns[-1].prompt_ids, array("i", [5, 6, 7]))
        kept.save(path)
    again = ok(chat("--continue", "-n", 24, "-t", 1, "--temp", 0, "-p", "What is my cat called?"))
    assert re.search(r"6 turns go on; reading \d+ tokens again: .+", again.stderr), again.stderr
    assert len(Transcript.load(path).turns) == 7


def test_a_damaged_cache_with_a_right_checksum_of_ours_is_refused_by_the_library(chat: Chat, chats: Path) -> None:
    ok(chat(*BOUNDED, say="\n".join(TALK)))
    (path,) = chats.glob("*.json")
    cache = saved.cache_path(path)
    data = bytearray(cache.read_bytes())
    data[len(data) // 2] ^= 1
    cache.write_bytes(data)
    again = ok(chat("--continue", "-n", 24, "-t", 1, say="Hello!"))
    assert re.search(r"reading \d+ tokens again: .*(damaged|checksum)", again.stderr), again.stderr


def test_chats_of_the_release_before_go_on(chat: Chat, chats: Path) -> None:
    chats.mkdir(parents=True)
    turns = [["My cat is called Tobelin.", "Noted."], ["Hello!", "Hello! How are you?"]]
    record = {"format": 1, "model": None, "system": None, "turns": turns}
    (chats / "2025-01-01T00-00-00-001.json").write_text(json.dumps(record))
    again = ok(chat("--continue", "-n", 24, "-t", 1, "--temp", 0, "-p", "What is my cat called?"))
    assert "2 turns go on; reading" in again.stderr and "no cache of it is saved" in again.stderr
    assert again.stdout == "Your cat is called Tobelin.\n"


# ---- names -----------------------------------------------------------------------------------------------------------


def test_names_find_their_chats(chat: Chat) -> None:
    ok(chat(*BOUNDED, say="My cat is called Tobelin.\n/save the cat"))
    ok(chat(*BOUNDED, say="My dog is called Rimoka.\n/rename the dog"))
    listed = records(chat)
    assert [(each["name"], each["first_words"]) for each in listed] == [
        ("the dog", "My dog is called Rimoka."),
        ("the cat", "My cat is called Tobelin."),
    ]
    assert all(each["n_tokens"] > 5 and each["n_kept"] > 5 and each["bytes"] > 10_000 for each in listed)
    assert "1 turns go on where they were" in ok(chat("--continue", "the cat", "-t", 1, say="/stats")).stderr
    assert "1 turns go on where they were" in ok(chat("--continue", "the d", "-t", 1, say="/stats")).stderr
    table = ok(chat("--list")).stdout
    assert "the cat" in table and "My dog is called Rimoka." in table
    unknown = chat("--continue=the bird", "-t", 1)
    assert unknown.returncode == 2 and "there is no saved chat the bird: the newest are the " in unknown.stderr
    taken = chat(*BOUNDED, say="Hello!\n/rename the cat")
    assert "another chat has the name the cat" in taken.stderr


def test_load_goes_over_to_another_chat_and_delete_removes_one(chat: Chat, chats: Path) -> None:
    ok(chat(*BOUNDED, say="My cat is called Tobelin.\n/save cat"))
    done = ok(
        chat(*BOUNDED, "--temp", 0, say="Hello!\n/save hello\n/load cat\nWhat is my cat called?\n/delete hello\n/list")
    )
    assert "Your cat is called Tobelin." in done.stdout and "1 turns go on where they were" in done.stderr
    assert [each["name"] for each in records(chat)] == ["cat"]
    assert "cat *" in done.stdout and "hello" not in done.stdout.split("| name")[1]
    assert {path.suffix for path in chats.iterdir()} == {".json", ".cache"}
    other = chat("-t", 1, say="Hello!\n/load cat")
    assert "that chat has another model or policy" in other.stderr


def test_continue_takes_a_model_behind_it(chat: Chat, tiny_model: Path) -> None:
    ok(chat(*BOUNDED, say="Hello!"))
    done = ok(chat("--continue", tiny_model, "-t", 1, "-n", 4, say="Hello!"))
    assert re.search(r"1 turns go on; reading \d+ tokens again: it was with another model\n", done.stderr), done.stderr


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_caches_are_kept_within_their_limits(chat: Chat, chats: Path) -> None:
    for i in range(4):
        ok(chat(*BOUNDED, "--saved-caches", 2, say=f"Chat number {i}."))
    assert len(list(chats.glob("*.json"))) == 4
    assert len(list(chats.glob("*.cache"))) == 2
    ok(chat(*BOUNDED, "--no-save-cache", say="Another one."))
    ok(chat(*BOUNDED, "--saved-caches", 0, say="And one more."))
    assert len(list(chats.glob("*.json"))) == 6 and len(list(chats.glob("*.cache"))) == 2
    oldest = min(chats.glob("*.json")).stem
    assert "no cache of it is saved" in ok(chat(f"--continue={oldest}", "-t", 1, say="Hello!")).stderr
    small = ok(
        chat("-t", 1, "--budget", 1024, "--cache-limit", 1, "-ctk", "f32", "-ctv", "f32", say="\n".join(TALK * 8))
    )
    assert small.stderr.count("raise --cache-limit") <= 1


def test_one_chat_is_open_in_one_process(chat: Chat, chats: Path) -> None:
    ok(chat(*BOUNDED, say="Hello!\n/save mine"))
    (path,) = chats.glob("*.json")
    lock = saved.Lock(path)
    try:
        other = chat("--continue", "mine", "-t", 1, say="Hello!")
        assert other.returncode == 2
        assert other.stderr.endswith(
            "error: this chat is open in another process: close it there, or start a new chat\n"
        )
        with pytest.raises(UsageError, match="open in another process"):
            saved.delete(path)
    finally:
        lock.release()
    ok(chat("--continue", "mine", "-t", 1, say="Hello!"))


@POSIX
def test_a_full_disk_costs_the_cache_and_not_the_text(
    equip_bin: Path, environment: dict[str, str], chats: Path
) -> None:
    """A limit on the size of files stands for the disk: the transcript fits, the cache does not."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        "from equip_cli.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "chat", "-t", "1", "--budget", "128", "-p", "Hello!", "-p", "How are you?"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the cache of this chat is not saved, its text is: ") == 1
    (path,) = chats.glob("*.json")
    assert len(Transcript.load(path).turns) == 2
    assert {each.suffix for each in chats.iterdir()} == {".json"}


# ---- whatever ends it ------------------------------------------------------------------------------------------------


class Evening:
    """Turns in a terminal whose process is killed at random moments."""

    def __init__(
        self, open_terminal: Callable[..., Any], chats: Path, first: tuple[str, ...], again: tuple[str, ...]
    ) -> None:
        self.open_terminal, self.chats, self.again = open_terminal, chats, again
        self.typed: list[str] = []
        self.notes: list[str] = []
        self.terminal = open_terminal(*first)

    @property
    def turns(self) -> list[Any]:
        (path,) = self.chats.glob("*.json")
        return list(Transcript.load(path).turns)

    def say(self, line: str) -> None:
        self.terminal.say(line)
        self.typed.append(line)

    def context(self) -> str:
        """What /context shows, down to its summary."""
        self.terminal.say("/context")
        shown = str(self.terminal.text).rsplit("> /context", 1)[1]
        assert "readable" in shown
        return " ".join(shown.rpartition("readable")[0].split())

    def kill(self, when: str) -> None:
        line = f"And then they said number {len(self.typed)}."
        if when != "at the prompt":
            self.terminal.wait_for_prompt()
            self.terminal.type(line)
            self.typed.append(line)
            if when == "in an answer":
                (path,) = self.chats.glob("*.json")
                self.terminal.wait(lambda: bool(saved.journaled(path)), "first tokens of an answer")
            else:
                self.terminal.wait(lambda: len(self.turns) == len(self.typed), "the message on disk")
        self.terminal.process.kill(9)
        self.terminal.end()
        shown = self.terminal.text
        self.terminal = self.open_terminal("--continue", *self.again)
        self.terminal.wait_for("turns go on")
        self.terminal.wait_for_prompt()
        self.notes.append(self.terminal.text)
        turns = self.turns
        assert [turn.user for turn in turns] == self.typed
        if when == "in an answer":  # what was on the screen of it is there again
            last = " ".join(shown.split(line)[-1].split())
            # at least: a token is on disk before it is shown
            reply = " ".join(turns[-1].reply.split())
            assert reply and reply.startswith(last), (last, reply)


def live(evening: Evening, n: int, kills: dict[int, str]) -> None:
    for i in range(n):
        evening.say(TALK[i % len(TALK)] + f" This is turn {i}.")
        if i in kills:
            before = evening.context() if kills[i] == "at the prompt" else ""
            evening.kill(kills[i])
            if before:
                assert evening.context() == before
    assert [turn.user for turn in evening.turns] == evening.typed
    assert all("tokens again" not in note for note in evening.notes), evening.notes


@pytest.fixture
def terminal(equip_bin: Path, environment: dict[str, str]) -> Iterator[Callable[..., Any]]:
    from terminal import Terminal

    opened: list[Any] = []

    def start(*args: object) -> Any:
        opened.append(Terminal([str(equip_bin), "chat", *map(str, args)], environment, rows=40))
        return opened[-1]

    yield start
    for each in opened:
        each.process.close(force=True)


@POSIX
def test_an_evening_that_is_killed_three_times_goes_on_each_time(terminal: Callable[..., Any], chats: Path) -> None:
    first = ("-t", "1", "--budget", "128", "--policy", "h2o", "-n", "24")
    evening = Evening(terminal, chats, first, ("-t", "1", "-n", "24"))
    live(evening, 12, {4: "at the prompt", 7: "in an answer", 10: "after a message"})


@POSIX
@pytest.mark.real
@pytest.mark.timeout(1800)
def test_sixty_turns_of_a_real_model(
    terminal: Callable[..., Any], chats: Path, real_file: Callable[[str], Path]
) -> None:
    first = (str(real_file("smollm2")), "--budget", "512", "--policy", "h2o", "-n", "24", "--temp", "0")
    evening = Evening(terminal, chats, first, ("-n", "24", "--temp", "0"))
    moments = random.Random(5).sample(range(10, 58), 3)
    live(evening, 60, dict(zip(sorted(moments), ("in an answer", "at the prompt", "after a message"), strict=True)))
