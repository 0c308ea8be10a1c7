"""GGUF files of a real model's shape with random weights: for speed, demonstrations and tests, never for text."""

from __future__ import annotations

import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equip_cli.core.errors import EquipError
from equip_cli.core.memory import megabytes
from equip_cli.core.text import expand
from equip_cli.models import embedded, gguf_file
from equip_cli.models.gguf_file import GGML_TYPES, Tensor
from equip_cli.models.shapes import SHAPES, Shape, parse_shape
from equip_cli.terminal import output

if TYPE_CHECKING:
    import numpy as np

# part of the file name: raise it when the contents change
GENERATION = 2

# random weights follow no template; this one exists so that the code path does
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

_FILE_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 7}
_CHUNK = 1 << 22  # elements per piece, so that memory stays flat


def cache_folder() -> Path:
    """Where generated files go: EQUIP_CACHE_DIR, else the platform's place for caches.

    Raises EquipError where nobody knows the home folder.
    """
    override = os.environ.get("EQUIP_CACHE_DIR")
    if override:
        return expand(override)
    try:
        if sys.platform == "win32":
            base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = str(Path.home() / "Library" / "Caches")
        else:
            base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    except RuntimeError:
        raise EquipError("nobody knows the home folder: set HOME, or EQUIP_CACHE_DIR to a folder") from None
    return Path(base) / "equip"


def _matrix(tensor: Tensor, rng: np.random.Generator) -> Iterator[bytes]:
    """Weights with mean 0 and a standard deviation of 1/sqrt(row length), so that activations keep their size."""
    import numpy

    _, block, block_bytes = GGML_TYPES[tensor.kind]
    std = tensor.extents[0] ** -0.5
    left = tensor.extents[0] * tensor.extents[1]
    while left > 0:
        n = min(left, _CHUNK)
        left -= n
        if tensor.kind == "f16":
            yield (rng.standard_normal(n, dtype=numpy.float32) * std).astype(numpy.float16).tobytes()
            continue
        # a block is an f16 scale and uniformly random integers. The spread of those is 4.6 (4 bits) or 73.9 (8 bits);
        # their mean is -1/2, so the sign of the scale is random as well
        blocks = rng.integers(0, 256, (n // block, block_bytes), dtype=numpy.uint8)
        scale = numpy.float16(std / (4.61 if tensor.kind == "q4_0" else 73.9))
        signs = rng.integers(0, 2, n // block, dtype=numpy.uint8) << 7
        low, high = scale.tobytes()
        blocks[:, 0] = low
        blocks[:, 1] = high | signs
        yield blocks.tobytes()


def _tensor_data(tensor: Tensor, shape: Shape, seed: int) -> Iterator[bytes]:
    import numpy

    # a seed per tensor: the same tensor in any order, on any machine
    rng = numpy.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    if len(tensor.extents) > 1:
        yield from _matrix(tensor, rng)
    elif tensor.name == "rope_freqs.weight":
        yield numpy.array(shape.rope_factors(), numpy.float32).tobytes()
    elif tensor.name.endswith(".bias"):
        yield (rng.standard_normal(tensor.extents[0], dtype=numpy.float32) * 0.1).tobytes()
    else:
        yield numpy.ones(tensor.extents[0], numpy.float32).tobytes()


def _counted(tensor: Tensor, shape: Shape, seed: int, progress: output.Progress) -> Iterator[bytes]:
    for piece in _tensor_data(tensor, shape, seed):
        yield piece
        progress.advance(len(piece))


def write_random_gguf(path: Path, shape: Shape, kind: str, *, name: str, seed: int = 0) -> None:
    """Write the model to `path` through a temporary name in the same folder, then rename.

    kind: `f16`, `q8_0` or `q4_0`. The tokenizer is the embedded model's, with dummy tokens up to `shape.n_vocab`.
    Raises ModelFileError for the embedded model, EquipError if the disk is too small or cannot be written.
    """
    tokenizer = gguf_file.pad_tokenizer(gguf_file.read_metadata(embedded.MODEL, "tokenizer."), shape.n_vocab)
    metadata: dict[str, Any] = {
        "general.architecture": gguf_file.string(shape.arch),
        "general.name": gguf_file.string(f"random-{name}"),
        "general.file_type": gguf_file.u32(_FILE_TYPES[kind]),
        **shape.metadata(),
        **tokenizer,
        "tokenizer.chat_template": gguf_file.string(CHAT_TEMPLATE),
    }
    tensors = shape.tensors(kind)
    needed = sum(tensor.n_bytes for tensor in tensors)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    progress = output.Progress("making random weights", needed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < needed * 1.02:
            raise EquipError(
                f"{path.name} needs {megabytes(needed)} and {path.parent} has {megabytes(free)} free: "
                "make room or set EQUIP_CACHE_DIR"
            )
        with temporary.open("wb") as file:
            gguf_file.write(file, metadata, tensors, (_counted(tensor, shape, seed, progress) for tensor in tensors))
        temporary.replace(path)
    except OSError as error:
        raise EquipError(
            f"{path} cannot be written ({error.strerror}): set EQUIP_CACHE_DIR to another place"
        ) from error
    finally:
        progress.done()
        temporary.unlink(missing_ok=True)


def shape_file(text: str, default_type: str = "q4_0") -> Path:
    """The cached file of `NAME[:TYPE]`, written now if it is not there yet. Raises UsageError, EquipError."""
    name, kind = parse_shape(text, default_type)
    path = cache_folder() / "shapes" / f"{name}-{kind}-{GENERATION}.gguf"
    if not path.is_file():
        write_random_gguf(path, SHAPES[name], kind, name=name)
    return path
