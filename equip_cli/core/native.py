"""libequip through cffi in ABI mode: find it, check it, and turn its status codes into exceptions."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equip_cli.core.errors import (
    BackendError,
    BudgetError,
    CancelledError,
    ContextFullError,
    EquipError,
    ModelFileError,
    OutOfMemoryError,
    RewindError,
    StateError,
    UnsupportedModelError,
    UsageError,
)
from equip_cli.core.folders import PACKAGE, REPOSITORY, package_folders
from equip_cli.core.text import expand

# enum equip_status
_STATUS: dict[int, type[EquipError]] = {
    -1: UsageError,
    -2: ModelFileError,
    -3: UnsupportedModelError,
    -4: BudgetError,
    -5: ContextFullError,
    -6: BackendError,
    -7: OutOfMemoryError,
    -8: CancelledError,
    -9: RewindError,
    -10: StateError,
}


def library_name(stem: str) -> str:
    """File name of a shared library on this platform, `equip` -> `libequip.so`."""
    if sys.platform == "win32":
        return f"{stem}.dll"
    return f"lib{stem}.dylib" if sys.platform == "darwin" else f"lib{stem}.so"


def _candidate_folders() -> Iterator[Path]:
    for folder in package_folders():
        yield folder / "lib"
    # a source tree that was built in place
    for pattern in ("build", "build/lib", "build/bin", "build/*", "build/*/lib", "build/*/bin"):
        yield from sorted(path for path in REPOSITORY.glob(pattern) if path.is_dir())


def library_in(path: str) -> tuple[Path, bool]:
    """The folder that is meant by its path or by that of libequip in it, and whether libequip is there."""
    folder = expand(path).resolve()
    folder = folder.parent if folder.is_file() else folder
    return folder, (folder / library_name("equip")).is_file()


def library_folder() -> Path:
    """Folder that holds libequip and libllama: `EQUIP_LIB_PATH` (it, or libequip in it), else the package's own `lib`.

    Raises BackendError if there is none.
    """
    name = library_name("equip")
    override = os.environ.get("EQUIP_LIB_PATH")
    if override:
        folder, is_there = library_in(override)
        if not is_there:
            raise BackendError(f"EQUIP_LIB_PATH is {folder}, but there is no {name} in it: unset it or correct it")
        return folder
    for folder in _candidate_folders():
        if (folder / name).is_file():
            return folder
    raise BackendError(
        f"{name} was not found in {PACKAGE / 'lib'}: reinstall equip-llama, or set EQUIP_LIB_PATH to its folder"
    )


def _header(folder: Path) -> str:
    # the header beside the library first: it is the one that the library was built from
    places = (
        folder / "equip.h",
        folder.parent / "include" / "equip.h",
        *(package / "include" / "equip.h" for package in package_folders()),
        REPOSITORY / "native" / "include" / "equip.h",
    )
    for path in places:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise BackendError(f"equip.h was not found in {PACKAGE / 'include'}: reinstall equip-llama")


@functools.cache
def abi_version() -> int:
    """EQUIP_ABI_VERSION of the header that belongs to this package: what it needs of a library. Raises BackendError."""
    for path in (PACKAGE / "include" / "equip.h", REPOSITORY / "native" / "include" / "equip.h"):
        if path.is_file():
            found = re.search(r"^#define EQUIP_ABI_VERSION (\d+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            if found:
                return int(found[1])
    raise BackendError(f"equip.h in {PACKAGE / 'include'} is missing or of another package: reinstall equip-llama")


def cdef_source(header: str) -> str:
    """The declarations of equip.h as cffi's `cdef` takes them: no preprocessor lines, no C++, no EQUIP_API."""
    text = re.sub(r"/\*.*?\*/", " ", header, flags=re.DOTALL)
    lines: list[str] = []
    skipping: list[bool] = []  # one entry per open #if; True inside `#ifdef __cplusplus`
    for line in text.splitlines():
        directive = re.match(r"\s*#\s*(\w+)\s*(.*)", line)
        if directive is None:
            if not any(skipping):
                lines.append(line)
        elif directive[1].startswith("if"):
            skipping.append(directive[1] == "ifdef" and directive[2].strip() == "__cplusplus")
        elif directive[1] == "endif" and skipping:
            skipping.pop()
    return re.sub(r"\bEQUIP_API\b", "", "\n".join(lines))


