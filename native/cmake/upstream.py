"""Fetch the pinned llama.cpp, apply the patch series and bring a source folder up to date with the result.

CMake runs this at configure time; it needs patch-ng and, for the download, pip. Neither git nor patch is called, so it
works inside a foreign git repository too. Only files whose bytes differ are written, so that ninja rebuilds what a patch
touched and nothing else. Every failure is one sentence with its remedy on stderr, and exit code 1.

Environment:
    EQUIP_CACHE_DIR         folder that keeps the download (default: the user's cache folder)
    EQUIP_LLAMA_CPP_SOURCE  the pinned tarball or a llama.cpp tree, for people off line
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

HERE = Path(__file__).resolve().parent
PIN = HERE / "pin.json"
PATCHES = HERE.parents[1] / "patches"
STAMP = ".equip-stamp.json"

# (path relative to the tree, content, executable)
SourceFile = tuple[str, bytes, bool]


class UpstreamError(Exception):
    """One sentence: what is wrong and what to do."""


class PatchError(UpstreamError):
    """A patch does not apply; `patch` and `file` say which."""

    def __init__(self, patch: Path, file: str) -> None:
        super().__init__(f"Patch {patch.name} does not apply to {file}.")
        self.patch = patch
        self.file = file


@dataclass(frozen=True)
class Pin:
    """The release that carries llama.cpp: `folder` is its place inside the tarball."""

    package: str
    version: str
    sha256: str
    folder: str
    commit: str
    date: str

    @property
    def tarball_name(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}.tar.gz"


def load_pin(path: Path = PIN) -> Pin:
    return Pin(**json.loads(path.read_text(encoding="utf-8")))


def say(line: str) -> None:
    print(f"equip: {line}", flush=True)


# ---- fetch ----------------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """The folder that outlives build folders; EQUIP_CACHE_DIR wins over the platform's own place."""
    if given := os.environ.get("EQUIP_CACHE_DIR"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "equip"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def pip_environment() -> dict[str, str]:
    """Our own build options must not reach the metadata step of the package that pip downloads."""
    drop = ("SKBUILD_", "LLAMA_", "GGML_", "EQUIP_")
    return {k: v for k, v in os.environ.items() if k != "CMAKE_ARGS" and not k.startswith(drop)}


def download(pin: Pin, target: Path) -> None:
    """Ask pip, so that the user's index, proxy and certificates hold."""
    remedy = "connect to a package index, or set EQUIP_LLAMA_CPP_SOURCE to that tarball or to a llama.cpp tree"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
        # the package's own name, not ":all:", which pip would hand on to the build environment of that package
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
        command += ["--no-binary", pin.package, f"{pin.package}=={pin.version}", "-d", tmp]
        result = subprocess.run(command, env=pip_environment(), capture_output=True, text=True)
        found = Path(tmp) / pin.tarball_name
        if result.returncode != 0 or not found.is_file():
            lines = (result.stderr + result.stdout).strip().splitlines() or ["no message"]
            errors = [line for line in lines if line.startswith("ERROR:")] or lines
            reason = errors[-1].removeprefix("ERROR:").strip().rstrip(".")
            raise UpstreamError(f"pip could not download {pin.package} {pin.version} ({reason}); {remedy}.")
        if (actual := sha256(found)) != pin.sha256:
            raise UpstreamError(
                f"The package index delivered {pin.tarball_name} with sha256 {actual} where the pin says {pin.sha256}; "
                "use another index, or set EQUIP_LLAMA_CPP_SOURCE to a file with the pinned hash."
            )
        os.replace(found, target)


def fetch(pin: Pin) -> Path:
    """The path of the pinned tarball, checked on every use."""
    tarball = cache_dir() / pin.tarball_name
    if not tarball.is_file():
        say(f"fetch: {pin.package} {pin.version} with pip, once, into {tarball.parent}")
        try:
            download(pin, tarball)
        except OSError as error:
            raise UpstreamError(
                f"The cache folder {tarball.parent} cannot be written ({error.strerror}); "
                "set EQUIP_CACHE_DIR to a folder that can."
            ) from error
    else:
        say(f"fetch: {pin.package} {pin.version} from {tarball.parent}")
        if (actual := sha256(tarball)) != pin.sha256:
            raise UpstreamError(
                f"{tarball} has sha256 {actual} where the pin says {pin.sha256}; "
                "delete that file and run the command again."
            )
    return tarball


def tarball_files(tarball: Path, folder: str) -> Iterator[SourceFile]:
    """Regular files below `<top>/<folder>`; links, devices and paths that leave the folder are never extracted."""
    inside = PurePosixPath(folder).parts
    try:
        with tarfile.open(tarball) as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                # the release holds the .git file of a submodule, which would point git at a repository that is not there
                if not member.isreg() or parts[1 : 1 + len(inside)] != inside or ".." in parts or parts[-1] == ".git":
                    continue
                data = archive.extractfile(member)
                if data is not None:
                    yield "/".join(parts[1 + len(inside) :]), data.read(), bool(member.mode & 0o100)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UpstreamError(
            f"{tarball} cannot be unpacked ({error}); delete that file and run the command again."
        ) from error


def tree_files(root: Path) -> Iterator[SourceFile]:
    """The files of a checkout, without git's own, top-level build folders, and models beyond upstream's vocabularies."""
    for folder, subfolders, names in os.walk(root):
        here = Path(folder)
        subfolders[:] = sorted(
            d for d in subfolders if d not in (".git", "__pycache__") and not (here == root and d.startswith("build"))
        )
        for name in sorted(names):
            path = here / name
            is_model = name.endswith(".gguf") and not name.startswith("ggml-vocab-")
            if is_model or name == ".git" or not path.is_file():
                continue
            yield path.relative_to(root).as_posix(), path.read_bytes(), os.access(path, os.X_OK)


# ---- patch ----------------------------------------------------------------------------------------------------------


def series(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.patch"))


def parse(patch: Path) -> Any:
    try:
        import patch_ng
    except ImportError as error:
        raise UpstreamError(
            f"The Python package patch-ng is missing; run: {sys.executable} -m pip install patch-ng."
        ) from error
    parsed = patch_ng.fromfile(str(patch))
    if not parsed or parsed.errors:
        raise UpstreamError(f"{patch} is not a unified diff; restore it from the repository and run the command again.")
    return parsed


def item_file(item: Any) -> str:
    """The file that one part of a patch changes, relative to the tree."""
    name = item.source if item.target == b"/dev/null" else item.target
    return str(name.decode())


def touched(patch: Path) -> list[str]:
    return [item_file(item) for item in parse(patch).items]


def apply_item(parsed: Any, item: Any, root: Path, *, reverse: bool = False) -> bool:
    """Apply one file's hunks without fuzz; true only if the file's bytes changed as the patch says."""
    path = root / item_file(item)
    before = path.read_bytes() if path.is_file() else None
    creates = item.source == b"/dev/null"
    if creates and reverse:
        # the library cannot revert a new file; the file that the patch makes is its reverse's precondition
        added = [line[1:] for hunk in item.hunks for line in hunk.text if line.startswith(b"+")]
        return before is not None and before == b"".join(added)
    if creates != (before is None):
        return False
    single = copy.copy(parsed)
    single.items = [copy.deepcopy(item)]
    cwd = Path.cwd()
    try:
        done = single.revert(root=str(root)) if reverse else single.apply(root=str(root))
    finally:
        os.chdir(cwd)  # the library changes folder while it works
    after = path.read_bytes() if path.is_file() else None
    # the library answers true without a change where it thinks that a file has been patched before
    return bool(done) and after != before


def apply_patch(patch: Path, root: Path) -> list[str]:
    parsed = parse(patch)
    for item in parsed.items:
        if not apply_item(parsed, item, root):
            raise PatchError(patch, item_file(item))
    return [item_file(item) for item in parsed.items]


def is_applied(patch: Path, files: dict[str, SourceFile]) -> bool:
    """Whether the files look as if the patch had been applied to them."""
    parsed = parse(patch)
    with tempfile.TemporaryDirectory() as tmp:
        write_files((files[name] for name in touched(patch) if name in files), Path(tmp))
        return all(apply_item(parsed, item, Path(tmp), reverse=True) for item in parsed.items)


def write_files(files: Iterable[SourceFile], root: Path) -> None:
    for name, data, executable in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o755 if executable else 0o644)


def patched(originals: dict[str, SourceFile], patches: list[Path]) -> list[SourceFile]:
    """The files that the series touches, after it; deleted ones are left out."""
    names = sorted({name for patch in patches for name in touched(patch)})
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        write_files((originals[name] for name in names if name in originals), root)
        for patch in patches:
            apply_patch(patch, root)
        result = []
        for name in names:
            path = root / name
            if path.is_file():
                result.append((name, path.read_bytes(), name in originals and originals[name][2]))
        return result


# ---- source folder --------------------------------------------------------------------------------------------------


class Sync:
    """Writes files below `root` where they differ, and in the end deletes what was not mentioned."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seen: set[str] = set()
        self.written = 0

    def put(self, file: SourceFile) -> None:
        name, data, _ = file
        self.seen.add(name)
        path = self.root / name
        if path.is_file() and path.read_bytes() == data:
            return
        write_files([file], self.root)
        self.written += 1

    def prune(self) -> int:
        removed = 0
        for folder, subfolders, names in os.walk(self.root, topdown=False):
            here = Path(folder)
            for name in names:
                if (here / name).relative_to(self.root).as_posix() not in self.seen:
                    (here / name).unlink()
                    removed += 1
            for name in subfolders:
                if not any((here / name).iterdir()):
                    (here / name).rmdir()
        return removed


def prepare(out: Path, pin: Pin, patches: list[Path], source: Path | None = None) -> None:
    """Make `out` the pinned tree with the patches applied. `source` is a tarball or a tree; None = cache or download.

    Raises UpstreamError.
    """
    digests = {patch.name: sha256(patch) for patch in patches}
    stamp = json.dumps({"pin": asdict(pin), "patches": digests, "script": sha256(Path(__file__))})
    stamp_file = out / STAMP
    from_tree = source is not None and source.is_dir()
    if not from_tree and stamp_file.is_file() and stamp_file.read_text(encoding="utf-8") == stamp:
        say(f"fetch: llama.cpp {pin.commit} is in place")
        say(f"patch: {len(patches)} patches are in place")
        return

    if source is None:
        files = tarball_files(fetch(pin), pin.folder)
    elif from_tree:
        if not all((source / name).is_file() for name in ("include/llama.h", "ggml/include/ggml.h", "CMakeLists.txt")):
            raise UpstreamError(f"EQUIP_LLAMA_CPP_SOURCE={source} is not a llama.cpp tree; give its top folder.")
        say(f"fetch: llama.cpp from the tree {source}, taken as it is")
        files = tree_files(source)
    elif source.is_file():
        say(f"fetch: {source}")
        if (actual := sha256(source)) != pin.sha256:
            raise UpstreamError(
                f"EQUIP_LLAMA_CPP_SOURCE={source} has sha256 {actual} where the pin says {pin.sha256}; "
                f"give the source release of {pin.package} {pin.version}."
            )
        files = tarball_files(source, pin.folder)
    else:
        raise UpstreamError(f"EQUIP_LLAMA_CPP_SOURCE={source} does not exist; give a tarball or a llama.cpp tree.")

    out.mkdir(parents=True, exist_ok=True)
    stamp_file.unlink(missing_ok=True)  # an interrupted run must not look finished
    by_patch = {name for patch in patches for name in touched(patch)}
    originals: dict[str, SourceFile] = {}
    sync = Sync(out)
    for file in files:
        if file[0] in by_patch:
            originals[file[0]] = file
        else:
            sync.put(file)
    try:
        changed = patched(originals, patches)
    except PatchError as error:
        if from_tree and any(is_applied(patch, originals) for patch in (error.patch, patches[-1])):
            raise UpstreamError(
                f"The tree {source} has been patched already (at {error.patch.name}); "
                "set EQUIP_LLAMA_CPP_SOURCE to an unchanged llama.cpp tree, or unset it."
            ) from error
        remedy = (
            f"set EQUIP_LLAMA_CPP_SOURCE to llama.cpp {pin.commit}, or unset it"
            if from_tree
            else f"restore patches/ and {PIN.name} from the same revision"
        )
        raise UpstreamError(f"{str(error).rstrip('.')}; {remedy} and run the command again.") from error
    for file in changed:
        sync.put(file)
    if not sync.seen:
        raise UpstreamError(f"The tarball has no folder {pin.folder}; restore {PIN.name} from the repository.")
    removed = sync.prune()
    say(f"patch: {len(patches)} patches to {len(by_patch)} files ({sync.written} written, {removed} removed)")
    if not from_tree:
        stamp_file.write_text(stamp, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch the pinned llama.cpp and apply the patch series.")
    parser.add_argument("--out", type=Path, required=True, help="source folder to bring up to date")
    parser.add_argument("--pin", type=Path, default=PIN, help="JSON file that names the release")
    parser.add_argument("--patches", type=Path, default=PATCHES, help="folder with the series")
    parser.add_argument("--no-patches", action="store_true", help="leave the tree as upstream made it")
    args = parser.parse_args()
    given = os.environ.get("EQUIP_LLAMA_CPP_SOURCE")
    try:
        patches = [] if args.no_patches else series(args.patches)
        prepare(args.out, load_pin(args.pin), patches, Path(given).expanduser().resolve() if given else None)
    except UpstreamError as error:
        print(f"equip: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
