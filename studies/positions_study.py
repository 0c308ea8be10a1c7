"""What positions by rank cost in quality: figures for docs/positions.md. Each command prints JSON.

    python studies/positions_study.py debts         logits off by how much, by --rotate-every
    python studies/positions_study.py drift         100,000 evictions: inplace, gather and shift beside a reference
    python studies/positions_study.py perplexity    streaming perplexity by budget, rule and update
    python studies/positions_study.py plot FILE     docs/drift.svg from the output of `drift` (needs matplotlib)

The stream is the held-out prose of the embedded model, over and over where it is too short. All sessions read the same
tokens, so only what the cache holds differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from equip_cli import CachePolicy, Model, Session
from equip_cli.models import embedded

F32 = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
F16 = {"type_k": "f16", "type_v": "f16", "flash_attn": "off"}
Q8 = {"type_k": "q8_0", "type_v": "q8_0", "flash_attn": "on"}
CACHES = {"f32": F32, "f16": F16, "q8_0": Q8}


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x -= x.max()
    return x - math.log(np.exp(x).sum())


def kl(reference: np.ndarray, other: np.ndarray) -> float:
    """Kullback-Leibler divergence of two rows of logits, in nats."""
    p, q = log_softmax(reference), log_softmax(other)
    return float(np.sum(np.exp(p) * (p - q)))


def rms(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square difference in units of a's range."""
    return float(np.sqrt(np.mean(np.square(a - b))) / (a.max() - a.min()))


def policy(name: str, budget: int, **more: Any) -> CachePolicy:
    return CachePolicy(name, budget=budget, positions="cache", **more)


