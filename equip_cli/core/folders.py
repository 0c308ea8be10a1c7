"""Where this package lies, and what was installed with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = PACKAGE.parent  # of a source tree


def package_folders() -> Iterator[Path]:
    """This package, then an installed one: a source tree holds no library, and Python may have imported that one."""
    yield PACKAGE
    for entry in sys.path:
        folder = Path(entry).resolve() / "equip_cli"
        if folder != PACKAGE and folder.is_dir():
            yield folder
