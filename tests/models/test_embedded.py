"""The embedded model: the same numbers as in PyTorch, names that it never saw, sinks; and what `equip eval` measures on it (test_eval.py)."""

from __future__ import annotations

import importlib
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from command import runner
from places import DATA, REPOSITORY

from equip_cli import CachePolicy, Model, Session, UsageError
from equip_cli.evaluation import quality
from equip_cli.models import embedded
from equip_cli.models.embedded import RecallDialogue

LOGITS = DATA / "tiny_logits.npz"
BUCKETS = [str(key) for key in range(128, 1025, 128)]


def nothing(_: int) -> None:
    pass


@pytest.fixture
def session(model: Model) -> Iterator[Session]:
    with model.session(CachePolicy("none"), n_threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The modules of studies/tiny_model that need no torch."""
    sys.path.insert(0, str(REPOSITORY / "studies" / "tiny_model"))
    try:
        yield type("Tiny", (), {name: importlib.import_module(name) for name in ("corpus", "names", "tokenizer")})
    finally:
        sys.path.remove(str(REPOSITORY / "studies" / "tiny_model"))


@pytest.fixture(scope="module")
def its_tokenizer(tiny: Any) -> Any:
    reader = gguf.GGUFReader(embedded.MODEL)
    pieces = reader.fields["tokenizer.ggml.tokens"].contents()
    return tiny.tokenizer.Tokenizer(pieces[len(tiny.tokenizer.SPECIAL) + tiny.tokenizer.N_BYTES :])


# ---- the file


def test_the_file_says_what_it_is(model: Model) -> None:
    info = model.info
    assert info["arch"] == "llama"
    assert info["head_dim"] in (32, 64)
    assert info["n_head"] > info["n_head_kv"] > 0
    assert info["n_ctx_train"] == 1024
    assert 1e6 <= info["n_params"] <= 6e6
    assert info["has_chat_template"]
    assert embedded.MODEL.stat().st_size < 24e6
    fields = gguf.GGUFReader(embedded.MODEL).fields
    assert fields["general.name"].contents() == "EQUIP tiny"
    assert fields["general.license"].contents() == "mit"
    assert "studies/tiny_model" in fields["general.description"].contents()


@pytest.mark.parametrize("flash_attn", ["on", "off"])
@pytest.mark.parametrize("name", ["dialogue", "prose"])
def test_logits_are_those_of_pytorch(model: Model, name: str, flash_attn: str) -> None:
    data = np.load(LOGITS)
    tokens, expected = data[f"{name}_tokens"].tolist(), data[f"{name}_logits"]
    worst = 0.0
    with model.session(CachePolicy("none"), n_threads=1, flash_attn=flash_attn) as session:
        for i, token in enumerate(tokens):
            session.eval([token])
            if i % 8 == 7:
                row = expected[i // 8]
                worst = max(worst, float(np.abs(session.logits() - row).max() / (row.max() - row.min())))
    assert worst < 1e-3


# ---- the tokenizer


def test_texts_split_as_they_did_in_training(model: Model, its_tokenizer: Any) -> None:
    texts = embedded.prose().split("\n\n")[:40]
    texts += [m["content"] for d in embedded.recall_dialogues()[:100] for m in d.messages]
    rng = random.Random(0)
    texts += ["".join(rng.choices(" abetolinTSM.,'?!19\n", k=60)) for _ in range(200)]
    texts += ["\u00fcber caf\u00e9 \U0001f642", "  two  blanks", "TobeTobe Tobe"]
    for text in texts:
        ids = model.tokenize(text, add_special=False)
        assert ids == its_tokenizer.encode(text), text
        assert model.detokenize(ids) == " " + text


# ---- what is held out


def test_held_out_names_share_no_pair_with_the_training(tiny: Any, its_tokenizer: Any) -> None:
    forbidden = set(tiny.corpus.held_out_pairs(its_tokenizer))
    dialogues = embedded.recall_dialogues()
    for dialogue in dialogues:
        ids = its_tokenizer.encode(dialogue.value)
        assert 2 <= len(ids) <= 3
        assert set(zip(ids, ids[1:], strict=False)) <= forbidden, dialogue.value
        assert dialogue.value in dialogue.answer
    source = tiny.corpus.Corpus(its_tokenizer, seed=1)
    for _ in range(100):
        for ids in (source.dialogue(1025, 12).ids, source.prose(1025).ids):
            assert not forbidden & set(zip(ids, ids[1:], strict=False))
    prose = its_tokenizer.encode(embedded.prose())
    assert len(prose) >= 60_000
    assert len(forbidden & set(zip(prose, prose[1:], strict=False))) > 500  # its names are held out too


def test_four_to_eight_facts_and_fifty_dialogues_per_bucket(model: Model, tiny: Any) -> None:
    dialogues = embedded.recall_dialogues()
    counts: Counter[str] = Counter()
    for dialogue in dialogues:
        prompt = model.render_chat(dialogue.messages)
        counts[str((quality.distance(model, prompt, dialogue) // 128 + 1) * 128)] += 1
        text = " ".join(m["content"] for m in dialogue.messages)
        stated = {w.strip(".,") for w in text.split() if w[0].isupper() and tiny_name(w.strip(".,"), tiny)}
        assert 4 <= len(stated) <= 8, stated
        assert len(re.findall(rf"\b{dialogue.value}\b", text)) == 1
    assert dict(counts) == dict.fromkeys(BUCKETS, 50)


def tiny_name(word: str, tiny: Any) -> bool:
    """Whether the word consists of held-out pairs of syllables."""
    parts = [word.lower()[i : i + 2] for i in range(0, len(word), 2)]
    known = tiny.names.SYLLABLES
    return (
        len(parts) > 1
        and all(p in known for p in parts)
        and all(tiny.names.is_held_out(known.index(a), known.index(b)) for a, b in zip(parts, parts[1:], strict=False))
    )


# ---- what it can do


def hits(session: Session, dialogues: list[RecallDialogue]) -> int:
    return sum(n_hits for n_hits, _ in quality.recall(session, dialogues, nothing).values())


def test_facts_are_recalled_at_every_distance(session: Session) -> None:
    counts = quality.recall(session, embedded.recall_dialogues()[::5], nothing)
    assert [str(key) for key in counts] == BUCKETS
    assert all(n_hits >= 0.8 * n for n_hits, n in counts.values()), counts


def test_shuffled_facts_are_answered_by_chance(session: Session, tiny: Any) -> None:
    """The values dealt out anew among the stated facts: the old answer is then right once in four to eight times."""
    rng = random.Random(0)
    dealt = []
    for dialogue in embedded.recall_dialogues()[::4]:
        words = {w.strip(".,") for m in dialogue.messages for w in m["content"].split()}
        values = sorted(w for w in words if tiny_name(w, tiny))
        swap = dict(zip(values, rng.sample(values, len(values)), strict=True))
        messages = [
            m
            | {
                "content": " ".join(
                    swap.get(w.strip(".,"), w.strip(".,")) + w[len(w.strip(".,")) :] for w in m["content"].split()
                )
            }
            for m in dialogue.messages
        ]
        dealt.append(RecallDialogue(messages, dialogue.answer, dialogue.value))
    chance = len(dealt) / 6
    assert hits(session, dealt) <= chance + 3 * math.sqrt(chance)


@pytest.mark.full
def test_facts_of_all_dialogues_are_recalled(session: Session) -> None:
    counts = quality.recall(session, embedded.recall_dialogues(), nothing)
    assert {str(key): n for key, (_, n) in counts.items()} == dict.fromkeys(BUCKETS, 50)
    assert all(n_hits >= 0.95 * n for n_hits, n in counts.values()), counts


def test_evicted_facts_are_gone(model: Model) -> None:
    far = [d for d in embedded.recall_dialogues() if len(d.messages) > 60][:20]
    with model.session(CachePolicy("streaming", 256), n_threads=1) as session:
        assert hits(session, far) <= 2
    with model.session(CachePolicy("streaming", 1024), n_threads=1) as session:
        assert hits(session, far) >= 16


@pytest.mark.full
def test_without_sinks_prose_is_predicted_worse(model: Model) -> None:
    """Without the first four tokens a window of 256 predicts prose at least 15% worse."""
    tokens = model.tokenize(embedded.prose())[:20_000]
    ppl = {}
    for sinks in (0, 4):
        with model.session(CachePolicy("streaming", 256, sinks=sinks), n_threads=1) as session:
            ppl[sinks] = quality.perplexity(session, tokens, nothing)
    assert ppl[0] > 1.15 * ppl[4], ppl


# ---- perplexity


def log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row.astype(np.float64) - row.max()
    logs: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return logs


def test_perplexity_is_that_of_the_logits(session: Session, model: Model) -> None:
    tokens = model.tokenize(embedded.prose()[:1500])
    session.reset()
    nll = []
    for token, following in zip(tokens, tokens[1:], strict=False):
        session.eval([token])
        nll.append(-log_softmax(session.logits())[following])
    assert quality.perplexity(session, tokens, nothing) == pytest.approx(math.exp(np.mean(nll)), rel=1e-6)


def test_a_full_cache_starts_over_with_its_newest_half(model: Model) -> None:
    tokens = model.tokenize(embedded.prose())[:700]
    with model.session(CachePolicy("none"), n_ctx=256, n_threads=1) as session:
        measured = quality.perplexity(session, tokens, nothing)
        nll, past = list[float](), list[int]()  # by hand
        session.reset()
        for i, token in enumerate(tokens[:-1]):
            if len(past) == 256:
                past = [tokens[0], *tokens[i - 128 : i]]
                session.reset()
                session.eval(past)
            session.eval([token])
            past.append(token)
            nll.append(-log_softmax(session.logits())[tokens[i + 1]])
    assert measured == pytest.approx(math.exp(np.mean(nll)), rel=1e-6)


def test_a_text_of_one_token_is_refused(session: Session) -> None:
    with pytest.raises(UsageError, match="less than two tokens"):
        quality.perplexity(session, [1], nothing)


@pytest.mark.parametrize(
    ("n_hits", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)]
)
def test_the_wilson_interval_has_the_known_ends(n_hits: int, n: int, low: float, high: float) -> None:
    assert quality.wilson(n_hits, n) == pytest.approx((low, high), abs=1e-4)


# ---- the commands that run it


@pytest.mark.parametrize("command", [["info"], ["generate", "-p", "The baker", "-n", "8", "-t", "1"]])
def test_without_a_model_the_embedded_one_runs(
    equip_bin: Path, environment: dict[str, str], command: list[str]
) -> None:
    result = runner(equip_bin, environment)(*command)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "demonstration model" in line]
    assert len(lines) == 1
    assert "equip pull" in lines[0]
    assert result.stdout.strip()
