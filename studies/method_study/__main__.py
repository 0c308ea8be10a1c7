"""Methods that the library does not have, beside those that it has, at equal bytes: a Markdown table on stdout.

    pip install torch gguf
    python -m method_study MODEL --text FILE --work DIR                  (in the folder studies)
    python -m method_study MODEL --text FILE --work DIR --budget 512 --rows "h2o;SpAtten"

MODEL is a GGUF file of the architecture llama or gemma3. A text is read token by token, and each row keeps a budget of
tokens per KV head, the mean over heads and layers, in the layers without a sliding window. KL, in nats, is that of the full
cache to the row, at the positions from the first eviction on; intervals are 95%, by bootstrap over blocks of 32 tokens, and
the ratio to another row's KL is paired. Positions are `true`, and `cache` for streaming. A row is saved in DIR when it
is done, and taken from there the next time. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .eviction import run
from .measure import Judge, Row, draws, interval, ratio
from .network import Network, run_full
from .rows import BUILT, ROWS


def read_tokens(model: Path, text: Path, n: int, work: Path) -> list[int]:
    """The first n tokens of a text, as the library makes them. Raises SystemExit where it has fewer."""
    known = work / f"{model.stem}.tokens.json"
    tokens: list[int] = json.loads(known.read_text()) if known.exists() else []
    if len(tokens) < n:
        from equip_cli import Model

        with Model(model) as library:
            tokens = library.tokenize(text.read_text(encoding="utf-8")[: 10 * n])
        known.write_text(json.dumps(tokens))
    if len(tokens) < n:
        raise SystemExit(f"{text} has {len(tokens)} tokens and {n} are wanted: give a longer text")
    return tokens[:n]


def names(text: str) -> list[str]:
    chosen = text.split(";")
    if unknown := [name for name in chosen if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"there is no row {unknown[0]}: choose of {'; '.join(ROWS)}")
    return chosen


def place(args: argparse.Namespace, name: str) -> Path:
    file = f"{args.model.stem}-{args.tokens}-{args.every}-{args.budget}-{name.replace(', ', '-').replace(' ', '_')}.npz"
    return Path(args.work / file)


def compute(args: argparse.Namespace) -> None:
    """The rows that are not saved yet."""
    missing = [name for name in args.rows if not place(args, name).exists()]
    if not missing:
        return
    tokens = read_tokens(args.model, args.text, args.tokens, args.work)
    network = Network.load(args.model)
    full = run_full(network, tokens)
    judge = Judge(network, tokens, full.hidden, args.budget, args.every)
    for name in missing:
        entry, begin = ROWS[name], time.perf_counter()
        if (entry.needs_heads and network.spec.n_head_kv == 1) or place(args, name).exists():
            continue  # another process may have made it meanwhile
        method = entry.make(name, args.budget)
        hidden = run(network, method, full)
        row = judge.row(hidden, len(tokens) - len(hidden))
        row.save(place(args, name))
        seconds = time.perf_counter() - begin
        print(f"{name}: KL {row.kl.mean():.4f}, perplexity {row.perplexity:.2f}, {seconds:.0f} s", file=sys.stderr)


def table(args: argparse.Namespace) -> None:
    rows = {name: Row.load(place(args, name)) for name in ROWS if place(args, name).exists()}
    if not rows:
        return
    weights = draws(next(iter(rows.values())).positions)
    built = [name for name in BUILT if name in rows]
    best = min(built, key=lambda name: rows[name].kl.mean()) if built else None
    print("| row | perplexity | same top token | KL, nats per token | to its base | base |", f"to `{best}` |")
    print("| --- | ---: | ---: | ---: | ---: | --- | ---: |")

    def beside(row: Row, base: str | None) -> str:
        if base not in rows or rows[base].kl.sum() == 0:
            return "-"
        return "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(row, rows[base], weights))

    for name, row in rows.items():
        low, high = interval(row.kl, weights)
        base = ROWS[name].base
        cells = [
            *(name, f"{row.perplexity:.2f}", f"{row.same.mean():.3f}", f"{row.kl.mean():.4f} [{low:.4f}, {high:.4f}]"),
            *(beside(row, base), base or "-", beside(row, None if name == best else best)),
        ]
        print(f"| {' | '.join(cells)} |")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m method_study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the rows that are done")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--every", type=int, default=1, help="score every so many positions")
    parser.add_argument("--rows", type=names, default=list(ROWS), help="by semicolons; default: all")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if args.tokens < args.budget + 2:
        parser.error(f"--tokens {args.tokens}: nothing is evicted before token {args.budget}; ask for more")
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        compute(args)
    table(args)


if __name__ == "__main__":
    main()
