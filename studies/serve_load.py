"""Requests of many clients at the same time: `equip serve`, and stock llama-server in turns with it.

    python studies/serve_load.py MODEL.gguf [--stock PROGRAM] [--policy streaming] [--budget 256] [--clients 8] [--turns 20]

Each client has a chat of so many turns, each of which adds about 60 tokens and gets an answer of 16; the server has `--lanes`
of them at the same time. Stock llama-server, given with `--stock`, has lanes as large as the budget, with its context shift
and without, and lanes of `--context` tokens that hold a chat whole. A row gives requests per second, the median and the 95th
percentile of seconds from a request to its last byte, tokens written per second, the share of the prompts' tokens that were
read, and requests that were refused, of all rounds together.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tools"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "native" / "cmake"))

from dropin_support import clean_environment, serve
from load_clients import Answer, Client, run
from serving import equip_serve

from equip_cli.terminal.columns import from_rows, table


@contextmanager
def server(name: str, args: argparse.Namespace, log: Path) -> Iterator[str]:
    """The URL of one of `variants`."""
    if name.startswith("equip"):
        given = ("--policy", args.policy, "--budget", args.budget, "-np", args.lanes, "--", "-t", args.threads)
        with equip_serve(log, args.model, *given) as ours:
            yield ours.url
        return
    n_ctx = args.context if name == "stock, whole chats" else args.budget
    command = [args.stock, "-m", args.model, "-c", str(n_ctx * args.lanes), "-np", str(args.lanes), "--no-kv-unified"]
    command += ["-t", str(args.threads)]
    if name == "stock, shift":
        command.append("--context-shift")
    environment = clean_environment(LD_LIBRARY_PATH=str(Path(args.stock).parent), OMP_WAIT_POLICY="passive")
    with serve(command, environment, "/health", log) as other:
        yield other.url


def measure(name: str, args: argparse.Namespace) -> tuple[list[Answer], float]:
    """The answers, and the seconds that all of them took."""
    with tempfile.TemporaryDirectory() as folder, server(name, args, Path(folder) / "log") as url:
        port = int(url.rsplit(":", 1)[1])
        clients = [
            Client(port, number, (25, 25), kinds=("chat",), options={"ignore_eos": True})
            for number in range(args.clients)
        ]
        begin = time.monotonic()
        answers = run(clients, args.turns)
        return answers, time.monotonic() - begin


def row(name: str, rounds: list[tuple[list[Answer], float]]) -> list[str]:
    answers = [each for found, _ in rounds for each in found]
    seconds = sum(taken for _, taken in rounds)
    good = [each for each in answers if each.status == 200]
    times = sorted(each.seconds for each in good)
    p95 = statistics.quantiles(times, n=20, method="inclusive")[-1]
    written = sum(each.timings["predicted_n"] for each in good)
    read = sum(each.timings["prompt_n"] for each in good) / sum(each.n_prompt for each in good)
    numbers = [
        f"{len(good) / seconds:.2f}",
        f"{statistics.median(times):.2f}",
        f"{p95:.2f}",
        f"{written / seconds:.1f}",
    ]
    return [name, *numbers, f"{read:.0%}", f"{len(answers) - len(good)} of {len(answers)}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stock", metavar="PROGRAM", help="llama-server of an unpatched llama.cpp")
    parser.add_argument("--policy", default="streaming")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    variants = [f"equip serve, {args.policy}"]
    if args.stock:
        variants += ["stock, shift", "stock, no shift", "stock, whole chats"]
        subprocess.run([args.stock, "--version"], check=True, capture_output=True)
    found: dict[str, list[tuple[list[Answer], float]]] = {name: [] for name in variants}
    loads = [os.getloadavg()[0]]
    for _ in range(args.rounds):
        for name in variants:
            found[name].append(measure(name, args))
            loads.append(os.getloadavg()[0])
    titles = ["server", "requests/s", "p50 s", "p95 s", "tokens/s", "read", "refused"]
    print(table(from_rows(titles, [row(name, rounds) for name, rounds in found.items()])))
    print(f"{os.cpu_count()} processors, load average {', '.join(f'{each:.1f}' for each in loads)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
