"""Model files for tools/fuzz.py: tiny models, read into keys and tensors, and written with whatever they claim by then."""

from __future__ import annotations

import math
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from models import MODELS, Spec, write

STRING, ARRAY = 8, 9
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOATS = (6, 12)


@dataclass
class Tensor:
    name: str
    dims: list[int]  # as in the file: the fastest first
    type: int
    offset: int
    data: bytes


@dataclass
class Value:
    type: int
    data: Any  # of an array: a list of `sub`
    sub: int = 0


@dataclass
class File:
    """A GGUF; `pack` writes what it claims, also where that makes no sense."""

    keys: dict[str, Value] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    more: list[tuple[str, Value]] = field(default_factory=list)  # keys that are there twice, or have no name

    @property
    def arch(self) -> str:
        value = self.keys.get("general.architecture")
        return str(value.data) if value else ""

    def pack(self) -> bytes:
        head = struct.pack("<4sIqq", b"GGUF", 3, len(self.tensors), len(self.keys) + len(self.more))
        for key, value in [*self.keys.items(), *self.more]:
            head += _text(key) + struct.pack("<I", value.type)
            head += _scalar(value.type, value.data) if value.type != ARRAY else _array(value)
        for t in self.tensors:
            head += _text(t.name) + struct.pack("<I", len(t.dims))
            head += b"".join(struct.pack("<q", _wrap(n, 64)) for n in t.dims)
            head += struct.pack("<IQ", t.type & 0xFFFFFFFF, t.offset % (1 << 64))
        head += bytes(-len(head) % 32)
        return head + b"".join(t.data + bytes(-len(t.data) % 32) for t in self.tensors)


def _wrap(value: int, bits: int) -> int:
    return (int(value) + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))


def _text(text: Any) -> bytes:
    raw = text if isinstance(text, bytes) else str(text).encode("latin-1", "replace")
    return struct.pack("<Q", len(raw)) + raw


