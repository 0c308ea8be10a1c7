"""Decode beside another busy program: stock llama.cpp with each number of threads, and ours that adapts it.

    python studies/busy_laptop.py MODEL.gguf [--rounds 5] [--tokens 96]

The variants take turns, idle and with one process that uses a processor all the time. A row gives the median of tokens per
second and its range over the rounds; the last lines give medians of paired ratios. Settling: seconds from the moment in
which the other program starts or ends until the number of threads has changed for good.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from equip_cli import CachePolicy, Model, Sampling, Session
from equip_cli.terminal.columns import from_rows, table

PROMPT = "Once upon a time, in a town by the sea, there was a harbour master who wrote down everything that he saw. "


@contextlib.contextmanager
def busy(is_busy: bool) -> Iterator[None]:
    """One process that uses a processor all the time."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_busy else None
    try:
        time.sleep(1.0)
        yield
    finally:
        if other is not None:
            other.kill()
            other.wait()


def rate(session: Session, text: list[int], n: int) -> float:
    """Tokens per second of `n` steps behind the text, after a second in which the number of threads settles."""
    session.reset()  # all variants attend to as many tokens
    session.eval(text)
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        session.generate_tokens(8)
    before = session.stats()
    session.generate_tokens(n)
    after = session.stats()
    assert after["predicted_n"] - before["predicted_n"] == n
    return n / (after["predicted_us"] - before["predicted_us"]) * 1e6


def spread(values: list[float], decimals: int) -> str:
    """The median and the range: `92.7 (87.6-93.3)`."""
    return f"{statistics.median(values):.{decimals}f} ({min(values):.{decimals}f}-{max(values):.{decimals}f})"


def settling(session: Session, n_threads: int) -> tuple[float, float]:
    """Seconds until the threads have followed a load that begins, and one that ends."""

    def until(wanted: Any) -> float:
        begin = time.monotonic()
        while time.monotonic() - begin < 20 and not wanted(session.stats()["n_threads_now"]):
            session.generate_tokens(1)
        return time.monotonic() - begin

    session.generate_tokens(64)
    other = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    down = until(lambda n: n < n_threads)
    other.kill()
    other.wait()
    return down, until(lambda n: n == n_threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    with Model(args.model) as model, contextlib.ExitStack() as stack:
        n_all = model.session(CachePolicy("streaming", 1024)).stats()["n_threads"]
        bounded = CachePolicy("streaming", 1024)
        sessions: dict[str, Session] = {}
        for n in range(1, n_all + 1):
            sessions[f"stock, -t {n}"] = model.session(CachePolicy("none"), n_ctx=8192, n_threads=n)
            sessions[f"streaming, -t {n}"] = model.session(bounded, n_threads=n)
        sessions["streaming, adapts"] = model.session(bounded)
        for session in sessions.values():
            stack.enter_context(session)
            session.set_sampler(Sampling(temp=0.0, ignore_eos=True))
        text = (model.tokenize(PROMPT) * 64)[:1000]
        found: dict[tuple[str, bool], list[float]] = {}
        for _ in range(args.rounds):
            for is_busy in (False, True):
                with busy(is_busy):
                    for name, session in sessions.items():
                        found.setdefault((name, is_busy), []).append(rate(session, text, args.tokens))
        print(f"{Path(args.model).name}, {os.cpu_count()} processors, {n_all} threads, {args.rounds} rounds\n")
        rows = [[name, *(spread(found[name, is_busy], 1) for is_busy in (False, True))] for name in sessions]
        print(table(from_rows(["tokens per second", "idle", "busy"], rows)))
        fixed = [name for name in sessions if name.startswith("streaming, -t")]
        for is_busy in (False, True):
            ours = found["streaming, adapts", is_busy]
            best = max(fixed, key=lambda name, b=is_busy: statistics.median(found[name, b]))
            ratios = [a / b for a, b in zip(ours, found[best, is_busy], strict=True)]
            print(f"{'busy' if is_busy else 'idle'}: adapts / {best}: {spread(ratios, 2)}")
        times = [settling(sessions["streaming, adapts"], n_all) for _ in range(args.rounds)]
        print("settling: " + ", ".join(f"{down:.1f} s down, {up:.1f} s up" for down, up in times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
