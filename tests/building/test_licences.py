"""Everything of other projects that a wheel carries has its licence in it."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from places import REPOSITORY

PACKAGE = (REPOSITORY / "native" / "cmake" / "package.cmake").read_text(encoding="utf-8")

# licenses/NAME.txt: what of it is in the libraries and in llama-server, and whose name the text must hold. Of upstream's other
# vendored parts, sha1 and sha256 are in the public domain, and subprocess.h is not used
LICENCES = {
    "llama.cpp": "The ggml authors",  # libllama, ggml, llama-common
    "llamafile": "Mozilla Foundation",  # ggml-cpu: matrix products
    "nlohmann-json": "Niels Lohmann",  # llama-common: templates, schemas
    "cpp-httplib": "yhirose",  # llama-common links it, llama-server serves with it
    "stb": "Sean Barrett",  # llama-server: images
    "miniaudio": "David Reid",  # llama-server: sounds
    "rotate-bits": "William Casarin",  # llama-server: hashes of images
    "xxhash": "Yann Collet",  # the same
    "adapted": "Jeffrey Quesnelle and Bowen Peng",  # code that upstream took over from others
}
# below equip_cli/, beside the libraries, the header and the Python code: all of it is ours
DATA = {
    "assets/equip-tiny.gguf",
    "assets/prose.txt.gz",
    "assets/recall.jsonl.gz",
    "models.txt",
    "py.typed",
    "lib/build.json",
    "serving/page/index.html",
    "serving/page/page.css",
    "serving/page/page.js",
}


def test_a_licence_is_installed_for_each_part() -> None:
    assert set(re.findall(r'^equip_install_license\(".+"\s+([\w.-]+)\)$', PACKAGE, re.MULTILINE)) == set(LICENCES)


def test_nothing_else_of_upstream_is_copied() -> None:
    """install(FILES ...) of package.cmake: the build's record, the header, the list of models, and licences."""
    copied = re.findall(r'install\(FILES "?([^"\s]+)', PACKAGE)
    assert [Path(path).name for path in copied] == ["build.json", "equip.h", "models.txt", "${file}"]


def test_every_licence_of_a_part_is_installed() -> None:
    try:
        dist = distribution("equip-llama")
    except PackageNotFoundError:
        pytest.skip("equip-llama is not installed")
    folder = Path(str(dist.locate_file("equip_cli")))
    if not (folder / "lib").is_dir():
        pytest.skip("equip-llama is installed without its libraries")
    found = {path.stem: path.read_text(encoding="utf-8") for path in (folder / "licenses").iterdir()}
    assert set(found) == set(LICENCES)
    for name, owner in LICENCES.items():
        assert owner in found[name], name
        assert re.search(
            "Permission is hereby granted|Redistribution and use in source and binary forms", found[name]
        ), name
    files = {str(file).replace("\\", "/") for file in dist.files or []}
    data = {name.removeprefix("equip_cli/") for name in files if re.match(r"equip_cli/(?!licenses/|include/)", name)}
    programs = {"lib/llama-server", "lib/llama-server.exe"}
    assert {name for name in data if not re.search(r"\.(py|pyc|so|dylib|dll)$", name)} - programs == DATA


def test_the_embedded_model_names_its_licence() -> None:
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(REPOSITORY / "equip_cli" / "assets" / "equip-tiny.gguf").fields
    assert (fields["general.license"].contents(), fields["general.author"].contents()) == (
        "mit",
        "EQUIP for llama.cpp authors",
    )


def test_the_version_has_one_place() -> None:
    """pyproject.toml; CITATION.cff has the same (test_citing.py), and the library takes it from there when it is built."""
    version = re.search(
        r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert version is not None
    commit = json.loads((REPOSITORY / "native" / "cmake" / "pin.json").read_text(encoding="utf-8"))["commit"]
    folders = ("native", "equip_cli", "docs", "studies", "tools", ".github", ".ci")
    pages = [
        path
        for folder in folders
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".txt", ".cmake", ".yml")
    ]
    for path in [*pages, REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(rf"(?<![\d.]){re.escape(version[1])}(?![\d.]*\d)", text), path
        assert commit not in text, path


def test_the_library_says_the_version() -> None:
    from equip_cli.core import native

    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{native.load().info()["version"]}"\n' in text
    assert native.load().lib.equip_abi_version() == native.abi_version()
