"""`equip bench`: what is measured, in which order, what it is compared with, and what it refuses; what it asks of the library."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from native_api import library_folder
from places import REPOSITORY

from equip_cli import BackendError, CachePolicy, Model, UnsupportedModelError, UsageError, benchmark, cli
from equip_cli.benchmark import jobs, libraries, modes, records, summary
from equip_cli.benchmark.jobs import Request, Table
from equip_cli.benchmark.rows import Row, Settings
from equip_cli.commands.setup import presets
from equip_cli.core.errors import RewindError
from equip_cli.models import embedded, random_gguf

SCHEMA = json.loads((REPOSITORY / "docs" / "schemas" / "bench.json").read_text())
POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
F32 = {"type_k": "f32", "type_v": "f32", "flash_attn": "off", "n_threads": 1}

Bench = Callable[..., "tuple[str, str]"]


@pytest.fixture
def bench(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """bench(*args, code=0): stdout and stderr of `equip bench` on one thread."""
    monkeypatch.delenv("LLAMA_KV_POLICY", raising=False)
    monkeypatch.setenv("EQUIP_CACHE_DIR", str(tmp_path))

    def run(*args: object, code: int = 0) -> tuple[str, str]:
        capfd.readouterr()
        found = cli.main(["bench", "-t", "1", *map(str, args)])
        out, err = capfd.readouterr()
        assert found == code, err
        return out, err

    return run


def valid(text: str) -> list[dict[str, Any]]:
    """JSON that the schema of the repository allows."""
    found: list[dict[str, Any]] = json.loads(text)
    jsonschema.validate(found, SCHEMA)
    return found


# ---- the library: context shift, copied rows, RoPE kernels, chunks that are scored


def test_context_shift_drops_half_of_what_follows_the_sinks(model: Model, prose: list[int]) -> None:
    policy = CachePolicy("none", sinks=4, update="context-shift")
    with model.session(policy, n_ctx=256, **F32) as session:
        session.eval(prose[:256])
        assert session.stats()["n_evicted"] == 0
        session.eval(prose[256:257])
        n_gone = (256 - 4) // 2
        positions = [position for position, _ in session.kept()]
        assert positions == [0, 1, 2, 3, *range(4 + n_gone, 257)]
        stats = session.stats()
        assert (stats["update"], stats["n_evicted"], stats["n_used"], stats["n_past"]) == (
            "context-shift", n_gone, 257 - n_gone, 257,
        )  # fmt: skip
        with pytest.raises(RewindError):
            session.rewind(256)
        session.eval(prose[257:1200])  # chunks as large as the whole cache, and many shifts
        assert session.stats()["n_past"] == 1200 and session.stats()["n_used"] <= 256
        assert np.isfinite(session.logits()).all()
        assert session.rewind(0) == "exact"
        again = session.eval(prose[:100])
        assert again == 100 and session.stats()["n_evicted"] == 0
        shifted = session.logits()
    with model.session(CachePolicy("none"), n_ctx=256, **F32) as plain:
        plain.eval(prose[:100])
        assert np.array_equal(plain.logits(), shifted)


def test_context_shift_rotates_what_stays(model: Model, prose: list[int]) -> None:
    """By llama.cpp's own calls: as near to a cache that evicted the same tokens in place, with ranks, as float32 allows."""
    n_gone, keep = 126, 4
    with model.session(CachePolicy("none", sinks=keep, update="context-shift"), n_ctx=256, **F32) as session:
        session.eval(prose[:257])
        shifted = session.logits()
        kept = [position for position, _ in session.kept()]
    with model.session(CachePolicy("streaming", 130, keep, update="gather"), n_ubatch=256, **F32) as reference:
        reference.eval(prose[:256])
        assert len(reference.kept()) == 130
        reference.eval(prose[256:257])
        # the same sinks and newest tokens but one: 131 are visible to the shifted one's query, 130 to this
        assert [p for p, _ in reference.kept()] == [p for p in kept if p != keep + n_gone]
        logits = reference.logits()
    spread = shifted.max() - shifted.min()
    assert 1e-7 < np.abs(shifted - logits).max() / spread < 0.05
    assert int(shifted.argmax()) == int(logits.argmax())


def test_context_shift_is_for_the_policy_none(model: Model) -> None:
    with pytest.raises(UsageError, match="evicts nothing"):
        CachePolicy("none", update="gather")
    with pytest.raises(UsageError, match="keeps less"):
        model.session(CachePolicy("none", sinks=300, update="context-shift"), n_ctx=256)


@pytest.mark.parametrize("flash_attn", ["on", "off"])
def test_filled_rows_are_copies(model: Model, prose: list[int], flash_attn: str) -> None:
    with model.session(CachePolicy("none"), n_ctx=1024, flash_attn=flash_attn, n_threads=1) as session:
        session.eval(prose[:192])
        before = session.save_bytes()
        session.fill(320)
        assert session.stats()["n_past"] == 512
        assert session.kept() == [(i, i) for i in range(512)]
        with pytest.raises(UsageError):
            session.logits()
        after = session.save_bytes()
        # 48 bytes from anywhere within the rows are there three times: 192 + 192 + 128 rows
        rng = np.random.default_rng(1)
        windows = [before[i : i + 48] for i in rng.integers(16 * 192 + 200, len(before) - 48, 40)]
        counts = [after.count(window) / before.count(window) for window in windows]
        assert sum(2 <= count <= 3 for count in counts) >= 36, counts
        session.eval(prose[512:520])
        assert np.isfinite(session.logits()).all()
        for n in (505, 100000):
            with pytest.raises(UnsupportedModelError, match="read tokens instead"):
                session.fill(n)
        assert session.stats()["n_past"] == 520
    with model.session(CachePolicy("streaming", 128)) as bounded:
        bounded.eval(prose[:64])
        with pytest.raises(UnsupportedModelError):
            bounded.fill(8)


