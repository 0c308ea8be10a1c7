"""Requests of many clients at the same time: `equip serve`, and stock llama-server in turns with it.

    python tools/upstream_tests.py stock          # builds it from the pristine tree, as ours is built
    python studies/serve_load.py MODEL.gguf --stock [PROGRAM] [--rounds 5] [--policy streaming] [--budget 256] [--turns 20]

Each client has a chat of so many turns, each of which adds about 60 tokens and gets an answer of 16; the server has `--lanes`
of them at the same time. A round starts every server once, one after the other, so that what else the machine does falls on
all of them. Stock llama-server has lanes of `--context` tokens that hold a chat whole, with its context shift and without, and
lanes as large as the budget, which refuse a chat that has grown beyond them, whether they shift or not.

The first table has the medians of the rounds: requests per second, the median and the 95th percentile of seconds from a request
to its last byte, tokens written per second, the share of the prompts' tokens that were read, and requests that were refused.
The second has the ratios of `equip serve` to each of the others, pair by pair within a round: the median, and the least and
the greatest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tools"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "native" / "cmake"))

from dropin_support import clean_environment, serve
from load_clients import Client, run
from serving import equip_serve
from upstream_tests import build

from equip_cli.terminal.columns import from_rows, table

# of stock llama-server: whether a lane holds a whole chat, or as much as the budget; and its options
STOCK: dict[str, tuple[bool, list[str]]] = {
    "stock, whole chats, shift": (True, ["--context-shift"]),
    "stock, whole chats, no shift": (True, ["--no-context-shift"]),
    "stock, lanes of the budget, shift": (False, ["--context-shift"]),
    "stock, lanes of the budget, no shift": (False, ["--no-context-shift"]),
}


@dataclass(frozen=True)
class Round:
    """What one server did in one round; seconds of a request are those from sending it to the last byte of its answer."""

    requests_per_second: float
    p50: float
    p95: float
    tokens_per_second: float
    read: float  # the share of the prompts' tokens
    n_refused: int
    n_requests: int


def stock_program(given: str) -> str:
    """The path of llama-server; where none is given, of the one of the pristine tree, which is built if need be."""
    program = Path(given) if given else build("stock") / ("llama-server.exe" if os.name == "nt" else "llama-server")
    subprocess.run([program, "--version"], env=stock_environment(program), check=True, capture_output=True)
    return str(program)


def stock_environment(program: str | Path) -> dict[str, str]:
    return clean_environment(LD_LIBRARY_PATH=str(Path(program).parent), OMP_WAIT_POLICY="passive")


@contextmanager
def server(name: str, args: argparse.Namespace, log: Path) -> Iterator[str]:
    """The URL of `equip serve`, or of one of STOCK."""
    if name not in STOCK:
        given = ("--policy", args.policy, "--budget", args.budget, "-np", args.lanes, "--", "-t", args.threads)
        with equip_serve(log, args.model, *given) as ours:
            yield ours.url
        return
    is_whole, options = STOCK[name]
    n_ctx = args.context if is_whole else args.budget
    command = [args.stock, "-m", args.model, "-c", str(n_ctx * args.lanes), "-np", str(args.lanes), "--no-kv-unified"]
    command += ["-t", str(args.threads), "--fit", "off", *options]
    with serve(command, stock_environment(args.stock), "/health", log) as other:
        yield other.url


def measure(name: str, args: argparse.Namespace) -> Round:
    with tempfile.TemporaryDirectory() as folder, server(name, args, Path(folder) / "log") as url:
        port = int(url.rsplit(":", 1)[1])
        clients = [
            Client(port, number, (25, 25), kinds=("chat",), options={"ignore_eos": True})
            for number in range(args.clients)
        ]
        begin = time.monotonic()
        answers = run(clients, args.turns)
        seconds = time.monotonic() - begin
    good = [each for each in answers if each.status == 200]
    times = sorted(each.seconds for each in good)
    return Round(
        requests_per_second=len(good) / seconds,
        p50=statistics.median(times),
        p95=statistics.quantiles(times, n=20, method="inclusive")[-1],
        tokens_per_second=sum(each.timings["predicted_n"] for each in good) / seconds,
        read=sum(each.timings["prompt_n"] for each in good) / sum(each.n_prompt for each in good),
        n_refused=len(answers) - len(good),
        n_requests=len(answers),
    )


def row(name: str, rounds: Sequence[Round]) -> list[str]:
    def median(key: str, form: str) -> str:
        return format(statistics.median(getattr(each, key) for each in rounds), form)

    numbers = [median("requests_per_second", ".2f"), median("p50", ".2f"), median("p95", ".2f")]
    numbers += [median("tokens_per_second", ".1f"), median("read", ".0%")]
    n_refused, n_requests = (sum(getattr(each, key) for each in rounds) for key in ("n_refused", "n_requests"))
    return [name, *numbers, f"{n_refused} of {n_requests}"]


def ratio(ours: Sequence[Round], theirs: Sequence[Round], key: str) -> str:
    """The median of the ratios within each round, and the range of all of them."""
    found = sorted(getattr(a, key) / getattr(b, key) for a, b in zip(ours, theirs, strict=True))
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument(
        "--stock", nargs="?", const="", metavar="PROGRAM", help="beside llama-server of an unpatched llama.cpp"
    )
    parser.add_argument("--only", action="append", choices=STOCK, help="of stock llama-server; may be repeated")
    parser.add_argument("--policy", default="streaming")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    ours, others = f"equip serve, {args.policy}", list[str]()
    if args.stock is not None:
        args.stock = stock_program(args.stock)
        others = args.only or list(STOCK)
    found: dict[str, list[Round]] = {name: [] for name in [ours, *others]}
    loads = [os.getloadavg()[0]]
    for number in range(args.rounds):
        for name, rounds in found.items():
            rounds.append(measure(name, args))
            loads.append(os.getloadavg()[0])
            said = f"{rounds[-1].requests_per_second:.2f} requests/s, p95 {rounds[-1].p95:.2f} s"
            print(f"round {number + 1} of {args.rounds}: {name}: {said}", file=sys.stderr, flush=True)
    titles = ["server", "requests/s", "p50 s", "p95 s", "tokens/s", "read", "refused"]
    print(table(from_rows(titles, [row(name, rounds) for name, rounds in found.items()])))
    if others:
        keys = ("requests_per_second", "p50", "p95")
        rows = [[name, *(ratio(found[ours], found[name], key) for key in keys)] for name in others]
        print(f"{ours}, to\n{table(from_rows(['server', 'requests/s', 'p50', 'p95'], rows))}")
    print(f"{os.cpu_count()} processors, load average {min(loads):.1f} to {max(loads):.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
