"""The package's imports run one way, without a circle; what stands where is told by each folder's `__init__.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from places import SUPPORT

import equip_cli

PACKAGE = Path(equip_cli.__file__).parent

# what a folder's modules may import beside each other
ALLOWED = {
    "core": (),
    "terminal": ("core",),
    "models": ("core", "terminal"),
    "chat": ("core", "terminal", "models"),
    "evaluation": ("core", "terminal", "models"),
    "benchmark": ("core", "terminal", "models"),
    "checking": ("core", "terminal", "models"),
    "serving": ("core", "terminal"),
    "plots": ("core", "terminal", "models", "evaluation", "benchmark"),
    "commands.setup": ("core", "terminal", "models", "chat", "evaluation", "benchmark", "checking", "serving", "plots"),
}
ALLOWED["commands"] = (*ALLOWED["commands.setup"], "commands.setup")
# beside the folders: the command itself, which alone imports the commands, and the public modules
TOP = {
    "__init__": ("core",),
    "compat": ("core",),
    "cli": ("core", "terminal", "commands", "commands.setup"),
    "__main__": ("cli",),
}


class Import(NamedTuple):
    """`of` imports `what`, both named from the package on; only_types: for annotations alone."""

    of: str
    what: str
    only_types: bool


def name(path: Path) -> str:
    """`core.model`; of a folder's `__init__.py` the folder's name."""
    words = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(words[:-1] if words[-1] == "__init__" and len(words) > 1 else words)


MODULES = {name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def folder(module: str) -> str:
    """The longest name in ALLOWED that the module lies in; a module beside the folders is its own."""
    words = module.split(".")
    names = (".".join(words[:n]) for n in range(len(words), 0, -1))
    return next((each for each in names if each in ALLOWED), module)


def named(base: str, names: list[ast.alias]) -> Iterator[str]:
    """The modules of the package that `from base import names` takes from: a module, or what stands in one."""
    for each in names:
        module = f"{base}.{each.name}".removeprefix("equip_cli.")
        yield module if module in MODULES else base.removeprefix("equip_cli").removeprefix(".") or "__init__"


def imports(module: str) -> Iterator[Import]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(each.name.split(".")[0] == "equip_cli" for each in node.names), (
                f"{module}: write from ... import"
            )
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports are not used here"
            if (node.module or "").split(".")[0] == "equip_cli":
                for what in named(node.module or "", node.names):
                    yield Import(module, what, id(node) in for_types)


IMPORTS = [each for module in MODULES for each in imports(module)]


def test_every_module_has_its_place() -> None:
    """At the top level stand the public modules and the command; everything else lies in a folder."""
    top = {folder(module) for module in MODULES} - set(ALLOWED)
    assert top == set(TOP)


@pytest.mark.parametrize("place", [*ALLOWED, *TOP])
def test_imports_run_one_way(place: str) -> None:
    """An arrow against the order would make the lower folder useless without the upper one; annotations count too."""
    allowed = {place, *ALLOWED.get(place, TOP.get(place, ()))}
    for each in IMPORTS:
        # the package's own version and the public names may be read anywhere but below
        if folder(each.of) == place and not (each.what == "__init__" and place in ("commands", "cli")):
            assert folder(each.what) in allowed, f"{each.of} imports {each.what}: {place} may not"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports for annotations are left out: a model makes sessions, and a session names its model."""
    arrows: dict[str, list[str]] = {}
    for each in IMPORTS:
        if not each.only_types and each.of != each.what:
            arrows.setdefault(each.of, []).append(each.what)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for what in arrows.get(module, ()):
                visit(what, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_a_command_imports_no_other_command() -> None:
    for each in IMPORTS:
        if folder(each.of) == "commands":
            assert folder(each.what) != "commands" or each.of == each.what, f"{each.of} imports {each.what}"


def fixtures(path: Path) -> set[str]:
    """Names of the fixtures that a file defines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("fixture" in ast.unparse(each) for each in node.decorator_list)
    }


def test_fixtures_of_a_plugin_are_nobody_elses() -> None:
    """conftest.py's win over those of a plugin, in silence: a module that takes the plugin's would get the others."""
    everywhere = fixtures(SUPPORT.parent / "conftest.py")
    plugins = {path: fixtures(path) for path in sorted(SUPPORT.glob("*.py"))}
    assert any(plugins.values()) and everywhere
    assert {path.name: names & everywhere for path, names in plugins.items() if names & everywhere} == {}
