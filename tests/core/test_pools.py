"""Sessions that share one cache: each as it would be alone, and none in another's way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from dropin_models import write_hybrid

from equip_cli import (
    BudgetError,
    CachePolicy,
    CancelledError,
    Model,
    Pool,
    RewindError,
    Sampling,
    Session,
    StateError,
    UnsupportedModelError,
    UsageError,
)
from equip_cli.models import embedded

GREEDY = Sampling(temp=0, ignore_eos=True)
# exact: f32 rows, which are read without flash attention on a CPU
EXACT: dict[str, Any] = {"n_threads": 1, "type_k": "f32", "type_v": "f32"}
TEXTS = ["My cat is called Mirosa.", "I like painting.", "The train was very late.", "What is my dog called?"]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model(embedded.MODEL) as loaded:
        yield loaded


def opened(pool: Pool, n: int, sampling: Sampling = GREEDY) -> list[Session]:
    sessions = [pool.session() for _ in range(n)]
    for session in sessions:
        session.set_sampler(sampling)
    return sessions


def n_past(session: Session) -> int:
    return int(session.stats()["n_past"])


@pytest.mark.parametrize(
    "policy",
    [
        *("streaming:budget=64", "h2o:budget=64,scope=head", "tova:budget=64,scope=token"),
        "snapkv:budget=64,evict_every=8,scope=layer,graph=0.3",
    ],
)
def test_sessions_in_one_batch_say_what_each_says_alone(model: Model, policy: str) -> None:
    prompts = [model.tokenize(text) for text in TEXTS]
    alone, kept = [], []
    for prompt in prompts:
        with model.session(policy, **EXACT) as session:
            session.set_sampler(GREEDY)
            session.eval(prompt)
            alone.append(session.generate_tokens(120))
            kept.append(list(session.shares()))
    with model.pool(policy, 4, **EXACT) as pool:
        assert pool.stats()["pool"] == 512  # the least that four can have
        sessions = opened(pool, 4)
        for session, prompt in zip(sessions, prompts, strict=True):
            session.eval(prompt)
        assert pool.generate_tokens(sessions, 120) == alone
        assert [list(session.shares()) for session in sessions] == kept
        assert all(session.stats()["n_evicted"] > 50 for session in sessions)


def test_keys_and_values_of_a_pools_pages_are_read_where_they_lie(model: Model) -> None:
    """Each session is a batch of its own: equal tokens have equal rows in the first layer, and the rounding of a larger batch would
    decide between them."""
    policy = "lagkv:budget=64,evict_every=4,positions=cache"
    prompts = [model.tokenize(text) for text in TEXTS]
    told = []
    for pool in (None, model.pool(policy, 4, **EXACT)):
        sessions = [model.session(policy, **EXACT) for _ in prompts] if pool is None else opened(pool, 4)
        for session, prompt in zip(sessions, prompts, strict=True):
            session.set_sampler(GREEDY)
            session.eval(prompt)
        texts = [list[int]() for _ in prompts]
        for _ in range(6):  # in turns, so that their pages lie among each other
            for session, text in zip(sessions, texts, strict=True):
                text += session.generate_tokens(20)
        told.append([(text, session.head(3, 1)) for text, session in zip(texts, sessions, strict=True)])
        for session in sessions:
            session.close()
    assert told[0] == told[1]


def test_what_others_do_between_two_steps_changes_nothing(model: Model) -> None:
    sampling = Sampling(temp=1.0, seed=7, ignore_eos=True)
    prompt = model.tokenize(TEXTS[0])
    with model.session("streaming:budget=64", **EXACT) as session:
        session.set_sampler(sampling)
        session.eval(prompt)
        alone = session.generate_tokens(12)
        end = session.logits()
    with model.pool("streaming:budget=64", 3, **EXACT) as pool:
        a, b, c = opened(pool, 3, sampling)
        a.eval(prompt)
        before = a.logits()
        b.eval(model.tokenize(TEXTS[1]))
        numpy.testing.assert_array_equal(a.logits(), before)
        assert not numpy.array_equal(b.logits(), before)
        found: list[int] = []
        for i in range(12):
            found += a.generate_tokens(1) if i % 2 else [token for _, token in pool.iter_tokens([a], 1)]
            pool.step([b, c], {c: [5, 6, 7]})  # one writes, another reads
            b_logits = b.logits()
            c.eval([8])
            numpy.testing.assert_array_equal(b.logits(), b_logits)
        assert found == alone
        assert numpy.abs(a.logits() - end).max() < 1e-4 * numpy.ptp(end)
        assert n_past(c) == 12 * 4 and n_past(b) == len(model.tokenize(TEXTS[1])) + 12


def test_prompts_are_read_together_in_chunks(model: Model) -> None:
    text = [token % 200 + 3 for token in range(500)]
    with model.pool("h2o:budget=128", 3, n_ubatch=64, n_threads=1) as pool:
        sessions = opened(pool, 3)
        pool.eval({sessions[0]: text, sessions[1]: text[:70], sessions[2]: []})
        assert [n_past(session) for session in sessions] == [500, 70, 0]
        assert all(len(session.logits()) == model.n_vocab for session in sessions[:2])
        with pytest.raises(UsageError, match="nothing to continue in session 1"):
            pool.step([sessions[0], sessions[2]])
        assert n_past(sessions[0]) == 500  # nothing has happened


def test_a_session_gives_its_room_back(model: Model) -> None:
    text = [token % 200 + 3 for token in range(600)]
    with model.pool("streaming:budget=512,pool=512", 2, n_threads=1) as pool:
        a, b = opened(pool, 2)
        with pytest.raises(UsageError, match="all 2 sessions of this pool are in use"):
            pool.session()
        a.eval(text)
        assert a.stats()["n_used"] == 512 and a.stats()["n_evicted_pool"] == 0
        b.eval(text)  # half of the pool is b's
        assert (a.stats()["n_used"], b.stats()["n_used"]) == (256, 256)
        assert a.stats()["n_evicted_pool"] == 256
        a.close()
        assert pool.stats()["n_open"] == 1
        b.eval(text)
        assert b.stats()["n_used"] == 512
        c = pool.session()
        assert n_past(c) == 0 and c.kept() == []
        b.reset()
        c.eval(text)
        assert c.stats()["n_used"] == 512


def test_pins_rewinds_and_states_are_each_sessions_own(model: Model) -> None:
    text = [token % 200 + 3 for token in range(200)]
    with model.pool("streaming:budget=96", 2, **EXACT) as pool:
        a, b = opened(pool, 2)
        a.pin(20)
        pool.eval({a: text, b: text[::-1]})
        assert [position for position, _ in a.kept()][:20] == list(range(20))
        assert [position for position, _ in b.kept()][:5] != list(range(5))
        with pytest.raises(RewindError):
            a.rewind(50)
        state, kept = a.save_bytes(), a.kept()
        b_before = b.kept()
        a.generate_tokens(9)
        assert a.rewind(200) == "shortened" and n_past(a) == 200 and b.kept() == b_before
        b.load_bytes(state)
        assert [position for position, _ in b.kept()] == [position for position, _ in kept]
        a.load_bytes(state)
        pool.eval({a: [9], b: [9]})
        assert numpy.abs(a.logits() - b.logits()).max() < 1e-4 * numpy.ptp(a.logits())
        with model.session("streaming:budget=96", **EXACT) as alone, pytest.raises(StateError):
            alone.load_bytes(state)


def test_threads_take_turns(model: Model) -> None:
    prompts = [model.tokenize(text) for text in TEXTS[:3]]
    with model.pool("h2o:budget=64", 3, **EXACT) as pool:
        sessions = opened(pool, 3)
        for session, prompt in zip(sessions, prompts, strict=True):
            session.eval(prompt)
        together = pool.generate_tokens(sessions, 60)
    found: dict[int, list[int]] = {}
    with model.pool("h2o:budget=64", 3, **EXACT) as pool:
        sessions = opened(pool, 3)

        def work(i: int) -> None:
            sessions[i].eval(prompts[i])
            found[i] = [token for _ in range(60) for token in sessions[i].generate_tokens(1)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[i] for i in range(3)] == together


def test_a_cancelled_session_does_not_stop_the_others(model: Model) -> None:
    with model.pool("streaming:budget=64", 2, n_threads=1) as pool:
        a, b = opened(pool, 2)
        pool.eval({a: [3, 4, 5], b: [3, 4, 5]})
        a.cancel()
        with pytest.raises(CancelledError):
            pool.step([b, a])
        assert (n_past(a), n_past(b)) == (3, 3)
        assert len(pool.generate_tokens([a, b], 4)[1]) == 4


def test_a_turn_that_ends_leaves_the_others_at_work(model: Model) -> None:
    prompts = [
        model.tokenize(model.render_chat([{"role": "user", "content": text}]), parse_special=True) for text in TEXTS
    ]
    with model.pool("streaming:budget=128", 4, n_threads=1) as pool:
        sessions = opened(pool, 4, Sampling(temp=0))
        pool.eval(dict(zip(sessions, prompts, strict=True)))
        answers = pool.generate_tokens(sessions, 64)
        assert all(model.is_eog(answer[-1]) for answer in answers) and len({len(answer) for answer in answers}) > 1
        assert all(session.stopped for session in sessions)
        # the token that ends a turn is not in the cache
        assert [n_past(s) for s in sessions] == [len(p) + len(a) - 1 for p, a in zip(prompts, answers, strict=True)]


def test_without_a_policy_sessions_share_llama_cpps_cache(model: Model) -> None:
    with model.pool("none", 3, n_ctx=64, n_threads=1) as pool:
        sessions = opened(pool, 3)
        pool.eval({session: [5] * 64 for session in sessions})
        assert [session.stats()["n_used"] for session in sessions] == [64, 64, 64]
        assert len(pool.time_decode(sessions[:0] or sessions, 0)[0]) == 0


def test_sessions_that_share_nothing_have_a_budget_each(model: Model) -> None:
    with model.pool("streaming:budget=64", 3, shares=False, n_threads=1) as pool:
        assert pool.stats()["pool"] == 0
        sessions = opened(pool, 3)
        pool.eval({session: [5] * 200 for session in sessions})
        assert [session.stats()["n_used"] for session in sessions] == [64, 64, 64]
        total, host = pool.time_decode(sessions, 3)
        assert len(total) == len(host) == 3 and all(0 <= h <= t for t, h in zip(total, host, strict=True))
        assert [n_past(session) for session in sessions] == [203, 203, 203]
    with pytest.raises(UsageError, match="has no size"):
        model.pool("streaming:budget=64,pool=256", 3, shares=False)


def test_what_cannot_be_a_pool_is_refused(model: Model, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="pool of 100 tokens is too small for 4 sequences: give pool=512 or more"):
        model.pool("streaming:budget=64,pool=100", 4)
    with pytest.raises(UsageError, match="update=inplace"):
        model.pool("h2o:budget=64,pool=1024,update=gather", 4)
    with pytest.raises(UsageError, match="baselines for a single session"):
        model.pool("streaming:budget=64,update=shift", 4, shares=False)
    with pytest.raises(UsageError, match="baselines for a single session"):
        model.pool(CachePolicy("none", update="context-shift"), 4)
    for n in (0, 257, True):
        with pytest.raises(UsageError, match="n_sessions"):
            model.pool("streaming", n)
    with Model(write_hybrid(tmp_path / "hybrid.gguf", tiny_model)) as hybrid:
        with pytest.raises(UnsupportedModelError, match="recurrent layers"):
            hybrid.pool("streaming:budget=64,pool=1024", 4)
        with pytest.raises(UnsupportedModelError, match="start with|one sequence per stream"):
            hybrid.pool("streaming:budget=64", 4)
    with model.pool("streaming:budget=64", 2) as pool, model.pool("streaming:budget=64", 2) as other:
        a, b = pool.session(), other.session()
        with pytest.raises(UsageError, match="different pools"):
            pool.step([a, b], {a: [1], b: [1]})
        with pytest.raises(UsageError, match="given twice"):
            pool.step([a, a], {a: [1]})
        with pytest.raises(UsageError, match="takes no part"):
            pool.step([a], {b: [1]})
        with pytest.raises(UsageError, match="no session"):
            pool.step([])
        with pytest.raises(UsageError, match="out of range|outside the vocabulary"):
            pool.step([a], {a: [10**6]})
        assert n_past(a) == 0
        other.close()
        with pytest.raises(UsageError, match="closed"):
            pool.step([b], {b: [1]})
        with pytest.raises(UsageError, match="closed"):
            other.session()
    with pytest.raises(UsageError, match="closed"):
        pool.stats()


def test_a_pool_is_closed_with_its_model(tiny_model: Path, model_file: Callable[[str], Path]) -> None:
    model = Model(tiny_model)
    pool = model.pool("streaming:budget=64", 2)
    session = pool.session()
    model.close()
    for handle in (pool, session):
        with pytest.raises(UsageError, match="closed"):
            handle.stats()


@pytest.mark.parametrize("pool", [",pool=512", ""])
def test_scores_that_a_caller_sets_are_those_of_one_session(model: Model, pool: str) -> None:
    """In a pool, and where each session has a stream of its own."""
    prompts = [model.tokenize(embedded.prose())[i : i + 60] for i in (0, 60, 120)]
    scores = [[float((i * k) % 97) for i in range(300)] for k in (5, 7, 11)]
    policy, alone = "external:budget=64,scope=head", []

    def announce(session: Session, values: list[float]) -> None:
        session.set_scores(None, 0, range(300), values)
        session.set_scores(None, 1, range(300), values[::-1])

    for prompt, values in zip(prompts, scores, strict=True):
        with model.session(policy, **EXACT) as session:
            session.set_sampler(GREEDY)
            announce(session, values)
            session.eval(prompt)
            alone.append((session.generate_tokens(100), session.head(0, 0), session.head(5, 1)))
    with model.pool(policy + pool, 3, **EXACT) as shared:
        sessions = opened(shared, 3)
        for session, prompt, values in zip(sessions, prompts, scores, strict=True):
            announce(session, values)
            session.eval(prompt)
        generated = shared.generate_tokens(sessions, 100)
        told = [(session.head(0, 0), session.head(5, 1)) for session in sessions]
    assert [(tokens, *heads) for tokens, heads in zip(generated, told, strict=True)] == alone


def test_a_session_does_not_inherit_scores(model: Model) -> None:
    """Those of tokens that never came."""
    prompt = model.tokenize(embedded.prose())[:20]
    with model.pool("external:budget=64,pool=512", 2, **EXACT) as pool:
        for again in (Session.close, Session.reset):
            session = pool.session()
            session.set_scores(None, None, range(20), [1.0] * 20)
            again(session)
            session = pool.session() if again is Session.close else session
            session.eval(prompt)
            assert all(value != value for _, value in session.head(0, 0))
            session.close()