@pytest.mark.parametrize("type_k", ["f16", "f32"])
def test_upstreams_rope_kernel_gives_the_same_bits(model: Model, prose: list[int], type_k: str) -> None:
    """Shifts of one and of several tokens, with the kernel of patch 0010 and without."""
    found = []
    for upstream in (False, True):
        options = {"type_k": type_k, "flash_attn": "on", "n_threads": 1, "rope_upstream": upstream}
        with model.session(CachePolicy("streaming", 64, update="shift"), **options) as session:
            assert session.stats()["rope_kernel"] == ("upstream" if upstream else "cached")
            session.eval(prose[:100])
            for token in prose[100:140]:
                session.eval([token])
            found.append(session.logits())
    ours, upstreams = found
    assert np.array_equal(ours, upstreams)


@pytest.mark.parametrize("policy", [CachePolicy("none"), CachePolicy("streaming", 64)], ids=["none", "streaming"])
def test_a_chunk_is_scored_token_by_token(model: Model, prose: list[int], policy: CachePolicy) -> None:
    tokens = prose[:200]
    with model.session(policy, n_ctx=256, n_outputs=16, n_ubatch=16, **F32) as session:
        session.eval(tokens[:1])
        chunked = session.nll(tokens[1:], chunk=16)
        with pytest.raises(UsageError, match="n_outputs"):
            session.nll(tokens, chunk=17)
    with model.session(policy, n_ctx=256, n_ubatch=16, **F32) as session:
        session.eval(tokens[:1])
        stepped = session.nll(tokens[1:])
        with pytest.raises(UsageError, match="n_outputs"):
            session.nll(tokens, chunk=2)
    n_same = 63 if policy.name == "streaming" else 199  # a chunk sees the budget and itself
    assert chunked[:n_same] == pytest.approx(stepped[:n_same], abs=5e-3)  # f16 weights: products of other shapes
    if policy.name == "streaming":
        assert max(abs(a - b) for a, b in zip(chunked[64:], stepped[64:], strict=True)) > 2e-2


# ---- what a row is compared with


def row(policy: CachePolicy, samples: list[int], fa: str = "on", kernel: str = "upstream", **stats: Any) -> Row:
    made = Row(policy, fa, 1024, samples_ns=samples)
    made.stats = {"update": policy.update or "inplace", "scope": policy.scope or "token", "positions": "cache"}
    made.stats |= {"attn_kernel": kernel, **stats}
    return made


def test_a_kernel_of_ours_is_compared_twice() -> None:
    none = CachePolicy("none")
    stock_on, stock_off = row(none, [40, 40, 40]), row(none, [30, 30, 30], "off")
    ours = row(none, [20, 20, 20], "auto", "equip")
    bounded = row(CachePolicy("h2o", 1024), [22, 22, 22], "on", "equip")
    rows = [stock_on, stock_off, ours, bounded]
    assert benchmark.baseline_of(bounded, rows) is ours  # the effect of the method
    others = records._other_baselines(bounded, rows)
    assert others["ratio_vs_stock"] is stock_off  # what a user gains
    assert others["ratio_vs_same_fa"] is None
    # with one kernel on both sides there is one ratio, and the one with the same flash attention
    bounded.stats["attn_kernel"] = "upstream-fa"
    assert benchmark.baseline_of(bounded, rows) is stock_off
    others = records._other_baselines(bounded, rows)
    assert others["ratio_vs_stock"] is None and others["ratio_vs_same_fa"] is stock_on


def test_a_baseline_is_compared_with_the_fastest_in_place() -> None:
    slow, fast = (row(CachePolicy("streaming", 1024), [n] * 3, fa) for n, fa in ((20, "on"), (10, "off")))
    gather = row(CachePolicy("streaming", 1024, update="gather"), [30, 30, 60])
    none = row(CachePolicy("none"), [15] * 3)
    other = row(CachePolicy("random", 1024), [1] * 3)
    rows = [none, slow, fast, gather, other]
    assert records._other_baselines(gather, rows)["ratio_vs_inplace"] is fast
    assert records._other_baselines(none, rows)["ratio_vs_inplace"] is None
    assert records._ratio(gather, fast) == {
        "baseline": "streaming, fa off", "time_ratio_median": 3.0, "ci95": [3.0, 6.0], "n_pairs": 3,
    }  # fmt: skip
    prompt = Row(CachePolicy("none"), "on", 0, "pp", 512, 0, samples_ns=[1])
    prompt.stats = none.stats
    assert benchmark.baseline_of(gather, [*rows, prompt]) is none  # not one of another test


def test_percentiles_are_samples() -> None:
    assert benchmark.percentiles([]) is None
    steps = [1000 * n for n in range(100, 0, -1)]
    assert benchmark.percentiles(steps) == {"p50": 50, "p95": 95, "p99": 99, "max": 100, "n": 100}
    assert benchmark.percentiles([7000]) == {"p50": 7, "p95": 7, "p99": 7, "max": 7, "n": 1}


