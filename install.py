#!/usr/bin/env python3
"""Install EQUIP for llama.cpp into .venv beside this file, and run it once.

    python3 install.py [--with test]

Needs Python 3.10 or newer with pip, and a C++17 compiler; everything else is fetched. CMAKE_ARGS="-DGGML_CUDA=ON",
EQUIP_PORTABLE=1 and EQUIP_LLAMA_CPP_SOURCE reach the build (docs/building.md). A second run rebuilds what changed.
"""

import sys

# nothing above or below uses syntax that an older Python would trip over before it gets here
if sys.version_info < (3, 10):
    sys.exit(
        "EQUIP needs Python 3.10 or newer, this is %d.%d; run the command with a newer one." % sys.version_info[:2]
    )

import argparse
import os
import re
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
LOG = ROOT / "build" / "install.log"
START = time.monotonic()

sys.path.insert(0, str(ROOT / "tools"))

from build_steps import BuildSteps  # noqa: E402

STAGE = re.compile(r"\bequip: (?!error)(.*)")
ERROR = re.compile(r"\bequip: error: (.*)")


class InstallError(Exception):
    """One sentence for the user."""


def say(line: str) -> None:
    print(f"[{time.monotonic() - START:4.0f} s] {line}", flush=True)


def works(*command: str) -> bool:
    try:
        return subprocess.run([str(PYTHON), *command], capture_output=True).returncode == 0
    except OSError:
        return False


def make_venv() -> None:
    if works("-m", "pip", "--version"):
        say(f"environment: {VENV.name}")
        return
    say(f"environment: {VENV.name} (new)")
    clear = ["--clear"] if VENV.exists() else []
    if subprocess.run([sys.executable, "-m", "venv", *clear, str(VENV)], capture_output=True).returncode == 0:
        return
    # Debian ships venv without ensurepip: make the environment bare and let this Python's pip fill it
    remedy = "install it (Debian: apt install python3-venv) and run the command again"
    bare = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(VENV)]
    if subprocess.run(bare, capture_output=True).returncode != 0:
        raise InstallError(f"Python's venv module does not work here; {remedy}.")
    pip = [sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "--quiet", "pip"]
    if subprocess.run(pip, capture_output=True).returncode != 0 or not works("-m", "pip", "--version"):
        raise InstallError(f"Python's venv module cannot install pip; {remedy}.")


def install(extras: str) -> None:
    """pip, with its output in a log; the stages are shown, and how far the compiler is: off a terminal a line every so often."""
    LOG.parent.mkdir(exist_ok=True)
    target = f"{ROOT}[{extras}]" if extras else str(ROOT)
    command = [str(PYTHON), "-m", "pip", "install", "--verbose", "--disable-pip-version-check", target]
    errors: list[str] = []  # ours
    pip_errors: list[str] = []
    bar = sys.stdout.isatty()
    steps = BuildSteps((lambda line: None) if bar else say)
    say("install: build tools and dependencies, with pip")
    with LOG.open("w", encoding="utf-8") as log:
        pip = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
        )
        assert pip.stdout is not None
        for line in pip.stdout:
            log.write(line)
            error, stage, progress = ERROR.search(line), STAGE.search(line), steps.read(line)
            if error:
                errors.append(error[1].strip())
            elif line.strip().startswith("ERROR: "):
                pip_errors.append(line.strip()[7:].rstrip("."))
            elif stage:
                say(stage[1].strip())
            elif bar and progress:
                done, n = progress
                end = "\r" if done != n else "\n"
                print(f"[{time.monotonic() - START:4.0f} s] compiled {done} of {n}", end=end, flush=True)
        code = pip.wait()
    if code != 0:
        reason = next((line for line in pip_errors if "subprocess" not in line), f"code {code}")
        raise InstallError(errors[0] if errors else f"pip failed ({reason}); the rest is in {LOG}.")


def main() -> int:
    parser = argparse.ArgumentParser(description="Install EQUIP for llama.cpp into .venv, and run it once.")
    parser.add_argument("--with", dest="extras", default="", metavar="EXTRA", help="optional dependencies, e.g. test")
    args = parser.parse_args()
    try:
        make_venv()
        install(args.extras)
    except InstallError as error:
        print(f"equip: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    say("installed; a first run, past its budget, on the embedded model:")
    code = subprocess.run([str(BIN / "equip"), "demo"]).returncode
    if code != 0:
        print(f"equip: the first run failed with code {code}; run again: {BIN / 'equip'} demo", file=sys.stderr)
        return 1
    say(f"done; the commands are in {os.path.relpath(BIN)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
