"""Build libllama and libequip with the compiler's sanitizers and run the native tests on them:

    python tools/sanitize.py address    AddressSanitizer and UndefinedBehaviorSanitizer: all of libllama and libequip
    python tools/sanitize.py thread     ThreadSanitizer: the attention kernel, the scores, several sequences

`--quick` runs one model. The folder of the build is kept in the cache folder (about 5 minutes on two cores the first
time). Exit code 0: clean. What upstream's own code is known to do is listed in `KNOWN`, with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "support"), str(ROOT / "native" / "cmake")]

import upstream_tests  # noqa: E402
from upstream import cache_dir  # noqa: E402

FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize=vptr -fno-omit-frame-pointer -g1 -O1",
    "thread": "-fsanitize=thread -fno-omit-frame-pointer -g1 -O1",
}

# UndefinedBehaviorSanitizer, by file of upstream: what is not ours, and harmless here
KNOWN: dict[str, str] = {}

MODELS = {True: ("hybrid",), False: ("hybrid", "llama-gqa", "gemma3", "gpt-oss")}
THROUGH_LIBEQUIP = [
    "tests/native/test_memory.py::test_cancelled_hybrid_session_keeps_what_it_has_read",
    "tests/native/test_scores.py::test_a_rewind_keeps_count",
    "tests/native/test_scores.py::test_window_is_that_of_the_policy_whatever_the_chunks",
    "tests/native/test_streaming.py::test_a_cancelled_session_goes_on",
]
PROGRAMS = {"address": ("test-memory", "test-policy"), "thread": ("test-policy",)}

STATES = [  # arguments of test-state
    ["exact", "streaming:budget=64", "n_seq=2"],
    ["exact", "h2o:budget=64,recent=8,positions=cache,rotate_every=4", "fa=1"],
    ["exact", "snapkv:budget=64,recent=8,scope=layer,evict_every=4,update=gather"],
    ["exact", "random:budget=64,recent=8"],
    ["mutate", "h2o:budget=64,recent=8,positions=auto", "200", "5", "state"],
    ["mutate", "rkv:budget=64,recent=8,evict_every=4", "200", "6", "state", "fa=1"],
    ["mutate", "random:budget=64,recent=8", "100", "7", "state"],
]


class SanitizeError(RuntimeError):
    """One sentence, or what a sanitizer said."""


def build(kind: str) -> Path:
    """The folder with the instrumented libraries; what has not changed is not built again."""
    folder = cache_dir() / "sanitize" / f"{kind}-{upstream_tests.digest(str(ROOT))[:6]}"
    folder.mkdir(parents=True, exist_ok=True)
    cmake = upstream_tests.tool("cmake")
    if cmake is None:
        raise SanitizeError("cmake is missing; run: python3 install.py --with test")
    flags = FLAGS[kind]
    options = [f"-DCMAKE_{language}_FLAGS={flags}" for language in ("C", "CXX")]
    options += [f"-DCMAKE_{linker}_LINKER_FLAGS={flags}" for linker in ("SHARED", "EXE", "MODULE")]
    # OpenMP's own synchronisation is unknown to ThreadSanitizer; ggml's threads take its place
    options += ["-DGGML_OPENMP=OFF", "-DCMAKE_BUILD_TYPE=None", f"-DPython3_EXECUTABLE={sys.executable}"]
    generator = ["-G", "Ninja"] if upstream_tests.tool("ninja") else []
    log = folder / "build.log"
    log.unlink(missing_ok=True)
    upstream_tests.run([cmake, *generator, "-S", str(ROOT / "native"), "-B", str(folder), *options], log)
    targets = ["equip", "equip-libraries"] if kind == "address" else ["equip-libraries"]
    upstream_tests.run([cmake, "--build", str(folder), "--target", *targets], log)
    return folder


def programs(kind: str, folder: Path) -> Path:
    """native/tests, instrumented in the same way."""
    cmake = upstream_tests.tool("cmake")
    assert cmake is not None
    tests, tree = folder / "tests", folder / "llama.cpp"
    include = f"{tree / 'include'};{ROOT / 'native' / 'cache'}"
    options = [f"-DLLAMA_INCLUDE={include}", f"-DGGML_INCLUDE={tree / 'ggml' / 'include'}"]
    options += [f"-DLLAMA_LIB_DIR={folder / 'bin'}", "-DCMAKE_BUILD_TYPE=None"]
    options += [f"-DCMAKE_CXX_FLAGS={FLAGS[kind]}", f"-DCMAKE_EXE_LINKER_FLAGS={FLAGS[kind]}"]
    generator = ["-G", "Ninja"] if upstream_tests.tool("ninja") else []
    log = folder / "tests.log"
    log.unlink(missing_ok=True)
    upstream_tests.run([cmake, *generator, "-S", str(ROOT / "native" / "tests"), "-B", str(tests), *options], log)
    names = [*PROGRAMS[kind], "test-attn", "test-state", *(["test-ahead"] if kind == "address" else [])]
    upstream_tests.run([cmake, "--build", str(tests), "--target", *names], log)
    return tests


def environment(folder: Path, suppressions: Path) -> dict[str, str]:
    suppressions.write_text("".join(f"alignment:{name}\nundefined:{name}\n" for name in KNOWN), encoding="utf-8")
    return os.environ | {
        "LD_LIBRARY_PATH": str(folder / "bin"),
        "EQUIP_TEST_LIB_DIR": str(folder / "bin"),
        "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:exitcode=99:suppressions={suppressions}",
        "TSAN_OPTIONS": "halt_on_error=0:exitcode=99",
        "LSAN_OPTIONS": "exitcode=99",
    }


def models(names: tuple[str, ...], folder: Path) -> list[Path]:
    """Tiny models with random weights."""
    from dropin_models import write_hybrid
    from models import MODELS as shapes
    from models import write

    made = []
    for name in names:
        path = folder / f"{name}.gguf"
        if name == "hybrid":
            write_hybrid(path, ROOT / "equip_cli" / "assets" / "equip-tiny.gguf")
        else:
            write(shapes[name], path)
        made.append(path)
    return made


def through_libequip(folder: Path, env: dict[str, str]) -> None:
    """Tests that drive libequip from Python, which loads the sanitizer first; its own leaks do not count."""
    compiler = os.environ.get("CXX", "c++")
    # the C++ library too: the sanitizer looks up what throws an exception when it is loaded, which Python alone has not
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    env = env | {"LD_PRELOAD": " ".join(libraries), "EQUIP_LIB_PATH": str(folder / "bin")}
    env["ASAN_OPTIONS"] = "detect_leaks=0:exitcode=99"
    # -s: what the sanitizer says is not to be caught with the rest of a test's output
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-n", "0", "--timeout", "3000", *THROUGH_LIBEQUIP]
    result = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", cwd=ROOT)
    if result.returncode != 0 or "Sanitizer" in result.stderr or "runtime error" in result.stderr:
        raise SanitizeError(f"address: libequip: code {result.returncode}\n{(result.stdout + result.stderr)[-6000:]}")
    print(f"address: libequip: {result.stdout.splitlines()[-1]}: clean", flush=True)


def run(kind: str, quick: bool) -> None:
    folder = build(kind)
    tests = programs(kind, folder)
    with tempfile.TemporaryDirectory() as tmp:
        env = environment(folder, Path(tmp) / "suppressions")
        paths = models(MODELS[quick], Path(tmp))
        commands = [[str(tests / "test-attn"), "quick"]]
        for path in paths:
            for name in PROGRAMS[kind]:
                if not (name == "test-policy" and path.stem == "hybrid"):
                    commands.append([str(tests / name), str(path)])
            for arguments in STATES if kind == "address" else []:
                if path.stem != "hybrid" or arguments[1].startswith(("streaming", "random")):
                    commands.append([str(tests / "test-state"), str(path), *arguments])
        runs: list[tuple[list[str], dict[str, str]]] = [(command, {}) for command in commands]
        # victims chosen as on a device: by ggml's operations, and by the code of our kernels
        for path, form in itertools.product(paths, ("graph", "node")) if kind == "address" else []:
            if path.stem != "hybrid":
                variables = {"LLAMA_KV_SCORES": form, "LLAMA_KV_SINKS": "graph"}
                runs.append(([str(tests / "test-ahead"), str(path), "6"], variables))
        for command, variables in runs:
            result = subprocess.run(
                command, env=env | variables, capture_output=True, text=True, errors="replace", cwd=tmp
            )
            said = result.stdout + result.stderr
            line = f"{kind}: {Path(command[0]).name} {' '.join([Path(command[1]).stem, *command[2:], *variables.values()])}"
            if result.returncode != 0 or "Sanitizer" in said or "runtime error" in said:
                raise SanitizeError(f"{line}: code {result.returncode}\n{said[-6000:]}")
            print(f"{line}: clean", flush=True)
        if kind == "address":
            through_libequip(folder, env)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the native tests under the compiler's sanitizers.")
    parser.add_argument("kind", choices=sorted(FLAGS))
    parser.add_argument("--quick", action="store_true", help="one model")
    args = parser.parse_args()
    if shutil.which("c++") is None and "CXX" not in os.environ:
        print("equip: error: no C++ compiler was found; install one (Debian: apt install g++).", file=sys.stderr)
        return 1
    try:
        run(args.kind, args.quick)
    except (SanitizeError, upstream_tests.BuildError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
