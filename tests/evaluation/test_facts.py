"""Facts that are told in a text or a chat and asked back: what the tasks are, what counts as an answer, and the records."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from command import Equip, runner
from places import REPOSITORY

from equip_cli import CachePolicy, Model, UnsupportedModelError, UsageError, cli
from equip_cli.evaluation import facts, told
from equip_cli.plots import quality

SCHEMA = json.loads((REPOSITORY / "docs" / "schemas" / "eval.json").read_text())


def nothing(_: float) -> None:
    pass


@pytest.fixture
def equip(equip_bin: Path, tmp_path: Path) -> Equip:
    kept = {k: v for k, v in os.environ.items() if k not in ("LLAMA_KV_POLICY", "NO_COLOR", "FORCE_COLOR")}
    return runner(equip_bin, kept | {"EQUIP_CACHE_DIR": str(tmp_path)})


def test_no_value_stands_in_the_talk() -> None:
    """Else it could be found there."""
    talk = " ".join(" ".join(turn) for turn in told.TALK)
    words = set(talk.replace(",", " ").replace(".", " ").replace("?", " ").split())
    assert not words & {value for each in told.IN_A_CHAT for value in each.values}
    for each in (*told.IN_A_TEXT, *told.IN_A_CHAT):
        assert len(set(each.values)) == len(each.values) >= 7
        assert each.fact.count("{0}") == 1 and "{0}" not in each.question + each.answer


def test_a_text_tells_eight_facts_far_apart(model: Model) -> None:
    task = facts.text_task(model, 800, 3)
    text = model.detokenize(task.tokens)
    assert 800 <= len(task.tokens) < 1000
    assert len(task.questions) == 8
    places = []
    for question in task.questions:
        asked = model.detokenize(question.tokens)
        begun = asked.partition("Answer: ")[2]
        places.append(text.index(begun))
        # what the text says is what is right
        right = model.detokenize([question.choices[question.right]])
        assert text[places[-1] + len(begun) :].startswith(right.rstrip()) or right.strip() == ""
    assert places == sorted(places)
    gaps = np.diff(places)
    assert gaps.min() > len(text) / 20


def test_a_chat_begins_with_its_facts(model: Model) -> None:
    task = facts.chat_task(model, 5, 1)
    text = model.detokenize(task.tokens)
    assert text.count("User: ") == text.count("Assistant: ") == 6
    assert text.lstrip().startswith("User: Hello!")
    head = model.detokenize(task.tokens[: task.n_told])
    assert head.rstrip().endswith("Assistant:") and head.count("User: ") == 1
    asked = [model.detokenize(question.tokens) for question in task.questions]
    assert [each.question in said for each, said in zip(told.IN_A_CHAT, asked, strict=True)] == [True] * 6
    assert facts.chat_task(model, 0, 1).tokens == task.tokens[: len(facts.chat_task(model, 0, 1).tokens)]


def test_the_same_seed_tells_the_same(model: Model) -> None:
    first, again = (facts.text_tasks(model, [500, 600], 2, 7) for _ in range(2))
    assert first == again
    assert [task.length for task in first] == [500, 500, 600, 600]
    other = facts.text_tasks(model, [500], 2, 9)
    assert other[0].tokens not in [task.tokens for task in first]
    assert facts.chat_tasks(model, 3, 2, 1)[1] == facts.chat_task(model, 3, 2)


def test_choices_are_tokens_that_tell_the_values_apart(model: Model) -> None:
    each = told.Told("It is {0}.", "What is it?", "It is", ("red", "red wine", "blue", "green", "white"))
    question = facts._question(model, each, "red", "Question: ", " Answer: ")
    assert question is not None and len(set(question.choices)) == len(question.choices)
    assert model.detokenize(question.tokens).endswith("It is") or model.detokenize(question.tokens).endswith("It is ")
    alike = told.Told("It is {0}.", "What is it?", "It is", ("aaa", "aab", "aac", "aad"))
    if facts._question(model, alike, "aaa", "", " ") is None:
        with pytest.raises(UnsupportedModelError, match="do not tell the values"):
            facts._checked([None])


def test_a_length_without_room_is_refused_with_one_that_has(model: Model) -> None:
    with pytest.raises(UsageError, match="--facts-length is 50, too short for 8 facts: give at least"):
        facts.text_task(model, 50, 0)
    assert facts.default_lengths(model, 300) == [600, 960]
    assert facts.default_lengths(model, 16) == [256]


class Reader:
    """A session that finds what stands within the last `window` tokens that it has read."""

    def __init__(self, model: Model, window: int, is_saved: bool = True) -> None:
        self.model, self._window, self._is_saved = model, window, is_saved
        self._read: list[int] = []
        self.n_resets, self.pinned = 0, 0

    def reset(self) -> None:
        self._read, self.n_resets = [], self.n_resets + 1

    def pin(self, n: int) -> None:
        assert not self._read
        self.pinned = n

    def eval(self, tokens: list[int]) -> int:
        self._read += tokens
        return len(tokens)

    def save_bytes(self) -> bytes:
        if not self._is_saved:
            raise UnsupportedModelError("cannot be saved")
        return json.dumps(self._read).encode()

    def load_bytes(self, data: bytes) -> None:
        self._read = json.loads(data)

    def logits(self) -> Any:
        """The token that followed the last words before is the likeliest."""
        row = np.zeros(self.model.n_vocab, np.float32)
        seen = [*self._read[: self.pinned], *self._read[-self._window :]]
        end = seen[-3:]
        for i in range(len(seen) - 4, 1, -1):
            if seen[i - 2 : i + 1] == end:
                row[seen[i + 1]] = 1
                break
        else:
            row[:] = np.arange(len(row), 0, -1)
            # never by chance
            for task in self.tasks:
                for question in task.questions:
                    row[question.choices[question.right]] = -1
        return row

    tasks: list[facts.Task] = []


@pytest.mark.parametrize("is_saved", [True, False])
def test_right_answers_are_counted(model: Model, is_saved: bool) -> None:
    """Also under a policy whose sessions cannot be saved: the text is read again for each question."""
    tasks = facts.chat_tasks(model, 3, 2)
    Reader.tasks = tasks
    done: list[float] = []
    reader = Reader(model, 10_000, is_saved)
    assert facts.hits(reader, tasks, done.append) == {3: (12, 12)}  # type: ignore[arg-type]
    assert sum(done) == facts.n_tokens(tasks)
    assert reader.n_resets == (2 if is_saved else 12)
    short = Reader(model, 60, is_saved)
    assert facts.hits(short, tasks, nothing) == {3: (0, 12)}  # type: ignore[arg-type]
    # the turn that tells them is kept, if that is asked for; some answers begin in its words
    [(n_right, n)] = facts.hits(short, tasks, nothing, before=facts.pin_told).values()  # type: ignore[arg-type]
    assert n == 12 and n_right > 0 and short.pinned == tasks[-1].n_told


def test_questions_do_not_change_each_others_answers(model: Model) -> None:
    task = facts.text_task(model, 400, 2)
    alone = [facts.Task(task.tokens, [question], 400) for question in task.questions]
    with model.session(CachePolicy("h2o", 96), n_threads=1) as session:
        together = facts.hits(session, [task], nothing)
        assert together == facts.hits(session, alone, nothing)
        assert facts.hits(session, [task], nothing, before=facts.pin_told) == together  # it tells nothing first


def test_a_record_has_every_length_and_the_chat(equip: Equip) -> None:
    args = ("eval", "--policy", "streaming", "--budget", 96, "-n", 0, "--dialogues", 0, "-t", 1, "--no-baselines")
    asked = ("--facts-length", "260,400", "--facts-trials", 2, "--chat-turns", 2, "--chat-trials", 1)
    result = equip(*args, *asked, "--json", "--policy", "none,streaming", "-c", 256)
    records = json.loads(result.stdout)
    jsonschema.validate(records, SCHEMA, jsonschema.Draft202012Validator)
    for each in records:  # the full cache has room for all of it, whatever -c says
        assert each["facts_n"] == {"260": 16, "400": 16} and each["chat_n"] == {"2": 6}
        for key in ("facts", "chat"):
            for length, share in each[key].items():
                low, high = each[f"{key}_ci95"][length]
                assert 0 <= low <= share <= high <= 1
    table = equip(*args, *asked).stdout
    assert "in 400 tokens of prose (16)" in table and "after 2 turns (6)" in table
    alone = json.loads(equip(*args, "--chat", "--chat-trials", 1, "--json").stdout)
    assert alone[0]["facts"] == {} and alone[0]["chat_n"] == {"20": 6}


def test_other_facts_are_other_rows_of_a_file(equip: Equip, tmp_path: Path) -> None:
    args = (
        "eval",
        "--policy",
        "streaming",
        "--budget",
        96,
        "-n",
        0,
        "--dialogues",
        0,
        "-t",
        1,
        "--no-baselines",
        "--json",
    )
    file = tmp_path / "rows.jsonl"
    first = equip(*args, "--chat-turns", 1, "--chat-trials", 1, "--save", file)
    again = equip(*args, "--chat-turns", 1, "--chat-trials", 1, "--save", file)
    assert "1 of 1 rows are in" in again.stderr and again.stdout == first.stdout
    assert "rows are in" not in equip(*args, "--chat-turns", 1, "--chat-trials", 2, "--save", file).stderr


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--facts-length", "20"), "--facts-length is 20, too short"),
        (("--facts-length", "long"), "--facts-length is 'long'"),
        (("--chat-turns", "-1"), "--chat-turns is -1: give a whole number from 0"),
    ],
)
def test_what_is_refused_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], sentence: str
) -> None:
    monkeypatch.delenv("LLAMA_KV_POLICY", raising=False)
    assert cli.main(["eval", "--policy", "streaming", "--budget", "64", "-n", "100", "--dialogues", "0", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and sentence in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.real
def test_real_models_answer_with_the_full_cache(load_real: Any) -> None:
    """Else the task says nothing about what a policy keeps."""
    model = load_real("smollm2")
    with model.session("none", n_ctx=2048) as session:
        [(n_right, n)] = facts.hits(session, facts.text_tasks(model, [1024], 2), nothing).values()
        assert n == 16 and n_right >= 0.9 * n
        [(n_right, n)] = facts.hits(session, facts.chat_tasks(model, 20, 2), nothing).values()
        assert n == 12 and n_right >= 0.9 * n


def test_facts_and_chat_are_drawn_against_the_budget() -> None:
    rows = [
        {
            "model": "m.gguf", "policy": name, "budget": budget, "kept_bytes": 100 * budget, "sinks": 4, "scope": "token",
            "positions": "auto", "update": "inplace", "facts": {"512": 0.5, "1024": 0.25},
            "facts_ci95": {"512": [0.4, 0.6], "1024": [0.1, 0.4]}, "chat": {"20": share}, "chat_ci95": {"20": [0.0, 0.9]},
        }
        for name, budget, share in (("streaming", 256, 0.125), ("streaming", 512, 0.25), ("h2o", 256, 0.75))
    ]  # fmt: skip
    facts_row, chat_row = quality.grid(rows).rows
    assert [facts_row[0].title, chat_row[0].title] == [
        "Facts of a text answered",
        "Facts of a chat's beginning answered",
    ]
    assert [line.y for line in facts_row[0].lines] == [[0.375, 0.375], [0.375]]
    streaming, h2o = chat_row[0].lines
    assert (streaming.x, streaming.y, streaming.low, streaming.high) == (
        [256, 512],
        [0.125, 0.25],
        [0.0, 0.0],
        [0.9, 0.9],
    )
    assert h2o.y == [0.75]
    assert chat_row[0].y_range == (0.0, 1.0)
