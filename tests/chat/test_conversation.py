"""A conversation in a bounded cache: every token is read once, turns can be taken back, and stopping loses nothing."""

from __future__ import annotations

import threading
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from equip_cli import CachePolicy, ContextFullError, Model, Session, UnsupportedModelError, UsageError
from equip_cli.chat import context_view, thinking
from equip_cli.chat.conversation import Conversation
from equip_cli.chat.messages import join_lines
from equip_cli.chat.transcript import SavedTurn
from equip_cli.core.sampling import Sampling

# drops the thinking of every turn but the last, as templates of reasoning models do, and opens it in the prompt
THINKING_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- set content = m['content'] -%}"
    "{%- if m['role'] == 'assistant' and not loop.last and '</think>' in content -%}"
    "{%- set content = content.split('</think>')[-1] -%}"
    "{%- endif -%}"
    "{{- '<|' + m['role'] + '|>' + content | trim + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|><think>' -}}{%- endif -%}"
)
TALK = ("Hello!", "I had soup for lunch.", "The weather is cold today.", "I like painting.", "How are you?")


def say(conversation: Conversation, text: str, n: int = 40) -> str:
    return "".join(conversation.say(text, n))


def n_read_by(session: Session) -> int:
    return int(session.stats()["prompt_n"])


# ---- turns


def test_twenty_turns_read_their_own_tokens_alone(session: Session) -> None:
    conversation = Conversation(session, "You remember what the user tells you.", template=THINKING_TEMPLATE)
    model = session.model
    for i in range(20):
        before = n_read_by(session)
        say(conversation, TALK[i % len(TALK)], 24)
        turn = conversation.turns[-1]
        own = model.render_chat([{"role": "user", "content": turn.user}], template=THINKING_TEMPLATE)
        n_own = len(model.tokenize(own, add_special=False))
        # the first turn has the BOS and the system prompt too, the others the end of the turn before
        extra = len(turn.prompt_ids) - n_own
        assert (extra > 1) if i == 0 else (extra == 1), model.detokenize(turn.prompt_ids, special=True)
        assert n_read_by(session) - before == len(turn.prompt_ids)
    assert session.stats()["n_evicted"] > 50
    assert conversation.n_read == len(conversation.ids)


def test_appended_turns_are_what_the_template_renders(session: Session) -> None:
    conversation = Conversation(session, "Be kind and brief.")
    messages = [{"role": "system", "content": "Be kind and brief."}]
    for text in TALK:
        say(conversation, text)
        turn = conversation.turns[-1]
        assert turn.complete
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": turn.reply}]
    rendered = session.model.render_chat(messages, add_generation_prompt=False)
    # the end of the last turn is appended with the next one
    assert conversation.ids + session.model.tokenize("<|end|>", add_special=False) == session.model.tokenize(rendered)


def test_the_system_prompt_is_pinned(session: Session) -> None:
    conversation = Conversation(session, "You are a friendly assistant.")
    for i in range(30):
        say(conversation, TALK[i % len(TALK)])
    kept = {position for position, _ in session.kept()}
    first = conversation.turns[0].prompt_ids
    n_system = len(session.model.tokenize("<|system|>You are a friendly assistant.<|end|>"))
    assert session.stats()["n_evicted"] > 0
    assert set(range(n_system)) <= kept
    assert not set(range(n_system + 1, len(first))) <= kept


def test_without_a_pin_the_system_prompt_goes(session: Session) -> None:
    conversation = Conversation(session, "You are a friendly assistant.", pin=False)
    for i in range(30):
        say(conversation, TALK[i % len(TALK)])
    assert {position for position, _ in session.kept() if position < 20} == set(range(4))


