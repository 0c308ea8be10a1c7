"""The figures and tables of docs/benchmarks.md: run the commands, keep their JSON, write the page.

    python studies/benchmarks.py run FOLDER [NAME ...]     # measure: nothing else may run, about 40 minutes on two cores
    python studies/benchmarks.py page FOLDER               # docs/benchmarks.md and its pictures from what was measured

A run that is there already is not repeated; name it to measure it anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equip_cli import plots

DOCS = Path(__file__).resolve().parents[1] / "docs"
Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One command. picture: kinds of records to draw, or () for none."""

    title: str
    command: str
    picture: tuple[str, ...] = ()


def shape(name: str, compare: str, policies: str, growth: str) -> dict[str, Run]:
    """The two runs of a shape."""
    return {
        f"{name}-compare": Run(
            f"{name}: ways for a token to go",
            f"equip bench --shape {name} --compare --shift-rope upstream,cached {compare}",
        ),
        f"{name}-growth": Run(
            f"{name}: a sequence that grows",
            f"equip bench --shape {name} --policy {policies} --budget 1024 {growth}",
            ("growth",),
        ),
    }


_FIRST = "--update context-shift,shift,inplace --budget 512 --ttft 1,4 --latency 512 -r 1 --no-warmup"

RUNS: dict[str, Run] = {
    "embedded-quick": Run(
        "The embedded model: `--preset quick`", "equip bench --preset quick", ("growth", "latency", "tg", "ttft")
    ),
    **shape(
        "smollm-135m",
        "--policy streaming,h2o --budget 1024 -n 32 -r 7",
        "none,streaming,h2o",
        "--upto 32768 -n 16 -r 5",
    ),
    "smollm-135m-4096": Run(
        "smollm-135m: a budget of 4096",
        "equip bench --shape smollm-135m --policy none,streaming,h2o --budget 4096 --positions true -n 16 -r 7",
    ),
    "smollm-135m-first": Run(
        "smollm-135m: the first token, and each of 512",
        f"equip bench --shape smollm-135m --policy none,streaming,h2o {_FIRST}",
        ("latency", "ttft"),
    ),
    **shape("llama-3.2-1b", "--policy streaming --budget 512 -n 16 -r 5", "none,streaming", "--upto 8192 -n 8 -r 3"),
    **shape(
        "qwen2.5-0.5b", "--policy streaming,h2o --budget 512 -n 16 -r 5", "none,streaming", "--upto 8192 -n 8 -r 3"
    ),
    "smollm-135m-paper": Run(
        "smollm-135m: the paper's table",
        "equip bench --shape smollm-135m --preset paper --budget 512 --upto 8192 -r 5 -n 32",
    ),
}


def measure(folder: Path, names: Sequence[str]) -> None:
    """Run the commands and keep their output; an interrupted one leaves nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, run in RUNS.items():
        target = folder / f"{name}.json"
        if (target.exists() and name not in names) or (names and name not in names):
            continue
        words = run.command.split()[1:]
        print(f"{name}: {run.command}", file=sys.stderr, flush=True)
        begin = time.monotonic()
        command = [sys.executable, "-m", "equip_cli", *words, "-o", "json"]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.monotonic() - begin
        part = target.with_suffix(".part")
        part.write_text(json.dumps({"seconds": round(seconds), "records": json.loads(result.stdout)}))
        part.replace(target)
        print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)


# ---- the page


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows)) + "\n"


def ratio(value: Record | None) -> str:
    if value is None:
        return "-"
    low, high = value["ci95"]
    return f"{value['time_ratio_median']:.2f} [{low:.2f}, {high:.2f}]"


def milliseconds(record: Record) -> float:
    return statistics.median(record["samples_ns"]) / max(record["n_gen"], 1) / 1e6


def way(record: Record) -> str:
    """The row's name: policy and how the victim goes."""
    if record["policy"] == "none":
        return "none" if record["update"] == "none" else "llama.cpp's context shift"
    update = "shift, cached rotation" if record["rope_kernel"] == "cached" else record["update"]
    return f"{record['policy']}, {'in place' if update == 'inplace' else update}"


KERNELS = {"upstream": "off", "upstream-fa": "on"}


def attention(record: Record) -> str:
    """Flash attention on or off, or the name of our kernel."""
    return KERNELS.get(record["attn_kernel"], "ours")


def compare(records: Sequence[Record]) -> str:
    """Every row of single tokens: time, the ratios, and the graphs that were reused."""
    rows, stock = [], any(r.get("ratio_vs_stock") for r in records)
    for r in records:
        if r["kind"] != "tg":
            continue
        first = "1" if r["ratio_vs"] is None else ratio(r["ratio_vs"])
        cells = [str(r["n_depth"]), way(r), attention(r), f"{milliseconds(r):.2f}", first]
        if stock:
            cells.append(ratio(r["ratio_vs_stock"] or (r["ratio_vs"] if attention(r) != "ours" else None)))
        rows.append([*cells, ratio(r["ratio_vs_inplace"])])
    header = [
        "tokens kept",
        "row",
        "attention",
        "ms per token",
        "time / plain, same kernel" if stock else "time / plain",
    ]
    return table([*header, *(["time / plain, stock"] if stock else []), "time / in place"], rows)


