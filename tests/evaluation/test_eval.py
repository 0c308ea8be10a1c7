"""`equip eval`: which rows it measures, what its measures mean, what it prints and draws, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from command import Equip, runner
from places import REPOSITORY

from equip_cli import CachePolicy, Model, UsageError, cli
from equip_cli.evaluation import agreement, keep_map, measure, passkey
from equip_cli.evaluation.rows import Plan, Row, opened, pairs, with_baselines
from equip_cli.evaluation.tables import labels
from equip_cli.models import embedded

SCHEMA = json.loads((REPOSITORY / "docs" / "schemas" / "eval.json").read_text())
BUCKETS = [str(key) for key in range(128, 1025, 128)]
QUICK = ("--dialogues", 0, "-t", 1)
POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


def nothing(_: float) -> None:
    pass


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("LLAMA_KV_POLICY", "NO_COLOR", "FORCE_COLOR")}
    return kept | {"EQUIP_CACHE_DIR": str(tmp_path)}


@pytest.fixture
def equip(equip_bin: Path, environment: dict[str, str]) -> Equip:
    return runner(equip_bin, environment)


def records_of(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """What a command printed, checked against the schema."""
    assert result.returncode == 0, result.stderr
    records = json.loads(result.stdout)
    jsonschema.validate(records, SCHEMA, jsonschema.Draft202012Validator)
    return list(records)


def first_column(text: str) -> list[str]:
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if not set(row) <= set("-:")][1:]


def test_the_schema_is_one_and_tells_what_every_key_means() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    record = SCHEMA["$defs"]["record"]
    assert record["additionalProperties"] is False
    assert set(record["required"]) == set(record["properties"]) - {
        *("score_queries", "evict_every", "page_size", "parameters")
    }
    assert all(each["description"] for each in record["properties"].values())


# ---- which rows


def test_a_budget_is_measured_beside_none_random_and_the_window() -> None:
    policies = [CachePolicy("h2o", 64), CachePolicy("h2o", 128), CachePolicy("streaming", 64)]
    rows = [(p.name, p.budget, p.sinks, added) for p, added in with_baselines(policies)]
    assert rows == [
        ("none", None, None, True),
        ("random", 64, None, True), ("random", 128, None, True),
        ("streaming", 64, 0, True), ("streaming", 128, 0, True),
        ("h2o", 64, None, False), ("h2o", 128, None, False), ("streaming", 64, None, False),
    ]  # fmt: skip


def test_baselines_that_were_named_are_not_added_again() -> None:
    policies = [CachePolicy("streaming", 64, 0), CachePolicy("none"), CachePolicy("random", 64, scope="head")]
    rows = with_baselines(policies)
    assert rows == [(policies[1], False), (policies[0], False), (policies[2], False)]
    assert with_baselines([CachePolicy("none")]) == [(CachePolicy("none"), False)]


def test_the_context_shift_evicts_too(equip: Equip, tmp_path: Path) -> None:
    """llama.cpp's own remedy is a row with a budget, of which a cache of `none` is a multiple of 256."""
    args = ("--policy", "none", "--update", "context-shift", "--budget", "200,256", "-n", 400, "--agreement", *QUICK)
    records = records_of(equip("eval", *args, "--json", "--keep-map", tmp_path / "kept.svg"))
    assert labels(records) == [
        "none, 1024", "random, 200, 4 sinks, auto", "random, 256, 4 sinks, auto", "window only, 200, cache",
        "window only, 256, cache", "context-shift, 256, 4 sinks",
    ]  # fmt: skip
    assert records[0]["agreement"] is None
    assert records[-1]["agreement"]["n_tokens"] == 400 - 256
    assert records[-1]["kept_bytes"] == 256 * 1536
    assert records[-1]["ppl"] != records[0]["ppl"]
    assert (tmp_path / "kept.svg").exists()


def test_types_of_k_and_v_go_in_pairs() -> None:
    assert pairs(["f16", "q8_0"], ["f16", "q8_0"]) == [("f16", "f16"), ("q8_0", "q8_0")]
    assert pairs(["f16", "q8_0"], ["f16"]) == [("f16", "f16"), ("q8_0", "f16")]
    assert pairs(["f16"], ["q8_0", "q4_0"]) == [("f16", "q8_0"), ("f16", "q4_0")]
    with pytest.raises(UsageError, match="-ctk names 3 types and -ctv 2"):
        pairs(["f16", "q8_0", "q4_0"], ["f16", "q8_0"])
    with pytest.raises(UsageError, match="no cache type 'q7'"):
        pairs(["f16"], ["q7"])