def test_a_short_first_message_is_pinned_and_a_long_one_is_not(session: Session) -> None:
    budget = session.stats()["budget"]
    for words, is_kept in ((TALK[0], True), (" ".join(TALK * 8), False)):
        session.reset()
        conversation = Conversation(session, "Be kind.", pin_first=True)
        say(conversation, words)
        first = len(conversation.turns[0].prompt_ids)
        assert (4 * first <= budget) == is_kept
        while session.stats()["n_past"] < first + 3 * budget:
            say(conversation, TALK[len(conversation.turns) % len(TALK)])
        kept = {position for position, _ in session.kept()}
        assert (set(range(first)) <= kept) == is_kept
        # taken back, it is no longer there, and the next one is the first
        while conversation.turns:
            conversation.undo()
        say(conversation, TALK[1])
        assert conversation.n_read >= len(conversation.turns[0].prompt_ids)
        # nor does a long one keep what was pinned for a short one
        conversation.undo()
        say(conversation, " ".join(TALK * 8))
        while session.stats()["n_past"] < first + 3 * budget:
            say(conversation, TALK[len(conversation.turns) % len(TALK)])
        assert not set(range(first)) <= {position for position, _ in session.kept()}


def test_undo_without_evictions_reads_nothing_again(session: Session) -> None:
    reread: list[int] = []
    conversation = Conversation(session, on_reread=reread.append)
    say(conversation, "My cat is called Tobelin.")
    n = conversation.n_read
    say(conversation, "Hello!")
    assert conversation.undo().user == "Hello!"
    assert (conversation.n_read, reread) == (n, [])
    assert "Tobelin" in say(conversation, "What is my cat called?")


def with_evictions(session: Session, reread: list[int]) -> Conversation:
    conversation = Conversation(session, "Be kind and brief.", on_reread=reread.append)
    while session.stats()["n_evicted"] < 50:
        say(conversation, TALK[len(conversation.turns) % len(TALK)])
    return conversation


@pytest.mark.parametrize("action", ["undo", "regen"])
def test_after_evictions_what_is_recent_is_taken_back_without_reading(session: Session, action: str) -> None:
    reread: list[int] = []
    conversation = with_evictions(session, reread)
    before, n_prompt = {p for p, _ in session.kept()}, len(conversation.turns[-1].prompt_ids)
    n_read = n_read_by(session)
    if action == "undo":
        conversation.undo()
        conversation.catch_up()
        assert {p for p, _ in session.kept()} == {p for p in before if p < len(conversation.ids)}
        assert n_read_by(session) == n_read
    else:
        assert "".join(conversation.regenerate(40))
        assert n_read_by(session) - n_read == 1 < n_prompt  # for its logits
    assert reread == []
    assert conversation.n_read == len(conversation.ids)


@pytest.mark.parametrize("action", ["undo", "regen", "system"])
def test_what_cannot_be_taken_back_is_read_again_and_said_so(model: Model, action: str) -> None:
    reread: list[int] = []
    with model.session(CachePolicy("h2o", 128, recent=2), n_threads=1) as session:
        conversation = with_evictions(session, reread)
        check_reread(session, conversation, action, reread)


def check_reread(session: Session, conversation: Conversation, action: str, reread: list[int]) -> None:
    if action == "undo":
        conversation.undo()
        expected = len(conversation.ids)
        conversation.catch_up()
    elif action == "regen":
        expected = len(conversation.ids) - len(conversation.turns[-1].reply_ids)
        "".join(conversation.regenerate(40))
    else:
        conversation.set_system("You answer in short sentences.")
        expected = len(conversation.ids)
        conversation.catch_up()
        assert "short sentences" in session.model.detokenize(conversation.ids[:20])
    assert reread == [expected]
    assert conversation.n_read == len(conversation.ids)
    assert say(conversation, "Hello!")


def test_regenerating_greedily_gives_the_same_answer(model: Model) -> None:
    with model.session(CachePolicy("none"), n_threads=1) as session:
        conversation = Conversation(session)
        say(conversation, "My dog is called Rimoka.")
        first = say(conversation, "What is my dog called?")
        assert "Rimoka" in first
        assert "".join(conversation.regenerate()) == first


def test_clear_keeps_the_system_prompt(session: Session) -> None:
    conversation = Conversation(session, "Be kind and brief.")
    say(conversation, "My cat is called Tobelin.")
    conversation.clear()
    assert "Tobelin" not in say(conversation, "What is my cat called?")
    assert "Be kind and brief." in session.model.detokenize(conversation.turns[0].prompt_ids)