def growth(records: Sequence[Record]) -> str:
    """Tokens per second by length, the faster attention of each cache, and where they cross."""
    lengths = sorted({r["n_depth"] for r in records if r["kind"] == "growth"})
    best: dict[tuple[str, int], Record] = {}
    for r in records:
        if r["kind"] == "growth":
            key = (
                f"none, {'our kernel' if attention(r) == 'ours' else 'stock'}"
                if r["policy"] == "none"
                else f"{way(r)}, {r['budget']}",
                r["n_depth"],
            )
            if key not in best or milliseconds(r) < milliseconds(best[key]):
                best[key] = r
    names = list(dict.fromkeys(name for name, _ in best))
    rows = []
    for name in names:
        speeds = [f"{1000 / milliseconds(best[name, n]):.1f}" if (name, n) in best else "-" for n in lengths]
        last = best[name, lengths[-1]]
        rows.append([name, *speeds, f"{last['kv_bytes'] / 2**20:.0f}", f"{last['rss_bytes'] / 2**20:.0f}"])
    text = table(["tokens per second at", *map(str, lengths), "cache, MiB, at the end", "process, MiB"], rows)
    for r in records:
        if r["kind"] == "summary" and "crossing_tokens" in r:
            where = f"from {r['crossing_tokens']} tokens on" if r["crossing_tokens"] is not None else "at no length"
            text += (
                f"\n{r['policy']}, {r['budget']}: faster than a growing cache ({r['baseline']}) {where}; {r['speedup_at_end']:.2f} times at "
                f"{lengths[-1]} tokens, {r['speedup']:.2f} times for the whole text.\n"
            )
    filled = {r["fill"] for r in records if r["kind"] == "growth"}
    if "copied" in filled:
        text += "\nLengths above a few hundred tokens were reached by copies of rows (`--fill read` reads them; the steps take the same time, see the lab notes).\n"
    return text


def ttft(records: Sequence[Record]) -> str:
    prompts = sorted({r["n_prompt"] for r in records if r["kind"] == "ttft"})
    cells: dict[str, dict[int, str]] = {}
    for r in records:
        if r["kind"] == "ttft":
            cells.setdefault(f"{way(r)}, attention {attention(r)}", {})[r["n_prompt"]] = f"{r['avg_ns'] / 1e9:.2f}"
    return table(
        ["seconds to the first token, prompt of", *map(str, prompts)],
        [[name, *(by.get(n, "-") for n in prompts)] for name, by in cells.items()],
    )


def latency(records: Sequence[Record]) -> str:
    rows = [
        [way(r), attention(r), *(f"{r['latency_us'][key] / 1000:.2f}" for key in ("p50", "p95", "p99", "max"))]
        for r in records
        if r["kind"] == "latency"
    ]
    return table(["milliseconds per token", "attention", "p50", "p95", "p99", "max"], rows)


def paper(records: Sequence[Record]) -> str:
    rows = [
        [
            r["test"],
            r["baseline"],
            r["note"] or f"{r['speedup']:.2f}",
            *(f"{r[k]:.2f}" if r[k] else "-" for k in ("paper_cpu", "paper_gpu")),
        ]
        for r in records
        if r["kind"] == "paper"
    ]
    return table(["method", "baseline over in place", "here", "paper, CPU", "paper, GPU"], rows)


PARTS: dict[str, Callable[[Sequence[Record]], str]] = {
    "tg": compare,
    "growth": growth,
    "ttft": ttft,
    "latency": latency,
    "paper": paper,
}


def page(folder: Path) -> None:
    """Write docs/benchmarks.md: what stands before the first line `<!-- measured -->` stays."""
    target = DOCS / "benchmarks.md"
    head = target.read_text().split("<!-- measured -->")[0]
    text = head + "<!-- measured -->\n"
    for name, run in RUNS.items():
        file = folder / f"{name}.json"
        if not file.is_file():
            continue
        found = json.loads(file.read_text())
        records = found["records"]
        first = records[0]
        weights = "trained weights" if name.startswith("embedded") else "random weights of the real shape"
        text += f"\n## {run.title}\n\n{weights[0].upper()}{weights[1:]}, {first['model_size'] / 2**20:.0f} MiB, {first['n_threads']} threads, "
        text += (
            f"keys and values {first['type_k']}/{first['type_v']}; {found['seconds']} s for\n\n    {run.command}\n\n"
        )
        kinds = {r["kind"] for r in records}
        if run.picture:
            picture = DOCS / "benchmarks" / f"{name}.svg"
            picture.parent.mkdir(exist_ok=True)
            plots.bench_figure([r for r in records if r["kind"] in run.picture], str(picture))
            text += f"![{run.title}](benchmarks/{picture.name})\n\n"
        shown = ["paper"] if "paper" in kinds else [kind for kind in PARTS if kind in kinds]
        text += "\n".join(PARTS[kind](records) for kind in shown)
    target.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("folder", type=Path)
    run.add_argument("names", nargs="*", metavar="NAME")
    commands.add_parser("page").add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "run":
        measure(args.folder, args.names)
    else:
        page(args.folder)


if __name__ == "__main__":
    main()