def stream(model: Model) -> Iterator[int]:
    tokens = model.tokenize(embedded.prose())
    return itertools.chain(tokens, itertools.cycle(tokens[1:]))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def debts(model: Model, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Against rotate_every=1 in f32: rows with larger N, and the rounding of an f16 and of a q8_0 cache for comparison."""
    rows: list[tuple[str, int, str]] = [("f32", n, "debt") for n in args.every]
    rows += [(cache, n, "both") for cache in ("f16", "q8_0") for n in args.every]
    out = []
    for name, pinned in (("random", 0), ("streaming", args.pinned)):
        with ExitStack() as stack:

            def open_session(cache: str, n: int, name: str = name, pinned: int = pinned) -> Session:
                made = stack.enter_context(
                    model.session(policy(name, args.budget, rotate_every=n), n_threads=1, **CACHES[cache])
                )
                if pinned:
                    made.pin(pinned)
                return made

            reference = open_session("f32", 1)
            sessions = [open_session(cache, n) for cache, n, _ in rows]
            tokens = list(itertools.islice(stream(model), args.n + args.budget + 256))
            head = args.budget + 256
            for session in [reference, *sessions]:
                session.eval(tokens[:1])
                session.nll(tokens[1:head])
            divergence = np.zeros(len(rows))
            nll = np.zeros(len(rows) + 1)
            for i in range(head, len(tokens) - 1):
                reference.eval([tokens[i]])
                want = reference.logits()
                nll[-1] -= log_softmax(want)[tokens[i + 1]]
                for j, session in enumerate(sessions):
                    session.eval([tokens[i]])
                    got = session.logits()
                    divergence[j] += kl(want, got)
                    nll[j] -= log_softmax(got)[tokens[i + 1]]
            n = len(tokens) - 1 - head
            for j, (cache, every, what) in enumerate(rows):
                out.append(
                    {
                        "policy": name,
                        "budget": args.budget,
                        "pinned": pinned,
                        "cache": cache,
                        "rotate_every": every,
                        "what": what,
                        "n_tokens": n,
                        "kl": divergence[j] / n,
                        "ppl": math.exp(nll[j] / n),
                        "ppl_exact": math.exp(nll[-1] / n),
                    }
                )
                say(json.dumps(out[-1]))
    return out


def drift(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """RMS difference from `gather` in f32, whose keys are rotated afresh at each step, in windows along the stream."""
    rows = [
        ("inplace", "f32"),
        ("inplace", "f16"),
        ("inplace", "q8_0"),
        ("shift", "f32"),
        ("shift", "f16"),
        ("shift", "q8_0"),
    ]
    out: dict[str, Any] = {"model": model.path.name, "budget": args.budget, "window": args.window, "at": [], "rows": {}}
    with ExitStack() as stack:
        reference = stack.enter_context(
            model.session(policy("streaming", args.budget, update="gather"), n_threads=1, **F32)
        )
        sessions: dict[str, Session] = {}
        for update, cache in rows:
            label = f"{update} {cache}"
            try:
                sessions[label] = stack.enter_context(
                    model.session(policy("streaming", args.budget, update=update), n_threads=1, **CACHES[cache])
                )
                out["rows"][label] = []
            except Exception as error:  # shift of quantised keys of this head_dim
                say(f"{label}: {error}")
        tokens = list(itertools.islice(stream(model), args.n + args.budget + 1))
        for session in [reference, *sessions.values()]:
            session.eval(tokens[: args.budget])
        at = args.budget
        while at < len(tokens):
            skip = min(args.step - args.window, len(tokens) - at) if at > args.budget else 0
            for session in [reference, *sessions.values()]:
                session.nll(tokens[at : at + skip])
            at += skip
            sums = dict.fromkeys(sessions, 0.0)
            window = tokens[at : at + args.window]
            if len(window) < args.window:
                break
            for token in window:
                reference.eval([token])
                want = reference.logits()
                for label, session in sessions.items():
                    session.eval([token])
                    sums[label] += rms(want, session.logits())
            at += len(window)
            out["at"].append(at - args.budget)
            for label, value in sums.items():
                out["rows"][label].append(value / len(window))
            say(f"{out['at'][-1]}: " + ", ".join(f"{k} {v[-1]:.2e}" for k, v in out["rows"].items()))
        out["n_evicted"] = reference.stats()["n_evicted"]
    return out


def perplexity(model: Model, args: argparse.Namespace) -> list[dict[str, Any]]:
    tokens = list(itertools.islice(stream(model), args.n + 1))
    rules = [("true", "inplace"), ("cache", "inplace"), ("cache", "shift")]
    out = []
    for cache, budget, (positions, update) in itertools.product(args.caches, args.budgets, rules):
        chosen = CachePolicy("streaming", budget=budget, positions=positions, update=update)
        try:
            with model.session(chosen, n_threads=1, **CACHES[cache]) as session:
                session.eval(tokens[:1])
                value = math.exp(sum(session.nll(tokens[1:])) / (len(tokens) - 1))
        except Exception as error:
            say(f"{cache} {budget} {positions} {update}: {error}")
            continue
        out.append({"cache": cache, "budget": budget, "positions": positions, "update": update, "ppl": value})
        say(json.dumps(out[-1]))
    return out


def plot(path: Path, target: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    colours = {"f32": "#1b7837", "f16": "#2166ac", "q8_0": "#b2182b"}
    for file in path.parent.glob(path.name):
        data = json.loads(file.read_text())
        for label, values in data["rows"].items():
            update, cache = label.split()
            style = {"inplace": "-", "shift": "--"}[update]
            axes.plot(data["at"], values, style, color=colours[cache], label=f"{update}, {cache}")
    axes.set(yscale="log", xlabel="evictions", ylabel="RMS difference / range of the logits")
    axes.set_title(
        f"How far from keys that are rotated afresh at every step ({data['model']}, budget {data['budget']})"
    )
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("debts", "drift", "perplexity"):
        sub = commands.add_parser(name)
        sub.add_argument("--model", type=Path, default=embedded.MODEL)
        sub.add_argument("--budget", type=int, default=256)
        sub.add_argument("-n", type=int, default={"debts": 3000, "drift": 100_000, "perplexity": 50_000}[name])
        sub.add_argument("--every", type=numbers, default=[1, 4, 8, 16, 32, 64, 128, 256])
        sub.add_argument("--pinned", type=int, default=64)
        sub.add_argument("--step", type=int, default=5000)
        sub.add_argument("--window", type=int, default=100)
        sub.add_argument("--budgets", type=numbers, default=[64, 128, 256, 512, 1024])
        sub.add_argument("--caches", type=lambda text: text.split(","), default=["f32", "f16", "q8_0"])
    sub = commands.add_parser("plot")
    sub.add_argument("file", type=Path)
    sub.add_argument("--out", type=Path, default=Path("docs/drift.svg"))
    args = parser.parse_args(argv)
    if args.command == "plot":
        plot(args.file, args.out)
        return
    with Model(args.model) as model:
        print(json.dumps({"debts": debts, "drift": drift, "perplexity": perplexity}[args.command](model, args)))


if __name__ == "__main__":
    main()
