"""The help of a command with many options: what matters first on top, the others in groups.

Rich would draw such groups by itself, but importing it costs more than the rest of a help text.
"""

from __future__ import annotations

from typing import Any, ClassVar

from typer.core import TyperCommand

from equip_cli.commands.setup.declaring import GROUPS, OTHER

MAIN = "Most used"


class GroupedCommand(TyperCommand):
    """A command whose help has a section for each `rich_help_panel` of its options, in the order of GROUPS.

    first: names of the parameters that stand above all groups, behind the arguments.
    """

    first: ClassVar[tuple[str, ...]] = ()

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in (MAIN, *GROUPS)}
        # the arguments come before `first`, whose order holds
        order = {name: place for place, name in enumerate(self.first, 1)}
        for parameter in sorted(self.get_params(ctx), key=lambda each: order.get(each.name or "", len(order) + 1)):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                sections[MAIN].insert(0, record)
            elif parameter.name in order:
                sections[MAIN].append(record)
            else:
                sections[getattr(parameter, "rich_help_panel", None) or OTHER].append(record)
        for name, records in sections.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


def grouped(*first: str, base: type[GroupedCommand] = GroupedCommand) -> type[GroupedCommand]:
    """`cls` of a Typer command: these parameters stand on top of its help."""
    return type("Grouped", (base,), {"first": first})
