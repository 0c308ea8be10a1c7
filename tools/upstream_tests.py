"""Build what the tests compare with, once, in the cache folder:

    python tools/upstream_tests.py pristine   libllama and ggml as upstream made them, built like ours
    python tools/upstream_tests.py stock      those, and llama-server as upstream made it
    python tools/upstream_tests.py server     upstream's llama-server on the patched tree
    python tools/upstream_tests.py tests      upstream's own tests on the patched tree

The last two are further targets of the folder in which install.py has built the libraries, so nothing is compiled twice;
where there is none, they get a folder in the cache.

The last line of output is the folder. From Python: `upstream_tests.build("pristine")`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "native"
sys.path.insert(0, str(NATIVE / "cmake"))

from build_steps import BuildSteps  # noqa: E402
from upstream import cache_dir, load_pin, series  # noqa: E402

TESTS = ["test-backend-ops", "test-llama-archs", "test-rope", "test-save-load-state", "test-state-restore-fragmented"]
TARGETS = {
    "pristine": ["equip-libraries"],
    "stock": ["equip-libraries", "llama-server"],
    "server": ["llama-server"],
    "tests": TESTS,
}
OPTION = {"pristine": "EQUIP_PRISTINE", "server": "EQUIP_UPSTREAM_TESTS", "tests": "EQUIP_UPSTREAM_TESTS"}
STOCK = ROOT / "tools" / "stock-server"


class BuildError(RuntimeError):
    """cmake or the compiler failed; the message ends with the last lines of the log."""


def installed_build() -> dict[str, Any]:
    """How the installed libequip was built: compiler, processor, portable or not, CMAKE_ARGS. Empty without it."""
    try:
        path = Path(str(distribution("equip-llama").locate_file("equip_cli/lib/build.json")))
    except PackageNotFoundError:
        return {}
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def tool(name: str) -> str | None:
    """cmake and ninja may be Python packages of an environment that is not active."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    return shutil.which(name, path=path)


def flags() -> list[str]:
    """The CMake options that our own libraries were built with."""
    ours = installed_build()
    args = shlex.split(os.environ.get("CMAKE_ARGS") or ours.get("cmake_args", ""))
    portable = os.environ.get("EQUIP_PORTABLE") or ours.get("portable")
    args.append(f"-DEQUIP_PORTABLE={'ON' if portable else 'OFF'}")
    for variable, key in (("CMAKE_C_COMPILER", "cc"), ("CMAKE_CXX_COMPILER", "cxx")):
        if key in ours and Path(ours[key]).is_file():
            args.append(f"-D{variable}={ours[key]}")
    return args


def digest(*parts: str | Path) -> str:
    """A short hash of strings and of files' contents."""
    value = hashlib.sha256()
    for part in parts:
        value.update(part.read_bytes() if isinstance(part, Path) else part.encode())
        value.update(b"\0")
    return value.hexdigest()[:12]


def processor() -> list[str]:
    """The instruction sets of the installed libraries: builds for another processor are other builds."""
    ours = installed_build()
    return [*ours.get("instruction_sets", []), "without", *ours.get("left_out", [])]


