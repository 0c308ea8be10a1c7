"""Figures: the data drawn is the data given, every line has its label, nothing is written that should not be."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from equip_cli import EquipError, UsageError, plots
from equip_cli.plots import axes as scales
from equip_cli.plots import bench, draw, keep, panels, quality, style

LENGTHS = [256, 512, 1024, 2048, 4096]
POLICIES = ["streaming", "h2o", "tova", "snapkv", "a2sf", "vatp", "caote", "fastcaote", "pagedeviction", "keydiff",
            "knorm", "rkv"]  # fmt: skip


def record(kind: str, policy: str, speed: float | None = 10.0, **more: Any) -> dict[str, Any]:
    unbounded = policy == "none"
    return {
        "kind": kind,
        "test": "",
        "model_type": "llama-3.2-1b",
        "policy": policy,
        "scope": "token",
        "positions": "cache",
        "update": "none" if unbounded else "inplace",
        "budget": None if unbounded else 512,
        "flash_attn": "off",
        "attn_kernel": "upstream",
        "type_k": "f16",
        "type_v": "f16",
        "n_depth": 512,
        "n_prompt": 0,
        "n_gen": 64,
        "avg_ts": speed,
        "stddev_ts": 0.0,
        "samples_ns": [],
        "kv_bytes": 1,
        "rss_bytes": 1,
        "latency_us": None,
        "steps_us": None,
        "ratio_vs": None,
        **more,
    }


def growth(policies: list[str]) -> list[dict[str, Any]]:
    """`none` slows down from 80 t/s; the others stay as fast as at 512 tokens, each a little slower."""
    rows = []
    for n in LENGTHS:
        rows += [record("growth", "none", 20480 / (n + 256) / f, n_depth=n, flash_attn=fa) for fa, f in (("on", 2.0), ("off", 1.0))]  # fmt: skip
        rows += [record("growth", name, 20480 / (min(n, 512) + 300) - i, n_depth=n) for i, name in enumerate(policies)]
    return rows


def ratio(median: float, low: float, high: float) -> dict[str, Any]:
    return {"baseline": "none, fa off", "time_ratio_median": median, "ci95": [low, high], "n_pairs": 5}


def decode() -> list[dict[str, Any]]:
    rows = []
    for budget in (256, 1024):
        rows.append(record("tg", "none", 30.0 - budget / 256, n_depth=budget))
        for fa, slower in (("on", 4.0), ("off", 0.0)):
            rows += [
                record("tg", "streaming", 29.0 - budget / 256 - slower - more, update=update, budget=budget,
                       flash_attn=fa, n_ubatch=budget // 4, recent=budget // 4, ratio_vs=ratio(1.1 + more, 1.0 + more, 1.2 + more))
                for update, more in (("inplace", 0.0), ("shift", 0.5))
            ]  # fmt: skip
    return rows


def latency() -> list[dict[str, Any]]:
    calm = [10000 + 10 * (i % 7) for i in range(100)]
    spiky = [10000 if i != 50 else 400000 for i in range(100)]
    given = {"p50": 10000, "p95": 10000, "p99": 12345, "max": 400000, "n": 100}
    return [
        record("latency", "streaming", steps_us=calm),
        record("latency", "none", update="context-shift", steps_us=spiky, latency_us=given),
    ]


def first_token() -> list[dict[str, Any]]:
    return [
        record("ttft", name, n_prompt=n, samples_ns=[n * 10**6 * k for k in (1, 2, 4)]) for name in ("none", "streaming") for n in (512, 2048)
    ]  # fmt: skip


def evaluation(policies: list[str], budgets: tuple[int, ...] = (64, 256)) -> list[dict[str, Any]]:
    full: dict[str, Any] = {"policy": "none", "scope": None, "positions": None, "budget": None, "sinks": None, "ppl": 5.0,
            "recall": {"128": 1.0, "256": 0.9, "384": 0.8}, "kept_bytes": 2**23, "agreement": None, "passkey": None}  # fmt: skip
    rows = [full]
    for i, policy in enumerate(policies):
        for budget in budgets:
            rows.append(
                {
                    **full,
                    "policy": policy,
                    "scope": "token",
                    "positions": "cache",
                    "budget": budget,
                    "sinks": 4,
                    "ppl": 5.0 + 64 / budget + i,
                    "recall": {"128": 1.0, "256": 0.5, "384": 0.25},
                    "kept_bytes": budget * 2**12,
                    "agreement": {"top1": 0.9, "top1_ci95": [0.85, 0.95], "kl": 0.1 + i, "kl_ci95": [0.05, 0.2 + i], "n_tokens": 9},
                    "passkey": {"1024": {"0": 0.0, "50": 1.0}, "2048": {"0": 0.5, "50": 0.5}},
                }
            )  # fmt: skip
    return [
        {**row, "model": "names", "n_tokens": 1000, "type_k": "f16", "type_v": "f16", "kv_bytes": 1} for row in rows
    ]


def maps(n: int) -> plots.KeepMap:
    """A window of 20 and 4 sinks, 100 tokens long, looked at every 10 tokens."""
    n_read = list(range(10, 101, 10))
    kept = [[i for i in range(n) if i < 4 or i >= n - 20] for n in n_read]
    return plots.KeepMap("names, streaming", n_read, [(f"layer {i // 4}, head {i % 4}", kept) for i in range(n)])


def all_records() -> list[dict[str, Any]]:
    return growth(["streaming", "h2o"]) + decode() + first_token() + latency()


@pytest.fixture
def styled() -> Iterator[None]:
    with style.context():
        yield


def sheet_figure(records: list[dict[str, Any]]) -> Figure:
    return draw.sheet_figure(bench.sheet(records))


def xs(line: Line2D) -> list[float]:
    return [float(x) for x in numpy.asarray(line.get_xdata())]


def ys(line: Line2D) -> list[float]:
    return [float(y) for y in numpy.asarray(line.get_ydata())]


def drawn(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    """x and y of each labelled line; the first axes that has the label."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for ax in figure.axes:
        for line in ax.get_lines():
            label = str(line.get_label())
            if label and not label.startswith("_"):
                found.setdefault(label, (xs(line), ys(line)))
    return found