def test_a_restored_conversation_goes_on(model: Model, session: Session) -> None:
    conversation = Conversation(session)
    conversation.restore([SavedTurn("My cat is called Tobelin.", "Noted."), SavedTurn("Hello!", "Hello! How are you?")])
    conversation.catch_up()
    assert conversation.n_read == len(conversation.ids)
    assert "Tobelin" in say(conversation, "What is my cat called?")


# ---- stopping


def test_a_stopped_answer_stays_and_the_next_turn_ends_it(session: Session) -> None:
    session.set_sampler(Sampling(seed=1, temp=0.0, ignore_eos=True))
    conversation = Conversation(session)
    pieces = conversation.say("Hello!", -1)
    head = [next(pieces) for _ in range(3)]
    pieces.close()
    turn = conversation.turns[-1]
    assert not turn.complete
    assert turn.reply.startswith("".join(head))
    assert conversation.n_read == len(conversation.ids)
    session.set_sampler(Sampling(temp=0.0))
    say(conversation, "I like painting.")
    text = session.model.detokenize(conversation.turns[-1].prompt_ids, special=True)
    assert text == "<|end|><|user|> I like painting.<|end|><|assistant|>"


def test_ctrl_c_while_a_prompt_is_read_loses_nothing(model: Model) -> None:
    long = "I had soup for lunch. " * 2000
    for delay in (0.05, 0.2, 0.8, 3.2):  # a busy machine begins to read later
        with model.session(CachePolicy("streaming", 256), n_threads=1, n_ubatch=32) as session:
            conversation = Conversation(session)
            pieces = conversation.say(long, 8)
            threading.Timer(delay, session.cancel).start()
            with pytest.raises(Exception, match="cancelled"):
                list(pieces)
            if conversation.n_read == 0 and delay < 3.2:
                continue
            assert 0 < conversation.n_read < len(conversation.ids)
            # what was not read is read with the next message, and nothing is lost
            say(conversation, "Hello!", 8)
            assert conversation.n_read == len(conversation.ids)
            break


def test_a_late_cancel_does_not_stop_the_next_turn(session: Session) -> None:
    conversation = Conversation(session)
    session.set_sampler(Sampling(temp=0.0, ignore_eos=True))
    for _ in range(20):
        pieces = conversation.say("Hello!", 3)
        next(pieces)
        pieces.close()  # often after the last token was made, so that no call is there to be stopped
        assert say(conversation, "How are you?", 3)


def test_a_full_cache_leaves_the_conversation_whole(model: Model) -> None:
    with model.session(CachePolicy("none"), n_ctx=256, n_threads=1) as session:
        conversation = Conversation(session)
        say(conversation, "My cat is called Tobelin.")
        n = len(conversation.ids)
        with pytest.raises(ContextFullError):
            say(conversation, "I had soup for lunch. " * 100)
        assert (len(conversation.turns), len(conversation.ids), conversation.n_read) == (1, n, n)
        assert "Tobelin" in say(conversation, "What is my cat called?")


def test_what_cannot_be_done_in_a_new_conversation_is_refused(session: Session) -> None:
    conversation = Conversation(session)
    for action in (conversation.undo, lambda: list(conversation.regenerate()), lambda: list(conversation.say(" \n"))):
        with pytest.raises(UsageError):
            action()
    with pytest.raises(UnsupportedModelError, match="leaves earlier answers out"):
        Conversation(
            session, template="{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
        )


# ---- what can still be read


def test_context_shows_what_the_cache_holds(session: Session) -> None:
    conversation = Conversation(session)
    while session.stats()["n_evicted"] < 80:
        say(conversation, TALK[len(conversation.turns) % len(TALK)])
    kept = {position for position, _ in session.kept()}
    shown = list(context_view.passages(conversation))
    assert [p.label for p in shown] == ["you", "model"] * len(conversation.turns)
    position, turns = 0, iter(shown)
    for turn in conversation.turns:
        you, answer = next(turns), next(turns)
        assert session.model.detokenize(you.tokens).strip() == turn.user
        begin = position + len(turn.prompt_ids) - 2 - len(you.tokens)  # then end of turn, beginning of the answer
        assert you.readable == [p in kept for p in range(begin, begin + len(you.tokens))]
        position += len(turn.prompt_ids)
        assert answer.tokens == list(turn.reply_ids)
        assert answer.readable == [p in kept for p in range(position, position + len(turn.reply_ids))]
        position += len(turn.reply_ids)
    assert not any(shown[1].readable)
    assert all(shown[-1].readable)


