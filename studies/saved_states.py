"""What it costs to save a session and to take it back, against reading its text again.

    python studies/saved_states.py MODEL.gguf|SHAPE[:TYPE] [--budgets 1024,4096] [--policies streaming,h2o] [--rounds 5]

SHAPE: a shape of `equip bench --shape`, with random weights. The session reads `budget` + 256 tokens, so that tokens have
been evicted. Times are medians of the rounds, in milliseconds; the text is read once, in chunks of n_ubatch. `file` is a file in
the folder for temporary files, flushed to its disk before it gets its name.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from equip_cli import CachePolicy, Model
from equip_cli.models import random_gguf


def median_ms(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def measure(model: Model, policy: CachePolicy, rounds: int, folder: Path) -> str:
    assert policy.budget is not None
    n = policy.budget + 256
    text = [1 + 7919 * i % (model.n_vocab - 1) for i in range(n)]
    path = folder / "session"
    with model.session(policy) as session, model.session(policy) as other:
        begin = time.perf_counter()
        session.eval(text)
        read = (time.perf_counter() - begin) * 1e3
        assert session.stats()["n_evicted"] > 0
        data = session.save_bytes()  # the first one looks at the model's weights
        other.load_bytes(data)
        save, load = median_ms(session.save_bytes, rounds), median_ms(lambda: other.load_bytes(data), rounds)
        write, back = (
            median_ms(lambda: session.save(path), rounds),
            median_ms(lambda: other.load(path), rounds),
        )
        assert other.save_bytes() == data
        kv = session.stats()["kv_bytes"]
    return (
        f"| {policy.name} | {policy.budget} | {len(data) / 1e6:.1f} | {kv / 1e6:.1f} | {save:.1f} | {load:.1f} | "
        f"{write:.1f} | {back:.1f} | {read:.0f} | {read / load:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--budgets", default="1024,4096")
    parser.add_argument("--policies", default="streaming,h2o")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as tmp:
        path = Path(args.model)
        if not path.is_file():
            path = random_gguf.shape_file(args.model)
        print("| policy | budget | MB | cache MB | save | load | save file | load file | read again | read / load |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        with Model(path) as model:
            for budget in map(int, args.budgets.split(",")):
                for name in args.policies.split(","):
                    print(measure(model, CachePolicy(name, budget=budget), args.rounds, Path(tmp)), flush=True)


if __name__ == "__main__":
    main()