def shown_texts(figure: Figure) -> list[Text]:
    """All texts of a figure that was drawn, without the tick labels beyond the ends of an axis."""
    hidden = set()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            hidden |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and text not in hidden]
    assert len(texts) > 5
    return texts


def svg_text(path: Path) -> str:
    return " ".join(
        "".join(element.itertext()) for element in ElementTree.parse(path).iter() if element.tag.endswith("text")
    )


# ---- targets


def test_good_targets_pass_and_leave_nothing(tmp_path: Path) -> None:
    for name in ("a.png", "b.svg", "C.PNG"):
        plots.check_target(str(tmp_path / name))
    plots.check_target("-")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("a.pdf", "a figure cannot be written to '{folder}/a.pdf': give a file that ends in .png or .svg, or - for the terminal"),
        ("png", "a figure cannot be written to '{folder}/png': give a file that ends in .png or .svg, or - for the terminal"),
        ("no/a.png", "the folder {folder}/no does not exist: make it, or write the figure to another place"),
        ("old.svg", "{folder}/old.svg is a folder: give a file for the figure"),
    ],
)  # fmt: skip
def test_bad_targets_are_refused(tmp_path: Path, target: str, sentence: str) -> None:
    (tmp_path / "old.svg").mkdir()
    for call in (plots.check_target, lambda name: plots.bench_figure(all_records(), name)):
        with pytest.raises(UsageError) as error:
            call(str(tmp_path / target))
        assert str(error.value) == sentence.format(folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["old.svg"]


def test_unwritable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UsageError, match="cannot be written to: write the figure to another place"):
        plots.check_target(str(tmp_path / "a.png"))


@pytest.mark.parametrize(("target", "package"), [("a.png", "matplotlib"), ("a.svg", "matplotlib"), ("-", "plotext")])
def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, target: str, package: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else real(name, *more))
    with pytest.raises(UsageError) as error:
        plots.check_target(target)
    assert str(error.value) == f'{package} is not installed: pip install "equip-llama[plot]"'


def test_old_plotext_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions were renamed in version 6."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.3.2")
    with pytest.raises(UsageError, match=r'^this plotext is too old: pip install --upgrade "plotext>=6"$'):
        plots.check_target("-")