def test_every_row_is_a_record(equip: Equip) -> None:
    result = equip(
        "eval", "--policy", "none,streaming", "--budget", 64, "--sinks", "0,4", "-n", 150, "--dialogues", 8, "--json",
        "-t", 1,
    )  # fmt: skip
    records = records_of(result)
    assert [(r["policy"], r["budget"], r["sinks"]) for r in records] == [
        ("none", 1024, 0), ("random", 64, 4), ("streaming", 64, 0), ("streaming", 64, 4),
    ]  # fmt: skip
    for record in records:
        assert (record["n_tokens"], record["chunk"], record["seed"]) == (150, 1, 0)
        assert 1 < record["ppl"] < 2048
        assert record["kept_bytes"] == 1536 * record["budget"]
        assert record["kv_bytes"] >= record["kept_bytes"]
        assert (record["agreement"], record["passkey"], record["passkey_n"]) == (None, {}, 0)
        assert list(record["recall"]) == list(record["recall_ci95"]) == list(record["recall_n"]) == BUCKETS
        for key, share in record["recall"].items():
            low, high = record["recall_ci95"][key]
            assert 0 <= low <= share <= high <= 1
    assert "demonstration model" in result.stderr


def test_none_alone_stays_alone(equip: Equip) -> None:
    assert [r["policy"] for r in records_of(equip("eval", "-n", 20, *QUICK, "--json"))] == ["none"]


