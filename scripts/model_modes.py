"""Fill in the last column of models.txt: what `equip info` says of a file of each architecture's shape.

python scripts/model_modes.py

The files are upstream's own tiny random models, so this tells what the library accepts, not how well a model answers.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import upstream_tests

from equip_cli import EquipError, Model
from equip_cli.native import load

LIST = Path(__file__).resolve().parents[1] / "models.txt"


def modes(supports: dict[str, list[str]]) -> str:
    """`streaming, h2o (true, cache)`: the policies that bound the cache, `all` if it is all, and the position rules."""
    policies = [name for name in supports["policies"] if name != "none"]
    if len(policies) == len(load().policies()) - 1:
        policies = ["all"]
    return f"{', '.join(policies)} ({', '.join(supports['positions'])})" if policies else "none"


def modes_of(arch: str, folder: Path) -> str:
    """What the first model of this architecture in `folder` supports."""
    for path in sorted(folder.rglob("*.gguf")):
        try:
            with Model(path, n_gpu_layers=0) as model:
                info: dict[str, Any] = model.info
        except EquipError:
            continue
        if info["arch"] == arch:
            return modes(info["supports"])
    return "not checked"


def updated(text: str, folder: Path) -> str:
    """The list with its last column made anew from the models in `folder`."""
    lines = text.splitlines()
    archs = {line: re.split(r"\s{2,}", line)[3] for line in lines if line and not line.startswith("#")}
    found = {arch: modes_of(arch, folder) for arch in dict.fromkeys(archs.values())}
    column = max(line.rindex("  ") + 2 for line in archs)
    lines = [f"{line[:column].rstrip().ljust(column)}{found[archs[line]]}" if line in archs else line for line in lines]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write models.txt."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(upstream_tests.build("tests")) / "test-llama-archs"
        subprocess.run([str(program), "-o", folder], capture_output=True, check=True, cwd=folder)
        LIST.write_text(updated(LIST.read_text(encoding="utf-8"), Path(folder)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
