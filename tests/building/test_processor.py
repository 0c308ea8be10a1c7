"""Instruction sets: what a processor announces is tried before it is used, in the build and when the libraries are loaded.

EQUIP_PROBE_FAULT=NAME,.. makes a processor of any kind announce these sets and fault on them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import upstream_tests
from native_api import library_folder
from places import REPOSITORY
from test_build import configure

OWN = REPOSITORY / "native" / "ggml"
STUB = "amx,avx512bf16"

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64", "i686") or os.name == "nt",
    reason="instruction sets are tried on x86 processors, and not on Windows",
)


def installed() -> dict[str, Any]:
    """How the library under test was built."""
    path = library_folder() / "build.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def used_set() -> str:
    """One that the library under test was compiled for; its build names them, unless CMAKE_ARGS did."""
    sets = [name for name in installed().get("instruction_sets", []) if name != "amx"]  # which is left out alone
    return str(sets[-1]) if sets else "sse4.2"


def compile_program(to: Path, *args: object) -> Path:
    compiler = installed().get("cxx", "c++")
    command = [compiler if shutil.which(compiler) else "c++", "-std=c++17", *map(str, args), "-o", str(to)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return to


def run(*command: object, fault: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_")} | {"EQUIP_PROBE_FAULT": fault}
    return subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True, timeout=120, **options)


# ---- the probe ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, tuple[str, list[str]]]]:
    """What the program of the configure step prints: {set: (verdict, flags)}."""
    to = tmp_path_factory.mktemp("probe") / "probe"
    program = compile_program(to, "-DGGML_CPU_PROBE_MAIN", OWN / "ggml-cpu-probe.cpp")

    def call(fault: str = "", **options: Any) -> dict[str, tuple[str, list[str]]]:
        result = run(program, fault=fault, **options)
        assert (result.returncode, result.stderr) == (0, "")
        lines = [line.split() for line in result.stdout.splitlines()]
        return {name: (verdict, flags) for name, verdict, *flags in lines}

    return call


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs /proc/cpuinfo")
def test_what_the_kernel_lists_is_tried(probe: Any) -> None:
    flags = re.search(r"^flags\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert flags is not None
    listed = {word.replace("_", "") for word in flags[1].split()}
    aliases = {"sse4.2": "sse42", "lzcnt": "abm", "bmi": "bmi1", "amx": "amxtile"}
    tried = probe()
    for name in (
        "sse4.2",
        "popcnt",
        "bmi2",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512vbmi",
        "avx512bf16",
        "amx",
    ):
        if aliases.get(name, name) in listed:
            assert name in tried


def test_set_that_faults_is_left_out_with_what_needs_it(probe: Any) -> None:
    tried = probe("avx512f,amx,avx512bf16")
    assert tried["avx512f"] == ("faults", ["-mno-avx512f"])
    assert tried["amx"] == ("faults", ["-mno-amx-tile", "-mno-amx-int8"])
    assert all(verdict != "works" for name, (verdict, _) in tried.items() if name.startswith("avx512"))
    assert not any(flag.startswith("-mavx512") for _, flags in tried.values() for flag in flags)
    untouched = {name for name in tried if not name.startswith(("avx512", "amx"))}
    assert {name: tried[name] for name in untouched} == {name: v for name, v in probe().items() if name in untouched}


def test_verdicts_do_not_rest_on_the_programs_own_signals(probe: Any) -> None:
    """A program may ignore the end of its children, and handle or block what a fault raises."""

    def rough() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.signal(signal.SIGSEGV, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV, signal.SIGILL})

    assert probe(STUB, preexec_fn=rough) == probe(STUB)
    assert probe(STUB)["avx512bf16"][0] == "faults"


def test_no_core_is_written_for_a_child(probe: Any, tmp_path: Path) -> None:
    import resource

    def core() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)

    assert probe(STUB, preexec_fn=core, cwd=tmp_path)["amx"][0] == "faults"
    assert not list(tmp_path.iterdir())


# ---- the build ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """native/ configured, not built, on a processor whose AMX and bf16 fault: the folder, and what CMake said."""
    build = tmp_path_factory.mktemp("configured")
    options = ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DEQUIP_PORTABLE=OFF", "-DGGML_NATIVE=ON"]
    result = configure(REPOSITORY / "native", build, *options, EQUIP_PROBE_FAULT=STUB)
    assert result.returncode == 0, result.stdout + result.stderr
    return build, result.stdout


def flags_of(build: Path, source: str) -> list[str]:
    commands = json.loads((build / "compile_commands.json").read_text())
    return shlex.split(next(each["command"] for each in commands if each["file"].endswith(source)))


def test_build_leaves_out_what_faults_and_says_so(configured: tuple[Path, str]) -> None:
    build, said = configured
    assert re.findall(r"equip: processor: (.*)", said) == [
        "AVX512BF16 is announced by this processor but does not work: left out",
        "AMX is announced by this processor but does not work: left out",
    ]
    flags = flags_of(build, "ggml-cpu/ggml-cpu.c")
    for flag in ("-mno-amx-tile", "-mno-amx-int8", "-mno-avx512bf16"):
        assert flags.index(flag) > flags.index("-march=native")
    record = json.loads((build / "bin" / "build.json").read_text())
    assert record["left_out"] == ["avx512bf16", "amx"]
    assert not {"avx512bf16", "amx"} & set(record["instruction_sets"])


def test_what_looks_at_the_processor_runs_on_all_of_them(configured: tuple[Path, str]) -> None:
    for source in ("ggml/ggml-cpu-probe.cpp", "src/ggml-backend-reg.cpp", "equip-library.cpp"):
        assert not [flag for flag in flags_of(configured[0], source) if flag.startswith("-m")]


def test_moved_build_folder_is_compiled_again(tmp_path: Path) -> None:
    """-march=native alone is the same text on each machine, and nothing would be compiled again."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.21)\nproject(x C CXX)\nset(GGML_NATIVE ON)\nadd_library(x STATIC x.cpp)\n"
        f'include("{REPOSITORY}/native/cmake/processor.cmake")\nequip_use_what_works(x)\n'
        'file(WRITE "${CMAKE_BINARY_DIR}/out" "${EQUIP_CPU_SETS}")\n'
    )
    (tmp_path / "x.cpp").write_text("int x;\n")
    build = tmp_path / "build"
    seen = []
    for fault in ("popcnt", ""):
        result = configure(tmp_path, build, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", EQUIP_PROBE_FAULT=fault)
        assert result.returncode == 0, result.stderr
        seen.append(("popcnt" in (build / "out").read_text().split(";"), flags_of(build, "x.cpp")))
    assert [works for works, _ in seen] == [False, True]
    assert "-mno-popcnt" in seen[0][1]
    assert "-mpopcnt" in seen[1][1]


def test_reference_build_belongs_to_a_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(upstream_tests, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(upstream_tests, "run", lambda command, log: None)
    folders = set()
    for left_out in ([], ["amx"]):
        build = {"instruction_sets": ["avx"], "left_out": left_out}
        monkeypatch.setattr(upstream_tests, "installed_build", lambda build=build: build)
        folders.add(upstream_tests.build("pristine"))
    assert len(folders) == 2


@pytest.mark.parametrize(
    ("instruction", "lines"),
    [
        ("ldtilecfg", "_tile_loadconfig(bytes);"),
        ("tileloadd", "_tile_loadd(0, bytes, 64); bytes[63] = 0; _tile_stored(0, bytes, 64);"),
        ("tileloaddt1", "_tile_stream_loadd(0, bytes, 64); bytes[63] = 0; _tile_stored(0, bytes, 64);"),
    ],
)
def test_what_amx_reads_is_in_memory_before(
    configured: tuple[Path, str], tmp_path: Path, instruction: str, lines: str
) -> None:
    """GCC's optimiser may leave out stores to what its own header does not say that an instruction reads."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("AMX is of x86-64")
    (tmp_path / "x.cpp").write_text(
        "#include <immintrin.h>\n"
        "void f(unsigned char last) {\n"
        f"    alignas(64) unsigned char bytes[1024] = {{ 1 }};\n    bytes[63] = last;\n    {lines}\n}}\n"
    )
    flags = flags_of(configured[0], "ggml-cpu/amx/mmq.cpp")
    folders = [word for i, flag in enumerate(flags) if flag == "-isystem" for word in flags[i : i + 2]]
    options = ["-O3", "-mamx-tile", "-Wall", "-Wextra", "-Wpedantic", "-Werror", *folders, "-S"]
    text = compile_program(tmp_path / "x.s", *options, tmp_path / "x.cpp").read_text()
    before, found, _ = text.partition(instruction)
    assert found
    assert re.search(r"%(dil|edi)\b", before), text


def test_amx_computes_what_other_instructions_do(real_file: Callable[[str], Path]) -> None:
    """On quantised weights; both round activations, so each is compared with the same weights in f32."""
    if "amx" not in installed().get("instruction_sets", []):
        pytest.skip("the libraries were not built for a processor with AMX")
    code = (
        "import sys, numpy; from equip_cli import CachePolicy, Model\n"
        "with Model(sys.argv[1]) as model, model.session(CachePolicy('none'), n_ctx=256, n_threads=2) as session:\n"
        "    tokens = model.tokenize('It was a bright cold day in April, and the clocks were striking thirteen. ' * 4)\n"
        "    for part in (tokens[:33], tokens[33:64], tokens[64:65]):\n"
        "        session.eval(part)\n"
        "        sys.stdout.buffer.write(numpy.array(session.logits(), numpy.float32).tobytes())\n"
    )

    def logits(name: str, fault: str = "") -> np.ndarray:
        env = os.environ | {"EQUIP_PROBE_FAULT": fault}
        out = subprocess.run([sys.executable, "-c", code, real_file(name)], env=env, stdout=subprocess.PIPE, check=True)
        return np.frombuffer(out.stdout, np.float32).reshape(3, -1)

    exact = logits("smollm2-f32")
    amx, other = (np.sqrt(((logits("smollm2", fault) - exact) ** 2).mean()) for fault in ("", "amx"))
    assert amx != other
    assert amx < 2 * other


# ---- the choice at run time -----------------------------------------------------------------------------------------


def upstream_includes(tree: Path) -> list[str]:
    return [f"-I{tree / 'ggml' / folder}" for folder in ("include", "src", "src/ggml-cpu")] + [f"-I{OWN}"]


def ggml_base() -> list[str]:
    """The library under test that holds the probe."""
    return [f"-L{library_folder()}", "-lggml-base", f"-Wl,-rpath,{library_folder()}"]


def test_variant_that_needs_what_faults_is_not_chosen(configured: tuple[Path, str], tmp_path: Path) -> None:
    """A portable build's libraries, one per group of sets: each gives itself a score, and 0 is never loaded."""
    tree = configured[0] / "llama.cpp"
    (tmp_path / "main.cpp").write_text(
        '#include <cstdio>\nextern "C" int ggml_backend_score(void);\nint main() { std::printf("%d", ggml_backend_score()); }\n'
    )
    program = compile_program(
        tmp_path / "score",
        *("-DGGML_BACKEND_DL", "-DGGML_BACKEND_BUILD", "-DGGML_BACKEND_SHARED", "-DGGML_SSE42", "-msse4.2"),
        *upstream_includes(tree),
        *(tree / "ggml/src/ggml-cpu/arch/x86/cpu-feats.cpp", OWN / "ggml-cpu-probe-built.cpp", tmp_path / "main.cpp"),
        *ggml_base(),
    )
    scores = {fault: int(run(program, fault=fault).stdout) for fault in ("", "sse4.2", "amx,avx512bf16")}
    assert scores[""] > 0
    assert scores["sse4.2"] == 0
    assert scores["amx,avx512bf16"] == scores[""]


@pytest.mark.skipif(sys.platform != "linux", reason="upstream uses AMX on Linux")
def test_amx_that_faults_takes_no_weights(configured: tuple[Path, str], tmp_path: Path) -> None:
    """The kernel's permission, which is given here, is no proof."""
    tree = configured[0] / "llama.cpp"
    (tmp_path / "main.cpp").write_text(
        "#include <immintrin.h>\n"
        "#define __AMX_INT8__ 1\n#define __AVX512VNNI__ 1\n"
        f'#include "{tree}/ggml/src/ggml-cpu/amx/amx.cpp"\n'
        "size_t ggml_backend_amx_desired_wsize(const ggml_tensor *) { return 0; }\n"
        "size_t ggml_backend_amx_get_alloc_size(const ggml_tensor *) { return 0; }\n"
        "void ggml_backend_amx_convert_weight(ggml_tensor *, const void *, size_t, size_t) {}\n"
        "void ggml_backend_amx_mul_mat(const ggml_compute_params *, ggml_tensor *) {}\n"
        "ggml::cpu::tensor_traits::~tensor_traits() {}\n"
        "ggml::cpu::extra_buffer_type::~extra_buffer_type() {}\n"
        'extern "C" long syscall(long, ...) noexcept { return 0; }\n'
        'extern "C" ggml_backend_reg_t ggml_backend_cpu_reg(void) { return nullptr; }\n'
        'extern "C" ggml_backend_dev_t ggml_backend_reg_dev_get(ggml_backend_reg_t, size_t) { return nullptr; }\n'
        "int main() { return ggml_backend_amx_buffer_type() ? 1 : 0; }\n"
    )
    program = compile_program(tmp_path / "amx", *upstream_includes(tree), tmp_path / "main.cpp", *ggml_base())
    assert run(program, fault="amx").returncode == 0
    announced = "amx_tile" in Path("/proc/cpuinfo").read_text()
    if not announced:
        assert run(program).returncode == 1


# ---- the libraries --------------------------------------------------------------------------------------------------


def test_runs_without_what_faults_and_says_so(equip_bin: Path, tiny_model: Path) -> None:
    version = run(equip_bin, "--version", "-v", fault="amx")
    line = version.stdout.splitlines()[-1]
    assert re.fullmatch(r"instruction sets [\w., -]+; left out: .*\bamx \(does not work\).*", line), version.stderr
    assert not re.search(r"\bamx\b", line.split(";")[0])
    command = (equip_bin, "generate", "-t", 1, tiny_model, "-p", "Hello", "-n", 8, "--seed", 1, "--ignore-eos")
    result = run(*command, "-v", fault="amx")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("this processor announces amx, which does not work: what needs it is left out") == 1
    assert result.stdout == run(*command).stdout


def test_library_info_holds_what_is_used_and_left_out(equip_bin: Path) -> None:
    code = "import json; from equip_cli.core import native; print(json.dumps(native.load().info()))"
    about = json.loads(run(sys.executable, "-c", code, fault="amx").stdout)
    assert {"name": "amx", "reason": "does not work"} in about["left_out"]
    assert "amx" not in about["instruction_sets"]
    assert about["instruction_sets"] == [name.lower() for name in about["instruction_sets"]]


def test_build_of_another_processor_is_refused_in_one_sentence(equip_bin: Path, tiny_model: Path) -> None:
    command = (equip_bin, "generate", "-t", 1, tiny_model, "-p", "Hello", "-n", 4, "--ignore-eos")
    if installed().get("portable"):  # it has a variant for each processor
        assert run(*command, fault="sse4.2,avx2").returncode == 0
        return
    name = used_set()
    result = run(*command, fault=name)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"error: this build uses the instruction set {name}, which this processor announces but which does not "
        "work: run install.py again, or set EQUIP_PORTABLE=1 for a build that runs on any\n"
    )


def test_other_programs_get_a_sentence_in_place_of_a_crash(run_native: Any, tiny_model: Path, tmp_path: Path) -> None:
    """A program on llama.h that knows nothing of libequip."""
    if installed().get("portable"):
        return  # such a program loads the variant that works
    result = run_native("logits-dump", tiny_model, tmp_path / "out", EQUIP_PROBE_FAULT=used_set())
    assert result.returncode == 1
    assert f"this build uses the instruction set {used_set()}, which" in result.stderr


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="needs readelf")
def test_nothing_of_the_cpu_backend_runs_before_it_is_checked() -> None:
    """A constructor of the library would, with instructions that the processor may not have."""
    for path in library_folder().glob("libggml-cpu*.so"):
        sections = subprocess.run(["readelf", "-SW", str(path)], capture_output=True, text=True, check=True).stdout
        size = re.search(r"\.init_array\s+INIT_ARRAY\s+\w+\s+\w+\s+(\w+)", sections)
        assert size is not None
        assert int(size[1], 16) == 8, f"{path.name} has constructors beside the compiler's own"
