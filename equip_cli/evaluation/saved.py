"""Rows of an evaluation in a file, each written when it is done: a run that was interrupted goes on from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from equip_cli.core.errors import EquipError, UsageError
from equip_cli.core.text import expand
from equip_cli.evaluation.paired import Series

Record = dict[str, Any]

_BEGIN = b'{"measured": '


class SavedRows:
    """The records in a file of JSON lines, `{"measured": what decides the numbers, "record": a row, "series": its values token
    by token}` each.

    measured: what the rows of this run are measured on, beside their caches: a row counts as done where its line has the same.
    Raises UsageError for a file of something else, and one that cannot be read or written.
    """

    def __init__(self, path: str, measured: Mapping[str, Any]) -> None:
        self._path = expand(path)
        self._measured = json.loads(json.dumps(measured))
        self._rows: list[tuple[Record, Series]] = []
        refused = f"--save is {path}, which"
        try:
            data = self._path.read_bytes() if self._path.exists() else b""
            *lines, last = data.split(b"\n")
            found = [_parsed(line) for line in lines]
            # a run that was killed while it wrote has left half a line
            is_torn = last.startswith(_BEGIN) or _BEGIN.startswith(last)
            if None in found or not is_torn:
                raise UsageError(f"{refused} does not hold what equip eval --save writes: give another file")
            with self._path.open("ab") as file:
                file.truncate(len(data) - len(last))
        except OSError as error:
            raise UsageError(f"{refused} cannot be used ({error.strerror}): give another file") from None
        self._rows += [
            (each["record"], Series(**each["series"]))
            for each in found
            if each is not None and each["measured"] == self._measured
        ]

    def find(self, identity: Mapping[str, Any]) -> tuple[Record, Series] | None:
        """A cache that was measured before, the last time if there are several."""
        wanted = json.loads(json.dumps(identity))
        return next((each for each in reversed(self._rows) if each[0].items() >= wanted.items()), None)

    def add(self, record: Record, series: Series) -> None:
        """Write a row that is done. Raises EquipError if the file cannot be written."""
        line = json.dumps({"measured": self._measured, "record": record, "series": asdict(series)})
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise EquipError(
                f"{self._path} cannot be written ({error.strerror}): make room, and go on with it"
            ) from None


def _parsed(line: bytes) -> Record | None:
    """None for what is no line of ours."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_ours = (
        isinstance(found, dict)
        and set(found) == {"measured", "record", "series"}
        and isinstance(found["record"], dict)
        and isinstance(found["series"], dict)
        and set(found["series"]) == {"nll", "kl"}
    )
    return found if is_ours else None
