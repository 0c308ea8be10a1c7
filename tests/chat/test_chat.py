"""equip chat from outside: a newcomer at a real terminal, pipes, and every way to leave."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from equip_cli.chat import context_view

POSIX = pytest.mark.skipif(os.name == "nt", reason="a pseudo terminal")

FACTS = {"cat": "Tobelin", "dog": "Rimoka", "sister": "Zanuri", "boat": "Kedomal", "town": "Lopesi"}
SMALL_TALK = (
    "I had soup for lunch.", "The weather is cold today.", "I like painting.", "How are you?", "I feel tired today.",
    "We walked to the park.", "I am reading about stars.", "The train was very late.", "I bought a red lamp.",
)  # fmt: skip
TURN_KEYS = {
    "role", "content", "reasoning_content", "complete", "n_prompt", "n_gen", "policy", "budget", "n_used", "n_evicted",
    "n_past", "predicted_per_second",
}  # fmt: skip


@pytest.fixture
def chat(equip_bin: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
        options["env"] = environment | options.pop("env", {})
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        # the tiny model may not end an answer to what it was not trained on
        command = [str(equip_bin), "chat", "-t", "1", "-n", "64", *map(str, args)]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, **options)

    return run


@pytest.fixture
def terminal(equip_bin: Path, environment: dict[str, str]) -> Iterator[Callable[..., Any]]:
    pytest.importorskip("pexpect")
    from terminal import Terminal

    opened: list[Terminal] = []

    def start(*args: object, rows: int = 40, env: dict[str, str] | None = None, **options: Any) -> Terminal:
        command = [str(equip_bin), "chat", "-t", "1", *map(str, args)]
        opened.append(Terminal(command, environment | (env or {}), rows=rows, **options))
        return opened[-1]

    yield start
    for each in opened:
        each.process.close(force=True)


def saved_chats(environment: dict[str, str]) -> list[dict[str, Any]]:
    folder = Path(environment["EQUIP_STATE_DIR"]) / "chats"
    assert not list(folder.glob(".*"))  # no partial files
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


# ---- the newcomer


def tell_and_ask(terminal: Any) -> dict[str, str]:
    """State five facts, talk past a budget of 256 tokens, ask the facts back."""
    for noun, name in FACTS.items():
        terminal.say(f"My {noun} is called {name}.")
    for i in range(18):
        terminal.say(SMALL_TALK[i % len(SMALL_TALK)])
    return {noun: terminal.say(f"What is my {noun} called?") for noun in FACTS}


@POSIX
def test_a_newcomer_with_the_whole_cache_gets_every_fact(terminal: Any) -> None:
    with terminal("--policy", "none") as screen:
        answers = tell_and_ask(screen)
        for noun, name in FACTS.items():
            assert f"Your {noun} is called {name}." in answers[noun]
        assert "tiny demonstration model" in screen.text
        assert "equip pull" in screen.text
        screen.type("/exit")
        assert screen.end() == 0


@POSIX
@pytest.mark.parametrize("colour", [True, False], ids=["colour", "NO_COLOR"])
def test_a_newcomer_past_the_budget_sees_what_is_gone(terminal: Any, colour: bool) -> None:
    with terminal(
        *("--policy", "streaming", "--budget", 256, "--no-pin-first"),
        rows=200,
        env={} if colour else {"NO_COLOR": "1"},
    ) as screen:
        answers = tell_and_ask(screen)
        for noun, name in FACTS.items():
            assert name not in answers[noun]
        assert "256 of 256 slots used" in answers["town"]
        begin = len(screen.raw)
        shown = screen.say("/context all")
        drawn = screen.raw[begin:].decode()
        for name in FACTS.values():
            if colour:
                # dimmed and struck through; the sinks before the first name are not
                assert re.search(rf"\x1b\[2;9m[^\x1b]*{name}\.\x1b\[0m", drawn), drawn
            else:
                assert name not in shown
        if not colour:
            assert re.search(r"you: \[\.\.\. \d+ tokens no longer readable \.\.\.\]", shown)
            assert set(re.findall(r"\x1b\[([0-9;]*)m", drawn)) <= {"", "0"}
        # what was just said is not
        assert re.search(r"you: What is my town called\?", re.sub(r"\x1b\[[0-9;]*m", "", drawn))
        assert not re.search(r"\x1b\[2;9m[^\x1b]*What is my town called", drawn)
        assert re.search(r"256 of \d+ tokens readable, \d+ no longer", shown)
        screen.type("/exit")
        assert screen.end() == 0


@POSIX
def test_a_short_first_message_is_never_forgotten(terminal: Any) -> None:
    with terminal("--policy", "streaming", "--budget", 256, rows=200) as screen:
        answers = tell_and_ask(screen)
        assert "keeps the first 4 tokens, a short first message and the newest" in " ".join(screen.text.split())
        first, *later = FACTS
        assert FACTS[first] in answers[first]
        assert not any(FACTS[noun] in answers[noun] for noun in later)


@POSIX
def test_the_context_fits_the_screen(terminal: Any) -> None:
    with terminal("--budget", 256, rows=12) as screen:
        for i in range(12):
            screen.say(SMALL_TALK[i % len(SMALL_TALK)])
        shown = screen.say("/context")
        assert re.search(r"; \d+ lines above: /context all", shown)
        assert len(shown.strip().splitlines()) <= 12


# ---- stopping and leaving


@POSIX
def test_ctrl_c_stops_the_turn_and_a_second_one_leaves(terminal: Any, environment: dict[str, str]) -> None:
    # at this temperature the tiny model hardly ever ends a turn by itself
    with terminal("--budget", 256, "--temp", 100, "--top-k", 0, "--top-p", 1, "--min-p", 0, "--seed", 1) as screen:
        screen.type("Hello!")
        screen.wait(lambda: len(screen.text.split("> Hello!")[-1]) > 400, "an answer under way")
        screen.interrupt()
        screen.wait_for("stopped; Ctrl-C again leaves")
        screen.wait_for_prompt()
        screen.interrupt()
        assert screen.end() == 130
    (kept,) = saved_chats(environment)
    (turn,) = kept["turns"]
    assert turn[0] == "Hello!"
    assert len(turn[1]) > 50


@POSIX
def test_after_a_stopped_turn_the_chat_goes_on(terminal: Any) -> None:
    with terminal("--budget", 256, "--temp", 100, "--top-k", 0, "--top-p", 1, "--min-p", 0, "--seed", 1) as screen:
        for count in (1, 2):
            screen.type("Hello!")
            screen.wait(lambda n=count: len(screen.text.split("> Hello!")) > n, "the message")
            screen.wait(lambda: len(screen.text.split("> Hello!")[-1]) > 300, "an answer under way")
            screen.interrupt()
            screen.wait_for("stopped; Ctrl-C again leaves", count)
        assert "evicted" in screen.say("/stats")
        screen.type("/exit")
        assert screen.end() == 0


@POSIX
def test_ctrl_c_at_the_prompt_warns_and_ctrl_d_leaves(terminal: Any) -> None:
    with terminal() as screen:
        screen.wait_for_prompt()
        screen.interrupt()
        screen.wait_for("Ctrl-C again leaves")
        screen.say("Hello!")  # a message in between starts the count again
        screen.interrupt()
        screen.wait_for("Ctrl-C again leaves", 2)
        screen.wait_for_prompt()
        screen.process.sendeof()
        assert screen.end() == 0


@POSIX
def test_a_resize_leaves_the_chat_whole(terminal: Any) -> None:
    with terminal(rows=30, columns=90, env={"PAGER": "cat"}) as screen:  # /help is longer than 20 rows
        screen.say("My cat is called Tobelin.")
        screen.wait_for_prompt()
        screen.resize(20, 50)
        assert "Tobelin" in screen.say("What is my cat called?")
        assert max(map(len, screen.say("/help").splitlines())) <= 50
        screen.type("/exit")
        assert screen.end() == 0


@POSIX
def test_history_holds_messages_of_several_lines(terminal: Any, environment: dict[str, str]) -> None:
    with terminal() as screen:
        screen.say("My cat is called Tobelin.")
        screen.type('"""I had soup')
        screen.type('for lunch."""')
        screen.wait_for_prompt()
        screen.process.send("\x1b[A\x1b[A\x1b[A")  # up, to the first message
        screen.wait_for(r"^> My cat is called Tobelin\.", 2)
        screen.process.send("\x15")
        screen.wait_for_prompt()
        screen.type("/exit")
        assert screen.end() == 0
    assert saved_chats(environment)[0]["turns"][1][0] == "I had soup\nfor lunch."


