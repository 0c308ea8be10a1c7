"""The recipe of docs/adding-a-policy.md, followed to the letter: its file and its two lines, compiled with the registry, against
its formula in numpy."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle_rules
import pytest
from places import REPOSITORY

SOURCE = REPOSITORY / "native"

POSITIONS = [9, 0, 5, 12, 11]
WEIGHTS = [0.75, 6.5, 2.0, 0.125, 1.0]

MAIN = """
#include "llama-kv-policy-spec.h"

#include <cstdio>

int main() {
    const auto spec = llama_kv_policy_parse("observed:budget=64,scope=layer");
    const auto rule = spec.desc->rule();

    const int32_t  pos[]     = { %(pos)s };
    const float    weights[] = { %(weights)s };

    llama_kv_head_view head = {};
    head.n       = 5;
    head.n_old   = 5;
    head.pos     = pos;
    head.weights = weights;
    head.n_group = 1;

    float out[5];
    rule->score(head, out, nullptr);
    for (const float x : out) {
        printf("%%.9g\\n", x);
    }
}
"""


def compiler() -> list[str]:
    """The one that the installed libequip was built with, else CXX or c++."""
    built = importlib.import_module("upstream_tests").installed_build().get("cxx", "")
    return [built] if Path(built).is_file() else shlex.split(os.environ.get("CXX", "c++"))


def insert(path: Path, before: str, line: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert before in text, f"{path.name} has no {before!r}"
    path.write_text(text.replace(before, line + before, 1), encoding="utf-8")


def test_the_recipe_compiles_and_scores_as_its_formula(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "adding-a-policy.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```cpp\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    twins = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    declared = re.findall(r"^    (std::unique_ptr<llama_kv_rule> .*;)$", text, flags=re.MULTILINE)
    registered = re.findall(r'^    (\{ "observed", .*\},)$', text, flags=re.MULTILINE)
    named = re.findall(r'^    ("observed": Rule.*\),)$', text, flags=re.MULTILINE)
    assert list(map(len, (blocks, twins, declared, registered, named))) == [1, 1, 1, 1, 1]

    # the recipe's three places, in a copy of the files that know of rules
    for path in [*(SOURCE / "cache").iterdir(), *(SOURCE / "policies").iterdir()]:
        is_known = path.suffix == ".h" or path.parent.name == "policies"
        if is_known or path.name in ("llama-kv-policy-spec.cpp", "llama-kv-victim-random.cpp"):
            shutil.copy(path, tmp_path)
    (tmp_path / "observed.cpp").write_text(blocks[0], encoding="utf-8")
    insert(
        tmp_path / "llama-kv-policy-registry.h",
        "std::unique_ptr<llama_kv_rule> llama_kv_rule_random()",
        declared[0] + "\n",
    )
    insert(tmp_path / "llama-kv-policy-spec.cpp", '        { "random",', f"        {registered[0]}\n")
    numbers = {"pos": ", ".join(map(str, POSITIONS)), "weights": ", ".join(f"{w}f" for w in WEIGHTS)}
    (tmp_path / "main.cpp").write_text(MAIN % numbers, encoding="utf-8")

    program = tmp_path / "main.exe"
    command = [*compiler(), "-std=c++17", "-Wall", "-Wextra", "-o", str(program), *map(str, tmp_path.glob("*.cpp"))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "warning" not in result.stderr, result.stderr[-4000:]

    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

    scope: dict[str, Any] = dict(vars(oracle_rules))
    exec(twins[0], scope)
    rule = eval("{" + named[0] + "}", scope)["observed"]
    order = np.argsort(POSITIONS)  # the twin sees the tokens by position
    want = rule.score(SimpleNamespace(pos=np.array(POSITIONS)[order], weights=np.array(WEIGHTS)[order]))
    assert [float(x) for x in result.stdout.split()] == pytest.approx(list(want[np.argsort(order)]), rel=1e-6)
    assert want[-1] == WEIGHTS[3]  # the newest token has been seen once
