"""Records as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from equip_cli.benchmark.records import INSTALLED
from equip_cli.benchmark.rows import is_our_kernel
from equip_cli.core.memory import megabytes
from equip_cli.core.policy import CHOICE, differ_in_rotation, type_words
from equip_cli.terminal.columns import (
    BLANK,
    WIDTH,
    Column,
    fold,
    fold_by,
    interval,
    of_records,
    paragraph,
    table,
    the_same,
    width,
)

Record = dict[str, Any]

_RATIOS = {
    "ratio_vs_library": "time / installed",
    "ratio_vs": "time / baseline",
    "ratio_vs_stock": "/ stock llama.cpp",
    "ratio_vs_same_fa": "/ none, same fa",
    "ratio_vs_inplace": "/ inplace",
    "ratio_vs_streams": "/ streams",
}
_SHARING = {"alone": BLANK, "pool": "pool", "unified": "one", "streams": "one each"}
# the policies' own settings
_SETTINGS = ("scope", "positions", "rotate every", *(key.replace("_", " ") for key in CHOICE))
_OURS = "fa ours = our CPU kernel, flash attention on"


# ---- cells


def _number(value: float | None) -> str:
    return BLANK if value is None else f"{value:.0f}"


def _params(n: int | None) -> str:
    return BLANK if not n else f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


def _ratio(ratio: Record | None, missing: str) -> str:
    if ratio is None:
        return missing
    middle = ratio["time_ratio_median"]
    return interval(middle, ratio["ci95"], 2 if middle >= 0.1 else 3)


def _speed(record: Record) -> str:
    """Four digits of the mean, and as many decimals of the deviation."""
    mean = record["avg_ts"]
    decimals = 0 if mean >= 1000 else 1 if mean >= 100 else 2
    return f"{mean:.{decimals}f} ± {record['stddev_ts']:.{decimals}f}"


def _setting(record: Record, key: str) -> str:
    plain = record["policy"] == "none"
    if plain and not (record["update"] == "context-shift" and key in ("update", "budget")):
        return BLANK
    if key == "update" and record["rope_kernel"] == "cached":
        return "shift, cached"
    return str(record.get(key) or BLANK)


def _attention(record: Record) -> str:
    return "ours" if is_our_kernel(record["attn_kernel"]) else str(record["flash_attn"])


# ---- columns


def _about(records: Sequence[Record]) -> list[Column]:
    """What the rows are: llama-bench's columns and the settings of the caches."""
    plain = [record for record in records if record["policy"] == "none" and record["update"] == "none"]
    # a shifted cache has batches of its own
    swept = [
        key
        for key in ("n_batch", "n_ubatch")
        if len({(r["test"], r[key]) for r in plain}) > len({r["test"] for r in plain})
    ]
    rotations = differ_in_rotation([each for each in records if each["update"] != "context-shift"])
    keys = ["scope", "positions", *(["rotate_every"] if rotations else []), "update", "budget"]
    keys += [key for key in CHOICE if any(key in record for record in records)]
    grows = any(record["kind"] == "growth" for record in records)
    column = of_records(records)

    def setting(key: str) -> Column:
        title = key.replace("_", " ")
        return column(title, f"{title} {{}}", lambda record: _setting(record, key))

    return [
        column("model", "model {}", lambda r: r["model_type"]),
        column("size", "{}", lambda r: megabytes(r["model_size"])),
        column("params", "{} parameters", lambda r: _params(r["model_n_params"])),
        column("backend", "{}", lambda r: r["backends"]),
        column("threads", "threads {}", lambda r: r["n_threads"]),
        *(column(key, f"{key} {{}}", itemgetter(key)) for key in swept),
        column("type", "cache {}", type_words),
        column("policy", "policy {}", lambda r: r["policy"]),
        *map(setting, keys),
        column("fa", "fa {}", _attention),
        column("library", "library {}", lambda r: r.get("library", BLANK)),
        column("lanes", "lanes {}", lambda r: r["lanes"] if r.get("sharing", "alone") != "alone" else BLANK),
        column("caches", "caches {}", lambda r: _SHARING[r.get("sharing", "alone")]),
        column("cache", "{} of cache", lambda r: megabytes(r["kv_bytes"])),
        column("test", "test {}", lambda r: r["test"].partition(" @")[0] if r["kind"] == "growth" else r["test"]),
        *([column("tokens", "{} tokens", lambda r: r["n_depth"] if r["kind"] == "growth" else BLANK)] if grows else []),
    ]