@dataclass(frozen=True)
class Native:
    """The loaded library. `ffi` and `lib` are cffi's objects; `folder` holds libequip, libllama and ggml."""

    ffi: Any
    lib: Any
    folder: Path

    def message(self) -> str:
        """The last error of this thread: one sentence."""
        return self.string(self.lib.equip_error()).strip()

    def string(self, pointer: Any) -> str:
        """A returned `const char *`; it must be copied before the next call on this thread."""
        return bytes(self.ffi.string(pointer)).decode("utf-8", "replace")

    def check(self, status: int) -> int:
        """`status` if it is not negative; else raises the error that it stands for."""
        if status < 0:
            raise _STATUS.get(status, BackendError)(self.message())
        return status

    def text(self, pointer: Any, error: type[EquipError] = BackendError) -> str:
        """A returned string; raises `error` with the library's sentence if it is NULL."""
        if pointer == self.ffi.NULL:
            raise error(self.message())
        return self.string(pointer)

    def info(self) -> dict[str, Any]:
        """`{version, llama_cpp, backends, devices: [{name, description, free_bytes, total_bytes}]}`, and of the CPU
        `instruction_sets: [name]`, `left_out: [{name, reason}]` and `n_threads`, the default number of threads.
        """
        return dict(json.loads(self.text(self.lib.equip_library_info())))

    def processor(self) -> str:
        """One line: the instruction sets that the CPU backend uses, and what was left out and why."""
        about = self.info()
        left_out = [f"{each['name']} ({each['reason']})" for each in about["left_out"]]
        used = ", ".join(about["instruction_sets"]) or "those of every processor of this architecture"
        return used + (f"; left out: {', '.join(left_out)}" if left_out else "")

    def check_policy(self, text: str) -> None:
        """Whether a text is one of a policy, as far as that shows without a model. Raises UsageError, BudgetError."""
        self.check(self.lib.equip_policy_check(c_string(text, "the policy")))

    def policies(self) -> list[dict[str, Any]]:
        """`[{name, scopes, positions, updates, default_positions, default_scope, scores, pages, evict_every}]`.

        scores: it reads attention weights; pages: it evicts whole pages, of evict_every tokens; evict_every: victims
        chosen at once on the CPU, 0 where their number cannot be set.
        """
        return list(json.loads(self.text(self.lib.equip_policies())))

    def set_verbosity(self, level: int) -> None:
        """0: the native log is silent; 1: warnings and errors; 2: all of it."""
        self.lib.equip_set_verbosity(level)


_kept: list[Any] = []  # libraries that must stay loaded


@functools.cache
def load() -> Native:
    """Load libequip once per process.

    Raises BackendError if it is missing, cannot be loaded, or speaks another version of the interface.
    """
    folder = library_folder()
    cffi: Any = importlib.import_module("cffi")
    ffi = cffi.FFI()
    ffi.cdef(cdef_source(_header(folder)))
    if sys.platform == "win32":
        os.add_dll_directory(str(folder))
    path = folder / library_name("equip")
    try:
        # LD_LIBRARY_PATH goes before the folder that the library names: what is loaded already is not looked for there
        beside = [folder / library_name(stem) for stem in ("ggml-base", "ggml-cpu", "ggml", "llama")]
        _kept.extend(ffi.dlopen(str(each)) for each in beside if each.is_file())
        lib = ffi.dlopen(str(path))
        version = int(lib.equip_abi_version())
    except (OSError, AttributeError) as error:
        reason = str(error).partition(".  Additionally")[0].partition(". Additionally")[0]
        raise BackendError(f"{path} cannot be loaded ({reason}): reinstall equip-llama") from error
    if version != abi_version():
        raise BackendError(
            f"{path} speaks version {version} of the native interface and this package needs {abi_version()}: "
            "reinstall equip-llama"
        )
    return Native(ffi, lib, folder)


def utf8(text: str, what: str) -> bytes:
    """`text` for the library. Raises UsageError for half of a surrogate pair; what: `the grammar`, ..."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is no Unicode text (character {error.start}): convert it to UTF-8") from None


def c_string(text: str, what: str) -> bytes:
    """`text` for an argument that ends at the first zero byte. Raises UsageError if it has one, and what `utf8()` raises."""
    if "\0" in text:
        raise UsageError(f"{what} has a zero byte at character {text.index(chr(0))}: take it out")
    return utf8(text, what)


def option_text(options: dict[str, object]) -> bytes:
    """`key=value,key=value` as the C API takes it; None is left out, True and False are 1 and 0.

    Raises UsageError for a value that would break the syntax.
    """
    parts: list[str] = []
    for key, value in options.items():
        if value is None:
            continue
        text = str(int(value)) if isinstance(value, bool) else str(value)
        if not re.fullmatch(r"[\w.+\-]+", text, re.ASCII):
            raise UsageError(f"{text!r} is not a valid value of {key}: use letters, digits, '.', '_', '+' and '-'")
        parts.append(f"{key}={text}")
    return ",".join(parts).encode("ascii")
