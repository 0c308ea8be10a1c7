"""A llama-server that runs as long as this process does: started, watched, and ended with it."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from equip_cli.core.errors import EquipError, UsageError
from equip_cli.serving import address, program, request_log
from equip_cli.terminal import output

_PATIENCE = 10.0  # seconds in which a server that was told to end may finish what it is at


def _ends_with_its_parent() -> Callable[[], None] | None:
    """What a child calls so that it ends if this process is killed; None where there is no such thing."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Server:
    """One llama-server. on_ready: called with its URL, and what its lanes keep, once it answers."""

    def __init__(
        self,
        path: Path,
        settings: program.Settings,
        environment: dict[str, str],
        on_ready: Callable[[str, request_log.Bounded], None],
        *,
        verbose: bool = False,
    ) -> None:
        self._settings, self._on_ready, self._verbose = settings, on_ready, verbose
        self._is_ready = False
        self._bounded = request_log.Bounded()
        self._refused: str | None = None  # why it does not start: the policy's sentence, or the server's
        self._wrong: str | None = None  # an argument that llama-server does not take
        self._lost_worker = False
        self._errors: list[str] = []
        # a group of its own: Ctrl-C is this process's, which passes it on once
        apart: dict[str, Any] = {"start_new_session": True, "preexec_fn": _ends_with_its_parent()}
        if sys.platform == "win32":
            apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        self._process = subprocess.Popen(
            [str(path), *program.arguments(settings)],
            env=program.environment(settings, environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            **apart,
        )

    def run(self) -> None:
        """Pass on what it says until it ends. Raises EquipError if it ends by itself; KeyboardInterrupt passes, and ends it."""
        lines = self._process.stdout
        assert lines is not None
        try:
            for line in lines:
                self._read(line.rstrip("\n"))
            code = self._process.wait()
        except BaseException:
            self._end(lines)
            raise
        raise self._why(code)

    def _read(self, line: str) -> None:
        if found := request_log.request(line):
            if self._verbose or not request_log.is_aside(found):
                output.note(request_log.sentence(found, time.strftime("%H:%M:%S")))
            return
        if self._verbose:
            output.note(line)
        self._lost_worker |= "Remote RPC server crashed" in line
        if line.startswith("LLAMA_KV_POLICY: "):
            self._refused = line.removeprefix("LLAMA_KV_POLICY: ")
        elif line.startswith("error: "):
            self._wrong = line.removeprefix("error: ")
        elif said := request_log.refusal(line):
            self._refused = said
        elif said := request_log.warning(line):
            output.warn(said)
        elif said := request_log.error(line):
            self._errors = [*self._errors, said][-20:]
        self._bounded = request_log.bounded(line) or self._bounded
        if not self._is_ready and (url := request_log.address(line)):
            self._is_ready = True
            self._errors.clear()
            self._on_ready(url, self._bounded)

    def _end(self, lines: IO[str]) -> None:
        """Tell it to end, wait, and make it end."""
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            # it may still have much to say, and would wait for a reader
            self._process.communicate(timeout=_PATIENCE)
        except BaseException:  # too long, or Ctrl-C once more
            self._process.kill()
            self._process.wait()
        finally:
            lines.close()

    def _why(self, code: int) -> EquipError:
        """Why it has ended by itself."""
        details = "" if self._verbose else "; -v shows its log"
        if self._lost_worker:
            return EquipError(
                "a worker of --rpc has ended, or the connection to it has: start it again, and then equip serve"
            )
        if self._refused:
            return EquipError(self._refused.rstrip("."))
        if self._wrong:
            return UsageError(
                f"llama-server does not take what stands behind -- ({self._wrong}): see llama-server --help"
            )
        if not self._is_ready:
            if any("bind HTTP server socket" in each for each in self._errors):
                return EquipError(address.taken(self._settings.host, self._settings.port))
            reason = self._errors[0] if self._errors else f"code {code}"
            return EquipError(f"llama-server could not start ({reason}){details}")
        how = f"signal {-code}" if code < 0 else f"code {code}"
        reason = f": {self._errors[-1]}" if self._errors else ""
        return EquipError(f"llama-server has ended by itself ({how}{reason}){details}")
