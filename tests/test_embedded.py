"""The embedded model: the same numbers as in PyTorch, names that it never saw, sinks; and `equip eval`, which shows them."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from native_api import REPOSITORY

from equip_cli import CachePolicy, Model, Session, UsageError, embedded, quality
from equip_cli.embedded import RecallDialogue

LOGITS = Path(__file__).parent / "data" / "tiny_logits.npz"
BUCKETS = [str(key) for key in range(128, 1025, 128)]
RECORD_KEYS = {
    "model", "text", "policy", "scope", "positions", "rotate_every", "update", "budget", "sinks", "n_tokens", "ppl", "recall",
    "recall_ci95", "recall_n", "n_ubatch", "flash_attn", "type_k", "type_v",
}  # fmt: skip


def nothing(_: int) -> None:
    pass


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model(embedded.MODEL) as loaded:
        yield loaded


@pytest.fixture
def session(model: Model) -> Iterator[Session]:
    with model.session(CachePolicy("none"), n_threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The modules of scripts/tiny_model that need no torch."""
    sys.path.insert(0, str(REPOSITORY / "scripts" / "tiny_model"))
    try:
        import corpus
        import names
        import tokenizer

        yield type("Tiny", (), {"corpus": corpus, "names": names, "tokenizer": tokenizer})
    finally:
        sys.path.remove(str(REPOSITORY / "scripts" / "tiny_model"))


@pytest.fixture(scope="module")
def its_tokenizer(tiny: Any) -> Any:
    reader = gguf.GGUFReader(embedded.MODEL)
    pieces = reader.fields["tokenizer.ggml.tokens"].contents()
    return tiny.tokenizer.Tokenizer(pieces[len(tiny.tokenizer.SPECIAL) + tiny.tokenizer.N_BYTES :])


# ---- the file


def test_what_the_file_says_of_itself(model: Model) -> None:
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
    assert "scripts/tiny_model" in fields["general.description"].contents()


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


def test_recall_at_every_distance(session: Session) -> None:
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
def test_recall_of_all_dialogues(session: Session) -> None:
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
def test_attention_sinks(model: Model) -> None:
    """Without the first four tokens a window of 256 predicts prose at least 15% worse."""
    tokens = model.tokenize(embedded.prose())[:20_000]
    ppl = {}
    for sinks in (0, 4):
        with model.session(CachePolicy("streaming", 256, sinks=sinks), n_threads=1) as session:
            ppl[sinks] = quality.perplexity(session, tokens, nothing)
    assert ppl[0] > 1.15 * ppl[4], ppl


# ---- perplexity


def log_softmax(row: np.ndarray) -> np.ndarray:
    row = row.astype(np.float64)
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


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
        nll, past = [], []  # by hand
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
def test_wilson_interval(n_hits: int, n: int, low: float, high: float) -> None:
    assert quality.wilson(n_hits, n) == pytest.approx((low, high), abs=1e-4)


# ---- the commands


Equip = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def equip(equip_bin: Path, tmp_path: Path) -> Equip:
    import os

    environment = {k: v for k, v in os.environ.items() if k != "LLAMA_KV_POLICY"} | {"EQUIP_CACHE_DIR": str(tmp_path)}

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        command = [str(equip_bin), *map(str, args)]
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", timeout=120, env=environment, stdin=subprocess.DEVNULL
        )

    return run


def test_eval_json(equip: Equip) -> None:
    result = equip(
        "eval", "--policy", "none,streaming", "--budget", "64,128", "--sinks", "0,4", "-n", 300, "--dialogues", 8, "--json",
        "-t", 1,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    records = json.loads(result.stdout)
    assert [(r["policy"], r["budget"], r["sinks"]) for r in records] == [
        ("none", 1024, 0), ("streaming", 64, 0), ("streaming", 64, 4), ("streaming", 128, 0), ("streaming", 128, 4),
    ]  # fmt: skip
    for record in records:
        assert set(record) == RECORD_KEYS
        assert record["n_tokens"] == 300
        assert 1 < record["ppl"] < 2048
        assert list(record["recall"]) == list(record["recall_ci95"]) == list(record["recall_n"]) == BUCKETS
        for key, share in record["recall"].items():
            low, high = record["recall_ci95"][key]
            assert 0 <= low <= share <= high <= 1
    assert "demonstration model" in result.stderr


def test_eval_tells_rules_and_updates_apart(equip: Equip) -> None:
    args = ("--policy", "streaming,random", "--budget", 64, "--sinks", 4, "-n", 150, "--dialogues", 0, "-t", 1)
    result = equip("eval", *args, "--positions", "true,cache", "--update", "inplace,gather", "--rotate-every", "1,8")
    assert result.returncode == 0, result.stderr
    labels = [line.split("|")[1].strip() for line in result.stdout.splitlines()[2:] if line.startswith("|")]
    assert labels == [
        f"{policy}, 64, 4 sinks, {rest}"
        for policy in ("streaming", "random")
        for rest in (
            "true, inplace",
            "true, gather",
            "cache, rotate every 1, inplace",
            "cache, rotate every 8, inplace",
            "cache, rotate every 1, gather",
            "cache, rotate every 8, gather",
        )
    ]
    plain = equip("eval", *args, "--positions", "cache")
    assert "streaming, 64, 4 sinks, cache " in plain.stdout


def test_eval_tables(equip: Equip, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(embedded.prose()[:800])
    result = equip("eval", "--policy", "none", "-f", text, "--dialogues", 8, "-t", 1)
    assert result.returncode == 0, result.stderr
    assert "perplexity of book.txt" in result.stdout
    assert "| 896 to 1023" in result.stdout


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["--policy", "h3o"], 2, "there is no policy"),
        (["--policy", ","], 2, "nothing to measure"),
        (["-n", "0", "--dialogues", "0"], 2, "nothing to measure"),
        (["--policy", "streaming", "--budget", "many"], 2, "--budget is 'many'"),
        (["--policy", "streaming", "--positions", "cache,nearest"], 2, "no positions 'nearest'"),
        (["--policy", "streaming", "--update", "sideways"], 2, "no update 'sideways'"),
        (["--policy", "streaming", "--update", "shift", "--positions", "true"], 2, "use positions cache"),
        (["--policy", "streaming", "--rotate-every", "0"], 2, "rotate_every is 0"),
        (["-f", "no-such-file"], 2, "cannot be read"),
        (["-n", "-1"], 2, "-n"),
    ],
)
def test_eval_refusals(equip: Equip, args: list[str], code: int, sentence: str) -> None:
    result = equip("eval", *args)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert len(errors) == 1, result.stderr
    assert sentence in errors[0]


@pytest.mark.parametrize("command", [["info"], ["generate", "-p", "The baker", "-n", "8", "-t", "1"]])
def test_without_a_model_the_embedded_one_runs(equip: Equip, command: list[str]) -> None:
    result = equip(*command)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "demonstration model" in line]
    assert len(lines) == 1
    assert "equip pull" in lines[0]
    assert result.stdout.strip()
