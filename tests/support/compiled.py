"""Files of native/ that a test compiles by itself."""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
from pathlib import Path


def compiler() -> list[str]:
    """The one that the installed libequip was built with, else CXX or c++."""
    built = importlib.import_module("upstream_tests").installed_build().get("cxx", "")
    return [built] if Path(built).is_file() else shlex.split(os.environ.get("CXX", "c++"))


def compiled(target: Path, *arguments: str) -> Path:
    """Compile C++17 to `target`, without a warning."""
    command = [*compiler(), "-std=c++17", "-Wall", "-Wextra", "-o", str(target), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "warning" not in result.stderr, result.stderr[-4000:]
    return target