def compiler_version(args: list[str]) -> str:
    given = [arg.split("=", 1)[1] for arg in args if arg.startswith("-DCMAKE_CXX_COMPILER=")]
    command = given[-1] if given else os.environ.get("CXX", "c++")
    try:
        return subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True).stdout
    except OSError:
        return command


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One build at a time; a second process waits."""
    with path.open("a+b") as file:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: list[str], log: Path) -> None:
    """Run it with its output in the log, and every so often a line on stderr that says how far it is."""
    steps = BuildSteps(lambda line: print(f"{log.stem}: {line}", file=sys.stderr, flush=True))
    with log.open("a", encoding="utf-8") as out:
        out.write(f"$ {shlex.join(command)}\n")
        out.flush()
        pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, **pipe, env=environment(), encoding="utf-8", errors="replace") as process:
            try:
                for line in process.stdout or ():
                    out.write(line)
                    out.flush()
                    steps.read(line)
            except BaseException:
                process.kill()
                raise
        code = process.returncode
    if code != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise BuildError(f"{command[0]} failed with code {code}; {log} ends with:\n{tail}")


def environment() -> dict[str, str]:
    """PATH with this environment's cmake and ninja; our flags are on the command line already."""
    env = {k: v for k, v in os.environ.items() if k not in ("CMAKE_ARGS", "CC", "CXX")}
    env["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), env.get("PATH", "")])
    return env


def product_folder() -> Path | None:
    """Where install.py has built the installed libraries of this checkout; None if it has not."""
    found = sorted((ROOT / "build").glob("*/CMakeCache.txt"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found and installed_build() else None


def same_tools(folder: Path, cmake: str) -> tuple[str, list[str]]:
    """(cmake, options) that go on where another call has configured `folder`: another release would compile all of it anew.

    If that cmake is gone, it was the newest of the package index in an environment of pip's, and `cmake` is as new.
    """
    cache = (folder / "CMakeCache.txt").read_text(encoding="utf-8", errors="replace")
    used = {key: value for key, value in re.findall(r"^(\w+):\w+=(.*)$", cache, re.MULTILINE)}
    if Path(used.get("CMAKE_COMMAND", "")).is_file():
        cmake = used["CMAKE_COMMAND"]
    ninja = tool("ninja")
    if used.get("CMAKE_GENERATOR") == "Ninja" and ninja and not Path(used.get("CMAKE_MAKE_PROGRAM", "")).is_file():
        return cmake, [f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    return cmake, []


def build(kind: str) -> Path:
    """The folder with the libraries or programs of `kind` (pristine, stock, server or tests), built if it is not up to date.

    A folder belongs to a pin, a set of flags, a compiler, a processor and a checkout, and is refreshed when its sources
    change; one that another checkout built from the very same sources is used as it is. Raises BuildError.
    """
    args = flags()
    unpatched = kind in ("pristine", "stock")
    sources = [*sorted((NATIVE / "cmake").iterdir()), NATIVE / "CMakeLists.txt"]
    sources += sorted((NATIVE / "ggml" / "gcc").iterdir())  # what both sides are compiled with
    if kind == "stock":
        sources.append(STOCK / "CMakeLists.txt")
    if not unpatched:
        sources += [
            *series(ROOT / "patches"),
            *sorted((NATIVE / "cache").iterdir()),
            *sorted((NATIVE / "policies").iterdir()),
            *sorted((NATIVE / "ggml").iterdir()),
            *sorted((NATIVE / "common").iterdir()),
            *sorted((NATIVE / "server").iterdir()),
        ]
    key = digest(load_pin().sha256, *args, compiler_version(args), *processor())
    stamp_text = digest(*(part for path in sources if path.is_file() for part in (path.name, path)))

    base = cache_dir() / "upstream"
    group = kind if unpatched else "patched"
    product = None if unpatched else product_folder()
    mine = product or base / f"{group}-{key}-{digest(str(ROOT))[:6]}"
    if product is not None:
        stamp_text = f"{key} {stamp_text}"
    for folder in [mine, *sorted(base.glob(f"{group}-{key}-*"))]:
        stamp = folder / f"{kind}.stamp"
        if stamp.is_file() and stamp.read_text() == stamp_text:
            return folder / "bin"

    cmake = tool("cmake")
    if cmake is None:
        raise BuildError("cmake is missing; run: python -m pip install cmake ninja")
    mine.mkdir(parents=True, exist_ok=True)
    stamp, log = mine / f"{kind}.stamp", mine / f"{kind}.log"
    with locked(mine / "lock"):
        if stamp.is_file() and stamp.read_text() == stamp_text:
            return mine / "bin"
        stamp.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
        generator = ["-G", "Ninja"] if tool("ninja") else []
        if product is not None:
            cmake, generator = same_tools(product, cmake)
        options = [f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        if kind in OPTION:
            options.append(f"-D{OPTION[kind]}=ON")
        source = STOCK if kind == "stock" else NATIVE
        run([cmake, *generator, "-S", str(source), "-B", str(mine), *options, *args], log)
        parallel = [] if generator or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") else ["-j", str(os.cpu_count() or 1)]
        run([cmake, "--build", str(mine), "--config", "Release", *parallel, "--target", *TARGETS[kind]], log)
        stamp.write_text(stamp_text)
    return mine / "bin"


def main() -> int:
    parser = argparse.ArgumentParser(description="Build what the tests compare with, once, in the cache folder.")
    parser.add_argument("kind", choices=sorted(TARGETS))
    try:
        print(build(parser.parse_args().kind))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
