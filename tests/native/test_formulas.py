"""Each score formula alone against its twin in numpy, over heads of every size: what the matrix of test_scores.py sees only
in the victims."""

from __future__ import annotations

from pathlib import Path

import formula_scores
import pytest
from compiled import compiled
from oracle_formulas import FORMULAS
from places import REPOSITORY


@pytest.fixture(scope="module")
def formulas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """native/tests/formula-scores.cpp with the registry and the formulas; as one file, which compiles in a fraction of the time."""
    native, folder = REPOSITORY / "native", tmp_path_factory.mktemp("formulas")
    files = [native / "tests" / "formula-scores.cpp", *sorted((native / "policies").glob("*.cpp"))]
    files += [native / "cache" / f"llama-kv-{name}.cpp" for name in ("policy-spec", "victim-random")]
    (folder / "all.cc").write_text("".join(f'#include "{path}"\n' for path in files), encoding="utf-8")
    include = f"-I{native / 'cache'}"
    return compiled(folder / "formulas.so", "-shared", "-fPIC", "-O1", include, str(folder / "all.cc"))


@pytest.mark.parametrize("policy", FORMULAS)
def test_a_formula_is_its_twin(formulas: Path, policy: str) -> None:
    formula_scores.check(formulas, [policy])