def _speeds(records: Sequence[Record]) -> list[Column]:
    columns = [Column("t/s", [_speed(record) for record in records])]
    if any(record.get("sharing", "alone") != "alone" for record in records):
        columns.append(Column("per lane", [f"{record['avg_ts'] / record.get('lanes', 1):.1f}" for record in records]))
    if any(record["host_us_per_token"] is not None for record in records):
        columns.append(Column("host us", [_number(record["host_us_per_token"]) for record in records]))
    return columns


def _milliseconds(records: Sequence[Record]) -> list[Column]:
    return [
        Column(f"{key}, ms", [f"{record['latency_us'][key] / 1000:.2f}" for record in records])
        for key in ("p50", "p95", "p99", "max")
    ]


def _seconds(records: Sequence[Record]) -> list[Column]:
    seconds = [f"{record['avg_ns'] / 1e9:.3f} ± {record['stddev_ns'] / 1e9:.3f}" for record in records]
    return [Column("first token, s", seconds), _speeds(records)[0]]


def _growth_columns(records: Sequence[Record]) -> list[Column]:
    return [
        _speeds(records)[0],
        Column("process", [megabytes(record["rss_bytes"]) for record in records]),
        # a bounded cache is always read
        Column("filled", [r["fill"] if r["policy"] == "none" else BLANK for r in records], "growing caches filled: {}"),
    ]


_MEASURES = {"pp": _speeds, "tg": _speeds, "latency": _milliseconds, "ttft": _seconds, "growth": _growth_columns}


def _ratio_columns(records: Sequence[Record]) -> list[Column]:
    keys = [key for key in _RATIOS if key == "ratio_vs" or any(record.get(key) for record in records)]
    if records[0]["kind"] == "latency":  # a single sum each, no pairs
        return []
    missing = {"ratio_vs": "1 (baseline)"}
    return [Column(_RATIOS[key], [_ratio(r.get(key), missing.get(key, BLANK)) for r in records]) for key in keys]


# ---- tables


@dataclass(frozen=True)
class _Part:
    """Rows that stand together. about: what they are; measures, ratios: what was found."""

    records: Sequence[Record]
    about: Sequence[Column]
    measures: Sequence[Column]
    ratios: Sequence[Column]

    def _by_test(self) -> list[_Part]:
        """A part for each test, and for each budget that has the same one; a growing sequence is one part."""
        if self.records[0]["kind"] == "growth":
            return [self]
        names = [column for column in self.about if column.title not in ("budget", "cache")]
        rows = list(zip(*(column.cells for column in names), strict=True))
        parts = [(record["test"], rows[:i].count(rows[i])) for i, record in enumerate(self.records)]
        return [self._of([row for row, each in enumerate(parts) if each == part]) for part in dict.fromkeys(parts)]

    def _of(self, rows: Sequence[int]) -> _Part:
        about, measures, ratios = ([c.of(rows) for c in group] for group in (self.about, self.measures, self.ratios))
        return _Part([self.records[row] for row in rows], about, measures, ratios)

    def text(self, said: Sequence[str] = ()) -> str:
        """One table if it fits, else one for each test, with a second one for the other ratios where it must be.

        said: words of the paragraph above it.
        """
        words, columns = fold([*self.about, *self.measures])
        if not any(column in self.about for column in columns):
            columns = [*(column for column in self.about if column.title == "test"), *columns]
            words = [word for word in words if not word.startswith("test ")]
        if width([*columns, *self.ratios]) <= WIDTH:
            return paragraph([*said, *words]) + table([*columns, *self.ratios])
        parts = self._by_test()
        if len(parts) > 1:
            return paragraph(said) + "\n".join(part.text() for part in parts)
        text = paragraph([*said, *words]) + table([*columns, *self.ratios[:1]])
        others = [column for column in self.ratios[1:] if the_same(column.cells) != BLANK]
        rows = [row for row in range(len(self.records)) if any(column.cells[row] != BLANK for column in others)]
        names = [column for column in columns if column in self.about and column.title != "cache"]
        return text + ("\n" + table([column.of(rows) for column in [*names, *others]]) if others else "")


def _measured(records: Sequence[Record]) -> list[str]:
    """Tables by kind of measurement; what all rows share stands at the beginning."""
    kinds = ["tg" if record["kind"] == "pp" else record["kind"] for record in records]
    about = _about(records)
    tests = [column for column in about if column.title in ("test", "tokens")]
    words, left = fold([column for column in about if column not in tests])
    by_policy, own = fold_by([r["policy"] for r in records], [c for c in left if c.title in _SETTINGS])
    left = [column for column in left if column.title not in _SETTINGS or column in own]
    words += by_policy + ([_OURS] if "ours" in map(_attention, records) else [])
    folders = {record["library"]: record["library_path"] for record in records if "library" in record}
    words += [f"{name} = {folder}" for name, folder in folders.items() if name != INSTALLED]
    parts = []
    for kind in dict.fromkeys(kinds):
        rows = [row for row, each in enumerate(kinds) if each == kind]
        of_kind = [records[row] for row in rows]
        columns = [column.of(rows) for column in [*left, *tests]]
        parts.append(_Part(of_kind, columns, _MEASURES[kind](of_kind), _ratio_columns(of_kind)))
    if len(parts) == 1:
        return [parts[0].text(words)]
    return [paragraph(words) + parts[0].text(), *(part.text() for part in parts[1:])]


