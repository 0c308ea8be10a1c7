"""The fetch-and-patch step, what its failures say, and what the build ships."""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import upstream
import upstream_tests
from places import REPOSITORY

SCRIPT = REPOSITORY / "native" / "cmake" / "upstream.py"
FOLDER = "vendor/llama.cpp"

FILES = {
    "CMakeLists.txt": "project(fake)\n",
    "LICENSE": "MIT\n",
    "include/llama.h": "int llama(void);\n",
    "ggml/include/ggml.h": "int ggml(void);\n",
    "src/a.cpp": "".join(f"line {i}\n" for i in range(40)),
    "src/b.cpp": "int b;\n",
}


def diff(name: str, old: str | None, new: str) -> str:
    lines = difflib.unified_diff(
        (old or "").splitlines(True), new.splitlines(True), f"a/{name}" if old else "/dev/null", f"b/{name}"
    )
    kind = (
        "index 0123456789ab..ba9876543210 100644\n"
        if old
        else "new file mode 100644\nindex 000000000000..ba9876543210\n"
    )
    return f"diff --git a/{name} b/{name}\n{kind}{''.join(lines)}"


def edited(line: str = "line 20\n", by: str = "line 20, hooked\n") -> str:
    return FILES["src/a.cpp"].replace(line, by)


