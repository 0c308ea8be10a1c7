"""The little of the GGUF format that the random-weight files need: copy a tokenizer, write tensors as a stream.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; little-endian, version 3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from equip_cli.core.errors import ModelFileError

ALIGNMENT = 32

# value types
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, U32: 4, I32: 4, F32: 4, BOOL: 1, 10: 8, 11: 8, 12: 8}

# tensor types: number, elements per block, bytes per block
GGML_TYPES: dict[str, tuple[int, int, int]] = {
    "f32": (0, 1, 4),
    "f16": (1, 1, 2),
    "q4_0": (2, 32, 18),
    "q8_0": (8, 32, 34),
}


@dataclass(frozen=True)
class Value:
    """A metadata value as it stands in a file: its type and its bytes."""

    kind: int
    data: bytes


def u32(value: int) -> Value:
    """An unsigned integer."""
    return Value(U32, struct.pack("<I", value))


def f32(value: float) -> Value:
    """A float."""
    return Value(F32, struct.pack("<f", value))


def string(value: str) -> Value:
    """A text."""
    return Value(STRING, _string(value))


def _string(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _array(kind: int, n: int, payload: bytes) -> Value:
    return Value(ARRAY, struct.pack("<IQ", kind, n) + payload)


@dataclass(frozen=True)
class Tensor:
    """Name, extents in ggml's order (ne[0] is the row length), and type of one tensor."""

    name: str
    extents: tuple[int, ...]
    kind: str

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor's data."""
        _, block, block_bytes = GGML_TYPES[self.kind]
        n = 1
        for extent in self.extents:
            n *= extent
        return n // block * block_bytes


def _skip(data: bytes, kind: int, at: int) -> int:
    """Offset behind the value of type `kind` that begins at `at`."""
    if kind == STRING:
        (n,) = struct.unpack_from("<Q", data, at)
        return at + 8 + int(n)
    if kind == ARRAY:
        element, n = struct.unpack_from("<IQ", data, at)
        at += 12
        if element in _SIZES:
            return at + _SIZES[element] * int(n)
        for _ in range(n):
            at = _skip(data, element, at)
        return at
    return at + _SIZES[kind]


def read_metadata(path: Path, prefix: str) -> dict[str, Value]:
    """The metadata whose key begins with `prefix`, byte for byte. Raises ModelFileError."""
    try:
        data = path.read_bytes()
        magic, version, _, n_kv = struct.unpack_from("<4sIQQ", data, 0)
        if magic != b"GGUF" or version < 2:
            raise ValueError("no GGUF file of version 2 or later")
        at, found = 24, {}
        for _ in range(n_kv):
            end = _skip(data, STRING, at)
            key = data[at + 8 : end].decode()
            (kind,) = struct.unpack_from("<I", data, end)
            begin = end + 4
            at = _skip(data, kind, begin)
            if key.startswith(prefix):
                found[key] = Value(kind, data[begin:at])
        return found
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ModelFileError(f"{path} cannot be read as a vocabulary ({error}): reinstall equip-llama") from error


def pad_tokenizer(tokenizer: dict[str, Value], n_vocab: int) -> dict[str, Value]:
    """The same tokenizer with dummy tokens behind its own, `n_vocab` in all.

    A vocabulary of the real size makes the output layer cost what it costs in the real model. No text is split into dummy
    tokens, since no part of one is a token; a model with random weights samples them, and their text is printed.
    """
    padded = dict(tokenizer)
    tokens = tokenizer["tokenizer.ggml.tokens"].data
    n_own = int(struct.unpack_from("<IQ", tokens)[1])
    n_more = n_vocab - n_own
    if n_more < 0:
        raise ValueError(f"the vocabulary has {n_own} tokens, more than {n_vocab}")
    more = b"".join(_string(f"<{n_own + i}>") for i in range(n_more))
    padded["tokenizer.ggml.tokens"] = _array(STRING, n_vocab, tokens[12:] + more)
    for key, kind, filler in (
        ("tokenizer.ggml.scores", F32, struct.pack("<f", -1e4)),
        ("tokenizer.ggml.token_type", I32, struct.pack("<i", 1)),  # 1: normal
    ):
        if key in tokenizer:
            padded[key] = _array(kind, n_vocab, tokenizer[key].data[12:] + filler * n_more)
    return padded


def write(file: BinaryIO, metadata: dict[str, Value], tensors: list[Tensor], data: Iterable[Iterator[bytes]]) -> None:
    """Write a whole file. `data` gives one iterator of byte strings per tensor, in the order of `tensors`."""
    file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        file.write(_string(key) + struct.pack("<I", value.kind) + value.data)
    offset = 0
    for tensor in tensors:
        file.write(_string(tensor.name) + struct.pack("<I", len(tensor.extents)))
        file.write(struct.pack(f"<{len(tensor.extents)}Q", *tensor.extents))
        file.write(struct.pack("<IQ", GGML_TYPES[tensor.kind][0], offset))
        offset += -(-tensor.n_bytes // ALIGNMENT) * ALIGNMENT
    file.write(bytes(-file.tell() % ALIGNMENT))
    for pieces in data:
        for piece in pieces:
            file.write(piece)
        file.write(bytes(-file.tell() % ALIGNMENT))
