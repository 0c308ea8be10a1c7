"""`python -m equip_cli` is `equip`."""

from __future__ import annotations

import sys

from equip_cli.cli import main

if __name__ == "__main__":
    sys.exit(main())
