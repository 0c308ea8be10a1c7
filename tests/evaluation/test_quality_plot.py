"""The picture of the real model's table: what it draws is what the table says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from places import REPOSITORY

from equip_cli import plots

PAGE = """
## A real model
the full cache has a perplexity of 39.17.
| policy | 256: perplexity | same top token | KL, nats per token |
| --- | ---: | ---: | ---: |
| `h2o` | 44.16 | 0.777 | 0.147 [0.128, 0.167] |
| window without sinks | 76.25 | 0.528 | 0.762 [0.717, 0.806] |

| another table | of two columns |
"""


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quality_plot", REPOSITORY / "studies" / "quality_plot.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_those_of_the_table(study: ModuleType) -> None:
    full, row = study.records(PAGE)
    assert (full["policy"], full["ppl"]) == ("none", 39.17)
    assert (row["policy"], row["budget"], row["ppl"]) == ("h2o", 256, 44.16)
    assert row["agreement"] == {"top1": 0.777, "kl": 0.147, "kl_ci95": [0.128, 0.167]}
    with pytest.raises(ValueError, match="not one of perplexity"):
        study.records(PAGE.replace("256: perplexity", "perplexity"))


def test_the_page_has_a_table_that_can_be_drawn(study: ModuleType, tmp_path: Path) -> None:
    rows = study.records(study.PAGE.read_text(encoding="utf-8"))
    assert {row["policy"] for row in rows} >= {"none", "random", "streaming", "h2o", "snapkv"}
    plots.eval_figure(rows, str(tmp_path / "table.svg"))
    assert (tmp_path / "table.svg").read_bytes().startswith(b"<?xml")
    assert "quality-smollm2.svg" in study.PAGE.read_text(encoding="utf-8")
