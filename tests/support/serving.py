"""`equip serve` as a test runs it: the command, the server behind it, and what it says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dropin_support import ProgramError, Server, clean_environment
from native_api import library_folder

import equip_cli
from equip_cli.core.errors import BackendError
from equip_cli.serving import program

READY = re.compile(r"^ready: (http://\S+)/v1 serves (\S+); ", re.MULTILINE)


def need_program() -> None:
    """Skips the test where the libraries under test were built without the server."""
    try:
        program.find()
    except BackendError as error:
        pytest.skip(str(error))


def command(*arguments: object) -> list[str]:
    """`equip serve` of this source tree."""
    return [sys.executable, "-m", "equip_cli", "serve", *map(str, arguments)]


def environment(**settings: str) -> dict[str, str]:
    """The command finds this package and the libraries under test."""
    places = {"PYTHONPATH": str(Path(equip_cli.__file__).parents[1]), "EQUIP_LIB_PATH": str(library_folder())}
    return clean_environment(**places | {"OMP_WAIT_POLICY": "passive"} | settings)


@dataclass
class Served(Server):
    """A server that `equip serve` has started; `process` is the command."""

    def post(self, path: str, body: Mapping[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and answer, of an error too."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, dict(json.load(response))
        except urllib.error.HTTPError as error:
            return error.code, dict(json.load(error))

    def events(self, path: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The JSON of each event of a streamed answer."""
        request = urllib.request.Request(
            self.url + path, json.dumps({**body, "stream": True}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            lines = [line.decode().strip() for line in response]
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [json.loads(each) for each in data if each != "[DONE]"]

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=120) as response:
            return str(response.read().decode())

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The log is written after the answer is sent."""
        return wait_for(self.log_file, pattern, self)

    def end(self, how: signal.Signals) -> int:
        """The exit code of the command after this signal."""
        self.process.send_signal(how)
        return self.process.wait(30)


def wait_for(log: Path, pattern: str, server: Server, seconds: float = 120) -> re.Match[str]:
    """What matches in the log, once it is there."""
    deadline = time.monotonic() + seconds
    while True:
        found = re.search(pattern, log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if found:
            return found
        server.check()
        if time.monotonic() > deadline:
            raise ProgramError(f"no {pattern!r} in:\n{server.log[-3000:]}")
        time.sleep(0.05)


@contextmanager
def equip_serve(log: Path, *arguments: object, **settings: str) -> Iterator[Served]:
    """Start `equip serve` on a free port, wait until it is ready, end it. What stands behind `--` comes last."""
    words = list(map(str, arguments))
    at = words.index("--") if "--" in words else len(words)
    words[at:at] = ["--port", "0", "-t", "1"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command(*words),
            env=environment(**settings),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    served = Served(process, "", log)
    try:
        served.url = wait_for(log, READY.pattern, served)[1]
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM if os.name != "nt" else signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