def test_rules_and_updates_are_told_apart(equip: Equip) -> None:
    args = ("--policy", "streaming,random", "--budget", 64, "--sinks", 4, "-n", 100, "--no-baselines", *QUICK)
    result = equip("eval", *args, "--positions", "true,cache", "--update", "inplace,gather", "--rotate-every", "1,8")
    assert result.returncode == 0, result.stderr
    assert first_column(result.stdout.split("differences")[0]) == [
        f"{policy}, 64, {rest}"
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
    assert "| streaming, 64 " in plain.stdout and "| positions cache |" in plain.stdout


def test_types_and_the_window_are_told_apart(equip: Equip) -> None:
    args = ("--policy", "streaming", "--budget", 64, "-n", 80, *QUICK, "-ctk", "f16,q8_0", "-ctv", "f16,q8_0")
    records = records_of(equip("eval", *args, "--json"))
    assert [(r["type_k"], r["type_v"]) for r in records] == [("f16", "f16"), ("q8_0", "q8_0")] * 4
    assert [r["kept_bytes"] for r in records[-2:]] == [64 * 1536, 64 * 1536 * 17 // 32]
    assert labels(records) == [
        f"{label}, {kind}"
        for label in (
            "none, 1024",
            "random, 64, 4 sinks, auto",
            "window only, 64, cache",
            "streaming, 64, 4 sinks, cache",
        )
        for kind in ("f16", "q8_0")
    ]
    table = equip("eval", *args).stdout
    assert "| kept |" in re.sub(" +", " ", table)
    # what is the same in all rows, or in all of a policy, is said once
    assert "4 sinks | update inplace |" in table.splitlines()[0] and "window only: positions cache" in table
    assert first_column(table.split("differences")[0]) == [
        f"{label}, {kind}"
        for label in ("none, 1024", "random, 64", "window only, 64", "streaming, 64")
        for kind in ("f16", "q8_0")
    ]


def test_tables_say_what_was_measured_and_on_what(equip: Equip, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(embedded.prose()[:800])
    alone = equip("eval", "--policy", "none", "-f", text, "--dialogues", 8, "-t", 1)
    assert alone.returncode == 0, alone.stderr
    assert "perplexity of book.txt" in alone.stdout
    assert "| 896 to 1023 (1)" in alone.stdout
    many = equip(
        "eval", "--policy", "h2o", "--budget", 64, "--text", text, "--dialogues", 0, "-t", 1, "--agreement", "--passkey",
        "--passkey-length", 150, "--passkey-depths", "0,1", "--passkey-trials", 2,
    )  # fmt: skip
    assert many.returncode == 0, many.stderr
    for shown in (alone.stdout, many.stdout):
        assert max(map(len, shown.splitlines())) <= 100
    about, *paragraphs = many.stdout.split("\n\n")
    tables = [each for each in paragraphs if each.startswith("|")]
    assert len(tables) == 4
    about = " ".join(about.split())
    assert about.startswith("model ") and "4 sinks | update inplace | score queries all | evict every 1 |" in about
    assert "random: scope token, positions auto" in about and "h2o: scope head, positions auto" in about
    rows = ["none, 1024", "random, 64", "window only, 64", "h2o, 64"]
    assert first_column(tables[0]) == rows
    assert first_column(tables[1]) == rows[1:]  # the full cache is what the others are compared with
    assert "below 0 is better" in many.stdout and first_column(tables[2]) == rows[2:]
    assert "passkeys found, 2 trials" in many.stdout and "150 at 0" in tables[3] and "h2o, 64" in tables[3]


# ---- perplexity


def test_chunks_are_in_the_record_and_evict_differently(equip: Equip) -> None:
    args = ("eval", "--policy", "streaming", "--budget", 64, "-n", 200, "--no-baselines", *QUICK, "--json")
    one, eight = records_of(equip(*args))[0], records_of(equip(*args, "--chunk", 8))[0]
    assert (one["chunk"], eight["chunk"]) == (1, 8)
    assert one["ppl"] != eight["ppl"]
    assert abs(one["ppl"] / eight["ppl"] - 1) < 0.2
    wide = records_of(equip(*args, "--chunk", 100))[0]
    assert (wide["chunk"], wide["n_ubatch"]) == (100, 100)


def test_chunks_do_not_change_a_full_cache(equip: Equip) -> None:
    args = ("eval", "-n", 150, "-fa", "off", *QUICK, "--json")
    values = [records_of(equip(*args, "--chunk", chunk))[0]["ppl"] for chunk in (1, 7)]
    assert values[0] == pytest.approx(values[1], rel=1e-3)


# ---- agreement


def test_divergence_is_that_by_hand() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    full, other = (agreement.Distribution((np.log(x) + 7).astype(np.float32)) for x in (p, q))
    assert full.divergence(other) == pytest.approx(0.25 * np.log(2), abs=1e-6)
    assert full.divergence(full) == pytest.approx(0, abs=1e-6)
    assert (full.top, other.top) == (0, 1)
    assert full.nll(1) == pytest.approx(np.log(4), abs=1e-6)


def test_exponentials_in_single_precision_cost_less_than_a_millionth() -> None:
    draw = np.random.default_rng(3)
    x, y = (draw.normal(scale=4, size=100_000).astype(np.float32) for _ in range(2))
    rows = [z - np.log(np.exp(z - z.max()).sum()) - z.max() for z in (x.astype(np.float64), y.astype(np.float64))]
    full, other = map(agreement.Distribution, (x, y))
    assert full.nll(5) == pytest.approx(-rows[0][5], abs=1e-6)
    assert full.divergence(other) == pytest.approx(float(np.exp(rows[0]) @ (rows[0] - rows[1])), abs=2e-6)


def test_bootstrap_holds_neighbours_together() -> None:
    assert agreement.block_bootstrap([0.5] * 40) == (0.5, 0.5)
    assert agreement.block_bootstrap([0.25]) == (0.25, 0.25)
    draw = np.random.default_rng(1)
    noise = draw.normal(size=4096)
    runs = np.repeat(draw.normal(size=128), 32)  # as many values, but 128 of them independent
    width = [high - low for low, high in (agreement.block_bootstrap(list(each)) for each in (noise, runs))]
    assert width[0] == pytest.approx(2 * 1.96 / 64, rel=0.3)
    assert width[1] == pytest.approx(2 * 1.96 / np.sqrt(128), rel=0.3)
    assert agreement.block_bootstrap(list(noise), 1) == agreement.block_bootstrap(list(noise), 1)
    assert agreement.block_bootstrap(list(noise), 1) != agreement.block_bootstrap(list(noise), 2)


def test_agreement_counts_from_the_first_eviction_on(model: Model, prose: list[int]) -> None:
    n, budget = 100, 64
    with (
        model.session(CachePolicy("none"), n_ctx=256, n_threads=1) as full,
        model.session(CachePolicy("none"), n_ctx=256, n_threads=1, type_k="q4_0") as coarse,
        model.session(CachePolicy("streaming", budget), n_threads=1) as bounded,
        model.session(CachePolicy("streaming", n), n_threads=1) as roomy,
    ):
        compared = agreement.compare(full, [coarse, bounded, roomy], prose[:n], nothing)
        found = compared.agreements
        assert found[0] is not None and found[1] is not None
        assert found[2] is None
        assert (found[0].n_tokens, found[1].n_tokens) == (n, n - budget)
        assert 0 < found[0].kl < found[1].kl

        rows: list[list[np.ndarray]] = [[], []]  # by hand
        for session, into in zip((full, bounded), rows, strict=True):
            session.reset()
            for token in prose[:n]:
                session.eval([token])
                x = session.logits().astype(np.float64)
                into.append(np.exp(x - x.max()) / np.exp(x - x.max()).sum())
    late = list(zip(*rows, strict=True))[budget:]
    assert found[1].kl == pytest.approx(np.mean([(p * np.log(p / q)).sum() for p, q in late]), rel=1e-6)
    assert found[1].top1 == np.mean([p.argmax() == q.argmax() for p, q in late])
    low, high = found[1].kl_ci95
    assert low <= found[1].kl <= high


def test_perplexity_comes_with_agreement(model: Model, prose: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One reading for both gives what two give, also where the text goes on behind what is compared."""
    kinds = [Row(each) for each in (CachePolicy("none"), CachePolicy("streaming", 64), CachePolicy("h2o", 64))]
    kinds += [Row(CachePolicy("none"), "q8_0", "q8_0"), Row(CachePolicy("streaming", 200))]
    options = {"n_ctx": 256, "n_threads": 1}
    for n_agreement in (149, 100):
        plan = Plan("x", prose[:150], prose[:150], n_agreement, options=options)
        rows = opened(model, kinds, options, 1)
        done: list[float] = []
        found = [record for _, record, _ in measure.measure(model, rows, plan, done.append)]
        assert sum(done) == measure.n_steps(rows, plan)
        alone: list[dict[int, dict[str, Any]]] = []
        for each in (replace(plan, n_agreement=0), replace(plan, tokens=())):
            done.clear()
            alone.append({i: record for i, record, _ in measure.measure(model, rows, each, done.append)})
            assert sum(done) == measure.n_steps(rows, each)
        for i, record in enumerate(found):
            assert record["ppl"] == pytest.approx(alone[0][i]["ppl"], rel=1e-7)
            assert record["agreement"] == alone[1][i]["agreement"]
        assert [record["agreement"] is None for record in found] == [True, False, False, False, True]
        # rows of their own where there is no room for all of them
        monkeypatch.setattr(measure, "_GROUP_BYTES", 0)
        monkeypatch.setattr(measure, "_GROUP", 1)
        apart = [record for _, record, _ in measure.measure(model, rows, plan, done.append)]
        assert [r["ppl"] for r in apart] == pytest.approx([r["ppl"] for r in found], rel=1e-12)
        assert [r["agreement"] for r in apart] == [r["agreement"] for r in found]
        monkeypatch.undo()


def test_agreement_of_more_rows_than_are_open_at_once(equip: Equip) -> None:
    """Seven rows beside the reference: more than are open at once."""
    args = ("--policy", "streaming", "--budget", "64,96", "-n", 0, "--agreement", *QUICK, "--json")
    text = ("--text", REPOSITORY / "LICENSE")
    records = records_of(
        equip("eval", *args, *text, "-ctk", "f16,q8_0", "--no-baselines", "--policy", "none,streaming")
    )
    assert [r["ppl"] for r in records] == [None] * len(records)
    found = [r["agreement"] for r in records]
    assert found[0] is None  # the full f16 cache is the reference
    assert all(each is not None for each in found[1:])
    assert found[1]["n_tokens"] - found[2]["n_tokens"] == 64
    assert found[1]["kl"] < found[2]["kl"]


def test_agreement_past_the_trained_context_is_none_with_a_warning(equip: Equip) -> None:
    args = ("--policy", "streaming", "--budget", 1024, "-n", 0, "--agreement", "--no-baselines", *QUICK, "--json")
    result = equip("eval", *args)
    assert [r["agreement"] for r in records_of(result)] == [None]
    [warning] = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert "1024 tokens are read" in warning and "takes 1025" in warning


# ---- passkey


def test_a_prompt_holds_the_key_at_its_depth_and_has_its_length(model: Model) -> None:
    sentence = max(len(model.tokenize(each, add_special=False)) for each in passkey.FILLER)
    for length in (150, 400):
        for depth in (0.0, 0.25, 1.0):
            prompt = passkey.make(model, length, depth, "31415")
            assert length - sentence <= len(prompt.tokens) <= length
            text = model.detokenize(prompt.tokens)
            assert text.count("31415") == 2 and text.endswith("The pass key is")
            before, after = text.split("The pass key is 31415. Remember it. 31415 is the pass key.")
            counts = [sum(part.count(each) for each in passkey.FILLER) for part in (before, after)]
            assert abs(counts[0] - depth * sum(counts)) <= 0.5


def test_prompts_are_drawn_from_the_seed(model: Model) -> None:
    first, again, other = (passkey.make_all(model, [150], [0, 0.5], 3, seed) for seed in (0, 0, 1))
    assert first == again
    assert {p.key for p in first}.isdisjoint({p.key for p in other})
    assert len({p.key for p in first}) == 6
    assert all(re.fullmatch(r"[1-9]\d{4}", p.key) for p in first)


def test_lengths_follow_the_budget_and_the_trained_context(model: Model) -> None:
    low = passkey.shortest(model)
    assert passkey.default_lengths(model, 100) == [200, 400]
    assert passkey.default_lengths(model, 16) == [low]
    assert passkey.default_lengths(model, 400) == [800, 1024 - passkey.ROOM]
    with pytest.raises(UsageError, match="trained on 64: leave --passkey out"):
        passkey.default_lengths(SimpleNamespace(n_ctx_train=64, tokenize=model.tokenize), 16)  # type: ignore[arg-type]


def test_the_key_alone_counts_as_an_answer() -> None:
    assert passkey.found(" 31415. Remember", "31415")
    assert passkey.found("the number 31415", "31415")
    assert not passkey.found("3141592", "31415")
    assert not passkey.found("3141 5", "31415")


class Answers:
    """A session that finds the key as long as it stands within the last `window` tokens."""

    def __init__(self, model: Model, window: int) -> None:
        self.model, self._window = model, window

    def reset(self) -> None:
        pass

    def set_sampler(self, _: object) -> None:
        pass

    def generate(self, prompt: list[int], n: int, *, per_call: int) -> Iterator[str]:
        assert n == passkey.N_ANSWER
        seen = re.search(r"pass key is (\d{5})", self.model.detokenize(prompt[-self._window :]))
        yield from f" {seen[1] if seen else 0}. There and"


def test_right_answers_are_counted(model: Model) -> None:
    prompts = passkey.make_all(model, [200], [0, 1], 3)
    counted: list[float] = []
    assert passkey.accuracy(Answers(model, 200), prompts, counted.append) == {"200": {"0": 1.0, "1": 1.0}}  # type: ignore[arg-type]
    assert passkey.accuracy(Answers(model, 60), prompts, nothing) == {"200": {"0": 0.0, "1": 1.0}}  # type: ignore[arg-type]
    assert sum(counted) == sum(len(p.tokens) + passkey.N_ANSWER for p in prompts)


def test_a_passkey_record_has_every_length_and_depth(equip: Equip) -> None:
    args = ("--policy", "streaming", "--budget", 64, "-n", 0, *QUICK, "-c", 256, "--json", "--passkey-depths", "0,0.5")
    records = records_of(equip("eval", *args, "--passkey-length", "150,300", "--passkey-trials", 1))
    for record in records:  # the full cache has room for 300 tokens, whatever -c says
        assert {length: list(found) for length, found in record["passkey"].items()} == {
            "150": ["0", "0.5"],
            "300": ["0", "0.5"],
        }
        assert record["passkey_n"] == 1
    assert records[0]["budget"] == 256


# ---- the keep map


def test_a_keep_map_shows_the_window(model: Model, prose: list[int]) -> None:
    with model.session(CachePolicy("streaming", 64), n_threads=1) as session:
        frames = keep_map.read(session, prose[:500], "title", nothing)
    [(_, columns)] = frames.panels
    assert frames.title == "title"
    assert frames.n_read[-1] == 500 and len(frames.n_read) == len(columns)
    assert 100 <= len(columns) <= 200
    assert len({b - a for a, b in zip(frames.n_read[:-1], frames.n_read[1:-1], strict=False)}) == 1
    for n, kept in zip(frames.n_read, columns, strict=True):
        assert kept == (list(range(n)) if n <= 64 else [0, 1, 2, 3, *range(n - 60, n)])


@pytest.mark.parametrize(("scope", "n_panels"), [("layer", 6), ("head", 12), ("token", 1)])
def test_keep_map_has_a_panel_per_lane(model: Model, prose: list[int], scope: str, n_panels: int) -> None:
    with model.session(CachePolicy("h2o", 64, scope=scope), n_threads=1) as session:
        frames = keep_map.read(session, prose[:200], "title", nothing)
        last = [position for position, _ in session.head(5, 1)]
    assert len(frames.panels) == n_panels
    assert frames.panels[-1][1][-1] == last
    for _, columns in frames.panels:
        for n, kept in zip(frames.n_read, columns, strict=True):
            assert len(kept) == min(n, 64) and kept[:4] == list(range(min(n, 4)))
    assert (len({tuple(columns[-1]) for _, columns in frames.panels}) > 1) == (n_panels > 1)


class ManyHeads:
    """A session of 40 layers with 16 KV heads, of which every other layer has no cache of its own."""

    def __init__(self, scope: str) -> None:
        self.model = SimpleNamespace(info={"n_layer": 40, "n_head_kv": 16})
        self._scope = scope

    def stats(self) -> dict[str, str]:
        return {"scope": self._scope}

    def head(self, layer: int, head: int) -> list[tuple[int, float]]:
        if layer % 2:
            raise UsageError("a layer without a cache of its own")
        return [(layer, 0.0), (head, 0.0)]


def test_at_most_64_panels_evenly_spread() -> None:
    units, left_out = keep_map.units(ManyHeads("head"))  # type: ignore[arg-type]
    assert left_out == "8 of 20 layers, 8 of 16 heads"
    assert [label for label, _ in units[:9]] == [f"layer 0, head {h}" for h in range(0, 16, 2)] + ["layer 4, head 0"]
    assert [read() for _, read in units[:2]] == [[(0, 0.0), (0, 0.0)], [(0, 0.0), (2, 0.0)]]
    units, left_out = keep_map.units(ManyHeads("layer"))  # type: ignore[arg-type]
    assert (len(units), left_out) == (20, "")


def test_keep_map_reads_as_much_as_is_sensible() -> None:
    lengths = [keep_map.length(budget, 60_000) for budget in (64, 256, 400, 1024, 4096)]
    assert lengths == [1024, 1024, 1600, 2048, 8192]
    assert keep_map.length(64, 300) == 300


# ---- figures


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_figures_are_written_in_each_form(equip: Equip, tmp_path: Path, kind: str) -> None:
    plot, kept = tmp_path / f"plot.{kind}", tmp_path / f"kept.{kind}"
    result = equip(
        "eval", "--policy", "h2o", "--budget", 64, "-n", 150, *QUICK, "--json", "--plot", plot, "--keep-map", kept
    )
    records_of(result)
    for file in (plot, kept):
        assert file.read_bytes()[:4] == (b"\x89PNG" if kind == "png" else b"<?xm")
    assert {path.suffix for path in tmp_path.glob("*.*")} == {f".{kind}"}


def test_plot_in_the_terminal_follows_the_table(equip: Equip) -> None:
    result = equip("eval", "--policy", "streaming", "--budget", "64,96", "-n", 150, *QUICK, "--plot", "-")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("model ") and "\n| policy, budget" in result.stdout
    assert len(result.stdout.splitlines()) > 20


# ---- the same again


def test_two_runs_print_the_same(equip: Equip) -> None:
    args = (
        "eval", "--policy", "h2o", "--budget", 64, "-n", 120, "--dialogues", 2, "--agreement", "--passkey-length", 150,
        "--passkey-trials", 1, "--seed", 7, "--json", "-t", 1,
    )  # fmt: skip
    first, second = equip(*args), equip(*args)
    assert records_of(first)[0]["seed"] == 7
    assert first.stdout == second.stdout


# ---- rows that were measured before


def test_an_interrupted_run_goes_on_where_it_was(equip: Equip, environment: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    args = ("--policy", "streaming,h2o", "--budget", 64, "-n", 100, *QUICK, "--json")
    whole = equip("eval", *args)
    process = stopped_at_the_third("raise KeyboardInterrupt", environment, *args, "--save", file)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and len(json.loads(out)) == 2
    assert len(file.read_text().splitlines()) == 2
    with file.open("a") as torn:
        torn.write('{"measured": {"mod')  # killed while it wrote
    again = equip("eval", *args, "--save", file)
    assert "2 of 5 rows are in" in again.stderr
    assert records_of(again) == records_of(whole)
    third = equip("eval", *args, "--save", file)
    assert "5 of 5 rows are in" in third.stderr and third.stdout == again.stdout
    # other numbers are other rows
    others: tuple[tuple[str, int], ...] = (("-n", 101), ("--chunk", 2), ("--seed", 3), ("--budget", 65))
    for other in others:
        found = equip("eval", *args, *other, "--save", file)
        # at another budget the full cache is the same row
        assert found.returncode == 0, found.stderr
        assert re.findall(r"\d of 5 rows are in", found.stderr) == (
            ["1 of 5 rows are in"] if "--budget" in other else []
        )


@pytest.mark.parametrize(
    "content",
    [b"a poem\nof two lines\n", b"half a poem", b'{"measured": 1}\n{}\n', b"\xff\xfe\n", b"\xff", b"[]"],
)  # fmt: skip
def test_a_file_of_something_else_is_not_written_to(equip: Equip, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    found = equip("eval", "--policy", "streaming", "--budget", 64, "-n", 100, *QUICK, "--save", file)
    assert found.returncode == 2 and "does not hold" in found.stderr.strip().splitlines()[-1]
    assert file.read_bytes() == content
    folder = equip("eval", "--policy", "streaming", "--budget", 64, "-n", 100, *QUICK, "--save", tmp_path)
    assert folder.returncode == 2 and "cannot be used" in folder.stderr


# ---- Ctrl-C

STOPS_AT_THE_THIRD = """
import sys
from equip_cli import cli
from equip_cli.core import errors
from equip_cli.evaluation import quality
measure, n = quality.log_losses, 0

def log_losses(session, tokens, *rest):
    global n
    n += 1
    if n == 3:
        print("third", file=sys.stderr, flush=True)
        {what}
    return measure(session, tokens, *rest)

quality.log_losses = log_losses
sys.exit(cli.main(sys.argv[1:]))
"""


def stopped_at_the_third(what: str, environment: dict[str, str], *args: object) -> subprocess.Popen[str]:
    """`equip eval` in which the third row comes to nothing; it has begun when this returns."""
    process = subprocess.Popen(
        [sys.executable, "-c", STOPS_AT_THE_THIRD.format(what=what), "eval", *map(str, args)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        # a background job hands an ignored SIGINT on to its children
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) if os.name != "nt" else None,
    )
    assert process.stderr is not None
    line = b""
    while b"third" not in line or not line.endswith(b"\n"):
        # byte by byte: what a buffered reader has taken is lost to communicate()
        byte = os.read(process.stderr.fileno(), 1)
        assert byte, "ended before the third row"
        line = byte if line.endswith(b"\n") else line + byte
    return process


@POSIX
@pytest.mark.parametrize("as_json", [False, True])
def test_interrupt_prints_the_rows_that_are_done(environment: dict[str, str], tmp_path: Path, as_json: bool) -> None:
    plot = tmp_path / "plot.svg"
    args = ("--policy", "h2o", "--budget", 64, "-n", 100, *QUICK, "--plot", plot, *(["--json"] if as_json else []))
    process = stopped_at_the_third("tokens = list(tokens) * 10000", environment, *args)
    try:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    if as_json:
        records = json.loads(out)
        jsonschema.validate(records, SCHEMA)
        assert [r["policy"] for r in records] == ["none", "random"]
    else:
        assert first_column(out) == ["none, 1024", "random, 64"]
    assert "stopped after 2 of 4 rows; missing: window only, 64, cache; h2o, " in err
    assert "the plot" in err and "Traceback" not in err
    assert not list(tmp_path.glob("*plot*"))


def test_a_failure_prints_the_rows_that_are_done(environment: dict[str, str]) -> None:
    args = ("--policy", "streaming", "--budget", 64, "-n", 100, *QUICK, "--json")
    what = 'raise errors.BackendError("the device is gone: start again")'
    process = stopped_at_the_third(what, environment, *args)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert [r["policy"] for r in json.loads(out)] == ["none", "random"]
    assert err.splitlines()[-1] == "error: the device is gone: start again"


# ---- refusals

SMALL = ["--policy", "streaming", "--budget", "64"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--policy", "h3o"], "there is no policy"),
        (["--policy", ","], "--policy is ','"),
        (["-n", "0", "--dialogues", "0"], "nothing to measure"),
        (["--policy", "streaming", "--budget", "many"], "--budget is 'many'"),
        (["--policy", "streaming", "--positions", "cache,nearest"], "no positions 'nearest'"),
        (["--policy", "streaming", "--update", "sideways"], "no update 'sideways'"),
        (["--policy", "streaming", "--update", "shift", "--positions", "true"], "use --positions cache"),
        (["--policy", "streaming", "--rotate-every", "0"], "--rotate-every is 0"),
        (["-f", "no-such-file"], "cannot be read"),
        (["-n", "-1"], "-n is -1: give a whole number from 0"),
        (["--chunk", "0"], "--chunk is 0: give a whole number from 1"),
        (["--chunk", "99", "-ub", "64"], "--chunk is 99 and -ub 64"),
        ([*SMALL, "--chunk", "99", "-b", "32"], "a chunk of this cache holds 32 tokens"),
        (
            [*SMALL, "-n", "64"],
            "-n is 64 and the budget is 64, so nothing would be evicted: raise -n, or give a smaller",
        ),
        (
            ["--policy", "streaming", "--budget", "90000"],
            "the budget is 90000, so nothing would be evicted: give a longer",
        ),
        ([*SMALL, "--text", "short.txt"], "the text has 4 tokens and the budget is 64, so nothing would be evicted"),
        ([*SMALL, "--text", "short.txt", "-n", "0", "--agreement"], "the text has 4 tokens and the budget is 64"),
        (["--text", "empty.txt"], "less than two tokens"),
        (["-ctk", "q7"], "no cache type 'q7'"),
        (["-ctk", ","], "-ctk is ','"),
        (["-ctk", "f16,q8_0,q4_0", "-ctv", "f16,q8_0"], "give as many of both, or one that goes with all"),
        (["--passkey-depths", "0,2"], "--passkey-depths is '0,2'"),
        (["--passkey-depths", "low"], "--passkey-depths is 'low'"),
        (["--passkey-length", "long"], "--passkey-length is 'long'"),
        (["--passkey-length", "20"], "too short for the task"),
        (["--passkey-trials", "0"], "--passkey-trials"),
        (["--seed", "-1"], "--seed is -1: give a whole number from 0"),
        (["--plot", "-", "--json"], "both write to stdout"),
        (["--plot", "no-such-folder/plot.png"], "no-such-folder does not exist"),
        (["--plot", "plot.gif"], ".png or .svg"),
        ([*SMALL, "--keep-map", "-"], "--keep-map is '-'"),
        ([*SMALL, "--keep-map", "no-such-folder/kept.png"], "no-such-folder does not exist"),
        ([*SMALL, "--keep-map", "a.png", "--plot", "a.png"], "give two files"),
        (["--keep-map", "kept.png"], "--keep-map needs a policy that evicts"),
        ([*SMALL, "--keep-map", "kept.png", "-n", "0", "--dialogues", "0", "--plot", "-"], "nothing to plot"),
    ],
)
def test_what_is_refused_is_one_sentence_and_writes_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    sentence: str,
) -> None:
    monkeypatch.delenv("LLAMA_KV_POLICY", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("hello there")
    Path("empty.txt").write_text("")
    code = cli.main(["eval", *args])
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert out == ""
    assert len(errors) == 1, err
    assert sentence in errors[0]
    assert {path.name for path in tmp_path.rglob("*")} == {"short.txt", "empty.txt"}


@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_folder_that_cannot_be_written_to_is_named_first(equip: Equip, tmp_path: Path) -> None:
    folder = tmp_path / "shut"
    folder.mkdir(mode=0o555)
    result = equip("eval", "-n", 20, *QUICK, "--plot", folder / "plot.svg")
    assert (result.returncode, result.stdout) == (2, "")
    assert "cannot be written to" in result.stderr


def test_without_a_chat_template_recall_is_left_out(equip: Equip, tmp_path: Path) -> None:
    path = tmp_path / "bare.gguf"
    path.write_bytes(embedded.MODEL.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_templatf"))
    asked = equip("eval", path, "-n", 20, "--dialogues", 4, "-t", 1)
    assert (asked.returncode, asked.stdout) == (1, "")
    assert "needs a chat template" in asked.stderr
    result = equip("eval", path, "-n", 20, "-t", 1, "--json")
    [record] = records_of(result)
    assert record["recall"] == {} and record["ppl"] is not None
    assert "warning: not measured: recall needs a chat template" in result.stderr
