"""Other RoPE parameters (YaRN, LongRoPE, Llama 3 factors, linear, partial), and what docs/architectures.md says.

llama.cpp's own shift is no reference for some of them (shift-zero.cpp shows which); there `gather` is, and a move of the
whole cache to other positions, which must not show.
"""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
from architectures import TOLERANCE, VARIANTS, Variant
from models import Spec

from equip_cli import Model, Session, UnsupportedModelError

ModelFile = Callable[["Spec | str"], Path]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

N_EVICTIONS = 150
F32 = ("type_k=f32", "type_v=f32")

# the shape of tests/support/models.py that takes the variant
SHAPES = {
    "llama + YaRN x4": "llama-gqa",
    "llama + YaRN x32": "llama-gqa",
    "llama + attention factor 1.19": "llama-gqa",
    "llama + linear x4": "llama-gqa-128",
    "llama + Llama 3 factors": "llama-gqa",
    "llama + LongRoPE, long": "llama-gqa-128",
    "qwen2 + YaRN x4": "qwen2-gqa",
    "gemma3 + partial rotary 50%": "gemma3-128",
    "gemma3 + linear x8": "gemma3",
    "gpt-oss + YaRN x32": "gpt-oss",
}
SCALED = [name for name in SHAPES if "YaRN" in name or "LongRoPE" in name or "factor 1" in name]


