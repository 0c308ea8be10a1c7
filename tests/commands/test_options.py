"""An option that several commands have means the same in each: one text, one range, one default."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.models import OptionInfo

from equip_cli.commands import bench, chat, eval, generate
from equip_cli.commands.setup.declaring import expanded, number
from equip_cli.core import limits

# what compares rows has another meaning of these, and says so
OF_ROWS = {
    "bench": {"--policy", "--budget", "-fa", "-n", "-p"},
    "evaluate": {"--policy", "--budget", "-ctv", "-n", "--seed", "--plot", "--json"},
}


def options(command: Callable[..., None]) -> dict[str, OptionInfo]:
    """The options of a command by their first flag."""
    hints = typing.get_type_hints(command, include_extras=True).values()
    found = [each for hint in hints for each in getattr(hint, "__metadata__", ()) if isinstance(each, OptionInfo)]
    return {str(each.default): each for each in found}  # Typer keeps the first flag there


@pytest.mark.parametrize("command", [chat.chat, bench.bench, eval.evaluate], ids=lambda each: each.__name__)
def test_one_text_for_one_option(command: Callable[..., None]) -> None:
    """Of a list too: only its metavar differs."""
    single, here = options(generate.generate), options(command)
    its_own = OF_ROWS.get(command.__name__, {"-p", "-n", "--json"})
    shared = set(single) & set(here) - its_own
    assert {"--scope", "--positions", "--sinks", "-t", "-b", "-ctk"} <= shared
    for flag in shared:
        assert here[flag].help == single[flag].help, flag
        assert str(here[flag].metavar).removesuffix(",..") == str(single[flag].metavar).removesuffix(",.."), flag


def test_a_group_reaches_the_command_whole() -> None:
    @dataclass(frozen=True)
    class Group:
        n: Annotated[int, number("-n", limit=limits.COUNT, group="Other", help="A number.")] = 3
        word: str = "a"

    seen: list[Any] = []

    def command(*, first: bool = False, group: Group) -> None:
        seen.append((first, group))

    # annotations of this function are text, and its own classes are not found by it
    command.__annotations__ = {"first": bool, "group": Group}
    app = typer.Typer()
    app.command()(expanded(command))
    run: Any = typer.main.get_command(app)
    for arguments in ([], ["-n", "5", "--first", "--word", "b"]):
        run(arguments, standalone_mode=False)
    assert seen == [(False, Group(3, "a")), (True, Group(5, "b"))]