def test_names_are_llama_benchs() -> None:
    none = CachePolicy("none")
    assert Row(none, "on", 0, "pp", 512, 0).test == "pp512"
    assert Row(none, "on", 4096, "pp", 512, 0).test == "pp512 @ d4096"
    assert Row(none, "on", 4096, n_gen=128).test == "tg128 @ d4096"
    assert Row(none, "on", 1024, "latency", 0, 256).test == "lat256 @ d1024"


def test_a_sample_of_a_context_shift_holds_its_share_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cycle of 508 tokens at a size of 1024; the step with the shift takes 9 ms, plain ones 1 ms."""
    from equip_cli.benchmark import measure

    class Fake:
        model = None
        n_used, n_ctx = 700, 1024

        def stats(self) -> dict[str, int]:
            return {"n_ctx": self.n_ctx, "n_used": self.n_used}

        def eval(self, tokens: list[int]) -> None:
            self.n_used += len(tokens)
            assert self.n_used <= self.n_ctx

        def time_decode(self, n: int, rewind: bool = False) -> tuple[list[int], list[int]]:
            steps = []
            for _ in range(n):
                shifts = self.n_used == self.n_ctx
                self.n_used = (4 + 510 if shifts else self.n_used) + 1
                steps.append(9_000_000 if shifts else 1_000_000)
            return steps, [0] * n

    monkeypatch.setattr(measure, "filler", lambda model, n: [0] * n)
    made = Row(CachePolicy("none", 1024, update="context-shift"), "on", 1024, n_gen=32)
    for phase in (0.1, 0.5, 0.9):
        measure.sample(Fake(), made, phase)  # type: ignore[arg-type]
    assert made.cycle == 1024 - 514
    assert made.shift_ns == [8_000_000] * 3
    assert made.samples_ns == [32_000_000 + round(8_000_000 * 32 / 510)] * 3


# ---- what a request is cut into


def test_a_request_has_a_table_per_test() -> None:
    streaming = [CachePolicy("streaming", budget) for budget in (64, 128)]
    shift = CachePolicy("none", 64, update="context-shift")
    request = Request(
        [CachePolicy("none"), shift, *streaming], [64, 128], ["on", "off"], [Settings(type_v="q8_0")],
        n_prompts=[32], n_gens=[8, 16], upto=512, ttft=[2], latency=40,
    )  # fmt: skip
    made = list(jobs.jobs(request))
    assert [(job.kind, job.rows[0].test if job.rows else job.upto) for job in made] == [
        ("pp", "pp32"), ("tg", "tg8 @ d64"), ("tg", "tg16 @ d64"), ("latency", "lat40 @ d64"), ("ttft", "ttft128"),
        ("pp", "pp32"), ("tg", "tg8 @ d128"), ("tg", "tg16 @ d128"), ("latency", "lat40 @ d128"), ("ttft", "ttft256"),
        ("growth", 512),
    ]  # fmt: skip
    # quantised values need flash attention; a context shift has no prompt of its own
    assert [r.label for r in made[0].rows] == ["none, fa on", "none, fa off", "streaming, fa on"]
    assert [r.label for r in made[1].rows] == [
        "none, fa on", "none, fa off", "none, our kernel, fa on", "none, context-shift, fa on", "none, context-shift, fa off",
        "streaming, fa on",
    ]  # fmt: skip
    assert all(job.work() > 0 for job in made)


def test_shift_runs_with_both_rope_kernels() -> None:
    settings = Settings(shift_rope=("upstream", "cached"))
    rows = benchmark.plan([CachePolicy("streaming", 64, update="shift")], ["on"], settings, 64)
    assert [(r.rope_upstream, r.label) for r in rows] == [
        (True, "streaming, shift, fa on"), (False, "streaming, shift, cached rotation, fa on"),
    ]  # fmt: skip


def test_lanes_have_a_cache_that_they_share_and_one_each() -> None:
    policies = [
        CachePolicy("none"),
        CachePolicy("streaming", budget=64),
        CachePolicy("h2o", budget=64, update="gather"),
    ]
    request = Request(policies, [64], ["on"], [Settings()], n_gens=[8], lanes=[1, 4], pool=512)
    one, four = jobs.jobs(request)
    rows = [(row.policy.name, row.flash_attn, row.cpu_attn, row.sharing, row.policy.pool) for row in four.rows]
    stock = [("none", fa, False, sharing, None) for fa in ("on", "off") for sharing in ("unified", "streams")]
    ours = [("none", "on", True, sharing, None) for sharing in ("unified", "streams")]
    assert rows == [*stock, *ours, ("streaming", "on", None, "pool", 512), ("streaming", "on", None, "streams", None)]
    assert {row.test for row in four.rows} == {"tg8 x 4 @ d64"} and four.rows[0].n_tokens == 32
    assert [row.sharing for row in one.rows] == ["unified"] * 3 + ["pool"]
    assert len({id(row.samples_ns) for row in four.rows}) == len(four.rows)
    [alone] = jobs.jobs(Request(policies[:2], [64], ["on"], [Settings()], n_gens=[8]))
    assert {row.sharing for row in alone.rows} == {"alone"}


def test_lengths_double_up_to_the_last() -> None:
    assert modes.lengths(256) == [256]
    assert modes.lengths(1000) == [256, 512, 1000]
    assert modes.lengths(32768)[-2:] == [16384, 32768]


# ---- what the records come to


def grown(policy: str, length: int, ns: int, budget: int = 256) -> dict[str, Any]:
    return {
        "kind": "growth", "policy": policy, "scope": "token", "positions": "cache", "budget": budget, "type_k": "f16",
        "type_v": "f16", "n_threads": 1, "attn_kernel": "upstream", "n_depth": length, "n_gen": 2, "samples_ns": [2 * ns] * 3,
    }  # fmt: skip


def test_crossing_and_speedup_of_a_growing_sequence() -> None:
    found = [grown("none", n, ns) for n, ns in ((256, 10), (512, 14), (1024, 22))]
    found += [grown("none", n, 100) for n in (256, 512, 1024)]  # the slower flash attention
    found += [grown("streaming", n, 12) for n in (256, 512, 1024)]
    (row,) = summary.growth(found)
    assert row["crossing_tokens"] == 384  # half way from 10 to 14
    assert row["speedup_at_end"] == pytest.approx(22 / 12)
    none = 256 * 10 + 256 * 12 + 512 * 18
    streaming = 256 * (10 + 12) / 2 + 768 * 12
    assert row["speedup"] == pytest.approx(none / streaming)
    assert summary.growth([each for each in found if each["policy"] == "none"]) == []
    never = [*found[:3], *(grown("streaming", n, 50) for n in (256, 512, 1024))]
    assert summary.growth(never)[0]["crossing_tokens"] is None


def test_the_paper_is_compared_by_geometric_means() -> None:
    def tg(policy: str, update: str, budget: int, ratio: float, ns: int, rope: str = "none") -> dict[str, Any]:
        return grown(policy, budget, ns, budget) | {
            "kind": "tg", "test": f"tg2 @ d{budget}", "update": update, "rope_kernel": rope, "flash_attn": "on", "avg_ns": ns,
            "ratio_vs": {"baseline": "none, fa on", "time_ratio_median": 9.0, "ci95": [9, 9], "n_pairs": 3},
            "ratio_vs_inplace": {"time_ratio_median": ratio, "ci95": [ratio, ratio]},
        }  # fmt: skip

    found = [
        tg("streaming", "shift", 512, 8.0, 80, "upstream"), tg("streaming", "shift", 512, 3.0, 30, "cached"),
        tg("streaming", "gather", 512, 2.0, 20), tg("streaming", "shift", 1024, 8.0, 80, "upstream"),
        tg("streaming", "shift", 1024, 4.5, 45, "cached"), tg("streaming", "gather", 1024, 9.0, 90),
        tg("h2o", "gather", 512, 1.5, 15),
    ]  # fmt: skip
    rows = {(r["test"], r["baseline"]): r for r in summary.paper(found)}
    assert rows["StreamingLLM", "shift"]["speedup"] == pytest.approx(8.0)
    assert rows["StreamingLLM", "shift, cached rotation"]["speedup"] == pytest.approx((3 * 4.5) ** 0.5)
    assert rows["StreamingLLM", "the fastest of them"]["speedup"] == pytest.approx((2 * 4.5) ** 0.5)
    assert (rows["StreamingLLM", "gather"]["paper_cpu"], rows["StreamingLLM", "gather"]["paper_gpu"]) == (1.62, 1.47)
    assert rows["H2O", "gather"]["speedup"] == pytest.approx(1.5)
    paged = rows["long generation, paged attention", "none"]
    assert (paged["speedup"], paged["note"]) == (None, "with --lanes")


# ---- the command


def test_everything_at_once_is_valid(bench: Bench) -> None:
    args = ("--policy", "none,streaming,h2o", "--budget", "64,128", "--update", "context-shift,shift,gather,inplace")
    tests = (
        "-p",
        32,
        "-n",
        4,
        "-r",
        2,
        "--upto",
        512,
        "--ttft",
        "1,2",
        "--latency",
        16,
        "--shift-rope",
        "upstream,cached",
    )
    out, err = bench(*args, *tests, "-fa", "on", "-o", "json")
    found = valid(out)
    measured = [r for r in found if "samples_ns" in r]
    assert {r["kind"] for r in found} == {"pp", "tg", "ttft", "latency", "growth", "summary"}
    # every sample of the command has its own number, and rows of a table take turns
    order = sorted(n for r in measured for n in r["sample_order"])
    assert order == list(range(len(order)))
    table = [r for r in measured if r["test"] == "tg4 @ d64"]
    first = table[0]["sample_order"][0]
    assert [r["sample_order"] for r in table] == [[first + i, first + i + len(table)] for i in range(len(table))]
    assert {(r["policy"], r["update"], r["rope_kernel"]) for r in table} == {
        ("none", "none", "none"), ("none", "context-shift", "none"), ("streaming", "shift", "upstream"),
        ("streaming", "shift", "cached"), ("streaming", "gather", "none"), ("streaming", "inplace", "none"),
        ("h2o", "gather", "none"), ("h2o", "inplace", "none"),
    }  # fmt: skip
    for r in measured:
        stock = {"on": "upstream-fa", "off": "upstream"}[r["flash_attn"]]
        assert r["attn_kernel"] == stock or (r["attn_kernel"], r["flash_attn"]) == ("equip-cpu", "on")
        assert r["attn_kernel"] == stock or r["policy"] != "none" or r["update"] == "none"
        assert len(r["samples_ns"]) == {"latency": 1}.get(r["kind"], 2)
        assert (r["ratio_vs"] is None) == (r["kind"] == "latency" or r["policy"] == "none" and r["ratio_vs"] is None)
    assert all(len(r["steps_us"]) == 16 for r in measured if r["kind"] == "latency")
    by_length = [(r["policy"], r["n_depth"], r["fill"], r["n_gen"]) for r in measured if r["kind"] == "growth"]
    assert by_length.count(("none", 512, "copied", 4)) == 3 and by_length.count(("streaming", 512, "read", 4)) == 2
    sizes = {r["n_depth"]: r["kv_bytes"] for r in measured if r["kind"] == "growth" and r["policy"] == "none"}
    assert sizes[512] == 2 * sizes[256]
    assert "h2o has no update shift" in err


def test_compare_adds_the_baselines(bench: Bench) -> None:
    out, _ = bench("--compare", "--policy", "streaming", "--budget", 64, "-n", 2, "-r", 2, "-o", "json")
    measured = [r for r in valid(out) if r["kind"] == "tg"]
    assert [(r["policy"], r["update"]) for r in measured] == [
        *[("none", "none")] * 3, *[("none", "context-shift")] * 2,
        *[("streaming", update) for update in ("shift", "gather", "inplace") for _ in ("on", "off")],
    ]  # fmt: skip
    assert {r["flash_attn"] for r in measured if r["update"] == "gather"} == {"on", "off"}  # the faster one counts
    assert all(r["ratio_vs_inplace"] for r in measured if r["update"] in ("shift", "gather", "context-shift"))
    ways = [r for r in valid(out) if r["kind"] == "summary"]
    assert sorted(r["baseline"] for r in ways) == ["gather", "shift"] and sum(r["fastest"] for r in ways) == 1


def test_lanes_are_measured(bench: Bench) -> None:
    args = ("--policy", "none,streaming", "--lanes", "3", "--budget", 64, "-n", 4, "-r", 2, "-fa", "on")
    found = valid(bench(*args, "--pool", 640, "-o", "json")[0])
    assert [(r["policy"], r["sharing"]) for r in found if r["flash_attn"] == "on"][-2:] == [
        ("streaming", "pool"),
        ("streaming", "streams"),
    ]
    for each in found:
        assert (each["lanes"], each["n_gen"], each["test"], each["kind"]) == (3, 4, "tg4 x 3 @ d64", "tg")
        assert each["samples_ts"][0] == pytest.approx(12e9 / each["samples_ns"][0])
        assert each["ratio_vs"] is None or "none" in each["ratio_vs"]["baseline"]
        assert (each["ratio_vs_streams"] is not None) == (each["sharing"] == "pool")
        assert each["graphs_reused"] > 0
    pool = next(each for each in found if each["sharing"] == "pool")
    assert (pool["pool"], pool["budget"]) == (640, 64)
    # bounded caches that are not full are held at their depth
    deep = valid(bench(*args, "-d", 16, "-o", "json")[0])
    assert {each["test"] for each in deep} == {"tg4 x 3 @ d16"}
    table = bench(*args)[0]
    assert "per lane" in table and "one each" in table and "/ streams" in table
    grown = valid(
        bench(
            "--policy",
            "none,streaming",
            "--lanes",
            "2",
            "--budget",
            64,
            "--upto",
            256,
            "-n",
            2,
            "-r",
            1,
            "-fa",
            "on",
            "-o",
            "json",
        )[0]
    )
    assert {each["sharing"] for each in grown if each["kind"] == "summary"} == {"pool", "streams"}
    assert all(each["fill"] == "copied" for each in grown if each["kind"] == "growth" and each["policy"] == "none")


def test_pages_have_the_papers_third_row() -> None:
    def grown(policy: str, sharing: str, n_depth: int, ns: int) -> dict[str, Any]:
        return {
            "kind": "growth", "policy": policy, "scope": "token", "positions": "cache", "budget": 64, "type_k": "f16", "type_v": "f16",
            "n_threads": 1, "lanes": 4, "sharing": sharing, "n_depth": n_depth, "n_gen": 1, "samples_ns": [ns], "attn_kernel": "upstream",
        }  # fmt: skip

    found = [
        grown("none", "unified", 256, 200), grown("none", "streams", 256, 100), grown("none", "streams", 512, 300),
        grown("h2o", "pool", 256, 50), grown("h2o", "pool", 512, 50), grown("h2o", "streams", 256, 25), grown("h2o", "streams", 512, 25),
    ]  # fmt: skip
    rows = summary.growth(found)
    assert [(row["sharing"], row["test"], row["speedup_at_end"]) for row in rows] == [
        ("pool", "generate 512 x 4", 6.0),
        ("streams", "generate 512 x 4", 12.0),
    ]
    paged = [row for row in summary.paper(found) if row["paper_cpu"] == 4.18]
    assert len(paged) == 1 and paged[0]["speedup"] == pytest.approx(rows[0]["speedup"])
    assert "512 x 4 tokens" in paged[0]["test"] and "none" in paged[0]["baseline"]


def test_sweeps_measure_every_combination(bench: Bench) -> None:
    sweeps = ("-n", "2,3", "-d", "32,64", "-ctk", "f16,q8_0", "-ub", "32,64", "--no-warmup")
    out, err = bench("--policy", "none", *sweeps, "-r", 1, "-o", "jsonl")
    found = [json.loads(line) for line in out.splitlines()]
    jsonschema.validate(found, SCHEMA)
    assert {(r["n_gen"], r["n_depth"], r["type_k"], r["n_ubatch"]) for r in found} == {
        (n, d, k, ub) for n in (2, 3) for d in (32, 64) for k in ("f16", "q8_0") for ub in (32, 64)
    }
    assert "warning" not in err


def test_default_tests_are_llama_benchs(bench: Bench) -> None:
    assert [r["test"] for r in valid(bench("-r", 1, "--budget", 128, "-o", "json")[0])] == [
        *["pp512"] * 2, *["tg128 @ d128"] * 2,
    ]  # fmt: skip
    assert [r["test"] for r in valid(bench("-p", 16, "-r", 1, "-o", "json")[0])] == ["pp16"] * 2
    assert [r["test"] for r in valid(bench("-p", "0", "-n", 2, "-d", 16, "-r", 1, "-o", "json")[0])] == [
        "tg2 @ d16"
    ] * 2


def test_prompts_are_measured_after_a_depth(bench: Bench) -> None:
    out, _ = bench("--policy", "none,streaming", "--budget", 64, "-p", 32, "-d", 64, "-r", 2, "-fa", "on", "-o", "json")
    assert {(r["policy"], r["test"]) for r in valid(out)} == {("none", "pp32 @ d64"), ("streaming", "pp32 @ d64")}


def test_markdown_has_a_table_per_test_and_csv_a_line_per_row(bench: Bench) -> None:
    args = ("--policy", "none,streaming", "--budget", 64, "-n", 2, "-r", 2, "-fa", "on", "--upto", 256, "--latency", 8)
    out, _ = bench(*args)
    about, *paragraphs = out.split("\n\n")
    for words in ("model EQUIP tiny", "2.76 M parameters", "threads 1", "cache f16", "positions cache", "budget 64"):
        assert words in re.split(r" \|[ \n]", about.replace("\n", " ")), about
    tables = [each.splitlines() for each in paragraphs if each.startswith("|")]
    assert [[cell.strip() for cell in table[0].split("|")[1:-1]] for table in tables] == [
        ["policy", "fa", "t/s", "host us", "time / baseline", "/ stock llama.cpp"],
        ["policy", "fa", "p50, ms", "p95, ms", "p99, ms", "max, ms"],
        ["policy", "fa", "t/s", "process", "time / baseline", "/ stock llama.cpp"],
        ["policy", "budget", "faster than", "from, tokens", "times faster at 256", "for the whole text"],
    ]  # fmt: skip
    assert "test tg2 @ d64" in paragraphs and "test lat8 @ d64" in paragraphs
    assert "test tg2 | 256 tokens | growing caches filled: copied" in paragraphs
    assert re.match(r"\| streaming +\| +64 \| none, our kernel \| +(\d+|at no length) \|", tables[3][2])
    rows = list(csv.DictReader(io.StringIO(bench(*args, "-o", "csv")[0])))
    assert [(r["policy"], r["kind"]) for r in rows if r["kind"] == "growth"] == [("none", "growth")] * 3 + [
        ("streaming", "growth")
    ]
    for r in rows:
        assert float(r["avg_ts"]) > 0 and int(r["kv_bytes"]) > 0 and int(r["rss_bytes"]) > 1 << 20
    assert {"latency_us_p99", "ratio_vs_time_ratio_median", "ratio_vs_ci95"} <= set(rows[0])


@pytest.mark.parametrize("preset", list(presets.PRESETS))
def test_presets_take_other_options(bench: Bench, preset: str) -> None:
    less = (
        "--budget",
        64,
        "-n",
        2,
        "-r",
        1,
        "--upto",
        256,
        *(() if preset == "paper" else ("--latency", 8, "--ttft", 1)),
    )
    out, _ = bench("--preset", preset, *less, "-o", "json")
    found = valid(out)
    assert {"streaming", "h2o", "none"} <= {r["policy"] for r in found if r["kind"] == "tg"}
    assert ("paper" in {r["kind"] for r in found}) == (preset == "paper")
    text, _ = bench("--preset", preset, *less)
    assert ("with --lanes" in text) == (preset == "paper")
    assert max(map(len, text.splitlines())) <= 120  # 100, where a busy machine has not made the numbers longer
    assert "shift, cached" in text or preset == "quick"


def test_tables_fit_a_terminal(bench: Bench) -> None:
    """Nothing is lost: what is the same in all rows, or in all rows of a policy, is said above the table."""
    for args in ((), ("--compare", "--budget", 64), ("--policy", "none,streaming,h2o", "--budget", "64,128", "-p", 16)):
        text, _ = bench(*args, "-n", 2, "-r", 1)
        assert max(map(len, text.splitlines())) <= 110, (
            text
        )  # 100, where a busy machine has not made the numbers longer
    about = " ".join(text.partition("\n\n")[0].split())
    assert "streaming: scope token, positions cache | h2o: scope head, positions auto" in about
    assert "score queries all | evict every 1" in about
    # rows that were not measured in turns are not in one table
    tables = [each.splitlines()[2:] for each in text.split("\n\n") if each.startswith("| policy") and "t/s" in each]
    assert [len(table) for table in tables] == [6, 7] * 2


def test_a_figure_is_drawn_beside_the_table(bench: Bench, tmp_path: Path) -> None:
    args = ("--policy", "none,streaming", "--budget", "64,128", "-n", 2, "-r", 2, "-fa", "on", "--upto", 256)
    target = tmp_path / "speed.svg"
    out, _ = bench(*args, "--plot", target)
    assert out.startswith("model EQUIP tiny | ") and "streaming" in target.read_text()
    out, _ = bench(*args, "--plot", "-")
    assert len(out.splitlines()) > 40


@POSIX
def test_an_interrupt_prints_complete_tables(equip_bin: Path, tmp_path: Path) -> None:
    command = [
        str(equip_bin),
        "bench",
        "-t",
        "1",
        "-n",
        "2",
        "-r",
        "2",
        "-d",
        "32,64,100,128",
        "-o",
        "json",
        "--latency",
        "50000",
    ]
    process = subprocess.Popen(
        command,
        env=os.environ | {"EQUIP_CACHE_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a background job hands an ignored SIGINT on to its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"interrupted: the tables that were complete follow" in err
    assert [r["test"] for r in valid(out.decode())] == [
        f"tg2 @ d{d}" for d in (32, 64, 100, 128) for _ in ("on", "off")
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--preset", "slow"), "choose one of quick, full, paper"),
        (("--shape", "gpt-5"), "there is no shape 'gpt-5'"),
        (("-o", "xml"), "give md, csv, json or jsonl"),
        (("--plot", "/nowhere/at/all.png"), "/nowhere/at"),
        (("--plot", "speed.pdf"), ".png"),
        (("--upto", 100), "--upto is 100"),
        (("--upto", 512, "--policy", "streaming", "--budget", 1024), "at least the budget"),
        (("--ttft", "0"), "--ttft"),
        (("--fill", "magic"), "give copied or read"),
        (("-ctk", "f8"), "there is no cache type 'f8'"),
        (("-d", "0"), "-d is 0: give a whole number from 1"),
        (("-n", "two"), "-n is 'two'"),
        (("-n", "0"), "nothing to measure"),
        (("-n", "-1"), "-n is -1: give a whole number from 0"),
        (("--shift-rope", "fast"), "give upstream, cached or both"),
        (("--policy", "streaming", "--budget", 64, "--update", "context-shift,sideways"), "sideways"),
        (("--shape", "tiny,gpt-5"), "there is no shape 'gpt-5'"),
        (("--other-lib", "/nowhere/at/all"), "--other-lib is /nowhere/at/all, but there is no "),
        (("--from", "speed.json"), "no other options than -o and --plot"),
    ],
)
def test_what_is_refused_is_one_sentence_and_writes_nothing(
    bench: Bench, tmp_path: Path, args: tuple[object, ...], words: str
) -> None:
    out, err = bench(*args, code=2)
    assert out == "" and words in err and err.splitlines()[-1].startswith("error: ")
    assert list(tmp_path.rglob("*.gguf")) == []


def test_without_room_for_a_shape_nothing_is_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:

    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    _, err = bench("--shape", "smollm-135m", "-n", 2, code=1)
    assert "make room or set EQUIP_CACHE_DIR" in err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_part_of_an_interrupted_run_is_not_taken_for_the_file(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    folder.mkdir()
    name = f"tiny-q4_0-{random_gguf.GENERATION}.gguf"
    (folder / f".{name}.4711.part").write_bytes(b"GGUF, but not all of it")
    out, _ = bench("--shape", "tiny:q4_0", "-n", 2, "-d", 32, "-r", 1, "-o", "json")
    assert valid(out)[0]["model_type"] == "random-tiny"
    assert (folder / name).stat().st_size > 1 << 20


# ---- several shapes, several libraries, what was measured before


def test_shapes_are_measured_one_after_the_other(bench: Bench) -> None:
    args = ("--shape", "tiny:q4_0,tiny:q8_0", "--policy", "none,streaming", "--budget", 64, "-n", 2, "-r", 2)
    found = valid(bench(*args, "--upto", 256, "-o", "json")[0])
    files = [f"tiny-{kind}-{random_gguf.GENERATION}.gguf" for kind in ("q4_0", "q8_0")]
    measured = [r for r in found if "samples_ns" in r]
    assert [r["model_filename"] for r in measured] == [files[0]] * 10 + [files[1]] * 10
    assert sorted(n for r in measured for n in r["sample_order"]) == list(range(40))
    sums = [r for r in found if r["kind"] == "summary"]
    assert [(r["model_filename"], r["baseline"]) for r in sums] == [
        (file, baseline) for file in files for baseline in ("none, our kernel", "none")
    ]
    # a ratio between models would be no ratio of anything
    text = bench(*args)[0]
    assert [part.count("\nmodel random-tiny | ") for part in ("\n" + text).split("\n\nmodel ")] == [1, 0]


def test_what_several_models_come_to_is_told_apart() -> None:
    rows = [{"model_filename": name, "library": "installed", "n": n} for name, n in (("a", 1), ("b", 2), ("a", 3))]
    assert summary.of_each(rows, lambda own: [{"sum": sum(r["n"] for r in own)}]) == [
        {"sum": 4, "model_filename": "a"}, {"sum": 2, "model_filename": "b"},
    ]  # fmt: skip
    assert summary.of_each(rows[::2], lambda own: [{"n": len(own)}]) == [{"n": 2}]


@pytest.fixture
def other_library(tmp_path: Path) -> Path:
    """A second folder with the libraries."""
    folder = tmp_path / "other"
    folder.mkdir()
    for path in Path(library_folder()).iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@POSIX
def test_libraries_take_turns(bench: Bench, other_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_PAUSE", 0.0)
    measures = ("-n", 2, "-r", 3, "-fa", "on", "--latency", 20, "--upto", 256)
    args = ("--policy", "none,streaming", "--budget", 64, *measures, "--other-lib", other_library)
    found = valid(bench(*args, "-o", "json")[0])
    measured = [r for r in found if "samples_ns" in r]
    assert {r["kind"] for r in measured} == {"tg", "latency", "growth"}
    assert [r["library"] for r in measured] == ["installed", "other"] * (len(measured) // 2)
    assert sorted(n for r in measured for n in r["sample_order"]) == list(
        range(sum(len(r["sample_order"]) for r in measured))
    )
    for ours, other in zip(measured[::2], measured[1::2], strict=True):
        assert [ours[key] for key in ("test", "policy", "flash_attn", "attn_kernel", "n_depth")] == [
            other[key] for key in ("test", "policy", "flash_attn", "attn_kernel", "n_depth")
        ]
        assert [n + 1 for n in ours["sample_order"]] == other["sample_order"]  # one right after the other
        assert ours["ratio_vs_library"] is None
        if ours["kind"] == "latency":
            assert other["ratio_vs_library"] is None
        else:
            assert (other["ratio_vs_library"]["baseline"], other["ratio_vs_library"]["n_pairs"]) == ("installed", 3)
        # what else a row is compared with is of its own library
        assert (ours["ratio_vs"] is None or other["ratio_vs"] is None) or (
            ours["ratio_vs"]["baseline"] == other["ratio_vs"]["baseline"]
        )
    assert {r["library"] for r in found if r["kind"] == "summary"} == {"installed", "other"}
    folders = {r["library"]: r["library_path"] for r in measured}
    assert folders["other"] == str(other_library) != folders["installed"]
    text, _ = bench(*args)
    assert text.count(" time / installed |") == 2 and f"other = {other_library}" in text
    assert not any(str(other_library) in line for line in text.splitlines() if line.startswith("|"))


@POSIX
def test_a_library_that_does_not_load_is_named(bench: Bench, other_library: Path) -> None:
    """Which also tells that it is the other folder's library that the other process loads."""
    (other_library / "libequip.so").unlink(missing_ok=True)
    (other_library / "libequip.dylib").unlink(missing_ok=True)
    for name in ("libequip.so", "libequip.dylib"):
        (other_library / name).write_bytes(b"no library")
    out, err = bench("-n", 2, "--other-lib", other_library, code=1)
    assert out == "" and f"error: with the library {other_library}: " in err and "cannot be loaded" in err


