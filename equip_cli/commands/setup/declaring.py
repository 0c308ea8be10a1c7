"""How an option is declared, and how a command takes options in groups: dataclasses whose fields are options."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

import typer

from equip_cli.core.limits import Limit

# groups of the help, in this order; what stands first of all is chosen by each command (grouped.py)
TEXT, MEASURES, SERVER, CACHE, SAMPLING, COMPUTE = "Text", "Measurements", "Server", "Cache", "Sampling", "Compute"
OUTPUT, OTHER = "Output", "Other"
GROUPS = (TEXT, MEASURES, SERVER, CACHE, SAMPLING, COMPUTE, OUTPUT, OTHER)


def option(*flags: str, group: str, help: str, metavar: str | None = None, default: str | None = None) -> Any:
    """A Typer option. default: what holds where nothing is given, in words."""
    text = help + (f" [default: {default}]" if default is not None else "")
    return typer.Option(*flags, metavar=metavar, help=text, rich_help_panel=group)


def number(*flags: str, limit: Limit, group: str, help: str, metavar: str = "N", default: str | None = None) -> Any:
    """An option that is a number within `limit`, which the help tells; an error names the first flag."""
    found = numbers(*flags, limit=limit, group=group, help=help, metavar=metavar, default=default)
    found.parser = limit.parser(flags[0])
    return found


def numbers(*flags: str, limit: Limit, group: str, help: str, metavar: str = "N,..", default: str | None = None) -> Any:
    """An option that is a comma list of numbers within `limit`; `values.numbers()` checks them."""
    notes = "; ".join([limit.short, *([f"default: {default}"] if default is not None else [])])
    return typer.Option(*flags, metavar=metavar, help=f"{help} [{notes}]", rich_help_panel=group)


@functools.cache
def hints(group: type) -> dict[str, Any]:
    """The annotations of a group's fields, by name, with the options in them."""
    return typing.get_type_hints(group, include_extras=True)


def option_of(group: type, field: str) -> Any:
    """The option that a field of a group is."""
    return next(each for each in typing.get_args(hints(group)[field]) if isinstance(each, typer.models.OptionInfo))


def _parameter(field: Field[Any], annotation: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer wants it: a parameter that is a dataclass becomes one parameter for each of its fields.

    The help has the options of a section in the order of the parameters, and within a dataclass in that of the fields.
    """
    own = inspect.get_annotations(command, eval_str=True)
    groups = {name: kind for name, kind in own.items() if is_dataclass(kind) and isinstance(kind, type)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            group = groups[parameter.name]
            parameters += [_parameter(field, hints(group)[field.name]) for field in fields(group)]
        else:
            parameters.append(parameter.replace(annotation=own[parameter.name]))

    @functools.wraps(command)
    def call(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    return call