def test_evicted_runs_are_counted_without_colour_and_dimmed_with_it(session: Session) -> None:
    model = session.model
    tokens = model.tokenize("I had soup for lunch.", add_special=False)
    readable: list[float] = [True, False, False, *[True] * (len(tokens) - 3)]
    passage = context_view.Passage("you", tokens, readable)
    plain = context_view.render(model, passage, colour=False)
    assert plain.plain == "you: I [... 2 tokens no longer readable ...] for lunch."
    coloured = context_view.render(model, passage, colour=True)
    assert coloured.plain == "you: I had soup for lunch."
    console = Console(force_terminal=True, color_system="standard", width=80)
    with console.capture() as capture:
        console.print(coloured)
    assert "\x1b[2;9m had soup\x1b[0m" in capture.get()


# ---- thinking


@given(st.data())
def test_the_splitter_does_not_depend_on_how_the_text_arrives(data: st.DataObject) -> None:
    begin, end = data.draw(st.sampled_from(thinking.MARKS))
    words = st.text(alphabet="ab <>[]/|think", max_size=12).filter(
        lambda t: all(m not in t for p in thinking.MARKS for m in p)
    )
    thought, answer = data.draw(words), data.draw(words)
    opened = data.draw(st.booleans())
    text = ("" if opened else begin) + thought + end + answer
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    splitter = thinking.Splitter("..." + begin + "\n" if opened else "user: hi")
    parts = [part for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) for part in splitter.feed(text[a:b])]
    parts += splitter.feed("", final=True)
    expected = text.removeprefix(begin).partition(end)
    # a mark may also arise where two drawn texts meet; then the split is another one, and this draw says nothing
    if text.count(end) == 1 and (opened or text.count(begin) == 1) and end not in thought + end[:-1]:
        assert "".join(t for is_thinking, t in parts if is_thinking) == expected[0]
        assert "".join(t for is_thinking, t in parts if not is_thinking) == expected[2]


def test_half_a_mark_at_the_end_is_text() -> None:
    splitter = thinking.Splitter()
    assert splitter.feed(" <thi") == []
    assert splitter.feed("", final=True) == [(False, " <thi")]
    splitter = thinking.Splitter("<think>")
    assert splitter.feed("a </thi") == [(True, "a ")]
    assert splitter.feed("", final=True) == [(True, "</thi")]


@pytest.mark.parametrize(
    ("reply", "thought", "answer"),
    [
        ("Write <think> and </think> around it.", "", "Write <think> and </think> around it."),
        ("\n<think>hm</think>\nWrite <think>.", "hm", "Write <think>."),
        ("<think>a</think><think> is a tag", "a", "<think> is a tag"),
        ("[THINK]hm[/THINK]Yes.", "hm", "Yes."),
        ("<|channel>thought\nhm<channel|>Yes: <|channel>thought", "hm", "Yes: <|channel>thought"),
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.", "hm", "Yes."),
        ("<|channel|>final<|message|>Yes.", "", "Yes."),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Yes.",
            "ab",
            "Yes.",
        ),
        ("<|START_THINKING|>hm<|END_THINKING|><|START_TEXT|>Yes.", "hm", "Yes."),
    ],
)
def test_marks_of_thinking_count_at_the_beginning_of_an_answer_only(reply: str, thought: str, answer: str) -> None:
    assert thinking.split(reply) == (thought, answer)
    # and however it arrives
    splitter = thinking.Splitter()
    parts = [part for char in reply for part in splitter.feed(char)] + splitter.feed("", final=True)
    assert "".join(t for is_thinking, t in parts if is_thinking).strip() == thought
    assert "".join(t for is_thinking, t in parts if not is_thinking).strip() == answer