class Upstream:
    """A release in miniature with its pin, a series of two patches, and a cache folder."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.out = tmp / "build" / "llama.cpp"
        self.cache = tmp / "cache"
        self.patches = tmp / "patches"
        self.pin = tmp / "pin.json"
        self.tarball = self.cache / "fake_release-1.0.tar.gz"
        self.cache.mkdir()
        self.patches.mkdir()
        self.write_tarball(FILES)
        self.patch("0001-hook.patch", diff("src/a.cpp", FILES["src/a.cpp"], edited()))
        second = edited().replace("line 30\n", "line 30, hooked\n")
        self.patch("0002-more.patch", diff("src/a.cpp", edited(), second) + diff("src/new.h", None, "int n;\n"))
        self.result = {**FILES, "src/a.cpp": second, "src/new.h": "int n;\n"}

    def write_tarball(self, files: dict[str, str], extra: dict[str, str] | None = None) -> None:
        with tarfile.open(self.tarball, "w:gz") as archive:
            members = {f"fake-1.0/{FOLDER}/{name}": text for name, text in files.items()}
            for name, text in {**members, "fake-1.0/README": "x", **(extra or {})}.items():
                info = tarfile.TarInfo(name)
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text.encode()))
        self.write_pin(hashlib.sha256(self.tarball.read_bytes()).hexdigest())

    def write_pin(self, sha256: str) -> None:
        pin = {"package": "fake-release", "version": "1.0", "sha256": sha256, "folder": FOLDER}
        self.pin.write_text(json.dumps({**pin, "commit": "c0ffee", "date": "2026-01-01"}))

    def patch(self, name: str, text: str) -> None:
        (self.patches / name).write_text(f"Subject: {name}\n\n---\n\n{text}")

    def tree(self, files: dict[str, str]) -> Path:
        root = self.tmp / "tree"
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return root

    def run(self, *args: str, python: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("EQUIP_", "PIP_"))}
        command = [sys.executable, *python, str(SCRIPT), "--out", str(self.out), "--pin", str(self.pin)]
        return subprocess.run(
            [*command, "--patches", str(self.patches), *args],
            env={**clean, "EQUIP_CACHE_DIR": str(self.cache), **env},
            capture_output=True,
            text=True,
        )

    def contents(self) -> dict[str, str]:
        paths = (path for path in self.out.rglob("*") if path.is_file() and path.name != upstream.STAMP)
        return {path.relative_to(self.out).as_posix(): path.read_text() for path in paths}

    def fails(self, *words: str, python: tuple[str, ...] = (), **env: str) -> str:
        """The run fails with one sentence that holds the words, and does not look finished afterwards."""
        result = self.run(python=python, **env)
        assert result.returncode == 1, result.stdout + result.stderr
        assert result.stderr.startswith("equip: error: ") and result.stderr.endswith(".\n")
        assert result.stderr.count("\n") == 1
        for word in words:
            assert word in result.stderr
        assert not (self.out / upstream.STAMP).exists()
        return result.stderr


@pytest.fixture
def release(tmp_path: Path) -> Upstream:
    return Upstream(tmp_path)


# ---- what it does ---------------------------------------------------------------------------------------------------


def test_the_series_is_applied(release: Upstream) -> None:
    result = release.run()
    assert result.returncode == 0, result.stderr
    assert release.contents() == release.result


def test_without_patches_the_tree_is_upstreams(release: Upstream) -> None:
    assert release.run("--no-patches").returncode == 0
    assert release.contents() == FILES


def test_a_second_run_changes_nothing(release: Upstream) -> None:
    release.run()
    before = {path: path.stat().st_mtime_ns for path in release.out.rglob("*")}
    result = release.run()
    assert "in place" in result.stdout
    assert before == {path: path.stat().st_mtime_ns for path in release.out.rglob("*")}


def test_only_changed_files_are_written(release: Upstream) -> None:
    release.run()
    before = {path: path.stat().st_mtime_ns for path in release.out.rglob("*") if path.is_file()}
    (release.out / "src" / "left-over.cpp").write_text("int x;\n")
    (release.patches / "0002-more.patch").unlink()
    result = release.run()
    assert "(1 written, 2 removed)" in result.stdout
    assert release.contents() == {**FILES, "src/a.cpp": edited()}
    kept = {path: path.stat().st_mtime_ns for path in release.out.rglob("*") if path.is_file()}
    assert {p.name for p in kept if kept[p] != before[p]} == {"a.cpp", upstream.STAMP}


def test_an_interrupted_run_is_not_trusted(release: Upstream) -> None:
    release.run()
    (release.out / upstream.STAMP).unlink()
    (release.out / "src" / "b.cpp").write_text("torn")
    assert release.run().returncode == 0
    assert release.contents() == release.result


def test_a_tree_and_a_tarball_of_ones_own_are_taken(release: Upstream) -> None:
    tree = release.tree({**FILES, "build/junk.o": "x", ".git/HEAD": "ref", "models/big.gguf": "x"})
    assert release.run(EQUIP_LLAMA_CPP_SOURCE=str(tree)).returncode == 0
    assert release.contents() == release.result
    moved = release.tarball.rename(release.tmp / "elsewhere.tar.gz")
    assert release.run(EQUIP_LLAMA_CPP_SOURCE=str(moved)).returncode == 0
    assert release.contents() == release.result


def test_nothing_is_extracted_outside(release: Upstream) -> None:
    release.write_tarball(FILES, {f"fake-1.0/{FOLDER}/../../../evil": "x", f"fake-1.0/{FOLDER}/.git": "gitdir: ../.."})
    assert release.run("--no-patches").returncode == 0
    assert release.contents() == FILES
    assert not list(release.tmp.rglob("evil"))


# ---- what it says when it cannot ------------------------------------------------------------------------------------


def test_a_wrong_hash_in_the_cache_is_refused(release: Upstream) -> None:
    release.write_pin("0" * 64)
    release.fails("the pin says 0000", "delete that file", str(release.tarball))


def test_a_wrong_hash_of_a_given_tarball_is_refused(release: Upstream) -> None:
    release.write_pin("0" * 64)
    release.fails("EQUIP_LLAMA_CPP_SOURCE", "the pin says 0000", EQUIP_LLAMA_CPP_SOURCE=str(release.tarball))


def test_a_wrong_hash_of_a_download_is_refused(release: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    data = release.tarball.read_bytes()
    release.tarball.unlink()
    release.write_pin("0" * 64)
    seen: dict[str, str] = {}

    def pip(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.update(env)
        (Path(command[-1]) / release.tarball.name).write_bytes(data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("EQUIP_CACHE_DIR", str(release.cache))
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    monkeypatch.setenv("SKBUILD_BUILD_DIR", "x")
    monkeypatch.setenv("LLAMA_KV_POLICY", "x")
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(upstream.UpstreamError, match=r"delivered fake_release-1\.0.*the pin says 0000"):
        upstream.fetch(upstream.load_pin(release.pin))
    assert not list(release.cache.iterdir()), "a download with the wrong hash must not stay"
    assert not {"CMAKE_ARGS", "SKBUILD_BUILD_DIR", "LLAMA_KV_POLICY"} & set(seen)


def test_a_patch_that_does_not_apply_is_named(release: Upstream) -> None:
    release.patch("0002-more.patch", diff("src/a.cpp", edited("line 30\n", "line thirty\n"), "other\n"))
    release.fails("0002-more.patch", "src/a.cpp", "restore patches/")


def test_a_patch_of_a_moved_line_does_not_apply(release: Upstream) -> None:
    """No fuzz and no offset: a hunk that fits some lines further down may be another function."""
    moved = {**FILES, "src/a.cpp": "one more line\n" + FILES["src/a.cpp"]}
    release.write_tarball(moved)
    release.fails("0001-hook.patch", "src/a.cpp")


def test_a_patch_that_makes_a_file_which_exists_is_named(release: Upstream) -> None:
    release.write_tarball({**FILES, "src/new.h": "int m;\n"})
    release.fails("0002-more.patch", "src/new.h")


def test_what_is_no_patch_is_named(release: Upstream) -> None:
    (release.patches / "0003-x.patch").write_text("hello\n")
    release.fails("0003-x.patch", "not a unified diff")


@pytest.mark.parametrize("depth", ["first patch", "whole series"])
def test_a_tree_that_is_patched_already_is_refused(release: Upstream, depth: str) -> None:
    files = release.result if depth == "whole series" else {**FILES, "src/a.cpp": edited()}
    tree = release.tree(files)
    release.fails("patched already", "0001-hook.patch", "unchanged", EQUIP_LLAMA_CPP_SOURCE=str(tree))


def test_a_tree_of_another_revision_is_refused(release: Upstream) -> None:
    tree = release.tree({**FILES, "src/a.cpp": "rewritten\n"})
    release.fails("0001-hook.patch", "src/a.cpp", "c0ffee", EQUIP_LLAMA_CPP_SOURCE=str(tree))


def test_a_tree_that_is_not_llama_cpp_is_refused(release: Upstream) -> None:
    release.fails("not a llama.cpp tree", EQUIP_LLAMA_CPP_SOURCE=str(release.patches))


def test_a_source_that_does_not_exist_is_refused(release: Upstream) -> None:
    release.fails("does not exist", EQUIP_LLAMA_CPP_SOURCE=str(release.tmp / "nothing"))


def test_off_line_the_sentence_names_the_remedy(release: Upstream) -> None:
    release.tarball.unlink()
    release.fails(
        "pip could not download fake-release 1.0",
        "EQUIP_LLAMA_CPP_SOURCE",
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_RETRIES="0",
        PIP_TIMEOUT="2",
    )
    assert not list(release.cache.iterdir())


def test_a_cache_that_cannot_be_made_is_named(release: Upstream) -> None:
    release.fails("cannot be written", "EQUIP_CACHE_DIR", EQUIP_CACHE_DIR=str(release.tarball / "below-a-file"))


def test_a_missing_patch_library_is_named(release: Upstream) -> None:
    release.fails("patch-ng is missing", "pip install patch-ng", python=("-S",))


# ---- CMake ----------------------------------------------------------------------------------------------------------


def configure(source: Path, build: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    cmake, ninja = upstream_tests.tool("cmake"), upstream_tests.tool("ninja")
    if cmake is None or ninja is None:
        pytest.skip("cmake or ninja is missing")
    clean = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "CMAKE_ARGS") and not k.startswith("GIT_")}
    command = [cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython3_EXECUTABLE={sys.executable}"]
    return subprocess.run(
        [*command, "-S", str(source), "-B", str(build), *args], env={**clean, **env}, capture_output=True, text=True
    )


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_without_a_compiler_the_sentence_names_the_remedy(tmp_path: Path, variable: str) -> None:
    result = configure(REPOSITORY / "native", tmp_path / "build", **{variable: str(tmp_path / "no-such-compiler")})
    assert result.returncode != 0
    said = re.findall(r"equip: error: .*", result.stderr)
    assert len(said) == 1
    assert "No working C++17 compiler was found; install one" in said[0]


def test_a_build_inside_another_repository_leaves_it_alone(tmp_path: Path) -> None:
    """The series applies, the outer repository is untouched, and its commit does not pass for llama.cpp's."""
    outer = tmp_path / "outer"
    for folder in ("native", "patches"):
        if (REPOSITORY / folder).is_dir():
            shutil.copytree(REPOSITORY / folder, outer / "sub" / folder)
    head = ""
    if git := shutil.which("git"):
        ident = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
        for args in (["init", "-q"], ["add", "."], [*ident, "commit", "-q", "-m", "outer"]):
            subprocess.run([git, *args], cwd=outer, check=True, capture_output=True)
        command = [git, "rev-parse", "--short", "HEAD"]
        head = subprocess.run(command, cwd=outer, check=True, capture_output=True, text=True).stdout.strip()
    build = outer / "sub" / "build"
    result = configure(outer / "sub" / "native", build)
    assert result.returncode == 0, result.stdout + result.stderr
    info = (build / "common" / "build-info.cpp").read_text()
    assert upstream.load_pin().commit in info
    assert not head or head not in info
    if git:
        changes = subprocess.run(
            [git, "status", "--short"], cwd=outer, capture_output=True, text=True, check=True
        ).stdout
        assert changes.split() == ["??", "sub/build/"]
    for patch in upstream.series(REPOSITORY / "patches"):
        for name in upstream.touched(patch):
            assert (build / "llama.cpp" / name).is_file()


