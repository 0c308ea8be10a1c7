"""llama-cpp-python on our library. What it does there under a policy is the drop-in tests' matter."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dropin_support import binding_environment, binding_python
from native_api import library_folder
from places import REPOSITORY

from equip_cli import EquipError, compat
from equip_cli.core import native

# loads a library as llama-cpp-python 0.3.36 does
FAKE = """
import ctypes, os, pathlib, sys
name = {"win32": "llama.dll", "darwin": "libllama.dylib"}.get(sys.platform, "libllama.so")
_lib = ctypes.CDLL(str(pathlib.Path(os.environ["LLAMA_CPP_LIB_PATH"]) / name))
"""

SCRIPT = """
import os, sys
from equip_cli.compat import llama_cpp
assert "LLAMA_CPP_LIB_PATH" not in os.environ
assert sys.modules["llama_cpp"] is llama_cpp
from equip_cli.compat import llama_cpp as again
assert again is llama_cpp
print(os.path.dirname(sys.modules["llama_cpp.llama_cpp"]._lib._name))
"""


def run(code: str, *paths: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "LLAMA_CPP_LIB_PATH"} | environment
    env["PYTHONPATH"] = os.pathsep.join([*map(str, paths), str(Path(compat.__file__).parents[1])])
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def binding(tmp_path: Path) -> Path:
    """A folder with something that looks like the binding, installed."""
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text("from . import llama_cpp\n", encoding="utf-8")
    (package / "llama_cpp.py").write_text(FAKE, encoding="utf-8")
    info = tmp_path / "llama_cpp_python-0.3.36.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.36\n", encoding="utf-8")
    return tmp_path


def test_the_import_runs_on_our_library(binding: Path) -> None:
    result = run(SCRIPT, binding)
    assert result.returncode == 0, result.stderr
    assert os.path.samefile(result.stdout.strip(), native.library_folder())


def test_a_variable_of_ones_own_is_restored(binding: Path) -> None:
    code = (
        "import os; from equip_cli.compat import llama_cpp; import sys;"
        "assert os.environ['LLAMA_CPP_LIB_PATH'] == '/elsewhere';"
        "print(os.path.dirname(sys.modules['llama_cpp.llama_cpp']._lib._name))"
    )
    result = run(code, binding, LLAMA_CPP_LIB_PATH="/elsewhere")
    assert result.returncode == 0, result.stderr
    assert os.path.samefile(result.stdout.strip(), native.library_folder())


def test_an_import_of_another_library_is_not_touched(binding: Path, tmp_path: Path) -> None:
    (binding / "llama_cpp" / "llama_cpp.py").write_text("class _lib: _name = __file__\n", encoding="utf-8")
    code = (
        "import llama_cpp, sys; before = sys.modules['llama_cpp.llama_cpp']\n"
        "try: from equip_cli.compat import llama_cpp\n"
        "except ImportError as error: print(error)\n"
        "assert sys.modules['llama_cpp.llama_cpp'] is before"
    )
    result = run(code, binding)
    assert result.returncode == 0, result.stderr
    assert "already runs on" in result.stdout


def test_a_failed_import_leaves_nothing_behind(binding: Path) -> None:
    (binding / "llama_cpp" / "__init__.py").write_text(
        "from . import llama_cpp\nraise RuntimeError('no such symbol')\n", encoding="utf-8"
    )
    code = (
        "import sys\n"
        "try: from equip_cli.compat import llama_cpp\n"
        "except ImportError as error: print(error)\n"
        "assert not [name for name in sys.modules if name.startswith('llama_cpp')]"
    )
    result = run(code, binding)
    assert result.returncode == 0, result.stderr
    assert "no such symbol" in result.stdout


def test_a_missing_or_other_version_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)

    def missing(_name: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    for version in (missing, lambda _name: "0.3.2"):
        monkeypatch.setattr(importlib.metadata, "version", version)
        with pytest.raises(EquipError) as caught:
            from equip_cli.compat import llama_cpp  # noqa: F401
        assert isinstance(caught.value, ImportError)
        assert 'CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" pip install llama-cpp-python==0.3.36' in str(
            caught.value
        )
        assert "\n" not in str(caught.value)


def test_other_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError):
        _ = compat.nothing


@pytest.mark.timeout(900)  # the first run sets the binding up
def test_the_real_binding_runs_on_our_library(tiny_model: Path) -> None:
    code = (
        "import sys; from equip_cli.compat import llama_cpp\n"
        "model = llama_cpp.Llama(sys.argv[1], n_ctx=4096, verbose=False)\n"
        "out = model('Hello', max_tokens=300, logit_bias={model.token_eos(): -100.0})\n"
        "cells = llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(model.ctx), 0)\n"
        "print(out['usage']['completion_tokens'], cells, llama_cpp.llama_cpp._lib._name)"
    )
    env = binding_environment("streaming:budget=64") | {"EQUIP_LIB_PATH": str(library_folder())}
    env |= {"PYTHONPATH": str(REPOSITORY)}
    del env["LLAMA_CPP_LIB_PATH"]
    command = [str(binding_python()), "-c", code, str(tiny_model)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    n, pos_min, path = result.stdout.split(maxsplit=2)
    assert n == "300" and int(pos_min) > 200
    assert Path(path.strip()).parent.samefile(library_folder())
