"""Run the bundle's programs on the GPU and on the CPU, compare with the oracle's logits, write numbers.

    python3 check.py BUNDLE BIN OUT [--cpu-only]

Python's standard library only. OUT gets cases.json, policy.txt, bench.jsonl and summary.md; the exit code is 1 if a
criterion is missed. Criterion, as on every backend: the RMS error against the float64 oracle, over all single tokens at
a full cache, is at most 1.1 times that of policy `none` on the same kept sets and the same device; an f32 cache without
flash attention on the CPU is held to 1e-4 of the logit range.

A re-base, which in a program comes every 65,536 positions, reads all stored keys, rotates them, and rounds them once more.
Positions by rank are run a second time with one every 50 positions: a key is then rounded AGE/50 times more, by its mean age
at the end 0.6 times, so that even if all noise were the keys', it would grow by no more than sqrt(1.6).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

# beside plain decode at the same n_kv, each budget
LANES = [
    "none@4096",
    "none@8192",
    "none@16384",
    "none@32768",
    "streaming:positions=true",
    "streaming:positions=cache",
    "streaming:positions=cache,update=gather",
    "h2o:positions=true",
    "composed h2o:positions=true",
    "host h2o:positions=true",
    "h2o:positions=true,scope=layer",
    "h2o:positions=true,scope=token",
    "h2o:positions=cache",
    "composed h2o:positions=cache",
    "host h2o:positions=cache",
    "h2o:positions=true,evict_every=16",
    "h2o:positions=true,update=gather",
]
# keys that are dequantised, rotated and rounded again, where they have moved up by a rank
QUANTISED_LANES = [
    "streaming:positions=cache",
    "h2o:positions=true",
    "h2o:positions=cache",
    "composed h2o:positions=cache",
    "host h2o:positions=cache",
]

RATIO, TOLERANCE = 1.1, 1e-4
REBASED_RATIO = RATIO * math.sqrt(1.6)

Row = dict[str, Any]


def read(path: Path) -> array[float]:
    values = array("f")
    values.frombytes(path.read_bytes())
    return values


def rms(a: array[float], b: array[float], rows: list[int], n: int) -> float:
    total = 0.0
    for row in rows:
        total += sum((x - y) ** 2 for x, y in zip(a[row * n : row * n + n], b[row * n : row * n + n], strict=True))
    return math.sqrt(total / (len(rows) * n))


def worst(a: array[float], b: array[float], n: int) -> float:
    """Largest difference of a row in units of b's range in that row."""
    result = 0.0
    for i in range(0, len(b), n):
        x, y = a[i : i + n], b[i : i + n]
        result = max(result, max(abs(p - q) for p, q in zip(x, y, strict=True)) / (max(y) - min(y)))
    return result


def bench_model(folder: Path, name: str, target: Path) -> Path:
    """Write the model of a recipe: a header, then each tensor as a block repeated, padded to the alignment."""
    recipe = json.loads((folder / f"{name}.json").read_text())
    blocks = {block: (folder / block).read_bytes() for block, _ in recipe["tensors"]}
    with target.open("wb") as file:
        file.write((folder / f"{name}.header").read_bytes())
        for block, n_bytes in recipe["tensors"]:
            file.write(bytes(-file.tell() % recipe["alignment"]))
            whole, rest = divmod(n_bytes, len(blocks[block]))
            for _ in range(whole):
                file.write(blocks[block])
            file.write(blocks[block][:rest])
        file.write(bytes(-file.tell() % recipe["alignment"]))
    return target