def test_the_series_applies_and_exports_to_itself() -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / "export_patches.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- what is shipped ------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped() -> Path:
    """The installed package's folder."""
    try:
        folder = Path(str(distribution("equip-llama").locate_file("equip_cli")))
    except PackageNotFoundError:
        pytest.skip("equip-llama is not installed")
    if not (folder / "lib").is_dir():
        pytest.skip("equip-llama is installed without its libraries")
    return folder


def test_the_wheel_holds_libraries_header_and_licences(shipped: Path) -> None:
    tags = distribution("equip-llama").read_text("WHEEL") or ""
    assert re.search(r"^Tag: py3-none-(?!any)", tags, re.MULTILINE)
    names = {path.name for path in (shipped / "lib").iterdir()}
    stems = {re.sub(r"^lib|\.(so|dylib|dll)$", "", name) for name in names}
    assert {"equip", "llama", "ggml", "ggml-base", "build.json"} <= stems
    assert not any(path.is_symlink() for path in (shipped / "lib").iterdir())
    assert (shipped / "include" / "equip.h").is_file()
    assert {"index.html", "page.css", "page.js"} == {path.name for path in (shipped / "serving" / "page").iterdir()}
    # nothing of upstream's own installation: headers, cmake and pkg-config files
    files = [str(file) for file in distribution("equip-llama").files or []]
    assert not [file for file in files if re.search(r"\.(cmake|pc|hpp|a)$|ggml.*\.h$|llama.*\.h$", file)]


