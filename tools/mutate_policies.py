"""Change each score formula in small ways, one at a time, and see whether its twin in numpy notices
(tests/support/formula_scores.py), or what native/tests/test-formulas.cpp has worked out by hand.

    python tools/mutate_policies.py              all files of native/policies
    python tools/mutate_policies.py rkv snapkv   some of them

A change that goes unnoticed is printed with its line, and the exit code is 1. What changes no choice is in EQUIVALENT. No llama.cpp is needed, only a
C++17 compiler and numpy.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
POLICIES = ROOT / "native" / "policies"
TWINS = ROOT / "tests" / "support" / "formula_scores.py"
INCLUDES = [f"-I{ROOT / 'native' / folder}" for folder in ("cache", "tests")]

# what is looked for in a line of code, and what takes its place
CHANGES = [
    (r"(?<=[\w\])]) ?\+ ?(?=[\w(])", " - "),
    (r"(?<=[\w\])]) ?- ?(?=[\w(])", " + "),
    (r"(?<=[\w\])])\*(?=[\w(])", "/"),
    (r"(?<=[\w\])])/(?=[\w(])", "*"),
    (r"std::max\(", "std::min("),
    (r"std::min\(", "std::max("),
    (r" > ", " < "),
    (r" < (?!n\b|head\.n\b|d\b|j1\b)", " > "),
    (r"\+=", "-="),
    (r"-=", "+="),
    (r"\[i\]", "[0]"),
    (r"= true", "= false"),
    (r"\b(0\.\d+)f?\b", "0.77"),
    (r"(?<![\w.])([2-9]|\d\d+)(?![\w.])", "1"),
]

# changes that change no choice, and why
EQUIVALENT = {
    ("keydiff", "static float inverse(float x) { return x > 0.0f ? 1.0f/x : 0.77; }"): "what it scales is zero there",
    ("rkv", "const uint32_t d = (head.n_embd_k + 7)*8*8;"): "more zeros behind each row",
    ("rkv", "const uint32_t d = (head.n_embd_k + 7)/1*8;"): "more zeros behind each row",
    ("rkv", "std::vector<double> cosines(n, 0.77);"): "the softmax does not see what is added to all",
    (
        "lagkv",
        "std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return worth[a] != worth[b] ? worth[a] < worth[b] : a > b; });",
    ): "no two tokens vary alike",
    ("lagkv", "sum -= x;"): "it is squared",
}


def changes(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, what it says then, the whole file) of each change; declarations, comments and constructors are left alone."""
    lines = source.split("\n")
    for i, line in enumerate(lines):
        code = line.split("//")[0]
        if not code.strip() or code.lstrip().startswith(
            ("#", "class", "return {", '{ "', "std::unique", "res.positive")  # the last: what GraphKV may be put on
        ):
            continue
        for pattern, replacement in CHANGES:
            if code.lstrip().startswith("for (") and replacement in (" + ", " - "):
                continue  # how far a loop takes four at a time is a matter of speed
            for match in re.finditer(pattern, code):
                changed = code[: match.start()] + replacement + code[match.end() :]
                if changed != code:
                    yield i + 1, changed.strip(), "\n".join([*lines[:i], changed, *lines[i + 1 :]])


def main() -> int:
    parser = argparse.ArgumentParser(
        description="See whether the formulas in numpy, or test-formulas.cpp, notice small changes of the score formulas."
    )
    names = sorted(path.stem for path in POLICIES.glob("*.cpp"))
    parser.add_argument("policies", nargs="*", metavar="POLICY", choices=[*names, []], help=", ".join(names))
    wanted = parser.parse_args().policies or names
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-O1", "-fPIC", "-w", *INCLUDES]
    tests = [ROOT / "native" / "tests" / f"{name}.cpp" for name in ("formula-scores", "test-formulas")]
    registry = [ROOT / "native" / "cache" / f"llama-kv-{name}.cpp" for name in ("policy-spec", "victim-random")]
    n_changes, n_missed = 0, 0
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)

        def compiled(path: Path) -> str:
            subprocess.run([*compiler, "-c", str(path), "-o", str(folder / f"{path.stem}.o")], check=True)
            return str(folder / f"{path.stem}.o")

        objects = {name: compiled(POLICIES / f"{name}.cpp") for name in names}
        scores, by_hand = map(compiled, tests)
        shared = [*map(compiled, registry)]
        for name in wanted:
            others = [path for other, path in objects.items() if other != name]
            original = (POLICIES / f"{name}.cpp").read_text(encoding="utf-8")
            formulas = ",".join(re.findall(r"> llama_kv_formula_(\w+)\(\) \{", original))
            for line, text, source in changes(original):
                if (name, text) in EQUIVALENT:
                    continue
                (folder / "changed.cpp").write_text(source, encoding="utf-8")
                try:
                    changed = compiled(folder / "changed.cpp")
                except subprocess.CalledProcessError:
                    continue  # the compiler has noticed
                n_changes += 1
                library, program = str(folder / "scores.so"), str(folder / "program")
                subprocess.run([*compiler, "-shared", changed, scores, *shared, *others, "-o", library], check=True)
                if fails([sys.executable, str(TWINS), library, formulas]):
                    continue
                subprocess.run([*compiler, changed, by_hand, *others, "-o", program], check=True)
                if not fails([program]):
                    n_missed += 1
                    print(f"native/policies/{name}.cpp:{line}: not noticed: {text}", flush=True)
    print(f"{n_changes - n_missed} of {n_changes} changes noticed")
    return 1 if n_missed else 0


def fails(command: list[str]) -> bool:
    """Whether it ends with an error, or not at all."""
    try:
        return subprocess.run(command, capture_output=True, timeout=120).returncode != 0
    except subprocess.TimeoutExpired:
        return True


if __name__ == "__main__":
    sys.exit(main())
