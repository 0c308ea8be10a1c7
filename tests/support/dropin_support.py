"""Programs that were never written for a policy, run on our libllama: llama-cpp-python's interpreter, and HTTP servers."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from models import Spec
from native_api import library_folder
from upstream import cache_dir, fetch, load_pin
from upstream_tests import build, locked

SCENARIOS = ("dropin_scenarios.py", "dropin_refusals.py")
BUDGET = 256
POLICY = f"streaming:budget={BUDGET},sinks=4"
N_CTX = 32768
REMOVED = ("LLAMA_", "GGML_", "EQUIP_", "PYTHON", "CMAKE_", "SKBUILD_")  # of the tester's own environment


class ProgramError(AssertionError):
    """A program did not do its part; the message ends with what it wrote to stderr."""


# ---- model -----------------------------------------------------------------------------------------------------------


def spec(upstream_file: Callable[[str], Path], arch: str = "llama") -> Spec:
    """Random weights behind a tokenizer and a chat template of the real world."""
    shape = {"n_layer": 6, "n_head_kv": 2, "rope_base": 1e6} if arch == "gemma3" else {"n_layer": 3, "n_head_kv": 4}
    vocabulary = str(upstream_file("models/ggml-vocab-phi-3.gguf"))
    return Spec(arch, n_vocab=32064, n_ctx_train=N_CTX, dtype="q8_0", tokenizer=vocabulary, seed=21, **shape)


def kv_bytes(model: Spec) -> int:
    """f16 keys and values of one token, all layers."""
    return model.n_layer * 2 * 2 * model.n_head_kv * model.head_dim


# ---- the binding -----------------------------------------------------------------------------------------------------


def clean_environment(**settings: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(REMOVED)} | settings


def has_binding(python: Path) -> bool:
    """The pinned llama-cpp-python, its server's dependencies and what our own package needs can be imported there."""
    code = "import cffi, fastapi, uvicorn, pydantic_settings, sse_starlette, starlette_context, yaml, importlib.metadata as m; "
    code += "print(m.version('llama-cpp-python'))"
    result = subprocess.run([str(python), "-c", code], env=clean_environment(), capture_output=True, text=True)
    return result.returncode == 0 and result.stdout.strip() == load_pin().version


@cache
def binding_python() -> Path:
    """An interpreter with the binding: this one, or one that is set up once in the cache folder."""
    if has_binding(Path(sys.executable)):
        return Path(sys.executable)
    pin = load_pin()
    folder = cache_dir() / f"{pin.package}-{pin.version}-py{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        if not (folder / "done").is_file() or not has_binding(python):
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, with_pip=True)
            given = os.environ.get("EQUIP_LLAMA_CPP_SOURCE")
            source = Path(given) if given and Path(given).is_file() else None if given else fetch(pin)
            what = f"{source}[server]" if source else f"{pin.package}[server]=={pin.version}"
            env = clean_environment(CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF")
            command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", what, "cffi"]
            result = subprocess.run(command, env=env, capture_output=True, text=True)
            if result.returncode != 0:
                raise ProgramError(f"pip could not install {what}:\n{result.stderr[-2000:]}")
            (folder / "done").touch()
    return python


def binding_environment(policy: str = POLICY) -> dict[str, str]:
    return clean_environment(LLAMA_CPP_LIB_PATH=str(library_folder()), LLAMA_KV_POLICY=policy, PYTHONUTF8="1")


@dataclass(frozen=True)
class Outcome:
    result: dict[str, Any]
    stderr: str


def run_scenario(name: str, model: Path, policy: str = POLICY, **arguments: Any) -> Outcome:
    """Run a function of one of SCENARIOS in a process of its own."""
    files = [Path(__file__).with_name(file) for file in SCENARIOS]
    script = next(file for file in files if f"\ndef {name}(" in file.read_text(encoding="utf-8"))
    command = [str(binding_python()), str(script), name, str(model), json.dumps(arguments)]
    done = subprocess.run(command, env=binding_environment(policy), capture_output=True, text=True, timeout=250)
    if done.returncode != 0:
        raise ProgramError(f"{name} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    return Outcome(json.loads(done.stdout), done.stderr)


# ---- servers ---------------------------------------------------------------------------------------------------------


def server_program() -> Path:
    """llama-server of the patched tree; EQUIP_TEST_SERVER is a folder with one that is built already."""
    given = os.environ.get("EQUIP_TEST_SERVER")
    return (Path(given) if given else build("server")) / ("llama-server.exe" if os.name == "nt" else "llama-server")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str
    log_file: Path
    requests: list[str] = field(default_factory=list)

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def check(self) -> None:
        if self.process.poll() is not None:
            raise ProgramError(f"the server ended with code {self.process.returncode}:\n{self.log[-3000:]}")

    def call(self, path: str, body: Mapping[str, Any] | None = None, timeout: float = 120) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return dict(json.load(response))
        except urllib.error.HTTPError as error:
            self.check()
            raise ProgramError(f"{path}: {error.code} {error.read().decode()[:500]}\n{self.log[-3000:]}") from error
        except (OSError, urllib.error.URLError) as error:
            time.sleep(0.5)  # a process that aborts closes its socket first
            self.check()
            raise ProgramError(f"{path}: {error}\n{self.log[-3000:]}") from error


@contextmanager
def serve(command: Sequence[str], env: Mapping[str, str], ready: str, log_file: Path) -> Iterator[Server]:
    """Start a server, wait until GET `ready` answers, stop it at the end."""
    port = free_port()
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log_file)
    try:
        deadline = time.monotonic() + 120
        while True:
            server.check()
            try:
                urllib.request.urlopen(server.url + ready, timeout=5).close()
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ProgramError(f"the server does not answer ({error}):\n{server.log[-3000:]}") from error
                time.sleep(0.05)
        yield server
        server.check()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