class Machine:
    def __init__(self, bundle: Path, programs: Path, out: Path) -> None:
        self.bundle, self.programs, self.out = bundle, programs, out
        self.failed: list[str] = []

    def run(
        self, device: str, policy: str, *command: object, rebase_at: int = 0, variables: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """device: gpu, or cpu, where the GPU is hidden; rebase_at: positions between two re-bases, 0 = as in a program."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "GGML_"))} | (variables or {})
        env["LD_LIBRARY_PATH"] = os.pathsep.join([str(self.programs), env.get("LD_LIBRARY_PATH", "")]).rstrip(
            os.pathsep
        )
        if device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        if policy:
            env["LLAMA_KV_POLICY"] = policy
        if rebase_at:
            env["LLAMA_KV_REBASE_AT"] = str(rebase_at)
        line = [str(self.programs / str(command[0])), *map(str, command[1:])]
        try:
            return subprocess.run(line, env=env, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(line, 124, "", "no answer after 600 s")

    def fail(self, what: str) -> None:
        print(f"FAILED {what}", flush=True)
        self.failed.append(what)

    def logits(self, case: Row, device: str, policy: str, rebase_at: int = 0) -> array[float] | None:
        folder, target = self.bundle / "cases", self.out / "logits.tmp"
        chunks = itertools.groupby(case["chunks"])
        options = [
            f"tokens={folder / case['tokens']}",
            "chunks=" + ",".join(f"{n}x{len(list(same))}" for n, same in chunks),
            f"n_ctx={(case['budget'] + case['n_ubatch'] + 255) // 256 * 256}",
            *(f"{key}={case[key]}" for key in ("n_ubatch", "fa", "type_k", "type_v")),
        ]
        if not policy:
            options += [f"evict={case['budget']}", f"protect={case['sinks']}"]
        command = ("logits-dump", folder / case["model_file"], target, *options)
        result = self.run(device, policy, *command, rebase_at=rebase_at)
        if result.returncode != 0:
            self.fail(f"{case['name']} on {device}, {policy or 'none'}: {result.stderr.strip()[-400:]}")
            return None
        values = read(target)
        target.unlink()
        return values

    def case(self, case: Row, devices: list[str]) -> Row:
        name, n = case["name"], case["n_vocab"]
        positions = case["positions"]
        policy = f"streaming:budget={case['budget']},sinks={case['sinks']},positions={positions}"
        rows = [i for i, full in enumerate(case["full"]) if full]
        want = {p: read(self.bundle / "cases" / case[f"want_{p}"]) for p in ("true", positions)}
        result: Row = {"name": name}
        for device in devices:
            none, bounded = self.logits(case, device, ""), self.logits(case, device, policy)
            if none is None or bounded is None:
                continue
            noise, error = rms(none, want["true"], rows, n), rms(bounded, want[positions], rows, n)
            far = worst(bounded, want[positions], n)
            result[device] = {"rms": error, "rms_none": noise, "ratio": error / noise, "max_of_range": far}
            exact = device == "cpu" and not case["fa"] and case["type_k"] == case["type_v"] == "f32"
            good = far <= TOLERANCE if exact else error <= RATIO * noise
            if not good or not math.isfinite(error):
                self.fail(f"{name} on {device}: RMS {error:.3e}, none {noise:.3e}, {far:.1e} of the range")
            again = self.logits(case, device, policy, rebase_at=50) if positions == "cache" else None
            if again is not None:
                error, far = rms(again, want[positions], rows, n), worst(again, want[positions], n)
                result[device]["ratio_rebased"] = error / noise
                if not (far <= TOLERANCE if exact else error <= REBASED_RATIO * noise):
                    self.fail(
                        f"{name} on {device}, re-based: RMS {error:.3e}, none {noise:.3e}, {far:.1e} of the range"
                    )
            if case["type_k"] == "f32" and not case["fa"]:
                self.updates(case, device, noise, rows)
        print(f"{name}: " + ", ".join(f"{d} {result[d]['ratio']:.3f}" for d in devices if d in result), flush=True)
        return result

    def updates(self, case: Row, device: str, noise: float, rows: list[int]) -> None:
        """Rotations on the device: `inplace` against `gather`, which rotates every key afresh, with evictions from the
        middle, positions by rank and a re-base every 50 positions. They may differ by the noise of both."""
        limit = 2 * RATIO * noise
        for name in ("streaming", "random", "h2o"):
            keep = "" if name == "streaming" else ",recent=8"
            policy = f"{name}:budget={case['budget']},sinks={case['sinks']},positions=cache,rotate_every=1{keep}"
            found = [self.logits(case, device, f"{policy},update={update}", 50) for update in ("inplace", "gather")]
            if found[0] is None or found[1] is None:
                continue
            apart = rms(found[0], found[1], rows, case["n_vocab"])
            print(f"  {case['name']} on {device}, {name}: inplace and gather {apart:.2e} apart, noise {noise:.2e}")
            if not apart <= limit:
                self.fail(
                    f"{case['name']} on {device}, {name}: inplace and gather are {apart:.3e} apart, not {limit:.3e}"
                )

    def programs_pass(self, device: str) -> str:
        """test-policy, batch-equiv, test-score-node and test-ahead; the last one by our kernels and by what is composed of ggml's
        operations, on the CPU to the bit, on the GPU also without CUDA graphs: what changes per step lies in device tensors, so
        that a graph that is played again sees it."""
        text = ""

        def run(*command: object, **variables: str) -> None:
            nonlocal text
            result = self.run(device, "", *command, variables=variables)
            said = (result.stdout + result.stderr).strip()
            line = " ".join([*(f"{k}={v}" for k, v in variables.items()), *map(str, command)])
            text += f"$ {line} ({device})\n{said}\n"
            if result.returncode != 0:
                self.fail(f"{line} on {device}: exit code {result.returncode}: {said[-400:]}")

        run("test-score-node", *(["CUDA0"] if device == "gpu" else []))
        for model in ("llama-gqa", "qwen2-gqa", "gemma3", "gpt-oss"):
            path = self.bundle / "cases" / f"{model}.gguf"
            run("test-policy", path)
            for fa in ("fa=0", "fa=1"):
                run("batch-equiv", path, "streaming:budget=64,sinks=4", "n_ctx=4096", "n_ubatch=16", fa)
            if device == "gpu":
                run("test-ahead", path, "40", "1e-3")
                run("test-ahead", path, "15", "1e-3", LLAMA_KV_SCORES="graph")
                run("test-ahead", path, "15", "1e-3", GGML_CUDA_DISABLE_GRAPHS="1")
            else:
                for form in ("node", "graph"):
                    run("test-ahead", path, "10", "0", LLAMA_KV_SCORES=form, EQUIP_TEST_THREADS="1")
        return text

    def bench(self, device: str, models: list[str], *options: str) -> list[Row]:
        rows = []
        kinds = [(["fa=1"], LANES), (["fa=0"], LANES), (["fa=1", "type_k=q8_0", "type_v=q8_0"], QUANTISED_LANES)]
        for model, (kind, lanes) in itertools.product(models, kinds):
            path = self.bundle / "bench" / f"{model}.gguf"
            if not path.is_file():
                bench_model(self.bundle / "bench", model, path)
            result = self.run(device, "", "bench-decode", path, *kind, f"lanes={';'.join(lanes)}", *options)
            if result.returncode != 0:
                self.fail(f"bench-decode {model} {' '.join(kind)} on {device}: {result.stderr.strip()[-400:]}")
                continue
            rows += [{"model": model, "device": device, **json.loads(line)} for line in result.stdout.splitlines()]
        for row in rows:
            if device == "gpu" and "CUDA" not in row["devices"]:
                self.fail(f"bench-decode sees no GPU, only {row['devices']}")
                break
        return rows


def table(cases: list[Row], bench: list[Row]) -> str:
    lines = [
        "| case | device | RMS error | of none | ratio | re-based every 50 | max, of the range |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in cases:
        for device, row in case.items():
            if isinstance(row, dict):
                lines.append(
                    f"| {case['name']} | {device} | {row['rms']:.2e} | {row['rms_none']:.2e} | {row['ratio']:.3f} "
                    f"| {row.get('ratio_rebased', math.nan):.3f} | {row['max_of_range']:.1e} |"
                )
    lines += [
        "",
        "| model | device | budget | FA | K | lane | us per token | of them policy | ratio to none [95%] | graphs reused |",
        "|" + " --- |" * 10,
    ]
    for row in bench:
        ratio: Row = row.get("ratio_vs", {})
        low, high = ratio.get("ci95", [0, 0])
        against = f"{ratio['time_ratio_median']:.3f} [{low:.3f}, {high:.3f}]" if ratio else ""
        lines.append(
            f"| {row['model']} | {row['device']} | {row['budget']} | {'on' if row['flash_attn'] else 'off'} "
            f"| {row['type_k']} | {row['lane']} | {row['us_per_token']:.1f} | {row['policy_us']:.0f} | {against} "
            f"| {row['graphs_reused']}/{row['steps']} |"
        )
    return "\n".join([*lines, "", *targets(bench)]) + "\n"


# lane, what it is compared with, the bound, and whether it is an upper one; gather's are the paper's speedups
TARGETS = [
    ("streaming:positions=cache", "none", 1.02, True),
    ("h2o:positions=true", "none", 1.10, True),
    ("h2o:positions=cache", "none", 1.20, True),
    ("streaming:positions=cache,update=gather", "streaming:positions=cache", 1.47, False),
    ("h2o:positions=true,update=gather", "h2o:positions=true", 1.86, False),
]


def targets(bench: list[Row]) -> list[str]:
    """What the speeds were to be, with flash attention and an f16 cache: ratios of the medians."""
    lines = ["| model | budget | lane | to | ratio | target | |", "|" + " --- |" * 7]
    kept: dict[tuple[str, int], dict[str, float]] = {}
    for row in bench:
        if row["flash_attn"] and row["type_k"] == "f16":
            kept.setdefault((row["model"], row["budget"]), {})[row["lane"]] = row["us_per_token"]
    for (model, budget), us in kept.items():
        for lane, other, bound, is_most in TARGETS:
            if lane in us and other in us:
                ratio = us[lane] / us[other]
                met = "met" if (ratio <= bound) == is_most else "missed"
                sign = "<=" if is_most else ">="
                lines.append(f"| {model} | {budget} | {lane} | {other} | {ratio:.3f} | {sign} {bound} | {met} |")
        h2o = us.get("h2o:positions=true")
        depths = sorted((int(lane[5:]), t) for lane, t in us.items() if lane.startswith("none@"))
        slower = [depth for depth, t in depths if h2o is not None and t > h2o]
        if h2o is not None and depths:
            said = f"slower from {slower[0]} tokens on" if slower else f"no slower up to {depths[-1][0]} tokens"
            lines.append(f"| {model} | {budget} | none | h2o:positions=true | {said} | | |")
    return lines


def main() -> int:
    bundle, programs, out = map(Path, sys.argv[1:4])
    devices = ["cpu"] if "--cpu-only" in sys.argv[4:] else ["gpu", "cpu"]
    out.mkdir(parents=True, exist_ok=True)
    machine = Machine(bundle, programs, out)
    cases = [machine.case(case, devices) for case in json.loads((bundle / "cases" / "cases.json").read_text())]
    (out / "cases.json").write_text(json.dumps(cases, indent=1))
    (out / "policy.txt").write_text("".join(machine.programs_pass(device) for device in devices))
    if devices[0] == "gpu":
        bench = machine.bench("gpu", ["smollm-135m", "llama-3.2-1b"], "budgets=1024,4096", "n=32", "r=15")
    else:
        bench = machine.bench("cpu", ["smollm-135m"], "budgets=256", "n=4", "r=5")
    (out / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bench))
    (out / "summary.md").write_text(table(cases, bench))
    print(table(cases, bench))
    print("FAILED: " + "; ".join(machine.failed) if machine.failed else "OK")
    return 1 if machine.failed else 0


if __name__ == "__main__":
    sys.exit(main())
