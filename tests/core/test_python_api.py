"""The Python package: sessions, text, errors, and the small parts that the command line is made of."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from models import Spec

import equip_cli
from equip_cli import (
    BackendError,
    BudgetError,
    CachePolicy,
    CancelledError,
    ContextFullError,
    EquipError,
    Model,
    ModelFileError,
    RewindError,
    Sampling,
    Session,
    StateError,
    UnsupportedModelError,
    UsageError,
    benchmark,
)
from equip_cli.commands.setup.policies import cache_policies, cache_policy
from equip_cli.commands.setup.values import parse_flash_attention, parse_gpu_layers
from equip_cli.core import native, policy
from equip_cli.models import embedded, gguf_file, random_gguf, shapes

GREEDY = Sampling(temp=0, ignore_eos=True)
PROMPT = "The quick brown fox jumps over the lazy dog, and then it jumps back again."


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Iterator[Model]:
    with Model(tiny_model) as loaded:
        yield loaded


def session_of(model: Model, *policy: Any, **options: Any) -> Session:
    """One thread: on a busy machine, two wait for each other far longer than a tiny model computes."""
    return model.session(*policy, **({"n_threads": 1} | options))


# ---- package


def test_every_error_has_one_base_class() -> None:
    errors = [getattr(equip_cli, name) for name in equip_cli.__all__ if name.endswith("Error")]
    assert len(errors) >= 6
    assert all(issubclass(error, EquipError) for error in errors)
    with pytest.raises(AttributeError):
        _ = equip_cli.nothing


# ---- model


def test_a_text_survives_the_tokenizer(model: Model) -> None:
    text = "Grüße, 世界 😀"
    tokens = model.tokenize(text, add_special=False)
    assert model.detokenize(tokens).strip() == text
    assert model.tokenize("") == model.tokenize("", parse_special=False)
    with pytest.raises(UsageError):
        model.piece(model.n_vocab)


def test_no_second_begin_of_sequence(model: Model) -> None:
    bos = model.info["bos"]
    if not model.info["add_bos"]:
        pytest.skip("the tokenizer adds none")
    text = model.piece(bos, special=True).decode() + "Hello"
    assert model.tokenize(text).count(bos) == 1


def test_a_chat_template_of_the_caller_is_used(model: Model) -> None:
    template = (
        "{%- for t in tools %}[{{ t.function.name }}]{% endfor %}"
        "{%- for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{%- if add_generation_prompt %}<go>{% endif %}"
    )
    tools = [{"type": "function", "function": {"name": n, "description": "", "parameters": {}}} for n in ("add", "sub")]
    messages = [{"role": "user", "content": 'a "b"\n'}, {"role": "assistant", "content": "ü"}]
    rendered = model.render_chat(messages, tools, template)
    assert rendered.startswith('[add][sub]<user>a "b"')
    assert rendered.endswith("<assistant>ü<go>")
    assert not model.render_chat(messages, tools, template, add_generation_prompt=False).endswith("<go>")


def test_a_template_that_refuses_is_an_error(model: Model) -> None:
    with pytest.raises(UnsupportedModelError):
        model.render_chat([{"role": "user", "content": "a"}], template="{{ raise_exception('never') }}")


def test_what_is_no_model_file_is_a_model_file_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(ModelFileError):
            Model(path)


def test_a_progress_callback_may_cancel_the_load(tiny_model: Path) -> None:
    def stop(_fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Model(tiny_model, progress=stop)
    Model(tiny_model).close()


def test_closed_handles_are_refused(tiny_model: Path) -> None:
    model = Model(tiny_model)
    session = session_of(model, "streaming:budget=64")
    model.close()
    model.close()
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.eval([1])
    with pytest.raises(UsageError, match="closed"):
        model.tokenize("a")


# ---- session


def test_streaming_keeps_sinks_and_the_newest(model: Model) -> None:
    with session_of(model, CachePolicy("streaming", budget=64, sinks=4)) as session:
        session.eval(model.tokenize(PROMPT))
        session.set_sampler(GREEDY)
        tokens = session.generate_tokens(200)
        stats = session.stats()
        n_past = stats["n_past"]
        assert len(tokens) == 200
        assert n_past == len(model.tokenize(PROMPT)) + 200
        assert (stats["n_used"], stats["n_evicted"]) == (64, n_past - 64)
        kept = session.kept()
        assert [position for position, _ in kept] == [0, 1, 2, 3, *range(n_past - 60, n_past)]
        assert sorted(slot for _, slot in kept) == list(range(64))


def test_pinned_tokens_stay(model: Model) -> None:
    with session_of(model, "streaming:budget=64") as session:
        session.pin(20)
        session.eval(model.tokenize(PROMPT * 4))
        assert [position for position, _ in session.kept()][:20] == list(range(20))
        with pytest.raises(UsageError):
            session.pin(4)  # too late
    with session_of(model, "streaming:budget=64") as session, pytest.raises(BudgetError):
        session.pin(64)


def test_tokens_per_call_do_not_matter(model: Model) -> None:
    texts = []
    for per_call in (1, 7, 0):
        with session_of(model, "streaming:budget=64") as session:
            texts.append("".join(session.generate(PROMPT, 90, GREEDY, per_call=per_call)))
    assert texts[0] == texts[1] == texts[2] != ""


def test_chunked_eval_is_one_eval(model: Model) -> None:
    tokens = model.tokenize(PROMPT * 12)
    with session_of(model, "streaming:budget=64") as one, session_of(model, "streaming:budget=64") as many:
        assert one.eval(tokens) == len(tokens)
        chunk = one.stats()["n_ubatch"]
        assert len(tokens) > 2 * chunk
        for i in range(0, len(tokens), chunk):
            many.eval(tokens[i : i + chunk])
        assert one.kept() == many.kept()
        assert (one.logits() == many.logits()).all()
        assert one.logits().shape == (model.n_vocab,)


def test_characters_are_never_halved(model: Model) -> None:
    text = "é😀世"
    for seed in range(5):  # random weights choose other tokens each time, single bytes among them
        with session_of(model, "streaming:budget=64") as session:
            pieces = list(session.generate(PROMPT, 60, Sampling(seed=seed, grammar=f'root ::= "{text}"')))
            assert "".join(pieces) == text
            assert session.stopped


def test_half_a_character_at_the_end_is_replaced(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with session_of(model, "streaming:budget=64") as session:
        monkeypatch.setattr(Session, "iter_tokens", lambda *_, **__: iter([0, 1, 2]))
        monkeypatch.setattr(Model, "piece", lambda _, token: [b"a\xf0", b"\x9f\x98", b"\x80\xc3"][token])
        monkeypatch.setattr(Model, "is_eog", lambda *_: False)
        assert list(session.generate(None, 3)) == ["a", "😀", "�"]


def test_a_full_context_gives_what_it_had(model: Model) -> None:
    with session_of(model, "none", n_ctx=256) as session:
        session.set_sampler(GREEDY)
        session.eval(model.tokenize(PROMPT))
        tokens = []
        with pytest.raises(ContextFullError):
            for token in session.iter_tokens():
                tokens.append(token)
        assert len(tokens) >= 256 - len(model.tokenize(PROMPT))
        assert session.stats()["n_used"] == 256


def test_a_rewind_drops_the_newest_tokens(model: Model) -> None:
    tokens = model.tokenize(PROMPT * 6)
    assert len(tokens) > 70
    with session_of(model, "streaming:budget=64") as session:
        session.eval(tokens[:40])
        before = session.logits()
        session.eval(tokens[40:45])
        assert session.rewind(40) == "exact"
        with pytest.raises(UsageError):
            session.logits()
        assert session.rewind(39) == "exact"
        session.eval(tokens[39:40])
        assert abs(session.logits() - before).max() < 1e-2 * max(1.0, abs(before).max())
        session.eval(tokens[40:])
        # what the last chunk evicts waits for what follows it, or for a look at the kept set
        assert session.rewind(len(tokens) - 1) == "exact"
        assert len(session.kept()) == 64
        assert session.rewind(len(tokens) - 2) == "shortened"
        kept = session.kept()
        with pytest.raises(RewindError):
            session.rewind(10)
        assert session.kept() == kept
        session.reset()
        assert session.kept() == []


def test_nll_is_that_of_the_logits(model: Model) -> None:
    tokens = model.tokenize(PROMPT * 6)
    done: list[int] = []
    with session_of(model, "streaming:budget=64") as one, session_of(model, "streaming:budget=64") as other:
        one.eval(tokens[:5])
        other.eval(tokens[:5])
        values = one.nll(tokens[5:], done.append)
        for token, value in zip(tokens[5:], values, strict=True):
            logits = other.logits().astype(float)
            expected = logits.max() + math.log(numpy.exp(logits - logits.max()).sum()) - logits[token]
            assert value == pytest.approx(expected, abs=1e-6)
            other.eval([token])
        assert sum(done) == len(values) == len(tokens) - 5
        assert one.kept() == other.kept()
        assert one.stats()["n_past"] == len(tokens)
        assert (one.logits() == other.logits()).all()
        assert one.nll([]) == []


def test_nll_refuses_what_it_cannot_measure(model: Model) -> None:
    with session_of(model, "streaming:budget=64") as session:
        with pytest.raises(UsageError):
            session.nll([1])  # nothing has been read
        session.eval([1, 2, 3])
        for tokens in ([-1], [model.n_vocab], [2**40]):
            with pytest.raises(UsageError, match="out of range"):
                session.nll(tokens)
        session.rewind(2)
        with pytest.raises(UsageError):
            session.nll([1])
    with session_of(model, "none", n_ctx=256) as session:
        session.eval([1])
        with pytest.raises(ContextFullError):
            session.nll([1] * 300)
        assert session.stats()["n_past"] == 256


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_ends_nll_between_two_tokens(model: Model) -> None:
    tokens = model.tokenize(PROMPT * 3000)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with session_of(model, "streaming:budget=64") as session:
            session.eval(tokens[:1])
            timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
            begin = time.monotonic()
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                session.nll(tokens)
            timer.join()
            assert time.monotonic() - begin < 5
            assert 0 < session.stats()["n_past"] < len(tokens)
            assert len(session.nll(tokens[:3])) == 3
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_policy_of_a_session_cannot_change(model: Model) -> None:
    with session_of(model, "streaming:budget=64") as session:
        for value in (CachePolicy("streaming", 64, positions="true"), "none", None):
            with pytest.raises(UsageError, match="keys rotated under one rule cannot be mixed .* make a new session"):
                session.policy = value
        assert session.policy == CachePolicy("streaming", budget=64)
        with pytest.raises(dataclasses.FrozenInstanceError):
            session.policy.positions = "true"  # type: ignore[misc]


def test_saved_session_goes_on(model: Model, tmp_path: Path) -> None:
    policy = "h2o:budget=64,recent=16"
    with (
        session_of(model, policy) as one,
        session_of(model, policy) as two,
        session_of(model, "streaming:budget=64") as other,
    ):
        one.eval(model.tokenize(PROMPT * 6))
        assert one.stats()["n_evicted"] > 0
        two.load_bytes(data := one.save_bytes())
        one.save(path := tmp_path / "saved")
        assert path.read_bytes() == data == two.save_bytes()
        assert "".join(one.generate(" and", 8, GREEDY)) == "".join(two.generate(" and", 8, GREEDY))
        two.load(path)
        assert two.save_bytes() == data

        with pytest.raises(StateError, match="policy=h2o"):
            other.load_bytes(data)
        with pytest.raises(BackendError, match="reset it"):
            other.eval(model.tokenize("Hello"))
        other.reset()
        other.eval(model.tokenize("Hello"))
        with pytest.raises(StateError, match="No such file"):
            other.load(tmp_path / "nowhere")
        assert other.stats()["n_used"] > 0


def test_another_thread_can_cancel(model: Model) -> None:
    tokens = model.tokenize(PROMPT * 2000)
    with session_of(model, "streaming:budget=64") as session:
        timer = threading.Timer(0.2, session.cancel)
        timer.start()
        with pytest.raises(CancelledError):
            while True:
                session.eval(tokens)
        timer.join()
        assert "".join(session.generate("Hello", 8, GREEDY)) != ""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_session_is_usable_after_ctrl_c(model: Model) -> None:
    tokens = model.tokenize(PROMPT * 2000)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with session_of(model, "streaming:budget=64") as session:
            timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                while True:
                    session.eval(tokens)
            timer.join()
            n_past = session.stats()["n_past"]
            assert session.stats()["n_used"] == 64
            assert "".join(session.generate("Hello", 8, GREEDY)) != ""
            assert session.stats()["n_past"] > n_past
    finally:
        signal.signal(signal.SIGINT, before)


def test_bad_tokens_and_words_are_refused(model: Model) -> None:
    with session_of(model, "streaming:budget=64") as session:
        for tokens in ([-1], [model.n_vocab], [2**40]):
            with pytest.raises(UsageError):
                session.eval(tokens)
        with pytest.raises(UsageError):
            session.set_sampler(Sampling(grammar="no grammar"))
        assert session.eval([]) == 0
    for options in ({"type_k": "q9"}, {"flash_attn": "a=b,c"}, {"n_threads": -2}):
        with pytest.raises(UsageError):
            session_of(model, "streaming:budget=64", **options)


def test_environment_decides_when_no_policy_is_given(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_KV_POLICY", "streaming:budget=96,sinks=2")
    with session_of(model) as session:
        assert (session.policy.name, session.policy.budget, session.policy.sinks) == ("streaming", 96, 2)
    monkeypatch.setenv("LLAMA_KV_POLICY", "streaming:budget=96,positions=true")
    with session_of(model) as session:
        assert session.policy == CachePolicy("streaming", 96, 4, None, "token", "true", "inplace")
    monkeypatch.setenv("LLAMA_KV_POLICY", "none")
    with session_of(model) as session:
        assert session.policy == CachePolicy("none")
    with session_of(model, "streaming:budget=64") as session:
        assert session.stats()["budget"] == 64
    monkeypatch.delenv("LLAMA_KV_POLICY")
    with session_of(model) as session:
        assert session.stats()["budget"] == min(model.n_ctx_train, 4096)


def test_timed_steps_leave_the_session_as_it_was(model: Model) -> None:
    with session_of(model, "none", n_ctx=256) as session:
        session.eval(model.tokenize(PROMPT))
        n_past = session.stats()["n_past"]
        total, host = session.time_decode(5, rewind=True)
        assert len(total) == len(host) == 5
        assert all(0 <= h <= t for t, h in zip(total, host, strict=True))
        assert session.stats()["n_past"] == n_past


@pytest.mark.parametrize("scope", ["token", "layer", "head"])
def test_heads_and_shares_tell_what_each_head_keeps(model: Model, scope: str) -> None:
    info, tokens = model.info, model.tokenize(PROMPT * 8)
    with session_of(model, CachePolicy("h2o", 64, 4, 16, scope)) as session:
        assert session.shares() == {} and session.head(0, 0) == []
        session.eval(tokens[:32])
        assert session.shares() == dict.fromkeys(range(32), 1.0)
        session.eval(tokens[32:64])
        for token in tokens[64:]:
            session.eval([token])
        n = len(tokens)
        heads = {(il, i): session.head(il, i) for il in range(info["n_layer"]) for i in range(info["n_head_kv"])}
        for kept in heads.values():
            positions = [position for position, _ in kept]
            assert positions == sorted(set(positions)) and len(positions) == 64
            assert {*range(4), *range(n - 16, n)} <= set(positions)
            assert all(weight >= 0 for _, weight in kept) and sum(weight for _, weight in kept) > 0
        shares = session.shares()
        assert list(shares) == sorted(shares)
        counted = [position for kept in heads.values() for position, _ in kept]
        assert shares == {p: pytest.approx(counted.count(p) / len(heads)) for p in set(counted)}
        assert sum(shares.values()) == pytest.approx(64)
        sets = {key: tuple(position for position, _ in kept) for key, kept in heads.items()}
        if scope == "token":
            assert set(shares.values()) == {1.0}
        else:
            assert min(shares.values()) < 1  # random weights look at other tokens in each layer
        if scope == "layer":
            assert all(sets[il, i] == sets[il, 0] for il, i in sets)
        assert [position for position, _ in session.kept()] == list(sets[0, 0])
        for place in ((-1, 0), (0, -1), (info["n_layer"], 0), (0, info["n_head_kv"]), (2**40, 0)):
            with pytest.raises(UsageError):
                session.head(*place)
        with pytest.raises(RewindError):
            session.rewind(5)
        assert session.rewind(n - 3) == "shortened"
        assert {len(session.head(il, i)) for il, i in heads} == {61}
        session.reset()
        assert session.shares() == {}


def test_shares_without_lanes_are_all_one(model: Model) -> None:
    with session_of(model, "none", n_ctx=256) as session:
        session.eval([1, 2, 3])
        assert session.shares() == {0: 1.0, 1: 1.0, 2: 1.0}
        with pytest.raises(UsageError):
            session.head(0, 0)
    with session_of(model, "streaming:budget=64") as session:
        session.eval(model.tokenize(PROMPT * 4))
        assert session.shares() == dict.fromkeys((position for position, _ in session.kept()), 1.0)
        assert [weight for _, weight in session.head(0, 0)] == [0.0] * 64  # nothing reads weights


@pytest.mark.skipif(not os.environ.get("EQUIP_TEST_MODEL"), reason="needs EQUIP_TEST_MODEL, a trained dialogue model")
def test_a_trained_model_answers() -> None:
    with Model(os.environ["EQUIP_TEST_MODEL"]) as model, session_of(model, "streaming:budget=256") as session:
        messages = [
            {"role": "user", "content": "my cat is called Tobeli ."},
            {"role": "assistant", "content": "noted ."},
            {"role": "user", "content": "what is my cat called ?"},
        ]
        text = "".join(session.generate(model.render_chat(messages), 12, Sampling(temp=0)))
        assert "Tobeli" in text


# ---- policy


def test_policy_numbers_are_checked() -> None:
    budgets: list[dict[str, Any]] = [{"budget": -1}, {"budget": 2**40}, {"budget": 4}, {"budget": 20, "sinks": 20}]
    for values in budgets:
        with pytest.raises(BudgetError):
            CachePolicy("streaming", **values)
    with pytest.raises(BudgetError):
        CachePolicy("h2o", budget=20, sinks=4, recent=16)
    others: list[dict[str, Any]] = [{"recent": 16}, {"sinks": -1}]
    for values in others:
        with pytest.raises(UsageError):
            CachePolicy("streaming", **values)
    assert CachePolicy("streaming", budget=0).budget == 0


def test_a_policys_text_is_read_and_written_alike() -> None:
    parsed = CachePolicy.parse("streaming:budget=1024,sinks=4,positions=true")
    assert parsed == CachePolicy("streaming", budget=1024, sinks=4, positions="true")
    assert CachePolicy.parse("none") == CachePolicy("none")
    assert CachePolicy.parse("random:recent=20,rotate_every=8").rotate_every == 8
    for text in ("streaming:budge=1", "streaming:budget", "streaming:budget=x", "streaming:rotate_every=x"):
        with pytest.raises(UsageError):
            CachePolicy.parse(text)


@pytest.mark.parametrize("value", [0, -3, 2**40, 2.5, "x"])
def test_rotate_every_counts_evictions(value: Any) -> None:
    with pytest.raises(UsageError, match=f"rotate_every is {value}: give a whole number"):
        CachePolicy("streaming", rotate_every=value)
    with pytest.raises(UsageError, match=f"rotate_every.*{value}.* whole number"):
        CachePolicy.parse(f"random:rotate_every={value}")


@pytest.mark.parametrize("value", [0, -3, 2**40, 2.5, "some"])
@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("score_queries", "all, or a whole number"),
        ("evict_every", "a whole number"),
        ("page_size", "a whole number"),
    ],
)
def test_settings_of_the_choice_are_whole_numbers(key: str, words: str, value: Any) -> None:
    most = 2**16 if key == "page_size" else 2**30
    with pytest.raises(UsageError, match=f"^{key} is {value}: give {words} from 1 to {most}$"):
        CachePolicy("h2o", **{key: value})
    policy = "pagedeviction" if key == "page_size" else "h2o"  # one that has the number
    with pytest.raises(UsageError, match=f"{key}.*{value}.* whole number"):
        CachePolicy.parse(f"{policy}:{key}={value}")


def test_settings_of_the_choice_are_read_from_text() -> None:
    parsed = CachePolicy.parse("h2o:scope=head,score_queries=all,evict_every=4")
    assert parsed == CachePolicy("h2o", scope="head", score_queries="all", evict_every=4)
    assert CachePolicy.parse("rkv:score_queries=32").score_queries == 32
    assert CachePolicy.parse("pagedeviction:budget=64,page_size=16").page_size == 16
    assert CachePolicy.parse(parsed.text) == parsed
    assert cache_policy("h2o", score_queries="all") == CachePolicy("h2o", score_queries="all")
    assert cache_policy("h2o", score_queries="32") == CachePolicy("h2o", score_queries=32)
    with pytest.raises(UsageError, match="--score-queries is 'most': give all"):
        cache_policy("h2o", score_queries="most")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("streaming:score_queries=all", "the policy streaming reads no attention weights: leave score_queries out"),
        ("knorm:score_queries=1", "the policy knorm reads no attention weights: leave score_queries out"),
        (
            "streaming:evict_every=4",
            "the policy streaming chooses a fixed number of victims at once: leave evict_every out",
        ),
        (
            "pagedeviction:evict_every=4",
            "the policy pagedeviction chooses a fixed number of victims at once: leave evict_every out",
        ),
        ("h2o:page_size=16", "the policy h2o evicts tokens, not pages: leave page_size out"),
        ("h2o:scope=galaxy", "the policy h2o has no scope 'galaxy': choose one of head, layer, token"),
        ("h2o:update=shift", "the policy h2o has no update 'shift': choose one of inplace, gather"),
    ],
)
def test_a_setting_that_a_policy_lacks_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=f"^{sentence}$"):
        CachePolicy.parse(text)


def test_settings_that_a_policy_has_are_known() -> None:
    for text in (
        "h2o:budget=99,scope=token,score_queries=all,evict_every=4", "knorm:evict_every=4", "random:scope=head,evict_every=2",
        "pagedeviction:budget=96", "pagedeviction:budget=96,page_size=32", "pagedeviction:budget=0",
    ):  # fmt: skip
        assert CachePolicy.parse(CachePolicy.parse(text).text) == CachePolicy.parse(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("pagedeviction:budget=100,page_size=16", "100 tokens is no multiple of the page size 16: give 96 or 112"),
        ("pagedeviction:budget=100", "100 tokens is no multiple of the page size 16: give 96 or 112"),
        ("pagedeviction:budget=60", "60 tokens is no multiple of the page size 16: give 48 or 64"),
        ("pagedeviction:budget=32", "too small for pages of 16: .* from budget=64 on"),
        (
            "pagedeviction:budget=10",
            "10 tokens is too small: it cannot hold 4 sinks, 16 recent tokens and the new one: use budget=21",
        ),
    ],
)
def test_a_budget_is_whole_pages(text: str, sentence: str) -> None:
    with pytest.raises(BudgetError, match=sentence):
        CachePolicy.parse(text)


@pytest.fixture
def loaded(model_file: Callable[[Spec], Path]) -> Iterator[Callable[[Spec], Model]]:
    with ExitStack() as stack:
        yield lambda spec: stack.enter_context(Model(model_file(spec)))


def test_the_default_budget_is_whole_pages(loaded: Callable[[Spec], Model]) -> None:
    model = loaded(Spec(n_ctx_train=1000))
    for given, budget in (
        (CachePolicy("pagedeviction"), 992),
        (CachePolicy("pagedeviction", page_size=300), 900),
        (CachePolicy("h2o"), 1000),
        (CachePolicy("pagedeviction", 64), 64),
        (CachePolicy("h2o", 0), 1000),
    ):
        plan = model.plan(given)
        assert plan["budget"] == budget
        assert plan["text"].startswith(f"{given.name}:budget={budget},sinks=4,")


def test_a_plan_is_what_a_session_comes_to(loaded: Callable[[Spec], Model]) -> None:
    """The complete text says the same again, and the sizes are those of the cache that is made."""
    model = loaded(Spec(n_ctx_train=1024, arch="gemma3", n_layer=6))
    options: dict[str, Any] = {"type_k": "q8_0", "n_threads": 1}
    for given in (
        "none",
        "streaming",
        "h2o:scope=layer,recent=9",
        "snapkv:window=8,budget=300",
        "random:update=gather",
    ):
        plan = model.plan(given, **options)
        assert model.plan(re.sub("[:,]adapt_threads=0", "", plan["text"]), **options) == plan
        with model.session(given, **options) as session:
            stats = session.stats()
        assert {key: stats[key] for key in ("text", "policy", "budget", "n_ctx", "n_ubatch")} == {
            key: plan[key] for key in ("text", "policy", "budget", "n_ctx", "n_ubatch")
        }
        assert stats["kv_bytes"] == pytest.approx(plan["kv_bytes"], rel=0.1)


def test_shift_takes_whole_tokens() -> None:
    with pytest.raises(UsageError, match="scope cannot be head: use scope=token, or update=inplace or update=gather"):
        CachePolicy("random", update="shift", scope="head")
    assert CachePolicy("random", update="shift", scope="token").scope == "token"


def test_a_session_names_its_choices() -> None:
    stats = {"budget": 64, "sinks": 4, "recent": 16, "positions": "auto", "update": "inplace", "rotate_every": 8}
    for name, scope, reported, expected in (
        ("h2o", "head", ("all", 1, 0), {"score_queries": "all", "evict_every": 1}),
        ("rkv", "head", (32, 128, 0), {"score_queries": 32, "evict_every": 128}),
        ("pagedeviction", "layer", ("none", 16, 16), {"page_size": 16}),
        ("knorm", "head", ("none", 1, 0), {"evict_every": 1}),
        ("random", "token", ("none", 0, 0), {}),
    ):
        choice = dict(zip(("score_queries", "evict_every", "page_size"), reported, strict=True))
        all_of_it = stats | {"policy": name, "scope": scope, "text": f"{name}:budget=64,recent=16"} | choice
        assert policy.choice(all_of_it) == expected
        made = CachePolicy.from_stats(all_of_it)
        assert made == CachePolicy(name, 64, 4, 16, scope, "auto", "inplace", 8, **expected)
    assert policy.choice({"policy": "none"}) == {}
    words = {"score_queries": "all", "evict_every": 4, "page_size": None}
    assert policy.choice_words(words) == ["score queries all", "evict every 4"]


def test_every_field_reaches_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"budget": 96, "sinks": 3, "recent": 17, "scope": "token", "positions": "auto", "update": "gather"}
    values |= {"rotate_every": 7, "score_queries": 5, "evict_every": 6}
    full = CachePolicy("h2o", **values)  # type: ignore[arg-type]
    assert full.text == "h2o:" + ",".join(f"{key}={value}" for key, value in values.items())
    assert CachePolicy("pagedeviction", page_size=8).text == "pagedeviction:page_size=8"
    assert CachePolicy("a2sf", parameters={"decay": 0.5}).text == "a2sf:decay=0.5"
    names = {field.name for field in dataclasses.fields(CachePolicy)}
    filtered = CachePolicy("h2o", filter=0.25, filter_layers=3, filter_warmup=9)
    assert (
        filtered.text == "h2o:filter=0.25,filter_layers=3,filter_warmup=9"
        and CachePolicy.parse(filtered.text) == filtered
    )
    assert names == {*values, "name", "page_size", "pool", "parameters", "filter", "filter_layers", "filter_warmup"}
    assert CachePolicy("none", rotate_every=7).text == CachePolicy("none", update="context-shift").text == "none"
    values.pop("rotate_every")
    assert cache_policy("h2o", **values, rotate_every=7) == full
    monkeypatch.setenv("LLAMA_KV_POLICY", "streaming")
    assert cache_policy(None, budget=None, rotate_every=None) is None
    assert cache_policy(None, budget=None, rotate_every=7) == CachePolicy(rotate_every=7)


def test_every_field_survives_a_session(model: Model) -> None:
    given = CachePolicy("random", 64, 3, 17, "token", "cache", "inplace", 7)
    with session_of(model, given) as session:
        assert session.policy == given
        assert CachePolicy.from_stats(session.stats()) == given
    for given in (
        CachePolicy("h2o", 64, 3, 17, "layer", "true", "gather", None, 5, 2),
        CachePolicy("tova", 64, 3, 17, "token", "cache", "inplace", 7, "all", 1),
        CachePolicy("pagedeviction", 96, 3, 17, "layer", "true", "inplace", None, None, None, 8),
    ):
        with session_of(model, given) as session:
            assert CachePolicy.from_stats(session.stats()) == given
    given = CachePolicy("random", 64, 3, 17, "token", "cache", "inplace", 7)
    unresolved = replace(given, budget=None)
    with session_of(model, unresolved) as session:
        assert session.policy == replace(given, budget=min(model.n_ctx_train, 4096))


def test_lists_of_options_make_every_combination_that_means_something() -> None:
    made = cache_policies("none,streaming,none", budgets=[64], positions="true,cache", update="shift,gather")
    assert [(each.name, each.positions, each.update) for each in made] == [
        ("none", None, None), ("streaming", "true", "gather"), ("streaming", "cache", "shift"),
        ("streaming", "cache", "gather"),
    ]  # fmt: skip
    rotated = cache_policies("streaming", positions="true,cache", update="inplace,gather", rotate_every="1,8")
    assert [(each.positions, each.update, each.rotate_every) for each in rotated] == [
        ("true", "inplace", None), ("true", "gather", None), ("cache", "inplace", 1), ("cache", "inplace", 8),
        ("cache", "gather", 1), ("cache", "gather", 8),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="use positions=cache"):
        cache_policies("streaming", positions="true,auto", update="shift")
    with pytest.raises(UsageError, match="--rotate-every"):
        cache_policies("streaming", rotate_every="1,x")


def short(made: list[CachePolicy]) -> list[str]:
    return [" ".join(str(word) for word in (each.name, each.scope, each.update) if word) for each in made]


def test_lists_of_scopes_leave_out_what_a_policy_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    made = cache_policies("none,streaming,h2o", scope="head,token")
    assert short(made) == ["none", "streaming token", "h2o head", "h2o token"]
    assert capsys.readouterr().err == "warning: left out: streaming has no scope head\n"
    made = cache_policies("streaming,h2o,random", scope="token,layer", update="inplace,shift")
    assert short(made) == [
        "streaming token inplace", "streaming token shift", "h2o token inplace", "h2o layer inplace", "random token inplace",
        "random token shift", "random layer inplace",
    ]  # fmt: skip
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[1] == "warning: left out: streaming has no scope layer, h2o has no update shift"
    assert said[0].startswith("warning: the update shift is left out with scopes other than token: ")
    assert short(cache_policies("h2o", scope="head,layer,token")) == ["h2o head", "h2o layer", "h2o token"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("names", "words", "sentence"),
    [
        ("streaming", {"scope": "head"}, "streaming has no scope 'head'"),
        ("none,streaming", {"scope": "head"}, "streaming has no scope 'head'"),
        ("streaming,h2o", {"scope": "token,galaxy"}, "no scope 'galaxy'"),
        ("h2o", {"update": "shift"}, "h2o has no update 'shift'"),
        ("random", {"update": "shift", "scope": "head"}, "scope cannot be head"),
        ("streaming", {"score_queries": "all"}, "streaming reads no attention weights"),
        ("streaming,h2o", {"page_size": "16"}, "not pages: leave page_size out"),
        ("h2o", {"score_queries": "all,most"}, "--score-queries is 'most'"),
        ("h2o", {"evict_every": "1,0"}, "--evict-every is 0"),
        ("h2o", {"evict_every": "x"}, "--evict-every is 'x'"),
        ("pagedeviction", {"page_size": "8,x"}, "--page-size is 'x'"),
    ],
)
def test_lists_with_nothing_left_are_refused(names: str, words: dict[str, str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        cache_policies(names, budgets=[64], **words)  # type: ignore[arg-type]


def test_lists_of_choices_go_to_the_policies_that_have_them() -> None:
    made = cache_policies(
        "none,streaming,h2o,pagedeviction", budgets=[150], score_queries="all,8", evict_every="1,4", page_size="50"
    )
    assert [(each.name, each.score_queries, each.evict_every, each.page_size) for each in made] == [
        ("none", None, None, None), ("streaming", None, None, None), ("h2o", "all", 1, None), ("h2o", "all", 4, None),
        ("h2o", 8, 1, None), ("h2o", 8, 4, None), ("pagedeviction", None, None, 50),
    ]  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of a process")
def test_the_default_budget_follows_free_memory(model_file: Callable[[Spec], Path]) -> None:
    """C and Python propose the same; a limit of the process counts as memory that it does not have."""
    code = """if True:
        import json, os, resource, sys
        from equip_cli import Model
        with Model(sys.argv[1]) as model:
            plans = [model.plan("h2o")]
            used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20), -1))
            plans += [model.plan("h2o"), model.plan("none"), model.plan("h2o", type_k="q8_0", type_v="q8_0")]
        print(json.dumps(plans))
    """
    path = model_file(Spec(n_ctx_train=8192, n_head=16, n_head_kv=16))  # 8 KB per token
    env = {key: value for key, value in os.environ.items() if key != "LLAMA_KV_POLICY"}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    free, lowered, none, halved = (plan["budget"] for plan in json.loads(done.stdout))
    assert free == 4096
    assert 256 <= lowered < 4096 and lowered % 256 == 0
    assert lowered == none
    assert halved > lowered


def test_the_bytes_of_a_token_follow_its_types() -> None:
    assert policy.cache_bytes_per_token(1000, "q8_0", "q4_0") == pytest.approx(1000 * (34 / 32 + 18 / 32) / 4)


# ---- native


def test_the_header_is_read_without_a_preprocessor() -> None:
    source = native.cdef_source(
        '#ifndef A\n#define A\n/* a\n * b */\n#ifdef __cplusplus\nextern "C" {\n#endif\n'
        "#ifndef EQUIP_API\n#    define EQUIP_API\n#endif\nEQUIP_API int f(void);\n#ifdef __cplusplus\n}\n#endif\n#endif\n"
    )
    assert source.split() == "int f(void);".split()


def test_options_become_text_that_smuggles_nothing() -> None:
    assert native.option_text({"a": 1, "b": None, "c": True, "d": "q8_0", "e": 0.5}) == b"a=1,c=1,d=q8_0,e=0.5"
    with pytest.raises(UsageError):
        native.option_text({"a": "x,policy=none"})


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "abi_version", lambda: 99)
    with pytest.raises(EquipError, match="version"):
        native.load.__wrapped__()


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EQUIP_LIB_PATH", str(tmp_path))
    with pytest.raises(EquipError, match="EQUIP_LIB_PATH"):
        native.library_folder()


# ---- benchmark


def test_a_paired_ratio_lies_in_an_interval_that_repeats() -> None:
    base = [100, 200, 400, 100, 300]
    same = benchmark.compare([2 * ns for ns in base], base)
    assert same == {"time_ratio_median": 2.0, "ci95": [2.0, 2.0], "n_pairs": 5}
    noisy = benchmark.compare([110, 200, 380, 105, 300], base)
    assert noisy == benchmark.compare([110, 200, 380, 105, 300], base)  # fixed seed
    low, high = noisy["ci95"]
    assert low < noisy["time_ratio_median"] < high


def test_the_baseline_is_the_faster_none() -> None:
    settings = benchmark.Settings(depth=None)
    rows = benchmark.plan([CachePolicy("none"), CachePolicy("streaming", budget=512)], ["auto"], settings, 512)
    assert [(row.policy.name, row.flash_attn, row.depth) for row in rows] == [
        ("none", "on", 512),
        ("none", "off", 512),
        ("none", "on", 512),
        ("streaming", "auto", 512),
    ]
    assert rows[2].cpu_attn
    rows.pop(2)
    for row, ns in zip(rows, (30, 20, 21), strict=True):
        row.samples_ns = [ns] * 3
        row.stats = {"policy": row.policy.name, "update": "inplace", "positions": "cache", "rotate_every": 1}
        row.stats["scope"] = "token"
    assert benchmark.baseline_of(rows[2], rows) is rows[1]
    assert benchmark.baseline_of(rows[2], rows[2:]) is rows[2]
    assert [benchmark.padded(n) for n in (1, 256, 257)] == [256, 256, 512]


def test_a_row_is_compared_at_its_own_scope() -> None:
    made = [CachePolicy("h2o", 512, scope=s, update=u) for s in ("head", "layer") for u in ("inplace", "gather")]
    rows = benchmark.plan(
        [*made, CachePolicy("rkv", 512, score_queries=8, evict_every=64)], ["on"], benchmark.Settings(), 512
    )
    for row in rows:
        row.samples_ns = [1]
        row.stats = {"update": row.policy.update, "positions": "auto", "scope": row.policy.scope}
    assert [benchmark.baseline_of(row, rows) for row in rows] == [rows[0], rows[0], rows[2], rows[2], None]
    assert rows[3].label == "h2o, layer, gather, fa on"
    assert rows[4].label == "rkv, score queries 8, evict every 64, fa on"


# ---- random weights


def test_a_random_file_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIP_CACHE_DIR", str(tmp_path))
    real = random_gguf._tensor_data

    def fail(tensor: Any, *args: Any) -> Any:
        if tensor.name.startswith("blk.2"):
            raise KeyboardInterrupt
        return real(tensor, *args)

    monkeypatch.setattr(random_gguf, "_tensor_data", fail)
    with pytest.raises(KeyboardInterrupt):
        random_gguf.shape_file("tiny:q4_0")
    assert list((tmp_path / "shapes").iterdir()) == []
    monkeypatch.setattr(random_gguf, "_tensor_data", real)
    path = random_gguf.shape_file("tiny:q4_0")
    assert list((tmp_path / "shapes").iterdir()) == [path]
    stamp = path.stat().st_mtime_ns
    assert random_gguf.shape_file("tiny:q4_0").stat().st_mtime_ns == stamp  # written once


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("kind", shapes.WEIGHT_TYPES)
def test_a_random_file_loads(tmp_path: Path, arch: str, kind: str) -> None:
    shape = shapes.Shape(arch, 6, 64, 2, 1, 32, 128, 32128, 512, 1e6, tied=arch != "llama", llama3_rope=32.0 if arch == "llama" else 0.0,
                         window=64 if arch == "gemma3" else 0)  # fmt: skip
    path = tmp_path / "model.gguf"
    random_gguf.write_random_gguf(path, shape, kind, name="test")
    with Model(path) as model:
        assert (model.info["arch"], model.n_vocab, model.n_ctx_train) == (arch, 32128, 512)
        assert model.tokenize("Once upon a time") == model.tokenize("Once upon a time", parse_special=False)
        with session_of(model, "none", n_ctx=256) as session:
            session.eval(model.tokenize(PROMPT))
            logits = session.logits()
            assert 0.05 < logits.std() < 50


def test_shapes_cost_what_the_models_cost() -> None:
    """Parameters in millions, as the models' published weights have them."""
    millions = {
        "tiny": 2.245,
        "smollm-135m": 134.515,
        "smollm2-360m": 361.821,
        "smollm2-1.7b": 1711.376,
        "tinyllama-1.1b": 1100.048,
        "llama-2-7b": 6738.416,
        "llama-3.1-8b": 8030.261,
        "llama-3.2-1b": 1235.814,
        "llama-3.2-3b": 3212.750,
        "mistral-7b": 7248.024,
        "qwen2.5-0.5b": 494.033,
        "qwen2.5-1.5b": 1543.714,
        "qwen2.5-7b": 7615.617,
        "qwen3-0.6b": 596.050,
        "qwen3-4b": 4022.468,
        "gemma-3-270m": 268.098,
        "gemma-3-1b": 999.886,
    }
    for name, shape in shapes.SHAPES.items():
        weights = [tensor for tensor in shape.tensors("f16") if tensor.name != "rope_freqs.weight"]
        n = sum(math.prod(tensor.extents) for tensor in weights)
        assert n / 1e6 == pytest.approx(millions.pop(name), abs=1e-3), name
        assert all(tensor.extents[0] % 32 == 0 for tensor in weights if len(tensor.extents) == 2), name  # whole blocks
    assert not millions


