"""equip models: the list in models.txt, and which of it is on this disk."""

from __future__ import annotations

from dataclasses import asdict

from equip_cli.commands.setup.groups import Json
from equip_cli.models import hub, model_list
from equip_cli.models.model_list import KnownModel
from equip_cli.terminal import output
from equip_cli.terminal.columns import from_rows, table


def _note(rows: list[KnownModel]) -> str:
    smallest = min(rows, key=lambda row: row.size_gb, default=None)
    example = f" (the smallest: {smallest.name}, {smallest.size_gb:.2f} GB)" if smallest else ""
    return f"fetch one: equip pull NAME{example}; any other GGUF model of the hub: equip pull owner/repo[:quant]"


def models(as_json: Json = False) -> None:
    """List the models that are known by name.

    The size is that of the file, the modes are the policies and position rules that the architecture supports, the note is the family and the trained context.
    """
    rows = model_list.rows()
    found = [(row, hub.on_disk(row)) for row in rows]
    if as_json:
        left_out = ("quant", "sha256")
        output.result_json(
            [
                {key: value for key, value in asdict(row).items() if key not in left_out} | {"path": path and str(path)}
                for row, path in found
            ]
        )
        return
    cells = [
        [row.name, f"{row.size_gb:.2f} GB", row.arch, row.modes, row.note, "yes" if path else ""] for row, path in found
    ]
    output.result(table(from_rows(["name", "file", "arch", "modes", "note", "on disk"], cells)))
    output.note(_note(rows))
