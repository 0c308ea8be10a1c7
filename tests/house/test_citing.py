"""What others would cite: complete, and the same as the package and docs/policies.md say."""

from __future__ import annotations

import re
from typing import Any

import yaml
from places import REPOSITORY

from equip_cli.core import native


def project_field(key: str) -> str:
    found = re.search(rf'^{key} = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_citation_file_agrees_with_the_package() -> None:
    about: dict[str, Any] = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "type", "version", "license", "authors", "references"} <= about.keys()
    assert (about["cff-version"], about["type"]) == ("1.2.0", "software")
    assert about["version"] == project_field("version")
    assert about["license"] == project_field("license")
    assert all(author.keys() & {"name", "family-names"} for author in about["authors"])
    (paper,) = about["references"]
    assert {"type", "title", "authors", "year", "url"} <= paper.keys()  # the format asks for the first three
    assert paper["title"].startswith("EQUIP: ")
    assert paper["url"] in (REPOSITORY / "docs" / "citing.md").read_text(encoding="utf-8")
    for author in paper["authors"]:
        assert set(author) == {"family-names", "given-names"}


def named_in_table() -> dict[str, str]:
    """Policy -> its row in docs/policies.md."""
    text = (REPOSITORY / "docs" / "policies.md").read_text(encoding="utf-8")
    table = text.partition("| policy | keeps |")[2].partition("\n\n")[0]
    return {name: row for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1:2][0])}


def test_every_policy_of_the_registry_is_in_the_table() -> None:
    known = {str(policy["name"]) for policy in native.load().policies()} - {"none"}
    rows = named_in_table()
    assert set(rows) == known
    assert {name for name, row in rows.items() if not re.search(r"\d{4}\.\d{5}", row)} == {"random"}  # the control


def test_every_policy_has_its_paper() -> None:
    """A BibTeX entry per policy in docs/policies.md, with the number that the table there gives."""
    citing = (REPOSITORY / "docs" / "citing.md").read_text(encoding="utf-8")
    entries: dict[str, str] = {}
    for names, entry in re.findall(r"^((?:`\w+`,? ?)+):\n\n```bibtex\n(.+?)\n```$", citing, re.MULTILINE | re.DOTALL):
        entries |= dict.fromkeys(re.findall(r"`(\w+)`", names), entry)
    cited = set()
    for row in (REPOSITORY / "docs" / "policies.md").read_text(encoding="utf-8").splitlines():
        number = re.search(r"\d{4}\.\d{5}", row)
        if row.startswith("| `") and number is not None:
            for name in re.findall(r"`(\w+)`", row.split("|")[1]):
                assert f"arXiv:{number[0]}" in entries[name], name
                cited.add(name)
    assert cited == set(entries)
    assert len(cited) >= 12
    for entry in set(entries.values()):
        assert re.match(r"@(inproceedings|misc)\{[\w-]+,\n", entry) and entry.endswith("\n}")
        assert entry.count("{") == entry.count("}")
        assert all(re.search(rf"^ +{key} +=", entry, re.MULTILINE) for key in ("title", "author", "year"))
