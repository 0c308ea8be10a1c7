"""The recipes of docs/adding-a-policy.md, followed to the letter: files and lines, compiled with the registry, against the
formulas in numpy; and the whole matrix with libllama's registry replaced by the result."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle_formulas
import pytest
from compiled import compiled
from places import REPOSITORY

SOURCE = REPOSITORY / "native"

POSITIONS = [9, 0, 5, 12, 11]
WEIGHTS = [0.75, 6.5, 2.0, 0.125, 1.0]

MAIN = """
#include "llama-kv-policy-spec.h"

#include <cstdio>

int main() {
    const auto spec = llama_kv_policy_parse("observed:budget=64,scope=layer");
    const auto formula = spec.desc->formula();

    const int32_t  pos[]     = { %(pos)s };
    const float    weights[] = { %(weights)s };

    llama_kv_head_view head = {};
    head.n       = 5;
    head.n_old   = 5;
    head.pos     = pos;
    head.weights = weights;
    head.n_group = 1;

    float out[5];
    formula->score(head, out, nullptr);
    for (const float x : out) {
        printf("%%.9g\\n", x);
    }
}
"""


def insert(path: Path, before: str, line: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert before in text, f"{path.name} has no {before!r}"
    path.write_text(text.replace(before, line + before, 1), encoding="utf-8")


Recipe = dict[str, str]  # file, declaration, row, and in numpy: twin, its name in FORMULAS


@pytest.fixture(scope="module")
def recipes() -> dict[str, Recipe]:
    """What the page says, by the name of the policy."""
    text = (REPOSITORY / "docs" / "adding-a-policy.md").read_text(encoding="utf-8")
    found: dict[str, Recipe] = {}
    for name in ("observed", "strided"):
        patterns = {
            "file": rf"^```cpp\n((?:(?!```).)*_{name}\(\) \{{.*?)^```$",
            "declaration": rf"^    (std::unique_ptr<\w+> \w+_{name}\(\);)$",
            "row": rf'^    (\{{ "{name}", .*\}},)$',
            "twin": rf"^```python\n(def {name}\(.*?)^```$",
            "named": rf'^    ("{name}": Formula.*\),)$',
        }
        found[name] = {}
        for part, pattern in patterns.items():
            matches = re.findall(pattern, text, flags=re.DOTALL | re.MULTILINE if "```" in pattern else re.MULTILINE)
            assert len(matches) == 1, f"{len(matches)} times: the {part} of {name}"
            found[name][part] = matches[0]
    return found


@pytest.fixture(scope="module")
def registry(recipes: dict[str, Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes' places, in a copy of the files that know of policies, compiled to a library in the same folder."""
    folder = tmp_path_factory.mktemp("recipes")
    for path in [*(SOURCE / "cache").iterdir(), *(SOURCE / "policies").iterdir()]:
        is_known = path.suffix == ".h" or path.parent.name == "policies"
        if is_known or path.name in ("llama-kv-policy-spec.cpp", "llama-kv-victim-random.cpp"):
            shutil.copy(path, folder)
    for name, recipe in recipes.items():
        (folder / f"{name}.cpp").write_text(recipe["file"], encoding="utf-8")
        before = "std::unique_ptr<llama_kv_formula> llama_kv_formula_random()"
        insert(folder / "llama-kv-policy-registry.h", before, recipe["declaration"] + "\n")
        insert(folder / "llama-kv-policy-spec.cpp", '        { "random",', f"        {recipe['row']}\n")
    # the recipes' files each alone; the others as one, which compiles in a tenth of the time
    others = sorted(path.name for path in folder.glob("*.cpp") if path.stem not in recipes)
    (folder / "others.cc").write_text("".join(f'#include "{name}"\n' for name in others), encoding="utf-8")
    return compiled(
        folder / "libpolicies.so",
        "-shared",
        "-fPIC",
        *(str(folder / f"{name}.cpp") for name in recipes),
        str(folder / "others.cc"),
    )


def test_the_recipe_compiles_and_scores_as_its_formula(
    tmp_path: Path, recipes: dict[str, Recipe], registry: Path
) -> None:
    numbers = {"pos": ", ".join(map(str, POSITIONS)), "weights": ", ".join(f"{w}f" for w in WEIGHTS)}
    main = tmp_path / "main.cpp"
    main.write_text(MAIN % numbers, encoding="utf-8")
    folder = registry.parent
    program = compiled(tmp_path / "main.exe", f"-I{folder}", str(main), str(registry), f"-Wl,-rpath,{folder}")
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

    scope: dict[str, Any] = dict(vars(oracle_formulas))
    exec(recipes["observed"]["twin"], scope)
    formula = eval("{" + recipes["observed"]["named"] + "}", scope)["observed"]
    order = np.argsort(POSITIONS)  # the twin sees the tokens by position
    want = formula.score(SimpleNamespace(pos=np.array(POSITIONS)[order], weights=np.array(WEIGHTS)[order]))
    assert [float(x) for x in result.stdout.split()] == pytest.approx(list(want[np.argsort(order)]), rel=1e-6)
    assert want[-1] == WEIGHTS[3]  # the newest token has been seen once


# ---- in the library: one that is loaded before libllama takes over its registry


def matrix(first: Path, *arguments: str, folder: Path = REPOSITORY) -> str:
    """pytest with this library; what it printed."""
    known = [str(folder), str(REPOSITORY / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"LD_PRELOAD": str(first), "PYTHONPATH": os.pathsep.join(filter(None, known))}
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return result.stdout


needs_preload = pytest.mark.skipif(sys.platform != "linux", reason="one library takes over another's calls on Linux")


@needs_preload
@pytest.mark.parametrize("name", ["observed", "strided"])
def test_the_recipes_pass_the_matrix(tmp_path: Path, recipes: dict[str, Recipe], registry: Path, name: str) -> None:
    twins = ["import numpy as np", "from oracle_formulas import ALL, FORMULAS, WEIGHTS, Array, Formula, Head"]
    for recipe in recipes.values():
        twins += [recipe["twin"], "FORMULAS.update({" + recipe["named"] + "})"]
    (tmp_path / "page_twins.py").write_text("\n".join(twins), encoding="utf-8")
    those = "described or setting or batch or reset or rewind"
    told = matrix(
        registry, "-p", "page_twins", "tests/native/test_scores.py", "-k", f"{name} and ({those})", folder=tmp_path
    )
    assert int(re.findall(r"(\d+) passed", told)[0]) >= 5


@needs_preload
def test_what_no_policy_asks_yet_is_right(tmp_path: Path) -> None:
    """Keys without their rotation, what a formula remembers, pages without ratios, the counts in the view."""
    toys = SOURCE / "tests" / "toy-policies.cpp"
    library = compiled(tmp_path / "toys.so", "-shared", "-fPIC", "-O2", f"-I{SOURCE / 'cache'}", str(toys))
    told = matrix(library, "tests/native/toy_policies.py")
    assert int(re.findall(r"(\d+) passed", told)[0]) >= 20
