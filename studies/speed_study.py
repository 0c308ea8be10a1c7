"""Speed of the updates side by side, also with libraries that differ: figures for docs/lab-notes.md.

    python studies/speed_study.py SHAPE[:TYPE] --budgets 512,1024 --caches f16,q8_0 --lanes updates
    python studies/speed_study.py smollm-135m --budgets 2048 --lanes pinned
    python studies/speed_study.py smollm-135m --budgets 1024 --lanes random
    python studies/speed_study.py smollm-135m --budgets 1024,4096 --lanes scores
    python studies/speed_study.py ... --other-lib DIR    a lane `shift` on that library beside the installed one: to compare
                                                         with upstream's RoPE kernel, a copy of equip_cli/lib with the
                                                         libggml-cpu of the pristine build (tools/upstream_tests.py)

One process per library; the lanes take turns, one sample each, and only one process computes at a time. Every lane attends
over the same padded n_kv. One JSON object per lane on stdout; ratios are medians of pairs of the same turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from equip_cli import CachePolicy, Model, Session
from equip_cli.benchmark import compare, filler, padded

Lane = dict[str, Any]


def lanes_of(kind: str, budget: int, cache: str, other: bool) -> list[Lane]:
    none: list[Lane] = [{"label": "none, fa on", "policy": None, "fa": "on"}]
    if cache == "f16":
        none.append({"label": "none, fa off", "policy": None, "fa": "off"})

    def streaming(label: str, **more: Any) -> Lane:
        pinned, other_lib = more.pop("pinned", 0), more.pop("other", False)
        name = more.pop("name", "streaming")
        policy = {"name": name, "budget": budget, "positions": "cache", **more}
        return {"label": label, "policy": policy, "fa": "on", "pinned": pinned, "other": other_lib}

    if kind == "pinned":
        return [*none, *(streaming(f"inplace, {n} pinned", pinned=n) for n in (0, 64, 512, 1024) if n < budget - 64)]
    if kind == "random":
        rows = [streaming(f"random, rotate every {n}", name="random", rotate_every=n) for n in (1, 8, 32)]
        return [*none, streaming("streaming"), *rows]
    if kind == "scores":
        rows = [streaming("streaming, fa off", positions="true") | {"fa": "off"}]
        for fa in ("off", "on"):
            rows += [
                streaming(f"h2o head, fa {fa}", name="h2o", positions="true") | {"fa": fa},
                streaming(f"h2o head gather, fa {fa}", name="h2o", positions="true", update="gather") | {"fa": fa},
            ]
        rows += [
            streaming("h2o head, fa off, ranks", name="h2o") | {"fa": "off"},
            streaming("h2o head gather, fa off, ranks", name="h2o", update="gather") | {"fa": "off"},
            streaming("h2o layer, fa off", name="h2o", positions="true", scope="layer") | {"fa": "off"},
            streaming("h2o token, fa off", name="h2o", positions="true", scope="token") | {"fa": "off"},
        ]
        return [*none, *rows]
    if kind == "family":
        names = ["streaming", "random", "h2o", "tova", "snapkv", "a2sf", "vatp", "caote", "fastcaote", "pagedeviction"]
        rows = [
            streaming(f"{name}, fa off", name=name, positions="true") | {"fa": "off"}
            for name in [*names, "keydiff", "knorm", "rkv"]
        ]
        rows.append(streaming("random head, fa off", name="random", positions="true", scope="head") | {"fa": "off"})
        return [*none, *rows]
    if kind == "sinks":  # LLAMA_KV_SINKS decides when the session is made
        return [
            *none,
            streaming("sinks on the host") | {"env": {"LLAMA_KV_SINKS": "host"}},
            streaming("sinks in the graph") | {"env": {"LLAMA_KV_SINKS": "graph"}},
            streaming("positions true", positions="true"),
        ]
    rows = [streaming("inplace"), streaming("gather", update="gather"), streaming("shift", update="shift")]
    return [*none, *rows, *([streaming("shift, upstream's RoPE kernel", update="shift", other=True)] if other else [])]


def open_lane(model: Model, lane: Lane, budget: int, cache: str, threads: int, stack: ExitStack) -> Session:
    none = lane["policy"] is None
    os.environ.update(lane.get("env", {}))
    session = stack.enter_context(
        model.session(
            CachePolicy("none") if none else CachePolicy(**lane["policy"]),
            n_ctx=padded(budget) if none else None,
            n_ubatch=512,
            n_threads=threads,
            flash_attn=lane["fa"],
            type_k=cache,
            type_v=cache,
        )
    )
    for key in lane.get("env", {}):
        del os.environ[key]
    if lane.get("pinned"):
        session.pin(lane["pinned"])
    session.eval(filler(model, budget - 1 if none else budget))
    session.time_decode(16, rewind=none)
    return session


def worker() -> None:
    """Commands as JSON lines: {open: lanes, ...}, {time: label, n}, {close}."""
    with ExitStack() as outer:
        model: Model | None = None
        stack, sessions, lanes = ExitStack(), dict[str, Session](), dict[str, Lane]()
        for line in sys.stdin:
            job = json.loads(line)
            answer: Any = None
            if "model" in job:
                model = outer.enter_context(Model(job["model"]))
            elif "open" in job and model is not None:
                lane = job["open"]
                lanes[lane["label"]] = lane
                sessions[lane["label"]] = open_lane(model, lane, job["budget"], job["cache"], job["threads"], stack)
            elif "time" in job:
                none = lanes[job["time"]]["policy"] is None
                before = sessions[job["time"]].stats()["graphs_reused"]
                ns, host = sessions[job["time"]].time_decode(job["n"], rewind=none)
                stats = sessions[job["time"]].stats()
                answer = {"ns": sum(ns), "host": sum(host), "reused": stats["graphs_reused"] - before}
            elif "close" in job:
                stack.close()
                stack, sessions, lanes = ExitStack(), {}, {}
            print(json.dumps(answer), flush=True)


class Worker:
    def __init__(self, library: Path | None) -> None:
        env = dict(os.environ) | ({"EQUIP_LIB_PATH": str(library)} if library else {})
        command = [sys.executable, str(Path(__file__).resolve()), "worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, **job: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def measure(workers: dict[bool, Worker], budget: int, cache: str, args: argparse.Namespace) -> None:
    lanes = lanes_of(args.lanes, budget, cache, args.other_lib is not None)
    if args.only:
        lanes = [lane for lane in lanes if lane["policy"] is None or lane["label"] in args.only.split(";")]
    for lane in lanes:
        workers[lane.get("other", False)].ask(open=lane, budget=budget, cache=cache, threads=args.threads)
        print(f"{budget} {cache}: {lane['label']} is full", file=sys.stderr, flush=True)
    times: dict[str, list[dict[str, int]]] = {lane["label"]: [] for lane in lanes}
    for _ in range(args.repetitions):
        for lane in lanes:
            time.sleep(0.05)  # threads of the other process stop spinning
            times[lane["label"]].append(workers[lane.get("other", False)].ask(time=lane["label"], n=args.n))
    samples = {label: [sample["ns"] for sample in rows] for label, rows in times.items()}
    plain = {label: ns for label, ns in samples.items() if label.startswith("none")}
    best = min(plain, key=lambda label: statistics.median(plain[label]))
    for label, ns in samples.items():
        record: dict[str, Any] = {
            "shape": args.shape,
            "budget": budget,
            "cache": cache,
            "lane": label,
            "threads": args.threads,
            "ms_per_token": round(statistics.median(ns) / args.n / 1e6, 3),
            "host_us_per_token": round(statistics.median(row["host"] for row in times[label]) / args.n / 1e3, 1),
            "graphs_reused_of": [sum(row["reused"] for row in times[label]), args.n * args.repetitions],
        }
        inplace = "inplace" if "inplace" in samples else label.replace(" gather", "")
        for key, base in (("vs_none_fa_on", "none, fa on"), ("vs_best_none", best), ("vs_inplace", inplace)):
            if base in samples and base != label:
                ratio = compare(ns, samples[base])
                low, high = ratio["ci95"]
                record[key] = [round(ratio["time_ratio_median"], 3), round(low, 3), round(high, 3)]
        print(json.dumps(record), flush=True)
    for each in workers.values():
        each.ask(close=True)


def main() -> None:
    if sys.argv[1:] == ["worker"]:
        worker()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--budgets", default="1024")
    parser.add_argument("--caches", default="f16")
    parser.add_argument(
        "--lanes", choices=["updates", "pinned", "random", "sinks", "scores", "family"], default="updates"
    )
    parser.add_argument("--other-lib", type=Path)
    parser.add_argument("--only", metavar="LABEL;..", help="these of the lanes, and plain decode")
    parser.add_argument("-n", type=int, default=8)
    parser.add_argument("-r", "--repetitions", type=int, default=11)
    parser.add_argument("-t", "--threads", type=int, default=2)
    args = parser.parse_args()

    from equip_cli.models.random_gguf import shape_file

    path = str(shape_file(args.shape))
    workers = {False: Worker(None)} | ({True: Worker(args.other_lib)} if args.other_lib else {})
    for each in workers.values():
        each.ask(model=path)
    for cache in args.caches.split(","):
        for budget in args.budgets.split(","):
            measure(workers, int(budget), cache, args)


if __name__ == "__main__":
    main()
