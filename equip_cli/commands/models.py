"""equip models: the list in models.txt, and which of it is on this disk."""

from __future__ import annotations

from dataclasses import asdict

from equip_cli import hub, options, output

NOTE = "fetch one: equip pull NAME; any other GGUF model of the hub: equip pull owner/repo[:quant]"


def models(as_json: options.Json = False) -> None:
    """List the models that are known by name.

    The size is that of the file, the modes are the policies and position rules that the architecture supports, the note is the family and the trained context.
    """
    found = [(row, hub.on_disk(row)) for row in hub.rows()]
    if as_json:
        output.result_json(
            [
                {key: value for key, value in asdict(row).items() if key != "quant"} | {"path": path and str(path)}
                for row, path in found
            ]
        )
        return
    cells = [
        [row.name, f"{row.size_gb:.2f} GB", row.arch, row.modes, row.note, "yes" if path else ""] for row, path in found
    ]
    output.result(output.table(cells, ["name", "file", "arch", "modes", "note", "on disk"]))
    output.note(NOTE)
