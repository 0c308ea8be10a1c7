"""Write docs/cli.md from the commands' own help, and the table of parameters in docs/policies.md from the library's
registry; --check says whether they are up to date.

python tools/cli_docs.py [--check]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import typer

from equip_cli.cli import app
from equip_cli.core import native
from equip_cli.core.policy import range_of

DOCS = Path(__file__).resolve().parents[1] / "docs"


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
    return "# The command line\n\nMade from `--help` by `tools/cli_docs.py`.\n\n" + "\n".join(parts)


def policies() -> str:
    """docs/policies.md with its table of parameters made anew."""
    page = (DOCS / "policies.md").read_text(encoding="utf-8")
    before, begin, rest = page.partition("<!-- parameters: begin -->\n")
    _, end, after = rest.partition("<!-- parameters: end -->")
    takers: dict[str, list[str]] = {}  # a row without its policies, which may be several
    for policy in native.load().policies():
        for row in policy["parameters"]:
            text = f"`{row['name']}` | {row['default']:g} | {row['published']:g} | {range_of(row)} | {row['help']} |"
            takers.setdefault(text, []).append(f"`{policy['name']}`")
    rows = [f"| {', '.join(names)} | {text}" for text, names in takers.items()]
    head = ["| policy | parameter | default | published | from, to | what |", "| --- | --- | ---: | ---: | --- | --- |"]
    return before + begin + "\n".join([*head, *rows]) + "\n" + end + after


def main() -> int:
    for path, text in ((DOCS / "cli.md", document()), (DOCS / "policies.md", policies())):
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            print(f"docs/{path.name} is out of date: run python tools/cli_docs.py", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