def test_a_process_that_dies_is_an_error() -> None:
    request = Request([CachePolicy("none")], [64], ["on"], [Settings()], n_gens=[2])
    task = libraries.Task(embedded.MODEL, 0, request)
    context = multiprocessing.get_context("spawn")
    with libraries._Worker("mine", None, task, context) as worker:
        worker._process.kill()
        with pytest.raises(BackendError, match="the process that measured the library mine has ended"):
            worker.turn()


def test_rows_of_two_libraries_are_paired_by_what_they_are() -> None:
    def measured(
        label: str, samples: list[int], kind: str = "tg", test: str = "tg2 @ d64"
    ) -> tuple[str, dict[str, Any]]:
        return label, {"kind": kind, "test": test, "budget": 64, "samples_ns": samples, "sample_order": [0, 2]}

    # the other library lacks one row, has one more, and refuses a third
    mine = Table([measured("none", [10, 10]), measured("h2o", [20, 40])], [])
    other = Table([measured("h2o", [30, 60]), measured("rkv", [5, 5]), measured("none", [10, 5])], ["gather: no"])
    made = libraries.together({"installed": mine, "old": other}, first_sample=100)
    assert [(label, r["library"], r["ratio_vs_library"] and r["ratio_vs_library"]["time_ratio_median"]) for label, r in made.rows] == [
        ("none", "installed", None), ("none", "old", 0.75), ("h2o", "installed", None), ("h2o", "old", 1.5),
        ("rkv", "old", None),
    ]  # fmt: skip
    assert [r["sample_order"] for _, r in made.rows[:2]] == [[100, 104], [101, 105]]
    assert made.refused == ["old: gather: no"]


