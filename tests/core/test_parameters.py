"""Numbers of a policy's formula: rows of the registry, set by the policy's text on every route."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from equip_cli import BudgetError, CachePolicy, Model, UsageError
from equip_cli.commands.setup.policies import cache_policies, cache_policy
from equip_cli.core import limits, native
from equip_cli.models import embedded

ROWS = {each["name"]: each["parameters"] for each in native.load().policies() if each["parameters"]}


def run(equip_bin: Path, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(equip_bin), *args], capture_output=True, text=True, timeout=120, env=os.environ | variables,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_every_row_is_complete() -> None:
    assert set(ROWS) >= {"a2sf", "snapkv", "rkv", "pagedeviction"}
    for rows in ROWS.values():
        for row in rows:
            assert row["min"] <= row["published"] <= row["max"]
            assert row["min"] <= row["default"] <= row["max"]
            assert row["type"] in ("real", "count", "odd")
            assert row["help"]
    assert {row["name"]: row["default"] for row in ROWS["a2sf"]} == {"decay": 0.95, "graph": 0, "graph_near": 16}
    (page,) = ROWS["pagedeviction"]  # it has an option of its own beside the text
    assert (page["name"], page["min"], page["max"]) == ("page_size", limits.PAGE_SIZE.low, limits.PAGE_SIZE.high)


@pytest.mark.parametrize("policy", ROWS)
def test_each_row_can_be_set_on_every_route(
    equip_bin: Path, model: Model, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a budget of whole pages
    numbers = {"real": 0.25, "odd": 3, "count": 4}
    values = {row["name"]: min(numbers[row["type"]], row["max"]) for row in ROWS[policy]}
    text = f"{policy}:budget=64," + ",".join(f"{key}={value:g}" for key, value in values.items())
    given = CachePolicy(policy, 64, parameters=values)
    assert CachePolicy.parse(text) == given == cache_policy(text)
    assert cache_policies(text.replace(",", ";"), budgets=(None,)) == [given]
    with model.session(given, n_threads=1) as session:
        assert session.stats()["parameters"] == values
        assert CachePolicy.from_stats(session.stats()).parameters == given.parameters
        session.eval(model.tokenize(embedded.prose())[:200])
        assert session.stats()["n_evicted"] > 0
    monkeypatch.setenv("LLAMA_KV_POLICY", text)
    with model.session() as session:
        assert session.stats()["parameters"] == values
    result = run(equip_bin, "generate", "-p", "Hello", "-n", "2", "--json", "--policy", text)
    record = json.loads(result.stdout)
    written = dict(pair.split("=") for pair in record.get("parameters", "").split(",") if pair)
    written |= {key: str(record[key]) for key in ("page_size",) if key in record}
    assert written == {key: f"{value:g}" for key, value in values.items()}


def test_the_default_is_not_named(model: Model) -> None:
    with model.session("a2sf:budget=64,decay=0.95") as session:
        assert session.stats()["parameters"] == {}


def test_a_number_changes_what_is_kept(model: Model) -> None:
    tokens = model.tokenize(embedded.prose())[:400]
    kept = []
    for decay in (0.95, 0.2):
        with model.session(CachePolicy("a2sf", 64, 4, 8, parameters={"decay": decay}), n_threads=1) as session:
            session.eval(tokens)
            kept.append(session.head(0, 0))
    assert [p for p, _ in kept[0]] != [p for p, _ in kept[1]]


def test_an_option_beside_the_text_wins() -> None:
    assert cache_policy("a2sf:budget=64,decay=0.9", budget=128) == CachePolicy("a2sf", 128, parameters={"decay": 0.9})
    assert cache_policies("h2o,a2sf:decay=0.9;recent=20", budgets=(64,)) == [
        CachePolicy("h2o", 64), CachePolicy("a2sf", 64, recent=20, parameters={"decay": 0.9}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a2sf:decay=1.5", "decay is 1.5: give a number from 0 to 1"),
        ("a2sf:decay=nan", "decay is 'nan'"),
        ("a2sf:decay=x", "decay is 'x'"),
        ("a2sf:window=3", "the policy a2sf has no parameter window: give decay"),
        ("h2o:decay=0.5", "the policy h2o has no parameter decay: give graph or graph_near"),
        ("snapkv:kernel=4", "kernel is 4: give an odd number"),
        ("snapkv:kernel=2.5", "kernel is 2.5"),
        ("snapkv:window=0", "window is 0: give a whole number from 1 to 256"),
        ("rkv:threshold=-2", "threshold is -2"),
        ("streaming:decay=1", "the policy streaming has no parameter decay"),
        ("knorm:graph=0.3", "the policy knorm has no parameter graph: leave it out"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    equip_bin: Path, model: Model, text: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError) as error:
        model.session(text)
    assert words in str(error.value)
    result = run(equip_bin, "generate", "-p", "x", "--policy", text)
    assert result.returncode == 2
    assert words in result.stderr
    # and by the library alone
    monkeypatch.setenv("LLAMA_KV_POLICY", text)
    with pytest.raises((UsageError, BudgetError)) as refused:
        model.session()
    assert text.split(":")[1].split("=")[0] in str(refused.value)


def test_info_lists_them(equip_bin: Path) -> None:
    shown = run(equip_bin, "info").stdout
    for policy, rows in ROWS.items():
        for row in rows:
            assert any(policy in line and row["name"] in line and row["help"] in line for line in shown.splitlines())
    record: dict[str, Any] = json.loads(run(equip_bin, "info", "--json").stdout)
    assert record["supports"]["by_policy"]["a2sf"]["parameters"] == ROWS["a2sf"]
