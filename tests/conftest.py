"""What the tests share: tiny models, the library under test, upstream's headers, and the native test programs."""

from __future__ import annotations

import os

# before numpy is loaded: threads of its BLAS that wait for each other cost the oracle more than they give on a busy machine
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hashlib
import importlib
import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from models import MODELS, Spec, write
from native_api import Library, Model, library_folder
from places import REPOSITORY

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_configure(config: pytest.Config) -> None:
    # OpenMP threads that spin turn a tiny model's milliseconds into seconds on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # also where the tests are started from another folder than the repository's
    for folder in ("tests/support", "tools", "native/cmake"):
        if str(REPOSITORY / folder) not in sys.path:
            sys.path.insert(0, str(REPOSITORY / folder))


# modules of the tier `quick`: each guards something that a change anywhere may break, in seconds
QUICK = {
    "test_architectures", "test_columns", "test_conversation", "test_fuzz", "test_house", "test_limits", "test_options",
    "test_oracle", "test_python_api", "test_position_rules", "test_words",
}  # fmt: skip
# what builds or fetches something beside the installed libraries
BUILT = {"pristine", "native_program", "run_native", "real_file", "load_real", "upstream_file"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        is_slow = any(item.get_closest_marker(name) for name in ("full", "real", "clients", "soak"))
        if item.path.stem in QUICK and not is_slow and not BUILT & set(getattr(item, "fixturenames", ())):
            item.add_marker("quick")


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Spec | str], Path]:
    """The GGUF of a spec (or of its name in MODELS), written once per run."""
    folder, made = tmp_path_factory.mktemp("models"), dict[Spec, Path]()

    def get(spec: Spec | str) -> Path:
        spec = MODELS[spec] if isinstance(spec, str) else spec
        if spec not in made:
            made[spec] = write(spec, folder / f"{len(made):02d}-{spec.arch}-{spec.dtype}.gguf")
        return made[spec]

    return get


@pytest.fixture(scope="session")
def library() -> Library:
    return Library()


@pytest.fixture(scope="session")
def load(library: Library, model_file: Callable[[Spec | str], Path]) -> Iterator[Callable[[Spec | str], Model]]:
    """A spec's model, loaded once per run."""
    loaded: dict[Path, Model] = {}

    def get(spec: Spec | str) -> Model:
        path = model_file(spec)
        if path not in loaded:
            loaded[path] = Model(library, path)
        return loaded[path]

    yield get
    for model in loaded.values():
        model.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama with a real tokenizer and a chat template: the package's own shape `tiny`."""
    from equip_cli.models.random_gguf import shape_file

    # the file is made in the cache folder; a copy of this run's own cannot change under it
    return Path(shutil.copy(shape_file("tiny:f16"), tmp_path_factory.mktemp("tiny-llama") / "tiny-llama.gguf"))


@pytest.fixture(scope="session")
def real_file() -> Callable[[str], Path]:
    """The file of a real model: `smollm2`, `gemma3`, or `smollm2-f32` with the weights of the first in f32.

    A test is skipped where the model cannot be fetched, and fails in CI.
    """
    import real_models

    def get(name: str) -> Path:
        try:
            return real_models.f32_copy() if name == "smollm2-f32" else real_models.path(name)
        except real_models.RealModelError as error:
            if os.environ.get("EQUIP_CI_FULL") == "1" or os.environ.get("CI") == "true":
                raise
            pytest.skip(str(error))

    return get


@pytest.fixture(scope="session")
def load_real(real_file: Callable[[str], Path]) -> Iterator[Callable[[str], Any]]:
    """A real model as the package's `Model`, loaded once per run."""
    from equip_cli import Model

    loaded: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in loaded:
            loaded[name] = Model(real_file(name), n_gpu_layers=0)
        return loaded[name]

    yield get
    for model in loaded.values():
        model.close()


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """The embedded model, where a test module does not define one of its own."""
    from equip_cli import Model
    from equip_cli.models import embedded

    with Model(embedded.MODEL) as loaded:
        yield loaded


