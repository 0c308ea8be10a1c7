"""Differences between rows, paired token by token: what they are, which rows they are taken of, and that a file keeps them."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from command import Equip, runner
from places import REPOSITORY

from equip_cli.evaluation import paired
from equip_cli.evaluation.paired import Series

SCHEMA = json.loads((REPOSITORY / "docs" / "schemas" / "eval.json").read_text())


@pytest.fixture
def equip(equip_bin: Path, tmp_path: Path) -> Equip:
    kept = {k: v for k, v in os.environ.items() if k not in ("LLAMA_KV_POLICY", "NO_COLOR", "FORCE_COLOR")}
    return runner(equip_bin, kept | {"EQUIP_CACHE_DIR": str(tmp_path)})


def record(policy: str, budget: int = 64, sinks: int = 4, bytes_of_one: float = 2.0, **more: Any) -> dict[str, Any]:
    """What a row is called by."""
    return {
        "policy": policy, "scope": "token", "positions": "auto", "rotate_every": 8, "update": "inplace", "budget": budget,
        "sinks": sinks, "recent": None, "type_k": "f16", "type_v": "f16", "kept_bytes": round(100 * budget * bytes_of_one),
    } | more  # fmt: skip


def test_a_difference_is_known_better_than_either_value() -> None:
    """What is hard to foretell is so for both rows: that falls out of the difference, not of the two intervals."""
    draw = np.random.default_rng(1)
    hard = list(draw.exponential(2, size=2048))
    a = [x + 0.1 + e for x, e in zip(hard, draw.normal(scale=0.01, size=2048), strict=True)]
    found = paired.difference(a, hard, 0)
    assert found is not None
    assert found["difference"] == pytest.approx(0.1, abs=0.001)
    low, high = found["ci95"]
    assert 0.09 < low < found["difference"] < high < 0.11
    assert high - low < 0.01 < np.std(hard) / np.sqrt(2048)
    assert found == paired.difference(a, hard, 0)
    reverse = paired.difference(hard, a, 0)
    assert reverse is not None and reverse["difference"] == pytest.approx(-found["difference"])


def test_tokens_before_the_first_eviction_do_not_count() -> None:
    found = paired.difference([0.0] * 10 + [1.0] * 30, [0.0] * 40, 10)
    assert found == {"difference": 1.0, "ci95": [1.0, 1.0], "n_tokens": 30}
    assert paired.difference([1.0] * 10, [0.0] * 10, 10) is None
    assert paired.difference([1.0] * 10, [0.0] * 9, 0) is None


def test_the_baseline_keeps_as_many_bytes() -> None:
    quantised: dict[str, Any] = {"type_k": "q8_0", "type_v": "q8_0", "bytes_of_one": 17 / 16}
    rows = dict(enumerate([
        record("none", 1024), record("random"), record("streaming", sinks=0), record("streaming"),
        record("streaming", sinks=16), record("h2o"), record("h2o", sinks=16), record("h2o", 120, **quantised),
        record("h2o", 128), record("streaming", 64, **quantised), record("h2o", 64, **quantised),
    ]))  # fmt: skip
    assert paired.baseline_of(rows[0], rows, "streaming") is None  # the full cache evicts nothing
    assert [paired.baseline_of(rows[i], rows, "streaming") for i in range(1, 11)] == [
        3,
        3,
        None,
        3,
        3,
        4,
        3,
        None,
        None,
        9,
    ]
    assert [paired.baseline_of(rows[i], rows, "random") for i in (1, 5, 7, 8)] == [None, 1, 1, None]


def test_records_say_what_they_were_paired_with() -> None:
    rows = {3: record("streaming"), 5: record("h2o"), 6: record("h2o", 128)}
    series = {i: Series.of([value] * 100, [value / 2] * 101) for i, value in ((3, 1.0), (5, 0.75), (6, 0.5))}
    found = paired.with_differences(rows, series)
    assert found[6]["paired"] == found[3]["paired"] == {}
    [(name, item)] = found[5]["paired"].items()
    assert (name, item["with"]) == ("streaming", "streaming, 64, 4 sinks, auto")
    assert item["log_loss"] == {"difference": -0.25, "ci95": [-0.25, -0.25], "n_tokens": 36}
    assert item["kl"] == {"difference": -0.125, "ci95": [-0.125, -0.125], "n_tokens": 37}
    assert "paired" not in rows[5]
    # a row whose values were not kept has no difference
    assert paired.with_differences(rows, {5: series[5]})[5]["paired"] == {}


def test_rows_from_a_file_have_the_same_differences(equip: Equip, tmp_path: Path) -> None:
    """Also where the baseline was measured in another run, and rows that differ in recent tokens alone are two."""
    args = ("eval", "--budget", 64, "-n", 150, "--dialogues", 0, "-t", 1, "--no-baselines", "--agreement", "--json")
    file = tmp_path / "rows.jsonl"
    policies = "streaming,random,h2o,h2o:recent=32"
    whole = json.loads(equip(*args, "--policy", policies).stdout)
    jsonschema.validate(whole, SCHEMA, jsonschema.Draft202012Validator)
    assert [row["recent"] for row in whole] == [None, 16, 16, 32]
    assert whole[2]["ppl"] != whole[3]["ppl"]
    for first in ("streaming", "h2o", policies):
        last = equip(*args, "--policy", first, "--save", file)
    assert "2 of 4 rows are in" in last.stderr
    assert json.loads(last.stdout) == whole
    values = [row["paired"]["streaming"]["kl"]["difference"] for row in whole[1:]]
    want = [row["agreement"]["kl"] - whole[0]["agreement"]["kl"] for row in whole[1:]]
    assert values == pytest.approx(want, abs=2e-6)
    n = {item[key]["n_tokens"] for row in whole for item in row["paired"].values() for key in ("kl", "log_loss")}
    assert n == {150 - 64}
    without = json.loads(equip(*args[:-2], "--json", "--policy", "streaming,h2o", "--chunk", 8).stdout)
    assert without[1]["paired"]["streaming"]["kl"] is None
    assert without[1]["paired"]["streaming"]["log_loss"]["n_tokens"] == 150 - 64


def test_the_study_of_a_setting_pairs_rows_of_one_policy_and_budget() -> None:
    spec = importlib.util.spec_from_file_location("paired_rows", REPOSITORY / "studies" / "paired_rows.py")
    assert spec is not None and spec.loader is not None
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    rows = [(record("h2o"), 1.0), (record("h2o", recent=16), 0.75), (record("h2o", 128), 1.0), (record("random"), 2.0)]
    lines = [
        json.dumps({"measured": {"text": 1}, "record": row, "series": {"nll": [value] * 100, "kl": [value] * 100}})
        for row, value in rows
    ]
    lines.append(lines[1].replace('"text": 1', '"text": 2'))
    [_, _, found] = study.table(lines).splitlines()
    assert "recent 16" in found and found.endswith("| 36 | -0.2500 [-0.2500, -0.2500] | -0.2500 [-0.2500, -0.2500] |")
