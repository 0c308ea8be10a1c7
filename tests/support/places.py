"""Folders that tests name, wherever a test itself lies."""

from __future__ import annotations

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
DATA = SUPPORT.parent / "data"
REPOSITORY = SUPPORT.parents[1]