def _library(rows: Sequence[Record]) -> list[Column]:
    """The libraries of a summary, where there are several."""
    return [Column("library", [row["library"] for row in rows])] if "library" in rows[0] else []


def _baselines(rows: Sequence[Record]) -> str:
    policies = [row["policy"] for row in rows]
    setting = [Column(key, [str(row[key]) for row in rows], f"{key} {{}}") for key in ("scope", "positions")]
    _, left = fold_by(policies, setting)  # said above already
    columns = [
        *_library(rows),
        Column("policy", policies),
        *left,
        Column("budget", [str(row["budget"]) for row in rows]),
        Column("baseline", [row["baseline"] + (" (the fastest)" if row["fastest"] else "") for row in rows]),
        Column("fa", [row["flash_attn"] for row in rows]),
        Column(
            "time / in place", [_ratio({"time_ratio_median": r["speedup"], "ci95": r["ci95"]}, BLANK) for r in rows]
        ),
    ]
    return table(columns)


def _growth(rows: Sequence[Record]) -> str:
    """Where a bounded cache becomes the faster one, and by how much."""
    last = rows[0]["test"].split()[1]
    shared = [row.get("sharing", "alone") for row in rows]
    lanes = [Column("lanes", [(row["test"].split(" x ") + [BLANK])[1] for row in rows])]
    lanes.append(Column("caches", [_SHARING[each] for each in shared]))
    where = ["at no length" if row["crossing_tokens"] is None else str(row["crossing_tokens"]) for row in rows]
    columns = [
        *_library(rows),
        Column("policy", [row["policy"] for row in rows]),
        Column("budget", [str(row["budget"]) for row in rows]),
        *(lanes if set(shared) != {"alone"} else []),
        Column("faster than", [row["baseline"] for row in rows]),
        Column("from, tokens", where),
        Column(f"times faster at {last}", [f"{row['speedup_at_end']:.2f}" for row in rows]),
        Column("for the whole text", [f"{row['speedup']:.2f}" for row in rows]),
    ]
    return table(columns)


def _paper(rows: Sequence[Record]) -> str:
    columns = [
        *_library(rows),
        Column("method", [row["test"] for row in rows]),
        Column("baseline / in place", [row["baseline"].replace(", against ", " / ") for row in rows]),
        Column("here", [row["note"] or f"{row['speedup']:.2f}" for row in rows]),
        *(
            Column(title, [f"{row[key]:.2f}" if row[key] else BLANK for row in rows])
            for title, key in (("CPU", "paper_cpu"), ("GPU", "paper_gpu"))
        ),
    ]
    return "Speedups here, and those that the paper states for a CPU and a GPU:\n\n" + table(columns)


def markdown(records: Sequence[Record]) -> str:
    """Tables by kind of measurement, with the summaries behind them; of several models one after the other."""
    models = list(dict.fromkeys(record["model_filename"] for record in records if record["kind"] in _MEASURES))
    if len(models) < 2:
        return _of_model(records)
    return "\n".join(_of_model([record for record in records if record["model_filename"] == name]) for name in models)


def _of_model(records: Sequence[Record]) -> str:
    measured = [record for record in records if record["kind"] in _MEASURES]
    parts = _measured(measured) if measured else []
    summaries = [record for record in records if record["kind"] == "summary"]
    for key, make in (("fastest", _baselines), ("crossing_tokens", _growth)):
        rows = [row for row in summaries if key in row]
        parts += [make(rows)] if rows else []
    papers = [record for record in records if record["kind"] == "paper"]
    return "\n".join(parts + ([_paper(papers)] if papers else []))


def _flat(record: Record) -> Record:
    """Without nesting: a ratio is four columns, percentiles are one each, and a list is JSON."""
    flat: Record = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{key}_{inner}": each for inner, each in value.items()}
        else:
            flat[key] = value
    return {key: json.dumps(value) if isinstance(value, (list, tuple)) else value for key, value in flat.items()}


def as_csv(records: Sequence[Record]) -> str:
    """One line per record; a column that a record lacks is empty."""
    flat = [_flat(record) for record in records if record["kind"] not in ("summary", "paper")]
    names = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