# ---- commands


def test_commands_work_in_a_pipe(chat: Any, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("My cat is called Tobelin.\n")
    script = [
        f"/read {note}", "I had soup for lunch.", "What is my cat called?", "/undo", "/system Be kind and brief.", "/system",
        "Hello!", "/regen", f"/save {tmp_path / 'a.md'}", f"/save {tmp_path / 'a.json'}", "/stats", "/context", "/help",
        "//help", "/clear", "What is my cat called?", "/exit", "this is not read",
    ]  # fmt: skip
    result = chat(input="\n".join(script) + "\n")
    assert result.returncode == 0, result.stderr
    assert "Your cat is called Tobelin." in result.stdout
    assert "taken back: What is my cat called?" in result.stderr
    assert "Be kind and brief.\n" in result.stdout
    messages = json.loads((tmp_path / "a.json").read_text())
    assert messages[0] == {"role": "system", "content": "Be kind and brief."}
    assert [m["role"] for m in messages[1:]] == ["user", "assistant"] * 2
    assert messages[1]["content"] == "My cat is called Tobelin.\n\nI had soup for lunch."
    assert messages[3]["content"] == "Hello!"
    assert (tmp_path / "a.md").read_text().startswith("## system\n\nBe kind and brief.\n\n## user\n")
    assert re.search(r"^policy +streaming, token, cache, inplace$", result.stdout, re.MULTILINE)
    assert "/context" in result.stdout
    assert "this is not read" not in result.stdout
    after = result.stdout.rpartition("Alt-Enter")[2]
    assert "Tobelin" not in after


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("/bogus", "there is no command /bogus: /help lists them"),
        ("/undo", "there is no turn yet: say something first"),
        ("/regen", "there is no turn yet: say something first"),
        ("/read", "/read needs the path of a text file"),
        ("/read no-such-file", "the file no-such-file cannot be read (No such file or directory): check the path"),
        ("/save", "nothing was said yet: there is nothing to save"),
        ("/save a.txt", "a.txt ends neither in .md nor in .json: give one of them"),
        ("/save /no/such/folder/a.md", "/no/such/folder"),
        ("/context everything", "/context takes nothing or all"),
        ("/positions true", "keys rotated under one rule cannot be mixed with those of another: leave with /exit"),
        ("/positions true", "`equip chat --positions true`"),
        ("/policy none", "policy cannot change within a chat"),
        (
            "/budget 128",
            "the cache is laid out when a chat begins: leave with /exit, and go on with `equip chat --budget 128`",
        ),
        ("/rotate-every", "`equip chat --rotate-every N`"),
        ("/evict-every 4", "what is gone was chosen by the old rule: leave with /exit"),
        ("/score-queries 8", "`equip chat --score-queries 8`"),
        ("/page-size", "`equip chat --page-size N`"),
        ("/scope head", "`equip chat --scope head`"),
    ],
)
def test_a_wrong_command_is_one_sentence(chat: Any, command: str, sentence: str) -> None:
    if command.startswith("/save /no") and os.geteuid() == 0:
        command = "/save /proc/equip/a.md"  # root may make folders elsewhere
        sentence = "/proc/equip"
    result = chat(input=command + "\n")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode in (1, 2)
    assert result.stdout == ""
    assert len(errors) == 1, result.stderr
    assert sentence in errors[0]
    assert "Traceback" not in result.stderr