@pytest.fixture
def session(model: Any) -> Iterator[Any]:
    """A bounded session of that model, where a test module does not define one of its own."""
    from equip_cli import CachePolicy

    with model.session(CachePolicy("streaming", 256), n_threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def prose(model: Any) -> list[int]:
    """Tokens of the package's prose."""
    from equip_cli.models import embedded

    return list(model.tokenize(embedded.prose()))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables of a command that keeps what it writes in this test's folder, and no word of how this terminal looks."""
    left_out = ("LLAMA_KV_POLICY", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")
    kept = {key: value for key, value in os.environ.items() if key not in left_out}
    return kept | {
        "EQUIP_STATE_DIR": str(tmp_path / "state"), "EQUIP_CACHE_DIR": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path / "hub"), "PYTHONIOENCODING": "utf-8",
    }  # fmt: skip


@pytest.fixture(scope="session")
def equip_bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command `equip` of this interpreter; a script that starts the module where it is not installed."""
    installed = Path(sysconfig.get_path("scripts")) / ("equip.exe" if os.name == "nt" else "equip")
    if installed.is_file():
        return installed
    script = tmp_path_factory.mktemp("bin") / "equip"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{REPOSITORY}" exec "{sys.executable}" -m equip_cli "$@"\n')
    script.chmod(0o755)
    return script


def only_one_of_us(folder: Path) -> AbstractContextManager[None]:
    """What processes of one test run must not do to a folder at the same time."""
    lock = importlib.import_module("upstream_tests").locked(folder.with_name(f"{folder.name}.lock"))
    assert isinstance(lock, AbstractContextManager)
    return lock


# ---- upstream --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def upstream_file(pytestconfig: pytest.Config) -> Callable[[str], Path]:
    """A file or folder of the pinned tree, unpatched: headers and vocabularies, unpacked once from the cached tarball."""
    import upstream

    given = os.environ.get("EQUIP_LLAMA_CPP_SOURCE")
    if given and Path(given).is_dir():
        root = Path(given)
    else:
        pin = upstream.load_pin()
        assert pytestconfig.cache is not None
        root = pytestconfig.cache.mkdir(f"upstream-2-{pin.sha256[:12]}")
        with only_one_of_us(root):
            if not (root / "done").exists():
                wanted = ("include/", "ggml/include/", "models/ggml-vocab-")
                files = upstream.tarball_files(Path(given) if given else upstream.fetch(pin), pin.folder)
                headers = ("ggml/src/", "ggml/src/ggml-cpu/")
                upstream.write_files(
                    (f for f in files if f[0].startswith(wanted) or (f[0].startswith(headers) and f[0].endswith(".h"))),
                    root,
                )
                (root / "done").touch()
    return lambda name: root / name


@pytest.fixture(scope="session")
def pristine() -> Path:
    """Folder of upstream's own libllama, built from the unpatched tree with the options of the library under test."""
    given = os.environ.get("EQUIP_PRISTINE_LIB")
    build: Any = (lambda _: given) if given else importlib.import_module("upstream_tests").build
    folder = Path(build("pristine"))
    found = next((f for f in (folder, folder / "bin", folder / "lib") if list(f.glob("*llama.*"))), None)
    assert found is not None, f"there is no libllama in {folder}"
    return found


# ---- native programs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def native_program(
    pytestconfig: pytest.Config, upstream_file: Callable[[str], Path]
) -> Callable[[str], tuple[Path, Path]]:
    """Build a program of native/tests; returns its path and the folder of the library that it was linked to."""
    assert pytestconfig.cache is not None
    library = library_folder()
    settings = {
        "LLAMA_INCLUDE": f"{upstream_file('include')};{REPOSITORY / 'native' / 'cache'}",
        "GGML_INCLUDE": str(upstream_file("ggml/include")),
        "GGML_SOURCE": str(upstream_file("ggml/src")),
        "LLAMA_LIB_DIR": str(library),
    }
    source = REPOSITORY / "native" / "tests"
    tool = importlib.import_module("upstream_tests").tool
    cmake, ninja = tool("cmake"), tool("ninja")
    assert cmake is not None, "cmake is missing; run: python3 install.py --with test"
    # a machine with a compiler need not have make; ninja comes as a Python package
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    key = hashlib.sha256(json.dumps([settings, str(source), *generator]).encode()).hexdigest()[:12]
    folder = pytestconfig.cache.mkdir(f"native-tests-{key}")
    configured: list[bool] = []

    def call(*args: str) -> None:
        result = subprocess.run([cmake, *args], capture_output=True, text=True)
        assert result.returncode == 0, f"cmake {' '.join(args)} failed:\n{result.stdout[-4000:]}{result.stderr[-4000:]}"

    def build(name: str) -> tuple[Path, Path]:
        with only_one_of_us(folder):
            if not configured:
                definitions = [f"-D{key}={value}" for key, value in settings.items()]
                call(
                    "-S", str(source), "-B", str(folder), *generator, "-DCMAKE_BUILD_TYPE=RelWithDebInfo", *definitions
                )
                configured.append(True)
            call("--build", str(folder), "--target", name, "--config", "RelWithDebInfo")
        found = [p for p in folder.rglob(f"{name}*") if p.is_file() and p.stem == name and os.access(p, os.X_OK)]
        assert found, f"{name} was built, but is not in {folder}"
        return found[0], library

    return build


@pytest.fixture(scope="session")
def run_native(native_program: Callable[[str], tuple[Path, Path]]) -> Run:
    """run_native(name, *args, library=FOLDER): run a native test program on that build of libllama (default: ours), with
    these variables in its environment."""

    def run(
        name: str, *args: object, library: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        program, ours = native_program(name)
        folder = library or ours
        # what chooses a device stays (tests/backends)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "GGML_")) or k.startswith("GGML_VK_")}
        path = {"darwin": "DYLD_LIBRARY_PATH", "win32": "PATH"}.get(sys.platform, "LD_LIBRARY_PATH")
        env[path] = os.pathsep.join([str(folder), env.get(path, "")]).rstrip(os.pathsep)
        env["EQUIP_TEST_LIB_DIR"] = str(folder)
        env.setdefault("OMP_WAIT_POLICY", "passive")  # two threads that spin take minutes beside another busy program
        env.setdefault("EQUIP_TEST_THREADS", "1")  # and two that sleep wait for each other at every node of a graph
        return subprocess.run(
            [str(program), *map(str, args)], env=env | variables, capture_output=True, text=True, timeout=250
        )

    return run