def test_checking_imports_no_plotting_package() -> None:
    code = (
        "import sys; from equip_cli import plots; plots.check_target('a.png'); plots.check_target('-')\n"
        "assert not {'matplotlib', 'plotext', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(plots.__file__).parents[2])


# ---- files


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("kind", ["bench", "eval", "keep"])
def test_file_has_its_form_and_size(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"figure.{suffix}"
    if kind == "bench":
        plots.bench_figure(all_records(), str(path))
    elif kind == "eval":
        plots.eval_figure(evaluation(["streaming", "h2o"]), str(path))
    else:
        plots.keep_map(maps(8), str(path))
    assert list(tmp_path.iterdir()) == [path]
    data = path.read_bytes()
    if suffix == "png":
        width, height = struct.unpack(">8x4x4sII", data[:24])[1:]
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
    else:
        root = ElementTree.fromstring(data)
        assert root.tag.endswith("svg")
        width, height = (float(root.attrib[key].removesuffix("pt")) / 72 * 150 for key in ("width", "height"))
    assert width == pytest.approx(1200, rel=0.06)  # 8 inches, about the width of a README
    assert 300 < height < 4000


def test_same_data_gives_the_same_svg(tmp_path: Path) -> None:
    for i in (1, 2):
        plots.bench_figure(all_records(), str(tmp_path / f"bench{i}.svg"))
        plots.eval_figure(evaluation(POLICIES), str(tmp_path / f"eval{i}.svg"))
        plots.keep_map(maps(5), str(tmp_path / f"keep{i}.svg"))
    for name in ("bench", "eval", "keep"):
        first, second = ((tmp_path / f"{name}{i}.svg").read_bytes() for i in (1, 2))
        assert first == second
        assert b"<dc:date>" not in first


def test_user_settings_do_not_leak_in(tmp_path: Path) -> None:
    import matplotlib

    plots.bench_figure(decode(), str(tmp_path / "a.svg"))
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "other", "axes.facecolor": "red"}):
        plots.bench_figure(decode(), str(tmp_path / "b.svg"))
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Figure, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    target = tmp_path / "a.png"
    target.write_bytes(b"old")
    with pytest.raises(EquipError) as error:
        plots.bench_figure(decode(), str(target))
    assert (
        str(error.value)
        == f"the figure {target} cannot be written (No space left on device): write it to another place"
    )
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.png", b"old")]


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    target = str(tmp_path / "a.png")
    calls: list[Callable[[], None]] = [
        lambda: plots.bench_figure([], target),
        lambda: plots.bench_figure([{"kind": "summary", "speedup": 2.0}], target),
        lambda: plots.bench_figure([record("tg", "streaming", None)], target),
        lambda: plots.eval_figure([], target),
        lambda: plots.eval_figure(evaluation([]), target),
        lambda: plots.keep_map(plots.KeepMap("names", [], []), target),
    ]
    for call in calls:
        with pytest.raises(EquipError, match="^there is nothing to draw: "):
            call()
    assert list(tmp_path.iterdir()) == []


# ---- labels


