"""Fixtures of the tests of models by name: a hub with some models, a home for its cache, the command in a process.

A test module takes them with `pytest_plugins = ("hub_fixtures",)`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from hub_support import LARGE, LIST, SEVERAL, Equip, Result, Several

import equip_cli


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[HubServer]:
    tiny = tiny_model.read_bytes()
    server = HubServer(
        repos={
            "own/tiny-GGUF": {"README.md": b"hello", "tiny-Q8_0.gguf": tiny},
            "own/large-GGUF": {"large-Q4_K_M.gguf": LARGE},
            "own/split-GGUF": {f"s-Q4_K_M-0000{i}-of-00002.gguf": b"part %d" % i for i in (2, 1)},
            "own/many-GGUF": {
                "README.md": b"hello",
                "BF16/many-BF16-00001-of-00002.gguf": b"bf16, 1",
                "BF16/many-BF16-00002-of-00002.gguf": b"bf16, 2",
                "imatrix-Q4_K_M.gguf": b"imatrix",
                "many-IQ4_0.gguf": b"iq4_0",
                "many-Q4_0.gguf": b"q4_0",
                "many-UD-Q4_K_XL.gguf": b"q4_k_xl",
                "mmproj-Q4_K_M.gguf": b"mmproj",
                "z-q4_k_m.gguf": b"q4_k_m",
            },
            "own/first-GGUF": {"b-IQ2_M.gguf": b"iq2_m", "a-Q6_K.gguf": b"q6_k"},
            "own/no-GGUF": {"model.safetensors": b"weights", "mmproj-F16.gguf": b"mmproj"},
        }
    )
    yield server
    server.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """HF_HOME, with the list of models beside it."""
    (tmp_path / "models.txt").write_text(LIST, encoding="utf-8")
    return tmp_path / "hf"


@pytest.fixture
def hub_environment(hub: HubServer, home: Path) -> dict[str, str]:
    dropped = (
        "HF_",
        "HUGGING",
        "TRANSFORMERS_",
        "XDG_CACHE",
        "LLAMA_KV",
        "EQUIP_",
        "PIP_",
        "SSL_",
        "REQUESTS_",
        "CURL_",
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped) and not k.lower().endswith("_proxy")}
    return kept | {
        "HF_HOME": str(home),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "EQUIP_MODELS_FILE": str(home.with_name("models.txt")),
        "EQUIP_CACHE_DIR": str(home.with_name("cache")),
        "PIP_CONFIG_FILE": os.devnull,
        "PYTHONPATH": str(Path(equip_cli.__file__).parents[1]),
        "PYTHONIOENCODING": "utf-8",
    }


@pytest.fixture
def equip(hub_environment: dict[str, str]) -> Equip:
    def run(*args: object, code: str = "", env: dict[str, str] | None = None) -> Result[str]:
        """`equip ARGS` of the package under test, in its own process; `code` runs there first."""
        start = f"{code}\nimport sys\nfrom equip_cli.cli import main\nsys.exit(main(sys.argv[1:]))"
        return subprocess.run(
            [sys.executable, "-c", start, *map(str, args)],
            env=hub_environment | (env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )

    return run


@pytest.fixture
def several(hub_environment: dict[str, str]) -> Several:
    def run(*commands: str, env: dict[str, str] | None = None) -> list[Result[str]]:
        """Commands in one process, one after the other: to start one takes longer than what it does here."""
        process = subprocess.run(
            [sys.executable, "-c", SEVERAL, json.dumps([command.split() for command in commands])],
            env=hub_environment | (env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )
        assert (process.returncode, process.stderr) == (0, "")
        return [Result(*result) for result in json.loads(process.stdout)]

    return run
