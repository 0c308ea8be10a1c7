"""Upstream's own tests on the patched tree, and every architecture that upstream can make a tiny model of."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from places import SUPPORT

pytestmark = pytest.mark.full

# runs far past the budget, or is refused with one sentence; anything else (an abort, a hang) fails
BOUNDED_RUN = """
import sys
import tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from native_api import Library, Model, NativeError, Session
try:
    model = Model(Library(), Path(sys.argv[1]))
    n = min(model.n_vocab, 100)
    for spec in ("h2o:head", "h2o:token", "vatp:layer", "pagedeviction:layer", "random:head"):
        policy, scope = spec.split(":")
        options = dict(policy=policy, scope=scope, positions="true", budget=48, recent=8, n_ubatch=16, n_batch=16)
        try:
            with Session(model, **options) as session:
                for t in [*range(0, 64, 16)]:
                    session.eval([(t + i) % n for i in range(16)])
                for t in range(40):
                    logits = session.eval([t % n])
                stats = session.stats()
                assert stats["n_past"] == 104 and 32 < stats["n_used"] <= 48, (spec, stats)
                assert (logits == logits).all(), spec
            print(spec, "ran")
        except NativeError as error:
            assert str(error).count(". ") == 0 and len(str(error)) > 20, error
            print(spec, "refused:", error)
    with Session(model, policy="streaming", budget=40, sinks=4, n_ubatch=16, n_batch=16) as session:
        session.eval([t % n for t in range(70)])
        for t in range(70):
            session.eval([t % n])
        stats, kept = session.stats(), list(session.kept())
        assert stats["n_past"] == 140 and stats["n_used"] == 40, stats
        assert kept == [0, 1, 2, 3, *range(104, 140)], kept
        assert session.rewind(130) == 1 and session.rewind(50) == 0
except NativeError as error:
    if error.status == -9:
        print("ran")
        sys.exit(0)
    assert str(error).count(". ") == 0 and len(str(error)) > 20, error
    print("refused:", error)
else:
    raise SystemExit("a rewind into the evicted positions was allowed")
"""


@pytest.fixture(scope="session")
def programs() -> Path:
    return Path(importlib.import_module("upstream_tests").build("tests"))


@pytest.fixture(scope="session")
def arch_models(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny random model per architecture, made by upstream."""
    folder = tmp_path_factory.mktemp("archs")
    run(programs / "test-llama-archs", "-o", folder)
    return folder


def run(*command: object, timeout: int = 900, **variables: str) -> str:
    # some of upstream's tests write into the current folder
    with tempfile.TemporaryDirectory() as folder:
        line = [str(c) for c in command]
        env = os.environ | variables
        result = subprocess.run(line, capture_output=True, text=True, timeout=timeout, cwd=folder, env=env)
    assert result.returncode == 0, (
        f"{command} gives {result.returncode}:\n{result.stdout[-3000:]}{result.stderr[-3000:]}"
    )
    return result.stdout


def test_upstreams_cases_of_rope_pass_on_the_patched_tree(programs: Path) -> None:
    run(programs / "test-rope")


@pytest.mark.parametrize("hs", [64, 128])
def test_upstreams_cases_of_flash_attention_pass_on_our_kernel(programs: Path, hs: int) -> None:
    """Nodes of up to 8 tokens go to our kernel, the reference beside it is upstream's code."""
    cases = f"hsk={hs},hsv={hs},.*nb=[1-8],.*type_K=(f32|f16|bf16|q8_0|q4_0)"
    text = run(
        programs / "test-backend-ops", "test", "-b", "CPU", "-o", "FLASH_ATTN_EXT", "-p", cases, GGML_CPU_ATTN_ALL="1"
    )
    n_ok = len(re.findall(r"FLASH_ATTN_EXT\(.*\): .*OK", text))
    assert n_ok > 50 and "FAIL" not in text, text[-2000:]


@pytest.mark.parametrize("arch", ["^llama$", "^qwen2$", "^gemma3$", "^gpt-oss$"])
def test_upstreams_cases_of_an_architecture_pass_on_the_patched_tree(programs: Path, arch: str) -> None:
    # it ends before its log's thread has written everything, now and then; the exit code counts each time
    texts = (run(programs / "test-llama-archs", "-a", arch) for _ in range(20))
    text = next(text for text in texts if "Summary" in text)
    assert "OK" in text and "test(s) passed" in text and "FAIL" not in text


def test_save_and_load_pass_on_the_patched_tree(programs: Path, arch_models: Path) -> None:
    run(programs / "test-save-load-state", "--models", arch_models)


def test_a_fragmented_restore_passes_on_the_patched_tree(programs: Path, tiny_model: Path) -> None:
    run(programs / "test-state-restore-fragmented", "-m", tiny_model)


def test_no_architecture_aborts_under_a_policy(arch_models: Path) -> None:
    """Loads every architecture in a process of its own, since an abort would take the tests with it."""
    models = sorted(arch_models.rglob("*.gguf"))
    assert len(models) > 50, f"upstream made only {len(models)} models"
    said: dict[str, str] = {}
    for model in models:
        command = [sys.executable, "-c", BOUNDED_RUN, str(model), str(SUPPORT)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        said[model.stem] = (
            result.stdout.strip() if result.returncode == 0 else f"exit {result.returncode}: {result.stderr[-500:]}"
        )
    last = {name: text.splitlines()[-1] for name, text in said.items()}
    broken = {name: said[name] for name, text in last.items() if not text.startswith(("ran", "refused: "))}
    assert not broken
    ran = [name for name, text in last.items() if text.startswith("ran")]
    scored = [name for name, text in said.items() if text.startswith("h2o:head ran")]
    assert len(scored) > 70, said
    assert {"llama", "qwen2", "gemma3"} <= {name.split("-")[0] for name in ran} and len(ran) > 30, said


def test_models_txt_says_the_modes_of_the_library(arch_models: Path) -> None:
    model_modes = importlib.import_module("model_modes")
    text = model_modes.LIST.read_text(encoding="utf-8")
    assert model_modes.updated(text, arch_models) == text
    assert "not checked" not in text
