"""`equip`, and `python -m equip_cli`."""

from __future__ import annotations

import sys


def run() -> int:
    """The command `equip`; returns the exit code."""
    try:
        # the imports take a moment, and Ctrl-C may come in it
        from equip_cli.cli import main

        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run())