def test_llama_server_is_installed_and_starts_beside_its_libraries(shipped: Path, tmp_path: Path) -> None:
    if "EQUIP_SERVER=OFF" in json.loads((shipped / "lib" / "build.json").read_text())["cmake_args"]:
        pytest.skip("built without it")
    program = shipped / "lib" / ("llama-server.exe" if os.name == "nt" else "llama-server")
    env = {key: value for key, value in os.environ.items() if key not in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")}
    done = subprocess.run([str(program), "--version"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and upstream.load_pin().commit[:7] in done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("ldd"), reason="needs ldd")
def test_libraries_need_runtimes_and_each_other_only(shipped: Path) -> None:
    if json.loads((shipped / "lib" / "build.json").read_text())["cmake_args"]:
        pytest.skip("built with options of its own")
    allowed = re.compile(r"^(linux-vdso|(/.*/)?ld-linux|lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|gomp|mvec)(?=\.so))")
    ours = {path.name for path in (shipped / "lib").glob("*.so")}
    for path in sorted(
        each for each in (shipped / "lib").iterdir() if each.suffix == ".so" or os.access(each, os.X_OK)
    ):
        out = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True).stdout
        needed = {line.split()[0] for line in out.splitlines()}
        assert "not found" not in out
        assert not {name for name in needed if name not in ours and not allowed.match(name)}, path.name
        for name in needed & ours:
            assert f"{name} => {shipped / 'lib' / name}" in out


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="needs nm")
def test_libequip_exports_its_api_alone(shipped: Path) -> None:
    command = ["nm", "-D", "--defined-only", str(shipped / "lib" / "libequip.so")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in out.splitlines()}
    assert names and all(name.startswith("equip_") for name in names)
    assert names <= set(re.findall(r"\bequip_\w+", (shipped / "include" / "equip.h").read_text()))