def test_svg_names_every_line(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    summary = {"kind": "summary", "policy": "streaming", "budget": 512, "crossing_tokens": 700}  # not drawn
    plots.bench_figure([*growth(POLICIES), *decode(), *latency(), summary], str(path))
    text = svg_text(path)
    for label in (*POLICIES, "none, fa on", "none, fa off", "streaming, inplace", "streaming, shift", "context-shift"):
        assert label in text, label
    for words in ("llama-3.2-1b", "budget 256, 512, 1k", "f16 cache", "tokens/s", "p99 12.3", "max 400 ms"):
        assert words in text, words
    plots.eval_figure(evaluation([*POLICIES, "random"]), str(path))
    text = svg_text(path)
    for label in (*POLICIES, "random", "none", "perplexity", "KL, nats per token", "top-1 agreement", "names"):
        assert label in text, label
    plots.keep_map(maps(12), str(path))
    assert all(f"layer {i // 4}, head {i % 4}" in svg_text(path) for i in range(12))


def test_labels_say_no_more_than_it_takes() -> None:
    rows = [record("tg", "streaming"), record("tg", "h2o", scope="head"), record("tg", "none", flash_attn="on")]
    assert panels.tell_apart(rows) == ["streaming", "h2o", "none"]
    rows.append(record("tg", "h2o", scope="layer"))
    assert panels.tell_apart(rows) == ["streaming, token", "h2o, head", "none", "h2o, layer"]
    rows = [record("tg", "streaming", budget=512), record("tg", "h2o", budget=1024)]
    assert panels.tell_apart(rows) == [
        "streaming, budget 512",
        "h2o, budget 1024",
    ]  # a cost is named though h2o differs
    assert panels.tell_apart(rows, ("budget",)) == ["streaming", "h2o"]
    rows = [record("tg", "streaming", type_k="q8_0", type_v=v) for v in ("q8_0", "q4_0")]
    assert panels.tell_apart(rows) == ["streaming, q8_0", "streaming, K q8_0, V q4_0"]
    rows = [
        record("tg", "streaming", sinks=0),
        record("tg", "streaming", sinks=4),
        record("tg", "none", update="context-shift"),
    ]
    assert panels.tell_apart(rows) == ["window only", "streaming", "context-shift"]


@pytest.mark.usefixtures("styled")
@pytest.mark.parametrize("n", [1, 2, 12])
def test_end_labels_do_not_overlap(n: int) -> None:
    figure = sheet_figure(growth(POLICIES[:n]))
    (ax,) = figure.axes
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
    assert len(boxes) == n + 2
    assert all(below.y1 <= above.y0 + 0.5 for below, above in zip(boxes, boxes[1:], strict=False))
    assert all(box.x1 <= figure.bbox.x1 and box.x0 > ax.bbox.x1 for box in boxes)


@pytest.mark.usefixtures("styled")
def test_text_is_large_enough_and_inside_of_the_page() -> None:
    long = [{**row, "model_type": "a-model-with-a-very-long-name-" * 6, "scope": "head"} for row in all_records()]
    wide = evaluation(POLICIES) + [{**row, "type_k": "q8_0", "type_v": "q4_0"} for row in evaluation(POLICIES)]
    for figure in (
        sheet_figure(long),
        draw.grid_figure(quality.grid(wide)),
        keep.figure(maps(64)),
        keep.figure(maps(1)),
    ):
        figure.draw_without_rendering()
        for text in shown_texts(figure):
            box = text.get_window_extent()
            size = text.get_fontsize()
            assert isinstance(size, float | int) and size >= 8.0, text
            assert box.x0 >= -1 and box.y0 >= -1, text
            assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, text


# ---- data


@pytest.mark.usefixtures("styled")
def test_growth_draws_what_was_measured() -> None:
    rows = growth(["streaming", "h2o"])
    found = drawn(sheet_figure(rows[::-1]))  # the order of the records is not the order of the points
    assert set(found) == {"none, fa on", "none, fa off", "streaming", "h2o"}
    for label, (x, y) in found.items():
        name, _, fa = label.partition(", fa ")
        own = [row for row in rows if row["policy"] == name and row["flash_attn"] == (fa or "off")]
        assert (x, y) == (LENGTHS, [row["avg_ts"] for row in own])


def test_crossing_is_where_the_bounded_cache_gets_faster_for_good() -> None:
    none = [
        panels.Line("none", "none", [256, 1024, 4096], [30, 20, 10]),
        panels.Line("slow", "none", [256, 4096], [5, 5]),
    ]

    def crossing(*speeds: float) -> tuple[float, float] | None:
        return bench.crossing(panels.Line("streaming", "streaming", [256, 1024, 4096], list(speeds)), none)

    # ms per token of none: 33.3, 50, 100; of the bounded cache 66.7: a third of the way from 1024 to 4096
    assert crossing(15, 15, 15) == pytest.approx((2048, 15))
    assert crossing(31, 15, 15) == pytest.approx((2048, 15))  # the lead at 256 did not last
    assert crossing(31, 21, 11) == (256, 31)  # always faster: from where it was first measured
    assert crossing(15, 15, 9) is None  # slower at the end
    assert bench.crossing(panels.Line("streaming", "streaming", [512], [15]), []) is None


@pytest.mark.usefixtures("styled")
def test_crossing_is_ringed_and_named() -> None:
    figure = sheet_figure(growth(["streaming"]))
    sheet = bench.sheet(growth(["streaming"]))
    (panel,) = sheet.panels
    assert isinstance(panel, panels.Panel)
    (line,) = [line for line in panel.lines if line.policy == "streaming"]
    assert line.mark is not None and 512 < line.mark[0] < 1024
    rings = [
        one for one in figure.axes[0].get_lines() if str(one.get_label()).startswith("_") and one.get_marker() == "o"
    ]
    assert [xs(ring)[0] for ring in rings] == [line.mark[0]]
    assert re.search(r"streaming\nfaster from \d+0 tokens", "".join(text.get_text() for text in figure.axes[0].texts))


@pytest.mark.usefixtures("styled")
def test_budget_panel_takes_the_faster_attention() -> None:
    ax = sheet_figure(decode()).axes[0]
    found = {str(line.get_label()): (xs(line), ys(line)) for line in ax.get_lines()}
    assert found["none"] == ([256, 1024], [29.0, 26.0])  # at its depth
    assert found["streaming, inplace"] == ([256, 1024], [28.0, 25.0])  # fa off
    assert found["streaming, shift"] == ([256, 1024], [27.5, 24.5])
    assert ax.get_title(loc="left") == "Decode speed by budget, whichever attention is faster"
    one_budget = [row for row in decode() if 256 in (row["budget"], row["n_depth"] if row["policy"] == "none" else 0)]
    assert [type(panel) for panel in bench.sheet(one_budget).panels] == [panels.Bars]


@pytest.mark.usefixtures("styled")
def test_ratio_panel_draws_medians_and_intervals() -> None:
    figure = sheet_figure(decode()[:5])
    ax = figure.axes[-1]
    medians = [xs(line)[0] for line in ax.get_lines() if "streaming" in str(line.get_label())]
    spans = [xs(line) for line in ax.get_lines() if len(xs(line)) == 2 and line.get_linewidth() > 2]
    assert medians == [1.1, 1.6, 1.1, 1.6]
    assert spans == [[1.0, 1.2], [1.5, 1.7]] * 2
    assert [xs(line) for line in ax.get_lines()][0] == [1.0, 1.0]
    assert [label.get_text() for label in ax.get_yticklabels()][:2] == [
        "streaming, inplace, fa on",
        "streaming, shift, fa on",
    ]
    assert "1.60 [1.50, 1.70]" in [text.get_text() for text in ax.texts]
    assert ax.get_xlabel() == "time of the row / time of none, fa off; below 1 is faster"


def test_ratio_panel_names_the_length_of_none() -> None:
    rows = [record("tg", "none", n_depth=n, flash_attn="on", ratio_vs=ratio(1.5, 1.4, 1.6)) for n in (256, 1024)]
    (bars,) = bench.sheet(rows).panels
    assert isinstance(bars, panels.Bars)
    assert [line.label for line, _ in bars.rows] == ["none, depth 256", "none, depth 1024"]


def test_ratio_panel_has_at_most_twenty_four_rows() -> None:
    rows = [record("tg", name, budget=b, ratio_vs=ratio(1.0, 0.9, 1.1)) for name in POLICIES for b in (64, 128, 256)]
    bars = [panel for panel in bench.sheet(rows).panels if isinstance(panel, panels.Bars)]
    assert [len(panel.rows) for panel in bars] == [24]
    assert bars[0].title.endswith(", 24 of 36 rows")


def compared() -> list[dict[str, Any]]:
    """What `--compare` measures on a CPU: each row with and without flash attention, the former with our kernel."""
    rows = []
    for budget in (256, 1024):
        for kernel, fa, speed in (("upstream-fa", "on", 20.0), ("upstream", "off", 30.0), ("equip-cpu", "on", 40.0)):
            base = "none, our kernel, fa on" if kernel == "equip-cpu" else "none, fa off"
            shared: dict[str, Any] = {"attn_kernel": kernel, "flash_attn": fa, "n_depth": budget}
            own = ratio(1.5, 1.4, 1.6) | {"baseline": base}
            rows.append(
                record("tg", "none", speed, **shared, ratio_vs=own if kernel == "upstream-fa" else None, n_batch=budget)
            )
            shared |= {"budget": budget, "n_batch": budget // 4}
            if kernel != "equip-cpu":
                rows.append(
                    record("tg", "none", speed - 3, **shared, update="context-shift", ratio_vs=own, rotate_every=0)
                )
            if kernel != "upstream-fa":
                rows += [record("tg", name, speed - 1 - i, **shared, update=update, rope_kernel=rope, ratio_vs=own, rotate_every=8 - 7 * (update == "shift"))
                         for i, name in enumerate(("streaming", "h2o"))
                         for update, rope in (("shift", "upstream"), ("shift", "cached"), ("gather", "none"), ("inplace", "none"))
                         if name == "streaming" or update != "shift"]  # fmt: skip
    return rows


WAYS = ["streaming, shift", "streaming, shift, cached rotation", "streaming, gather", "streaming, inplace", "h2o, gather",
        "h2o, inplace"]  # fmt: skip


def test_of_many_rows_the_faster_attention_is_drawn() -> None:
    by_budget, ratios = bench.sheet(compared()).panels
    assert isinstance(by_budget, panels.Panel) and isinstance(ratios, panels.Bars)
    assert {line.label for line in by_budget.lines} == {"none", "none, our kernel", "context-shift", *WAYS}
    found = {line.label: line.y for line in by_budget.lines}
    assert (found["none"], found["none, our kernel"], found["streaming, inplace"]) == ([30, 30], [40, 40], [39, 39])
    # the fastest none of either kernel is what the others are compared with, so it has no row; the shown context shift is
    # the one without flash attention
    assert [line.label for line, _ in ratios.rows] == [
        f"{way}, budget {budget}" for budget in (256, 1024) for way in ("context-shift", *WAYS)
    ]
    assert ratios.title == "Time per token, ratio and 95% interval, whichever attention is faster"
    assert ratios.xlabel == "time of the row / time of the fastest none with the same kernel; below 1 is faster"
    few = [
        row for row in compared() if row["budget"] in (None, 256) and row["n_depth"] == 256 and row["policy"] != "h2o"
    ]
    (all_of_them,) = bench.sheet(few).panels
    assert isinstance(all_of_them, panels.Bars)
    assert [line.label for line, _ in all_of_them.rows][:5] == [
        "none, fa on",
        "context-shift, fa on",
        "context-shift, fa off",
        "streaming, shift, fa off",
        "streaming, shift, cached rotation, fa off",
    ]


def test_lines_in_place_are_solid() -> None:
    (by_budget, _) = bench.sheet(compared()).panels
    assert isinstance(by_budget, panels.Panel)
    assert [line.label for line in by_budget.lines if line.policy != "none" and line.variant == 0] == [
        "context-shift",
        "streaming, inplace",
        "h2o, inplace",
    ]


def test_our_kernel_is_named_wherever_both_ran() -> None:
    rows = [record("growth", "none", 10.0, flash_attn="on", attn_kernel="upstream-fa"),
            record("growth", "streaming", 12.0, flash_attn="on", attn_kernel="equip-cpu")]  # fmt: skip
    assert panels.tell_apart(rows) == ["none, fa on", "streaming, fa on (ours)"]
    assert "fa" not in bench.sheet(rows).subtitle
    assert "fa on (ours)" in bench.sheet(rows[1:]).subtitle


def test_medians_are_drawn_where_there_are_samples() -> None:
    rows = [record("growth", "streaming", 8.0, n_depth=n, samples_ts=[1.0, 9.0, 10.0, 11.0, 12.0]) for n in (256, 512)]
    (panel,) = bench.sheet(rows).panels
    assert isinstance(panel, panels.Panel) and panel.spread == "median and quartiles"
    (line,) = panel.lines
    assert (line.y, line.low, line.high) == ([10.0, 10.0], [9.0, 9.0], [11.0, 11.0])
    rows[0]["samples_ts"] = [1.0]  # then all are means
    (panel,) = bench.sheet(rows).panels
    assert isinstance(panel, panels.Panel) and panel.spread == "mean and standard deviation"
    assert panel.lines[0].y == [8.0, 8.0]


def test_only_the_fastest_row_of_a_cache_has_its_crossing_named() -> None:
    rows = growth(["streaming", "h2o"])
    rows += [
        {**row, "flash_attn": "on", "avg_ts": row["avg_ts"] - 1}
        for row in rows
        if row["policy"] in ("streaming", "h2o")
    ]
    rows += [record("growth", "none", 99.0, update="context-shift", n_depth=n) for n in LENGTHS]  # not a growing cache
    (panel,) = bench.sheet(rows).panels
    assert isinstance(panel, panels.Panel)
    assert [line.label for line in panel.lines if line.mark] == ["streaming, fa off", "h2o, fa off"]


@pytest.mark.usefixtures("styled")
def test_many_latency_rows_become_bars() -> None:
    rows = [{**row, "budget": 2**i} for i in range(6, 12) for row in latency()]
    (bars,) = bench.sheet(rows).panels
    assert isinstance(bars, panels.Bars)
    assert len(bars.rows) == 12
    line, text = bars.rows[1]
    assert (line.label, line.x, line.low, line.high) == ("context-shift, budget 64", [10.0], [10.0], [400.0])
    assert text == "10 / 12.3 / 400"


def test_a_prompt_measured_twice_is_one_point() -> None:
    rows = [record("ttft", "none", n_prompt=512, samples_ns=[n * 10**9]) for n in (3, 2)]
    (panel,) = bench.sheet(rows).panels
    assert isinstance(panel, panels.Panel)
    assert (panel.lines[0].x, panel.lines[0].y) == ([512], [2.0])


@pytest.mark.usefixtures("styled")
def test_growth_alone_is_twice_as_wide_as_high() -> None:
    width, height = sheet_figure(growth(["streaming", "h2o"])).get_size_inches()
    assert 1.9 < width / height < 2.1


def test_levels_look_the_same_in_all_panels() -> None:
    rows = evaluation(["streaming"])
    rows += [{**row, "type_k": "q8_0", "type_v": "q8_0"} for row in rows]
    rows[3]["agreement"] = {"top1": 0.99, "top1_ci95": None, "kl": 1e-4, "kl_ci95": None, "n_tokens": 9}
    looks = {(level.label, level.variant) for row in quality.grid(rows).rows for level in row[0].levels}
    assert looks == {("none, f16", 1), ("none, q8_0", 2)}
    assert [level.label for level in quality.grid(rows).rows[1][0].levels] == ["none, q8_0"]


def test_small_caches_are_counted_in_kib() -> None:
    assert quality.grid(evaluation(["h2o"], (64, 128))).rows[0][1].xlabel == "keys and values kept, KiB"
    assert quality.grid(evaluation(["h2o"])).rows[0][1].xlabel == "keys and values kept, MiB"


@pytest.mark.usefixtures("styled")
def test_first_token_is_the_median_in_seconds() -> None:
    figure = sheet_figure(first_token())
    ax = figure.axes[0]
    assert drawn(figure)["streaming"] == ([512, 2048], [1.024, 4.096])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


@pytest.mark.usefixtures("styled")
def test_latency_strips_share_axes_and_keep_spikes() -> None:
    figure = sheet_figure(latency())
    calm, spiky = figure.axes
    assert drawn(figure)["context-shift"] == (list(range(100)), [10.0 if i != 50 else 400.0 for i in range(100)])
    assert calm.get_yscale() == spiky.get_yscale() == "log"  # 40 times the median
    assert calm.get_ylim() == spiky.get_ylim() and calm.get_xlim() == spiky.get_xlim()
    assert spiky.get_ylim()[1] > 400
    assert [text.get_text() for text in spiky.texts] == ["context-shift", "p50 10   p99 12.3   max 400 ms"]
    assert [text.get_text() for text in calm.texts] == ["streaming", "p50 10   p99 10.1   max 10.1 ms"]
    assert [ax.get_yscale() for ax in sheet_figure(latency()[:1]).axes] == ["linear"]


@pytest.mark.usefixtures("styled")
def test_a_spike_among_many_tokens_is_still_drawn() -> None:
    steps = [10000] * 100_000
    steps[77_777] = 55_000
    x, y = drawn(sheet_figure([record("latency", "streaming", steps_us=steps)]))["streaming"]
    assert len(x) < 5000
    assert (x[y.index(max(y))], max(y)) == (77_777, 55.0)


@pytest.mark.usefixtures("styled")
def test_a_single_row_is_drawn_as_its_speed() -> None:
    figure = sheet_figure([record("pp", "streaming", 123.0, n_prompt=512)])
    assert drawn(figure)["streaming"][0] == [123.0]


@pytest.mark.usefixtures("styled")
def test_quality_draws_what_was_measured() -> None:
    figure = draw.grid_figure(quality.grid(evaluation(["streaming", "h2o"])))
    columns = [figure.axes[0::2], figure.axes[1::2]]
    want = {
        "perplexity": ([6.0, 5.25], [7.0, 6.25]),
        "KL, nats per token": ([0.1, 0.1], [1.1, 1.1]),
        "top-1 agreement": ([0.9, 0.9], [0.9, 0.9]),
        "mean recall": ([0.375, 0.25], [0.375, 0.25]),
        "mean accuracy": ([0.5, 0.5], [0.5, 0.5]),
    }
    for axes, x in zip(columns, ([64, 256], [0.25, 1.0]), strict=True):
        assert [ax.get_ylabel() for ax in axes] == list(want)
        for ax in axes:
            lines = {str(line.get_label()): line for line in ax.get_lines()}
            for label, y in zip(("streaming", "h2o"), want[ax.get_ylabel()], strict=True):
                assert xs(lines[label]) == x
                assert ys(lines[label]) == pytest.approx(y)
    perplexity, recall = columns[0][0], columns[0][3]
    (level,) = [line for line in perplexity.get_lines() if line.get_label() == "none"]
    assert ys(level) == [5.0, 5.0] and level.get_linestyle() == "--"
    (full,) = [line for line in recall.get_lines() if line.get_label() == "none"]
    assert xs(full) == [64, 256] and ys(full) == pytest.approx([0.85, 0.8])
    assert all(a.get_ylim() == b.get_ylim() for a, b in zip(*columns, strict=True))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["streaming", "h2o", "none"]


def test_recall_counts_only_what_lies_beyond_the_budget() -> None:
    row = {"recall": {"128": 1.0, "256": 0.5, "384": 0.2, "512": None}}
    assert quality.recall_beyond(row, 128) == pytest.approx((0.35, 0.35, 0.35))
    assert quality.recall_beyond(row, 129) == pytest.approx((0.2, 0.2, 0.2))
    assert quality.recall_beyond(row, 300) is None


def test_bytes_have_lines_per_cache_type() -> None:
    rows = evaluation(["streaming"])
    rows += [{**row, "type_k": "q8_0", "type_v": "q8_0", "kept_bytes": row["kept_bytes"] / 2} for row in rows]
    budget, kept = quality.grid(rows).rows[0]
    assert [line.label for line in kept.lines] == ["streaming, f16", "streaming, q8_0"]
    assert [line.x for line in kept.lines] == [[0.25, 1.0], [0.125, 0.5]]
    assert [line.x for line in budget.lines] == [[64, 256], [64, 256]]
    assert [level.label for level in budget.levels] == ["none, f16", "none, q8_0"]


def test_positions_have_lines_of_their_own_against_the_budget() -> None:
    rows = evaluation(["h2o"])
    rows += [{**row, "positions": "true", "ppl": 9.0} for row in rows if row["policy"] == "h2o"]
    budget, kept = quality.grid(rows).rows[0]
    assert [line.label for line in budget.lines] == ["h2o, positions cache", "h2o, positions true"]
    assert [len(line.x) for line in kept.lines] == [2, 2]  # never two values for one number of bytes on a line


@pytest.mark.usefixtures("styled")
def test_window_without_sinks_does_not_press_the_others_together() -> None:
    rows = evaluation(["streaming"])
    rows += [{**row, "sinks": 0, "ppl": 5000.0} for row in rows if row["policy"] == "streaming"]
    figure = draw.grid_figure(quality.grid(rows))
    assert figure.axes[0].get_ylim()[1] < 10
    assert "window only: 5e+03, above the scale" in [text.get_text() for text in figure.axes[1].texts]
    for row in rows:
        row["ppl"] = min(row["ppl"], 12.0)
    assert draw.grid_figure(quality.grid(rows)).axes[0].get_ylim()[1] > 12


@pytest.mark.usefixtures("styled")
def test_missing_values_and_zeros_are_no_obstacle() -> None:
    rows = evaluation(["streaming", "h2o", "tova"])
    for row in rows:
        if row["budget"] == 256:
            row["agreement"] = {"top1": 1.0, "top1_ci95": None, "kl": 0.0, "kl_ci95": [0.0, 0.0], "n_tokens": 9}
        if row["policy"] == "tova":
            row |= {"ppl": None, "agreement": None, "passkey": None, "recall": {}}
        if row["policy"] == "h2o":
            row |= {"kept_bytes": None, "ppl": math.inf}
    figure = draw.grid_figure(quality.grid(rows))
    labels = [{str(line.get_label()) for line in ax.get_lines()} for ax in figure.axes]
    assert labels[:4] == [{"streaming", "none"}, {"streaming", "none"}, {"streaming", "h2o"}, {"streaming"}]
    assert figure.axes[2].get_ylim()[0] < 0  # a divergence of zero has its place
    sheet_figure([record("growth", "streaming", 0.0), record("growth", "h2o", None), record("growth", "none", None)])


def test_axes_name_round_numbers() -> None:
    assert [panels.tokens(n) for n in (100, 512, 1024, 1536, 131072)] == ["100", "512", "1k", "1536", "128k"]
    assert scales._apart([256, 260, 512, 1024], 1.0) == [256, 512, 1024]


# ---- keep maps


def test_keep_image_is_what_was_kept() -> None:
    frames = maps(1)
    image = keep.image(frames.n_read, frames.panels[0][1], 100, 10)
    for column, n in enumerate(frames.n_read):
        kept = [1.0 if i < 4 or i >= n - 20 else 0.0 for i in range(n)]
        numpy.testing.assert_array_equal(image[:n, column], kept)
        assert numpy.isnan(image[n:, column]).all()
    uneven = keep.image(frames.n_read, frames.panels[0][1], 64, 10)  # one or two positions per row
    assert (uneven[60:, 9] == 1.0).all() and set(uneven[~numpy.isnan(uneven)]) <= {0.0, 0.5, 1.0}
    coarse = keep.image(frames.n_read, frames.panels[0][1], 10, 10)
    assert coarse[0, 9] == pytest.approx(0.4) and coarse[9, 9] == 1.0 and coarse[5, 9] == 0.0


@pytest.mark.usefixtures("styled")
def test_a_keep_map_is_dark_where_kept_and_light_where_evicted() -> None:
    figure = keep.figure(maps(64))
    assert len(figure.axes) == 64
    pixels = numpy.asarray(figure.axes[0].images[0].get_array())
    assert set(numpy.unique(pixels.round(2))) == {0.13, 0.86, 1.0}  # kept, not yet written, evicted
    assert pixels[0, -1] == pytest.approx(0.13) and pixels[50, -1] == 1.0 and pixels[-1, 0] == pytest.approx(0.86)
    assert figure.axes[63].get_title(loc="left") == "layer 15, head 3"
    assert {tuple(ax.images[0].get_extent()) for ax in figure.axes} == {(5, 105, 0, 100)}


@pytest.mark.usefixtures("styled")
def test_single_tokens_of_a_long_text_still_show() -> None:
    frames = plots.KeepMap("long", [50_000, 100_000], [("layer 0", [[7], [7, 60_000]])])
    pixels = numpy.asarray(keep.figure(frames).axes[0].images[0].get_array())
    assert (pixels[:, 1] < 0.75).sum() == 2
    with pytest.raises(ValueError, match="layer 0 has 1 columns for 2 looks"):
        keep.figure(plots.KeepMap("long", [1, 2], [("layer 0", [[0]])]))


# ---- terminal


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")


@pytest.mark.usefixtures("narrow")
def test_terminal_figures_fit_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    calls: dict[str, Callable[[], None]] = {
        "bench": lambda: plots.bench_figure(all_records(), "-"),
        "eval": lambda: plots.eval_figure(evaluation(POLICIES), "-"),
        "keep": lambda: plots.keep_map(maps(2), "-"),
    }
    words = {
        "bench": ("tokens in the sequence", "tokens/s", "faster from", "none, fa on", "4k", "Decode speed by budget",
                  "Time per token", "context-shift: p50 10   p99 12.3   max 400 ms", "1.60 [1.50, 1.70]", "prompt tokens"),
        "eval": ("perplexity", "budget, tokens", "none", "KL, nats per token", "64", "256", *POLICIES),
        "keep": ("names, streaming", "layer 0, head 1", "position over tokens read", "kept"),
    }  # fmt: skip
    for name, call in calls.items():
        call()
        text = capsys.readouterr().out
        assert "\x1b" not in text
        assert max(len(line) for line in text.splitlines()) <= 80, name
        for word in words[name]:
            assert word in text, (name, word)


@pytest.mark.usefixtures("narrow")
def test_terminal_points_are_where_the_axes_say(capsys: pytest.CaptureFixture[str]) -> None:
    plots.bench_figure([record("growth", "streaming", float(n), n_depth=n) for n in (256, 512, 1024)], "-")
    text = capsys.readouterr().out.splitlines()
    (ticks,) = [line for line in text if "256" in line and "512" in line and "1k" in line]
    assert abs(ticks.index("512") - (ticks.index("256") + ticks.index("1k")) / 2) <= 2  # evenly spaced


def test_terminal_is_coloured_only_where_it_may_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    plots.bench_figure(growth(["streaming"]), "-")  # stdout is no terminal
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    plots.bench_figure(growth(["streaming"]), "-")
    assert "\x1b[" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    plots.bench_figure(growth(["streaming"]), "-")
    assert "\x1b" not in capsys.readouterr().out
