"""Write docs/cli.md from the commands' own help; --check says whether it is up to date.

python scripts/cli_docs.py [--check]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import typer

from equip_cli.cli import app

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"


def section(name: str, text: str) -> str:
    lines = [f"## {name}", "", *(f"    {line}".rstrip() for line in text.strip().splitlines()), ""]
    return "\n".join(lines)


def document() -> str:
    os.environ["COLUMNS"] = "100"  # the help is wrapped to the terminal
    root: Any = typer.main.get_command(app)
    with root.make_context("equip", [], resilient_parsing=True) as top:
        parts = [section("equip", root.get_help(top))]
        for name, command in sorted(root.commands.items()):
            with command.make_context(name, [], parent=top, resilient_parsing=True) as context:
                parts.append(section(f"equip {name}", command.get_help(context)))
    return "# The command line\n\nMade from `--help` by `scripts/cli_docs.py`.\n\n" + "\n".join(parts)


def main() -> int:
    text = document()
    if "--check" in sys.argv[1:]:
        if TARGET.read_text(encoding="utf-8") != text:
            print("docs/cli.md is out of date: run python scripts/cli_docs.py", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
