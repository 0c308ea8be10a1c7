"""Time per token of plain decode at a length, with stock llama.cpp and with our attention kernel: figures for docs/lab-notes.md.

    python studies/whole_step.py SHAPE[:TYPE] [--n-kv 4096] [--cache f16|q8_0]   # stock with flash attention on, off; ours
    python studies/whole_step.py SHAPE[:TYPE] --fill                             # caches whose rows were copied, and read

All caches are alive at once and take turns; a ratio is the median of paired samples over the last lane. Rows are copied
from those of 64 tokens, but where they are read.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import ExitStack
from typing import Any

from equip_cli import CachePolicy, Model, Session
from equip_cli.benchmark import compare, filler
from equip_cli.models.random_gguf import shape_file

Lane = tuple[str, bool, bool]  # flash attention, our kernel, rows are read


def measure(model: Model, lanes: list[Lane], args: argparse.Namespace) -> list[dict[str, Any]]:
    n = args.n_kv
    with ExitStack() as stack:
        sessions: list[Session] = []
        for flash_attn, ours, is_read in lanes:
            session = stack.enter_context(
                model.session(
                    CachePolicy("none"),
                    n_ctx=n,
                    flash_attn=flash_attn,
                    cpu_attn=ours,
                    type_k=args.cache,
                    type_v=args.cache,
                )
            )
            session.eval(filler(model, n - 1 if is_read else 64))
            if not is_read:
                session.fill(n - 65)
            session.time_decode(3, rewind=True)
            sessions.append(session)
        times: list[list[int]] = [[] for _ in sessions]
        for _ in range(args.repetitions):
            for found, session in zip(times, sessions, strict=True):
                found.append(sum(session.time_decode(args.n, rewind=True)[0]))
    return [
        {
            "shape": args.shape,
            "n_kv": n,
            "cache": args.cache,
            "flash_attn": lane[0],
            "ours": lane[1],
            "fill": "read" if lane[2] else "copied",
            "ms_per_token": round(statistics.median(found) / args.n / 1e6, 2),
            "over_last": compare(found, times[-1]),
        }
        for lane, found in zip(lanes, times, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--n-kv", type=int, default=4096)
    parser.add_argument("--cache", default="f16")
    parser.add_argument("--fill", action="store_true")
    parser.add_argument("-n", type=int, default=3)
    parser.add_argument("-r", "--repetitions", type=int, default=9)
    args = parser.parse_args()
    off: list[Lane] = [("off", False, False)] if args.cache == "f16" else []
    groups: list[list[Lane]] = [[("on", False, False), *off, ("on", True, False)]]
    if args.fill:
        groups = [[("on", ours, True), ("on", ours, False)] for ours in (False, True)]
    with Model(shape_file(args.shape)) as model:
        for lanes in groups:
            for record in measure(model, lanes, args):
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
