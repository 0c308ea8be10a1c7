"""What the documentation names exists: links, headings, and the files of docs/design.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "patches" / "README.md"])
FOLDERS = (".ci", ".github", "docs", "equip_cli", "native", "patches", "studies", "tests", "tools")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def texts() -> Iterator[Path]:
    """What people read and edit: pages, code and scripts; no build folder, and nothing that is another project's."""
    yield from (path for path in REPOSITORY.iterdir() if path.suffix in (".md", ".toml", ".py", ".cff"))
    for folder in FOLDERS:
        for path in (REPOSITORY / folder).rglob("*"):
            if path.suffix in (".md", ".py", ".sh", ".cpp", ".h", ".txt", ".cmake", ".yml", "") and path.is_file():
                yield path


def test_every_path_below_tests_that_is_named_exists() -> None:
    """In pages, comments and commands; behind `::` stands a test of that file."""
    named = 0
    for path in texts():
        for name, test in re.findall(
            r"(?<![\w/.])(?:\.\./)?(tests/[\w./-]*\w)(?:::(\w+))?", path.read_text(encoding="utf-8")
        ):
            place, named = REPOSITORY / name, named + 1
            assert place.exists(), f"{path.relative_to(REPOSITORY)}: {name}"
            if test:
                assert f"def {test}(" in place.read_text(encoding="utf-8"), f"{path.relative_to(REPOSITORY)}: {test}"
    assert named > 0


def test_files_that_the_design_names_exist() -> None:
    text = (REPOSITORY / "docs" / "design.md").read_text(encoding="utf-8")
    folders = [REPOSITORY, REPOSITORY / "native" / "cache", REPOSITORY / "native" / "libequip"]
    for name in re.findall(
        r"`([\w./-]+\.(?:cpp|py|md|cmake)|[\w./-]*/[\w.-]+\.h|(?:\.\./ggml/ggml|llama-kv)-[\w.-]+)`", text
    ):
        names = [name] if Path(name).suffix else [f"{name}.cpp"]
        assert any((folder / each).exists() for folder in folders for each in names), name
