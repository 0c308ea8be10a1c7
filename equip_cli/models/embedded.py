"""What the package carries beside its code: the embedded model, and the texts on which `equip eval` measures."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass

from equip_cli.core.errors import EquipError
from equip_cli.core.folders import PACKAGE

FOLDER = PACKAGE / "assets"
MODEL = FOLDER / "equip-tiny.gguf"
NOTE = (
    "a tiny demonstration model that remembers names; the smallest real one, 0.1 GB: equip pull smollm2-135m; others: "
    "equip models"
)


@dataclass(frozen=True)
class RecallDialogue:
    """A conversation whose last message asks for a fact stated before; `answer` contains `value`."""

    messages: list[dict[str, str]]
    answer: str
    value: str


def _read(name: str) -> str:
    try:
        return gzip.decompress((FOLDER / name).read_bytes()).decode()
    except OSError as error:
        raise EquipError(f"{FOLDER / name} cannot be read ({error}): reinstall equip-llama") from error


def prose() -> str:
    """About 60,000 tokens of held-out prose, passages separated by blank lines. Raises EquipError."""
    return _read("prose.txt.gz")


def recall_dialogues() -> list[RecallDialogue]:
    """400 held-out dialogues, 50 for each 128 tokens of distance. Raises EquipError."""
    return [RecallDialogue(**json.loads(line)) for line in _read("recall.jsonl.gz").splitlines()]