@pytest.fixture(scope="session")
def variant_file(model_file: ModelFile, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The GGUF of a variant, or of a plain model of tests/support/models.py, written once per run."""
    folder, made = tmp_path_factory.mktemp("variants"), dict[str, Path]()

    def get(name: str) -> Path:
        if name not in SHAPES:
            return model_file(name)
        if name not in made:
            target = folder / f"{len(made)}.gguf"
            made[name] = architectures.make_variant(VARIANTS[name], model_file(SHAPES[name]), target)
        return made[name]

    return get


# ---- llama.cpp's own shift ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama-gqa", F32),
        ("llama-gqa", (*F32, "times=40")),
        ("llama-gqa", ("type_k=q8_0",)),
        ("gemma3", F32),
        ("gemma3 + partial rotary 50%", F32),
        ("llama + linear x4", F32),
        ("llama + Llama 3 factors", F32),
    ],
)
def test_a_shift_of_zero_leaves_the_logits(
    run_native: Run, variant_file: Callable[[str], Path], model: str, options: tuple[str, ...]
) -> None:
    result = run_native("shift-zero", variant_file(model), *options)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= (1e-6 if options[0] == "type_k=f32" else architectures.SHIFTED_Q8)


@pytest.mark.parametrize("model", ["llama-gqa", "llama + Llama 3 factors", "gemma3 + partial rotary 50%"])
def test_a_shift_of_everything_leaves_the_logits(
    run_native: Run, variant_file: Callable[[str], Path], model: str
) -> None:
    result = run_native("shift-zero", variant_file(model), *F32, "by=7", "times=10")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= TOLERANCE


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("model", SCALED)
def test_llama_cpp_shift_is_wrong_where_it_is_refused(
    run_native: Run, variant_file: Callable[[str], Path], model: str, times: int
) -> None:
    """If this fails, upstream has mended its K-shift: allow update=shift there, and make the table anew."""
    result = run_native("shift-zero", variant_file(model), *F32, f"times={times}")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) > 1e-3


def test_llama_cpp_shift_of_quantised_partial_keys_is_wrong_where_it_is_refused(
    run_native: Run, variant_file: Callable[[str], Path]
) -> None:
    result = run_native("shift-zero", variant_file("gemma3 + partial rotary 50%"), "type_k=q8_0")
    assert result.returncode != 0 or not float(result.stdout) <= architectures.SHIFTED_Q8


@pytest.mark.parametrize(
    ("model", "type_k", "words"),
    [
        *((name, "f32", "magnitude factor" if "gpt-oss" not in name else "magnitude|sliding") for name in SCALED),
        ("gemma3 + partial rotary 50%", "q8_0", "partial rotary"),
        ("gemma3 + linear x8", "f32", "sliding-window"),
    ],
)
def test_shift_is_refused_where_it_is_wrong(
    variant_file: Callable[[str], Path], model: str, type_k: str, words: str
) -> None:
    options = architectures.EXACT | {"type_k": type_k, "type_v": "f16"}
    with Model(variant_file(model)) as handle, pytest.raises(UnsupportedModelError, match=words):
        Session(handle, architectures.policy("shift", "cache"), **options)


# ---- bounded caches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["streaming", "random"])
@pytest.mark.parametrize("name", SHAPES)
def test_updates_agree_with_other_rope_parameters(variant_file: Callable[[str], Path], name: str, policy: str) -> None:
    """The magnitude factor of YaRN and LongRoPE is applied once, factors and scales are the model's own."""
    with Model(variant_file(name)) as model:
        assert architectures.agreement(model, "cache", policy, ["inplace", "gather"], N_EVICTIONS) <= TOLERANCE


@pytest.mark.parametrize("name", SHAPES)
def test_moving_the_whole_cache_does_not_show(variant_file: Callable[[str], Path], name: str) -> None:
    with Model(variant_file(name)) as model:
        assert architectures.rebase_difference(model) <= TOLERANCE
        # the control: positions are worth far more than the tolerance
        both = [architectures.policy("inplace", rule, "random") for rule in ("cache", "true")]
        rows = list(architectures.run(model, both, N_EVICTIONS))
        assert max(architectures.relative(a, b) for a, b in rows) > 30 * TOLERANCE


@pytest.mark.parametrize("name", SHAPES)
def test_a_variant_is_not_the_plain_model(variant_file: Callable[[str], Path], name: str) -> None:
    """The parameters arrive: the logits are not those of the plain model."""
    rows = []
    for path in (variant_file(name), variant_file(SHAPES[name])):
        with Model(path) as model:
            rows.append([row[0] for row in architectures.run(model, [architectures.policy("inplace", "cache")], 0)])
    assert max(architectures.relative(a, b) for a, b in zip(*rows, strict=True)) > 10 * TOLERANCE


# ---- the table ------------------------------------------------------------------------------------------------------


def test_the_status_of_a_cell_lacks_its_numbers_alone() -> None:
    cell = "FAIL (updates 2e-07, but moving all keys alike changes 3e-01)"
    assert architectures.status(cell) == "FAIL (updates #, but moving all keys alike changes #)"
    assert architectures.status("ok (1.02); q8_0 keys") == "ok (#); q8_0 keys"
    assert architectures.status("pass (1e-04; the order of the slots alone 7e-05)") == "pass (#)"


def test_the_table_has_every_architecture_that_must_pass() -> None:
    found = architectures.read(architectures.TARGET.read_text(encoding="utf-8"))
    for column, names in ((1, architectures.PASS_CACHE), (2, architectures.PASS_TRUE)):
        for name in names:
            rows = [cells for row, cells in found.items() if row == name or row.rsplit("-", 1)[0] == name]
            assert rows and all(cells[column].startswith("pass") for cells in rows), name


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_the_table_is_what_the_library_does(tmp_path: Path, native_program: Callable[[str], tuple[Path, Path]]) -> None:
    upstream_tests: Any = importlib.import_module("upstream_tests")
    models = architectures.make_models(Path(upstream_tests.build("tests")) / "test-llama-archs", tmp_path)
    musts = [*architectures.PASS_CACHE, *architectures.PASS_TRUE]
    program, _ = native_program("shift-zero")
    chosen = {
        name: path
        for name, path in models.items()
        if (VARIANTS.get(name, Variant(name)).base.rsplit("-", 1)[0] in musts)
    }
    rows = architectures.collapsed([architectures.row_of(name, path, program) for name, path in chosen.items()])
    found = architectures.read(architectures.TARGET.read_text(encoding="utf-8"))
    assert {row.name: row.status for row in rows} == {row.name: found.get(row.name) for row in rows}
