"""What the tests of models by name share: the list of models, and what the output of a command must be like."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import HubServer

POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and files")
CHUNK = 10 * 2**20  # what huggingface_hub writes at once
LARGE = random.Random(7).randbytes(2 * CHUNK + 4321)  # more than one chunk, or a cut leaves nothing to resume

LIST = """
# a comment
tiny       own/tiny-GGUF    tiny-Q8_0.gguf            llama  0.01  Test, 256   not checked
large      own/large-GGUF   large-Q4_K_M.gguf         llama  0.02  Test, 256   not checked  # another one
two-parts  own/split-GGUF   s-Q4_K_M-00001-of-00002.gguf  llama  0.01  Test, 256   not checked
stale      own/tiny-GGUF    renamed-Q8_0.gguf         llama  0.01  Test, 256   not checked
lost       own/lost-GGUF    lost.gguf                 llama  0.01  Test, 256   not checked
"""

Result = subprocess.CompletedProcess  # of text
Equip = Callable[..., "Result[str]"]
Several = Callable[..., "list[Result[str]]"]

SEVERAL = """
import contextlib, io, json, sys
from equip_cli.cli import main
results = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    results.append([arguments, code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def fetched(result: Result[str]) -> Path:
    """The one path on stdout of a pull that went well."""
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\n") and result.stdout.count("\n") == 1
    return Path(result.stdout[:-1])


def sentence(result: Result[str], code: int = 1) -> str:
    """The one sentence of a command that failed, with nothing of huggingface_hub's own around it."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert all(line.startswith(("error: ", "fetching ")) for line in lines), result.stderr
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


def interrupt(name: str, environment: dict[str, str], server: HubServer, has_arrived: Callable[[], bool]) -> None:
    """Stop `equip pull NAME` by Ctrl-C once `has_arrived()`, while the server stalls; it goes on afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "equip_cli", "pull", name],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a background job hands an ignored SIGINT on to its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 30
        while not has_arrived():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        server.go_on.set()
        server.stall_at = 0
    assert (process.returncode, out) == (130, b"") and b"Traceback" not in err


def files(home: Path) -> set[str]:
    """Names of the models in the cache."""
    return {path.name for path in home.glob("hub/models--*/snapshots/*/**/*.gguf")}


def blobs(home: Path) -> list[Path]:
    return [path for path in home.glob("hub/models--*/blobs/*")]
