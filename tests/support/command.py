"""The command `equip` as a test runs it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

Equip = Callable[..., "subprocess.CompletedProcess[str]"]


def runner(equip_bin: Path, environment: dict[str, str]) -> Equip:
    """run(*arguments, env={}, **options): run the command with these variables beside `environment`, and keep what it prints."""

    def run(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        options["env"] = environment | options.pop("env", {})
        command = [str(equip_bin), *map(str, args)]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, **options)

    return run