def test_llama3_rope_stretches_the_slow_rotations_alone() -> None:
    """A pair with 4 turns or more in 8192 tokens keeps its frequency, one with less than a turn loses the whole factor."""
    for name, factor in (("llama-3.1-8b", 8.0), ("llama-3.2-1b", 32.0), ("llama-3.2-3b", 32.0)):
        shape = shapes.SHAPES[name]
        factors = shape.rope_factors()
        turns = [8192 / (2 * math.pi * 500000.0 ** (2 * i / shape.head_dim)) for i in range(shape.head_dim // 2)]
        assert len(factors) == len(turns)
        assert all(f == 1.0 for f, n in zip(factors, turns, strict=True) if n >= 4)
        assert all(f == factor for f, n in zip(factors, turns, strict=True) if n <= 1)
        assert factors == sorted(factors)


def test_no_text_is_split_into_dummy_tokens(model: Model) -> None:
    with Model(embedded.MODEL) as own:
        for text in (embedded.prose()[:5000], "<2048> <31999>, <1>, 2048>", "0123456789<>" * 20):
            assert model.tokenize(text) == own.tokenize(text)


def test_the_vocabulary_is_padded() -> None:
    tokenizer = gguf_file.read_metadata(embedded.MODEL, "tokenizer.")
    padded = gguf_file.pad_tokenizer(tokenizer, 32100)
    for key in ("tokens", "scores", "token_type"):
        assert struct.unpack_from("<IQ", padded[f"tokenizer.ggml.{key}"].data)[1] == 32100
    with pytest.raises(ValueError):
        gguf_file.pad_tokenizer(tokenizer, 100)
    with pytest.raises(ModelFileError):
        gguf_file.read_metadata(Path(__file__), "tokenizer.")


# ---- what commands share


def test_words_of_llama_cpp_are_understood() -> None:
    assert [parse_flash_attention(word) for word in ("on", "1", "off", "AUTO")] == ["on", "on", "off", "auto"]
    assert [parse_gpu_layers(word) for word in ("all", "auto", "7")] == [-1, -1, 7]
    assert json.loads(json.dumps(native.load().policies()))[0]["name"] == "none"


def test_generation_is_seconds_not_minutes(model: Model) -> None:
    begin = time.monotonic()
    with session_of(model, "streaming:budget=64") as session:
        session.eval(model.tokenize(PROMPT))
        session.set_sampler(GREEDY)
        assert len(session.generate_tokens(500)) == 500
    assert time.monotonic() - begin < 60


def test_scores_are_set_for_one_head_or_for_all(model: Model) -> None:
    tokens = model.tokenize(embedded.prose())[:120]
    with model.session("external:budget=64", n_threads=1) as session:
        assert session.set_scores(None, None, range(50), [1.0] * 50) == 50
        session.eval(tokens[:60])
        assert session.set_scores(2, 1, [3, 200, 55], [4.0, 5.0, 6.0]) == 3
        assert dict(session.head(2, 1))[55] == 6.0 and dict(session.head(2, 0))[3] == 1.0
        session.eval(tokens[60:])
        assert session.set_scores(2, 1, [], []) == 0
        for arguments, words in (
            ((0, 0, [1, 2], [1.0]), "2 positions have 1 values"),
            ((-1, 0, [1], [1.0]), "no layer -1"),
            ((0, 7, [1], [1.0]), "no KV head 7"),
            ((0, 0, [-1], [1.0]), "position"),
            ((0, 0, [1], [float("nan")]), "not a finite number"),
            ((0, 0, [1.5], [1.0]), "position 1.5"),
            ((0, 0, [None], [1.0]), "position None"),
            ((0, 0, [1], ["high"]), "is high: give"),
        ):
            with pytest.raises(UsageError, match=words):
                session.set_scores(*arguments)
    with (
        model.session("h2o:budget=64", n_threads=1) as session,
        pytest.raises(UsageError, match="use the policy external"),
    ):
        session.set_scores(None, None, [1], [1.0])
