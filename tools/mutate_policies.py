"""Change each score formula in small ways, one at a time, and see whether native/tests/test-rules.cpp notices.

    python tools/mutate_policies.py              all files of native/policies
    python tools/mutate_policies.py rkv snapkv   some of them

A change that goes unnoticed is printed with its line, and the exit code is 1. What changes no choice is in EQUIVALENT. No llama.cpp is needed, only a C++17 compiler.
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
}


def changes(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, what it says then, the whole file) of each change; declarations, comments and constructors are left alone."""
    lines = source.split("\n")
    for i, line in enumerate(lines):
        code = line.split("//")[0]
        if not code.strip() or code.lstrip().startswith(("#", "class", "return {", '{ "', "std::unique")):
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
        description="See whether test-rules.cpp notices small changes of the score formulas."
    )
    names = sorted(path.stem for path in POLICIES.glob("*.cpp"))
    parser.add_argument("policies", nargs="*", metavar="POLICY", choices=[*names, []], help=", ".join(names))
    wanted = parser.parse_args().policies or names
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-O1", "-w", *INCLUDES]
    n_changes, n_missed = 0, 0
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        objects = {name: folder / f"{name}.o" for name in names}
        for name, target in objects.items():
            subprocess.run([*compiler, "-c", str(POLICIES / f"{name}.cpp"), "-o", str(target)], check=True)
        test = folder / "test-rules.o"
        subprocess.run(
            [*compiler, "-c", str(ROOT / "native" / "tests" / "test-rules.cpp"), "-o", str(test)], check=True
        )
        for name in wanted:
            others = [str(path) for other, path in objects.items() if other != name]
            for line, text, source in changes((POLICIES / f"{name}.cpp").read_text(encoding="utf-8")):
                if (name, text) in EQUIVALENT:
                    continue
                (folder / "changed.cpp").write_text(source, encoding="utf-8")
                program = folder / "program"
                build = [*compiler, str(folder / "changed.cpp"), str(test), *others, "-o", str(program)]
                if subprocess.run(build, capture_output=True).returncode != 0:
                    continue  # the compiler has noticed
                n_changes += 1
                try:
                    noticed = subprocess.run([str(program)], capture_output=True, timeout=120).returncode != 0
                except subprocess.TimeoutExpired:
                    noticed = True
                if not noticed:
                    n_missed += 1
                    print(f"native/policies/{name}.cpp:{line}: not noticed: {text}", flush=True)
    print(f"{n_changes - n_missed} of {n_changes} changes noticed")
    return 1 if n_missed else 0


if __name__ == "__main__":
    sys.exit(main())