def _scalar(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _text(value)
    code = FORMATS[kind]
    if kind in FLOATS:
        try:
            return struct.pack("<" + code, float(value))
        except (OverflowError, ValueError):
            return struct.pack("<" + code, math.nan)
    if kind == 7:
        return struct.pack("<B", int(bool(value)))
    try:
        raw = int(value) % (1 << (8 * struct.calcsize(code)))
    except (OverflowError, ValueError):
        raw = 0
    return struct.pack("<" + code.upper(), raw)


def _array(value: Value) -> bytes:
    return struct.pack("<IQ", value.sub, len(value.data)) + b"".join(_scalar(value.sub, v) for v in value.data)


def read(path: Path) -> File:
    reader, file = gguf.GGUFReader(path), File()
    for f in reader.fields.values():
        if f.name.startswith("GGUF."):
            continue
        if f.types[0] == gguf.GGUFValueType.ARRAY:
            file.keys[f.name] = Value(ARRAY, list(f.contents()), int(f.types[-1]))
        else:
            file.keys[f.name] = Value(int(f.types[0]), f.contents())
    offset = 0
    for t in reader.tensors:
        data = bytes(np.ascontiguousarray(t.data).data)
        file.tensors.append(Tensor(t.name, [int(n) for n in t.shape], int(t.tensor_type), offset, data))
        offset += len(data) + -len(data) % 32
    return file


# ---- the tiny models -------------------------------------------------------------------------------------------------


def _built(arch: str, numbers: dict[str, Any], tensors: dict[str, tuple[int, ...]], n_vocab: int = 64) -> File:
    """A model that tests/support/models.py does not make; shapes as in the file, the fastest dimension first."""
    rng, file, offset = np.random.default_rng(7), File(), 0
    file.keys["general.architecture"] = Value(STRING, arch)
    file.keys["tokenizer.ggml.model"] = Value(STRING, "no_vocab")
    for key, value in (numbers | {"context_length": 256, "vocab_size": n_vocab}).items():
        if isinstance(value, list):
            file.keys[f"{arch}.{key}"] = Value(ARRAY, value, 5)
        else:
            file.keys[f"{arch}.{key}"] = Value(6 if isinstance(value, float) else 4, value)
    for name, dims in tensors.items():
        values = np.abs(rng.normal(0, 0.2, dims)) * (-1 if "ssm_a" in name else 1)
        data = values.astype(np.float32).tobytes()
        file.tensors.append(Tensor(name, list(dims), 0, offset, data))
        offset += len(data) + -len(data) % 32
    return file


def lfm2() -> File:
    """Hybrid: layers 0 and 2 keep a short convolution's state, layer 1 a KV cache."""
    d, ff, conv = 64, 96, 3
    numbers = {"embedding_length": d, "block_count": 3, "feed_forward_length": ff, "shortconv.l_cache": conv}
    numbers |= {
        "attention.head_count": 2,
        "attention.head_count_kv": [0, 1, 0],
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    numbers |= {"rope.freq_base": 10000.0}
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (d, 64), "token_embd_norm.weight": (d,)}
    for il in range(3):
        p = f"blk.{il}."
        tensors |= {p + "ffn_norm.weight": (d,), p + "attn_norm.weight": (d,), p + "ffn_gate.weight": (d, ff)}
        tensors |= {p + "ffn_down.weight": (ff, d), p + "ffn_up.weight": (d, ff)}
        if il == 1:
            tensors |= {p + "attn_q_norm.weight": (32,), p + "attn_k_norm.weight": (32,), p + "attn_q.weight": (d, d)}
            tensors |= {p + "attn_k.weight": (d, 32), p + "attn_v.weight": (d, 32), p + "attn_output.weight": (d, d)}
        else:
            tensors |= {p + "shortconv.conv.weight": (conv, d), p + "shortconv.in_proj.weight": (d, 3 * d)}
            tensors |= {p + "shortconv.out_proj.weight": (d, d)}
    return _built("lfm2", numbers, tensors)


def mamba() -> File:
    """Recurrent: no KV cache at all."""
    d, inner, state, conv, rank = 32, 64, 8, 4, 4
    numbers = {"embedding_length": d, "block_count": 2, "feed_forward_length": 0, "attention.head_count": 0}
    numbers |= {"ssm.conv_kernel": conv, "ssm.inner_size": inner, "ssm.state_size": state, "ssm.time_step_rank": rank}
    numbers |= {"attention.layer_norm_rms_epsilon": 1e-5}
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (d, 64), "output_norm.weight": (d,)}
    for il in range(2):
        p = f"blk.{il}."
        tensors |= {p + "attn_norm.weight": (d,), p + "ssm_in.weight": (d, 2 * inner)}
        tensors |= {p + "ssm_conv1d.weight": (conv, inner), p + "ssm_conv1d.bias": (inner,)}
        tensors |= {p + "ssm_x.weight": (inner, rank + 2 * state), p + "ssm_dt.weight": (rank, inner)}
        tensors |= {p + "ssm_dt.bias": (inner,), p + "ssm_a": (state, inner), p + "ssm_d": (inner,)}
        tensors |= {p + "ssm_out.weight": (inner, d)}
    return _built("mamba", numbers, tensors)


def bases(folder: Path) -> dict[str, File]:
    """The models whose files are mutated, by name."""
    small: dict[str, Any] = {"n_embd": 64, "head_dim": 32, "n_ff": 64}
    specs = {name: MODELS[name] for name in ("gemma3", "gemma2", "smollm3")}
    specs |= {"llama": Spec(**small), "llama-text": Spec(tokenizer="bytes", n_vocab=320, **small)}
    specs |= {
        "llama-q8_0": Spec(dtype="q8_0", **small),
        "qwen2": Spec("qwen2", rope_base=1e6, **(small | {"n_embd": 128})),
    }
    specs |= {"gpt-oss": Spec("gpt-oss", n_layer=4, swa_period=0, **small)}
    found = {name: read(write(spec, folder / f"{name}.gguf")) for name, spec in specs.items()}
    return found | {"lfm2": lfm2(), "mamba": mamba()}