def test_thinking_is_told_from_the_answer(session: Session) -> None:
    assert thinking.split("<think>\nwell\n</think>\n\nYes.") == ("well", "Yes.")
    assert thinking.split("well</think>Yes.", "<|assistant|><think>\n") == ("well", "Yes.")
    assert thinking.split("Yes.") == ("", "Yes.")


# ---- input


def lines(text: str) -> list[str]:
    given_lines = iter(text.split("\n"))

    def read(_in_block: bool) -> str:
        try:
            return next(given_lines)
        except StopIteration:
            raise EOFError from None

    messages = []
    while True:
        try:
            messages.append(join_lines(read).text)
        except EOFError:
            return messages


def test_marks_hold_a_message_of_several_lines_together() -> None:
    assert lines('one\n"""two\nthree\n"""\nfour') == ["one", "two\nthree", "four"]
    assert lines('"""\na\n\nb"""\nc') == ["a\n\nb", "c"]
    # what stands behind the closing marks is not lost
    assert lines('"""\na\nb""" and more\nc') == ["a\nb and more", "c"]
    assert lines('"""a""" and more\nc') == ["a and more", "c"]
    assert lines('"""a\nb') == ["a\nb"]
    # marks of a text that is quoted
    code = 'def f():\n    """Short."""\n\ndef g():\n    """\n    Long.\n    """\n    return 1\n'
    assert lines(f'"""\n{code}"""\nc') == [code.rstrip("\n"), "c"]


@pytest.mark.parametrize(
    ("pasted", "message"),
    [
        ("/etc/hosts\nis what?", "/etc/hosts\nis what?"),
        ("/clear\n/exit", "/clear\n/exit"),
        ('"""Doc."""\nimport os\n', '"""Doc."""\nimport os\n'),
        ('"""\na\n\n  b\n"""', "a\n\n  b"),
        ("\n\n a\n", "\n\n a\n"),
        ('a\nb"""', 'a\nb"""'),
    ],
)
def test_a_paste_is_one_message_and_all_of_it(pasted: str, message: str) -> None:
    read = join_lines(lambda in_block: pasted)
    assert read.text == message
    assert read.is_text  # no command, whatever it begins with
    assert lines('"""one line"""') == ["one line"]
    assert lines('"""never\nclosed') == ["never\nclosed"]


# ---- the transcript


def test_a_transcript_is_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from equip_cli import EquipError
    from equip_cli.chat import transcript

    path = tmp_path / "chat.json"
    saved = transcript.Transcript(
        "m.gguf", "system", [SavedTurn("hi", "hello", array("i", [1]), array("i"), False), SavedTurn("ü", "\u2028")]
    )
    saved.save(path)
    assert transcript.Transcript.load(path) == saved

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(EquipError, match="No space left"):
        transcript.Transcript("m.gguf", None, []).save(path)
    assert transcript.Transcript.load(path) == saved
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2}', '{"format": 1, "model": null, "system": null, "turns": [1]}']
)
def test_a_damaged_transcript_is_one_sentence(tmp_path: Path, text: str) -> None:
    from equip_cli import EquipError
    from equip_cli.chat import transcript

    path = tmp_path / "chat.json"
    path.write_text(text)
    with pytest.raises(EquipError, match="cannot be read .*: start a new one"):
        transcript.Transcript.load(path)


def test_an_export_holds_the_conversation(session: Session, tmp_path: Path) -> None:
    import json

    from equip_cli.chat import transcript

    conversation = Conversation(session, "Be kind and brief.")
    conversation.restore([SavedTurn("Hi?", "<think>hm</think>Yes.")])
    transcript.export(conversation, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == [
        {"role": "system", "content": "Be kind and brief."},
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"},
    ]
    transcript.export(conversation, tmp_path / "a.md")
    expected = "## system\n\nBe kind and brief.\n\n## user\n\nHi?\n\n## assistant\n\n> hm\n\nYes.\n"
    assert (tmp_path / "a.md").read_text() == expected
    with pytest.raises(UsageError, match=r"\.md nor in \.json"):
        transcript.export(conversation, tmp_path / "a.txt")