def test_what_was_measured_is_printed_again(bench: Bench, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = ("--policy", "none,streaming", "--budget", 64, "-n", 2, "-r", 2, "-fa", "on", "--upto", 256)
    whole = bench(*args, "-o", "json")[0]
    kept, lines, picture = tmp_path / "speed.json", tmp_path / "speed.jsonl", tmp_path / "speed.svg"
    kept.write_text(whole)

    def again(path: Path, *more: str) -> str:
        capfd.readouterr()
        assert cli.main(["bench", "--from", str(path), *more]) == 0
        return capfd.readouterr().out

    lines.write_text(again(kept, "-o", "jsonl"))
    assert len(lines.read_text().splitlines()) == len(json.loads(whole))
    assert again(kept, "-o", "json") == again(lines, "-o", "json") == whole
    text = again(lines, "--plot", str(picture))
    first = next(r for r in json.loads(whole) if r["kind"] == "tg")
    assert text.startswith("model EQUIP tiny | ") and f"{first['avg_ts']:.0f}"[:3] in text
    assert "streaming" in picture.read_text()
    assert len(list(csv.DictReader(io.StringIO(again(kept, "-o", "csv"))))) == sum(
        "samples_ns" in r for r in json.loads(whole)
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", "words", '[{"kind": "tg"}]', '[{"kind": "eval"}]', "[" * 100_000])
def test_a_file_of_something_else_is_refused(content: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "speed.json"
    path.write_text(content)
    assert cli.main(["bench", "--from", str(path)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and f"{path} does not hold what equip bench measured" in err