def test_a_rule_that_cannot_change_names_the_way_to_go_on(chat: Any) -> None:
    first = chat(input="My cat is called Tobelin.\n/positions true\nnot read\n")
    assert first.returncode == 2
    assert "`equip chat --continue --positions true`" in first.stderr
    after = chat("--continue", "--positions", "true", input="What is my cat called?\n/stats\n")
    assert after.returncode == 0, after.stderr
    assert "Your cat is called Tobelin." in after.stdout
    assert re.search(r"^policy +streaming, token, true, inplace$", after.stdout, re.MULTILINE)
    auto = chat("--policy", "random", "--budget", 64, input="/stats\n")
    assert re.search(r"^policy +random, token, auto \(true now\), inplace$", auto.stdout, re.MULTILINE)


# ---- what each layer or KV head can still read


class Words:
    """A model whose tokens are indices of words."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return self.pieces[token]


class Kept:
    """A session that keeps these shares."""

    def __init__(self, model: Words, shares: dict[int, float], scope: str, n_past: int) -> None:
        self.model, self._shares = model, shares
        self._stats = {"scope": scope, "n_past": n_past, "n_used": 3}

    def shares(self) -> dict[int, float]:
        return self._shares

    def stats(self) -> dict[str, Any]:
        return self._stats


def conversation_of(session: Kept, *turns: tuple[list[int], list[int]]) -> Any:
    def turn(prompt: list[int], reply: list[int]) -> SimpleNamespace:
        user = b"".join(session.model.pieces[token] for token in prompt).decode()
        return SimpleNamespace(user=user, prompt_ids=prompt, reply_ids=reply)

    n_read = session.stats()["n_past"]
    return SimpleNamespace(session=session, turns=[turn(*each) for each in turns], system=None, n_read=n_read)


MODEL = Words(b" I", b" had", b" soup", b" for", b" lunch", b".", b" \xe4\xb8", b"\x96")
SHARES = {0: 1.0, 2: 0.25, 3: 0.75, 4: 0.5, 5: 1.0}


def styles(text: Any) -> list[tuple[str, str]]:
    return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]


def test_a_token_is_as_bright_as_many_heads_keep_it() -> None:
    conversation = conversation_of(Kept(MODEL, SHARES, "head", 6), (list(range(6)), [0]))
    you, answer = context_view.passages(conversation)
    assert (you.shares, you.units) == ([1.0, 0.0, 0.25, 0.75, 0.5, 1.0], "KV heads")
    assert you.readable == [True, False, True, True, True, True]
    assert answer.shares == [1.0]  # it waits to be read
    coloured = context_view.render(MODEL, you, colour=True)  # type: ignore[arg-type]
    assert coloured.plain == "you: I had soup for lunch."
    assert styles(coloured) == [
        ("I", "bold"), (" had", "not bold dim strike"), (" soup", "not bold dim"), (" for lunch", "not bold"), (".", "bold"),
    ]  # fmt: skip
    plain = context_view.render(MODEL, you, colour=False)  # type: ignore[arg-type]
    assert plain.plain == "you: I [... 1 token no longer readable ...] {soup for lunch}."
    assert (
        context_view.summary(conversation) == "2 of 6 tokens readable by all KV heads, 3 by some, 1 by none, 3 by each"
    )
    assert context_view.legend(conversation, colour=False) == "{in braces}: some KV heads can read it; without: all"
    legend = context_view.legend(conversation, colour=True)
    assert legend == "bold: all KV heads can read it; plain: half or more; dim: fewer; struck: none"


def test_one_set_for_the_whole_model_needs_no_legend() -> None:
    shares = dict.fromkeys((0, 2, 3), 1.0)
    conversation = conversation_of(Kept(MODEL, shares, "token", 4), (list(range(4)), []))
    (you,) = context_view.passages(conversation)
    assert (you.shares, you.units) == ([1.0, 0.0, 1.0, 1.0], None)
    coloured = context_view.render(MODEL, you, colour=True)  # type: ignore[arg-type]
    assert styles(coloured) == [("I", "not bold"), (" had", "not bold dim strike"), (" soup for", "not bold")]
    assert context_view.legend(conversation, colour=True) is context_view.legend(conversation, colour=False) is None
    assert context_view.summary(conversation) == "3 of 4 tokens readable, 1 no longer"
    assert context_view.legend(conversation_of(Kept(MODEL, shares, "layer", 4)), colour=False) == (
        "{in braces}: some layers can read it; without: all"
    )


def test_a_character_of_two_tokens_is_not_torn() -> None:
    passage = context_view.Passage("you", [0, 6, 7, 5], [1.0, 1.0, 0.5, 0.5], "KV heads")
    coloured = context_view.render(MODEL, passage, colour=True)  # type: ignore[arg-type]
    assert coloured.plain == "you: I \u4e16."
    half = context_view.Passage("you", [0, 6], [1.0, 1.0], None)
    assert context_view.render(MODEL, half, colour=False).plain == "you: I \ufffd"  # type: ignore[arg-type]


def test_a_pipe_shows_what_heads_keep(chat: Any) -> None:
    script = [*SMALL_TALK, *SMALL_TALK, "/context", "/stats"]
    result = chat("--policy", "h2o", "--budget", 64, input="\n".join(script) + "\n")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^you: .*\{[^{}]+\}", result.stdout, re.MULTILINE)
    assert re.search(
        r"\d+ of \d+ tokens readable by all KV heads, \d+ by some, \d+ by none, 64 by each\n", result.stderr
    )
    assert "{in braces}: some KV heads can read it" in result.stderr
    assert re.search(
        r"^policy +h2o, head, auto \(.*now\), inplace, score queries all, evict every 1$", result.stdout, re.M
    )


def test_json_names_the_choice(chat: Any) -> None:
    (turn,) = map(json.loads, chat("--policy", "h2o", "--budget", 64, "--json", "-p", "Hello!").stdout.splitlines())
    assert set(turn) == TURN_KEYS | {"score_queries", "evict_every"}


# ---- pipes


def test_one_turn_per_line_or_block(chat: Any) -> None:
    text = 'My cat is called Tobelin.\n\n"""My dog is called Rimoka.\nHello!"""\nWhat is my cat called?\nWhat is my dog called?'
    result = chat(input=text)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert lines[2:] == ["Your cat is called Tobelin.", "Your dog is called Rimoka."]
    assert "\x1b" not in result.stdout + result.stderr


def test_json_is_one_object_per_turn(chat: Any) -> None:
    result = chat("--json", "--budget", 64, input="\n".join(SMALL_TALK))
    turns = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(turns) == len(SMALL_TALK)
    assert all(set(turn) == TURN_KEYS for turn in turns)
    assert all(turn["complete"] and turn["content"] for turn in turns)
    assert turns[-1]["n_used"] == turns[-1]["budget"] == 64
    assert turns[-1]["n_evicted"] > 0
    # each turn reads its own tokens: a sentence and three tokens of the template
    assert all(turn["n_prompt"] < 20 for turn in turns)


def test_messages_may_be_arguments(chat: Any) -> None:
    result = chat("-p", "My cat is called Tobelin.", "-p", "What is my cat called?")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "Your cat is called Tobelin."


def test_a_system_prompt_is_read_from_a_file(chat: Any, tmp_path: Path) -> None:
    path = tmp_path / "system.txt"
    path.write_text("Be kind and brief.")
    result = chat("-sysf", path, input="/system\nHello!\n/context")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Be kind and brief.\n")
    assert "system: Be kind and brief." in result.stdout


def test_continue_goes_on_without_reading_again(chat: Any, environment: dict[str, str]) -> None:
    first = chat("-p", "My cat is called Tobelin.", "-p", "Hello!")
    assert first.returncode == 0, first.stderr
    again = chat("--continue", "-p", "What is my cat called?")
    assert again.returncode == 0, again.stderr
    assert again.stdout == "Your cat is called Tobelin.\n"
    assert "2 turns go on where they were\n" in again.stderr
    assert [len(each["turns"]) for each in saved_chats(environment)] == [3]


def test_a_full_cache_names_both_remedies_and_loses_nothing(chat: Any, environment: dict[str, str]) -> None:
    result = chat("--policy", "none", "-c", 256, input="\n".join(SMALL_TALK * 5))
    assert result.returncode == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "--policy streaming" in error
    assert "larger -c" in error
    (kept,) = saved_chats(environment)
    assert len(kept["turns"]) > 5
    on = chat("--continue", "--policy", "streaming", "--budget", 128, "-p", "Hello!")
    assert on.returncode == 0, on.stderr
    assert on.stdout.strip()


def test_thinking_is_not_part_of_the_answer(chat: Any, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{%- for m in messages -%}{{- '<|' + m['role'] + '|>' + m['content'] + '<|end|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|><think>' -}}{%- endif -%}"
    )
    result = chat("--chat-template-file", template, "-n", 8, "--json", "-p", "Hello!")
    assert result.returncode == 0, result.stderr
    turn = json.loads(result.stdout)
    assert turn["content"] == ""
    assert turn["reasoning_content"]
    assert chat("--chat-template-file", template, "-n", 8, "-p", "Hello!").stdout == ""


# ---- refusals


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["--continue"], 2, "there is no chat to continue"),
        (["--sys", "a"], 2, "No such option"),
        (["--update", "gather"], 2, "No such option"),
        (["--rotate-every", "0"], 2, "--rotate-every is 0"),
        (["--evict-every", "0"], 2, "--evict-every is 0"),
        (["--page-size", "16"], 2, "streaming evicts tokens, not pages"),
        (["--policy", "none", "--scope", "galaxy", "--score-queries", "x"], 2, "--score-queries is 'x'"),
        (["-sys", "a", "-sysf", "b"], 2, "-sys and -sysf exclude each other"),
        (["--chat-template-file", "no-such-file"], 2, "cannot be read"),
        (["-sys", "I like soup. " * 100, "--budget", "64", "-p", "Hi"], 2, "budget"),
        (["--budget", "3"], 2, "budget of 3"),
        (["no-such-model", "-p", "Hi"], 1, "no-such-model"),
    ],
)
def test_what_is_refused_prints_nothing_but_one_sentence(chat: Any, args: list[str], code: int, sentence: str) -> None:
    result = chat(*args)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert len(errors) == 1, result.stderr
    assert sentence in errors[0]


def test_a_broken_template_is_one_sentence(chat: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{% for %}")
    result = chat("--chat-template-file", path, "-p", "Hi")
    assert result.returncode in (1, 2)
    assert "template" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_state_folder_that_cannot_be_written_is_a_warning(chat: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = chat("-p", "Hello!", env={"EQUIP_STATE_DIR": str(tmp_path / "file")})
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert len([line for line in result.stderr.splitlines() if line.startswith("warning: this chat is not saved")]) == 1
