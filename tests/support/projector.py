"""Tiny models that read images: a vision encoder with random weights (an mmproj file), and images for it."""

from __future__ import annotations

import base64
import struct
import zlib
from pathlib import Path

import gguf
import numpy as np
from gguf_copy import copy_metadata, finish

SIZE, PATCH = 32, 4  # of an image, in pixels; a token is a patch, or some patches that are merged


def write_projector(path: Path, kind: str, n_text: int, size: int = SIZE, seed: int = 1) -> Path:
    """An encoder of one layer for a text model with n_text embeddings. kind: what comes behind it, and with it how many tokens
    an image has and how the text model reads them:

    - mlp (LLaVA): (size / 4)^2 tokens, each with a position of its own, read as text is;
    - gemma3: (size / 8)^2 tokens that all see each other, so that an image is read in one chunk;
    - qwen2vl_merger: (size / 8)^2 tokens, with a row and a column as positions (M-RoPE).
    """
    rng, n_embd, n_ff = np.random.default_rng(seed), 32, 64
    tmp = path.with_suffix(".tmp")
    w = gguf.GGUFWriter(str(tmp), "clip")
    w.add_type(gguf.GGUFType.MMPROJ)
    w.add_bool("clip.has_vision_encoder", True)
    w.add_string("clip.projector_type", kind)
    w.add_bool("clip.use_gelu", True)
    for key, value in {
        "embedding_length": n_embd, "feed_forward_length": n_ff, "block_count": 1, "projection_dim": n_text,
        "image_size": size, "patch_size": PATCH, "attention.head_count": 2, "projector.scale_factor": 2,
    }.items():  # fmt: skip
        w.add_uint32(f"clip.vision.{key}", value)
    w.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    for key in ("image_mean", "image_std"):
        w.add_array(f"clip.vision.{key}", [0.5] * 3)

    def add(name: str, *shape: int, std: float = 0.0) -> None:
        data = rng.normal(0.0, std or 1.0 / np.sqrt(shape[-1]), shape)
        w.add_tensor(f"{name}.weight", data.astype(np.float32))

    def bias(name: str, n: int) -> None:
        w.add_tensor(f"{name}.bias", np.zeros(n, np.float32))

    def norm(name: str) -> None:
        w.add_tensor(f"{name}.weight", np.ones(n_embd, np.float32))
        bias(name, n_embd)

    add("v.patch_embd", n_embd, 3, PATCH, PATCH, std=0.1)
    if kind == "qwen2vl_merger":  # two images that follow each other are one in a video
        w.add_tensor("v.patch_embd.weight.1", rng.normal(0.0, 0.1, (n_embd, 3, PATCH, PATCH)).astype(np.float32))
    else:
        bias("v.patch_embd", n_embd)
        add("v.position_embd", (size // PATCH) ** 2, n_embd, std=0.5)
    for name in ("v.post_ln", "v.blk.0.ln1", "v.blk.0.ln2"):
        norm(name)
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        add(f"v.blk.0.{name}", n_embd, n_embd)
        bias(f"v.blk.0.{name}", n_embd)
    for name, rows, columns in (("ffn_up", n_ff, n_embd), ("ffn_down", n_embd, n_ff)):
        add(f"v.blk.0.{name}", rows, columns)
        bias(f"v.blk.0.{name}", rows)
    if kind == "gemma3":
        w.add_tensor("mm.soft_emb_norm.weight", np.ones(n_embd, np.float32))
        add("mm.input_projection", n_embd, n_text, std=1.0 / np.sqrt(n_embd))
    else:
        n_in = 4 * n_embd if kind == "qwen2vl_merger" else n_embd
        for name, rows, columns in (("mm.0", n_text, n_in), ("mm.2", n_text, n_text)):
            add(name, rows, columns)
            bias(name, rows)
    finish(w)
    return tmp.replace(path)


def write_qwen2vl(source: Path, target: Path, head_dim: int) -> Path:
    """A qwen2 file as qwen2vl, whose tokens have several positions each."""
    reader, half = gguf.GGUFReader(source), head_dim // 2
    writer = gguf.GGUFWriter(str(target), "qwen2vl")
    copy_metadata(reader, writer, rename=lambda name: name.replace("qwen2.", "qwen2vl.", 1))
    writer.add_rope_dimension_sections([half // 4, half // 4, half // 2, 0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    finish(writer)
    return target


def write_reranker(source: Path, target: Path, n_embd: int, seed: int = 7) -> Path:
    """A bert file with the head that makes one number of a text."""
    rng, reader = np.random.default_rng(seed), gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(target), "bert")
    copy_metadata(reader, writer, leave_out=["bert.pooling_type"])
    writer.add_pooling_type(gguf.PoolingType.RANK)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    for name, rows in (("cls", n_embd), ("cls.output", 1)):
        writer.add_tensor(f"{name}.weight", rng.normal(0.0, 1.0 / np.sqrt(n_embd), (rows, n_embd)).astype(np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(rows, np.float32))
    finish(writer)
    return target


def png(seed: int, size: int = SIZE) -> str:
    """An image of random pixels; another seed gives another one. Base64."""

    def part(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = np.random.default_rng(seed).integers(0, 256, (size, 3 * size), dtype=np.uint8)
    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    file = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", data) + part(b"IEND", b"")
    return base64.b64encode(file).decode()
